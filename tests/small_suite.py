# SPDX-License-Identifier: Apache-2.0
"""A small suite, and records of runs that were not made."""

import json
from functools import cache

import yaml
from small import TINY_RECIPE

from ipg_hf.recipe import parse_settings
from ipg_hf.record import append_record, read_records, resolved_settings

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


def fake(run, worst, split="test", seconds=10.0, cpu=None, metrics=None, guidance=None, **more):
    """Appends the record of a run that was not made.

    Args:
        run: the run.
        worst: worst-group accuracy on both splits.
        split: "test", or "validation" for a run that does not read the test set.
        seconds: duration of the training.
        cpu: name of the processor.
        metrics: all metrics of both splits, instead of those of a classifier.
        guidance: columns of what was logged of the pairs.
        more: further metrics.
    """
    values = metrics or {"accuracy": 0.5, "worst_group_accuracy": worst, "flip_rate": 0.25, **more}
    own = {key: run.settings[key] for key in ("seed", "measure_test") if key in run.settings}
    shared = {key: value for key, value in run.settings.items() if key not in own}
    settings = resolved(json.dumps(shared)) | own
    record = {
        "run": run.name,
        "method": settings["method"],
        "settings": settings,
        "seed": settings["seed"],
        "metrics": {"validation": values, **({"test": values} if split == "test" else {})},
        "course": {"guidance": guidance} if guidance else {},
        "seconds": seconds,
        "commit": "0123456789abcdef",
        "hardware": {"machine": "x86_64", "cpus": 2, "torch_threads": 1, "gpus": []} | ({"cpu": cpu} if cpu else {}),
    }
    append_record(run.records, record)


@cache
def resolved(settings):
    """The settings of a record, for what is given as JSON."""
    return resolved_settings(*parse_settings(json.loads(settings), title="")[:2])


def records_of(folder):
    """Name of a run -> its record, of the small suite in a folder."""
    return {record["run"]: record for record in read_records(folder / "records/tiny_suite.jsonl")}
