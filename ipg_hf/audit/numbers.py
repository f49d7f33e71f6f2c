# SPDX-License-Identifier: Apache-2.0
"""The statistics of an audit: intervals, paired differences, linear probes, rationale differences, a run's course."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config import IPGConfig

NORMAL_975 = 1.959963984540054  # the 97.5 % quantile of the normal distribution
DRAWS = 10_000  # of a bootstrap
PROBE_ROWS = 10_000  # images that a probe is fitted on at most
PROJECTED = 1_000  # images that a projection shows at most
TOP_FEATURES = 6
SHOWN_CLASSES = 6
CANCELLED = 0.01  # of the sum of absolute contributions: a smaller total has no meaningful shares


def wilson_interval(count: int, total: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share.

    Args:
        count: successes, 0..total.
        total: trials, at least 1.

    Returns:
        Its two ends, in [0, 1].
    """
    share, spread = count / total, NORMAL_975**2 / total
    middle, half = share + spread / 2, math.sqrt(share * (1 - share) * spread + spread**2 / 4)
    low, high = (middle - half) / (1 + spread), (middle + half) / (1 + spread)
    # the ends of none and of all are exact, up to rounding
    return (max(low, 0.0) if count else 0.0), (min(high, 1.0) if count < total else 1.0)


def combined_interval(counts: Sequence[int], totals: Sequence[int], weights: Sequence[float]) -> tuple[float, float]:
    """A 95 % interval of a weighted mean of independent shares, from their Wilson intervals (Zou and Donner, 2008).

    Args:
        counts: successes of each.
        totals: trials of each, at least 1.
        weights: not negative; their sum is 1.

    Returns:
        Its two ends; of one share alone those of [`wilson_interval`].
    """
    mean, below, above = 0.0, 0.0, 0.0
    for count, total, weight in zip(counts, totals, weights, strict=True):
        low, high = wilson_interval(count, total)
        mean += weight * count / total
        below += (weight * (count / total - low)) ** 2
        above += (weight * (high - count / total)) ** 2
    return max(0.0, mean - math.sqrt(below)), min(1.0, mean + math.sqrt(above))


def paired_difference(
    first: np.ndarray, second: np.ndarray, groups: np.ndarray, *, seed: int = 0, draws: int = DRAWS
) -> dict[str, dict[str, float]]:
    """Differences of two models' accuracy and worst-group accuracy on the same rows, with 95 % bootstrap intervals.

    A draw takes as many rows from each group as it has, with replacement, and looks at both models on these: what makes
    a row hard for both cancels out.

    Args:
        first: bool (N,), whether the first model is right, N at least 1.
        second: bool (N,), whether the second is.
        groups: ints (N,), the group of each row.
        seed: non-negative; seed of the draws.
        draws: number of draws.

    Returns:
        `accuracy` and `worst_group_accuracy`, each with `difference` (first minus second), `low` and `high`, the 2.5 %
        and 97.5 % quantiles. Where the models are right on the same rows all are exactly 0.
    """
    rng = np.random.default_rng((seed, 30))
    outcomes = 2 * np.asarray(first, np.int64) + np.asarray(second, np.int64)
    total, worst = np.zeros(draws + 1), np.full((2, draws + 1), np.inf)
    for group in np.unique(groups):
        # rows of a group differ in who is right alone: to draw them is to draw from four kinds; row 0 is what was met
        met = np.bincount(outcomes[groups == group], minlength=4)
        drawn = np.vstack([met, rng.multinomial(met.sum(), met / met.sum(), size=draws)])
        right = np.stack([drawn[:, 2] + drawn[:, 3], drawn[:, 1] + drawn[:, 3]])
        total += right[0] - right[1]
        worst = np.minimum(worst, right / met.sum())
    differences = {"accuracy": total / len(outcomes), "worst_group_accuracy": worst[0] - worst[1]}
    found = {}
    for name, values in differences.items():
        low, high = np.quantile(values[1:], (0.025, 0.975))
        found[name] = {"difference": float(values[0]), "low": float(low), "high": float(high)}
    return found


