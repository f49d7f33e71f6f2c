# SPDX-License-Identifier: Apache-2.0
"""The data sets of one benchmark, under the names that recipes and audits use."""

from __future__ import annotations

from dataclasses import dataclass

import datasets


@dataclass(frozen=True)
class Benchmark:
    """The data sets of one benchmark.

    Args:
        train: rows `image`, `label` and `attribute` (both ClassLabel; the attribute is the spurious one).
        validation: likewise, for choosing settings and checkpoints.
        test: likewise, for reporting.
        pairs: training pairs, rows `image_a`, `image_b`, `label`, `attribute_a`, `attribute_b`, `source_id`; a dict of
            such sets where there are several attributes, `None` where pairs have to be made.
        validation_pairs: pairs of images of `validation`, for the flip rate (or a dict, or `None`).
        test_pairs: likewise, of `test`.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    test: datasets.Dataset
    pairs: datasets.Dataset | dict[str, datasets.Dataset] | None
    validation_pairs: datasets.Dataset | dict[str, datasets.Dataset] | None
    test_pairs: datasets.Dataset | dict[str, datasets.Dataset] | None
