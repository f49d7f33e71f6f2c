# SPDX-License-Identifier: Apache-2.0
"""Exchanges parts between images of different answers, and counts how often the answer goes with the part."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from datasets.utils import tqdm
from PIL import Image
from torch import nn

from ..inference import inference, logits_of
from ..models import check_image_size, forward_inputs, model_inputs
from ..pairs.classes import is_class_label, is_text, model_names, one_form
from ..pairs.edits import alpha_of, fill_foreground, read_mask
from ..pairs.exchanging import (
    BACKGROUND,
    BOXES,
    CENTER,
    OVERLAY,
    PARTS,
    check_size,
    fitted,
    overlay_region,
    put_region,
    region,
    rows_to_compare,
)
from ..pairs.images import read_image, stored_images
from ..pairs.makers import array_cached, check_columns, check_is_set, check_number, content_hash
from ..pairs.matching import model_facts
from ..pairs.transforms import process_images
from .properties import FileProperty, file_properties

logger = logging.getLogger(__name__)

STRONG = 0.1  # a lower end of the interval above this
LEAST_IMAGES = 20
EXAMPLES = 4  # pictures of a finding
SHARPER = 2  # times the size that the model gets: images are made smaller before the edits, which cost less then
SOFT_EDGE = 1.5  # pixels: the blur of a mask's edge
ENOUGH = 0.5  # of the effect of a larger part: a smaller one that has it comes first

Strength = Literal["strong", "weak", "none"]


@dataclass(frozen=True)
class Example:
    """An image, before and after a part of another image was put into it, in RGB."""

    row: int  # in the scanned set
    donor_row: int
    image: Image.Image
    donor: Image.Image
    edited: Image.Image
    answer: str  # name of the predicted class
    answer_after: str


@dataclass(frozen=True)
class Finding:
    """How far the answers follow a part of the images.

    Args:
        part: what was exchanged, a value of `part` in [`~ipg_hf.pairs.exchange_pairs`], or `"center"`.
        effect: share of the images that take the answer of a donor with another answer when they get its part, minus
            the share that take this answer when they get the part of a donor with the same answer; in [-1, 1].
        low: lower end of the 95 % interval of `effect`.
        high: upper end.
        changed: share of the answers that change with a part of an image of another answer, in [0, 1].
        control: the same with a part of an image of the same answer. The edit is of the same kind and size, so what it
            does is no effect of the part's content.
        by_answer: answer before the exchange -> `effect` over its images.
        strength: `"strong"` if `low` is above 0.1; `"weak"` if it is above 0; else `"none"`.
    """

    part: str
    effect: float
    low: float
    high: float
    changed: float
    control: float
    by_answer: dict[str, float]
    strength: Strength


@dataclass(frozen=True)
class Scan:
    """The result of a scan.

    Args:
        findings: one for each part. The part of the largest effect comes first, or the smallest overlay, corner, strip
            or border that has half of this effect: it says more exactly what the model follows. The rest
            follow in the same way. `"center"` is the last: an effect of the middle is most often that of the object.
        examples: part -> images whose answers became those of the donors, at most 4.
        num_images: number of scanned images: those that were drawn, without those whose answer no other image has.
        accuracy: share of right answers among the drawn images with a label; `None` if there are none, if the label is
            neither a ClassLabel nor a text, or if the model lacks a name of the labels.
        answers: answer -> number of drawn images that got it.
        seed: seed of the draws.
        mask: column of the masks, if there were any.
        segmenter: folder or Hub id of the model that made the masks; [`scan`] leaves it `None`. Recipes name it.
        properties: how well properties of the files tell the answers, the most telling first.
    """

    findings: list[Finding]
    examples: dict[str, list[Example]]
    num_images: int
    accuracy: float | None
    answers: dict[str, int]
    seed: int
    mask: str | None = None
    segmenter: str | None = None
    properties: list[FileProperty] = field(default_factory=list)


def scan(
    model: nn.Module,
    dataset: datasets.Dataset,
    processor: Any,
    *,
    mask: str | None = None,
    num_images: int = 300,
    batch_size: int = 32,
    seed: int = 0,
) -> Scan:
    """Finds which parts of the images a model follows (ours).

    Each image gets a part of two other images, the donors: of one to which the model gives another answer, and of one
    to which it gives the same. If the model follows the part, the first exchange moves the answer to that of the donor,
    and the second does not. So no attribute and no label is needed, and the second exchange is the control: an edit of
    the same kind and size. [`~ipg_hf.pairs.exchange_pairs`] exchanges the same parts, to make pairs against a finding.

    No part shows the size and the compression of a file alone: traces of them are in all parts. The scan says how well
    such a property tells the answers. The model need not follow it.

    A part that shows something of the object moves answers rightly. The scan cannot know what is an object: look at the
    pictures. A shortcut that is in no part may not be found, nor one of two that each suffice alone.

    The answers of a model of transformers or timm are kept in the cache folder of `datasets`, exchange by exchange: an
    interrupted scan goes on.

    Args:
        model: an image classifier, on any device. It should give each of its answers to two or more images: images with
            an answer that no other image has are not scanned.
        dataset: a set with the column `image`, not the training images if there are others. If it has `label`, with the
            classes of the model, the accuracy is reported.
        processor: the image processor of the model.
        mask: column of masks of the objects. With it the background is exchanged too.
        num_images: number of images to scan, at least 20, drawn at random. `None` or more than there are uses all. They
            are kept in memory, at twice the size that the model gets.
        batch_size: number of images in a forward.
        seed: non-negative seed of the draws.

    Raises:
        ValueError: the set is a stream or lacks a column; a number is out of range; an image or a mask cannot be read
            or used; the model cannot run on images of the processor's size; the model is a regression; fewer than 20
            images can be scanned, or the model gives one answer to all images.
    """
    check_is_set(dataset, "the set to scan")
    check_columns(dataset, ["image", *([mask] if mask else [])])
    check_number("seed", seed, 0, math.inf, whole=True)
    check_number("batch_size", batch_size, 1, math.inf, whole=True)
    if num_images is not None:
        check_number("num_images", num_images, LEAST_IMAGES, math.inf, whole=True)
    check_image_size(model, processor)
    names = _names(model)
    rng = np.random.default_rng((int(seed), 17))
    rows = np.sort(rng.permutation(len(dataset))[:num_images])
    images, filled, alphas = _read(dataset, rows, mask, _largest(model, processor))

    def answers_of(batch: Sequence[Image.Image]) -> np.ndarray:
        return _answers(model, processor, batch, batch_size)

    facts = _facts(model, processor, dataset.select(rows), mask, batch_size)

    def kept(make: Callable[[], np.ndarray], *of: Any) -> np.ndarray:
        """The answers to one exchange, which an interrupted scan has on disk already."""
        return array_cached(make, facts and [*facts, *of])

    before = kept(lambda: answers_of(images))
    counts = {names[number]: int((before == number).sum()) for number in np.unique(before).tolist()}
    accuracy = _accuracy(model, dataset, rows, before)
    shared = _with_company(before)
    rows, before = rows[shared], before[shared]
    images, filled, alphas = ([part[place] for place in shared] for part in (images, filled, alphas))
    other, same = _donors(before, rng)
    parts: dict[str, Callable[[int, int], Image.Image]] = {
        name: lambda to, of, exchange=exchange, name=name: exchange(
            images[to], fitted(images[of], images[to].size, name)
        )
        for name, exchange in PARTS.items()
    }
    if mask:
        parts[BACKGROUND] = lambda to, of: Image.composite(images[to], fitted(filled[of], images[to].size), alphas[to])
    compared = rows_to_compare(before)
    overlay = overlay_region([images[place] for place in compared], before[compared])
    if overlay is not None:
        parts[OVERLAY] = lambda to, of: put_region(images[to], fitted(images[of], images[to].size, OVERLAY), overlay)
    findings, examples = [], {}
    with tqdm(total=2 * len(parts) * len(rows), desc="Scanning") as bar:

        def answers_after(exchange: Callable[[int, int], Image.Image], donors: np.ndarray) -> np.ndarray:
            found = []
            for start in range(0, len(rows), batch_size):
                places = range(start, min(start + batch_size, len(rows)))
                found.append(answers_of([exchange(place, int(donors[place])) for place in places]))
                bar.update(len(places))
            return np.concatenate(found)

        for name, exchange in parts.items():
            after = []
            for donors in (other, same):
                done = bar.n
                after.append(kept(partial(answers_after, exchange, donors), name, donors.tolist()))
                bar.update(done + len(rows) - bar.n)  # nothing, unless the answers were on disk
            findings.append(_finding(name, before, *after, other, names))
            moved = np.flatnonzero(after[0] == before[other])[:EXAMPLES].tolist()
            shown = [(place, int(other[place]), exchange(place, int(other[place]))) for place in moved]
            examples[name] = [
                Example(
                    row=int(rows[place]),
                    donor_row=int(rows[donor]),
                    image=images[place],
                    donor=images[donor],
                    edited=edited,
                    answer=names[before[place]],
                    answer_after=names[after[0][place]],
                )
                for place, donor, edited in shown
            ]
    files = stored_images(dataset.with_format(None).select_columns(["image"]), ["image"])
    told = file_properties([files[row]["image"] for row in rows.tolist()], [names[n] for n in before], int(seed))
    return Scan(_ranked(findings, overlay), examples, len(rows), accuracy, counts, int(seed), mask, properties=told)


def _facts(
    model: nn.Module, processor: Any, images: datasets.Dataset, mask: str | None, batch_size: int
) -> list[Any] | None:
    """What the answers of a scan depend on beside the exchange, for their names on disk; `None`: no hash can tell."""
    facts = model_facts(model, processor, batch_size, Path(__file__).read_text(encoding="utf-8"))
    columns = ["image", *([mask] if mask else [])]
    stored = stored_images(images.with_format(None).select_columns(columns), columns)
    return facts and ["scan", content_hash(*facts, stored)]


def _read(
    dataset: datasets.Dataset, rows: np.ndarray, mask: str | None, size: int | None
) -> tuple[list[Image.Image], list[Image.Image | None], list[Image.Image | None]]:
    """Reads images (RGB), the same with their object filled, and masks (L, with a soft edge).

    Args:
        dataset: the set.
        rows: the rows to read.
        mask: column of masks. Without it the last two are `None`.
        size: the shorter side is scaled to it, in pixels, if it is longer. `None` leaves images as they are.
    """
    columns = ["image", *([mask] if mask else [])]
    stored = stored_images(dataset.with_format(None).select_columns(columns), columns)
    modes = {name: dataset.features[name].mode for name in columns}
    read: tuple[list, list, list] = ([], [], [])
    for row in rows.tolist():
        value = stored[row]
        image = read_image(value["image"], f"the image of row {row}", modes["image"]).convert("RGB")
        parts: list[Image.Image | None] = [image, None, None]
        try:
            check_size(image)
            if mask:
                shape = read_mask(value[mask], f"the mask of row {row}", modes[mask], image)
                parts[1:] = fill_foreground(image, shape), alpha_of(shape, image.size, SOFT_EDGE)
        except ValueError as failure:
            raise ValueError(f"row {row}: {failure}") from failure
        scale = min(1, (size or min(image.size)) / min(image.size))
        new = tuple(round(length * scale) for length in image.size)
        for found, part in zip(read, parts, strict=True):
            same_size = part is None or part.size == new
            found.append(part if same_size else part.resize(new, Image.Resampling.BICUBIC))
    return read


def _largest(model: nn.Module, processor: Any) -> int | None:
    """The shorter side, in pixels, that is enough for an image; `None` if the processor does not scale images."""
    main = forward_inputs(model)[0]
    shapes = [process_images(processor, [Image.new("RGB", (side, side))])[main].shape for side in (64, 512)]
    if shapes[0] != shapes[1] or len(shapes[0]) != 4:
        return None
    return SHARPER * max(shapes[0][-2:])


@torch.no_grad()
def _answers(model: nn.Module, processor: Any, images: Sequence[Image.Image], batch_size: int) -> np.ndarray:
    """The predicted classes: int64, shape (n,)."""
    found = []
    with inference(model):
        for start in range(0, len(images), batch_size):
            inputs = model_inputs(model, process_images(processor, images[start : start + batch_size]))
            found.append(logits_of(model(**inputs)).argmax(-1).cpu())
    return torch.cat(found).numpy()


def _with_company(answers: np.ndarray) -> np.ndarray:
    """The places of the images whose answer another image has too."""
    kinds, places, counts = np.unique(answers, return_inverse=True, return_counts=True)
    kept = np.flatnonzero(counts[places] > 1)
    if len(kinds) < 2:
        raise ValueError("the model gives one answer to all images: there is nothing to exchange. Give other images.")
    if len(kept) < LEAST_IMAGES or (counts > 1).sum() < 2:
        raise ValueError(
            f"{len(kept)} of {len(answers)} images have an answer that another image has too, of {(counts > 1).sum()} "
            f"kinds: a scan needs {LEAST_IMAGES} images and two answers. Scan more images."
        )
    if len(kept) < len(answers):
        logger.warning(f"{len(answers) - len(kept)} images are not scanned: no other image has their answer.")
    return kept


def _donors(answers: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draws for each image a donor of another answer, and one of the same answer that is not the image itself."""
    places = np.arange(len(answers))
    other = [rng.choice(places[answers != answer]) for answer in answers]
    same = [rng.choice(places[(answers == answer) & (places != place)]) for place, answer in enumerate(answers)]
    return np.array(other), np.array(same)


