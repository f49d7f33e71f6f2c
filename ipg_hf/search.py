# SPDX-License-Identifier: Apache-2.0
"""A search space and an objective for `Trainer.hyperparameter_search`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WORST_GROUP = "worst_group_accuracy"


def ipg_search_space(trial: Any) -> dict[str, Any]:
    """The settings of the guidance, for `hyperparameter_search(hp_space=ipg_search_space, backend="optuna")`.

    Args:
        trial: an `optuna.Trial`.

    Returns:
        `alpha` in [0.1, 10] and `invariance_threshold` in [1e-6, 1e-1], both drawn in their logarithm, and
        `per_device_pair_batch_size`, one of 8, 16, 32, 64. Add a `learning_rate` where it is not settled: alpha and the
        learning rate share the strength of the task update.
    """
    return {
        "alpha": trial.suggest_float("alpha", 0.1, 10.0, log=True),
        "invariance_threshold": trial.suggest_float("invariance_threshold", 1e-6, 1e-1, log=True),
        "per_device_pair_batch_size": trial.suggest_categorical("per_device_pair_batch_size", [8, 16, 32, 64]),
    }


def worst_group_objective(metrics: Mapping[str, float]) -> float:
    """The worst-group accuracy of the evaluation, for `compute_objective=` with `direction="maximize"`.

    Args:
        metrics: what `evaluate` returned; of several evaluation sets, the lowest counts.

    Returns:
        A share in [0, 1].

    Raises:
        ValueError: no evaluation set measured it.
    """
    found = [value for name, value in metrics.items() if name.endswith(WORST_GROUP)]
    if not found:
        raise ValueError(
            f"the evaluation has no {WORST_GROUP}, only {sorted(metrics)}. Give the trainer compute_metrics="
            "GroupMetrics() and an evaluation set with an `attribute` column."
        )
    return min(found)
