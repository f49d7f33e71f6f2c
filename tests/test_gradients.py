# SPDX-License-Identifier: Apache-2.0
"""The gradients of a model: their mean over processes in few messages, and which parameters get one."""

import pytest
import torch
from torch import nn

from ipg_hf import gradients
from ipg_hf.gradients import only_gradients_of, parameters_matching


class Recorded:
    """Stands in for an accelerator of two processes, of which the other has gradients 0."""

    def __init__(self):
        self.messages = []

    def reduce(self, tensor, reduction):
        assert reduction == "mean"
        self.messages.append(tensor)
        return tensor / 2


def model_of(shapes):
    model = nn.ParameterList([nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape, dtype in shapes])
    for number, parameter in enumerate(model):
        parameter.grad = torch.arange(parameter.numel(), dtype=parameter.dtype).view_as(parameter) + number
    return model


@pytest.mark.parametrize(
    ("limit", "sizes"),
    [(1000, [15, 4, 2]), (40, [10, 5, 4, 2]), (0, [6, 4, 5, 4, 2])],  # of float32: 4 bytes each
)
def test_messages_have_one_dtype_and_at_most_the_size_of_a_bucket(monkeypatch, limit, sizes):
    monkeypatch.setattr(gradients, "BUCKET_BYTES", limit)
    single, half = torch.float32, torch.bfloat16
    model = model_of([((2, 3), single), ((4,), single), ((5,), single), ((2, 2), half), ((2,), single)])
    before, accelerator = [parameter.grad.clone() for parameter in model], Recorded()
    gradients.average_gradients(model, accelerator)
    assert [len(message) for message in accelerator.messages] == sizes
    assert accelerator.messages[-2].dtype == half
    for parameter, gradient in zip(model, before, strict=True):
        assert torch.equal(parameter.grad, gradient / 2) and parameter.grad.dtype == gradient.dtype


def test_an_averaged_gradient_keeps_its_place_and_layout_and_none_stays_none():
    model = nn.ModuleList([nn.Conv2d(3, 2, 2), nn.Linear(2, 2)]).to(memory_format=torch.channels_last)
    weight = model[0].weight
    weight.grad = torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last)
    gradient, expected, strides = weight.grad, weight.grad / 2, weight.grad.stride()
    gradients.average_gradients(model, Recorded())
    assert weight.grad is gradient and gradient.stride() == strides and torch.equal(gradient, expected)
    assert model[1].weight.grad is None


# ---- Which parameters ----


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


def test_either_name_of_a_shared_parameter_matches():
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in ("one", "other", "third")})
    model["other"].weight = model["one"].weight
    for name in ("one", "other"):
        with only_gradients_of(model, parameters_matching(model, [name])):
            assert model["one"].weight.requires_grad and not model["third"].weight.requires_grad
        assert model["third"].weight.requires_grad


def test_after_an_error_in_the_block_all_parameters_require_gradients_as_before():
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in ("one", "other", "frozen")})
    model["frozen"].requires_grad_(False)
    with pytest.raises(RuntimeError, match="in between"), only_gradients_of(model, {"one.weight"}):
        assert [name for name, p in model.named_parameters() if p.requires_grad] == ["one.weight"]
        raise RuntimeError("in between")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["one.weight", "other.weight"]
