# SPDX-License-Identifier: Apache-2.0
"""What goes into the trainer and comes out of it: data, logs, warnings and errors."""

import math
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import small
import timm
import torch
from accelerate import ParallelismConfig
from accelerate.utils import DistributedType
from PIL import Image
from small import Around, bit_equal, logged, trainer, weights
from torch import nn
from transformers import TrainerCallback, TrainingArguments, ViTImageProcessor

from ipg_hf import IPGConfig, IPGTrainer
from ipg_hf.step import check_launch


@pytest.fixture
def warnings_of(caplog):
    """The library's warnings so far."""
    return lambda: [r.getMessage() for r in caplog.records if r.name.startswith("ipg_hf") and r.levelname == "WARNING"]


# ---- Skipped steps, logs, collapse ----


class Poisoned(TrainerCallback):
    """A gradient that is not finite in the corrective backward of the chosen steps."""

    def __init__(self, model, *steps):
        self.steps, self.now = steps, -1
        model.classifier.weight.register_hook(lambda grad: grad * self.factor(model))

    def factor(self, model):
        return math.nan if self.now in self.steps and not model.training else 1.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.now = state.global_step


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch_fused"])
def test_a_gradient_that_is_not_finite_skips_the_whole_step(tmp_path, optim):
    model, around = small.vit(), Around()
    run = trainer(
        tmp_path,
        model,
        callbacks=[Poisoned(model, 1, 2), around],
        max_steps=4,
        optim=optim,
        gradient_accumulation_steps=2,
        weight_decay=0.1,
    )
    run.train()
    for step in range(4):
        for before, after in zip(around.before[step], around.after[step], strict=True):
            assert bit_equal(before, after) is (step in (1, 2)) or not before
    assert [entry["ipg/skipped"] for entry in logged(run)] == [0.0, 1.0, 1.0, 0.0]
    assert ["ipg/distance" in entry for entry in logged(run)] == [True, False, False, True]
    assert all(torch.isfinite(value).all() for value in weights(model).values())


def test_log_keys(tmp_path):
    run = trainer(tmp_path, max_steps=4, logging_steps=2)
    run.train()
    names = {"distance", "divergence", "violated", "corrective_grad_norm", "loss_grad_norm", "loss_scale", "skipped"}
    names |= {"pair_wait"}
    for entry in logged(run):
        assert {key for key in entry if key.startswith("ipg/")} == {f"ipg/{name}" for name in {*names, "collapsed"}}
    assert not any(key.startswith("ipg/") for key in logged(run, "train_loss")[0])


def test_logs_are_means_over_the_steps_since_the_last(tmp_path):
    every, second = (trainer(tmp_path, max_steps=4, logging_steps=steps) for steps in (1, 2))
    every.train()
    second.train()
    values = [entry["ipg/distance"] for entry in logged(every)]
    wanted = [np.mean(values[:2]), np.mean(values[2:])]
    assert [entry["ipg/distance"] for entry in logged(second)] == pytest.approx(wanted, rel=1e-12)


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


# ---- Data ----


