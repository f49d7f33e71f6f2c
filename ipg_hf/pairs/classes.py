# SPDX-License-Identifier: Apache-2.0
"""Numbers the classes of several sets by their names, so that a number means the same class in each set."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .makers import dataset_of

logger = logging.getLogger(__name__)

NUMBER = re.compile(r"-?\d+(\.\d+)?")
SHOWN = 10  # names in a message


@dataclass(frozen=True)
class Coded:
    """A column of classes.

    Args:
        ids: number of the class of each row, shape (n,).
        names: the name of each number.
        is_declared: whether the names and their order come from a ClassLabel.
    """

    ids: np.ndarray
    names: list[str]
    is_declared: bool

    @property
    def used(self) -> set[str]:
        """The names that rows have."""
        return {self.names[number] for number in np.unique(self.ids)}


def is_class_label(feature: Any) -> bool:
    """Whether a column has named classes."""
    return isinstance(feature, datasets.ClassLabel)


def is_text(feature: Any) -> bool:
    """Whether a column has texts."""
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string", "string_view")


def sorted_names(names: Iterable[str]) -> list[str]:
    """Sorts names of classes: as numbers if all of them are numbers, else as texts."""
    names = sorted(names)
    return sorted(names, key=float) if all(map(NUMBER.fullmatch, names)) else names


def one_form(names: Iterable[str]) -> list[str]:
    """Gives names one Unicode form: the name of a folder may hold "ö" as one character or as two."""
    return [unicodedata.normalize("NFC", name) for name in names]


def folded(names: Iterable[str]) -> list[str]:
    """Gives names without capitals and without spaces at their ends, so that slips in them do not count."""
    return [name.strip().casefold() for name in names]


def warn_of_look_alikes(names: Iterable[str]) -> None:
    """Warns if names of classes differ only in capitals or in spaces at their ends."""
    names = sorted(names)
    short = folded(names)
    alike = [name for name, form in zip(names, short, strict=True) if short.count(form) > 1]
    if alike:
        logger.warning(
            f"The names {shown(alike)} differ only in capitals or spaces, and are different classes: if they are not "
            "meant to be, spell them alike."
        )


def shown(names: Iterable[Any]) -> str:
    """The first names of a list, for a message."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more


def values_of(dataset: datasets.Dataset, column: str) -> pa.Array:
    """The stored values of a column, one a row."""
    table = dataset.select_columns([column]).with_format("arrow")[:]
    return table.column(0).combine_chunks()


def check_filled(values: pa.Array, where: str) -> None:
    """Raises a ValueError if a value is missing (None, NaN or an empty text). It names the first such row."""
    missing = pc.is_null(values, nan_is_null=True)
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        missing = pc.or_(missing, pc.equal(pc.fill_null(values, ""), ""))
    rows = np.flatnonzero(missing.to_numpy(zero_copy_only=False))
    if len(rows):
        raise ValueError(
            f"{where} is missing in {len(rows)} of {len(values)} rows, the first is row {rows[0]} "
            f"({values[int(rows[0])].as_py()!r}): fill it in, or drop these rows."
        )


def coded(dataset: datasets.Dataset, column: str, where: str) -> Coded:
    """Reads a column of classes: a ClassLabel, texts, whole numbers or truth values.

    Args:
        dataset: the set.
        column: the column.
        where: what the column is, for messages.

    Raises:
        ValueError: the column has other values, a value is missing, or a number is not one of its ClassLabel.
    """
    feature, values = dataset.features[column], values_of(dataset, column)
    if not isinstance(feature, (datasets.Value, datasets.ClassLabel)):
        raise ValueError(
            f"{where} is a {type(feature).__name__}, but must be one class a row: a ClassLabel, a text or a whole "
            "number."
        )
    check_filled(values, where)
    if is_class_label(feature):
        ids, names = values.to_numpy(zero_copy_only=False).astype(np.int64), one_form(feature.names)
        wrong = np.flatnonzero((ids < 0) | (ids >= len(names)))
        if len(wrong):
            raise ValueError(
                f"{where} is {ids[wrong[0]]} in row {wrong[0]} ({len(wrong)} of {len(ids)} rows), which is none of its "
                f"{len(names)} classes: the rows have no class. Drop them, or name another split or column."
            )
        return Coded(ids, names, True)
    if pa.types.is_floating(values.type):
        value = next((value for value in values.to_pylist() if value % 1 != 0), None)  # inf % 1 is NaN
        if value is not None:
            raise ValueError(
                f"{where} has numbers like {value}, but must be names or whole numbers: make groups of it."
            )
        values = values.cast(pa.int64())
    if not (is_text(feature) or pa.types.is_integer(values.type) or pa.types.is_boolean(values.type)):
        raise ValueError(f"{where} is of type {values.type}, but must be names or whole numbers.")
    encoded = values.dictionary_encode()
    names = encoded.dictionary.to_pylist()
    names = one_form(str(name).lower() if isinstance(name, bool) else str(name) for name in names)
    return Coded(encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), names, False)


