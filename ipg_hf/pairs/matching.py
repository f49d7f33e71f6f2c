# SPDX-License-Identifier: Apache-2.0
"""Pairs by matching: two images of a set that have the same label and another attribute."""

from __future__ import annotations

from typing import Any, Literal, get_args

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import DataLoader
from transformers.utils import logging

from ..heads import find_head
from ..inference import inference
from ..models import forward_inputs
from .makers import draw_rows, encode_image
from .transforms import ImageRows

logger = logging.get_logger(__name__)

MatchOn = Literal["features", "random"]


def match_pairs(
    source: datasets.Dataset,
    *,
    match_on: MatchOn = "features",
    model: nn.Module | None = None,
    processor: Any = None,
    attribute: str = "attribute",
    attributes: tuple[Any, Any] | None = None,
    head: str | None = None,
    batch_size: int = 64,
    max_per_group: int | None = None,
    size: tuple[int, int] | None = None,
    num_pairs: int | None = None,
    seed: int = 0,
) -> datasets.Dataset:
    """Pairs of images of one set: the same label, another value of the spurious attribute, each image used once.

    The sides differ in more than the attribute, and so teach less than exact pairs do; groups with few images give few
    pairs, and a label with one value of the attribute alone gives none.

    Args:
        source: a set with the columns `image`, `label` and the attribute.
        match_on: `"features"` makes the sum of the distances within the pairs smallest, label by label (the Hungarian
            method; the distance of two images is the Euclidean one of their features, standardised over the set);
            `"random"` pairs at random, the honest baseline. Both use as many pairs as the smaller side has images.
        model: an image classifier whose features are matched: what enters its classifier head, in inference mode, on
            its own device.
        processor: its image processor.
        attribute: column of the attribute.
        attributes: the two values (names or ids), for side a and side b; by default the column's first two.
        head: path of the model's head, where it is not found by itself (see `find_head`).
        batch_size: images a forward.
        max_per_group: at most so many images of each label and attribute, drawn at random, are matched; `None`: all.
            For large sets: features are computed of the drawn images alone, and n with m images take 8·n·m bytes.
        size: (width, height) in pixels to which the images of the pairs are scaled, cropped at the centre; `None`
            leaves them as they are. For sets whose images differ in size: the two sides of a pair must have one.
        num_pairs: pairs to keep: the nearest ones (random ones with `"random"`); `None`: all.
        seed: non-negative; seed of the random draws.

    Returns:
        A set with the columns `image_a`, `image_b`, `label`, `attribute_a`, `attribute_b`, `source_id` (row of side a),
        `source_id_b`, and with features `distance` (float, the distance of the sides' features; the same distance
        averaged over pairs at random is logged beside its mean).

    Raises:
        ValueError: a column is missing; features without model or processor; the values are not two different ones of
            the column; `max_per_group` is below 1; no label has images of both; more pairs wanted than there are.
    """
    if match_on not in get_args(MatchOn):
        raise ValueError(f"match_on={match_on!r} is unknown: choose from {', '.join(get_args(MatchOn))}.")
    for name in ("image", "label", attribute):
        if name not in source.column_names:
            raise ValueError(f"the source has no column {name!r}, only {source.column_names}.")
    if match_on == "features" and (model is None or processor is None):
        raise ValueError("match_on='features' needs a model and its image processor; match_on='random' needs none.")
    if max_per_group is not None and max_per_group < 1:
        raise ValueError(f"max_per_group={max_per_group} must be at least 1, or None for all images.")
    plain = source.with_format(None)
    labels, values = (np.asarray(plain[name][:]) for name in ("label", attribute))
    first, second = _values(source.features[attribute], values, attribute, attributes)
    rng = np.random.default_rng((seed, 7))
    drawn = {}
    for label in np.unique(labels):
        a, b = (rng.permutation(np.flatnonzero((labels == label) & (values == value))) for value in (first, second))
        if min(len(a), len(b)):
            drawn[label] = a[:max_per_group], b[:max_per_group]
        else:
            logger.warning(f"no pairs of label {label}: it has {len(a)} and {len(b)} images of the two attributes.")
    if not drawn:
        raise ValueError(f"no label has images with both values of {attribute!r}: there is nothing to match.")
    features, rows = None, np.arange(len(plain))
    if match_on == "features":
        if max_per_group is not None:
            rows = np.sort(np.concatenate([side for sides in drawn.values() for side in sides]))
        chosen = plain.select(rows)
        features = _standardised(extract_features(chosen, model, processor, head=head, batch_size=batch_size))
    matches, chance = [], []
    for a, b in drawn.values():
        count = min(len(a), len(b))
        if features is None:
            matches.append((a[:count], b[:count], np.zeros(count)))
            continue
        places_a, places_b, distances, mean = _assigned(features, *(np.searchsorted(rows, side) for side in (a, b)))
        matches.append((rows[places_a], rows[places_b], distances))
        chance.append((mean, count))
    a, b, distances = (np.concatenate(column) for column in zip(*matches, strict=True))
    kept = draw_rows(len(a), num_pairs, seed=seed, of="matched pairs")
    if features is not None:
        kept = np.argsort(distances, kind="stable")[: len(kept)]
    kept = kept[np.argsort(a[kept], kind="stable")]
    if features is not None:
        at_random = np.average([mean for mean, _ in chance], weights=[count for _, count in chance])
        logger.info(
            f"{len(kept)} pairs matched: mean distance {distances[kept].mean():.3g}, at random {at_random:.3g}."
        )
    pairs = _paired(plain, a[kept], b[kept], attribute)
    pairs = _fitted(pairs, tuple(size)) if size else pairs
    return pairs.add_column("distance", distances[kept]) if features is not None else pairs


