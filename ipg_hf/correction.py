# SPDX-License-Identifier: Apache-2.0
"""The parts of a guided step that need an optimizer, an `Accelerator` or a model, and no trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from .gradients import average_gradients, gradient_norm, scale_gradients
from .guidance import Distance, Norm, ProblemType, Reduction, invariance_divergence, rationale_distance, root_divergence
from .heads import ClassifierHead
from .inference import inference
from .objectives import PairObjective, pair_penalty

PairForward = Callable[[nn.Module, Mapping[str, Any]], tuple[Tensor, Tensor]]
GRADIENT = "gradient of the output"  # no model input has such a name
NOTHING_TO_CORRECT = (
    "the distance depends on no trainable parameter: unfreeze the head or network, or widen corrective_layers."
)


def pair_measures(
    head: ClassifierHead,
    logits: Tensor,
    z: Tensor,
    accelerator: Accelerator,
    *,
    reduction: Reduction,
    norm: Norm,
    problem_type: ProblemType,
    kind: Distance = "rationale",
) -> tuple[Tensor, Tensor]:
    """Distance and divergence of the pair batch that all processes hold together.

    Args:
        head: the layer that made the logits.
        logits: shape (2B, C), the a sides in the first half.
        z: shape (2B, D), the input of the head; both attached to the graph.
        accelerator: the processes, each with B pairs of its own.
        reduction: see `guidance.rationale_distance`.
        norm: see `guidance.rationale_distance`.
        problem_type: see `guidance.invariance_divergence`.
        kind: distance between rationales, or the root of the divergence (`guidance.root_divergence`).

    Returns:
        The distance, attached, whose gradient averaged over processes is that of the whole batch; and the divergence,
        detached. Both are scalars, equal on all processes (the distance up to rounding).
    """
    several = accelerator.num_processes > 1
    if kind == "divergence":
        own = invariance_divergence(*logits.chunk(2), problem_type=problem_type)
        divergence = accelerator.reduce(own.detach(), "mean") if several else own.detach()
        return root_divergence(own, divergence), divergence
    if reduction == "mean" and several:
        # the norm of the mean is not the mean of norms: every process moves its features to the common mean; in half
        # precision that would lose what the sides still differ by
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        halves = torch.stack([side.mean(0) for side in z.detach().chunk(2)])
        shift = accelerator.reduce(halves, "mean") - halves
        z = z + shift.repeat_interleave(len(z) // 2, 0)
    distance = rationale_distance(head.weight, *z.chunk(2), reduction=reduction, norm=norm)
    divergence = invariance_divergence(*logits.detach().chunk(2), problem_type=problem_type)
    if several:
        divergence = accelerator.reduce(divergence, "mean")
        if reduction == "pair":
            distance = distance + (accelerator.reduce(distance.detach(), "mean") - distance.detach())
    return distance, divergence


@torch.no_grad()
def evaluate_sides(
    head: ClassifierHead,
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    reduction: Reduction,
    norm: Norm,
    problem_type: ProblemType,
    kind: Distance = "rationale",
) -> dict[str, float]:
    """Flip rate, divergence and distance of all pairs together, in inference mode.

    Args:
        head: the layer that makes the logits.
        model: the model that holds it.
        batches: inputs of the model's forward, the a sides in the first half of each.
        reduction: see `guidance.rationale_distance`.
        norm: see `guidance.rationale_distance`.
        problem_type: see `guidance.invariance_divergence`.
        kind: see [`pair_measures`].

    Returns:
        `flip_rate`, the share of pairs whose predicted classes differ (of several labels: any of them), or for a
        regression `difference`, the mean absolute difference of the outputs; `divergence`; `distance`.
    """
    parts = []
    with inference(model):
        for batch in batches:
            logits, z = head.run(model, batch)
            parts.append((*logits.chunk(2), *z.chunk(2)))
    a, b, z_a, z_b = (torch.cat(column) for column in zip(*parts, strict=True))
    if problem_type == "regression":
        agreement = {"difference": (a - b).abs().mean().item()}
    elif problem_type == "multi_label_classification":
        agreement = {"flip_rate": ((a > 0) != (b > 0)).any(-1).sum().item() / len(a)}
    else:
        agreement = {"flip_rate": (a.argmax(-1) != b.argmax(-1)).sum().item() / len(a)}
    divergence = invariance_divergence(a, b, problem_type=problem_type)
    if kind == "divergence":
        distance = root_divergence(divergence)
    else:
        distance = rationale_distance(head.weight, z_a, z_b, reduction=reduction, norm=norm)
    return {**agreement, "divergence": divergence.item(), "distance": distance.item()}


def pair_backward(
    forward: PairForward,
    head: ClassifierHead,
    model: nn.Module,
    batch: Mapping[str, Tensor],
    accelerator: Accelerator,
    *,
    weight: float = 1.0,
    chunk_size: int | None = None,
    floor: float | None = None,
    kind: Distance = "rationale",
    **settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adds the gradient of `weight` · distance of a pair batch to the parameters' gradients.

    The forward is the inference forward (R2): what is made invariant is what will be deployed. The backward runs in the
    same mode, since timm's gradient checkpointing forwards once more then.

    In chunks (gradient caching): the features of all pairs are computed without a graph, the distance is differentiated
    with respect to them and to W, and each chunk runs once more to take the gradient of its features back through the
    network (of its logits, where the distance is the root of the divergence). That costs a second forward and holds the
    graph of `chunk_size` pairs alone. It is exact, since the pair forward is the inference forward: a pair's features
    depend on no other pair.

    Args:
        forward: `ClassifierHead.run` of the head, or one compiled.
        head: the head.
        model: the model that holds it.
        batch: inputs of its forward, the a sides of P pairs in the first half of each.
        accelerator: the processes.
        weight: of this pair set among several.
        chunk_size: pairs whose graph is held at a time; by default all.
        floor: a divergence up to which there is no gradient; by default there is always one.
        kind: see [`pair_measures`].
        **settings: see [`pair_measures`].

    Returns:
        distance and divergence, detached scalars, and the logits, detached, shape (2P, C).

    Raises:
        ValueError: the distance depends on no trainable parameter.
    """
    pairs = len(next(iter(batch.values()))) // 2
    if chunk_size is None or chunk_size >= pairs:
        with inference(model):
            logits, z = forward(model, batch)
            distance, divergence = pair_measures(head, logits, z, accelerator, kind=kind, **settings)
            if not distance.requires_grad:
                raise ValueError(NOTHING_TO_CORRECT)
            if floor is None or divergence > floor:
                accelerator.backward(weight * distance)
        return distance.detach(), divergence, logits.detach()
    with torch.no_grad(), inference(model):
        chunks = _chunks_of_pairs(batch, chunk_size)
        parts = [[value.chunk(2) for value in forward(model, chunk)] for chunk in chunks]
    logits, z = (torch.cat([part[i][side] for side in (0, 1) for part in parts]) for i in (0, 1))
    carrier = 0 if kind == "divergence" else 1  # of logits and z, what the distance is computed from
    carried = (logits, z)[carrier].requires_grad_()
    distance, divergence = pair_measures(head, logits, z, accelerator, kind=kind, **settings)
    if floor is not None and not divergence > floor:
        return distance.detach(), divergence, logits.detach()
    accelerator.backward(weight * distance)
    for chunk in _chunks_of_pairs({**batch, GRADIENT: carried.grad}, chunk_size):
        gradient = chunk.pop(GRADIENT)
        with inference(model):
            output = forward(model, chunk)[carrier]
            if not output.requires_grad:
                if kind == "divergence" or not head.weight.requires_grad:
                    raise ValueError(NOTHING_TO_CORRECT)
                break
            output.backward(gradient)
    return distance.detach(), divergence, logits.detach()


