# SPDX-License-Identifier: Apache-2.0
"""The corrective gradient of some layers: that of all, but for the others, below which no backward runs."""

import math

import pytest
import small
import torch
from small import Around, bit_equal, logged, trainer
from torch import nn

from ipg_hf import IPGConfig
from ipg_hf.gradients import only_gradients_of, parameters_matching

# model -> its last block and head as patterns, the start of their parameters' names, a layer below
CASES = {
    "vit": (small.vit, ["vit.layers.1", "classifier"], ("vit.layers.1.", "classifier."), "vit.layers.0"),
    "resnet": (
        small.resnet,
        [".*stages.1", "classifier"],
        ("resnet.encoder.stages.1.", "classifier."),
        "resnet.encoder.stages.0",
    ),
    "timm": (
        small.timm_resnet,
        ["timm_model.(layer4|fc)"],
        ("timm_model.layer4.", "timm_model.fc."),
        "timm_model.layer3",
    ),
}
RATE = 0.05


def run(folder, name, layers=None, steps=1, callbacks=(), **settings):
    around, model = Around(), CASES[name][0]().double()
    training = trainer(
        folder,
        model,
        small.rows(24, dtype=torch.float64),
        small.pairs(10, dtype=torch.float64),
        callbacks=[around, *callbacks],
        corrective_layers=layers,
        **{
            "optim": "sgd",
            "learning_rate": RATE,
            "max_grad_norm": 0.0,
            "freeze_norm": True,
            "invariance_threshold": 0.0,
        }
        | settings,
        max_steps=steps,
    )
    training.train()
    return training, around


def moved(around, step=0):
    before, middle = around.before[step][0], around.middle[step][0]
    return {name: middle[name] - before[name] for name in before if not torch.equal(before[name], middle[name])}


@pytest.mark.parametrize("settings", [{}, {"pair_chunk_size": 1}, {"rationale_reduction": "pair"}])
@pytest.mark.parametrize("name", CASES)
def test_the_others_are_left_alone_and_these_move_as_ever(tmp_path, name, settings):
    _, layers, starts, _ = CASES[name]
    (every, all_around), (some, around) = (run(tmp_path, name, which, **settings) for which in (None, layers))
    whole, part = moved(all_around), moved(around)
    assert part.keys() == {key for key in whole if key.startswith(starts)} and part.keys() < whole.keys()
    assert small.differences(part, {key: whole[key] for key in part}) < 1e-15
    # the norm of step 4 is that over these parameters: by plain SGD the move is the rate times the gradient
    norm = math.sqrt(sum(value.square().sum().item() for value in part.values())) / RATE
    figures = logged(some)[0]
    assert figures["ipg/corrective_grad_norm"] == pytest.approx(norm, rel=1e-9)
    assert logged(every)[0]["ipg/corrective_grad_norm"] > 1.01 * norm
    assert figures["ipg/violated"] == 1.0
    assert figures["ipg/loss_scale"] == pytest.approx(norm / figures["ipg/loss_grad_norm"], rel=1e-9)
    trained = {key for key, value in around.after[0][0].items() if not torch.equal(value, around.middle[0][0][key])}
    assert part.keys() < trained  # the task gradient moves others too


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_the_others_momentum_is_left_alone(tmp_path, optim):
    settings = {"optim": optim, "optim_args": "momentum=0.9"} if optim == "sgd" else {"optim": optim}
    _, around = run(tmp_path, "vit", ["classifier"], steps=2, **settings)
    (_, before), (_, middle) = around.before[1], around.middle[1]
    changed = {key.split("/")[0] for key in before if not torch.equal(before[key], middle[key])}
    assert changed == {"classifier.weight"}


def test_all_layers_by_name_are_all(tmp_path):
    ends = [run(tmp_path, "vit", layers, steps=3)[1].after[-1][0] for layers in (None, ["vit", "classifier"])]
    assert bit_equal(*ends)
    assert not bit_equal(ends[0], run(tmp_path, "vit", ["classifier"], steps=3)[1].after[-1][0])


