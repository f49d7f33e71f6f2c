# SPDX-License-Identifier: Apache-2.0
"""Batch norm under guidance: the pair forward, the task forward and inference compute the same function (R3)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.utils import logging

logger = logging.get_logger(__name__)


def norm_layers(model: nn.Module) -> list[nn.Module]:
    """Lists the layers of a model that normalise with running statistics at inference: batch norm of any kind."""
    kind = nn.modules.batchnorm._NormBase
    return [layer for layer in model.modules() if isinstance(layer, kind) and layer.running_mean is not None]


def warn_of_batch_statistics(model: nn.Module) -> None:
    """Warns if a model uses the batch's statistics in training and running statistics at inference."""
    if norm_layers(model):
        logger.warning(
            f"{type(model).__name__} has batch-norm layers with running statistics, and freeze_norm is off. The pair "
            "forward uses the running statistics, but the task forward uses those of its batch, so the model may stay "
            "dependent on the spurious attribute. Set freeze_norm=True for a pretrained model. Set running_norm=True, "
            "which keeps updating the statistics, for a model trained from scratch."
        )


class RunningNorm:
    """Updates the running statistics of batch-norm layers that also normalise with them in training (ours).

    The pair forward and inference use the same running statistics, so all three forwards compute one function. No
    gradient flows through the statistics. At the end of each optimizer step they move towards the mean and the variance
    of the layer's inputs, over all rows of all micro-batches and processes of the step:

        running ← (1 - m)·running + m·(mean, or unbiased variance), with the layer's momentum m.

    torch does the same after each forward. Here the result does not depend on how the rows were split. If a step has
    one value a channel (one row without height and width), only the mean moves; torch refuses such a batch.
    """

    def __init__(self):
        self._sums: dict[nn.Module, Tensor] = {}

    def clear(self) -> None:
        """Drops the sums of a step that did not end."""
        self._sums.clear()

    @contextmanager
    def collecting(self, model: nn.Module) -> Iterator[None]:
        """Adds up the inputs of the batch-norm layers within the block.

        Args:
            model: the model, not wrapped. The block is the task forward of one micro-batch.
        """
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
        # relative to the running mean: the difference of squares would lose digits for a large mean
        values = values.to(torch.promote_types(values.dtype, torch.float32)) - layer.running_mean[:, None]
        count = values.new_full((len(values),), values.shape[1])
        sums = torch.stack([count, values.sum(1), values.square().sum(1)])
        self._sums[layer] = self._sums[layer] + sums if layer in self._sums else sums

    @torch.no_grad()
    def end_step(self, accelerator: Accelerator) -> None:
        """Updates the running statistics. Call it after the last task forward of an optimizer step.

        Args:
            accelerator: sums over the processes.
        """
        layers, sums = [*self._sums], [*self._sums.values()]
        self._sums.clear()
        if accelerator.num_processes > 1 and sums:
            together = accelerator.reduce(
                torch.cat([part.flatten() for part in sums]), "sum"
            )  # one message for all layers
            parts = together.split([part.numel() for part in sums])
            sums = [part.view_as(own) for part, own in zip(parts, sums, strict=True)]
        for layer, (count, total, squares) in zip(layers, sums, strict=True):
            shift = total / count
            variance = (squares - total * shift) / (count - 1)
            variance = torch.where(count > 1, variance, layer.running_var)  # one value has no variance
            layer.num_batches_tracked.add_(1)
            momentum = layer.momentum
            if momentum is None:  # torch: cumulative mean
                momentum = torch.ones_like(layer.running_mean[0]) / layer.num_batches_tracked
            layer.running_var.add_(momentum * (variance - layer.running_var))
            layer.running_mean.add_(momentum * shift)
