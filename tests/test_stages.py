# SPDX-License-Identifier: Apache-2.0
"""What surrounds a training: Just Train Twice, and another last layer, as a user launches them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import small
import torch
import yaml
from safetensors.torch import load_file
from test_cli import TINY
from transformers import AutoImageProcessor, AutoModelForImageClassification

from ipg_hf import find_head
from ipg_hf.baselines.stages import first_errors, repeat_errors
from ipg_hf.cli import main
from ipg_hf.data import load_digits
from ipg_hf.pairs import ImageRows
from ipg_hf.recipe import Recipe, RecipeError, parse_recipe

ROOT = Path(__file__).resolve().parent.parent
DFR = {"method": "dfr", "num_fits": 2, "strengths": [1.0, 0.3]}
TWICE = {"steps": 1, "factor": 3}
WARM = {"warmup_steps": 2}  # one step leaves the first model as it was: a real one takes the colour, without an error


def write(folder, **changes):
    folder.mkdir(exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**TINY, "method": "erm", "output_dir": str(folder / "out"), **changes}))
    return str(path)


def train(folder, *flags, **changes):
    assert main(["train", "--config", write(folder, **changes), *flags]) == 0
    return record_of(folder), load_file(folder / "out" / "model.safetensors")


def record_of(folder):
    return json.loads((folder / "out" / "run.json").read_text())


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return train(tmp_path_factory.mktemp("plain"))


# ---- Rows ----


def test_errors_stand_so_many_times_in_their_order():
    letters = datasets.Dataset.from_dict({"letter": ["a", "b", "c", "d"]})
    wrong = np.array([False, True, False, True])
    assert repeat_errors(letters, wrong, 3)["letter"][:] == ["a", "b", "b", "b", "c", "d", "d", "d"]
    assert repeat_errors(letters, wrong, 1)["letter"][:] == ["a", "b", "c", "d"]
    assert repeat_errors(letters, np.zeros(4, bool), 9)["letter"][:] == ["a", "b", "c", "d"]
    assert [*repeat_errors(["a", "b", "c", "d"], wrong, 2)] == ["a", "b", "b", "c", "d", "d"]


def test_no_row_is_read_to_repeat_it():
    recorded = small.Recorded(small.rows(6))
    repeated = repeat_errors(recorded, np.arange(6) == 2, 4)
    assert len(repeated) == 9 and recorded.drawn == []
    assert torch.equal(repeated[4]["pixel_values"], recorded.items[2]["pixel_values"]) and recorded.drawn == [2]
    stored = load_digits(num_pairs=1).train
    repeated = repeat_errors(stored, np.ones(len(stored), bool), 2)
    assert len(repeated) == 2 * len(stored) == 2 * repeated.data.num_rows


@pytest.mark.parametrize(
    ("wrong", "factor", "expected"),
    [
        ([True, False], 2, "shape"),
        ([1, 0, 1], 2, "int64"),
        ([True, False, True], 0, "factor=0"),
        ([True, False, True], 1.5, "factor=1.5"),
    ],
)
def test_errors_that_cannot_be_repeated(wrong, factor, expected):
    with pytest.raises(ValueError, match=expected):
        repeat_errors(["a", "b", "c"], np.array(wrong), factor)


def test_the_first_model_is_asked_every_training_row(tmp_path):
    rows = small.rows(21)
    model = small.vit()
    args = small.config(tmp_path, learning_rate=0.0, dataloader_drop_last=True, max_steps=50)
    labels = np.array([row["labels"] for row in rows])
    wrong = first_errors(model, args, rows, labels, None, steps=2)
    model.eval()
    with torch.no_grad():
        expected = model(pixel_values=torch.stack([row["pixel_values"] for row in rows])).logits.argmax(-1).numpy()
    assert (wrong == (expected != labels)).all() and 0 < wrong.sum() < 21
    assert args.max_steps == 50 and not any(tmp_path.iterdir())


# ---- Settings ----


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"last_layer": {"method": "dfrr"}}, "'dfr'"),
        ({"last_layer": {"rank": 1}}, "method=None"),
        ({"last_layer": {"method": "dfr", "num_fit": 3}}, "'num_fits'"),
        ({"last_layer": {"method": "dfr", "rank": 3}}, "'rank'"),
        ({"last_layer": {"method": "dfr", "num_fits": 0}}, "num_fits=0"),
        ({"last_layer": {"method": "dfr", "strengths": 0.1}}, "strengths=0.1"),
        ({"last_layer": {"method": "project"}}, "rank=None"),
        ({"last_layer": {"method": "project", "rank": 1.5}}, "rank=1.5"),
        ({"last_layer": "[1]"}, "mapping"),
        ({"repeat_errors": {"steps": 3}, "method": "erm"}, "factor=None"),
        ({"repeat_errors": {"steps": 3, "factor": 2, "epochs": 1}, "method": "erm"}, "'epochs'"),
        ({"repeat_errors": {"steps": 0, "factor": 2}, "method": "erm"}, "steps=0"),
        ({"repeat_errors": {"steps": 3, "factor": 2}}, "method: erm"),
    ],
)
def test_settings_that_are_none(tmp_path, settings, expected):
    with pytest.raises(ValueError, match=expected):
        Recipe(**settings)
    with pytest.raises(RecipeError, match=expected):
        parse_recipe(write(tmp_path, **{"method": "ipg", **settings}))


def test_settings_as_flags(tmp_path):
    flags = ["--last_layer", '{"method": "project", "rank": 0.5}', "--repeat_errors", '{"steps": 2, "factor": 3}']
    recipe, _, given = parse_recipe(write(tmp_path), flags)
    assert recipe.last_layer == given["last_layer"] == {"method": "project", "rank": 0.5}
    assert recipe.repeat_errors == {"steps": 2, "factor": 3}
    assert recipe.uses_pairs and not Recipe(method="erm", last_layer=DFR).uses_pairs


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"last_layer": {"method": "project", "rank": 1}, "pairs": {"maker": "adversarial"}}, "AdversarialPairs"),
        ({"last_layer": {"method": "project", "rank": 16}}, "rank=16 is more than the 15 directions"),
        ({"last_layer": {"method": "project", "rank": 5}, "num_pairs": 4}, "rank=5 is more than the 4 directions"),
        ({"last_layer": DFR, "dataset": "stroke_mass"}, "1 outputs"),
        ({"repeat_errors": TWICE, "dataset": "stroke_mass"}, "numbers"),
        ({"repeat_errors": TWICE, "objective": "group_dro"}, "group_dro"),
    ],
)
def test_what_cannot_be_compared_is_named_before_a_training(tmp_path, capsys, changes, expected):
    settings = {"num_pairs": None, "metric_for_best_model": "loss", **changes}
    assert main(["train", "--config", write(tmp_path, **settings)]) == 2
    assert expected in capsys.readouterr().err
    assert not [*tmp_path.glob("out/checkpoint-*")] and not (tmp_path / "out" / "run.json").exists()


# ---- Runs ----


def test_a_last_layer_is_fitted_to_half_of_validation_and_measured_by_the_other(tmp_path, plain, capsys):
    record, weights = train(tmp_path, last_layer=DFR)
    facts, validation = record["last_layer"], record["metrics"]["validation"]
    assert facts["method"] == "dfr" and facts["strength"] in (1.0, 0.3) and facts["fits"] == 2
    # 75 digits a group: 38 are fitted
    assert (facts["rows"], facts["rows_a_fit"], facts["rows_left_to_measure"]) == (152, 152, 148)
    assert {validation[key] for key in validation if key.startswith("group_n/")} == {37.0}
    # its pairs hold images that were fitted
    assert "flip_rate" not in validation and "flip_rate" in record["metrics"]["test"]
    assert {name for name in weights if not torch.equal(weights[name], plain[1][name])} == {
        "classifier.weight",
        "classifier.bias",
    }
    # the colour alone leaves a group without a right answer
    assert record["metrics"]["test"]["worst_group_accuracy"] > 0.2
    assert plain[0]["metrics"]["test"]["worst_group_accuracy"] == 0
    assert main(["evaluate", str(tmp_path / "out"), "--config", str(tmp_path / "recipe.yaml")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "fitted anew to 152 validation images" in card and "Plain training" not in card
    raw, same = train(tmp_path / "raw", last_layer=DFR, preload=False)
    assert raw["metrics"]["test"] == pytest.approx(record["metrics"]["test"], abs=1e-6)
    assert small.differences(weights, same) < 1e-5


def test_pairs_that_were_not_trained_with_are_projected_out(tmp_path, plain):
    record, weights = train(tmp_path, last_layer={"method": "project", "rank": 1})
    facts = record["last_layer"]
    assert facts["method"] == "project" and facts["pairs"] == 40 and facts["rank"] == 1
    assert 0.5 < facts["variance_removed"] <= 1 and 0 < facts["weight_removed"] < 1
    assert record["data"]["pair_sets"] == {} and record["method"] == "erm"
    changed = {name for name in weights if not torch.equal(weights[name], plain[1][name])}
    assert changed == {"classifier.weight"}
    for split in ("validation", "test"):
        assert record["metrics"][split]["flip_rate"] < 0.5 < plain[0]["metrics"][split]["flip_rate"]
    assert "of 40 pairs differ most were taken out" in (tmp_path / "out" / "README.md").read_text()
    raw, _ = train(tmp_path / "raw", last_layer={"method": "project", "rank": 1}, preload=False)
    for name, value in facts.items():
        assert raw["last_layer"][name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value)


def test_all_pair_sets_are_projected_out(tmp_path):
    record, _ = train(tmp_path, dataset="marked_digits", last_layer={"method": "project", "rank": 2})
    assert record["last_layer"]["pairs"] == 80


def test_errors_of_a_first_model_are_repeated(tmp_path):
    plain, without = train(tmp_path / "plain", **WARM)
    record, weights = train(tmp_path, repeat_errors=TWICE, **WARM)
    facts = record["repeat_errors"]
    errors = json.loads((tmp_path / "out" / "first_model_errors.json").read_text())["rows"]
    assert facts == {"errors": len(errors), **TWICE, "rows": 997 + 2 * len(errors)} and 0 < len(errors) < 997
    assert record["data"]["train"] == facts["rows"]
    assert small.differences(weights, without) > 1e-5
    assert f"3 times the {len(errors)} images" in (tmp_path / "out" / "README.md").read_text()
    # repeated once it is the plain training, bit for bit: the first model leaves no trace
    once, same = train(tmp_path / "once", repeat_errors={**TWICE, "factor": 1}, **WARM)
    assert small.bit_equal(same, without) and once["repeat_errors"]["rows"] == 997
    assert once["metrics"] == plain["metrics"]
    raw, same = train(tmp_path / "raw", repeat_errors=TWICE, preload=False, **WARM)
    assert raw["repeat_errors"] == facts and small.differences(same, weights) < 1e-5


def test_a_resumed_run_has_the_rows_that_it_began_with(tmp_path, monkeypatch):
    _, weights = train(tmp_path, repeat_errors=TWICE, **WARM)
    checkpoints = tmp_path / "out" / "checkpoint-6"
    for path in checkpoints.iterdir():
        path.unlink()
    checkpoints.rmdir()
    with monkeypatch.context() as without:
        without.setattr("ipg_hf.run.first_errors", lambda *_, **__: pytest.fail("a second first model"))
        _, resumed = train(tmp_path, "--resume_from_checkpoint", "last", repeat_errors=TWICE, **WARM)
    assert small.bit_equal(resumed, weights)
    assert main(["train", "--config", str(tmp_path / "recipe.yaml"), "--overwrite_output_dir", "true"]) == 0


SHARED = {
    "dfr": {"last_layer": DFR},
    "project": {"last_layer": {"method": "project", "rank": 1}},
    "jtt": {"repeat_errors": TWICE, **WARM},
}


def test_two_processes_do_what_one_does(tmp_path):
    sgd = {"optim": "sgd", "learning_rate": 0.05}
    half = TINY["per_device_train_batch_size"] // 2
    configs = [
        write(tmp_path / f"two-{name}", per_device_train_batch_size=half, **sgd, **SHARED[name]) for name in SHARED
    ]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(ROOT / "recipes/accelerate/cpu_2.yaml"), "--main_process_port", "0", __file__, *configs]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, timeout=400)
    for name, changes in SHARED.items():
        one, weights = train(tmp_path / name, **sgd, **changes)
        two, same = record_of(tmp_path / f"two-{name}"), load_file(tmp_path / f"two-{name}/out/model.safetensors")
        for key in ("last_layer", "repeat_errors"):
            assert (key in one) == (key in two)
            for fact, value in one.get(key, {}).items():
                assert two[key][fact] == (pytest.approx(value, rel=1e-3) if isinstance(value, float) else value), fact
        assert small.differences(weights, same) < 1e-3 * max(value.abs().max().item() for value in weights.values())
        for split in one["metrics"]:
            del one["metrics"][split]["loss"], two["metrics"][split]["loss"]  # Trainer's is of whole batches
            assert two["metrics"][split] == pytest.approx(one["metrics"][split], abs=1e-3)


def test_the_saved_head_is_the_one_that_was_fitted(tmp_path):
    _, weights = train(tmp_path, last_layer=DFR)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    head = find_head(model)
    assert torch.equal(head.weight, weights["classifier.weight"])
    assert torch.equal(head.weight[0], -head.weight[1]) and torch.equal(head.bias[0], -head.bias[1])
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    rows = ImageRows(load_digits(num_pairs=1).test.select(range(8)), processor, {"image": "pixel_values"})
    inputs = {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}
    logits, z = head.run(model.eval(), inputs)
    assert (logits - (z @ head.weight.T + head.bias)).abs().max() < 1e-5


if __name__ == "__main__":
    for config in sys.argv[1:]:
        sys.exit(1) if main(["train", "--config", config]) else None
