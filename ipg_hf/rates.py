# SPDX-License-Identifier: Apache-2.0
"""Learning rates by layer: of each layer a fixed factor times that of the layer above it, and one of the head."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import nn


def layer_depths(model: nn.Module) -> dict[str, int]:
    """The layer of each parameter, counted from the input: parameter name -> 0, 1, ...

    The first of these rules that fits (ours, as BEiT and MAE do it for a ViT; the first is timm's `layer_decay`):

    1. A timm model, also inside another module: timm's own groups (its `group_matcher`).
    2. A model with blocks: each block is a layer, in the order of registration. The blocks are the items of the list
       of modules with the most parameters; if an item holds a list itself, it is a stage, and the items of that list
       are the blocks. What a stage has before its blocks goes with its first, what it has after them with its last.
    3. Any other: each module that holds a parameter of two or more dimensions, together with the biases and norms
       after it.

    For 1 and 2, all that comes before is the lowest layer (embeddings, stem) and all that comes after is the highest
    (the last norm, the classifier). Frozen parameters count too.

    Args:
        model: the model, not wrapped. Adapters and a classifier that PEFT copied are in the layer where they stand.
    """
    inside = _timm_depths(model) or _block_depths(model)
    if not inside:
        return _depths_by_module(model)
    depths, depth = {}, 0
    for name, _ in model.named_parameters():
        # the blocks are registered one after the other: what is outside stands before or after all of them
        depth = inside[name] if name in inside else depth if depth == 0 else max(inside.values()) + 1
        depths[name] = depth
    return depths


def layer_factors(model: nn.Module, decay: float, head: Collection[str] = ()) -> dict[str, float]:
    """The factor on the learning rate of each parameter: parameter name -> `decay` ** layers above it.

    Args:
        model: the model, not wrapped.
        decay: in (0, 1].
        head: names of parameters that are no layer, since they have a rate of their own; they are left out.

    Raises:
        ValueError: `decay` is below 1, and all parameters are in one layer.
    """
    depths = {name: depth for name, depth in layer_depths(model).items() if name not in head}
    highest = max(depths.values(), default=0)
    if decay < 1 and len(set(depths.values())) < 2:
        raise ValueError(
            f"layer_lr_decay={decay} has no effect: all parameters of {type(model).__name__} but those with a rate of "
            "their own are in one layer. Leave it at 1.0."
        )
    return {name: decay ** (highest - depth) for name, depth in depths.items()}


def set_rates(
    optimizer: torch.optim.Optimizer, model: nn.Module, decay: float, head: Collection[str], head_rate: float | None
) -> None:
    """Splits the groups of a new optimizer so that each layer, and the head, has its learning rate.

    All else of a group stays, e.g. its weight decay. The first group, whose rate `Trainer` logs, is one whose factor
    is 1; where no trainable parameter has it, this group is empty.

    Args:
        optimizer: an optimizer that has made no step. All its parameters have the full learning rate.
        model: the model, not wrapped, whose trainable parameters the optimizer has.
        decay: the factor between two layers, in (0, 1].
        head: names of the head's parameters, if `head_rate` is given.
        head_rate: their learning rate.

    Raises:
        ValueError: the optimizer does not have each trainable parameter exactly once in its groups.
    """
    factors = layer_factors(model, decay, head)
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if len(held) != len(names) or {*held} != {*names}:
        raise ValueError(
            f"layer_lr_decay and head_learning_rate need an optimizer with all trainable parameters in its groups, but "
            f"{type(optimizer).__name__} has groups of its own: leave the two out, or choose another optim."
        )
    groups, full = [], []
    for group in optimizer.param_groups:
        by_factor: dict[float | None, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_factor.setdefault(factors.get(names[parameter]), []).append(parameter)
        for factor, parameters in by_factor.items():
            rate = head_rate if factor is None else group["lr"] * factor
            (full if factor == 1 else groups).append({**group, "params": parameters, "lr": rate})
    full = full or [{**optimizer.param_groups[0], "params": []}]
    optimizer.param_groups.clear()
    for group in full + groups:
        optimizer.add_param_group(group)


def _timm_depths(model: nn.Module) -> dict[str, int]:
    from timm.models import group_parameters  # slow to import

    for path, module in model.named_modules():
        if hasattr(module, "group_matcher"):
            depths = group_parameters(module, module.group_matcher(coarse=False), reverse=True)
            return {f"{path}.{name}" if path else name: depth + 1 for name, depth in depths.items()}
    return {}


def _block_depths(model: nn.Module) -> dict[str, int]:
    lists = list(_outermost_lists(model, ""))
    depths: dict[str, int] = {}
    count = 0
    for path, stage in _items(*max(lists, key=lambda found: _size(found[1]))) if lists else ():
        inner = [(path, stage), *((f"{path}.{name}", child) for name, child in stage.named_children())]
        inner = [found for found in inner if _is_list(found[1])]
        blocks = _items(*max(inner, key=lambda found: _size(found[1]))) if inner else [(path, stage)]
        numbers = {f"{start}.": count + i for i, (start, _) in enumerate(blocks, 1)}
        depth = count + 1
        for name, _ in stage.named_parameters(prefix=path):
            depth = next((number for start, number in numbers.items() if name.startswith(start)), depth)
            depths[name] = depth
        count += len(blocks)
    return depths


def _depths_by_module(model: nn.Module) -> dict[str, int]:
    depths, depth = {}, -1
    for path, module in model.named_modules():
        own = dict(module.named_parameters(prefix=path, recurse=False))
        depth += depth < 0 < len(own) or any(parameter.dim() > 1 for parameter in own.values())
        depths |= dict.fromkeys(own, depth)
    return {name: depths[name] for name, _ in model.named_parameters()}


def _outermost_lists(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    if _is_list(module):
        yield path, module
        return
    for name, child in module.named_children():
        yield from _outermost_lists(child, f"{path}.{name}" if path else name)


def _items(path: str, modules: nn.Module) -> list[tuple[str, nn.Module]]:
    """The items of a list that have parameters, with their paths."""
    items = [(f"{path}.{name}" if path else name, child) for name, child in modules.named_children()]
    return [(name, child) for name, child in items if _size(child)]


def _is_list(module: nn.Module) -> bool:
    """Whether a module is a list of blocks or stages: no chain of single layers, and no chain of different parts."""
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return False
    items = [child for _, child in _items("", module)]
    alike = isinstance(module, nn.ModuleList) or (len(items) > 1 and len({type(child) for child in items}) == 1)
    return bool(items) and alike and all(any(True for _ in child.children()) for child in items)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
