# SPDX-License-Identifier: Apache-2.0
"""Adversarial pairs (IPG-AA): an image, and the same image augmented so that the model's output changes most.

They need no attribute: the model learns to ignore a family of augmentations, each up to a strength. Our reading of the
paper's IPG-AA is projected sign-gradient ascent on the invariance divergence from a random start.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer

from ..guidance import ProblemType, invariance_divergence
from ..inference import inference, logits_of
from .loader import PairLoader, is_stream
from .makers import check_number
from .transforms import pixel_statistics

BLUR_SIGMA = 2.0  # pixels
RANGE_TOLERANCE = 1e-2  # for pixels in [0, 1]: not every image processor clips the overshoot of bicubic resizing


@dataclass(frozen=True)
class AdversarialPairs:
    """A pair set whose second sides are searched during training, for the model as it is.

    Example: `IPGTrainer(pair_dataset=AdversarialPairs(train_dataset), ...)`.

    The partner of an image is the image itself after changes of color, contrast, brightness, blur and noise, in this
    order. Each change is limited by its strength; the strength 0 leaves the change out. Labels are not used.

    Args:
        source: a map-style set of images, for example the training set, in a form that `IPGTrainer` accepts.
        steps: number of ascent steps, 1 or more. Each step costs a forward and a backward of the images.
        every: number of optimizer steps that use the same pair batch and partners, 1 or more.
        color: largest change of each entry of the matrix that mixes the channels, for pixels in [0, 1].
        contrast: largest relative change of the contrast.
        brightness: largest shift of all pixels.
        blur: largest weight of the blurred image (Gaussian, 2 pixels) in the result, at most 1.
        noise: largest change of a single value (the radius of the L∞ ball).
        step_size: size of an ascent step as a share of the strengths. By default 2.5 / steps (Madry et al.,
            arXiv 1706.06083).
        mean: the value of each channel that the image processor subtracts from pixels in [0, 1]. By default the mean of
            the trainer's image processor.
        std: the value of each channel that the image processor divides by. By default the standard deviation of the
            trainer's image processor.

    Raises:
        ValueError: a number is out of range; all strengths are 0; `source` is a stream.
    """

    source: Any
    _: KW_ONLY
    steps: int = 3
    every: int = 1
    color: float = 0.3
    contrast: float = 0.3
    brightness: float = 0.1
    blur: float = 0.5
    noise: float = 4 / 255
    step_size: float | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None

    def __post_init__(self):
        for name in ("steps", "every"):
            check_number(name, getattr(self, name), 1, math.inf, whole=True)
        for name in STRENGTHS:
            check_number(name, getattr(self, name), 0, 1)
        if self.step_size is not None:
            check_number("step_size", self.step_size, 0, math.inf, above=True)
        if not any(getattr(self, name) for name in STRENGTHS):
            raise ValueError(f"all of {', '.join(STRENGTHS)} are 0: there is nothing to search over. Set one above 0.")
        if is_stream(self.source) or isinstance(self.source, Mapping):
            raise ValueError(
                f"adversarial pairs need a map-style set of images, not {type(self.source).__name__}: load the "
                "set as a whole, and give one split of it."
            )

    def normalisation(self, processor: Any) -> tuple[Any, Any]:
        """Returns the mean and standard deviation that turn pixels in [0, 1] into the model's inputs.

        Args:
            processor: the trainer's image processor, or `None`.

        Returns:
            The mean and the standard deviation of each channel. Both are a single value, 0 and 1, if none are known.

        Raises:
            ValueError: only one of `mean` and `std` is given.
        """
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"mean={self.mean} and std={self.std}: give both, or none.")
        if self.mean is not None:
            return self.mean, self.std
        return pixel_statistics(processor)


STRENGTHS = ("color", "contrast", "brightness", "blur", "noise")


class SameImagePairs(torch.utils.data.Dataset):
    """Rows whose two sides are the same image, before the search.

    Args:
        settings: settings of the search.
        inputs: rows with the main input of the model.
        main_input: name of the main input.
    """

    def __init__(self, settings: AdversarialPairs, inputs: Any, main_input: str):
        self.settings, self.inputs, self.main_input = settings, inputs, main_input

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> list[dict[str, Any]]:
        """Returns several rows at once.

        Args:
            keys: row numbers, or (position, row number) for random transforms that depend on the position.
        """
        if not self.takes_positions:
            keys = [key[1] if isinstance(key, tuple) else key for key in keys]
        many = hasattr(self.inputs, "__getitems__")
        rows = self.inputs.__getitems__(keys) if many else [self.inputs[key] for key in keys]
        if self.main_input not in rows[0]:
            raise ValueError(
                f"rows of an adversarial pair set must have {self.main_input}, but have {sorted(rows[0])}."
            )
        return [{f"{self.main_input}_{side}": row[self.main_input] for side in "ab"} for row in rows]

    @property
    def takes_positions(self) -> bool:
        """Whether a key may be (position, row number): the random transforms of the inputs depend on the position."""
        return getattr(self.inputs, "takes_positions", False)


def augmented(images: Tensor, change: Mapping[str, Tensor], settings: AdversarialPairs) -> Tensor:
    """Applies the augmentations to images.

    Args:
        images: pixels in [0, 1], shape (P, C, H, W).
        change: for each strength above 0, a tensor with values in [-1, 1] that are multiplied by the strength: `color`
            (P, C, C), `contrast`, `brightness` and `blur` (P,), `noise` (P, C, H, W). Blur cannot be negative: -1 means
            no blur, 1 means blur of the full strength.
        settings: the strengths.

    Returns:
        Pixels in [0, 1], shape (P, C, H, W).
    """

    def each(name: str) -> Tensor:
        return getattr(settings, name) * change[name].view(-1, 1, 1, 1)

    x = images
    if "color" in change:
        x = x + torch.einsum("pij,pjhw->pihw", settings.color * change["color"], x)
    if "contrast" in change:
        x = x + each("contrast") * (x - x.mean((1, 2, 3), keepdim=True))
    if "brightness" in change:
        x = x + each("brightness")
    if "blur" in change:
        x = x + settings.blur * (change["blur"].view(-1, 1, 1, 1) + 1) / 2 * (_blurred(x) - x)
    if "noise" in change:
        x = x + settings.noise * change["noise"]
    return x.clamp(0, 1)


def search_partners(
    model: nn.Module,
    inputs: Tensor,
    name: str,
    settings: AdversarialPairs,
    *,
    normalisation: tuple[Any, Any],
    keys: Sequence[Sequence[int]],
    problem_type: ProblemType,
    scale: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Searches the partner of each image: a few steps of ascent on the divergence between the two.

    The partner depends only on the image, the model and the key, and not on the other images of the batch.

    Args:
        model: the model. It runs in inference mode. The gradients of its parameters are not changed.
        inputs: images from the image processor, shape (P, C, H, W).
        name: name of the model's input for the images.
        settings: the strengths, and the number and size of the steps.
        normalisation: mean and standard deviation of the image processor.
        keys: for each image the non-negative integers that seed its random start.
        problem_type: problem type of the model, one of `guidance.ProblemType`.
        scale: a function that scales the divergence before its gradient is taken, against underflow in half precision.

    Returns:
        Shape (P, C, H, W), the dtype of `inputs`.

    Raises:
        ValueError: `inputs` are no images.
    """
    images, mean, std = _pixels(inputs, normalisation, name)
    with torch.no_grad(), inference(model):
        anchor = logits_of(model(**{name: inputs}))
    change = _start(images, settings, keys)
    size = settings.step_size or 2.5 / settings.steps
    for _ in range(settings.steps):
        for value in change.values():
            value.requires_grad_()
        with inference(model):
            partners = (augmented(images, change, settings) - mean) / std
            logits = logits_of(model(**{name: partners.to(inputs.dtype)}))
            divergence = invariance_divergence(anchor, logits, problem_type=problem_type) * len(images)
            slopes = torch.autograd.grad(scale(divergence) if scale else divergence, list(change.values()))
        change = {
            key: (value.detach() + size * slope.nan_to_num().sign()).clamp(-1, 1)
            for (key, value), slope in zip(change.items(), slopes, strict=True)
        }
    return ((augmented(images, change, settings) - mean) / std).to(inputs.dtype)


