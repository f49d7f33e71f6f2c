# SPDX-License-Identifier: Apache-2.0
"""Records: every setting with its value, one line a run, nothing of the machine's folders."""

import json
import math
from dataclasses import fields

import pytest
import torch
from small import TINY_RECIPE
from transformers import Trainer, TrainingArguments

from ipg_hf.baselines import METHODS
from ipg_hf.config import IPGConfig
from ipg_hf.recipe import Recipe, parse_settings
from ipg_hf.record import (
    LATER,
    append_record,
    course,
    hardware,
    processor_name,
    read_json,
    read_records,
    resolved_settings,
    trainer_record,
    write_json,
)

# ---- Settings


def test_a_setting_that_a_record_is_older_than_has_the_value_of_before(tmp_path):
    path = tmp_path / "runs.jsonl"
    append_record(path, {"run": "a-seed0", "settings": {"seed": 0, "pair_loss_weight": 1.0}})
    (record,) = read_records(path)
    assert record["settings"] == {
        "seed": 0, "pair_loss_weight": 1.0, "layer_lr_decay": 1.0, "head_learning_rate": None, "extend_pairs": {},
    }  # fmt: skip
    append_record(path, {"run": "b-seed0", "settings": {"seed": 0}})
    assert read_records(path)[1]["settings"]["pair_loss_weight"] == 0.0 != IPGConfig.pair_loss_weight
    assert LATER["extend_pairs"] == resolved_settings(Recipe())["extend_pairs"]


def test_every_field_of_the_recipe_and_of_the_method_is_a_setting():
    """With the value that the run uses, whether it was given or is a default."""
    places = {"output_dir", "overwrite_output_dir", "data_dir", "preload_dir", "resume_from_checkpoint", "run_name"}
    unrelated = {"about", "local_rank", "do_train", "do_eval", "do_predict", "push_to_hub"}
    for method, entry in METHODS.items():
        recipe, args, _ = parse_settings({**TINY_RECIPE, "method": method, "output_dir": "x"}, title="")
        found = resolved_settings(recipe, args)
        known = {part.name for part in (*fields(Recipe), *fields(entry.config))} - places - unrelated
        known = {name for name in known if not name.startswith(("hub_", "trackio_"))}
        assert {*found} == known, {*found} ^ known
        assert found["method"] == method and found["optim"] == args.optim.value
        assert found["alpha"] == 1.0 and found["invariance_distance"] == "rationale_divergence"
        assert json.loads(json.dumps(found)) == found
    assert {"num_fits", "strengths"} <= {*resolved_settings(parse_settings({"method": "dfr"}, title="")[1])}


def test_a_record_names_no_folder_and_no_token(tmp_path):
    given = {
        "output_dir": str(tmp_path / "out"),
        "model_name_or_path": str(tmp_path / "secret/resnet"),
        "dataset_options": {"segmentations_dir": str(tmp_path / "secret/masks"), "parts": ["a", 2]},
        "hub_token": "hf_secret",
        "hub_model_id": "secret/model",
    }
    found = resolved_settings(*parse_settings(given, title="")[:2])
    text = json.dumps(found)
    assert "secret" not in text and str(tmp_path) not in text
    assert found["model_name_or_path"] == "resnet"
    assert found["dataset_options"] == {"segmentations_dir": "masks", "parts": ["a", 2]}


# ---- Files


def test_a_record_is_one_line_and_the_lines_before_stay(tmp_path):
    path = tmp_path / "records" / "tiny.jsonl"
    assert read_records(path) == []
    first, second = {"run": "a-seed0", "text": "two\nlines", "value": float("inf")}, {"run": "b-seed0"}
    append_record(path, first)
    before = path.read_bytes()
    append_record(path, second)
    assert path.read_bytes().startswith(before) and path.read_bytes().count(b"\n") == 2
    assert read_records(path) == [first, second]


