# SPDX-License-Identifier: Apache-2.0
"""All gradients of a model together: the mean over processes travels in few messages of a bounded size."""

import pytest
import torch
from torch import nn

from ipg_hf import gradients


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
def test_messages_are_of_one_dtype_and_no_larger_than_a_bucket_but_for_one_gradient(monkeypatch, limit, sizes):
    monkeypatch.setattr(gradients, "BUCKET_BYTES", limit)
    single, half = torch.float32, torch.bfloat16
    model = model_of([((2, 3), single), ((4,), single), ((5,), single), ((2, 2), half), ((2,), single)])
    before, accelerator = [parameter.grad.clone() for parameter in model], Recorded()
    gradients.average_gradients(model, accelerator)
    assert [len(message) for message in accelerator.messages] == sizes
    assert accelerator.messages[-2].dtype == half
    for parameter, gradient in zip(model, before, strict=True):
        assert torch.equal(parameter.grad, gradient / 2) and parameter.grad.dtype == gradient.dtype


def test_a_gradient_keeps_its_place_and_layout_and_none_stays_none():
    model = nn.ModuleList([nn.Conv2d(3, 2, 2), nn.Linear(2, 2)]).to(memory_format=torch.channels_last)
    weight = model[0].weight
    weight.grad = torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last)
    gradient, expected, strides = weight.grad, weight.grad / 2, weight.grad.stride()
    gradients.average_gradients(model, Recorded())
    assert weight.grad is gradient and gradient.stride() == strides and torch.equal(gradient, expected)
    assert model[1].weight.grad is None
