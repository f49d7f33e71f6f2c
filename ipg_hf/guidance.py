# SPDX-License-Identifier: Apache-2.0
"""The equations of invariance pair guidance, as pure tensor functions that need torch alone.

A classifier's last linear layer has weight W (C, D) and input z (B, D); its rationale R = W ⊙ z is what each feature
adds to each logit. Over pairs (a, b) that differ in a spurious attribute alone, `rationale_distance` is how far apart
the rationales of the two sides lie (the corrective update descends on it), `invariance_divergence` how far the outputs
do, `loss_gradient_scale` the factor on the task gradient while the outputs still differ. Source: arXiv 2502.18975; "our
reading" marks this library's choices where the paper leaves one. All of it runs outside autocast in float32, or float64
if any argument is, whatever dtypes come in; non-finite arguments give non-finite results. TF32, where
`torch.backends.cuda.matmul` allows it, makes the spectral norm's singular vectors coarser.
"""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.linalg import eigh, vector_norm

Reduction = Literal["mean", "pair"]
Norm = Literal["spectral", "frobenius"]
Distance = Literal["rationale", "divergence"]
LossScaling = Literal["adaptive", "fixed"]
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]

_EIGH_MAX_SIDE = 128  # smaller side of W up to which a whole eigendecomposition is as fast as the Krylov iteration
_KRYLOV_STEPS = 160  # more than random weights need; what has not converged by then is decomposed whole


def rationale(weight: Tensor, z: Tensor) -> Tensor:
    """Rationale matrices R = W ⊙ z, (B, C, D), of weight (C, D) and features z (B, D) (arXiv 2502.18975).

    `rationale(weight, z).sum(-1) + bias` equals the logits. Raises ValueError if the shapes do not fit.
    """
    _check_features(weight, z)
    with torch.autocast(weight.device.type, enabled=False):
        weight, z = _upcast(weight, z)
        return weight * z.unsqueeze(1)


def rationale_distance(
    weight: Tensor, z_a: Tensor, z_b: Tensor, *, reduction: Reduction = "mean", norm: Norm = "spectral"
) -> Tensor:
    """Distance between the rationales of the two sides of B pairs, differentiable in all three tensors.

    Args:
        weight: weight W of the last linear layer, (C, D), any floating dtype.
        z_a: input of that layer on the a sides, (B, D).
        z_b: the same on the b sides, (B, D).
        reduction: "mean" compares the mean rationales, ‖W·diag(mean(z_a) - mean(z_b))‖ (arXiv 2502.18975), and so is
            blind to differences that cancel over the pairs. "pair" is the mean over pairs of ‖W·diag(z_a,i - z_b,i)‖
            (our reading: an option), and so is blind to which member stands on which side.
        norm: "spectral" is the largest singular value (our reading of ‖·‖₂), "frobenius" the root of the summed squares
            (our reading: an option).

    Returns: Scalar ≥ 0, float32 or float64. At 0 the gradient is exactly 0, at a tied top value one subgradient.
    Raises: ValueError if the shapes do not fit or nothing is in them, or `reduction` or `norm` is unknown.
    """
    _check_name("reduction", reduction, Reduction)
    _check_name("norm", norm, Norm)
    _check_features(weight, z_a, z_b)
    with torch.autocast(weight.device.type, enabled=False):
        weight, z_a, z_b = _upcast(weight, z_a, z_b)
        delta = z_a - z_b if reduction == "pair" else (z_a - z_b).mean(0, keepdim=True)
        if norm == "spectral":
            return _spectral_norms(weight, delta).mean()
        # vector_norm squares as it is: in float32 an entry of 1e-25 would vanish.
        norms = vector_norm(_widen(delta) * vector_norm(_widen(weight), dim=0), dim=-1)
        return norms.mean().to(weight.dtype)


