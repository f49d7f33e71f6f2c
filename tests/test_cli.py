# SPDX-License-Identifier: Apache-2.0
"""The commands as a user gives them, on the real digits with a tiny network."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from small_runs import TINY
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from ipg_hf.baselines import METHODS
from ipg_hf.cli import main
from ipg_hf.data import LOADERS, load_digits
from ipg_hf.recipe import RecipeError, parse_recipe, parse_settings
from ipg_hf.run import RUN_FILES, train


def write(path, **changes):
    path.write_text(yaml.safe_dump({**TINY, **changes}))
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    config = write(folder / "recipe.yaml", output_dir=str(folder / "out"))
    assert main(["train", "--config", config, "--compare", "erm"]) == 0
    return folder


def test_train_leaves_a_model_a_record_a_card_and_a_figure(trained, capsys):
    record = json.loads((trained / "out" / "run.json").read_text())
    assert {"settings", "given", "seed", "metrics", "seconds", "versions", "commit", "hardware"} <= set(record)
    assert set(record["metrics"]) == {"validation", "test"}
    test = record["metrics"]["test"]
    assert {"accuracy", "worst_group_accuracy", "flip_rate", "divergence", "distance"} <= set(test)
    assert sum(value for key, value in test.items() if key.startswith("group_n/")) == len(LOADERS["digits"]().test)
    settings = record["settings"]
    assert settings["compare"] == "erm" and settings["model_config"]["patch_size"] == 8
    assert (
        settings["invariance_distance"] == "rationale_divergence" and settings["optim"] == "adamw_torch_fused"
    )  # not given
    assert {*record["given"]} == {*TINY, "compare"}
    assert (trained / "out" / "training_curves.png").read_bytes()[:4] == b"\x89PNG"
    erm = json.loads((trained / "out" / "erm" / "run.json").read_text())
    assert erm["method"] == "erm" and record["method"] == "ipg"
    pair_set = record["data"]["pair_sets"]["pairs"]
    assert record["data"]["train"] == 997 and pair_set["pairs"] == 40 and erm["data"]["pair_sets"] == {}
    assert record["about"]["title"] == "Coloured digits" and record["base_model"] is None
    card = (trained / "out" / "README.md").read_text()
    worst = [run["metrics"]["test"]["worst_group_accuracy"] for run in (record, erm)]
    assert f"| worst-group accuracy | {worst[0]:.3f} | {worst[1]:.3f} |" in card
    assert main(["card", str(trained / "out")]) == 0
    assert capsys.readouterr().out == card


def test_saved_model_is_an_ordinary_checkpoint(trained):
    model = AutoModelForImageClassification.from_pretrained(trained / "out")
    assert model.config.id2label == {0: "small", 1: "large"}
    image = LOADERS["digits"]().test[0]["image"]
    inputs = AutoImageProcessor.from_pretrained(trained / "out")(image, return_tensors="pt")
    with torch.no_grad():
        probabilities = model(**inputs).logits.softmax(-1)[0]
    answers = pipeline("image-classification", model=str(trained / "out"))(image)
    assert {answer["label"]: pytest.approx(answer["score"], abs=1e-6) for answer in answers} == {
        name: probabilities[index].item() for index, name in model.config.id2label.items()
    }


def test_evaluate_gives_the_test_metrics_of_the_record_again(trained, capsys):
    output = trained / "metrics.json"
    config = str(trained / "recipe.yaml")
    assert main(["evaluate", str(trained / "out"), "--config", config, "--output", str(output)]) == 0
    again = json.loads(output.read_text())["metrics"]
    recorded = json.loads((trained / "out" / "run.json").read_text())["metrics"]["test"]
    assert again == pytest.approx(recorded, abs=1e-6)
    assert "worst-group accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("objective", ["class_balanced", "reweight", "group_dro"])
def test_evaluate_reads_the_recipe_of_any_task_loss(trained, tmp_path, objective):
    """It has no training set, whose groups these losses count, and its loss is the plain mean."""
    output = tmp_path / "metrics.json"
    words = ["--config", str(trained / "recipe.yaml"), "--objective", objective, "--output", str(output)]
    assert main(["evaluate", str(trained / "out"), *words]) == 0
    recorded = json.loads((trained / "out" / "run.json").read_text())["metrics"]["test"]
    assert json.loads(output.read_text())["metrics"] == pytest.approx(recorded, abs=1e-6)


def test_the_plain_training_beside_it_differs_by_the_pairs_alone(trained):
    weights = [
        AutoModelForImageClassification.from_pretrained(trained / name).state_dict() for name in ("out", "out/erm")
    ]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    records = [json.loads((trained / name / "run.json").read_text()) for name in ("out", "out/erm")]
    differ = {name for name, value in records[0]["settings"].items() if records[1]["settings"][name] != value}
    assert differ == {"method", "compare"} and records[0]["settings"].keys() == records[1]["settings"].keys()


def test_another_run_is_not_overwritten(trained, capsys):
    before = (trained / "out" / "run.json").read_bytes()
    assert main(["train", "--config", str(trained / "recipe.yaml")]) == 2
    message = capsys.readouterr().err
    assert "--overwrite_output_dir true" in message and str(trained / "out") in message
    assert (trained / "out" / "run.json").read_bytes() == before


def test_overwriting_on_demand_and_resuming(trained, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained / "out", out)
    # a folder without the trainer's state is a checkpoint whose saving was cut off
    (out / "checkpoint-9").mkdir()
    command = ["train", "--config", write(tmp_path / "recipe.yaml", output_dir=str(out), measure_test=False)]
    command += ["--seed", "2", "--lr_scheduler_type", "constant"]
    assert main([*command, "--overwrite_output_dir", "true", "--max_steps", "3"]) == 0
    first = json.loads((out / "run.json").read_text())
    assert first["seed"] == 2 and first["steps"] == 3
    assert not any((out / name).exists() for name in ("checkpoint-6", "checkpoint-9", "erm"))
    (out / "checkpoint-9").mkdir()
    assert main([*command, "--resume_from_checkpoint", "last"]) == 0
    assert json.loads((out / "run.json").read_text())["steps"] == 6


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset": "files"},  # no data_dir
        {"dataset": "files", "data_dir": "nowhere"},
        {"num_pairs": 10**6},  # more than there are
        {"pairs": {"maker": "table"}},  # it lacks an argument
        {"model_type": None, "model_name_or_path": "nowhere"},
        {"model_config": {"image_size": 4}},  # the first forward fails
    ],
)
def test_a_run_that_cannot_begin_loses_nothing(trained, tmp_path, capsys, changes):
    out = tmp_path / "out"
    shutil.copytree(trained / "out", out)
    before = files_of(out)
    config = write(tmp_path / "recipe.yaml", output_dir=str(out), overwrite_output_dir=True, **changes)
    assert main(["train", "--config", config]) == 2
    assert before and files_of(out) == before
    assert capsys.readouterr().err.splitlines()[-1].startswith("ipg train: error: ")


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_run_writes_over_no_file_unasked(tmp_path, capsys, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    assert main(["train", "--config", write(tmp_path / "recipe.yaml", output_dir=str(tmp_path / "out"))]) == 2
    assert f"({name})" in capsys.readouterr().err
    assert files_of(tmp_path / "out") == {Path(name): b"mine"}


def test_the_files_that_a_run_writes_over_are_all_that_it_writes(trained):
    written = {path.name for path in (trained / "out").iterdir() if path.is_file()}
    assert "config.json" in written and written - {*RUN_FILES} == {"README.md"}


def test_an_output_folder_that_is_a_file(tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert main(["train", "--config", write(tmp_path / "recipe.yaml", output_dir=str(tmp_path / "out"))]) == 2
    assert "output_dir=" in capsys.readouterr().err and (tmp_path / "out").read_text() == "mine"


def test_overwriting_removes_a_run_and_nothing_else(trained, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained / "out", out)
    shutil.rmtree(out / "erm")
    mine = ["erm/notes.txt", "checkpoint-best/model.safetensors", "checkpoint-9.txt", "notes.txt", "data/config.json"]
    for name in mine:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(name)
    config = write(tmp_path / "recipe.yaml", output_dir=str(out), measure_test=False, max_steps=2, save_steps=2)
    assert main(["train", "--config", config, "--eval_steps", "2", "--overwrite_output_dir", "true"]) == 0
    assert [(out / name).read_text() for name in mine] == mine
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-best", "checkpoint-9.txt"}


def test_going_on_from_another_folders_checkpoint_replaces_no_run(trained, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(trained / "out", out)
    before = files_of(out)
    config = write(tmp_path / "recipe.yaml", output_dir=str(out))
    for checkpoint, said in ((trained / "out" / "checkpoint-3", "another run"), ("checkpoint-3", "is no folder")):
        assert main(["train", "--config", config, "--resume_from_checkpoint", str(checkpoint)]) == 2
        assert said in capsys.readouterr().err
    assert files_of(out) == before


def test_the_plain_training_beside_it_is_resumed_too(trained, tmp_path):
    shutil.copytree(trained / "out", tmp_path / "out")
    before = json.loads((tmp_path / "out" / "erm" / "run.json").read_text())
    shutil.rmtree(tmp_path / "out" / "erm" / "checkpoint-6")
    (tmp_path / "out" / "erm" / "run.json").unlink()
    begun = (tmp_path / "out" / "erm" / "checkpoint-3" / "trainer_state.json").stat().st_mtime_ns
    arguments = ["--output_dir", str(tmp_path / "out"), "--compare", "erm", "--resume_from_checkpoint", "last"]
    assert main(["train", "--config", str(trained / "recipe.yaml"), *arguments]) == 0
    after = json.loads((tmp_path / "out" / "erm" / "run.json").read_text())
    assert after["metrics"] == before["metrics"]
    assert (tmp_path / "out" / "erm" / "checkpoint-3" / "trainer_state.json").stat().st_mtime_ns == begun


@pytest.mark.parametrize("command", ["train", "evaluate", "pairs"])
def test_help_lists_every_setting(capsys, command):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert all(f"--{name} " in shown for name in ("alpha", "freeze_norm", "dataset", "compare", "random_flip"))
    # of transformers' own settings that which has another default
    assert "--warmup_steps" in shown and "share of all. [0.1]" in shown and "--learning_rate" not in shown


def test_resume_without_a_checkpoint(tmp_path, capsys):
    config = write(tmp_path / "recipe.yaml", output_dir=str(tmp_path / "out"))
    assert main(["train", "--config", config, "--resume_from_checkpoint", "last"]) == 2
    assert "No valid checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "flags", "expected"),
    [
        ({"alhpa": 1}, [], ["alhpa", "'alpha'"]),
        ({}, ["--learning_rat", "1"], ["--learning_rat", "'learning_rate'"]),
        ({"alpha": "big"}, [], ["alpha", "big"]),
        ({"max_steps": 1.5}, [], ["max_steps", "1.5"]),
        ({"max_steps": [1, 2]}, [], ["2"]),
        ({"alpha": float("nan")}, [], ["alpha", "nan"]),
        ({"alpha": -1}, [], ["alpha=-1.0"]),
        ({"invariance_threshold": -1}, [], ["invariance_threshold=-1.0"]),
        ({"rationale_reduction": "middle"}, [], ["middle", "'mean'"]),
        ({"method": "klo"}, [], ["klo", "'kl'"]),
        ({"method": "kl", "objective": "dro"}, [], ["dro", "group_dro"]),
        # a setting of other methods
        ({"rank": 3}, [], ["method='ipg' has no such setting", "method project"]),
        ({"method": "kl", "upweight": 3}, [], ["upweight", "method='kl'", "method jtt"]),
        (
            {},
            ["--method", "dfr", "--pair_penalty_weight", "3"],
            ["pair_penalty_weight", "method='dfr'", "method kl or "],
        ),
        # a setting that the method's name fixes
        ({"method": "kl", "pair_objective": "kl"}, [], ["method='kl' sets pair_objective='kl' itself"]),
        ({"method": "irm", "objective": "irm"}, [], ["method='irm' sets objective='irm' itself"]),
        ({"dataset": "digit"}, [], ["digit", "'digits'"]),
        ({"model_type": "vitt"}, [], ["vitt", "'vit'"]),
        ({"model_config": {"hiden_size": 3}}, [], ["hiden_size", "hidden_size"]),
        ({"model_name_or_path": "x"}, [], ["model_name_or_path", "model_type"]),
        ({"num_pairs": 10**6}, [], ["1000000"]),
        ({}, ["--model_config", "{no json"], ["model_config", "no json"]),
        ({}, ["--dataset", "colored_mnist", "--data_dir", "nowhere"], ["nowhere"]),
    ],
)
def test_mistakes_are_named_before_anything_is_written(tmp_path, capsys, changes, flags, expected):
    config = write(tmp_path / "recipe.yaml", output_dir=str(tmp_path / "out"), **changes)
    assert main(["train", "--config", config, *flags]) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in expected), message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "expected"), [(None, "no such file"), ("- a\n- b\n", "mapping"), ("a: [", "not YAML")]
)
def test_files_that_are_no_recipe(tmp_path, text, expected):
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RecipeError, match=expected):
        parse_recipe(str(path))


def test_flags_win_over_the_file_and_what_is_given_is_recorded(tmp_path):
    config = write(tmp_path / "recipe.yaml", alpha=3, output_dir="x")
    recipe, args, given = parse_recipe(config, ["--alpha", "0.25", "--oriented_pairs", "false"])
    assert args.alpha == 0.25 and recipe.oriented_pairs is False and args.learning_rate == 1e-3
    assert {*given} == {*TINY, "alpha", "oriented_pairs", "output_dir"}


def test_a_method_names_its_trainer_and_its_fixed_settings():
    for name, method in METHODS.items():
        recipe, args, given = parse_settings({"method": name}, title="recipe.yaml")
        assert type(args) is method.config and given == ["method"]
        assert {key: getattr(args, key) for key in method.settings} == dict(method.settings)
        assert recipe.uses_pairs == (name not in ("erm", "irm", "vrex", "dfr", "jtt"))
    # a flag wins over the file, and brings its own settings
    _, args, _ = parse_settings(
        {"method": "ipg"}, ["--method", "kl", "--pair_penalty_weight", "3"], title="recipe.yaml"
    )
    assert (args.pair_objective, args.pair_penalty_weight) == ("kl", 3.0)


def test_a_baseline_is_trained_beside_plain_training_and_evaluated_as_any_model(tmp_path):
    """The plain training and the evaluation have nothing of V-REx: an evaluation has no environments."""
    folder = tmp_path / "out"
    recipe = {**TINY, "method": "vrex", "environment_penalty_weight": 100, "compare": "erm", "output_dir": str(folder)}
    data = load_digits(seed=42)
    data = replace(data, train=data.train.add_column("environment", [row % 2 for row in range(len(data.train))]))
    train(*parse_settings(recipe, title="recipe.yaml"), data=data)
    vrex, erm = (json.loads((path / "run.json").read_text()) for path in (folder, folder / "erm"))
    assert (vrex["method"], erm["method"]) == ("vrex", "erm")
    assert (vrex["settings"]["objective"], erm["settings"]["objective"]) == ("vrex", "erm")
    assert "environment_penalty_weight" not in erm["settings"]
    weights = [AutoModelForImageClassification.from_pretrained(path).state_dict() for path in (folder, folder / "erm")]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    plain = {**TINY, "method": "erm", "output_dir": str(tmp_path / "erm")}
    expected = train(*parse_settings(plain, title="recipe.yaml"), data=data)
    assert erm["metrics"] == expected["metrics"]
    config = write(tmp_path / "recipe.yaml", method="vrex", environment_penalty_weight=100)
    assert main(["evaluate", str(folder), "--config", config, "--output", str(tmp_path / "metrics.json")]) == 0
    again = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    assert again == pytest.approx(vrex["metrics"]["test"], abs=1e-6)


def test_channels_last_is_another_layout_of_the_same_training(tmp_path):
    small = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    resnet = {
        "model_type": "resnet",
        "model_config": small,
        "freeze_norm": True,
        "optim": "sgd",
        "max_steps": 3,
        "measure_test": False,
    }
    saved = {}
    for is_last in (True, False):
        folder = tmp_path / str(is_last)
        config = write(tmp_path / "recipe.yaml", **resnet, channels_last=is_last, output_dir=str(folder))
        recipe, args, _ = parse_recipe(config)
        torch.manual_seed(args.seed)
        model = recipe.build_model(recipe.load_data(args.data_order_seed).train)
        first = {name: value.contiguous() for name, value in model.state_dict().items()}
        layouts = {
            layer.weight.is_contiguous(memory_format=torch.channels_last)
            for layer in model.modules()
            if isinstance(layer, torch.nn.Conv2d) and layer.kernel_size != (1, 1)
        }
        assert layouts == {is_last}
        assert main(["train", "--config", config]) == 0
        saved[is_last] = AutoModelForImageClassification.from_pretrained(folder).state_dict()
    moved = [name for name, value in saved[True].items() if (value - first[name]).abs().max() > 1e-4]
    assert moved
    for name, value in saved[True].items():
        torch.testing.assert_close(value, saved[False][name], rtol=1e-4, atol=1e-6, msg=name)


def test_evaluate_refuses_a_model_of_other_labels(trained, tmp_path, capsys):
    model = AutoModelForImageClassification.from_pretrained(trained / "out", num_labels=3, ignore_mismatched_sizes=True)
    model.save_pretrained(tmp_path / "three")
    assert main(["evaluate", str(tmp_path / "three"), "--config", str(trained / "recipe.yaml")]) == 2
    assert "3 labels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "None")],
)
def test_waiting_threads_spin_little_unless_the_user_says_otherwise(given, expected):
    # torch reads the variable when it is imported, with the commands: what it is just before
    code = (
        "import os, sys\nfrom ipg_hf.cli import main\n"
        "class Look:\n    def find_spec(self, name, *rest):\n"
        "        name == 'ipg_hf.commands' and (print(os.environ.get('GOMP_SPINCOUNT')), os._exit(0))\n"
        "sys.meta_path.insert(0, Look())\nmain(['heads'])"
    )
    environment = {name: v for name, v in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-u", "-c", code], env=environment | given, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == expected


def test_an_interrupt_of_the_imports_is_one_line():
    code = (
        "import runpy, sys\nclass Stop:\n    def find_spec(self, name, *rest):\n"
        "        if name == 'torch':\n            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Stop())\nsys.argv = ['ipg', 'heads']\n"
        "runpy.run_module('ipg_hf.cli', run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130 and done.stderr == "\nipg heads: interrupted.\n"
