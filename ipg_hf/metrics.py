# SPDX-License-Identifier: Apache-2.0
"""Metrics: accuracy, worst group, adjusted accuracy, flip rate and pair accuracy; for a regression the absolute error.

A group is a label together with a value of the spurious attribute: group = label · n_attributes + attribute. The same
metrics for the library `evaluate`: `evaluate_metrics`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import unquote

import datasets
import numpy as np

if TYPE_CHECKING:
    import evaluate

IGNORED = -100


class MetricDisplay(NamedTuple):
    """How a metric is shown.

    Args:
        title: the words for it in tables, cards and figures.
        direction: which values are better, "higher" or "lower".
    """

    title: str
    direction: Literal["higher", "lower"]


# name -> title and direction, in the order in which tables show them; no other list of metrics exists
METRICS = {
    "accuracy": MetricDisplay("accuracy", "higher"),
    "worst_group_accuracy": MetricDisplay("worst-group accuracy", "higher"),
    "adjusted_accuracy": MetricDisplay("adjusted accuracy", "higher"),
    "flip_rate": MetricDisplay("flip rate", "lower"),
    "pair_accuracy": MetricDisplay("pair accuracy", "higher"),
    "mae": MetricDisplay("mean absolute error", "lower"),
    "worst_group_mae": MetricDisplay("worst-group mean absolute error", "lower"),
    "difference": MetricDisplay("mean absolute difference within pairs", "lower"),
}
MANY_VALUES = 1000  # numbers of an attribute from here on are names of values, not ids
# what a model is chosen by: the first for classes, the second for a regression
WORST_GROUP = ("worst_group_accuracy", "worst_group_mae")
# what `IPGTrainer.evaluate_pairs` measures on pairs; the last two are no results and stand in no table
OF_PAIRS = ("flip_rate", "pair_accuracy", "difference", "divergence", "distance")


def metric_of(key: str) -> str | None:
    """Returns the metric that a name in `metric_for_best_model` ends with, or `None` if it is none of this module's.

    Args:
        key: for example `"flip_rate"`, `"eval_flip_rate"`, `"eval_color/flip_rate"` (of one pair set),
            `"eval_ood_accuracy"` (of one of several evaluation sets) or `"eval_group_accuracy/cat/indoor"`.
    """
    if found := re.search("group_(accuracy|mae)/", key):
        return found[1]
    names = {*METRICS, *OF_PAIRS}
    return next((name for name in sorted(names, key=len, reverse=True) if re.search(f"(^|[/_]){name}$", key)), None)


def is_higher_better(key: str) -> bool | None:
    """Tells whether higher values of a metric are better; `None` if it is none of this module's metrics."""
    name = metric_of(key)
    return None if name is None else name in METRICS and METRICS[name].direction == "higher"


def group_name(label: str | int, attribute: str | int) -> str:
    """Returns `<label>/<attribute>`, the name of a group in the keys of metrics.

    A `/` within a name becomes `%2F` (and `%2F` becomes `%252F`), so that no two groups have one name.
    """
    escaped = (re.sub("%(?=2F|25)", "%25", str(name)).replace("/", "%2F") for name in (label, attribute))
    return "/".join(escaped)


def group_parts(name: str) -> tuple[str, str]:
    """Returns label and attribute of a name made by [`group_name`]."""
    label, attribute = (re.sub("%(2F|25)", lambda code: unquote(code[0]), part) for part in name.split("/", 1))
    return label, attribute


class DivergedError(ValueError):
    """A model returns NaN or infinity: its training has diverged, or its inputs are NaN."""


def group_counts(
    labels: np.ndarray, attributes: np.ndarray, num_labels: int, num_attributes: int, weights: np.ndarray | None = None
) -> np.ndarray:
    """Counts the rows of each group.

    Args:
        labels: ints in 0..num_labels-1, shape (N,).
        attributes: ints in 0..num_attributes-1, shape (N,).
        num_labels: number of labels.
        num_attributes: number of values of the attribute.
        weights: weight of each row in its count, shape (N,); 1 by default.

    Returns:
        float64, shape (num_labels, num_attributes).
    """
    groups = labels * num_attributes + attributes
    counts = np.bincount(groups, weights=weights, minlength=num_labels * num_attributes)
    return counts.astype(np.float64).reshape(num_labels, num_attributes)