class Backwards:
    """Which layers' outputs hang on a graph in the pair forward, and which have a backward through them."""

    def __init__(self, model, *paths):
        self.graph, self.backward = {}, {path: [] for path in paths}
        for path in paths:
            model.get_submodule(path).register_forward_hook(lambda m, _, out, path=path: self.look(path, m, out))

    def look(self, path, module, output):
        output = output[0] if isinstance(output, tuple) else output
        key = "task" if module.training else "pairs"
        if torch.is_grad_enabled():
            self.graph[path, key] = output.requires_grad
            if output.requires_grad:
                output.register_hook(lambda _: self.backward[path].append(key))


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("name", CASES)
def test_no_backward_runs_below(tmp_path, name, chunk):
    build, layers, _, below = CASES[name]
    model = build()
    seen = Backwards(model, below, *(layers[:1] if name == "vit" else []))
    training = trainer(tmp_path, model, corrective_layers=layers, max_steps=1, pair_chunk_size=chunk, check_pairs=False)
    training.train()
    assert "task" in seen.backward[below] and "pairs" not in seen.backward[below]
    assert seen.graph[below, "pairs"] is False and seen.graph[below, "task"] is True
    if name == "vit":  # the control: the layer that is corrected
        assert seen.graph[layers[0], "pairs"] is True and "pairs" in seen.backward[layers[0]]


def test_what_was_frozen_stays_so_and_the_rest_is_put_back(tmp_path):
    model = small.vit()
    model.vit.embeddings.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    trainer(tmp_path, model, corrective_layers=["vit.layers.1"]).train()
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    with pytest.raises(RuntimeError, match="in between"), only_gradients_of(model, {"classifier.weight"}):
        assert [name for name, p in model.named_parameters() if p.requires_grad] == ["classifier.weight"]
        raise RuntimeError("in between")
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_a_penalty_moves_the_same_layers(tmp_path):
    """In one update with the task's gradient: with the penalty's factor the difference grows in these layers alone."""
    layers, ends = ["classifier"], []
    for weight in (1.0, 100.0):
        settings = {"pair_objective": "kl", "pair_penalty_weight": weight}
        ends.append(run(tmp_path, "vit", layers, **settings)[1].after[0][0])
    changed = {name for name in ends[0] if (ends[0][name] - ends[1][name]).abs().max() > 1e-9}
    assert changed == {"classifier.weight", "classifier.bias"}


# ---- Patterns ----


def test_a_pattern_is_a_name_or_the_start_of_one():
    model = nn.ModuleDict({f"layer{i}": nn.Linear(2, 2) for i in (1, 10, 11)})
    for pattern, wanted in (
        ("layer1", {"layer1.weight", "layer1.bias"}),
        ("layer1[01]", {"layer10.weight", "layer10.bias", "layer11.weight", "layer11.bias"}),
        ("layer10|layer1", {"layer10.weight", "layer10.bias", "layer1.weight", "layer1.bias"}),
        (r".*\.bias", {"layer1.bias", "layer10.bias", "layer11.bias"}),
        ("layer11.weight", {"layer11.weight"}),
    ):
        assert parameters_matching(model, [pattern]) == wanted
    assert parameters_matching(model, ["layer1.bias", "layer11.bias"]) == {"layer1.bias", "layer11.bias"}


def test_either_name_of_a_shared_parameter_will_do():
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in ("one", "other", "third")})
    model["other"].weight = model["one"].weight
    for name in ("one", "other"):
        with only_gradients_of(model, parameters_matching(model, [name])):
            assert model["one"].weight.requires_grad and not model["third"].weight.requires_grad
        assert model["third"].weight.requires_grad


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (["vit.layer.1"], ["'vit.layer.1'", "of no parameter of ViTForImageClassification", "'vit.layers.1."]),
        (["classifier", "classifer.weight"], ["'classifer.weight'", "'classifier.weight'"]),
        (["vit.layers.1.mlp.fc"], ["'vit.layers.1.mlp.fc'", "'vit.layers.1.mlp.fc1"]),
        (["vit.embeddings"], ["'vit.embeddings' chooses frozen parameters alone", "Unfreeze"]),
    ],
)
def test_patterns_that_choose_nothing(tmp_path, layers, words):
    model = small.vit()
    model.vit.embeddings.requires_grad_(False)
    with pytest.raises(ValueError) as error:
        trainer(tmp_path, model, corrective_layers=layers)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("chunk", [None, 1])
def test_layers_that_the_distance_does_not_depend_on(tmp_path, chunk):
    with pytest.raises(ValueError, match="widen corrective_layers"):
        trainer(tmp_path, corrective_layers=["classifier.bias"], pair_chunk_size=chunk).train()


@pytest.mark.parametrize("layers", [[], "classifier", ["("], [""], [3]])
def test_settings_that_are_no_patterns(tmp_path, layers):
    with pytest.raises(ValueError, match="is not valid: it must be None or a list of regular expressions"):
        IPGConfig(str(tmp_path), use_cpu=True, corrective_layers=layers)
