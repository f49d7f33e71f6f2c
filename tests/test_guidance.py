# SPDX-License-Identifier: Apache-2.0
"""The equations: numbers worked by hand, properties, accuracy against float64 decompositions, numerics."""

import itertools
import math

import pytest
import torch
from torch.linalg import matrix_norm, svdvals

from ipg_hf import guidance
from ipg_hf.guidance import (
    invariance_divergence,
    loss_gradient_scale,
    rationale,
    rationale_distance,
    rationale_divergence,
    root_divergence,
)

REDUCTIONS = ("mean", "pair")
NORMS = ("spectral", "frobenius")
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def one_pair(delta):
    """z_a, z_b of a single pair that differ by delta (D), exactly."""
    return delta.unsqueeze(0), torch.zeros_like(delta).unsqueeze(0)


def orthonormal(rows, columns, seed):
    return torch.linalg.qr(randn(rows, columns, seed=seed, dtype=torch.float64))[0]


def with_singular_values(classes, features, values):
    """A float32 matrix with the given singular values, up to rounding."""
    left, right = orthonormal(classes, len(values), 1), orthonormal(features, len(values), 2)
    return ((left * values) @ right.mT).float()


# --- rationale


def test_rationale_by_hand():
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, -1.0]])
    z = torch.tensor([[5.0, 6.0], [7.0, 8.0]])
    expected = [[[5.0, 12.0], [15.0, 24.0], [0.0, -6.0]], [[7.0, 16.0], [21.0, 32.0], [0.0, -8.0]]]
    assert rationale(weight, z).tolist() == expected


def test_rationale_sums_to_the_logits():
    head = torch.nn.Linear(17, 5, dtype=torch.float64)
    z = randn(4, 17, dtype=torch.float64)
    torch.testing.assert_close(rationale(head.weight, z).sum(-1) + head.bias, head(z))


# --- rationale distance: numbers and properties

# W·diag(3, 4) = [[3, 4], [3, -4]]; times its transpose [[25, -7], [-7, 25]], with eigenvalues 32 and 18: the singular
# values are sqrt(32) = 4·sqrt(2) and 3·sqrt(2), the Frobenius norm is sqrt(50).
# W·diag(6, 0) = [[6, 0], [6, 0]] has the one singular value 6·sqrt(2), W·diag(0, 8) the one 8·sqrt(2); the mean of
# (6, 0) and (0, 8) is (3, 4).
HAND_WEIGHT = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
HAND_A = torch.tensor([[7.0, 2.0], [1.0, 5.0]])
HAND_B = torch.tensor([[1.0, 2.0], [1.0, -3.0]])


@pytest.mark.parametrize(
    ("reduction", "norm", "expected"),
    [
        ("mean", "spectral", 4 * math.sqrt(2)),
        ("mean", "frobenius", math.sqrt(50)),
        ("pair", "spectral", 7 * math.sqrt(2)),
        ("pair", "frobenius", 7 * math.sqrt(2)),
    ],
)
def test_distance_by_hand(reduction, norm, expected):
    distance = rationale_distance(HAND_WEIGHT, HAND_A, HAND_B, reduction=reduction, norm=norm)
    assert distance.shape == ()
    assert distance.item() == pytest.approx(expected, rel=1e-6)


def test_defaults_are_mean_and_spectral():
    named = rationale_distance(HAND_WEIGHT, HAND_A, HAND_B, reduction="mean", norm="spectral")
    assert torch.equal(rationale_distance(HAND_WEIGHT, HAND_A, HAND_B), named)


def test_spectral_gradient_by_hand():
    # W = diag(3, 1), δ = (2, 2): M = diag(6, 2), u = v = (1, 0). dM = u vᵀ, so dW = u (δ∘v)ᵀ and dδ = (Wᵀu)∘v.
    weight = torch.diag(torch.tensor([3.0, 1.0])).requires_grad_()
    z_a = torch.tensor([[2.5, 3.0]], requires_grad=True)
    z_b = torch.tensor([[0.5, 1.0]], requires_grad=True)
    rationale_distance(weight, z_a, z_b).backward()
    assert weight.grad.tolist() == [[2.0, 0.0], [0.0, 0.0]]
    assert z_a.grad.tolist() == [[3.0, 0.0]]
    assert z_b.grad.tolist() == [[-3.0, 0.0]]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_distance_is_symmetric_and_homogeneous(reduction, norm):
    weight, z_a, z_b = randn(5, 11), randn(6, 11, seed=1), randn(6, 11, seed=2)
    distance = rationale_distance(weight, z_a, z_b, reduction=reduction, norm=norm)
    assert distance > 0
    torch.testing.assert_close(rationale_distance(weight, z_b, z_a, reduction=reduction, norm=norm), distance)
    torch.testing.assert_close(rationale_distance(-3 * weight, z_a, z_b, reduction=reduction, norm=norm), 3 * distance)
    scaled = rationale_distance(weight, -0.5 * z_a, -0.5 * z_b, reduction=reduction, norm=norm)
    torch.testing.assert_close(scaled, 0.5 * distance)


