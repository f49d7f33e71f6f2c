# SPDX-License-Identifier: Apache-2.0
"""Loads a user's own data as a benchmark: a folder of images, tables or Parquet files, or a set on the Hub."""

from __future__ import annotations

import io
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from ..pairs.classes import (
    check_filled,
    coded,
    common_names,
    is_class_label,
    is_text,
    match_labels,
    numbered,
    shown,
    sorted_names,
    values_of,
    with_column,
)
from ..pairs.images import is_deep, read_image, stored_images
from ..pairs.sources import TABLES, image_files, is_encoded, pairs_from_columns, pairs_from_rows, read_table, with_paths
from .benchmark import Benchmark

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
# the names of `datasets`
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)(-[0-9a-f]+)?")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
BUFFER = 1000  # rows within which a stream is shuffled
DRAWN = 0.15  # share of the training rows that a missing split gets
TAIL = 1024  # bytes
# format -> what a whole file has at its end, and in how many of its last bytes
ENDS = {"JPEG": (b"\xff\xd9", TAIL), "MPO": (b"\xff\xd9", TAIL), "PNG": (b"IEND", TAIL), "GIF": (b";", 2)}


def load_files(
    *,
    data_dir: str | None = None,
    seed: int = 0,
    num_pairs: int | None = None,
    oriented_pairs: bool = True,
    image: str = "image",
    label: str = "label",
    attribute: str | None = "attribute",
    pairs: str | None = "pairs",
    instance: str | None = None,
    keep: Mapping[str, Any] | None = None,
) -> Benchmark:
    """Loads your own data from a folder.

    Each split is one of these, in the folder or in its sub-folder `data`:

    - a sub-folder with images in `split/label/` or `split/label/attribute/`; deeper folders have no meaning;
    - a sub-folder with images and a file `metadata.csv`, `.jsonl` or `.parquet`, with the column `file_name`, as
      `imagefolder` reads it. One such file may be in the folder itself, with the split in the column `split`, or as the
      first part of `file_name`;
    - a table `split.csv`, `split.jsonl` or `split.parquet`, with images or paths of images. `push_to_hub` writes
      Parquet files named `split-00000-of-00001.parquet`.

    The splits are `train`, `validation` and `test`, or other names that `datasets` has for them (`val`, `dev`, ...). A
    folder without splits, `label/` or `label/attribute/`, is `train`. For a split that is missing, 15 % of the training
    rows of each group are drawn; the draw does not depend on `seed`. A warning says so, and which files are left out.

    Labels are classes, numbered in one way in all splits, by name: in the order of a ClassLabel, else sorted, as
    numbers if all names are numbers. Labels that are fractions are those of a regression. The attribute is numbered in
    the same way. It is optional: training reads it only for GroupDRO and the like, evaluation for the groups.

    Args:
        data_dir: the folder.
        seed: non-negative seed of the draw of the pairs.
        num_pairs: number of training pairs. `None` uses all.
        oriented_pairs: `False` swaps the sides of a random half of the training pairs.
        image: column of the images, or of their paths, which are relative to the folder of the table. By default
            `image`, or else the only column of images.
        label: column of the label. By default `label`, or else the only ClassLabel.
        attribute: column of the spurious attribute. `None` ignores the attribute.
        pairs: sub-folder with Parquet files of training pairs, with the columns `image_a` and `image_b`. If it is
            `None` or the sub-folder is missing, the benchmark has no training pairs, and a maker must make them.
        instance: column that names the object in an image. Images of validation and test that show the same object
            with both values of the attribute are the pairs for the flip rate. `None`: there are no such pairs.
        keep: column -> value, a class by its name. Only training rows with these values are used: `{"aligned": True}`,
            for example, leaves out the minority groups.

    Raises:
        FileNotFoundError: the folder, the training split or an image is missing.
        ValueError: a column is missing or has values that are no classes; validation or test has a label that training
            has not; an image is damaged; `keep` keeps no row; `instance` gives no pairs; `pairs_from_columns` refuses
            the training pairs.
    """
    if data_dir is None or not Path(data_dir).is_dir():
        raise FileNotFoundError(
            f"data_dir={data_dir!r} is no folder: give the folder with the files (unpack an archive first), "
            "--data_dir FOLDER."
        )
    folder = Path(data_dir)
    sets = read_folder(folder, image, pairs)
    data = _benchmark(sets, str(folder), image, label, attribute, instance, keep)
    found = folder / pairs if pairs else None
    if found is None or not found.is_dir():
        return data
    source = _read_pairs(found, attribute, num_pairs, seed, oriented_pairs)
    return replace(data, pairs=_match_pairs(source, data, str(found)))


