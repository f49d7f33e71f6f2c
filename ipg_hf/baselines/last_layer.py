# SPDX-License-Identifier: Apache-2.0
"""A trained classifier with another last layer: fitted anew to balanced groups, or blind to what pairs differ in.

Neither is a training: the network below stays as it is, and the model an ordinary checkpoint. They stand beside the
pair-guided training for comparison.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..heads import ClassifierHead, find_head
from ..inference import inference

STRENGTHS = (1.0, 0.7, 0.3, 0.1, 0.07, 0.03, 0.01)
TARGETS = ("labels", "attribute")
LEAST_IN_GROUP = 3  # two in the half that is fitted, to fit on and to choose by, and one to measure by


def refit_last_layer(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    seed: int,
    num_fits: int = 10,
    strengths: Sequence[float] = STRENGTHS,
    head: str | None = None,
) -> tuple[ClassifierHead, dict[str, Any]]:
    """Deep feature reweighting: fits the last layer anew to features of images that all groups have as many of.

    DFR^Val of Kirichenko et al. (arXiv 2204.02937), for images that training has not seen; see [`fit_balanced`].

    Args:
        model: the classifier; its last layer is overwritten.
        batches: inputs of its forward, with `labels` (ints in 0..C-1, shape (N,)) and `attribute` (ints, shape (N,)).
        seed: non-negative; seed of the halves and of the balanced subsets.
        num_fits: number of fits that are averaged, at least 1.
        strengths: values of C, positive: the smaller, the stronger the penalty.
        head: dotted path of the last layer, where it is not found by itself.

    Returns:
        The head, whose `weight` and `bias` are the new ones, and what [`fit_balanced`] tells of them.

    Raises:
        ValueError: a group has too few rows; the head consists of several layers, or is sharded; a regression; no such
            settings.
    """
    check_fits(num_fits, strengths)
    found, z, columns = _features(model, batches, head)
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
    _write(found, weight, bias)
    return found, facts


def project_last_layer(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, rank: int | float, head: str | None = None
) -> tuple[ClassifierHead, dict[str, Any]]:
    """Takes out of the last layer the directions in which the features of pairs differ most: W <- W (I - V Vᵀ).

    After Noisy Counterfactual Matching (Bai et al., arXiv 2505.24843), which trains a linear classifier under a
    constraint given by pairs that should be answered alike. That trained weights are projected instead, and that V are
    the leading singular directions of z_a - z_b, is our reading.

    Args:
        model: the classifier; the weight of its last layer is overwritten, its bias stays.
        batches: inputs of its forward, the a sides of P pairs in the first half of each.
        rank: see [`project_out`].
        head: dotted path of the last layer, where it is not found by itself.

    Returns:
        The head, whose `weight` is the new one, and what [`project_out`] tells of it.

    Raises:
        ValueError: the head consists of several layers, or is sharded; see [`project_out`].
    """
    check_rank(rank)
    found, z, _ = _features(model, batches, head, pairs=True)
    weight, facts = project_out(found.weight.detach().double().cpu().numpy(), z[0] - z[1], rank=rank)
    _write(found, weight, None)
    return found, facts


# ---- The numbers ----


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

    The C with the best worst group on one half of the rows, fitted on the other (the first of equals), is taken. Then
    `num_fits` fits, each on as many rows of every group as the smallest has, drawn anew from all rows, are averaged.
    As in the authors' code, but that a fit is standardised by its own rows (there by the training set's), that halves
    are drawn within groups, and that ten fits are averaged by default (there 20).

    Args:
        z: features, float (N, D).
        labels: ints in 0..C-1, (N,).
        attributes: ints, (N,).
        num_labels: C, at least 2.
        seed: non-negative.
        num_fits: at least 1.
        strengths: values of C, positive: the smaller, the stronger the penalty.
        with_bias: `False` fits without an intercept and does not centre, for a layer without a bias.

    Returns:
        The weight W, float64 (C, D), and the bias b, float64 (C,), of the features as they are. With two classes
        z W[1] + b[1] - (z W[0] + b[0]) is the decision function; with more, the logits are those of each class against
        the rest. And `strength`, the C taken; `scores`, the worst group's accuracy by C; `rows` and `rows_a_fit`.

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


def project_out(weight: np.ndarray, differences: np.ndarray, *, rank: int | float) -> tuple[np.ndarray, dict[str, Any]]:
    """A weight without the directions in which differences are largest: W (I - V Vᵀ).

    Args:
        weight: W, float (C, D).
        differences: z_a - z_b of P pairs, float (P, D); they are not centred, since their mean is what oriented pairs
            share.
        rank: an int, the number of leading right singular directions V, at least 1; or a float in (0, 1], the fewest
            that hold this share of the sum of squared differences (1.0: all in which they differ, so that the logits
            of the two sides become equal).

    Returns:
        The new weight, float64 (C, D), and `pairs`; `rank`, the number of directions; `variance_removed`, their share
        of the sum of squares; `weight_removed`, the share of the squared norm of W that went.

    Raises:
        ValueError: `rank` is out of range; the differences have fewer directions, or none; nothing of W would be left.
    """
    check_rank(rank)
    weight, differences = np.asarray(weight, np.float64), np.asarray(differences, np.float64)
    _, lengths, axes = np.linalg.svd(differences, full_matrices=False)
    number = int((lengths > lengths[0] * max(differences.shape) * np.finfo(np.float64).eps).sum())
    shares = (lengths**2).cumsum() / max((lengths**2).sum(), np.finfo(np.float64).tiny)
    if number == 0:
        raise ValueError("the sides of every pair have the same features: there is no direction to take out.")
    if isinstance(rank, int):
        taken = rank
    else:
        taken = number if rank == 1 else min(number, int(np.searchsorted(shares, rank)) + 1)
    if taken > number:
        raise ValueError(f"rank={rank}: the features of {len(differences)} pairs differ in {number} directions alone.")
    if taken == weight.shape[1]:
        raise ValueError(
            f"rank={rank} takes out all {taken} directions of the features, so that the outputs would be constant: "
            "give fewer, or a smaller share."
        )
    axes = axes[:taken]
    projected = weight - weight @ axes.T @ axes
    removed = 1 - (projected**2).sum() / max((weight**2).sum(), np.finfo(np.float64).tiny)
    facts = {"pairs": len(differences), "rank": taken, "variance_removed": float(shares[taken - 1])}
    return projected, facts | {"weight_removed": float(removed)}


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


# ---- Checks ----


def check_groups(labels: np.ndarray, attributes: np.ndarray, num_labels: int, *, least: int = LEAST_IN_GROUP) -> None:
    """Raises ValueError where a group, a label with a value of the attribute that occurs, has fewer rows than `least`,
    or a label is out of range.

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


