# SPDX-License-Identifier: Apache-2.0
"""Makes model inputs of raw images: the model's own image processor, and for training random crops and flips.

A random draw is a function of the seed and of the row's place: epoch and row in a training set, position in the order
of a pair set. The number of workers, the number of processes and a resume therefore change nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.transforms import v2

from ..seeding import seeded
from .images import check_depth, image_content, read_image, stored_images
from .makers import check_is_set

PRELOAD_CHUNK = 512
TRANSFORMING = ("transformers", "torch", "torchvision", "timm", "pillow")


def pixel_statistics(processor: Any) -> tuple[Sequence[float], Sequence[float]]:
    """The mean and standard deviation of the channels with which an image processor turns pixels in [0, 1] into inputs.

    Args:
        processor: an image processor of transformers or timm, or `None`. 0 and 1 are returned if it has neither.
    """
    if getattr(processor, "do_normalize", False):
        return processor.image_mean, processor.image_std
    data = getattr(processor, "data_config", None) or {}  # timm's
    return data.get("mean", (0.0,)), data.get("std", (1.0,))


class ImageRows(torch.utils.data.Dataset):
    """Gives the rows of a data set with raw images as model inputs.

    Args:
        dataset: a map-style `datasets.Dataset` with image columns.
        processor: an image processor (`AutoImageProcessor`, `TimmWrapperImageProcessor`, ...). It is called on batches
            of images, in the form that it has at inference.
        columns: image column -> name of the model input, e.g. `{"image": "pixel_values"}`. A pair set has two columns.
            All images of a row get the same crop and the same flip.
        keep: other columns that are passed on unchanged (labels, attributes).
        random_flip: flip the images of a row left to right with probability 1/2.
        random_crop_scale: smallest share of the area that a random crop keeps; 1.0 crops nothing. The aspect ratio of
            the crop is that of the image times a factor between 3/4 and 4/3.
        seed: seed of the draws.
        preload: transform every row once, now, and keep the tensors in memory. Only without random draws.
        preload_dir: with `preload`, a folder that keeps the tensors for the next run, as one safetensors file. The name
            of the file is a hash of the images (for an image that is a file of its own: path, size and time of change),
            of the settings of the processor and of the versions of the packages that transform. No file is removed.
            A processor that is no class of transformers keeps nothing: no hash can tell what its code does.

    Attributes:
        preloaded: the tensors of all rows by name, (number of rows, ...); `None` without `preload`.

    An item is a dict: name of a model input -> tensor, for most models floats of shape (channels, height, width); kept
    column -> its value. A processor may return more than the main input, e.g. masks. They keep their own names; those
    of a pair end in the side (`pixel_attention_mask_a`). A key is a row number, or (position, row) as the pair sampler
    gives it.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        processor: Any,
        columns: Mapping[str, str],
        *,
        keep: Sequence[str] = (),
        random_flip: bool = False,
        random_crop_scale: float = 1.0,
        seed: int = 0,
        preload: bool = False,
        preload_dir: str | None = None,
    ):
        check_is_set(dataset, "dataset")
        self.columns = dict(columns)
        self.keep = [name for name in keep if name in dataset.column_names]
        # other columns (masks, say) would be decoded for nothing
        self.dataset = dataset.with_format(None).select_columns([*self.columns, *self.keep])
        images = {name: feature for name, feature in self.dataset.features.items() if name in self.columns}
        self.modes = {name: feature.mode for name, feature in images.items() if isinstance(feature, datasets.Image)}
        self.stored = stored_images(self.dataset, self.modes)
        self.processor = processor
        self.random_flip = random_flip
        self.random_crop_scale = random_crop_scale
        self.seed = seed
        # worker processes that outlive an epoch see a change made here, since the memory is shared
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.preloaded: dict[str, Tensor] | None = None
        if preload:
            if self.is_random:
                raise ValueError("preload=True keeps one version of each image: it needs no random flip and no crop.")
            self.preloaded = self._load_all(preload_dir)

    takes_positions = True

    @property
    def is_random(self) -> bool:
        """Whether a row may give other values when it is read again."""
        return self.random_flip or self.random_crop_scale < 1

    def set_epoch(self, epoch: int) -> None:
        """Sets the number of the pass over the rows, on which the draws depend."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> list[dict[str, Any]]:
        """Returns several rows, as `torch.utils.data.DataLoader` asks for them."""
        if self.preloaded is not None:
            table = {name: values.unbind() for name, values in self.columns_of(keys).items()}
        else:
            rows = [key[1] if isinstance(key, tuple) else key for key in keys]
            places = [key[0] if isinstance(key, tuple) else (self._epoch.item(), key) for key in keys]
            table = self._transformed(self._decoded(self.stored[rows], rows), places)
        return [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]

    def columns_of(self, keys: Sequence[int | tuple[int, int]]) -> dict[str, Tensor]:
        """Returns the values of several rows of a preloaded set, stacked: input or kept column -> (n, ...)."""
        rows = torch.tensor([key[1] if isinstance(key, tuple) else key for key in keys])
        return {name: values.index_select(0, rows) for name, values in self.preloaded.items()}

    def transform_batch(self, batch: dict[str, list], numbers: list[int]) -> dict[str, Any]:
        """Makes the inputs of a batch of raw rows, for `datasets.IterableDataset.map`.

        Args:
            batch: image column -> images.
            numbers: place of each row in the stream.

        Raises:
            ValueError: an image cannot be read, or the images of a row differ in size.
        """
        return self._transformed(self._decoded(batch, numbers), numbers)

    def _decoded(self, batch: Mapping[str, list], numbers: Sequence[int]) -> dict[str, list]:
        images = {
            name: [
                read_image(value, f"{name} of row {number}", self.modes.get(name))
                for number, value in zip(numbers, batch[name], strict=True)
            ]
            for name in self.columns
        }
        for number, row in zip(numbers, zip(*images.values(), strict=True), strict=True):
            sizes = [image.size for image in row]
            if len({*sizes}) > 1:
                raise ValueError(f"the sides of a pair must have one size, but they have {sizes} in row {number}.")
        return {**batch, **images}

    def _transformed(self, batch: dict[str, list], places: Sequence[int | tuple[int, int]]) -> dict[str, Any]:
        if self.is_random:
            with seeded(self.seed):
                rows = zip(places, *(batch[name] for name in self.columns), strict=True)
                augmented = [self._augmented(place, images) for place, *images in rows]
            batch = {**batch, **dict(zip(self.columns, zip(*augmented, strict=True), strict=True))}
        return self._inputs(batch) | {name: batch[name] for name in self.keep}

    def _augmented(self, place: int | tuple[int, int], images: list[Image.Image]) -> list[Image.Image]:
        """The images of a row under the random crop and flip of its place. Call it within [`~seeding.seeded`]."""
        # torchvision draws from the global generator of torch
        key = np.random.SeedSequence((self.seed, *np.atleast_1d(place).tolist()))
        torch.default_generator.manual_seed(int(key.generate_state(1)[0]))
        if self.random_crop_scale < 1:
            shape = images[0].width / images[0].height
            ratios = [shape * 3 / 4, shape * 4 / 3]
            box = v2.RandomResizedCrop.get_params(images[0], [self.random_crop_scale, 1.0], ratios)
            # the image processor resizes
            images = [v2.functional.crop(image, *box) for image in images]
        return v2.RandomHorizontalFlip()(images) if self.random_flip else images

    def _inputs(self, batch: Mapping[str, Sequence[Image.Image]]) -> dict[str, Tensor]:
        # one call for all columns: processors have a fixed cost per call
        inputs = process_images(self.processor, [image for name in self.columns for image in batch[name]])
        main = "pixel_values" if "pixel_values" in inputs else next(iter(inputs))  # ImageGPT's are `input_ids`
        table = {}
        for name, values in inputs.items():
            for (column, target), part in zip(self.columns.items(), values.chunk(len(self.columns)), strict=True):
                side = column[-2:] if column.endswith(("_a", "_b")) else ""
                table[target if name == main else f"{name}{side}"] = part
        return table

    def _load_all(self, folder: str | None) -> dict[str, Tensor]:
        kept = {name: torch.as_tensor(self.dataset[name][:]) for name in self.keep}
        is_kept = folder is not None and type(self.processor).__module__.startswith("transformers.")
        path = Path(folder) / f"{self._content_hash()}.safetensors" if is_kept else None
        if path is not None and path.is_file():
            return load_file(path) | kept
        images = self.stored.select_columns([*self.columns])
        chunks = [range(len(self))[start : start + PRELOAD_CHUNK] for start in range(0, len(self), PRELOAD_CHUNK)]
        tables = [self._inputs(self._decoded(images[rows.start : rows.stop], rows)) for rows in chunks]
        inputs = {name: torch.cat([table[name] for table in tables]) for name in tables[0]}
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}")
            save_file(inputs, part)
            os.replace(part, path)  # another run may read, or write the same
        return inputs | kept

    def _content_hash(self) -> str:
        facts = [type(self.processor).__name__, self.processor.to_dict(), package_versions(), self.columns]
        content = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
        for name in self.columns:
            stored = self.stored.select_columns([name])
            for start in range(0, len(self), PRELOAD_CHUNK):
                for image in stored[start : start + PRELOAD_CHUNK][name]:
                    content.update(image_content(image))
        return content.hexdigest()


def package_versions() -> dict[str, str | None]:
    """The versions of the packages that make model inputs and features; `None` for one that is not installed."""
    return {name: _version(name) for name in TRANSFORMING}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def as_model_inputs(
    dataset: Any,
    processor: Any,
    main_input: str,
    *,
    keep: Sequence[str] = (),
    random_flip: bool = False,
    random_crop_scale: float = 1.0,
    seed: int = 0,
) -> Any:
    """Wraps a data set with raw images so that its rows are model inputs. Any other data set is returned unchanged.

    A set that has columns of model inputs, or a transform of the user, is returned unchanged. A format of a set with
    image columns (`with_format("torch")`) is dropped. A stream is mapped lazily without its format, and a draw depends
    on the row only, not on the pass.

    Args:
        dataset: the data set; raw images are the columns `image`, or `image_a` and `image_b`, of a `datasets` set.
        processor: the image processor.
        main_input: name of the model input that the images become.
        keep: other columns that are passed on unchanged.
        random_flip: flip the images of a row left to right with probability 1/2.
        random_crop_scale: smallest share of the area that a random crop keeps.
        seed: seed of the draws.
    """
    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        return dataset
    names = dataset.column_names or list(next(iter(dataset), {}))
    found = {f"image{side}": f"{main_input}{side}" for side in ("", "_a", "_b") if f"image{side}" in names}
    if not found or set(found.values()) & set(names) or set(found) == {"image_a"} or set(found) == {"image_b"}:
        return dataset
    settings = {"random_flip": random_flip, "random_crop_scale": random_crop_scale, "seed": seed}
    if isinstance(dataset, datasets.Dataset):
        has_images = all(isinstance(dataset.features[name], datasets.Image) for name in found)
        if dataset.format["type"] == "custom" or (dataset.format["type"] is not None and not has_images):
            return dataset
        return ImageRows(dataset, processor, found, keep=keep, **settings)
    known = dataset.features or {}
    features = {name: known.get(name, datasets.Value("null")) for name in keep if name in names}
    features |= {name: known.get(name, datasets.Image()) for name in found}
    empty = datasets.Dataset.from_dict({name: [] for name in features}, features=datasets.Features(features))
    rows = ImageRows(empty, processor, found, keep=keep, **settings)
    dataset = dataset.with_format(None)
    dataset = dataset.decode(False) if dataset.features else dataset
    return dataset.map(rows.transform_batch, batched=True, with_indices=True, remove_columns=names)


def process_images(processor: Any, images: Sequence[Image.Image]) -> dict[str, Tensor]:
    """Calls an image processor on images of any mode.

    Args:
        processor: the image processor.
        images: N images.

    Returns:
        The tensors of the processor by name, each with N rows: `pixel_values`, floats of shape (N, channels, height,
        width), or what the model reads instead (patches with their mask and places, colours).

    Raises:
        ValueError: an entry is no image, an image has more than 8 bits a channel, or the processor returns images of
            different sizes.
    """
    for image in images:
        if not isinstance(image, Image.Image):
            raise ValueError(
                f"an image column holds a {type(image).__name__}, not an image: cast it, "
                "dataset.cast_column(name, datasets.Image()), or make model inputs of it yourself."
            )
        check_depth(image.mode, "an image")
    images = [image if image.mode == "RGB" else image.convert("RGB") for image in images]
    try:
        inputs = processor(images, return_tensors="pt")
    except ValueError as failure:
        raise ValueError(
            f"{type(processor).__name__} made no batch of the images ({failure}). Where their sizes differ, set its "
            "size and crop so that all agree."
        ) from failure
    return {
        name: values for name, values in inputs.items() if isinstance(values, Tensor) and len(values) == len(images)
    }
