# SPDX-License-Identifier: Apache-2.0
"""A user's own data as a benchmark: image folders, Parquet files or a saved set, with a test for each group."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ..pairs.sources import pairs_from_columns
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
    """Reads a folder of one's own.

    The folder holds Parquet files named by split (`train-*.parquet`, also in a sub-folder `data`), as
    `Dataset.push_to_hub` writes them, or one sub-folder for each split with images in `split/label/attribute/`, as
    `imagefolder` reads them.

    Args:
        data_dir: the folder.
        seed: non-negative; seed of the pairs that are drawn.
        num_pairs: number of training pairs; `None`: all.
        oriented_pairs: `False` swaps the sides of a random half of the training pairs.
        label: column of the label.
        attribute: column of the spurious attribute.
        pairs: sub-folder with Parquet files of training pairs, with columns `image_a` and `image_b`, or `None`. Where
            it is missing the benchmark has no pairs of its own (a maker's are needed for training).
        instance: column that is equal in images of one object under both values of the attribute: such images of
            validation and test are the held-out pairs, for the flip rate. Without it there are none.
        keep: column -> value; only training rows with these values are used (`{"aligned": True}` leaves the minority
            groups out).

    Raises:
        FileNotFoundError: the folder, or a split, is missing.
        ValueError: a column is missing or the label is no class; as in `pairs.pairs_from_columns`.
    """
    if data_dir is None or not Path(data_dir).is_dir():
        raise FileNotFoundError(f"data_dir={data_dir!r} is no folder: give the folder of the files, --data_dir FOLDER.")
    folder = Path(data_dir)
    sets = {split: _read_split(folder, split) for split in SPLITS}
    for split, dataset in sets.items():
        for name, column in (("label", label), ("attribute", attribute)):
            if column not in dataset.column_names:
                raise ValueError(f"{split} of {folder} has no column {column!r} for {name}: {dataset.column_names}.")
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
    """Images of one object under the first two values of the attribute, as pairs.

    Args:
        dataset: rows with `image`, `label`, `attribute` and the column `instance`.
        instance: values that occur with each of the two attributes once make a pair.

    Raises:
        ValueError: there is no such pair.
    """
    names, attributes = dataset[instance][:], np.asarray(dataset["attribute"][:])
    rows: list[dict[Any, int]] = [{}, {}]
    for row, (name, value) in enumerate(zip(names, attributes, strict=True)):
        if value in (0, 1):
            rows[value].setdefault(name, row)
    both = [name for name in rows[0] if name in rows[1]]
    if not both:
        raise ValueError(f"no value of {instance!r} occurs with both values of the attribute: there are no pairs.")
    sides = []
    for value, side in enumerate("ab"):
        columns = ["image", "attribute", *(["label"] if side == "a" else [])]
        part = dataset.select_columns(columns).select([rows[value][name] for name in both])
        sides.append(part.rename_columns({"image": f"image_{side}", "attribute": f"attribute_{side}"}))
    pairs = datasets.concatenate_datasets(sides, axis=1)
    return pairs.add_column("source_id", [str(name) for name in both])


def _read_split(folder: Path, split: str) -> datasets.Dataset:
    files = sorted(path for place in (folder, folder / "data") for path in place.glob(f"{split}*.parquet"))
    if files:
        return datasets.load_dataset("parquet", data_files=[*map(str, files)], split="train")
    if not (folder / split).is_dir():
        raise FileNotFoundError(f"{folder} has neither {split}*.parquet (also in data/) nor a folder {split}.")
    rows = []
    for path in sorted((folder / split).rglob("*")):
        parts = path.relative_to(folder / split).parts
        if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp") and len(parts) == 3:
            rows.append({"image": str(path), "label": parts[0], "attribute": parts[1]})
    if not rows:
        raise FileNotFoundError(f"{folder / split} has no images in folders label/attribute.")
    names = {key: datasets.ClassLabel(names=sorted({row[key] for row in rows})) for key in ("label", "attribute")}
    return datasets.Dataset.from_list(rows, features=datasets.Features({"image": datasets.Image(), **names}))


def _read_pairs(folder: Path, attribute: str, num_pairs: int | None, seed: int, oriented: bool) -> datasets.Dataset:
    files = sorted(map(str, folder.rglob("*.parquet")))
    if not files:
        raise FileNotFoundError(f"{folder} has no Parquet files.")
    source = datasets.load_dataset("parquet", data_files=files, split="train")
    sides = {
        f"attribute_{side}": f"{attribute}_{side}" for side in "ab" if f"{attribute}_{side}" in source.column_names
    }
    return pairs_from_columns(source, "image_a", "image_b", **sides, num_pairs=num_pairs, oriented=oriented, seed=seed)
