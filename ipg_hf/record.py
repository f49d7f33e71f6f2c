# SPDX-License-Identifier: Apache-2.0
"""What is known of a training by its trainer: the part of a run's record that its model card needs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from transformers import Trainer

from . import report
from .pairs import ImageRows, check_pairs

MAIN_SETTINGS = (
    "learning_rate",
    "optim",
    "lr_scheduler_type",
    "warmup_steps",
    "per_device_train_batch_size",
    "max_steps",
    "freeze_norm",
)
PAIR_SETTINGS = (
    "alpha",
    "invariance_threshold",
    "max_loss_scale",
    "invariance_distance",
    "rationale_reduction",
    "rationale_norm",
    "per_device_pair_batch_size",
    "pair_combination",
)
WORST_GROUP = ("eval_worst_group_accuracy", "eval_worst_group_mae")


def data_facts(trainer: Trainer) -> dict[str, Any]:
    """What a record keeps of a trainer's data: number of training rows, and of each pair set the number of pairs and
    what the fast form of the linter finds (`None` for a stream, or where partners are searched in training)."""

    def of(dataset: Any) -> dict[str, Any]:
        looked = isinstance(dataset, (ImageRows, datasets.Dataset)) and getattr(dataset, "format", {})
        is_stored = isinstance(dataset, ImageRows) or (looked and looked["type"] != "custom")
        findings = check_pairs(dataset, fast=True) if is_stored else None
        kept = None if findings is None else [[f.severity, f.code, f.message] for f in findings]
        return {"pairs": len(dataset) if hasattr(dataset, "__len__") else None, "findings": kept}

    train = trainer.train_dataset
    sets = getattr(trainer, "pair_datasets", {})
    return {
        "train": len(train) if hasattr(train, "__len__") else None,
        "pair_sets": {name: of(dataset) for name, dataset in sets.items()},
    }


def trainer_record(trainer: Trainer) -> dict[str, Any]:
    """A record of a training by its `Trainer` alone: the metrics are those of the evaluation at the chosen step.

    The log's last evaluation is not the best one's (transformers issue 15547).
    """
    state, args = trainer.state, trainer.args
    step = state.best_global_step if args.load_best_model_at_end and state.best_global_step else state.global_step
    evaluated = [entry for entry in state.log_history if "eval_loss" in entry and entry["step"] <= step]
    timings = ("_runtime", "_per_second", "_preparation_time")
    last = evaluated[-1] if evaluated else {}
    metrics = {
        key.removeprefix("eval_"): value
        for key, value in last.items()
        if key.startswith("eval_") and not key.endswith(timings)
    }
    named = getattr(getattr(trainer.model, "config", None), "_name_or_path", None)
    config = {name: getattr(args, name) for name in (*MAIN_SETTINGS, *PAIR_SETTINGS) if hasattr(args, name)}
    return {
        "config": {name: getattr(value, "value", value) for name, value in config.items()},
        "seed": args.seed,
        "method": "ipg" if getattr(trainer, "is_guided", False) else "erm",
        "metrics": {"evaluation": metrics} if metrics else {},
        "chosen_step": last.get("step", step),
        "steps": state.global_step,
        "seconds": next((entry["train_runtime"] for entry in state.log_history if "train_runtime" in entry), None),
        "versions": report.versions(),
        "commit": None,
        "hardware": report.hardware(),
        "base_model": hub_id(named),
        "data": data_facts(trainer),
    }


def course(history: Sequence[Mapping[str, Any]], points: int = 50) -> dict[str, dict[str, list[float]]]:
    """The course of a training, for figures, from `trainer.state.log_history`.

    Args:
        history: the log.
        points: how many steps are kept at most, evenly spread, the first and the last among them.

    Returns:
        `guidance` (`divergence`, `violated`, `loss_scale`) and `validation` (`worst_group_accuracy` or
        `worst_group_mae`), each in columns beside `step`, four significant digits; what was not logged is left out.
    """
    kept = {"guidance": ("ipg/divergence", "ipg/violated", "ipg/loss_scale"), "validation": WORST_GROUP}
    found = {}
    for part, keys in kept.items():
        entries = [entry for entry in history if any(key in entry for key in keys)]
        if len(entries) > points:
            entries = [entries[round(i * (len(entries) - 1) / (points - 1))] for i in range(points)]
        names = [key for key in keys if all(key in entry for entry in entries)]
        if entries:
            columns = {name.split("/")[-1].removeprefix("eval_"): [entry[name] for entry in entries] for name in names}
            columns = {name: [float(f"{value:.4g}") for value in values] for name, values in columns.items()}
            found[part] = {"step": [entry["step"] for entry in entries], **columns}
    return found


def hub_id(name: str | None) -> str | None:
    """The name of a base model where it is an id of the Hub and not a folder."""
    return name if name and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists() else None
