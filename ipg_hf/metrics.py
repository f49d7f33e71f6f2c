# SPDX-License-Identifier: Apache-2.0
"""Accuracy by group, worst group, adjusted average and flip rate.

A group is a label together with a value of the spurious attribute: group = label · n_attributes + attribute. Nothing is
looked up on a hub: the classes are `evaluate.Metric`s that are built directly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import datasets
import evaluate
import numpy as np

IGNORED = -100


class MetricInfo(NamedTuple):
    """How a metric is shown.

    Args:
        title: the words for it in tables, cards and figures.
        direction: which values are better, "higher" or "lower".
    """

    title: str
    direction: Literal["higher", "lower"]


# name -> title and direction, in the order in which tables show them; no other list of metrics exists
METRICS = {
    "accuracy": MetricInfo("accuracy", "higher"),
    "worst_group_accuracy": MetricInfo("worst-group accuracy", "higher"),
    "adjusted_accuracy": MetricInfo("adjusted accuracy", "higher"),
    "flip_rate": MetricInfo("flip rate", "lower"),
    "mae": MetricInfo("mean absolute error", "lower"),
    "worst_group_mae": MetricInfo("worst-group mean absolute error", "lower"),
    "difference": MetricInfo("mean absolute difference within pairs", "lower"),
}
# what a model is chosen by: the first for classes, the second for a regression
WORST_GROUP = ("worst_group_accuracy", "worst_group_mae")

_INTEGERS = datasets.Value("int64")


class DivergedError(ValueError):
    """A model gives NaN or infinity: its training has diverged, or its inputs are NaN."""


def group_counts(
    labels: np.ndarray, attributes: np.ndarray, num_labels: int, num_attributes: int, weights: np.ndarray | None = None
) -> np.ndarray:
    """Rows per group.

    Args:
        labels: ints in 0..num_labels-1, shape (N,).
        attributes: ints in 0..num_attributes-1, shape (N,).
        num_labels: number of labels.
        num_attributes: number of values of the attribute.
        weights: what each row counts, shape (N,); 1 by default.

    Returns:
        float64, shape (num_labels, num_attributes).
    """
    groups = labels * num_attributes + attributes
    counts = np.bincount(groups, weights=weights, minlength=num_labels * num_attributes)
    return counts.astype(np.float64).reshape(num_labels, num_attributes)


def group_accuracy(correct: np.ndarray, counts: np.ndarray, train_counts: np.ndarray | None = None) -> dict[str, float]:
    """The summaries of a table of groups.

    Args:
        correct: number of right predictions per group, shape (num_labels, num_attributes).
        counts: number of rows per group, same shape, at least one of them positive.
        train_counts: number of training rows per group, same shape.

    Returns:
        `accuracy` over all rows; `worst_group_accuracy`, the smallest over groups that have rows; with `train_counts`
        also `adjusted_accuracy`, the mean of the groups' accuracies weighted by their training sizes (Sagawa et al.,
        arXiv 1911.08731, and wilds). Groups without rows take no part in it (our reading); where only groups that the
        training set lacks have rows, it is left out.
    """
    filled = counts > 0
    accuracy = correct[filled] / counts[filled]
    summary = {"accuracy": correct.sum() / counts.sum(), "worst_group_accuracy": accuracy.min()}
    if train_counts is not None and train_counts[filled].sum() > 0:
        summary["adjusted_accuracy"] = (accuracy * train_counts[filled]).sum() / train_counts[filled].sum()
    return {name: float(value) for name, value in summary.items()}


def group_metrics(
    predictions: np.ndarray,
    references: np.ndarray,
    attributes: np.ndarray,
    *,
    num_attributes: int | None = None,
    train_group_counts: np.ndarray | None = None,
    label_names: Sequence[str] | None = None,
    attribute_names: Sequence[str] | None = None,
) -> dict[str, float]:
    """All metrics of [`GroupAccuracy`], which describes the settings.

    Args:
        predictions: predicted classes, int, shape (N,).
        references: labels, int, shape (N,).
        attributes: values of the attribute, int, shape (N,).
        num_attributes: number of values of the attribute.
        train_group_counts: training rows per group, shape (n_labels, num_attributes).
        label_names: names of the labels.
        attribute_names: names of the attribute's values.

    Raises:
        ValueError: no rows; a label or attribute out of range.
    """
    if len(references) == 0:
        raise ValueError("there are no rows to measure: predictions, references and attributes are empty.")
    _check_range("label", references, None if label_names is None else len(label_names))
    _check_range("attribute", attributes, num_attributes)
    shape = [int(references.max()) + 1, num_attributes or int(attributes.max()) + 1]
    if train_group_counts is not None:
        shape[0] = max(shape[0], len(train_group_counts))
        train_group_counts = np.pad(train_group_counts, ((0, shape[0] - len(train_group_counts)), (0, 0)))
    counts = group_counts(references, attributes, *shape)
    correct = group_counts(references, attributes, *shape, weights=predictions == references)
    result = group_accuracy(correct, counts, train_group_counts)
    for label, attribute in np.argwhere(counts > 0):
        name = f"{_name(label_names, label)}/{_name(attribute_names, attribute)}"
        result[f"group_accuracy/{name}"] = float(correct[label, attribute] / counts[label, attribute])
        result[f"group_n/{name}"] = float(counts[label, attribute])
    return result


class _IntegerMetric(evaluate.Metric):
    """A metric over columns of integers, kept in memory, whose inputs are checked before they are stored."""

    def __init__(self, **kwargs: Any):
        kwargs.setdefault("keep_in_memory", kwargs.get("num_process", 1) == 1)
        super().__init__(**kwargs)

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Adds rows.

        Args:
            predictions: ints, shape (N,).
            references: ints, shape (N,).
            **kwargs: further columns of the metric, likewise.

        Raises:
            ValueError: a column is not one integer a row, or the lengths differ; nothing is added then.
        """
        columns = {"predictions": predictions, "references": references, **kwargs}
        columns = {name: _integers(name, values) for name, values in columns.items()}
        _check_lengths(columns)
        super().add_batch(**columns)