def load_hub(
    name: str,
    *,
    config: str | None = None,
    revision: str | None = None,
    image: str = "image",
    label: str = "label",
    attribute: str | None = "attribute",
    instance: str | None = None,
    keep: Mapping[str, Any] | None = None,
    streaming: bool = False,
    seed: int = 0,
) -> Benchmark:
    """Loads a data set from the Hub, or another place that `datasets.load_dataset` knows.

    Splits, labels and attributes are read as by [`load_files`]. The benchmark has no training pairs: a maker must make
    them.

    Args:
        name: id of the set, such as `"user/name"`.
        config: name of the set's configuration (subset), if it has several.
        revision: branch, tag or commit of the set.
        image: column of the images. By default `image`, or else the only column of images.
        label: column of the label. By default `label`, or else the only ClassLabel.
        attribute: column of the spurious attribute. `None` ignores the attribute.
        instance: column that names the object in an image, for held-out pairs.
        keep: column -> value, a class by its name. Only training rows with these values are used.
        streaming: read the training images while they are used, without a download of the whole set. The label must be
            a ClassLabel, validation and test must be there and are read into memory, and a training needs `max_steps`.
            The rows are shuffled within a buffer of 1,000.
        seed: non-negative seed of that shuffling.

    Raises:
        FileNotFoundError: there is no training split.
        ValueError: the set cannot be loaded; a column or a value is wrong; the set cannot be streamed.
    """
    try:
        loaded = datasets.load_dataset(name, config, revision=revision, streaming=streaming)
    except Exception as failure:
        reason = " ".join(str(failure).split()) or type(failure).__name__
        raise ValueError(f"dataset={name!r} cannot be loaded from the Hub: {reason}") from failure
    splits = _splits({split: split for split in loaded}, name)
    sets = {split: loaded[found] for split, found in splits.items()}
    if not streaming:
        return _benchmark(sets, name, image, label, attribute, instance, keep)
    if len(sets) < len(SPLITS) or keep or sets["train"].features is None:
        raise ValueError(
            f"{name} has the splits {shown(loaded)}: streaming needs train, validation and test with known columns, "
            "and no keep. Set streaming: false."
        )
    first = {"train": sets["train"].take(BUFFER), **{split: sets[split] for split in SPLITS[1:]}}
    read = {split: datasets.Dataset.from_list([*s.decode(False)], features=s.features) for split, s in first.items()}
    names = {column: option for option, column in _columns(read, image, label, attribute, name).items()}
    names |= {attribute: "attribute"} if attribute else {}
    data = _benchmark(read, name, image, label, attribute, instance, None)
    train = _renamed(sets["train"], names, ignore_attribute=attribute is None)
    if any(train.features.get(column) != kind for column, kind in data.train.features.items()):
        raise ValueError(
            f"the label or the attribute of {name} is no ClassLabel, or is numbered otherwise in another split: "
            "streaming cannot number its classes. Set streaming: false."
        )
    return replace(data, train=train.shuffle(seed=seed, buffer_size=BUFFER))


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


# ---- Files ----


