# SPDX-License-Identifier: Apache-2.0
"""Just Train Twice: what a first model gets wrong stands several times in the second training."""

import json
import shutil

import datasets
import numpy as np
import pytest
import small
import torch
from safetensors.torch import load_file
from small_runs import record_of, train, write

from ipg_hf import IPGTrainer
from ipg_hf.baselines import JTTConfig, JTTTrainer
from ipg_hf.baselines.jtt import ERRORS, repeat_errors
from ipg_hf.cli import main
from ipg_hf.data import load_digits
from ipg_hf.recipe import RecipeError, parse_recipe

# one step leaves the first model as it was: a real one takes the colour, without an error
TWICE = {"method": "jtt", "first_steps": 1, "upweight": 3, "warmup_steps": 2}

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


@pytest.mark.parametrize(("wrong", "expected"), [([True, False], "shape"), ([1, 0, 1], "int64")])
def test_errors_that_cannot_be_repeated(wrong, expected):
    with pytest.raises(ValueError, match=expected):
        repeat_errors(["a", "b", "c"], np.array(wrong), 2)


# ---- The trainer ----


def test_the_errors_of_the_first_model_over_every_row_are_repeated(tmp_path):
    """With a learning rate of 0 the first model is the one that was given."""
    rows, model = small.grouped(21), small.vit()
    settings = {"first_steps": 2, "upweight": 3, "learning_rate": 0.0, "dataloader_drop_last": True, "max_steps": 1}
    args = small.config(tmp_path, JTTConfig, **settings)
    run = JTTTrainer(model, args, train_dataset=rows)
    run.train()
    model.eval()
    labels = np.asarray(rows[:]["label"])
    with torch.no_grad():
        wrong = model(pixel_values=rows[:]["pixel_values"].float()).logits.argmax(-1).numpy() != labels
    errors = np.flatnonzero(wrong).tolist()
    assert 0 < len(errors) < 21 and run.method_facts == {"errors": len(errors), "rows": 21 + 2 * len(errors)}
    expected = [label for label, is_wrong in zip(labels, wrong, strict=True) for _ in range(3 if is_wrong else 1)]
    assert run.train_dataset[:]["label"].tolist() == expected
    assert json.loads((tmp_path / ERRORS).read_text()) == {"rows": errors} and [*tmp_path.iterdir()] == [
        tmp_path / ERRORS
    ]
    assert args.max_steps == 1 and run.state.global_step == 1 and run.method == "jtt"


def test_pairs_are_refused(tmp_path):
    args = small.config(tmp_path, JTTConfig)
    with pytest.raises(ValueError, match="jtt trains without pairs"):
        JTTTrainer(small.vit(), args, train_dataset=small.grouped(24), pair_dataset=small.pairs(4))


def test_a_first_model_without_an_error_is_said(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(JTTTrainer, "predict", None)  # the first training is not one of the two
    rows = small.grouped(16)
    labels = torch.as_tensor(rows[:]["label"])
    monkeypatch.setattr(
        IPGTrainer, "predict", lambda *_: type("Output", (), {"predictions": torch.eye(2)[labels].numpy()})
    )
    run = JTTTrainer(small.vit(), small.config(tmp_path, JTTConfig, max_steps=1), train_dataset=rows)
    run.train()
    assert run.method_facts == {"errors": 0, "rows": 16}
    assert any("makes no error" in record.getMessage() for record in caplog.records)


# ---- Recipes ----


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"first_steps": 0}, "first_steps=0"),
        ({"upweight": 0}, "upweight=0"),
        ({"upweight": 1.5}, "upweight"),
        ({"epochs": 1}, "'epochs'"),
        ({"objective": "group_dro"}, "objective='group_dro'"),
    ],
)
def test_settings_that_are_none(tmp_path, settings, expected):
    with pytest.raises(RecipeError, match=expected):
        parse_recipe(write(tmp_path, **{**TWICE, **settings}))


def test_settings_as_flags(tmp_path):
    recipe, args, _ = parse_recipe(write(tmp_path), ["--method=jtt", "--first_steps", "2", "--upweight", "3"])
    assert (type(args), args.first_steps, args.upweight, recipe.uses_pairs) == (JTTConfig, 2, 3, False)


def test_numbers_have_no_errors_to_count(tmp_path, capsys):
    settings = {"dataset": "stroke_mass", "num_pairs": None, "metric_for_best_model": "loss"}
    assert main(["train", "--config", write(tmp_path, **TWICE, **settings)]) == 2
    assert "ClassLabel" in capsys.readouterr().err
    assert not [*tmp_path.glob("out/checkpoint-*")] and not (tmp_path / "out" / "run.json").exists()


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    folder = tmp_path_factory.mktemp("twice")
    return folder, *train(folder, **TWICE)


def test_errors_of_a_first_model_are_repeated(tmp_path, twice):
    folder, record, weights = twice
    plain, without = train(tmp_path / "plain", method="erm", warmup_steps=2)
    facts = record["baseline"]
    errors = json.loads((folder / "out" / ERRORS).read_text())["rows"]
    assert facts == {"errors": len(errors), "rows": 997 + 2 * len(errors)} and 0 < len(errors) < 997
    assert record["method"] == "jtt" and record["data"]["train"] == facts["rows"]
    assert (record["settings"]["first_steps"], record["settings"]["upweight"]) == (1, 3)
    assert small.differences(weights, without) > 1e-5
    card = (folder / "out" / "README.md").read_text()
    assert f"The {len(errors)} training images that it got wrong stand 3 times" in card
    # repeated once it is the plain training, bit for bit: the first model leaves no trace
    once, same = train(tmp_path / "once", **{**TWICE, "upweight": 1})
    assert small.bit_equal(same, without) and once["baseline"]["rows"] == 997
    assert once["metrics"] == plain["metrics"]
    raw, same = train(tmp_path / "raw", **TWICE, preload=False, measure_test=False)
    assert raw["baseline"] == facts and small.differences(same, weights) < 1e-5


def test_a_resumed_run_has_the_rows_that_it_began_with(tmp_path, twice, monkeypatch):
    shutil.copytree(twice[0] / "out", tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    (tmp_path / "out" / "run.json").unlink()
    config = write(tmp_path, **TWICE)
    with monkeypatch.context() as without:
        without.setattr(JTTTrainer, "_first_errors", lambda *_: pytest.fail("a second first model"))
        assert main(["train", "--config", config, "--resume_from_checkpoint", "last"]) == 0
    assert small.bit_equal(load_file(tmp_path / "out" / "model.safetensors"), twice[2])
    assert record_of(tmp_path)["metrics"] == twice[1]["metrics"]
    # a new run finds its own errors
    (tmp_path / "out" / ERRORS).write_text('{"rows": []}')
    flags = ["--overwrite_output_dir", "true", "--measure_test", "false"]
    assert main(["train", "--config", config, *flags]) == 0
    assert record_of(tmp_path)["baseline"] == twice[1]["baseline"]
