# SPDX-License-Identifier: Apache-2.0
"""A run of a recipe, and what is measured of its model: the work of `ipg train` and `ipg evaluate`."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import datasets
from transformers import AutoConfig, AutoImageProcessor, PrinterCallback, ProgressCallback, TrainerCallback, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from . import report
from .baselines import METHODS
from .baselines.jtt import ERRORS
from .checkpoints import newest_checkpoint
from .config import IPGConfig, chooses_by_pairs
from .data import Benchmark, describe
from .hub.publish import check_can_push
from .metrics import OF_PAIRS, GroupErrors, GroupMetrics, metric_of
from .models import check_image_size, load_trained_classifier
from .names import nearest
from .pairs import AdversarialPairs, ImageRows
from .pairs.checks import ONLY_SET, named_sets
from .pairs.classes import model_names, order_of_base, order_of_model
from .pairs.held_out import hold_out_pairs
from .recipe import Recipe, RecipeError
from .record import check_place, hub_id, make_record, resolved_settings, write_json
from .record import commit as current_commit
from .trainer import IPGTrainer

RECORD = "run.json"
FIGURE = "training_curves.png"
# what a run writes over in its output folder, beside its checkpoints and a card of ipg_hf
RUN_FILES = [RECORD, FIGURE, ERRORS, "trainer_state.json", "config.json", "model.safetensors"]
RUN_FILES += ["preprocessor_config.json", "training_args.json", "training_args.bin"]


# of mallopt(3): setting, number, value
KEEP_MEMORY = (("MALLOC_MMAP_MAX_", -4, 0), ("MALLOC_TRIM_THRESHOLD_", -1, 2**31 - 1), ("MALLOC_TOP_PAD_", -2, 2**28))


def keep_memory() -> None:
    """Lets the C library keep the memory of large tensors, for steps on a CPU.

    glibc gives it back to the system and asks for it anew at each step, which zeroes every page of it (measured:
    recipes/speed). What the user has set in the environment stays; other C libraries are left alone.
    """
    if platform.libc_ver()[0] == "glibc":
        for name, number, value in KEEP_MEMORY:
            if name not in os.environ:
                ctypes.CDLL(None).mallopt(number, value)


def train(
    recipe: Recipe,
    args: IPGConfig,
    given: Sequence[str],
    *,
    commit: str | None = None,
    data: Benchmark | None = None,
) -> dict[str, Any]:
    """Trains by a recipe, and pushes where asked for.

    Args:
        recipe: data, model and method.
        args: the training settings, an instance of the method's config.
        given: names of the settings that the user gave, for the record.
        commit: commit of the code that is imported; by default it is read now.
        data: the benchmark to train on; by default the recipe loads it.

    Returns:
        The run record.
    """
    commit = commit or current_commit()
    if args.push_to_hub and args.process_index == 0:
        check_can_push(args)  # before another run is removed, and before hours of training
    resume, replaced = _look_at_output(recipe, args)
    splits = ("validation", "test") if recipe.measure_test else ("validation",)
    data = data or recipe.load_data(args.data_order_seed, with_pairs=recipe.uses_pairs, held_out=splits)
    data = _in_order_of_base(data, recipe.model_name_or_path)
    if chooses_by_pairs(args) and data.validation_pairs is None and recipe.uses_pairs:
        data = _with_held_out(data, args.data_order_seed)
    record, trainer = _train_one(recipe, args, given, data, resume, commit, replaced)
    split = "test" if recipe.measure_test else "validation"
    columns = {recipe.method: record["metrics"][split]}
    if recipe.compare == "erm" and recipe.method != "erm":
        folder = Path(args.output_dir) / "erm"  # pushed with the folder that it lies in
        plain = _without_method(args, recipe.method, str(folder))
        begun = resume and list(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
        its_resume = newest_checkpoint(folder) if begun else None
        recipe_of_erm = replace(recipe, method="erm", compare="none")
        erm_record, _ = _train_one(recipe_of_erm, plain, given, data, its_resume, commit)
        columns["erm"] = erm_record["metrics"][split]
    if args.process_index == 0:
        print(f"\n{report.summary_table(columns, split)}\n\nmodel, {RECORD}, README.md and {FIGURE}: {args.output_dir}")
    trainer.create_model_card(license=recipe.license)
    pushed = trainer.push_to_hub(license=recipe.license) if args.push_to_hub else None
    if pushed:
        print(f"pushed to {pushed.repo_url}")
    return record


def _with_held_out(data: Benchmark, seed: int) -> Benchmark:
    """The benchmark with a part of its training pairs held out, for this training and for a plain one beside it."""
    split = {name: hold_out_pairs(pairs, name, seed=seed) for name, pairs in named_sets(data.pairs).items()}
    parts = [{name: both[side] for name, both in split.items()} for side in (0, 1)]
    if not isinstance(data.pairs, dict):
        parts = [part[ONLY_SET] for part in parts]
    return replace(data, pairs=parts[0], validation_pairs=parts[1])


def _in_order_of_base(data: Benchmark, base: str | None) -> Benchmark:
    """The benchmark with its classes numbered as those of the model that is fine-tuned, if that has the same ones."""
    if base is None or data.label_names is None:
        return data
    try:
        config = AutoConfig.from_pretrained(base)
    except OSError:
        return data  # loading the model says what is wrong
    return data.with_labels(order_of_base(data.label_names, config, base))


def _without_method(args: IPGConfig, method: str, output_dir: str) -> IPGConfig:
    """The training settings without those of a baseline, for plain training or an evaluation in another folder."""
    names = [entry.name for entry in fields(IPGConfig) if entry.init and entry.name not in METHODS[method].settings]
    settings = {name: getattr(args, name) for name in names}
    settings |= {"output_dir": output_dir, "resume_from_checkpoint": None, "push_to_hub": False}
    return IPGConfig(**settings)


def _train_one(
    recipe: Recipe,
    args: IPGConfig,
    given: Sequence[str],
    data: Benchmark,
    resume: str | None,
    commit: str | None,
    replaced: Sequence[Path] = (),
) -> tuple[dict, IPGTrainer]:
    """Returns the record and the trainer; the files `replaced` are removed when the training has begun."""
    _check_best_metric(args, data)
    if args.device.type == "cpu":
        keep_memory()
    method, processor = METHODS[recipe.method], recipe.build_processor()
    set_seed(args.seed)  # the weights of a model from scratch
    model = recipe.build_model(data.train)
    check_image_size(model, processor)
    sets = _inputs(data, recipe, processor, ("label", *method.trainer.row_columns))
    trainer = method.trainer(
        model=model,
        args=args,
        train_dataset=sets["train"],
        eval_dataset=sets["validation"],
        processing_class=processor,
        compute_metrics=_metrics(data),
        eval_pair_dataset=sets["validation_pairs"] if chooses_by_pairs(args) else None,
        **({"pair_dataset": sets["pairs"]} if recipe.uses_pairs else {}),
    )
    _silence(trainer)
    if replaced and trainer.is_world_process_zero():
        trainer.add_callback(_Removal(replaced))
    begun = time.monotonic()
    trainer.train(resume_from_checkpoint=resume)
    if trainer.state.global_step < trainer.state.max_steps:  # SIGTERM, enable_jit_checkpoint: nothing to measure yet
        raise KeyboardInterrupt
    seconds = time.monotonic() - begun
    # before anything is measured: an image of the test set that cannot be read must not cost the model
    trainer.save_whole()
    if trainer.is_world_process_zero():
        processor.save_pretrained(args.output_dir)
    if trainer.eval_dataset is not sets["validation"]:  # dfr has fitted some of its rows, and images of its pairs
        sets |= {"validation": trainer.eval_dataset, "validation_pairs": None}
    splits = ("validation", "test") if recipe.measure_test else ("validation",)
    try:
        metrics = {name: _measure(trainer, sets, name) for name in splits}
    except Exception as failure:
        failure.add_note(
            f"The trained model is saved in {args.output_dir}: mend the data, and measure it: ipg evaluate."
        )
        raise
    record = make_record(
        trainer,
        settings=resolved_settings(recipe, args),
        metrics=metrics,
        seconds=seconds,
        method=recipe.method,
        given=given,
        commit=commit,
        base_model=hub_id(recipe.model_name_or_path),
        about={**asdict(describe(recipe.dataset, recipe.dataset_options)), **recipe.about},
        baseline=trainer.method_facts,
    )
    if trainer.is_world_process_zero():
        trainer.state.save_to_json(str(Path(args.output_dir) / "trainer_state.json"))
        write_json(Path(args.output_dir) / RECORD, record)
        threshold = args.invariance_threshold
        report.plot_training(trainer.state.log_history, Path(args.output_dir) / FIGURE, threshold)
    trainer.run_record = record
    return record, trainer


def evaluate(name: str, recipe: Recipe, args: IPGConfig, split: str, output: str | None) -> dict[str, float]:
    """Measures a saved model on a split of a recipe's data, prints the tables and returns the metrics.

    Args:
        name: folder or Hub id of the model.
        recipe: the data to measure on.
        args: settings of the evaluation, such as the batch size, and the seed that the data are drawn with.
        split: `"validation"` or `"test"`.
        output: path of a JSON file to write the metrics to, or `None`.

    Raises:
        FileExistsError: there is a file `output` already.
    """
    if output:
        refuse_existing(output)
    data = recipe.load_data(args.data_order_seed, with_pairs=False, held_out=())
    model, processor = load_trained(name, recipe, data)
    data = data.with_labels(model_names(model.config) or data.label_names)
    # nothing is trained or saved; the folder is one that exists, since Trainer makes it
    unsaved = {"save_strategy": "no", "load_best_model_at_end": False, "eval_strategy": "no"}
    # the other objectives count the groups of a training set
    unsaved |= {"metric_for_best_model": None, "greater_is_better": None, "objective": "erm"}
    args = replace(_without_method(args, recipe.method, gettempdir()), **unsaved)
    trainer = IPGTrainer(model=model, args=args, processing_class=processor, compute_metrics=_metrics(data))
    _silence(trainer)
    metrics = _measure(trainer, {split: getattr(data, split), f"{split}_pairs": getattr(data, f"{split}_pairs")}, split)
    if args.process_index == 0:
        tables = [report.summary_table({Path(name).name: metrics}, split), report.group_table(metrics)]
        tables.append(f"{recipe.dataset}, drawn with seed {args.data_order_seed}")
        print("\n" + "\n\n".join(filter(None, tables)))
        if output:
            write_json(output, {"model": name, "split": split, "dataset": recipe.dataset, "metrics": metrics})
    return metrics


def refuse_existing(path: str | os.PathLike) -> None:
    """Raises an OSError if there is a file of that name, or one where its folder would be."""
    check_place(path)
    if Path(path).exists():
        raise FileExistsError(f"{path} exists, and is not replaced: remove it, or name another file by --output.")


def load_trained(name: str, recipe: Recipe, data: Benchmark) -> tuple[Any, Any]:
    """A saved model and its image processor, for the labels of a benchmark.

    Raises:
        ValueError: the model does not have the classes of the benchmark.
    """
    model = load_trained_classifier(name)
    if data.label_names is not None:
        order_of_model(data.label_names, model.config, name)
    elif model.config.num_labels != 1:
        raise RecipeError(f"{name} has {model.config.num_labels} labels, but those of {recipe.dataset} are numbers.")
    processor = AutoImageProcessor.from_pretrained(name)
    check_image_size(model, processor)
    return model, processor


def _look_at_output(recipe: Recipe, args: IPGConfig) -> tuple[str | None, list[Path]]:
    """Looks at what the output folder holds.

    Returns:
        The checkpoint to go on from, and the files of another run that are to be removed.

    Raises:
        RecipeError: the folder holds another run, and neither a resume nor overwriting is asked for; or there is no
            such checkpoint.
        ValueError: there is nothing to go on from.
    """
    folder, resume = Path(args.output_dir), args.resume_from_checkpoint
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"output_dir={args.output_dir!r} is a file: name a folder.")
    if resume and resume.lower() in ("last", "true"):
        return newest_checkpoint(folder), []
    if resume and not Path(resume).is_dir():
        raise RecipeError(f"resume_from_checkpoint={resume!r} is no folder: name a checkpoint of a run, or 'last'.")
    if resume and Path(resume).resolve().parent == folder.resolve():
        return resume, []
    held = _run_files(folder)
    if held and not recipe.overwrite_output_dir:
        raise RecipeError(
            f"{folder} holds another run ({held[0].name}). Go on with it by --resume_from_checkpoint last, replace it "
            "by --overwrite_output_dir true, or choose another --output_dir."
        )
    # jtt writes its errors anew before its own training
    return resume, [path for path in held if recipe.method != "jtt" or path.name != ERRORS]


def _run_files(folder: Path) -> list[Path]:
    """The files and folders of a run that a folder holds."""
    checkpoints = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdigit()]
    files = [path for path in (folder / name for name in RUN_FILES) if path.exists()]
    beside = folder / "erm"  # which may also be a folder of somebody's own
    return [*checkpoints, *files, *([beside] if beside.is_dir() and _run_files(beside) else [])]


class _Removal(TrainerCallback):
    """Removes the files of another run after the first optimizer step, when all that is checked has been."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = [*paths]

    def on_step_end(self, args, state, control, **kwargs):
        while self.paths:
            path = self.paths.pop()
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _inputs(data: Benchmark, recipe: Recipe, processor: Any, keep: Sequence[str]) -> dict[str, Any]:
    """The sets of a benchmark that a run reads, by name; transformed and in memory with `preload`."""
    names = ["train", "validation", "validation_pairs", *(["pairs"] if recipe.uses_pairs else [])]
    names += ["test", "test_pairs"] if recipe.measure_test else []
    sets = {name: getattr(data, name) for name in names}
    if recipe.uses_pairs and sets["pairs"] is None:
        raise RecipeError(f"{recipe.dataset} has no training pairs of its own: give a maker, pairs: {{maker: ...}}.")
    if not recipe.preload:
        return sets
    inputs = {f"image{side}": f"pixel_values{side}" for side in ("", "_a", "_b")}

    def loaded(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: loaded(part) for name, part in value.items()}
        if not isinstance(value, datasets.Dataset):
            return value
        columns = {name: target for name, target in inputs.items() if name in value.column_names}
        return ImageRows(value, processor, columns, keep=keep, preload=True, preload_dir=recipe.preload_dir)

    sets = {name: loaded(value) for name, value in sets.items()}
    if isinstance(sets.get("pairs"), AdversarialPairs):
        sets["pairs"] = replace(sets["pairs"], source=sets["train"])
    return sets


