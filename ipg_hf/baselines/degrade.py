# SPDX-License-Identifier: Apache-2.0
"""Worse pairs of good ones, for measuring how much pair quality matters."""

from __future__ import annotations

from collections.abc import Mapping

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image

from ..pairs.images import read_image, stored_images
from ..pairs.makers import check_columns, encode_image, image_column, known_values

KINDS = ("mislabelled", "unoriented", "residual")
MIXABLE = ("L", "LA", "RGB", "RGBA")


def degrade_pairs(
    pairs: datasets.Dataset,
    *,
    mislabelled: float = 0.0,
    unoriented: float = 0.0,
    residual: float = 0.0,
    seed: int = 0,
) -> datasets.Dataset:
    """Spoils a pair set in a controlled way (ours): first residual, then mislabelled, then unoriented.

    Args:
        pairs: a pair set with raw images.
        residual: strength in [0, 1] of a difference beside the attribute: side b of every pair becomes the mixture
            (1 - residual) · b + residual · b', b' being side b of another pair of the same label (of any where there
            are no labels). At 1 the sides share the label alone, as pairs matched at random do.
        mislabelled: share in [0, 1] of pairs whose side b comes from a pair of another label.
        unoriented: share in [0, 1] of pairs whose sides change places; at 0.5 the mean difference tells nothing.
        seed: non-negative; seed of all draws. With one seed the rows of a smaller share are among those of a larger.

    Returns:
        A set with the columns and the order of `pairs`. The column `label` keeps the label of side a as it was.

    Raises:
        ValueError: a share is outside [0, 1]; mislabelling without a column `label` or with one label alone; two images
            that are to be mixed cannot be read, differ in size or mode, or have another mode than L, LA, RGB or RGBA.
    """
    for name, share in zip(KINDS, (mislabelled, unoriented, residual), strict=True):
        if not 0 <= share <= 1:
            raise ValueError(f"{name}={share} is not valid: it must be a share from 0 to 1.")
    count = len(pairs)
    check_columns(pairs, ("image_a", "image_b"))
    raw = stored_images(pairs.with_format(None), ("image_a", "image_b"))
    labels = known_values(raw, "label") if "label" in raw.column_names else np.zeros(count, dtype=np.int64)
    sides = [list(raw["image_a"]), list(raw["image_b"])]
    if residual:
        partner = _partners(labels, np.random.default_rng((seed, 10)), same=True)
        originals = sides[1]
        mode = pairs.features["image_b"].mode

        def image(row: int) -> Image.Image:
            return read_image(originals[row], f"image_b of row {row}", mode)

        sides[1] = [_mixed(image(row), image(partner[row]), residual, row) for row in range(count)]
    if mislabelled:
        if len(np.unique(labels)) < 2:
            raise ValueError(f"mislabelled={mislabelled} needs a column `label` with at least two labels.")
        rng = np.random.default_rng((seed, 11))
        partner, originals = _partners(labels, rng, same=False), list(sides[1])
        for row in rng.permutation(count)[: round(mislabelled * count)]:
            sides[1][row] = originals[partner[row]]
    swapped = np.zeros(count, dtype=bool)
    swapped[np.random.default_rng((seed, 12)).permutation(count)[: round(unoriented * count)]] = True
    return _with_sides(raw, sides, swapped, pairs.features)


def _partners(labels: np.ndarray, rng: np.random.Generator, *, same: bool) -> np.ndarray:
    """For each row a random other row of the same (or of another) label; itself where there is none of the same."""
    partner = np.arange(len(labels))
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if not same:
            partner[rows] = rng.choice(np.flatnonzero(labels != label), len(rows)) if len(rows) < len(labels) else rows
        elif len(rows) > 1:
            # one cycle through a random order: nobody is his own partner
            order = rng.permutation(rows)
            partner[order] = np.roll(order, 1)
    return partner


def _mixed(first: Image.Image, second: Image.Image, share: float, row: int) -> dict[str, bytes | None]:
    if first.size != second.size or first.mode != second.mode:
        raise ValueError(
            f"residual={share} mixes images of one size and mode, but row {row} has {first.mode} of {first.size} and "
            f"its partner {second.mode} of {second.size} pixels."
        )
    if first.mode not in MIXABLE:
        raise ValueError(
            f"residual={share} mixes images of the modes {', '.join(MIXABLE)}, but row {row} has {first.mode}: convert "
            'the images of both sides, image.convert("RGB").'
        )
    return {"bytes": encode_image(Image.blend(first, second, share)), "path": None}


def _with_sides(
    raw: datasets.Dataset, sides: list[list[Mapping]], swapped: np.ndarray, features: datasets.Features
) -> datasets.Dataset:
    """The set with these images, the sides of some rows (and what belongs to them) having changed places."""
    table = raw.with_format("arrow")[:]
    chosen = [[sides[i ^ int(swap)][row] for row, swap in enumerate(swapped)] for i in (0, 1)]
    columns = {name: table[name] for name in table.column_names}
    columns["image_a"], columns["image_b"] = (image_column(values) for values in chosen)
    for name in [key[:-2] for key in columns if key.endswith("_a") and key != "image_a" and f"{key[:-2]}_b" in columns]:
        both = pa.concat_arrays([columns[f"{name}_{side}"].combine_chunks() for side in "ab"])
        rows = np.arange(len(swapped))
        for side, other in (("a", swapped), ("b", ~swapped)):
            columns[f"{name}_{side}"] = both.take(pa.array(rows + len(rows) * other))
    features = datasets.Features({name: features[name] for name in columns})
    result = pa.table(columns).cast(features.arrow_schema)
    return datasets.Dataset(result, info=datasets.DatasetInfo(features=features))
