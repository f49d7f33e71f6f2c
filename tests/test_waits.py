# SPDX-License-Identifier: Apache-2.0
"""How often a guided step waits for the device: each value that Python reads of a tensor makes it wait."""

import pytest
import small
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ipg_hf.step import GuidedStep
from ipg_hf.pairs.loader import PairLoader


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

    watch("begin", GuidedStep.begin)
    watch("end", GuidedStep.end)
    monkeypatch.setattr(PairLoader, "__next__", uncounted)
    small.trainer(tmp_path, **settings).train()
    return list(zip(counts[::2], counts[1::2], strict=True))


@pytest.mark.parametrize("reduction", ["mean", "pair"])
def test_a_guided_step_waits_once(tmp_path, monkeypatch, reduction):
    """To know whether the corrective gradient is finite, before the first update."""
    settings = {"rationale_reduction": reduction, "max_grad_norm": 0.1}
    assert reads(tmp_path, monkeypatch, **settings) == [(1, 0)] * 3


@pytest.mark.parametrize("interval", [1, 4])
def test_correcting_while_the_pairs_disagree_waits_for_the_divergence_too(tmp_path, monkeypatch, interval):
    """Before the backward of the pairs and after it; then for the norm."""
    settings = {"correction_schedule": "violated", "invariance_threshold": 0.0, "correction_interval": interval}
    assert reads(tmp_path, monkeypatch, **settings) == [(3, 0)] * 3


def test_a_fixed_interval_waits_once_a_look(tmp_path, monkeypatch):
    assert reads(tmp_path, monkeypatch, correction_interval=2) == [(1, 0), (0, 0), (1, 0)]