def group_accuracy(correct: np.ndarray, counts: np.ndarray, train_counts: np.ndarray | None = None) -> dict[str, float]:
    """Computes the accuracy of the worst group and the adjusted accuracy from a table of groups.

    Args:
        correct: number of right predictions in each group, shape (num_labels, num_attributes).
        counts: number of rows in each group, same shape, at least one of them positive.
        train_counts: number of training rows in each group, same shape.

    Returns:
        `worst_group_accuracy`, the smallest accuracy of a group that has rows. With `train_counts` also
        `adjusted_accuracy`, the mean of the accuracies of the groups, weighted by the sizes of the groups in training
        (Sagawa et al., arXiv 1911.08731, and wilds). Groups without rows are left out of the mean (our reading). The
        adjusted accuracy is left out if no group with rows has training rows.
    """
    filled = counts > 0
    accuracy = correct[filled] / counts[filled]
    summary = {"worst_group_accuracy": accuracy.min()}
    if train_counts is not None and train_counts[filled].sum() > 0:
        summary["adjusted_accuracy"] = (accuracy * train_counts[filled]).sum() / train_counts[filled].sum()
    return {name: float(value) for name, value in summary.items()}


def metrics_of_groups(
    predictions: np.ndarray,
    references: np.ndarray,
    attributes: np.ndarray,
    *,
    num_attributes: int | None = None,
    train_group_counts: np.ndarray | None = None,
    label_names: Sequence[str] | None = None,
    attribute_names: Sequence[str] | None = None,
) -> dict[str, float]:
    """Computes the accuracy of each group, of the worst group, and the adjusted accuracy.

    Args:
        predictions: predicted labels, ints, shape (N,).
        references: labels, ints, shape (N,).
        attributes: values of the attribute, ints, shape (N,).
        num_attributes: number of values of the attribute. By default the largest value in the data plus one.
        train_group_counts: number of training rows in each group, shape (n_labels, num_attributes).
        label_names: names of the labels, for the keys. By default ints.
        attribute_names: names of the values of the attribute, for the keys. By default ints.

    Returns:
        `worst_group_accuracy`, with `train_group_counts` `adjusted_accuracy`, and for each group with rows
        `group_accuracy/<label>/<attribute>` and `group_n/<label>/<attribute>`.

    Raises:
        ValueError: a label or an attribute is out of range.
    """
    check_range("label", references, None if label_names is None else len(label_names))
    check_range("attribute", attributes, num_attributes)
    if num_attributes is None and attributes.max() >= MANY_VALUES:  # a table by value would not fit
        used, attributes = np.unique(attributes, return_inverse=True)
        attribute_names, attributes = [str(value) for value in used], attributes.reshape(-1)
    shape = [int(references.max()) + 1, num_attributes or int(attributes.max()) + 1]
    if train_group_counts is not None:
        shape[0] = max(shape[0], len(train_group_counts))
        train_group_counts = np.pad(train_group_counts, ((0, shape[0] - len(train_group_counts)), (0, 0)))
    counts = group_counts(references, attributes, *shape)
    correct = group_counts(references, attributes, *shape, weights=predictions == references)
    result = group_accuracy(correct, counts, train_group_counts)
    for label, attribute in np.argwhere(counts > 0):
        name = group_name(_name(label_names, label), _name(attribute_names, attribute))
        result[f"group_accuracy/{name}"] = float(correct[label, attribute] / counts[label, attribute])
        result[f"group_n/{name}"] = float(counts[label, attribute])
    return result


