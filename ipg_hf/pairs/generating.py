# SPDX-License-Identifier: Apache-2.0
"""Makes pairs by a generative model: each image and its edit to the other value of the attribute."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets.utils import tqdm
from filelock import FileLock
from PIL import Image
from torch import nn

from ..inference import inference, logits_of
from ..models import forward_inputs
from .classes import is_class_label
from .edits import attribute_ids
from .images import image_content, read_image, stored_images
from .makers import check_columns, check_is_set, check_number, draw_rows, encode_image, known_values, pair_dataset
from .matching import extract_features

logger = logging.getLogger(__name__)

Editor = Callable[[list[Image.Image], list[Any], list[int]], Sequence[Image.Image]]
Classify = Callable[[list[Image.Image]], np.ndarray]

FACTS = "edits.json"  # what the edits of a folder were made of


def generate_pairs(
    source: datasets.Dataset,
    editor: Editor,
    folder: str | os.PathLike,
    *,
    attribute: str | None = None,
    classify: Classify | None = None,
    min_probability: float = 0.5,
    min_change: float = 0.01,
    batch_size: int = 8,
    num_pairs: int | None = None,
    seed: int = 0,
) -> datasets.Dataset:
    """Makes pairs of an image and its edit by a generative model (ours; the paper compares such pairs with exact ones).

    Generated pairs differ in more than the attribute: an edit may miss the attribute, change the label, or leave traces
    of the generator. With `attribute`, both sides have edited images, so the traces do not tell the side. Look at the
    pairs before training, with `preview_pairs`.

    Example: the editor of an instruction pipeline of diffusers.

    ```python
    def editor(images, values, seeds):
        prompts = [f"make this a photo of a {value} person" for value in values]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipeline(prompt=prompts, image=images, generator=generators).images
    ```

    Args:
        source: a set with the column `image` and, optionally, `label`.
        editor: a function, called as `editor(images, values, seeds)` with lists of one length: RGB images, the value
            that each image is to have (see `attribute`), and a seed for each image, in [0, 2³¹). It returns as many PIL
            images. An edit of another size is scaled to the size of its image. An edit that depends on its image, value
            and seed alone does not depend on `batch_size` or an interruption.
        folder: a folder for the edits of this editor: a PNG for each row, and `edits.json`. An interrupted run goes on
            from the edits that it finds there. A deleted edit is made again. Another editor needs another folder.
        attribute: column of an attribute of two values. Each image is edited to the value that it does not have: a
            name, or a number if the column has no names. The image with the first value becomes side a. Without it the
            editor gets `None` as values, and side a is the original image.
        classify: a function of a list of RGB images that returns the probability of each class, shape (n, C):
            [`label_classifier`] or [`label_neighbors`]. Edits that the filter takes for another label make no pair. A
            classifier that takes the shortcut itself drops the good edits: choose one that does not.
        min_probability: the filter's threshold: an edit is kept if the label of its image has at least this
            probability, in [0, 1].
        min_change: an edit that changes its image less makes no pair: the mean absolute difference of the pixels, in
            [0, 1]. An edit without any change never makes one.
        batch_size: number of images in a call of the editor and of `classify`.
        num_pairs: number of rows to edit, before the filters. They are drawn without replacement and stay in the order
            of the source. `None` uses all. With the same seed, a smaller number gives a subset of a larger one.
        seed: non-negative seed of the draw and of the seeds that the editor gets.

    Returns:
        A set with the columns `image_a`, `image_b`, `attribute_a`, `attribute_b`, `source_id` (number of the row in the
        source), `change` (float, in [0, 1]), if the source has it `label`, and with `classify` `probability` (float, of
        the label, of the edit). A warning counts the edits that make no pair.

    Raises:
        ValueError: the source is a stream or lacks a column; a number is out of range; `classify` without labels; the
            folder holds edits of other images, another attribute or another seed; an image cannot be read; the editor
            does not return an image for each image; `classify` does not return a row of probabilities for each image;
            no edit passes the filters.
    """
    check_is_set(source, "the source")
    check_columns(source, ["image", *([attribute] if attribute else []), *(["label"] if classify else [])])
    check_number("min_probability", min_probability, 0, 1)
    check_number("min_change", min_change, 0, 1)
    check_number("batch_size", batch_size, 1, math.inf, whole=True)
    rows = draw_rows(len(source), num_pairs, seed=seed, of="source rows")
    plain = source.with_format(None)
    feature, has_second, values = _targets(plain, attribute)
    images = stored_images(plain.select_columns(["image"]), ["image"])
    mode = source.features["image"].mode

    def read(row: int) -> tuple[Any, Image.Image]:
        """An image as it is stored (a new PNG if it is no RGB image), and its pixels."""
        value = images[row]["image"]
        file = read_image(value, f"the image of row {row}")
        image = file if mode in (None, file.mode) else file.convert(mode)
        if image is file and image.mode == "RGB":
            return value, image
        image = image.convert("RGB")
        return {"bytes": encode_image(image), "path": None}, image

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "edits.lock"):  # the first of several processes makes the edits, and the others read them
        _check_facts(folder / FACTS, {"source": _hash(images, values), "attribute": attribute, "seed": seed})
        missing = [row for row in rows.tolist() if not _edit_of(folder, row).exists()]
        with tqdm(total=len(rows), initial=len(rows) - len(missing), desc="Editing") as bar:
            for start in range(0, len(missing), batch_size):
                batch = missing[start : start + batch_size]
                _edit(editor, batch, [read(row)[1] for row in batch], [values[row] for row in batch], seed, folder)
                bar.update(len(batch))

    labels = known_values(plain, "label") if classify else None
    sides: list[tuple[Any, Any]] = []  # encoded images, with the first value and with the second
    changes, probabilities = np.empty(len(rows)), np.ones(len(rows))
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size].tolist()
        edits = []
        for place, row in enumerate(batch, start):
            (stored, image), path = read(row), _edit_of(folder, row)
            edits.append(read_image({"bytes": None, "path": str(path)}, f"the edit of row {row}", "RGB"))
            changes[place] = np.abs(np.asarray(image, np.int16) - np.asarray(edits[-1])).mean() / 255
            pair = stored, path.read_bytes()
            sides.append(pair[::-1] if has_second[row] else pair)
        if classify:
            probabilities[start : start + len(batch)] = _of_labels(classify, edits, labels[batch], source.features)
    too_little, other_label = (changes < min_change) | (changes == 0), probabilities < min_probability
    kept = np.flatnonzero(~(too_little | other_label))
    dropped = (
        f"{len(rows) - len(kept)} of {len(rows)} edits make no pair: {too_little.sum()} change their image by less "
        f"than min_change={min_change:g}, {other_label.sum()} have a lower probability of the label than "
        f"min_probability={min_probability:g}."
    )
    if not len(kept):
        raise ValueError(f"{dropped} Look at the edits in {folder}, and mend the editor or lower the threshold.")
    if len(kept) < len(rows):
        logger.warning(dropped)
    pairs = pair_dataset(
        *zip(*(sides[place] for place in kept), strict=True),
        source_id=rows[kept],
        attributes=(0, 1),
        attribute_feature=feature,
        label=plain.select(rows[kept])["label"][:] if "label" in source.column_names else None,
        label_feature=source.features.get("label"),
    )
    pairs = pairs.add_column("change", changes[kept])
    return pairs.add_column("probability", probabilities[kept]) if classify else pairs


def label_classifier(model: nn.Module, processor: Any) -> Classify:
    """Returns a function that computes the probabilities of the classes by an image classifier, for `generate_pairs`.

    Args:
        model: an image classifier with the classes of the labels, in their order.
        processor: the image processor of the model.

    Returns:
        A function of n RGB images: float64, shape (n, C), each row sums to 1.
    """

    @torch.no_grad()
    def classify(images: list[Image.Image]) -> np.ndarray:
        weight = next(model.parameters())
        batch = processor(images, return_tensors="pt")[forward_inputs(model)[0]].to(weight.device, weight.dtype)
        with inference(model):
            return logits_of(model(batch)).double().softmax(-1).cpu().numpy()

    return classify


def label_neighbors(
    model: nn.Module, processor: Any, source: datasets.Dataset, *, num_neighbors: int = 10, head: str | None = None
) -> Classify:
    """Returns a function that computes the share of each label among the nearest images, for `generate_pairs`.

    Near are images with near features of a pretrained model: what enters its classifier head, standardised over the
    set, by Euclidean distance.

    Args:
        model: an image classifier, of any classes.
        processor: the image processor of the model.
        source: a set with the columns `image` and `label` (ClassLabel, or ints from 0). Give images of all groups where
            there are any: among images in which the attribute tells the label, an edit looks like the other label.
        num_neighbors: number of nearest images.
        head: path of the model's head, if `find_head` does not find it by itself.

    Returns:
        A function of n RGB images: float64, shape (n, C), each row sums to 1.

    Raises:
        ValueError: the source lacks a column or a label; it has fewer than `num_neighbors` images.
    """
    check_is_set(source, "the source")
    check_columns(source, ["image", "label"])
    check_number("num_neighbors", num_neighbors, 1, len(source), whole=True)
    labels = known_values(source, "label")
    feature = source.features["label"]
    classes = np.eye(feature.num_classes if is_class_label(feature) else int(labels.max()) + 1)
    known = extract_features(source.with_format(None), model, processor, head=head)
    center, scale = known.mean(0), known.std(0)
    known = (known - center) / np.where(scale > 0, scale, 1)

    def classify(images: list[Image.Image]) -> np.ndarray:
        from scipy.spatial.distance import cdist

        rows = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))
        features = extract_features(rows, model, processor, head=head)
        distances = cdist((features - center) / np.where(scale > 0, scale, 1), known)
        nearest = np.argsort(distances, axis=1, kind="stable")[:, :num_neighbors]
        return classes[labels[nearest]].mean(1)

    return classify


def _targets(source: datasets.Dataset, attribute: str | None) -> tuple[datasets.ClassLabel, np.ndarray, list[Any]]:
    """Returns the feature of the attribute, whether each row has its second value, and the value to edit it to."""
    if attribute is None:
        feature = datasets.ClassLabel(names=["original", "edited"])
        return feature, np.zeros(len(source), bool), [None] * len(source)
    feature, ids = attribute_ids(source, attribute)
    numbers = [ids.get(value) for value in known_values(source, attribute).tolist()]
    for row, number in enumerate(numbers):
        if number not in (0, 1):
            value = source[row][attribute]
            raise ValueError(f"row {row}: {attribute}={value!r} is none of the two values {[*ids][:2]}: drop the row.")
    names = feature.names if is_class_label(feature) else [*ids]
    return feature, np.asarray(numbers) == 1, [names[1 - number] for number in numbers]


def _check_facts(path: Path, facts: dict[str, Any]) -> None:
    """Compares what a folder's edits were made of with `facts`, which a new folder gets."""
    if not path.exists():
        if found := next(path.parent.glob("*.png"), None):
            raise ValueError(f"{path.parent} holds images, such as {found.name}, but no {FACTS}: name a new folder.")
        path.write_text(json.dumps(facts, indent=2) + "\n")
        return
    of_folder = json.loads(path.read_text())
    other = [name for name, value in facts.items() if of_folder.get(name) != value]
    if other:
        raise ValueError(
            f"{path.parent} holds edits of another {', another '.join(other)}: name another folder, or delete it."
        )


