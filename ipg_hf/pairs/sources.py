# SPDX-License-Identifier: Apache-2.0
"""Makes pair sets from images that are paired already: in columns, in tables, in folders.

No image is decoded or copied: the rows have the paths or the bytes of the files.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
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
    """Makes a pair set from a set that has the two sides in two columns.

    Args:
        source: a `datasets.Dataset`, or an `IterableDataset`, which gives a stream of pairs.
        column_a: column of side a: images, or paths of image files.
        column_b: column of side b: images, or paths of image files.
        attribute_a: column of the spurious attribute on side a. By default `attribute_a`, if there is one.
        attribute_b: column of the spurious attribute on side b. By default `attribute_b`, if there is one.
        label: column of the label. By default `label`, if there is one.
        num_pairs: number of rows to use. They are drawn without replacement and stay in the order of the source. `None`
            uses all. A stream must have `None`.
        oriented: `False` swaps the sides of a random half of the pairs (an ablation). A stream must have `True`.
        seed: non-negative seed of both draws.

    Returns:
        A set with the columns `image_a`, `image_b`, `source_id` (that of the source, else the row's number; a stream
        has it only if its source has) and, if the source has them, `label`, `attribute_a`, `attribute_b`.

    Raises:
        ValueError: a column is missing or has no images; the source has fewer rows than `num_pairs`; a stream with
            `num_pairs` or `oriented=False`, which need the number of rows.
    """
    names = list(source.column_names or [])
    wanted = {"image_a": column_a, "image_b": column_b, "label": label}
    wanted |= {"attribute_a": attribute_a, "attribute_b": attribute_b}
    for target, name in wanted.items():
        if name is not None and name not in names:
            raise ValueError(f"there is no column {name!r} for {target}, only {names}: name one of them.")
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
            raise ValueError(
                f"the column {found[side]!r} is a {type(feature).__name__}: it must have images or paths of images."
            )
    if isinstance(source, datasets.IterableDataset):
        if num_pairs is not None or not oriented:
            raise ValueError(
                "a stream has no length: num_pairs and oriented=False need a map-style set. Use source.take(n)."
            )
        return source
    rows = draw_rows(len(source), num_pairs, seed=seed, of="source rows")
    if "source_id" not in source.column_names:
        source = source.add_column("source_id", np.arange(len(source)))
    return _swapped(source.select(rows), None if oriented else draw_swap(len(rows), seed))


def pairs_from_rows(
    source: datasets.Dataset, rows_a: Sequence[int] | np.ndarray, rows_b: Sequence[int] | np.ndarray, *, attribute: str
) -> datasets.Dataset:
    """Puts rows of one set side by side as pairs.

    Args:
        source: rows `image`, `label` and the attribute.
        rows_a: n row numbers, for side a.
        rows_b: n row numbers, for side b.
        attribute: column of the attribute.

    Returns:
        A set with the columns `image_a`, `image_b`, `label` (of side a), `attribute_a`, `attribute_b`.
    """
    sides = []
    for rows, side, label in ((rows_a, "a", ["label"]), (rows_b, "b", [])):
        part = source.select_columns(["image", attribute, *label]).select(rows)
        sides.append(part.rename_columns({"image": f"image_{side}", attribute: f"attribute_{side}"}))
    order = ["image_a", "image_b", "label", "attribute_a", "attribute_b"]
    return datasets.concatenate_datasets(sides, axis=1).select_columns(order)


def pairs_from_table(path: str | os.PathLike, *, column_a: str = "image_a", column_b: str = "image_b", **options: Any):
    """Makes a pair set from a CSV file, a Parquet file or a folder of Parquet files.

    Args:
        path: the file or folder. Relative paths of images are relative to the folder.
        column_a: column of side a: images, or paths of image files.
        column_b: column of side b: images, or paths of image files.
        **options: further arguments of [`pairs_from_columns`]. A label column of strings becomes a ClassLabel.

    Raises:
        ValueError: the file is missing or of another type; an image path does not exist (the message names the row);
            [`pairs_from_columns`] refuses the table.
    """
    path = Path(path)
    kind = "parquet" if path.is_dir() else {".csv": "csv", ".parquet": "parquet"}.get(path.suffix.lower())
    if not path.exists() or kind is None:
        raise ValueError(f"{path} is not there, or is no .csv file, .parquet file or folder of Parquet files.")
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
    """Makes a pair set from two folders that have the two sides under the same file names.

    A name includes the sub-folder and leaves out the suffix: `a/cat/1.png` and `b/cat/1.jpg` are a pair. The sub-folder
    is the label, as in `imagefolder`. Images directly in the folder have no label.

    Args:
        folder_a: images with the first value of the attribute.
        folder_b: the same images with the second value of the attribute.
        attributes: names of the two values. By default the names of the folders.
        num_pairs: number of pairs to use. They are drawn without replacement and stay in the order of the names. `None`
            uses all.
        oriented: `False` swaps the sides of a random half of the pairs (an ablation).
        seed: non-negative seed of both draws.

    Returns:
        A set with the columns `image_a`, `image_b` (paths, decoded when they are read), `attribute_a`, `attribute_b`,
        `source_id` (the name, a string) and, if there are sub-folders, `label`.

    Raises:
        ValueError: a folder is missing or has no images; a name is in one folder only, or twice in a folder; some
            images are in sub-folders and others are not; the two names in `attributes` are equal.
    """
    files = [_images_in(Path(folder)) for folder in (folder_a, folder_b)]
    lone = sorted(set(files[0]) ^ set(files[1]))
    if lone:
        where = folder_a if lone[0] in files[0] else folder_b
        raise ValueError(
            f"{len(lone)} names are in one of the two folders only, the first {lone[0]!r} in {where}: a pair needs "
            "both sides. Remove these images or add their other sides."
        )
    names = sorted(files[0])
    labels = [Path(name).parent.as_posix() for name in names]
    if "." in labels and len(set(labels)) > 1:
        raise ValueError(
            f"some images are in sub-folders (their labels), but {names[labels.index('.')]!r}, for example, is not. "
            "Put all of them in sub-folders, or none."
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
            raise ValueError(f"{name!r} is twice in {folder}: {found[name].name} and {path.name}. Remove one.")
        found[name] = path
    if not found:
        raise ValueError(f"{folder} has no images.")
    return found


def _with_paths(source: datasets.Dataset, column: str, folder: Path) -> datasets.Dataset:
    paths = [folder / value if value else None for value in source[column][:]]
    for row, path in enumerate(paths):
        if path is None or not path.is_file():
            raise ValueError(f"row {row} names {path} in the column {column!r}, which is no file: correct the path.")
    features = datasets.Features({**source.features, column: datasets.Image()})
    images = datasets.Dataset.from_dict(
        {column: list(map(str, paths))}, features=datasets.Features({column: datasets.Image()})
    )
    source = datasets.concatenate_datasets([source.remove_columns(column), images], axis=1)
    return source.select_columns(list(features))


def _swapped(pairs: datasets.Dataset, swap: np.ndarray | None) -> datasets.Dataset:
    """Exchanges the sides of the pairs for which `swap` is true."""
    if swap is None:
        return pairs
    other_side = {
        name: f"{name[:-2]}_b"
        for name in pairs.column_names
        if name.endswith("_a") and f"{name[:-2]}_b" in pairs.column_names
    }
    exchanged = pairs.rename_columns({**other_side, **{b: a for a, b in other_side.items()}}).select_columns(
        pairs.column_names
    )
    both = datasets.concatenate_datasets([pairs, exchanged])
    return both.select(np.arange(len(pairs)) + len(pairs) * swap)
