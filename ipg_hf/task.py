# SPDX-License-Identifier: Apache-2.0
"""Objectives of the task update that need more of a batch than its mean loss: groups and environments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from .callbacks import GroupShares
from .config import IPGConfig
from .metrics import training_group_counts
from .objectives import (
    IGNORED,
    Objective,
    balanced_shares,
    find_problem_type,
    group_dro_shares,
    irm_penalty,
    vrex_penalty,
)
from .pairs.transforms import ImageRows

ATTRIBUTE = "attribute"
ENVIRONMENT = "environment"
COLUMN = {
    "class_balanced": "label",
    "group_dro": ATTRIBUTE,
    "reweight": ATTRIBUTE,
    "irm": ENVIRONMENT,
    "vrex": ENVIRONMENT,
}


def row_columns(objective: Objective) -> list[str]:
    """The columns of training rows, beside image and label, that an objective and the evaluation by groups read."""
    return [ATTRIBUTE, ENVIRONMENT] if COLUMN.get(objective) == ENVIRONMENT else [ATTRIBUTE]


class TaskObjective:
    """The task loss of one training run under `IPGConfig.objective`.

    A group's weight in the loss is settled before the first micro-batch of an optimizer step, by the rows of all its
    micro-batches on all processes, so that accumulating or splitting a batch changes nothing. GroupDRO's q is therefore
    the one after the step before (our reading: its paper updates q by the batch's own losses first).

    Args:
        args: the settings.
        model: the classifier.
        train_dataset: the training set.

    Raises:
        ValueError: the objective cannot be computed for this model, data or kind of batch.
    """

    def __init__(self, args: IPGConfig, model: nn.Module, train_dataset: Any):
        self.args = args
        self.kind, self.column = args.objective, COLUMN[args.objective]
        problem = find_problem_type(model, None)
        if problem != "single_label_classification":
            raise ValueError(f"objective={self.kind!r} needs one class an image, but the model's is {problem}.")
        if self.column == ENVIRONMENT and (args.gradient_accumulation_steps > 1 or args.world_size > 1):
            raise ValueError(
                f"objective={self.kind!r} is no sum over rows, and is exact for whole batches alone: set "
                "gradient_accumulation_steps=1 and use one process."
            )
        stored = train_dataset.dataset if isinstance(train_dataset, ImageRows) else train_dataset
        if not isinstance(stored, datasets.Dataset) or self.column not in stored.column_names:
            found = stored.column_names if isinstance(stored, datasets.Dataset) else type(stored).__name__
            raise ValueError(
                f"objective={self.kind!r} needs a train_dataset (datasets.Dataset) with a column {self.column!r}, but "
                f"it has {found}."
            )
        self.shares: GroupShares | None = None
        if self.column != ENVIRONMENT:
            counts = torch.from_numpy(training_group_counts(stored, by_attribute=self.column == ATTRIBUTE))
            self.num_attributes = counts.shape[1]
            self.balanced = balanced_shares(counts.flatten())

    def begin_step(self, batches: Sequence[Mapping[str, Any]], accelerator: Accelerator) -> None:
        """Settles the weight of each group's rows; called with all micro-batches of an optimizer step.

        Args:
            batches: of this process, with `labels` and the objective's column.
            accelerator: the processes.
        """
        if self.column == ENVIRONMENT:
            return
        device, groups = accelerator.device, len(self.balanced)
        counts = torch.zeros(groups, device=device)
        for batch in batches:
            labels = batch["labels"].to(device)
            counts += torch.bincount(self._groups(labels, batch)[labels != IGNORED], minlength=groups)
        self.counts = accelerator.reduce(counts, "sum")
        self.sums = torch.zeros_like(self.counts)
        if self.kind != "group_dro":
            self.factors = self.balanced.to(device).float() / self.counts.sum()
            return
        if not self.shares.shares:
            self.shares.shares = [1 / groups] * groups
        self.factors = torch.tensor(self.shares.shares, device=device) / self.counts.clamp(min=1)

    def loss(self, logits: Tensor, inputs: Mapping[str, Any], accelerator: Accelerator, step: int) -> Tensor:
        """The loss of a micro-batch: its part of the optimizer step's, times the number of processes, whose mean DDP
        takes.

        Args:
            logits: shape (N, C).
            inputs: with `labels` and the objective's column, shape (N,).
            accelerator: the processes.
            step: number of optimizer steps before this one.

        Returns:
            A scalar.
        """
        labels = inputs["labels"]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        smoothing = self.args.label_smoothing_factor
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        kept = labels != IGNORED
        if self.column != ENVIRONMENT:
            groups = self._groups(labels, inputs)[kept]
            losses = losses[kept]
            self.sums.index_add_(0, groups, losses.detach().float())
            return (self.factors[groups] * losses).sum() * accelerator.num_processes
        environments = inputs[self.column][kept]
        if self.kind == "irm":
            penalty = irm_penalty(logits[kept], labels[kept], environments)
        else:
            penalty = vrex_penalty(losses[kept], environments)
        weight = self.args.environment_penalty_weight
        if step < self.args.environment_penalty_start:
            weight = min(1.0, weight)
        return (losses[kept].mean() + weight * penalty) / max(1.0, weight)

    def end_step(self, accelerator: Accelerator) -> None:
        """Updates GroupDRO's q by the losses of the optimizer step's rows."""
        if self.kind != "group_dro":
            return
        sums, shares = accelerator.reduce(self.sums, "sum"), torch.tensor(self.shares.shares, dtype=torch.float64)
        step_size = self.args.group_dro_step_size
        shares = group_dro_shares(shares, sums.cpu(), self.counts.cpu(), step_size=step_size)
        if torch.isfinite(shares).all():  # a loss that overflowed is skipped by fp16's scaler, and would be kept here
            self.shares.shares = shares.tolist()

    def _groups(self, labels: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        attributes = inputs[ATTRIBUTE].to(labels.device) if self.column == ATTRIBUTE else 0
        return labels.clamp(min=0) * self.num_attributes + attributes