def check_rank(rank: int | float) -> None:
    """Raises ValueError where the rank of [`project_out`] is neither an int from 1 on nor a share in (0, 1]."""
    is_number = isinstance(rank, (int, float)) and not isinstance(rank, bool)
    if not is_number or not (rank >= 1 if isinstance(rank, int) else 0 < rank <= 1):
        raise ValueError(f"rank={rank!r} must be a whole number of at least 1, or a share in (0, 1] such as 0.9.")


def check_head(head: ClassifierHead) -> None:
    """Raises ValueError where a head is not one layer that this process holds whole."""
    if len(head.modules) > 1:
        raise ValueError(
            f"the logits are the mean of {len(head.modules)} layers ({', '.join(head.paths)}): which of them a new "
            "last layer should replace is not defined. Use a model with one classifier."
        )
    if isinstance(head.modules[0].weight, DTensor):
        raise ValueError(f"{head.path} is sharded: change the last layer of a whole model (data parallel, not FSDP).")


def check_classes(model: nn.Module, head: ClassifierHead) -> None:
    """Raises ValueError where the outputs of a model are not those of exclusive classes."""
    kind = getattr(getattr(model, "config", None), "problem_type", None)
    if len(head.weight) < 2 or kind in ("regression", "multi_label_classification"):
        raise ValueError(
            f"the last layer has {len(head.weight)} outputs ({kind or 'one number'}): only that of a classifier with "
            "exclusive classes is fitted anew."
        )


# ---- Parts ----


def _features(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], path: str | None, pairs: bool = False
) -> tuple[ClassifierHead, np.ndarray, dict[str, list[np.ndarray]]]:
    """The proven head, its inputs in inference mode, (N, D) or (2, P, D) of pairs, and the other columns."""
    parameter = next(model.parameters())
    head: ClassifierHead | None = None
    features, columns = [], {name: [] for name in TARGETS}
    for batch in batches:
        inputs = {name: _moved(value, parameter) for name, value in batch.items() if name not in TARGETS}
        if head is None:
            head = find_head(model, path, inputs)
            check_head(head)
            head.verify(model, inputs)
        with torch.no_grad(), inference(model):
            z = head.run(model, inputs)[1].double().cpu().numpy()
        features.append(z.reshape(2, -1, z.shape[1]) if pairs else z)
        for name in columns:
            columns[name] += [np.asarray(batch[name])] if name in batch else []
    if head is None:
        raise ValueError("there are no rows: give at least one batch.")
    return head, np.concatenate(features, 1 if pairs else 0), columns


def _moved(value: Any, like: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(like.device, like.dtype if value.is_floating_point() else None)


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


@torch.no_grad()
def _write(head: ClassifierHead, weight: np.ndarray, bias: np.ndarray | None) -> None:
    layer = head.modules[0]
    layer.weight.copy_(torch.from_numpy(weight).view(layer.weight.shape))
    if bias is not None and layer.bias is not None:
        layer.bias.copy_(torch.from_numpy(bias))
