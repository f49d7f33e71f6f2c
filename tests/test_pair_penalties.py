# SPDX-License-Identifier: Apache-2.0
"""Penalties on pairs: numbers worked by hand, and the trainer against gradient descent by hand."""

import pytest
import small
import torch
import torch.nn.functional as F
from small import descended, descended_by_hand, differences, grouped, logged, trainer, weights
from transformers import Trainer

from ipg_hf import find_head
from ipg_hf.baselines import PairPenaltyTrainer
from ipg_hf.baselines.pair_penalties import pair_penalty
from ipg_hf.guidance import invariance_divergence

PENALTIES = ("kl", "features", "rationales", "augmentation")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labelled(n=6, seed=1):
    return [{**row, "label": i % 2} for i, row in enumerate(small.pairs(n, seed, torch.float64))]


# ---- By hand ----


def test_penalties_by_hand():
    z = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0], [0.0, 1.0]])  # pairs differ by (1, 0) and (0, 1)
    weight = torch.tensor([[3.0, 0.0], [4.0, 2.0]])
    logits = z @ weight.T
    settings = {"problem_type": "single_label_classification"}
    assert pair_penalty("features", logits, z, weight, **settings).item() == pytest.approx(1)
    assert pair_penalty("rationales", logits, z, weight, **settings).item() == pytest.approx((25 + 4) / 2)
    assert pair_penalty("kl", logits, None, None, **settings) == invariance_divergence(*logits.chunk(2))
    labels = torch.tensor([0, 1, 0, 1])
    both = pair_penalty("augmentation", logits, None, None, labels=labels, **settings)
    assert both.item() == pytest.approx(F.cross_entropy(logits, labels).item())
    numbers = torch.tensor([1.0, 2.0])
    squares = pair_penalty("augmentation", logits[:2, :1], None, None, labels=numbers, problem_type="regression")
    assert squares.item() == pytest.approx(((3 - 1) ** 2 + (0 - 2) ** 2) / 2)


@pytest.mark.parametrize("kind", ["kl", "features", "rationales"])
def test_a_penalty_on_equal_sides_is_zero_with_a_zero_gradient(kind):
    z = randn(3, 4).repeat(2, 1).requires_grad_()
    weight = randn(5, 4, seed=1).requires_grad_()
    penalty = pair_penalty(kind, z @ weight.T, z, weight, problem_type="single_label_classification")
    gradients = torch.autograd.grad(penalty, [z, weight], allow_unused=True)
    assert penalty.item() == 0
    assert all(gradient is None or not gradient.any() for gradient in gradients)


# ---- In the trainer ----


@pytest.mark.parametrize("kind", PENALTIES)
def test_a_penalty_is_added_to_the_loss(tmp_path, kind):
    """All pairs in each step; a step is one update along the gradient of loss + weight · penalty."""
    train, pairs = grouped(), labelled(4)
    settings = {"kind": PairPenaltyTrainer, "pair_objective": kind, "pair_penalty_weight": 3.0}
    run = descended(tmp_path, train, pairs, **settings)
    model = small.vit().double()
    head = find_head(model)
    sides = torch.stack([row[f"pixel_values_{side}"] for side in "ab" for row in pairs])
    labels = torch.tensor([row["label"] for row in pairs] * 2)

    def loss_of(losses, *_):
        logits, z = head.run(model, {"pixel_values": sides})
        settings = {"problem_type": "single_label_classification", "labels": labels}
        return losses.mean() + 3 * pair_penalty(kind, logits, z, head.weight, **settings)

    assert differences(weights(run.model), descended_by_hand(model, train, loss_of)) < 1e-7
    plain = descended(tmp_path, train, kind=Trainer)
    assert differences(weights(run.model), weights(plain.model)) > 1e-5
    entry = logged(run)[0]
    assert entry["ipg/penalty"] > 0 and "ipg/distance" not in entry and "ipg/loss_scale" not in entry
    assert (run.head is None) is (kind in ("kl", "augmentation"))


@pytest.mark.parametrize("kind", PENALTIES)
def test_chunks_and_accumulation_change_nothing(tmp_path, kind):
    ends = []
    for settings in (
        {"per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 8, "pair_chunk_size": 3},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 8, "pair_penalty_weight": 1.1},
    ):
        settings = {"pair_objective": kind, "per_device_pair_batch_size": 4} | settings
        ends.append(weights(descended(tmp_path, grouped(), labelled(), kind=PairPenaltyTrainer, **settings).model))
    assert differences(ends[0], ends[1]) < 1e-9
    assert differences(ends[0], ends[2]) < 1e-6
    assert differences(ends[0], ends[3]) > 1e-7


def test_a_penalty_moves_the_corrective_layers_alone(tmp_path):
    """In one update with the task's gradient: with the penalty's factor the difference grows in these layers alone."""
    ends = []
    for weight in (1.0, 100.0):
        settings = {"corrective_layers": ["classifier"], "pair_penalty_weight": weight, "max_steps": 1}
        pairs = small.pairs(10, dtype=torch.float64)
        ends.append(weights(descended(tmp_path, None, pairs, kind=PairPenaltyTrainer, **settings).model))
    changed = {name for name in ends[0] if (ends[0][name] - ends[1][name]).abs().max() > 1e-9}
    assert changed == {"classifier.weight", "classifier.bias"}


# ---- Refusals ----


def test_augmentation_needs_labels(tmp_path):
    sets = {"with": labelled(), "without": small.pairs(6)}
    for pair_dataset in (small.pairs(6), sets):
        for freeze_norm in (False, True):
            settings = {"pair_objective": "augmentation", "freeze_norm": freeze_norm}
            with pytest.raises(ValueError, match="column 'label'"):
                trainer(tmp_path, pair_dataset=pair_dataset, kind=PairPenaltyTrainer, **settings)


@pytest.mark.parametrize("kind", ["kl", "features"])
def test_a_penalty_that_nothing_can_lower(tmp_path, kind):
    model = small.vit()
    model.unused = torch.nn.Parameter(torch.ones(()))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "unused")
    with pytest.raises(ValueError, match="the penalty depends on no trainable parameter"):
        trainer(tmp_path, model, kind=PairPenaltyTrainer, pair_objective=kind).train()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pair_objective": "mmd"}, "pair_objective='mmd' is not valid: it must be one of kl, features"),
        ({"pair_penalty_weight": 0.0}, "pair_penalty_weight=0.0 is not valid: it must be a finite number above 0"),
        ({"correction_interval": 2}, "correction_interval=2 .*pair_objective='kl'.*Set correction_interval=1"),
        ({"correction_schedule": "violated"}, "Set correction_schedule='always'"),
    ],
)
def test_settings_that_cannot_work(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        small.config(tmp_path, PairPenaltyTrainer.config_class, **settings)