def invariance_divergence(
    logits_a: Tensor, logits_b: Tensor, *, problem_type: ProblemType = "single_label_classification"
) -> Tensor:
    """How far the outputs on the two sides of B pairs lie apart, as a mean over the pairs.

    Args:
        logits_a: outputs on the a sides, (B, C), any floating dtype.
        logits_b: outputs on the b sides, (B, C).
        problem_type: as in `PretrainedConfig`. "single_label_classification": ½(KL(p_a‖p_b) + KL(p_b‖p_a)) of the
            softmax probabilities (KL as in arXiv 2502.18975, the symmetric half our reading).
            "multi_label_classification": the same of the labels' Bernoulli distributions, summed over labels (our
            reading). "regression": the mean squared difference of the outputs (our reading).

    Returns: Scalar ≥ 0, float32 or float64. Exactly 0 for identical outputs, inf if one side alone has a logit of -inf.
    Raises: ValueError if the shapes do not fit or nothing is in them, or `problem_type` is unknown.
    """
    _check_name("problem_type", problem_type, ProblemType)
    if logits_a.ndim != 2 or logits_a.shape != logits_b.shape or not logits_a.numel():
        raise ValueError(f"expected two non-empty (B, C), got {tuple(logits_a.shape)} and {tuple(logits_b.shape)}")
    with torch.autocast(logits_a.device.type, enabled=False):
        a, b = _upcast(logits_a, logits_b)
        if problem_type == "single_label_classification":
            a, b = a.log_softmax(-1), b.log_softmax(-1)
        gap = torch.where(a == b, 0.0, a - b).abs()  # a class both sides rule out, -inf twice, is no difference
        if problem_type == "regression":
            return gap.square().mean()
        # (p_a - p_b)(x_a - x_b), with p_a - p_b written as a product: it cannot cancel, overflow or turn negative.
        high, low = torch.maximum(a, b), torch.minimum(a, b)
        p = high.exp() if problem_type == "single_label_classification" else high.sigmoid() * (-low).sigmoid()
        return (p * -torch.expm1(-gap) * gap).sum(-1).mean() / 2


def root_divergence(divergence: Tensor, of_all: Tensor | None = None) -> Tensor:
    """√c, a distance between the outputs on the two sides (ours), in place of that between their rationales.

    c falls with the square of what the outputs differ by, and its gradient with that; the gradient of √c keeps its
    length, as that of a norm does, and pairs count by how far their outputs are apart.

    Args:
        divergence: c of some pairs, a scalar ≥ 0, attached to the graph.
        of_all: c of all pairs of which these are an equal part; by default these are all.

    Returns: √(c of all), whose gradient is the part's in it: averaged over the parts it is that of the whole. At 0 the
        gradient is exactly 0.
    """
    whole = (divergence if of_all is None else of_all).detach()
    root = whole.sqrt()
    return root + torch.where(root > 0, 0.5 / root, 0.0) * (divergence - divergence.detach())


def loss_gradient_scale(
    distance_grad_norm: Tensor,
    loss_grad_norm: Tensor,
    divergence: Tensor,
    *,
    alpha: float,
    threshold: float,
    scaling: LossScaling = "adaptive",
    maximum: float = torch.inf,
) -> Tensor:
    """Factor on the task gradient: alpha·‖g_d‖/‖g_L‖ where divergence > threshold, else 1 (arXiv 2502.18975).

    g_d is the gradient of the rationale distance and g_L that of the task loss, each over all trainable parameters; all
    three tensors are scalars, alpha and threshold ≥ 0. Returns a scalar ≥ 0, float32 or float64, without gradient and
    without waiting for the device. It is 1 where ‖g_L‖ is 0 (or too small to have an inverse), as there is nothing to
    scale, and where the divergence is NaN. Non-finite norms give a non-finite factor where they are used. With
    `scaling="fixed"` (ours: an ablation) the factor is alpha itself where it is alpha·‖g_d‖/‖g_L‖ otherwise. Neither
    is above `maximum` (ours: at 1 the task gradient is only ever scaled down).

    Raises: ValueError if `scaling` is unknown.
    """
    _check_name("scaling", scaling, LossScaling)
    with torch.no_grad():
        g_d, g_l, divergence = _upcast(distance_grad_norm, loss_grad_norm, divergence)
        scaled = (divergence > threshold) & ~(g_l < torch.finfo(g_l.dtype).tiny)
        factor = alpha * g_d / g_l if scaling == "adaptive" else torch.full_like(g_l, alpha)
        return torch.where(scaled, factor.clamp(max=maximum), 1.0)


