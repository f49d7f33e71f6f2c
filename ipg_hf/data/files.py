# SPDX-License-Identifier: Apache-2.0
"""Loads a user's own data as a benchmark: image folders or Parquet files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ..pairs.sources import pairs_from_columns, pairs_from_rows
from .benchmark import Benchmark

SPLITS = ("train", "validation", "test")


def load_files(
    *,
    data_dir: str | None = None,
    seed: int = 0,
    num_pairs: int | None = None,
    oriented_pairs: bool = True,
    label: str = "label",
    attribute: str = "attribute",
    pairs: str | None = "pairs",
    instance: str | None = None,
    keep: Mapping[str, Any] | None = None,
) -> Benchmark:
    """Loads your own data from a folder.

    The folder has Parquet files for each split, named `train-*.parquet` and so on, also in a sub-folder `data`.
    `Dataset.push_to_hub` writes them like this. Or it has a sub-folder for each split, with images in
    `split/label/attribute/`. The splits are train, validation and test.

    Args:
        data_dir: the folder.
        seed: non-negative seed of the draw of the pairs.
        num_pairs: number of training pairs. `None` uses all.
        oriented_pairs: `False` swaps the sides of a random half of the training pairs.
        label: column of the label.
        attribute: column of the spurious attribute.
        pairs: sub-folder with Parquet files of training pairs, with the columns `image_a` and `image_b`. If it is
            `None` or the sub-folder is missing, the benchmark has no training pairs, and a maker must make them.
        instance: column that names the object in an image. Images of validation and test that show the same object
            with both values of the attribute are the pairs for the flip rate. `None`: there are no such pairs.
        keep: column -> value. Only training rows with these values are used: `{"aligned": True}`, for example, leaves
            out the minority groups.

    Raises:
        FileNotFoundError: the folder or a split is missing.
        ValueError: a column is missing; `instance` gives no pairs; `pairs_from_columns` refuses the training pairs.
    """
    if data_dir is None or not Path(data_dir).is_dir():
        raise FileNotFoundError(
            f"data_dir={data_dir!r} is no folder: give the folder with the files, --data_dir FOLDER."
        )
    folder = Path(data_dir)
    sets = {split: _read_split(folder, split) for split in SPLITS}
    for split, dataset in sets.items():
        for name, column in (("label", label), ("attribute", attribute)):
            if column not in dataset.column_names:
                raise ValueError(
                    f"{split} of {folder} has no column {column!r} for {name}, only {dataset.column_names}. Name one "
                    f"of them with the option {name}."
                )
            if column != name:
                dataset = dataset.rename_column(column, name)
            if not isinstance(dataset.features[name], datasets.ClassLabel):
                dataset = dataset.class_encode_column(name)
        sets[split] = dataset
    for column, value in (keep or {}).items():
        sets["train"] = sets["train"].select(np.flatnonzero(np.asarray(sets["train"][column][:]) == value))
    found = folder / pairs if pairs else None
    training_pairs = None
    if found is not None and found.is_dir():
        training_pairs = _read_pairs(found, attribute, num_pairs, seed, oriented_pairs)
    held_out = {split: held_out_pairs(sets[split], instance) if instance else None for split in SPLITS[1:]}
    return Benchmark(
        train=sets["train"],
        validation=sets["validation"],
        test=sets["test"],
        pairs=training_pairs,
        validation_pairs=held_out["validation"],
        test_pairs=held_out["test"],
    )


def held_out_pairs(dataset: datasets.Dataset, instance: str) -> datasets.Dataset:
    """Pairs the images that show the same object with the first two values of the attribute.

    Args:
        dataset: rows `image`, `label`, `attribute` and the column `instance`.
        instance: column that names the object in an image. An object that occurs with both values makes one pair for
            each of its labels, of its first image with each value. Rows without a name (`None`) make no pair.

    Raises:
        ValueError: there is no such pair.
    """
    columns = zip(*(dataset[name][:] for name in (instance, "label", "attribute")), strict=True)
    rows: list[dict[Any, int]] = [{}, {}]
    for row, (name, label, value) in enumerate(columns):
        if value in (0, 1) and name is not None:
            rows[value].setdefault((name, label), row)
    both = [key for key in rows[0] if key in rows[1]]
    if not both:
        raise ValueError(
            f"no value of {instance!r} occurs with both values of the attribute and one label: there are no pairs. "
            "Name another column, or none."
        )
    pairs = pairs_from_rows(dataset, *([side[key] for key in both] for side in rows), attribute="attribute")
    return pairs.add_column("source_id", [str(name) for name, _ in both])


def _read_split(folder: Path, split: str) -> datasets.Dataset:
    files = sorted(path for place in (folder, folder / "data") for path in place.glob(f"{split}*.parquet"))
    if files:
        return datasets.load_dataset("parquet", data_files=[*map(str, files)], split="train")
    if not (folder / split).is_dir():
        raise FileNotFoundError(
            f"{folder} has neither {split}*.parquet (also in data/) nor a folder {split}: add one of them."
        )
    rows = []
    for path in sorted((folder / split).rglob("*")):
        parts = path.relative_to(folder / split).parts
        if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp") and len(parts) == 3:
            rows.append({"image": str(path), "label": parts[0], "attribute": parts[1]})
    if not rows:
        raise FileNotFoundError(f"{folder / split} has no images in sub-folders LABEL/ATTRIBUTE: put them there.")
    names = {key: datasets.ClassLabel(names=sorted({row[key] for row in rows})) for key in ("label", "attribute")}
    return datasets.Dataset.from_list(rows, features=datasets.Features({"image": datasets.Image(), **names}))


def _read_pairs(folder: Path, attribute: str, num_pairs: int | None, seed: int, oriented: bool) -> datasets.Dataset:
    files = sorted(map(str, folder.rglob("*.parquet")))
    if not files:
        raise FileNotFoundError(f"{folder} has no Parquet files: add the training pairs, or set pairs=None.")
    source = datasets.load_dataset("parquet", data_files=files, split="train")
    sides = {
        f"attribute_{side}": f"{attribute}_{side}" for side in "ab" if f"{attribute}_{side}" in source.column_names
    }
    return pairs_from_columns(source, "image_a", "image_b", **sides, num_pairs=num_pairs, oriented=oriented, seed=seed)