def test_half_a_line_of_a_process_that_was_killed_is_not_read_and_goes(tmp_path):
    path = tmp_path / "tiny.jsonl"
    append_record(path, {"run": "a-seed0"})
    whole = path.read_bytes()
    for half in (b'{"run":"b-se', b'{"run":"b-seed0"}', b"{"):
        path.write_bytes(whole + half)
        assert [record["run"] for record in read_records(path)] == ["a-seed0"]
        append_record(path, {"run": "c-seed0"})
        assert [record["run"] for record in read_records(path)] == ["a-seed0", "c-seed0"]
    path.write_bytes(b'{"run":"a-se' + b"\n" + whole)
    with pytest.raises(ValueError, match=r"tiny\.jsonl, line 1 is not a record"):
        read_records(path)


# ---- What is kept of a training


def test_the_record_of_a_training_without_a_recipe(tmp_path):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 2)

        def forward(self, x, labels):
            logits = self.layer(x)
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    rows = [{"x": torch.ones(4) * n, "labels": n % 2} for n in range(8)]
    args = TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to="none", eval_strategy="steps", eval_steps=1
    )
    trainer = Trainer(Net(), args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    record = trainer_record(trainer)
    assert record["method"] == "erm" and record["given"] is None and record["steps"] == 2
    assert record["settings"] == resolved_settings(args) and record["settings"]["weight_decay"] == 0.0
    assert set(record["metrics"]["evaluation"]) == {"loss"}
    assert record["data"] == {"train": 8, "pair_sets": {}}


def test_the_course_of_a_training_is_short_and_keeps_its_ends():
    history = [
        {"step": step, "loss": 1.0, "ipg/divergence": 1 / step, "ipg/violated": 1.0, "ipg/spread": 2.0}
        for step in range(1, 1001)
    ]
    history += [{"step": 500, "eval_worst_group_accuracy": 0.123456}, {"step": 1000, "train_runtime": 3.0}]
    kept = course(history)
    guidance = kept["guidance"]
    assert set(guidance) == {"step", "divergence", "violated"} and len(guidance["step"]) == 50
    assert guidance["step"][0] == 1 and guidance["step"][-1] == 1000
    assert guidance["divergence"][-1] == 0.001 and guidance["divergence"][1] == float(f"{1 / guidance['step'][1]:.4g}")
    assert kept["validation"] == {"step": [500], "worst_group_accuracy": [0.1235]}
    assert course([{"step": 1, "loss": 1.0}]) == {}


def test_a_processor_as_linux_gives_it():
    first = "processor\t: 0\nvendor_id\t: X\ncpu family\t: 6\nmodel\t\t: 143\nmodel name\t: Xeon: Gold @ 2.1GHz\n"
    assert (
        processor_name(first + "\nprocessor\t: 1\nmodel name\t: Other\n") == "Xeon: Gold @ 2.1GHz, family 6, model 143"
    )
    assert processor_name("processor\t: 0\nBogoMIPS\t: 100\nCPU part\t: 0xd0c\n") == ""  # as ARM has it
    found = hardware()
    assert found["machine"] and found.get("cpu", "a, b").count(",") >= 1


def test_files_are_json_whose_numbers_are_read_again(tmp_path):
    def refuse(constant):
        raise AssertionError(f"bare {constant}")

    record = {
        "settings": {"max_loss_scale": math.inf, "betas": [0.9, math.inf]},
        "metrics": {"test": {"mae": -math.inf}},
    }
    record |= {"run": "Infinite", "seconds": 1.5, "about": None, "given": ["max_loss_scale"]}
    write_json(tmp_path / "run.json", record)
    for _ in range(2):
        append_record(tmp_path / "runs.jsonl", record)
    for text in ((tmp_path / "run.json").read_text(), *(tmp_path / "runs.jsonl").read_text().splitlines()):
        json.loads(text, parse_constant=refuse)
    read = read_records(tmp_path / "runs.jsonl")
    assert read_json(tmp_path / "run.json") == record
    assert read == [record | {"settings": LATER | record["settings"]}] * 2
    # a line of an earlier version has the bare word
    (tmp_path / "runs.jsonl").write_text('{"settings": {"max_loss_scale": Infinity}}\n')
    assert read_records(tmp_path / "runs.jsonl") == [{"settings": LATER | {"max_loss_scale": math.inf}}]
    write_json(tmp_path / "run.json", {"value": math.nan})
    assert math.isnan(read_json(tmp_path / "run.json")["value"])
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        read_json(tmp_path / "run.json")
