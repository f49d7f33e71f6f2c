# SPDX-License-Identifier: Apache-2.0
"""What the trainer takes as data: each set is one that it can train with, or a ValueError names the call that mends it.

The checks read columns, features and the first row, not the images of all rows.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch.utils.data import DataLoader
from transformers.utils import logging

from .losses import ATTRIBUTE
from .metrics import read_attributes
from .pairs.adversarial import AdversarialPairs
from .pairs.checks import LABEL_COLUMNS, ONLY_SET
from .pairs.classes import (
    check_filled,
    folded,
    is_class_label,
    is_text,
    model_names,
    one_form,
    shown,
    values_of,
    warn_of_look_alikes,
    with_column,
)
from .pairs.loader import is_stream
from .pairs.scores import SIDES
from .pairs.transforms import ImageRows
from .seeding import first_row

logger = logging.get_logger(__name__)

SPLITS = {"train", "training", "validation", "valid", "val", "dev", "eval", "evaluation", "test", "testing", "unsplit"}
TRAINING_SPLITS = {"train", "training", "unsplit"}
WANTED = (
    "It takes one set of pairs, or a dict of sets by name: datasets.Dataset or IterableDataset with the columns "
    "image_a and image_b, AdversarialPairs, or a torch data set whose rows are dicts of model inputs (pixel_values_a, "
    "pixel_values_b)."
)
STORED = (datasets.Dataset, datasets.IterableDataset)
MODEL = "the model (config.id2label)"


# ---- The form of pair sets ----


def pair_sets(given: Any, argument: str) -> dict[str, Any]:
    """Returns pair sets by name, of what a user gives; an empty dict for `None`.

    Args:
        given: one pair set, a dict of pair sets, or a `DatasetDict` of one split.
        argument: the argument that it was given as, for messages.

    Raises:
        ValueError: it is something else.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        check_pair_form(given, argument, argument)
        return {ONLY_SET: given}
    if not given:
        raise ValueError(f"{argument} is an empty {_kind(given)}: give it a set of pairs, or None to go without pairs.")
    splits = [name for name in given if str(name).lower() in SPLITS]
    if splits:
        if len(given) == 1 and splits[0].lower() in TRAINING_SPLITS and argument == "pair_dataset":
            return pair_sets(given[splits[0]], argument)
        raise ValueError(
            f"{argument} is a {_kind(given)} of the splits {shown(given)}: all of them would be used. Give one split, "
            f"{argument}=pairs[{splits[0]!r}]. A dict of sets has a name for each invariance, e.g. {{'colour': pairs}}."
        )
    for name, pairs in given.items():
        title = f"{argument}[{name!r}]"
        if not isinstance(name, str):
            raise ValueError(
                f"{argument} is a dict with the key {name!r}: its keys are names of sets, which are texts."
            )
        if pairs is None:
            raise ValueError(f"{title} is None: give it a set of pairs, or leave it out of the dict.")
        if not isinstance(pairs, STORED) and name.endswith(("_a", "_b")):
            fix = f"Make a set of it, datasets.Dataset.from_dict({argument})."
            raise ValueError(f"{argument} is a dict of the columns {shown(given)}. {WANTED} {fix}")
        check_pair_form(pairs, title, argument)
    return dict(given)


