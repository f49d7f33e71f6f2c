# SPDX-License-Identifier: Apache-2.0
"""The classifier head: the last linear layer, its weight W, and the features z that enter it.

The method needs z and W such that `W z + b` is exactly what the model returns as logits. `find_head` finds the layer,
`ClassifierHead.verify` proves it on a real forward, and `ClassifierHead.run` does a forward and hands out logits and z.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# A recomputed W z + b may differ from the layer's own output by rounding alone, relative to sum |W z|.
RELATIVE_TOLERANCE = 1e-4


@dataclass(frozen=True)
class ClassifierHead:
    """A linear classifier head inside a model.

    Args:
        module: the `nn.Linear`, or `nn.Conv2d` with a 1×1 kernel, that makes the logits.
        path: its dotted name in the model, e.g. `"classifier"` or `"classifier.1"`.
    """

    module: nn.Module
    path: str

    @property
    def weight(self) -> Tensor:
        """W, shape (C, D), a view of the parameter: gradients flow into it."""
        return self.module.weight.flatten(1)

    @property
    def bias(self) -> Tensor | None:
        """b, shape (C,), or None."""
        return self.module.bias

    def run(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """One forward of `model`.

        Args:
            model: the model that holds this head.
            inputs: keyword arguments of its forward, without labels.

        Returns:
            logits, shape (N, C), and z, shape (N, D), the input of the head; both attached to the graph.

        Raises:
            RuntimeError: the head did not run exactly once, or its input is not one vector an image.
        """
        with _captured({self.path: self.module}) as calls:
            logits = _logits_of(model(**inputs))
        if len(calls) != 1:
            raise RuntimeError(
                f"the head {self.path!r} ran {len(calls)} times in one forward instead of once. A replaced layer "
                "(reset_classifier), or a forward that was compiled before the hook was set, is the usual cause; "
                "find the head anew or pass another one as head=."
            )
        return logits, _one_vector_per_image(calls[0][1], self.path)

    @torch.no_grad()
    def verify(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Proves on one forward that this layer makes the logits; leaves the model as it was.

        Raises:
            ValueError: the layer's output is not the logits, or `W z + b` is not its output.
        """
        with inference(model):
            problem = _problems(model, [self], inputs)[self.path]
        if problem:
            names = ", ".join(repr(name) for name, _ in _candidates(model)) or "none"
            raise ValueError(
                f"the layer {self.path!r} is not this model's classifier head: {problem}. Linear layers of the same "
                f"width: {names}. Pass the right one as head=."
            )


def find_head(model: nn.Module, head: str | None = None) -> ClassifierHead:
    """Finds the last linear layer of an image classifier.

    Candidates are the linear layers (and 1×1 convolutions) with as many outputs as the model has labels. Where there
    are several (a hidden layer as wide as the number of labels, or two heads), one forward of noise decides: the head
    is the layer whose output is the logits.

    Args:
        model: a transformers image classifier, or a module with a `config.num_labels`.
        head: dotted path of the layer, where it cannot be found.

    Returns:
        The head. Nothing is registered on the model.

    Raises:
        ValueError: the path does not exist or is not linear; no candidate; several, none of which makes the logits.
    """
    if head is not None:
        return _head_at(model, head)
    candidates = _candidates(model)
    if len(candidates) == 1:
        return ClassifierHead(module=candidates[0][1], path=candidates[0][0])
    if not candidates:
        linear = [name for name, module in model.named_modules() if _is_linear(module)]
        raise ValueError(
            f"{type(model).__name__} has no linear layer with {_num_labels(model)} outputs (its config.num_labels). "
            f"Its last linear layers: {', '.join(map(repr, linear[-5:])) or 'none'}. Pass the path of the last linear "
            "layer as head=, or give the model a linear classifier (load_image_classifier wraps timm models)."
        )
    return _head_among(model, candidates)


def _head_at(model: nn.Module, path: str) -> ClassifierHead:
    modules = dict(model.named_modules())
    if path not in modules:
        near = difflib.get_close_matches(path, [name for name in modules if name], n=3, cutoff=0.3)
        raise ValueError(f"head={path!r} is no layer of {type(model).__name__}. Nearest names: {near}.")
    if not _is_linear(modules[path]):
        start = f"{path}." if path else ""
        inside = [name for name, module in modules.items() if name.startswith(start) and _is_linear(module)]
        hint = f" Did you mean {inside[-1]!r}?" if inside else ""
        raise ValueError(f"head={path!r} is a {type(modules[path]).__name__}, not a linear layer.{hint}")
    return ClassifierHead(module=modules[path], path=path)


def _head_among(model: nn.Module, candidates: list[tuple[str, nn.Module]]) -> ClassifierHead:
    names = ", ".join(repr(name) for name, _ in candidates)
    num_labels = _num_labels(model)
    width = "" if num_labels is None else f" with {num_labels} outputs"
    error = f"{type(model).__name__} has several linear layers{width}: {names}."
    heads = [ClassifierHead(module=module, path=name) for name, module in candidates]
    try:
        with torch.no_grad(), inference(model):
            problems = _problems(model, heads, _noise_for(model))
    except Exception as failure:
        raise ValueError(
            f"{error} Trying them out on noise failed ({failure}). Pass the right one as head=."
        ) from failure
    right = [head for head in heads if problems[head.path] is None]
    if len(right) != 1:
        reasons = "; ".join(f"{path!r}: {problem or 'fits'}" for path, problem in problems.items())
        raise ValueError(f"{error} Not exactly one of them makes the logits ({reasons}). Pass the right one as head=.")
    return right[0]


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)


