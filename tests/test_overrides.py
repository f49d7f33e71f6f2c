# SPDX-License-Identifier: Apache-2.0
"""Subclasses of IPGTrainer as users write them: each is exact, or an error that names the override."""

import datasets
import numpy as np
import pytest
import small
import torch
from PIL import Image
from small import bit_equal, config, grouped, logged, pairs, rows, trainer, weights
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from transformers import Trainer, ViTImageProcessor

from ipg_hf import IPGTrainer
from ipg_hf.pairs import ImageRows


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


# ---- An optimizer of ones own, and a head that is another one than at construction ----

RATIONALES = {"invariance_distance": "rationale", "invariance_threshold": 1e-4, "learning_rate": 1e-2}


class LayerwiseDecay(IPGTrainer):
    """Gives lower layers a lower rate, without super."""

    def create_optimizer(self, model=None):
        model = self.model if model is None else model
        rates = {"vit.embeddings": 0.25, "vit.layers.0": 0.5, "vit.layers.1": 0.75}
        groups = [
            {
                "params": [parameter],
                "lr": self.args.learning_rate * next((r for start, r in rates.items() if name.startswith(start)), 1.0),
            }
            for name, parameter in model.named_parameters()
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=self.args.learning_rate)
        return self.optimizer


class LayerwiseDecayBySuper(LayerwiseDecay):
    """The same optimizer, and then super."""

    def create_optimizer(self, model=None):
        super().create_optimizer(model)
        return IPGTrainer.create_optimizer(self, model)


def vit_of_many_heads(trial=None):
    """Makes a model each time, as `model_init` does."""
    return small.vit()


def test_an_optimizer_of_ones_own_with_model_init(tmp_path):
    ends = []
    for kind in (LayerwiseDecay, LayerwiseDecayBySuper):
        args = config(tmp_path, **RATIONALES)
        run = kind(None, args, train_dataset=rows(24), pair_dataset=pairs(10), model_init=vit_of_many_heads)
        run.train()
        assert run.head.modules == (run.model.classifier,)
        ends.append(weights(run.model))
    assert bit_equal(*ends)


def replaced_head(run):
    """A head of other first weights in the place of the model's."""
    torch.manual_seed(1)
    run.model.classifier = torch.nn.Linear(32, 2)
    return weights(run.model)


def test_an_optimizer_of_ones_own_with_a_head_that_was_replaced(tmp_path):
    ends = []
    for kind in (LayerwiseDecay, LayerwiseDecayBySuper):
        run = trainer(tmp_path, kind=kind, **RATIONALES)
        before = replaced_head(run)
        run.train()
        ends.append(weights(run.model))
        assert not torch.equal(before["classifier.weight"], ends[-1]["classifier.weight"])
        assert all(entry["ipg/corrective_grad_norm"] > 0 for entry in logged(run))
    assert bit_equal(*ends)
    plain = trainer(tmp_path, kind=LayerwiseDecay, pair_dataset={}, **RATIONALES)
    replaced_head(plain)
    plain.train()
    assert small.differences(ends[0], weights(plain.model)) > 1e-4  # the pairs act


def test_an_optimizer_of_ones_own_in_a_search(tmp_path):
    pytest.importorskip("optuna")
    args = config(tmp_path, **RATIONALES)
    run = LayerwiseDecay(
        None, args, train_dataset=rows(24), eval_dataset=rows(8), pair_dataset=pairs(10), model_init=vit_of_many_heads
    )
    best = run.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-3)},
        compute_objective=lambda metrics: metrics["eval_loss"],
        n_trials=2,
        backend="optuna",
    )
    assert best.objective > 0


def test_a_head_of_ones_own_that_is_none_is_an_error_before_the_first_step(tmp_path):
    run = trainer(tmp_path, kind=LayerwiseDecay, **RATIONALES)
    run.model.classifier = torch.nn.Sequential(torch.nn.Linear(32, 2), torch.nn.ReLU())
    with pytest.raises(ValueError, match="its output is not the logits"):
        run.train()
    assert run.state.global_step == 0