@torch.no_grad()
def extract_features(
    source: datasets.Dataset, model: nn.Module, processor: Any, *, head: str | None = None, batch_size: int = 64
) -> np.ndarray:
    """What enters a model's classifier head for each image: float32, shape (N, D).

    Args:
        source: a set with the column `image`.
        model: an image classifier.
        processor: its image processor.
        head: path of its head, where it is not found by itself.
        batch_size: images a forward.
    """
    main = forward_inputs(model)[0]
    batches = DataLoader(ImageRows(source, processor, {"image": main}), batch_size, generator=torch.Generator())
    device, parts = next(model.parameters()).device, []
    found = None
    with inference(model):
        for batch in batches:
            batch = {name: values.to(device) for name, values in batch.items()}
            found = found or find_head(model, head, batch)
            parts.append(found.run(model, batch)[1].float().cpu())
    return torch.cat(parts).numpy()


def _standardised(features: np.ndarray) -> np.ndarray:
    spread = features.std(0)
    return (features - features.mean(0)) / np.where(spread > 0, spread, 1)


def _assigned(features: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Rows of the pairs with the smallest sum of distances, the distances, and the mean over all that could be."""
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    cost = cdist(features[a], features[b])
    chosen = linear_sum_assignment(cost)
    return a[chosen[0]], b[chosen[1]], cost[chosen], float(cost.mean())


def _values(feature: Any, values: np.ndarray, column: str, wanted: tuple[Any, Any] | None) -> tuple[Any, Any]:
    known = np.unique(values).tolist()
    if wanted is None:
        wanted = tuple(known[:2])
    ids = [
        feature.str2int(v)
        if isinstance(v, str) and isinstance(feature, datasets.ClassLabel) and v in feature.names
        else v
        for v in wanted
    ]
    if len(ids) != 2 or ids[0] == ids[1] or not {*ids} <= {*known}:
        raise ValueError(f"attributes={wanted!r} must be two different values of {column!r}, which holds {known}.")
    return ids[0], ids[1]


def _paired(source: datasets.Dataset, a: np.ndarray, b: np.ndarray, attribute: str) -> datasets.Dataset:
    """The rows side by side; images that lie in files stay there."""
    sides = []
    for rows, side in ((a, "a"), (b, "b")):
        part = source.select_columns(["image", "label", attribute] if side == "a" else ["image", attribute]).select(
            rows
        )
        part = part.rename_columns({"image": f"image_{side}", attribute: f"attribute_{side}"})
        sides.append(part.add_column("source_id" if side == "a" else "source_id_b", rows))
    order = ["image_a", "image_b", "label", "attribute_a", "attribute_b", "source_id", "source_id_b"]
    return datasets.concatenate_datasets(sides, axis=1).select_columns(order)


def _fitted(pairs: datasets.Dataset, size: tuple[int, int]) -> datasets.Dataset:
    """The pairs with their images scaled and cropped to (width, height)."""

    def fitted(row: dict[str, Any]) -> dict[str, Any]:
        sides = {name: row[name].convert("RGB") for name in ("image_a", "image_b")}
        images = {name: ImageOps.fit(image, size, Image.Resampling.BICUBIC) for name, image in sides.items()}
        return {name: {"bytes": encode_image(image), "path": None} for name, image in images.items()}

    return pairs.map(fitted, features=pairs.features, desc="Cropping pairs")
