# SPDX-License-Identifier: Apache-2.0
"""Penalties on pairs: other uses of the same pairs, added to the task loss, with one update a step.

The penalty's gradient is computed in the pair forward of the method (the inference forward, R2) and stays in the
parameters, where the task gradient is added to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ..config import IPGConfig
from ..guidance import ProblemType, invariance_divergence
from ..inference import inference
from ..losses import IGNORED, summed_loss
from ..step import GuidedStep, backward, chunks_of_pairs, num_pairs
from ..trainer import IPGTrainer

PairObjective = Literal["kl", "features", "rationales", "augmentation"]


@dataclass
class PairPenaltyConfig(IPGConfig):
    """Settings of [`PairPenaltyTrainer`]: those of [`IPGConfig`], and these.

    Args:
        pair_objective (`str`, *optional*, defaults to `"kl"`):
            The penalty: `"kl"`, `"features"`, `"rationales"` or `"augmentation"`, described in [`pair_penalty`].
        pair_penalty_weight (`float`, *optional*, defaults to `1.0`):
            Factor of the penalty, above 0.

    `alpha`, `invariance_threshold`, `max_loss_scale` and `pair_loss_weight` do not act on the training.
    """

    pair_objective: PairObjective = field(default="kl", metadata={"help": "The penalty on the pairs."})
    pair_penalty_weight: float = field(default=1.0, metadata={"help": "Factor of the penalty on the pairs."})

    def check(self) -> None:
        """Raises ValueError for a setting that is not valid, its own settings included."""
        super().check()
        self._require("pair_penalty_weight", 0 < self.pair_penalty_weight < math.inf, "a finite number above 0")
        for name, value in {"correction_interval": 1, "correction_schedule": "always"}.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} does not combine with pair_objective={self.pair_objective!r}: the "
                    f"penalty is part of every step's one update. Set {name}={value!r}."
                )


class PairPenaltyStep(GuidedStep):
    """One update a step: the gradient of the penalty is left for the task gradient to be added to."""

    value_name = "penalty"
    no_gradient = "the penalty depends on no trainable parameter: unfreeze the head or network."
    without_head = "Or compare the outputs alone: pair_objective='kl'."

    def correct(self, model: nn.Module) -> dict[str, Tensor]:
        """Adds the gradient of the penalty; moves nothing. Returns the step's metrics, detached scalars."""
        return self.measure(self.accelerator.unwrap_model(model, keep_torch_compile=False))

    def after_task(self, model: nn.Module) -> None:
        """Counts the step; the task gradient is not scaled."""
        metrics, self.metrics, self.ended = self.metrics, None, self.trainer.state.global_step
        self.progress.add(metrics)

    def set_weight(self) -> float:
        """The factor of each set's penalty."""
        return super().set_weight() * self.args.pair_penalty_weight

    def pair_backward(self, module: nn.Module, batch: Mapping[str, Tensor], weight: float) -> tuple[Tensor, ...]:
        """Adds the gradient of `weight` · the penalty of a pair batch to the gradients of the parameters.

        A penalty is a mean over pairs, so chunks need no second forward.

        Args:
            module: the model, not wrapped.
            batch: inputs of its forward, the a sides of P pairs in the first half of each; for augmentation `labels`.
            weight: factor of the penalty.

        Returns:
            penalty and divergence of the pairs of all processes, detached scalars, and this process's logits, shape
            (2P, C), detached, chunk after chunk.

        Raises:
            ValueError: the penalty depends on no trainable parameter.
        """
        pairs, parts, outputs = num_pairs(batch), [], []
        for chunk in chunks_of_pairs(batch, self.args.pair_chunk_size or pairs):
            labels = chunk.pop("labels", None)
            share = num_pairs(chunk) / pairs
            with inference(module):
                logits, z = self.forward(module, chunk)
                penalty = pair_penalty(
                    self.args.pair_objective,
                    logits,
                    z,
                    None if self.head is None else self.head.weight,
                    problem_type=self.problem_type,
                    labels=labels,
                )
                if not penalty.requires_grad:
                    raise ValueError(self.no_gradient)
                backward(weight * share * penalty, self.accelerator)
            divergence = invariance_divergence(*logits.detach().chunk(2), problem_type=self.problem_type)
            parts.append(share * torch.stack([penalty.detach(), divergence.to(penalty.dtype)]))
            outputs.append(logits.detach())
        return *self.mean_over_processes(torch.stack(parts).sum(0)), torch.cat(outputs)


class PairPenaltyTrainer(IPGTrainer):
    """`IPGTrainer` whose pairs give a penalty that is added to the task loss.

    Args:
        args: a [`PairPenaltyConfig`].
        pair_dataset: the pairs. For `"augmentation"` they need a column `label`.

    All other arguments are those of [`IPGTrainer`].
    """

    _tag_names = ()
    config_class = PairPenaltyConfig
    step_class = PairPenaltyStep

    @property
    def method(self) -> str:
        """The method that a run record names."""
        return self.args.pair_objective

    @property
    def pairs_with_labels(self) -> bool:
        """Whether a batch of labelled pairs holds `labels` too."""
        return self.needs_pair_labels

    @property
    def needs_pair_labels(self) -> bool:
        """Whether pairs without labels cannot be trained with."""
        return self.args.pair_objective == "augmentation"

    def needs_head(self) -> bool:
        """Whether the penalty is computed from the classifier head."""
        return self.args.pair_objective in ("features", "rationales")


def pair_penalty(
    kind: PairObjective,
    logits: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    *,
    problem_type: ProblemType,
    labels: Tensor | None = None,
) -> Tensor:
    """The penalty on a pair batch, a mean over the pairs.

    Args:
        kind: `"kl"`: the invariance divergence, ½(KL(p_a‖p_b) + KL(p_b‖p_a)) for classes. `"features"`: ‖z_a - z_b‖²,
            feature matching. `"rationales"`: ‖W ⊙ z_a - W ⊙ z_b‖², the squared Frobenius distance (after RIDG, Chen et
            al., ICCV 2023, who compare with a running mean of each class; our reading for pairs). `"augmentation"`: the
            task loss of both sides, counterfactual data augmentation.
        logits: shape (2P, C), the a sides in the first half.
        z: input of the head, shape (2P, D), the a sides in the first half; for features and rationales.
        weight: weight of the head, shape (C, D); for rationales.
        problem_type: a value of `guidance.ProblemType`.
        labels: labels of the rows, shape (2P,) or (2P, C); for augmentation.

    Returns:
        A scalar, float32 or wider, differentiable.
    """
    with torch.autocast(logits.device.type, enabled=False):
        wide = torch.promote_types(logits.dtype, torch.float32)
        logits = logits.to(wide)
        if kind == "kl":
            return invariance_divergence(*logits.chunk(2), problem_type=problem_type)
        if kind == "augmentation" and labels is None:  # a stream, of which nothing was read before
            raise ValueError("pair_objective='augmentation' needs pairs with a column 'label'.")
        if kind == "augmentation":
            return summed_loss(logits, labels, problem_type) / labels.ne(IGNORED).sum()
        a, b = z.to(wide).chunk(2)
        gap = (a - b).square()
        if kind == "rationales":
            gap = gap * weight.to(wide).square().sum(0)
        return gap.sum(-1).mean()
