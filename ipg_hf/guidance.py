# SPDX-License-Identifier: Apache-2.0
"""The equations of invariance pair guidance, as pure tensor functions. They need torch alone.

The last linear layer of a classifier has the weight W, shape (C, D), and the input z, shape (B, D). The rationale
R = W ⊙ z is what each feature adds to each logit. The two sides of a pair, a and b, differ in a spurious attribute
alone.

- `rationale_distance` measures how far the rationales of the two sides are apart.
- `invariance_divergence` measures how far the outputs of the two sides are apart.
- `rationale_divergence` measures the same, feature by feature: what the sides' rationales differ in may not cancel.
- `root_divergence` makes a distance of one of the divergences, or of their sum.
- `loss_gradient_scale` is the factor on the task gradient while the outputs still differ.

The corrective update descends on the root of the sum of both divergences, which is the default, on the root of the
first alone, or on the rationale distance of the paper.

Source: arXiv 2502.18975. "Our reading" marks a choice of this library where the paper leaves one; "ours" marks what the
paper does not have.

All functions compute outside autocast: in float64 if any argument is float64, else in float32. Non-finite arguments
give non-finite results. If `torch.backends.cuda.matmul` allows TF32, the singular vectors of the spectral norm are less
exact.
"""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.linalg import eigh, vector_norm

Reduction = Literal["mean", "pair"]
Norm = Literal["spectral", "frobenius"]
Distance = Literal["rationale_divergence", "divergence", "rationale"]
LossScaling = Literal["adaptive", "fixed"]
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]

ROOT_FLOOR = 1e-3  # of the default distance, in nats: chosen in a few trials without records, which had 1e-2 too
_EIGH_MAX_SIDE = 128  # up to this smaller side of W, a full eigendecomposition is as fast as the Krylov iteration
_KRYLOV_STEPS = 160  # more than random weights need; rows that have not converged by then get a full decomposition


def rationale(weight: Tensor, z: Tensor) -> Tensor:
    """Computes the rationale matrices R = W ⊙ z (arXiv 2502.18975).

    `rationale(weight, z).sum(-1) + bias` equals the logits.

    Args:
        weight: weight W of the last linear layer, (C, D), any floating dtype.
        z: input of that layer, (B, D).

    Returns: Shape (B, C, D), float32 or float64.
    Raises: ValueError if the shapes do not fit or a tensor is empty.
    """
    _check_features(weight, z)
    with torch.autocast(weight.device.type, enabled=False):
        weight, z = _upcast(weight, z)
        return weight * z.unsqueeze(1)


def rationale_distance(
    weight: Tensor, z_a: Tensor, z_b: Tensor, *, reduction: Reduction = "mean", norm: Norm = "spectral"
) -> Tensor:
    """Computes the rationale distance d between the two sides of B pairs, differentiable in all three tensors.

    Args:
        weight: weight W of the last linear layer, (C, D), any floating dtype.
        z_a: input of that layer on side a, (B, D).
        z_b: input of that layer on side b, (B, D).
        reduction: "mean" compares the mean rationales: ‖W·diag(mean(z_a) - mean(z_b))‖ (arXiv 2502.18975). It does not
            see differences that cancel over the pairs. "pair" is the mean over the pairs of ‖W·diag(z_a,i - z_b,i)‖
            (ours: an option). It does not see which image is on which side.
        norm: "spectral" is the largest singular value (our reading of ‖·‖₂). "frobenius" is the root of the summed
            squares (ours: an option).

    Returns: Scalar ≥ 0, float32 or float64. If it is 0, the gradient is exactly 0 (R1). If several singular values
        share the maximum, the gradient is one of the subgradients.
    Raises: ValueError if the shapes do not fit, a tensor is empty, or `reduction` or `norm` is unknown.
    """
    _check_name("reduction", reduction, Reduction)
    _check_name("norm", norm, Norm)
    _check_features(weight, z_a, z_b)
    with torch.autocast(weight.device.type, enabled=False):
        weight, z_a, z_b = _upcast(weight, z_a, z_b)
        delta = z_a - z_b if reduction == "pair" else (z_a - z_b).mean(0, keepdim=True)
        if norm == "spectral":
            return _spectral_norms(weight, delta).mean()
        # vector_norm squares the entries without rescaling them: in float32 an entry of 1e-25 would become 0.
        norms = vector_norm(_widen(delta) * vector_norm(_widen(weight), dim=0), dim=-1)
        return norms.mean().to(weight.dtype)


