# SPDX-License-Identifier: Apache-2.0
"""The corrective gradient of some layers: that of all, but for the others, below which no backward runs."""

import math

import pytest
import small
import torch
from small import bit_equal, descending, logged, trainer

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


def run(folder, name, layers=None, steps=1, **settings):
    pairs = small.pairs(10, dtype=torch.float64)
    settings = {"freeze_norm": True, "max_steps": steps, "corrective_layers": layers, **small.SCALED, **settings}
    training, around = descending(folder, pair_dataset=pairs, build=CASES[name][0], **settings)
    training.train()
    return training, around


def moved(around, step=0):
    before, middle = around.before[step][0], around.middle[step][0]
    return {name: middle[name] - before[name] for name in before if not torch.equal(before[name], middle[name])}


MEAN = {"invariance_distance": "rationale"}
PAIR = MEAN | {"rationale_reduction": "pair"}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vit", {}),
        ("vit", {"pair_chunk_size": 1}),
        ("vit", small.DIVERGENCE | {"pair_chunk_size": 1}),
        ("vit", MEAN),
        ("vit", PAIR | {"pair_chunk_size": 1}),
        ("resnet", {"pair_chunk_size": 1}),
        ("resnet", PAIR),
        ("timm", {}),
    ],
    ids=str,
)
def test_chosen_layers_move_as_if_all_did_and_the_others_stay(tmp_path, name, settings):
    _, layers, starts, _ = CASES[name]
    (every, all_around), (some, around) = (run(tmp_path, name, which, **settings) for which in (None, layers))
    whole, part = moved(all_around), moved(around)
    assert part.keys() == {key for key in whole if key.startswith(starts)} and part.keys() < whole.keys()
    assert small.differences(part, {key: whole[key] for key in part}) < 1e-15
    # the norm of step 4 is that over these parameters: by plain SGD the move is the rate times the gradient
    norm = math.sqrt(sum(value.square().sum().item() for value in part.values())) / small.RATE
    figures = logged(some)[0]
    assert figures["ipg/corrective_grad_norm"] == pytest.approx(norm, rel=1e-9)
    assert logged(every)[0]["ipg/corrective_grad_norm"] > 1.01 * norm
    assert figures["ipg/violated"] == 1.0
    assert figures["ipg/loss_scale"] == pytest.approx(0.1 * norm / figures["ipg/loss_grad_norm"], rel=1e-9)
    assert figures["ipg/loss_scale"] < 1
    trained = {key for key, value in around.after[0][0].items() if not torch.equal(value, around.middle[0][0][key])}
    assert part.keys() < trained  # the task gradient moves others too


@pytest.mark.parametrize(
    ("optim", "distance", "wanted"),
    [("sgd", {}, {"classifier.weight", "classifier.bias"}), ("adamw_torch", MEAN, {"classifier.weight"})],
)
def test_the_momentum_of_the_other_layers_is_left(tmp_path, optim, distance, wanted):
    """The paper's distance does not depend on the head's bias."""
    settings = {"optim": optim, "optim_args": "momentum=0.9" if optim == "sgd" else None, **distance}
    _, around = run(tmp_path, "vit", ["classifier"], steps=2, **settings)
    (_, before), (_, middle) = around.before[1], around.middle[1]
    assert {key.split("/")[0] for key in before if not torch.equal(before[key], middle[key])} == wanted


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


@pytest.mark.parametrize(("name", "chunk"), [("vit", None), ("vit", 1), ("resnet", None), ("timm", 1)])
def test_no_backward_runs_below_the_lowest_chosen_layer(tmp_path, name, chunk):
    build, layers, _, below = CASES[name]
    model = build()
    seen = Backwards(model, below, *(layers[:1] if name == "vit" else []))
    training = trainer(tmp_path, model, corrective_layers=layers, max_steps=1, pair_chunk_size=chunk, check_pairs=False)
    training.train()
    assert "task" in seen.backward[below] and "pairs" not in seen.backward[below]
    assert seen.graph[below, "pairs"] is False and seen.graph[below, "task"] is True
    if name == "vit":  # the control: the layer that is corrected
        assert seen.graph[layers[0], "pairs"] is True and "pairs" in seen.backward[layers[0]]


def test_frozen_parameters_stay_frozen_and_the_rest_requires_gradients_again(tmp_path):
    model = small.vit()
    model.vit.embeddings.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    trainer(tmp_path, model, corrective_layers=["vit.layers.1"]).train()
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (["vit.layer.1"], ["'vit.layer.1'", "of no parameter of ViTForImageClassification", "mean 'vit.layers.1'?"]),
        (["classifier", "classifer.weight"], ["'classifer.weight'", "mean 'classifier.weight'?"]),
        (["vit.layers.1.mlp.fc"], ["'vit.layers.1.mlp.fc'", "mean 'vit.layers.1.mlp.fc"]),
        (["vit.embeddings"], ["'vit.embeddings' matches frozen parameters only", "Unfreeze"]),
    ],
)
def test_patterns_that_match_nothing_trainable(tmp_path, layers, words):
    model = small.vit()
    model.vit.embeddings.requires_grad_(False)
    with pytest.raises(ValueError) as error:
        trainer(tmp_path, model, corrective_layers=layers)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("chunk", [None, 1])
def test_layers_that_the_distance_does_not_depend_on_are_refused(tmp_path, chunk):
    """The bias of the head, with the paper's distance."""
    with pytest.raises(ValueError, match="widen corrective_layers"):
        trainer(tmp_path, corrective_layers=["classifier.bias"], pair_chunk_size=chunk, **small.PAPER).train()