def read_folder(folder: Path, image: str = "image", pairs: str | None = "pairs") -> dict[str, datasets.Dataset]:
    """The splits that a folder has, as [`load_files`] finds them; none is drawn, and no label is checked.

    Raises:
        FileNotFoundError: there is no training split, or an image is missing.
        ValueError: the files can be read in no way, or in several ways.
    """
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        loaded = datasets.load_from_disk(str(folder))
        if isinstance(loaded, datasets.Dataset):
            return {"train": loaded}
        return {split: loaded[name] for split, name in _splits({name: name for name in loaded}, folder).items()}
    for name in METADATA:
        if (folder / name).is_file():
            return _read_common_metadata(folder / name)
    names: dict[str, str] = {}
    files: dict[str, list[Path]] = {}
    left_out, unread = [], []
    for path in [entry for place in (folder, folder / "data") if place.is_dir() for entry in sorted(place.iterdir())]:
        is_table = path.is_file() and path.suffix.lower() in TABLES
        if path.name.startswith((".", "__")) or not (is_table or path.is_dir()):
            unread += [path.name] if path.is_file() and path.stem.lower() in SPLIT_NAMES else []
            continue
        shard = SHARD.fullmatch(path.stem) if is_table else None
        name = shard[1] if shard else path.stem if is_table else path.name
        if name.lower() in SPLIT_NAMES:
            place = f"{path.parent / name}{path.suffix if is_table else ''}"
            names[place] = name
            files.setdefault(place, []).append(path)
        elif name not in (pairs, "data"):
            left_out.append(path)
    if not names:
        if unread:
            raise ValueError(
                f"{folder} has {shown(unread)}, which are not read: save tables as {', '.join(TABLES)}, and unpack "
                "archives."
            )
        _check_no_splits(folder)
        return {"train": _read_images(folder, skip=pairs)}
    if all(paths[0].is_file() for paths in files.values()):  # the folders have the images that the tables name
        left_out = [path for path in left_out if path.is_file()]
    unread += [path.name for path in left_out]
    if unread:
        logger.warning(
            f"{folder}: {shown(unread)} are left out, since they are no folder and no table ({', '.join(TABLES)}) with "
            "the name of a split."
        )
    return {split: _read_split(files[place], image) for split, place in _splits(names, folder).items()}


def _splits(names: Mapping[str, str], where: Any) -> dict[str, str]:
    """The place of each split, in the order of the splits.

    Args:
        names: place -> its name as a split. Names of other splits are left out, with a warning.
        where: what has the splits, for messages.

    Raises:
        FileNotFoundError: there is no training split.
        ValueError: a split is in two places.
    """
    splits: dict[str, str] = {}
    for place, name in names.items():
        split = SPLIT_NAMES.get(name.lower())
        if split is None:
            logger.warning(f"{where}: the split {name!r} is left out.")
        elif split in splits:
            raise ValueError(f"{where} has {split} twice, {splits[split]} and {place}: remove or rename one of them.")
        else:
            splits[split] = place
    if "train" not in splits:
        raise FileNotFoundError(
            f"{where} has no training split, only {shown(names.values())}: add one, named train. A measurement needs "
            "it too, for the names of the classes and the sizes of the groups."
        )
    return {split: splits[split] for split in SPLITS if split in splits}


def _read_split(paths: list[Path], image: str) -> datasets.Dataset:
    if not paths[0].is_dir():
        _check_shards(paths)
        dataset = read_table(paths)
        if image in dataset.column_names and is_text(dataset.features[image]):
            dataset = with_paths(dataset, image, paths[0].parent, str(paths[0]))
        return dataset
    (folder,) = paths
    for name in METADATA:
        if (folder / name).is_file():
            table = _with_files(read_table([folder / name]), folder / name)
            unnamed = len(image_files(folder)[0]) - len(table)
            if unnamed > 0:
                logger.warning(f"{folder}: {unnamed} images are left out, since {name} does not name them.")
            return table
    tables = sorted(folder.glob("*.parquet"))
    return read_table(tables) if tables else _read_images(folder)


def _check_shards(paths: list[Path]) -> None:
    """Raises a ValueError if a part of a split is missing."""
    shards = [SHARD.fullmatch(path.stem) for path in paths]
    found = {(int(shard[2]), int(shard[3])) if shard else (0, 1) for shard in shards}
    total = max(number for _, number in found)
    if len(paths) != len(found) or found != {(number, total) for number in range(total)}:
        raise ValueError(
            f"{paths[0].parent} has {len(paths)} files of this split, {shown(path.name for path in paths)}, but they "
            f"must be the parts 0 to {total - 1} of one set: add what is missing, and remove what is old."
        )