def invariance_divergence(
    logits_a: Tensor, logits_b: Tensor, *, problem_type: ProblemType = "single_label_classification"
) -> Tensor:
    """Computes the invariance divergence c between the outputs on the two sides, as a mean over B pairs.

    Args:
        logits_a: outputs on side a, (B, C), any floating dtype.
        logits_b: outputs on side b, (B, C).
        problem_type: the `problem_type` of the model's config. It selects the divergence of a pair (R12):
            - "single_label_classification": ½(KL(p_a‖p_b) + KL(p_b‖p_a)) of the softmax probabilities (KL as in
              arXiv 2502.18975; that it is symmetric is our reading).
            - "multi_label_classification": the symmetric KL of each label's Bernoulli distribution, summed over the
              labels (our reading).
            - "regression": the mean squared difference of the outputs (our reading).

    Returns: Scalar ≥ 0, float32 or float64. It is exactly 0 for identical outputs, and inf if a logit is -inf on one
        side alone.
    Raises: ValueError if the shapes do not fit, a tensor is empty, or `problem_type` is unknown.
    """
    _check_name("problem_type", problem_type, ProblemType)
    if logits_a.ndim != 2 or logits_a.shape != logits_b.shape or not logits_a.numel():
        raise ValueError(
            "the logits of both sides must have one shape (B, C) and must not be empty, got "
            f"{tuple(logits_a.shape)} and {tuple(logits_b.shape)}."
        )
    with torch.autocast(logits_a.device.type, enabled=False):
        a, b = _upcast(logits_a, logits_b)
        if problem_type == "single_label_classification":
            a, b = a.log_softmax(-1), b.log_softmax(-1)
        gap = torch.where(a == b, 0.0, a - b).abs()  # -inf on both sides: both rule the class out, no difference
        if problem_type == "regression":
            return gap.square().mean()
        # (p_a - p_b)(x_a - x_b). p_a - p_b is written as a product, which cannot cancel, overflow or become negative.
        high, low = torch.maximum(a, b), torch.minimum(a, b)
        p = high.exp() if problem_type == "single_label_classification" else high.sigmoid() * (-low).sigmoid()
        return (p * -torch.expm1(-gap) * gap).sum(-1).mean() / 2


def rationale_divergence(
    weight: Tensor,
    z_a: Tensor,
    z_b: Tensor,
    logits_a: Tensor,
    logits_b: Tensor,
    *,
    problem_type: ProblemType = "single_label_classification",
) -> Tensor:
    """Computes the divergence of the rationales, feature by feature, as a mean over B pairs (ours).

    The logits of the two sides differ by the sum over the features k of the rationales' differences, ΔR_k = w_k·δ_k
    with δ = z_a - z_b and w_k the column k of W. For a small difference the invariance divergence is ½ Var_p(Σ_k ΔR_k),
    a variance over the classes, whose probabilities are p. There the features can cancel. This function returns
    ½ Σ_k Var_p(ΔR_k) = ½ Σ_k δ_k² Var_p(w_k), where they cannot. The same vector added to all rows of W changes
    neither the outputs nor this value.

    Args:
        weight: weight W of the last linear layer, (C, D), any floating dtype.
        z_a: input of that layer on side a, (B, D).
        z_b: input of that layer on side b, (B, D).
        logits_a: outputs on side a, (B, C). They give p, the mean of the two sides, without gradient.
        logits_b: outputs on side b, (B, C).
        problem_type: as in [`invariance_divergence`]. With several labels, the variance is the sum of the labels'
            Bernoulli variances p(1 - p) w_k². In a regression, ½ Var_p(ΔR_k) is the mean of ΔR_k² over the outputs.

    Returns: Scalar ≥ 0, float32 or float64. It is exactly 0 for identical features.
    Raises: ValueError if the shapes do not fit, a tensor is empty, or `problem_type` is unknown.
    """
    _check_name("problem_type", problem_type, ProblemType)
    _check_features(weight, z_a, z_b)
    if logits_a.shape != (len(z_a), len(weight)) or logits_b.shape != logits_a.shape:
        raise ValueError(
            f"the logits of both sides must have the shape (B, C) = ({len(z_a)}, {len(weight)}), got "
            f"{tuple(logits_a.shape)} and {tuple(logits_b.shape)}."
        )
    with torch.autocast(weight.device.type, enabled=False):
        weight, z_a, z_b, *logits = _upcast(weight, z_a, z_b, logits_a.detach(), logits_b.detach())
        if problem_type == "regression":
            variance = 2 * weight.square().mean(0)
        elif problem_type == "multi_label_classification":
            p = sum(side.sigmoid() for side in logits) / 2
            variance = (p * (1 - p)) @ weight.square()
        else:
            p = sum(side.softmax(-1) for side in logits) / 2
            if len(weight) == 2:  # p_0·p_1 (w_0 - w_1)²: nothing cancels, and a third of the time
                return ((z_a - z_b).square() @ (weight[0] - weight[1]).square() * p.prod(-1)).mean() / 2
            weight = weight - weight.mean(0)  # changes no variance, and the two terms below cancel less
            variance = (p @ weight.square() - (p @ weight).square()).clamp(min=0)
        return ((z_a - z_b).square() * variance).sum(-1).mean() / 2


