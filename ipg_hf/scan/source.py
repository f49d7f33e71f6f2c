# SPDX-License-Identifier: Apache-2.0
"""Reads the images that a scan needs: no label, no attribute, no certain split."""

from __future__ import annotations

import logging
import os

import datasets

from ..data.files import load_files
from ..names import nearest

logger = logging.getLogger(__name__)

PREFERRED = ("test", "validation", "train")  # images that the model was not trained on tell more


def load_images(place: str | os.PathLike, split: str | None = None) -> datasets.Dataset:
    """Loads a set of images from a folder, or from the Hub.

    Args:
        place: a folder that a training reads ([`~ipg_hf.data.load_files`]), with the splits that it would have there;
            or else a folder or Hub id that `datasets.load_dataset` reads.
        split: name of the split. By default test, or else validation, or else train.

    Returns:
        A set with the column `image`, and the set's other columns.

    Raises:
        ValueError: the set cannot be loaded, has not this split, or has no or several columns of images.
    """
    loaded = _load(str(place))
    name = split or next((name for name in PREFERRED if name in loaded), None)
    if name not in loaded:
        hint = nearest(name, loaded) if name else f" Known: {', '.join(loaded)}."
        raise ValueError(f"{place} has no split {name or ' or '.join(PREFERRED)!r}.{hint}")
    found = [column for column, kind in loaded[name].features.items() if isinstance(kind, datasets.Image)]
    if "image" not in found and len(found) != 1:
        raise ValueError(f"{place} has the columns of images {found}: one of them must be named 'image'.")
    images = loaded[name]
    return images if "image" in found else images.rename_column(found[0], "image")


def _load(place: str) -> dict[str, datasets.Dataset]:
    """The splits of a folder, or of a set on the Hub."""
    if os.path.isdir(place):
        try:
            data = load_files(data_dir=place)
            return {name: getattr(data, name) for name in PREFERRED}
        except (FileNotFoundError, ValueError) as refusal:  # images without labels can be scanned too
            logger.warning(f"A training could not read {place}, so it is read as `datasets` reads it: {refusal}")
    try:
        return datasets.load_dataset(place)
    except Exception as failure:
        reason = " ".join(str(failure).split()) or type(failure).__name__
        raise ValueError(f"{place} cannot be loaded: {reason}") from failure
