# SPDX-License-Identifier: Apache-2.0
"""`Benchmark`: the data sets of one benchmark, as recipes and audits use them."""

from __future__ import annotations

from dataclasses import dataclass

import datasets


@dataclass(frozen=True)
class Benchmark:
    """The data sets of one benchmark.

    Args:
        train: rows `image`, `label` and `attribute`. The attribute is the spurious one and a ClassLabel. The label is a
            ClassLabel, or a float in a regression.
        validation: rows with the columns of `train`, for choosing settings and checkpoints.
        test: rows with the columns of `train`, for reporting.
        pairs: training pairs, rows `image_a`, `image_b`, `label`, `attribute_a`, `attribute_b` and `source_id`. A dict
            of pair sets if there are several spurious attributes. `None` if the pairs must be made first.
        validation_pairs: pairs of images of `validation`, for the flip rate. A dict if there are several spurious
            attributes, `None` if there are no pairs.
        test_pairs: pairs of images of `test`, for the flip rate. A dict if there are several spurious attributes,
            `None` if there are no pairs.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    test: datasets.Dataset
    pairs: datasets.Dataset | dict[str, datasets.Dataset] | None
    validation_pairs: datasets.Dataset | dict[str, datasets.Dataset] | None
    test_pairs: datasets.Dataset | dict[str, datasets.Dataset] | None
