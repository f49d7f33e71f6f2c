# SPDX-License-Identifier: Apache-2.0
"""The command line: `ipg train`, `ipg evaluate`, `ipg pairs`, `ipg scan`, `ipg bench`, `ipg card` and `ipg heads`."""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoImageProcessor

from .audit.measure import audit, named_models
from .audit.page import audit_table, check_folder, write_report
from .bench.run import bench
from .config import IPGConfig
from .data import load_files
from .html import write_files
from .hub.card import model_card
from .models import load_trained_classifier, on_accelerator
from .norms import norm_layers
from .pairs.checks import ONLY_SET, first_pairs, named_sets
from .pairs.classes import model_names
from .pairs.linter import check_pairs, format_findings
from .pairs.makers import check_number
from .pairs.masking import add_masks, load_segmenter
from .pairs.preview import preview_pairs
from .pairs.scores import score_pairs
from .recipe import Recipe, RecipeError, parse_recipe, settings_help
from .record import check_place, read_json, write_json
from .run import RECORD, evaluate, keep_memory, load_trained, refuse_existing, train
from .scan import (
    LEAST_IMAGES,
    Scan,
    first_suspect,
    load_images,
    read_scan,
    recipe_against,
    scan,
    scan_table,
    write_scan,
)
from .scan import check_folder as check_folder_of_scan
from .scan.page import CAUTIONS
from .survey import survey

logger = logging.getLogger(__name__)

