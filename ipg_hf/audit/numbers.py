# SPDX-License-Identifier: Apache-2.0
"""The statistics of an audit: intervals, paired differences, linear probes, rationale differences, training course."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from ..record import read_json

DRAWS = 10_000  # of a bootstrap
PROBE_ROWS = 10_000  # images that a probe is fitted on at most
PROJECTED = 1_000  # images that a projection shows at most
TOP_FEATURES = 6
SHOWN_CLASSES = 6
CANCELLED = 0.01  # of the sum of absolute contributions: a smaller total has no meaningful shares


def wilson_interval(count: int, total: int) -> tuple[float, float]:
    """Computes the 95 % Wilson score interval of a share.

    Args:
        count: number of successes, from 0 to `total`.
        total: number of trials, at least 1.

    Returns:
        The two ends of the interval, in [0, 1].
    """
    interval = stats.binomtest(count, total).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def combined_interval(counts: Sequence[int], totals: Sequence[int], weights: Sequence[float]) -> tuple[float, float]:
    """Computes a 95 % interval of a weighted mean of independent shares from their Wilson intervals.

    The method is that of Zou and Donner (2008).

    Args:
        counts: number of successes of each share.
        totals: number of trials of each share, at least 1.
        weights: weight of each share, not negative; the weights add up to 1.

    Returns:
        The two ends of the interval. For one share alone they are those of [`wilson_interval`].
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
    """Compares two models on the same rows, with 95 % bootstrap intervals.

    A draw takes rows with replacement, from each group as many as the group has. Both models are measured on the same
    draw. What makes a row hard for both models therefore cancels out.

    Args:
        first: whether the first model is right on each row, bool (N,), N at least 1.
        second: whether the second model is right on each row, bool (N,).
        groups: group of each row, ints (N,).
        seed: seed of the draws, not negative.
        draws: number of draws.

    Returns:
        `accuracy` and `worst_group_accuracy`. Each has `difference` (first model minus second), `low` and `high` (the
        2.5 % and the 97.5 % quantile). All three are exactly 0 if the models are right on the same rows.
    """
    rng = np.random.default_rng((seed, 30))
    outcomes = 2 * np.asarray(first, np.int64) + np.asarray(second, np.int64)
    total, worst = np.zeros(draws + 1), np.full((2, draws + 1), np.inf)
    for group in np.unique(groups):
        # rows of a group differ only in which model is right: to draw rows is to draw from four kinds of row.
        # Row 0 of `drawn` holds the counts of the data itself.
        observed = np.bincount(outcomes[groups == group], minlength=4)
        drawn = np.vstack([observed, rng.multinomial(observed.sum(), observed / observed.sum(), size=draws)])
        right = np.stack([drawn[:, 2] + drawn[:, 3], drawn[:, 1] + drawn[:, 3]])
        total += right[0] - right[1]
        worst = np.minimum(worst, right / observed.sum())
    differences = {"accuracy": total / len(outcomes), "worst_group_accuracy": worst[0] - worst[1]}
    found = {}
    for name, values in differences.items():
        low, high = np.quantile(values[1:], (0.025, 0.975))
        found[name] = {"difference": float(values[0]), "low": float(low), "high": float(high)}
    return found


