# SPDX-License-Identifier: Apache-2.0
"""Pairs of the training batch: the run is that of updates worked out in plain PyTorch, both gradients at one point."""

import logging

import datasets
import numpy as np
import pytest
import small
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from PIL import Image
from small import bit_equal, logged, trainer, weights
from torch import nn
from transformers import Trainer, TrainerCallback, ViTImageProcessor

from ipg_hf import IPGConfig

RATE, ALPHA = 0.1, 0.7
MODELS = {
    "vit": (small.vit, "classifier"),
    "resnet": (small.resnet, "classifier.1"),
    "timm": (small.timm_resnet, "timm_model.fc"),
}


def rows(n, num_labels=2, dtype=torch.float64, seed=0):
    """Training rows with counterparts, which are noise a third as strong away."""
    generator = torch.Generator().manual_seed(seed + 50)
    found = small.rows(n, num_labels, seed, dtype)
    for row in found:
        noise = torch.randn(3, small.SIZE, small.SIZE, generator=generator, dtype=torch.float64).to(dtype)
        row["pixel_values_b"] = row["pixel_values"] + noise / 3
    return found


def run(folder, model, train=None, **settings):
    defaults = {"pair_source": "batch", "rationale_reduction": "pair", "optim": "sgd", "learning_rate": RATE}
    defaults |= {
        "alpha": ALPHA,
        "max_grad_norm": 0.0,
        "freeze_norm": True,
        "max_steps": 3,
        "lr_scheduler_type": "constant",
    }
    defaults |= {"train_sampling_strategy": "sequential", "invariance_threshold": 0.0, "per_device_train_batch_size": 6}
    training = trainer(folder, model, train or rows(18), {}, **defaults | settings)
    training.train()
    return training


# ---- The updates, worked out ----


def gradients_of(model, path, micro_batches, settings):
    """∇d, ∇L, d and c of an optimizer step at the model's parameters."""
    head, parameters = model.get_submodule(path), dict(model.named_parameters())
    z_of = {}
    sides = [torch.cat([batch[name] for batch in micro_batches]) for name in ("pixel_values", "pixel_values_b")]
    labels = torch.cat([batch["labels"] for batch in micro_batches])
    handle = head.register_forward_pre_hook(lambda _, args: z_of.update(now=args[0].flatten(1)))
    features, logits = [], []
    for images in sides:
        logits.append(model(pixel_values=images).logits)
        features.append(z_of["now"])
    handle.remove()
    difference = head.weight * (features[0] - features[1]).unsqueeze(1)
    if settings["rationale_reduction"] == "mean":
        difference = difference.mean(0, keepdim=True)
    d = torch.linalg.svdvals(difference)[:, 0].mean()
    p, q = (x.softmax(-1) for x in logits)
    c = ((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1)).mean() / 2
    if settings["invariance_distance"] == "divergence":
        d = c.sqrt()
    loss = F.cross_entropy(logits[0], labels)
    corrected = [n for n in parameters if n.startswith(tuple(settings["corrective_layers"] or [""]))]
    g_d = torch.autograd.grad(d, [parameters[n] for n in corrected], retain_graph=True, allow_unused=True)
    g_d = {n: g for n, g in zip(corrected, g_d, strict=True) if g is not None}
    g_l = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    return g_d, g_l, d.item(), c.item()


def norm(gradients):
    return torch.sqrt(sum(gradient.square().sum() for gradient in gradients.values()))


