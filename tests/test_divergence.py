# SPDX-License-Identifier: Apache-2.0
"""The divergence of a pair and the scale of the task gradient: numbers worked by hand, properties, numerics."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, kl_divergence

from ipg_hf.guidance import invariance_divergence, loss_gradient_scale, root_divergence

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
def test_nan_logits_give_a_nan_divergence(problem_type):
    logits = randn(3, 4)
    logits[1, 2] = math.nan
    assert invariance_divergence(logits, logits, problem_type=problem_type).isnan()
    assert invariance_divergence(logits, randn(3, 4, seed=1), problem_type=problem_type).isnan()


# --- divergence


@pytest.mark.parametrize(
    ("problem_type", "expected"),
    [
        # p = (1/2, 1/2), q = (3/4, 1/4): ½[(-1/4)·log(2/3) + (1/4)·log 2] = log(3)/8. The second pair is equal.
        ("single_label_classification", math.log(3) / 8 / 2),
        # Label 1: ½(3/4 - 1/2)·log 3 = log(3)/8; label 2 has no difference.
        ("multi_label_classification", math.log(3) / 8 / 2),
        ("regression", math.log(3) ** 2 / 4),
    ],
)
def test_divergence_by_hand(problem_type, expected):
    logits_a = torch.tensor([[math.log(3), 0.0], [2.0, 5.0]])
    logits_b = torch.tensor([[0.0, 0.0], [2.0, 5.0]])
    got = invariance_divergence(logits_a, logits_b, problem_type=problem_type)
    assert got.shape == ()
    assert got.item() == pytest.approx(expected, rel=1e-6)


def test_multi_label_divergence_sums_over_labels():
    logits_a, logits_b = torch.tensor([[math.log(3), -math.log(3)]]), torch.zeros(1, 2)
    got = invariance_divergence(logits_a, logits_b, problem_type="multi_label_classification")
    assert got.item() == pytest.approx(math.log(3) / 4, rel=1e-6)


def explicit(distribution, a, b):
    p, q = distribution(logits=a), distribution(logits=b)
    return (kl_divergence(p, q) + kl_divergence(q, p)) / 2


@pytest.mark.parametrize("spread", [1e-3, 1.0, 10.0])
def test_divergence_against_torch_distributions(spread):
    a, b = (spread * randn(6, 5, seed=s, dtype=torch.float64) for s in (1, 2))
    a.requires_grad_()
    for problem_type, reference in (
        ("single_label_classification", explicit(Categorical, a, b).mean()),
        ("multi_label_classification", explicit(Bernoulli, a, b).sum(-1).mean()),
        ("regression", torch.nn.functional.mse_loss(a, b)),
    ):
        got = invariance_divergence(a, b, problem_type=problem_type)
        torch.testing.assert_close(got, reference, rtol=1e-9, atol=1e-15)
        gradients = [torch.autograd.grad(x, a, retain_graph=True)[0] for x in (got, reference)]
        torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
def test_divergence_is_symmetric_positive_and_zero_at_identity(problem_type):
    a, b = randn(50, 10, seed=1), randn(50, 10, seed=2).requires_grad_()
    assert torch.equal(
        invariance_divergence(a, b, problem_type=problem_type), invariance_divergence(b, a, problem_type=problem_type)
    )
    for step in (1e-7, 1e-5, 1.0):  # differences of a few float32 roundings must not make it negative
        assert invariance_divergence(a, a + step * b, problem_type=problem_type) >= 0
    same = invariance_divergence(b, b.detach(), problem_type=problem_type)
    assert same == 0
    assert torch.equal(torch.autograd.grad(same, b)[0], torch.zeros_like(b))


def test_small_divergences_keep_float32_accuracy():
    a = randn(20, 10, seed=1)
    b = a + 1e-3 * randn(20, 10, seed=2)
    got = invariance_divergence(a, b).double()
    torch.testing.assert_close(got, explicit(Categorical, a.double(), b.double()).mean(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES[:2])
def test_saturated_logits_stay_finite(problem_type):
    a = torch.tensor([[1e4, -1e4]], requires_grad=True)
    got = invariance_divergence(a, torch.tensor([[-1e4, 1e4]]), problem_type=problem_type)
    # Single label: p = (1, 0), q = (0, 1), and both log-probabilities differ by 2e4. Multi-label: both logits do.
    assert got.item() == pytest.approx(2e4)
    assert torch.autograd.grad(got, a)[0].isfinite().all()


def test_a_class_that_both_sides_rule_out_adds_nothing():
    a = torch.tensor([[0.0, 1.0, -math.inf]], requires_grad=True)
    b = torch.tensor([[1.0, 0.5, -math.inf]])
    got = invariance_divergence(a, b)
    torch.testing.assert_close(got, invariance_divergence(a[:, :2], b[:, :2]))
    gradient = torch.autograd.grad(got, a)[0]
    assert gradient.isfinite().all()
    assert gradient[0, 0] != 0
    multi = [invariance_divergence(a[:, c], b[:, c], problem_type=PROBLEM_TYPES[1]) for c in (slice(3), slice(2))]
    torch.testing.assert_close(*multi)


def test_a_class_that_one_side_rules_out_gives_an_infinite_divergence():
    a, b = torch.tensor([[0.0, -math.inf]]), torch.tensor([[0.0, 0.0]])
    for problem_type in PROBLEM_TYPES:
        assert invariance_divergence(a, b, problem_type=problem_type) == math.inf


# --- scale of the task gradient


@pytest.mark.parametrize(
    ("distance_norm", "loss_norm", "divergence", "expected"),
    [
        (6.0, 4.0, 0.02, 0.75),  # 0.5 · 6 / 4
        (6.0, 4.0, 0.005, 1.0),
        (6.0, 4.0, 0.01, 1.0),  # at the threshold: not above it
        (0.0, 4.0, 0.02, 0.0),
        (6.0, 0.0, 0.02, 1.0),
        (0.0, 0.0, 0.02, 1.0),
        (6.0, 1e-40, 0.02, 1.0),  # 6 / 1e-40 is beyond float32
        (math.nan, 4.0, 0.005, 1.0),
        (math.inf, 4.0, 0.02, math.inf),
        (6.0, 4.0, math.nan, 1.0),
        (6.0, 4.0, math.inf, 0.75),
    ],
)
def test_loss_gradient_scale(distance_norm, loss_norm, divergence, expected):
    norms = [torch.tensor(x, requires_grad=True) for x in (distance_norm, loss_norm)]
    scale = loss_gradient_scale(*norms, torch.tensor(divergence), alpha=0.5, threshold=float(torch.tensor(0.01)))
    assert scale.shape == ()
    assert scale.dtype == torch.float32
    assert not scale.requires_grad
    assert scale.item() == expected


@pytest.mark.parametrize(
    ("loss_norm", "divergence", "expected"),
    [
        (4.0, 0.02, 0.5),  # alpha, where the ratio of norms would make it .75
        (400.0, 0.02, 0.5),
        (4.0, 0.01, 1.0),  # at the threshold
        (4.0, math.nan, 1.0),
        (0.0, 0.02, 1.0),
    ],
)
def test_a_fixed_scale_is_alpha(loss_norm, divergence, expected):
    for norm in (6.0, 0.0, math.inf):
        values = map(torch.tensor, (norm, loss_norm, divergence))
        scale = loss_gradient_scale(*values, alpha=0.5, threshold=float(torch.tensor(0.01)), scaling="fixed")
        assert scale.item() == expected and scale.dtype == torch.float32 and scale.shape == ()
    double = torch.ones((), dtype=torch.float64)
    assert loss_gradient_scale(double, double, double, alpha=0.1, threshold=0, scaling="fixed").item() == 0.1
    with pytest.raises(ValueError, match="unknown scaling 'none'"):
        loss_gradient_scale(double, double, double, alpha=0.1, threshold=0, scaling="none")


@pytest.mark.parametrize("norms", [(math.nan, 4.0), (6.0, math.nan)])
def test_loss_gradient_scale_keeps_nan(norms):
    assert loss_gradient_scale(*map(torch.tensor, norms), torch.tensor(0.02), alpha=0.5, threshold=0.01).isnan()


def test_loss_gradient_scale_has_a_maximum():
    def scale(loss_norm, divergence=0.02):
        norms = torch.tensor(3.0), torch.tensor(loss_norm)
        return loss_gradient_scale(*norms, torch.tensor(divergence), alpha=0.5, threshold=0.01, maximum=0.8).item()

    assert scale(6.0) == 0.25
    assert scale(1e-3) == pytest.approx(0.8)  # 1,500 without it
    assert scale(1e-3, divergence=0.0) == 1  # the maximum limits a scaled gradient only


def test_loss_gradient_scale_does_not_wait_for_the_device():
    # A meta tensor has no value: reading one raises.
    norm = torch.ones((), device="meta")
    assert loss_gradient_scale(norm, norm, norm, alpha=0.5, threshold=0.01).device.type == "meta"


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4)), ((2, 3), (1, 3)), ((3,), (3,)), ((0, 3), (0, 3))])
def test_divergence_names_shapes_that_do_not_fit(shapes):
    with pytest.raises(ValueError) as error:
        invariance_divergence(*map(torch.zeros, shapes))
    assert f"{shapes[0]} and {shapes[1]}" in str(error.value)


# --- root of the divergence


def test_root_by_hand():
    """The outputs differ by 3 and -4: c = 25 / 2, √c = 5 / √2, and the gradient is the difference over 2·√c."""
    a, b = torch.tensor([[3.0], [0.0]], requires_grad=True), torch.tensor([[0.0], [4.0]])
    root = root_divergence(invariance_divergence(a, b, problem_type="regression"))
    assert root.item() == pytest.approx(5 / math.sqrt(2))
    root.backward()
    assert a.grad.flatten().tolist() == pytest.approx([3 / (5 * math.sqrt(2)), -4 / (5 * math.sqrt(2))])


def test_root_with_a_floor_by_hand():
    """c = 0.08 and f = 0.01: √0.09 - √0.01 = 0.2, with the slope 1 / (2·√0.09) = 5 / 3."""
    c = torch.tensor(0.08, dtype=torch.float64, requires_grad=True)
    root = root_divergence(c, floor=0.01)
    assert root.item() == pytest.approx(0.2)
    assert torch.autograd.grad(root, c)[0].item() == pytest.approx(5 / 3)


def test_a_floor_does_not_cancel_tiny_divergences():
    """√(c + f) - √f is c / (2·√f) for c far below f; float32 would make 0 of the difference of the two roots."""
    c = torch.tensor(1e-12, requires_grad=True)
    root = root_divergence(c, floor=1e-3)
    assert root.item() == pytest.approx(1e-12 / (2 * math.sqrt(1e-3)), rel=1e-6)
    assert torch.autograd.grad(root, c)[0].item() == pytest.approx(1 / (2 * math.sqrt(1e-3)), rel=1e-6)
    assert (c + 1e-3).sqrt() - torch.tensor(1e-3).sqrt() == 0


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_the_gradient_of_the_root_is_the_mean_over_its_parts(floor):
    logits = [torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (0, 1)]
    whole = [part.clone().requires_grad_() for part in logits]
    root_divergence(invariance_divergence(*whole), floor=floor).backward()
    of_all = invariance_divergence(*logits)
    parts = [part.clone().requires_grad_() for part in logits]
    for rows in (slice(0, 3), slice(3, 6)):
        root = root_divergence(invariance_divergence(parts[0][rows], parts[1][rows]), of_all, floor=floor)
        assert root.item() == pytest.approx((of_all + floor).sqrt().item() - floor**0.5)
        (root / 2).backward()
    for ours, theirs in zip(parts, whole, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    # negative control: the mean of the roots of the parts differs
    own = [invariance_divergence(logits[0][rows], logits[1][rows]).sqrt() for rows in (slice(0, 3), slice(3, 6))]
    assert abs(sum(own) / 2 - of_all.sqrt()) > 1e-4


@pytest.mark.parametrize("floor", [0.0, 1e-3])
def test_the_root_of_equal_outputs_has_a_zero_gradient(floor):
    a = torch.tensor([[1.0, -2.0]], requires_grad=True)
    root = root_divergence(invariance_divergence(a, a.detach().clone()), floor=floor)
    root.backward()
    assert root.item() == 0 and a.grad.tolist() == [[0.0, 0.0]]


def test_the_gradient_of_the_root_keeps_its_length():
    """The gradient of the divergence falls with the difference, that of its root does so with a floor only."""
    lengths = {}
    for scale in (1.0, 1e-3):
        a = torch.tensor([[scale, -scale]], requires_grad=True)
        c = invariance_divergence(a, torch.zeros(1, 2))
        (plain,) = torch.autograd.grad(c, a, retain_graph=True)
        (root,) = torch.autograd.grad(root_divergence(c), a, retain_graph=True)
        (floored,) = torch.autograd.grad(root_divergence(c, floor=1e-3), a)
        lengths[scale] = plain.norm(), root.norm(), floored.norm()
    assert lengths[1e-3][0] < 2e-3 * lengths[1.0][0] and lengths[1e-3][1] > 0.5 * lengths[1.0][1]
    assert lengths[1.0][2] > 0.9 * lengths[1.0][1] and lengths[1e-3][2] < 0.1 * lengths[1e-3][1]