def root_divergence(divergence: Tensor, of_all: Tensor | None = None, *, floor: float = 0.0) -> Tensor:
    """Computes √(c + f) - √f, a distance of the two sides from a divergence c (ours).

    c falls with the square of the difference between the sides, so its gradient falls with the difference. The
    gradient of √c keeps its length, as the gradient of a norm does. With a floor f it does so while c is far above f,
    and falls with the difference below f (a pseudo-Huber loss). Without a floor, a network that has learned nothing is
    corrected as strongly as one that has learned the shortcut; a vision transformer from scratch may then stay at one
    constant output.

    Args:
        divergence: c of some of the pairs, a scalar ≥ 0 with its graph.
        of_all: c of all pairs, if `divergence` is c of one of several equal parts; by default `divergence` is c of all
            pairs.
        floor: f ≥ 0, in the unit of c.

    Returns: √(c + f) - √f of all pairs. Its gradient is the gradient through the given pairs: averaged over the parts,
        it is the gradient of the whole. If c is 0, the gradient is exactly 0.
    """
    whole = (divergence if of_all is None else of_all).detach()
    root = (whole + floor).sqrt()
    value = root if floor == 0 else whole / (root + floor**0.5)  # the difference of the roots, without cancellation
    return value + torch.where(root > 0, 0.5 / root, 0.0) * (divergence - divergence.detach())


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
    """Computes the factor on the task gradient: α·‖g_d‖/‖g_L‖ if c > t, else 1 (arXiv 2502.18975, step 4).

    g_d is the corrective gradient, g_L the gradient of the task loss. Their norms are over all trainable
    parameters together.

    Args:
        distance_grad_norm: ‖g_d‖, a scalar.
        loss_grad_norm: ‖g_L‖, a scalar.
        divergence: c, a scalar.
        alpha: α ≥ 0.
        threshold: t ≥ 0.
        scaling: "adaptive" is the paper's factor. "fixed" replaces α·‖g_d‖/‖g_L‖ with α (ours: an ablation).
        maximum: upper limit of the factor if c > t (ours). With 1 the task gradient is never scaled up.

    Returns: Scalar ≥ 0, float32 or float64, without gradient. The device is not waited for. The factor is also 1 if c
        is NaN, and if ‖g_L‖ is 0 or too small to have an inverse: there is nothing to scale. Non-finite norms give a
        non-finite factor if they are used.
    Raises: ValueError if `scaling` is unknown.
    """
    _check_name("scaling", scaling, LossScaling)
    with torch.no_grad():
        g_d, g_l, divergence = _upcast(distance_grad_norm, loss_grad_norm, divergence)
        scaled = (divergence > threshold) & ~(g_l < torch.finfo(g_l.dtype).tiny)
        factor = alpha * g_d / g_l if scaling == "adaptive" else torch.full_like(g_l, alpha)
        return torch.where(scaled, factor.clamp(max=maximum), 1.0)


