# SPDX-License-Identifier: Apache-2.0
"""Objectives over groups and environments, and penalties on pairs: by hand, and as the trainer takes them."""

import pytest
import small
import torch
import torch.nn.functional as F
from small import grouped, logged, trainer, weights
from transformers import Trainer

from ipg_hf import IPGTrainer, find_head
from ipg_hf.baselines.environments import irm_penalty, vrex_penalty
from ipg_hf.baselines.pair_penalties import pair_penalty
from ipg_hf.guidance import invariance_divergence
from ipg_hf.losses import balanced_weights, group_dro_shares

PENALTIES = ("kl", "features", "rationales", "augmentation")
NEVER_REACHED = 1e9  # as a threshold, of a divergence


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- By hand ----


def test_balanced_shares_by_hand():
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


def test_irm_penalty_is_the_squared_derivative_by_the_scale():
    logits, labels, environments = randn(12, 3), torch.arange(12) % 3, torch.arange(12) % 2 * 7
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


def test_vrex_penalty_by_hand():
    losses, environments = torch.tensor([1.0, 3.0, 4.0]), torch.tensor([0, 0, 5])
    assert vrex_penalty(losses, environments).item() == pytest.approx(1.0)  # means 2 and 4
    assert vrex_penalty(losses, torch.zeros(3)).item() == 0


def test_pair_penalties_by_hand():
    z = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0], [0.0, 1.0]])  # pairs differ by (1, 0) and (0, 1)
    weight = torch.tensor([[3.0, 0.0], [4.0, 2.0]])
    logits = z @ weight.T
    settings = {"problem_type": "single_label_classification"}
    assert pair_penalty("features", logits, z, weight, **settings).item() == pytest.approx(1)
    assert pair_penalty("rationales", logits, z, weight, **settings).item() == pytest.approx((25 + 4) / 2)
    assert pair_penalty("kl", logits, z, weight, **settings) == invariance_divergence(*logits.chunk(2))
    labels = torch.tensor([0, 1, 0, 1])
    both = pair_penalty("augmentation", logits, z, weight, labels=labels, **settings)
    assert both.item() == pytest.approx(F.cross_entropy(logits, labels).item())
    numbers = torch.tensor([1.0, 2.0])
    squares = pair_penalty("augmentation", logits[:2, :1], z[:2], weight, labels=numbers, problem_type="regression")
    assert squares.item() == pytest.approx(((3 - 1) ** 2 + (0 - 2) ** 2) / 2)


@pytest.mark.parametrize("kind", ["kl", "features", "rationales"])
def test_a_penalty_on_equal_sides_is_zero_with_a_zero_gradient(kind):
    z = randn(3, 4).repeat(2, 1).requires_grad_()
    weight = randn(5, 4, seed=1).requires_grad_()
    penalty = pair_penalty(kind, z @ weight.T, z, weight, problem_type="single_label_classification")
    gradients = torch.autograd.grad(penalty, [z, weight], allow_unused=True)
    assert penalty.item() == 0
    assert all(gradient is None or not gradient.any() for gradient in gradients)


# ---- In the trainer: groups ----


def columns(dataset, attribute="attribute"):
    batch = dataset[:]
    return batch["pixel_values"].double(), batch["label"], batch[attribute]


def trained(folder, train, pair_dataset=None, build=small.vit, **settings):
    settings = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, "max_steps": 2} | settings
    settings |= {"train_sampling_strategy": "sequential", "lr_scheduler_type": "constant"}
    run = trainer(folder, build().double(), train, pair_dataset or {}, **settings)
    run.train()
    return run


