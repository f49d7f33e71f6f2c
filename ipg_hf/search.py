# SPDX-License-Identifier: Apache-2.0
"""Search space and objective for `Trainer.hyperparameter_search`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WORST_GROUP = "worst_group_accuracy"


def ipg_search_space(trial: Any) -> dict[str, Any]:
    """Proposes settings of the guidance.

    Use it as `trainer.hyperparameter_search(hp_space=ipg_search_space, backend="optuna", direction="maximize")`.

    Args:
        trial: an `optuna.Trial`.

    Returns:
        `alpha` in [0.1, 10] and `invariance_threshold` in [1e-6, 1e-1], both log-uniform, and
        `per_device_pair_batch_size`, one of 8, 16, 32, 64. Add `learning_rate` if you have not chosen it yet: alpha and
        the learning rate both scale the task update.
    """
    return {
        "alpha": trial.suggest_float("alpha", 0.1, 10.0, log=True),
        "invariance_threshold": trial.suggest_float("invariance_threshold", 1e-6, 1e-1, log=True),
        "per_device_pair_batch_size": trial.suggest_categorical("per_device_pair_batch_size", [8, 16, 32, 64]),
    }


def worst_group_objective(metrics: Mapping[str, float]) -> float:
    """Returns the worst-group accuracy of an evaluation. Use it as `compute_objective` with `direction="maximize"`.

    Args:
        metrics: the metrics that `Trainer.evaluate` returned.

    Returns:
        A share in [0, 1]. If there are several evaluation sets, it is the lowest one.

    Raises:
        ValueError: `metrics` has no `worst_group_accuracy`.
    """
    found = [value for name, value in metrics.items() if name == WORST_GROUP or name.endswith(f"_{WORST_GROUP}")]
    if not found:
        raise ValueError(
            f"the evaluation has no {WORST_GROUP}, only {sorted(metrics)}: give the trainer "
            "compute_metrics=GroupMetrics() and an eval_dataset with a column `attribute`."
        )
    return min(found)
