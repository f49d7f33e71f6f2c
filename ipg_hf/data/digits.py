# SPDX-License-Identifier: Apache-2.0
"""Coloured digits: 1,797 handwritten digits of 8×8 pixels. They come with scikit-learn, so there is no download.

The label is whether the digit is small or large, the spurious attribute is its colour. In training the colour agrees
with the label in every image. In the test set it disagrees in nine of ten. A pair is one digit in both colours.
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
COLOR = datasets.ClassLabel(names=["red", "green"])  # the channel with the intensity

NUM_VALIDATION, NUM_TEST = 300, 500
NUM_PAIRS = 300
CHUNK = 1000  # images coloured at a time: they fit the processor's cache
TEST_MISLEADING = 0.9
UPSCALE = 2


def load_digits(
    *, data_dir: str | None = None, seed: int = 0, num_pairs: int | None = None, oriented_pairs: bool = True
) -> Benchmark:
    """Makes the coloured digits (ours; the digits are the UCI test set of Alpaydin and Kaynak, 1998).

    - Image: RGB, 16×16 pixels. The intensity 0..16 is scaled to 0..255, repeated over 2×2 pixels and put into the red
      or the green channel. The other channels are 0.
    - Label: 0 "small" (digits 0 to 4), 1 "large" (5 to 9). Attribute: 0 "red", 1 "green".
    - Training: 997 digits. The colour equals the label in every row, so two of the four groups are empty.
    - Validation: 300 digits. A random half of each label is red, the other half green.
    - Test: 500 digits. Exactly 90 % of each label (rounded) have the colour of the other label, the rest their own.
    - Pairs: training digits, side a red and side b green.

    The split is fixed and stratified by digit.

    Args:
        data_dir: not used, because the digits are a part of scikit-learn.
        seed: non-negative seed of the colours of validation and test, and of the draw of the pairs.
        num_pairs: number of training pairs, 1 to 997. `None` is 300. Fewer pairs are a subset of more.
        oriented_pairs: `False` swaps the sides of a random half of the training pairs.

    Raises:
        ValueError: `num_pairs` is below 1 or above the number of training digits.
    """
    gray, digits = read_digits()
    labels = (digits >= 5).astype(np.int64)
    train, validation, test = split_digits(digits)
    pair_rows = draw_rows(len(train), NUM_PAIRS if num_pairs is None else num_pairs, seed=seed, of="training digits")
    sides = [encode_colored(gray, np.full(len(gray), color)) for color in range(2)]

    def rows(index: np.ndarray, share: float, stream: int) -> datasets.Dataset:
        colors = draw_colors(labels[index], share, np.random.default_rng((seed, stream)))
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


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Reads scikit-learn's digits: uint8 intensities, shape (1797, 16, 16), and the digits 0 to 9, shape (1797,)."""
    source = sklearn.datasets.load_digits()
    gray = np.rint(source.images * (255 / 16)).astype(np.uint8).repeat(UPSCALE, 1).repeat(UPSCALE, 2)
    return gray, source.target


def encode_colored(gray: np.ndarray, colors: np.ndarray) -> list[bytes]:
    """Puts grey images into the red or the green channel of RGB images and encodes them as PNG.

    Args:
        gray: uint8, shape (N, H, W).
        colors: 0 red, 1 green, shape (N,). The other channels are 0.
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
    attributes: np.ndarray,
    label_feature: datasets.ClassLabel | datasets.Value = LABEL,
    attribute_feature: datasets.ClassLabel = COLOR,
    **more: np.ndarray,
) -> datasets.Dataset:
    """Makes a set with the columns `image`, `label` and `attribute`, and further columns of integers.

    Args:
        images: n encoded images.
        labels: values of `label_feature`, shape (n,).
        attributes: ids of `attribute_feature`, shape (n,).
        label_feature: feature of the label.
        attribute_feature: the ClassLabel of the attribute.
        **more: column name -> ints, shape (n,).
    """
    columns = {
        "image": (image_column(images), datasets.Image()),
        "label": (pa.array(labels, label_feature.pa_type), label_feature),
        "attribute": (pa.array(attributes, pa.int64()), attribute_feature),
    }
    columns |= {name: (pa.array(values, pa.int64()), datasets.Value("int64")) for name, values in more.items()}
    return dataset_of(columns)


def colored_pairs(
    red: Sequence[bytes],
    green: Sequence[bytes],
    labels: np.ndarray,
    source_id: np.ndarray,
    swap: np.ndarray | None = None,
    label_feature: datasets.ClassLabel | datasets.Value = LABEL,
) -> datasets.Dataset:
    """Makes a pair set with side a red and side b green.

    Args:
        red: n encoded images.
        green: the same n images in green.
        labels: values of `label_feature`, shape (n,).
        source_id: n integers that name the source of each pair.
        swap: n booleans. If one is true, the sides of that pair change places.
        label_feature: feature of the label.
    """
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
    """Splits rows into training, validation and test: a fixed permutation, stratified by digit.

    Args:
        digits: the digit of each row.

    Returns:
        The row numbers of the three splits.
    """
    order = np.random.default_rng(0).permutation(len(digits))
    place = np.empty(len(digits))
    for digit in range(10):
        rows = order[digits[order] == digit]
        place[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    # each digit is spread evenly over the order: any section of it has every digit in its share
    order = order[np.argsort(place[order], kind="stable")]
    num_train = len(digits) - NUM_VALIDATION - NUM_TEST
    train, validation, test = np.split(order, [num_train, num_train + NUM_VALIDATION])
    return train, validation, test


def draw_colors(labels: np.ndarray, misleading: float, rng: np.random.Generator) -> np.ndarray:
    """Draws colours that disagree with the label in exactly the given share of each label's rows (rounded).

    Args:
        labels: 0 or 1, shape (n,).
        misleading: share of the rows of each label whose colour is 1 - label. In the other rows it is the label.
        rng: generator of the draw.
    """
    colors = labels.copy()
    for label in range(2):
        rows = rng.permutation(np.flatnonzero(labels == label))
        colors[rows[: round(misleading * len(rows))]] = 1 - label
    return colors
