# SPDX-License-Identifier: Apache-2.0
"""Makes many pairs from few: learns the colour map between the two sides, and applies it to the training images."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from PIL import Image, ImageChops

from .classes import is_class_label, match_labels
from .images import file_of, image_content, read_image, read_rgb, stored_images
from .makers import check_columns, check_is_set, check_number, encode_image, map_cached

logger = logging.getLogger(__name__)

SIDES = ("image_a", "image_b")
FOLDS = 5
FEWEST = 10  # pairs: each fold holds out two or more
EXPLAINED = 0.9  # share of the held-out pairs' difference
RECOGNISED = 0.95  # share of the held-out pairs' images
# variance of the rounding to 8 bits: pixels that vary less in a direction say nothing about it
ROUNDING = 1 / 12 / 255**2
SHRINKAGE = 0.01  # of the coefficients that tell the side, per image, for standardized features


@dataclass(frozen=True)
class ColorMaps:
    """The colour maps between the sides of pairs, and the rule that tells which side an image is like.

    Args:
        to_b: float64, shape (4, 3): a pixel x of side a, red, green and blue in [0, 1], becomes x + (x, 1) · `to_b`.
        to_a: float64, shape (4, 3): the same from side b to side a.
        rule: float64, shape (13,): an image of features f is like side a if (f, 1) · `rule` is above 0.
    """

    to_b: np.ndarray
    to_a: np.ndarray
    rule: np.ndarray

    def sides(self, image: Image.Image) -> tuple[Image.Image, Image.Image]:
        """Returns both sides of the pair of an RGB image: the image itself, and the image with the other colours."""
        pixels = np.asarray(image)
        is_a = _scores(_features(pixels), self.rule) > 0
        other = Image.fromarray(_mapped(pixels, self.to_b if is_a else self.to_a))
        return (image, other) if is_a else (other, image)


def extend_pairs(
    pairs: datasets.Dataset, source: datasets.Dataset, *, num_pairs: int | None = None, seed: int = 0
) -> datasets.Dataset:
    """Makes a small pair set large: learns what turns one side into the other, and does it to training images (ours).

    - An affine map of the colours, fitted by least squares to the pixels of the pairs, turns side a into side b;
      another turns b into a. Colours that no pair shows stay as they are.
    - A linear discriminant, fitted to mean, standard deviation, minimum and maximum of each channel, tells whether a
      training image is like side a or like side b. The image is that side of its pair, and its map is the other side.

    Both are checked by cross-validation over the pairs in five parts. Pairs that differ in more than their colours,
    such as those of two backgrounds, are refused. The check does not see the training images: they must be of the same
    kind as those of the pairs.

    Args:
        pairs: a pair set of at least 10 pairs, with one value of the attribute on side a and another on side b.
        source: the training images: rows with `image` and, optionally, `label`.
        num_pairs: number of pairs in the result, above the number in `pairs`. The training images are drawn without
            replacement and stay in the order of the source. `None` uses all. With the same seed, a smaller number
            gives a subset of a larger one.
        seed: non-negative seed of the draw.

    Returns:
        A set with the columns `image_a`, `image_b` and, if both sets have it, `label`. The pairs come first, unchanged.
        After them comes a pair for each training image. A training image that is stored in `pairs` too makes no further
        pair. An image that its map does not change makes none; a warning counts these images. Mapped images are stored
        as PNG, RGB.

    Raises:
        ValueError: one of the sets is a stream or lacks a column; the pairs are too few; `num_pairs` is out of range;
            an image cannot be read; the sides of a pair differ in size; the labels of the two sets are of different
            types; on held-out pairs a map explains less than 0.9 of the squared difference of the sides, or less than
            0.95 of the sides are recognised; the maps change no training image.
    """
    check_is_set(pairs, "the pair set that extend_pairs enlarges")
    check_is_set(source, "the set of training images of extend_pairs")
    check_columns(pairs, SIDES)
    check_columns(source, ["image"])
    check_number("seed", seed, 0, math.inf, whole=True)
    count = len(pairs)
    if num_pairs is not None:
        check_number("num_pairs", num_pairs, -math.inf, math.inf, whole=True)
        if num_pairs <= count:
            raise ValueError(f"num_pairs={num_pairs} of extend_pairs must be above the number of pairs, {count}.")
    if count < FEWEST:
        raise ValueError(f"extend_pairs learns from at least {FEWEST} pairs, but the set has {count}: make more pairs.")
    pairs, labels = _with_labels(pairs.with_format(None), source)
    raw = stored_images(pairs, SIDES)
    stored = stored_images(source.with_format(None).select_columns(["image", *labels]), ["image"])
    own = {image_content(value) for side in SIDES for value in raw[side]}
    others = np.flatnonzero([image_content(value) not in own for value in stored["image"]])
    wanted = len(others) if num_pairs is None else num_pairs - count
    if not 0 < wanted <= len(others):
        raise ValueError(
            f"num_pairs={num_pairs}, but there are {count} pairs and {len(others)} training images that are not in "
            f"them: ask for at most {count + len(others)} pairs, or for all with num_pairs=None."
            if len(others)
            else "all training images are in the pairs already: extend_pairs has nothing to add, leave it out."
        )
    rows = others[np.sort(np.random.default_rng((seed, 14)).permutation(len(others))[:wanted])]
    modes = [pairs.features[side].mode for side in SIDES] + [source.features["image"].mode]
    maps = learn_colors(raw, modes[:2])
    features = datasets.Features({name: pairs.features[name] for name in pairs.column_names})

    def pair(row: dict[str, Any], place: int) -> dict[str, Any]:
        image, own = read_rgb(row["image"], f"the image of row {rows[place]}", modes[2])
        sides = maps.sides(image)
        is_changed = ImageChops.difference(*sides).getbbox() is not None
        a, b = (own if own and side is image else {"bytes": encode_image(side), "path": None} for side in sides)
        return {"image_a": a, "image_b": b, **{name: row[name] for name in labels}, "changed": is_changed}

    made = map_cached(
        stored.select(rows),
        pair,
        ["extend", [raw], modes, rows.tolist()],
        remove_columns=["image"],
        features=datasets.Features({**features, "changed": datasets.Value("bool")}),
    )
    changed = np.flatnonzero(made["changed"][:])
    if not len(changed):
        raise ValueError(
            f"the colour maps of the pairs change none of {len(made)} training images: give pairs of images like them."
        )
    if len(changed) < len(made):
        logger.warning(
            f"{len(made) - len(changed)} of {len(made)} training images make no pair: the colour maps of the pairs do "
            "not change them."
        )
        made = made.select(changed)
    return datasets.concatenate_datasets([pairs, made.remove_columns("changed")])


def learn_colors(raw: datasets.Dataset, modes: list[str | None]) -> ColorMaps:
    """Learns the colour maps between the sides of pairs and the rule that tells a side, and checks both.

    Args:
        raw: a pair set with encoded images.
        modes: the modes of the features of side a and side b.

    Raises:
        ValueError: as [`extend_pairs`] says.
    """
    # all that least squares needs of a pair's pixels: the mean products of (side a, side b, 1)
    products, features = np.empty((len(raw), 7, 7)), np.empty((len(raw), 2, 12))
    for row, sides in enumerate(_read_sides(raw, modes)):
        values = np.concatenate([side.reshape(-1, 3) / 255 for side in sides] + [np.ones((sides[0].size // 3, 1))], 1)
        products[row] = values.T @ values / len(values)
        features[row] = [_features(side) for side in sides]

    missed, differences, right = np.zeros(2), 0.0, 0
    fold = np.arange(len(raw)) % FOLDS
    for number in range(FOLDS):
        kept, held = (products[part].sum(0) for part in (fold != number, fold == number))
        missed += [_missed(held, _fit(kept, direction), direction) for direction in (0, 1)]
        differences += _missed(held, np.zeros((4, 3)), 0)  # what a map misses that leaves all as it is
        scores = _scores(features[fold == number], _fit_rule(features[fold != number]))
        right += (scores[:, 0] > 0).sum() + (scores[:, 1] <= 0).sum()
    explained = 1 - missed / differences if differences else np.zeros(2)
    told = right / (2 * len(raw))
    fix = "use mix_pairs instead, or more pairs if there are few."
    if not explained.min() >= EXPLAINED:
        raise ValueError(
            "no colour map turns the sides of these pairs into each other: on held-out pairs it explains "
            f"{_share(explained[0])} of the squared difference from side a to b and {_share(explained[1])} from b to "
            f"a, and extend_pairs needs {EXPLAINED} of both. It is for pairs that differ in their colours alone: {fix}"
        )
    if not told >= RECOGNISED:
        raise ValueError(
            f"the colours do not tell which side an image is like: of held-out pairs {_share(told)} of the sides are "
            f"recognised, and extend_pairs needs {RECOGNISED}. Put one value of the attribute on side a of every pair, "
            f"or {fix}"
        )
    whole = products.sum(0)
    return ColorMaps(_fit(whole, 0), _fit(whole, 1), _fit_rule(features))


def _with_labels(pairs: datasets.Dataset, source: datasets.Dataset) -> tuple[datasets.Dataset, list[str]]:
    """Returns the columns of the pairs that the result has, and the names of those among them that are labels."""
    labels = ["label"] if "label" in pairs.column_names and "label" in source.column_names else []
    pairs = pairs.select_columns([*SIDES, *labels])
    for name in labels:
        kind = source.features[name]
        if is_class_label(kind):
            pairs = match_labels(pairs, kind.names, "the pair set")
            # numbers of classes have become no ClassLabel yet
            pairs = pairs if pairs.features[name] == kind else pairs.cast_column(name, kind)
        elif pairs.features[name] != kind:
            raise ValueError(
                f"the column 'label' of the pairs is {pairs.features[name]} and that of the training images {kind}: "
                "cast one of them, cast_column('label', ...)."
            )
    return pairs, labels


def _read_sides(raw: datasets.Dataset, modes: list[str | None]) -> Iterator[list[np.ndarray]]:
    """Yields both sides of each pair: uint8, shape (H, W, 3)."""
    for number, row in enumerate(raw):
        images = [
            read_image(row[side], f"{side} of pair {number}", mode) for side, mode in zip(SIDES, modes, strict=True)
        ]
        if images[0].size != images[1].size:
            raise ValueError(
                f"the sides of pair {number}{file_of(row['image_a'])} have {images[0].width}×{images[0].height} and "
                f"{images[1].width}×{images[1].height} pixels, but must show one content at one size: drop the pair."
            )
        yield [np.asarray(image.convert("RGB")) for image in images]


def _features(pixels: np.ndarray) -> np.ndarray:
    """Mean, standard deviation, minimum and maximum of each channel, in [0, 1], shape (12,)."""
    flat = pixels.reshape(-1, 3)
    return np.concatenate([flat.mean(0), flat.std(0), flat.min(0), flat.max(0)]) / 255


def _mapped(pixels: np.ndarray, change: np.ndarray) -> np.ndarray:
    """The pixels x + (x, 1) · `change`, uint8, with values beyond the range at its ends."""
    values = pixels / np.float32(255)
    values = values + values @ change[:3].astype(np.float32) + change[3].astype(np.float32)
    return np.rint(255 * values.clip(0, 1)).astype(np.uint8)


def _blocks(products: np.ndarray, direction: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Products of (x, 1) with itself, of (x, 1) with the difference y - x, and of the difference with itself.

    Args:
        products: products of (side a, side b, 1), shape (7, 7).
        direction: 0 from side a to b, 1 from b to a.
    """
    x, y = ([0, 1, 2], [3, 4, 5])[:: 1 - 2 * direction]
    inputs = products[:, [*x, 6]]
    difference = products[:, y] - products[:, x]
    return inputs[[*x, 6]], difference[[*x, 6]], difference[y] - difference[x]