def common_names(columns: Mapping[str, Coded]) -> list[str]:
    """The names of all columns in one order: that of the first ClassLabel, then the others, sorted."""
    declared = next((column.names for column in columns.values() if column.is_declared), [])
    used = set().union(*(column.used for column in columns.values()))
    warn_of_look_alikes(used)
    return [*declared, *sorted_names(used - set(declared))]


def numbered(dataset: datasets.Dataset, column: str, read: Coded, names: Sequence[str]) -> datasets.Dataset:
    """Stores a column of classes as a ClassLabel of the given names. The columns keep their order.

    Args:
        dataset: the set.
        column: the column.
        read: the classes of the column. `names` must have all that rows use.
        names: names of the ClassLabel, in its order.
    """
    kind = dataset.features[column]
    if is_class_label(kind) and kind.names == [*names]:
        return dataset
    number = {name: position for position, name in enumerate(names)}
    ids = np.array([number.get(name, -1) for name in read.names], np.int64)[read.ids]
    return with_column(dataset, column, pa.array(ids), datasets.ClassLabel(names=[*names]))


def with_column(dataset: datasets.Dataset, column: str, values: pa.Array, feature: Any) -> datasets.Dataset:
    """Replaces the values of a column. The columns keep their order, and no image is copied."""
    new, order = dataset_of({column: (values, feature)}), dataset.column_names
    return datasets.concatenate_datasets([dataset.remove_columns(column), new], axis=1).select_columns(order)


def match_labels(dataset: Any, names: Sequence[str], where: str, column: str = "label") -> Any:
    """Numbers the classes of a column as another set does, by name.

    Args:
        dataset: a `datasets.Dataset`. Any other set, or a set without the column, is returned unchanged. So is a column
            of whole numbers that are no names of classes: they are numbers of classes already.
        names: the names of the other set, in its order.
        where: what the set is, for the message.
        column: the column.

    Raises:
        ValueError: a row has a class that is not in `names`.
    """
    if not isinstance(dataset, datasets.Dataset) or column not in dataset.column_names:
        return dataset
    read = coded(dataset, column, f"the {column} of {where}")
    unknown = read.used - {*names}
    if unknown and not read.is_declared and not is_text(dataset.features[column]):
        return dataset
    if unknown:
        raise ValueError(
            f"{where} has the {column} {shown(sorted_names(unknown))}, but the training set has only {shown(names)}: "
            "give both the same names."
        )
    return numbered(dataset, column, read, names)


def model_names(config: Any) -> list[str] | None:
    """The names of a model's classes in their order; None if it has the names `LABEL_0`, ... that say nothing."""
    known = {int(number): str(name) for number, name in (getattr(config, "id2label", None) or {}).items()}
    names = one_form(known[number] for number in sorted(known))
    return None if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names


def order_of_model(names: Sequence[str], config: Any, place: str) -> list[str]:
    """The order in which data must number its classes for a trained model to be measured.

    Args:
        names: the names of the data's classes, in their order.
        config: the model's config.
        place: the model's name, for messages.

    Raises:
        ValueError: the model does not have all classes of the data, or it has no names and another number of classes.
    """
    own = model_names(config)
    if own is None:
        if config.num_labels != len(names):
            raise ValueError(f"{place} has {config.num_labels} labels, the data has {len(names)}: {shown(names)}.")
        logger.warning(
            f"{place} has no names of classes: its outputs are taken in the order of the data's, {shown(names)}. If it "
            "has another, set id2label and label2id in its config.json."
        )
        return [*names]
    unknown = [name for name in names if name not in own]
    if unknown:
        raise ValueError(
            f"{place} has the labels {shown(own)}, but not the data's {shown(unknown)}: give the data the names of the "
            "model, or the model those of the data (id2label and label2id in its config.json)."
        )
    return own


def order_of_base(names: Sequence[str], config: Any, place: str) -> list[str]:
    """The order in which data must number its classes to train a model on, so that its head keeps what it knows.

    Args:
        names: the names of the data's classes, in their order.
        config: the model's config. A head for another number of classes is replaced by the training.
        place: the model's name, for messages.

    Raises:
        ValueError: the model has as many classes, of which some have names of the data's and others have not.
    """
    own = model_names(config)
    if own is None or len(own) != len(names) or own == [*names]:
        return [*names]
    if {*own} == {*names}:
        logger.info(f"the data's classes are numbered as those of {place}: {shown(own)}.")
        return own
    if {*folded(own)} & {*folded(names)}:
        raise ValueError(
            f"{place} has the labels {shown(own)}, the data has {shown(names)}: the head would be trained on from "
            "classes of other names. Give the classes that are the same one name, in the data or in the model's "
            "config.json."
        )
    logger.warning(f"the head of {place}, for {shown(own)}, is trained on from there for {shown(names)}.")
    return [*names]
