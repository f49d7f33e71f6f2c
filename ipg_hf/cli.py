# SPDX-License-Identifier: Apache-2.0
"""The command line: `ipg train`, `ipg evaluate`, `ipg pairs`, `ipg card` and `ipg heads`."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import datasets
from transformers import AutoImageProcessor, PrinterCallback, ProgressCallback, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from . import report
from .audit import audit, named_models
from .audit_page import audit_table, check_folder, write_report
from .checkpoints import newest_checkpoint
from .config import IPGConfig
from .data import ABOUT, Benchmark, describe
from .metrics import GroupErrors, GroupMetrics
from .model_card import model_card
from .models import load_image_classifier
from .pairs import AdversarialPairs, ImageRows
from .pairs.checks import named_sets
from .pairs.linter import check_pairs, format_findings
from .pairs.preview import preview_pairs
from .pairs.scores import score_pairs
from .publish import check_can_push
from .recipe import Recipe, RecipeError, parse_recipe, settings_help
from .record import data_facts, hub_id
from .survey import survey
from .trainer import IPGTrainer

logger = logging.get_logger(__name__)

RECORD = "run.json"
FIGURE = "training_curves.png"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, 1 for bad pairs, 2 for a usage error, 130 for an interrupt."""
    parser = argparse.ArgumentParser(
        prog="ipg",
        description="Train image classifiers that ignore a spurious attribute, from pairs of images.",
        epilog="Every setting of a recipe is a flag too: --key value wins over the file.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    texts = {
        "train": "train by a recipe",
        "evaluate": "measure a model on a recipe's data",
        "pairs": "check or show a recipe's training pairs",
    }
    for name, text in texts.items():
        command = commands.add_parser(
            name, help=text, allow_abbrev=False, epilog=settings_help(), formatter_class=argparse.RawTextHelpFormatter
        )
        if name == "evaluate":
            command.add_argument("model", help="a folder made by ipg train, or any Hub id")
            command.add_argument("--split", choices=["validation", "test"], default="test")
            command.add_argument("--against", metavar="OTHER", help="with --report: a second model to stand beside it")
            written = command.add_mutually_exclusive_group()
            written.add_argument("--output", help="write the metrics to this JSON file")
            written.add_argument(
                "--report", metavar="DIR", help="write an audit to this folder: a page and its numbers"
            )
        if name == "pairs":
            command.add_argument("action", choices=["check", "preview"])
            command.add_argument("--model", help="a folder or Hub id, whose divergence on each pair is measured")
            command.add_argument(
                "--output", help="check: write the findings to this JSON file; preview: page and picture"
            )
            command.add_argument("--shown", type=int, default=24, help="pairs that a preview shows [24]")
        command.add_argument("--config", required=True, help="the recipe, a YAML file")
    heads = commands.add_parser("heads", help="show which classifier head is found in which model", allow_abbrev=False)
    heads.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="timm/NAME or a class of transformers, also with wildcards ('timm/vit_*', '*Swin*'), a folder or Hub id; "
        "without any, every class of transformers and every model of timm (minutes). Weights are random; of a Hub id "
        "only the config is fetched. A wildcard of timm proves which layers reach the logits, a name the numbers too.",
    )
    card = commands.add_parser("card", help="print the model card of a run", allow_abbrev=False)
    card.add_argument("run", help="a folder made by ipg train; its twin in the folder erm stands beside")
    card.add_argument("--name", help="of the model, a Hub id or a word; by default the folder's name")
    card.add_argument("--license", help="of the model, as the Hub spells it, e.g. apache-2.0")
    options, flags = parser.parse_known_args(argv)
    if options.command in ("heads", "card") and flags:
        commands.choices[options.command].error(f"unrecognized arguments: {' '.join(flags)}")
    try:
        if options.command == "card":
            print(card_of(options.run, options.name, options.license))
            return 0
        if options.command == "heads":
            show_heads(options.models)
            return 0
        recipe, args, given = parse_recipe(options.config, flags)
        if options.command == "pairs":
            return pairs(options, recipe, args)
        if options.command == "train":
            train(recipe, args, given)
        elif options.report or options.against:
            write_audit(options, recipe, args)
        else:
            evaluate(options.model, recipe, args, options.split, options.output)
    except (ValueError, OSError) as failure:
        print(f"ipg {options.command}: error: {failure}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"\nipg {options.command}: interrupted. Where it had saved a checkpoint, go on from the last by the same "
            "command and --resume_from_checkpoint last",
            file=sys.stderr,
        )
        return 130
    return 0


