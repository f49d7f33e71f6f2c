# SPDX-License-Identifier: Apache-2.0
"""Finds the files of a benchmark: in a given folder, in the folder that IPG_DATA names, or on the Hub."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from ..pairs.makers import dataset_of, image_column

VARIABLE = "IPG_DATA"


def find_folder(data_dir: str | None, names: Sequence[str], contents: Sequence[str], ways: str) -> Path | None:
    """Finds the folder with the files of a benchmark.

    Args:
        data_dir: the folder, or a folder that contains it. If it is `None`, the environment variable IPG_DATA names a
            folder that contains it.
        names: names that the folder may have in the folder that contains it. `"."` is that folder itself.
        contents: patterns of files or folders. The folder must contain a match of at least one of them.
        ways: how to get the files, for the message.

    Returns:
        The folder, or `None` if `data_dir` is `None` and IPG_DATA does not lead to it.

    Raises:
        FileNotFoundError: `data_dir` is given and does not lead to the folder.
    """
    parent = data_dir if data_dir is not None else os.environ.get(VARIABLE)
    folders = [Path(parent, name) for name in names] if parent else []
    for folder in [*([Path(data_dir)] if data_dir is not None else []), *folders]:
        if any(any(folder.glob(pattern)) for pattern in contents):
            return folder
    if data_dir is not None:
        within = " or ".join(name for name in names if name != ".")
        raise FileNotFoundError(
            f"data_dir={data_dir!r} has no {' or '.join(contents)}"
            f"{f', and no folder {within} with it' if within else ''}. {ways}"
        )
    return None


def load_hub_set(hub_set: str, columns: Sequence[str], splits: Sequence[str], ways: str) -> datasets.DatasetDict:
    """Loads a data set from the Hub and checks its columns and splits.

    Args:
        hub_set: id of the set.
        columns: columns that each split must have.
        splits: splits that the set must have.
        ways: how to get the files, for the message.

    Raises:
        FileNotFoundError: the set cannot be loaded.
        ValueError: a column or a split is missing.
    """
    try:
        hub = datasets.load_dataset(hub_set)
    except Exception as failure:
        folder = os.environ.get(VARIABLE)
        searched = f"{VARIABLE}={folder!r} does not have them" if folder else f"{VARIABLE} is not set"
        raise FileNotFoundError(
            f"the images are not found: {searched}, and the Hub set {hub_set} cannot be loaded ({failure}). {ways}"
        ) from failure
    lost = [split for split in splits if split not in hub]
    if lost:
        raise ValueError(f"{hub_set} has no splits {lost}, only {[*hub]}. {ways}")
    for split in splits:
        missing = [name for name in columns if name not in hub[split].column_names]
        if missing:
            raise ValueError(f"{split} of {hub_set} has no columns {missing}, only {hub[split].column_names}. {ways}")
    return hub


def labelled(
    images: datasets.Dataset | Iterable[Path],
    labels: np.ndarray,
    attributes: np.ndarray,
    label_feature: datasets.ClassLabel,
    attribute_feature: datasets.ClassLabel,
    where: str,
) -> datasets.Dataset:
    """Makes a set with the columns `image`, `label` and `attribute`. Images are neither decoded nor copied.

    Args:
        images: n paths of image files, or a set with n rows and the column `image`.
        labels: ids of `label_feature`, 0 or 1, shape (n,).
        attributes: ids of `attribute_feature`, 0 or 1, shape (n,).
        label_feature: the ClassLabel of the label.
        attribute_feature: the ClassLabel of the attribute.
        where: what the rows are, for the message.

    Raises:
        ValueError: there are no rows, or an id is neither 0 nor 1.
    """
    if not len(labels):
        raise ValueError(f"{where} has no rows.")
    columns = {}
    for name, ids, feature in (("label", labels, label_feature), ("attribute", attributes, attribute_feature)):
        check_values(f"{name} of {where}", ids, (0, 1))
        columns[name] = (pa.array(ids.astype(np.int64)), feature)
    if isinstance(images, datasets.Dataset):
        return datasets.concatenate_datasets([images.select_columns("image"), dataset_of(columns)], axis=1)
    return dataset_of({"image": (image_column(as_files(images)), datasets.Image()), **columns})


def check_values(what: str, values: np.ndarray, allowed: Sequence[int]) -> None:
    """Raises ValueError if integers have a value that is not allowed.

    Args:
        what: what the values are, for the message.
        values: integers.
        allowed: at least two integers.
    """
    wrong = set(np.unique(values).tolist()) - {*allowed}
    if wrong:
        *first, last = map(str, allowed)
        raise ValueError(f"{what} has the values {sorted(wrong)}, but must be {', '.join(first)} or {last}.")


def as_files(paths: Iterable[Path]) -> list[dict[str, str | None]]:
    """Turns paths into the form in which `datasets.Image` stores files that it reads when they are used."""
    return [{"bytes": None, "path": str(path)} for path in paths]
