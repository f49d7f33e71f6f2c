# SPDX-License-Identifier: Apache-2.0
"""A run of a recipe, and what is measured of its model: the work of `ipg train` and `ipg evaluate`."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import datasets
import numpy as np
from transformers import AutoImageProcessor, PrinterCallback, ProgressCallback, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from . import report
from .baselines.stages import change_last_layer, check_last_layer, first_errors, repeat_errors
from .checkpoints import newest_checkpoint
from .config import IPGConfig
from .data import Benchmark, describe
from .hub.publish import check_can_push
from .metrics import GroupErrors, GroupMetrics
from .models import load_image_classifier
from .pairs import AdversarialPairs, ImageRows, with_counterparts
from .pairs.checks import named_sets
from .recipe import Recipe, RecipeError
from .record import commit as commit_of_code
from .record import course, data_facts, hardware, hub_id, versions, write_json
from .task import row_columns
from .trainer import IPGTrainer

RECORD = "run.json"
FIGURE = "training_curves.png"
ERRORS = "first_model_errors.json"


def train(recipe: Recipe, args: IPGConfig, given: dict[str, Any], *, commit: str | None = None) -> dict[str, Any]:
    """Trains by a recipe, and its twin where asked for; pushes where asked for; returns the run record.

    Args:
        recipe: what to train on what.
        args: how.
        given: the settings that were given, for the record.
        commit: of the code that is imported; by default it is read now.
    """
    commit = commit or commit_of_code()
    if args.push_to_hub and args.process_index == 0:
        check_can_push(args)  # before another run is removed, and before hours of training
    given = {name: value for name, value in given.items() if not name.endswith("_token")}
    resume = _prepare_output(recipe, args)
    data = recipe.load_data(args.data_order_seed)
    record, trainer = _train_one(recipe, args, given, data, resume, commit)
    split = "test" if recipe.measure_test else "validation"
    columns = {recipe.method: record["metrics"][split]}
    if recipe.compare == "erm" and recipe.method != "erm":
        folder = Path(args.output_dir) / "erm"  # pushed with the folder that it lies in
        twin_args = replace(args, output_dir=str(folder), resume_from_checkpoint=None, push_to_hub=False)
        twin = replace(recipe, method="erm", compare="none")
        begun = resume and list(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
        twin_resume = newest_checkpoint(folder) if begun else None
        twin_record, _ = _train_one(twin, twin_args, {**given, "method": "erm"}, data, twin_resume, commit)
        columns["erm"] = twin_record["metrics"][split]
    if args.process_index == 0:
        print(f"\n{report.summary_table(columns, split)}\n\nmodel, {RECORD}, README.md and {FIGURE}: {args.output_dir}")
    trainer.create_model_card(license=recipe.license)
    pushed = trainer.push_to_hub(license=recipe.license) if args.push_to_hub else None
    if pushed:
        print(f"pushed to {pushed.repo_url}")
    return record


def _train_one(
    recipe: Recipe, args: IPGConfig, given: dict, data: Benchmark, resume: str | None, commit: str | None
) -> tuple[dict, IPGTrainer]:
    """Returns the record and the trainer."""
    processor = recipe.build_processor()
    in_batch = recipe.method == "ipg" and args.pair_source == "batch"
    if in_batch:
        data = replace(data, train=_with_counterparts(recipe, data), pairs=None)
    elif args.pair_source == "batch":
        args = replace(args, pair_source="pairs")
    sets = _inputs(data, recipe, processor, ("label", *row_columns(args.objective)), recipe.uses_pairs and not in_batch)
    begun, comparisons = time.monotonic(), {}
    if recipe.repeat_errors:
        sets["train"], comparisons["repeat_errors"] = _with_errors_repeated(recipe, args, data, sets, processor, resume)
    seconds = time.monotonic() - begun
    set_seed(args.seed)  # the weights of a model from scratch
    model = recipe.build_model(data.train)
    trainer = IPGTrainer(
        model=model,
        args=args,
        train_dataset=sets["train"],
        eval_dataset=sets["validation"],
        pair_dataset=sets["pairs"] if recipe.method == "ipg" and not in_batch else None,
        processing_class=processor,
        compute_metrics=_metrics(data),
    )
    _silence(trainer)
    if recipe.last_layer:
        check_last_layer(recipe.last_layer, trainer, sets, data.validation)
    begun = time.monotonic()
    trainer.train(resume_from_checkpoint=resume)
    if trainer.state.global_step < trainer.state.max_steps:  # SIGTERM, enable_jit_checkpoint: nothing to measure yet
        raise KeyboardInterrupt
    if recipe.last_layer:
        comparisons["last_layer"], sets = change_last_layer(recipe.last_layer, trainer, sets, data.validation)
    seconds += time.monotonic() - begun
    splits = ("validation", "test") if recipe.measure_test else ("validation",)
    metrics = {name: _measure(trainer, sets, name) for name in splits}
    record = {
        "config": given,
        "seed": args.seed,
        "method": recipe.method,
        "metrics": metrics,
        "chosen_step": trainer.state.best_global_step or trainer.state.global_step,
        "steps": trainer.state.global_step,
        "course": course(trainer.state.log_history),
        "seconds": round(seconds, 1),
        "versions": versions(),
        "commit": commit,
        "hardware": hardware(),
        "base_model": hub_id(recipe.model_name_or_path),
        "about": {**asdict(describe(recipe.dataset, recipe.dataset_options)), **recipe.about},
        "data": data_facts(trainer),
        **comparisons,
    }
    trainer.save_whole()
    if trainer.is_world_process_zero():
        processor.save_pretrained(args.output_dir)
        trainer.state.save_to_json(str(Path(args.output_dir) / "trainer_state.json"))
        write_json(Path(args.output_dir) / RECORD, record)
        threshold = args.invariance_threshold
        report.plot_training(trainer.state.log_history, Path(args.output_dir) / FIGURE, threshold)
    trainer.run_record = record
    return record, trainer


def _with_errors_repeated(
    recipe: Recipe, args: IPGConfig, data: Benchmark, sets: dict, processor: Any, resume: str | None
) -> tuple[Any, dict]:
    """The training set with the first model's errors repeated, and what the record keeps of it."""
    if not isinstance(data.train.features["label"], datasets.ClassLabel):
        raise RecipeError(f"repeat_errors counts wrong classes, but the labels of {recipe.dataset} are numbers.")
    path, settings = Path(args.output_dir) / ERRORS, recipe.repeat_errors
    if resume and path.is_file():  # the training goes on with the rows that it began with
        wrong = np.isin(np.arange(len(data.train)), json.loads(path.read_text(encoding="utf-8"))["rows"])
    else:
        set_seed(args.seed)
        first, labels = recipe.build_model(data.train), np.asarray(data.train["label"][:])
        wrong = first_errors(first, args, sets["train"], labels, processor, steps=settings["steps"])
        if args.process_index == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"rows": np.flatnonzero(wrong).tolist()})
    repeated = repeat_errors(sets["train"], wrong, settings["factor"])
    return repeated, {"errors": int(wrong.sum()), **settings, "rows": len(repeated)}


