# SPDX-License-Identifier: Apache-2.0
"""Draws pairs: an endless, shuffled order that can be resumed, and batches of two halves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from ..losses import IGNORED
from ..seeding import seeded
from .transforms import ImageRows


class PairCollator:
    """Makes a batch of pairs: the first half holds the a sides, the second half the b sides.

    Args:
        input_names: names of the inputs that the model's forward takes. The columns `<name>_a` and `<name>_b` of a row
            become the input `<name>`.
        main_input: name of the input that every row must have.
        labels: whether a batch of rows with a column `label` also holds `labels`, for both halves.

    A call takes n rows and returns `{name: tensor (2n, ...)}`. It raises a ValueError if columns are missing, if the
    sides differ in shape or dtype, or if a value is NaN or infinite.
    """

    def __init__(self, input_names: Collection[str], main_input: str = "pixel_values", *, labels: bool = False):
        self.input_names = frozenset(input_names)
        self.main_input = main_input
        self.labels = labels

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = {}
        for name in self.names(rows[0]):
            columns = a_side, b_side = f"{name}_a", f"{name}_b"
            missing = [number for number, row in enumerate(rows) if a_side not in row or b_side not in row]
            if missing:
                raise ValueError(
                    f"the pair set has no {name}_a or no {name}_b in row {missing[0]} of the batch"
                    f"{source_of(rows[missing[0]])}, other than in row 0."
                )
            sides = [[torch.as_tensor(row[column]) for row in rows] for column in columns]
            values = sides[0] + sides[1]
            if len({(value.shape, value.dtype) for value in values}) > 1:
                for number, (a, b) in enumerate(zip(*sides, strict=True)):
                    where = f"row {number} of the batch{source_of(rows[number])}"
                    check_sides(name, a, b, where)
                    check_rows_agree(name, sides[0][0], a, where)
            batch[name] = torch.stack(values)
            self._check_finite(name, batch[name], rows.__getitem__)
        if self.labels and "label" in rows[0]:
            for number, row in enumerate(rows):
                if row.get("label") is None:
                    raise ValueError(
                        f"the pair set has no label in row {number} of the batch{source_of(row)}, other than in row 0: "
                        f"give it one, or {IGNORED} where it is not known."
                    )
            labels = [row["label"] for row in rows] * 2
            of_classes = isinstance(labels[0], int)  # at once: a tensor for each would take a tenth of a small step
            batch["labels"] = torch.tensor(labels) if of_classes else torch.stack([*map(torch.as_tensor, labels)])
        return batch

    def of_columns(self, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Makes the batch that a call makes, of rows whose values are stacked already.

        Args:
            columns: column of the pair set -> its values in n rows, (n, ...).
        """
        batch = {}
        for name in self.names(columns):
            a, b = columns[f"{name}_a"], columns[f"{name}_b"]
            check_sides(name, a[0], b[0], "row 0 of the batch")
            batch[name] = torch.cat([a, b])
            self._check_finite(name, batch[name], lambda n: {column: rows[n] for column, rows in columns.items()})
        if self.labels and "label" in columns:
            batch["labels"] = columns["label"].repeat(2)
        return batch

    def _check_finite(self, name: str, values: Tensor, row_of: Callable[[int], Mapping[str, Any]]) -> None:
        # the sum shows at a fraction of the cost whether it is worth looking for a value that is not finite
        if torch.isfinite(values.sum()):
            return
        finite = torch.isfinite(values).flatten(1).all(1)
        if not finite.all():
            number = int(finite.int().argmin()) % (len(values) // 2)
            raise ValueError(
                f"the pair set has NaN or infinite values in {name!r}, row {number} of the batch"
                f"{source_of(row_of(number))}. Remove or mend that row."
            )

    def names(self, row: Mapping[str, Any]) -> list[str]:
        """Returns the names of the model inputs that a row holds for both sides."""
        if not isinstance(row, Mapping):
            raise ValueError(
                f"a row of the pair set is of type {type(row).__name__}: it must be a dict of model inputs, e.g. "
                f"{self.main_input}_a and {self.main_input}_b."
            )
        found = [key[:-2] for key in row if key.endswith("_a") and f"{key[:-2]}_b" in row]
        names = [name for name in found if name in self.input_names]
        if self.main_input not in names:
            raise ValueError(
                f"the pair set has no columns {self.main_input}_a and {self.main_input}_b, only {sorted(row)}. Give it "
                "image_a and image_b and the trainer an image processor (processing_class), or transform it yourself. "
                "Raw images must be in a datasets.Dataset (from_list) or IterableDataset (from_generator)."
            )
        return names


def check_sides(name: str, a: Tensor, b: Tensor, where: str) -> None:
    """Raises a ValueError if the two sides of a pair differ in shape or dtype."""
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(
            f"the sides of a pair must have one shape and dtype, but {name}_a is {a.dtype} {tuple(a.shape)} and "
            f"{name}_b {b.dtype} {tuple(b.shape)} in {where}."
        )


def check_rows_agree(name: str, first: Tensor, a: Tensor, where: str) -> None:
    """Raises a ValueError if a row differs from row 0 in shape or dtype, so that they cannot form a batch."""
    if first.shape != a.shape or first.dtype != a.dtype:
        raise ValueError(
            f"all rows of pairs must have one shape and dtype, but {name}_a is {first.dtype} {tuple(first.shape)} in "
            f"row 0 and {a.dtype} {tuple(a.shape)} in {where}. Resize and crop all images to one size."
        )


def source_of(row: Mapping[str, Any]) -> str:
    """Returns the row's `source_id` for a message, or nothing if the row has none."""
    return f" (source_id {row['source_id']})" if "source_id" in row else ""


class PairSampler(Sampler):
    """Draws endless batches of keys (position, row). Each pass over the rows is a new permutation.

    No row is dropped: a batch goes on into the next pass. Position p is row `permutation(seed, p // n)[p % n]` of n
    rows, for every batch size and number of processes. Process r of m takes part r of each global batch.

    Args:
        num_rows: number of rows of the pair set.
        batch_size: number of keys in a batch of this process.
        seed: seed of the permutations.
        start: position of the first key.
        rank: number of this process.
        world_size: number of processes.
    """

    def __init__(
        self, num_rows: int, batch_size: int, *, seed: int, start: int = 0, rank: int = 0, world_size: int = 1
    ):
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = self.start + self.rank * self.batch_size
        number, order = -1, np.empty(0)
        while True:
            keys = []
            for position in range(first, first + self.batch_size):
                if position // self.num_rows != number:
                    number = position // self.num_rows
                    order = np.random.default_rng((self.seed, number)).permutation(self.num_rows)
                keys.append((position, int(order[position % self.num_rows])))
            yield keys
            first += self.batch_size * self.world_size


class _MapPairs(Dataset):
    """Fetches the keys of a PairSampler from the user's data set.

    A random transform of the user's data set draws from the global generators. For the fetch, they are set from the
    seed and the position, and put back after it. The pairs and the rest of the training do not disturb each other.
    """

    def __init__(self, dataset: Any, seed: int):
        self.dataset = dataset
        self.seed = seed

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Mapping[str, Any]]:
        if getattr(self.dataset, "takes_positions", False):
            return self.dataset.__getitems__(keys)
        rows = [row for _, row in keys]
        with seeded(self.seed, keys[0][0]):
            if hasattr(self.dataset, "__getitems__"):
                return self.dataset.__getitems__(rows)
            return [self.dataset[row] for row in rows]


