# SPDX-License-Identifier: Apache-2.0
"""What is looked at before training: a fault in the data costs a second here and a run later."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

from .loader import PairCollator, check_sides, is_stream
from .transforms import ImageRows

CHUNK = 256


def check_pair_set(dataset: Any, name: str, collator: PairCollator, *, every_row: bool = True) -> None:
    """Checks a pair set against the contract of its columns.

    Args:
        dataset: the pair set as the trainer draws from it.
        name: its name, for messages.
        collator: the collator that will make its batches.
        every_row: look at each row of a map-style set, not only at its first.

    Raises:
        ValueError: the set is empty, lacks a column, or a row has sides of different shape, mode or dtype, different
            labels, or NaN or infinite values; the row is named.
    """
    if is_stream(dataset):
        return  # its rows are checked as they are drawn
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty: give it at least one pair.")
    if isinstance(dataset, ImageRows):
        raw = dataset.dataset.cast_column("image_a", datasets.Image(decode=False))
        raw = raw.cast_column("image_b", datasets.Image(decode=False))
        stop = len(raw) if every_row else 1
        for row in range(stop):
            _check_raw_row(raw[row], f"row {row} of {name}")
        return
    collator.names(dataset[0])
    stop = len(dataset) if every_row else 1
    for number, row in enumerate(_rows(dataset, stop)):
        _check_row(row, f"row {number} of {name}{_source(row)}", collator.names(row))


def check_pair_labels(dataset: Any, name: str) -> None:
    """Raises ValueError where `label_a` and `label_b` of a `datasets.Dataset` differ, naming the first such row."""
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
    """Raises ValueError where an integer label of a `datasets.Dataset` is not in 0..num_labels-1 (-100 is ignored)."""
    if not isinstance(dataset, datasets.Dataset) or num_labels is None:
        return
    for column in {"label", "labels", "label_ids"} & set(dataset.column_names):
        feature = dataset.features[column]
        if not str(getattr(feature, "dtype", "")).startswith("int"):
            continue
        labels = np.asarray(dataset.with_format("numpy").select_columns([column])[column][:])
        wrong = np.flatnonzero(((labels < 0) | (labels >= num_labels)) & (labels != -100))
        if len(wrong):
            raise ValueError(
                f"{name} has the {column} {labels[wrong[0]]} in row {wrong[0]}, out of range for a model of "
                f"{num_labels} labels (0 to {num_labels - 1}). Make the model with a larger num_labels or mend the data."
            )


def _rows(dataset: Any, stop: int) -> Iterator[Mapping[str, Any]]:
    for start in range(0, stop, CHUNK):
        numbers = range(start, min(start + CHUNK, stop))
        if hasattr(dataset, "__getitems__"):
            yield from dataset.__getitems__(list(numbers))
        else:
            yield from (dataset[number] for number in numbers)


def _check_row(row: Mapping[str, Any], where: str, names: Collection[str]) -> None:
    if "label_a" in row and "label_b" in row and not np.array_equal(row["label_a"], row["label_b"]):
        raise ValueError(f"the labels of {where} differ: label_a={row['label_a']}, label_b={row['label_b']}.")
    for name in names:
        a, b = torch.as_tensor(row[f"{name}_a"]), torch.as_tensor(row[f"{name}_b"])
        check_sides(name, a, b, where)
        for side, values in (("a", a), ("b", b)):
            if not torch.isfinite(values).all():
                raise ValueError(f"{name}_{side} of {where} has NaN or infinite values. Remove or mend that row.")


def _check_raw_row(row: Mapping[str, Any], where: str) -> None:
    sides = []
    for column in ("image_a", "image_b"):
        value = row[column]
        try:
            # the header alone: size and mode are read without decoding
            with Image.open(io.BytesIO(value["bytes"]) if value["bytes"] is not None else value["path"]) as image:
                sides.append((image.size, image.mode))
        except Exception as failure:
            raise ValueError(f"{column} of {where} cannot be read as an image: {failure}") from failure
    if sides[0] != sides[1]:
        raise ValueError(
            f"the sides of a pair must have one size and mode, but image_a is {sides[0][1]} of {sides[0][0]} pixels and "
            f"image_b {sides[1][1]} of {sides[1][0]} in {where}."
        )


def _source(row: Mapping[str, Any]) -> str:
    return f" (source_id {row['source_id']})" if "source_id" in row else ""