def test_an_optimizer_that_was_made_before_the_head_was_replaced_is_refused(tmp_path):
    model = small.vit()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = trainer(tmp_path, model=model, optimizers=(optimizer, None))
    replaced_head(run)
    with pytest.raises(
        ValueError, match=r"does not have 'classifier.weight', 'classifier.bias'.*trainer.optimizer = None"
    ):
        run.train()
    run.optimizer = None
    before = replaced_head(run)
    run.train()
    assert not torch.equal(before["classifier.weight"], run.model.classifier.weight)


@pytest.mark.parametrize("surplus", [True, False], ids=["more", "fewer"])
def test_an_optimizer_of_more_or_of_fewer_parameters_is_taken(tmp_path, surplus):
    model = small.vit()
    centres = [torch.nn.Parameter(torch.zeros(2, 32))]  # as a metric loss has them
    chosen = [*model.parameters(), *centres] if surplus else model.classifier.parameters()
    run = trainer(tmp_path, model=model, optimizers=(torch.optim.SGD(chosen, 0.1), None))
    run.train()
    assert run.state.global_step == 3


# ---- A data loader of ones own, with raw images ----


def raw_images(n, columns, seed=0):
    """A data set of pictures, whose further columns have the label of the row."""
    pictures = np.random.default_rng(seed).integers(0, 255, (len(columns), n, 20, 20, 3), dtype=np.uint8)
    table = {name: [Image.fromarray(p) for p in side] for name, side in zip(columns, pictures, strict=True)}
    features = {name: datasets.Image() for name in columns} | {"label": datasets.ClassLabel(names=["no", "yes"])}
    return datasets.Dataset.from_dict(table | {"label": [i % 2 for i in range(n)]}, datasets.Features(features))


class OwnLoader(IPGTrainer):
    """Makes the data loader without super, as one does to weigh rows."""

    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, self.args.train_batch_size, collate_fn=self.data_collator)


class OwnEvaluationLoader(IPGTrainer):
    """Makes the loader of the evaluation without super."""

    def get_eval_dataloader(self, eval_dataset=None):
        return DataLoader(self.eval_dataset, self.args.eval_batch_size, collate_fn=self.data_collator)


class OwnCollator(OwnLoader):
    """Makes the loader without super, and the model inputs in its collator."""

    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, self.args.train_batch_size, collate_fn=self.collate)

    def collate(self, rows):
        inputs = self.processing_class([row["image"] for row in rows], return_tensors="pt")
        return {**inputs, "labels": torch.tensor([row["label"] for row in rows])}


class LoaderBySuper(IPGTrainer):
    """Changes the loader that super makes."""

    def get_train_dataloader(self):
        return super().get_train_dataloader()


PROCESSOR = ViTImageProcessor(size={"height": small.SIZE, "width": small.SIZE})
IN_ORDER = {"train_sampling_strategy": "sequential", "processing_class": PROCESSOR, "learning_rate": 1e-2}
raw_pairs = pytest.mark.parametrize("has_pairs", [True, False], ids=["pairs", "no pairs"])


@raw_pairs
def test_raw_images_in_a_loader_of_ones_own_are_refused(tmp_path, has_pairs):
    given = raw_images(10, ["image_a", "image_b"]) if has_pairs else {}
    run = trainer(tmp_path, train=raw_images(24, ["image"]), pair_dataset=given, kind=OwnLoader, **IN_ORDER)
    with pytest.raises(ValueError, match=r"OwnLoader\.get_train_dataloader loads raw images.*super\(\)") as failure:
        run.train()
    assert "\n" not in str(failure.value)
    assert run.state.global_step == 0


