# SPDX-License-Identifier: Apache-2.0
"""Commands do no work that was not asked for, replace no file, lose no model, and say what is wrong in one line."""

import json
import os
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
import yaml
from PIL import Image
from small_runs import TINY

from ipg_hf import recipe, run
from ipg_hf.cli import main

SHORT = {**TINY, "max_steps": 2, "eval_steps": 2, "save_steps": 2, "logging_steps": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    assert main(["train", "--config", write(folder)]) == 0
    return folder


def write(folder, **changes):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**SHORT, "output_dir": str(folder / "out"), **changes}))
    return str(path)


def one_error(capsys):
    """The one line of an error on stderr, below what libraries print."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ipg ")]
    assert len(lines) == 1
    return lines[0]


def test_an_evaluation_and_a_plain_training_make_no_pairs(trained, tmp_path, monkeypatch):
    made, maker = [], recipe.MAKERS["recolor"]

    def counting(source, *, num_pairs=None, seed=0):
        made.append(num_pairs)
        return maker(source, num_pairs=num_pairs, seed=seed)

    monkeypatch.setitem(recipe.MAKERS, "recolor", counting)
    config = write(tmp_path, pairs={"maker": "recolor"})
    assert main(["evaluate", str(trained / "out"), "--config", config]) == 0
    assert main(["evaluate", str(trained / "out"), "--config", config, "--report", str(tmp_path / "report")]) == 0
    assert main(["train", "--config", config, "--method", "erm", "--measure_test", "false"]) == 0
    assert made == []
    flags = ["--output_dir", str(tmp_path / "ipg"), "--max_steps", "2", "--measure_test", "false"]
    assert main(["train", "--config", config, *flags]) == 0
    assert made == [40]


@pytest.mark.parametrize("command", ["evaluate", "check", "preview"])
def test_no_file_is_replaced(trained, tmp_path, capsys, monkeypatch, command):
    mine = tmp_path / "notes.v1.html"
    mine.write_text("mine")
    words = {
        "evaluate": ["evaluate", str(trained / "out"), "--output", str(mine)],
        "check": ["pairs", "check", "--output", str(mine)],
        "preview": ["pairs", "preview", "--output", str(mine)],
    }[command]
    monkeypatch.setattr(run, "load_trained", None)  # it is found out before any work
    monkeypatch.setattr("ipg_hf.commands.check_pairs", None)
    assert main([*words, "--config", str(trained / "recipe.yaml")]) == 2
    assert mine.read_text() == "mine"
    said = one_error(capsys)
    assert str(mine) in said and "--output" in said


def test_a_report_replaces_no_figure(trained, tmp_path, capsys):
    command = ["evaluate", str(trained / "out"), "--config", str(trained / "recipe.yaml"), "--report", str(tmp_path)]
    assert main(command) == 0
    figures = [*tmp_path.glob("*.png")]
    for path in tmp_path.iterdir():
        path.write_text("mine") if path in figures else path.unlink()
    assert figures and main(command) == 2
    said = one_error(capsys)
    assert any(str(path) in said for path in figures) and "another folder" in said
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in figures}
    assert all(path.read_text() == "mine" for path in figures)


def test_a_preview_keeps_the_dots_of_its_name(trained, tmp_path, capsys):
    config = str(trained / "recipe.yaml")
    assert main(["pairs", "preview", "--config", config, "--output", str(tmp_path / "run.lr0.01")]) == 0
    assert main(["pairs", "preview", "--config", config, "--output", str(tmp_path / "other.html")]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"run.lr0.01.html", "other.html"}


def test_the_model_is_saved_before_it_is_measured(trained, tmp_path, monkeypatch, capsys):
    measured = run._measure

    def unreadable(trainer, sets, split):
        if split == "test":
            raise OSError("row 3 of the test set (images/3.png): image file is truncated.")
        return measured(trainer, sets, split)

    monkeypatch.setattr(run, "_measure", unreadable)
    config = write(tmp_path)
    assert main(["train", "--config", config]) == 2
    said = one_error(capsys)
    assert "images/3.png" in said and f"saved in {tmp_path / 'out'}" in said
    assert not (tmp_path / "out" / "run.json").exists()
    monkeypatch.undo()
    assert main(["evaluate", str(tmp_path / "out"), "--config", config, "--output", str(tmp_path / "m.json")]) == 0
    expected = json.loads((trained / "out" / "run.json").read_text())["metrics"]["test"]
    assert json.loads((tmp_path / "m.json").read_text())["metrics"] == pytest.approx(expected, abs=1e-6)


def test_files_that_cannot_be_read_are_named_in_one_line(trained, tmp_path, capsys):
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("about: {title: größe}\n".encode("latin-1"))
    assert main(["train", "--config", str(latin)]) == 2
    assert str(latin) in one_error(capsys)
    damaged = tmp_path / "damaged"
    shutil.copytree(trained / "out", damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert main(["evaluate", str(damaged), "--config", str(trained / "recipe.yaml")]) == 2
    assert str(damaged) in one_error(capsys)
    (damaged / "run.json").write_text("{")
    assert main(["card", str(damaged)]) == 2
    assert str(damaged / "run.json") in one_error(capsys)
    table = tmp_path / "pairs.parquet"
    table.write_bytes(b"no parquet")
    config = write(tmp_path, pairs={"maker": "table", "path": str(table)})
    assert main(["pairs", "check", "--config", config]) == 2
    assert str(table) in one_error(capsys)


def test_pairs_choose_the_checkpoint_of_a_recipe(tmp_path):
    """By the held-out pairs of the benchmark; without any, by some of the training pairs, for plain training too."""
    settings = {"metric_for_best_model": "pair_accuracy", "measure_test": False, "preload": False}
    assert main(["train", "--config", write(tmp_path, **settings)]) == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["best_metric"] == record["metrics"]["validation"]["pair_accuracy"]
    assert record["data"]["pair_sets"]["pairs"]["pairs"] == 40
    for split in ("train", "validation", "test"):
        for label in ("small", "large"):
            for value in ("red", "green"):
                save_images(tmp_path / "files" / split / label / value, 6)
    files = {"dataset": "files", "data_dir": str(tmp_path / "files")}
    # an edit makes pairs of the validation images; of other makers' pairs, some are held out
    for pairs, count in (({"maker": "overlay"}, 20), ({"maker": "match", "match_on": "random"}, 8)):
        files |= {"pairs": pairs, "num_pairs": 20 if count == 20 else 10}
        own = tmp_path / pairs["maker"]
        config = write(tmp_path, **settings, **files, output_dir=str(own))
        assert main(["train", "--config", config, "--compare", "erm"]) == 0
        for folder in (own, own / "erm"):
            record = json.loads((folder / "run.json").read_text())
            assert 0 <= record["metrics"]["validation"]["pair_accuracy"] <= 1
        assert json.loads((own / "run.json").read_text())["data"]["pair_sets"]["pairs"]["pairs"] == count


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("learning_rate: 1e-3\nseed: 1\nlearning_rate: 1e-2\n", "'learning_rate' stands twice, again in line 3"),
        ("pairs:\n  maker: overlay\n  size: 0.2\n  maker: recolor\n", "'maker' stands twice, again in line 4"),
        ("1: 2\n", "the key 1 is no text"),
        ("? \n: 3\n", "the key None is no text"),
        ("dataset: digits\n\tseed: 1\n", "is not YAML"),
        ("- seed\n", "must be a mapping"),
    ],
)
def test_a_recipe_that_is_no_mapping_of_names_is_one_line(tmp_path, capsys, content, match):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    assert main(["train", "--config", str(path)]) == 2
    error = one_error(capsys)
    assert str(path) in error and match in error
    assert main(["train", "--config", str(tmp_path)]) == 2
    assert f"{tmp_path} is a folder" in one_error(capsys)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"dataset": "photos"}, "'photos' is a folder: set dataset: files and data_dir: photos"),
        ({"model_config": {"hidden_size": "wide"}}, "'hidden_size' expected int, got str"),
        (
            {"pairs": {"maker": "overlay", "size": "big"}},
            "size='big' is not valid: it must be a finite number above 0 up to 1",
        ),
        ({"deepspeed": "config.json"}, "deepspeed"),
        *([] if find_spec("wandb") else [({"report_to": "wandb"}, "wandb to be installed")]),
    ],
)
def test_a_setting_that_cannot_be_used_is_one_line(tmp_path, capsys, monkeypatch, changes, match):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    assert main(["train", "--config", write(tmp_path, **changes)]) == 2
    assert match in one_error(capsys)


def test_a_reader_that_has_seen_enough_is_no_error(trained, capsys, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        assert main(["card", str(trained / "out")]) == 1
        stdout.flush()  # as the interpreter does at its end
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command", ["train", "evaluate", "pairs", "heads", "card"])
def test_an_interrupt_speaks_of_checkpoints_only_where_there_are_some(trained, capsys, monkeypatch, command):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    names = {"heads": "show_heads", "card": "card_of"}
    monkeypatch.setattr(f"ipg_hf.commands.{names.get(command, command)}", interrupted)
    config = ["--config", str(trained / "recipe.yaml")]
    words = {"train": config, "evaluate": ["m", *config], "pairs": ["check", *config], "heads": ["m"], "card": ["m"]}
    assert main([command, *words[command]]) == 130
    assert ("--resume_from_checkpoint" in one_error(capsys)) == (command == "train")


def test_keys_of_a_recipe_may_be_merged(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("about: &base {title: a, license: b}\npairs: {<<: *base, title: c}\n")
    assert recipe.read_yaml(path)["pairs"] == {"title": "c", "license": "b"}


@pytest.mark.parametrize("where", ["evaluate", "check", "heads"])
@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "some/deep/path"])
def test_a_model_that_is_not_there_is_named(trained, capsys, monkeypatch, where, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = str(trained / "recipe.yaml")
    arguments = {
        "evaluate": ["evaluate", name, "--config", config],
        "check": ["pairs", "check", "--config", config, "--model", name],
        "heads": ["heads", name],
    }
    assert main(arguments[where]) == 2
    error = one_error(capsys)
    assert name in error and "no folder here" in error


def test_a_report_in_place_of_a_file_is_refused_before_any_work(trained, tmp_path, capsys, monkeypatch):
    (tmp_path / "mine").write_text("mine")
    monkeypatch.setattr(recipe.Recipe, "load_data", None)  # any work would fail
    for folder in ("mine", "mine/report"):
        command = ["evaluate", str(trained / "out"), "--config", write(tmp_path), "--report", str(tmp_path / folder)]
        assert main(command) == 2
        assert f"{tmp_path / 'mine'} is a file" in one_error(capsys)


def test_the_metrics_of_an_evaluation_go_to_a_new_folder(trained, tmp_path):
    output = tmp_path / "new" / "deep" / "metrics.json"
    config = str(trained / "recipe.yaml")
    assert main(["evaluate", str(trained / "out"), "--config", config, "--output", str(output)]) == 0
    assert json.loads(output.read_text())["metrics"]["accuracy"] >= 0


@pytest.mark.parametrize(
    ("metric", "match"),
    [
        ("worst_group_accuracy", "needs a column attribute"),
        ("eval_adjusted_accuracy", "needs a column attribute"),
        ("acuracy", "Did you mean 'accuracy'"),
        ("flip_rates", "Did you mean 'flip_rate'"),
        ("mae", "Measured: loss, accuracy, flip_rate"),
        ("difference", "Measured: loss, accuracy, flip_rate, pair_accuracy, divergence, distance."),
    ],
)
def test_a_metric_that_is_not_measured_cannot_choose_the_checkpoint(tmp_path, capsys, metric, match):
    for split in ("train", "validation", "test"):
        for label in ("small", "large"):
            save_images(tmp_path / "files" / split / label, 6)
    files = {"dataset": "files", "data_dir": str(tmp_path / "files"), "pairs": {"maker": "overlay"}, "num_pairs": 8}
    assert main(["train", "--config", write(tmp_path, **files, metric_for_best_model=metric)]) == 2
    error = one_error(capsys)
    assert metric in error and match in error
    assert not list((tmp_path / "out").glob("checkpoint*"))
    assert main(["train", "--config", write(tmp_path, **files, metric_for_best_model="flip_rate")]) == 0


def save_images(folder, count):
    folder.mkdir(parents=True)
    draws = np.random.default_rng(sum(map(ord, str(folder.parts[-3:]))))
    for number in range(count):
        Image.fromarray(draws.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")


CONVNEXT = {"model_type": "convnext", "model_config": {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}}


@pytest.mark.parametrize(
    ("network", "size"),
    [("ViT", (8, 8)), ("ViT", (20, 20)), ("ViT", (16, 12)), ("ConvNext", (8, 8)), ("ConvNext", (2, 40))],
)
def test_an_image_size_that_the_network_does_not_take(trained, tmp_path, capsys, network, size):
    settings = {"image_processor": {"size": dict(zip(("height", "width"), size, strict=True))}}
    shape = f"{network}ForImageClassification cannot run on images of 3×{size[0]}×{size[1]}"
    config = write(tmp_path, **settings, **(CONVNEXT if network == "ConvNext" else {}))
    assert main(["train", "--config", config]) == 2
    assert shape in one_error(capsys) and not (tmp_path / "out").exists()
    if network == "ViT":
        shutil.copytree(trained / "out", tmp_path / "model")
        saved = json.loads((tmp_path / "model/preprocessor_config.json").read_text())
        (tmp_path / "model/preprocessor_config.json").write_text(json.dumps(saved | settings["image_processor"]))
        assert main(["evaluate", str(tmp_path / "model"), "--config", config]) == 2
        assert shape in one_error(capsys)


@pytest.mark.parametrize("command", ["evaluate", "check", "preview"])
def test_a_file_where_the_folder_of_an_output_would_be(trained, tmp_path, capsys, command):
    (tmp_path / "file").write_text("mine")
    words = ["evaluate", str(trained / "out")] if command == "evaluate" else ["pairs", command]
    assert main([*words, "--config", write(tmp_path), "--output", str(tmp_path / "file" / "in" / "x")]) == 2
    assert "file is a file, and no folder for x" in one_error(capsys) and capsys.readouterr().out == ""
    assert (tmp_path / "file").read_text() == "mine"
