# SPDX-License-Identifier: Apache-2.0
"""What a training step can minimise: the task's loss, objectives over groups and environments, penalties on pairs."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .guidance import ProblemType, invariance_divergence
from .inference import logits_of

Objective = Literal["erm", "class_balanced", "group_dro", "reweight", "irm", "vrex"]
PairObjective = Literal["ipg", "kl", "features", "rationales", "augmentation"]
IGNORED = -100


def find_problem_type(model: nn.Module, labels: Tensor | None) -> ProblemType:
    """The model's problem type, inferred as transformers' loss infers it where the config names none.

    Args:
        model: a classifier with a transformers config.
        labels: a batch of its labels, any shape; floating point ones make it multi-label.
    """
    config = getattr(model, "config", None)
    named = getattr(config, "problem_type", None)
    if named is not None:
        return named
    if getattr(config, "num_labels", None) == 1:
        return "regression"
    floating = labels is not None and labels.is_floating_point()
    return "multi_label_classification" if floating else "single_label_classification"


def classification_loss(
    model: nn.Module,
    outputs: Any,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    *,
    smoothing: float = 0.0,
) -> Tensor:
    """The loss of a model whose forward takes no labels, as transformers' classifiers compute theirs.

    Args:
        model: the model, whose config may name a problem type.
        outputs: what its forward returned.
        labels: shape (N,), class indices (-100 is ignored); (N, C) for multi-label; (N,) or (N, C) for regression.
        num_items_in_batch: number of labels that the loss is divided by; by default those of this batch.
        smoothing: label smoothing, in [0, 1).

    Returns:
        A scalar: cross entropy, binary cross entropy or squared error by the problem type.
    """
    logits, kind = logits_of(outputs), find_problem_type(model, labels)
    total = _summed_loss(logits, labels, kind, smoothing)
    return total / (labels.ne(IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)


def _summed_loss(logits: Tensor, labels: Tensor, kind: ProblemType, smoothing: float = 0.0) -> Tensor:
    if kind == "single_label_classification":
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    if kind == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum")
    return F.mse_loss(logits, labels.view_as(logits).to(logits.dtype), reduction="sum")


# ---- Groups ----


def balanced_shares(training_counts: Tensor) -> Tensor:
    """How often each group's rows count where every group that has rows is to count alike.

    Args:
        training_counts: rows per group of the training set, shape (G,).

    Returns:
        N / (number of groups with rows · rows of the group), shape (G,), float64; 0 for an empty group. Their mean over
        the training rows is 1.
    """
    counts = training_counts.double()
    filled = counts > 0
    return torch.where(filled, counts.sum() / (filled.sum() * counts.clamp(min=1)), 0.0)


def group_dro_shares(shares: Tensor, loss_sums: Tensor, counts: Tensor, *, step_size: float) -> Tensor:
    """One step of exponentiated gradient ascent on the groups' shares q of the loss (Sagawa et al., arXiv 1911.08731,
    algorithm 1; as in their code a group without rows in the batch has loss 0).

    Args:
        shares: q, shape (G,), summing to 1.
        loss_sums: sum of the losses of each group's rows in the batch, shape (G,).
        counts: rows of each group in the batch, shape (G,).
        step_size: η_q, at least 0.

    Returns:
        The next q, shape (G,), float64, summing to 1.
    """
    losses = loss_sums.double() / counts.double().clamp(min=1)
    # in logarithms: a loss in the hundreds would overflow
    return torch.softmax(shares.double().log() + step_size * losses, 0)


# ---- Environments ----


def irm_penalty(logits: Tensor, labels: Tensor, environments: Tensor) -> Tensor:
    """IRMv1's penalty: the mean over environments of (∂/∂s of the mean cross entropy of s · logits, at s = 1)²
    (Arjovsky et al., arXiv 1907.02893, equation IRMv1).

    Args:
        logits: shape (N, C).
        labels: class indices, shape (N,).
        environments: the environment of each row, any integers, shape (N,).

    Returns:
        A scalar, float32 or wider, differentiable. The derivative is written out: Σ_c (p_c - y_c) · logit_c.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    gap = logits.softmax(-1) - F.one_hot(labels, logits.shape[-1])
    return torch.stack(_means((gap * logits).sum(-1), environments)).square().mean()


def vrex_penalty(losses: Tensor, environments: Tensor) -> Tensor:
    """V-REx's penalty: the variance over environments of their mean losses (Krueger et al., arXiv 2003.00688).

    Args:
        losses: loss of each row, shape (N,).
        environments: the environment of each row, any integers, shape (N,).

    Returns:
        The population variance, a scalar; 0 for one environment.
    """
    return torch.stack(_means(losses, environments)).var(correction=0)


def _means(values: Tensor, environments: Tensor) -> list[Tensor]:
    return [values[environments == number].mean() for number in environments.unique()]


# ---- Penalties on pairs ----


def pair_penalty(
    kind: PairObjective,
    logits: Tensor,
    z: Tensor,
    weight: Tensor,
    *,
    problem_type: ProblemType,
    labels: Tensor | None = None,
) -> Tensor:
    """What is added to the task loss by those that use pairs otherwise than the method does, a mean over the pairs.

    Args:
        kind: "kl": the invariance divergence, ½(KL(p_a‖p_b) + KL(p_b‖p_a)) for classes. "features": ‖z_a - z_b‖²,
            feature matching. "rationales": ‖W ⊙ z_a - W ⊙ z_b‖², the squared Frobenius distance (after RIDG, Chen et
            al., ICCV 2023, who compare with a running mean of each class; our reading for pairs). "augmentation": the
            task loss of both sides, counterfactual data augmentation.
        logits: shape (2B, C), the a sides in the first half.
        z: input of the head, shape (2B, D), likewise.
        weight: weight of the head, shape (C, D).
        problem_type: as in [`~guidance.invariance_divergence`].
        labels: of "augmentation": labels of the rows, shape (2B,) or (2B, C).

    Returns:
        A scalar, float32 or wider, differentiable.
    """
    with torch.autocast(logits.device.type, enabled=False):
        wide = torch.promote_types(logits.dtype, torch.float32)
        logits, z, weight = logits.to(wide), z.to(wide), weight.to(wide)
        if kind == "kl":
            return invariance_divergence(*logits.chunk(2), problem_type=problem_type)
        if kind == "augmentation":
            return _summed_loss(logits, labels, problem_type) / labels.ne(IGNORED).sum()
        a, b = z.chunk(2)
        gap = (a - b).square()
        if kind == "rationales":
            gap = gap * weight.square().sum(0)
        return gap.sum(-1).mean()