def test_the_mean_depends_on_the_orientation_and_pair_does_not():
    weight, z_a, z_b = randn(3, 8), randn(2, 8, seed=1), randn(2, 8, seed=2)
    # The second pair is the first with its sides swapped. The differences cancel in `mean` and add up in `pair`.
    swapped_a, swapped_b = torch.stack([z_a[0], z_b[0]]), torch.stack([z_b[0], z_a[0]])
    assert rationale_distance(weight, swapped_a, swapped_b, reduction="mean") == 0
    one = rationale_distance(weight, z_a[:1], z_b[:1])
    torch.testing.assert_close(rationale_distance(weight, swapped_a, swapped_b, reduction="pair"), one)


def test_the_mean_does_not_depend_on_the_pairing_and_pair_does():
    weight, z_a, z_b = randn(3, 8), randn(4, 8, seed=1), randn(4, 8, seed=2)
    mean, pair = (rationale_distance(weight, z_a, z_b, reduction=r) for r in REDUCTIONS)
    torch.testing.assert_close(rationale_distance(weight, z_a, z_b.roll(1, 0), reduction="mean"), mean)
    assert (rationale_distance(weight, z_a, z_b.roll(1, 0), reduction="pair") - pair).abs() > 1e-2


@pytest.mark.parametrize("norm", NORMS)
def test_pair_is_the_mean_over_single_pairs(norm):
    weight, z_a, z_b = randn(150, 140), randn(5, 140, seed=1), randn(5, 140, seed=2)
    singles = [rationale_distance(weight, z_a[i : i + 1], z_b[i : i + 1], norm=norm) for i in range(5)]
    whole = rationale_distance(weight, z_a, z_b, reduction="pair", norm=norm)
    torch.testing.assert_close(whole, torch.stack(singles).mean())


@pytest.mark.parametrize("shape", [(3, 8), (8, 3), (1, 4), (150, 140)])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_identical_sides_give_exactly_zero_and_zero_gradients(reduction, norm, shape):
    tensors = [randn(*shape), randn(4, shape[1], seed=1), randn(4, shape[1], seed=1)]
    tensors = [t.requires_grad_() for t in tensors]
    distance = rationale_distance(*tensors, reduction=reduction, norm=norm)
    assert distance == 0
    for gradient in torch.autograd.grad(distance, tensors):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("norm", NORMS)
def test_zero_weight_gives_zero_and_finite_gradients(norm):
    tensors = [torch.zeros(3, 5).requires_grad_(), randn(4, 5).requires_grad_(), randn(4, 5, seed=1).requires_grad_()]
    distance = rationale_distance(*tensors, reduction="pair", norm=norm)
    assert distance == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(distance, tensors))


def test_one_zero_pair_among_others_adds_nothing():
    for shape in ((3, 8), (150, 140)):
        weight, delta = randn(*shape), randn(2, shape[1], seed=1)
        delta[0] = 0
        delta.requires_grad_()
        distance = rationale_distance(weight, delta, torch.zeros_like(delta), reduction="pair")
        torch.testing.assert_close(distance, matrix_norm(weight * delta[1], ord=2) / 2)
        (gradient,) = torch.autograd.grad(distance, delta)
        assert torch.equal(gradient[0], torch.zeros(shape[1]))
        assert gradient[1].abs().sum() > 0


# --- spectral norm: accuracy


def relative_error(weight, delta):
    reference = svdvals(weight.double() * delta.double())[0]
    return abs(rationale_distance(weight, *one_pair(delta)).double() / reference - 1).item()


