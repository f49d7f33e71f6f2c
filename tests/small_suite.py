# SPDX-License-Identifier: Apache-2.0
"""A small suite, and records of runs that were not made."""

import json

import yaml
from small import TINY_RECIPE

from ipg_hf.recipe import parse_settings

TINY = {
    **TINY_RECIPE,
    "max_steps": 4,
    "logging_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "worst_group_accuracy",
    "output_dir": "not/used",
    "seed": 9,
}
SUITE = {
    "title": "Tiny",
    "recipe": "tiny.yaml",
    "seeds": [0, 1, 2],
    "reference": "erm",
    "methods": {"erm": {"method": "erm"}, "a": {"alpha": 0.5}, "b": None},
}
TUNING = {"draws": 4, "seed": 3, "ranges": {"all": {"learning_rate": [1e-4, 1e-2, "log"]}}}


def write(folder, recipe=TINY, changes=None, **more):
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    path = folder / "tiny_suite.yaml"
    path.write_text(yaml.safe_dump({**SUITE, **(changes or {}), **more}, sort_keys=False))
    return path


def fake(run, worst, split="test", seconds=10.0, cpu=None, **metrics):
    """The record of a run that was not made."""
    values = {"accuracy": 0.5, "worst_group_accuracy": worst, "flip_rate": 0.25, **metrics}
    record = {
        "config": json.loads(json.dumps(parse_settings(run.settings, title="")[2])),
        "metrics": {"validation": values, **({"test": values} if split == "test" else {})},
        "seconds": seconds,
        "commit": "0123456789abcdef",
        "hardware": {"machine": "x86_64", "cpus": 2, "torch_threads": 1, "gpus": []} | ({"cpu": cpu} if cpu else {}),
    }
    run.record.parent.mkdir(parents=True, exist_ok=True)
    run.record.write_text(json.dumps(record))
