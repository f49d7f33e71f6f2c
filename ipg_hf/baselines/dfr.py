# SPDX-License-Identifier: Apache-2.0
"""Deep feature reweighting: the last layer is fitted anew to validation images with all groups in equal numbers.

Source: Kirichenko et al., arXiv 2204.02937 (DFR^Val).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
from torch import nn
from transformers import default_data_collator

from ..config import IPGConfig
from ..heads import ClassifierHead, find_head
from ..losses import ATTRIBUTE
from ..pairs.transforms import ImageRows
from ..trainer import IPGTrainer
from .jtt import rows_of
from .last_layer import (
    TARGETS,
    batches_of,
    check_classes,
    check_head,
    check_whole,
    head_and_features,
    same_on_all_processes,
    write_head,
)

STRENGTHS = (1.0, 0.7, 0.3, 0.1, 0.07, 0.03, 0.01)
LEAST_IN_GROUP = 3  # two in the half that is fitted, to fit on and to choose by, and one to measure by


@dataclass
class DFRConfig(IPGConfig):
    """Settings of [`DFRTrainer`]: those of [`IPGConfig`], and these.

    Args:
        num_fits (`int`, *optional*, defaults to `10`):
            Number of fits that are averaged, at least 1 (in the authors' code 20).
        strengths (`list[float]`, *optional*, defaults to `[1.0, 0.7, 0.3, 0.1, 0.07, 0.03, 0.01]`):
            Values to choose from of C, scikit-learn's inverse strength of the penalty, above 0: the smaller, the
            stronger the penalty (those of the authors' code).
    """

    num_fits: int = field(default=10, metadata={"help": "Number of fits that are averaged."})
    strengths: list[float] = field(
        default_factory=lambda: list(STRENGTHS), metadata={"help": "Values of C to choose from."}
    )

    def check(self) -> None:
        """Raises ValueError for a setting that is not valid, its own settings included."""
        super().check()
        check_fits(self.num_fits, self.strengths)


class DFRTrainer(IPGTrainer):
    """Trains without pairs, then fits the last layer anew to half of every group of the evaluation set.

    After `train()`, `eval_dataset` is the other half: the rows that were not fitted.

    Args:
        args: a [`DFRConfig`].
        eval_dataset: a `datasets.Dataset` (or an `ImageRows`) with columns `label` and `attribute`, three rows or more
            in every group.

    All other arguments are those of [`IPGTrainer`], without `pair_dataset`.
    """

    _tag_names = ()
    config_class = DFRConfig

    def __init__(self, *positional: Any, **named: Any):
        super().__init__(*positional, **named)
        if self.is_guided:
            raise ValueError("dfr trains without pairs: leave pair_dataset out.")
        check_whole(self)
        head = find_head(self.model, self.head_path)
        check_head(head)
        check_classes(self.model, head)
        check_groups(*self._targets(), len(head.weight))

    @property
    def method(self) -> str:
        """The method that a run record names."""
        return "dfr"

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`, and then the fit; see [`fit_balanced`] for what `method_facts` holds afterwards."""
        output = super().train(*args, **kwargs)
        if self.state.global_step < self.state.max_steps:
            return output  # stopped before its end
        fitted, measured = split_groups(*self._targets(), seed=self.args.seed)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        head, facts = refit_last_layer(
            model,
            batches_of(self, rows_of(self.eval_dataset, fitted), default_data_collator),
            seed=self.args.seed,
            num_fits=self.args.num_fits,
            strengths=self.args.strengths,
            head=self.head_path,
        )
        same_on_all_processes(head)
        self.eval_dataset = rows_of(self.eval_dataset, measured)
        self.method_facts = {**facts, "rows_left_to_measure": len(measured)}
        return output

    def _targets(self) -> tuple[np.ndarray, np.ndarray]:
        rows = self.eval_dataset.dataset if isinstance(self.eval_dataset, ImageRows) else self.eval_dataset
        if not isinstance(rows, datasets.Dataset):
            raise ValueError(
                f"dfr fits the rows of an eval_dataset (datasets.Dataset), not of a {type(rows).__name__}."
            )
        for name in ("label", ATTRIBUTE):
            if name not in rows.column_names:
                raise ValueError(
                    f"dfr balances groups, and eval_dataset has no column {name!r}, only {rows.column_names}."
                )
        return np.asarray(rows["label"][:]), np.asarray(rows[ATTRIBUTE][:])


def refit_last_layer(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    seed: int,
    num_fits: int = 10,
    strengths: Sequence[float] = STRENGTHS,
    head: str | None = None,
) -> tuple[ClassifierHead, dict[str, Any]]:
    """Fits the last layer anew to features of a subset with equally many images of each group.

    Deep feature reweighting, DFR^Val of Kirichenko et al. (arXiv 2204.02937), for images that training has not seen.
    [`fit_balanced`] is the fit.

    Args:
        model: the classifier; its last layer is overwritten.
        batches: inputs of its forward, with `labels` (ints in 0..K-1, shape (N,)) and `attribute` (ints, shape (N,)).
        seed: non-negative; seed of the halves and of the balanced subsets.
        num_fits: number of fits that are averaged, at least 1.
        strengths: values to choose from of scikit-learn's C, positive: the smaller, the stronger the penalty.
        head: dotted path of the last layer, where it is not found by itself.

    Returns:
        The head, whose `weight` and `bias` are the new ones, and the facts of [`fit_balanced`].

    Raises:
        ValueError: a group has too few rows; the head consists of several layers, or is sharded; a regression; no such
            settings.
    """
    check_fits(num_fits, strengths)
    found, z, columns = head_and_features(model, batches, head)
    labels, attributes = (np.concatenate(columns[name]) if columns[name] else None for name in TARGETS)
    if labels is None or attributes is None:
        raise ValueError("batches need labels and attribute: a fit that balances the groups has to know them.")
    check_classes(model, found)
    weight, bias, facts = fit_balanced(
        z,
        labels,
        attributes,
        num_labels=len(found.weight),
        seed=seed,
        num_fits=num_fits,
        strengths=strengths,
        with_bias=found.bias is not None,
    )
    write_head(found, weight, bias)
    return found, facts


def fit_balanced(
    z: np.ndarray,
    labels: np.ndarray,
    attributes: np.ndarray,
    *,
    num_labels: int,
    seed: int,
    num_fits: int = 10,
    strengths: Sequence[float] = STRENGTHS,
    with_bias: bool = True,
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Weight and bias of L1-penalised logistic regressions on standardised features of balanced groups.

    First, each value in `strengths` is fitted on one half and scored on the other; the value with the best worst group
    is kept (the first of equals). Then `num_fits` fits, each on as many rows of every group as the smallest has, drawn
    anew from all rows, are averaged. The authors' code differs in three points: it standardises by the training set
    (here each fit by its own rows), it does not draw the halves within groups, and it averages 20 fits (here 10).

    Args:
        z: features, float (N, D).
        labels: ints in 0..K-1, (N,).
        attributes: ints, (N,).
        num_labels: number K of classes, at least 2.
        seed: non-negative.
        num_fits: at least 1.
        strengths: values to choose from of scikit-learn's C, positive: the smaller, the stronger the penalty.
        with_bias: `False` fits without an intercept and does not centre, for a layer without a bias.

    Returns:
        The weight W, float64 (K, D), and the bias b, float64 (K,), of the features as they are. With two classes
        z W[1] + b[1] - (z W[0] + b[0]) is the decision function; with more, the logits are those of each class against
        the rest. And the facts: `strength`, the value of `strengths` that was kept; `scores`, the worst group's
        accuracy by that value; `fits`, their number; `rows` in all and `rows_a_fit`.

    Raises:
        ValueError: a group of label and attribute has fewer than two rows; settings out of range.
    """
    check_fits(num_fits, strengths)
    check_groups(labels, attributes, num_labels, least=2)
    z = np.asarray(z, np.float64)
    _, groups = np.unique(np.stack([labels, attributes]), axis=1, return_inverse=True)
    groups = groups.reshape(-1)
    rng = np.random.default_rng((seed, 41))

    def fit(rows: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
        return _fit(z[rows], labels[rows], num_labels, strength, with_bias)

    fitted, scored = split_groups(labels, attributes, seed=seed)
    rows = fitted[_balanced(groups[fitted], rng)]
    scores = {}
    for strength in strengths:
        weight, bias = fit(rows, strength)
        right = (z[scored] @ weight.T + bias).argmax(1) == labels[scored]
        scores[float(strength)] = float(min(right[groups[scored] == group].mean() for group in np.unique(groups)))
    best = max(scores, key=scores.__getitem__)
    drawn = [_balanced(groups, rng) for _ in range(num_fits)]
    weights, biases = zip(*(fit(rows, best) for rows in drawn), strict=True)
    facts = {"strength": best, "scores": scores, "fits": num_fits, "rows": len(z), "rows_a_fit": len(drawn[0])}
    return np.mean(weights, 0), np.mean(biases, 0), facts


def split_groups(labels: np.ndarray, attributes: np.ndarray, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers, ascending, of two random halves with half of every group; the first has the odd row.

    Args:
        labels: ints, (N,).
        attributes: ints, (N,).
        seed: non-negative.
    """
    rng = np.random.default_rng((seed, 40))
    halves: tuple[list, list] = ([], [])
    for group in np.unique(np.stack([labels, attributes]), axis=1).T:
        rows = rng.permutation(np.flatnonzero((labels == group[0]) & (attributes == group[1])))
        for half, part in zip(halves, np.array_split(rows, 2), strict=True):
            half.append(part)
    return np.sort(np.concatenate(halves[0])), np.sort(np.concatenate(halves[1]))


def check_groups(labels: np.ndarray, attributes: np.ndarray, num_labels: int, *, least: int = LEAST_IN_GROUP) -> None:
    """Raises ValueError where a group has fewer than `least` rows, or a label is out of range.

    A group is a label with an attribute value that occurs.

    Args:
        labels: ints, (N,).
        attributes: ints, (N,).
        num_labels: number of labels there should be.
        least: rows that each group needs.
    """
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= num_labels:
        raise ValueError(f"labels {np.unique(labels).tolist()} must be in 0..{num_labels - 1}, and some there must be.")
    for label in range(num_labels):
        for attribute in np.unique(attributes):
            count = int(((labels == label) & (attributes == attribute)).sum())
            if count < least:
                raise ValueError(
                    f"the group label={label}, attribute={attribute} has {count} of the rows (of validation, in a "
                    f"recipe): a fit to balanced groups needs {least} of each. Take data that have all groups, or "
                    "pairs instead (project)."
                )


def check_fits(num_fits: int, strengths: Sequence[float]) -> None:
    """Raises ValueError where the settings of [`fit_balanced`] are out of range."""
    if isinstance(num_fits, bool) or not isinstance(num_fits, int) or num_fits < 1:
        raise ValueError(f"num_fits={num_fits!r} must be a whole number of at least 1.")
    is_list = isinstance(strengths, Sequence) and not isinstance(strengths, str) and len(strengths) > 0
    if not is_list or not all(isinstance(c, (int, float)) and 0 < c < float("inf") for c in strengths):
        raise ValueError(f"strengths={strengths!r} must be a list of positive numbers.")


def _balanced(groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Row numbers of a random subset in which every group has as many rows as the smallest."""
    size = np.unique(groups, return_counts=True)[1].min()
    rows = [rng.permutation(np.flatnonzero(groups == group))[:size] for group in np.unique(groups)]
    return np.sort(np.concatenate(rows))


def _fit(
    z: np.ndarray, labels: np.ndarray, num_labels: int, strength: float, with_bias: bool
) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    # the setting's name before scikit-learn 1.8, and since
    penalty = {"penalty": "l1"} if LogisticRegression().penalty == "l2" else {"l1_ratio": 1.0}
    scaler = StandardScaler(with_mean=with_bias).fit(z)
    settings = {
        "C": strength,
        "solver": "liblinear",
        "fit_intercept": with_bias,
        "random_state": 0,
        "max_iter": 1000,
    }
    classes = [1] if num_labels == 2 else range(num_labels)
    fits = [LogisticRegression(**settings, **penalty).fit(scaler.transform(z), labels == label) for label in classes]
    weight = np.concatenate([fit.coef_ for fit in fits]) / scaler.scale_
    bias = np.array([np.ravel(fit.intercept_)[0] for fit in fits])
    if with_bias:
        bias = bias - weight @ scaler.mean_
    if num_labels == 2:  # halves are exact, so that the difference of the two is the decision function
        return np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return weight, bias
