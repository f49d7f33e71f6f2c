# SPDX-License-Identifier: Apache-2.0
"""Pairs in memory: the training is that without them, to the last bit, and what cannot be kept is refused."""

import gc
import logging
import time
import weakref

import datasets
import numpy as np
import pytest
import small
import torch
from PIL import Image
from small import bit_equal, logged, trainer, weights
from transformers import TrainerCallback, ViTImageProcessor
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from ipg_hf import IPGConfig
from ipg_hf.pairs import AdversarialPairs, ImageRows, PairCollator, PairLoader
from ipg_hf.pairs.cache import CachedPairs, Kept

CPU = torch.device("cpu")
PAIR = {"image_a": "pixel_values_a", "image_b": "pixel_values_b"}
SIDE = small.SIZE
MODELS = {"vit": small.vit, "resnet": small.resnet, "timm": small.timm_resnet}


def timm_processor(crop=1.0):
    settings = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "interpolation": "bicubic"}
    return TimmWrapperImageProcessor({"input_size": [3, SIDE, SIDE], "crop_pct": crop, **settings})


PROCESSORS = {
    "vit": ViTImageProcessor(size={"height": SIDE, "width": SIDE}),
    "resnet": ViTImageProcessor(size={"height": SIDE, "width": SIDE}, resample=3, image_mean=[0.4, 0.5, 0.6]),
    "timm": timm_processor(),
}


def raw_pairs(n=10, size=(20, 28), seed=1):
    rng = np.random.default_rng(seed)
    columns = {
        side: [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(n)]
        for side in ("image_a", "image_b")
    }
    return datasets.Dataset.from_dict(columns | {"label": [i % 2 for i in range(n)]})


def run(folder, name="vit", **settings):
    training = trainer(
        folder,
        MODELS[name](),
        small.rows(24),
        {"one": raw_pairs(), "other": raw_pairs(7, seed=5)},
        processing_class=PROCESSORS[name],
        **{"max_steps": 5, "freeze_norm": True, "learning_rate": 1e-3} | settings,
    )
    training.train(resume_from_checkpoint=None)
    return training


def end(training):
    times = ("ipg/pair_wait", "train_runtime", "train_samples_per_second", "train_steps_per_second")
    history = [{k: v for k, v in entry.items() if k not in times} for entry in training.state.log_history]
    return history, training.progress.positions, small.optimizer_state(training.model, training.optimizer)


@pytest.mark.parametrize("settings", [{}, {"random_flip": True}, {"gradient_accumulation_steps": 2}])
@pytest.mark.parametrize("name", MODELS)
def test_the_training_is_the_same_to_the_bit(tmp_path, name, settings):
    """The resizing of 20×28 pixels to 16×16 commutes with flips exactly: no processor here cuts odd margins."""
    plain, *kept = (run(tmp_path, name, pair_cache=cache, **settings) for cache in ("none", "cpu", "device"))
    for training in kept:
        assert bit_equal(weights(plain.model), weights(training.model))
        (history, positions, state), theirs = end(plain), end(training)
        assert history == theirs[0] and positions == theirs[1] == {"one": 20, "other": 20}
        assert bit_equal(state, theirs[2]) and state
    control = run(tmp_path, name, pair_cache="cpu", pair_seed=1, **settings)
    assert small.differences(weights(plain.model), weights(control.model)) > 1e-5


def test_flips_are_what_makes_the_difference(tmp_path):
    ends = [weights(run(tmp_path, pair_cache="cpu", random_flip=flip).model) for flip in (False, True)]
    assert small.differences(*ends) > 1e-5


def test_labels_come_with_the_pairs(tmp_path):
    settings = {"pair_objective": "augmentation", "random_flip": True}
    ends = [weights(run(tmp_path, pair_cache=cache, **settings).model) for cache in ("none", "cpu")]
    assert bit_equal(*ends)