# errors of a user's files, settings and installation, which one line says; any other error is a fault of ours
FAILURES = (
    ValueError,
    OSError,
    ImportError,
    DatasetsError,
    SafetensorError,
    StrictDataclassError,
    Image.DecompressionBombError,
)
ROW = "number of the row in the set"  # a column of images that are drawn
# after an interrupt
GO_ON = {
    "train": " Where it had saved a checkpoint, go on from the last by the same command and "
    "--resume_from_checkpoint last",
    "scan": " The same command goes on, unless the model has code of its own.",
    "bench": " Finished runs are kept: the same command goes on.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, 1 for bad pairs, 2 for a usage error, 130 for an interrupt."""
    parser, commands = _parser()
    options, flags = parser.parse_known_args(argv)
    if options.command in ("heads", "card", "bench", "scan") and flags:
        commands.choices[options.command].error(f"unrecognized arguments: {' '.join(flags)}")
    try:
        status = _run(options, flags)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe has seen enough (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter's last flush would fail too
        return 1
    except FAILURES as failure:
        print(f"ipg {options.command}: error: {_in_one_line(failure)}", file=sys.stderr)
        return 2
    except RuntimeError as failure:
        if "to be installed" not in str(failure):  # what Trainer says of a tracker in report_to
            raise
        print(f"ipg {options.command}: error: {_in_one_line(failure)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nipg {options.command}: interrupted.{GO_ON.get(options.command, '')}", file=sys.stderr)
        return 130
    return status


def _run(options: argparse.Namespace, flags: Sequence[str]) -> int:
    """Runs the command that was given; returns the exit status."""
    if options.command == "bench":
        bench(options.suite, **{k: v for k, v in vars(options).items() if k not in ("command", "suite")})
        return 0
    if options.command == "card":
        print(card_of(options.run, options.name, options.license))
        return 0
    if options.command == "heads":
        show_heads(options.models)
        return 0
    if options.command == "scan":
        scan_model(options)
        return 0
    recipe, args, given = parse_recipe(options.config, flags)
    if options.command == "pairs":
        return pairs(options, recipe, args)
    if options.command == "train":
        # of torch, at each evaluation on a machine without an accelerator: the default of TrainingArguments is meant
        warnings.filterwarnings("ignore", "'pin_memory' argument is set as true")
        train(recipe, args, given)
    elif options.report or options.against:
        write_audit(options, recipe, args)
    else:
        evaluate(options.model, recipe, args, options.split, options.output)
    return 0


def _in_one_line(failure: BaseException) -> str:
    """The message of an error and of what caused it, with its notes."""
    parts = [str(failure) or type(failure).__name__]
    if isinstance(failure, DatasetsError) and failure.__cause__ is not None:
        parts.append(f"({type(failure.__cause__).__name__}: {failure.__cause__})")  # which alone says what is wrong
    return " ".join(" ".join([*parts, *getattr(failure, "__notes__", [])]).split())


def _parser() -> tuple[argparse.ArgumentParser, argparse._SubParsersAction]:
    """The parser, and that of its commands."""
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
            written.add_argument("--output", help="write the metrics to this new JSON file")
            written.add_argument(
                "--report", metavar="DIR", help="write an audit to this folder: a page and its numbers"
            )
        if name == "pairs":
            command.add_argument("action", choices=["check", "preview"])
            command.add_argument("--model", help="a folder or Hub id, whose divergence on each pair is measured")
            command.add_argument(
                "--output",
                help="check: write the findings to this new JSON file; preview: name of the new page [pairs]",
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
    _add_scan(commands)
    card = commands.add_parser("card", help="print the model card of a run", allow_abbrev=False)
    card.add_argument("run", help="a folder made by ipg train; the run in its folder erm is compared with it")
    card.add_argument("--name", help="of the model, a Hub id or a word; by default the folder's name")
    card.add_argument("--license", help="of the model, as the Hub spells it, e.g. apache-2.0")
    _add_bench(commands)
    return parser, commands


def _add_scan(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "scan", help="find which parts of the images a model follows; no attribute is needed", allow_abbrev=False
    )
    command.add_argument("model", help="a folder or Hub id")
    command.add_argument("--data", required=True, help="a folder of images or of a data set, or a Hub id")
    command.add_argument("--split", help="by default test, or else validation, or else train")
    command.add_argument("--mask", metavar="COLUMN", help="column of masks of the objects, to exchange backgrounds too")
    command.add_argument(
        "--segmenter", metavar="MODEL", help="make masks by this model, a folder or Hub id; --mask names them"
    )
    command.add_argument("--num_images", type=int, default=300, help="number of images to scan, at least 20 [300]")
    command.add_argument("--seed", type=int, default=0, help="seed of the draws [0]")
    command.add_argument("--report", metavar="DIR", help="write a page with pictures and the numbers to this folder")
    command.add_argument(
        "--before", metavar="DIR", help="folder of an earlier scan's report: its effects are shown too"
    )
    command.add_argument(
        "--write_recipe", metavar="FILE", help="write a recipe that trains against the first strong finding"
    )


def _add_bench(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "bench", help="compare methods over seeds, by a suite; goes on where it stopped", allow_abbrev=False
    )
    command.add_argument("suite", help="a YAML file, see recipes/suites")
    command.add_argument("--methods", nargs="+", metavar="NAME", help="run only these of the suite's methods")
    command.add_argument("--seeds", nargs="+", type=int, metavar="N", help="run only these of the suite's seeds")
    command.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each if more than one [1]")
    command.add_argument("--only", choices=["tune", "run", "render"], help="one of the three stages")
    command.add_argument("--output_dir", help="where runs work [outputs/bench-SUITE]")
    command.add_argument("--keep_models", action="store_true", help="keep what each run leaves in the output folder")


def write_audit(options: argparse.Namespace, recipe: Recipe, args: IPGConfig) -> None:
    """Audits a saved model, or two side by side, on a split of a recipe's data, and writes the report."""
    if not options.report:
        raise RecipeError("--against stands in a report: name its folder, --report DIR.")
    check_folder(options.report)
    if args.process_index:
        return
    data = recipe.load_data(args.data_order_seed, with_pairs=False, held_out=(options.split,))
    places = named_models([place for place in (options.model, options.against) if place])
    models = {name: (place, *load_trained(place, recipe, data)) for name, place in places.items()}
    first = next(iter(models.values()))[1]
    data = data.with_labels(model_names(first.config) or data.label_names)
    settings = {"batch_size": args.eval_batch_size, "num_workers": args.dataloader_num_workers, "device": args.device}
    settings |= {"split": options.split, "dataset": recipe.dataset, "seed": args.data_order_seed}
    result, pictures = audit(models, data, **settings)
    page = write_report(result, pictures, options.report)[0]
    print(f"\n{audit_table(result)}\n\n{recipe.dataset}, drawn with seed {args.data_order_seed}\n{page}")


def pairs(options: argparse.Namespace, recipe: Recipe, args: IPGConfig) -> int:
    """Checks a recipe's training pairs, or draws them; returns 1 where a check finds errors, else 0."""
    if options.action == "check" and options.output:
        refuse_existing(options.output)
    # the linter compares the divergence of training pairs with that of held-out pairs
    data = recipe.load_data(args.data_order_seed, held_out=("validation",) if options.model else ())
    sets = named_sets(data.pairs)
    page = str(options.output or "pairs").removesuffix(".html")
    pages = {name: f"{page}.html" if name == ONLY_SET else f"{page}-{name}.html" for name in sets}
    if options.action == "preview":
        for path in pages.values():
            refuse_existing(path)
    model = processor = None
    if options.model:
        model, processor = load_trained_classifier(options.model), AutoImageProcessor.from_pretrained(options.model)
    records, severities = [], set()
    for name, dataset in sets.items():
        title = recipe.dataset if name == ONLY_SET else f"{recipe.dataset} ({name})"
        if isinstance(dataset, datasets.IterableDataset):
            dataset = first_pairs(dataset, title)
            title = f"the first {len(dataset)} pairs of {title}"
        if not isinstance(dataset, datasets.Dataset):
            raise RecipeError(f"{title} has no pairs before training: there is nothing to look at.")
        held_out = named_sets(data.validation_pairs).get(name)
        evaluation = {"validation": data.validation, "test": data.test}
        findings = check_pairs(dataset, evaluation=evaluation, held_out=held_out, model=model, processor=processor)
        severities |= {finding.severity for finding in findings}
        if options.action == "preview":
            scores = score_pairs(dataset, model, processor) if model else None
            written = preview_pairs(
                dataset, pages[name], num_pairs=options.shown, scores=scores, title=title, findings=findings
            )
            print("\n".join(map(str, written)))
            continue
        print(format_findings(findings, title), end="\n\n")
        records += [{"set": name, **asdict(finding)} for finding in findings]
    if options.action == "check" and options.output:
        write_json(options.output, {"dataset": recipe.dataset, "model": options.model, "findings": records})
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
    record, erm = (read_json(path) if path.is_file() else None for path in paths)
    if "settings" not in record:
        raise RecipeError(f"{paths[0]} lacks the settings, as a record of an earlier version: train again.")
    return str(model_card(record, name=name or folder.resolve().name, erm=erm, license=license))


def scan_model(options: argparse.Namespace) -> None:
    """Scans a model, prints the findings, and writes what was asked for."""
    if options.report:
        check_folder_of_scan(options.report)
    before = read_scan(options.before) if options.before else None
    recipe = Path(options.write_recipe) if options.write_recipe else None
    if recipe:
        check_place(recipe)
        if recipe.exists():
            raise FileExistsError(f"{recipe} exists, and is not replaced: remove it, or name another file.")
        if not os.path.isdir(options.data) and "/" not in options.data:
            raise ValueError(
                f"--write_recipe: a recipe cannot name the set {options.data!r}. Give a folder, or OWNER/SET."
            )
    if recipe and os.path.isdir(options.data):
        load_files(data_dir=options.data)  # raises what the training would
    images = load_images(options.data, options.split)
    if recipe and "label" not in images.column_names:
        raise ValueError(
            f"--write_recipe: {options.data} has no labels to train with. Put images in folders of labels."
        )
    check_number("num_images", options.num_images, LEAST_IMAGES, math.inf, whole=True)
    check_number("seed", options.seed, 0, math.inf, whole=True)
    model = on_accelerator(load_trained_classifier(options.model))
    if model.device.type == "cpu":
        keep_memory()
        model = model.to(memory_format=torch.channels_last)  # convolutions are faster so on a processor
    processor = AutoImageProcessor.from_pretrained(options.model)
    mask, rows = options.mask, None
    if options.segmenter:
        mask = mask or "mask"
        # more images than are scanned, since some get no mask
        drawn = np.random.default_rng(options.seed).permutation(len(images))[: options.num_images * 5 // 4]
        images = images.select(drawn).add_column(ROW, drawn)
        images = add_masks(images, *load_segmenter(options.segmenter), column=mask)
        rows, images = images[ROW][:], images.remove_columns(ROW)
    result = scan(model, images, processor, mask=mask, num_images=options.num_images, seed=options.seed)
    if rows:
        result = replace(with_rows(result, rows), segmenter=options.segmenter)
    for name in ("seed", "mask", "segmenter"):
        if before and getattr(before, name) != getattr(result, name):
            logger.warning(
                f"The earlier scan had {name}={getattr(before, name)}, this one {getattr(result, name)}: give the same."
            )
    print(f"\n{scan_table(result, before)}\n")
    if options.report:
        title = f"Scan of {options.model} on {options.data}"
        print(write_scan(result, options.report, title=title, before=before)[0])
    part = first_suspect(result)
    if part is None:
        print(f"No strong finding{': no recipe was written' if recipe else ''}.")
        return
    print(f"Is {part!r} a shortcut? {'Look at the pictures.' if options.report else 'See pictures by --report DIR.'}")
    if part in CAUTIONS:
        print(CAUTIONS[part])
    if recipe:
        text = recipe_against(result, options.model, options.data, freeze_norm=bool(norm_layers(model)))
        write_files({recipe: text.encode()})
        print(f"ipg train --config {recipe}")


def with_rows(result: Scan, rows: Sequence[int]) -> Scan:
    """A scan of some rows of a set, with the numbers that the rows have in the set."""
    examples = {
        part: [replace(shown, row=rows[shown.row], donor_row=rows[shown.donor_row]) for shown in found]
        for part, found in result.examples.items()
    }
    return replace(result, examples=examples)


def show_heads(models: Sequence[str]) -> None:
    """Prints a row for each model: accepted or refused, the head, or the reason; totals at the end."""
    accepted: Counter[bool] = Counter()
    for finding in survey(models):
        accepted[not finding.problem] += 1
        found = f"{finding.kind:<18} {finding.features:>6}  {finding.path}"
        print(f"{finding.model:<48} {f'REFUSED: {finding.problem}' if finding.problem else found}", flush=True)
    print(f"\n{accepted[True]} of {sum(accepted.values())} models accepted")


if __name__ == "__main__":
    status = main()
    if torch.distributed.is_initialized():
        # gloo's threads now and then abort the interpreter's orderly end ("terminate called without an active
        # exception", torch 2.15 on CPU), which a launcher takes for a failed run
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