def check_pair_form(pairs: Any, title: str, argument: str) -> None:
    """Raises a ValueError if an object is no set of pairs.

    Args:
        pairs: the object.
        title: its name, for the message.
        argument: the argument of which it is, for the message.
    """
    if isinstance(pairs, (*STORED, AdversarialPairs, ImageRows)) or is_stream(pairs):
        return
    what, fix = f"a {_kind(pairs)}", ""
    if isinstance(pairs, (str, os.PathLike)):
        what = f"the {'text' if isinstance(pairs, str) else 'path'} {str(pairs)!r}"
        fix = "Load it: datasets.load_dataset(...), ipg_hf.pairs.pairs_from_folders or pairs_from_table."
    elif isinstance(pairs, Mapping):
        fix = "Give one of its entries, or one flat dict of sets."
    elif hasattr(pairs, "columns") and hasattr(pairs, "iloc"):
        fix = "Make a set of it: datasets.Dataset.from_list(frame.to_dict('records'))."
    elif isinstance(pairs, DataLoader):
        fix = f"Give the data set of the loader, {argument}=loader.dataset."
    elif isinstance(pairs, (tuple, list)) and len(pairs) and hasattr(pairs[0], "column_names"):
        what = f"a {_kind(pairs)} of {len(pairs)} data sets"
        fix = "Sets of pairs get names, {'colour': pairs, ...}; the two sides of pairs go into one set's columns."
    elif hasattr(pairs, "__getitem__") and hasattr(pairs, "__len__") and not isinstance(pairs, type):
        if not len(pairs):
            raise ValueError(f"{title} is empty: give it at least one pair.")
        row = first_row(pairs)
        what = f"a {_kind(pairs)} whose rows are of type {_kind(row)}"
        fix = "Make a set of it: datasets.Dataset.from_list([{'image_a': a, 'image_b': b} for a, b in pairs])."
        if isinstance(row, Mapping):
            names = {str(name).removesuffix("_a") for name in row if f"{str(name).removesuffix('_a')}_b" in row}
            if names - {"image", "label", "attribute"}:
                return  # model inputs
            what, fix = f"a {_kind(pairs)} whose rows are dicts of {shown(row)}", ""
            if "image" in names:
                what = f"a {_kind(pairs)} whose rows are dicts of images"
                fix = "Make a set of it: datasets.Dataset.from_list(list(pairs))."
    raise ValueError(f"{title} is {what}. {WANTED} {fix}".rstrip())


def _kind(value: Any) -> str:
    return type(value).__name__


# ---- Columns ----


def check_columns(
    dataset: Any,
    title: str,
    inputs: Sequence[str],
    *,
    has_processor: bool,
    needs_label: bool,
    label_names: Collection[str] = (),
    num_labels: int | None = None,
    problem_type: str | None = None,
) -> None:
    """Raises a ValueError if a training or evaluation set lacks its columns, or if they hold no images and no labels.

    Args:
        dataset: the set. Of a stream without features nothing is read, of a set with a transform of the user one row.
        title: name of the set, for messages.
        inputs: names of the inputs of the model's forward, the main one first.
        has_processor: whether the trainer has an image processor.
        needs_label: whether rows must have a label.
        label_names: names of the columns of labels besides `label`, `labels` and `label_ids`.
        num_labels: number of outputs of the model, if it is known.
        problem_type: a value of `guidance.ProblemType`.
    """
    names_its_images = isinstance(dataset, ImageRows)
    dataset = dataset.dataset if names_its_images else dataset
    features = getattr(dataset, "features", None) or {}
    if hasattr(dataset, "__len__") and not len(dataset):
        raise ValueError(f"{title} is empty: give it at least one row.")
    if not isinstance(dataset, STORED):
        _check_first_row(dataset, title, inputs)
        return
    if _is_custom(dataset):
        row = first_row(dataset)
        for name in [name for name in (*LABEL_COLUMNS, *label_names) if isinstance(row.get(name), str)]:
            raise ValueError(
                f"{title} has the text {row[name]!r} as {name} in row 0, after its transform: return the number of the "
                "class there, the same in all sets."
            )
        return
    if not features:
        return
    if not names_its_images and not {*inputs} & {*features}:
        _check_image_column(features, title, inputs[0], has_processor)
    _check_label_column(dataset, title, {*LABEL_COLUMNS, *label_names}, needs_label, num_labels, problem_type)
    if isinstance(dataset, datasets.Dataset) and isinstance(features.get("image"), datasets.Image):
        check_no_image_is_missing(dataset, ["image"], title)