def by_hand(name, train, steps, wrong=None, **given):
    """Three steps of plain SGD; `wrong` names one mistake, for the controls."""
    settings = {"rationale_reduction": "pair", "invariance_threshold": 0.0, "corrective_layers": None}
    settings |= {"invariance_distance": "rationale"} | given
    model = MODELS[name][0]().double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    parameters, figures = dict(model.named_parameters()), []
    for micro_batches in steps(train):
        g_d, g_l, d, c = gradients_of(model, MODELS[name][1], micro_batches, settings)

        def move(gradients, parameters=parameters):
            with torch.no_grad():
                for key, gradient in gradients.items():
                    parameters[key] -= RATE * gradient

        move(g_d)
        if wrong == "task gradient at the corrected point":
            g_l = gradients_of(model, MODELS[name][1], micro_batches, settings)[1]
        scale = ALPHA * norm(g_d) / norm(g_l) if c > settings["invariance_threshold"] else 1.0
        if wrong == "no scaling":
            scale = 1.0
        move({key: scale * gradient for key, gradient in g_l.items()})
        figures.append([d, c, norm(g_d).item(), norm(g_l).item()])
    return weights(model), figures


def in_steps(*sizes):
    """Micro-batches of these sizes, in optimizer steps."""

    def steps(train):
        start = 0
        for step in sizes:
            micro_batches = []
            for size in step:
                chosen = train[start : start + size]
                names = ("pixel_values", "pixel_values_b", "labels")
                micro_batches.append({n: torch.stack([torch.as_tensor(row[n]) for row in chosen]) for n in names})
                start += size
            yield micro_batches

    return steps


WHOLE = in_steps([6], [6], [6])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rationale_reduction": "mean"},
        {"invariance_distance": "divergence"},
        {"invariance_threshold": 1.0},
        {"corrective_layers": ["classifier", "resnet.encoder.stages.1", "vit.layers.1", "timm_model.fc"]},
    ],
    ids=["pair", "mean", "root", "not violated", "some layers"],
)
@pytest.mark.parametrize("name", MODELS)
def test_a_run_equals_the_updates_worked_out(tmp_path, name, settings):
    if "corrective_layers" in settings:
        start = {"vit": "vit", "resnet": "resnet", "timm": "timm_model"}[name]
        layers = [layer for layer in settings["corrective_layers"] if layer.startswith((start, "classifier"))]
        settings = {"corrective_layers": layers[1:] if name == "timm" else layers}
    training = run(tmp_path, MODELS[name][0]().double(), **settings)
    wanted, figures = by_hand(name, rows(18), WHOLE, **settings)
    assert small.differences(weights(training.model), wanted) < 1e-12
    keys = ("distance", "divergence", "corrective_grad_norm", "loss_grad_norm")
    for entry, expected in zip(logged(training), figures, strict=True):
        assert [entry[f"ipg/{key}"] for key in keys] == pytest.approx(expected, rel=1e-9)
        assert entry["ipg/violated"] == (settings.get("invariance_threshold", 0.0) == 0.0)
    for wrong in [
        "task gradient at the corrected point",
        *([] if "invariance_threshold" in settings else ["no scaling"]),
    ]:
        assert small.differences(wanted, by_hand(name, rows(18), WHOLE, wrong, **settings)[0]) > 1e-7, wrong


@pytest.mark.parametrize("distance", ["rationale", "divergence"])
@pytest.mark.parametrize("name", MODELS)
def test_accumulation_equals_one_batch(tmp_path, name, distance):
    """22 rows in steps of 8: the last has 6, in micro-batches of 3 and then of 3 or less."""
    ends = []
    for batch, micro in ((8, 1), (4, 2), (3, 3), (1, 8)):
        train = rows(24 if batch == 3 else 22)
        settings = {"max_steps": -1, "num_train_epochs": 1, "gradient_accumulation_steps": micro}
        settings |= {"invariance_distance": distance}
        training = run(
            tmp_path, MODELS[name][0]().double(), train, per_device_train_batch_size=batch, **settings
        )  # fmt: skip
        ends.append((batch, weights(training.model), [entry["ipg/distance"] for entry in logged(training)]))
    for batch, end, distances in ends:
        sizes = {8: ([8], [8], [6]), 4: ([4, 4], [4, 4], [4, 2]), 3: ([3] * 3, [3] * 3, [3, 3]), 1: ([8], [8], [6])}
        train = rows(24 if batch == 3 else 22)
        wanted, figures = by_hand(name, train, in_steps(*sizes[batch]), invariance_distance=distance)
        assert small.differences(end, wanted) < 1e-12
        assert distances == pytest.approx([row[0] for row in figures], rel=1e-9)


