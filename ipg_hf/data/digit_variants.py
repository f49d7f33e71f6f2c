# SPDX-License-Identifier: Apache-2.0
"""Two further settings of the coloured digits: two shortcuts at once, and a regression.

Both use the images, the split and the colours of [`load_digits`].
"""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import sklearn.datasets

from ..pairs.makers import dataset_of, draw_rows, encode_png, image_column, pair_dataset
from .benchmark import Benchmark
from .digits import COLOR, LABEL, NUM_PAIRS, UPSCALE, classification_set, encode_colored, split_digits

MARK = datasets.ClassLabel(names=["plain", "marked"])
BOTH = datasets.ClassLabel(names=["red-plain", "red-marked", "green-plain", "green-marked"])
MARK_SIZE = 3  # pixels


def load_marked_digits(
    *, data_dir: str | None = None, seed: int = 0, num_pairs: int | None = None, oriented_pairs: bool = True
) -> Benchmark:
    """Digits with two independent shortcuts (ours): the colour, and a white mark of 3×3 pixels in a corner.

    - Label: 0 "small" (digit 0 to 4), 1 "large" (5 to 9). Attribute: 2 · colour + mark, four values.
    - Training: each of the two tells the label in every image: red and plain, or green and marked.
    - Validation and test: every image in all four combinations, so that the eight groups are of like size. A model that
      uses one of the two is right in half of the images and in no image of its worst group.
    - Pairs: a dict of two sets, `color` (red and green, the mark drawn for each pair and the same on both sides) and
      `mark` (plain and marked, the colour drawn).

    Args:
        data_dir: not used: the digits are a part of scikit-learn.
        seed: non-negative; seed of the pairs that are drawn.
        num_pairs: number of training pairs of each set, 1 to 997; `None` is 300.
        oriented_pairs: must be True.

    Raises:
        ValueError: more pairs than training digits, or fewer than 1; `oriented_pairs=False`.
    """
    if not oriented_pairs:
        raise ValueError("oriented_pairs=False is not offered by marked_digits: use degrade_pairs.")
    gray, targets, (train, validation, test) = _digits()
    labels = (targets >= 5).astype(np.int64)
    files = {}
    for color in range(2):
        plain = np.zeros((*gray.shape, 3), dtype=np.uint8)
        plain[..., color] = gray
        marked = plain.copy()
        marked[:, :MARK_SIZE, :MARK_SIZE] = 255
        files[color, 0], files[color, 1] = encode_png(plain), encode_png(marked)

    def rows(index: np.ndarray, colors: np.ndarray, marks: np.ndarray) -> datasets.Dataset:
        images = [files[c, m][i] for i, c, m in zip(index, colors, marks, strict=True)]
        both = 2 * colors + marks
        return classification_set(images, labels[index], both).cast_column("attribute", BOTH)

    def balanced(index: np.ndarray) -> datasets.Dataset:
        count = len(index)
        return rows(np.tile(index, 4), np.repeat([0, 0, 1, 1], count), np.repeat([0, 1, 0, 1], count))

    def pairs(index: np.ndarray, stream: int) -> dict[str, datasets.Dataset]:
        other = np.random.default_rng((seed, stream)).integers(2, size=(2, len(index)))
        sides = {
            "color": [[files[side, m][i] for i, m in zip(index, other[0], strict=True)] for side in range(2)],
            "mark": [[files[c, side][i] for i, c in zip(index, other[1], strict=True)] for side in range(2)],
        }
        names = {"color": COLOR, "mark": MARK}
        return {
            name: pair_dataset(
                *images,
                source_id=index,
                attributes=(0, 1),
                attribute_feature=names[name],
                label=labels[index],
                label_feature=LABEL,
            )
            for name, images in sides.items()
        }

    count = NUM_PAIRS if num_pairs is None else num_pairs
    return Benchmark(
        train=rows(train, labels[train], labels[train]),
        validation=balanced(validation),
        test=balanced(test),
        pairs=pairs(train[draw_rows(len(train), count, seed=seed, of="training digits")], 5),
        validation_pairs=pairs(validation, 6),
        test_pairs=pairs(test, 7),
    )


def load_stroke_mass(
    *, data_dir: str | None = None, seed: int = 0, num_pairs: int | None = None, oriented_pairs: bool = True
) -> Benchmark:
    """A regression (ours): how much ink a digit has, in units of its standard deviation over the training digits.

    - Image: as [`load_digits`], but each digit's intensities are scaled so that its brightest pixel has a random value
      between 100 and 255: the ink is a sum over strokes and not read off one pixel.
    - Label: float, mean 0 and standard deviation 1 over the training digits. Attribute: the colour.
    - Training: green where the label is above its median, else red: the colour tells half of the answer.
    - Validation: colours balanced within each half; test: 90 % of each half in the colour of the other.
    - Pairs: training digits, side a red and side b green.

    Args:
        data_dir: not used.
        seed: non-negative; seed of the brightnesses, the colours and the pairs.
        num_pairs: number of training pairs, 1 to 997; `None` is 300.
        oriented_pairs: must be True.

    Raises:
        ValueError: more pairs than training digits, or fewer than 1; `oriented_pairs=False`.
    """
    if not oriented_pairs:
        raise ValueError("oriented_pairs=False is not offered by stroke_mass: use degrade_pairs.")
    gray, _, (train, validation, test) = _digits()
    bright = np.random.default_rng((seed, 8)).uniform(100, 255, len(gray)) / np.maximum(1, gray.max((1, 2)))
    gray = np.rint(gray * bright[:, None, None]).astype(np.uint8)
    ink = gray.mean((1, 2))
    labels = (ink - ink[train].mean()) / ink[train].std()
    heavy = (labels > np.median(labels[train])).astype(np.int64)
    sides = [encode_colored(gray, np.full(len(gray), color)) for color in range(2)]

    def rows(index: np.ndarray, share: float, stream: int) -> datasets.Dataset:
        rng = np.random.default_rng((seed, stream))
        colors = heavy[index].copy()
        for half in range(2):
            members = rng.permutation(np.flatnonzero(heavy[index] == half))
            colors[members[: round(share * len(members))]] = 1 - half
        return dataset_of(
            {
                "image": (image_column([sides[c][i] for i, c in zip(index, colors, strict=True)]), datasets.Image()),
                "label": (pa.array(labels[index], pa.float32()), datasets.Value("float32")),
                "attribute": (pa.array(colors, pa.int64()), COLOR),
            }
        )

    def pairs(index: np.ndarray) -> datasets.Dataset:
        return pair_dataset(
            *([side[i] for i in index] for side in sides),
            source_id=index,
            attributes=(0, 1),
            attribute_feature=COLOR,
            label=labels[index],
            label_feature=datasets.Value("float32"),
        )

    count = NUM_PAIRS if num_pairs is None else num_pairs
    return Benchmark(
        train=rows(train, 0.0, 2),
        validation=rows(validation, 0.5, 3),
        test=rows(test, 0.9, 4),
        pairs=pairs(train[draw_rows(len(train), count, seed=seed, of="training digits")]),
        validation_pairs=pairs(validation),
        test_pairs=pairs(test),
    )


def _digits() -> tuple[np.ndarray, np.ndarray, Any]:
    source = sklearn.datasets.load_digits()
    gray = np.rint(source.images * (255 / 16)).astype(np.uint8).repeat(UPSCALE, 1).repeat(UPSCALE, 2)
    return gray, source.target, split_digits(source.target)