class GroupAccuracy(_IntegerMetric):
    """Accuracy by group, of the worst group, and adjusted, as an `evaluate.Metric`.

    Example:
        ```python
        metric = GroupAccuracy(label_names=["landbird", "waterbird"], attribute_names=["land", "water"])
        metric.compute(predictions=[0, 1, 1], references=[0, 1, 0], attributes=[0, 1, 1])["worst_group_accuracy"]  # 0.0
        ```

    Args:
        num_attributes: number of values of the attribute; by default that of `attribute_names`, or as many as are met.
        train_group_counts: training rows per group, shape (n_labels · n_attributes,) in the order of the groups, or
            (n_labels, n_attributes); gives `adjusted_accuracy`.
        label_names: names of the labels, for the keys of the result; ints by default.
        attribute_names: names of the attribute's values, likewise.
        **kwargs: arguments of `evaluate.Metric`, e.g. `experiment_id`. Values are kept in memory on one process.

    `compute(predictions=, references=, attributes=)` takes ints of shape (N,) and returns plain floats: `accuracy`,
    `worst_group_accuracy`, `adjusted_accuracy`, and for each group with rows `group_accuracy/<label>/<attribute>` and
    `group_n/<label>/<attribute>`. ValueError: no rows, different lengths, a label or attribute out of range.
    """

    def __init__(
        self,
        num_attributes: int | None = None,
        train_group_counts: Sequence[int] | np.ndarray | None = None,
        label_names: Sequence[str] | None = None,
        attribute_names: Sequence[str] | None = None,
        **kwargs: Any,
    ):
        self.train_group_counts = None if train_group_counts is None else np.asarray(train_group_counts, np.float64)
        self.label_names = None if label_names is None else list(label_names)
        self.attribute_names = None if attribute_names is None else list(attribute_names)
        self.num_attributes = num_attributes
        if num_attributes is None and attribute_names is not None:
            self.num_attributes = len(self.attribute_names)
        if self.train_group_counts is not None:
            self._read_train_counts()
        super().__init__(**kwargs)

    def _read_train_counts(self) -> None:
        counts = self.train_group_counts
        if counts.ndim == 2 and self.num_attributes is None:
            self.num_attributes = counts.shape[1]
        if self.num_attributes is None or counts.size % self.num_attributes or counts.size == 0:
            raise ValueError(
                f"train_group_counts of shape {counts.shape} need num_attributes (now {self.num_attributes}), of which "
                "their number is a multiple: one count for each label and attribute."
            )
        if counts.ndim == 2 and counts.shape[1] != self.num_attributes:
            raise ValueError(f"train_group_counts are {counts.shape}, but num_attributes={self.num_attributes}.")
        if not (np.isfinite(counts).all() and (counts >= 0).all()):
            raise ValueError(f"train_group_counts={counts.tolist()} must not be negative or NaN.")
        self.train_group_counts = counts.reshape(-1, self.num_attributes)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy by group of label and spurious attribute, and of the worst group.",
            citation="Sagawa et al., arXiv 1911.08731",
            inputs_description="predictions, references, attributes: one int a row.",
            features=datasets.Features(dict.fromkeys(("predictions", "references", "attributes"), _INTEGERS)),
        )

    def _compute(self, predictions: Any, references: Any, attributes: Any, **_: Any) -> dict[str, float]:
        return group_metrics(
            np.asarray(predictions),
            np.asarray(references),
            np.asarray(attributes),
            num_attributes=self.num_attributes,
            train_group_counts=self.train_group_counts,
            label_names=self.label_names,
            attribute_names=self.attribute_names,
        )


