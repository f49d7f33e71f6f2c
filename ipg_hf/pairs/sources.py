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
import pyarrow.parquet as pq
from PIL import Image

from .classes import coded, common_names, is_class_label, is_text, numbered, one_form, sorted_names
from .makers import check_is_set, draw_rows, draw_swap

# what PIL writes only, and what it knows but cannot read by itself
UNREADABLE = ("MPEG", "BUFR", "GRIB", "HDF5", "WMF")
SUFFIXES = frozenset(
    suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN and name not in UNREADABLE
)
TABLES = {".csv": "csv", ".jsonl": "json", ".parquet": "parquet"}


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
        has it only if its source has) and, if the source has them, `label`, `attribute_a`, `attribute_b`. Except in a
        stream, columns of texts become ClassLabels, and the two attributes have the same one.

    Raises:
        ValueError: a column is missing or has no images; a label or an attribute of texts is missing in a row; the
            source has fewer rows than `num_pairs`; a stream with `num_pairs` or `oriented=False`, which need the number
            of rows.
    """
    check_is_set(source, "the source", or_stream=True)
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
        if is_text(feature) or is_encoded(feature):
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
    source = _with_names(_with_names(source, ["label"]), ["attribute_a", "attribute_b"])
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
    """Makes a pair set from a CSV, JSON Lines or Parquet file, or a folder of Parquet files.

    Args:
        path: the file or folder. Relative paths of images are relative to the folder.
        column_a: column of side a: images, or paths of image files.
        column_b: column of side b: images, or paths of image files.
        **options: further arguments of [`pairs_from_columns`].

    Raises:
        ValueError: the file is missing, of another type, not UTF-8 or damaged; an image path does not exist (the
            message names the row); [`pairs_from_columns`] refuses the table.
    """
    path = Path(path)
    if not path.is_dir() and (not path.exists() or path.suffix.lower() not in TABLES):
        raise ValueError(f"{path} is not there, or is no {' or '.join(TABLES)} file and no folder of Parquet files.")
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} has no Parquet files.")
    source = read_table(files)
    folder = path if path.is_dir() else path.parent
    for column in {column_a, column_b} & {*source.column_names}:
        if is_text(source.features[column]):
            source = with_paths(source, column, folder, str(path))
    return pairs_from_columns(source, column_a, column_b, **options)


def read_table(files: Sequence[Path]) -> datasets.Dataset:
    """Reads tables of one type as one set: CSV, JSON Lines or Parquet, in UTF-8.

    In a CSV file, an empty field alone is a missing value: `None` and `NA` are texts.

    Args:
        files: at least one file. The suffix of the first is the type of all.

    Raises:
        ValueError: a file is not UTF-8, is damaged or has no rows, or the files have different columns. The message
            names the file.
    """
    kind = TABLES[files[0].suffix.lower()]
    options: dict[str, Any] = {"keep_default_na": False, "na_values": [""]} if kind == "csv" else {}
    for file in files:
        if kind != "parquet":
            _check_utf8(file)
        elif file.stat().st_size == 0:
            raise ValueError(f"{file} is empty: copy it again.")
    if kind == "parquet":
        _check_alike(files)
    names = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    try:
        table = datasets.load_dataset(kind, data_files=[*map(str, files)], split="train", **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError, NotImplementedError) as failure:
        cause: BaseException = failure
        while cause.__cause__ or cause.__context__:
            cause = cause.__cause__ or cause.__context__
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise ValueError(f"{names} cannot be read as {kind.upper()}: {reason}") from failure
    if kind == "csv" and len(table.column_names) == 1 and {*table.column_names[0]} & {";", "\t"}:
        raise ValueError(f"{names} has the one column {table.column_names[0]!r}: save it with commas between columns.")
    return table


def _check_alike(files: Sequence[Path]) -> None:
    """Raises a ValueError if Parquet files have other columns or classes, which reading them as one would mix up."""
    first: dict[str, Any] = {}
    for file in files:
        try:
            kinds = datasets.Features.from_arrow_schema(pq.read_schema(file))
        except (OSError, ValueError) as failure:
            raise ValueError(f"{file} cannot be read as PARQUET: {failure}") from failure
        kinds = {name: kind.names if is_class_label(kind) else None for name, kind in kinds.items()}
        first = first or kinds
        if kinds != first:
            name = next(name for name in sorted({*first, *kinds}) if first.get(name, "") != kinds.get(name, ""))
            found = ["no such column" if name not in part else part[name] or "no classes" for part in (first, kinds)]
            raise ValueError(
                f"{files[0]} and {file} have another column {name!r} ({found[0]} and {found[1]}): write both alike."
            )


def _check_utf8(file: Path) -> None:
    with open(file, "rb") as lines:
        number = 0
        for number, line in enumerate(lines, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as failure:
                raise ValueError(
                    f"{file} is not UTF-8 (line {number}, byte {line[failure.start]:#x}): save it in UTF-8; in a "
                    "spreadsheet choose the type 'CSV UTF-8'."
                ) from failure
    if number == 0:
        raise ValueError(f"{file} is empty: it needs a line of column names and rows.")


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
        features["label"] = datasets.ClassLabel(names=sorted_names(set(labels)))
    columns |= {"attribute_a": [0] * len(rows), "attribute_b": [1] * len(rows), "source_id": [names[i] for i in rows]}
    features |= {"attribute_a": feature, "attribute_b": feature, "source_id": datasets.Value("string")}
    pairs = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return _swapped(pairs, None if oriented else draw_swap(len(rows), seed))


def is_encoded(feature: Any) -> bool:
    """Whether a column has encoded images that `datasets.Image` can read: bytes, or `{"bytes": ..., "path": ...}`."""
    is_bytes = isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")
    return is_bytes or (isinstance(feature, dict) and {*feature} == {"bytes", "path"})


def image_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Lists the files in a folder and its sub-folders: those with the suffix of an image, and the others.

    Hidden files and folders, whose names begin with a dot, and folders that begin with two underscores are left out, as
    `imagefolder` does.
    """
    images: list[Path] = []
    others: list[Path] = []

    def read(place: Path, above: tuple[str, ...]) -> None:
        real = os.path.realpath(place)
        for entry in os.scandir(place) if real not in above else ():  # a link may lead back up
            path = place / entry.name
            if entry.is_dir() and not entry.name.startswith((".", "__")):
                read(path, (*above, real))
            # a link to nothing is refused when it is read
            elif (entry.is_file() or not path.exists()) and not entry.name.startswith("."):
                (images if path.suffix.lower() in SUFFIXES else others).append(path)

    read(folder, ())
    return sorted(images), sorted(others)


