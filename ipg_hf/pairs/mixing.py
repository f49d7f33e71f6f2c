# SPDX-License-Identifier: Apache-2.0
"""Many pairs of few: mixtures of two pairs, both sides alike."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from .makers import dataset_of, encode_image, image_column

SIDES = ("image_a", "image_b")
HELD = 512  # decoded images held at once


def mix_pairs(pairs: datasets.Dataset, *, num_pairs: int, grid: int = 7, seed: int = 0) -> datasets.Dataset:
    """Enlarges a small pair set by mixtures of its pairs (ours, after CutMix, arXiv 1905.04899).

    A mixture takes each cell of a grid from one of two pairs, of either with probability 1/2, the same cells on both
    sides. So its sides differ where those of the two pairs do, and in that alone.

    Args:
        pairs: a pair set with images of one size.
        num_pairs: number of pairs to be had, at least as many as there are. The first are those of `pairs`, untouched;
            the following are made of each of them in turn with a partner, drawn for each. With one seed, fewer pairs
            are the first of more.
        grid: number of cells along each axis, at least 2 and at most the image's pixels.
        seed: non-negative; seed of all draws.

    Returns:
        A set with the columns of `pairs`; a mixture has the first pair's `source_id` and, as the partner is drawn from
        those with the same `label` and `attribute_a` where there are such columns, its label and attributes. A pair
        that has no such partner is repeated as it is. Mixtures are stored as PNG, RGB.

    Raises:
        ValueError: `pairs` is a stream or has fewer than two rows; `num_pairs` is below their number; `grid` is out of
            range; two images that are to be mixed differ in size.
    """
    if not isinstance(pairs, datasets.Dataset):
        raise ValueError(f"mix_pairs needs the number of pairs in advance, which {type(pairs).__name__} does not have.")
    count = len(pairs)
    if count < 2:
        raise ValueError(f"mix_pairs needs at least two pairs to mix, there are {count}.")
    if num_pairs < count:
        raise ValueError(f"num_pairs={num_pairs} of mix_pairs must be at least the number of pairs, {count}.")
    if grid < 2:
        raise ValueError(f"grid={grid} is not valid: it must be at least 2 cells along each axis.")
    raw = pairs.with_format(None)
    for side in SIDES:
        raw = raw.cast_column(side, datasets.Image(decode=False))
    files = {side: list(raw[side]) for side in SIDES}

    @lru_cache(HELD)
    def image(side: str, row: int) -> np.ndarray:
        return np.asarray(datasets.Image().decode_example(files[side][row]).convert("RGB"))

    alike = _alike(raw)
    rows = np.arange(num_pairs) % count
    sides: dict[str, list[Any]] = {side: list(files[side]) for side in SIDES}
    for number in range(count, num_pairs):
        rng = np.random.default_rng((seed, 13, number))
        row = int(rows[number])
        partner, cells = _partner(row, alike[row], rng), rng.random((grid, grid)) < 0.5
        for side in SIDES:
            own = files[side][row]
            mixed = own if partner == row else _mixture(image(side, row), image(side, partner), cells, (row, partner))
            sides[side].append(mixed)

    def values(name: str) -> pa.ChunkedArray:
        if name in SIDES:
            return image_column(sides[name])
        return raw.select_columns([name]).with_format("arrow")[:][name].take(pa.array(rows))

    return dataset_of({name: (values(name), pairs.features[name]) for name in pairs.column_names})


def _alike(pairs: datasets.Dataset) -> list[np.ndarray]:
    """For each row the rows of its label and attributes, itself among them; rows that are alike share the array."""
    columns = [pairs[name][:] for name in ("label", "attribute_a") if name in pairs.column_names]
    keys = list(zip(*columns, strict=True)) if columns else [()] * len(pairs)
    members: dict[tuple, list[int]] = {}
    for row, key in enumerate(keys):
        members.setdefault(key, []).append(row)
    groups = {key: np.array(rows) for key, rows in members.items()}
    return [groups[key] for key in keys]


def _partner(row: int, alike: np.ndarray, rng: np.random.Generator) -> int:
    """Another row of `alike`, in ascending order, or the row itself where there is no other."""
    if len(alike) == 1:
        return row
    drawn = int(rng.integers(len(alike) - 1))
    return int(alike[drawn + (alike[drawn] >= row)])


def _mixture(own: np.ndarray, other: np.ndarray, cells: np.ndarray, rows: tuple[int, int]) -> bytes:
    if own.shape != other.shape:
        raise ValueError(
            f"mix_pairs mixes images of one size, but pair {rows[0]} has {own.shape[1]}×{own.shape[0]} pixels and pair "
            f"{rows[1]} {other.shape[1]}×{other.shape[0]}: resize them first."
        )
    if len(cells) > min(own.shape[:2]):
        raise ValueError(f"grid={len(cells)} is more than the {min(own.shape[:2])} pixels of an image's shorter side.")
    down, across = (np.arange(length) * len(cells) // length for length in own.shape[:2])
    return encode_image(np.where(cells[down][:, across, None], other, own))