def train(recipe: Recipe, args: IPGConfig, given: dict[str, Any]) -> dict[str, Any]:
    """Trains by a recipe, and its twin where asked for; pushes where asked for; returns the run record."""
    if args.push_to_hub and args.process_index == 0:
        check_can_push(args)  # before another run is removed, and before hours of training
    given = {name: value for name, value in given.items() if not name.endswith("_token")}
    resume = _prepare_output(recipe, args)
    data = recipe.load_data(args.data_order_seed)
    record, trainer = _train_one(recipe, args, given, data, resume)
    columns = {recipe.method: record["metrics"]["test"]}
    if recipe.compare == "erm" and recipe.method != "erm":
        folder = Path(args.output_dir) / "erm"  # pushed with the folder that it lies in
        twin_args = replace(args, output_dir=str(folder), resume_from_checkpoint=None, push_to_hub=False)
        twin = replace(recipe, method="erm", compare="none")
        begun = resume and list(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
        twin_resume = newest_checkpoint(folder) if begun else None
        twin_record, _ = _train_one(twin, twin_args, {**given, "method": "erm"}, data, twin_resume)
        columns["erm"] = twin_record["metrics"]["test"]
    if args.process_index == 0:
        print(f"\n{report.summary_table(columns)}\n\nmodel, {RECORD}, README.md and {FIGURE}: {args.output_dir}")
    trainer.create_model_card(license=recipe.license)
    pushed = trainer.push_to_hub(license=recipe.license) if args.push_to_hub else None
    if pushed:
        print(f"pushed to {pushed.repo_url}")
    return record


def _train_one(
    recipe: Recipe, args: IPGConfig, given: dict, data: Benchmark, resume: str | None
) -> tuple[dict, IPGTrainer]:
    """Returns the record and the trainer."""
    commit = report.commit()  # of the code that is loaded: the folder may move on during the run
    set_seed(args.seed)  # the weights of a model from scratch
    model = recipe.build_model(data.train)
    processor = recipe.build_processor()
    sets = _inputs(data, recipe, processor)
    trainer = IPGTrainer(
        model=model,
        args=args,
        train_dataset=sets["train"],
        eval_dataset=sets["validation"],
        pair_dataset=sets["pairs"] if recipe.method == "ipg" else None,
        processing_class=processor,
        compute_metrics=_metrics(data),
    )
    _silence(trainer)
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=resume)
    if trainer.state.global_step < trainer.state.max_steps:  # SIGTERM, enable_jit_checkpoint: nothing to measure yet
        raise KeyboardInterrupt
    seconds = time.monotonic() - started
    metrics = {name: _measure(trainer, sets, name) for name in ("validation", "test")}
    record = {
        "config": given,
        "seed": args.seed,
        "method": recipe.method,
        "metrics": metrics,
        "chosen_step": trainer.state.best_global_step or trainer.state.global_step,
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 1),
        "versions": report.versions(),
        "commit": commit,
        "hardware": report.hardware(),
        "base_model": hub_id(recipe.model_name_or_path),
        "about": {**asdict(describe(recipe.dataset, recipe.dataset_options)), **recipe.about},
        "data": data_facts(trainer),
    }
    trainer.save_whole()
    if trainer.is_world_process_zero():
        processor.save_pretrained(args.output_dir)
        trainer.state.save_to_json(str(Path(args.output_dir) / "trainer_state.json"))
        report.write_json(Path(args.output_dir) / RECORD, record)
        threshold = args.invariance_threshold
        report.plot_training(trainer.state.log_history, Path(args.output_dir) / FIGURE, threshold)
    trainer.run_record = record
    return record, trainer


def evaluate(name: str, recipe: Recipe, args: IPGConfig, split: str, output: str | None) -> dict[str, float]:
    """Measures a saved model on a split of a recipe's data, prints the tables and returns the metrics."""
    data = recipe.load_data(args.data_order_seed)
    model, processor = _loaded(name, recipe, data)
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
            report.write_json(output, {"model": name, "split": split, "dataset": recipe.dataset, "metrics": metrics})
    return metrics


def _loaded(name: str, recipe: Recipe, data: Benchmark) -> tuple[Any, Any]:
    """A saved model and its image processor, for the labels of a benchmark."""
    model = load_image_classifier(name)
    names = getattr(data.train.features["label"], "names", ["a number"])
    if model.config.num_labels != len(names):
        raise RecipeError(f"{name} has {model.config.num_labels} labels, {recipe.dataset} has {len(names)}: {names}.")
    return model, AutoImageProcessor.from_pretrained(name)


