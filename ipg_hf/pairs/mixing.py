# SPDX-License-Identifier: Apache-2.0
"""Makes more pairs from few: mixtures of two pairs, the same on both sides."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets.utils import tqdm

from .images import read_image, stored_images
from .makers import check_columns, check_is_set, check_number, dataset_of, encode_image, image_column

SIDES = ("image_a", "image_b")
CACHED_IMAGES = 512  # decoded images in memory


def mix_pairs(pairs: datasets.Dataset, *, num_pairs: int, grid: int = 7, seed: int = 0) -> datasets.Dataset:
    """Enlarges a small pair set with mixtures of its pairs (ours, after CutMix, arXiv 1905.04899).

    A mixture takes each cell of a grid from one of two pairs, with probability 1/2 each, and the same cells on both
    sides. Its sides therefore differ only where the sides of the two pairs differ.

    Args:
        pairs: a pair set with images of one size.
        num_pairs: number of pairs in the result, at least the number in `pairs`. The first pairs of the result are
            those of `pairs`, unchanged. After them, each pair in turn is mixed with a newly drawn partner. With
            the same seed, a smaller result is the beginning of a larger one.
        grid: number of cells along each axis, at least 2 and at most the pixels of the shorter side.
        seed: non-negative seed of all draws.

    Returns:
        A set with the columns of `pairs`. The partner of a pair has the same `label` and `attribute_a`, if these
        columns exist. A mixture has the label, the attributes and the `source_id` of its first pair. A pair without a
        possible partner is repeated as it is. Mixtures are stored as PNG, RGB.

    Raises:
        ValueError: `pairs` is a stream or has fewer than two rows; `num_pairs` is below the number in `pairs`; `grid`
            is out of range; an image that should be mixed cannot be read; two of them differ in size.
    """
    check_is_set(pairs, "the pair set that mix_pairs enlarges")
    count = len(pairs)
    if count < 2:
        raise ValueError(f"mix_pairs needs at least two pairs to mix, but the set has {count}.")
    check_number("seed", seed, 0, math.inf, whole=True)
    for name, value in (("num_pairs", num_pairs), ("grid", grid)):
        check_number(name, value, -math.inf, math.inf, whole=True)
    if num_pairs < count:
        raise ValueError(
            f"num_pairs={num_pairs} of mix_pairs must be at least the number of pairs in the set, {count}."
        )
    if grid < 2:
        raise ValueError(f"grid={grid} is not valid: it must be at least 2 cells along each axis.")
    check_columns(pairs, SIDES)
    raw = stored_images(pairs.with_format(None), SIDES)
    files = {side: list(raw[side]) for side in SIDES}

    @lru_cache(CACHED_IMAGES)
    def image(side: str, row: int) -> np.ndarray:
        image = read_image(files[side][row], f"{side} of pair {row}", pairs.features[side].mode)
        return np.asarray(image.convert("RGB"))

    partners = _possible_partners(raw)
    rows = np.arange(num_pairs) % count
    sides: dict[str, list[Any]] = {side: list(files[side]) for side in SIDES}
    for number in tqdm(range(count, num_pairs), desc="Mixing pairs"):
        rng = np.random.default_rng((seed, 13, number))
        row = int(rows[number])
        partner, cells = _partner(row, partners[row], rng), rng.random((grid, grid)) < 0.5
        for side in SIDES:
            own = files[side][row]
            mixed = own if partner == row else _mixture(image(side, row), image(side, partner), cells, (row, partner))
            sides[side].append(mixed)

    def values(name: str) -> pa.ChunkedArray:
        if name in SIDES:
            return image_column(sides[name])
        return raw.select_columns([name]).with_format("arrow")[:][name].take(pa.array(rows))

    return dataset_of({name: (values(name), pairs.features[name]) for name in pairs.column_names})


def _possible_partners(pairs: datasets.Dataset) -> list[np.ndarray]:
    """For each row, all rows with its label and `attribute_a`, itself included. Rows of one group share one array."""
    columns = [pairs[name][:] for name in ("label", "attribute_a") if name in pairs.column_names]
    keys = list(zip(*columns, strict=True)) if columns else [()] * len(pairs)
    members: dict[tuple, list[int]] = {}
    for row, key in enumerate(keys):
        members.setdefault(key, []).append(row)
    groups = {key: np.array(rows) for key, rows in members.items()}
    return [groups[key] for key in keys]


def _partner(row: int, rows: np.ndarray, rng: np.random.Generator) -> int:
    """Draws another row from ascending `rows`, or returns the row itself if there is no other."""
    if len(rows) == 1:
        return row
    drawn = int(rng.integers(len(rows) - 1))
    return int(rows[drawn + (rows[drawn] >= row)])


def _mixture(own: np.ndarray, other: np.ndarray, cells: np.ndarray, rows: tuple[int, int]) -> bytes:
    if own.shape != other.shape:
        raise ValueError(
            f"mix_pairs mixes images of one size, but pair {rows[0]} has {own.shape[1]}×{own.shape[0]} pixels and pair "
            f"{rows[1]} {other.shape[1]}×{other.shape[0]}: resize the images first."
        )
    if len(cells) > min(own.shape[:2]):
        raise ValueError(
            f"grid={len(cells)} is more than the {min(own.shape[:2])} pixels of the shorter side of an image: use "
            "fewer cells."
        )
    down, across = (np.arange(length) * len(cells) // length for length in own.shape[:2])
    return encode_image(np.where(cells[down][:, across, None], other, own))
