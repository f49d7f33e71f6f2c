# SPDX-License-Identifier: Apache-2.0
"""fp16: the loss scale changes nothing but the range, and each update has an overflow check of its own.

transformers and accelerate give a loss scaler on accelerators alone; PyTorch's own runs on the CPU too, and is put in
its place, with autocast to fp16 where a test says so.
"""

import math

import pytest
import small
import torch
from accelerate.utils import AutocastKwargs
from small import Around, bit_equal, logged, trainer, weights

from ipg_hf import IPGTrainer
from ipg_hf.pairs import AdversarialPairs


def with_scaler(training, scale, autocast=False, **kwargs):
    accelerator = training.accelerator
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, **kwargs)
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"
    accelerator.autocast_handler = AutocastKwargs(enabled=autocast)
    return training


@pytest.fixture(autouse=True)
def full_precision_afterwards():
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()


def test_an_overflow_leaves_the_group_weights_as_they_were(tmp_path):
    """The scaler skips such a step; GroupDRO's q would keep the infinite loss for good."""
    model, settings = small.vit().double(), {"objective": "group_dro", "group_dro_step_size": 1.0, "max_steps": 1}
    handle = model.classifier.register_forward_hook(lambda layer, args, logits: logits * math.inf)
    training = with_scaler(trainer(tmp_path, model, small.grouped(), {}, **settings), 2.0**4)
    training.train()
    assert training.task_loss.shares == [0.25] * 4 and bit_equal(weights(model), weights(small.vit().double()))
    handle.remove()
    training.train()
    assert training.task_loss.shares != [0.25] * 4 and sum(training.task_loss.shares) == pytest.approx(1)


@pytest.mark.parametrize(
    ("accumulation", "max_grad_norm", "chunk", "distance"),
    [
        (1, 0.05, None, "rationale_divergence"),
        (3, 0.05, 2, "rationale_divergence"),
        (1, 0.05, 2, "divergence"),
        (3, 0.0, None, "rationale"),
        (1, 0.0, 2, "rationale"),
    ],
)
def test_a_scale_that_never_overflows_changes_nothing(tmp_path, accumulation, max_grad_norm, chunk, distance):
    results = []
    for scale in (None, 2.0**14):
        model = small.vit()
        training = trainer(
            tmp_path,
            model,
            train=small.rows(72),
            gradient_accumulation_steps=accumulation,
            max_grad_norm=max_grad_norm,
            pair_chunk_size=chunk,
            invariance_distance=distance,
            learning_rate=0.01,
            invariance_threshold=1e-5,
            alpha=0.1,
            max_steps=6,
        )
        if scale:
            # a scale that grows in the middle of a step, between its two updates
            with_scaler(training, scale, growth_interval=3)
        training.train()
        results.append((weights(model), logged(training)))
    assert bit_equal(results[0][0], results[1][0])  # powers of two scale without rounding
    assert training.accelerator.scaler.get_scale() == 2.0**18
    for plain, scaled in zip(results[0][1], results[1][1], strict=True):
        for name in ("ipg/corrective_grad_norm", "ipg/loss_grad_norm", "ipg/loss_scale", "ipg/distance", "ipg/skipped"):
            assert math.isclose(plain[name], scaled[name], rel_tol=1e-6), name
    assert {entry["ipg/violated"] for entry in results[0][1]} == {0.0, 1.0}
    assert min(small.scales(training)) < 1  # step 4 acted


def test_an_overflow_of_the_corrective_gradient_skips_the_step(tmp_path):
    model, around = small.vit(), Around()
    training = trainer(
        tmp_path, model, train=small.rows(96), callbacks=[around], learning_rate=0.01, max_steps=12, max_grad_norm=1.0
    )
    with_scaler(training, 2.0**24, autocast=True)
    training.train()
    logs = logged(training)
    skipped = [bool(entry["ipg/skipped"]) for entry in logs]
    corrected = [not bit_equal(around.before[n][0], around.middle[n][0]) for n in range(12)]
    first = corrected.index(True)
    assert first >= 2 and all(skipped[:first]) and not any(skipped[-3:])
    for number in range(first):
        assert bit_equal(around.before[number][0], around.after[number][0])
        assert not any(value.any() for value in around.after[number][1].values())  # no moment, no step was counted
    assert all(math.isfinite(entry["ipg/distance"]) for entry in logs[-3:])
    assert training.accelerator.scaler.get_scale() < 2.0**24


def test_an_overflow_of_the_task_gradient_skips_the_second_update_alone(tmp_path):
    model, around = small.vit(), Around()

    class Overflowing(IPGTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * (torch.inf if self.state.global_step == 1 else 1.0)

    settings = small.config(tmp_path, learning_rate=0.01)
    training = Overflowing(
        model, settings, train_dataset=small.rows(24), pair_dataset=small.pairs(10), callbacks=[around]
    )
    with_scaler(training, 2.0**10)
    training.train()
    moved = [not bit_equal(around.before[n][0], around.middle[n][0]) for n in range(3)]
    updated = [not bit_equal(around.middle[n][0], around.after[n][0]) for n in range(3)]
    assert moved == [True, True, True] and updated == [True, False, True]
    assert [entry.get("ipg/skipped") for entry in logged(training)] == [0, 1, 0]


def test_fp16_learns_what_full_precision_learns(tmp_path):
    results = []
    for half in (False, True):
        model = small.vit()
        training = trainer(tmp_path, model, train=small.rows(96), optim="sgd", learning_rate=0.1, max_steps=10)
        if half:
            with_scaler(training, 2.0**12, autocast=True)
        training.train()
        results.append([entry["ipg/distance"] for entry in logged(training)])
    assert results[1] == pytest.approx(results[0], rel=0.1)
    assert results[1] != results[0]  # half precision did run


def test_adversarial_partners_in_fp16(tmp_path):
    """The search takes signs of slopes: scaled into the range of fp16 it finds what it finds in full precision."""

    def divergences(scale=None, half=False):
        training = trainer(
            tmp_path,
            small.vit(),
            train=small.images(16),
            pair_dataset=AdversarialPairs(small.images(16), steps=4),
            learning_rate=1e-6,
            max_steps=3,
        )
        if scale:
            with_scaler(training, scale, autocast=half)
        training.train()
        return [entry["ipg/divergence"] for entry in logged(training)]

    large, tiny = 2.0**12, 2.0**-14
    plain = divergences()
    assert divergences(large) == divergences(tiny) == plain  # powers of two
    halved, lost = divergences(large, half=True), divergences(tiny, half=True)
    assert halved != plain and halved == pytest.approx(plain, rel=0.05)
    # the control: under a scale with which fp16's slopes vanish, the model tells the partners apart less
    assert lost != pytest.approx(plain, rel=0.05)