def _metrics(data: Benchmark) -> GroupMetrics | GroupErrors:
    if data.label_names is None:
        return GroupErrors(data.train)
    is_stored = isinstance(data.train, datasets.Dataset)  # of a stream the sizes of groups are not known
    metrics = GroupMetrics(train_dataset=data.train if is_stored else data.validation)
    if not is_stored:
        metrics.settings["train_group_counts"] = None
    if data.attribute_names is not None:  # the training set may lack the attribute, which training does not read
        metrics.settings |= {"attribute_names": data.attribute_names, "num_attributes": len(data.attribute_names)}
    return metrics


def _silence(trainer: IPGTrainer) -> None:
    """A table follows: no line for every log."""
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback):
        trainer.add_callback(_Bar)


def _check_best_metric(args: IPGConfig, data: Benchmark) -> None:
    """Raises a RecipeError if no evaluation of a run has the metric that chooses its checkpoint."""
    key, columns = args.metric_for_best_model, data.validation.column_names
    if key is None or columns is None or args.eval_strategy == "no":  # a stream may not know its columns
        return
    name = metric_of(key) or key.removeprefix("eval_")
    measured = ["loss", "accuracy"] if data.label_names is not None else ["loss", "mae"]
    groups = ["worst_group_accuracy", "adjusted_accuracy"] if data.label_names is not None else ["worst_group_mae"]
    measured += groups if "attribute" in columns else []
    other = {"difference"} if data.label_names is not None else {"flip_rate", "pair_accuracy"}
    measured += [metric for metric in OF_PAIRS if metric not in other] if data.validation_pairs is not None else []
    if name not in measured:
        why = " It needs a column attribute in the validation set." if name in groups else nearest(name, measured)
        raise RecipeError(f"metric_for_best_model={key!r} is not measured here.{why} Measured: {', '.join(measured)}.")


def _measure(trainer: IPGTrainer, sets: dict[str, Any], split: str) -> dict[str, float]:
    metrics = trainer.evaluate(sets[split], metric_key_prefix=split)
    if sets[f"{split}_pairs"] is not None:
        metrics |= trainer.evaluate_pair_sets(sets[f"{split}_pairs"], split)
    timings = ("_runtime", "_per_second", "_preparation_time")
    return {
        key.removeprefix(f"{split}_"): value
        for key, value in metrics.items()
        if key.startswith(f"{split}_") and not key.endswith(timings)
    }


class _Bar(ProgressCallback):
    """The progress bar, with the figures that matter beside it instead of a line for every log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or logs is None:
            return
        shown = {"loss": "loss", "ipg/distance": "d", "ipg/divergence": "c", "eval_worst_group_accuracy": "worst group"}
        figures = {title: f"{logs[key]:.3g}" for key, title in shown.items() if key in logs}
        self._figures = {**getattr(self, "_figures", {}), **figures}
        self.training_bar.set_postfix(self._figures, refresh=False)