def _spectral_norms(weight: Tensor, delta: Tensor) -> Tensor:
    """Largest singular value of M_i = W·diag(δ_i) for each row of delta (P, D): (P,), with gradient uvᵀ of its pair."""
    with torch.no_grad():
        # In units of M's largest entry, each column of W in its own, no square under- or overflows.
        columns = weight.abs().amax(0)
        w, d = (weight / _or_one(columns)).nan_to_num_(0.0, 0.0, 0.0), delta * columns
        d = d / _or_one(d.abs().amax(-1, keepdim=True))
        top = _top_by_eigh if min(w.shape) <= _EIGH_MAX_SIDE else _top_by_krylov
        u = _unit(top(w, d.nan_to_num(0.0, 0.0, 0.0)))
        # One more half step: uᵀMv errs by the square of what u errs by. Non-finite arguments come back in with d.
        v = _unit((u @ w) * d)
    # With u and v constant this is linear in W and in δ, and no (P, C, D) tensor is kept for backward. The product is
    # in float64, as 1,000 equal float32 terms can add up to an error of 1e-5.
    return ((_widen(u) @ _widen(weight)).to(v.dtype) * delta * v).sum(-1)


def _top_by_eigh(w: Tensor, d: Tensor) -> Tensor:
    """Top left singular vectors of W·diag(d_i), (P, C), of any length, from the Gram matrix of the smaller side."""
    if w.shape[0] <= w.shape[1]:
        return eigh((w * d.square().unsqueeze(1)) @ w.mT).eigenvectors[..., -1]
    v = eigh((w.mT @ w) * d.unsqueeze(1) * d.unsqueeze(2)).eigenvectors[..., -1]
    return (v * d) @ w.mT


def _top_by_krylov(w: Tensor, d: Tensor) -> Tensor:
    """The same by Lanczos on MMᵀ for all rows of d at once, with no (P, C, D) and no (P, C, C) tensor."""
    tolerance = 2 * torch.finfo(w.dtype).eps
    start = torch.randn(len(w), generator=torch.Generator().manual_seed(0), dtype=w.dtype)  # so that runs repeat
    q = _unit(start.to(w.device)).expand(len(d), -1)
    basis = w.new_zeros(len(d), _KRYLOV_STEPS, len(w))
    tridiagonal = w.new_zeros(len(d), _KRYLOV_STEPS + 1, _KRYLOV_STEPS + 1)
    for k in range(_KRYLOV_STEPS):
        basis[:, k] = q
        known = basis[:, : k + 1]
        rest = ((q @ w) * d.square()) @ w.mT
        tridiagonal[:, k, k] = (q * rest).sum(-1)
        for _ in range(2):  # after a single pass the float32 basis of a clustered spectrum repeats itself
            rest = rest - ((known @ rest.unsqueeze(-1)).mT @ known).squeeze(1)
        length = vector_norm(rest, dim=-1)
        # Rounding noise is no new direction: such a row is exhausted and goes on as zeros.
        length = length * (length > tolerance * tridiagonal.amax((1, 2)))
        tridiagonal[:, k + 1, k] = length  # eigh reads the lower triangle
        q = rest * torch.where(length > 0, 1 / length, 0.0).unsqueeze(-1)
        if (k + 1) % 8 == 0:
            values, vectors = eigh(tridiagonal[:, : k + 1, : k + 1])
            # The residual bounds how far the value is from an eigenvalue, ties and clusters included.
            converged = length * vectors[:, -1, -1].abs() <= tolerance * values[:, -1]
            if converged.all():
                break
    u = (vectors[:, :, -1].unsqueeze(1) @ known).squeeze(1)
    if not converged.all():
        u[~converged] = _top_by_eigh(w, d[~converged])
    return u


def _unit(x: Tensor) -> Tensor:
    return x / _or_one(x.square().sum(-1, keepdim=True).sqrt())  # `sum` rounds less than vector_norm: it cascades


def _or_one(x: Tensor) -> Tensor:
    return torch.where(x == 0, 1.0, x)


def _upcast(*tensors: Tensor) -> list[Tensor]:
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return [t.to(dtype) for t in tensors]


def _widen(x: Tensor) -> Tensor:
    return x if x.device.type == "mps" else x.double()  # MPS has no float64


def _check_name(argument: str, value: str, names: object) -> None:
    if value not in get_args(names):
        raise ValueError(f"unknown {argument} {value!r}, choose from {', '.join(map(repr, get_args(names)))}")


def _check_features(weight: Tensor, *features: Tensor) -> None:
    rows = features[0].shape[:1]
    fit = weight.ndim == 2 and all(z.ndim == 2 and z.shape == rows + weight.shape[1:] for z in features)
    if not (fit and weight.numel() and features[0].numel()):
        shapes = ", ".join(str(tuple(t.shape)) for t in (weight, *features))
        raise ValueError(f"expected weight (C, D) and features (B, D) for each side, not empty, got {shapes}")