def evaluate(name: str, recipe: Recipe, args: IPGConfig, split: str, output: str | None) -> dict[str, float]:
    """Measures a saved model on a split of a recipe's data, prints the tables and returns the metrics."""
    data = recipe.load_data(args.data_order_seed)
    model, processor = load_trained(name, recipe, data)
    # nothing is trained or saved; the folder is one that exists, since Trainer makes it
    unsaved = {"save_strategy": "no", "load_best_model_at_end": False, "push_to_hub": False}
    args = replace(args, eval_strategy="no", output_dir=gettempdir(), **unsaved)
    trainer = IPGTrainer(model=model, args=args, processing_class=processor, compute_metrics=_metrics(data))
    _silence(trainer)
    metrics = _measure(trainer, {split: getattr(data, split), f"{split}_pairs": getattr(data, f"{split}_pairs")}, split)
    if args.process_index == 0:
        print(f"\n{report.summary_table({Path(name).name: metrics}, split)}\n")
        print(f"{report.group_table(metrics)}\n\n{recipe.dataset}, drawn with seed {args.data_order_seed}")
        if output:
            write_json(output, {"model": name, "split": split, "dataset": recipe.dataset, "metrics": metrics})
    return metrics


def load_trained(name: str, recipe: Recipe, data: Benchmark) -> tuple[Any, Any]:
    """A saved model and its image processor, for the labels of a benchmark."""
    model = load_image_classifier(name)
    names = getattr(data.train.features["label"], "names", ["a number"])
    if model.config.num_labels != len(names):
        raise RecipeError(f"{name} has {model.config.num_labels} labels, {recipe.dataset} has {len(names)}: {names}.")
    return model, AutoImageProcessor.from_pretrained(name)


