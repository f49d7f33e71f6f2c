# SPDX-License-Identifier: Apache-2.0
"""`Benchmark`: the data sets of one benchmark, as recipes and audits use them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets

from ..pairs.adversarial import AdversarialPairs
from ..pairs.classes import is_class_label, match_labels, shown


@dataclass(frozen=True)
class Benchmark:
    """The data sets of one benchmark.

    Args:
        train: rows `image`, `label` and, where it is known, `attribute`. The attribute is the spurious one and a
            ClassLabel. The label is a ClassLabel, or a float in a regression. It may be a stream.
        validation: rows with these columns, for choosing settings and checkpoints.
        test: rows with these columns, for reporting.
        pairs: training pairs, rows `image_a`, `image_b`, `label`, `attribute_a`, `attribute_b` and `source_id`. A dict
            of pair sets if there are several spurious attributes. `None` if the pairs must be made first.
        validation_pairs: pairs of images of `validation`, for the flip rate. A dict if there are several spurious
            attributes, `None` if there are no pairs.
        test_pairs: pairs of images of `test`, for the flip rate. A dict if there are several spurious attributes,
            `None` if there are no pairs.
    """

    train: datasets.Dataset | datasets.IterableDataset
    validation: datasets.Dataset
    test: datasets.Dataset
    pairs: datasets.Dataset | dict[str, datasets.Dataset] | None
    validation_pairs: datasets.Dataset | dict[str, datasets.Dataset] | None
    test_pairs: datasets.Dataset | dict[str, datasets.Dataset] | None

    @property
    def label_names(self) -> list[str] | None:
        """The names of the classes, in their order; None in a regression."""
        kind = self.train.features["label"]
        return list(kind.names) if is_class_label(kind) else None

    @property
    def attribute_names(self) -> list[str] | None:
        """The names of the attribute's values; None if no split has a ClassLabel of the attribute."""
        kinds = [part.features.get("attribute") for part in (self.train, self.validation, self.test)]
        return next((list(kind.names) for kind in kinds if is_class_label(kind)), None)

    def with_labels(self, names: Sequence[str]) -> Benchmark:
        """The benchmark with its classes numbered in the order of other names, by name.

        Args:
            names: names of classes, those of the benchmark and perhaps more. Not used in a regression.
        """
        if self.label_names is None or self.label_names == [*names]:
            return self

        def matched(value: Any, where: str) -> Any:
            if isinstance(value, dict):
                return {name: matched(part, f"{where} ({name})") for name, part in value.items()}
            if isinstance(value, AdversarialPairs):
                return replace(value, source=matched(value.source, where))
            if isinstance(value, datasets.IterableDataset) and is_class_label(value.features.get("label")):
                return _renumbered(value, names)
            return match_labels(value, names, where)

        return Benchmark(**{name: matched(value, name) for name, value in vars(self).items()})


def _renumbered(stream: datasets.IterableDataset, names: Sequence[str]) -> datasets.IterableDataset:
    """A stream with the classes of its labels numbered in the order of other names."""
    own = stream.features["label"].names
    if not {*own} <= {*names}:
        raise ValueError(f"the stream has the classes {shown(own)}, but they must be among {shown(names)}.")
    number = [names.index(name) for name in own]
    features = datasets.Features({**stream.features, "label": datasets.ClassLabel(names=[*names])})
    return stream.map(lambda label: {"label": number[label]}, input_columns="label", features=features)