def test_the_gradient_of_a_short_micro_batch_counts_by_its_pairs(tmp_path):
    """5 rows in micro-batches of 3 and 2; the mean of the micro-batches' means would be another."""
    train = rows(5)
    settings = {"max_steps": 1, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    training = run(tmp_path, small.vit().double(), train, **settings)
    assert small.differences(weights(training.model), by_hand("vit", train, in_steps([5]))[0]) < 1e-12
    d = [by_hand("vit", part, in_steps([len(part)]))[1][0][0] for part in (train[:3], train[3:])]
    assert abs(logged(training)[0]["ipg/distance"] - sum(d) / 2) > 1e-4


def test_the_loss_is_that_of_the_batch_alone(tmp_path):
    """The first step's loss and gradient norm are Trainer's, which knows nothing of the counterparts."""
    ours = run(tmp_path, small.vit(), rows(18, dtype=torch.float32), max_steps=1)
    plain = [{k: v for k, v in row.items() if k != "pixel_values_b"} for row in rows(18, dtype=torch.float32)]
    settings = {"per_device_train_batch_size": 6, "train_sampling_strategy": "sequential", "max_steps": 1}
    theirs = trainer(tmp_path, small.vit(), plain, kind=Trainer, max_grad_norm=0.0, **settings)
    theirs.train()
    assert logged(ours)[0]["loss"] == logged(theirs)[0]["loss"]
    assert logged(ours)[0]["ipg/loss_grad_norm"] == pytest.approx(logged(theirs)[0]["grad_norm"], rel=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"optim": "adamw_torch", "weight_decay": 0.5},
        {"correction_schedule": "violated", "invariance_threshold": 1.0},
        {"max_grad_norm": 0.05},
        {"label_smoothing_factor": 0.1},
        {"bf16": True},
    ],
    ids=["adamw", "violated", "clipped", "smoothed", "bf16"],
)
def test_other_settings(tmp_path, settings):
    plain = run(tmp_path, small.vit(), rows(18, dtype=torch.float32), max_steps=2)
    training = run(tmp_path, small.vit(), rows(18, dtype=torch.float32), max_steps=2, **settings)
    assert small.differences(weights(plain.model), weights(training.model)) > 1e-6
    moves = [entry["ipg/corrective_grad_norm"] for entry in logged(training)]
    assert all(move > 0 for move in moves) is ("correction_schedule" not in settings)


def test_weight_decay_acts_once(tmp_path):
    """Equal sides and a task gradient that is scaled to nothing leave the decay alone."""
    train = [row | {"pixel_values_b": row["pixel_values"]} for row in rows(18)]
    model = small.vit().double()
    before = weights(model)
    optimizer = torch.optim.SGD(model.parameters(), RATE, weight_decay=0.5)
    training = run(
        tmp_path, model, train, max_steps=1, optimizers=(optimizer, None), callbacks=[WithoutTask()]
    )  # fmt: skip
    assert logged(training)[0]["ipg/distance"] == logged(training)[0]["ipg/divergence"] == 0.0
    for name, value in weights(model).items():
        torch.testing.assert_close(value, before[name] * (1 - RATE * 0.5), rtol=1e-12, atol=0)


