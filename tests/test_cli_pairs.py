# SPDX-License-Identifier: Apache-2.0
"""Recipes whose pairs are made, checked and shown: the commands as a user gives them."""

import json

import datasets
import pytest
from test_cli import write

from ipg_hf.cli import main
from ipg_hf.data import LOADERS
from ipg_hf.metrics import METRICS
from ipg_hf.recipe import Recipe


@pytest.fixture
def spoiled(tmp_path):
    data = LOADERS["digits"](num_pairs=40)
    rows = [data.pairs[number] for number in range(20)]
    for row in rows[:3]:
        row["image_b"] = row["image_a"]
    datasets.Dataset.from_list(rows, features=data.pairs.features).to_parquet(str(tmp_path / "pairs.parquet"))
    return {"maker": "table", "path": str(tmp_path / "pairs.parquet")}


def test_pairs_check_finds_errors_and_says_so_by_its_status(tmp_path, capsys, spoiled):
    config = write(tmp_path / "good.yaml", output_dir=str(tmp_path / "out"))
    assert main(["pairs", "check", "--config", config, "--output", str(tmp_path / "good.json")]) == 0
    assert {row["severity"] for row in json.loads((tmp_path / "good.json").read_text())["findings"]} == {"info"}
    config = write(tmp_path / "bad.yaml", output_dir=str(tmp_path / "out"), pairs=spoiled, num_pairs=None)
    assert main(["pairs", "check", "--config", config, "--output", str(tmp_path / "bad.json")]) == 1
    findings = json.loads((tmp_path / "bad.json").read_text())["findings"]
    assert [row["rows"] for row in findings if row["code"] == "sides-identical"] == [[0, 1, 2]]
    assert "[sides-identical]" in capsys.readouterr().out


def test_pairs_with_a_model(tmp_path, capsys):
    trained = tmp_path / "out"
    config = write(tmp_path / "recipe.yaml", output_dir=str(trained))
    assert main(["train", "--config", config]) == 0
    assert main(["pairs", "check", "--config", config, "--model", str(trained)]) == 0
    assert "[model-scores]" in capsys.readouterr().out
    assert (
        main(["pairs", "preview", "--config", config, "--model", str(trained), "--output", str(tmp_path / "x.html")])
        == 0
    )
    assert "divergence" in (tmp_path / "x.html").read_text()
    assert main(["pairs", "preview", "--config", config, "--output", str(tmp_path / "x.html")]) == 2
    assert "exists" in capsys.readouterr().err


MARKED = ["red-marked", "green-marked"]


def test_several_pair_sets_and_their_makers(tmp_path, capsys):
    makers = {
        "color": {"maker": "recolor", "change": "channels"},
        "mark": {"maker": "overlay", "overlay": "mark", "size": 0.1875, "attribute": "attribute", "present": MARKED},
    }
    folder = tmp_path / "out"
    config = write(tmp_path / "recipe.yaml", output_dir=str(folder), dataset="marked_digits", pairs=makers)
    assert main(["pairs", "preview", "--config", config, "--output", str(tmp_path / "page")]) == 0
    pages = [tmp_path / f"page-{name}.html" for name in ("color", "mark")]
    assert all(page.exists() for page in pages) and capsys.readouterr().out.split() == [*map(str, pages)]
    assert main(["train", "--config", config]) == 0
    test = json.loads((folder / "run.json").read_text())["metrics"]["test"]
    assert test["flip_rate"] == max(test["color/flip_rate"], test["mark/flip_rate"])
    assert main(["evaluate", str(folder), "--config", config]) == 0
    for change, match in (
        ({"pairs": {"maker": "recolour"}}, "recolor"),
        ({"pairs": {"maker": "recolor", "chance": 1}}, "change"),
        ({"pairs": {"maker": "table"}}, "path"),
        ({"pair_sets": ["colour"]}, "color"),
        ({"dataset_options": {"minority": 1}}, "no option"),
        ({"pairs": {"maker": "match", "match_on": "features"}}, "needs a model"),
    ):
        settings = {"output_dir": str(tmp_path / "o"), "dataset": "marked_digits", **change}
        assert main(["train", "--config", write(tmp_path / "wrong.yaml", **settings)]) == 2
        assert match in capsys.readouterr().err


@pytest.mark.parametrize("preload", [True, False])
def test_adversarial_pairs_by_a_recipe(tmp_path, capsys, preload):
    folder = tmp_path / "out"
    settings = {"pairs": {"maker": "adversarial", "steps": 1}, "preload": preload, "output_dir": str(folder)}
    config = write(tmp_path / "recipe.yaml", **settings)
    assert main(["train", "--config", config]) == 0
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert log[0]["ipg/adversarial_images"] == 16
    assert main(["pairs", "check", "--config", config]) == 2
    assert "no pairs before training" in capsys.readouterr().err


def test_a_regression_by_a_recipe(tmp_path, capsys):
    folder = tmp_path / "out"
    settings = {"metric_for_best_model": "worst_group_mae", "greater_is_better": False, "output_dir": str(folder)}
    config = write(tmp_path / "recipe.yaml", dataset="stroke_mass", **settings)
    assert main(["train", "--config", config, "--compare", "erm"]) == 0
    test = json.loads((folder / "run.json").read_text())["metrics"]["test"]
    assert {"mae", "worst_group_mae", "difference", "divergence"} <= set(test)
    assert "flip_rate" not in test and "accuracy" not in test
    assert METRICS["worst_group_mae"].title in capsys.readouterr().out
    assert main(["evaluate", str(folder), "--config", config]) == 0
    assert "above/green" in capsys.readouterr().out


