# SPDX-License-Identifier: Apache-2.0
"""One optimizer step with pairs, in the order of the paper (arXiv 2502.18975).

For a pair batch I, a training batch with the loss L, parameters θ, an optimizer σ and its learning rate η:

1. One forward of both sides of the pairs. It gives the distance d(I) and the invariance divergence c(I).
2. The corrective update: θ ← σ(θ, η, ∇d(I)). Of labelled pairs a multiple of their task loss is added to d (ours).
3. The task gradient at the corrected θ: g_L = ∇L.
4. While c(I) > t: g_L ← min(m, α · ‖∇d(I)‖ / ‖g_L‖) · g_L (m: max_loss_scale; the paper has no limit).
5. The task update with the same optimizer and its state: θ ← σ(θ, η, g_L).

[`GuidedStep.before_task`] does 1 and 2, [`GuidedStep.after_task`] does 4; `Trainer` does 3 and 5 as in any training.
The equations are in `guidance.py`. The rules R1 to R12 that the comments cite are in recipes/guides/method.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer

from .callbacks import output_spread
from .config import IPGConfig
from .gradients import average_gradients, gradient_norm, only_gradients_of, parameters_matching, scale_gradients
from .guidance import (
    ROOT_FLOOR,
    LossScaling,
    ProblemType,
    invariance_divergence,
    loss_gradient_scale,
    rationale_distance,
    rationale_divergence,
    root_divergence,
)
from .heads import ClassifierHead, CompiledRun
from .inference import inference, logits_of
from .losses import IGNORED, summed_loss
from .pairs.adversarial import AdversarialLoader
from .pairs.checks import ONLY_SET
from .pairs.loader import PairLoader

GRADIENT = "gradient of the output"  # no model input has this name


class GuidedStep:
    """The optimizer steps of one training run with pairs.

    Args:
        trainer: an `IPGTrainer` with its `head`, `progress` and prepared optimizer.
        loaders: the loaders of the pair sets by name. Each step draws one batch from every one.
        problem_type: a value of `guidance.ProblemType`.
        compiled: a compiled forward, if the model is compiled.
    """

    value_name = "distance"  # the quantity whose gradient the pairs give, in logs
    no_gradient = (
        "the distance depends on no trainable parameter: unfreeze the head or network, or widen corrective_layers."
    )
    without_head = "Or compare the outputs alone: invariance_distance='divergence'."  # ends the error of a missing head

    def __init__(
        self,
        trainer: Trainer,
        loaders: Mapping[str, PairLoader | AdversarialLoader],
        problem_type: ProblemType,
        compiled: CompiledRun | None = None,
    ):
        self.trainer, self.args, self.accelerator = trainer, trainer.args, trainer.accelerator
        self.head, self.progress = trainer.head, trainer.progress
        self.loaders, self.problem_type, self.compiled = loaders, problem_type, compiled
        self.metrics: dict[str, Tensor] | None = None  # of the current optimizer step
        self.ended: int | None = None  # the last optimizer step whose task gradient is complete
        module = self.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        self.corrected = parameters_matching(module, self.args.corrective_layers)

    # ---- Called by the trainer ----

    def before_task(self, model: nn.Module) -> None:
        """Steps 1 and 2 of the method; the trainer calls it before each micro-batch, it acts before the first (R6)."""
        if self.metrics is not None:
            return
        if self.ended == self.trainer.state.global_step:
            raise ValueError(
                f"{type(self.trainer).__name__}.training_step calls IPGTrainer.training_step twice in one optimizer "
                "step, which would correct twice: add the losses in compute_loss instead."
            )
        if callable(getattr(self.trainer.optimizer, "train", None)):
            self.trainer.optimizer.train()  # schedule-free: Trainer does so too late for the first of two updates
        self.metrics = self.correct(model) if self.progress.is_due() else dict(self.progress.last)

    def after_task(self, model: nn.Module) -> None:
        """Step 4 of the method: scales the accumulated task gradient, after the last micro-batch (R6)."""
        metrics, self.metrics, self.ended = self.metrics, None, self.trainer.state.global_step
        if not metrics:
            skip_update(model, self.accelerator)
            return
        metrics["loss_grad_norm"] = gradient_norm(model) / loss_scale_of(self.accelerator)
        if self.accelerator.scaler is not None and not torch.isfinite(metrics["loss_grad_norm"]):
            self.progress.skipped += 1  # the scaler sees it too, and leaves the task update out (R8)
            return
        # values that come from a checkpoint are in float64
        metrics = {name: value.to(metrics["loss_grad_norm"]) for name, value in metrics.items()}
        metrics["loss_scale"] = self.loss_scale(metrics)
        scale_gradients(model, metrics["loss_scale"])
        self.progress.add(metrics)

    # ---- Steps 1 and 2: the pairs and the corrective update ----

    def correct(self, model: nn.Module) -> dict[str, Tensor]:
        """Draws and measures the pairs, and moves the parameters along the corrective gradient.

        Returns:
            The step's metrics, detached scalars; empty where the whole step is skipped (a gradient is not finite, R8).
        """
        module = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        metrics = self.measure(module)
        norm: Tensor | None = torch.zeros_like(metrics["divergence"])
        always = self.args.correction_schedule == "always"
        disagree = not always and bool(metrics["violated"])  # waits for the device, before the first update is queued
        if always or disagree:
            norm = self.corrective_update(module)
        if norm is None:
            self.progress.skipped += 1
            return {}
        metrics["corrective_grad_norm"] = norm
        if self.args.correction_interval > 1:
            costs = {self.log_name(name, key) for name, loader in self.loaders.items() for key in loader.cost}
            kept = {name: value for name, value in metrics.items() if name not in costs}  # a cost is paid once
            self.progress.keep(kept, 1 if disagree else self.args.correction_interval)
        return metrics

    def measure(self, module: nn.Module) -> dict[str, Tensor]:
        """Draws a batch of every pair set and measures it; the combined gradient is in the parameters afterwards (R11).

        Args:
            module: the model, not wrapped.

        Returns:
            The distance (combined), the divergence (the largest) and the parts of each of several sets, by name.
        """
        weight = self.set_weight()
        metrics: dict[str, Tensor] = {}
        values, divergences, spreads = [], [], []
        with pair_gradients(module, self.accelerator), only_gradients_of(module, self.corrected):
            for name, loader in self.loaders.items():
                batch = self.trainer._prepare_inputs(self.progress.draw(name, loader))
                with self.trainer.autocast_smart_context_manager():
                    value, divergence, logits = self.pair_backward(module, batch, weight)
                values.append(weight * value)
                divergences.append(divergence)
                spreads.append(output_spread(logits))
                if name != ONLY_SET:
                    metrics |= {f"{name}/{self.value_name}": value, f"{name}/divergence": divergence}
                metrics |= {self.log_name(name, key): torch.tensor(cost) for key, cost in loader.cost.items()}
        metrics[self.value_name] = torch.stack(values).sum()
        metrics["divergence"] = torch.stack(divergences).max()
        if self.problem_type == "single_label_classification":
            metrics["spread"] = torch.stack(spreads).max()
        metrics["violated"] = (metrics["divergence"] > self.args.invariance_threshold).float()
        return metrics

    def pair_backward(self, module: nn.Module, batch: Mapping[str, Tensor], weight: float) -> tuple[Tensor, ...]:
        """Adds the gradient of `weight` · d of a pair batch to the gradients of the parameters.

        The forward is the inference forward (R2): what becomes invariant is what will be deployed. The backward runs in
        the same mode, since timm's gradient checkpointing runs the forward once more then.

        Of labelled pairs the task loss of both sides, times `pair_loss_weight`, is added to d.

        With `pair_chunk_size` the result is the same (gradient caching): a forward without a graph gives what d is
        computed from (the logits, and the features z with W), d is differentiated with respect to it, and each chunk
        then runs once more to carry its part of this gradient back through the network. At most a chunk's graph is in
        memory. This is exact because the outputs of a pair depend on no other pair in the inference forward.

        Args:
            module: the model, not wrapped.
            batch: inputs of its forward, the a sides of P pairs in the first half of each; of labelled pairs also
                `labels`, if `pair_loss_weight` is above 0.
            weight: the weight of this pair set among several.

        Returns:
            distance and divergence, detached scalars, and the logits, detached, shape (2P, C).

        Raises:
            ValueError: the distance depends on no trainable parameter.
        """
        size, pairs = self.args.pair_chunk_size, num_pairs(batch)
        batch = dict(batch)
        labels = batch.pop("labels", None)
        if size is None or size >= pairs:
            with inference(module):
                logits, z = self.forward(module, batch)
                distance, divergence = self.distance_and_divergence(logits, z)
                if not distance.requires_grad:
                    raise ValueError(self.no_gradient)
                if self.needs_gradient(divergence):
                    backward(weight * self.with_pair_loss(distance, logits, labels), self.accelerator)
            return distance.detach(), divergence, logits.detach()
        with torch.no_grad(), inference(module):
            chunks = [self.forward(module, chunk) for chunk in chunks_of_pairs(batch, size)]
        outputs = [None if parts[0] is None else join_pairs(parts) for parts in zip(*chunks, strict=True)]
        leaves = [output.requires_grad_() for output in outputs if output is not None]
        distance, divergence = self.distance_and_divergence(*outputs)
        if not self.needs_gradient(divergence):
            return distance.detach(), divergence, leaves[0].detach()
        backward(weight * self.with_pair_loss(distance, leaves[0], labels), self.accelerator)
        used = [n for n, leaf in enumerate(leaves) if leaf.grad is not None]  # d may not depend on all outputs
        gradients = {f"{GRADIENT}{n}": leaves[n].grad for n in used}
        for chunk in chunks_of_pairs({**batch, **gradients}, size):
            parts = {n: chunk.pop(f"{GRADIENT}{n}") for n in used}
            with inference(module):
                outputs = self.forward(module, chunk)
                parts = {n: gradient for n, gradient in parts.items() if outputs[n].requires_grad}
                if not parts:
                    if self.head is None or not self.head.weight.requires_grad:
                        raise ValueError(self.no_gradient)
                    break  # d has its gradient by W alone
                torch.autograd.backward([outputs[n] for n in parts], [*parts.values()])
        return distance.detach(), divergence, leaves[0].detach()

    def forward(self, module: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Logits, shape (N, C), and the input z of the head, shape (N, D); z is None where no head is needed."""
        if self.compiled is not None:
            return self.compiled(module, batch)
        if self.head is None:
            return logits_of(module(**batch)), None
        return self.head.run(module, batch)

    def distance_and_divergence(self, logits: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor]:
        """d(I) and c(I) of the pairs that all processes hold together (R7).

        Args:
            logits: shape (2P, C), the a sides of this process's P pairs in the first half.
            z: shape (2P, D), the input of the head, with the sides in the same order; both are attached to the graph.

        Returns:
            d, attached: the mean over processes of its gradients is the gradient for all pairs. c, detached. Both are
            scalars and equal on all processes (d up to rounding).
        """
        own = invariance_divergence(*logits.chunk(2), problem_type=self.problem_type)
        if self.args.invariance_distance == "rationale_divergence":
            of_rationales = rationale_divergence(
                self.head.weight, *z.chunk(2), *logits.chunk(2), problem_type=self.problem_type
            )
            both = self.mean_over_processes(torch.stack([own, of_rationales]).detach())  # in one exchange
            return root_divergence(own + of_rationales, both.sum(), floor=ROOT_FLOOR), both[0]
        divergence = self.mean_over_processes(own.detach())
        if self.args.invariance_distance == "divergence":
            return root_divergence(own, divergence), divergence
        several = self.accelerator.num_processes > 1
        if several and self.args.rationale_reduction == "mean":
            # The norm of a mean is not the mean of norms, so each process moves its features to the common mean. In
            # half precision that would lose the difference of the sides.
            z = z.to(torch.promote_types(z.dtype, torch.float32))
            halves = torch.stack([side.mean(0) for side in z.detach().chunk(2)])
            z = z + (self.mean_over_processes(halves) - halves).repeat_interleave(len(z) // 2, 0)
        distance = self.distance_of_rationales(self.args, self.head, *z.chunk(2))
        if several and self.args.rationale_reduction == "pair":
            distance = distance + (self.mean_over_processes(distance.detach()) - distance.detach())
        return distance, divergence

    def with_pair_loss(self, distance: Tensor, logits: Tensor, labels: Tensor | None) -> Tensor:
        """d plus the task loss of both sides of all pairs, times its weight; d alone where pairs give no labels.

        It is the loss of plain training, a mean over the labels, also where `objective` or the user's loss is another.
        As with d, the mean over processes of the gradients is the gradient for all pairs.

        Args:
            distance: d, a scalar with its graph.
            logits: shape (2P, C), attached to the graph.
            labels: shape (2P,) or (2P, C), or None. Rows with the label -100 do not count.
        """
        if labels is None:
            return distance
        known = self.mean_over_processes(labels.ne(IGNORED).sum().to(distance.dtype))
        known = torch.where(known > 0, known, 1.0)  # of several processes' mean, one label is less than 1
        wide = torch.promote_types(logits.dtype, torch.float32)
        with torch.autocast(logits.device.type, enabled=False):
            loss = summed_loss(logits.to(wide), labels, self.problem_type, self.args.label_smoothing_factor)
        return distance + self.args.pair_loss_weight * loss / known

    @staticmethod
    def distance_of_rationales(args: IPGConfig, head: ClassifierHead, z_a: Tensor, z_b: Tensor) -> Tensor:
        """The distance between the rationales of the two sides, a scalar; z_a and z_b have the shape (P, D)."""
        return rationale_distance(head.weight, z_a, z_b, reduction=args.rationale_reduction)

    def needs_gradient(self, divergence: Tensor) -> bool:
        """Whether these pairs give a corrective gradient: with the schedule "violated" only above the threshold."""
        return self.args.correction_schedule == "always" or bool(divergence > self.args.invariance_threshold)

    def set_weight(self) -> float:
        """The weight of each pair set in the corrective gradient: the mean of the sets (R11)."""
        return 1 / len(self.loaders)

    def corrective_update(self, module: nn.Module) -> Tensor | None:
        """Step 2: one step of the optimizer on the corrective gradient, without weight decay (R5).

        Afterwards the gradients are gone. Under fp16 the gradient comes scaled; its loss scale is undone before the
        update and adapted afterwards, and so in the task update: each has its own overflow check (R8). Parameters
        without a gradient stay as they are, momentum included (R4).

        Args:
            module: the model, not wrapped, with this process's gradient.

        Returns:
            The norm of the gradient's mean over all processes, before clipping, a scalar; None where it is not finite,
            and then nothing was updated.
        """
        optimizer, limit = self.trainer.optimizer, self.args.max_grad_norm
        return update_on_gradients(module, optimizer, self.accelerator, limit, self.optimizer_step)

    def optimizer_step(self) -> None:
        """θ ← σ(θ, η, g), with the state (momentum, Adam moments) that both updates share."""
        self.trainer.optimizer.step()

    # ---- Step 4: the scale of the task gradient ----

    def loss_scale(self, metrics: Mapping[str, Tensor], scaling: LossScaling = "adaptive") -> Tensor:
        """The factor on the task gradient, a scalar; `metrics` holds the two norms and the divergence."""
        return loss_gradient_scale(
            metrics["corrective_grad_norm"],
            metrics["loss_grad_norm"],
            metrics["divergence"],
            alpha=self.args.alpha,
            threshold=self.args.invariance_threshold,
            scaling=scaling,
            maximum=self.args.max_loss_scale,
        )

    # ---- Small parts ----

    def mean_over_processes(self, value: Tensor) -> Tensor:
        """The mean of a detached tensor over all processes."""
        return self.accelerator.reduce(value, "mean") if self.accelerator.num_processes > 1 else value

    def log_name(self, set_name: str, key: str) -> str:
        """The name of a pair set's metric in the logs: with the set's name where there are several."""
        return key if set_name == ONLY_SET else f"{set_name}/{key}"


# ---- Batches of pairs ----


def num_pairs(batch: Mapping[str, Tensor]) -> int:
    """Number of pairs in a batch of two halves."""
    return len(next(iter(batch.values()))) // 2


def chunks_of_pairs(batch: Mapping[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    """Batches of at most `size` pairs, the a sides in the first half of each; one at a time, since each is a copy."""
    halves = {name: values.chunk(2) for name, values in batch.items()}
    for start in range(0, num_pairs(batch), size):
        yield {name: torch.cat([side[start : start + size] for side in sides]) for name, sides in halves.items()}


def join_pairs(chunks: list[Tensor]) -> Tensor:
    """One batch of the outputs of several chunks, the a sides in the first half."""
    sides = [chunk.chunk(2) for chunk in chunks]
    return torch.cat([both[i] for i in (0, 1) for both in sides])


# ---- What surrounds the two updates ----


@contextmanager
def pair_gradients(module: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Lets FSDP2 reduce the gradients of the block, also where it waits for the last of several micro-batches.

    Raises:
        MemoryError: the pairs do not fit; `auto_find_batch_size` would go on to halve the training batch in vain.
    """
    waiting = isinstance(module, FSDPModule) and not accelerator.sync_gradients
    if waiting:
        module.set_requires_gradient_sync(True)
    try:
        yield
    except RuntimeError as failure:
        if should_reduce_batch_size(failure):
            raise MemoryError(
                "the pairs do not fit into memory: set pair_chunk_size, the number of pairs that are in memory at a "
                "time, or a smaller per_device_pair_batch_size. (auto_find_batch_size changes the training batch only.)"
            ) from failure
        raise
    finally:
        if waiting:
            module.set_requires_gradient_sync(False)


@contextmanager
def not_accumulating(accelerator: Accelerator) -> Iterator[None]:
    """Within the block, accelerate takes backward and optimizer as those of a step without accumulation.

    Before the last micro-batch a wrapped optimizer would skip its step silently (accelerate issues 439, 641), and
    `accelerator.backward` would divide by the number of micro-batches.
    """
    state, micro_batches = accelerator.gradient_state, accelerator.gradient_accumulation_steps
    synchronized = state.sync_gradients
    state._set_sync_gradients(True)
    accelerator.gradient_accumulation_steps = 1
    try:
        yield
    finally:
        state._set_sync_gradients(synchronized)
        accelerator.gradient_accumulation_steps = micro_batches


def backward(value: Tensor, accelerator: Accelerator) -> None:
    """As `accelerator.backward`, but not divided by the number of micro-batches: the pairs are not accumulated (R6)."""
    with not_accumulating(accelerator):
        accelerator.backward(value)


def update_on_gradients(
    module: nn.Module,
    optimizer: Any,
    accelerator: Accelerator,
    max_grad_norm: float,
    optimizer_step: Callable[[], None],
) -> Tensor | None:
    """Makes the optimizer step along the pairs' gradients, for [`GuidedStep`] and [`corrective_update`].

    Returns:
        The norm of the gradient before clipping, a scalar; `None` if it was not finite and nothing was updated.
    """
    if accelerator.num_processes > 1:
        average_gradients(module, accelerator)
    accelerator.unscale_gradients(optimizer)
    norm = gradient_norm(module)
    is_finite = bool(torch.isfinite(norm))  # waits for the device: once, and before the update is queued
    if is_finite:
        if max_grad_norm > 0:
            scale_gradients(module, (max_grad_norm / (norm + 1e-6)).clamp(max=1.0))  # as clip_grad_norm_
        with without_weight_decay(optimizer), not_accumulating(accelerator):
            optimizer_step()
    elif accelerator.scaler is not None:
        accelerator.scaler.update()
    module.zero_grad()
    return norm if is_finite else None


@contextmanager
def without_weight_decay(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within the block the optimizer decays no weights: they decay once a step, with the task update (R5)."""
    groups = [group for group in optimizer.param_groups if "weight_decay" in group]
    decays = [group["weight_decay"] for group in groups]
    for group in groups:
        group["weight_decay"] = 0.0
    try:
        yield
    finally:
        for group, decay in zip(groups, decays, strict=True):
            group["weight_decay"] = decay


def skip_update(model: nn.Module, accelerator: Accelerator) -> None:
    """Makes the optimizer's next step one that changes no parameter and no state."""
    if accelerator.scaler is None:
        model.zero_grad()  # parameters without a gradient stay as they are
        return
    for parameter in model.parameters():  # a scaler wants gradients to look at
        if parameter.grad is not None:
            parameter.grad.fill_(torch.nan)


def loss_scale_of(accelerator: Accelerator) -> float:
    """The factor on gradients while they are accumulated: fp16's loss scale, else 1."""
    return 1.0 if accelerator.scaler is None else accelerator.scaler.get_scale()


# ---- A training loop of the user's own ----


def corrective_update(
    distance: Tensor, module: nn.Module, optimizer: Any, accelerator: Accelerator, max_grad_norm: float = 1.0
) -> Tensor:
    """Descends on d in a training loop of the user's own: its gradient, and one step of the optimizer (steps 1 and 2).

    It comes once in an optimizer step, before the first micro-batch. `Accelerator(gradient_accumulation_steps=k)`
    changes nothing in it. As in [`IPGTrainer`], no weights decay in it, and the gradients are gone afterwards.

    Args:
        distance: d of the pairs with its graph, a scalar, e.g. from `guidance.root_divergence`.
        module: the model, not wrapped: `accelerator.unwrap_model(model)`.
        optimizer: the optimizer of the task update, from `accelerator.prepare`.
        accelerator: the loop's.
        max_grad_norm: the largest norm of the gradient; a longer one is clipped to it. 0 clips nothing.

    Returns:
        ‖∇d‖, the norm of the gradient's mean over all processes, before clipping, a scalar.

    Raises:
        ValueError: the parameters have gradients already, d depends on none of them, or the mixed precision or the
            launcher is one with which the update would not be exact.
        FloatingPointError: the gradient is not finite; nothing was updated.
    """
    check_launch(accelerator)
    if accelerator.scaler is not None:
        raise ValueError("corrective_update takes no mixed_precision='fp16', whose gradients are scaled: use 'bf16'.")
    if not distance.requires_grad:
        raise ValueError(GuidedStep.no_gradient)
    if any(parameter.grad is not None and parameter.grad.any() for parameter in module.parameters()):
        raise ValueError(
            "corrective_update found gradients in the parameters, and would mix them with the gradient of the pairs: "
            "call it once in an optimizer step, before the first micro-batch (where accelerator.sync_gradients is True "
            "before accelerator.accumulate begins)."
        )
    with pair_gradients(module, accelerator):
        backward(distance, accelerator)
    norm = update_on_gradients(module, optimizer, accelerator, max_grad_norm, optimizer.step)
    if norm is None:
        raise FloatingPointError("the gradient of the pairs is not finite: look at the pairs and the learning rate.")
    return norm


# ---- Launchers and optimizers ----


def check_launch(
    accelerator: Accelerator, devices: int = 1, is_model_parallel: bool = False, optim: str = "adamw_torch"
) -> None:
    """Refuses launchers and optimizers with which two exact updates a step are not possible.

    Args:
        accelerator: the processes.
        devices: number of devices that this one process drives (`TrainingArguments.n_gpu`).
        is_model_parallel: whether the model's layers are spread over several devices (`Trainer.is_model_parallel`).
        optim: name of the optimizer (`TrainingArguments.optim`).

    Raises:
        ValueError: names what was found and what to use instead.
    """
    kind, plugin = accelerator.distributed_type, getattr(accelerator.state, "fsdp_plugin", None)
    instead = "Use plain data parallelism (accelerate launch --multi_gpu) or FSDP2 (--use_fsdp --fsdp_version 2)."
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"IPGTrainer with pairs does not run under {kind.value}, whose engine takes each backward as one step of "
            f"the optimizer, while a guided step has two of each. {instead}"
        )
    if plugin is not None and plugin.fsdp_version == 1:
        raise ValueError(f"IPGTrainer with pairs does not run under FSDP1, whose parameters are flattened. {instead}")
    if devices > 1 or is_model_parallel:
        raise ValueError(
            f"IPGTrainer with pairs takes one device a process, and this one has {devices} (torch.nn.DataParallel) or "
            f"a model spread over several. {instead}"
        )
    parallel = getattr(accelerator, "parallelism_config", None)
    if parallel is not None and (parallel.tp_enabled or parallel.cp_enabled or parallel.sp_enabled):
        raise ValueError(f"IPGTrainer with pairs does not run under tensor or context parallelism. {instead}")
    if optim in ("lomo", "adalomo") or optim.endswith("_layerwise"):
        whole = optim.removesuffix("_layerwise") if optim.endswith("_layerwise") else "adamw_torch"
        raise ValueError(
            f"IPGTrainer with pairs does not take optim={optim!r}, which moves the parameters within each "
            f"backward, while a guided step scales and clips two whole gradients. Use {whole!r}, say."
        )