def by_hand(model, train, loss_of, steps=2, batch=8, learning_rate=0.05, attribute="attribute"):
    """Plain gradient descent on `loss_of(losses, logits, labels, attributes, step)`."""
    images, labels, attributes = columns(train, attribute)
    for step in range(steps):
        rows = slice(batch * step, batch * (step + 1))
        logits = model(images[rows]).logits
        losses = F.cross_entropy(logits, labels[rows], reduction="none")
        model.zero_grad()
        loss_of(losses, logits, labels[rows], attributes[rows], step).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= learning_rate * parameter.grad
    return weights(model)


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
    run = trained(tmp_path, train, objective="group_dro", group_dro_step_size=0.5, max_steps=3)
    wanted = by_hand(small.vit().double(), train, group_dro_by_hand(0.5), steps=3)
    assert small.differences(weights(run.model), wanted) < 1e-7
    unmoved = by_hand(small.vit().double(), train, group_dro_by_hand(0.0), steps=3)
    assert small.differences(weights(run.model), unmoved) > 1e-5


def test_reweight_is_the_mean_of_the_groups(tmp_path):
    train = grouped()
    _, labels, attributes = columns(train)
    counts = torch.bincount(labels * 2 + attributes, minlength=4)
    assert len({*counts.tolist()}) > 1
    run = trained(tmp_path, train, objective="reweight", per_device_train_batch_size=24, max_steps=1)

    def loss_of(losses, logits, labels, attributes, step):
        groups = labels * 2 + attributes
        return torch.stack([losses[groups == g].mean() for g in range(4)]).mean()

    wanted = by_hand(small.vit().double(), train, loss_of, steps=1, batch=24)
    assert small.differences(weights(run.model), wanted) < 1e-7
    plain = by_hand(small.vit().double(), train, lambda losses, *_: losses.mean(), steps=1, batch=24)
    assert small.differences(weights(run.model), plain) > 1e-5


def test_class_balanced_is_the_mean_of_the_classes(tmp_path):
    train = grouped().select([i for i in range(24) if i % 3 or i % 2])  # 8 rows of one label, 12 of the other
    run = trained(tmp_path, train, objective="class_balanced", per_device_train_batch_size=20, max_steps=1)

    def loss_of(losses, logits, labels, attributes, step):
        return torch.stack([losses[labels == label].mean() for label in range(2)]).mean()

    wanted = by_hand(small.vit().double(), train, loss_of, steps=1, batch=20)
    assert small.differences(weights(run.model), wanted) < 1e-7
    plain = by_hand(small.vit().double(), train, lambda losses, *_: losses.mean(), steps=1, batch=20)
    assert small.differences(weights(run.model), plain) > 1e-5


@pytest.mark.parametrize("objective", ["class_balanced", "group_dro", "reweight"])
@pytest.mark.parametrize("build", [small.vit, small.resnet])
def test_groups_under_accumulation(tmp_path, objective, build):
    settings = {"objective": objective, "group_dro_step_size": 0.5, "max_steps": 3, "freeze_norm": True}
    train = grouped(32).select([i for i in range(32) if i % 4 != 2])  # twice as many of one label
    ends, logs = [], []
    for batch, steps in ((8, 1), (2, 4)):
        run = trained(
            tmp_path,
            train,
            small.pairs(6, dtype=torch.float64),
            build,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            **settings,
        )
        ends.append(weights(run.model))
        logs.append([entry["loss"] for entry in logged(run)])
    assert small.differences(*ends) < 1e-6
    assert logs[1] == pytest.approx(logs[0], abs=1e-5)
    plain = trained(tmp_path, train, small.pairs(6, dtype=torch.float64), build, max_steps=3, freeze_norm=True)
    assert small.differences(ends[0], weights(plain.model)) > 1e-5


def test_group_dro_goes_on_with_its_shares(tmp_path):
    settings = {"objective": "group_dro", "group_dro_step_size": 1.0, "save_strategy": "steps", "save_steps": 2}
    whole = trained(tmp_path / "whole", grouped(), max_steps=4, **settings)
    # a trainer that has seen nothing of the first two steps
    run = trainer(
        tmp_path / "whole",
        small.vit().double(),
        grouped(),
        {},
        optim="sgd",
        learning_rate=0.05,
        max_grad_norm=0.0,
        max_steps=4,
        train_sampling_strategy="sequential",
        lr_scheduler_type="constant",
        **settings,
    )
    run.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert small.bit_equal(weights(whole.model), weights(run.model))
    assert run.task_loss.shares == whole.task_loss.shares != [0.25] * 4