def linear_probe(
    fit: tuple[np.ndarray, np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray, np.ndarray], *, seed: int = 0
) -> dict[str, Any]:
    """Measures how well a logistic regression on standardised features reads a target.

    A group is a value of the target together with a value of the other variable. Every group counts the same in the
    fit. The score is the mean of the accuracies of the groups: first over the other variable, then over the target. A
    probe that reads only the other variable is therefore at chance if no group is empty.

    Args:
        fit: features (N, D), targets (N,) and other variable (N,) that the probe is fitted on. Targets and other
            variable are ints. At most [`PROBE_ROWS`] rows are used, drawn at random.
        test: features, targets and other variable that the probe is scored on.
        seed: seed of the draw of rows, not negative.

    Returns:
        `score` with `low` and `high` (by [`combined_interval`]), `chance` (1 / number of values of the target),
        `fitted_on`, `scored_on` and `empty_groups` of the scored images. Or only `missing`: the reason why there is no
        score.
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
    """Computes the first two principal components of features.

    At most [`PROJECTED`] images are used, drawn at random.

    Args:
        z: features, float (N, D).
        labels: label of each image, ints (N,).
        attributes: attribute of each image, ints (N,).
        seed: seed of the draw of images, not negative.

    Returns:
        `points`, lists of x, y, label and attribute (y is 0 if there is only one feature or one image); `explained`,
        the share of the variance of each component (0 if nothing varies); `shown` and `of`, the numbers of images.
    """
    from sklearn.decomposition import PCA

    rows = np.sort(np.random.default_rng((seed, 32)).permutation(len(z))[:PROJECTED])
    features = z[rows].astype(np.float64)
    pca = PCA(min(2, *features.shape), svd_solver="full")
    places, shares = np.zeros((len(rows), 2)), np.zeros(2)
    with np.errstate(invalid="ignore", divide="ignore"):  # one image, or equal images: no variance to take a share of
        places[:, : pca.n_components] = pca.fit_transform(features)
    shares[: pca.n_components] = np.nan_to_num(pca.explained_variance_ratio_)
    points = [
        [float(f"{x:.4g}"), float(f"{y:.4g}"), int(label), int(attribute)]
        for (x, y), label, attribute in zip(places, labels[rows], attributes[rows], strict=True)
    ]
    return {"points": points, "explained": shares.tolist(), "shown": len(rows), "of": len(z)}


def rationale_differences(
    weight: np.ndarray, z_a: np.ndarray, z_b: np.ndarray, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Finds the features that move the logit of each class between the two sides of a pair.

    The contribution of a feature is the mean over pairs of W ⊙ (z_a - z_b).

    Args:
        weight: W of the head, (C, D).
        z_a: inputs of the head on side a, (P, D), P at least 1.
        z_b: inputs of the head on side b, (P, D).
        names: names of the C classes.

    Returns:
        One dict for each shown class. At most [`SHOWN_CLASSES`] classes are shown, those with the largest sum of
        absolute contributions, in the order of the classes. A dict holds `label`; `logit_difference`, the mean of
        logit a - logit b; `absolute`, the mean of |logit a - logit b|; `features`, the [`TOP_FEATURES`] largest, each
        with its number, its `contribution` to the logit difference and its `share` of the difference; `rest`, the sum
        over all other features. Contributions add up to the logit difference. Shares are None if contributions of both
        signs cancel to less than 1 % of their absolute sum.
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
    """Reads the course of a training from the folder of a run.

    Args:
        model: a folder of a run or one of its checkpoints. It holds `trainer_state.json` and may hold `run.json`.

    Returns:
        `None` if `model` is no such folder. Otherwise `steps`; `chosen_step`, `seconds`, `method` and `threshold`, each
        None if there is no record; `guided`, the `step`, `distance`, `divergence`, `violated` and `loss_scale` of each
        log line; `violated_share` of all logged steps, and `last`, the last log line, both None without guidance;
        `evaluated`, the `step`, `accuracy`, `worst_group_accuracy` and `groups` of each evaluation.
    """
    folder = Path(model)
    if not (folder / "trainer_state.json").is_file():
        return None
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    record = next((file for file in (folder / "run.json", folder.parent / "run.json") if file.is_file()), None)
    run = read_json(record) if record else {}
    history = state["log_history"]
    keys = ("distance", "divergence", "violated", "loss_scale")
    guided = [
        {"step": entry["step"], **{key: entry.get(f"ipg/{key}") for key in keys}}
        for entry in history
        if "ipg/distance" in entry
    ]
    # a value that an old record cannot tell is the text "not recorded"
    threshold = run.get("settings", {}).get("invariance_threshold")
    return {
        "steps": state["global_step"],
        "chosen_step": run.get("chosen_step"),
        "seconds": run.get("seconds"),
        "method": run.get("method"),
        "threshold": threshold if guided and isinstance(threshold, int | float) else None,
        "violated_share": _violated_share(guided),
        "last": guided[-1] if guided else None,
        "guided": guided,
        "evaluated": [_evaluated(entry) for entry in history if "eval_accuracy" in entry],
    }


def _violated_share(guided: Sequence[Mapping[str, Any]]) -> float | None:
    """The mean over log lines, each weighted by the number of steps since the line before."""
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