@pytest.mark.parametrize("classes", [1, 2, 7, 10, 100, 1000])
def test_spectral_value_against_float64_svd(classes):
    for features in (1, 3, 64, 768, 2048):
        assert relative_error(randn(classes, features), randn(features, seed=1)) < 1e-6, features


SPECTRA = {
    "tied pair": lambda n: torch.cat([torch.ones(2), torch.linspace(0.9, 0, n - 2)]).double(),
    "all tied": lambda n: torch.ones(n).double(),
    "close pair": lambda n: torch.cat([torch.tensor([1, 1 - 1e-6]), torch.linspace(0.5, 0, n - 2)]).double(),
    "cluster 1e-7": lambda n: 1 - 1e-7 * torch.arange(n).double(),
    "cluster 1e-5": lambda n: 1 - 1e-5 * torch.arange(n).double(),
    "one above a flat rest": lambda n: torch.cat([torch.ones(1), (1 - 1e-4) * torch.ones(n - 1)]).double(),
    "close pair above a tail": lambda n: torch.cat(
        [torch.tensor([1, 1 - 1e-6, 0.5]).double(), 3e-3 * torch.linspace(1, 0.1, n - 3).double()]
    ),
    "linear": lambda n: torch.linspace(1, 0, n).double(),
    "rank 1": lambda n: torch.ones(1).double(),
    "rank 3": lambda n: torch.tensor([1, 1, 0.3]).double(),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_spectral_value_of_hard_spectra(spectrum):
    for shape in ((7, 64), (64, 7), (150, 300), (300, 150)):
        weight = with_singular_values(*shape, SPECTRA[spectrum](min(shape)))
        # float32 sums of 300 products, which processors order differently: 16 units in the last place
        assert relative_error(weight, torch.ones(shape[1])) < 2e-6, shape


def test_rows_that_converge_early_keep_their_value_while_others_iterate():
    # With orthonormal rows and columns in W, the singular values of W·diag(δ) are δ, and the largest of each row is 1.
    weight = orthonormal(300, 300, 1).float()
    spectra = [spectrum(300) for spectrum in SPECTRA.values()]
    delta = torch.stack([torch.nn.functional.pad(values, (0, 300 - len(values))) for values in spectra]).float()
    leaf = delta.clone().requires_grad_()
    distance = rationale_distance(weight, leaf, torch.zeros_like(delta), reduction="pair")
    assert distance.item() == pytest.approx(1, rel=1e-6)
    # By homogeneity the gradient of each row gives back its value.
    values = (torch.autograd.grad(distance, leaf)[0] * delta).sum(-1) * len(delta)
    torch.testing.assert_close(values, torch.ones(len(delta)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(2, 2048), (7, 3), (1000, 64), (150, 2048), (1000, 150)])
def test_spectral_value_of_equal_entries(shape):
    # Rank 1, and the worst case of a float32 sum: every rounding error has the same sign.
    assert relative_error(torch.full(shape, 0.37), torch.ones(shape[1])) < 1e-6


@pytest.mark.parametrize("shape", [(5, 8), (150, 160)])
def test_spectral_value_of_the_identity_and_of_diagonals(shape):
    assert relative_error(torch.eye(*shape), torch.ones(shape[1])) < 1e-6
    diagonal = torch.linspace(0, 1, shape[1])
    assert relative_error(torch.eye(*shape), diagonal) < 1e-6


def test_the_smaller_side_is_decomposed(monkeypatch):
    sizes = []
    whole = guidance.eigh
    monkeypatch.setattr(guidance, "eigh", lambda gram: (sizes.append(gram.shape), whole(gram))[1])
    for shape in ((40, 6), (6, 40)):
        rationale_distance(randn(*shape), randn(3, shape[1], seed=1), randn(3, shape[1], seed=2), reduction="pair")
    assert sizes == [(3, 6, 6), (3, 6, 6)]


def test_large_problems_converge_without_a_whole_decomposition(monkeypatch):
    weight, delta = randn(200, 300), randn(300, seed=1)
    monkeypatch.setattr(guidance, "_top_by_eigh", None)
    assert relative_error(weight, delta) < 1e-6


def test_rows_that_do_not_converge_fall_back_to_a_whole_decomposition(monkeypatch):
    weight, delta = randn(200, 300), randn(3, 300, seed=1)
    delta[1] = 0
    delta[1, 5] = 2  # rank 1: converges at once
    calls = []
    whole = guidance._top_by_eigh

    def spy(w, d):
        calls.append(len(d))
        return whole(w, d)

    monkeypatch.setattr(guidance, "_KRYLOV_STEPS", 8)
    monkeypatch.setattr(guidance, "_top_by_eigh", spy)
    distance = rationale_distance(weight, delta, torch.zeros_like(delta), reduction="pair")
    assert calls == [2]
    reference = svdvals(weight.double() * delta.double().unsqueeze(1))[:, 0].mean()
    assert distance.item() == pytest.approx(reference.item(), rel=1e-6)


@pytest.mark.parametrize("shape", [(3, 8), (150, 140)])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_tiny_and_huge_differences_keep_their_accuracy(scale, norm, shape):
    weight, delta = randn(*shape), randn(2, shape[1], seed=1)
    leaves = [weight.clone().requires_grad_(), delta.clone().requires_grad_()]
    distance = rationale_distance(*leaves, torch.zeros_like(delta), reduction="pair", norm=norm)
    by_weight, by_delta = torch.autograd.grad(distance, leaves)
    leaves = [weight.clone().requires_grad_(), (delta * scale).requires_grad_()]
    scaled = rationale_distance(*leaves, torch.zeros_like(delta), reduction="pair", norm=norm)
    scaled_by_weight, scaled_by_delta = torch.autograd.grad(scaled, leaves)
    torch.testing.assert_close(scaled.double() / scale, distance.double(), rtol=1e-6, atol=0)
    tolerance = 1e-4 * by_weight.abs().max().item()
    torch.testing.assert_close(scaled_by_weight.double() / scale, by_weight.double(), rtol=1e-4, atol=tolerance)
    torch.testing.assert_close(scaled_by_delta, by_delta, rtol=1e-4, atol=1e-4 * by_delta.abs().max().item())


def test_scales_that_cancel_between_weight_and_features():
    # One column of W is huge where δ is tiny: M itself is harmless.
    weight, delta = randn(4, 6), randn(6, seed=1)
    expected = rationale_distance(weight, *one_pair(delta))
    scale = torch.tensor([1e25, 1.0, 1e-25, 1.0, 1e12, 1e-12])
    scaled = rationale_distance(weight * scale, *one_pair(delta / scale))
    torch.testing.assert_close(scaled, expected, rtol=1e-5, atol=0)


# --- spectral norm: gradients


@pytest.mark.parametrize("shape", [(1, 6), (2, 9), (7, 5), (12, 30), (150, 140)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_against_matrix_norm(dtype, reduction, shape):
    values = [randn(*shape), randn(3, shape[1], seed=1), randn(3, shape[1], seed=2)]
    reference = [v.double().requires_grad_() for v in values]
    weight, z_a, z_b = reference
    if reduction == "mean":
        expected = matrix_norm(weight * (z_a.mean(0) - z_b.mean(0)), ord=2)
    else:
        expected = matrix_norm(rationale(weight, z_a) - rationale(weight, z_b), ord=2).mean()
    ours = [v.to(dtype).requires_grad_() for v in values]
    distance = rationale_distance(*ours, reduction=reduction)
    assert distance.dtype == dtype
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    pairs = zip(torch.autograd.grad(distance, ours), torch.autograd.grad(expected, reference), strict=True)
    for got, want in pairs:
        assert got.dtype == dtype
        assert (got.double() - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(2, 3), (4, 2)])
def test_gradcheck(shape, reduction, norm):
    tensors = [randn(*shape, seed=3), randn(3, shape[1], seed=4), randn(3, shape[1], seed=5)]
    tensors = [t.double().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: rationale_distance(*t, reduction=reduction, norm=norm), tensors)


@pytest.mark.parametrize("shape", [(2, 2), (4, 9), (150, 160)])
def test_ties_give_a_subgradient(shape):
    # The distance is convex in δ and homogeneous, so a subgradient g has ⟨g, δ⟩ = d(δ) and d(δ') ≥ ⟨g, δ'⟩ for all δ'.
    weight = with_singular_values(*shape, torch.ones(min(shape)).double())
    delta = torch.ones(shape[1]).requires_grad_()
    distance = rationale_distance(weight, *one_pair(delta))
    (gradient,) = torch.autograd.grad(distance, delta)
    assert gradient.isfinite().all()
    assert (gradient @ delta).item() == pytest.approx(distance.item(), rel=1e-5)
    for seed in range(20):
        other = delta.detach() + 10.0 ** (-seed % 4) * randn(shape[1], seed=seed)
        assert matrix_norm(weight * other, ord=2) >= gradient @ other - 1e-5


@pytest.mark.parametrize("classes", [6, 140])
def test_backward_keeps_no_tensor_of_pairs_by_classes_by_features(classes):
    weight, z_a, z_b = (t.requires_grad_() for t in (randn(classes, 150), randn(40, 150), randn(40, 150, seed=1)))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
        rationale_distance(weight, z_a, z_b, reduction="pair")
    assert 0 < max(sizes) <= max(weight.numel(), z_a.numel())


def test_the_distance_repeats_and_does_not_change_the_random_state():
    weight, delta = randn(150, 140), randn(140, seed=1)
    state = torch.get_rng_state()
    first = rationale_distance(weight, *one_pair(delta))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(rationale_distance(weight, *one_pair(delta)), first)


# --- divergence of the rationales

LOG_3 = math.log(3)
SINGLE, MULTI, REGRESSION = PROBLEM_TYPES


@pytest.mark.parametrize(
    ("weight", "delta", "logits", "problem_type", "expected"),
    [
        # p = (3/4, 1/4), rows that differ by u = (2, 2): ½·p(1 - p)·Σ (u_k δ_k)² = ½·3/16·(4 + 16)
        ([[2, 1], [0, -1]], (1, 2), ((LOG_3, 0), (LOG_3, 0)), SINGLE, 1.875),
        # the sides' p are (3/4, 1/4) and (1/4, 3/4), their mean is (1/2, 1/2): ½·1/4·20
        ([[2, 1], [0, -1]], (1, 2), ((LOG_3, 0), (0, LOG_3)), SINGLE, 2.5),
        # p = (1/2, 1/4, 1/4). Column (4, 0, 0): 16/2 - 2² = 4, times 3²/2. Column (0, 2, -2): 4/4 + 4/4 = 2, times 1/2.
        ([[4, 0], [0, 2], [0, -2]], (3, 1), ((math.log(2), 0, 0),) * 2, SINGLE, 19),
        # p(1 - p) = 3/16 of the first label and 1/4 of the second: ½·(3/16·2² + 1/4·4²)
        ([[2, 0], [0, 4]], (1, 1), ((LOG_3, 0),) * 2, MULTI, 2.375),
        # mean over outputs of w²: 5 and 10, times 1 and 4
        ([[1, 2], [3, 4]], (1, 2), ((7, 8), (9, 0)), REGRESSION, 45),
    ],
)
def test_rationale_divergence_by_hand(weight, delta, logits, problem_type, expected):
    z_a, z_b = one_pair(torch.tensor(delta).float())
    same = randn(1, 2)  # a second pair whose sides agree halves the mean
    for more in (0, 1):
        a, b = (torch.tensor([side] * (1 + more)).float() for side in logits)
        sides = torch.cat([z_a, same[:more]]), torch.cat([z_b, same[:more]])
        got = rationale_divergence(torch.tensor(weight).float(), *sides, a, b, problem_type=problem_type)
        assert got.shape == ()
        assert got.item() == pytest.approx(expected / (1 + more), rel=1e-6)


def classified(classes=5, features=11, pairs=6, spread=1.0, dtype=torch.float64):
    """W, the features of both sides, and their logits."""
    weight, z_a, z_b = randn(classes, features), spread * randn(pairs, features, seed=1), randn(pairs, features, seed=2)
    weight, z_a, z_b = (t.to(dtype) for t in (weight, z_a, spread * z_b))
    return weight, z_a, z_b, z_a @ weight.T, z_b @ weight.T


@pytest.mark.parametrize("n_classes", [2, 5])
@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
def test_what_the_rationale_divergence_does_not_depend_on(problem_type, n_classes):
    weight, z_a, z_b, a, b = classified(n_classes)
    value = rationale_divergence(weight, z_a, z_b, a, b, problem_type=problem_type)
    assert torch.equal(rationale_divergence(weight, z_b, z_a, b, a, problem_type=problem_type), value)
    sizes = (11, n_classes, 6)
    features, classes, pairs = (torch.randperm(n, generator=torch.Generator().manual_seed(n)) for n in sizes)
    permuted = weight[classes][:, features], z_a[:, features], z_b[:, features], a[:, classes], b[:, classes]
    torch.testing.assert_close(rationale_divergence(*permuted, problem_type=problem_type), value)
    unordered = (t[pairs] for t in (z_a, z_b, a, b))
    torch.testing.assert_close(rationale_divergence(weight, *unordered, problem_type=problem_type), value)
    scale = randn(11, seed=5).exp().double()  # of each feature, with the inverse in its column of W
    scaled = rationale_divergence(weight / scale, scale * z_a, scale * z_b, a, b, problem_type=problem_type)
    torch.testing.assert_close(scaled, value)
    other = rationale_divergence(weight, z_a, z_b.roll(1, 0), a, b.roll(1, 0), problem_type=problem_type)
    assert abs(other - value) > 1e-2 * value  # which sides are a pair matters
    # the same vector added to all rows of W: it changes the outputs of all classes alike, which is no other prediction
    added = weight + randn(11, seed=3)
    shifted = rationale_divergence(added, z_a, z_b, z_a @ added.T, z_b @ added.T, problem_type=problem_type)
    if problem_type == SINGLE:
        torch.testing.assert_close(shifted, value)
    else:
        assert abs(shifted - value) > 1e-2 * value


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
def test_of_one_feature_both_divergences_agree_to_second_order(problem_type):
    weight, z = randn(5, 1, dtype=torch.float64), randn(8, 1, seed=1, dtype=torch.float64)
    gaps = []
    for step in (1e-1, 1e-2):
        a, b = (z + step) @ weight.T, z @ weight.T
        of_outputs = invariance_divergence(a, b, problem_type=problem_type)
        of_rationales = rationale_divergence(weight, z + step, z, a, b, problem_type=problem_type)
        gaps.append(abs(of_rationales / of_outputs - 1).item())
    assert gaps[0] < 1e-2 and gaps[1] < max(1.1e-2 * gaps[0], 1e-12)  # a hundredth, at a tenth of the difference


def test_features_that_cancel_have_a_rationale_divergence_alone():
    """δ = (1, -1) under equal weights: the outputs are equal, each feature's rationales are not."""
    weight = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    z_a, z_b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    a, b = z_a @ weight.T - torch.tensor([1.0, 0.0]), z_b @ weight.T - torch.tensor([1.0, 0.0])
    assert invariance_divergence(a, b) == 0
    assert rationale_divergence(weight, z_a, z_b, a, b).item() == pytest.approx(0.25)  # ½·1/4·(1 + 1)


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
def test_identical_features_give_exactly_zero_and_zero_gradients_by_rationales(problem_type):
    weight, z_a, _, a, b = classified(dtype=torch.float32)
    leaves = [weight.requires_grad_(), z_a.requires_grad_(), z_a.detach().clone().requires_grad_()]
    value = rationale_divergence(*leaves, a, b, problem_type=problem_type)
    assert value == 0
    for of, floor in ((value, None), (root_divergence(value, floor=1e-3), 1e-3), (root_divergence(value), 0)):
        for gradient in torch.autograd.grad(of, leaves, retain_graph=True):
            assert torch.equal(gradient, torch.zeros_like(gradient)), floor


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
def test_the_gradient_of_the_rationale_divergence(problem_type, classes):
    """The probabilities are constants: the outputs have no gradient."""
    weight, z_a, z_b, a, b = (t.requires_grad_() for t in map(torch.clone, classified(classes, 4, 2)))
    value = rationale_divergence(weight, z_a, z_b, a, b, problem_type=problem_type)
    assert torch.autograd.grad(value, [a, b], retain_graph=True, allow_unused=True) == (None, None)
    assert torch.autograd.gradcheck(
        lambda *t: rationale_divergence(*t, a, b, problem_type=problem_type), (weight, z_a, z_b)
    )


@pytest.mark.parametrize("spread", [1e-2, 1.0, 10.0])
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_the_rationale_divergence_keeps_float32_accuracy(classes, spread):
    """Against the variance of its definition in float64; at a spread of 10 most predictions are certain."""
    weight, z_a, z_b, a, b = (t / 8 if n == 0 else t for n, t in enumerate(classified(classes, 64, 8, spread)))
    a, b = a / 8, b / 8
    p = (a.softmax(-1) + b.softmax(-1)).unsqueeze(-1) / 2
    gap = rationale(weight, z_a) - rationale(weight, z_b)
    wanted = (p * (gap - (p * gap).sum(1, keepdim=True)).square()).sum((1, 2)).mean() / 2
    torch.testing.assert_close(rationale_divergence(weight, z_a, z_b, a, b), wanted, rtol=1e-10, atol=0)
    got = rationale_divergence(*(t.float() for t in (weight, z_a, z_b, a, b)))
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=0)


def test_rounding_makes_no_rationale_divergence_negative():
    """Of certain predictions the variance is a difference of two numbers that agree in nearly all digits."""
    weight, z_a, z_b, a, b = classified(dtype=torch.float32, spread=100.0)
    pairs = zip(*(t.unsqueeze(1) for t in (z_a, z_b, a, a + 1e-3 * b)), strict=True)
    values = [rationale_divergence(weight, *pair) for pair in pairs]
    assert min(values) >= 0 and min(values) < 1e-3


@pytest.mark.parametrize("classes", [6, 140])
def test_the_rationale_divergence_keeps_no_tensor_of_pairs_by_classes_by_features(classes):
    weight, z_a, z_b, a, b = (t.requires_grad_() for t in map(torch.clone, classified(classes, 150, 40)))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
        rationale_divergence(weight, z_a, z_b, a, b)
    assert 0 < max(sizes) <= max(weight.numel(), z_a.numel())


# --- numerics: dtypes, autocast, non-finite values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_is_computed_in_float32(dtype, autocast):
    weight, z_a, z_b = (t.to(dtype) for t in (randn(3, 40), randn(4, 40, seed=1), randn(4, 40, seed=2)))
    leaf, logits = weight.clone().requires_grad_(), (z_a[:, :3].clone(), z_b[:, :3].clone())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = [rationale(leaf, z_a)]
        got += [rationale_distance(leaf, z_a, z_b, reduction=r, norm=n) for r in REDUCTIONS for n in NORMS]
        got += [invariance_divergence(z_a, z_b, problem_type=p) for p in PROBLEM_TYPES]
        got += [rationale_divergence(leaf, z_a, z_b, *logits, problem_type=p) for p in PROBLEM_TYPES]
        got += [loss_gradient_scale(z_a[0, 0].abs(), z_b[0, 0].abs(), got[-1], alpha=0.3, threshold=0.0)]
        got[1].backward()
    assert leaf.grad.dtype == dtype
    weight, z_a, z_b = weight.float(), z_a.float(), z_b.float()
    want = [rationale(weight, z_a)]
    want += [rationale_distance(weight, z_a, z_b, reduction=r, norm=n) for r in REDUCTIONS for n in NORMS]
    want += [invariance_divergence(z_a, z_b, problem_type=p) for p in PROBLEM_TYPES]
    logits = z_a[:, :3], z_b[:, :3]
    want += [rationale_divergence(weight, z_a, z_b, *logits, problem_type=p) for p in PROBLEM_TYPES]
    want += [loss_gradient_scale(z_a[0, 0].abs(), z_b[0, 0].abs(), want[-1], alpha=0.3, threshold=0.0)]
    for ours, reference in zip(got, want, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, reference)


def test_one_float64_argument_makes_it_float64():
    weight, z_a, z_b = randn(3, 5), randn(2, 5, seed=1), randn(2, 5, seed=2)
    assert rationale(weight.double(), z_a).dtype == torch.float64
    for norm in NORMS:
        assert rationale_distance(weight, z_a, z_b.double(), norm=norm).dtype == torch.float64
        assert rationale_distance(weight, z_a, z_b, norm=norm).dtype == torch.float32
    assert invariance_divergence(z_a, z_b.double()).dtype == torch.float64
    logits = z_a[:, :3], z_b[:, :3].double()
    assert rationale_divergence(weight, z_a, z_b, *logits).dtype == torch.float64
    one = torch.ones((), dtype=torch.float64)
    assert loss_gradient_scale(one, one.float(), one.float(), alpha=1.0, threshold=0.0).dtype == torch.float64


@pytest.mark.parametrize("shape", [(3, 8), (8, 3), (150, 140)])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_non_finite_arguments_give_non_finite_results(reduction, norm, shape):
    for where, bad in itertools.product(("weight", "z_a", "z_b"), (math.nan, math.inf, -math.inf)):
        tensors = {"weight": randn(*shape), "z_a": randn(4, shape[1], seed=1), "z_b": randn(4, shape[1], seed=2)}
        tensors[where][1, 2] = bad
        leaves = [t.requires_grad_() for t in tensors.values()]
        distance = rationale_distance(*leaves, reduction=reduction, norm=norm)
        assert not distance.isfinite(), (where, bad)
        assert not any(g.isfinite().all() for g in torch.autograd.grad(distance, leaves)), (where, bad)


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
def test_non_finite_arguments_give_a_non_finite_rationale_divergence(problem_type):
    for where, bad in itertools.product(range(3), (math.nan, math.inf, -math.inf)):
        tensors = list(classified(3, 8, 4))
        tensors[where][1, 2] = bad
        leaves = [t.requires_grad_() for t in tensors[:3]]
        value = rationale_divergence(*leaves, *tensors[3:], problem_type=problem_type)
        assert not value.isfinite(), (where, bad)
        assert not all(g.isfinite().all() for g in torch.autograd.grad(value, leaves)), (where, bad)
    weight, z_a, z_b, a, b = classified(3, 8, 4)
    a[1, 2] = math.nan
    assert rationale_divergence(weight, z_a, z_b, a, b, problem_type=problem_type).isnan() == (
        problem_type != REGRESSION  # which reads no outputs
    )


def test_a_class_that_is_ruled_out_adds_no_rationale_divergence():
    weight, z_a, z_b, a, b = classified()
    outputs = [torch.cat([side, torch.full((6, 1), -math.inf)], 1) for side in (a, b)]
    wider = torch.cat([weight, randn(1, 11, seed=4)])
    torch.testing.assert_close(
        rationale_divergence(wider, z_a, z_b, *outputs), rationale_divergence(weight, z_a, z_b, a, b)
    )


# --- errors


@pytest.mark.parametrize(
    ("shapes", "named"),
    [
        (((3, 5), (2, 4), (2, 4)), "(3, 5), (2, 4), (2, 4)"),
        (((3, 5), (2, 5), (3, 5)), "(3, 5), (2, 5), (3, 5)"),
        (((3, 5), (2, 5), (1, 5)), "(3, 5), (2, 5), (1, 5)"),
        (((3, 5), (5,), (5,)), "(3, 5), (5,), (5,)"),
        (((3, 5), (), ()), "(3, 5), (), ()"),
        (((5,), (2, 5), (2, 5)), "(5,), (2, 5), (2, 5)"),
        (((3, 5), (0, 5), (0, 5)), "(3, 5), (0, 5), (0, 5)"),
        (((0, 5), (2, 5), (2, 5)), "(0, 5), (2, 5), (2, 5)"),
    ],
)
def test_distance_names_shapes_that_do_not_fit(shapes, named):
    with pytest.raises(ValueError) as error:
        rationale_distance(*map(torch.zeros, shapes))
    assert named in str(error.value)


def test_rationale_names_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\(3, 5\), \(2, 4\)"):
        rationale(torch.zeros(3, 5), torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("shapes", "named"),
    [
        (((3, 5), (2, 4), (2, 4), (2, 3), (2, 3)), "(3, 5), (2, 4), (2, 4)"),
        (((3, 5), (2, 5), (2, 5), (2, 4), (2, 4)), "(B, C) = (2, 3), got (2, 4) and (2, 4)"),
        (((3, 5), (2, 5), (2, 5), (2, 3), (1, 3)), "(B, C) = (2, 3), got (2, 3) and (1, 3)"),
    ],
)
def test_rationale_divergence_names_shapes_that_do_not_fit(shapes, named):
    with pytest.raises(ValueError) as error:
        rationale_divergence(*map(torch.zeros, shapes))
    assert named in str(error.value)


def test_unknown_names_are_errors_that_list_the_known_ones():
    z = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"reduction 'sum', .*'mean', 'pair'"):
        rationale_distance(z, z, z, reduction="sum")
    with pytest.raises(ValueError, match=r"norm 'nuclear', .*'spectral', 'frobenius'"):
        rationale_distance(z, z, z, norm="nuclear")
    names = ", ".join(f"'{name}'" for name in PROBLEM_TYPES)
    with pytest.raises(ValueError, match=rf"problem_type 'ranking', .*{names}"):
        invariance_divergence(z, z, problem_type="ranking")
    with pytest.raises(ValueError, match=rf"problem_type 'ranking', .*{names}"):
        rationale_divergence(z, z, z, z, z, problem_type="ranking")
