# SPDX-License-Identifier: Apache-2.0
"""What a step waits for: the device, each time that Python reads the value of a tensor, and the pairs."""

import gc
import time
import weakref

import pytest
import small
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from ipg_hf.callbacks import PairProgress
from ipg_hf.pairs.loader import PairLoader
from ipg_hf.step import GuidedStep


class Reads(TorchDispatchMode):
    """Counts the values that are read while it is open."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def reads(tmp_path, monkeypatch, **settings):
    """Values read before and after the task's backward, of each step."""
    counts, mode = [], Reads()
    drawn = PairLoader.__next__

    def watch(name, plain):
        def counted(step, model):
            before = mode.count
            with mode:
                plain(step, model)
            counts.append(mode.count - before)

        monkeypatch.setattr(GuidedStep, name, counted)

    def uncounted(loader):  # the collator reads a batch that is in the host's memory
        before = mode.count
        batch = drawn(loader)
        mode.count = before
        return batch

    watch("before_task", GuidedStep.before_task)
    watch("after_task", GuidedStep.after_task)
    monkeypatch.setattr(PairLoader, "__next__", uncounted)
    small.trainer(tmp_path, **settings).train()
    return list(zip(counts[::2], counts[1::2], strict=True))


@pytest.mark.parametrize(
    "distance", [{}, *({"invariance_distance": "rationale", "rationale_reduction": name} for name in ("mean", "pair"))]
)
def test_a_guided_step_waits_once(tmp_path, monkeypatch, distance):
    """To know whether the corrective gradient is finite, before the first update."""
    assert reads(tmp_path, monkeypatch, max_grad_norm=0.1, **distance) == [(1, 0)] * 3


@pytest.mark.parametrize("interval", [1, 4])
def test_correcting_while_the_pairs_disagree_waits_for_the_divergence_too(tmp_path, monkeypatch, interval):
    """Before the backward of the pairs and after it; then for the norm."""
    settings = {"correction_schedule": "violated", "invariance_threshold": 0.0, "correction_interval": interval}
    assert reads(tmp_path, monkeypatch, **settings) == [(3, 0)] * 3


def test_a_fixed_interval_waits_once_a_look(tmp_path, monkeypatch):
    assert reads(tmp_path, monkeypatch, correction_interval=2) == [(1, 0), (0, 0), (1, 0)]


# ---- Waiting for pairs ----


class SlowPairs(small.Recorded):
    """Pairs of which each takes `seconds` to read."""

    seconds = 0.0

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
    training = small.trainer(tmp_path, pair_dataset=slow, check_pairs=False, max_steps=4, logging_steps=2)
    training.add_callback(SlowSteps())
    slow.seconds = seconds
    training.train()
    for entry in small.logged(training):
        assert least <= entry["ipg/pair_wait"] <= most


def test_the_time_waited_is_of_the_steps_since_the_last_line():
    progress = PairProgress()
    for waited, stepped, wanted in ((1.0, 4.0, 0.25), (0.5, 1.0, 0.5)):
        progress.add({"distance": torch.tensor(1.0)})
        progress.waited += waited
        progress.stepped += stepped
        assert progress.pop(1.0, 0.1)["ipg/pair_wait"] == wanted


def test_an_attempt_that_failed_lets_go_of_its_loaders(tmp_path):
    """`auto_find_batch_size` tries smaller batches if memory is short: worker processes must not be there twice."""
    model, first, alive = small.vit(), [], []
    whole = model.forward

    def short_of_memory(pixel_values=None, labels=None, **kwargs):
        if model.training and len(pixel_values) > 4:
            first.append(weakref.ref(training._pair_loaders["pairs"]))
            raise RuntimeError("CUDA out of memory. Tried to allocate all there is.")
        return whole(pixel_values=pixel_values, labels=labels, **kwargs)

    class Look(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            gc.collect()
            alive.append(any(loader() is not None for loader in first))

    model.forward = short_of_memory
    settings = {"auto_find_batch_size": True, "per_device_train_batch_size": 5, "callbacks": [Look()]}
    training = small.trainer(tmp_path, model, **settings)
    training.train()
    assert first and alive == [False] * 3
    assert not training._pair_loaders
