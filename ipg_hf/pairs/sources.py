# SPDX-License-Identifier: Apache-2.0
"""Pairs that lie on disk or in columns already. Nothing is decoded or copied: rows hold the files' paths or bytes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from .makers import draw_rows, draw_swap

SUFFIXES = frozenset(Image.registered_extensions())


def pairs_from_columns(
    source: Any,
    column_a: str,
    column_b: str,
    *,
    attribute_a: str | None = None,
    attribute_b: str | None = None,
    label: str | None = None,
    num_pairs: int | None = None,
    oriented: bool = True,
    seed: int = 0,
) -> Any:
    """A pair set of a set that has the two sides in two columns.

    Args:
        source: a `datasets.Dataset`, or an `IterableDataset`, which stays a stream.
        column_a: column of side a: images, or paths of image files.
        column_b: likewise, of side b.
        attribute_a: column of the spurious attribute on side a; by default `attribute_a` where there is one.
        attribute_b: likewise, of side b.
        label: column of the label; by default `label` where there is one.
        num_pairs: number of rows to use, drawn without replacement, in the order of the source; `None`: all.
        oriented: `False` swaps the sides of a random half of the pairs (an ablation).
        seed: non-negative; seed of both draws.

    Returns:
        The set with the columns `image_a`, `image_b`, `source_id` (the row's own, else its number) and, where they are,
        `label`, `attribute_a`, `attribute_b`.

    Raises:
        ValueError: a column is missing or is no image; fewer rows than `num_pairs`; a stream with `num_pairs` or
            `oriented=False`, which need the length.
    """
    names = list(source.column_names or [])
    wanted = {"image_a": column_a, "image_b": column_b, "label": label}
    wanted |= {"attribute_a": attribute_a, "attribute_b": attribute_b}
    for target, name in wanted.items():
        if name is not None and name not in names:
            raise ValueError(f"there is no column {name!r} for {target}, only {names}.")
    for target in ("label", "attribute_a", "attribute_b", "source_id"):
        if wanted.get(target) is None and target in names:
            wanted[target] = target
    found = {target: name for target, name in wanted.items() if name is not None}
    source = source.select_columns(list(dict.fromkeys(found.values())))
    source = source.rename_columns({name: target for target, name in found.items() if name != target})
    for side in ("image_a", "image_b"):
        feature = (source.features or {}).get(side)
        if isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string"):
            source = source.cast_column(side, datasets.Image())
        elif feature is not None and not isinstance(feature, datasets.Image):
            raise ValueError(f"{found[side]} is a {type(feature).__name__}: it must hold images or paths of images.")
    if isinstance(source, datasets.IterableDataset):
        if num_pairs is not None or not oriented:
            raise ValueError("a stream has no length: num_pairs and oriented=False need a map-style set. Use take(n).")
        return source
    rows = draw_rows(len(source), num_pairs, seed=seed, of="source rows")
    if "source_id" not in source.column_names:
        source = source.add_column("source_id", np.arange(len(source)))
    return _swapped(source.select(rows), None if oriented else draw_swap(len(rows), seed))


def with_counterparts(dataset: datasets.Dataset, pairs: datasets.Dataset) -> datasets.Dataset:
    """A training set with the counterpart of each image, for `pair_source="batch"`.

    Args:
        dataset: rows with a column `image`.
        pairs: rows with `image_a` and `image_b`, of which one is the training image, by its stored bytes or path. All
            of them are read into memory, as they are stored.

    Returns:
        The set with a column `image_b`: the other side of the image's pair, of several pairs of the last.

    Raises:
        ValueError: a training image is in no pair.
    """

    def stored(rows: datasets.Dataset, column: str) -> list[dict]:
        return rows.select_columns(column).cast_column(column, datasets.Image(decode=False))[column][:]

    sides = [stored(pairs, column) for column in ("image_a", "image_b")]
    others = {}
    for images, counterparts in (sides, sides[::-1]):
        others |= {image["bytes"] or image["path"]: other for image, other in zip(images, counterparts, strict=True)}
    found = [others.get(image["bytes"] or image["path"]) for image in stored(dataset, "image")]
    lacking = [row for row, other in enumerate(found) if other is None]
    if lacking:
        raise ValueError(
            f"pair_source='batch' needs the counterpart of every training image, but {len(lacking)} of {len(dataset)} "
            f"are in none of the {len(pairs)} pairs, first that of row {lacking[0]}: make a pair of each "
            "(num_pairs), or use pair_source='pairs'."
        )
    return dataset.add_column("image_b", found, feature=datasets.Image())


def pairs_from_table(path: str | os.PathLike, *, column_a: str = "image_a", column_b: str = "image_b", **options: Any):
    """A pair set of a CSV or Parquet file, or of a folder of Parquet files, whose rows hold images or paths of images.

    Args:
        path: the file or folder. Relative paths in it are relative to its folder.
        column_a: column of side a.
        column_b: column of side b.
        **options: as in [`pairs_from_columns`]. A column `label` of texts becomes a ClassLabel.

    Raises:
        ValueError: the file is missing or of another type; a path in it does not exist (the row is named); as in
            [`pairs_from_columns`].
    """
    path = Path(path)
    kind = "parquet" if path.is_dir() else {".csv": "csv", ".parquet": "parquet"}.get(path.suffix.lower())
    if not path.exists() or kind is None:
        raise ValueError(f"{path} is not there, or neither a .csv nor a .parquet file nor a folder of Parquet files.")
    files = sorted(map(str, path.rglob("*.parquet"))) if path.is_dir() else [str(path)]
    if not files:
        raise ValueError(f"{path} has no Parquet files.")
    source = datasets.load_dataset(kind, data_files=files, split="train")
    folder = path if path.is_dir() else path.parent
    for column in {column_a, column_b} & {*source.column_names}:
        feature = source.features[column]
        if isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string"):
            source = _with_paths(source, column, folder)
    label = options.get("label") or "label"
    feature = source.features.get(label)
    if isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string"):
        source = source.cast_column(label, datasets.ClassLabel(names=sorted(set(source[label][:]))))
    return pairs_from_columns(source, column_a, column_b, **options)


def pairs_from_folders(
    folder_a: str | os.PathLike,
    folder_b: str | os.PathLike,
    *,
    attributes: tuple[str, str] | None = None,
    num_pairs: int | None = None,
    oriented: bool = True,
    seed: int = 0,
) -> datasets.Dataset:
    """A pair set of two folders that hold the two sides under equal names.

    Names are compared with their sub-folders and without the suffix: `a/cat/1.png` goes with `b/cat/1.jpg`. A
    sub-folder is the label, as in `imagefolder`; images right in the folder have none.

    Args:
        folder_a: images with the first value of the attribute.
        folder_b: the same images with the second.
        attributes: names of the two values; by default those of the folders.
        num_pairs: number of pairs to use, drawn without replacement, in the order of the names; `None`: all.
        oriented: `False` swaps the sides of a random half of the pairs (an ablation).
        seed: non-negative; seed of both draws.

    Returns:
        A set with the columns `image_a`, `image_b` (paths, decoded as they are read), `attribute_a`, `attribute_b`,
        `source_id` (the name, a string) and, where there are sub-folders, `label`.

    Raises:
        ValueError: a folder is missing or empty; names are in one folder alone, or twice in one (they are named); some
            images lie in sub-folders and some do not.
    """
    files = [_images_in(Path(folder)) for folder in (folder_a, folder_b)]
    lone = sorted(set(files[0]) ^ set(files[1]))
    if lone:
        where = folder_a if lone[0] in files[0] else folder_b
        raise ValueError(
            f"{len(lone)} names are in one of the two folders alone, the first {lone[0]!r} in {where}: a pair needs "
            "both sides. Remove them or add the other side."
        )
    names = sorted(files[0])
    labels = [Path(name).parent.as_posix() for name in names]
    if "." in labels and len(set(labels)) > 1:
        raise ValueError(
            f"some images lie in sub-folders (labels) and some, such as {names[labels.index('.')]!r}, not."
        )
    values = [str(value) for value in (attributes or (Path(folder_a).name, Path(folder_b).name))]
    if len(set(values)) != 2:
        raise ValueError(f"attributes={tuple(values)} must be two different names: one for each folder.")
    rows = draw_rows(len(names), num_pairs, seed=seed, of="pairs of files")
    feature = datasets.ClassLabel(names=values)
    columns: dict[str, Any] = {
        f"image_{side}": [str(part[names[i]]) for i in rows] for side, part in zip("ab", files, strict=True)
    }
    features: dict[str, Any] = {"image_a": datasets.Image(), "image_b": datasets.Image()}
    if "." not in labels:
        columns["label"] = [labels[i] for i in rows]
        features["label"] = datasets.ClassLabel(names=sorted(set(labels)))
    columns |= {"attribute_a": [0] * len(rows), "attribute_b": [1] * len(rows), "source_id": [names[i] for i in rows]}
    features |= {"attribute_a": feature, "attribute_b": feature, "source_id": datasets.Value("string")}
    pairs = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return _swapped(pairs, None if oriented else draw_swap(len(rows), seed))


def _images_in(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder.")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in SUFFIXES:
            continue
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise ValueError(f"{name!r} is twice in {folder}: {found[name].name} and {path.name}.")
        found[name] = path
    if not found:
        raise ValueError(f"{folder} has no images.")
    return found


def _with_paths(source: datasets.Dataset, column: str, folder: Path) -> datasets.Dataset:
    paths = [folder / value if value else None for value in source[column][:]]
    for row, path in enumerate(paths):
        if path is None or not path.is_file():
            raise ValueError(f"row {row} names {path} in the column {column}, which is no file.")
    features = datasets.Features({**source.features, column: datasets.Image()})
    images = datasets.Dataset.from_dict(
        {column: list(map(str, paths))}, features=datasets.Features({column: datasets.Image()})
    )
    source = datasets.concatenate_datasets([source.remove_columns(column), images], axis=1)
    return source.select_columns(list(features))


def _swapped(pairs: datasets.Dataset, swap: np.ndarray | None) -> datasets.Dataset:
    """The pairs, with the sides exchanged where `swap` is true."""
    if swap is None:
        return pairs
    twins = {
        name: f"{name[:-2]}_b"
        for name in pairs.column_names
        if name.endswith("_a") and f"{name[:-2]}_b" in pairs.column_names
    }
    exchanged = pairs.rename_columns({**twins, **{b: a for a, b in twins.items()}}).select_columns(pairs.column_names)
    both = datasets.concatenate_datasets([pairs, exchanged])
    return both.select(np.arange(len(pairs)) + len(pairs) * swap)