class AdversarialLoader:
    """Loads pair batches and replaces each side b with the partner that a search finds for the current model.

    Args:
        loader: a loader of batches whose two sides are the same images.
        model: the model for which partners are searched, not wrapped.
        trainer: the trainer. Its device, precision and image processor are used.
        problem_type: problem type of the model, one of `guidance.ProblemType`.
        chunk_size: number of pairs that are searched at a time. By default all pairs of the batch.

    Raises:
        ValueError: at the first batch, if pixels are not in [0, 1] before the normalisation.
    """

    def __init__(
        self,
        loader: PairLoader,
        model: nn.Module,
        trainer: Trainer,
        problem_type: ProblemType,
        chunk_size: int | None = None,
    ):
        self.loader, self.model, self.trainer, self.problem_type = loader, model, trainer, problem_type
        self.normalisation = loader.dataset.settings.normalisation(trainer.processing_class)
        self.dataset = loader.dataset
        self.settings: AdversarialPairs = loader.dataset.settings
        self.chunk_size = chunk_size
        self.kept: dict[str, Tensor] = {}
        self.uses = 0  # steps that have used the kept batch
        self.cost = {"adversarial_images": 0.0, "adversarial_seconds": 0.0}

    @property
    def position(self) -> int:
        """Number of pairs that all processes together have drawn."""
        return self.loader.position

    def __next__(self) -> dict[str, Tensor]:
        self.cost = dict.fromkeys(self.cost, 0.0)
        if self.kept and self.uses < self.settings.every:
            self.uses += 1
            return self.kept
        first = self.loader.position + self.loader.rank * self.loader.batch_size
        (name, values), *_ = self.trainer._prepare_inputs(next(self.loader)).items()
        started = time.perf_counter()
        images = values.chunk(2)[0]
        if not self.kept:
            _check_range(images, self.normalisation, name)
        keys = [(self.loader.seed, first + number) for number in range(len(images))]
        size, scaler = self.chunk_size or len(images), self.trainer.accelerator.scaler
        with self.trainer.autocast_smart_context_manager():
            parts = [
                search_partners(
                    self.model,
                    images[i : i + size],
                    name,
                    self.settings,
                    normalisation=self.normalisation,
                    keys=keys[i : i + size],
                    problem_type=self.problem_type,
                    scale=scaler.scale if scaler else None,
                )
                for i in range(0, len(images), size)
            ]
        self.kept, self.uses = {name: torch.cat([images, *parts]).detach()}, 1
        if values.is_cuda:
            torch.cuda.synchronize(values.device)
        seconds = time.perf_counter() - started
        self.cost = {
            "adversarial_images": float(len(images) * (1 + self.settings.steps)),
            "adversarial_seconds": seconds,
        }
        return self.kept

    def close(self) -> None:
        """Stops the worker processes."""
        self.loader.close()

    def save(self, folder: str | os.PathLike, name: str) -> None:
        """Writes the kept batch into a checkpoint, if the next step will use it again.

        Args:
            folder: folder of the checkpoint.
            name: name of the pair set.
        """
        if self.kept and self.uses < self.settings.every:
            state = {**self.kept, "uses": torch.tensor(self.uses)}
            save_file({key: value.cpu().contiguous() for key, value in state.items()}, self._file(folder, name))

    def load(self, folder: str | os.PathLike, name: str) -> None:
        """Reads the kept batch from a checkpoint, if it has one.

        Args:
            folder: folder of the checkpoint.
            name: name of the pair set.
        """
        if self._file(folder, name).is_file():
            state = load_file(self._file(folder, name))
            self.uses = int(state.pop("uses"))
            self.kept = self.trainer._prepare_inputs(state)

    def _file(self, folder: str | os.PathLike, name: str) -> Path:
        return Path(folder) / f"adversarial_{name}_{self.loader.rank}.safetensors"