@pytest.mark.parametrize("build", [small.vit, small.timm_resnet])  # timm's forward takes no count of items
def test_the_loss_at_evaluation_is_the_mean(tmp_path, build):
    ends = []
    for objective in ("erm", "group_dro"):
        run = trainer(
            tmp_path,
            build().double(),
            grouped(),
            {},
            objective=objective,
            eval_dataset=grouped(8, seed=3),
        )
        ends.append(run.evaluate()["eval_loss"])
    assert ends[0] == ends[1]


# ---- Environments ----


@pytest.mark.parametrize("kind", ["irm", "vrex"])
def test_environment_penalties_in_the_trainer(tmp_path, kind):
    train = grouped(attribute="environment")
    settings = {"objective": kind, "environment_penalty_weight": 20.0, "environment_penalty_start": 1}
    run = trained(tmp_path, train, **settings)

    def loss_of(losses, logits, labels, environments, step):
        penalty = irm_penalty(logits, labels, environments) if kind == "irm" else vrex_penalty(losses, environments)
        return losses.mean() + penalty if step == 0 else (losses.mean() + 20 * penalty) / 20

    wanted = by_hand(small.vit().double(), train, loss_of, attribute="environment")
    assert small.differences(weights(run.model), wanted) < 1e-7
    at_once = trained(tmp_path, train, **settings | {"environment_penalty_start": 0})
    assert small.differences(weights(run.model), weights(at_once.model)) > 1e-5


@pytest.mark.parametrize(
    ("settings", "train", "told"),
    [
        (
            {"objective": "irm", "gradient_accumulation_steps": 2},
            grouped(attribute="environment"),
            "whole batches",
        ),
        ({"objective": "vrex"}, grouped(), "'environment'"),
        ({"objective": "group_dro"}, small.rows(8), "'attribute'"),
    ],
)
def test_what_an_objective_cannot_have(tmp_path, settings, train, told):
    with pytest.raises(ValueError, match=told):
        trainer(tmp_path, train=train, pair_dataset={}, **settings)


def test_an_objective_and_a_loss_of_ones_own(tmp_path):
    with pytest.raises(ValueError, match="compute_loss_func"):
        args = small.config(tmp_path, objective="reweight")
        IPGTrainer(small.vit(), args, train_dataset=grouped(), compute_loss_func=lambda *_, **__: torch.zeros(()))
    with pytest.raises(ValueError, match="regression"):
        trainer(tmp_path, small.vit(num_labels=1), grouped(), objective="reweight")


# ---- In the trainer: penalties on pairs ----


def labelled(n=6, seed=1):
    return [{**row, "label": i % 2} for i, row in enumerate(small.pairs(n, seed, torch.float64))]


@pytest.mark.parametrize("kind", PENALTIES)
def test_a_penalty_is_added_to_the_loss(tmp_path, kind):
    """All pairs in each step; a step is one update along the gradient of loss + weight · penalty."""
    train, pairs = grouped(), labelled(4)
    run = trained(tmp_path, train, pairs, pair_objective=kind, pair_penalty_weight=3.0)
    model = small.vit().double()
    head = find_head(model)
    sides = torch.stack([row[f"pixel_values_{side}"] for side in "ab" for row in pairs])
    labels = torch.tensor([row["label"] for row in pairs] * 2)

    def loss_of(losses, *_):
        logits, z = head.run(model, {"pixel_values": sides})
        settings = {"problem_type": "single_label_classification", "labels": labels}
        return losses.mean() + 3 * pair_penalty(kind, logits, z, head.weight, **settings)

    assert small.differences(weights(run.model), by_hand(model, train, loss_of)) < 1e-7
    plain = trained(tmp_path, train, kind=Trainer)
    assert small.differences(weights(run.model), weights(plain.model)) > 1e-5
    entry = logged(run)[0]
    assert entry["ipg/penalty"] > 0 and "ipg/distance" not in entry and "ipg/loss_scale" not in entry