def _with_files(table: datasets.Dataset, path: Path) -> datasets.Dataset:
    """The table of a metadata file with the images that it names."""
    if "file_name" not in table.column_names:
        raise ValueError(f"{path} has no column 'file_name', only {shown(table.column_names)}.")
    if "image" in table.column_names:
        table = table.remove_columns("image")
    return with_paths(table, "file_name", path.parent, str(path)).rename_column("file_name", "image")


def _read_common_metadata(path: Path) -> dict[str, datasets.Dataset]:
    table = read_table([path])
    if "split" in table.column_names:
        splits = table["split"][:]
    else:
        names = table["file_name"][:] if "file_name" in table.column_names else []
        splits = [str(name).replace("\\", "/").removeprefix("./").split("/")[0] for name in names]
        splits = splits if all(name.lower() in SPLIT_NAMES for name in splits) else ["train"] * len(table)
    table = _with_files(table, path)
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(splits):
        rows.setdefault(str(name), []).append(row)
    return {split: table.select(rows[name]) for split, name in _splits({name: name for name in rows}, path).items()}


def _read_images(folder: Path, skip: str | None = None) -> datasets.Dataset:
    """Reads images in `label/` or `label/attribute/`."""
    images, others = image_files(folder)
    places = {path: path.relative_to(folder).parts[:-1] for path in images}
    places = {path: parts for path, parts in places.items() if skip is None or parts[:1] != (skip,)}
    rows = {path: parts for path, parts in places.items() if parts}
    if not rows:
        suffixes = ", ".join(sorted({path.suffix.lower() or path.name for path in others})[:5])
        raise FileNotFoundError(
            f"{folder} has no images in sub-folders LABEL or LABEL/ATTRIBUTE: put them there."
            + (f" It has other files ({suffixes}), which Pillow does not read." if others else "")
            + (f" {len(places)} images are in no sub-folder." if places else "")
        )
    left_out = [path for path in places if path not in rows] + others
    if left_out:
        kinds = Counter(path.suffix.lower() or path.name for path in left_out).most_common(5)
        logger.warning(
            f"{folder}: {len(left_out)} of {len(left_out) + len(rows)} files are left out "
            f"({', '.join(f'{count} {kind}' for kind, count in kinds)}; the first is {left_out[0].name}): they are no "
            "images that Pillow reads, or in no sub-folder."
        )
    depths = {min(len(parts), 2): path for path, parts in rows.items()}
    if len(depths) > 1:
        raise ValueError(
            f"{folder} has images in LABEL ({depths[1].relative_to(folder)}) and in LABEL/ATTRIBUTE "
            f"({depths[2].relative_to(folder)}): put all of them in one or the other."
        )
    columns = {"image": list(map(str, rows)), "label": [parts[0] for parts in rows.values()]}
    features: dict[str, Any] = {"image": datasets.Image(), "label": datasets.Value("string")}
    if 2 in depths:
        columns["attribute"] = [parts[1] for parts in rows.values()]
        features["attribute"] = datasets.Value("string")
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _check_no_splits(folder: Path) -> None:
    """Raises a ValueError if the sub-folders of what looks like labels are splits."""
    splits = [path for path in sorted(folder.glob("*/*")) if path.is_dir() and path.name.lower() in SPLIT_NAMES]
    parents = sorted({path.parent for path in splits})
    if splits:
        one = f"give --data_dir {parents[0]}."
        several = f"put the splits above the labels, {splits[0].name}/{parents[0].name}."
        raise ValueError(
            f"{folder} has no split, but {parents[0]} has {splits[0].name}: {one if len(parents) == 1 else several}"
        )


def _read_pairs(
    folder: Path, attribute: str | None, num_pairs: int | None, seed: int, oriented: bool
) -> datasets.Dataset:
    files = [path for path in sorted(folder.rglob("*.parquet")) if not path.name.startswith(".")]
    if not files:
        raise FileNotFoundError(
            f"{folder} has no Parquet files: add the training pairs. If a maker makes them, set pairs=None "
            "(dataset_options: {pairs: null})."
        )
    splits: dict[str | None, list[Path]] = {}
    for path in files:
        shard = SHARD.fullmatch(path.stem)
        splits.setdefault(SPLIT_NAMES.get((shard[1] if shard else path.stem).lower()), []).append(path)
    if "train" in splits and len(splits) > 1:
        left_out = [path.name for split, paths in splits.items() if split != "train" for path in paths]
        logger.warning(f"{folder}: {shown(left_out)} are left out, since the training pairs are those of train.")
        files = splits["train"]
    elif {*splits} & {"validation", "test"}:
        raise ValueError(f"{folder} has pairs of {shown(path.name for path in files)}, but no train.parquet: add it.")
    source = read_table(files)
    sides = {
        f"attribute_{side}": f"{attribute}_{side}" for side in "ab" if f"{attribute}_{side}" in source.column_names
    }
    return pairs_from_columns(source, "image_a", "image_b", **sides, num_pairs=num_pairs, oriented=oriented, seed=seed)