def linear_probe(
    fit: tuple[np.ndarray, np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray, np.ndarray], *, seed: int = 0
) -> dict[str, Any]:
    """How well a logistic regression on standardised features reads a target.

    Every group (target and other variable) counts the same in the fit and in the score, the mean over the target's
    values of the mean over the other's of the accuracy: where no group is empty, who reads the other variable alone is
    at chance, however much the two go together in these images.

    Args:
        fit: features (N, D), targets and other variable (N,), ints, that the probe is fitted on; at most
            [`PROBE_ROWS`] of them, drawn at random.
        test: likewise, that it is scored on.
        seed: non-negative; seed of the draw.

    Returns:
        `score`, with `low` and `high` (see [`combined_interval`]), `chance` (1 / number of values of the target),
        `fitted_on`, `scored_on`, and `empty_groups` of the scored images; or `missing`, the reason why there is none.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng((seed, 31))
    rows = np.sort(rng.permutation(len(fit[0]))[:PROBE_ROWS])
    features, targets, others = (values[rows] for values in fit)
    for values, what in ((targets, "fitted"), (test[1], "scored")):
        if len(np.unique(values)) < 2:
            return {"missing": f"all images that the probe would be {what} on have one value"}
    _, group, sizes = np.unique(np.stack([targets, others]), axis=1, return_inverse=True, return_counts=True)
    weights = 1 / sizes[group.reshape(-1)]
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    probe.fit(features.astype(np.float64), targets, logisticregression__sample_weight=weights * len(rows) / len(sizes))
    right = probe.predict(test[0].astype(np.float64)) == test[1]
    kinds, other_kinds = np.unique(test[1]), np.unique(test[2])
    counts, totals, shares, empty = [], [], [], 0
    for kind in kinds:
        groups = [right[(test[1] == kind) & (test[2] == other)] for other in other_kinds]
        filled = [group for group in groups if len(group)]
        empty += len(groups) - len(filled)
        counts += [int(group.sum()) for group in filled]
        totals += [len(group) for group in filled]
        shares += [1 / len(kinds) / len(filled)] * len(filled)
    low, high = combined_interval(counts, totals, shares)
    return {
        "score": float(np.dot(np.divide(counts, totals), shares)),
        "low": low,
        "high": high,
        "chance": 1 / len(kinds),
        "fitted_on": len(rows),
        "scored_on": len(right),
        "empty_groups": empty,
    }


def projection(z: np.ndarray, labels: np.ndarray, attributes: np.ndarray, *, seed: int = 0) -> dict[str, Any]:
    """The first two principal components of features, those of at most [`PROJECTED`] images drawn at random.

    Args:
        z: features, float (N, D).
        labels: ints (N,).
        attributes: ints (N,).
        seed: non-negative; seed of the draw.

    Returns:
        `points`, lists of x, y, label and attribute (y is 0 where there is one feature or one image alone);
        `explained`, the shares of the variance of the two components (0 where nothing varies).
    """
    rows = np.sort(np.random.default_rng((seed, 32)).permutation(len(z))[:PROJECTED])
    centred = z[rows].astype(np.float64) - z[rows].astype(np.float64).mean(0)
    _, lengths, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:2] * np.sign(axes[:2][np.arange(len(axes[:2])), np.abs(axes[:2]).argmax(1)])[:, None]
    places = np.zeros((len(rows), 2))
    places[:, : len(axes)] = centred @ axes.T
    shares = np.zeros(2)
    if lengths[0] > 0:
        shares[: len(axes)] = lengths[:2] ** 2 / (lengths**2).sum()
    points = [
        [float(f"{x:.4g}"), float(f"{y:.4g}"), int(label), int(attribute)]
        for (x, y), label, attribute in zip(places, labels[rows], attributes[rows], strict=True)
    ]
    return {"points": points, "explained": shares.tolist(), "shown": len(rows), "of": len(z)}


def rationale_differences(
    weight: np.ndarray, z_a: np.ndarray, z_b: np.ndarray, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Which features move each class's logit from side b to side a: the mean over pairs of W ⊙ (z_a - z_b).

    Args:
        weight: W of the head, (C, D).
        z_a: its inputs on side a, (P, D), P at least 1.
        z_b: on side b, (P, D).
        names: of the C classes.

    Returns:
        For each class, at most [`SHOWN_CLASSES`], those with the largest sum of absolute contributions, in their own
        order: `label`; `logit_difference`, the mean of logit a - logit b; `absolute`, the mean of |logit a - logit b|;
        `features`, the [`TOP_FEATURES`] largest, each with its number, `contribution` to the logit difference and
        `share` of it; and `rest`, that of all others: contributions add up to the difference. Shares are None where
        contributions of both signs cancel to less than 1 % of their absolute sum.
    """
    weight, delta = weight.astype(np.float64), z_a.astype(np.float64) - z_b.astype(np.float64)
    contributions = weight * delta.mean(0)
    absolute = np.abs(delta @ weight.T).mean(0)
    sizes = np.abs(contributions).sum(1)
    shown = np.sort(np.argsort(-sizes, kind="stable")[:SHOWN_CLASSES])
    found = []
    for c in shown:
        order = np.argsort(-np.abs(contributions[c]), kind="stable")
        top, others = order[:TOP_FEATURES], order[TOP_FEATURES:]
        values = contributions[c, top].tolist()
        rest = {"features": len(others), "contribution": math.fsum(contributions[c, others])}
        total = math.fsum([*values, rest["contribution"]])
        has_shares = abs(total) > CANCELLED * sizes[c]
        parts = [{"feature": int(j), "contribution": value} for j, value in zip(top, values, strict=True)]
        for part in (*parts, rest):
            part["share"] = part["contribution"] / total if has_shares else None
        found.append(
            {
                "label": names[c],
                "logit_difference": total,
                "absolute": float(absolute[c]),
                "features": parts,
                "rest": rest,
            }
        )
    return found


