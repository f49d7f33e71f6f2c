# SPDX-License-Identifier: Apache-2.0
"""What the trainer logs of the pairs, and the warning of a collapse."""

import numpy as np
import pytest
import small
import torch
from small import logged, trainer
from transformers import TrainerCallback


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