def _spectral_norms(weight: Tensor, delta: Tensor) -> Tensor:
    """Largest singular value, (P,), of M_i = W·diag(δ_i) for each row of delta (P, D); its gradient in M_i is uvᵀ."""
    with torch.no_grad():
        # Scaled by M's largest entry, and each column of W by its own, no square underflows or overflows.
        columns = weight.abs().amax(0)
        w, d = (weight / _or_one(columns)).nan_to_num_(0.0, 0.0, 0.0), delta * columns
        d = d / _or_one(d.abs().amax(-1, keepdim=True))
        top = _top_by_eigh if min(w.shape) <= _EIGH_MAX_SIDE else _top_by_krylov
        u = _unit(top(w, d.nan_to_num(0.0, 0.0, 0.0)))
        # One more half step: the error of uᵀMv is the square of the error of u. d brings non-finite values back in.
        v = _unit((u @ w) * d)
    # u and v are constants here: the result is linear in W and in δ, and backward needs no (P, C, D) tensor. The
    # product is in float64, because a sum of 1,000 equal float32 terms can have an error of 1e-5.
    return ((_widen(u) @ _widen(weight)).to(v.dtype) * delta * v).sum(-1)


def _top_by_eigh(w: Tensor, d: Tensor) -> Tensor:
    """Top left singular vectors of W·diag(d_i), (P, C), not normalised, from the Gram matrix of the smaller side."""
    if w.shape[0] <= w.shape[1]:
        return eigh((w * d.square().unsqueeze(1)) @ w.mT).eigenvectors[..., -1]
    v = eigh((w.mT @ w) * d.unsqueeze(1) * d.unsqueeze(2)).eigenvectors[..., -1]
    return (v * d) @ w.mT


def _top_by_krylov(w: Tensor, d: Tensor) -> Tensor:
    """Top left singular vectors, (P, C), by Lanczos on MMᵀ for all rows at once: no (P, C, D) or (P, C, C) tensor."""
    tolerance = 2 * torch.finfo(w.dtype).eps
    start = torch.randn(len(w), generator=torch.Generator().manual_seed(0), dtype=w.dtype)  # fixed seed: runs repeat
    q = _unit(start.to(w.device)).expand(len(d), -1)
    basis = w.new_zeros(len(d), _KRYLOV_STEPS, len(w))
    tridiagonal = w.new_zeros(len(d), _KRYLOV_STEPS + 1, _KRYLOV_STEPS + 1)
    for k in range(_KRYLOV_STEPS):
        basis[:, k] = q
        known = basis[:, : k + 1]
        rest = ((q @ w) * d.square()) @ w.mT
        tridiagonal[:, k, k] = (q * rest).sum(-1)
        for _ in range(2):  # after one pass the float32 basis of a clustered spectrum is not orthogonal enough
            rest = rest - ((known @ rest.unsqueeze(-1)).mT @ known).squeeze(1)
        length = vector_norm(rest, dim=-1)
        # Rounding noise is no new direction: a row with nothing but noise left is finished and continues as zeros.
        length = length * (length > tolerance * tridiagonal.amax((1, 2)))
        tridiagonal[:, k + 1, k] = length  # eigh reads the lower triangle
        q = rest * torch.where(length > 0, 1 / length, 0.0).unsqueeze(-1)
        if (k + 1) % 8 == 0:
            values, vectors = eigh(tridiagonal[:, : k + 1, : k + 1])
            # The residual bounds the distance to an eigenvalue, also for ties and clusters.
            converged = length * vectors[:, -1, -1].abs() <= tolerance * values[:, -1]
            if converged.all():
                break
    u = (vectors[:, :, -1].unsqueeze(1) @ known).squeeze(1)
    if not converged.all():
        u[~converged] = _top_by_eigh(w, d[~converged])
    return u


def _unit(x: Tensor) -> Tensor:
    return x / _or_one(x.square().sum(-1, keepdim=True).sqrt())  # `sum` has smaller rounding errors than vector_norm


def _or_one(x: Tensor) -> Tensor:
    return torch.where(x == 0, 1.0, x)


def _upcast(*tensors: Tensor) -> list[Tensor]:
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return [t.to(dtype) for t in tensors]


def _widen(x: Tensor) -> Tensor:
    return x if x.device.type == "mps" else x.double()  # MPS has no float64


def _check_name(argument: str, value: str, names: object) -> None:
    if value not in get_args(names):
        raise ValueError(f"unknown {argument} {value!r}, choose from {', '.join(map(repr, get_args(names)))}.")


def _check_features(weight: Tensor, *features: Tensor) -> None:
    rows = features[0].shape[:1]
    fit = weight.ndim == 2 and all(z.ndim == 2 and z.shape == rows + weight.shape[1:] for z in features)
    if not (fit and weight.numel() and features[0].numel()):
        shapes = ", ".join(str(tuple(t.shape)) for t in (weight, *features))
        raise ValueError(f"weight must be (C, D) and the features of each side (B, D), not empty, got {shapes}.")