@pytest.mark.parametrize("kind", PENALTIES)
def test_penalties_in_chunks_and_under_accumulation(tmp_path, kind):
    ends = []
    for settings in (
        {"per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 8, "pair_chunk_size": 3},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 8, "pair_penalty_weight": 1.1},
    ):
        settings = {"pair_objective": kind, "per_device_pair_batch_size": 4} | settings
        ends.append(weights(trained(tmp_path, grouped(), labelled(), **settings).model))
    assert small.differences(ends[0], ends[1]) < 1e-9
    assert small.differences(ends[0], ends[2]) < 1e-6
    assert small.differences(ends[0], ends[3]) > 1e-7


def test_augmentation_needs_labels(tmp_path):
    sets = {"with": labelled(), "without": small.pairs(6)}
    for pair_dataset in (small.pairs(6), sets):
        for freeze_norm in (False, True):
            with pytest.raises(ValueError, match="column 'label'"):
                trainer(tmp_path, pair_dataset=pair_dataset, pair_objective="augmentation", freeze_norm=freeze_norm)


def test_a_penalty_that_nothing_can_lower(tmp_path):
    model = small.vit().requires_grad_(False)
    head = find_head(model)
    batch = {"pixel_values": torch.stack([row["pixel_values_a"] for row in small.pairs(4)])}
    accelerator = trainer(tmp_path).accelerator
    with pytest.raises(ValueError, match="no trainable parameter"):
        penalty_backward(
            head.run, head, model, batch, accelerator, kind="kl", problem_type="single_label_classification"
        )


# ---- Corrections now and then ----


def guided(folder, **settings):
    around = small.Around()
    run = trainer(
        folder,
        small.vit().double(),
        small.rows(64, dtype=torch.float64),
        small.pairs(8, dtype=torch.float64),
        optim="sgd",
        learning_rate=0.05,
        max_grad_norm=0.0,
        callbacks=[around],
        **{"max_steps": 5, "lr_scheduler_type": "constant"} | settings,
    )
    return run, around


def corrected(around):
    """Whether each step's first update moved something: before a step against before its second update."""
    return [not small.bit_equal(old[0], new[0]) for old, new in zip(around.before, around.middle, strict=True)]


def test_correction_interval(tmp_path):
    run, around = guided(tmp_path, correction_interval=2, invariance_threshold=0.0)
    run.train()
    assert corrected(around) == [True, False, True, False, True]
    assert run.progress.positions == {"": 12}
    logs = logged(run)
    for measured, held in ((0, 1), (2, 3)):
        # in between the task gradient gets the norm of the last corrective gradient
        assert logs[held]["ipg/corrective_grad_norm"] == logs[measured]["ipg/corrective_grad_norm"]
        scaled = logs[held]["ipg/loss_scale"] * logs[held]["ipg/loss_grad_norm"]
        assert scaled == pytest.approx(logs[held]["ipg/corrective_grad_norm"], rel=1e-6)
    assert logs[2]["ipg/corrective_grad_norm"] != logs[0]["ipg/corrective_grad_norm"]


def test_correction_only_while_violated(tmp_path):
    ends = {}
    for threshold in (0.0, NEVER_REACHED):
        for schedule in ("always", "violated"):
            run, around = guided(tmp_path, invariance_threshold=threshold, correction_schedule=schedule)
            run.train()
            ends[threshold, schedule] = weights(run.model)
            assert corrected(around) == [schedule == "always" or threshold == 0] * 5
    assert small.bit_equal(ends[0.0, "always"], ends[0.0, "violated"])
    assert small.differences(ends[NEVER_REACHED, "always"], ends[NEVER_REACHED, "violated"]) > 1e-5


def test_a_fixed_scale_of_the_task_gradient(tmp_path):
    def end(**settings):
        run, _ = guided(tmp_path, correction_interval=2, **{"invariance_threshold": 0.0} | settings)
        run.train()
        return weights(run.model), [log["ipg/loss_scale"] for log in logged(run)]

    quarter, scales = end(loss_scaling="fixed", alpha=0.25)
    assert scales == [0.25] * 5  # where the pairs are looked at, and in between
    # a factor of 1 is no scaling: the ablation without step 4, to the last bit
    one, unscaled = end(loss_scaling="fixed", alpha=1.0), end(invariance_threshold=float("inf"))
    assert one[1] == unscaled[1] == [1.0] * 5 and small.bit_equal(one[0], unscaled[0])
    adaptive = end(alpha=0.25)
    assert adaptive[1] != scales
    for other in (adaptive[0], one[0]):
        assert small.differences(quarter, other) > 1e-5


def test_a_fixed_scale_ends_at_the_threshold(tmp_path):
    run, _ = guided(tmp_path, loss_scaling="fixed", alpha=0.25, invariance_threshold=1e-5)
    run.train()
    logs = logged(run)
    scales = [log["ipg/loss_scale"] for log in logs]
    assert scales == [0.25 if log["ipg/violated"] else 1.0 for log in logs] and {*scales} == {0.25, 1.0}


def test_the_task_gradient_is_only_scaled_down(tmp_path):
    ends = []
    for settings in ({}, {"max_loss_scale": 1.0}):
        run, _ = guided(tmp_path, alpha=10.0, invariance_threshold=0.0, **settings)
        run.train()
        ends.append(([log["ipg/loss_scale"] for log in logged(run)], weights(run.model)))
    (free, free_end), (held, held_end) = ends
    assert max(free) > 1 == max(held)
    assert held[0] == min(1.0, free[0])
    assert small.differences(free_end, held_end) > 1e-5


def test_pairs_that_agree_are_looked_at_again_later(tmp_path):
    settings = {"correction_schedule": "violated", "correction_interval": 3, "max_steps": 7}
    run, _ = guided(tmp_path, invariance_threshold=NEVER_REACHED, **settings)
    run.train()
    assert run.progress.positions == {"": 4 * 3}  # steps 1, 4 and 7
    run, _ = guided(tmp_path, invariance_threshold=0.0, **settings)
    run.train()
    assert run.progress.positions == {"": 4 * 7}


def test_a_set_that_agrees_corrects_nothing_in_chunks_too(tmp_path):
    for chunk in (None, 2):
        run, around = guided(
            tmp_path, correction_schedule="violated", invariance_threshold=NEVER_REACHED, pair_chunk_size=chunk
        )
        run.train()
        assert not any(corrected(around))


@pytest.mark.parametrize("step", [2, 3])
def test_an_interval_goes_on_after_a_resume(tmp_path, step):
    settings = {"correction_interval": 3, "save_strategy": "steps", "save_steps": step, "invariance_threshold": 0.0}
    whole, _ = guided(tmp_path, **settings)
    whole.train()
    again, _ = guided(tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert small.bit_equal(weights(whole.model), weights(again.model))
    assert whole.progress.positions == again.progress.positions == {"": 8}


def test_objectives_are_settings(tmp_path):
    for name, value in (
        ("objective", "dro"),
        ("pair_objective", "mmd"),
        ("pair_penalty_weight", 0),
        ("correction_interval", 0),
        ("correction_schedule", "never"),
        ("loss_scaling", "none"),
        ("max_loss_scale", 0),
        ("group_dro_step_size", -1),
    ):
        with pytest.raises(ValueError, match=name):
            small.config(tmp_path, **{name: value})


def test_no_pairs_no_objective_is_trainer(tmp_path):
    ends = [weights(trained(tmp_path, grouped(), kind=kind).model) for kind in (Trainer, IPGTrainer)]
    assert small.bit_equal(*ends)
