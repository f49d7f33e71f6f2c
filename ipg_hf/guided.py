# SPDX-License-Identifier: Apache-2.0
"""The optimizer step with pairs: what comes before its first micro-batch and what after its last."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from . import correction
from .callbacks import output_spread
from .config import IPGConfig
from .gradients import gradient_norm, scale_gradients
from .guidance import ProblemType, loss_gradient_scale
from .layers import moving_only, parameters_matching
from .pairs.adversarial import AdversarialLoader
from .pairs.loader import PairLoader


def pair_settings(args: IPGConfig, problem_type: ProblemType) -> dict[str, Any]:
    """The arguments of `correction.pair_measures` that a config settles."""
    rationales = {"reduction": args.rationale_reduction, "norm": args.rationale_norm}
    return {"kind": args.invariance_distance, **rationales, "problem_type": problem_type}


class GuidedStep:
    """The guided steps of one training run.

    Args:
        trainer: an `IPGTrainer` with its `head`, `progress` and prepared optimizer.
        forward: `ClassifierHead.run` of the head, or one compiled.
        loaders: pair sets by name, drawn from once a step.
        problem_type: see `guidance.invariance_divergence`.
    """

    def __init__(
        self,
        trainer: Trainer,
        forward: Callable[..., tuple[Tensor, Tensor]],
        loaders: Mapping[str, PairLoader | AdversarialLoader],
        problem_type: ProblemType,
    ):
        self.trainer, self.args, self.accelerator = trainer, trainer.args, trainer.accelerator
        self.progress, self.loaders, self.problem_type = trainer.progress, loaders, problem_type
        self.is_penalty = self.args.pair_objective != "ipg"
        if self.is_penalty:
            backward: Callable = correction.penalty_backward
            measures = {"kind": self.args.pair_objective, "problem_type": problem_type}
        else:
            backward = correction.pair_backward
            floor = self.args.invariance_threshold if self.args.correction_schedule == "violated" else None
            measures = {**pair_settings(self.args, problem_type), "floor": floor}
        self._backward = partial(backward, forward, trainer.head, chunk_size=self.args.pair_chunk_size, **measures)
        self._own_state = None if self.args.shared_optimizer_state else defaultdict(dict)
        self._metrics: dict[str, Tensor] | None = None
        module = self.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        self._corrected = parameters_matching(module, self.args.corrective_layers)

    def begin(self, model: nn.Module) -> None:
        """Called before each micro-batch: corrects before the first of an optimizer step."""
        if self._metrics is None:
            if callable(getattr(self.trainer.optimizer, "train", None)):
                self.trainer.optimizer.train()  # schedule-free: Trainer does so too late for the first of two updates
            self._metrics = self._correct(model) if self.progress.is_due() else dict(self.progress.held)

    def end(self, model: nn.Module) -> None:
        """Step 4 of the method, once an optimizer step, on the accumulated gradient."""
        metrics, self._metrics = self._metrics, None
        if self.is_penalty:
            self.progress.add(metrics)
            return
        if not metrics:
            correction.skip_update(model, self.accelerator)
            return
        metrics["loss_grad_norm"] = gradient_norm(model) / correction.loss_scale_of(self.accelerator)
        if self.accelerator.scaler is not None and not torch.isfinite(metrics["loss_grad_norm"]):
            self.progress.skipped += 1  # the scaler will see it too, and leave the second update out
            return
        # what a checkpoint held comes in float64
        metrics = {name: value.to(metrics["loss_grad_norm"]) for name, value in metrics.items()}
        metrics["loss_scale"] = loss_gradient_scale(
            metrics["corrective_grad_norm"],
            metrics["loss_grad_norm"],
            metrics["divergence"],
            alpha=self.args.alpha,
            threshold=self.args.invariance_threshold,
            scaling=self.args.loss_scaling,
            maximum=self.args.max_loss_scale,
        )
        scale_gradients(model, metrics["loss_scale"])
        self.progress.add(metrics)

    def _correct(self, model: nn.Module) -> dict[str, Tensor]:
        """Steps 1 and 2 of the method: θ ← σ(θ, η, ∇d). Returns the step's metrics, none where it is skipped.

        A penalty on pairs leaves its gradient there, for the task's to be added to.
        """
        module = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        metrics = self._look(module)
        if self.is_penalty:
            return metrics
        norm: Tensor | None = torch.zeros_like(metrics["divergence"])
        always = self.args.correction_schedule == "always"
        disagree = not always and bool(metrics["violated"])  # waits for the device, before the first update is queued
        if always or disagree:
            norm = correction.corrective_update(
                module, self.trainer.optimizer, self.accelerator, self.args.max_grad_norm, self._own_state
            )
        if norm is None:
            self.progress.skipped += 1
            return {}
        metrics["corrective_grad_norm"] = norm
        costs = {f"{name}/{key}" if name else key for name, loader in self.loaders.items() for key in loader.cost}
        held = {name: value for name, value in metrics.items() if name not in costs}  # paid once
        if self.args.correction_interval > 1:
            self.progress.hold(held, 1 if disagree else self.args.correction_interval)
        return metrics

    def _look(self, module: nn.Module) -> dict[str, Tensor]:
        """Measures the next pairs of all sets, and leaves the gradient that they ask for."""
        weight = 1.0 if self.args.pair_combination == "sum" else 1 / len(self.loaders)
        weight *= self.args.pair_penalty_weight if self.is_penalty else 1.0
        metrics: dict[str, Tensor] = {}
        values, divergences, spreads = [], [], []
        kind = "penalty" if self.is_penalty else "distance"
        with correction.pair_gradients(module, self.accelerator), moving_only(module, self._corrected):
            for name, loader in self.loaders.items():
                batch = self.trainer._prepare_inputs(self.progress.draw(name, loader))
                with self.trainer.compute_loss_context_manager():
                    value, divergence, logits = self._backward(module, batch, self.accelerator, weight=weight)
                values.append(weight * value)
                divergences.append(divergence)
                spreads.append(output_spread(logits))
                parts = {kind: value, "divergence": divergence} if name else {}
                parts |= {key: torch.tensor(value) for key, value in loader.cost.items()}
                metrics |= {f"{name}/{key}" if name else key: value for key, value in parts.items()}
        metrics[kind] = torch.stack(values).sum()
        metrics["divergence"] = torch.stack(divergences).max()
        if self.problem_type == "single_label_classification":
            metrics["spread"] = torch.stack(spreads).max()
        metrics["violated"] = (metrics["divergence"] > self.args.invariance_threshold).float()
        return metrics
