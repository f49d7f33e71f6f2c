# SPDX-License-Identifier: Apache-2.0
"""Ablations of the method: one part of the step done otherwise, to measure what the part is worth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from ..config import IPGConfig
from ..guidance import LossScaling, Norm, rationale_distance
from ..heads import ClassifierHead
from ..step import GuidedStep
from ..trainer import IPGTrainer

PairCombination = Literal["mean", "sum"]


@dataclass
class AblationConfig(IPGConfig):
    """Settings of [`AblationTrainer`]: those of [`IPGConfig`], and these.

    With all defaults it trains as [`IPGConfig`] does.

    Args:
        loss_scaling (`str`, *optional*, defaults to `"adaptive"`):
            The factor of step 4. `"adaptive"`: α·‖g_d‖/‖g_L‖, the method. `"fixed"`: α itself, whatever the norms are.
        shared_optimizer_state (`bool`, *optional*, defaults to `True`):
            Whether the corrective and the task update share the optimizer's state (momentum, Adam moments). With
            `False` a run cannot be resumed.
        rationale_norm (`str`, *optional*, defaults to `"spectral"`):
            Matrix norm of the rationale difference: `"spectral"` (the method) or `"frobenius"`. Only with
            `invariance_distance="rationale"`.
        pair_combination (`str`, *optional*, defaults to `"mean"`):
            With several pair sets, the corrective gradient is the `"mean"` (the method) or the `"sum"` of theirs (R11).
    """

    loss_scaling: LossScaling = field(
        default="adaptive", metadata={"help": "Scale the task gradient by alpha times a ratio of norms, or by alpha."}
    )
    shared_optimizer_state: bool = field(
        default=True, metadata={"help": "Share the optimizer's state between the two updates."}
    )
    rationale_norm: Norm = field(default="spectral", metadata={"help": "Norm of the rationale difference."})
    pair_combination: PairCombination = field(
        default="mean", metadata={"help": "How the corrective gradients of several pair sets combine."}
    )


class AblationStep(GuidedStep):
    """The guided step with the parts that [`AblationConfig`] changes."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.own_state: defaultdict = defaultdict(dict)  # of the corrective update, where it is not shared

    @staticmethod
    def distance_of_rationales(args: AblationConfig, head: ClassifierHead, z_a: Tensor, z_b: Tensor) -> Tensor:
        """The distance between the rationales of the two sides in the chosen norm, a scalar."""
        settings = {"reduction": args.rationale_reduction, "norm": args.rationale_norm}
        return rationale_distance(head.weight, z_a, z_b, **settings)

    def set_weight(self) -> float:
        """The weight of each pair set in the corrective gradient."""
        return 1.0 if self.args.pair_combination == "sum" else super().set_weight()

    def optimizer_step(self) -> None:
        """The corrective update, with a state of its own where it is not shared."""
        if self.args.shared_optimizer_state:
            super().optimizer_step()
            return
        optimizer = self.trainer.optimizer.optimizer
        shared, optimizer.state = optimizer.state, self.own_state
        try:
            super().optimizer_step()
        finally:
            optimizer.state = shared

    def loss_scale(self, metrics: Mapping[str, Tensor]) -> Tensor:
        """The factor on the task gradient, a scalar."""
        return super().loss_scale(metrics, self.args.loss_scaling)


class AblationTrainer(IPGTrainer):
    """`IPGTrainer` with an [`AblationConfig`]; all other arguments are the same."""

    config_class = AblationConfig
    step_class = AblationStep

    @property
    def method(self) -> str:
        """The method that a run record names."""
        return "ablation"

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As `IPGTrainer.train`.

        Raises:
            ValueError: resuming a run whose updates have separate optimizer states, which checkpoints do not hold.
        """
        if resume_from_checkpoint and self.is_guided and not self.args.shared_optimizer_state:
            raise ValueError("shared_optimizer_state=False cannot be resumed: checkpoints hold one optimizer state.")
        return super().train(resume_from_checkpoint, **kwargs)
