# SPDX-License-Identifier: Apache-2.0
"""What the trainer uses of transformers and accelerate beyond their public interface. A failure names what moved."""

import inspect

import pytest
import small
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import GradientState
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import get_last_checkpoint


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_overridden_methods_have_the_arguments_that_the_overrides_have():
    assert parameters(Trainer.__init__)[:8] == [
        "self", "model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class", "model_init",
    ]  # fmt: skip
    assert parameters(Trainer._issue_warnings_after_load) == ["self", "load_result"]
    assert "save_original_format" in parameters(PreTrainedModel.save_pretrained)
    assert parameters(Trainer._get_dataloader)[:6] == [
        "self", "dataset", "description", "batch_size", "sampler_fn", "is_training",
    ]  # fmt: skip
    assert parameters(Trainer._save_checkpoint) == ["self", "model", "trial"]
    assert parameters(Trainer.training_step) == ["self", "model", "inputs", "num_items_in_batch"]
    assert parameters(Trainer.compute_loss) == ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]
    assert parameters(Trainer.prediction_step) == ["self", "model", "inputs", "prediction_loss_only", "ignore_keys"]
    assert parameters(Trainer.log) == ["self", "logs", "start_time"]
    assert parameters(Trainer.train)[:2] == ["self", "resume_from_checkpoint"]
    assert parameters(Trainer._get_output_dir) == ["self", "trial"]


def build(tmp_path, **kwargs):
    callbacks = kwargs.pop("callbacks", None)
    return Trainer(small.vit(), small.config(tmp_path, **kwargs), train_dataset=small.rows(24), callbacks=callbacks)


def test_signature_columns_are_a_list_set_once(tmp_path):
    trainer = build(tmp_path)
    trainer._set_signature_columns_if_needed()
    columns = trainer._signature_columns
    assert isinstance(columns, list) and {"pixel_values", "labels", "label"} <= set(columns)
    columns.append("mine")
    trainer._set_signature_columns_if_needed()
    assert trainer._signature_columns is columns


def test_every_data_loader_comes_from_one_method(tmp_path, monkeypatch):
    seen = []
    inner = Trainer._get_dataloader
    monkeypatch.setattr(
        Trainer,
        "_get_dataloader",
        lambda self, *args, **kwargs: (seen.append(kwargs.get("is_training", False)), inner(self, *args, **kwargs))[1],
    )
    trainer = build(tmp_path)
    trainer.get_train_dataloader()
    trainer.get_eval_dataloader(small.rows(4))
    trainer.get_test_dataloader(small.rows(4))
    assert seen == [True, False, False]


class Order(Trainer):
    def training_step(self, *args):
        self.seen.append(("step", self.accelerator.sync_gradients, self.state))
        return super().training_step(*args)

    def _clip_grad_norm(self, model):
        self.seen.append(("clip", self.accelerator.sync_gradients, self.state))
        return super()._clip_grad_norm(model)


def test_gradients_are_synchronized_at_the_last_micro_batch_and_clipped_after_it(tmp_path):
    trainer = Order(
        small.vit(), small.config(tmp_path, gradient_accumulation_steps=3, max_steps=2), train_dataset=small.rows(24)
    )
    states = []
    for _ in range(2):
        trainer.seen = []
        trainer.train()
        assert [entry[:2] for entry in trainer.seen] == 2 * [
            ("step", False), ("step", False), ("step", True), ("clip", True)
        ]  # fmt: skip
        states.append({id(state) for *_, state in trainer.seen})
        assert trainer.seen[0][2] is trainer.state
    # one TrainerState a training run, and another at the next
    assert len(states[0]) == len(states[1]) == 1 and states[0] != states[1]


def test_the_wrapped_optimizer_skips_steps_unless_gradients_are_synchronized(tmp_path):
    trainer = build(tmp_path, max_steps=1)
    trainer.train()
    wrapped, gradient_state = trainer.optimizer, trainer.accelerator.gradient_state
    assert isinstance(wrapped, AcceleratedOptimizer) and isinstance(wrapped.optimizer, torch.optim.Optimizer)
    assert isinstance(gradient_state, GradientState)
    weight = trainer.model.classifier.weight
    moved = {}
    for synchronized in (False, True):
        gradient_state._set_sync_gradients(synchronized)
        assert gradient_state.sync_gradients is synchronized
        before = weight.detach().clone()
        weight.grad = torch.ones_like(weight)
        for group in wrapped.optimizer.param_groups:
            group["lr"] = 0.1
        wrapped.step()
        moved[synchronized] = not torch.equal(weight, before)
    assert moved == {False: False, True: True}