def hf_rows(n, seed=0, attribute=True):
    rng = np.random.default_rng(seed)
    images = [Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)) for _ in range(n)]
    columns = {"image": images, "label": [i % 2 for i in range(n)]}
    columns |= {"attribute": [i // 2 % 2 for i in range(n)], "note": ["x"] * n} if attribute else {}
    return datasets.Dataset.from_dict(columns)


def hf_pairs(n, seed=1):
    a, b = hf_rows(n, seed), hf_rows(n, seed + 100)
    return datasets.Dataset.from_dict({"image_a": a["image"][:], "image_b": b["image"][:], "source_id": list(range(n))})


PROCESSOR = {"size": {"height": small.SIZE, "width": small.SIZE}}


@pytest.mark.parametrize("remove", [True, False])
def test_attributes_reach_metrics_and_never_the_model(tmp_path, remove):
    given, forwards = [], []
    model = small.vit()
    model.register_forward_pre_hook(lambda _, args, kwargs: forwards.append(set(kwargs)), with_kwargs=True)

    def metrics(prediction):
        given.append(prediction.label_ids)
        return {"seen": 1.0}

    rows = small.rows(10, attribute=True) if not remove else None
    settings = {"processing_class": ViTImageProcessor(**PROCESSOR)} if remove else {}
    train = hf_rows(24) if remove else small.rows(24, attribute=True)
    run = trainer(
        tmp_path,
        model,
        train,
        eval_dataset=hf_rows(10) if remove else rows,
        compute_metrics=metrics,
        remove_unused_columns=remove,
        max_steps=1,
        **settings,
    )
    run.train()
    run.evaluate()
    labels, attributes = given[0]
    assert labels.tolist() == [i % 2 for i in range(10)]
    assert attributes.tolist() == [i // 2 % 2 for i in range(10)]
    assert forwards and not any("attribute" in names or "note" in names for names in forwards)
    # a set without the column has plain labels
    run.evaluate(hf_rows(6, attribute=False) if remove else small.rows(6))
    assert given[1].tolist() == [i % 2 for i in range(6)]


def test_raw_images_are_transformed(tmp_path):
    """Train, evaluation and pair sets give what the processor gives."""
    processor = ViTImageProcessor(**PROCESSOR)
    seen = []
    model = small.vit()
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((module.training, kwargs["pixel_values"])), with_kwargs=True
    )
    train, pair_dataset = hf_rows(8), hf_pairs(4)
    run = trainer(
        tmp_path,
        model,
        train,
        pair_dataset,
        eval_dataset=hf_rows(6, seed=9),
        processing_class=processor,
        max_steps=1,
        train_sampling_strategy="sequential",
    )
    run.train()
    run.evaluate()

    def processed(images):
        return processor(list(images), return_tensors="pt")["pixel_values"]

    batches = [values for training, values in seen if training]
    assert torch.equal(batches[0], processed(train["image"]))
    pair_batch = next(values for training, values in seen if not training and len(values) == 8)
    wanted = processed([*pair_dataset["image_a"], *pair_dataset["image_b"]])
    order = [next(i for i in range(4) if torch.equal(wanted[i], image)) for image in pair_batch[:4]]
    assert sorted(order) == [0, 1, 2, 3]
    assert torch.equal(pair_batch[4:], wanted[[4 + i for i in order]])
    assert torch.equal(seen[-1][1], processed(hf_rows(6, seed=9)["image"]))
    measured = run.evaluate_pairs(pair_dataset)
    assert measured == pytest.approx(run.evaluate_pairs([
        {"pixel_values_a": a, "pixel_values_b": b} for a, b in zip(*wanted.chunk(2), strict=True)
    ]))  # fmt: skip


def test_a_pair_batch_larger_than_the_set_uses_all(tmp_path, warnings_of):
    recorded = small.Recorded(small.pairs(3))
    run = trainer(tmp_path, pair_dataset=recorded, per_device_pair_batch_size=8, max_steps=2, check_pairs=False)
    (message,) = warnings_of()
    assert "3 pairs" in message and "8" in message
    recorded.drawn.clear()
    run.train()
    steps = recorded.drawn[-6:]
    assert sorted(steps[:3]) == sorted(steps[3:]) == [0, 1, 2]
    assert run.progress.positions == {"": 6}


def test_pairs_do_not_disturb_the_global_generators(tmp_path):
    """Random transforms of the user's own: what the run draws besides is the same with any pair set."""

    class Noisy(small.Recorded):
        def __getitem__(self, row):
            noise = torch.rand(()).item() + np.random.rand()
            return {name: value + noise for name, value in super().__getitem__(row).items()}

    states = []
    for pair_dataset in (small.pairs(10), Noisy(small.pairs(10))):
        run = trainer(tmp_path, small.vit(dropout=0.5), pair_dataset=pair_dataset, check_pairs=False, max_steps=2)
        torch.manual_seed(0)
        np.random.seed(0)
        run.train()
        run.evaluate_pairs(small.pairs(4))
        states.append((torch.get_rng_state(), np.random.get_state()[1]))
    assert torch.equal(states[0][0], states[1][0])
    assert np.array_equal(states[0][1], states[1][1])


def test_augmentation_changes_with_the_epoch(tmp_path):
    seen = []
    model = small.vit()
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"]) if module.training else None, with_kwargs=True
    )
    run = trainer(
        tmp_path,
        model,
        hf_rows(8),
        hf_pairs(4),
        processing_class=ViTImageProcessor(**PROCESSOR),
        random_crop_scale=0.3,
        random_flip=True,
        max_steps=2,
        train_sampling_strategy="sequential",
    )
    run.train()
    assert all(not torch.equal(a, b) for a, b in zip(*seen, strict=True))


# ---- Errors of the constructor ----


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alpha": 0.0}, ["alpha=0.0", "above 0"]),
        ({"alpha": -1.0}, ["alpha=-1.0", "above 0"]),
        ({"alpha": math.nan}, ["alpha=nan", "above 0"]),
        ({"alpha": math.inf}, ["alpha=inf", "finite"]),
        ({"invariance_threshold": -1.0}, ["invariance_threshold=-1.0", "0 or more"]),
        ({"invariance_threshold": math.nan}, ["invariance_threshold=nan", "not NaN"]),
        ({"rationale_norm": "nuclear"}, ["rationale_norm='nuclear'", "spectral", "frobenius"]),
        ({"rationale_reduction": "sum"}, ["rationale_reduction='sum'", "mean", "pair"]),
        ({"pair_combination": "max"}, ["pair_combination='max'", "mean", "sum"]),
        ({"per_device_pair_batch_size": 0}, ["per_device_pair_batch_size=0", "1 or more"]),
        ({"random_crop_scale": 0.0}, ["random_crop_scale=0.0", "(0, 1]"]),
        ({"pair_num_workers": -1}, ["pair_num_workers=-1", "0 or more"]),
        ({"pair_objective": "kl", "correction_interval": 2}, ["correction_interval=2", "pair_objective='kl'"]),
        ({"pair_objective": "kl", "correction_schedule": "violated"}, ["set correction_schedule='always'"]),
        ({"pair_objective": "kl", "shared_optimizer_state": False}, ["set shared_optimizer_state=True"]),
        ({"correction_schedule": "violated", "invariance_threshold": math.inf}, ["never correct", "finite"]),
    ],
)
def test_settings_that_cannot_work(tmp_path, settings, words):
    with pytest.raises(ValueError) as error:
        IPGConfig(str(tmp_path), use_cpu=True, **settings)
    assert all(word in str(error.value) for word in words)


