# SPDX-License-Identifier: Apache-2.0
"""Coloured digits: 1,797 real handwritten digits of 8×8 pixels that come with scikit-learn, so that nothing is fetched.

The label is the size of the digit, the spurious attribute its colour. In training the colour tells the label in every
single image; in the test set it misleads nine times out of ten. Pairs are one digit in both colours.
"""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import numpy as np
import pyarrow as pa
import sklearn.datasets

from ..pairs.makers import dataset_of, draw_rows, draw_swap, encode_png, image_column, pair_dataset
from .benchmark import Benchmark

LABEL = datasets.ClassLabel(names=["small", "large"])  # digits 0 to 4, 5 to 9
COLOR = datasets.ClassLabel(names=["red", "green"])  # the channel that holds the intensity

NUM_VALIDATION, NUM_TEST = 300, 500
NUM_PAIRS = 300
CHUNK = 1000  # images coloured at once: fits the processor's cache
TEST_MISLEADING = 0.9
UPSCALE = 2


def load_digits(
    *, data_dir: str | None = None, seed: int = 0, num_pairs: int | None = None, oriented_pairs: bool = True
) -> Benchmark:
    """Makes the coloured digits (ours; the digits are the UCI test set of Alpaydin and Kaynak, 1998).

    - Image: RGB, 16×16 pixels; the intensity 0..16 scaled to 0..255 and repeated over 2×2 pixels, in the red or the
      green channel, the others 0.
    - Label: 0 "small" (digit 0 to 4), 1 "large" (5 to 9). Attribute: 0 "red", 1 "green".
    - Training: 997 digits, colour = label in every row: two of the four groups are empty.
    - Validation: 300 digits, a random half of each label red, the other half green.
    - Test: 500 digits; 90 % of each label, by count, in the colour of the other label, the rest in its own.
    - Pairs: training digits, side a red and side b green.

    The split is fixed, and each part has every digit in its share.

    Args:
        data_dir: not used: the digits are a part of scikit-learn.
        seed: non-negative; seed of the colours of validation and test, and of the pairs that are drawn.
        num_pairs: number of training pairs, 1 to 997; `None` is 300. Fewer pairs are a subset of more.
        oriented_pairs: `False` swaps the sides of a random half of the training pairs.

    Raises:
        ValueError: more pairs than training digits, or fewer than 1.
    """
    source = sklearn.datasets.load_digits()
    gray = np.rint(source.images * (255 / 16)).astype(np.uint8).repeat(UPSCALE, 1).repeat(UPSCALE, 2)
    labels = (source.target >= 5).astype(np.int64)
    train, validation, test = split_digits(source.target)
    pair_rows = draw_rows(len(train), NUM_PAIRS if num_pairs is None else num_pairs, seed=seed, of="training digits")
    sides = [encode_colored(gray, np.full(len(gray), color)) for color in range(2)]

    def rows(index: np.ndarray, share: float, stream: int) -> datasets.Dataset:
        colors = _misleading(labels[index], share, np.random.default_rng((seed, stream)))
        return classification_set([sides[c][i] for i, c in zip(index, colors, strict=True)], labels[index], colors)

    def pairs(index: np.ndarray, swap: np.ndarray | None = None) -> datasets.Dataset:
        return colored_pairs(*([side[i] for i in index] for side in sides), labels[index], index, swap)

    return Benchmark(
        train=rows(train, 0, 2),
        validation=rows(validation, 0.5, 3),
        test=rows(test, TEST_MISLEADING, 4),
        pairs=pairs(train[pair_rows], None if oriented_pairs else draw_swap(len(pair_rows), seed)),
        validation_pairs=pairs(validation),
        test_pairs=pairs(test),
    )


def encode_colored(gray: np.ndarray, colors: np.ndarray) -> list[bytes]:
    """Grey images in the red (0) or the green (1) channel of RGB images, the other channels 0, as PNG.

    Args:
        gray: uint8, shape (N, H, W).
        colors: 0 or 1, shape (N,).
    """
    files = []
    for start in range(0, len(gray), CHUNK):
        part = slice(start, start + CHUNK)
        images = np.zeros((*gray[part].shape, 3), dtype=np.uint8)
        images[np.arange(len(images)), :, :, colors[part]] = gray[part]
        files += encode_png(images)
    return files


def classification_set(
    images: list[bytes],
    labels: np.ndarray,
    colors: np.ndarray,
    label_feature: datasets.ClassLabel = LABEL,
    **more: np.ndarray,
) -> datasets.Dataset:
    """A set with the columns `image`, `label` and `attribute`, and further ones of integers.

    Args:
        images: n encoded images.
        labels: ids of `label_feature`, shape (n,).
        colors: ids of [`COLOR`], shape (n,).
        label_feature: names of the two labels.
        **more: column name -> ints, shape (n,).
    """
    columns = {
        "image": (image_column(images), datasets.Image()),
        "label": (pa.array(labels, pa.int64()), label_feature),
        "attribute": (pa.array(colors, pa.int64()), COLOR),
    }
    columns |= {name: (pa.array(values, pa.int64()), datasets.Value("int64")) for name, values in more.items()}
    return dataset_of(columns)


def colored_pairs(
    red: Sequence[bytes],
    green: Sequence[bytes],
    labels: np.ndarray,
    source_id: np.ndarray,
    swap: np.ndarray | None = None,
    label_feature: datasets.ClassLabel = LABEL,
) -> datasets.Dataset:
    """A pair set, side a red and side b green, but for the rows where `swap` is true."""
    return pair_dataset(
        red,
        green,
        source_id=source_id,
        attributes=(0, 1),
        attribute_feature=COLOR,
        label=labels,
        label_feature=label_feature,
        swap=swap,
    )


def split_digits(digits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row numbers of training, validation and test: one fixed permutation, stratified by digit."""
    order = np.random.default_rng(0).permutation(len(digits))
    place = np.empty(len(digits))
    for digit in range(10):
        rows = order[digits[order] == digit]
        place[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    # evenly spread places: any stretch of the order has each digit in its share
    order = order[np.argsort(place[order], kind="stable")]
    num_train = len(digits) - NUM_VALIDATION - NUM_TEST
    train, validation, test = np.split(order, [num_train, num_train + NUM_VALIDATION])
    return train, validation, test


def _misleading(labels: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Colours that equal the label, but for exactly this share of each label (rounded), drawn at random."""
    colors = labels.copy()
    for label in range(2):
        rows = rng.permutation(np.flatnonzero(labels == label))
        wrong = rows[: round(share * len(rows))]
        colors[wrong] = 1 - label
    return colors
