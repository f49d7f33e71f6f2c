# SPDX-License-Identifier: Apache-2.0
"""Which parameters the corrective gradient moves."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.distributed.fsdp import FSDPModule


def parameters_matching(model: nn.Module, patterns: Sequence[str] | None) -> set[str] | None:
    """Names of the parameters that patterns choose; `None`, for all, without patterns.

    Args:
        model: the model.
        patterns: regular expressions, each of which must match a parameter's whole name or the start of it up to a
            dot: `"classifier"`, `"vit.layers.1"` (not layer 10), `"vit.layers.1[01]"`, `".*norm"`.

    Raises:
        ValueError: a pattern matches nothing, or parameters that are all frozen.
    """
    if patterns is None:
        return None
    named = dict(model.named_parameters(remove_duplicate=False))
    chosen: set[str] = set()
    for pattern in patterns:
        matching = re.compile(rf"(?:{pattern})(?:\.|$)")
        found = [name for name in named if matching.match(name)]
        if not found:
            near = difflib.get_close_matches(pattern, list(named), n=3, cutoff=0.0)
            raise ValueError(
                f"corrective_layers: {pattern!r} is the name or the start of no parameter of {type(model).__name__}. "
                f"Nearest names: {', '.join(map(repr, near))}."
            )
        if not any(named[name].requires_grad for name in found):
            raise ValueError(
                f"corrective_layers: {pattern!r} chooses frozen parameters alone ({', '.join(map(repr, found[:3]))}). "
                "Unfreeze them, or choose others."
            )
        chosen.update(found)
    return chosen


@contextmanager
def moving_only(model: nn.Module, names: Collection[str] | None) -> Iterator[None]:
    """Gradients of the named parameters alone for the block, which begins without any; of all where `names` is None.

    No graph is made below the lowest of them, and no backward runs there. FSDP2 decides by itself which of its shards
    have gradients: there the others' are made and dropped.
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