def _images_in(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder.")
    found: dict[str, Path] = {}
    for path in image_files(folder)[0]:
        (name,) = one_form([path.relative_to(folder).with_suffix("").as_posix()])
        if name in found:
            raise ValueError(f"{name!r} is twice in {folder}: {found[name].name} and {path.name}. Remove one.")
        found[name] = path
    if not found:
        raise ValueError(f"{folder} has no images.")
    return found


def with_paths(source: datasets.Dataset, column: str, folder: Path, where: str) -> datasets.Dataset:
    """Makes images of a column of paths. The columns keep their order.

    Args:
        source: the set.
        column: the column of paths.
        folder: what relative paths are relative to.
        where: what the set is, for the message.

    Raises:
        ValueError: a path is missing or is no file. The message names the row.
    """
    paths = [folder / value if value else None for value in source[column][:]]
    for row, path in enumerate(paths):
        if path is not None and "\\" in path.name and not path.is_file():  # a table from Windows
            path = paths[row] = folder / str(source[row][column]).replace("\\", "/")
        if path is None or not path.is_file():
            raise ValueError(
                f"{where}: row {row} names {path} in the column {column!r}, which is no file: correct the path."
            )
    images = datasets.Dataset.from_dict(
        {column: list(map(str, paths))}, features=datasets.Features({column: datasets.Image()})
    )
    order = source.column_names
    return datasets.concatenate_datasets([source.remove_columns(column), images], axis=1).select_columns(order)


def _with_names(source: datasets.Dataset, columns: Sequence[str]) -> datasets.Dataset:
    """Makes ClassLabels of columns of texts, or of ClassLabels that differ: one for all of the columns."""
    columns = [name for name in columns if name in source.column_names]
    kinds = [source.features[name] for name in columns]
    if not all(is_text(kind) or is_class_label(kind) for kind in kinds):
        return source
    read = {name: coded(source, name, f"the column {name!r}") for name in columns}
    names = common_names(read)
    for name, column in read.items():
        source = numbered(source, name, column, names)
    return source


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
