# SPDX-License-Identifier: Apache-2.0
"""Task losses over classes and groups: numbers worked by hand, and the trainer against gradient descent by hand."""

import pytest
import small
import torch
from small import descended, descended_by_hand, differences, grouped, logged, scales, trainer, weights
from transformers import Trainer

from ipg_hf import IPGTrainer
from ipg_hf.losses import balanced_weights, group_dro_shares


def mean_loss(losses, *_):
    return losses.mean()


# ---- By hand ----


def test_balanced_weights_by_hand():
    counts = torch.tensor([6, 2, 0, 4])
    shares = balanced_weights(counts)
    assert shares.tolist() == pytest.approx([12 / 18, 12 / 6, 0, 12 / 12])
    assert (counts * shares).sum() / counts.sum() == pytest.approx(1)


def test_group_dro_shares_by_hand():
    # losses 2 and 0 under a step of ln(2) / 2: the first share doubles against the second
    step = torch.tensor(2.0).log().item() / 2
    shares = group_dro_shares(torch.tensor([0.5, 0.5]), torch.tensor([6.0, 0.0]), torch.tensor([3, 1]), step_size=step)
    assert shares.tolist() == pytest.approx([2 / 3, 1 / 3])
    unseen = group_dro_shares(torch.tensor([0.4, 0.6]), torch.zeros(2), torch.zeros(2), step_size=1.0)
    assert unseen.tolist() == pytest.approx([0.4, 0.6])
    huge = group_dro_shares(torch.tensor([0.5, 0.5]), torch.tensor([1e5, 0.0]), torch.ones(2), step_size=1.0)
    assert huge.tolist() == [1, 0]


# ---- In the trainer ----


def group_dro_by_hand(step_size):
    q = torch.full((4,), 0.25, dtype=torch.float64)

    def loss_of(losses, logits, labels, attributes, step):
        nonlocal q
        groups = labels * 2 + attributes
        means = torch.stack([losses[groups == g].mean() if (groups == g).any() else 0 * losses.sum() for g in range(4)])
        loss = (q * means).sum()
        q = q * torch.exp(step_size * means.detach())
        q = q / q.sum()
        return loss

    return loss_of


def test_group_dro_is_its_algorithm(tmp_path):
    train = grouped()
    run = descended(tmp_path, train, objective="group_dro", group_dro_step_size=0.5, max_steps=3)
    wanted = descended_by_hand(small.vit().double(), train, group_dro_by_hand(0.5), steps=3)
    assert differences(weights(run.model), wanted) < 1e-7
    unmoved = descended_by_hand(small.vit().double(), train, group_dro_by_hand(0.0), steps=3)
    assert differences(weights(run.model), unmoved) > 1e-5


@pytest.mark.parametrize("objective", ["reweight", "class_balanced"])
def test_balanced_objectives_are_the_mean_of_their_parts(tmp_path, objective):
    train = grouped().select([i for i in range(24) if i % 3 or i % 2])  # 8 rows of one label, 12 of the other
    stored = train[:]

    def part_of(labels, attributes):
        return labels if objective == "class_balanced" else labels * 2 + attributes

    counts = torch.bincount(part_of(stored["label"], stored["attribute"]))
    assert len({*counts.tolist()}) > 1

    def loss_of(losses, logits, labels, attributes, step):
        parts = part_of(labels, attributes)
        return torch.stack([losses[parts == part].mean() for part in range(len(counts))]).mean()

    run = descended(tmp_path, train, objective=objective, per_device_train_batch_size=20, max_steps=1)
    wanted = descended_by_hand(small.vit().double(), train, loss_of, steps=1, batch=20)
    assert differences(weights(run.model), wanted) < 1e-7
    plain = descended_by_hand(small.vit().double(), train, mean_loss, steps=1, batch=20)
    assert differences(weights(run.model), plain) > 1e-5


@pytest.mark.parametrize(
    ("objective", "build"),
    [
        ("class_balanced", small.vit),
        ("reweight", small.vit),
        ("group_dro", small.vit),
        ("group_dro", small.resnet),  # over-scales its own loss under accumulation (transformers issue 47688)
    ],
)
def test_accumulation_of_groups_equals_one_batch(tmp_path, objective, build):
    settings = {"pair_dataset": small.pairs(6, dtype=torch.float64), "build": build, "max_steps": 3}
    settings |= {"freeze_norm": True, **small.SCALED}
    train = grouped(32).select([i for i in range(32) if i % 4 != 2])  # twice as many of one label
    ends, logs = [], []
    for batch, steps in ((8, 1), (2, 4)):
        run = descended(
            tmp_path,
            train,
            objective=objective,
            group_dro_step_size=0.5,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            **settings,
        )
        assert 0 < max(scales(run)) < 1
        ends.append(weights(run.model))
        logs.append([entry["loss"] for entry in logged(run)])
    assert differences(*ends) < 1e-6
    assert logs[1] == pytest.approx(logs[0], abs=1e-5)
    plain = descended(tmp_path, train, **settings)
    assert differences(ends[0], weights(plain.model)) > 1e-5


def test_group_dro_resumes_with_its_shares(tmp_path):
    settings = {"objective": "group_dro", "group_dro_step_size": 1.0, "save_strategy": "steps", "save_steps": 2}
    whole = descended(tmp_path, grouped(), max_steps=4, **settings)
    # a trainer that has seen nothing of the first two steps
    run, _ = small.descending(tmp_path, grouped(), {}, max_steps=4, **settings)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert small.bit_equal(weights(whole.model), weights(run.model))
    assert run.task_loss.shares == whole.task_loss.shares != [0.25] * 4


@pytest.mark.parametrize("build", [small.vit, small.timm_resnet])  # timm's forward takes no count of items
def test_the_loss_at_evaluation_is_the_mean(tmp_path, build):
    ends = []
    for objective in ("erm", "group_dro"):
        evaluated = grouped(8, seed=3)
        run = trainer(tmp_path, build().double(), grouped(), {}, objective=objective, eval_dataset=evaluated)
        ends.append(run.evaluate()["eval_loss"])
    assert ends[0] == ends[1]


def test_erm_without_pairs_is_trainer(tmp_path):
    ends = [weights(descended(tmp_path, grouped(), kind=kind).model) for kind in (Trainer, IPGTrainer)]
    assert small.bit_equal(*ends)


# ---- Refusals ----


def test_an_objective_over_groups_needs_the_column(tmp_path):
    with pytest.raises(ValueError, match="'attribute'"):
        trainer(tmp_path, train=small.rows(8), pair_dataset={}, objective="group_dro")


def test_an_objective_and_a_loss_function_of_the_user_are_refused(tmp_path):
    with pytest.raises(ValueError, match="compute_loss_func"):
        args = small.config(tmp_path, objective="reweight")
        IPGTrainer(small.vit(), args, train_dataset=grouped(), compute_loss_func=lambda *_, **__: torch.zeros(()))
    with pytest.raises(ValueError, match="regression"):
        trainer(tmp_path, small.vit(num_labels=1), grouped(), objective="reweight")
