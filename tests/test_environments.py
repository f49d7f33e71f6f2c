# SPDX-License-Identifier: Apache-2.0
"""IRM and V-REx: the penalties by hand, and the trainer against gradient descent by hand."""

import pytest
import small
import torch
import torch.nn.functional as F
from small import descended, descended_by_hand, differences, grouped, trainer, weights

from ipg_hf.baselines import EnvironmentTrainer
from ipg_hf.baselines.environments import irm_penalty, vrex_penalty


def test_irm_penalty_is_the_squared_derivative_by_the_scale():
    logits = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels, environments = torch.arange(12) % 3, torch.arange(12) % 2 * 7
    wanted = []
    for number in (0, 7):
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        rows = environments == number
        wanted.append(torch.autograd.grad(F.cross_entropy(scale * logits[rows], labels[rows]), scale)[0] ** 2)
    assert irm_penalty(logits, labels, environments).item() == pytest.approx(sum(wanted).item() / 2, rel=1e-12)
    # one row of two classes with logits (1, -1), label 0: (p_0 - 1)·1 + p_1·(-1) = -2 p_1
    p = torch.sigmoid(torch.tensor(-2.0)).item()
    one = irm_penalty(torch.tensor([[1.0, -1.0]]), torch.tensor([0]), torch.tensor([3]))
    assert one.item() == pytest.approx(4 * p * p)


def test_vrex_penalty_is_the_variance_of_the_mean_losses():
    losses, environments = torch.tensor([1.0, 3.0, 4.0]), torch.tensor([0, 0, 5])
    assert vrex_penalty(losses, environments).item() == pytest.approx(1.0)  # means 2 and 4
    assert vrex_penalty(losses, torch.zeros(3)).item() == 0


@pytest.mark.parametrize("objective", ["irm", "vrex"])
def test_the_penalty_is_added_to_the_loss_and_rises_at_its_start(tmp_path, objective):
    train = grouped(attribute="environment")
    settings = {"kind": EnvironmentTrainer, "objective": objective}
    settings |= {"environment_penalty_weight": 20.0, "environment_penalty_start": 1}
    run = descended(tmp_path, train, **settings)

    def loss_of(losses, logits, labels, environments, step):
        irm = objective == "irm"
        penalty = irm_penalty(logits, labels, environments) if irm else vrex_penalty(losses, environments)
        return losses.mean() + penalty if step == 0 else (losses.mean() + 20 * penalty) / 20

    wanted = descended_by_hand(small.vit().double(), train, loss_of, attribute="environment")
    assert differences(weights(run.model), wanted) < 1e-7
    at_once = descended(tmp_path, train, **settings | {"environment_penalty_start": 0})
    assert differences(weights(run.model), weights(at_once.model)) > 1e-5


@pytest.mark.parametrize(
    ("settings", "column", "words"),
    [
        ({"objective": "irm", "gradient_accumulation_steps": 2}, "environment", "whole batches"),
        ({"objective": "vrex"}, "attribute", "'environment'"),
        ({"objective": "erm"}, "environment", "objective='erm' is not valid: it must be one of irm, vrex"),
        ({"environment_penalty_weight": -1.0}, "environment", "environment_penalty_weight=-1.0 is not valid"),
        ({"environment_penalty_start": -1}, "environment", "environment_penalty_start=-1 is not valid"),
    ],
)
def test_settings_that_cannot_work(tmp_path, settings, column, words):
    with pytest.raises(ValueError, match=words):
        trainer(tmp_path, train=grouped(8, attribute=column), pair_dataset={}, kind=EnvironmentTrainer, **settings)
