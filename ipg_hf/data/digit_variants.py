# SPDX-License-Identifier: Apache-2.0
"""Two variants of the coloured digits: two shortcuts at once, and a regression.

Both use the images, the split and the colours of [`load_digits`].
"""

from __future__ import annotations

import datasets
import numpy as np

from ..pairs.makers import draw_rows, encode_png, pair_dataset
from .benchmark import Benchmark
from .digits import (
    COLOR,
    LABEL,
    NUM_PAIRS,
    classification_set,
    colored_pairs,
    draw_colors,
    encode_colored,
    read_digits,
    split_digits,
)

MARK = datasets.ClassLabel(names=["plain", "marked"])
BOTH = datasets.ClassLabel(names=["red-plain", "red-marked", "green-plain", "green-marked"])
FLOAT = datasets.Value("float32")
MARK_SIZE = 3  # pixels


def load_marked_digits(
    *, data_dir: str | None = None, seed: int = 0, num_pairs: int | None = None, oriented_pairs: bool = True
) -> Benchmark:
    """Makes digits with two independent shortcuts (ours): the colour, and a white mark of 3×3 pixels in a corner.

    - Label: 0 "small" (digits 0 to 4), 1 "large" (5 to 9). Attribute: 2·colour + mark, four values.
    - Training: colour and mark both agree with the label in every image. An image is red and plain, or green and
      marked.
    - Validation and test: every image in all four combinations. For each label, its four groups have the same size. A
      model that uses one of the two shortcuts is right in half of the images and in none of its worst group.
    - Pairs: a dict of two sets. `color` has the sides red and green; the mark is drawn for each pair and is the same on
      both sides. `mark` has the sides plain and marked; the colour is drawn for each pair.

    Args:
        data_dir: not used, because the digits are a part of scikit-learn.
        seed: non-negative seed of the draw of the pairs.
        num_pairs: number of training pairs of each set, 1 to 997. `None` is 300.
        oriented_pairs: must be `True`.

    Raises:
        ValueError: `num_pairs` is below 1 or above the number of training digits; `oriented_pairs` is `False`.
    """
    _check_oriented(oriented_pairs, "marked_digits")
    gray, digits = read_digits()
    train, validation, test = split_digits(digits)
    labels = (digits >= 5).astype(np.int64)
    files = {}
    for color in range(2):
        plain = np.zeros((*gray.shape, 3), dtype=np.uint8)
        plain[..., color] = gray
        marked = plain.copy()
        marked[:, :MARK_SIZE, :MARK_SIZE] = 255
        files[color, 0], files[color, 1] = encode_png(plain), encode_png(marked)

    def rows(index: np.ndarray, colors: np.ndarray, marks: np.ndarray) -> datasets.Dataset:
        images = [files[c, m][i] for i, c, m in zip(index, colors, marks, strict=True)]
        return classification_set(images, labels[index], 2 * colors + marks, attribute_feature=BOTH)

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
    """Makes a regression (ours): how much ink a digit has.

    - Image: a coloured digit of 16×16 pixels. Its intensities are scaled so that the brightest pixel has a random value
      between 100 and 255. The ink is therefore a sum over the strokes and cannot be read from one pixel.
    - Label: float, the ink of the digit, scaled to mean 0 and standard deviation 1 over the training digits.
      Attribute: 0 "red", 1 "green".
    - Training: an image is green if its label is above the median, else red. The colour tells half of the answer.
    - Validation: half of the images above the median are green, and half of those below. Test: 90 % of the images above
      the median are red, 90 % of those below are green.
    - Pairs: training digits, side a red and side b green.

    Args:
        data_dir: not used, because the digits are a part of scikit-learn.
        seed: non-negative seed of the brightnesses, the colours and the draw of the pairs.
        num_pairs: number of training pairs, 1 to 997. `None` is 300.
        oriented_pairs: must be `True`.

    Raises:
        ValueError: `num_pairs` is below 1 or above the number of training digits; `oriented_pairs` is `False`.
    """
    _check_oriented(oriented_pairs, "stroke_mass")
    gray, digits = read_digits()
    train, validation, test = split_digits(digits)
    bright = np.random.default_rng((seed, 8)).uniform(100, 255, len(gray)) / np.maximum(1, gray.max((1, 2)))
    gray = np.rint(gray * bright[:, None, None]).astype(np.uint8)
    ink = gray.mean((1, 2))
    labels = (ink - ink[train].mean()) / ink[train].std()
    heavy = (labels > np.median(labels[train])).astype(np.int64)
    sides = [encode_colored(gray, np.full(len(gray), color)) for color in range(2)]

    def rows(index: np.ndarray, share: float, stream: int) -> datasets.Dataset:
        colors = draw_colors(heavy[index], share, np.random.default_rng((seed, stream)))
        images = [sides[c][i] for i, c in zip(index, colors, strict=True)]
        return classification_set(images, labels[index], colors, FLOAT)

    def pairs(index: np.ndarray) -> datasets.Dataset:
        return colored_pairs(*([side[i] for i in index] for side in sides), labels[index], index, label_feature=FLOAT)

    count = NUM_PAIRS if num_pairs is None else num_pairs
    return Benchmark(
        train=rows(train, 0.0, 2),
        validation=rows(validation, 0.5, 3),
        test=rows(test, 0.9, 4),
        pairs=pairs(train[draw_rows(len(train), count, seed=seed, of="training digits")]),
        validation_pairs=pairs(validation),
        test_pairs=pairs(test),
    )


def _check_oriented(oriented_pairs: bool, name: str) -> None:
    if not oriented_pairs:
        raise ValueError(
            f"oriented_pairs=False is not offered by {name}. Set oriented_pairs=True, or swap sides with "
            "ipg_hf.baselines.degrade_pairs."
        )
