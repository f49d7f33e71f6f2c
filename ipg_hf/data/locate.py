# SPDX-License-Identifier: Apache-2.0
"""Where the files of a benchmark are: a folder that is given, the one that IPG_DATA names, or the Hub."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from ..pairs.makers import dataset_of, image_column

VARIABLE = "IPG_DATA"


def find_folder(data_dir: str | None, names: Sequence[str], holds: Sequence[str], ways: str) -> Path | None:
    """The folder of a benchmark's files.

    Args:
        data_dir: the folder, or the one that it lies in; without it, the latter is taken from the environment variable
            IPG_DATA.
        names: what the folder may be called in the one that it lies in.
        holds: patterns of files or folders by which it is known; one of them must be there.
        ways: how to get the files, for the message.

    Returns:
        The folder, or `None` where `data_dir` is not given and IPG_DATA holds none.

    Raises:
        FileNotFoundError: `data_dir` is given and is no such folder.
    """
    around = data_dir if data_dir is not None else os.environ.get(VARIABLE)
    folders = [Path(around, name) for name in names] if around else []
    for folder in [*([Path(data_dir)] if data_dir is not None else []), *folders]:
        if any(any(folder.glob(pattern)) for pattern in holds):
            return folder
    if data_dir is not None:
        raise FileNotFoundError(
            f"data_dir={data_dir!r} has no {' or '.join(holds)}, nor has a folder {' or '.join(names)} in it. {ways}"
        )
    return None


def load_hub_set(hub_set: str, columns: Sequence[str], splits: Sequence[str], ways: str) -> datasets.DatasetDict:
    """A set of the Hub that must have these columns and splits.

    Raises:
        FileNotFoundError: it cannot be loaded.
        ValueError: it lacks a column or a split.
    """
    try:
        hub = datasets.load_dataset(hub_set)
    except Exception as failure:
        folder = os.environ.get(VARIABLE)
        searched = f"{VARIABLE}={folder!r} holds no such files" if folder else f"{VARIABLE} is not set"
        raise FileNotFoundError(f"nothing is found: {searched}, and {hub_set}: {failure}. {ways}") from failure
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
    """A set with the columns `image`, `label` and `attribute`. Images are neither decoded nor copied.

    Args:
        images: n paths of image files, or a set with the column `image`.
        labels: ids of `label_feature`, 0 or 1, shape (n,).
        attributes: ids of `attribute_feature`, 0 or 1, shape (n,).
        label_feature: names of the labels.
        attribute_feature: names of the attributes.
        where: what the rows are, for the message.

    Raises:
        ValueError: there are no rows, or an id is neither 0 nor 1.
    """
    if not len(labels):
        raise ValueError(f"{where} has no rows.")
    columns = {}
    for name, ids, feature in (("label", labels, label_feature), ("attribute", attributes, attribute_feature)):
        wrong = set(np.unique(ids).tolist()) - {0, 1}
        if wrong:
            raise ValueError(f"{name} of {where} has the values {sorted(wrong)}, but must be 0 or 1.")
        columns[name] = (pa.array(ids.astype(np.int64)), feature)
    if isinstance(images, datasets.Dataset):
        return datasets.concatenate_datasets([images.select_columns("image"), dataset_of(columns)], axis=1)
    return dataset_of({"image": (image_column(as_files(images)), datasets.Image()), **columns})


def as_files(paths: Iterable[Path]) -> list[dict[str, str | None]]:
    """Paths in the form in which `datasets.Image` keeps files that are read when they are used."""
    return [{"bytes": None, "path": str(path)} for path in paths]
