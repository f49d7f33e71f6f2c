# SPDX-License-Identifier: Apache-2.0
"""Runs of `ipg train` on the digits with a tiny network."""

import json

import yaml
from safetensors.torch import load_file
from small import TINY_RECIPE

from ipg_hf.cli import main

TINY = {
    **TINY_RECIPE,
    "max_steps": 6,
    "logging_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "save_steps": 3,
    "load_best_model_at_end": True,
    "metric_for_best_model": "worst_group_accuracy",
}


def write(folder, **changes):
    """A recipe in a folder, whose run goes to the folder `out` beside it; returns its path."""
    folder.mkdir(exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**TINY, "output_dir": str(folder / "out"), **changes}))
    return str(path)


def train(folder, *flags, **changes):
    """Runs a recipe; returns its record and the saved weights."""
    assert main(["train", "--config", write(folder, **changes), *flags]) == 0
    return record_of(folder), load_file(folder / "out" / "model.safetensors")


def record_of(folder):
    """The record of the run beside a recipe."""
    return json.loads((folder / "out" / "run.json").read_text())
