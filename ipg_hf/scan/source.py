# SPDX-License-Identifier: Apache-2.0
"""Reads the images that a scan needs: no label, no attribute, no certain split."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import datasets

from ..data.files import SPLIT_NAMES, read_folder
from ..names import nearest

logger = logging.getLogger(__name__)

PREFERRED = ("test", "validation", "train")  # images that the model was not trained on tell more


def load_images(place: str | os.PathLike, split: str | None = None) -> datasets.Dataset:
    """Loads a set of images from a folder, or from the Hub.

    Args:
        place: a folder as [`~ipg_hf.data.load_files`] reads it, but with the splits that it has: none is drawn. Or
            another folder or Hub id that `datasets.load_dataset` reads.
        split: name of the split. By default test, or else validation, or else train.

    Returns:
        A set with the column `image`, and the set's other columns.

    Raises:
        ValueError: the set cannot be loaded, has not this split, or has no or several columns of images.
    """
    loaded = _load(str(place), split)
    if split is None:
        name = next((name for name in PREFERRED if name in loaded), None)
    else:
        name = split if split in loaded else SPLIT_NAMES.get(split.lower())
    if name not in loaded:
        hint = nearest(split, loaded) if split else f" Known: {', '.join(loaded)}."
        raise ValueError(f"{place} has no split {split or ' or '.join(PREFERRED)!r}.{hint}")
    found = [column for column, kind in loaded[name].features.items() if isinstance(kind, datasets.Image)]
    if "image" not in found and len(found) != 1:
        raise ValueError(f"{place} has the columns of images {found}: one of them must be named 'image'.")
    images = loaded[name]
    return images if "image" in found else images.rename_column(found[0], "image")


def _load(place: str, split: str | None) -> Mapping[str, datasets.Dataset]:
    """The splits of a folder, or of a set on the Hub."""
    if os.path.isdir(place) and (split is None or split.lower() in SPLIT_NAMES):
        try:
            return read_folder(Path(place))
        except (FileNotFoundError, ValueError) as refusal:  # images without labels can be scanned too
            logger.warning(f"A training could not read {place}, so it is read as `datasets` reads it: {refusal}")
    try:
        return datasets.load_dataset(place)
    except Exception as failure:
        reason = " ".join(str(failure).split()) or type(failure).__name__
        raise ValueError(f"{place} cannot be loaded: {reason}") from failure