def _match_pairs(pairs: datasets.Dataset, data: Benchmark, where: str) -> datasets.Dataset:
    """Numbers the labels of pairs as the data does, and their attributes where the data knows them all."""
    if is_class_label(data.train.features["label"]):
        pairs = match_labels(pairs, data.train.features["label"].names, where)
    known = next((part.features["attribute"] for part in (data.train, data.test) if "attribute" in part.features), None)
    sides = [name for name in ("attribute_a", "attribute_b") if name in pairs.column_names]
    if known is None or not sides:
        return pairs
    read = {name: coded(pairs, name, f"the column {name!r} of {where}") for name in sides}
    if all(column.used <= {*known.names} for column in read.values()):
        for name, column in read.items():
            pairs = numbered(pairs, name, column, known.names)
    return pairs


# ---- Columns ----


def _benchmark(
    sets: dict[str, datasets.Dataset],
    where: str,
    image: str,
    label: str,
    attribute: str | None,
    instance: str | None,
    keep: Mapping[str, Any] | None,
) -> Benchmark:
    """Checks and numbers the columns of the splits, and draws what is missing."""
    for split, dataset in sets.items():
        if not len(dataset):
            raise ValueError(f"{split} of {where} has no rows.")
    wanted = _columns(sets, image, label, attribute, where)
    with_attribute = [split for split in sets if attribute and attribute in sets[split].column_names]
    if attribute not in (None, "attribute") and not with_attribute:
        raise ValueError(
            f"{where} has no column {attribute!r} for attribute, only {shown(sets['train'].column_names)}. Name one of "
            "them with the option attribute."
        )
    given = {**wanted, **({"attribute": attribute} if attribute else {})}
    if len({*given.values()}) < len(given):
        raise ValueError(f"image, label and attribute must be three columns, but are {given}.")
    if instance is not None and instance not in sets["train"].column_names:
        raise ValueError(f"{where} has no column {instance!r} for instance, only {shown(sets['train'].column_names)}.")
    names = {column: name for name, column in given.items()}
    sets = {split: _renamed(dataset, names, ignore_attribute=attribute is None) for split, dataset in sets.items()}
    for split, dataset in sets.items():
        kind = dataset.features["image"]
        if isinstance(kind, datasets.Image):
            continue
        if not is_encoded(kind):
            found = kind.dtype if isinstance(kind, datasets.Value) else type(kind).__name__
            raise ValueError(
                f"the column of images of {split} of {where} is a {found}: it must have images. Name another with the "
                "option image."
            )
        sets[split] = dataset.cast_column("image", datasets.Image())
    sets = _with_labels(sets, where)
    sets = _with_attributes(sets, where)
    for split, dataset in sets.items():
        _check_images(dataset, f"{split} of {where}")
    sets = _with_all_splits(sets, names.get(instance, instance), where)
    sets["train"] = _kept(sets["train"], {names.get(column, column): value for column, value in (keep or {}).items()})
    held_out = dict.fromkeys(SPLITS[1:])
    for split in SPLITS[1:]:
        if instance is not None:
            if "attribute" not in sets[split].column_names:
                raise ValueError(f"instance={instance!r} needs an attribute, but {split} of {where} has none.")
            held_out[split] = held_out_pairs(sets[split], names.get(instance, instance))
    return Benchmark(**sets, pairs=None, validation_pairs=held_out["validation"], test_pairs=held_out["test"])


