# SPDX-License-Identifier: Apache-2.0
"""IRM and V-REx: penalties on the differences between training environments, without pairs.

The training set has a column `environment` of integers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from ..config import IPGConfig
from ..losses import ATTRIBUTE, IGNORED, GroupLoss
from ..trainer import IPGTrainer

ENVIRONMENT = "environment"
EnvironmentObjective = Literal["irm", "vrex"]


@dataclass
class EnvironmentConfig(IPGConfig):
    """Settings of [`EnvironmentTrainer`]: those of [`IPGConfig`], and these.

    Args:
        objective (`str`, *optional*, defaults to `"irm"`):
            The penalty: `"irm"` or `"vrex"`.
        environment_penalty_weight (`float`, *optional*, defaults to `1.0`):
            Factor of the penalty, at least 0. Where it is above 1 the loss is divided by it.
        environment_penalty_start (`int`, *optional*, defaults to `0`):
            Optimizer step from which the factor holds; before, it is at most 1, as in IRM's code.
    """

    objective: EnvironmentObjective = field(default="irm", metadata={"help": "The penalty on the environments."})
    environment_penalty_weight: float = field(default=1.0, metadata={"help": "Factor of the penalty."})
    environment_penalty_start: int = field(default=0, metadata={"help": "Step from which the factor is above 1."})

    def check(self) -> None:
        """Raises ValueError for a setting that is not valid, its own settings included."""
        super().check()
        for name in ("environment_penalty_weight", "environment_penalty_start"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "0 or more, and finite")
        if self.gradient_accumulation_steps > 1 or self.world_size > 1:
            raise ValueError(
                f"objective={self.objective!r} is no sum over rows, and is exact for whole batches only: set "
                f"gradient_accumulation_steps=1 (now {self.gradient_accumulation_steps}) and use one process (now "
                f"{self.world_size})."
            )


class EnvironmentLoss(GroupLoss):
    """The mean loss plus the penalty of IRM or V-REx, of one micro-batch, which is the whole batch.

    Args:
        args: the settings.
    """

    def __init__(self, args: EnvironmentConfig):
        self.args = args
        self.shares: list[float] = []

    def begin_training(self, shares: list[float]) -> None:
        """Nothing: there are no group weights."""

    def begin_step(self, batches: Sequence[Mapping[str, Any]], accelerator: Accelerator) -> None:
        """Nothing: rows weigh the same."""

    def end_step(self, accelerator: Accelerator) -> None:
        """Nothing: there are no group weights."""

    def loss(self, logits: Tensor, inputs: Mapping[str, Any], accelerator: Accelerator, step: int) -> Tensor:
        """The loss of a batch, a scalar.

        Args:
            logits: shape (N, C).
            inputs: `labels` and `environment`, shape (N,).
            accelerator: the process.
            step: number of optimizer steps before this one.
        """
        args, labels = self.args, inputs["labels"]
        kept = labels != IGNORED
        logits, labels, environments = logits[kept], labels[kept], inputs[ENVIRONMENT][kept]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=args.label_smoothing_factor)
        if args.objective == "irm":
            penalty = irm_penalty(logits, labels, environments)
        else:
            penalty = vrex_penalty(losses, environments)
        weight = args.environment_penalty_weight
        if step < args.environment_penalty_start:
            weight = min(1.0, weight)
        return (losses.mean() + weight * penalty) / max(1.0, weight)


class EnvironmentTrainer(IPGTrainer):
    """`IPGTrainer` without pairs, with the penalty of IRM or V-REx in its task loss.

    Args:
        args: an [`EnvironmentConfig`].
        train_dataset: a `datasets.Dataset` with a column `environment` of integers.

    All other arguments are those of [`IPGTrainer`].
    """

    _tag_names = ()
    config_class = EnvironmentConfig
    row_columns = (ATTRIBUTE, ENVIRONMENT)

    @property
    def method(self) -> str:
        """The method that a run record names."""
        return self.args.objective

    def _make_task_loss(self) -> EnvironmentLoss:
        self._stored_training_set(self.args.objective, ENVIRONMENT)
        return EnvironmentLoss(self.args)


def irm_penalty(logits: Tensor, labels: Tensor, environments: Tensor) -> Tensor:
    """IRMv1's penalty: the mean over environments of (∂/∂s of the mean cross entropy of s · logits, at s = 1)².

    Source: Arjovsky et al., arXiv 1907.02893, equation IRMv1.

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
