# SPDX-License-Identifier: Apache-2.0
"""Runs a model as at inference: the mode of its modules, and the logits in its output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def logits_of(outputs: Any) -> Tensor:
    """Returns the logits, shape (N, C), from the output of a classifier that was called without labels.

    Args:
        outputs: the output. In a mapping the logits are the entry `logits`, else the first matrix (PP-LCNet returns
            its logits as `last_hidden_state`). In a tuple they are the first entry. A tensor is the logits itself.

    Raises:
        ValueError: a mapping has neither the entry `logits` nor a matrix.
    """
    if isinstance(outputs, Mapping):
        if "logits" in outputs:
            return outputs["logits"]
        matrices = [value for value in outputs.values() if isinstance(value, Tensor) and value.dim() == 2]
        if not matrices:
            raise ValueError(f"the output of the model has no logits, only {list(outputs)}: use an image classifier.")
        return matrices[0]
    return outputs if isinstance(outputs, Tensor) else outputs[0]


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Within the block, the model is in `eval()` mode. After it, every module has its former mode.

    Use a new block for each forward with gradients: some models (LeViT) cache what they compute from their parameters
    in `eval()` mode, with its graph. Entering the block clears the cache.

    Args:
        model: the model.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.train()  # clears such a cache
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