def _columns(
    sets: Mapping[str, datasets.Dataset], image: str, label: str, attribute: str | None, where: str
) -> dict[str, str]:
    """The columns of image and label: `image` and `label`, or else the only ones of their kind."""
    wanted = {"image": image, "label": label}
    kinds = {"image": datasets.Image, "label": datasets.ClassLabel}
    features = sets["train"].features
    for option, column in wanted.items():
        if column == option and column not in features:
            found = [name for name, kind in features.items() if isinstance(kind, kinds[option]) and name != attribute]
            wanted[option] = found[0] if len(found) == 1 else column
        for split, dataset in sets.items():
            if wanted[option] not in dataset.column_names:
                raise ValueError(
                    f"{split} of {where} has no column {wanted[option]!r} for {option}, only "
                    f"{shown(dataset.column_names)}. Name one of them with the option {option}."
                )
    return wanted


def _renamed(dataset: Any, names: Mapping[str, str], ignore_attribute: bool) -> Any:
    """Gives columns their names in a benchmark; other columns that have these names already are left out."""
    names = {column: name for column, name in names.items() if column in dataset.column_names}
    taken = {*names.values(), *(["attribute"] if ignore_attribute else [])}
    dataset = dataset.remove_columns([name for name in dataset.column_names if name in taken and name not in names])
    changed = {column: name for column, name in names.items() if column != name}
    return dataset.rename_columns(changed) if changed else dataset


def _with_labels(sets: dict[str, datasets.Dataset], where: str) -> dict[str, datasets.Dataset]:
    """Numbers the labels by name, or makes all of them floats: those of train, or some fractions (a regression)."""
    stored = {split: values_of(dataset, "label") for split, dataset in sets.items()}
    floats = {split: values for split, values in stored.items() if pa.types.is_floating(values.type)}
    if "train" in floats or any(pc.any(pc.not_equal(pc.floor(values), values)).as_py() for values in floats.values()):
        return {split: _with_floats(dataset, f"the label of {split} of {where}") for split, dataset in sets.items()}
    read = {split: coded(dataset, "label", f"the label of {split} of {where}") for split, dataset in sets.items()}
    known = read["train"].names if read["train"].is_declared else sorted_names(read["train"].used)
    for split, column in read.items():
        unknown = column.used - {*known}
        if unknown:
            raise ValueError(
                f"{split} of {where} has the labels {shown(sorted_names(unknown))}, which train has not (it has "
                f"{shown(known)}): a model cannot learn them. Give both the same names, or leave these rows out."
            )
        missing = {*known} - read["train"].used
    if len(read["train"].used) < 2:
        raise ValueError(f"train of {where} has only the label {shown(read['train'].used)}: there is nothing to learn.")
    if missing:
        logger.warning(f"train of {where} has no rows of the labels {shown(sorted_names(missing))}.")
    names = known if read["train"].is_declared else common_names(read)
    return {split: numbered(dataset, "label", read[split], names) for split, dataset in sets.items()}


def _with_floats(dataset: datasets.Dataset, where: str) -> datasets.Dataset:
    values = values_of(dataset, "label")
    if is_class_label(dataset.features["label"]) or not (
        pa.types.is_floating(values.type) or pa.types.is_integer(values.type)
    ):
        raise ValueError(
            f"{where} has names, but that of another split has fractions: make both names, or both numbers."
        )
    check_filled(values, where)
    numbers = values.to_numpy(zero_copy_only=False).astype(np.float64)
    if not np.isfinite(numbers).all():
        raise ValueError(f"{where} is infinite in row {np.flatnonzero(~np.isfinite(numbers))[0]}: drop the row.")
    if (numbers == numbers.round()).all():
        logger.warning(
            f"{where} has whole numbers, stored as fractions: they are taken for numbers (a regression). Store whole "
            "numbers or names if they are classes."
        )
    if pa.types.is_floating(values.type):
        return dataset
    return with_column(dataset, "label", pa.array(numbers), datasets.Value("float64"))