def check_pair_columns(pairs: Any, title: str, main_input: str, *, has_processor: bool, uses_labels: bool) -> None:
    """Raises a ValueError if a set of raw pairs lacks its columns, or if they hold no images or no labels.

    Args:
        pairs: the set. Of a stream without features, or a set with a transform of the user, nothing is read.
        title: name of the set, for messages.
        main_input: name of the main input of the model's forward.
        has_processor: whether the trainer has an image processor, and so takes raw images.
        uses_labels: whether the column `label` is read, if there is one.
    """
    features = getattr(pairs, "features", None) or {}
    if not isinstance(pairs, STORED) or not features or _is_custom(pairs):
        return
    if uses_labels:
        _check_label_column(pairs, title, ["label"], False, None, None)
    if not has_processor or f"{main_input}_a" in features:
        return
    found = [name for name in SIDES if name in features]
    if len(found) < 2:
        images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        missing = [name for name in SIDES if name not in features]
        others = [name for name in images if name not in found]
        fix = f"rename_columns({dict(zip(others, missing, strict=True))})." if len(others) == len(missing) else ""
        if images == ["image"]:
            fix = "Its rows are single images: make pairs of them, e.g. by ipg_hf.pairs.overlay_pairs or match_pairs."
        lists = [name for name, kind in features.items() if isinstance(kind, datasets.List)]
        if lists and not images:
            sides = f"{{'image_a': row[{lists[0]!r}][0], 'image_b': row[{lists[0]!r}][1]}}"
            fix = f"Take the images out of the list: map(lambda row: {sides}, remove_columns=[{lists[0]!r}])."
        raise ValueError(f"{title} has the columns {shown(features)}, but no {shown(missing)}. {fix}".rstrip())
    for name in found:
        if not isinstance(features[name], datasets.Image):
            raise ValueError(f"{title} {_no_image(name, features[name])}")
        if not features[name].decode and is_stream(pairs):
            raise ValueError(
                f"{title} is a stream of encoded images, Image(decode=False) in its column {name!r}: decode them, "
                f"{title}.decode(True)."
            )
    if isinstance(pairs, datasets.Dataset):
        check_no_image_is_missing(pairs, found, title)


def _is_custom(dataset: Any) -> bool:
    return isinstance(dataset, datasets.Dataset) and dataset.format["type"] == "custom"


def _check_first_row(dataset: Any, title: str, inputs: Sequence[str]) -> None:
    is_set = hasattr(dataset, "__getitem__") or is_stream(dataset)
    if not is_set or isinstance(dataset, (str, os.PathLike, Mapping)) or hasattr(dataset, "iloc"):
        raise ValueError(
            f"{title} is a {_kind(dataset)}: give it a set, e.g. datasets.load_dataset(..., split='train')."
        )
    if is_stream(dataset) or (hasattr(dataset, "__getitem__") and not hasattr(dataset, "__len__")):
        return
    check_row(first_row(dataset), title, inputs)


def check_row(row: Any, title: str, inputs: Sequence[str]) -> None:
    """Raises a ValueError if a row is no dict of model inputs.

    Args:
        row: a row of a set that the trainer does not transform.
        title: name of the set, for messages.
        inputs: names of the inputs of the model's forward, the main one first.
    """
    listed = "datasets.Dataset.from_list(list(rows))"
    if not isinstance(row, Mapping):
        listed = "datasets.Dataset.from_list([{'image': image, 'label': label} for image, label in rows])"
        raise ValueError(
            f"{title} has rows of type {_kind(row)}, but a row must be a dict of model inputs and a label: make a set "
            f"of raw images, {listed} (of a stream, datasets.IterableDataset.from_generator), or give a data_collator "
            "with remove_unused_columns=False."
        )
    if not {*inputs} & {*row}:
        raise ValueError(
            f"{title} has rows with {shown(row)}, but no {inputs[0]!r}: make a set of raw images, {listed} with the "
            "columns image and label (of a stream, datasets.IterableDataset.from_generator), and give an image "
            "processor as processing_class."
        )


def _check_image_column(features: Mapping[str, Any], title: str, main_input: str, has_processor: bool) -> None:
    feature = features.get("image")
    if feature is None:
        found = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        fix = f"rename the column of images, rename_column({found[0] if found else 'name'!r}, 'image')."
        if {*SIDES} <= {*features}:
            fix = "pairs are given as pair_dataset."
        raise ValueError(f"{title} has the columns {shown(features)}, but no 'image' and no {main_input!r}: {fix}")
    if not isinstance(feature, datasets.Image):
        raise ValueError(f"{title} {_no_image('image', feature)}")
    if not has_processor:
        raise ValueError(
            f"{title} has raw images in its column 'image', and there is no image processor to make {main_input!r} of "
            "them: processing_class=AutoImageProcessor.from_pretrained(...)."
        )


def _no_image(column: str, feature: Any) -> str:
    kind = feature.dtype if isinstance(feature, datasets.Value) else _kind(feature)
    fix = f"cast_column({column!r}, datasets.Image())"
    if not is_text(feature):
        fix = f"make images of it, Image.fromarray(np.asarray(values, 'uint8')), and {fix}"
    return f"has the column {column!r} of type {kind}, not Image: {fix}."


