# SPDX-License-Identifier: Apache-2.0
"""How well properties of the image files alone tell the answers of a model."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from ..pairs.images import upright_size

FOLDS = 5  # of the cross-validation
LEAVES = 4  # of a tree: two thresholds make a middle range, three two of them
LEAST_FILES = 20
TELLING = 0.1  # of the way from chance to all answers
STANDARD_MEAN = 57.625  # of JPEG's table of quantisation for brightness, at quality 50 (ITU T.81, table K.1)
NONE = "none"


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
    """Guesses the answers from single properties of the files: size, format, compression and camera.

    What is guessed by a small decision tree on other images is a correlation, as Datalab of cleanlab reports them. The
    model need not follow it. But no exchange of parts between images would show a model that does.

    Args:
        files: encoded images that can be decoded.
        answers: the answer to each image. Answers with fewer than five images are left out.
        seed: seed of the draw of the folds.

    Returns:
        The properties that every file has and that differ between files, the most telling first; none of fewer than 20
        images, or of fewer than two answers.
    """
    counts = Counter(answers)
    places = [place for place, answer in enumerate(answers) if counts[answer] >= FOLDS]
    kept = [answers[place] for place in places]
    if len(kept) < LEAST_FILES or len({*kept}) < 2:
        return []
    rows = [_properties_of(files[place]) for place in places]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    differ = {name: values for name, values in columns.items() if len({*values}) > 1 and None not in values}
    found = [_told(name, values, kept, seed) for name, values in differ.items()]
    return sorted(found, key=lambda one: -one.told)


def _properties_of(file: Mapping[str, Any]) -> dict[str, float | str | None]:
    with Image.open(file["path"] if file["bytes"] is None else io.BytesIO(file["bytes"])) as image:
        width, height = upright_size(image)
        exif = Image.Image.getexif(image)
        camera = " ".join(
            str(exif[tag]).strip("\0 ") for tag in (ExifTags.Base.Make, ExifTags.Base.Model) if tag in exif
        )
        return {
            "width": width,
            "height": height,
            "aspect ratio": round(width / height, 3),
            "format": f"{image.format} {image.mode}",
            "JPEG quality": _quality(getattr(image, "quantization", None)),
            "camera": camera or NONE,
        }


def _quality(tables: Mapping[int, Sequence[int]] | None) -> float | None:
    """The quality of a JPEG image, 1 to 100 by libjpeg's scale, from its tables."""
    if not tables:
        return None
    scale = 100 * float(np.mean(tables[0])) / STANDARD_MEAN
    return round(100 - scale / 2 if scale <= 100 else 5000 / scale)


def _told(name: str, values: Sequence[float | str], answers: Sequence[str], seed: int) -> FileProperty:
    from sklearn.model_selection import StratifiedKFold, cross_val_predict  # a second, for scans alone
    from sklearn.tree import DecisionTreeClassifier

    kinds = sorted({*answers})
    is_text = isinstance(values[0], str)
    order = {value: place for place, value in enumerate(sorted({*values}))}
    numbers = np.array([[order[value] if is_text else value] for value in values], float)
    tree = DecisionTreeClassifier(max_leaf_nodes=LEAVES, class_weight="balanced", random_state=0)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    right = cross_val_predict(tree, numbers, np.array(answers), cv=folds) == np.array(answers)
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