@pytest.mark.parametrize("at", [2, 4])
def test_a_resumed_run_goes_on_with_the_same_pairs(tmp_path, at):
    settings = {"pair_cache": "cpu", "random_flip": True, "save_strategy": "steps", "save_steps": 2}
    whole = run(tmp_path, **settings)
    resumed = trainer(
        tmp_path / "resumed",
        small.vit(),
        small.rows(24),
        {"one": raw_pairs(), "other": raw_pairs(7, seed=5)},
        processing_class=PROCESSORS["vit"],
        **{"max_steps": 5, "freeze_norm": True, "learning_rate": 1e-3, **settings},
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    assert bit_equal(weights(whole.model), weights(resumed.model))
    assert end(whole)[1:2] == end(resumed)[1:2] == ({"one": 20, "other": 20},)
    assert bit_equal(end(whole)[2], end(resumed)[2])


# ---- The batches ----


def loaders(processor, dataset=None, batch=4, **kwargs):
    settings = {key: kwargs.pop(key) for key in ("random_flip",) if key in kwargs}
    rows = ImageRows(dataset or raw_pairs(), processor, PAIR, seed=3, **settings)
    collate = PairCollator({"pixel_values"})
    return [PairLoader(d, collate, batch, seed=3, **kwargs) for d in (rows, CachedPairs(rows, collate, CPU, CPU))]


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("world", [{}, {"rank": 1, "world_size": 2}])
def test_batches_equal_those_of_the_loader(name, flip, world):
    plain, kept = loaders(PROCESSORS[name], random_flip=flip, **world)
    assert {input.store.dtype for input in kept.dataset.inputs.values()} == {torch.uint8}
    plain.position = kept.position = 8
    for _ in range(6):  # more than two passes
        assert bit_equal(next(plain), next(kept))
        assert plain.position == kept.position


def test_an_odd_margin_moves_what_is_flipped_by_one_pixel():
    """The limit that the docs state: 21 columns, of which 5 are cut off, 2 on one side."""
    processor = timm_processor(crop=16 / 21)
    plain, kept = loaders(processor, raw_pairs(size=(21, 21)), random_flip=True)
    same = []
    for _ in range(6):
        ours, theirs = next(kept)["pixel_values"], next(plain)["pixel_values"]
        for a, b in zip(ours, theirs, strict=True):
            same.append(torch.equal(a, b))
            assert same[-1] or torch.equal(a[..., 1:], b[..., :-1]) or torch.equal(a[..., :-1], b[..., 1:])
    assert 0 < sum(same) < len(same)  # those not flipped are the same


class Smooth:
    """A processor whose values are no 8-bit numbers any more, from some image on."""

    def __init__(self, first):
        self.first, self.seen = first, 0

    def __call__(self, images, return_tensors):
        values = torch.stack([torch.tensor(np.asarray(image)[:SIDE, :SIDE]).permute(2, 0, 1) / 255 for image in images])
        self.seen += len(images)
        return {"pixel_values": values.sqrt() if self.seen <= self.first else values.float() @ torch.rand(SIDE, SIDE)}


@pytest.mark.parametrize("first", [0, 8])
def test_values_that_are_many_are_kept_whole(monkeypatch, first):
    monkeypatch.setattr("ipg_hf.pairs.cache.CHUNK", 4)
    dataset, collate = raw_pairs(), PairCollator({"pixel_values"})
    torch.manual_seed(0)
    kept = CachedPairs(ImageRows(dataset, Smooth(first), PAIR), collate, CPU, CPU)
    torch.manual_seed(0)
    rows = ImageRows(dataset, Smooth(first), PAIR)
    wanted = torch.cat([collate(rows.__getitems__(numbers))["pixel_values"].unflatten(0, (2, -1))
                        for numbers in (range(4), range(4, 8), range(8, 10))], 1)  # fmt: skip
    assert kept.inputs["pixel_values"].store.dtype == torch.float32
    assert torch.equal(kept.batch([(0, i) for i in range(10)])["pixel_values"], wanted.flatten(0, 1))


def test_values_are_kept_by_their_bits():
    values = torch.tensor([[0.0, -0.0], [torch.nan, torch.inf], [1.5, 0.0], [-0.0, 3.0]])
    kept = Kept(values, 2, CPU)
    kept.put(range(2), values)
    found = kept.get(torch.tensor([1, 0]), CPU)
    assert kept.store.dtype == torch.uint8
    assert torch.equal(found.view(torch.int32), values[[1, 0, 3, 2]].view(torch.int32))


@pytest.mark.parametrize("count", [256, 257])
def test_up_to_256_values_a_channel_are_8_bit_numbers(count):
    values = torch.arange(2.0 * 2 * 20 * 20).view(2, 2, 20, 20) % count
    kept = Kept(values, 1, CPU)
    kept.put(range(1), values)
    assert kept.store.dtype == (torch.uint8 if count == 256 else torch.float32)
    assert torch.equal(kept.get(torch.tensor([0]), CPU), values)


def test_other_numbers_stay_as_they_are():
    for values in (torch.arange(600).view(2, 300), torch.randn(2, 5, dtype=torch.float64), torch.tensor([[True]] * 2)):
        kept = Kept(values, 1, CPU)
        kept.put(range(1), values)
        found = kept.get(torch.tensor([0]), CPU)
        assert found.dtype == values.dtype and torch.equal(found, values)


def test_the_memory_it_takes_is_said(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "ipg_hf"):
        rows = ImageRows(raw_pairs(50), PROCESSORS["vit"], PAIR)
        CachedPairs(rows, PairCollator({"pixel_values"}), CPU, CPU)
    (message,) = [record.getMessage() for record in caplog.records if "pair_cache" in record.getMessage()]
    assert message == "pair_cache: 50 pairs take 0.1 MiB (uint8 on cpu) in each process."  # 50 · 2 · 3 · 16 · 16 bytes


# ---- What is refused ----


def test_too_little_memory():
    with pytest.raises(MemoryError, match=r"10000000000 pairs take 14,648,438 MiB of cpu memory.*pair_cache='none'"):
        Kept(torch.zeros(2, 3, 16, 16), 10**10, CPU)


@pytest.mark.parametrize(
    ("pair_set", "settings", "words"),
    [
        (lambda: raw_pairs().to_iterable_dataset(), {}, ["pair_dataset", "IterableDataset", "pair_cache='none'"]),
        (lambda: AdversarialPairs(small.images(8)), {}, ["Twins", "pair_cache='none'"]),
        (lambda: {"ready": small.pairs(4)}, {}, ["pair_dataset['ready'] is of the type list", "raw images"]),
        (raw_pairs, {"random_crop_scale": 0.5}, ["random_crop_scale=0.5", "Set random_crop_scale=1.0"]),
    ],
    ids=["stream", "adversarial", "tensors", "crops"],
)
def test_sets_that_cannot_be_kept(tmp_path, pair_set, settings, words):
    with pytest.raises(ValueError) as error:
        trainer(tmp_path, pair_dataset=pair_set(), processing_class=PROCESSORS["vit"], pair_cache="cpu", **settings)
    assert all(word in str(error.value) for word in ["pair_cache='cpu'", *words]), str(error.value)


def test_patches_cannot_be_flipped():
    class Patches:
        def __call__(self, images, return_tensors):
            return {"pixel_values": torch.zeros(len(images), 4, 12)}

    rows = ImageRows(raw_pairs(), Patches(), PAIR, random_flip=True)
    with pytest.raises(ValueError, match=r"flips images of shape .*pixel_values is none: set random_flip=False"):
        CachedPairs(rows, PairCollator({"pixel_values"}), CPU, CPU)


def test_the_setting_is_one_of_three(tmp_path):
    with pytest.raises(ValueError, match="pair_cache='disk' is not valid: it must be one of none, cpu, device"):
        IPGConfig(str(tmp_path), use_cpu=True, pair_cache="disk")


# ---- Waiting for pairs ----


class SlowPairs(small.Recorded):
    def __getitem__(self, row):
        time.sleep(self.seconds)
        return super().__getitem__(row)


class SlowSteps(TrainerCallback):
    def on_optimizer_step(self, args, state, control, **kwargs):
        time.sleep(0.05)


@pytest.mark.parametrize(("seconds", "least", "most"), [(0.0, 0.0, 0.2), (0.1, 0.6, 0.95)])
def test_the_share_of_time_that_pairs_are_waited_for(tmp_path, seconds, least, most):
    """Four pairs of 0.1 s in a step that takes 0.05 s more and its arithmetic: most of it."""
    slow = SlowPairs(small.pairs(10))
    slow.seconds = 0.0
    training = trainer(tmp_path, pair_dataset=slow, check_pairs=False, max_steps=4, logging_steps=2)
    training.add_callback(SlowSteps())
    slow.seconds = seconds
    training.train()
    for entry in logged(training):
        assert least <= entry["ipg/pair_wait"] <= most


def test_the_time_waited_is_of_the_steps_since_the_last_line():
    from ipg_hf.callbacks import PairProgress

    progress = PairProgress()
    for waited, stepped, wanted in ((1.0, 4.0, 0.25), (0.5, 1.0, 0.5)):
        progress.add({"distance": torch.tensor(1.0)})
        progress.waited += waited
        progress.stepped += stepped
        assert progress.pop(1.0, 0.1)["ipg/pair_wait"] == wanted


def test_an_attempt_that_failed_lets_go_of_its_pairs(tmp_path):
    """`auto_find_batch_size` tries smaller batches where memory is short: what was kept must not be there twice."""
    model, kept, alive = small.vit(), [], []
    whole = model.forward

    def short_of_memory(pixel_values=None, labels=None, **kwargs):
        if model.training and len(pixel_values) > 4:
            kept.append(weakref.ref(training._pair_loaders[""].dataset))
            raise RuntimeError("CUDA out of memory. Tried to allocate all there is.")
        return whole(pixel_values=pixel_values, labels=labels, **kwargs)

    class Look(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            gc.collect()
            alive.append(any(cached() is not None for cached in kept))

    model.forward = short_of_memory
    settings = {"pair_cache": "cpu", "auto_find_batch_size": True, "callbacks": [Look()]}
    training = trainer(tmp_path, model, pair_dataset=raw_pairs(), processing_class=PROCESSORS["vit"], **settings)
    training.train()
    assert kept and alive == [False] * 3
    assert not training._pair_loaders and not training._guided_step.loaders