def test_an_infinite_threshold_and_none_at_all_are_settings(tmp_path):
    IPGConfig(str(tmp_path), use_cpu=True, invariance_threshold=math.inf)
    IPGConfig(str(tmp_path), use_cpu=True, invariance_threshold=0.0)


def without_linear_head():
    model = small.vit()
    model.classifier = nn.Sequential(nn.Flatten(), nn.LayerNorm(32), nn.Bilinear(32, 32, 2))
    return model


def with_labels(labels):
    return datasets.Dataset.from_dict({"pixel_values": [[0.0]] * len(labels), "label": labels})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"args": "plain"}, ["TrainingArguments", "IPGConfig"]),
        ({"model": "timm"}, ["timm module", "load_image_classifier(model)"]),
        ({"train": with_labels([0, 1, 2])}, ["train_dataset", "label 2", "row 2", "num_labels"]),
        ({"eval_dataset": {"far": with_labels([0, -1])}}, ["eval_dataset['far']", "label -1", "row 1"]),
        ({"model": "no head"}, ["ViTForImageClassification", "no linear layer", "head="]),
        ({"head": "vit.layers"}, ["head='vit.layers'"]),
        ({"pair_dataset": {"empty": small.Recorded([])}}, ["pair_dataset['empty']", "empty"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_constructors_that_cannot_work(tmp_path, arguments, words):
    if arguments.get("model") == "timm":
        arguments = {"model": timm.create_model("test_vit", num_classes=2)}
    if arguments.get("model") == "no head":
        arguments = {"model": without_linear_head()}
    with pytest.raises(ValueError) as error:
        if arguments.get("args") == "plain":
            IPGTrainer(small.vit(), TrainingArguments(str(tmp_path), use_cpu=True), pair_dataset=small.pairs(4))
        else:
            trainer(tmp_path, **arguments)
    assert all(word in str(error.value) for word in words), str(error.value)


def launched(kind="MULTI_GPU", fsdp_version=None, parallel=None):
    plugin = fsdp_version and SimpleNamespace(fsdp_version=fsdp_version)
    state = SimpleNamespace(fsdp_plugin=plugin)
    return SimpleNamespace(distributed_type=DistributedType(kind), state=state, parallelism_config=parallel)


@pytest.mark.parametrize(
    ("accelerator", "others", "words"),
    [
        (launched("DEEPSPEED"), {}, ["DEEPSPEED", "engine"]),
        (launched("MEGATRON_LM"), {}, ["MEGATRON_LM"]),
        (launched("FSDP", fsdp_version=1), {}, ["FSDP1"]),
        (launched(parallel=ParallelismConfig(tp_size=2)), {}, ["tensor or context parallelism"]),
        (launched(parallel=ParallelismConfig(cp_size=2)), {}, ["tensor or context parallelism"]),
        (launched("NO"), {"devices": 2}, ["this one has 2", "DataParallel"]),
        (launched("NO"), {"is_model_parallel": True}, ["spread over several"]),
    ],
    ids=["deepspeed", "megatron", "fsdp1", "tensor parallel", "context parallel", "DataParallel", "model parallel"],
)
def test_launchers_that_are_refused(accelerator, others, words):
    with pytest.raises(ValueError) as error:
        check_launch(accelerator, **others)
    assert all(word in str(error.value) for word in [*words, "--multi_gpu", "--fsdp_version 2"]), str(error.value)


@pytest.mark.parametrize(
    ("optim", "instead"),
    [("lomo", "adamw_torch"), ("galore_adamw_layerwise", "galore_adamw"), ("adalomo", "adamw_torch")],
)
def test_optimizers_that_step_in_the_backward_are_refused(tmp_path, optim, instead):
    with pytest.raises(ValueError, match=f"optim='{optim}', which moves .* Use '{instead}"):
        small.trainer(tmp_path, optim=optim)
    small.trainer(tmp_path, pair_dataset={}, optim=optim)  # plain training is Trainer's


def test_launchers_that_are_taken():
    sharded = launched("FSDP", fsdp_version=2, parallel=ParallelismConfig(dp_shard_size=2))
    for accelerator in (launched("NO"), launched("MULTI_GPU"), launched("MULTI_CPU"), sharded):
        check_launch(accelerator)


def test_a_refused_launcher_stops_the_trainer(tmp_path):
    settings = small.config(tmp_path)
    assert settings.device.type == "cpu"
    settings._n_gpu = 2  # what a machine of two gives a script that was started by itself
    with pytest.raises(ValueError, match="one device a process, and this one has 2"):
        IPGTrainer(small.vit(), settings, train_dataset=small.rows(4), pair_dataset=small.pairs(4))
    IPGTrainer(small.vit(), settings, train_dataset=small.rows(4))  # without pairs it is Trainer


def test_ignored_labels_are_in_range(tmp_path):
    trainer(tmp_path, train=with_labels([0, 1, -100]))


def test_nothing_to_correct_is_an_error(tmp_path):
    model = small.vit()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "classifier.bias")
    with pytest.raises(ValueError, match="unfreeze"):
        trainer(tmp_path, model).train()


def test_separate_states_cannot_be_resumed(tmp_path):
    with pytest.raises(ValueError, match="shared_optimizer_state=False"):
        trainer(tmp_path, shared_optimizer_state=False).train(resume_from_checkpoint=True)
