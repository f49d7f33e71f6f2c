# SPDX-License-Identifier: Apache-2.0
"""Raw pairs that are decoded and resized once: all of a small set in memory, on the CPU or on the training device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers.utils import logging

from .transforms import ImageRows

logger = logging.get_logger(__name__)

CHUNK = 64  # pairs that are decoded at a time


class CachedPairs(Dataset):
    """All pairs of an [`ImageRows`] as model inputs in memory, and batches of them as a loader would make them.

    Inputs whose values are few, as those of 8-bit images are, are kept as 8-bit numbers of their values: a quarter of
    the memory, and the same values to the last bit. All others are kept as they are.

    A flip is drawn as without the cache and made on what the image processor gave (our reading): the same to the last
    bit, save where the processor cuts an odd number of columns off an image's sides, and what is kept of a flipped
    image lies one pixel further.

    Args:
        rows: the pairs.
        collate: makes a batch of rows, the a sides in its first half, and raises what is wrong with them.
        kept_on: where the pairs are kept.
        device: where batches go.

    Raises:
        ValueError: a row cannot be part of a batch, or the images cannot be flipped any more.
        MemoryError: there is no room.
    """

    def __init__(
        self,
        rows: ImageRows,
        collate: Callable[[list], dict[str, Tensor]],
        kept_on: torch.device,
        device: torch.device,
    ):
        self.rows, self.device = rows, device
        plain = copy.copy(rows)
        plain.random_flip, plain.random_crop_scale = False, 1.0
        self.inputs: dict[str, Kept] = {}
        for start in range(0, len(rows), CHUNK):
            numbers = range(start, min(start + CHUNK, len(rows)))
            batch = collate(plain.__getitems__(numbers))
            if not start:
                self.inputs = {name: Kept(values, len(rows), kept_on) for name, values in batch.items()}
                self._announce()
            for name, values in batch.items():
                self.inputs[name].put(numbers, values)
        others = [name for name, kept in self.inputs.items() if kept.store.dim() < 4 and name != "labels"]
        if rows.random_flip and others:
            raise ValueError(
                f"pair_cache flips images of shape (channels, height, width), and {', '.join(others)} is none: set "
                "random_flip=False, or pair_cache='none'."
            )

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, keys: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """The batch of keys (position, row), as `PairSampler` gives them: tensors of shape (2n, ...)."""
        rows = torch.tensor([row for _, row in keys])
        batch = {name: kept.get(rows, self.device) for name, kept in self.inputs.items()}
        if self.rows.random_flip:
            flipped = [self.rows.flips(self.rows.draw(position)) for position, _ in keys]
            which = torch.tensor(flipped * 2, device=self.device).view(-1, 1, 1, 1)
            for name, values in batch.items():
                if name != "labels":
                    batch[name] = torch.where(which, values.flip(-1), values)
        return batch

    def _announce(self) -> None:
        size = sum(kept.store.nbytes for kept in self.inputs.values())
        where = {f"{kept.store.dtype} on {kept.store.device}".removeprefix("torch.") for kept in self.inputs.values()}
        logger.info(
            f"pair_cache: {len(self)} pairs take {size / 2**20:.1f} MiB ({', '.join(sorted(where))}) in each process."
        )


class Kept:
    """One input of all pairs, as 8-bit numbers of its values while it has at most 256 of them, in each channel.

    Args:
        first: its values in some pairs, shape (2n, ...), the a sides in the first half; of images (2n, C, H, W).
        num_pairs: of the set.
        device: where it is kept.

    Raises:
        MemoryError: there is no room for it.
    """

    def __init__(self, first: Tensor, num_pairs: int, device: torch.device):
        self.num_pairs, self.dtype = num_pairs, first.dtype
        # numbers of values are told apart by their bits: 0 and -0 are two
        self.book: Tensor | None = None  # (channels, 256), int32
        self.store = torch.empty(0)
        self.device = device
        if first.dtype == torch.float32:
            channels = first.shape[1] if first.dim() == 4 else 1
            self.known = [torch.empty(0, dtype=torch.int32) for _ in range(channels)]
            self.book = torch.zeros(channels, 256, dtype=torch.int32)
            if self._numbers(first) is None:
                self.book = None
        self.store = self._room(first.shape[1:], torch.uint8 if self.book is not None else first.dtype)

    def put(self, rows: range, values: Tensor) -> None:
        """Keeps the values of rows, shape (2n, ...)."""
        sides = values.chunk(2)
        if self.book is not None:
            numbers = self._numbers(values)
            if numbers is None:
                self._widen(rows.start)
            else:
                sides = numbers.chunk(2)
        for first, side in zip((0, self.num_pairs), sides, strict=True):
            self.store[first + rows.start : first + rows.stop] = side.to(self.device)

    def get(self, rows: Tensor, device: torch.device) -> Tensor:
        """The values of rows, shape (2n, ...), the a sides in the first half."""
        kept = self.store.index_select(0, torch.cat([rows, rows + self.num_pairs]).to(self.device)).to(device)
        return kept if self.book is None else self._values(kept)

    def _values(self, numbers: Tensor) -> Tensor:
        places = numbers.int()
        if len(self.book) > 1:
            places += 256 * torch.arange(len(self.book), device=numbers.device, dtype=torch.int32).view(-1, 1, 1)
        values = self.book.to(numbers.device).flatten().index_select(0, places.flatten())
        return values.view(self.dtype).view(numbers.shape)

    def _numbers(self, values: Tensor) -> Tensor | None:
        """The 8-bit numbers of the values, shape as theirs; None where a channel has more than 256."""
        parts = []
        bits = values.contiguous().view(torch.int32)
        for channel, part in enumerate(bits.split(1, 1) if len(self.known) > 1 else [bits]):
            numbers = self._looked_up(part.contiguous(), channel)
            if numbers is None:
                return None
            parts.append(numbers)
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def _looked_up(self, bits: Tensor, channel: int) -> Tensor | None:
        known = self.known[channel]  # in the order in which they were met
        ordered, places = known.sort()
        found = torch.searchsorted(ordered, bits).clamp(max=max(len(known) - 1, 0))
        new = bits if not len(known) else bits[ordered[found] != bits]
        if new.numel():
            known = torch.cat([known, new.unique()])
            if len(known) > 256:
                return None
            self.known[channel] = known
            self.book[channel, : len(known)] = known
            return self._looked_up(bits, channel)
        return places[found].to(torch.uint8)

    def _widen(self, filled: int) -> None:
        """Goes on with the values themselves, of which the first rows are known."""
        numbers, self.store = self.store, self._room(self.store.shape[1:], self.dtype)
        for first in (0, self.num_pairs):
            for start in range(first, first + filled, CHUNK):
                stop = min(start + CHUNK, first + filled)
                self.store[start:stop] = self._values(numbers[start:stop])
        self.book = None

    def _room(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        try:
            return torch.empty(2 * self.num_pairs, *shape, dtype=dtype, device=self.device)
        except RuntimeError as failure:
            size = 2 * self.num_pairs * torch.Size(shape).numel() * dtype.itemsize
            raise MemoryError(
                f"pair_cache: {self.num_pairs} pairs take {size / 2**20:,.0f} MiB of {self.device} memory, which is "
                "not there. Set pair_cache='cpu' where it was 'device', a smaller image size, or pair_cache='none'."
            ) from failure


def check_cacheable(dataset: Any, name: str, pair_cache: str) -> None:
    """Raises ValueError where a pair set, as the trainer draws from it, cannot be kept in memory."""
    if not isinstance(dataset, ImageRows):
        raise ValueError(
            f"pair_cache={pair_cache!r} keeps map-style sets of raw images (a datasets.Dataset with image_a and "
            f"image_b, and a processing_class), but {name} is of the type {type(dataset).__name__}: streams, "
            "adversarial pairs and model inputs are read anew at every step. Set pair_cache='none'."
        )
    if dataset.random_crop_scale < 1:
        raise ValueError(
            f"pair_cache={pair_cache!r} keeps images that are resized already, while a random crop comes before the "
            f"resizing (random_crop_scale={dataset.random_crop_scale}). Set random_crop_scale=1.0 or pair_cache='none'."
        )