def _hash(images: datasets.Dataset, values: list[Any]) -> str:
    content = hashlib.sha256()
    for row, value in zip(images, values, strict=True):
        content.update(image_content(row["image"]) + f"{value!r}\n".encode())
    return content.hexdigest()


def _edit_of(folder: Path, row: int) -> Path:
    return folder / f"{row:07d}.png"


def _edit(
    editor: Editor, rows: list[int], images: list[Image.Image], values: list[Any], seed: int, folder: Path
) -> None:
    """Edits images and stores the edits."""
    seeds = [int(np.random.default_rng((seed, 15, row)).integers(2**31)) for row in rows]
    edits = editor([image.copy() for image in images], values, seeds)
    if not isinstance(edits, Sequence) or not all(isinstance(edit, Image.Image) for edit in edits):
        kinds = type(edits).__name__
        kinds += f" of {type(edits[0]).__name__}" if isinstance(edits, Sequence) and len(edits) else ""
        raise ValueError(f"the editor returned a {kinds} for rows {rows}: it must return a list of PIL images.")
    if len(edits) != len(rows):
        raise ValueError(f"the editor returned {len(edits)} images for {len(rows)}: it must return one for each.")
    for row, image, edit in zip(rows, images, edits, strict=True):
        edit = edit.convert("RGB")
        edit = edit if edit.size == image.size else edit.resize(image.size, Image.Resampling.BICUBIC)
        path = _edit_of(folder, row)
        path.with_suffix(".part").write_bytes(encode_image(edit))
        os.replace(path.with_suffix(".part"), path)


def _of_labels(
    classify: Classify, edits: list[Image.Image], labels: np.ndarray, features: datasets.Features
) -> np.ndarray:
    """The probabilities of the labels."""
    found = np.asarray(classify(edits))
    names = features["label"].names if is_class_label(features["label"]) else None
    if found.ndim != 2 or len(found) != len(edits) or labels.max() >= found.shape[1]:
        wanted = f"({len(edits)}, {len(names) if names else int(labels.max()) + 1})"
        raise ValueError(f"classify returned shape {found.shape}: it must return probabilities of shape {wanted}.")
    if not ((found >= 0) & (found <= 1)).all():
        raise ValueError(
            f"classify returned values from {found.min():g} to {found.max():g}: it must return probabilities, in [0, "
            "1]. Logits need a softmax."
        )
    return found[np.arange(len(labels)), labels]