class FlipRate(_IntegerMetric):
    """Share of pairs whose two sides are predicted differently, as an `evaluate.Metric`.

    Args:
        **kwargs: arguments of `evaluate.Metric`.

    `compute(predictions=, references=)` takes the predicted classes on side a and on side b, ints of shape (N,), and
    returns `{"flip_rate": float in 0..1}`. ValueError: no pairs, different lengths.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of pairs whose two sides are predicted differently.",
            citation="",
            inputs_description="predictions: predicted classes on side a; references: those on side b.",
            features=datasets.Features({"predictions": _INTEGERS, "references": _INTEGERS}),
        )

    def _compute(self, predictions: Any, references: Any, **_: Any) -> dict[str, float]:
        # a combination of metrics hands its other columns to all of them: they are passed over
        if len(predictions) == 0:
            raise ValueError("there are no pairs to measure: predictions and references are empty.")
        return {"flip_rate": float(np.mean(np.asarray(predictions) != np.asarray(references)))}


class GroupMetrics:
    """`compute_metrics` for `transformers.Trainer`: accuracy and, where the rows have an attribute, all group metrics.

    Args:
        train_dataset: a `datasets.Dataset` with `label` and `attribute` columns, for their names (ClassLabel) and for
            the sizes of the training groups. Its images are not read.

    Call it with a `transformers.EvalPrediction`: `predictions` are logits, float (N, C), or a tuple whose first entry
    is; `label_ids` are labels, int (N,), or (labels, attributes). Rows with label -100 are ignored. Returns plain
    floats, with the keys of [`GroupAccuracy`]; without attributes `accuracy` alone.

    Raises:
        ValueError: `train_dataset` is no `datasets.Dataset` with a column `label`. On a call: no rows, different
            lengths, a label or attribute out of range; NaN logits (`DivergedError`).
    """

    def __init__(self, train_dataset: datasets.Dataset | None = None):
        self.settings: dict[str, Any] = {}
        if train_dataset is None:
            return
        counts = training_group_counts(train_dataset)
        self.settings = {f"{column}_names": _names(train_dataset, column) for column in ("label", "attribute")}
        self.settings["train_group_counts"] = counts
        self.settings["num_attributes"] = None if counts is None else counts.shape[1]

    def __call__(self, prediction: Any) -> dict[str, float]:
        logits = prediction.predictions
        logits = np.asarray(logits[0] if isinstance(logits, (tuple, list)) else logits)
        with_attributes = isinstance(prediction.label_ids, (tuple, list))
        labels = _integers("labels", prediction.label_ids[0] if with_attributes else prediction.label_ids)
        if logits.ndim != 2:
            raise ValueError(f"logits must be of shape (N, C), one row an image, but are {logits.shape}.")
        columns = {"logits": logits, "labels": labels}
        if with_attributes:
            columns["attributes"] = _integers("attributes", prediction.label_ids[1])
        _check_lengths(columns)
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
        if not with_attributes:
            return {"accuracy": float(np.mean(predictions == labels))}
        return group_metrics(predictions, labels, columns["attributes"][kept], **self.settings)


class GroupErrors:
    """`compute_metrics` for a regression on one number: mean absolute error by group (our reading of a group there).

    A group is a half of the labels (below or above the training median) together with a value of the attribute.

    Args:
        train_dataset: a `datasets.Dataset` with a column `label` of numbers, and `attribute` for its names.

    Call it with a `transformers.EvalPrediction`: `predictions` float (N, 1) or (N,), `label_ids` (labels, attributes)
    or labels. Returns `mae`, and with attributes `worst_group_mae`, `group_mae/<half>/<attribute>` and `group_n/...`.

    Raises:
        ValueError: on a call, for different lengths or NaN predictions (`DivergedError`).
    """

    def __init__(self, train_dataset: datasets.Dataset):
        self.median = float(np.median(train_dataset["label"][:]))
        self.names = _names(train_dataset, "attribute") if "attribute" in train_dataset.column_names else None

    def __call__(self, prediction: Any) -> dict[str, float]:
        outputs = prediction.predictions
        outputs = np.asarray(outputs[0] if isinstance(outputs, (tuple, list)) else outputs, dtype=np.float64)
        with_attributes = isinstance(prediction.label_ids, (tuple, list))
        labels = prediction.label_ids[0] if with_attributes else prediction.label_ids
        columns = {"predictions": outputs.reshape(len(outputs), -1)[:, 0], "labels": np.asarray(labels).reshape(-1)}
        if with_attributes:
            columns["attributes"] = _integers("attributes", prediction.label_ids[1])
        _check_lengths(columns)
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
                    groups[f"{half}/{_name(self.names, int(value))}"] = errors[members]
        metrics["worst_group_mae"] = max(float(values.mean()) for values in groups.values())
        metrics |= {f"group_mae/{name}": float(values.mean()) for name, values in groups.items()}
        return metrics | {f"group_n/{name}": float(len(values)) for name, values in groups.items()}


def training_group_counts(dataset: datasets.Dataset, *, by_attribute: bool = True) -> np.ndarray | None:
    """Rows per group of a training set with columns `label` (-100 is ignored) and `attribute`.

    Args:
        dataset: the training set.
        by_attribute: `False` counts as if all rows had the attribute 0; the column may be missing then.

    Returns:
        float64, shape (num_labels, num_attributes); `None` without a column `attribute`.

    Raises:
        ValueError: the set is no `datasets.Dataset` with a column `label`, has no labelled row, or a value is out of
            the range of its ClassLabel.
    """
    if not isinstance(dataset, datasets.Dataset) or "label" not in dataset.column_names:
        found = dataset.column_names if isinstance(dataset, datasets.Dataset) else type(dataset).__name__
        raise ValueError(f"train_dataset must be a datasets.Dataset with a column 'label', but is {found}.")
    if by_attribute and "attribute" not in dataset.column_names:
        return None
    read = ["label", *(["attribute"] if by_attribute else [])]
    columns = dataset.with_format("numpy").select_columns(read)[:]
    labels = _integers("label", columns["label"])
    attributes = _integers("attribute", columns["attribute"]) if by_attribute else np.zeros_like(labels)
    labels, attributes = labels[labels != IGNORED], attributes[labels != IGNORED]
    if len(labels) == 0:
        raise ValueError("train_dataset has no labelled rows, so that its group sizes are unknown.")
    sizes = []
    for column, values in (("label", labels), ("attribute", attributes)):
        names = _names(dataset, column) if column in read else None
        _check_range(column, values, len(names) if names else None)
        sizes.append(len(names) if names else int(values.max()) + 1)
    return group_counts(labels, attributes, *sizes)


def _names(dataset: Any, column: str) -> list[str] | None:
    feature = (getattr(dataset, "features", None) or {}).get(column)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def _name(names: Sequence[str] | None, index: int) -> str | int:
    return names[index] if names is not None else index


def _integers(name: str, values: Any) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim == 1 and len(array) == 0:
        return array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iub":
        raise ValueError(f"{name} must be one integer a row, but are {array.dtype} of shape {array.shape}.")
    return array.astype(np.int64)


def _check_lengths(columns: Mapping[str, np.ndarray]) -> None:
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError("the lengths differ: " + ", ".join(f"{n} {name}" for name, n in lengths.items()) + ".")


def _check_range(name: str, values: np.ndarray, count: int | None) -> None:
    wrong = np.flatnonzero((values < 0) | (values >= count if count is not None else False))
    if len(wrong):
        row = wrong[0]
        allowed = "not negative" if count is None else f"in 0..{count - 1}"
        raise ValueError(
            f"{len(wrong)} of {len(values)} rows have a {name} out of range: {values[row]} in row {row}, where it must "
            f"be {allowed}."
        )
