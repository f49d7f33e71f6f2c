# SPDX-License-Identifier: Apache-2.0
"""The order in which pairs are drawn, and the batches that they become."""

import random
from itertools import chain, islice, pairwise

import datasets
import numpy as np
import pytest
import torch
from small import pairs
from torch.utils.data import IterableDataset, get_worker_info

from ipg_hf.pairs import PairCollator, PairLoader, PairSampler

collate = PairCollator({"pixel_values"})


def keys(n, batch_size, count, **kwargs):
    return list(islice(PairSampler(n, batch_size, seed=3, **kwargs), count))


def rows_of(batches):
    return [row for batch in batches for _, row in batch]


def numbered(n):
    """Pairs whose a side is their number and whose b side is its negative."""
    return [{"pixel_values_a": torch.tensor([float(i)]), "pixel_values_b": torch.tensor([-float(i)])} for i in range(n)]


def draw(dataset, count, batch_size=4, position=0, collate=collate, **kwargs):
    loader = PairLoader(dataset, collate, batch_size, seed=3, **kwargs)
    loader.position = position
    batches = [next(loader)["pixel_values"] for _ in range(count)]
    assert loader.position == position + count * loader.batch_size * loader.world_size
    loader.close()
    return batches


def equal(ours, theirs):
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def generator_states():
    python, numpy = random.getstate(), np.random.get_state()
    return [
        torch.tensor(python[1]),
        torch.from_numpy(numpy[1].astype(np.int64)),
        torch.tensor(numpy[2]),
        *torch_state(),
    ]


def torch_state():
    return [torch.get_rng_state()]


class RandomRows(torch.utils.data.Dataset):
    """Pairs of noise from all three global generators."""

    def __len__(self):
        return 10

    def __getitem__(self, row):
        draws = [float(row), random.random(), np.random.rand(), torch.rand(()).item()]
        return {"pixel_values_a": torch.tensor(draws), "pixel_values_b": torch.tensor(draws)}


class Stream(IterableDataset):
    """Numbered pairs, shared out among worker processes; optionally with noise, or shuffled by epoch."""

    def __init__(self, n, noise=False):
        self.n = n
        self.noise = noise
        self.epochs = []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __iter__(self):
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for i in range(first, self.n, step):
            row = {"pixel_values_a": torch.tensor([float(i)]), "pixel_values_b": torch.tensor([-float(i)])}
            yield {name: values + torch.rand(1) for name, values in row.items()} if self.noise else row


# ---- PairSampler ----


def test_each_pass_is_a_permutation_and_drops_no_row():
    n, batch = 10, 4  # not divisible: batches go on across the end of a pass
    batches = keys(n, batch, 25)
    assert all(len(part) == batch for part in batches)
    positions = [position for part in batches for position, _ in part]
    assert positions == list(range(100))
    rows = rows_of(batches)
    passes = [rows[start : start + n] for start in range(0, 100, n)]
    assert all(sorted(order) == list(range(n)) for order in passes)
    assert len({tuple(order) for order in passes}) == len(passes)


def test_the_order_is_a_function_of_the_seed():
    assert keys(10, 4, 9) == keys(10, 4, 9)
    other = list(islice(PairSampler(10, 4, seed=4), 9))
    assert rows_of(other) != rows_of(keys(10, 4, 9))