def _check_label_column(
    dataset: Any, title: str, names: Collection[str], needed: bool, num_labels: int | None, problem_type: str | None
) -> None:
    features = dataset.features
    found = [name for name in features if name in names]
    if not found and not needed:
        return
    if not found:
        classes = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        like = [name for name in features if any(part in name.lower() for part in ("label", "class", "target"))]
        others = [name for name in (*classes, *like) if name != ATTRIBUTE]
        fix = f"rename the column of labels, rename_column({others[0] if others else 'name'!r}, 'label')."
        raise ValueError(f"{title} has the columns {shown(features)}, but no 'label': {fix}")
    for name in found:
        feature = features[name]
        if is_text(feature):
            raise ValueError(
                f"{title} has texts as {name}: number its classes, class_encode_column({name!r}), in all sets alike: "
                f"cast_column({name!r}, datasets.ClassLabel(names=[...]))."
            )
        if not isinstance(feature, (datasets.Value, datasets.ClassLabel)) or not isinstance(dataset, datasets.Dataset):
            continue
        values = values_of(dataset, name)
        check_filled(values, f"the {name} of {title}")
        is_number = pa.types.is_floating(values.type) and problem_type != "regression"
        if is_number and (num_labels or 1) > 1:
            raise ValueError(
                f"{title} has the {name} {values[0].as_py() if len(values) else None} in row 0, a float, but the model "
                f"has {num_labels} classes: cast_column({name!r}, datasets.Value('int64')), or num_labels=1 for a "
                "regression."
            )


def check_no_image_is_missing(dataset: datasets.Dataset, columns: Sequence[str], title: str) -> None:
    """Raises a ValueError if a row has no image (None). It names the first such row.

    Args:
        dataset: the set; its images are not read.
        columns: its image columns.
        title: name of the set, for messages.
    """
    for column in columns:
        if not any(map(_some_missing, dataset.data.column(column).chunks)):
            continue
        # a set of some rows of its table may leave these out
        stored = dataset.with_format(None).select_columns([column]).cast_column(column, datasets.Image(decode=False))
        rows = [number for number, row in enumerate(stored) if not any((row[column] or {}).values())]
        if rows:
            raise ValueError(
                f"{title} has no {column} (None) in {len(rows)} of {len(dataset)} rows, the first is row {rows[0]}: "
                "drop these rows, or give them an image."
            )


def _some_missing(images: pa.Array) -> bool:
    images = images.storage if isinstance(images, pa.ExtensionArray) else images
    if not pa.types.is_struct(images.type):
        return bool(images.null_count)
    empty = pc.and_(pc.is_null(images.field("bytes")), pc.is_null(images.field("path")))
    return bool(images.null_count) or bool(pc.any(empty).as_py())


# ---- Classes by name ----


def check_names(columns: Mapping[str, Any], own: Sequence[str] | None = None) -> None:
    """Raises a ValueError if two sets, or a set and the model, give one number to classes of different names.

    Args:
        columns: what a column is, for messages -> its feature. Only a ClassLabel has names. The names `"0"`, `"1"`, ...
            in this order are none, except beside the same names in another order.
        own: the names of the model's classes in their order, if it has names.
    """
    named = {} if own is None else {MODEL: one_form(own)}
    named |= {title: one_form(kind.names) for title, kind in columns.items() if is_class_label(kind) and kind.names}
    numbers = {title for title, names in named.items() if names == [str(number) for number in range(len(names))]}
    others = [{*names} for title, names in named.items() if title not in numbers]
    named = {title: names for title, names in named.items() if title not in numbers or {*names} in others}
    if len(named) < 2:
        return
    titles = list(named)
    first = titles[titles[0] == MODEL]  # the set, so that the message says what to cast to
    for title in titles:
        if title == first or all(a == b for a, b in zip(named[first], named[title])):  # noqa: B905 - one may have more
            continue
        fix = f"number the classes alike, cast {title} to the names of {first} (Dataset.align_labels_with_mapping)."
        if title == MODEL:
            fix = (
                "set id2label and label2id of its config to the names of the data (a new head), or number the data as "
                "the model does (Dataset.align_labels_with_mapping)."
            )
        raise ValueError(
            f"{first} has the classes {shown(named[first])}, {title} {shown(named[title])}: one number would mean "
            f"different classes. Where they are the same, {fix}"
        )