def _start(images: Tensor, settings: AdversarialPairs, keys: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Draws a random change for each image, because without a change the gradient of the divergence is 0."""
    channels = images.shape[1]
    shapes = {"color": (channels, channels), "contrast": (), "brightness": (), "blur": (), "noise": images.shape[1:]}
    shapes = {name: shape for name, shape in shapes.items() if getattr(settings, name)}
    generators = [np.random.default_rng((*key, 9)) for key in keys]
    rows = [[rng.random(shape, dtype=np.float32) for shape in shapes.values()] for rng in generators]
    return {
        name: 2 * torch.as_tensor(np.stack(values)).to(images) - 1
        for name, values in zip(shapes, zip(*rows, strict=True), strict=True)
    }


def _pixels(inputs: Tensor, normalisation: tuple[Any, Any], name: str) -> tuple[Tensor, Tensor, Tensor]:
    if inputs.dim() != 4 or not inputs.is_floating_point():
        raise ValueError(
            f"adversarial pairs need images, but {name} is {inputs.dtype} of shape {tuple(inputs.shape)}: use a model "
            "that reads (batch, channels, height, width)."
        )
    mean, std = (torch.as_tensor(value, device=inputs.device, dtype=torch.float64) for value in normalisation)
    mean, std = (value.to(torch.promote_types(inputs.dtype, torch.float32)).view(1, -1, 1, 1) for value in (mean, std))
    return (inputs * std + mean).clamp(0, 1), mean, std


def _check_range(inputs: Tensor, normalisation: tuple[Any, Any], name: str) -> None:
    mean, std = (torch.as_tensor(value).to(inputs).view(-1, 1, 1) for value in normalisation)
    low, high = (inputs * std + mean).aminmax()
    if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
        raise ValueError(
            f"{name} is not in [0, 1] before normalisation, but from {low:.3g} to {high:.3g}: give AdversarialPairs "
            "the mean and std with which its images were normalised."
        )


def _blurred(x: Tensor) -> Tensor:
    reach = min(int(2 * BLUR_SIGMA), x.shape[-1] - 1, x.shape[-2] - 1)
    line = torch.exp(-torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype).square() / (2 * BLUR_SIGMA**2))
    line = (line / line.sum()).expand(x.shape[1], 1, 1, -1)
    x = nn.functional.pad(x, (reach,) * 4, mode="reflect")
    x = nn.functional.conv2d(x, line, groups=x.shape[1])
    return nn.functional.conv2d(x, line.mT, groups=x.shape[1])
