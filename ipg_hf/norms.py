# SPDX-License-Identifier: Apache-2.0
"""Batch norm under guidance: one function in the pair forward, the task forward and at inference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.utils import logging

logger = logging.get_logger(__name__)


def norm_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that normalise by running statistics (batch norm of any kind) at inference."""
    kind = nn.modules.batchnorm._NormBase
    return [layer for layer in model.modules() if isinstance(layer, kind) and layer.running_mean is not None]


def warn_of_batch_statistics(model: nn.Module) -> None:
    """Warns where a model normalises by its batch's statistics in training and by others at inference."""
    if norm_layers(model):
        logger.warning(
            f"{type(model).__name__} has batch-norm layers that hold statistics, and freeze_norm is off: what the "
            "pairs teach under the running statistics may not reach the task forward, which uses its batch's. Set "
            "freeze_norm=True, or running_norm=True, which goes on to update the statistics, from scratch."
        )


class RunningNorm:
    """Batch-norm layers that normalise by their running statistics in training too, and go on to update them (ours).

    The statistics are those that the pair forward has and inference will have, so that the three are one function; no
    gradient goes through them. Each optimizer step ends by moving them towards the mean and the variance of what all
    its rows, of all micro-batches and processes, brought to the layer:

        running ← (1 - m) running + m (mean, or unbiased variance), m the layer's momentum,

    as torch does after each forward; here the result does not depend on how the rows were split. Where a step brings
    one value a channel (one row without spatial extent), the mean alone moves; torch refuses such a batch.
    """

    def __init__(self):
        self._sums: dict[nn.Module, Tensor] = {}

    def clear(self) -> None:
        """Forgets the micro-batches of a step that was not ended."""
        self._sums.clear()

    @contextmanager
    def collecting(self, model: nn.Module) -> Iterator[None]:
        """Counts what enters the layers of the bare model in the block, the task forward of a micro-batch."""
        layers = [layer for layer in norm_layers(model) if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
        handles = [layer.register_forward_pre_hook(self._collect) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _collect(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        values = args[0].detach().transpose(0, 1).flatten(1)
        # around the running mean, so that the difference of squares keeps its digits
        values = values.to(torch.promote_types(values.dtype, torch.float32)) - layer.running_mean[:, None]
        count = values.new_full((len(values),), values.shape[1])
        sums = torch.stack([count, values.sum(1), values.square().sum(1)])
        self._sums[layer] = self._sums[layer] + sums if layer in self._sums else sums

    @torch.no_grad()
    def end_step(self, accelerator: Accelerator) -> None:
        """Moves the statistics on, once the last micro-batch of an optimizer step has gone forward."""
        layers, sums = [*self._sums], [*self._sums.values()]
        self._sums.clear()
        if accelerator.num_processes > 1 and sums:
            together = accelerator.reduce(torch.cat([part.flatten() for part in sums]), "sum")  # one message
            parts = together.split([part.numel() for part in sums])
            sums = [part.view_as(own) for part, own in zip(parts, sums, strict=True)]
        for layer, (count, total, squares) in zip(layers, sums, strict=True):
            shift = total / count
            variance = (squares - total * shift) / (count - 1)
            variance = torch.where(count > 1, variance, layer.running_var)  # one value has none: the mean alone moves
            layer.num_batches_tracked.add_(1)
            momentum = layer.momentum
            if momentum is None:  # torch's cumulative mean
                momentum = torch.ones_like(layer.running_mean[0]) / layer.num_batches_tracked
            layer.running_var.add_(momentum * (variance - layer.running_var))
            layer.running_mean.add_(momentum * shift)
