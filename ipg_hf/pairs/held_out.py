# SPDX-License-Identifier: Apache-2.0
"""Splits held-out pairs off a pair set."""

from __future__ import annotations

import copy
from typing import Any

import datasets
import numpy as np
from torch.utils.data import Subset

from .adversarial import AdversarialPairs
from .loader import is_stream
from .transforms import ImageRows

SHARE = 0.2
ENOUGH = 10  # pairs that a set must have, so that the share is at least two


def hold_out_pairs(pairs: Any, name: str, *, seed: int) -> tuple[Any, Any]:
    """Splits a fifth of the pairs off a map-style pair set, drawn at random.

    Pairs with one `source_id` stay together: they show one image. If the pairs were made of the training set, the task
    loss still sees that image. The held-out pairs then show whether the outputs agree on new pairs, but their
    `pair_accuracy` is that of training images and may be too high. Pairs of other images are better.

    Args:
        pairs: the pair set.
        name: name of the pair set, for messages.
        seed: seed of the draw, not negative.

    Returns:
        The other pairs, and the held-out pairs, both in the order of the set.

    Raises:
        ValueError: the pairs are a stream or are made during training, or they are too few.
    """
    advice = "give held-out pairs as eval_pair_dataset, or choose the checkpoint by another metric_for_best_model."
    if is_stream(pairs) or isinstance(pairs, AdversarialPairs):
        raise ValueError(f"no pairs can be held out of {name}, which is no stored set of pairs: {advice}")
    is_stored = isinstance(pairs, datasets.Dataset) and "source_id" in pairs.column_names
    ids = np.asarray(pairs.with_format(None)["source_id"][:], dtype=str) if is_stored else np.arange(len(pairs))
    groups = np.unique(ids, return_inverse=True)[1].reshape(-1)
    count = groups.max() + 1 if len(groups) else 0
    if count < ENOUGH:
        raise ValueError(f"{name} has pairs of {count} images, too few to hold out a fifth of them: {advice}")
    drawn = np.random.default_rng(seed).permutation(count)[: round(SHARE * count)]
    is_held = np.isin(groups, drawn)
    return _rows(pairs, np.flatnonzero(~is_held)), _rows(pairs, np.flatnonzero(is_held))


def _rows(pairs: Any, rows: np.ndarray) -> Any:
    if isinstance(pairs, datasets.Dataset):
        return pairs.select(rows)
    if not isinstance(pairs, ImageRows):
        return Subset(pairs, rows.tolist())
    part = copy.copy(pairs)
    part.dataset = pairs.dataset.select(rows)
    part.preloaded = None if pairs.preloaded is None else {key: value[rows] for key, value in pairs.preloaded.items()}
    return part