class GroupMetrics:
    """Computes accuracy and, if the rows have an attribute, the metrics of groups: a `compute_metrics` for `Trainer`.

    Example:
        ```python
        metrics = GroupMetrics(train_dataset)
        Trainer(..., compute_metrics=metrics)
        evaluate.evaluator("image-classification").compute(
            model, test_dataset, metric=metrics.combined(test_dataset), label_mapping=model.config.label2id, ...
        )
        ```

    Args:
        train_dataset: a `datasets.Dataset` with the columns `label` and `attribute`, for their names (ClassLabel) and
            for the sizes of the training groups. Its images are not read.

    A call takes a `transformers.EvalPrediction`: `predictions` are logits, float (N, C), or a tuple with the logits
    first; `label_ids` are labels, int (N,), or (labels, attributes). Rows with the label -100 are ignored. The call
    returns floats: `accuracy` and, with attributes, the keys of [`metrics_of_groups`].

    Attributes:
        takes_attributes: `IPGTrainer` gives (labels, attributes) to metrics of which this is true, and plain labels to
            all others.

    Raises:
        ValueError: `train_dataset` is no `datasets.Dataset` with a column `label`. On a call: there are no rows, the
            lengths differ, a label or an attribute is out of range, or logits are NaN (`DivergedError`).
    """

    takes_attributes = True

    def __init__(self, train_dataset: datasets.Dataset | None = None):
        self.settings: dict[str, Any] = {}
        if train_dataset is not None:
            counts = training_group_counts(train_dataset)
            names = None if counts is None else read_attributes(train_dataset)[1]
            self.settings = {"label_names": _names(train_dataset, "label"), "attribute_names": names}
            self.settings["train_group_counts"] = counts
            self.settings["num_attributes"] = None if counts is None else counts.shape[1]

    def combined(self, evaluated: datasets.Dataset | None = None) -> evaluate.CombinedEvaluations:
        """Returns the metrics as one of `evaluate`.

        Args:
            evaluated: the set that is evaluated, if the caller passes no attributes, as `evaluate.evaluator`.
        """
        # here, since evaluate takes seconds to import, and only these users need it
        from .evaluate_metrics import Accuracy, GroupAccuracy, combine

        return combine([Accuracy(), GroupAccuracy(**self.settings, evaluated=evaluated)])

    def __call__(self, prediction: Any) -> dict[str, float]:
        logits = prediction.predictions
        logits = np.asarray(logits[0] if isinstance(logits, (tuple, list)) else logits)
        with_attributes = isinstance(prediction.label_ids, (tuple, list))
        labels = integers("labels", prediction.label_ids[0] if with_attributes else prediction.label_ids)
        if logits.ndim != 2:
            raise ValueError(f"logits must be of shape (N, C), one row an image, but are {logits.shape}.")
        columns = {"logits": logits, "labels": labels}
        if with_attributes:
            columns["attributes"] = integers("attributes", prediction.label_ids[1])
        check_lengths(columns)
        kept = labels != IGNORED
        logits, labels = logits[kept], labels[kept]
        if len(labels) == 0:
            raise ValueError("there are no rows to measure: the set is empty, or every label is -100.")
        num_nan = int(np.isnan(logits).any(1).sum())
        if num_nan:
            raise DivergedError(
                f"the logits of {num_nan} of {len(logits)} rows are NaN: the model has diverged, or its inputs are "
                "NaN. Lower the learning rate, or look for NaN in the images."
            )
        predictions = logits.argmax(1)
        result = {"accuracy": float(np.mean(predictions == labels))}
        if with_attributes:
            result |= metrics_of_groups(predictions, labels, columns["attributes"][kept], **self.settings)
        return result


class GroupErrors:
    """Computes the mean absolute error by group of a regression on one number: a `compute_metrics` for `Trainer`.

    A group is a half of the labels (below or above the training median) together with a value of the attribute (our
    reading of a group in a regression).

    Args:
        train_dataset: a `datasets.Dataset` with a column `label` of numbers, and `attribute` for its names.

    A call takes a `transformers.EvalPrediction`: `predictions` are floats (N, 1) or (N,), `label_ids` are labels or
    (labels, attributes). It returns `mae`, and with attributes `worst_group_mae`, `group_mae/<half>/<attribute>` and
    `group_n/<half>/<attribute>`.

    Raises:
        ValueError: on a call, if the lengths differ or predictions are NaN (`DivergedError`).
    """

    takes_attributes = True

    def __init__(self, train_dataset: datasets.Dataset):
        self.median = float(np.median(train_dataset["label"][:]))
        self.names = read_attributes(train_dataset)[1] if "attribute" in train_dataset.column_names else None

    def __call__(self, prediction: Any) -> dict[str, float]:
        outputs = prediction.predictions
        outputs = np.asarray(outputs[0] if isinstance(outputs, (tuple, list)) else outputs, dtype=np.float64)
        with_attributes = isinstance(prediction.label_ids, (tuple, list))
        labels = prediction.label_ids[0] if with_attributes else prediction.label_ids
        columns = {"predictions": outputs.reshape(len(outputs), -1)[:, 0], "labels": np.asarray(labels).reshape(-1)}
        if with_attributes:
            columns["attributes"] = integers("attributes", prediction.label_ids[1])
        check_lengths(columns)
        errors = np.abs(columns["predictions"] - columns["labels"])
        if not np.isfinite(errors).all():
            raise DivergedError(
                "predictions or labels are NaN or infinite: the model has diverged. Lower the learning rate."
            )
        metrics = {"mae": float(errors.mean())}
        if not with_attributes:
            return metrics
        above = columns["labels"] > self.median
        groups = {}
        for half, rows in (("below", ~above), ("above", above)):
            for value in np.unique(columns["attributes"]):
                members = rows & (columns["attributes"] == value)
                if members.any():
                    groups[group_name(half, _name(self.names, int(value)))] = errors[members]
        metrics["worst_group_mae"] = max(float(values.mean()) for values in groups.values())
        metrics |= {f"group_mae/{name}": float(values.mean()) for name, values in groups.items()}
        return metrics | {f"group_n/{name}": float(len(values)) for name, values in groups.items()}