def _with_attributes(sets: dict[str, datasets.Dataset], where: str) -> dict[str, datasets.Dataset]:
    having = {split: dataset for split, dataset in sets.items() if "attribute" in dataset.column_names}
    lacking = [split for split in sets if split not in having and split != "train"]
    if having and lacking:
        logger.warning(f"{shown(lacking)} of {where} has no attribute: there are no metrics of groups for it.")
    read = {
        split: coded(dataset, "attribute", f"the attribute of {split} of {where}") for split, dataset in having.items()
    }
    names = common_names(read)
    return {**sets, **{split: numbered(dataset, "attribute", read[split], names) for split, dataset in having.items()}}


def _kept(train: datasets.Dataset, keep: Mapping[str, Any]) -> datasets.Dataset:
    """The training rows with given values; a class is given by its name."""
    for column, value in keep.items():
        if column not in train.column_names:
            raise ValueError(f"keep: train has no column {column!r}, only {shown(train.column_names)}.")
        kind, values = train.features[column], train[column][:]
        if is_class_label(kind):
            values, value = [kind.names[number] for number in values], str(value)
        rows = np.flatnonzero([found == value for found in values])
        if not len(rows):
            found = sorted({str(found) for found in values})
            raise ValueError(f"keep: no training row has {column}={value!r}; its values are {shown(found)}.")
        train = train.select(rows)
    return train


# ---- Splits that are missing ----


def _with_all_splits(
    sets: dict[str, datasets.Dataset], instance: str | None, where: str
) -> dict[str, datasets.Dataset]:
    """Draws a missing validation or test split from the training rows."""
    for split in SPLITS[1:]:
        if split in sets:
            continue
        train = sets["train"]
        drawn = _draw(train, instance)
        sets["train"] = train.select(np.flatnonzero(~drawn))
        sets[split] = train.select(np.flatnonzero(drawn))
        logger.warning(
            f"{where} has no {split} split: {drawn.sum()} of {len(train)} training images are drawn for it. A shortcut "
            "of the training images is in them too. Add images without it to see how far a model relies on it."
        )
    return {split: sets[split] for split in SPLITS}


def _draw(train: datasets.Dataset, instance: str | None) -> np.ndarray:
    """Draws a share of the objects of each group; shape (n,), true for the rows that are drawn."""
    columns = [name for name in ("label", "attribute") if is_class_label(train.features.get(name))]
    groups = list(zip(*(train[name][:] for name in columns), strict=True)) if columns else [()] * len(train)
    names = train[instance][:] if instance else range(len(train))
    objects: dict[Any, list[int]] = {}
    for row, name in enumerate(names):
        objects.setdefault(row if name is None else (name,), []).append(row)
    strata: dict[Any, list[list[int]]] = {}
    for rows in objects.values():
        strata.setdefault(groups[rows[0]], []).append(rows)
    rng, drawn = np.random.default_rng(0), np.zeros(len(train), bool)
    for members in (strata[group] for group in sorted(strata)):
        count = max(1, round(DRAWN * len(members))) if len(members) > 1 else 0
        for number in rng.permutation(len(members))[:count]:
            drawn[members[number]] = True
    if not drawn.any():
        raise ValueError(f"{len(train)} training rows are too few to draw a split from them: add the split.")
    return drawn


# ---- Images ----


def _check_images(dataset: datasets.Dataset, where: str) -> None:
    """Raises a ValueError if an image is missing, cut off, no image, or of more than 8 bits a channel.

    Of JPEG, PNG, GIF and WebP only the start and the end are read. An image of another format, or one that does not
    look whole, is decoded.
    """
    batches = stored_images(dataset.with_format(None).select_columns(["image"]), ["image"]).iter(batch_size=256)
    for row, stored in enumerate(image for batch in batches for image in batch["image"]):
        if not _looks_whole(stored or {"bytes": None, "path": None}):
            read_image(stored, f"the image of row {row} of {where}")


def _looks_whole(stored: Mapping[str, Any]) -> bool:
    try:
        with io.BytesIO(stored["bytes"]) if stored["bytes"] is not None else open(stored["path"], "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            tail = file.read()
            file.seek(0)
            with Image.open(file) as image:
                if is_deep(image.mode):
                    return False
                if image.format == "WEBP":
                    file.seek(4)
                    return int.from_bytes(file.read(4), "little") + 8 <= size
                end, length = ENDS.get(image.format, (None, 0))
                return end is not None and end in tail[-length:]
    except Exception:  # Pillow raises many kinds
        return False
