# SPDX-License-Identifier: Apache-2.0
"""Checks of the data before training: a fault is found in seconds instead of after a run."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate import PartialState
from torch import Tensor
from transformers.utils import logging

from ..seeding import first_row, seeded
from .images import image_kind
from .linter import FAST_PAIRS, check_pairs, format_findings
from .loader import PairCollator, check_rows_agree, check_sides, is_stream, source_of
from .scores import SIDES
from .transforms import ImageRows

logger = logging.get_logger(__name__)

CHUNK = 256
RAW_ROWS = 20_000  # the headers of ten million pairs would take minutes
LABEL_COLUMNS = ("labels", "label", "label_ids")
PAIR_LABELS = ("label", "label_a", "label_b")
ONLY_SET = "pairs"  # the name of a pair set that is given alone


def named_sets(dataset: Any) -> dict[str, Any]:
    """Returns data sets by name. A set that is given alone, not in a dict, has the name `"pairs"`."""
    return dict(dataset) if isinstance(dataset, Mapping) else {ONLY_SET: dataset}


def title_of(argument: str, name: str) -> str:
    """Returns the name of a data set in messages: `pair_dataset`, or `pair_dataset['color']` for one of several."""
    return argument if name == ONLY_SET else f"{argument}[{name!r}]"


def check_pair_set(
    dataset: Any, name: str, collator: PairCollator, *, every_row: bool = True, per_step: int = 1
) -> None:
    """Checks a pair set against the contract of its columns.

    Args:
        dataset: the pair set as the trainer draws from it.
        name: name of the pair set, for messages.
        collator: the collator that will make the batches.
        every_row: check each row of a map-style set, not only the first, log what the fast form of
            [`~linter.check_pairs`] finds, and raise its errors. Of more than 20,000 raw pairs, so many are checked,
            evenly spaced; the sizes of the others are compared when they are drawn.
        per_step: number of pairs that a training step takes. A smaller set gets a warning.

    Raises:
        ValueError: the set is empty or lacks a column; the sides of a row differ in shape, mode, dtype or label, or
            hold NaN or infinite values; or the linter finds an error. The message names the row.
    """
    if is_stream(dataset):
        return  # the rows of a stream are checked when they are drawn
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty: give it at least one pair.")
    if len(dataset) < per_step:
        logger.warning(f"{name} has {len(dataset)} pairs, fewer than the {per_step} a step: every step uses all.")
    stop = len(dataset) if every_row else 1
    if isinstance(dataset, ImageRows):
        _check_raw_rows(dataset, name, stop, collator)
        _report_findings(dataset, name, every_row)
        return
    with seeded(0):  # a random transform of the user's own draws from the global generators
        first = dataset[0]
        sides = {name: torch.as_tensor(first[f"{name}_a"]) for name in collator.names(first)}
        for start in range(0, stop, CHUNK):
            numbers = range(start, min(start + CHUNK, stop))
            if isinstance(dataset, datasets.Dataset) and _are_clean(dataset, numbers, sides):
                continue
            for number, row in zip(numbers, _rows(dataset, numbers), strict=True):
                _check_row(row, f"row {number} of {name}{source_of(row)}", collator.names(row), sides)
    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom":
        _report_findings(dataset, name, every_row)


def check_pair_stream(dataset: Any, name: str, *, every_row: bool = True) -> None:
    """Looks at the first 256 pairs of a stream by the fast form of [`~linter.check_pairs`], and raises its errors.

    Each row of a stream is also checked when it is drawn.

    Args:
        dataset: a `datasets.IterableDataset` whose features name `image_a` and `image_b` as images. Nothing is read
            from any other set.
        name: name of the pair set, for messages.
        every_row: `False` reads nothing.

    Raises:
        ValueError: the linter finds an error.
    """
    features = getattr(dataset, "features", None) or {}
    if not every_row or not is_stream(dataset):
        return
    if not all(isinstance(features.get(side), datasets.Image) for side in SIDES):
        return
    first = first_pairs(dataset, name)
    _report_findings(first, f"the first {len(first)} pairs of {name}", every_row)


def first_pairs(stream: datasets.IterableDataset, name: str, count: int = FAST_PAIRS) -> datasets.Dataset:
    """Stores the first pairs of a stream, so that they can be looked at.

    Args:
        stream: pairs; its features name `image_a` and `image_b` as images.
        name: name of the pair set, for messages.
        count: largest number of pairs.

    Raises:
        ValueError: the stream has no pairs.
    """
    rows = list(stream.decode(False).take(count))
    if not rows:
        raise ValueError(f"{name} is empty: its stream ended without a single row.")
    return datasets.Dataset.from_list(rows, features=stream.features)


def _report_findings(dataset: Any, name: str, every_row: bool) -> None:
    """Logs what the fast form of the linter finds, and raises a ValueError of its errors."""
    if not every_row:
        return
    findings = check_pairs(dataset, fast=True)
    for finding in findings:
        if finding.severity != "error" and PartialState().is_main_process:
            log = logger.info if finding.severity == "info" else logger.warning
            log(format_findings([finding], name))
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors:
        raise ValueError(f"{format_findings(errors, name)}\nTo train all the same, set check_pairs=False.")


def check_pair_labels(dataset: Any, name: str) -> None:
    """Raises a ValueError if `label_a` and `label_b` of a `datasets.Dataset` differ. It names the first such row."""
    if not isinstance(dataset, datasets.Dataset) or not {"label_a", "label_b"} <= set(dataset.column_names):
        return
    columns = dataset.with_format("numpy").select_columns(["label_a", "label_b"])
    differs = np.flatnonzero(columns["label_a"][:] != columns["label_b"][:])
    if len(differs):
        row = int(differs[0])
        raise ValueError(
            f"the labels differ within {len(differs)} of {len(dataset)} pairs of {name}, first in row {row}: label_a="
            f"{columns[row]['label_a']}, label_b={columns[row]['label_b']}. A pair shows one label twice."
        )


def check_labels(dataset: Any, name: str, num_labels: int | None) -> None:
    """Raises a ValueError if an integer label of a `datasets.Dataset` is not in 0..num_labels-1 (-100 is ignored)."""
    dataset = dataset.dataset if isinstance(dataset, ImageRows) else dataset
    if not isinstance(dataset, datasets.Dataset) or dataset.format["type"] == "custom" or num_labels in (None, 1):
        return  # a transform of the user may change the stored labels; one output is a regression
    for column in {*LABEL_COLUMNS} & set(dataset.column_names):
        feature = dataset.features[column]
        if not str(getattr(feature, "dtype", "")).startswith(("int", "uint")):
            continue
        labels = np.asarray(dataset.with_format("numpy").select_columns([column])[column][:])
        wrong = np.flatnonzero(((labels < 0) | (labels >= num_labels)) & (labels != -100))
        if len(wrong):
            raise ValueError(
                f"{name} has the {column} {labels[wrong[0]]} in row {wrong[0]}, out of range for a model of "
                f"{num_labels} labels (0 to {num_labels - 1}). Give the model more num_labels or mend the data."
            )


def first_label(dataset: Any) -> Tensor | None:
    """The label in the first row of a map-style set; None for a stream, or where the row has no label."""
    if dataset is None or is_stream(dataset) or not len(dataset):
        return None
    dataset = dataset.dataset if isinstance(dataset, ImageRows) else dataset
    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom":
        named = [name for name in LABEL_COLUMNS if name in dataset.column_names]
        dataset = dataset.with_format(None).select_columns(named)  # no image is decoded
    row = first_row(dataset)
    found = [row[name] for name in LABEL_COLUMNS if name in row] if isinstance(row, Mapping) else []
    is_number = bool(found) and not isinstance(found[0], str) and found[0] is not None
    return torch.as_tensor(found[0]) if is_number else None


def _rows(dataset: Any, numbers: Sequence[int]) -> Iterable[Mapping[str, Any]]:
    if hasattr(dataset, "__getitems__"):
        return dataset.__getitems__(list(numbers))
    return (dataset[number] for number in numbers)


def _are_clean(dataset: datasets.Dataset, numbers: range, sides: Mapping[str, Tensor]) -> bool:
    """Whether rows of stored numbers have no fault. If not, the caller looks at each row to say what is wrong.

    A row of nested lists takes milliseconds to become a tensor; its Arrow memory takes microseconds to look through.
    """
    columns = [f"{name}_{side}" for name in sides for side in "ab"]
    if dataset.format["type"] == "custom" or not {*columns} <= {*dataset.column_names}:
        return False
    table = dataset.with_format("arrow").select_columns(columns)[numbers.start : numbers.stop]
    for name, first in sides.items():
        a, b = (_shape_if_finite(table[f"{name}_{side}"].combine_chunks()) for side in "ab")
        if a is None or a != b or a[:-1] != list(first.shape):
            return False
    return True


def _shape_if_finite(array: pa.Array) -> list | None:
    """Lengths of the nested lists and type of their values; None if lengths differ or a value is not finite."""
    shape: list[Any] = []
    array = array.storage if isinstance(array, pa.ExtensionArray) else array
    while pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        lengths = pc.min_max(pc.list_value_length(array)).as_py()
        if array.null_count or lengths["min"] != lengths["max"]:
            return None
        shape.append(lengths["max"])
        array = array.flatten()
    is_number = pa.types.is_floating(array.type) or pa.types.is_integer(array.type)
    if not is_number or array.null_count or not pc.all(pc.is_finite(array)).as_py():
        return None
    return [*shape, array.type]


def _check_row(row: Mapping[str, Any], where: str, names: Collection[str], sides: Mapping[str, Tensor]) -> None:
    if "label_a" in row and "label_b" in row and not np.array_equal(row["label_a"], row["label_b"]):
        raise ValueError(f"the labels of {where} differ: label_a={row['label_a']}, label_b={row['label_b']}.")
    for name in names:
        a, b = torch.as_tensor(row[f"{name}_a"]), torch.as_tensor(row[f"{name}_b"])
        check_sides(name, a, b, where)
        check_rows_agree(name, sides[name], a, where)
        for side, values in (("a", a), ("b", b)):
            if not torch.isfinite(values).all():
                raise ValueError(f"{name}_{side} of {where} has NaN or infinite values. Remove or mend that row.")


def _check_raw_rows(dataset: ImageRows, title: str, stop: int, collator: PairCollator) -> None:
    if set(dataset.columns) != {"image_a", "image_b"}:
        collator.names(dataset[0])
    for column in dataset.columns:
        if column not in dataset.modes:
            kind = type(dataset.dataset.features[column]).__name__
            raise ValueError(
                f"the column {column} of {title} is a {kind}, not an Image: cast it, "
                f"dataset.cast_column({column!r}, datasets.Image()), or make model inputs of it yourself."
            )
    modes = dataset.modes
    rows = np.arange(stop) if stop <= RAW_ROWS else np.linspace(0, stop - 1, RAW_ROWS).astype(int)
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        columns = dataset.stored[chunk]
        for row, *values in zip(chunk.tolist(), *(columns[name] for name in SIDES), strict=True):
            kinds = [
                image_kind(value, f"{name} of row {row} of {title}", modes[name])
                for name, value in zip(SIDES, values, strict=True)
            ]
            if kinds[0] != kinds[1]:
                raise ValueError(
                    f"the sides of a pair must have one size and mode, but image_a is {kinds[0][1]} of {kinds[0][0]} "
                    f"pixels and image_b {kinds[1][1]} of {kinds[1][0]} in row {row} of {title}."
                )
