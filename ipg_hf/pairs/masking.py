# SPDX-License-Identifier: Apache-2.0
"""Finds the objects in images: makes masks for a set that has none."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import datasets
import numpy as np
import torch
from datasets.utils import tqdm
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForMaskGeneration, PreTrainedModel
from transformers.utils import logging

from ..inference import inference
from ..models import forward_inputs, model_inputs, on_accelerator
from .edits import filled_region, read_mask
from .exchanging import CENTER, region
from .images import read_image, stored_images
from .makers import check_columns, check_is_set, check_number, encode_image, map_cached
from .matching import model_facts
from .transforms import pixel_statistics

logger = logging.get_logger(__name__)

SIDES = (224, 448)  # pixels: an image is scaled to the first that gives enough cells
LEAST_CELLS = 12  # in a row of the map of features
FIT_IMAGES = 400  # images that the direction of the objects is fitted on
NEAREST = 1 / 6  # share of an image's edge cells: a cell is compared with the most similar ones
SHRINKAGE = 0.1  # of the covariance of the features, towards a multiple of the identity
ROUNDS = 12
AREA = (0.01, 0.9)  # of the frame, that the object may have
AGREEMENT = 0.4  # least overlap, intersection over union, of a model's first and last answers
TASKS = ("image-segmentation", "mask-generation")  # pipelines
EDGE = 0.25  # of the frame's edge: what a segment of an object covers at most

Finder = Callable[[Sequence[Image.Image], Sequence[int]], Iterable[np.ndarray | None]]


def add_masks(
    source: datasets.Dataset, segmenter: Any, processor: Any = None, *, column: str = "mask", batch_size: int = 16
) -> datasets.Dataset:
    """Adds masks of the objects to a set of images (ours), for [`background_pairs`], [`exchange_pairs`] and `scan`.

    A model needs no training for this. Each image is cut into cells, and each cell has features of the model. In the
    first round a cell counts as object if it resembles none of the cells at the edge of its image. Then a linear
    discriminant is fitted to the answers over many images, and again to its own answers, 12 times.
    recipes/scenes/ipg_found_masks_lite0.yaml trains with such masks.

    All masks can be wrong alike: look at a preview of the pairs.

    Args:
        source: a set with the column `image`.
        segmenter: what finds the objects:
            - a pretrained model of `AutoModel.from_pretrained`, whose output has `last_hidden_state`. Vision
              transformers that were pretrained without labels, such as DINOv2, do best.
            - a pipeline of transformers, `"image-segmentation"` or `"mask-generation"`. Of its segments those count
              that lie mostly in a central oval and cover at most a quarter of the frame's edge.
            - a function of an RGB image that returns the mask: an image as [`background_pairs`] takes it, or a bool
              array, shape (height, width).
        processor: the image processor of a model. Its mean and standard deviation are used.
        column: name of the new column.
        batch_size: number of images in a forward of a model.

    Returns:
        The set, without a format or transform, with a column of masks, 0 background and 255 object, of the sizes of the
        images. Rows without a usable mask are left out, so that later rows have lower numbers, and a warning counts
        them: the object has less than 0.01 or more than 0.9 of the frame, no background is left beside it, or the first
        and the last answers of a model overlap by less than 0.4. The masks of a model or pipeline of transformers or
        timm are kept in the cache folder of `datasets`.

    Raises:
        ValueError: the source is a stream, is empty, lacks `image` or has `column` already; the segmenter is none of
            the above; a model has no processor, or gives no map of features or one that is not finite; an image cannot
            be read; a function returns no mask, or an array of another size; no row has a usable mask.
    """
    from transformers import Pipeline  # imports all pipelines, which few need

    check_is_set(source, "the source")
    check_columns(source, ["image"])
    check_number("batch_size", batch_size, 1, math.inf, whole=True)
    if column in source.column_names:
        raise ValueError(f"the source has a column {column!r} already: use it, or name another column.")
    if not len(source):
        raise ValueError("the source is empty: give a set of images.")
    source = source.with_format(None)
    stored = stored_images(source.select_columns(["image"]), ["image"])
    mode = source.features["image"].mode

    def read(value: Any, row: int) -> Image.Image:
        return read_image(value, f"the image of row {row}", mode).convert("RGB")

    find: Finder
    facts = None
    if isinstance(segmenter, Pipeline) and segmenter.task in TASKS:
        options = (segmenter._preprocess_params, segmenter._forward_params, segmenter._postprocess_params)
        facts = model_facts(segmenter.model, segmenter.image_processor, type(segmenter).__name__, *options)

        def find(images: Sequence[Image.Image], _: Sequence[int]) -> Iterable[np.ndarray | None]:
            return (_object_of(segmenter(image), image.size) for image in images)

    elif isinstance(segmenter, PreTrainedModel):
        if processor is None:
            raise ValueError(f"{type(segmenter).__name__} needs its image processor: give processor=...")
        find = ObjectFinder(segmenter, processor, batch_size, len(stored), lambda row: read(stored[row]["image"], row))
        facts = model_facts(segmenter, processor, batch_size)
    elif callable(segmenter) and not isinstance(segmenter, (Pipeline, nn.Module)):

        def find(images: Sequence[Image.Image], rows: Sequence[int]) -> Iterable[np.ndarray]:
            return map(_checked, map(segmenter, images), images, rows)

    else:
        what = f"a pipeline {segmenter.task!r}" if isinstance(segmenter, Pipeline) else f"a {type(segmenter).__name__}"
        raise ValueError(
            f"the segmenter is {what}, which finds no objects: give a model of AutoModel.from_pretrained, a pipeline "
            f"{' or '.join(map(repr, TASKS))}, or a function."
        )

    def masks(batch: dict[str, list], rows: list[int]) -> dict[str, list]:
        found = find([read(value, row) for value, row in zip(batch["image"], rows, strict=True)], rows)
        return {"mask": [*map(_file_of, found)]}

    features = datasets.Features(mask=datasets.Image())
    how = {"batched": True, "batch_size": batch_size, "remove_columns": ["image"], "desc": "Finding the objects"}
    made = map_cached(stored, masks, facts, features=features, **how)
    known = stored_images(made, ["mask"]).with_format("arrow")[:]["mask"].is_valid().to_numpy(zero_copy_only=False)
    if not known.any():
        raise ValueError("no image has a usable mask: look at the images, or give another segmenter.")
    if not known.all():
        logger.warning(f"{(~known).sum()} of {len(known)} images have no usable mask and are left out.")
    made = made.rename_column("mask", column) if column != "mask" else made
    return datasets.concatenate_datasets([source, made], axis=1).select(np.flatnonzero(known))


def load_segmenter(name: str | os.PathLike) -> tuple[Any, Any]:
    """Loads what finds objects, and its image processor, for [`add_masks`].

    Args:
        name: a Hub id or a local folder of a pretrained model.

    Returns:
        Of a model that segments images or generates masks, its pipeline and `None`. Of another vision model, the model
        without its classifier head, on the accelerator if there is one, and its image processor.

    Raises:
        OSError: nothing is found under the name.
        ValueError: the config there is of no known model.
    """
    from transformers import pipeline  # as in add_masks

    config = AutoConfig.from_pretrained(name)
    if type(config) in AutoModelForMaskGeneration._model_mapping:
        return pipeline("mask-generation", str(name)), None
    if any(architecture.endswith("Segmentation") for architecture in config.architectures or ()):
        return pipeline("image-segmentation", str(name)), None
    return on_accelerator(AutoModel.from_pretrained(name)), AutoImageProcessor.from_pretrained(name)


class ObjectFinder:
    """Finds the objects in images by the features of a pretrained model.

    Args:
        model: the model; its output has `last_hidden_state`, (N, tokens, D) or (N, D, height, width).
        processor: its image processor.
        batch_size: number of images in a forward.
        num_images: number of images of the set.
        read: reads the image of a row. At most 400 images are drawn to find what sets objects apart.

    Raises:
        ValueError: the model gives no map of features of 12 or more rows.
    """

    def __init__(
        self, model: nn.Module, processor: Any, batch_size: int, num_images: int, read: Callable[[int], Image.Image]
    ):
        self.model, self.batch_size, self.num_images, self.read = model, batch_size, num_images, read
        self.statistics = [torch.tensor(values)[:, None, None] for values in pixel_statistics(processor)]
        self.known: dict[int, Tensor] = {}  # row -> its cells, of the drawn images that have no mask yet
        self.side = self._enough()

    def __call__(self, images: Sequence[Image.Image], rows: Sequence[int]) -> list[np.ndarray | None]:
        """The masks, bool arrays of shape (height, width); `None` where the first and last answers disagree."""
        center, direction = self.direction
        new = [image for image, row in zip(images, rows, strict=True) if row not in self.known]
        computed = iter(self.cells(new) if new else ())
        cells = torch.stack([self.known.pop(row) if row in self.known else next(computed) for row in rows])
        first, last = edge_dissimilarity(cells), (cells - center) @ direction
        first, last = (scores - cut(scores.flatten(1))[:, None, None] for scores in (first, last))
        both, either = ((first > 0) & (last > 0)).sum((1, 2)), ((first > 0) | (last > 0)).sum((1, 2))
        agrees = (both >= AGREEMENT * either).tolist()
        return [
            F.interpolate(scores[None, None], image.size[::-1], mode="bicubic")[0, 0].gt(0).numpy() if agree else None
            for scores, image, agree in zip(last, images, agrees, strict=True)
        ]

    @cached_property
    def direction(self) -> tuple[Tensor, Tensor]:
        """The linear discriminant of object and background: a point between the two, and a direction, (D,) each."""
        drawn = np.sort(np.random.default_rng(0).permutation(self.num_images)[:FIT_IMAGES]).tolist()
        for start in tqdm(range(0, len(drawn), self.batch_size), desc="Features"):
            rows = drawn[start : start + self.batch_size]
            found = self.cells([*map(self.read, rows)])
            if not start:
                sample = found.new_empty(len(drawn), *found.shape[1:])
            sample[start : start + len(rows)] = found
        self.known = dict(zip(drawn, sample, strict=True))
        return discriminant(sample)

    @torch.no_grad()
    def cells(self, images: Sequence[Image.Image]) -> Tensor:
        """Features of length 1, float32, shape (N, rows, columns, D)."""
        mean, std = self.statistics
        scaled = [np.array(image.resize((self.side, self.side), Image.Resampling.BICUBIC)) for image in images]
        pixels = (torch.from_numpy(np.stack(scaled)).permute(0, 3, 1, 2) / 255 - mean) / std
        with inference(self.model):
            found = self.model(**model_inputs(self.model, {forward_inputs(self.model)[0]: pixels})).last_hidden_state
        if found.dim() == 3:  # tokens: a square of them after the class token and others of its kind
            length = math.isqrt(found.shape[1])
            found = found[:, found.shape[1] - length**2 :].unflatten(1, (length, length))
        elif found.dim() == 4 and found.shape[2] == found.shape[3]:  # channels first
            found = found.permute(0, 2, 3, 1)
        if found.dim() != 4 or self.side % found.shape[1]:  # queries of a detector, say, are no map
            raise ValueError(f"its output of shape {tuple(found.shape)} is no map of the image")
        if not found.isfinite().all():
            raise ValueError(f"the features are not finite in {found.dtype}: load the model in float32.")
        return F.normalize(found.float().cpu(), dim=-1)

    def _enough(self) -> int:
        """The side in pixels of an image that gives enough cells."""
        config, failures = self.model.config, {}
        of_timm = (getattr(config, "pretrained_cfg", None) or {}).get("input_size", (None,))
        others = [getattr(config, "image_size", None), of_timm[-1]]
        for side in dict.fromkeys((*SIDES, *(side for side in others if isinstance(side, int)))):
            self.side = side
            try:
                rows = self.cells([Image.new("RGB", (side, side))]).shape[1]
            except (ValueError, RuntimeError, AssertionError, AttributeError, IndexError) as failure:
                failures[side] = (str(failure) or type(failure).__name__).splitlines()[0]
                continue
            if rows >= LEAST_CELLS:
                return side
            failures[side] = f"{rows}×{rows} cells"
        found = "; ".join(f"{side} pixels: {why}" for side, why in failures.items())
        raise ValueError(
            f"{type(self.model).__name__} gives no map of features of {LEAST_CELLS}×{LEAST_CELLS} or more cells "
            f"({found}): give a vision transformer of AutoModel.from_pretrained."
        )


def edge_dissimilarity(cells: Tensor) -> Tensor:
    """How little each cell resembles the cells at the edge of its image: 1 - the mean cosine with the nearest ones.

    Args:
        cells: features of length 1, shape (N, rows, columns, D).

    Returns:
        Shape (N, rows, columns), in [0, 2].
    """
    is_edge = torch.ones(cells.shape[1:3], dtype=torch.bool)
    is_edge[1:-1, 1:-1] = False
    edge = is_edge.flatten().nonzero()[:, 0]
    features = cells.flatten(1, 2)
    cosines = features @ features[:, edge].transpose(1, 2)
    cosines[:, edge, torch.arange(len(edge))] = -1  # not with itself
    return 1 - cosines.topk(max(1, round(NEAREST * len(edge))), -1).values.mean(-1).view(cells.shape[:3])


def cut(scores: Tensor) -> Tensor:
    """The cut that leaves the least variance within its two sides (Otsu, 1979, https://doi.org/10.1109/TSMC.1979.4310076).

    Args:
        scores: shape (N, n), n > 1.

    Returns:
        Shape (N,): scores above it are one side. Of equal scores it is their value.
    """
    ordered = scores.double().sort(-1).values
    number = torch.arange(1, ordered.shape[1], dtype=torch.float64)
    lower = ordered.cumsum(-1)[:, :-1]
    upper = ordered.sum(-1, keepdim=True) - lower
    rest = ordered.shape[1] - number
    between = number * rest * (upper / rest - lower / number).square()
    place = between.argmax(-1, keepdim=True)
    return ((ordered.gather(1, place) + ordered.gather(1, place + 1)) / 2)[:, 0].to(scores.dtype)


def discriminant(cells: Tensor) -> tuple[Tensor, Tensor]:
    """Fits a linear discriminant of object and background to its own answers, from the first answers of the edges.

    Args:
        cells: features of length 1, float32, shape (N, rows, columns, D).

    Returns:
        The point between the means of both, and the direction from background to object, shape (D,) each.

    Raises:
        ValueError: all cells of all images are alike.
    """
    scores = edge_dissimilarity(cells).flatten(1)
    features = cells.flatten(0, 2)
    for _ in range(ROUNDS):
        is_object = (scores > cut(scores)[:, None]).flatten()
        if is_object.all() or not is_object.any():
            raise ValueError("the features of all cells are alike: give another segmenter, or other images.")
        background, of_object = means = [features[rows].mean(0) for rows in (~is_object, is_object)]
        scatter = torch.zeros(2 * features.shape[-1:])
        for rows, mean in zip((~is_object, is_object), means, strict=True):
            rest = features[rows].sub_(mean)
            scatter += rest.T @ rest / len(features)
        shrunk = scatter + SHRINKAGE * scatter.trace() / len(scatter) * torch.eye(len(scatter))
        direction = torch.linalg.solve(shrunk, of_object - background)
        center = (background + of_object) / 2
        scores = ((features - center) @ direction).view(len(cells), -1)
    return center, direction


def _file_of(mask: np.ndarray | None) -> dict[str, Any] | None:
    """The encoded image of a mask; `None` if it is not usable."""
    if mask is None or not AREA[0] <= mask.mean() <= AREA[1]:
        return None
    image = Image.fromarray(np.uint8(255 * mask))
    leaves_background = filled_region(image).getextrema()[0] == 0
    return {"bytes": encode_image(image), "path": None} if leaves_background else None


def _object_of(segments: Any, size: tuple[int, int]) -> np.ndarray | None:
    """The union of a pipeline's segments that are of an object, bool, shape (height, width); `None` if there are none.

    Args:
        segments: what the pipeline returns.
        size: width and height of the image.
    """
    masks = segments["masks"] if isinstance(segments, dict) else [segment["mask"] for segment in segments]
    inside = np.asarray(region(CENTER, size)) > 127
    is_edge = np.ones_like(inside)
    is_edge[1:-1, 1:-1] = False
    found = [np.asarray(mask) > 0 for mask in masks]
    of_object = [m for m in found if (m & inside).sum() > m.sum() / 2 and m[is_edge].mean() <= EDGE]
    return np.logical_or.reduce(of_object) if of_object else None


def _checked(mask: Any, image: Image.Image, row: int) -> np.ndarray:
    """The mask that a function returned for an image, bool, shape (height, width)."""
    where = f"the mask of row {row}, from the segmenter,"
    if isinstance(mask, Tensor):
        mask = mask.cpu().numpy()
    if isinstance(mask, Image.Image):
        mask = np.asarray(read_mask(mask, where, None, image).resize(image.size)) > 127
    shape = getattr(mask, "shape", None)
    if not isinstance(mask, np.ndarray) or mask.dtype != bool or shape != image.size[::-1]:
        what = f"a {type(mask).__name__}" if shape is None else f"an array of {mask.dtype} of shape {tuple(shape)}"
        raise ValueError(
            f"{where} is {what}: return an image of the mode L, or a bool array of shape {image.size[::-1]}."
        )
    return mask