def test_pairs_of_two_folders_to_the_end(tmp_path):
    data = LOADERS["digits"](num_pairs=40)
    for row in data.pairs:
        for side, color in (("a", "red"), ("b", "green")):
            path = tmp_path / color / ["small", "large"][row["label"]] / f"{row['source_id']}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            row[f"image_{side}"].save(path)
    makers = {"maker": "folders", "folder_a": str(tmp_path / "red"), "folder_b": str(tmp_path / "green")}
    config = write(tmp_path / "recipe.yaml", output_dir=str(tmp_path / "out"), pairs=makers)
    assert main(["pairs", "check", "--config", config]) == 0
    assert main(["train", "--config", config]) == 0


def test_a_folder_of_ones_own_without_pairs(tmp_path, capsys):
    data = LOADERS["digits"](num_pairs=40)
    for split in ("train", "validation", "test"):
        getattr(data, split).select(range(60)).to_parquet(str(tmp_path / f"{split}.parquet"))
    settings = {"dataset": "files", "data_dir": str(tmp_path), "num_pairs": None, "output_dir": str(tmp_path / "out")}
    config = write(tmp_path / "recipe.yaml", **settings)
    assert main(["train", "--config", config]) == 2
    assert "no training pairs of its own" in capsys.readouterr().err
    config = write(tmp_path / "recipe.yaml", **settings, pairs={"maker": "recolor", "change": "channels"})
    assert main(["train", "--config", config]) == 0
    metrics = json.loads((tmp_path / "out/run.json").read_text())["metrics"]
    # the images of validation and test give held-out pairs by the same edit
    assert all({"flip_rate", "pair_accuracy"} <= {*metrics[split]} for split in ("validation", "test"))
    assert main(["evaluate", str(tmp_path / "out"), "--config", config, "--report", str(tmp_path / "audit")]) == 0
    report = json.loads((tmp_path / "audit" / "report.json").read_text())
    assert report["models"][0]["pairs"]["pairs"]["n"] == 60
    assert report["models"][0]["pairs"]["pairs"]["flip_rate"] == metrics["test"]["flip_rate"]


def test_an_edit_makes_held_out_pairs_of_each_splits_own_images_where_none_are_given(tmp_path):
    data = LOADERS["digits"]()
    for split in ("train", "validation", "test"):
        images = getattr(data, split).select(range(30)).remove_columns("attribute")
        images.to_parquet(str(tmp_path / f"{split}.parquet"))
    color, mark = {"maker": "recolor", "change": "gray"}, {"maker": "overlay", "overlay": "mark", "num_pairs": 7}

    def load(pairs, **kwargs):
        return Recipe(dataset="files", data_dir=str(tmp_path), pairs=pairs).load_data(0, **kwargs)

    loaded = load(mark)
    assert len(loaded.pairs) == 7 and len(loaded.validation_pairs) == len(loaded.test_pairs) == 30
    for split in ("validation", "test"):
        images, pairs = getattr(loaded, split), getattr(loaded, f"{split}_pairs")
        assert all(a["image"].tobytes() == b["image_a"].tobytes() for a, b in zip(images, pairs, strict=True))
        assert images["label"][:] == pairs["label"][:]
    assert set(load({"color": color, "mark": mark}).test_pairs) == {"color", "mark"}
    assert load(mark, held_out=()).test_pairs is None and load(mark, held_out=("test",)).validation_pairs is None
    assert load(mark, with_pairs=False).pairs is None
    # no edit of one image; a column that the split lacks; pairs of the benchmark
    assert load({"maker": "adversarial"}).test_pairs is None
    with pytest.raises(ValueError, match="'attribute'"):
        load({**mark, "attribute": "attribute"})
    own = Recipe(dataset="digits", pairs=color).load_data(0).test_pairs
    assert [pair["image_b"].tobytes() for pair in own] == [pair["image_b"].tobytes() for pair in data.test_pairs]


@pytest.mark.parametrize("left", [0, 7])
def test_images_that_an_edit_does_not_change_make_no_held_out_pairs(tmp_path, caplog, left):
    """Grey images and images that have the overlay already: they are counted, and stop no training."""
    data = LOADERS["digits"]()
    for split in ("train", "validation", "test"):
        images = getattr(data, split).select(range(30))
        if split == "test":
            spoiled = [
                {**row, "image": row["image"] if number < left else row["image"].convert("L").convert("RGB")}
                for number, row in enumerate(images)
            ]
            images = datasets.Dataset.from_list(spoiled, features=images.features)
        images.to_parquet(str(tmp_path / f"{split}.parquet"))

    def load(pairs):
        caplog.clear()
        return Recipe(dataset="files", data_dir=str(tmp_path), pairs=pairs).load_data(0)

    loaded = load({"maker": "recolor", "change": "channels"})
    assert len(loaded.pairs) == len(loaded.validation_pairs) == 30
    assert caplog.text.count(f"{30 - left} of 30 images make no pair: the edit does not change them.") == 1
    assert caplog.text.count("pairs: maker recolor changes no image of test") == (left == 0)
    assert loaded.test_pairs["source_id"][:] == [*range(left)] if left else loaded.test_pairs is None

    mark = {"maker": "overlay", "overlay": "mark", "attribute": "attribute", "present": "red"}
    with_mark = datasets.concatenate_datasets([data.test.select(range(200))])
    red = with_mark.features["attribute"].str2int("red")
    with_mark.filter(lambda value: value == red, input_columns="attribute").to_parquet(str(tmp_path / "test.parquet"))
    loaded = load({"mark": mark})
    assert loaded.test_pairs is None and len(loaded.validation_pairs["mark"])
    assert caplog.text.count("pairs['mark']: maker overlay changes no image of test") == 1