def training_group_counts(dataset: datasets.Dataset, *, by_attribute: bool = True) -> np.ndarray | None:
    """Counts the rows of each group of a training set.

    Args:
        dataset: the training set, with the columns `label` (-100 is ignored) and `attribute`.
        by_attribute: `False` counts as if all rows had the attribute 0. The column may be missing then.

    Returns:
        float64, shape (num_labels, num_attributes); `None` without a column `attribute`.

    Raises:
        ValueError: the set is no `datasets.Dataset` with a column `label`, it has no labelled row, or a value is out of
            the range of its ClassLabel.
    """
    if not isinstance(dataset, datasets.Dataset) or "label" not in dataset.column_names:
        found = dataset.column_names if isinstance(dataset, datasets.Dataset) else type(dataset).__name__
        raise ValueError(f"train_dataset must be a datasets.Dataset with a column 'label', but is {found}.")
    if by_attribute and "attribute" not in dataset.column_names:
        return None
    labels = integers("label", dataset.with_format("numpy").select_columns(["label"])["label"][:])
    attributes, names = read_attributes(dataset) if by_attribute else (np.zeros_like(labels), None)
    labels, attributes = labels[labels != IGNORED], attributes[labels != IGNORED]
    if len(labels) == 0:
        raise ValueError("train_dataset has no labelled rows, so that its group sizes are unknown.")
    sizes = []
    for column, values, known in (("label", labels, _names(dataset, "label")), ("attribute", attributes, names)):
        check_range(column, values, len(known) if known else None)
        sizes.append(len(known) if known else int(values.max()) + 1)
    return group_counts(labels, attributes, *sizes)


def read_attributes(dataset: datasets.Dataset, where: str = "attribute") -> tuple[np.ndarray, list[str] | None]:
    """Reads the column `attribute` of a set.

    Args:
        dataset: the set.
        where: what the column is, for messages.

    Returns:
        The ids, int64 (N,), and the names of the ids. A ClassLabel has names. Texts, floats that are whole, and numbers
        of which one is 1,000 or more, are numbered in their order and are their own names. Small whole numbers are ids
        without names: the names are `None`.

    Raises:
        ValueError: a value is missing, negative, or no text and no whole number.
    """
    values = dataset.with_format("arrow").select_columns(["attribute"])[:].column(0).to_numpy()
    is_missing = np.array([value is None or value != value for value in values.tolist()], bool)
    if is_missing.any():
        raise ValueError(
            f"the {where} is missing (None) in {is_missing.sum()} of {len(values)} rows, the first is row "
            f"{is_missing.argmax()}: fill it in, or drop these rows."
        )
    names = _names(dataset, "attribute")
    is_float = values.dtype.kind == "f"
    is_whole = (values == np.floor(values)) & (np.abs(values) < 2**63) if is_float else np.ones(len(values), bool)
    values = values.astype(np.int64) if is_float and is_whole.all() else values
    if values.dtype.kind in "iub" or not len(values):
        check_range(where, values, len(names) if names else None)
        if names is not None or not len(values) or (values.max() < MANY_VALUES and not is_float):
            return values.astype(np.int64), names
        used, ids = np.unique(values, return_inverse=True)
        return ids.reshape(-1), [str(value) for value in used]
    others = values[~is_whole].tolist() if is_float else values.tolist()
    wrong = next((value for value in others if not isinstance(value, str)), None)
    if wrong is not None:
        raise ValueError(f"the {where} has the value {wrong!r}, but must be a ClassLabel, a text or a whole number.")
    used, ids = np.unique(values.astype(str), return_inverse=True)
    used, order = [str(value) for value in used], np.arange(len(used))
    if all(re.fullmatch(r"-?\d+", value) for value in used):  # numbers as texts: 2 before 10
        order = np.argsort([int(value) for value in used])
    return np.argsort(order)[ids.reshape(-1)], [used[number] for number in order]


def _names(dataset: Any, column: str) -> list[str] | None:
    feature = (getattr(dataset, "features", None) or {}).get(column)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def _name(names: Sequence[str] | None, index: int) -> str | int:
    return names[index] if names is not None else index


def integers(name: str, values: Any) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim == 1 and len(array) == 0:
        return array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iub":
        raise ValueError(f"{name} must be one integer a row, but are {array.dtype} of shape {array.shape}.")
    if array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} have the value {array.max()}, too large for an int64: number the values from 0.")
    return array.astype(np.int64)


def check_lengths(columns: Mapping[str, np.ndarray]) -> None:
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError("the lengths differ: " + ", ".join(f"{n} {name}" for name, n in lengths.items()) + ".")


def check_range(name: str, values: np.ndarray, count: int | None) -> None:
    wrong = np.flatnonzero((values < 0) | (values >= count if count is not None else False))
    if len(wrong):
        row = wrong[0]
        allowed = "not negative" if count is None else f"in 0..{count - 1}"
        raise ValueError(
            f"{name} out of range: {values[row]} in row {row}, where it must be {allowed} ({len(wrong)} of "
            f"{len(values)} rows are wrong)."
        )