def write_audit(options: argparse.Namespace, recipe: Recipe, args: IPGConfig) -> None:
    """Audits a saved model, or two side by side, on a split of a recipe's data, and writes the report."""
    if not options.report:
        raise RecipeError("--against stands in a report: name its folder, --report DIR.")
    check_folder(options.report)
    if args.process_index:
        return
    data = recipe.load_data(args.data_order_seed)
    places = named_models([place for place in (options.model, options.against) if place])
    models = {name: (place, *_loaded(place, recipe, data)) for name, place in places.items()}
    settings = {"batch_size": args.eval_batch_size, "num_workers": args.dataloader_num_workers, "device": args.device}
    settings |= {"split": options.split, "dataset": recipe.dataset, "seed": args.data_order_seed}
    result, pictures = audit(models, data, **settings)
    page = write_report(result, pictures, options.report)[0]
    print(f"\n{audit_table(result)}\n\n{recipe.dataset}, drawn with seed {args.data_order_seed}\n{page}")


def pairs(options: argparse.Namespace, recipe: Recipe, args: IPGConfig) -> int:
    """Checks a recipe's training pairs, or draws them; returns 1 where a check finds errors, else 0."""
    data = recipe.load_data(args.data_order_seed)
    model = processor = None
    if options.model:
        model, processor = load_image_classifier(options.model), AutoImageProcessor.from_pretrained(options.model)
    records, severities = [], set()
    for name, dataset in named_sets(data.pairs).items():
        title = f"{recipe.dataset}{f' ({name})' if name else ''}"
        if not isinstance(dataset, datasets.Dataset):
            raise RecipeError(f"{title} has no pairs before training: there is nothing to look at.")
        held_out = data.validation_pairs[name] if name and isinstance(data.validation_pairs, dict) else None
        held_out = held_out if name else data.validation_pairs
        evaluation = {"validation": data.validation, "test": data.test}
        findings = check_pairs(dataset, evaluation=evaluation, held_out=held_out, model=model, processor=processor)
        severities |= {finding.severity for finding in findings}
        if options.action == "preview":
            scores = score_pairs(dataset, model, processor) if model else None
            path = Path(options.output or "pairs").with_suffix("")
            path = path.with_name(f"{path.name}-{name}") if name else path
            written = preview_pairs(
                dataset, path, num_pairs=options.shown, scores=scores, title=title, findings=findings
            )
            print("\n".join(map(str, written)))
            continue
        print(format_findings(findings, title), end="\n\n")
        records += [{"set": name, **asdict(finding)} for finding in findings]
    if options.action == "check" and options.output:
        report.write_json(options.output, {"dataset": recipe.dataset, "model": options.model, "findings": records})
    return int(options.action == "check" and "error" in severities)


def card_of(run: str, name: str | None = None, license: str | None = None) -> str:
    """The model card of a run's folder.

    Raises:
        RecipeError: the folder holds no record of a finished run.
    """
    folder = Path(run)
    if not (folder / RECORD).is_file():
        raise RecipeError(f"{folder} holds no {RECORD}: give the folder of a run that ipg train has finished.")
    paths = (folder / RECORD, folder / "erm" / RECORD)
    record, twin = (json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None for path in paths)
    known = ABOUT.get(record["config"].get("dataset"))
    record.setdefault("about", asdict(known) if known else {})  # of a run by an earlier version
    return str(model_card(record, name=name or folder.resolve().name, twin=twin, license=license))


def show_heads(models: Sequence[str]) -> None:
    """Prints a row for each model: accepted or refused, the head, or the reason; totals at the end."""
    accepted: Counter[bool] = Counter()
    for finding in survey(models):
        accepted[not finding.problem] += 1
        found = f"{finding.kind:<18} {finding.features:>6}  {finding.path}"
        print(f"{finding.model:<48} {f'REFUSED: {finding.problem}' if finding.problem else found}", flush=True)
    print(f"\n{accepted[True]} of {sum(accepted.values())} models accepted")


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
    names = [RECORD, FIGURE, "trainer_state.json", "config.json", "model.safetensors", "erm"]
    return [*folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), *(folder / name for name in names)]


def _inputs(data: Benchmark, recipe: Recipe, processor: Any) -> dict[str, Any]:
    names = ("train", "validation", "test", "pairs", "validation_pairs", "test_pairs")
    sets = {name: getattr(data, name) for name in names}
    if recipe.method == "ipg" and sets["pairs"] is None:
        raise RecipeError(f"{recipe.dataset} has no training pairs of its own: give a maker, pairs: {{maker: ...}}.")
    if not recipe.preload:
        return sets
    single, double = {"image": "pixel_values"}, {"image_a": "pixel_values_a", "image_b": "pixel_values_b"}

    def loaded(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: loaded(part) for name, part in value.items()}
        if not isinstance(value, datasets.Dataset):
            return value
        columns = double if "image_a" in value.column_names else single
        return ImageRows(value, processor, columns, keep=("label", "attribute"), preload=True)

    used = {name: loaded(value) for name, value in sets.items() if name != "pairs" or recipe.method == "ipg"}
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


if __name__ == "__main__":
    sys.exit(main())
