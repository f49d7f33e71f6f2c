# SPDX-License-Identifier: Apache-2.0
"""The gradients of a model: which parameters get one, their norm, a factor on them, their mean over processes."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from .names import nearest

BUCKET_BYTES = 25 * 2**20  # of gradients in one message, as in DistributedDataParallel


def gradient_norm(model: nn.Module) -> Tensor:
    """The 2-norm of all gradients of a model together: a float32 scalar (float64 for float64 parameters).

    Parameters without a gradient count as zero.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    gradients = [grad if grad.dtype in (torch.float32, torch.float64) else grad.float() for grad in gradients]
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def scale_gradients(model: nn.Module, factor: Tensor) -> None:
    """Multiplies all gradients of a model by a scalar tensor, in place."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    # every process has the whole factor, so scaling its shards scales the whole gradient
    torch._foreach_mul_([g.to_local() if isinstance(g, DTensor) else g for g in gradients], factor)


def average_gradients(model: nn.Module, accelerator: Accelerator) -> None:
    """Replaces each gradient by its mean over all processes, in place. FSDP2 has reduced its shards already.

    The gradients travel in buckets: each message has a fixed cost, and a bucket is a copy, so its size is bounded.
    """
    buckets: list[list[Tensor]] = []
    size = 0
    for parameter in model.parameters():
        gradient = parameter.grad
        if gradient is None or isinstance(gradient, DTensor):
            continue
        size += gradient.nbytes
        if not buckets or buckets[-1][0].dtype != gradient.dtype or size > BUCKET_BYTES:
            buckets.append([])
            size = gradient.nbytes
        buckets[-1].append(gradient)
    for bucket in buckets:
        means = accelerator.reduce(torch.cat([gradient.flatten() for gradient in bucket]), "mean")
        for gradient, mean in zip(bucket, means.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def parameters_matching(model: nn.Module, patterns: Sequence[str] | None) -> set[str] | None:
    """Names of the parameters that match one of the patterns; `None`, which stands for all, without patterns.

    Args:
        model: the model.
        patterns: regular expressions. Each must match a parameter's whole name, or its start up to a dot:
            `"classifier"`, `"vit.layers.1"` (not layer 10), `"vit.layers.1[01]"`, `".*norm"`.

    Raises:
        ValueError: a pattern matches no parameter, or only frozen ones.
    """
    if patterns is None:
        return None
    named = dict(model.named_parameters(remove_duplicate=False))
    chosen: set[str] = set()
    for pattern in patterns:
        matching = re.compile(rf"(?:{pattern})(?:\.|$)")
        found = [name for name in named if matching.match(name)]
        if not found:
            raise ValueError(
                f"corrective_layers: {pattern!r} matches the name, or the start of the name, of no parameter of "
                f"{type(model).__name__}.{nearest(pattern, _starts(named))}"
            )
        if not any(named[name].requires_grad for name in found):
            raise ValueError(
                f"corrective_layers: {pattern!r} matches frozen parameters only ({', '.join(map(repr, found[:3]))}). "
                "Unfreeze them, or choose others."
            )
        chosen.update(found)
    return chosen


def _starts(names: Collection[str]) -> set[str]:
    """The names themselves, and each of their starts up to a dot."""
    parts = [name.split(".") for name in names]
    return {".".join(words[:count]) for words in parts for count in range(1, len(words) + 1)}


def check_optimizer(optimizer: Any, model: nn.Module) -> None:
    """Raises a ValueError if an optimizer was made before layers of the model were replaced: it would not train these.

    Args:
        optimizer: the optimizer, or None. It may have parameters besides the model's, or lack some, but not both.
        model: the model. Nothing is said of a sharded one, whose parameters are others than before.
    """
    if optimizer is None or isinstance(model, FSDPModule):
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if missing and held - {id(parameter) for parameter in model.parameters()}:
        names = ", ".join(map(repr, missing[-2:]))
        raise ValueError(
            f"the optimizer does not have {names}, but parameters that are no longer in the model: make the optimizer "
            "after the layer was replaced, or set trainer.optimizer = None before train()."
        )


@contextmanager
def only_gradients_of(model: nn.Module, names: Collection[str] | None) -> Iterator[None]:
    """Within the block, only the named parameters require gradients; all of them if `names` is None.

    No graph is made below the lowest of them, and no backward runs there. FSDP2 decides by itself which of its shards
    have gradients, so there the gradients of the other parameters are made and dropped.

    Args:
        model: the model, without gradients when the block begins.
        names: names of parameters, from [`parameters_matching`].
    """
    others = []
    if names is not None:
        every = dict(model.named_parameters(remove_duplicate=False))
        kept = {id(every[name]) for name in names}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in kept]
    is_sharded = isinstance(model, FSDPModule)
    try:
        for parameter in others:
            parameter.requires_grad_(is_sharded)
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
            if is_sharded:
                parameter.grad = None