def test_a_start_continues():
    whole = keys(10, 4, 12)
    for k in range(12):
        assert keys(10, 4, 12 - k, start=4 * k) == whole[k:]
    # positions keep their rows where the batch size changes
    assert rows_of(keys(10, 3, 4, start=7)) == rows_of(whole)[7:19]


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_parts_of_the_processes_tile_the_batches_of_one(world_size):
    whole = keys(10, 2 * world_size, 9)
    parts = [keys(10, 2, 9, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [[*chain(*step)] for step in zip(*parts, strict=True)] == whole
    later = [keys(10, 2, 4, rank=rank, world_size=world_size, start=2 * world_size * 5) for rank in range(world_size)]
    assert [[*chain(*step)] for step in zip(*later, strict=True)] == whole[5:]


# ---- PairLoader ----


def test_batches_are_the_samplers_rows():
    batches = draw(numbered(10), 5)
    expected = torch.tensor(rows_of(keys(10, 4, 5)), dtype=torch.float32).view(5, 4, 1)
    assert equal(batches, [torch.cat([rows, -rows]) for rows in expected])


def test_processes_tile_the_batches_of_one():
    whole = draw(numbered(10), 6, batch_size=6)
    parts = [draw(numbered(10), 6, batch_size=2, rank=rank, world_size=3) for rank in range(3)]
    for step, batch in enumerate(whole):
        halves = [part[step].chunk(2) for part in parts]
        assert torch.equal(torch.cat([torch.cat(side) for side in zip(*halves, strict=True)]), batch)


def test_a_batch_larger_than_the_set_is_the_set():
    batches = draw(numbered(5), 4, batch_size=32)
    assert all(len(batch) == 10 for batch in batches)
    assert all(sorted(batch[:5, 0].tolist()) == list(range(5)) for batch in batches)
    assert len({tuple(batch[:, 0].tolist()) for batch in batches}) > 1
    loader = PairLoader(numbered(5), collate, 32, seed=3, world_size=2)
    assert loader.batch_size == 3  # each half of the set, rounded up


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["rows", "random rows", "stream"])
def test_the_global_generators_are_left_alone(workers, kind):
    dataset = {"rows": numbered(10), "random rows": RandomRows(), "stream": Stream(10, noise=True)}[kind]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = generator_states()
    first = draw(dataset, 4, num_workers=workers)
    assert equal(generator_states(), before)
    # and what is drawn does not depend on them
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    assert equal(draw(dataset, 4, num_workers=workers), first)
    if kind == "random rows":  # all three generators are seeded, anew for each batch
        noise = torch.cat([batch[: len(batch) // 2, 1:] for batch in first])
        assert noise.unique(dim=0).shape == noise.shape
        assert all(noise[:, i].unique().numel() == len(noise) for i in range(3))


def with_noise(batch):
    return {name: [torch.rand(2) + value for value in batch["value"]] for name in ("pixel_values_a", "pixel_values_b")}


@pytest.mark.parametrize("kind", ["rows", "random rows", "datasets"])
def test_workers_and_resuming_change_nothing(kind):
    dataset = {
        "rows": numbered(10),
        "random rows": RandomRows(),
        "datasets": datasets.Dataset.from_dict({"value": list(range(10))}).with_transform(with_noise),
    }[kind]
    whole = draw(dataset, 7)
    assert not equal(whole[:3], whole[3:6])
    for workers in (1, 2):
        assert equal(draw(dataset, 7, num_workers=workers), whole)
    for workers in (0, 2):
        assert equal(draw(dataset, 4, position=12, num_workers=workers), whole[3:])


def test_the_data_sets_own_batched_fetch_is_used():
    class Batched(list):
        def __getitems__(self, rows):
            return [{"pixel_values_a": torch.ones(1), "pixel_values_b": torch.zeros(1)} for _ in rows]

    assert draw(Batched([None] * 8), 1)[0].flatten().tolist() == [1.0] * 4 + [0.0] * 4


def test_a_closed_loader_goes_on_where_it_was():
    whole = draw(numbered(10), 6)
    loader = PairLoader(numbered(10), collate, 4, seed=3, num_workers=1, prefetch_factor=4)
    begun = [next(loader)["pixel_values"] for _ in range(3)]
    loader.close()  # what the worker had fetched ahead was not drawn
    assert loader.position == 12
    assert equal(begun + [next(loader)["pixel_values"] for _ in range(3)], whole)
    loader.close()


# ---- Streams ----


def to_tensors(row):
    return {"pixel_values_a": torch.tensor([float(row["i"])]), "pixel_values_b": torch.tensor([-float(row["i"])])}


def stream(kind, n=10):
    if kind == "torch":
        return Stream(n)
    rows = datasets.Dataset.from_dict({"i": list(range(n))})
    return rows.to_iterable_dataset(num_shards=int(kind[0])).map(to_tensors)


@pytest.mark.parametrize("kind", ["torch", "1 shard", "3 shards"])
@pytest.mark.parametrize("workers", [0, 2])
def test_streams_are_endless_and_resume(kind, workers):
    batches = draw(stream(kind), 9, num_workers=workers)
    drawn = torch.cat([batch[: len(batch) // 2] for batch in batches]).flatten().tolist()
    assert {*drawn} == set(range(10))
    if workers == 0 or kind == "1 shard":  # one process reads all of it, pass after pass
        assert all(sorted(drawn[start : start + 10]) == list(range(10)) for start in (0, 10, 20))
        assert (drawn == [float(i % 10) for i in range(36)]) == (kind != "3 shards")  # which datasets shuffles by epoch
    for skipped in (1, 5):
        resumed = draw(stream(kind), 9 - skipped, position=4 * skipped, num_workers=workers)
        assert equal(resumed, batches[skipped:])


def test_processes_share_out_a_stream():
    whole = draw(Stream(10), 5, batch_size=4)
    parts = [draw(Stream(10), 5, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    halves = [
        torch.cat([torch.cat(s) for s in zip(*(p.chunk(2) for p in p2), strict=True)])
        for p2 in zip(*parts, strict=True)
    ]
    assert equal(halves, whole)


def test_noise_of_a_stream_repeats_at_a_resume_and_not_in_the_next_pass():
    batches = draw(Stream(4, noise=True), 5)
    assert equal(draw(Stream(4, noise=True), 3, position=8), batches[2:])
    assert not any(torch.equal(a, b) for a, b in pairwise(batches))


def test_each_pass_of_a_stream_has_its_epoch():
    dataset = Stream(8)
    draw(dataset, 5)
    assert dataset.epochs == [0, 1, 2]


@pytest.mark.parametrize("workers", [0, 2])
def test_shuffled_streams_change_with_the_pass_and_leave_the_users_object_alone(workers):
    dataset = stream("2 shards", 8).shuffle(seed=0, buffer_size=8)
    batches = draw(dataset, 8, num_workers=workers)
    passes = [torch.cat([b[:4] for b in batches[i : i + 2]]).flatten().tolist() for i in range(0, 8, 2)]
    assert all(sorted(order) == list(range(8)) for order in passes)
    assert len({tuple(order) for order in passes}) > 2
    assert dataset.epoch == 0  # the epoch lies in memory that workers share: each one has a copy
    assert equal(draw(dataset, 4, position=16, num_workers=workers), batches[4:])


def test_streams_without_rows():
    with pytest.raises(ValueError, match="the pair set is empty"):
        draw(Stream(0), 1)

    class Once(IterableDataset):
        def __init__(self):
            self.rows = iter(numbered(6))

        def __iter__(self):
            return self.rows

    loader = PairLoader(Once(), collate, 4, seed=0)
    next(loader)
    with pytest.raises(ValueError, match=r"ended after 6 rows and gave none when it was read again"):
        next(loader)


# ---- PairCollator ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8])
def test_two_halves(dtype):
    rows = [{name: (values * 10).to(dtype) for name, values in row.items()} for row in pairs(3)]
    batch = collate(rows)
    assert list(batch) == ["pixel_values"] and batch["pixel_values"].dtype == dtype
    a, b = batch["pixel_values"].chunk(2)
    assert torch.equal(a, torch.stack([row["pixel_values_a"] for row in rows]))
    assert torch.equal(b, torch.stack([row["pixel_values_b"] for row in rows]))


def test_only_what_forward_takes_becomes_an_input():
    row = {f"{name}_{side}": torch.ones(2) for name in ("pixel_values", "mask", "unknown") for side in "ab"}
    row |= {"source_id": 4, "label": 1, "attribute_a": 0, "attribute_b": 1, "half_a": torch.ones(2)}
    assert {*PairCollator({"pixel_values", "mask", "half", "label"})([row])} == {"pixel_values", "mask"}
    assert {*PairCollator({"mask"}, main_input="mask")([row])} == {"mask"}


def test_lists_and_arrays_become_tensors():
    batch = collate([{"pixel_values_a": [[1.0, 2.0]], "pixel_values_b": np.array([[3, 4]], np.float32)}])
    assert batch["pixel_values"].tolist() == [[[1.0, 2.0]], [[3.0, 4.0]]]


def damaged(change, row=2):
    rows = [{**values, "source_id": 40 + i} for i, values in enumerate(pairs(4))]
    change(rows[row])
    return rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row["pixel_values_a"].view(-1)[5].fill_(float("nan")), "NaN or infinite values in 'pixel_values'"),
        (
            lambda row: row["pixel_values_b"].view(-1)[5].fill_(float("-inf")),
            "NaN or infinite values in 'pixel_values'",
        ),
        (
            lambda row: row.update(pixel_values_b=row["pixel_values_b"][:, :8]),
            r"pixel_values_b torch.float32 \(3, 8, 16\)",
        ),
        (lambda row: row.update(pixel_values_b=row["pixel_values_b"].double()), "and pixel_values_b torch.float64"),
        (lambda row: row.update({f"pixel_values_{s}": torch.ones(3, 8, 8) for s in "ab"}), r"\(3, 16, 16\) in row 0"),
        (lambda row: row.update({f"pixel_values_{s}": row[f"pixel_values_{s}"].half() for s in "ab"}), "torch.float16"),
        (lambda row: row.pop("pixel_values_b"), "no pixel_values_a or no pixel_values_b"),
    ],
    ids=["nan", "inf", "shape", "dtype", "shape of the row", "dtype of the row", "missing"],
)
def test_faults_name_the_row_and_its_source(change, message):
    collate(damaged(lambda row: None))
    with pytest.raises(ValueError, match=message) as error:
        collate(damaged(change))
    assert "row 2 of the batch (source_id 42)" in str(error.value)


def test_missing_columns():
    for row in ({"image_a": 1, "image_b": 2}, {"pixel_values_a": torch.ones(1)}, {"pixel_values": torch.ones(1)}):
        with pytest.raises(ValueError, match=r"no columns pixel_values_a and pixel_values_b, only \['") as error:
            collate([row])
        assert str(sorted(row)) in str(error.value) and "processing_class" in str(error.value)