@contextmanager
def pair_gradients(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Lets FSDP2 reduce the gradients of the block, also where those of a task micro-batch wait for the last one.

    Raises:
        MemoryError: the pairs do not fit; `auto_find_batch_size` would go on to halve the training batch in vain.
    """
    waiting = isinstance(model, FSDPModule) and not accelerator.sync_gradients
    if waiting:
        model.set_requires_gradient_sync(True)
    try:
        yield
    except RuntimeError as failure:
        if should_reduce_batch_size(failure):
            raise MemoryError(
                "the pairs do not fit into memory: set pair_chunk_size, the pairs that are held at a time, or a "
                "smaller per_device_pair_batch_size. (auto_find_batch_size looks for a training batch alone.)"
            ) from failure
        raise
    finally:
        if waiting:
            model.set_requires_gradient_sync(False)


def penalty_backward(
    forward: PairForward,
    head: ClassifierHead,
    model: nn.Module,
    batch: Mapping[str, Tensor],
    accelerator: Accelerator,
    *,
    kind: PairObjective,
    problem_type: ProblemType,
    weight: float = 1.0,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adds the gradient of `weight` · a penalty on a pair batch to the parameters' gradients.

    A penalty is a mean over pairs, so that chunks need no second forward. The forward is the inference forward, as in
    [`pair_backward`].

    Args:
        forward: as in [`pair_backward`], and so the next four.
        head: the head.
        model: the model.
        batch: inputs of its forward.
        accelerator: the processes.
        kind: see `objectives.pair_penalty`; for `"augmentation"` the batch holds `labels`.
        problem_type: see `guidance.invariance_divergence`.
        weight: factor of the penalty.
        chunk_size: pairs whose graph is held at a time; by default all.

    Returns:
        penalty and divergence, of the pairs of all processes, detached scalars, and this process's logits, shape
        (2P, C), detached, chunk by chunk.

    Raises:
        ValueError: the penalty depends on no trainable parameter.
    """
    pairs = len(next(iter(batch.values()))) // 2
    parts, outputs = [], []
    for chunk in _chunks_of_pairs(batch, chunk_size or pairs):
        labels = chunk.pop("labels", None)
        share = len(next(iter(chunk.values()))) / (2 * pairs)
        with inference(model):
            logits, z = forward(model, chunk)
            penalty = pair_penalty(kind, logits, z, head.weight, problem_type=problem_type, labels=labels)
            if not penalty.requires_grad:
                raise ValueError("the penalty depends on no trainable parameter: unfreeze the head or network.")
            accelerator.backward(weight * share * penalty)
        divergence = invariance_divergence(*logits.detach().chunk(2), problem_type=problem_type)
        parts.append(share * torch.stack([penalty.detach(), divergence.to(penalty.dtype)]))
        outputs.append(logits.detach())
    measures = torch.stack(parts).sum(0)
    if accelerator.num_processes > 1:
        measures = accelerator.reduce(measures, "mean")
    return *measures, torch.cat(outputs)


def _chunks_of_pairs(batch: Mapping[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    """Batches of at most `size` pairs, each with its a sides in the first half; one at a time, since each is a copy."""
    halves = {name: values.chunk(2) for name, values in batch.items()}
    for start in range(0, len(next(iter(batch.values()))) // 2, size):
        yield {name: torch.cat([side[start : start + size] for side in sides]) for name, sides in halves.items()}


def corrective_update(
    model: nn.Module,
    optimizer: AcceleratedOptimizer,
    accelerator: Accelerator,
    max_grad_norm: float = 0.0,
    own_state: MutableMapping[nn.Parameter, Any] | None = None,
) -> Tensor | None:
    """One step of the optimizer on the corrective gradient, without weight decay; the gradients are gone afterwards.

    Under fp16 the gradient comes scaled; the loss scale is undone first and updated afterwards, here as in the second
    update of the step (R8: each has an overflow check of its own).

    Args:
        model: the bare model, with each process's gradient; parameters without one are left alone.
        optimizer: the prepared optimizer. It steps whether or not task gradients are being accumulated.
        accelerator: the one that prepared it.
        max_grad_norm: the gradient is clipped to this norm; not where 0.
        own_state: a state (momentum, Adam moments) that is used and changed instead of the optimizer's.

    Returns:
        The norm of the gradient's mean over all processes before clipping, a scalar; None where it is not finite, and
        nothing was updated.
    """
    if accelerator.num_processes > 1:
        average_gradients(model, accelerator)
    accelerator.unscale_gradients(optimizer)
    norm = gradient_norm(model)
    is_finite = bool(torch.isfinite(norm))  # waits for the device: once, and before the update is queued
    if is_finite:
        if max_grad_norm > 0:
            scale_gradients(model, (max_grad_norm / (norm + 1e-6)).clamp(max=1.0))  # as torch's clip_grad_norm_
        with _without_weight_decay(optimizer.optimizer), _stepping(optimizer.optimizer, accelerator, own_state):
            optimizer.step()
    elif accelerator.scaler is not None:
        accelerator.scaler.update()
    model.zero_grad()
    return norm if is_finite else None


def skip_update(model: nn.Module, accelerator: Accelerator) -> None:
    """Makes the optimizer's next step one that changes no parameter and no state."""
    if accelerator.scaler is None:
        model.zero_grad()  # parameters without a gradient are left alone
        return
    for parameter in model.parameters():  # a scaler wants gradients to look at
        if parameter.grad is not None:
            parameter.grad.fill_(torch.nan)


def loss_scale_of(accelerator: Accelerator) -> float:
    """The factor on the gradients while they are being accumulated: 1 but under fp16."""
    return 1.0 if accelerator.scaler is None else accelerator.scaler.get_scale()


@contextmanager
def _stepping(
    optimizer: torch.optim.Optimizer, accelerator: Accelerator, own_state: MutableMapping[nn.Parameter, Any] | None
) -> Iterator[None]:
    # accelerate skips a step on the micro-batches before the last (accelerate issues 439, 641)
    gradient_state = accelerator.gradient_state
    synchronized, shared = gradient_state.sync_gradients, optimizer.state
    gradient_state._set_sync_gradients(True)
    optimizer.state = shared if own_state is None else own_state
    try:
        yield
    finally:
        gradient_state._set_sync_gradients(synchronized)
        optimizer.state = shared


@contextmanager
def _without_weight_decay(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    groups = [group for group in optimizer.param_groups if "weight_decay" in group]
    decays = [group["weight_decay"] for group in groups]
    for group in groups:
        group["weight_decay"] = 0.0
    try:
        yield
    finally:
        for group, decay in zip(groups, decays, strict=True):
            group["weight_decay"] = decay
