# SPDX-License-Identifier: Apache-2.0
"""How well properties of the image files alone tell the answers of a model."""

from __future__ import annotations

import io
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from ..pairs.images import upright_size

logger = logging.getLogger(__name__)

FOLDS = 5  # of the cross-validation
LEAVES = 4  # of a tree, at least, and twice the number of answers
LEAST_FILES = 20
TELLING = 0.1  # of the way from chance to all answers
STANDARD_MEAN = 57.625  # of JPEG's table of quantisation for brightness, at quality 50 (ITU T.81, table K.1)
NONE = "none"
LONGEST = 40  # letters of a camera's name


@dataclass(frozen=True)
class FileProperty:
    """How well a property of the files tells the answers.

    Args:
        name: the property.
        told: share of the answers that are guessed from the property alone, each answer weighing the same, in [0, 1].
        low: lower end of the 95 % interval of `told`.
        high: upper end.
        chance: the same share by guessing, 1 / number of answers.
        typical: answer -> the median of the property over its images, or the most frequent value if it is no number.
    """

    name: str
    told: float
    low: float
    high: float
    chance: float
    typical: dict[str, float | str]

    @property
    def tells(self) -> bool:
        """Whether `low` is above chance by a tenth of what is above chance."""
        return self.low > self.chance + TELLING * (1 - self.chance)


def file_properties(files: Sequence[Mapping[str, Any]], answers: Sequence[str], seed: int = 0) -> list[FileProperty]:
    """Guesses the answers from single properties of the files: size, format, compression and camera (ours).

    A number is guessed from by a small decision tree, a text by the answer that is most frequent with it, on other
    images. That a property tells the answers is a correlation: the model need not follow it.

    Args:
        files: encoded images that can be decoded.
        answers: the answer to each image. Answers with fewer than five images are left out.
        seed: seed of the draw of the folds.

    Returns:
        The properties that every file has and that differ between files, the most telling first. The list is empty if
        there are fewer than 20 images or two answers, or if a file's header cannot be read.
    """
    counts = Counter(answers)
    places = [place for place, answer in enumerate(answers) if counts[answer] >= FOLDS]
    kept = [answers[place] for place in places]
    if len(kept) < LEAST_FILES or len({*kept}) < 2:
        return []
    try:
        rows = [_properties_of(files[place]) for place in places]
    except Exception as failure:  # of a file that `datasets` reads in another way, or with a damaged header
        logger.info(f"The properties of the files are not looked at: {failure}")
        return []
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    differ = {name: values for name, values in columns.items() if len({*values}) > 1 and None not in values}
    found = [_told(name, values, kept, seed) for name, values in differ.items()]
    return sorted(found, key=lambda one: -one.told)


def _properties_of(file: Mapping[str, Any]) -> dict[str, float | str | None]:
    with Image.open(file["path"] if file["bytes"] is None else io.BytesIO(file["bytes"])) as image:
        width, height = upright_size(image)
        exif = Image.Image.getexif(image)
        camera = " ".join(str(exif[tag]) for tag in (ExifTags.Base.Make, ExifTags.Base.Model) if tag in exif)
        camera = " ".join("".join(letter if letter.isprintable() else " " for letter in camera).split())[:LONGEST]
        return {
            "width": width,
            "height": height,
            "aspect ratio": round(width / height, 3),
            "format": f"{image.format} {image.mode}",
            "JPEG quality": _quality(getattr(image, "quantization", None)),
            "camera": camera or NONE,
        }


def _quality(tables: Mapping[int, Sequence[int]] | None) -> float | None:
    """About the quality of a JPEG image by libjpeg's scale of 1 to 100, from its table for brightness."""
    if not tables:
        return None
    scale = 100 * float(np.mean(tables[min(tables)])) / STANDARD_MEAN
    return round(100 - scale / 2 if scale <= 100 else 5000 / scale)


def _told(name: str, values: Sequence[float | str], answers: Sequence[str], seed: int) -> FileProperty:
    kinds, is_text = sorted({*answers}), isinstance(values[0], str)
    guesses = (_by_text if is_text else _by_number)(np.array(values), np.array(answers), seed % 2**32)
    right = guesses == np.array(answers)
    told, variance, typical = 0.0, 0.0, {}
    for kind in kinds:
        own = np.array([answer == kind for answer in answers])
        count, hits = int(own.sum()), int(right[own].sum())
        told += hits / count / len(kinds)
        share = (hits + 1) / (count + 2)  # the interval of equal values has a width
        variance += share * (1 - share) / count / len(kinds) ** 2
        of_kind = [value for value, is_own in zip(values, own, strict=True) if is_own]
        typical[kind] = Counter(of_kind).most_common(1)[0][0] if is_text else float(median(of_kind))
    error = 1.96 * math.sqrt(variance)
    return FileProperty(name, told, max(told - error, 0.0), min(told + error, 1.0), 1 / len(kinds), typical)


def _by_number(values: np.ndarray, answers: np.ndarray, seed: int) -> np.ndarray:
    """The answer to each image, guessed from its value by a tree that the other folds have grown."""
    from sklearn.model_selection import cross_val_predict  # a second, for scans alone
    from sklearn.tree import DecisionTreeClassifier

    leaves = max(LEAVES, 2 * len({*answers.tolist()}))
    tree = DecisionTreeClassifier(max_leaf_nodes=leaves, class_weight="balanced", random_state=0)
    return cross_val_predict(tree, values.astype(float)[:, None], answers, cv=_folds(seed))


def _by_text(values: np.ndarray, answers: np.ndarray, seed: int) -> np.ndarray:
    """The answer to each image, the most frequent of its value in the other folds; "" for a value that is not there."""
    guesses = np.full(len(answers), "", answers.dtype)
    for train, test in _folds(seed).split(values, answers):
        sizes = Counter(answers[train].tolist())
        shares: dict[str, Counter] = {}
        for value, answer in zip(values[train].tolist(), answers[train].tolist(), strict=True):
            shares.setdefault(value, Counter())[answer] += 1 / sizes[answer]
        for place in test.tolist():
            seen = shares.get(values[place])
            guesses[place] = seen.most_common(1)[0][0] if seen else ""
    return guesses


def _folds(seed: int) -> Any:
    from sklearn.model_selection import StratifiedKFold

    return StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
