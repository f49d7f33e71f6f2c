# SPDX-License-Identifier: Apache-2.0
"""The metrics of `metrics` as `evaluate.Metric`s. They are built directly: nothing is loaded from the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from evaluate import combine

from .metrics import check_lengths, integers, metrics_of_groups

__all__ = ["Accuracy", "FlipRate", "GroupAccuracy", "combine"]


class _IntegerColumns(datasets.Features):
    """Columns of int64, whose values are stored as they are. (`Features` encodes value by value: 1 µs each.)"""

    def __init__(self, *names: str):
        super().__init__(dict.fromkeys(names, datasets.Value("int64")))

    def encode_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch


class _IntegerMetric(evaluate.Metric):
    """A metric of columns of integers. The columns stay in memory and are checked when they are added."""

    def __init__(self, **kwargs: Any):
        kwargs.setdefault("keep_in_memory", kwargs.get("num_process", 1) == 1)
        super().__init__(**kwargs)

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Adds rows.

        Args:
            predictions: ints, shape (N,).
            references: ints, shape (N,).
            **kwargs: further columns of the metric, ints, shape (N,).

        Raises:
            ValueError: a column is not one integer a row, or the columns have different lengths. Nothing is added then.
        """
        columns = {"predictions": predictions, "references": references, **kwargs}
        columns = {name: integers(name, values) for name, values in columns.items()}
        check_lengths(columns)
        super().add_batch(**columns)


class Accuracy(_IntegerMetric):
    """Share of rows that are predicted right, as an `evaluate.Metric`.

    Args:
        **kwargs: arguments of `evaluate.Metric`.

    `compute(predictions=, references=)` takes ints of shape (N,) and returns `{"accuracy": float in 0..1}`. It raises a
    ValueError if there are no rows or if the lengths differ.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of rows that are predicted right.",
            citation="",
            inputs_description="predictions, references: one int a row.",
            format="numpy",
            features=_IntegerColumns("predictions", "references"),
        )

    def _compute(self, predictions: Any, references: Any, **_: Any) -> dict[str, float]:
        # a combination of metrics passes the columns of the other metrics too
        _check_rows(predictions)
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class GroupAccuracy(_IntegerMetric):
    """Accuracy of each group, accuracy of the worst group and adjusted accuracy, as an `evaluate.Metric`.

    Example:
        ```python
        metric = GroupAccuracy(label_names=["landbird", "waterbird"], attribute_names=["land", "water"])
        metric.compute(predictions=[0, 1, 1], references=[0, 1, 0], attributes=[0, 1, 1])["worst_group_accuracy"]  # 0.0
        ```

    Args:
        num_attributes: number of values of the attribute; by default the number of `attribute_names`, or else the
            largest value in the data plus one.
        train_group_counts: number of training rows in each group, shape (n_labels · n_attributes,) in the order of the
            groups, or (n_labels, n_attributes). They give `adjusted_accuracy`.
        label_names: names of the labels, for the keys of the result; ints by default.
        attribute_names: names of the values of the attribute, for the keys of the result; ints by default.
        evaluated: the set that is evaluated, with columns `label` and `attribute`. Give it if the caller of `compute`
            passes no attributes, as `evaluate.evaluator`.
        **kwargs: arguments of `evaluate.Metric`, e.g. `experiment_id`.

    `compute(predictions=, references=, attributes=)` takes ints of shape (N,), without `attributes` if `evaluated` is
    given. It returns floats: `worst_group_accuracy`, `adjusted_accuracy`, and for each group with rows
    `group_accuracy/<label>/<attribute>` and `group_n/<label>/<attribute>`. It raises a ValueError if there are no rows,
    if the lengths differ, if a label or an attribute is out of range, or if the references are not the labels of
    `evaluated`.
    """

    def __init__(
        self,
        num_attributes: int | None = None,
        train_group_counts: Sequence[int] | np.ndarray | None = None,
        label_names: Sequence[str] | None = None,
        attribute_names: Sequence[str] | None = None,
        evaluated: datasets.Dataset | None = None,
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
        self.evaluated = None
        if evaluated is not None:
            self.evaluated = [integers(column, evaluated[column][:]) for column in ("label", "attribute")]
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
        columns = ["predictions", "references", *([] if self.evaluated else ["attributes"])]
        return evaluate.MetricInfo(
            description="Accuracy of each group of label and spurious attribute, and of the worst group.",
            citation="Sagawa et al., arXiv 1911.08731",
            inputs_description=f"{', '.join(columns)}: one int a row.",
            format="numpy",
            features=_IntegerColumns(*columns),
        )

    def _compute(self, predictions: Any, references: Any, attributes: Any = None, **_: Any) -> dict[str, float]:
        _check_rows(predictions)
        predictions, references = np.asarray(predictions), np.asarray(references)
        if self.evaluated is None:
            attributes = np.asarray(attributes)
        else:
            labels, attributes = self.evaluated
            if not np.array_equal(labels, references):
                raise ValueError(
                    "the references are not the labels of the evaluated set in its order, so that their attributes are "
                    "unknown. Give evaluated= the set that is measured. strategy='bootstrap' of evaluate.evaluator "
                    "draws rows anew: use strategy='simple'."
                )
        return metrics_of_groups(
            predictions,
            references,
            attributes,
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
    returns `{"flip_rate": float in 0..1}`. It raises a ValueError if there are no pairs or if the lengths differ.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of pairs whose two sides are predicted differently.",
            citation="",
            inputs_description="predictions: predicted classes on side a; references: those on side b.",
            format="numpy",
            features=_IntegerColumns("predictions", "references"),
        )

    def _compute(self, predictions: Any, references: Any, **_: Any) -> dict[str, float]:
        if len(predictions) == 0:
            raise ValueError("there are no pairs to measure: predictions and references are empty.")
        return {"flip_rate": float(np.mean(np.asarray(predictions) != np.asarray(references)))}


def _check_rows(predictions: Any) -> None:
    if len(predictions) == 0:
        raise ValueError("there are no rows to measure: predictions and references are empty.")
