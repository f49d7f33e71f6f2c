# SPDX-License-Identifier: Apache-2.0
"""What the trainer logs of the pairs, and the warning of a collapse."""

import numpy as np
import pytest
import small
import torch
from small import logged, trainer
from transformers import TrainerCallback

from ipg_hf.callbacks import STALLED_STEPS


@pytest.fixture
def warnings_of(caplog):
    """The library's warnings so far."""
    return lambda: [r.getMessage() for r in caplog.records if r.name.startswith("ipg_hf") and r.levelname == "WARNING"]


def test_logs_hold_the_means_over_the_steps_since_the_last(tmp_path):
    every, second = (trainer(tmp_path, max_steps=4, logging_steps=steps) for steps in (1, 2))
    every.train()
    second.train()
    values = [entry["ipg/distance"] for entry in logged(every)]
    wanted = [np.mean(values[:2]), np.mean(values[2:])]
    assert [entry["ipg/distance"] for entry in logged(second)] == pytest.approx(wanted, rel=1e-12)
    names = {"distance", "divergence", "violated", "corrective_grad_norm", "loss_grad_norm", "loss_scale", "skipped"}
    names |= {"pair_wait", "collapsed"}
    for entry in [*logged(every), *logged(second)]:
        assert {key for key in entry if key.startswith("ipg/")} == {f"ipg/{name}" for name in names}
    assert not any(key.startswith("ipg/") for key in logged(second, "train_loss")[0])


class Constant(TrainerCallback):
    """From a step on, the model's output is one constant."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step >= self.step:
            with torch.no_grad():
                model.classifier.weight.zero_()


def test_a_collapse_is_logged_and_warned_of_once(tmp_path, warnings_of):
    model = small.vit()
    with torch.no_grad():
        model.classifier.weight.mul_(50)
    run = trainer(tmp_path, model, max_steps=6, callbacks=[Constant(3)], alpha=0.25, learning_rate=1e-6)
    run.train()
    assert [entry["ipg/collapsed"] for entry in logged(run)] == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    (message,) = warnings_of()
    assert "alpha (now 0.25)" in message and "learning_rate (now 1e-06)" in message


def test_a_fresh_zero_head_is_no_collapse(tmp_path, warnings_of):
    run = trainer(tmp_path, callbacks=[Constant(0)], max_steps=3)
    run.train()
    assert [entry["ipg/collapsed"] for entry in logged(run)] == [0.0] * 3
    assert warnings_of() == []


# ---- A training that never leaves the constant output with which it began ----


def coloured(n, seed, pairs=False):
    """Images whose right half is bright in one class; the left half, of any brightness, tells the class away."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row in range(n):
        image = 0.1 * torch.randn(3, small.SIZE, small.SIZE, generator=generator)
        image[:, :, small.SIZE // 2 :] += 2 * (row % 2) - 1
        sides = [image + 2 * side * (torch.arange(small.SIZE) < small.SIZE // 2) for side in (-1, 1)]
        rows.append(
            {"pixel_values_a": sides[0], "pixel_values_b": sides[1]}
            if pairs
            else {"pixel_values": sides[row % 2], "labels": row % 2}
        )
    return rows


def beginning_at_zero(folder, max_steps, learning_rate, **settings):
    """A ViT whose head is zero, as those of timm and of many checkpoints are."""
    model = small.vit()
    torch.nn.init.zeros_(model.classifier.weight)
    return trainer(
        folder,
        model,
        coloured(64, 1),
        coloured(32, 2, pairs=True),
        max_steps=max_steps,
        learning_rate=learning_rate,
        warmup_steps=0.1,
        **settings,
    )


STALLED = {"learning_rate": 1e-9, "max_steps": STALLED_STEPS + 20}  # it moves by less than an output shows


@pytest.mark.parametrize("logging_steps", [10, 500])
def test_a_training_that_stalls_is_warned_of_once(tmp_path, warnings_of, logging_steps):
    run = beginning_at_zero(tmp_path, **STALLED, logging_steps=logging_steps)
    run.train()
    flags = [entry["ipg/collapsed"] for entry in logged(run)]
    assert flags == ([0.0] * 10 + [1.0] * 2 if logging_steps == 10 else [])
    (message,) = warnings_of()
    assert (
        "has not begun to learn the task" in message
        and "learning_rate (now 1e-09)" in message
        and "warmup_steps (now 12)" in message
    )
    assert "correction_schedule='violated'" in message


def test_a_long_warm_up_is_waited_for(tmp_path, warnings_of):
    run = beginning_at_zero(tmp_path, 250, 1e-9, logging_steps=10)
    run.args.warmup_steps = 200
    run.train()
    flags = [entry["ipg/collapsed"] for entry in logged(run)]
    assert flags == [0.0] * 20 + [1.0] * 5 and len(warnings_of()) == 1


def test_a_head_that_begins_at_zero_and_learns_is_not_warned_of(tmp_path, warnings_of):
    run = beginning_at_zero(tmp_path, STALLED_STEPS + 50, 1e-3, logging_steps=10)
    run.train()
    assert [entry["ipg/collapsed"] for entry in logged(run)] == [0.0] * 15
    assert warnings_of() == [] and run.progress.peak_spread > 0.5


@pytest.mark.parametrize("stop", [60, 110])
def test_a_resume_neither_loses_nor_repeats_the_warning(tmp_path, warnings_of, stop):
    settings = {**STALLED, "logging_steps": 10, "save_strategy": "steps", "save_steps": stop}
    whole = beginning_at_zero(tmp_path, **settings)
    whole.train()
    first = len(warnings_of())
    on = beginning_at_zero(tmp_path, **settings)
    on.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert (first, len(warnings_of())) == ((1, 2) if stop == 60 else (1, 1))
    assert [entry["ipg/collapsed"] for entry in logged(on)] == [entry["ipg/collapsed"] for entry in logged(whole)]


@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification"])
def test_numbers_and_several_labels_have_no_such_watch(tmp_path, warnings_of, problem_type):
    model = small.vit(1 if problem_type == "regression" else 2, problem_type=problem_type)
    torch.nn.init.zeros_(model.classifier.weight)
    label = torch.tensor(0.5) if problem_type == "regression" else torch.tensor([0.0, 1.0])
    train = [{**row, "labels": label} for row in coloured(16, 1)]
    run = trainer(tmp_path, model, train, coloured(16, 2, pairs=True), **STALLED, logging_steps=20)
    run.train()
    assert not any("ipg/collapsed" in entry for entry in run.state.log_history) and warnings_of() == []