class _StreamPairs(IterableDataset):
    """Iterates over an iterable data set again and again."""

    def __init__(self, dataset: Any, seed: int):
        self.dataset = dataset
        self.seed = seed

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        # a data set's epoch lies in memory that worker processes share, and they reach its end at different times
        dataset = copy.deepcopy(self.dataset) if isinstance(self.dataset, datasets.IterableDataset) else self.dataset
        drawn = epoch = 0
        while True:
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(epoch)
            before = drawn
            rows = iter(dataset)
            while True:
                with seeded(self.seed, worker.id if worker else 0, drawn):
                    row = next(rows, None)
                if row is None:
                    break
                yield row
                drawn += 1
            if drawn == before:
                if drawn:
                    raise ValueError(
                        f"the stream of pairs ended after {drawn} rows and gave none when it was read again: each "
                        "iter() of it must start anew."
                    )
                raise ValueError("the pair set is empty: its stream ended without a single row.")
            epoch += 1


class PairLoader:
    """Draws endless batches of pairs, from any position.

    A preloaded [`ImageRows`] is read by whole batches in this process, since that takes less time than a worker's
    answer. Every other data set is read by a `torch.utils.data.DataLoader`.

    Args:
        dataset: a map-style data set, or an iterable one, which is read again from its start when it ends.
        collate: makes a batch of rows.
        batch_size: number of pairs in a batch of this process; at most as many as a map-style set has.
        seed: seed of the order and of random transforms.
        rank: number of this process.
        world_size: number of processes that share each global batch.
        loader_kwargs: further arguments of `torch.utils.data.DataLoader` (worker processes, pinned memory).

    Attributes:
        cost: what the last batch cost besides reading it, for the logs.
        position: number of pairs that all processes together have drawn. Set it before the first draw to continue from
            there. A stream is read again up to that position.
    """

    cost: Mapping[str, float] = MappingProxyType({})

    def __init__(
        self,
        dataset: Any,
        collate: PairCollator,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        **loader_kwargs: Any,
    ):
        self.dataset = dataset
        self.collate = collate
        self.batch_size = batch_size
        if not is_stream(dataset):
            self.batch_size = min(batch_size, -(-len(dataset) // world_size))
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.loader_kwargs = loader_kwargs
        self.position = 0
        self._batches: Iterator[Any] | None = None

    def __next__(self) -> Any:
        if self._batches is None:
            self._batches = self._stream() if is_stream(self.dataset) else self._rows()
        batch = next(self._batches)
        self.position += self.batch_size * self.world_size
        return batch

    def close(self) -> None:
        """Ends the worker processes."""
        self._batches = None

    def _rows(self) -> Iterator[Any]:
        sampler = PairSampler(
            len(self.dataset),
            self.batch_size,
            seed=self.seed,
            start=self.position,
            rank=self.rank,
            world_size=self.world_size,
        )
        if isinstance(self.dataset, ImageRows) and self.dataset.preloaded is not None:
            return (self.collate.of_columns(self.dataset.columns_of(keys)) for keys in sampler)
        return iter(self._loader(_MapPairs(self.dataset, self.seed), batch_sampler=sampler, collate_fn=self.collate))

    def _stream(self) -> Iterator[Any]:
        # every process reads the whole global batch and takes its part: exact for any stream, but all rows are read
        size, rank = self.batch_size, self.rank
        rows = _StreamPairs(self.dataset, self.seed)
        batches = iter(self._loader(rows, batch_size=size * self.world_size, collate_fn=list))
        for _ in range(self.position // (size * self.world_size)):
            next(batches)
        return (self.collate(rows[rank * size : (rank + 1) * size]) for rows in batches)

    def _loader(self, dataset: Any, **kwargs: Any) -> DataLoader:
        workers = self.loader_kwargs.get("num_workers", 0)
        # a worker without a shard of its own would find the stream empty
        workers = min(workers, getattr(self.dataset, "num_shards", workers)) if is_stream(self.dataset) else workers
        settings = {**self.loader_kwargs, "num_workers": workers, **kwargs}
        if workers == 0:
            settings |= {"prefetch_factor": None, "multiprocessing_context": None}
        # a generator of its own: starting the loader must not draw from the global one
        return DataLoader(dataset, generator=torch.Generator().manual_seed(self.seed), **settings)


def is_stream(dataset: Any) -> bool:
    """Returns whether a data set can only be iterated."""
    return isinstance(dataset, (IterableDataset, datasets.IterableDataset))
