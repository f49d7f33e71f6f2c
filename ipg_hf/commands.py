# SPDX-License-Identifier: Apache-2.0
"""What each command of `ipg` does."""

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
from .recipe import Recipe, RecipeError, parse_recipe
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


def run(options: argparse.Namespace, flags: Sequence[str]) -> int:
    """Runs the command that was given; returns the exit status, 2 for an error that one line says."""
    try:
        return _run(options, flags)
    except BrokenPipeError:
        raise
    except FAILURES as failure:
        print(f"ipg {options.command}: error: {_in_one_line(failure)}", file=sys.stderr)
    except RuntimeError as failure:
        if "to be installed" not in str(failure):  # what Trainer says of a tracker in report_to
            raise
        print(f"ipg {options.command}: error: {_in_one_line(failure)}", file=sys.stderr)
    return 2


def _run(options: argparse.Namespace, flags: Sequence[str]) -> int:
    """Runs the command that was given; returns 1 for bad pairs, else 0."""
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