def _num_labels(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    return getattr(config, "num_labels", None) or getattr(model, "num_classes", None)


def _candidates(model: nn.Module) -> list[tuple[str, nn.Module]]:
    num_labels = _num_labels(model)
    return [
        (name, module)
        for name, module in model.named_modules()
        if _is_linear(module) and num_labels in (None, module.weight.shape[0])
    ]


def _logits_of(outputs: Any) -> Tensor:
    if isinstance(outputs, Mapping):
        if "logits" not in outputs:
            raise ValueError(f"the model's output has no logits, only {list(outputs)}: use an image classifier.")
        return outputs["logits"]
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def _one_vector_per_image(z: Tensor, path: str) -> Tensor:
    if z.dim() < 2 or z.numel() != z.shape[0] * max(z.shape[1:]):
        raise RuntimeError(f"the head {path!r} is applied before pooling: its input has the shape {tuple(z.shape)}.")
    return z.flatten(1)


def _problems(model: nn.Module, heads: list[ClassifierHead], inputs: Mapping[str, Any]) -> dict[str, str | None]:
    """For each layer the reason why one forward shows that it is not the head; None where it is."""
    with _captured({head.path: head.module for head in heads}) as calls:
        logits = _logits_of(model(**inputs))
    problems = {head.path: _why_not_head(head, [c for c in calls if c[0] == head.path], logits) for head in heads}
    for head in heads:
        if problems[head.path] is None and not logits.any() and not _reaches_logits(head, model, inputs):
            problems[head.path] = "its output is not the logits"
    return problems


def _reaches_logits(head: ClassifierHead, model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether noise in place of the layer's output comes out as the logits: zeros agree with any other zeros."""
    noise = []

    def replaced(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        noise.append(torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output))
        return noise[0]

    handle = head.module.register_forward_hook(replaced)
    try:
        logits = _logits_of(model(**inputs))
    finally:
        handle.remove()
    return torch.equal(noise[0].flatten(1), logits)


def _why_not_head(head: ClassifierHead, calls: list[tuple[str, Tensor, Tensor]], logits: Tensor) -> str | None:
    """The reason why the calls of this layer show that it is not the head; None where it is."""
    if len(calls) != 1:
        return f"it ran {len(calls)} times in one forward"
    _, z, output = calls[0]
    if z.dim() < 2 or z.numel() != z.shape[0] * max(z.shape[1:]):
        return f"it is applied before pooling, to an input of shape {tuple(z.shape)}"
    output = output.flatten(1)
    if output.shape != logits.shape:
        return f"its output has the shape {tuple(output.shape)}, the logits {tuple(logits.shape)}"
    # a layer whose output is changed in place afterwards shares its memory and fails the last check
    if output.data_ptr() != logits.data_ptr() and not torch.equal(output, logits):
        return f"its output is not the logits (largest difference {(output - logits).abs().max().item():.3g})"
    # autocast and half precision round the layer's own output; the check allows that rounding and nothing else
    tolerance = max(RELATIVE_TOLERANCE, 4 * torch.finfo(output.dtype).eps, 4 * torch.finfo(z.dtype).eps)
    rationale = head.weight.double() * z.flatten(1).double().unsqueeze(1)
    recomputed = rationale.sum(-1) + (0 if head.bias is None else head.bias.double())
    error = (recomputed - output.double()).abs()
    if not (error <= tolerance * rationale.abs().sum(-1) + tolerance).all():
        return f"W z + b differs from its output by up to {error.max().item():.3g}"
    return None


@contextmanager
def _captured(modules: Mapping[str, nn.Module]) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
    """Records (name, input, output) of every call of the modules; the hooks are gone afterwards.

    Hooks that stay would be copied by deepcopy and refused by pickle (model copies for averaging, `mp_spawn`).
    """
    calls: list[tuple[str, Tensor, Tensor]] = []
    handles = [
        module.register_forward_hook(
            lambda _, args, kwargs, output, name=name: calls.append((name, *args, *kwargs.values(), output)),
            with_kwargs=True,
        )
        for name, module in modules.items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """`model.eval()` for the block; afterwards every module has the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _noise_for(model: nn.Module) -> dict[str, Tensor]:
    """Two images of noise in the size that the model's config names, 224 pixels where it names none."""
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError("it has no config that names the size of its images")
    size = getattr(config, "image_size", None)
    channels = getattr(config, "num_channels", 3)
    timm_config = getattr(config, "pretrained_cfg", None)
    if size is None and timm_config:
        channels, *size = timm_config["input_size"]
        made_with = getattr(config, "model_args", None) or {}
        size, channels = made_with.get("img_size", size), made_with.get("in_chans", channels)
    if size is None:
        size = 224
    height, width = (size, size) if isinstance(size, int) else size
    parameter = next(model.parameters())
    noise = torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0))
    return {getattr(model, "main_input_name", "pixel_values"): noise.to(parameter.device, parameter.dtype)}