def _prepare_output(recipe: Recipe, args: IPGConfig) -> str | None:
    """Looks at what the output folder holds; returns the checkpoint to go on from.

    Raises:
        RecipeError: it holds another run, and neither a resume nor overwriting is asked for.
        ValueError: there is nothing to go on from.
    """
    folder = Path(args.output_dir)
    if args.resume_from_checkpoint:
        if args.resume_from_checkpoint.lower() not in ("last", "true"):
            return args.resume_from_checkpoint
        return newest_checkpoint(folder)
    held = [path for path in _run_files(folder) if path.exists()]
    if held and not recipe.overwrite_output_dir:
        raise RecipeError(
            f"{folder} holds another run ({held[0].name}). Go on with it by --resume_from_checkpoint last, replace it "
            "by --overwrite_output_dir true, or choose another --output_dir."
        )
    if args.process_index == 0:
        for path in held:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return None


def _run_files(folder: Path) -> list[Path]:
    names = [RECORD, FIGURE, "trainer_state.json", "config.json", "model.safetensors", ERRORS, "erm"]
    return [*folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), *(folder / name for name in names)]


def _with_counterparts(recipe: Recipe, data: Benchmark) -> datasets.Dataset:
    if recipe.last_layer.get("method") == "project":
        raise RecipeError("last_layer: project reads a set of pairs: set pair_source: pairs.")
    if not isinstance(data.pairs, datasets.Dataset):
        has = "no pairs" if data.pairs is None else "several sets, or pairs that are made in training"
        raise RecipeError(
            f"pair_source: batch takes one set of pairs of the training images; {recipe.dataset} has {has}."
        )
    return with_counterparts(data.train, data.pairs)


def _inputs(data: Benchmark, recipe: Recipe, processor: Any, keep: Sequence[str], uses_pairs: bool) -> dict[str, Any]:
    names = ["train", "validation", "pairs", "validation_pairs"]
    names += ["test", "test_pairs"] if recipe.measure_test else []
    sets = {name: getattr(data, name) for name in names}
    if uses_pairs and sets["pairs"] is None:
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

    used = {name: loaded(value) for name, value in sets.items() if name != "pairs" or uses_pairs}
    if isinstance(used.get("pairs"), AdversarialPairs):
        used["pairs"] = replace(used["pairs"], source=used["train"])
    return sets | used


def _metrics(data: Benchmark) -> GroupMetrics | GroupErrors:
    is_class = isinstance(data.train.features["label"], datasets.ClassLabel)
    return GroupMetrics(train_dataset=data.train) if is_class else GroupErrors(data.train)


def _silence(trainer: IPGTrainer) -> None:
    """A table follows: no line for every log."""
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback):
        trainer.add_callback(_Bar)


def _measure(trainer: IPGTrainer, sets: dict[str, Any], split: str) -> dict[str, float]:
    metrics = trainer.evaluate(sets[split], metric_key_prefix=split)
    held_out = sets[f"{split}_pairs"]
    for name, pairs in named_sets(held_out).items():
        if pairs is not None:
            metrics |= trainer.evaluate_pairs(pairs, metric_key_prefix=f"{split}_{name}/" if name else split)
    if isinstance(held_out, dict):
        metrics[f"{split}_flip_rate"] = max(metrics[f"{split}_{name}/_flip_rate"] for name in held_out)
    timings = ("_runtime", "_per_second", "_preparation_time")
    return {
        key.removeprefix(f"{split}_").replace("/_", "/"): value
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