def test_raw_images_in_an_evaluation_loader_of_ones_own_are_refused(tmp_path):
    data = {"train": raw_images(24, ["image"]), "eval_dataset": raw_images(8, ["image"])}
    run = trainer(
        tmp_path, pair_dataset=raw_images(10, ["image_a", "image_b"]), kind=OwnEvaluationLoader, **data, **IN_ORDER
    )
    with pytest.raises(ValueError, match=r"OwnEvaluationLoader\.get_eval_dataloader loads raw images"):
        run.evaluate()


class SomeRows(IPGTrainer):
    """Makes the loader of some rows without super."""

    def get_train_dataloader(self):
        some = Subset(self.train_dataset, range(16))
        return DataLoader(some, self.args.train_batch_size, collate_fn=self.data_collator)


@pytest.mark.parametrize("kind", [OwnLoader, SomeRows])
@pytest.mark.parametrize("processor", [None, PROCESSOR], ids=["no processor", "processor"])
def test_raw_images_are_found_in_any_map_style_set(tmp_path, kind, processor):
    run = trainer(tmp_path, train=raw_images(24, ["image"]), kind=kind, processing_class=processor)
    with pytest.raises(ValueError, match=rf"{kind.__name__}\.get_train_dataloader loads raw images"):
        run.train()


class OwnNames(OwnCollator):
    """Its loader and its loss agree on names that are not the model's."""

    def collate(self, rows):
        batch = super().collate(rows)
        return {"pictures": batch["pixel_values"], "labels": batch["labels"]}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return F.cross_entropy(model(inputs["pictures"]).logits, inputs["labels"])


class Tuples(OwnNames):
    """Its loader and its loss agree on tuples."""

    def collate(self, rows):
        return tuple(super().collate(rows).values())

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return F.cross_entropy(model(inputs[0]).logits, inputs[1])


@pytest.mark.parametrize("kind", [OwnNames, Tuples])
@raw_pairs
def test_a_loader_and_a_loss_that_agree_are_taken(tmp_path, kind, has_pairs):
    given, ends = raw_images(10, ["image_a", "image_b"], seed=1) if has_pairs else {}, []
    for other in (OwnLoss, kind):
        run = trainer(tmp_path, train=raw_images(24, ["image"]), pair_dataset=given, kind=other, **IN_ORDER)
        run.train()
        ends.append(weights(run.model))
    assert bit_equal(*ends)


class WithoutAttribute(OwnLoader):
    """Makes the loader without super; its collator drops the attribute."""

    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, self.args.train_batch_size, collate_fn=self.collate)

    def collate(self, rows):
        images = torch.stack([row["pixel_values"] for row in rows]).float()
        return {"pixel_values": images, "labels": torch.stack([row["label"] for row in rows])}


@pytest.mark.parametrize("objective", ["reweight", "group_dro", "class_balanced"])
def test_a_loader_without_the_attribute_is_refused_where_the_loss_needs_it(tmp_path, objective):
    run = trainer(tmp_path, train=grouped(), kind=WithoutAttribute, objective=objective)
    if objective == "class_balanced":
        run.train()
        return
    with pytest.raises(ValueError, match=f"'{objective}' needs 'attribute' .* of WithoutAttribute gives"):
        run.train()


@raw_pairs
@pytest.mark.parametrize("kind", [OwnLoader, OwnCollator, LoaderBySuper])
def test_a_loader_of_ones_own_that_gives_model_inputs_is_exact(tmp_path, kind, has_pairs):
    train, ends = raw_images(24, ["image"]), []
    given = raw_images(10, ["image_a", "image_b"], seed=1) if has_pairs else {}
    for other in (IPGTrainer, kind):
        loads = ImageRows(train, PROCESSOR, {"image": "pixel_values"}, keep=["label"]) if other is OwnLoader else train
        run = trainer(tmp_path, train=loads, pair_dataset=given, kind=other, **IN_ORDER)
        run.train()
        ends.append(weights(run.model))
    assert bit_equal(*ends)
