# SPDX-License-Identifier: Apache-2.0
"""Makes pairs by a generative model: each image and its edit to the other value of the attribute."""

from __future__ import annotations

import hashlib
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
from ..models import model_inputs
from .classes import is_class_label, order_of_model
from .edits import attribute_ids
from .images import check_depth, read_image, read_rgb, stored_images
from .makers import check_columns, check_is_set, check_number, draw_rows, encode_image, known_values, pair_dataset
from .matching import extract_features
from .transforms import process_images

logger = logging.getLogger(__name__)

Editor = Callable[[list[Image.Image], list[Any], list[int]], Sequence[Image.Image]]
Classify = Callable[[list[Image.Image]], np.ndarray]


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

    Example: the editor of an instruction pipeline of diffusers. A pipeline may give all images of a call one size: use
    images of one size, or `batch_size=1`.

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
        folder: a folder for the edits of this editor, PNG files. Their names are hashes of image, value and seed, so an
            interrupted run goes on from the edits that it finds there, also if images were added or moved. A warning
            says how many were found. A deleted edit is made again. Another editor, or prompt, needs another folder.
        attribute: column of an attribute of two values. Each image is edited to the value that it does not have: a
            name, a text, a truth value or a number, as the column has them. The image with the first value becomes side
            a. Without it the editor gets `None` as values, and side a is the original image.
        classify: a function of a list of RGB images that returns the probability of each class, shape (n, C):
            [`label_classifier`] or [`label_neighbors`]. An edit that looks like another label makes no pair. A
            classifier that takes the shortcut itself drops the good edits: choose one that does not.
        min_probability: the filter's threshold: an edit is kept if the label of its image has at least this
            probability, in [0, 1].
        min_change: an edit that changes its image less makes no pair: the mean absolute difference of the pixels, in
            [0, 1]. An edit without any change never makes one.
        batch_size: number of images in a call of the editor and of `classify`.
        num_pairs: number of rows to edit, before the filters. They are drawn without replacement and stay in the order
            of the source. `None` uses all. With the same seed, a smaller number gives a subset of a larger one.
        seed: non-negative seed of the draw and of the seeds that the editor gets, which depend on image and value too.

    Returns:
        A set with the columns `image_a`, `image_b`, `attribute_a`, `attribute_b`, `source_id` (number of the row in the
        source), `change` (float, in [0, 1]), if the source has it `label`, and with `classify` `probability` (float, of
        the label, of the edit). A warning counts the edits that make no pair.

    Raises:
        ValueError: the source is a stream or lacks a column; a number is out of range; a label or an attribute is
            unknown; with `classify`, the labels are no classes; an image cannot be read; the editor does not return an
            image for each image; `classify` does not return a row of probabilities for each image; an edit in the
            folder has another size than its image; no edit passes the filters.
        NotADirectoryError: the folder is a file.
    """
    check_is_set(source, "the source")
    check_columns(source, ["image", *([attribute] if attribute else []), *(["label"] if classify else [])])
    check_number("min_probability", min_probability, 0, 1)
    check_number("min_change", min_change, 0, 1)
    check_number("batch_size", batch_size, 1, math.inf, whole=True)
    rows = draw_rows(len(source), num_pairs, seed=seed, of="source rows").tolist()
    plain = source.with_format(None)
    feature, has_second, values = _targets(plain, attribute)
    labels = known_values(plain, "label") if "label" in source.column_names else None
    if classify:
        _check_classes(labels, source.features["label"])
    images = stored_images(plain.select_columns(["image"]), ["image"])
    mode = source.features["image"].mode

    def read(row: int) -> tuple[Any, Image.Image]:
        """An image as it is stored (a new PNG if it is no RGB image), and its pixels."""
        image, own = read_rgb(images[row]["image"], f"the image of row {row}", mode)
        return own or {"bytes": encode_image(image), "path": None}, image

    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: name a folder for the edits.")
    names = {row: _hash(read(row)[1], values[row], seed) for row in rows}
    missing = [row for row in rows if not _edit_of(folder, names[row]).exists()]
    if len(missing) < len(rows):
        logger.warning(f"{len(rows) - len(missing)} of {len(rows)} edits are taken from {folder}.")
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "edits.lock"):  # the first of several processes makes the edits, the others read them
            missing = [row for row in missing if not _edit_of(folder, names[row]).exists()]
            with tqdm(total=len(rows), initial=len(rows) - len(missing), desc="Editing") as bar:
                for start in range(0, len(missing), batch_size):
                    batch = missing[start : start + batch_size]
                    edits = _edited(editor, batch, [read(row)[1] for row in batch], [values[row] for row in batch],
                                    [int(names[row][:7], 16) for row in batch])  # fmt: skip
                    for row, edit in zip(batch, edits, strict=True):
                        path = _edit_of(folder, names[row])
                        path.with_suffix(".part").write_bytes(encode_image(edit))
                        os.replace(path.with_suffix(".part"), path)
                    bar.update(len(batch))

    sides: list[tuple[Any, Any]] = []  # encoded images, with the first value and with the second
    changes, probabilities = np.empty(len(rows)), np.ones(len(rows))
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        edits = []
        for place, row in enumerate(batch, start):
            (stored, image), path = read(row), _edit_of(folder, names[row])
            edits.append(_stored_edit(path, row, image.size))
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
        raise ValueError(f"{dropped} Look at the edits in {folder}: improve the editor, or lower the threshold.")
    if len(kept) < len(rows):
        logger.warning(dropped)
    chosen = np.asarray(rows)[kept]
    pairs = pair_dataset(
        *zip(*(sides[place] for place in kept), strict=True),
        source_id=chosen,
        attributes=(0, 1),
        attribute_feature=feature,
        label=None if labels is None else labels[chosen],
        label_feature=source.features.get("label"),
    )
    pairs = pairs.add_column("change", changes[kept])
    return pairs.add_column("probability", probabilities[kept]) if classify else pairs


def label_classifier(model: nn.Module, processor: Any, source: datasets.Dataset) -> Classify:
    """Returns a function that computes the probabilities of the classes by an image classifier, for `generate_pairs`.

    Args:
        model: an image classifier with the classes of the labels, in any order.
        processor: the image processor of the model.
        source: the set that is edited, for the names and the order of its labels (ClassLabel).

    Returns:
        A function of n RGB images: float64, shape (n, C), in the order of the labels. If the model has further classes,
        a row sums to less than 1.

    Raises:
        ValueError: the labels are no ClassLabel, or the model lacks one of them.
    """
    check_columns(source, ["label"])
    names = getattr(source.features["label"], "names", None)
    if names is None:
        raise ValueError("the labels have no names: cast_column('label', datasets.ClassLabel(names=[...])).")
    order = order_of_model(names, model.config, "the model")
    places = [order.index(name) for name in names]

    @torch.no_grad()
    def classify(images: list[Image.Image]) -> np.ndarray:
        with inference(model):
            outputs = model(**model_inputs(model, process_images(processor, images)))
        return logits_of(outputs).double().softmax(-1).cpu().numpy()[:, places]

    return classify


def label_neighbors(
    model: nn.Module, processor: Any, source: datasets.Dataset, *, num_neighbors: int = 10, head: str | None = None
) -> Classify:
    """Returns a function that computes the share of each label among the nearest images, for `generate_pairs`.

    The distance of two images is the Euclidean distance of their features, standardised over the set. The features are
    what enters the classifier head.

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
        ValueError: the source lacks a column or a label; its labels are no classes; it has fewer than `num_neighbors`
            images.
    """
    check_is_set(source, "the source")
    check_columns(source, ["image", "label"])
    check_number("num_neighbors", num_neighbors, 1, len(source), whole=True)
    labels = known_values(source, "label")
    feature = source.features["label"]
    _check_classes(labels, feature)
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
    if len(ids) < 2:
        raise ValueError(f"{attribute!r} has the one value {[*ids]}: an attribute needs two.")
    numbers = [ids.get(value) for value in known_values(source, attribute).tolist()]
    for row, number in enumerate(numbers):
        if number not in (0, 1):
            value = source[row][attribute]
            raise ValueError(f"row {row}: {attribute}={value!r} is none of the two values {[*ids][:2]}: drop the row.")
    names = source.features[attribute].names if is_class_label(source.features[attribute]) else [*ids]
    return feature, np.asarray(numbers) == 1, [names[1 - number] for number in numbers]


def _check_classes(labels: np.ndarray, feature: Any) -> None:
    """Raises a ValueError if labels are no classes: numbers of a ClassLabel, or whole numbers from 0."""
    if is_class_label(feature):
        return
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise ValueError(
            f"the label of row {int(labels.argmin()) if labels.dtype.kind in 'if' else 0} is no class: cast_column("
            "'label', datasets.ClassLabel(names=[...]))."
        )


def _hash(image: Image.Image, value: Any, seed: int) -> str:
    content = hashlib.sha256(f"{image.size} {value!r} {int(seed)}\n".encode())
    content.update(image.tobytes())
    return content.hexdigest()[:24]


def _edit_of(folder: Path, name: str) -> Path:
    return folder / f"{name}.png"


def _stored_edit(path: Path, row: int, size: tuple[int, int]) -> Image.Image:
    """Reads the edit of a row, whose image has the given size."""
    try:
        edit = read_image({"bytes": None, "path": str(path)}, f"the edit of row {row}", "RGB")
    except ValueError as failure:
        raise ValueError(f"{failure} If you delete the file, the edit is made again.") from failure
    if edit.size != size:
        raise ValueError(
            f"the edit of row {row} ({path}) has {edit.width}×{edit.height} pixels and its image {size[0]}×{size[1]}: "
            "delete the file, and the edit is made again."
        )
    return edit


def _edited(
    editor: Editor, rows: list[int], images: list[Image.Image], values: list[Any], seeds: list[int]
) -> list[Image.Image]:
    """Calls the editor; returns the edits in RGB, each in the size of its image."""
    edits = editor([image.copy() for image in images], values, seeds)
    if not isinstance(edits, Sequence) or not all(isinstance(edit, Image.Image) for edit in edits):
        kinds = type(edits).__name__
        kinds += f" of {type(edits[0]).__name__}" if isinstance(edits, Sequence) and len(edits) else ""
        raise ValueError(f"the editor returned a {kinds} for rows {rows}: it must return a list of PIL images.")
    if len(edits) != len(rows):
        raise ValueError(f"the editor returned {len(edits)} images for {len(rows)}: it must return one for each.")
    for row, edit in zip(rows, edits, strict=True):
        check_depth(edit.mode, f"the edit of row {row}")
    edits = [edit.convert("RGB") for edit in edits]
    return [
        edit if edit.size == image.size else edit.resize(image.size, Image.Resampling.BICUBIC)
        for edit, image in zip(edits, images, strict=True)
    ]


def _of_labels(
    classify: Classify, edits: list[Image.Image], labels: np.ndarray, features: datasets.Features
) -> np.ndarray:
    """The probabilities of the labels."""
    found = np.asarray(classify(edits))
    feature = features["label"]
    classes = feature.num_classes if is_class_label(feature) else None
    is_right = found.ndim == 2 and len(found) == len(edits) and found.shape[1] == (classes or found.shape[1])
    if not is_right or labels.max() >= found.shape[1]:
        wanted = f"({len(edits)}, {classes or int(labels.max()) + 1})"
        raise ValueError(f"classify returned shape {found.shape}: it must return probabilities of shape {wanted}.")
    if not ((found >= 0) & (found <= 1)).all():
        raise ValueError(
            f"classify returned values from {found.min():g} to {found.max():g}: it must return probabilities, in [0, "
            "1]. Logits need a softmax."
        )
    return found[np.arange(len(labels)), labels]
