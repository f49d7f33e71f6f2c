# SPDX-License-Identifier: Apache-2.0
"""Task losses: the plain mean, class-balanced, re-weighted by group, and GroupDRO.

A group is a label together with a value of the spurious attribute. The losses over groups follow Sagawa et al.,
arXiv 1911.08731.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from .guidance import ProblemType
from .inference import logits_of

Objective = Literal["erm", "class_balanced", "group_dro", "reweight"]
ATTRIBUTE = "attribute"
IGNORED = -100


def find_problem_type(model: nn.Module, labels: Tensor | None) -> ProblemType:
    """The model's problem type, inferred as transformers' loss infers it where the config names none.

    Args:
        model: a classifier with a transformers config.
        labels: a batch of its labels, any shape; floating point ones make the problem multi-label.
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
    """The loss of a model whose forward takes no labels, computed as transformers' classifiers compute theirs.

    Args:
        model: the model, whose config may name a problem type.
        outputs: what its forward returned.
        labels: shape (N,), class indices (-100 is ignored); (N, C) for multi-label; (N,) or (N, C) for regression.
        num_items_in_batch: number of labels that the loss is divided by; by default the number in this batch.
        smoothing: label smoothing, in [0, 1).

    Returns:
        A scalar: cross entropy, binary cross entropy or squared error by the problem type.
    """
    logits, kind = logits_of(outputs), find_problem_type(model, labels)
    total = summed_loss(logits, labels, kind, smoothing)
    return total / (labels.ne(IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)


def summed_loss(logits: Tensor, labels: Tensor, problem_type: ProblemType, smoothing: float = 0.0) -> Tensor:
    """The sum of the losses of all rows, a scalar.

    Args:
        logits: shape (N, C).
        labels: as in [`classification_loss`].
        problem_type: a value of `guidance.ProblemType`.
        smoothing: label smoothing, in [0, 1), for classes only.
    """
    if problem_type == "single_label_classification":
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    if problem_type == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum")
    return F.mse_loss(logits, labels.view_as(logits).to(logits.dtype), reduction="sum")


def balanced_weights(training_counts: Tensor) -> Tensor:
    """The weight of each group's rows with which all groups that have rows weigh the same.

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
    """One step of exponentiated gradient ascent on the groups' shares q of the loss.

    Source: Sagawa et al., arXiv 1911.08731, algorithm 1. As in their code, a group without rows in the batch has the
    loss 0.

    Args:
        shares: q, shape (G,), with the sum 1.
        loss_sums: sum of the losses of each group's rows in the batch, shape (G,).
        counts: rows of each group in the batch, shape (G,).
        step_size: η_q, at least 0.

    Returns:
        The next q, shape (G,), float64, with the sum 1.
    """
    losses = loss_sums.double() / counts.double().clamp(min=1)
    # in logarithms: a loss in the hundreds would overflow
    return torch.softmax(shares.double().log() + step_size * losses, 0)


class GroupLoss:
    """The task loss of one training run in which rows weigh by their group.

    The weights are fixed before the first micro-batch of an optimizer step, from the rows of all its micro-batches on
    all processes, so that accumulating or splitting a batch changes nothing. GroupDRO therefore uses the q of the step
    before (our reading; the paper updates q by the losses of the same batch first).

    Args:
        objective: `"class_balanced"` (a group is a label), `"reweight"` or `"group_dro"`.
        training_counts: rows per group of the training set, shape (labels, attributes).
        step_size: η_q of GroupDRO, at least 0.
        smoothing: label smoothing, in [0, 1).

    Attributes:
        shares: GroupDRO's q, a list of G numbers with the sum 1. A checkpoint keeps it.
        was_used: whether the current optimizer step has computed it.
    """

    was_used = False

    def __init__(self, objective: Objective, training_counts: Tensor, step_size: float, smoothing: float = 0.0):
        self.objective, self.step_size, self.smoothing = objective, step_size, smoothing
        self.num_attributes = training_counts.shape[1]
        self.balanced = balanced_weights(training_counts.flatten())
        self.begin_training([])

    def begin_training(self, shares: list[float]) -> None:
        """Starts a training run with GroupDRO's q from a checkpoint, or with equal ones where the list is empty."""
        self.shares = shares or [1 / len(self.balanced)] * len(self.balanced)

    def begin_step(self, batches: Sequence[Mapping[str, Any]], accelerator: Accelerator) -> None:
        """Fixes the weight of each group's rows for one optimizer step.

        Args:
            batches: all micro-batches of this process, with `labels` and `attribute`.
            accelerator: the processes.
        """
        device, groups = accelerator.device, len(self.balanced)
        counts = torch.zeros(groups, device=device)
        for batch in batches:
            labels = batch["labels"].to(device)
            counts += torch.bincount(self._groups(labels, batch)[labels != IGNORED], minlength=groups)
        self.counts = accelerator.reduce(counts, "sum")
        self.sums = torch.zeros_like(self.counts)
        if self.objective == "group_dro":
            self.factors = torch.tensor(self.shares, device=device) / self.counts.clamp(min=1)
        else:
            self.factors = self.balanced.to(device).float() / self.counts.sum()

    def loss(self, logits: Tensor, inputs: Mapping[str, Any], accelerator: Accelerator, step: int) -> Tensor:
        """The loss of a micro-batch: its part of the optimizer step's loss, times the number of processes.

        DDP takes the mean over processes, which undoes the last factor.

        Args:
            logits: shape (N, C).
            inputs: `labels` and `attribute`, shape (N,).
            accelerator: the processes.
            step: number of optimizer steps before this one.

        Returns:
            A scalar.
        """
        labels = inputs["labels"]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.smoothing)
        kept = labels != IGNORED
        groups = self._groups(labels, inputs)[kept]
        losses = losses[kept]
        self.sums.index_add_(0, groups, losses.detach().float())
        return (self.factors[groups] * losses).sum() * accelerator.num_processes

    def end_step(self, accelerator: Accelerator) -> None:
        """Updates GroupDRO's q by the losses of the optimizer step's rows."""
        if self.objective != "group_dro":
            return
        sums, shares = accelerator.reduce(self.sums, "sum"), torch.tensor(self.shares, dtype=torch.float64)
        shares = group_dro_shares(shares, sums.cpu(), self.counts.cpu(), step_size=self.step_size)
        if torch.isfinite(shares).all():  # fp16's scaler skips a step whose loss overflowed; q would keep it
            self.shares = shares.tolist()

    def _groups(self, labels: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        attributes = 0 if self.objective == "class_balanced" else inputs[ATTRIBUTE].to(labels.device)
        return labels.clamp(min=0) * self.num_attributes + attributes