class WithoutTask(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for parameter in model.parameters():
            parameter.grad.zero_()


def test_a_gradient_that_is_not_finite_skips_the_step(tmp_path):
    train = rows(18)
    train[8]["pixel_values_b"][0, 0, 0] = torch.nan  # of the second step
    around = small.Around()
    training = run(tmp_path, small.vit().double(), train, callbacks=[around])
    assert [entry["ipg/skipped"] for entry in logged(training)] == [0.0, 1.0, 0.0]
    same = [bit_equal(around.before[step][0], around.after[step][0]) for step in range(3)]
    assert same == [False, True, False]


# ---- Raw images, resuming, evaluation ----


def raw(n, seed=0):
    rng = np.random.default_rng(seed)
    images = [Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)) for _ in range(2 * n)]
    columns = {"image": images[:n], "image_b": images[n:], "label": [i % 2 for i in range(n)]}
    return datasets.Dataset.from_dict(columns | {"attribute": [i // 2 % 2 for i in range(n)]})


def raw_run(folder, resume=None, train=None, **settings):
    training = trainer(
        folder,
        small.vit(),
        train or raw(22),
        {},
        processing_class=ViTImageProcessor(size={"height": small.SIZE, "width": small.SIZE}),
        **{"pair_source": "batch", "rationale_reduction": "pair", "per_device_train_batch_size": 4} | settings,
    )
    training.train(resume_from_checkpoint=resume)
    return training


def test_raw_images_and_their_counterparts_get_the_same_draw(tmp_path):
    seen = {}

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
            seen.update(next(iter(train_dataloader)))

    same = raw(8)
    same = same.remove_columns("image_b").add_column("image_b", same.with_format("arrow")["image"][:])
    same = same.cast_column("image_b", datasets.Image())
    training = raw_run(
        tmp_path, train=same, callbacks=[Watch()], random_flip=True, random_crop_scale=0.5, max_steps=1
    )  # fmt: skip
    assert {*seen} == {"pixel_values", "pixel_values_b", "labels", "attribute"}
    assert torch.equal(seen["pixel_values"], seen["pixel_values_b"])
    assert logged(training)[0]["ipg/distance"] == 0.0
    assert logged(raw_run(tmp_path, max_steps=1))[0]["ipg/distance"] > 0.0


def test_a_resumed_run_ends_as_the_whole_one(tmp_path):
    settings = {
        "max_steps": 6,
        "random_flip": True,
        "random_crop_scale": 0.5,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    settings |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    whole = raw_run(tmp_path, **settings)
    for step in (2, 5):
        resumed = raw_run(tmp_path / "resumed", resume=str(tmp_path / f"checkpoint-{step}"), **settings)
        assert bit_equal(weights(whole.model), weights(resumed.model))
        ends = [small.optimizer_state(end.model, end.optimizer) for end in (whole, resumed)]
        assert ends[0] and bit_equal(*ends)
        distances = [[entry["ipg/distance"] for entry in logged(end)] for end in (whole, resumed)]
        assert distances[0] == distances[1] and len(distances[0]) == 6


def test_evaluation_needs_no_counterparts(tmp_path):
    training = raw_run(tmp_path, max_steps=1, eval_dataset=raw(6, seed=1))
    plain = training.evaluate(raw(6, seed=1).remove_columns("image_b"))["eval_loss"]
    assert training.evaluate()["eval_loss"] == plain
    assert training.evaluate_pairs(small.pairs(4))["eval_distance"] > 0


def test_objectives_over_groups(tmp_path):
    training = raw_run(tmp_path, objective="group_dro", group_dro_step_size=1.0)
    assert all(entry["ipg/distance"] > 0 for entry in logged(training))


def test_streams(tmp_path):
    ends = [
        raw_run(tmp_path, train=train, max_steps=2, train_sampling_strategy="sequential")
        for train in (raw(8), raw(8).to_iterable_dataset())
    ]
    assert bit_equal(weights(ends[0].model), weights(ends[1].model))


def test_a_trainer_that_does_not_train(tmp_path):
    args = small.config(tmp_path, pair_source="batch")
    from ipg_hf import IPGTrainer

    assert "eval_loss" in IPGTrainer(small.vit(), args, eval_dataset=small.rows(8)).evaluate()


# ---- What is refused and warned of ----


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pair_objective": "kl"}, ["pair_objective='kl'", "set pair_objective='ipg'"]),
        ({"pair_chunk_size": 2}, ["pair_chunk_size=2", "set pair_chunk_size=None"]),
        ({"correction_interval": 2}, ["correction_interval=2"]),
        ({"pair_cache": "cpu"}, ["pair_cache='cpu'"]),
        ({"torch_compile": True}, ["torch_compile=True"]),
        (
            {"gradient_accumulation_steps": 2, "invariance_distance": "rationale"},
            ["rationale_reduction='mean'", "set rationale_reduction='pair'"],
        ),
    ],
)
def test_settings_that_do_not_go_together(tmp_path, settings, words):
    with pytest.raises(ValueError) as error:
        IPGConfig(str(tmp_path), use_cpu=True, pair_source="batch", **settings)
    assert all(word in str(error.value) for word in [*words, "pair_source='batch'"]), str(error.value)


@pytest.mark.parametrize(
    ("variable", "value", "settings", "words"),
    [
        ("ACCELERATE_MIXED_PRECISION", "fp16", {}, "fp16=True does not go with pair_source='batch'"),
        ("ACCELERATE_DYNAMO_BACKEND", "eager", {}, "torch_compile=True does not go with pair_source='batch'"),
        (
            "UNUSED",
            "",
            {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}},
            "gradient_accumulation_steps=1 instead of 2",
        ),
    ],
)
def test_what_a_launcher_adds_does_not_go_together_either(tmp_path, monkeypatch, variable, value, settings, words):
    monkeypatch.setenv(variable, value)
    AcceleratorState._reset_state()
    try:
        with pytest.raises(ValueError, match=words):
            run(tmp_path, small.vit(), pair_source="batch", rationale_reduction="mean", **settings)
    finally:
        AcceleratorState._reset_state()


def test_the_source_is_one_of_two(tmp_path):
    with pytest.raises(ValueError, match="pair_source='rows' is not valid: it must be one of pairs, batch"):
        IPGConfig(str(tmp_path), use_cpu=True, pair_source="rows")


def unequal():
    found = rows(8)
    found[0]["pixel_values_b"] = found[0]["pixel_values_b"][:, :8]
    return found


@pytest.mark.parametrize(
    ("model", "train", "pair_set", "words"),
    [
        (small.vit, lambda: small.rows(8), {}, ["column image_b", "pixel_values_b", "['labels', 'pixel_values']"]),
        (small.vit, unequal, {}, ["one shape and dtype"]),
        (small.vit, lambda: rows(8), small.pairs(4), ["leave pair_dataset out"]),
        (small.resnet, lambda: rows(8, dtype=torch.float32), {}, ["batch-norm", "freeze_norm=True"]),
    ],
    ids=["no counterparts", "unequal sides", "a pair set", "batch norm"],
)
def test_what_cannot_work(tmp_path, model, train, pair_set, words):
    with pytest.raises(ValueError) as error:
        trainer(tmp_path, model(), train(), pair_set, pair_source="batch", rationale_reduction="pair")
    assert all(word in str(error.value) for word in words), str(error.value)


def test_later_rows_without_a_counterpart(tmp_path):
    train = [row if i < 4 else {k: v for k, v in row.items() if k != "pixel_values_b"} for i, row in enumerate(rows(8))]
    with pytest.raises((ValueError, KeyError), match="pixel_values_b"):
        run(tmp_path, small.vit().double(), train, per_device_train_batch_size=4)


@pytest.mark.parametrize(
    ("dropout", "reduction", "word"), [(0.0, "mean", "cancels out"), (0.3, "pair", "dropout"), (0.0, "pair", None)]
)
def test_what_is_doubtful_is_said(tmp_path, caplog, dropout, reduction, word):
    with caplog.at_level(logging.WARNING):
        train = rows(8, dtype=torch.float32)
        trainer(tmp_path, small.vit(dropout=dropout), train, {}, pair_source="batch", rationale_reduction=reduction)
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("ipg_hf")]
    assert [word in message for message in messages] == ([True] if word else [])


def test_what_the_distance_does_not_depend_on(tmp_path):
    with pytest.raises(ValueError, match="widen corrective_layers"):
        run(tmp_path, small.vit().double(), corrective_layers=["classifier.bias"])
