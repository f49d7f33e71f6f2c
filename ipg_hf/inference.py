# SPDX-License-Identifier: Apache-2.0
"""A forward as at inference: the mode it runs in, and the logits in what a model returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def logits_of(outputs: Any) -> Tensor:
    """The logits, shape (N, C), in what a classifier returns without labels.

    That is the entry `logits` of a mapping, else its first matrix (PP-LCNet has its logits in `last_hidden_state`); the
    first entry of a tuple; a tensor itself.

    Raises:
        ValueError: there is none.
    """
    if isinstance(outputs, Mapping):
        if "logits" in outputs:
            return outputs["logits"]
        matrices = [value for value in outputs.values() if isinstance(value, Tensor) and value.dim() == 2]
        if not matrices:
            raise ValueError(f"the model's output has no logits, only {list(outputs)}: use an image classifier.")
        return matrices[0]
    return outputs if isinstance(outputs, Tensor) else outputs[0]


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """`model.eval()` for the block; afterwards every module has the mode it had.

    By way of `train()`: LeViT and others keep what they compute of their parameters at inference, graph and all, until
    they are set to training again. A forward with gradients needs a block of its own.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