def test_the_optimizers_state_can_be_replaced():
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], 0.1, momentum=0.9)
    parameter.grad = torch.ones(2)
    kept = optimizer.state
    optimizer.state = type(kept)(dict)
    optimizer.step()
    assert parameter not in kept and parameter in optimizer.state


def test_accelerate_is_told_of_one_accumulation_step(tmp_path):
    # its backward would divide the distance too
    assert build(tmp_path, gradient_accumulation_steps=4).accelerator.gradient_accumulation_steps == 1


@pytest.mark.parametrize("accepts", [True, False])
def test_who_divides_the_loss(tmp_path, accepts):
    """`model_accepts_loss_kwargs` decides whether items are counted, and whether training_step divides."""
    seen = []

    class Spy(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            seen.append(num_items_in_batch)
            return super().compute_loss(model, inputs, return_outputs)

    trainer = Spy(
        small.vit(), small.config(tmp_path, gradient_accumulation_steps=2, max_steps=1), train_dataset=small.rows(24)
    )
    trainer.model_accepts_loss_kwargs = accepts
    assert trainer.compute_loss_func is None and trainer.label_smoother is None
    trainer.train()
    assert [None if items is None else int(items) for items in seen] == [16 if accepts else None] * 2
    loss = trainer.state.log_history[0]["loss"]
    assert (loss > 1.0) is accepts  # ln 2 twice where nothing divides, else once


class Counted(TrainerCallback, ExportableState):
    def __init__(self):
        self.count = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.count += 1

    def state(self):
        return {"args": {}, "attributes": {"count": self.count}}


def test_stateful_callbacks_are_saved_by_class_name(tmp_path):
    trainer = build(tmp_path, callbacks=[Counted()], save_strategy="steps", save_steps=2)
    trainer.train()
    state = TrainerState.load_from_json(tmp_path / "checkpoint-2" / "trainer_state.json")
    assert state.stateful_callbacks["Counted"] == {"args": {}, "attributes": {"count": 2}}
    assert isinstance(trainer.callback_handler.callbacks, list)


def test_trainer_state_is_the_last_file_of_a_checkpoint(tmp_path, monkeypatch):
    there = []
    save = TrainerState.save_to_json
    monkeypatch.setattr(
        TrainerState,
        "save_to_json",
        lambda self, path: (there.append({p.name for p in (tmp_path / "checkpoint-2").iterdir()}), save(self, path))[1],
    )
    build(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    final = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert there == [final - {"trainer_state.json"}]
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= there[0]


def test_upstream_takes_a_partial_checkpoint_for_the_newest(tmp_path):
    """Why `IPGTrainer` looks for the newest whole one itself."""
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("{}")
    assert get_last_checkpoint(tmp_path).endswith("checkpoint-4")


def test_upstream_loses_vits_weights_at_a_resume(tmp_path):
    """Transformers issue 43701: why `IPGTrainer` saves checkpoints under the model's own names."""
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.01}
    first = build(tmp_path, **settings)
    first.train()
    again = build(tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    weights, other = first.model.state_dict(), again.model.state_dict()
    lost = {name for name in weights if not torch.equal(weights[name], other[name])}
    assert any("vit.layers" in name for name in lost) and "classifier.weight" not in lost


def test_a_resume_in_an_epoch_does_not_tell_the_rows_their_epoch(tmp_path):
    """Why `IPGTrainer` has a callback for it. When this fails the callback can go."""

    class Rows(small.Recorded):
        def set_epoch(self, epoch):
            epochs.append(epoch)

    def run(resume=None):
        args = small.config(tmp_path, max_steps=6, save_strategy="steps", save_steps=4)  # 3 steps an epoch
        Trainer(small.resnet(), args, train_dataset=Rows(small.rows(24))).train(resume_from_checkpoint=resume)

    epochs = []
    run()
    assert set(epochs) == {0, 1}
    epochs = []
    run(resume=str(tmp_path / "checkpoint-4"))
    assert 1 not in epochs
