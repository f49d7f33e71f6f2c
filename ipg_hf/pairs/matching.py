# SPDX-License-Identifier: Apache-2.0
"""Makes pairs by matching: two images of a set with the same label and different attributes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import datasets
import numpy as np
import torch
from datasets.utils import tqdm
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import DataLoader
from transformers.utils import logging

from ..heads import find_head, head_candidates
from ..inference import inference
from ..models import forward_inputs, model_inputs
from .images import read_image, stored_images
from .makers import (
    array_cached,
    check_choice,
    check_columns,
    check_is_set,
    check_number,
    draw_rows,
    encode_image,
    known_values,
    map_cached,
)
from .sources import pairs_from_rows
from .transforms import ImageRows, package_versions

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
    """Pairs images that have the same label and different values of the attribute. Each image is used at most once.

    The sides of a matched pair differ in more than the attribute, so matched pairs teach less than exact pairs. A group
    with few images gives few pairs. A label that has one value of the attribute only gives none. If one label gives
    most of the pairs, set `max_per_group`: otherwise the loss of labelled pairs favours that label.

    Args:
        source: a set with the columns `image`, `label` and the attribute.
        match_on: `"features"` minimises the sum of the distances within the pairs of a label (Hungarian method). The
            distance of two images is the Euclidean distance of their features, standardised over the set. Features of
            a model of transformers or timm are kept in the cache folder of `datasets`. `"random"`
            pairs at random, as a baseline. Either way, a label gives as many pairs as its smaller side has images.
        model: an image classifier. The features are what enters its classifier head, in inference mode, on the device
            of the model.
        processor: the image processor of the model.
        attribute: column of the attribute.
        attributes: the two values (names or ids), for side a and for side b. By default the first two of the column.
        head: path of the model's head, if `find_head` does not find it by itself.
        batch_size: number of images in a forward.
        max_per_group: largest number of images of a label and attribute; more images are reduced to a random draw.
            `None` uses all. Use it for large sets: only the drawn images get features, and matching n with m images
            needs 8·n·m bytes.
        size: (width, height) in pixels. The images of the pairs are scaled to it and cropped at the centre. `None`
            leaves them as they are. Use it if the images differ in size: the sides of a pair must have one size.
        num_pairs: number of pairs to keep: the nearest ones, or random ones with `"random"`. `None` keeps all.
        seed: non-negative seed of the random draws.

    Returns:
        A set with the columns `image_a`, `image_b`, `label`, `attribute_a`, `attribute_b`, `source_id` and
        `source_id_b` (numbers of the rows of side a and side b) and, with `"features"`, `distance` (float, between the
        features of the two sides). The mean distance of the pairs and of random pairs is logged.

    Raises:
        ValueError: a column is missing; `"features"` without a model or processor; `attributes` are not two different
            values of the column; `max_per_group` is below 1; no label has images of both values; there are fewer pairs
            than `num_pairs`.
    """
    check_choice("match_on", match_on, get_args(MatchOn))
    check_is_set(source, "the source")
    check_columns(source, ("image", "label", attribute))
    if match_on == "features" and (model is None or processor is None):
        raise ValueError("match_on='features' needs a model and its image processor; match_on='random' needs none.")
    check_number("seed", seed, 0, math.inf, whole=True)
    check_number("batch_size", batch_size, 1, math.inf, whole=True)
    if max_per_group is not None:
        check_number("max_per_group", max_per_group, 1, math.inf, whole=True)
    if size is not None:
        if not isinstance(size, (tuple, list)) or len(size) != 2:
            raise ValueError(f"size={size!r} is not valid: give (width, height) in pixels.")
        for length in size:
            check_number("size", length, 1, math.inf, whole=True)
    plain = source.with_format(None)
    labels, values = (known_values(plain, name) for name in ("label", attribute))
    first, second = _values(source.features[attribute], values, attribute, attributes)
    rng = np.random.default_rng((seed, 7))
    drawn = {}
    for label in np.unique(labels):
        a, b = (rng.permutation(np.flatnonzero((labels == label) & (values == value))) for value in (first, second))
        if min(len(a), len(b)):
            drawn[label] = a[:max_per_group], b[:max_per_group]
        else:
            logger.warning(
                f"label {label} gives no pairs: it has {len(a)} and {len(b)} images of the two attributes. Add images "
                "or make pairs by editing."
            )
    if not drawn:
        raise ValueError(
            f"no label has images with both values of {attribute!r}: there is nothing to match. Make pairs by editing."
        )
    features, rows = None, np.arange(len(plain))
    if match_on == "features":
        if max_per_group is not None:
            rows = np.sort(np.concatenate([side for sides in drawn.values() for side in sides]))
        # the features do not depend on the head, which may be new and random; where a forward must find it, it counts
        paths = [head] if head else [path for path, _ in head_candidates(model)]
        facts = model_facts(model, processor, head, batch_size, without=paths if len(paths) == 1 else ())
        features = array_cached(
            lambda: extract_features(plain, model, processor, rows=rows, head=head, batch_size=batch_size),
            facts and [*facts, stored_images(plain.select(rows).select_columns(["image"]), ["image"])],
        )
        features = _standardised(features)
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
    pairs = pairs_from_rows(plain, a[kept], b[kept], attribute=attribute)
    pairs = pairs.add_column("source_id", a[kept]).add_column("source_id_b", b[kept])
    pairs = _fitted(pairs, tuple(size)) if size else pairs
    return pairs.add_column("distance", distances[kept]) if features is not None else pairs


def model_facts(model: nn.Module, processor: Any, *settings: Any, without: Sequence[str] = ()) -> list[Any] | None:
    """What a model's answers depend on beside the images, for their name on disk (`facts` of [`map_cached`]).

    Args:
        model: the model.
        processor: its image processor.
        *settings: whatever else the answers depend on, as plain values.
        without: paths of modules whose weights the answers do not depend on.

    Returns:
        `None` if the answers depend on code that no hash can tell.
    """
    parts = {type(part).__module__.split(".")[0] for part in (*model.modules(), processor)}
    if not parts <= {"transformers", "timm", "torch"}:
        return None
    weights = hashlib.sha256()
    for name, values in model.state_dict().items():
        if name.rpartition(".")[0] in without:
            continue
        weights.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        weights.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    known = [model.config.to_dict(), processor.to_dict(), next(model.parameters()).device.type, *settings]
    return [type(model).__name__, weights.hexdigest(), known, package_versions()]


@torch.no_grad()
def extract_features(
    source: datasets.Dataset,
    model: nn.Module,
    processor: Any,
    *,
    rows: np.ndarray | None = None,
    head: str | None = None,
    batch_size: int = 64,
) -> np.ndarray:
    """Computes the features of images: what enters the classifier head of a model.

    Args:
        source: a set with the column `image`.
        model: an image classifier.
        processor: the image processor of the model.
        rows: numbers of the N rows to use. `None` uses all.
        head: path of the model's head, if `find_head` does not find it by itself.
        batch_size: number of images in a forward.

    Returns:
        float32, shape (N, D).
    """
    main = forward_inputs(model)[0]
    rows = range(len(source)) if rows is None else rows.tolist()
    images = ImageRows(source, processor, {"image": main})
    batches = DataLoader(images, batch_size, sampler=rows, generator=torch.Generator())
    parts, found = [], None
    with inference(model):
        for batch in tqdm(batches, desc="Features"):
            batch = model_inputs(model, batch)
            found = found or find_head(model, head, batch)
            parts.append(found.run(model, batch)[1].float().cpu())
    return torch.cat(parts).numpy()


def _standardised(features: np.ndarray) -> np.ndarray:
    spread = features.std(0)
    return (features - features.mean(0)) / np.where(spread > 0, spread, 1)


def _assigned(features: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Matches rows a and b so that the sum of the distances is smallest.

    Returns the rows of side a, the rows of side b, the distances, and the mean distance over all pairs of rows.
    """
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
        raise ValueError(f"attributes={wanted!r} must be two different values of {column!r}, which has {known}.")
    return ids[0], ids[1]


def _fitted(pairs: datasets.Dataset, size: tuple[int, int]) -> datasets.Dataset:
    """Scales the images of the pairs to (width, height) and crops them at the centre."""

    modes = {name: pairs.features[name].mode for name in ("image_a", "image_b")}
    rows = {"image_a": pairs["source_id"][:], "image_b": pairs["source_id_b"][:]}

    def fitted(row: dict[str, Any], number: int) -> dict[str, Any]:
        sides = {}
        for name, mode in modes.items():
            image = read_image(row[name], f"the image of row {rows[name][number]}", mode).convert("RGB")
            image = ImageOps.fit(image, size, Image.Resampling.BICUBIC)
            sides[name] = {"bytes": encode_image(image), "path": None}
        return sides

    facts = ["match", size, modes, rows]
    features = datasets.Features({**pairs.features, **dict.fromkeys(modes, datasets.Image())})
    return map_cached(stored_images(pairs, modes), fitted, facts, features=features)
