# SPDX-License-Identifier: Apache-2.0
"""Subclasses of IPGTrainer as users write them: each is exact, or an error that names the override."""

import pytest
import small
import torch
from small import bit_equal, config, grouped, logged, pairs, rows, trainer, weights
from torch.nn import functional as F
from transformers import Trainer

from ipg_hf import IPGTrainer


class OwnLoss(IPGTrainer):
    """Computes the loss without super, as a weighted or focal loss does."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


class OwnPlainLoss(Trainer):
    """The same override of Trainer."""

    compute_loss = OwnLoss.compute_loss


@pytest.mark.parametrize("norm", ["freeze_norm", "running_norm"])
def test_a_loss_of_ones_own_leaves_batch_norm_as_it_was_asked(tmp_path, norm):
    ends = []
    for kind, asked in ((IPGTrainer, True), (OwnLoss, True), (OwnLoss, False)):
        run = trainer(tmp_path, model=small.resnet(), kind=kind, learning_rate=1e-2, **{norm: asked})
        run.train()
        ends.append(weights(run.model))
    assert small.differences(ends[0], ends[1]) < 1e-6
    assert small.differences(ends[1], ends[2]) > 1e-4  # the setting matters


class Mixup(IPGTrainer):
    """Mixes the images and the labels of a batch, which makes soft labels."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        loss = F.cross_entropy(model(**inputs).logits, labels)
        return loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        soft = F.one_hot(inputs["labels"], 2).float()
        return super().training_step(model, {**inputs, "labels": 0.7 * soft + 0.3 * soft.flip(0)}, num_items_in_batch)


def test_soft_labels_do_not_make_the_pairs_multi_label(tmp_path):
    ours = trainer(tmp_path, kind=Mixup)
    ours.train()
    assert ours.problem_type == ours._guided_step.problem_type == "single_label_classification"
    assert all("ipg/collapsed" in entry for entry in logged(ours))


def test_labels_of_floats_are_a_multi_label_problem(tmp_path):
    train = [{**row, "labels": torch.tensor([1.0, 0.0])} for row in rows(8)]
    assert trainer(tmp_path, train=train).problem_type == "multi_label_classification"
    assert trainer(tmp_path, train=rows(8)).problem_type == "single_label_classification"


def test_a_loss_of_ones_own_is_accumulated_as_by_trainer(tmp_path):
    losses = []
    for kind in (OwnPlainLoss, OwnLoss):
        settings = {"model": small.timm_resnet(), "max_steps": 1, "gradient_accumulation_steps": 4}
        run = trainer(tmp_path, kind=kind, per_device_train_batch_size=2, learning_rate=1e-6, **settings)
        run.train()
        losses.append(logged(run)[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


class Twice(IPGTrainer):
    """Two gradients a step, as adversarial training takes them."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        super().training_step(model, dict(inputs), num_items_in_batch)
        return super().training_step(model, inputs, num_items_in_batch)


def test_two_training_steps_in_one_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Twice\.training_step calls IPGTrainer.training_step twice"):
        trainer(tmp_path, kind=Twice).train()


class WithoutSuper(IPGTrainer):
    """A training step that never calls IPGTrainer's."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = model(**self._prepare_inputs(inputs)).loss
        self.accelerator.backward(loss)
        return loss.detach()


def test_a_training_step_that_ignores_the_pairs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="WithoutSuper overrides training_step without"):
        trainer(tmp_path, kind=WithoutSuper).train()


@pytest.mark.parametrize("objective", ["class_balanced", "reweight", "group_dro"])
def test_an_objective_that_an_override_passes_over_is_refused(tmp_path, objective):
    with pytest.raises(ValueError, match=f"objective='{objective}' .* OwnLoss overrides compute_loss"):
        trainer(tmp_path, train=grouped(), kind=OwnLoss, objective=objective).train()


class ThroughSuper(IPGTrainer):
    """Scales the loss that IPGTrainer computes."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def test_an_override_that_calls_super_changes_nothing(tmp_path):
    ends = []
    for kind in (IPGTrainer, ThroughSuper):
        run = trainer(tmp_path, train=grouped(), kind=kind, objective="group_dro")
        run.train()
        ends.append(weights(run.model))
    assert bit_equal(*ends)


def test_settings_changed_after_construction_are_looked_at_before_training(tmp_path):
    run = trainer(tmp_path)
    run.args.alpha = -1.3
    with pytest.raises(ValueError, match=r"alpha=-1\.3 is not valid"):
        run.train()


def test_the_sixth_argument_is_that_of_trainer(tmp_path):
    processor = object()
    run = IPGTrainer(small.vit(), config(tmp_path), None, rows(4), None, processor, pair_dataset=pairs(4))
    assert run.processing_class is processor


def test_epochs_of_rows_are_counted_only_for_random_draws(tmp_path):
    names = [type(callback).__name__ for callback in trainer(tmp_path).callback_handler.callbacks]
    assert "RowEpochs" not in names
    names = [type(callback).__name__ for callback in trainer(tmp_path, random_flip=True).callback_handler.callbacks]
    assert "RowEpochs" in names
