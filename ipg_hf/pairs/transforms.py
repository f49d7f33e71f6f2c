# SPDX-License-Identifier: Apache-2.0
"""From raw images to model inputs: the model's own image processor, with random crops and flips in its train form.

Every draw is a function of the seed and of the row's place (epoch and row of the training set, position in the endless
order of the pairs), never of a global generator: the number of workers, of processes, or a resume changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
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

PRELOAD_CHUNK = 512
TRANSFORMING = ("transformers", "torch", "torchvision", "timm", "pillow")


class ImageRows(torch.utils.data.Dataset):
    """Rows of a raw-image data set as model inputs.

    Args:
        dataset: a map-style `datasets.Dataset` with image columns.
        processor: an image processor (`AutoImageProcessor`, `TimmWrapperImageProcessor`, ...), called in its inference
            form on batches of images.
        columns: image column -> name of the model input it becomes, e.g. `{"image": "pixel_values"}`, or two columns
            for a pair set. All images of one row get the same crop and the same flip.
        keep: other columns that stay as they are (labels, attributes).
        random_flip: flip left-right half of the time.
        random_crop_scale: smallest share of the area that a random crop keeps; 1.0 crops nothing.
        seed: seed of the draws.
        preload: transform every row once, now, and keep the tensors in memory. Only without random draws.
        preload_dir: with `preload`, a folder that keeps these tensors for the next time, a safetensors file under the
            hash of the images (of an image that is a file beside the set: its path, size and time of change), the
            processor's settings and the versions of what transforms. Nothing is removed from it.

    Items are dicts: input name -> tensor, of floats and shape (channels, height, width) for most models; kept column ->
    its value. What a processor gives beside the main input (masks) comes under its own name, with the side of a pair
    (`pixel_attention_mask_a`). A key is a row
    number, or a pair (position, row) as the pair sampler gives it.
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
        self.columns = dict(columns)
        self.keep = [name for name in keep if name in dataset.column_names]
        # other columns (masks, say) would be decoded for nothing
        self.dataset = dataset.with_format(None).select_columns([*self.columns, *self.keep])
        self.processor = processor
        self.random_flip = random_flip
        self.random_crop_scale = random_crop_scale
        self.seed = seed
        # worker processes that outlive an epoch see a change made here, since the memory is shared
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._preloaded: dict[str, Tensor] | None = None
        if preload:
            if self.is_random:
                raise ValueError("preload=True keeps one version of each image: it needs no random flip and no crop.")
            self._preloaded = self._load_all(preload_dir)

    takes_positions = True

    @property
    def is_random(self) -> bool:
        """Whether two visits of a row may differ."""
        return self.random_flip or self.random_crop_scale < 1

    def set_epoch(self, epoch: int) -> None:
        """Makes the draws of another pass over the rows."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> list[dict[str, Any]]:
        """Several rows at once, as `torch.utils.data.DataLoader` asks for them."""
        rows = [key[1] if isinstance(key, tuple) else key for key in keys]
        if self._preloaded is not None:
            index = torch.as_tensor(rows)
            table = {name: values[index].unbind() for name, values in self._preloaded.items()}
        else:
            places = [key[0] if isinstance(key, tuple) else (self._epoch.item(), key) for key in keys]
            table = self._transformed(self.dataset[rows], [self.draw(place) for place in places])
        return [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]

    def transform_batch(self, batch: dict[str, list], numbers: list[int]) -> dict[str, Any]:
        """The inputs of a batch of raw rows, for `datasets.IterableDataset.map`; `numbers` are the rows' places.

        ValueError: the images of a row differ in size (a stream has no check before training).
        """
        for number, images in zip(numbers, zip(*(batch[name] for name in self.columns), strict=True), strict=True):
            sizes = [image.size for image in images]
            if len({*sizes}) > 1:
                raise ValueError(f"the sides of a pair must have one size, but they have {sizes} in row {number}.")
        return self._transformed(batch, [self.draw(number) for number in numbers])

    def draw(self, place: int | tuple[int, int]) -> np.ndarray | None:
        """The five numbers in [0, 1) of a place: four of its crop, one of its flip; None without random draws."""
        if not self.is_random:
            return None
        return np.random.default_rng((self.seed, *np.atleast_1d(place))).random(5)

    def flips(self, draw: np.ndarray | None) -> bool:
        """Whether an image with this draw is flipped."""
        return self.random_flip and bool(draw[4] < 0.5)

    def _transformed(self, batch: dict[str, list], draws: list[np.ndarray | None]) -> dict[str, Any]:
        return self._inputs(batch, draws) | {name: batch[name] for name in self.keep}

    def _inputs(self, batch: dict[str, list], draws: list[np.ndarray | None]) -> dict[str, Tensor]:
        images = {
            name: [self._augmented(*pair) for pair in zip(batch[name], draws, strict=True)] for name in self.columns
        }
        # one call for all columns: processors have a fixed cost per call
        inputs = process_images(self.processor, [image for name in self.columns for image in images[name]])
        main = "pixel_values" if "pixel_values" in inputs else next(iter(inputs))  # ImageGPT's are `input_ids`
        table = {}
        for name, values in inputs.items():
            for (column, target), part in zip(self.columns.items(), values.chunk(len(self.columns)), strict=True):
                side = column[-2:] if column.endswith(("_a", "_b")) else ""
                table[target if name == main else f"{name}{side}"] = part
        return table

    def _augmented(self, image: Image.Image, draw: np.ndarray | None) -> Image.Image:
        if draw is None:
            return image
        if self.random_crop_scale < 1:
            image = image.crop(crop_box(image.size, self.random_crop_scale, draw[:4]))
        if self.flips(draw):
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image

    def _load_all(self, folder: str | None) -> dict[str, Tensor]:
        kept = {name: torch.as_tensor(self.dataset[name][:]) for name in self.keep}
        path = None if folder is None else Path(folder) / f"{self._content_hash()}.safetensors"
        if path is not None and path.is_file():
            return load_file(path) | kept
        images = self.dataset.select_columns([*self.columns])
        chunks = (images[start : start + PRELOAD_CHUNK] for start in range(0, len(self), PRELOAD_CHUNK))
        tables = [self._inputs(chunk, [None] * len(next(iter(chunk.values())))) for chunk in chunks]
        inputs = {name: torch.cat([table[name] for table in tables]) for name in tables[0]}
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}")
            save_file(inputs, part)
            os.replace(part, path)  # another run may read, or write the same
        return inputs | kept

    def _content_hash(self) -> str:
        versions = {name: _version(name) for name in TRANSFORMING}
        facts = [type(self.processor).__name__, self.processor.to_dict(), versions, self.columns]
        content = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
        for name in self.columns:
            stored = self.dataset.cast_column(name, datasets.Image(decode=False))
            for start in range(0, len(self), PRELOAD_CHUNK):
                for image in stored[start : start + PRELOAD_CHUNK][name]:
                    content.update(_image_content(image))
        return content.hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _image_content(stored: Mapping[str, Any]) -> bytes:
    """What tells a stored image from others: its bytes, after their number, or the facts of its file."""
    if stored["bytes"] is not None:
        return len(stored["bytes"]).to_bytes(8, "big") + stored["bytes"]
    facts = os.stat(stored["path"])
    return f"{os.path.abspath(stored['path'])} {facts.st_size} {facts.st_mtime_ns}\n".encode()


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
    """A `datasets` set with raw images (`image`, or `image_a` and `image_b`) as model inputs; any other set as it is.

    A set with columns of inputs, or with a format or transform of the user's own, is left alone. A stream is mapped
    lazily, its format dropped, its draws being a function of the row alone.
    """
    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        return dataset
    names = dataset.column_names or list(next(iter(dataset), {}))
    found = {f"image{side}": f"{main_input}{side}" for side in ("", "_a", "_b") if f"image{side}" in names}
    if not found or set(found.values()) & set(names) or set(found) == {"image_a"} or set(found) == {"image_b"}:
        return dataset
    settings = {"random_flip": random_flip, "random_crop_scale": random_crop_scale, "seed": seed}
    if isinstance(dataset, datasets.Dataset):
        if dataset.format["type"] is not None:
            return dataset
        return ImageRows(dataset, processor, found, keep=keep, **settings)
    empty = datasets.Dataset.from_dict({name: [] for name in (*found, *keep) if name in names})
    rows = ImageRows(empty, processor, found, keep=keep, **settings)
    return dataset.with_format(None).map(rows.transform_batch, batched=True, with_indices=True, remove_columns=names)


def process_images(processor: Any, images: Sequence[Image.Image]) -> dict[str, Tensor]:
    """Calls an image processor on images of any mode.

    Returns:
        Its tensors by name, each of N rows: `pixel_values`, a float tensor of shape (N, channels, height, width), or
        what else the model reads (patches with their mask and places, colours).

    Raises:
        ValueError: something is no image, or one of more than 8 bits a channel, or the processor gives images of
            different sizes.
    """
    for image in images:
        if not isinstance(image, Image.Image):
            raise ValueError(
                f"an image column holds a {type(image).__name__}, not an image: cast it, "
                "dataset.cast_column(name, datasets.Image()), or make model inputs of it yourself."
            )
        if image.mode.startswith("I"):
            raise ValueError(f"an image has the mode {image.mode!r}, all white in 8 bits: scale it to 0..255.")
    images = [image if image.mode in ("RGB", "F") else image.convert("RGB") for image in images]
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


def crop_box(size: tuple[int, int], scale: float, draw: Sequence[float]) -> tuple[int, int, int, int]:
    """A random crop: an area share in [scale, 1] and an aspect ratio in [3/4, 4/3] of the image's own, nearer to 1 for
    large shares, since they would not fit; to whole pixels.

    Args:
        size: (width, height) in pixels.
        scale: smallest share of the area, in (0, 1].
        draw: four numbers in [0, 1): area, aspect ratio, left, top.

    Returns:
        (left, top, right, bottom) in pixels, inside the image and not empty.
    """
    area = scale + (1 - scale) * draw[0]
    # a crop of the share `area` fits into the image only in ratios between area and 1 / area
    limit = min(math.log(4 / 3), -math.log(area)) / 2
    stretch = math.exp((2 * draw[1] - 1) * limit)
    width = max(1, min(size[0], round(size[0] * math.sqrt(area) * stretch)))
    height = max(1, min(size[1], round(size[1] * math.sqrt(area) / stretch)))
    left, top = int(draw[2] * (size[0] - width + 1)), int(draw[3] * (size[1] - height + 1))
    return left, top, left + width, top + height
