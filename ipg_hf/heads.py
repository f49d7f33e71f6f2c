# SPDX-License-Identifier: Apache-2.0
"""The classifier head: the last linear layer or layers, their weight W, and the features z that enter them.

A rationale needs z and W such that `W z + b` is exactly what the model returns as logits. `find_head` finds the layer,
`ClassifierHead.verify` proves it on a real forward, and `ClassifierHead.run` runs a forward and returns logits and z.

Some models return the mean of n linear heads, each with its own features (distilled DeiT and LeViT, CrossViT, RepViT,
...). This mean is linear too. Let z be the concatenation of the z_i, and W the concatenation of the W_i / n: then
W z + b is still the logits, and the rationale W ⊙ z is the concatenation of the heads' rationales, divided by n (our
reading: the paper has one head).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from .inference import inference, logits_of
from .names import nearest

# A recomputed W z + b may differ from the layer's own output by rounding alone, relative to sum |W z|.
RELATIVE_TOLERANCE = 1e-4

# Models without a head that can be proven -> the reason, and what to do.
WAYS_OUT = {
    "PeftModel": "Where an adapter is in the head, train a copy of the head instead: modules_to_save=['classifier'].",
    "VOLO": "VOLO adds the maximum over its tokens of an auxiliary head: build it with use_aux_head=False.",
    "EfficientViM": "EfficientViM mixes the logits of its stages by learned weights: choose another architecture.",
    "AttentionPool2d": "Its classifier stands inside the attention pooling: use a *_clip_gap variant.",
    "RotAttentionPool2d": "Its classifier stands inside the attention pooling: use a *_clip_gap variant.",
    "ShieldGemma2ForImageClassification": "Its classes are words of a language model: fine-tune its vision tower.",
}


@dataclass(frozen=True)
class ClassifierHead:
    """The linear classifier head of a model, or its several heads, if the model returns their mean.

    Args:
        modules: the layers that make the logits, each an `nn.Linear` or an `nn.Conv2d` with a 1×1 kernel.
        paths: the dotted name of each layer in the model, e.g. `("classifier.1",)`.
    """

    modules: tuple[nn.Module, ...]
    paths: tuple[str, ...]

    @property
    def path(self) -> str | tuple[str, ...]:
        """The argument `head` that makes `find_head` return this head: the name of its layer, or the names of all."""
        return self.paths[0] if len(self.paths) == 1 else self.paths

    @property
    def kind(self) -> str:
        """`"linear"` or `"convolution"`; `"mean of 2 linear"` where two heads are averaged."""
        kind = "convolution" if isinstance(self.modules[0], nn.Conv2d) else "linear"
        return kind if len(self.modules) == 1 else f"mean of {len(self.modules)} {kind}"

    @property
    def weight(self) -> Tensor:
        """W, shape (C, D), through which gradients flow into the parameters.

        For n heads it is [W_1, ..., W_n] / n, with D = sum of D_i. A sharded parameter (FSDP2) is gathered: read W
        after the forward, on all processes.
        """
        weights = [_whole(module.weight).flatten(1) for module in self.modules]
        return weights[0] if len(weights) == 1 else torch.cat(weights, 1) / len(weights)

    @property
    def bias(self) -> Tensor | None:
        """b, shape (C,), or None. For n heads it is the mean of their biases."""
        biases = [_whole(module.bias) for module in self.modules if module.bias is not None]
        if len(self.modules) == 1:
            return biases[0] if biases else None
        return torch.stack(biases).sum(0) / len(self.modules) if biases else None

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The modules by path."""
        return dict(zip(self.paths, self.modules, strict=True))

    def run(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Runs one forward of `model`, eagerly ([`CompiledRun`] runs a compiled one).

        Args:
            model: the model that holds this head.
            inputs: keyword arguments of its forward, without labels.

        Returns:
            logits, shape (N, C), and z, shape (N, D), the input of the head; both attached to the graph.

        Raises:
            RuntimeError: the head did not run exactly once, or its input is not one vector an image.
        """
        calls: dict[str, list[Tensor]] = {path: [] for path in self.paths}
        with hooked(self.layers, lambda path, args, kwargs, _: calls[path].extend((*args, *kwargs.values()))):
            logits = logits_of(model(**inputs))
        return logits, features_of(calls)

    def verify(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Proves on one forward that only this head makes the logits; leaves the model as it was.

        Noise replaces the output of each layer. It must come out as the logits (for several heads, as their mean), and
        no trainable parameter may reach the logits by another way. This also proves freshly initialised and
        zero-initialised heads, and adapters that start at zero. `W z + b` must equal the layer's own output. The meta
        device holds no numbers: there, the ways to the logits and the shapes are proven.

        Args:
            model: the model, eager (not compiled). Nothing is proven of a sharded model: it was whole when it was made.
            inputs: keyword arguments of its forward, without labels; two images are enough.

        Raises:
            ValueError: the layer's output is not the logits, or `W z + b` is not its output.
        """
        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            return
        problem = check_layers(model, self.layers, inputs).problem(self.paths)
        if problem:
            others = [repr(name) for name, _ in head_candidates(model) if name not in self.paths]
            raise ValueError(
                f"{_quoted(self.paths)} is not this model's classifier head: {problem}. Other linear layers of the "
                f"same width: {', '.join(others) or 'none'}. {_way_out(model)}"
            )


class CompiledRun:
    """A model's forward, compiled as one graph that gives the logits and, of a head, its input z.

    Compiled code does not see a hook that is set after its first call: the hook would silently never run. So the hooks
    are set here, once, and stay until `close`; z is an output of the graph.

    Args:
        head: the head whose input is wanted; None gives the logits only, with None for z.
        **options: arguments of `torch.compile`.
    """

    def __init__(self, head: ClassifierHead | None, **options: Any):
        layers = {} if head is None else head.layers
        self._calls: dict[str, list[Tensor]] = {path: [] for path in layers}
        self._is_open = False  # other forwards of the model go by
        self._handles = [
            layer.register_forward_pre_hook(partial(self._seen, path), with_kwargs=True)
            for path, layer in layers.items()
        ]
        self._compiled = torch.compile(self._run, **options)

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Runs one forward; returns logits, shape (N, C), and z, shape (N, D), or None without a head."""
        return self._compiled(model, inputs)

    def close(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()

    def _seen(self, path: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._is_open:
            self._calls[path].extend((*args, *kwargs.values()))

    def _run(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        self._is_open = True
        for values in self._calls.values():
            values.clear()
        logits = logits_of(model(**inputs))
        self._is_open = False
        z = features_of(self._calls) if self._calls else None
        for values in self._calls.values():
            values.clear()
        return logits, z


def features_of(calls: Mapping[str, list[Tensor]]) -> Tensor:
    """z, shape (N, D), from the inputs of all calls of each head in one forward: path -> inputs."""
    for path, inputs in calls.items():
        if len(inputs) != 1:
            raise RuntimeError(
                f"the head {path!r} ran {len(inputs)} times in one forward instead of once. Usually the layer was "
                "replaced after the head was found (reset_classifier), or the forward was compiled before: find "
                "the head anew, compile afterwards, or pass another layer as head=."
            )
        if not is_pooled(inputs[0]):
            raise RuntimeError(
                f"the head {path!r} is applied before pooling: its input has the shape {tuple(inputs[0].shape)}."
            )
    features = [inputs[0].flatten(1) for inputs in calls.values()]
    return features[0] if len(features) == 1 else torch.cat(features, 1)


def find_head(
    model: nn.Module, head: str | Sequence[str] | None = None, inputs: Mapping[str, Any] | None = None
) -> ClassifierHead:
    """Finds the last linear layer of an image classifier, or the layers whose mean it returns.

    Candidates are the linear layers (and 1×1 convolutions) with as many outputs as the model has labels. There may be
    several: a hidden layer of the same width, the untrained copy that PEFT keeps, several heads. Then one forward
    decides: the head is what reaches the logits.

    Args:
        model: a transformers image classifier, a timm model, or any other module. A module that names its number of
            labels (`config.num_labels`, `num_classes`) needs no `head`.
        head: dotted path of the layer, where it cannot be found; a tuple of paths for a mean of several heads.
        inputs: keyword arguments of the forward that decides between several candidates; by default noise in the size
            that the config names.

    Returns:
        The head. Nothing is registered on the model. The head is found, and not yet proven (`ClassifierHead.verify`).

    Raises:
        ValueError: the path does not exist or is not linear; no candidate; several, which do not make the logits.
    """
    if head is not None:
        paths = (head,) if isinstance(head, str) else tuple(head)
        return ClassifierHead(tuple(_layer_at(model, path) for path in paths), paths)
    candidates = dict(head_candidates(model))
    if len(candidates) == 1:
        return ClassifierHead(tuple(candidates.values()), tuple(candidates))
    if not candidates:
        linear = [name for name, module in model.named_modules() if _is_linear(module)]
        if _num_labels(model) == 0:
            raise ValueError(
                f"{type(model).__name__} has no classifier (num_classes is 0): choose a model that has one, or wrap it "
                "in a module of your own whose forward returns the logits of a linear layer."
            )
        raise ValueError(
            f"{type(model).__name__} has no linear layer with {_num_labels(model)} outputs (its config.num_labels). "
            f"Its last linear layers: {', '.join(map(repr, linear[-5:])) or 'none'}. {_way_out(model)}"
        )
    return _head_among(model, candidates, inputs)


def noise_inputs(model: nn.Module, size: int | tuple[int, int] | None = None) -> dict[str, Tensor]:
    """Two images of noise for a model's forward, in the size that its config names, or else of 224 pixels.

    Args:
        model: a transformers image classifier or a timm model.
        size: height and width in pixels; by default the config's.

    Raises:
        ValueError: the model has neither a config nor timm's.
    """
    described = _described(model)
    config = getattr(described, "config", None)
    timm_config = getattr(config or described, "pretrained_cfg", None)
    if config is None and timm_config is None:
        raise ValueError("it has no config that names the size of its images")
    name = getattr(described, "main_input_name", None) or next(iter(inspect.signature(described.forward).parameters))
    parameter, generator = next(model.parameters()), torch.Generator().manual_seed(0)
    if name == "input_ids":  # ImageGPT reads an image as a sequence of colours
        colours = torch.randint(config.vocab_size, (2, config.n_positions), generator=generator)
        return {name: colours.to(parameter.device)}
    vision = getattr(config, "vision_config", config)
    if hasattr(vision, "num_patches"):  # SigLIP 2 reads a list of patches and their places
        side = math.isqrt(vision.num_patches)
        noise = torch.randn(2, side**2, vision.num_channels * vision.patch_size**2, generator=generator)
        places = {"pixel_attention_mask": torch.ones(2, side**2).long(), "spatial_shapes": torch.full((2, 2), side)}
        places = {key: value.to(parameter.device) for key, value in places.items()}
        return {name: noise.to(parameter.device, parameter.dtype), **places}
    if name == "inputs" and not type(described).__name__.endswith("Learned"):
        size = size or 224  # two of the three Perceivers are made for it, whatever their config says
    made_with = getattr(config, "model_args", None) or {}
    default = timm_config["input_size"] if timm_config else (getattr(vision, "num_channels", 3), 224, 224)
    size = size or made_with.get("img_size") or getattr(vision, "image_size", None) or default[1:]
    height, width = (size, size) if isinstance(size, int) else size
    noise = torch.randn(2, made_with.get("in_chans", default[0]), height, width, generator=generator)
    return {name: noise.to(parameter.device, parameter.dtype)}


# ---- Candidates ----


def _layer_at(model: nn.Module, path: str) -> nn.Module:
    modules = dict(model.named_modules())
    if path not in modules:
        names = [name for name in modules if name]
        raise ValueError(f"head={path!r} is no layer of {type(model).__name__}.{nearest(path, names)}")
    if not _is_linear(modules[path]):
        start = f"{path}." if path else ""
        inside = [name for name, module in modules.items() if name.startswith(start) and _is_linear(module)]
        hint = f" Did you mean {inside[-1]!r}?" if inside else ""
        raise ValueError(f"head={path!r} is a {type(modules[path]).__name__}, not a linear layer.{hint}")
    return modules[path]


def _head_among(
    model: nn.Module, candidates: Mapping[str, nn.Module], inputs: Mapping[str, Any] | None
) -> ClassifierHead:
    num_labels = _num_labels(model)
    width = "" if num_labels is None else f" with {num_labels} outputs"
    error = f"{type(model).__name__} has several linear layers{width}: {', '.join(map(repr, list(candidates)[-8:]))}."
    try:
        check = check_layers(model, candidates, noise_inputs(model) if inputs is None else inputs)
    except Exception as failure:
        tried = "noise" if inputs is None else "the inputs"
        raise ValueError(
            f"{error} Trying them out on {tried} failed ({failure}). Pass the right one as head=."
        ) from failure
    paths = check.reaching()
    problem = check.problem(paths) if paths else "the output of none of them reaches the logits"
    if problem:
        raise ValueError(f"{error} They do not make the logits: {problem}. {_way_out(model)}")
    return ClassifierHead(tuple(candidates[path] for path in paths), paths)


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)


def _described(model: nn.Module) -> nn.Module:
    """The model inside wrappers such as averaged copies and adapters: the outermost module with a number of labels."""
    named = (
        m for m in model.modules() if hasattr(getattr(m, "config", None), "num_labels") or hasattr(m, "num_classes")
    )
    return next(named, model)


def _num_labels(model: nn.Module) -> int | None:
    described = _described(model)
    named = getattr(getattr(described, "config", None), "num_labels", None)
    return getattr(described, "num_classes", None) if named is None else named


def head_candidates(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Path and layer of each linear layer with as many outputs as the model has labels."""
    num_labels = _num_labels(model)
    return [
        (name, module)
        for name, module in model.named_modules()
        if _is_linear(module) and num_labels in (None, module.weight.shape[0])
    ]


def _way_out(model: nn.Module) -> str:
    kinds = {type(module).__name__ for module in model.modules()}
    default = (
        "Pass the path of the last linear layer as head=, or a tuple of paths where the model returns the mean of "
        "several heads, or give the model a linear classifier."
    )
    return next((text for kind, text in WAYS_OUT.items() if any(name.startswith(kind) for name in kinds)), default)


def _whole(parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return parameter
    # each process has the gradient of its own pairs, and FSDP takes their mean: with a plain full_tensor() the gradient
    # of one process would count as that of all
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


def _quoted(paths: Sequence[str]) -> str:
    return " and ".join(map(repr, paths))


# ---- The proof ----


@contextmanager
def hooked(layers: Mapping[str, nn.Module], hook: Callable[[str, tuple, dict, Tensor], Any]) -> Iterator[None]:
    """Within the block, the layers have forward hooks that call `hook(path, args, kwargs, output)`.

    Permanent hooks would be copied by deepcopy and refused by pickle (model copies for averaging, `mp_spawn`).
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
class HeadCheck:
    """The result of one forward in which noise replaced the output of each layer.

    Args:
        layers: path -> layer.
        calls: path -> (z, output, noise) of each call of the layer.
        logits: the logits of this forward, shape (N, C).
        probe: random numbers, shape (N, C).
        shares: path -> for each call, the gradient of the sum of logits · `probe` with respect to the noise, or None.
        others: names of the trainable parameters that reach the logits by another way than through the layers.
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
        """Why the layers at these paths are not the head; None if their mean is proven to be the logits."""
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
def check_layers(model: nn.Module, layers: Mapping[str, nn.Module], inputs: Mapping[str, Any]) -> HeadCheck:
    """Runs one forward in inference mode in which noise replaces the outputs of the layers.

    The noise has its own generator. The model and its gradients stay as they were.
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
    return HeadCheck(layers, calls, logits.detach(), probe, shares, others)