def _finding(
    part: str, before: np.ndarray, after: np.ndarray, control: np.ndarray, donors: np.ndarray, names: Sequence[str]
) -> Finding:
    """Counts, for answers before and after an exchange with donors of another answer, and of the same (`control`)."""
    of_donor = before[donors]
    moved = (after == of_donor).astype(float) - (control == of_donor)
    effect = moved.mean()
    # as if one more image had moved: without it the interval of equal values would have no width
    error = 1.96 * math.sqrt((((moved - effect) ** 2).sum() + 1) / (len(moved) + 1) / len(moved))
    low, high = max(effect - error, -1), min(effect + error, 1)
    return Finding(
        part,
        effect=float(effect),
        low=float(low),
        high=float(high),
        changed=float((after != before).mean()),
        control=float((control != before).mean()),
        by_answer={names[number]: float(moved[before == number].mean()) for number in np.unique(before).tolist()},
        strength="strong" if low > STRONG else "weak" if low > 0 else "none",
    )


def _ranked(findings: Sequence[Finding], overlay: Image.Image | None = None) -> list[Finding]:
    """The findings in the order of [`Scan`]; `overlay` is the region of that part."""
    regions = {name: region(name, (100, 100)) for name in BOXES} | ({OVERLAY: overlay} if overlay else {})
    areas = {name: np.asarray(mask).mean() / 255 for name, mask in regions.items()}
    rest, ranked = [found for found in findings if found.part != CENTER], []
    while rest:
        largest = max(found.effect for found in rest)
        near = [found for found in rest if found.effect >= min(ENOUGH * largest, largest)]
        ranked.append(min(near, key=lambda found: (areas.get(found.part, 1), -found.effect)))
        rest.remove(ranked[-1])
    return ranked + [found for found in findings if found.part == CENTER]


def _names(model: nn.Module) -> list[str]:
    """The names of a model's classes, each once.

    Raises:
        ValueError: the model is a regression.
    """
    config = model.config
    if config.num_labels == 1 or getattr(config, "problem_type", None) == "regression":
        raise ValueError("the model predicts a number: a scan needs a model that chooses among classes.")
    names = [str(config.id2label.get(number, number)) for number in range(config.num_labels)]
    return [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names)]


def _accuracy(model: nn.Module, dataset: datasets.Dataset, rows: np.ndarray, answers: np.ndarray) -> float | None:
    feature, own = dataset.features.get("label"), model_names(model.config)
    if own is None or not (is_class_label(feature) or is_text(feature)):
        return None
    labels = dataset.with_format(None).select(rows)["label"][:]
    if is_class_label(feature):
        labels = [feature.names[label] if label is not None and label >= 0 else None for label in labels]
    known = [place for place, label in enumerate(labels) if label is not None]
    names = one_form(labels[place] for place in known)
    if not names or not {*names} <= {*own}:
        return None
    return float(np.mean([own[answers[place]] == name for place, name in zip(known, names, strict=True)]))
