# SPDX-License-Identifier: Apache-2.0
"""All gradients of a model together: their norm, a factor on them, their mean over processes."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

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
    # a factor that every process has whole scales a shard as it scales the whole
    torch._foreach_mul_([g.to_local() if isinstance(g, DTensor) else g for g in gradients], factor)


def average_gradients(model: nn.Module, accelerator: Accelerator) -> None:
    """Makes each gradient the mean over all processes, in place; those that FSDP2 has reduced are left alone.

    They travel in buckets: a message has a cost of its own, and a bucket is a copy, so that its size is bounded.
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
