# SPDX-License-Identifier: Apache-2.0
"""Watched forwards: what enters a layer, and the trial that proves which layers make a model's logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# A recomputed W z + b may differ from the layer's own output by rounding alone, relative to sum |W z|.
RELATIVE_TOLERANCE = 1e-4


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


@contextmanager
def hooked(layers: Mapping[str, nn.Module], hook: Callable[[str, tuple, dict, Tensor], Any]) -> Iterator[None]:
    """Forward hooks `hook(path, args, kwargs, output)` on layers, given by path, for the block.

    Hooks that stay would be copied by deepcopy and refused by pickle (model copies for averaging, `mp_spawn`).
    """
    handles = [
        module.register_forward_hook(
            lambda _, args, kwargs, output, path=path: hook(path, args, kwargs, output), with_kwargs=True
        )
        for path, module in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def is_pooled(z: Tensor) -> bool:
    """Whether a layer's input is one vector an image: shape (N, D), (N, D, 1, 1) or (N, 1, D)."""
    return z.dim() >= 2 and z.numel() == z.shape[0] * max(z.shape[1:])


@dataclass(frozen=True)
class Trial:
    """A forward in which noise took the place of each layer's output.

    Args:
        layers: the layers by path.
        calls: by path (z, output, noise) of each call.
        logits: what came out, shape (N, C).
        probe: shape (N, C), random.
        shares: by path and call the gradient of the sum of logits · `probe` by the noise; None where there is none.
        others: the trainable parameters that reach the logits by another way than through the layers.
    """

    layers: Mapping[str, nn.Module]
    calls: Mapping[str, list[tuple[Tensor, Tensor, Tensor]]]
    logits: Tensor
    probe: Tensor
    shares: Mapping[str, list[Tensor | None]]
    others: list[str]

    def reaching(self) -> tuple[str, ...]:
        """Paths of the layers whose output reaches the logits."""
        return tuple(path for path, shares in self.shares.items() if any(share is not None for share in shares))

    def problem(self, paths: Sequence[str]) -> str | None:
        """Why the layers at these paths together are not the head; None where their mean is proven to be the logits."""
        for path in paths:
            problem = self._problem_of(path)
            if problem:
                return problem if len(paths) == 1 else f"{path!r}: {problem}"
        if self.others:
            return f"the logits depend on other layers too ({', '.join(map(repr, self.others[-3:]))})"
        if self.logits.is_meta:
            return None
        shares = torch.stack([self.shares[path][0].flatten(1) for path in paths])
        noise = torch.stack([self.calls[path][0][2].detach().flatten(1).to(self.logits.dtype) for path in paths])
        # sums of a few numbers of size one, in the precision of the layer and of the model's own mean
        tolerance = 16 * max(torch.finfo(value.dtype).eps for value in (self.calls[paths[0]][0][2], self.logits))
        error = (noise.mean(0) - self.logits).abs().max().item()
        if error > tolerance or (shares - self.probe / len(paths)).abs().max() > tolerance:
            what = "its output is not the logits" if len(paths) == 1 else "the logits are not the mean of their outputs"
            return f"{what} (noise in its place comes out changed, largest difference {error:.3g})"
        return None

    def _problem_of(self, path: str) -> str | None:
        rows, module = self.calls[path], self.layers[path]
        if not rows:
            return (
                "it ran 0 times in one forward (it was replaced, or the model uses its weight without calling it, or "
                "the model was compiled before)"
            )
        if len(rows) > 1:
            return f"it ran {len(rows)} times in one forward"
        z, output, _ = rows[0]
        if not is_pooled(z):
            return f"it is applied before pooling, to an input of shape {tuple(z.shape)}"
        output = output.flatten(1)
        if output.shape != self.logits.shape:
            return f"its output has the shape {tuple(output.shape)}, the logits {tuple(self.logits.shape)}"
        if self.shares[path][0] is None:
            return "its output is not the logits: it does not reach them"
        if output.is_meta:
            return None
        # autocast and half precision round the layer's own output; the check allows that rounding and nothing else
        tolerance = max(RELATIVE_TOLERANCE, 4 * torch.finfo(output.dtype).eps, 4 * torch.finfo(z.dtype).eps)
        rationale = module.weight.detach().flatten(1).double() * z.detach().flatten(1).double().unsqueeze(1)
        recomputed = rationale.sum(-1) + (0 if module.bias is None else module.bias.detach().double())
        error = (recomputed - output.double()).abs()
        if not (error <= tolerance * rationale.abs().sum(-1) + tolerance).all():
            return f"W z + b differs from its output by up to {error.max().item():.3g}"
        return None


@torch.enable_grad()
def try_layers(model: nn.Module, layers: Mapping[str, nn.Module], inputs: Mapping[str, Any]) -> Trial:
    """One forward in inference mode in which the outputs of the layers are replaced by noise.

    The noise has a generator of its own; the model, its gradients included, stays as it was.
    """
    generator = torch.Generator().manual_seed(0)
    calls: dict[str, list] = {path: [] for path in layers}

    def replaced(path: str, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        noise = torch.randn(output.shape, generator=generator).to(output).requires_grad_()
        calls[path].append((*args, *kwargs.values(), output.detach().clone(), noise))
        return noise * 1  # no leaf of the graph, so that the model may change it in place

    with inference(model), hooked(layers, replaced):
        logits = logits_of(model(**inputs))
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    leaves = [noise for rows in calls.values() for *_, noise in rows]
    probe = torch.randn(logits.shape, generator=generator).to(logits)
    gradients: Sequence[Tensor | None] = [None] * (len(leaves) + len(parameters))
    if logits.requires_grad:
        gradients = torch.autograd.grad(logits, [*leaves, *parameters.values()], probe, allow_unused=True)
    remaining = iter(gradients)
    shares = {path: [next(remaining) for _ in rows] for path, rows in calls.items()}
    # an all-zero gradient is that of a parameter multiplied by zero, as done to please data parallelism
    others = [
        name
        for name, gradient in zip(parameters, remaining, strict=True)
        if gradient is not None and (gradient.is_meta or gradient.any())
    ]
    return Trial(layers, calls, logits.detach(), probe, shares, others)
