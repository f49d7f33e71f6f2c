# SPDX-License-Identifier: Apache-2.0
"""Learning rates by layer: hand-worked rates, and trainings that equal those with groups made by hand."""

import peft
import pytest
import small
import timm
import timm.optim
import torch
from small import bit_equal, config, logged, optimizer_state, pairs, rows, trainer, weights
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from ipg_hf import IPGTrainer, load_image_classifier
from ipg_hf.baselines import PairPenaltyTrainer
from ipg_hf.data.colored_mnist import ColoredMnistMLPConfig, ColoredMnistMLPForImageClassification
from ipg_hf.rates import layer_depths, layer_factors

RATE, DECAY, HEAD = 1e-2, 0.5, 3e-2
BY_LAYER = {"learning_rate": RATE, "layer_lr_decay": DECAY}


def vit_of_three_layers():
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 16, "patch_size": 8}
    return ViTForImageClassification(ViTConfig(num_hidden_layers=3, **size))


def swin():
    size = {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 2, "image_size": 16, "patch_size": 2}
    return SwinForImageClassification(SwinConfig(**size))


def convnext():
    return ConvNextForImageClassification(ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 2], num_stages=2))


def dinov2():
    size = {"hidden_size": 16, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    return Dinov2ForImageClassification(Dinov2Config(num_hidden_layers=2, **size))


def timm_convnext():
    return load_image_classifier(timm.create_model("test_convnext", num_classes=2))


def timm_vit():
    return load_image_classifier(timm.create_model("test_vit", num_classes=2))


def mlp():
    return ColoredMnistMLPForImageClassification(ColoredMnistMLPConfig())


def with_lora():
    settings = peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    return peft.get_peft_model(vit_of_three_layers(), settings)


def rates_of(run):
    """The rate of each trainable parameter, each of which stands once in the groups of a new optimizer."""
    run.optimizer = None
    optimizer = run.create_optimizer()
    rates = [(parameter, group["lr"]) for group in optimizer.param_groups for parameter in group["params"]]
    names = {parameter: name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    assert len(rates) == len(names) and {parameter for parameter, _ in rates} == {*names}
    assert optimizer.param_groups[0]["lr"] == run.args.learning_rate  # the one that is logged
    return {names[parameter]: rate for parameter, rate in rates}


def check(rates, expected):
    """Each parameter has the rate of the longest start of a name that is expected."""
    for name, rate in rates.items():
        start = max((start for start in expected if name.startswith(start)), key=len)
        assert rate == pytest.approx(expected[start], rel=1e-12), name
    assert all(any(name.startswith(start) for name in rates) for start in expected)


# ---- Rates worked by hand, in units of the learning rate ----

CASES = {
    "vit": (
        vit_of_three_layers,
        {
            "vit.embeddings": 1 / 16,
            "vit.layers.0": 1 / 8,
            "vit.layers.1": 1 / 4,
            "vit.layers.2": 1 / 2,
            "vit.layernorm": 1,
            "classifier": 1,
        },
    ),
    # the first stage has one block, the second two; what joins two stages goes with the block beside it
    "swin": (
        swin,
        {
            "swin.embeddings": 1 / 16,
            "swin.encoder.layers.0": 1 / 8,
            "swin.encoder.layers.1.blocks.0": 1 / 4,
            "swin.encoder.layers.1.blocks.1": 1 / 2,
            "swin.layernorm": 1,
            "classifier": 1,
        },
    ),
    "convnext": (
        convnext,
        {
            "convnext.embeddings": 1 / 16,
            "convnext.encoder.stages.0.layers.0": 1 / 8,
            "convnext.encoder.stages.1.downsampling_layer": 1 / 4,
            "convnext.encoder.stages.1.layers.0": 1 / 4,
            "convnext.encoder.stages.1.layers.1": 1 / 2,
            "convnext.layernorm": 1,
            "classifier": 1,
        },
    ),
    "resnet": (
        small.resnet,
        {"resnet.embedder": 1 / 8, "resnet.encoder.stages.0": 1 / 4, "resnet.encoder.stages.1": 1 / 2, "classifier": 1},
    ),
    "dinov2": (
        dinov2,
        {
            "dinov2.embeddings": 1 / 8,
            "dinov2.encoder.layer.0": 1 / 4,
            "dinov2.encoder.layer.1": 1 / 2,
            "dinov2.layernorm": 1,
            "classifier": 1,
        },
    ),
    "mlp": (mlp, {"hidden.0": 1 / 4, "hidden.2": 1 / 2, "classifier": 1}),
    "lora": (
        with_lora,
        {
            "base_model.model.vit.layers.0": 1 / 8,
            "base_model.model.vit.layers.1": 1 / 4,
            "base_model.model.vit.layers.2": 1 / 2,
            "base_model.model.classifier": 1,
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_rates_worked_by_hand(tmp_path, case):
    build, expected = CASES[case]
    run = IPGTrainer(build(), config(tmp_path, **BY_LAYER), train_dataset=rows(8))
    check(rates_of(run), {start: RATE * factor for start, factor in expected.items()})


def test_timm_models_have_the_groups_of_timm(tmp_path):
    """timm's test_convnext has four stages of one, two, four and two blocks, and its ViT six blocks."""
    run = IPGTrainer(timm_convnext(), config(tmp_path, **BY_LAYER), train_dataset=rows(8))
    depths = layer_depths(run.model)
    blocks = [len(stage.blocks) for stage in run.model.timm_model.stages]
    above, expected = sum(blocks), {"timm_model.stem": RATE * DECAY ** (sum(blocks) + 1), "timm_model.head": RATE}
    for stage, count in enumerate(blocks):
        start = f"timm_model.stages.{stage}"
        for block in range(count):
            expected[f"{start}.blocks.{block}"] = RATE * DECAY**above
            if block == 0 and any(name.startswith(f"{start}.downsample") for name in depths):
                expected[f"{start}.downsample"] = RATE * DECAY**above
            above -= 1
    check(rates_of(run), expected)


@pytest.mark.parametrize(
    "name", ["test_vit", "test_convnext", "test_resnet", "test_efficientnet", "tf_efficientnet_lite0"]
)
def test_factors_are_those_of_timm(name):
    module = timm.create_model(name, num_classes=2)
    theirs = timm.optim.param_groups_layer_decay(module, layer_decay=DECAY)
    expected = {parameter: group["lr_scale"] for group in theirs for parameter in group["params"]}
    factors = layer_factors(load_image_classifier(module), DECAY)
    assert len({*factors.values()}) > 3
    assert factors == {f"timm_model.{n}": expected[p] for n, p in module.named_parameters()}


@pytest.mark.parametrize("build", [vit_of_three_layers, timm_vit, small.resnet, mlp, small.deit_with_teacher])
def test_the_head_has_its_rate_and_the_layer_below_it_the_full_one(tmp_path, build):
    run = IPGTrainer(build(), config(tmp_path, **BY_LAYER, head_learning_rate=HEAD), train_dataset=rows(8))
    rates = rates_of(run)
    heads = [name for name in rates if rates[name] == HEAD]
    modules = dict(run.model.named_modules())
    assert heads and all(modules[name.rpartition(".")[0]].out_features == 2 for name in heads)
    others = {rate for name, rate in rates.items() if name not in heads}
    assert max(others) == RATE and len(others) > 1
    run.args.layer_lr_decay = 1.0
    assert {rate for name, rate in rates_of(run).items() if name not in heads} == {RATE}


@pytest.mark.parametrize("frozen", ["vit.layernorm", "vit."])
def test_the_logged_rate_is_the_full_one_also_where_no_parameter_has_it(tmp_path, frozen):
    model = vit_of_three_layers()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    settings = {"lr_scheduler_type": "constant", "head_learning_rate": HEAD, "max_steps": 2}
    run = IPGTrainer(model, config(tmp_path, **BY_LAYER, **settings), train_dataset=rows(8), pair_dataset=pairs(4))
    run.train()
    assert [entry["learning_rate"] for entry in logged(run)] == [RATE] * 2
    below = {"vit.embeddings": 16, "vit.layers.0": 8, "vit.layers.1": 4, "vit.layers.2": 2}
    below = {} if frozen == "vit." else {start: RATE / divisor for start, divisor in below.items()}
    check(rates_of(run), {"classifier": HEAD, **below})


def test_weight_decay_is_that_of_trainer(tmp_path):
    decays = []
    for settings in ({}, BY_LAYER):
        run = IPGTrainer(small.vit(), config(tmp_path, weight_decay=0.1, **settings), train_dataset=rows(8))
        groups = run.create_optimizer().param_groups
        names = {parameter: name for name, parameter in run.model.named_parameters()}
        decays.append({names[p]: group["weight_decay"] for group in groups for p in group["params"]})
    assert decays[0] == decays[1] and {*decays[0].values()} == {0.0, 0.1}


def test_a_model_of_one_layer_is_refused(tmp_path):
    model = small.Wrapped(nn.Sequential(nn.Flatten(), nn.Linear(3 * small.SIZE**2, 2)))
    run = trainer(tmp_path, model=model, invariance_distance="divergence", **BY_LAYER)
    with pytest.raises(ValueError, match=r"layer_lr_decay=0\.5 has no effect"):
        run.train()


# ---- Training ----


def by_hand(model, optimizer_class=torch.optim.AdamW, **kwargs):
    """An optimizer with the rates of the small ViT of two layers, one group for each parameter."""
    starts = {"vit.embeddings": 1 / 8, "vit.layers.0": 1 / 4, "vit.layers.1": 1 / 2, "vit.layernorm": 1}
    groups = []
    for name, parameter in model.named_parameters():
        rate = next((RATE * factor for start, factor in starts.items() if name.startswith(start)), HEAD)
        decayed = parameter.dim() > 1 and "layernorm" not in name and not name.endswith("bias")
        groups.append({"params": [parameter], "lr": rate, "weight_decay": 0.1 if decayed else 0.0})
    return optimizer_class(groups, lr=RATE, **kwargs)


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
@pytest.mark.parametrize(
    ("kind", "has_pairs"), [(IPGTrainer, True), (IPGTrainer, False), (PairPenaltyTrainer, True)], ids=str
)
def test_both_updates_have_the_rates_of_groups_made_by_hand(tmp_path, kind, has_pairs, optim):
    given = {"kind": kind, "pair_dataset": pairs(10) if has_pairs else {}}
    settings = {"learning_rate": RATE, "weight_decay": 0.1, "optim": optim, "max_steps": 5}
    options = {"layer_lr_decay": DECAY, "head_learning_rate": HEAD}
    ours = trainer(tmp_path, **given, **settings, **options)
    model = small.vit()
    optimizer = by_hand(model, torch.optim.SGD if optim == "sgd" else torch.optim.AdamW)
    theirs = trainer(tmp_path, model=model, optimizers=(optimizer, None), **given, **settings)
    control = trainer(tmp_path, **given, **settings)
    for run in (ours, theirs, control):
        run.train()
    assert bit_equal(weights(ours.model), weights(theirs.model))
    assert small.differences(weights(ours.model), weights(control.model)) > 1e-4


def test_the_corrective_update_has_the_rates(tmp_path):
    """By plain descent the first corrective update is each layer's rate times a gradient that does not depend on it."""
    moved = []
    for settings in ({}, {"layer_lr_decay": DECAY, "head_learning_rate": 2 * small.RATE}):
        run, around = small.descending(tmp_path, max_steps=1, **settings)
        run.train()
        before, after = around.before[0][0], around.middle[0][0]
        moved.append({name: after[name] - before[name] for name in before})
    factors = {
        "vit.embeddings": 1 / 8,
        "vit.layers.0": 1 / 4,
        "vit.layers.1": 1 / 2,
        "vit.layernorm": 1,
        "classifier": 2,
    }
    for name, plain in moved[0].items():
        factor = next(factor for start, factor in factors.items() if name.startswith(start))
        torch.testing.assert_close(moved[1][name], factor * plain, rtol=1e-9, atol=1e-15)
    assert moved[0]["vit.embeddings.patch_embeddings.projection.weight"].abs().max() > 1e-6


def test_at_the_defaults_the_optimizer_is_that_of_trainer(tmp_path):
    run = trainer(tmp_path)
    ours, theirs = run.create_optimizer(), super(IPGTrainer, trainer(tmp_path)).create_optimizer()
    assert [len(group["params"]) for group in ours.param_groups] == [len(g["params"]) for g in theirs.param_groups]
    assert len(ours.param_groups) == 2 and "lr" in ours.param_groups[0]


def test_schedulers_scale_the_rate_of_each_group(tmp_path):
    run = trainer(tmp_path, max_steps=4, warmup_steps=2, **BY_LAYER)
    run.train()
    rates = {group["initial_lr"]: group["lr"] for group in run.optimizer.param_groups}
    assert {*rates} == {RATE, RATE / 2, RATE / 4, RATE / 8} and {*rates.values()} == {0.0}
    assert [entry["learning_rate"] for entry in logged(run)] == [0.0, RATE / 2, RATE, RATE / 2]


def test_resume_equals_a_run_without_a_stop(tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "head_learning_rate": HEAD, **BY_LAYER}
    whole, resumed = (trainer(tmp_path, **settings) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert bit_equal(weights(whole.model), weights(resumed.model))
    states = [optimizer_state(run.model, run.optimizer) for run in (whole, resumed)]
    assert bit_equal(*states)
    assert logged(whole)[-1]["learning_rate"] == logged(resumed)[-1]["learning_rate"]


def test_a_second_training_goes_on_with_the_optimizer(tmp_path):
    run = trainer(tmp_path, **BY_LAYER)
    run.train()
    run.train()
    assert len({group["initial_lr"] for group in run.optimizer.param_groups}) == 4


def test_a_compiled_model_has_the_same_rates(tmp_path):
    run = IPGTrainer(small.vit(), config(tmp_path, **BY_LAYER, head_learning_rate=HEAD), train_dataset=rows(8))
    plain = rates_of(run)
    run.optimizer = None
    optimizer = run.create_optimizer(torch.compile(run.model))
    names = {parameter: name for name, parameter in run.model.named_parameters()}
    assert {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]} == plain


# ---- What cannot be combined ----


class OwnOptimizer(IPGTrainer):
    """Makes the optimizer without super."""

    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1)
        return self.optimizer


class ThenSuper(OwnOptimizer):
    """Calls super after it made the optimizer."""

    def create_optimizer(self, model=None):
        super().create_optimizer(model)
        return IPGTrainer.create_optimizer(self, model)


OPTIONS = pytest.mark.parametrize("options", [{"layer_lr_decay": 0.5}, {"head_learning_rate": 1.0}], ids=str)


@OPTIONS
@pytest.mark.parametrize("has_pairs", [True, False], ids=["pairs", "plain"])
def test_an_override_that_passes_over_the_rates_is_refused(tmp_path, options, has_pairs):
    for kind in (OwnOptimizer, ThenSuper):
        run = trainer(tmp_path, kind=kind, pair_dataset=pairs(10) if has_pairs else {}, **options)
        with pytest.raises(ValueError, match=f"{kind.__name__} overrides create_optimizer without super"):
            run.train()
        assert run.state.global_step == 0


@OPTIONS
def test_an_optimizer_that_is_given_is_refused(tmp_path, options):
    model = small.vit()
    with pytest.raises(ValueError, match=r"optimizers= gives it a SGD"):
        trainer(tmp_path, model=model, optimizers=(torch.optim.SGD(model.parameters(), 0.1), None), **options)


def with_class(folder, optimizer_class, rate):
    chosen = {"optimizer_cls_and_kwargs": (optimizer_class, {"lr": rate})}
    return IPGTrainer(small.vit(), config(folder, **BY_LAYER), train_dataset=rows(8), **chosen)


class GroupsOfItsOwn(torch.optim.SGD):
    """Keeps its parameters outside its groups, as layerwise optimizers do."""

    def __init__(self, groups, lr):
        super().__init__([nn.Parameter(torch.zeros(1))], lr)


def test_an_optimizer_with_groups_of_its_own_is_refused(tmp_path):
    run = with_class(tmp_path, GroupsOfItsOwn, 0.1)
    with pytest.raises(ValueError, match="GroupsOfItsOwn has groups of its own"):
        run.train()


def test_an_optimizer_class_of_ones_own_gets_the_groups(tmp_path):
    groups = with_class(tmp_path, torch.optim.NAdam, 0.4).create_optimizer().param_groups
    assert {group["lr"] for group in groups} == {0.4, 0.2, 0.1, 0.05}
