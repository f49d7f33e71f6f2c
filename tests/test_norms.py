# SPDX-License-Identifier: Apache-2.0
"""Batch norm that normalises with its running statistics in training and keeps updating them."""

import copy

import pytest
import small
import torch
from accelerate import Accelerator
from small import Around, bit_equal, logged, trainer, weights
from torch import nn

from ipg_hf import IPGTrainer
from ipg_hf.norms import RunningNorm, norm_layers


def statistics(model):
    return {name: value for name, value in weights(model).items() if "running" in name or "num_batches" in name}


def moved_by(layer, *micro_batches):
    """The layer after the update of its statistics at the end of one optimizer step."""
    running = RunningNorm()
    for values in micro_batches:
        with running.collecting(layer):
            layer(values)
    running.end_step(Accelerator(cpu=True))
    return layer


def test_statistics_by_hand():
    """One channel has the values 1, 3 and 1, 7: mean 3, squared deviations 4 + 0 + 4 + 16, unbiased variance 8."""
    layer = moved_by(nn.BatchNorm1d(1).eval(), torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [7.0]]))
    assert layer.running_mean.item() == pytest.approx(0.1 * 3)
    assert layer.running_var.item() == pytest.approx(0.9 * 1 + 0.1 * 8)
    assert layer.num_batches_tracked.item() == 1


def test_a_single_value_moves_the_mean_only():
    layer = moved_by(nn.BatchNorm1d(1).eval(), torch.tensor([[5.0]]))
    assert (layer.running_mean.item(), layer.running_var.item()) == (pytest.approx(0.5), 1.0)


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
@pytest.mark.parametrize(("kind", "shape"), [(nn.BatchNorm1d, (6, 4)), (nn.BatchNorm2d, (6, 4, 3, 5))])
def test_the_statistics_are_those_of_torch(momentum, kind, shape):
    ours = kind(4, momentum=momentum).double().eval()
    theirs = copy.deepcopy(ours).train()
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        values = 100 + torch.randn(shape, generator=generator, dtype=torch.float64)
        moved_by(ours, *values.split(2))
        theirs(values)
    assert small.differences(statistics(ours), statistics(theirs)) < 1e-9


def test_the_variance_is_exact_for_a_large_mean():
    layer, exact = nn.BatchNorm1d(1).eval(), nn.BatchNorm1d(1).double().train()
    layer.running_mean.fill_(1e4)
    exact.running_mean.fill_(1e4)
    values = 1e4 + torch.linspace(-1, 1, 50)[:, None]
    moved_by(layer, values)
    exact(values.double())
    assert layer.running_var.item() == pytest.approx(exact.running_var.item(), rel=1e-6)


def test_instance_norm_is_left_alone():
    layer = nn.InstanceNorm2d(2, track_running_stats=True).eval()
    before = weights(layer)
    assert norm_layers(layer) == [layer]
    assert bit_equal(weights(moved_by(layer, torch.randn(2, 2, 3, 3))), before)


@pytest.mark.parametrize("guided", [True, False])
def test_the_task_forward_is_the_inference_forward(tmp_path, guided):
    """The loss of a step is the loss of the model in `eval()`. After the step the statistics have moved."""
    for settings, agrees in (({"running_norm": True}, True), ({}, False)):
        around, train = Around(), small.rows(8, dtype=torch.float64)
        pair_dataset = small.pairs(6, dtype=torch.float64) if guided else None
        args = small.config(tmp_path, max_steps=2, **settings)
        run = IPGTrainer(
            small.resnet().double(), args, train_dataset=train, pair_dataset=pair_dataset, callbacks=[around]
        )
        run.train()
        at_loss = around.middle[1][0]  # the parameters of the task forward, before the task update
        if guided:
            assert not bit_equal(at_loss, around.before[1][0])
        model = small.resnet().double()
        model.load_state_dict({**at_loss, **{k: v for k, v in around.before[1][0].items() if "running" in k}})
        batch = next(iter(run.get_train_dataloader()))
        with torch.no_grad():
            loss = model.eval()(**{name: batch[name] for name in ("pixel_values", "labels")}).loss.item()
        assert (abs(loss - logged(run)[1]["loss"]) < 1e-4) is agrees
        moved = statistics(run.model)
        assert not any(torch.equal(value, statistics(small.resnet().double())[name]) for name, value in moved.items())


def test_accumulation_equals_one_batch(tmp_path):
    """The last step of an epoch has fewer rows, in micro-batches of different sizes."""

    def run(batch, steps, **settings):
        model, train = small.resnet().double(), small.rows(22, dtype=torch.float64)
        settings |= {"num_train_epochs": 2, "max_steps": -1, "optim": "sgd", "learning_rate": 0.05}
        settings |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}
        pair_dataset = small.pairs(6, dtype=torch.float64)
        done = trainer(tmp_path, model, train, pair_dataset, train_sampling_strategy="sequential", **settings)
        done.train()
        return weights(done.model)

    whole = run(6, 1, running_norm=True)
    assert small.differences(whole, run(2, 3, running_norm=True)) < 1e-9
    assert small.differences(run(6, 1), run(2, 3)) > 1e-3  # negative control: each micro-batch uses its own statistics


def test_a_resumed_run_equals_the_uninterrupted_run_to_the_last_bit(tmp_path):
    settings = {"running_norm": True, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path, small.resnet(), **settings)
    whole.train()
    resumed = trainer(tmp_path, small.resnet(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert bit_equal(weights(resumed.model), weights(whole.model))


@pytest.mark.parametrize("running_norm", [True, False])
def test_the_pair_forward_does_not_change_the_statistics(tmp_path, running_norm):
    """With a learning rate of 0 the weights stay, so only the inputs of the layers can change the statistics."""

    def after_a_step(seed, pair_dataset):
        settings = {"running_norm": running_norm, "max_steps": 1, "learning_rate": 0.0}
        run = trainer(tmp_path, small.resnet(), small.rows(8, seed=seed), pair_dataset, **settings)
        run.train()
        assert logged(run, "ipg/distance")[0]["ipg/distance"] > 0
        return statistics(run.model)

    brighter = [{name: 5 * value for name, value in row.items()} for row in small.pairs(10)]
    plain = after_a_step(0, small.pairs(10))
    assert bit_equal(plain, after_a_step(0, brighter))
    assert not bit_equal(plain, after_a_step(1, small.pairs(10)))  # negative control: other training images


@pytest.mark.parametrize("other", ["freeze_norm", "torch_compile"])
def test_running_norm_does_not_combine_with_freeze_norm_or_the_compiler(tmp_path, other):
    with pytest.raises(ValueError, match=f"running_norm=True does not combine with {other}=True"):
        small.config(tmp_path, running_norm=True, **{other: True})


def test_the_trainer_warns_of_batch_statistics_unless_running_norm_is_on(tmp_path, caplog):
    trainer(tmp_path, small.resnet(), running_norm=True)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    trainer(tmp_path, small.resnet())
    assert "Set freeze_norm=True for a pretrained model. Set running_norm=True" in caplog.text