def _fit(products: np.ndarray, direction: int) -> np.ndarray:
    """The change of the colours that fits best, shape (4, 3).

    The change itself is shrunk: in a direction in which no pixel varies it is 0.
    """
    own, cross, _ = _blocks(products, direction)
    return np.linalg.solve(own + ROUNDING * own[3, 3] * np.eye(4), cross)


def _missed(products: np.ndarray, change: np.ndarray, direction: int) -> float:
    """The squared difference between side y and the mapped side x, summed over the channels, before clipping."""
    own, cross, whole = _blocks(products, direction)
    return np.trace(whole - 2 * change.T @ cross + change.T @ own @ change)


def _fit_rule(features: np.ndarray) -> np.ndarray:
    """The rule that tells side a from side b: a regression of +1 and -1 on standardized features.

    Args:
        features: shape (pairs, 2, 12).

    Returns:
        Shape (13,), for the features as they are.
    """
    values = features.reshape(-1, features.shape[-1])
    center, scale = values.mean(0), values.std(0) + 1 / 255
    values = (values - center) / scale
    targets = np.tile([1.0, -1.0], len(features))
    weights = np.linalg.solve(values.T @ values + SHRINKAGE * len(values) * np.eye(values.shape[1]), values.T @ targets)
    weights = weights / scale
    return np.append(weights, -weights @ center)


def _scores(features: np.ndarray, rule: np.ndarray) -> np.ndarray:
    return features @ rule[:-1] + rule[-1]


def _share(value: float) -> str:
    """A share for a message, rounded down, so that one below a bound is shown below it. 0.99999 is shown as 1."""
    return f"{math.floor(100 * value + 1e-3) / 100:.2f}"