def training_course(model: str) -> dict[str, Any] | None:
    """What the folder of a run tells of its training; None where the model is no such folder.

    Args:
        model: a folder, or one of its checkpoints, that holds `trainer_state.json` and may hold `run.json`.

    Returns:
        `steps`; `chosen_step`, `seconds` and `method`, None without a record; `threshold`; `guided`, the `step`,
        `distance`, `divergence`, `violated` and `loss_scale` of each log line; `violated_share` of all steps that were
        logged, and `last`, the last log line, both None without guidance; `evaluated`, the `step`, `accuracy`,
        `worst_group_accuracy` and `groups` of each evaluation.
    """
    folder = Path(model)
    if not (folder / "trainer_state.json").is_file():
        return None
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    record = next((file for file in (folder / "run.json", folder.parent / "run.json") if file.is_file()), None)
    run = json.loads(record.read_text(encoding="utf-8")) if record else {}
    history = state["log_history"]
    keys = ("distance", "divergence", "violated", "loss_scale")
    guided = [
        {"step": entry["step"], **{key: entry.get(f"ipg/{key}") for key in keys}}
        for entry in history
        if "ipg/distance" in entry
    ]
    threshold = run.get("config", {}).get("invariance_threshold", IPGConfig.invariance_threshold)
    return {
        "steps": state["global_step"],
        "chosen_step": run.get("chosen_step"),
        "seconds": run.get("seconds"),
        "method": run.get("method"),
        "threshold": float(threshold) if guided else None,
        "violated_share": _violated_share(guided),
        "last": guided[-1] if guided else None,
        "guided": guided,
        "evaluated": [_evaluated(entry) for entry in history if "eval_accuracy" in entry],
    }


def _violated_share(guided: Sequence[Mapping[str, Any]]) -> float | None:
    """Log lines hold means over the steps since the last: each counts as many."""
    starts = [0, *(entry["step"] for entry in guided)]
    windows = [
        (entry["step"] - start, entry["violated"])
        for start, entry in zip(starts, guided, strict=False)
        if entry["violated"] is not None
    ]
    steps = sum(length for length, _ in windows)
    return sum(length * share for length, share in windows) / steps if steps else None


def _evaluated(entry: Mapping[str, Any]) -> dict[str, Any]:
    prefix = "eval_group_accuracy/"
    return {
        "step": entry["step"],
        "accuracy": entry["eval_accuracy"],
        "worst_group_accuracy": entry.get("eval_worst_group_accuracy"),
        "groups": {key[len(prefix) :]: value for key, value in entry.items() if key.startswith(prefix)},
    }