def class_columns(sets: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Returns the features of some columns of several sets: `<column> of <set>` -> feature."""
    found = {}
    for title, dataset in sets.items():
        features = _features(dataset.source if isinstance(dataset, AdversarialPairs) else dataset)
        found |= {f"{name} of {title}": features[name] for name in names if name in features}
    return found


def _features(dataset: Any) -> Mapping[str, Any]:
    return getattr(dataset.dataset if isinstance(dataset, ImageRows) else dataset, "features", None) or {}


# ---- The attribute ----


def with_attribute_ids(
    sets: Mapping[str, Any], known: Sequence[str] | None, *, all_known: bool = False
) -> tuple[dict[str, Any], list[str] | None]:
    """Numbers the attributes of several sets alike, by name, where they are texts or large numbers.

    Args:
        sets: name for messages -> set. Only a `datasets.Dataset` with a column `attribute` is changed; a column of
            a ClassLabel or of small whole numbers holds ids already.
        known: names of values in their order, if some are known. Other values get the numbers after them.
        all_known: whether there are no other values.

    Returns:
        The sets, and the names in their order.

    Raises:
        ValueError: a value is missing, negative or no class; it is not known, with `all_known`; some sets have names
            and others numbers; or a stream or an `ImageRows` has texts.
    """
    for title, dataset in sets.items():
        if not isinstance(dataset, datasets.Dataset) and is_text(_features(dataset).get(ATTRIBUTE)):
            raise ValueError(
                f"{title}, of type {_kind(dataset)}, has texts as attribute, which are not numbered here: "
                f"cast_column({ATTRIBUTE!r}, datasets.ClassLabel(names=[...]))."
            )
    order, texts, numbers, ids = [*(known or [])], {}, {}, {}
    for title, dataset in sets.items():
        if not isinstance(dataset, datasets.Dataset) or ATTRIBUTE not in dataset.column_names or _is_custom(dataset):
            continue
        ids[title], names = read_attributes(dataset, f"attribute of {title}")
        if is_class_label(dataset.features[ATTRIBUTE]):
            order = order or names
        elif names is not None:
            texts[title] = names
        else:
            used, ids[title] = np.unique(ids[title], return_inverse=True)
            numbers[title] = [str(number) for number in used]
    # small numbers are names where other sets have the same as names
    seen = {*order, *(name for names in texts.values() for name in names)}
    texts |= {title: names for title, names in numbers.items() if names and seen >= {*names}}
    if not texts:
        return dict(sets), list(known) if known else None
    for title in numbers.keys() - texts.keys():
        other = next(iter(texts))
        raise ValueError(
            f"the attribute of {title} has the numbers {shown(numbers[title])}, that of {other} {shown(texts[other])}: "
            "give both the same names."
        )
    for title, names in texts.items():
        others = [name for name in names if name not in order]
        if others and all_known:
            raise ValueError(
                f"the attribute of {title} has the values {shown(others)}, but the training set that compute_metrics "
                f"was given has {shown(order)}: give both the same names."
            )
        order += others
    warn_of_look_alikes(order)
    changed = dict(sets)
    for title, names in texts.items():
        values = np.array([order.index(name) for name in names], np.int64)[ids[title]]
        changed[title] = with_column(sets[title], ATTRIBUTE, pa.array(values), datasets.ClassLabel(names=order))
    return changed, order


def names_for_training(model: Any, columns: Mapping[str, Any]) -> list[str] | None:
    """Returns the names of a model's classes in their order; None without a config, or where they say nothing.

    A model that was made for as many other classes gets the names of the training set, with a warning: it would be
    published under names that have nothing to do with what it was trained on.

    Args:
        model: the model; its config may be changed.
        columns: what [`class_columns`] returns.
    """
    config = getattr(model, "config", None)
    own = model_names(config) if getattr(config, "id2label", None) else None
    features = [feature for title, feature in columns.items() if title.endswith(" of train_dataset")]
    names = next((list(f.names) for f in features if isinstance(f, datasets.ClassLabel)), None)
    if own is None or names is None or len(own) != len(names) or {*folded(own)} & {*folded(names)}:
        return own
    logger.warning(
        f"The model has the classes {shown(own)}, and train_dataset has {shown(names)}: the model gets the names of "
        "the data (id2label and label2id of its config). Its head starts from what it knew."
    )
    config.id2label, config.label2id = dict(enumerate(names)), {name: number for number, name in enumerate(names)}
    return names
