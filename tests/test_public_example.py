# SPDX-License-Identifier: Apache-2.0
"""transformers' image-classification example, with the lines of the training guide, trains with pairs.

The example is not part of this project. IPG_EXAMPLE is the path of its `run_image_classification.py`.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small
from PIL import Image
from safetensors.torch import load_file
from transformers import ViTImageProcessor

EXAMPLE = os.environ.get("IPG_EXAMPLE")
GUIDE = Path(__file__).resolve().parent.parent / "recipes" / "guides" / "training.md"
COLOURS = np.array([[1.0, 0.2, 0.2], [0.2, 1.0, 0.2]])  # the spurious attribute of an image: red or green
METRIC = """
import datasets
import evaluate


class Accuracy(evaluate.Metric):
    def _info(self):
        features = datasets.Features({name: datasets.Value("int32") for name in ("predictions", "references")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"accuracy": float(sum(p == r for p, r in zip(predictions, references)) / len(references))}
"""

needs_example = pytest.mark.skipif(not EXAMPLE, reason="IPG_EXAMPLE names no run_image_classification.py")


def changed(script):
    """The script with the lines of the guide's diff; each of its hunks fits exactly one place."""
    (diff,) = re.findall(r"^```diff\n(.*?)^```", GUIDE.read_text(), re.M | re.S)
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] != "+")
        assert script.count(old) == 1, hunk
        script = script.replace(old, "".join(line[1:] for line in lines if line[0] != "-"))
    return script


def test_the_guide_changes_about_six_lines():
    diff = re.findall(r"^```diff\n(.*?)^```", GUIDE.read_text(), re.M | re.S)[0].splitlines()
    assert 0 < sum(line[0] in "+-" for line in diff) <= 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An imagefolder whose classes differ in shape and, in training, in colour; pairs of both colours; a tiny model."""
    folder = tmp_path_factory.mktemp("example")
    generator = np.random.default_rng(0)

    def draw(path, label, colour):
        pixels = generator.uniform(0, 0.3, (24, 24))
        pixels[(slice(4, 20), slice(10, 14)) if label else (slice(10, 14), slice(4, 20))] = 1.0
        for place, tint in zip(path, COLOURS if colour is None else [COLOURS[colour]], strict=True):
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((255 * pixels[:, :, None] * tint).astype("uint8")).save(place)

    for number in range(64):
        name, label = f"{number:03}.png", number % 2
        draw([folder / "train" / ("bar", "pole")[label] / name], label, label)
        draw([folder / "validation" / ("bar", "pole")[label] / name], label, number // 2 % 2)
        draw([folder / "pairs" / side / ("bar", "pole")[label] / name for side in "ab"], label, None)
    small.vit().save_pretrained(folder / "model")
    ViTImageProcessor(size={"height": small.SIZE, "width": small.SIZE}).save_pretrained(folder / "model")
    (folder / "accuracy").mkdir()
    (folder / "accuracy" / "accuracy.py").write_text(METRIC)  # evaluate.load looks here before it asks the Hub
    script = Path(EXAMPLE).read_text()
    (folder / "unchanged.py").write_text(script)
    (folder / "changed.py").write_text(changed(script))
    return folder


def run(folder, script, name, *flags):
    """Runs a script in the folder; returns the weights, the log and the last metrics."""
    command = [sys.executable, f"{script}.py", "--model_name_or_path", "model", "--output_dir", name]
    command += ["--train_dir", "train", "--validation_dir", "validation", "--do_train", "--do_eval"]
    command += ["--remove_unused_columns", "False", "--use_cpu", "--report_to", "none", "--seed", "1"]
    command += ["--num_train_epochs", "2", "--per_device_train_batch_size", "16", "--learning_rate", "1e-3"]
    command += ["--warmup_steps", "0", "--logging_steps", "2", "--eval_strategy", "epoch", "--save_strategy", "epoch"]
    environment = os.environ | {"HF_HOME": str(folder / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*command, *flags], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    log = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
    metrics = json.loads((folder / name / "all_results.json").read_text())
    return load_file(folder / name / "model.safetensors"), log, metrics


@needs_example
def test_without_pairs_the_changed_example_is_the_example(folder):
    weights, log, metrics = run(folder, "unchanged", "out_unchanged")
    same, log_of_same, metrics_of_same = run(folder, "changed", "out_changed")
    assert small.bit_equal(weights, same)
    assert metrics_of_same["eval_accuracy"] == metrics["eval_accuracy"]
    assert [entry.get("loss") for entry in log_of_same] == [entry.get("loss") for entry in log]
    start = load_file(folder / "model" / "model.safetensors")
    assert small.differences(start, weights) > 1e-3


@needs_example
def test_the_changed_example_trains_with_pairs(folder):
    chosen = ["--metric_for_best_model", "pair_accuracy", "--load_best_model_at_end", "True"]
    pairs = ["--pair_dir", "pairs", "--per_device_pair_batch_size", "8"]
    weights, log, metrics = run(folder, "changed", "out_pairs", *pairs, *chosen)
    steps = [entry for entry in log if "loss" in entry]
    assert len(steps) == 4 and all(entry["ipg/distance"] > 0 for entry in steps)
    assert all(entry["ipg/corrective_grad_norm"] > 0 for entry in steps)
    assert {"eval_accuracy", "eval_pair_accuracy", "eval_flip_rate"} <= {*metrics}
    plain, _, _ = run(folder, "changed", "out_plain")
    assert small.differences(weights, plain) > 1e-4
    state = json.loads((folder / "out_pairs" / "trainer_state.json").read_text())
    assert state["best_metric"] == metrics["eval_pair_accuracy"]
