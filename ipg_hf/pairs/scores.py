# SPDX-License-Identifier: Apache-2.0
"""Scores of a model on each pair of a set."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import torch
from torch import nn

from ..guidance import ProblemType, invariance_divergence
from ..inference import inference, logits_of
from ..models import forward_inputs
from ..seeding import seeded
from .loader import PairCollator
from .makers import check_is_set
from .transforms import ImageRows

SIDES = ["image_a", "image_b"]
LABELS = ["label", "label_a", "label_b", "attribute_a", "attribute_b"]


def score_pairs(
    pairs: Any, model: nn.Module, processor: Any = None, batch_size: int = 64, problem_type: ProblemType | None = None
) -> dict[str, np.ndarray]:
    """Computes divergence, flip and logits of each of P pairs, in inference mode.

    The global random generators keep their states.

    Args:
        pairs: a `datasets.Dataset` of raw images (`image_a`, `image_b`), or an `ImageRows` of such a set.
        model: an image classifier.
        processor: image processor of the model; by default that of the `ImageRows`.
        batch_size: number of pairs in a forward, positive.
        problem_type: a value of `guidance.ProblemType`; by default that of the model's config.

    Returns:
        `divergence`, float64 (P,), ≥ 0: its mean is the `guidance.invariance_divergence` of all pairs. `flipped`, bool
        (P,): whether the predicted classes differ (multi-label: any label; regression: never). `logits_a` and
        `logits_b`, float32 (P, C).

    Raises:
        ValueError: there are no pairs, there is no processor, or the processor makes no batch of the images.
    """
    raw, config = raw_images(pairs, "pairs", SIDES), getattr(model, "config", None)
    processor = processor or getattr(pairs, "processor", None)
    if not len(raw) or processor is None:
        raise ValueError(f"{len(raw)} pairs, processor {processor and 'given'}: give pairs, and the image processor.")
    kind = "regression" if getattr(config, "num_labels", None) == 1 else "single_label_classification"
    kind = problem_type or getattr(config, "problem_type", None) or kind
    names, weight = forward_inputs(model), next(model.parameters())
    rows = ImageRows(raw, processor, {f"image_{side}": f"{names[0]}_{side}" for side in "ab"})
    collate, parts = PairCollator(names, names[0]), []
    with torch.no_grad(), inference(model), seeded(0):
        for start in range(0, len(raw), batch_size):
            batch = collate(rows.__getitems__(range(start, min(start + batch_size, len(raw)))))
            # weights of half precision take no float32 images
            batch = {k: v.to(weight.device, weight.dtype if v.is_floating_point() else None) for k, v in batch.items()}
            parts.append(logits_of(model(**batch)).double().cpu().chunk(2))
    a, b = (torch.cat(side) for side in zip(*parts, strict=True))
    flips = {"single_label_classification": a.argmax(-1) != b.argmax(-1), "regression": torch.zeros(len(a)) > 0}
    by_row = torch.vmap(lambda a, b: invariance_divergence(a[None], b[None], problem_type=kind))
    scores = {"divergence": by_row(a, b), "logits_a": a.float(), "logits_b": b.float()}
    scores["flipped"] = flips[kind] if kind in flips else ((a > 0) != (b > 0)).any(-1)
    return {name: values.numpy() for name, values in scores.items()}


def raw_images(dataset: Any, name: str, wanted: list[str]) -> datasets.Dataset:
    """Returns the image columns of a data set, with its labels and attributes.

    Args:
        dataset: a `datasets.Dataset` of raw images, or an `ImageRows` of such a set.
        name: name of the data set, for messages.
        wanted: image columns that the data set should have. The columns of a pair are accepted too.

    Raises:
        ValueError: the data set lacks these columns, or they hold no images.
    """
    raw = dataset.dataset if isinstance(dataset, ImageRows) else dataset
    check_is_set(raw, name)
    kinds = raw.features
    for columns in (wanted, SIDES):
        if all(isinstance(kinds.get(column), datasets.Image) for column in columns):
            return raw.with_format(None).select_columns([*columns, *(label for label in LABELS if label in kinds)])
    what = f"{name} must be a datasets.Dataset with {' and '.join(wanted)} of the feature datasets.Image"
    raise ValueError(f"{what}, not a {type(raw).__name__} of {dict(kinds)}: cast_column(name, datasets.Image()).")
