# SPDX-License-Identifier: Apache-2.0
"""Waterbirds, on synthetic images in the layout of WILDS' folder, CUB's masks, Places and the Hub set; and Scenes."""

import csv
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import small
import torch
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from ipg_hf.cli import main
from ipg_hf.data import load_scenes, load_waterbirds, waterbirds

SPLITS = ("train", "validation", "test")
GROUPS = {"train": (8, 2, 2, 6), "validation": (2, 2, 2, 2), "test": (3, 3, 2, 2)}
BOX = (10, 12, 22, 20)  # of a bird, in every image
CATEGORIES = ("b/bamboo_forest", "f/forest/broadleaf", "o/ocean", "l/lake/natural")
PHOTOS = 8  # of each category
RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def write(image, path):
    """Writes a PNG under any name, so the pixels do not change."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "PNG")


def scene_color(category, number):
    return (10 + category, 20 + number, 30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Writes images of two sizes. Birds are rectangles whose green value is the number of the row."""
    root = tmp_path_factory.mktemp("waterbirds")
    rows, used = [], [0] * 4
    for split, counts in enumerate(GROUPS.values()):
        for group, count in enumerate(counts):
            for _ in range(count):
                number, place = len(rows), group % 2
                category = 2 * place + number % 2
                taken = f"/{CATEGORIES[category]}/{used[category] % 2}.jpg" if split else "/x/elsewhere/0.jpg"
                used[category] += bool(split)
                name = f"{number % 3:03}.Some_Bird/Some_Bird_{number:04}.jpg"
                row = {"img_id": number + 1, "img_filename": name, "y": group // 2, "split": split, "place": place}
                rows.append({**row, "place_filename": taken})
    order = np.random.default_rng(0).permutation(len(rows))  # splits are mixed, as in the real table
    for row in rows:
        number = row["img_id"] - 1
        image = Image.new("RGB", (40, 30) if number % 2 else (30, 40), (200, 10 * row["place"], 0))
        image.paste((90, number, 0), BOX)
        write(image, root / "waterbirds_v1.0" / row["img_filename"])
        mask = Image.new("L", image.size)
        mask.paste(255, BOX)
        write(mask, root / "segmentations" / Path(row["img_filename"]).with_suffix(".png"))
    with open(root / "waterbirds_v1.0" / "metadata.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows[i] for i in order)
    for category, name in enumerate(CATEGORIES):
        for number in range(PHOTOS):
            write(Image.new("RGB", (25, 50), scene_color(category, number)), root / "places" / name / f"{number}.jpg")
    return root


@pytest.fixture(scope="module")
def composed(folder):
    return load(folder, segmentations_dir=str(folder / "segmentations"), places_dir=str(folder / "places"))


def load(folder, **options):
    return load_waterbirds(data_dir=str(folder), **options)


def groups(rows):
    return np.bincount(2 * np.array(rows["label"][:]) + rows["attribute"][:], minlength=4).tolist()


def test_waterbirds_reads_the_folder_of_wilds(folder):
    data = load(folder)
    for split in SPLITS:
        rows = getattr(data, split)
        assert rows.column_names == ["image", "label", "attribute"]
        assert rows.features["label"].names == ["landbird", "waterbird"]
        assert rows.features["attribute"].names == ["land", "water"]
        assert groups(rows) == list(GROUPS[split])
        for row in rows:  # the image belongs to the row: the colour around the bird encodes its place
            assert np.asarray(row["image"])[0, 0].tolist() == [200, 10 * row["attribute"], 0]
    assert (data.pairs, data.validation_pairs, data.test_pairs) == (None, None, None)
    assert groups(load(folder / "waterbirds_v1.0").train) == list(GROUPS["train"])


def test_waterbirds_reads_the_folder_of_the_environment_variable(folder, monkeypatch):
    monkeypatch.setenv("IPG_DATA", str(folder))
    assert groups(load_waterbirds().test) == list(GROUPS["test"])


@pytest.mark.parametrize("correlation", ["100", 100])
def test_correlation_100_leaves_out_the_minority_groups_of_training(folder, correlation):
    data = load(folder, correlation=correlation)
    assert groups(data.train) == [8, 0, 0, 6]
    assert groups(data.validation) == list(GROUPS["validation"])
    assert groups(data.test) == list(GROUPS["test"])


def bird_and_scene(image):
    """Returns the number of the bird, and the category and number of the scene. The image has nothing else."""
    pixels = np.asarray(image)
    inside = np.zeros(pixels.shape[:2], bool)
    inside[BOX[1] : BOX[3], BOX[0] : BOX[2]] = True
    birds, scenes = np.unique(pixels[inside], axis=0), np.unique(pixels[~inside], axis=0)
    assert len(birds) == len(scenes) == 1 and (birds[0, 0], birds[0, 2]) == (90, 0) and scenes[0, 2] == 30
    return int(birds[0, 1]), (int(scenes[0, 0]) - 10, int(scenes[0, 1]) - 20)


def test_a_pair_is_the_same_bird_on_both_places(folder, composed):
    seen = []
    for split, pairs in zip(SPLITS, (composed.pairs, composed.validation_pairs, composed.test_pairs), strict=True):
        rows = getattr(composed, split)
        assert len(pairs) == len(rows)
        assert pairs.features["attribute_a"].names == ["land", "water"]
        scenes = set()
        for pair in pairs:
            assert (pair["attribute_a"], pair["attribute_b"]) == (0, 1)
            source = rows[pair["source_id"]]
            assert pair["label"] == source["label"]
            assert pair["image_a"].size == pair["image_b"].size == source["image"].size
            (bird, land), (other, water) = (bird_and_scene(pair[f"image_{side}"]) for side in "ab")
            assert bird == other == np.asarray(source["image"])[BOX[1], BOX[0], 1]
            assert land[0] in (0, 1) and water[0] in (2, 3)
            scenes |= {land, water}
        seen.append(scenes)
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]
    # validation and test images use the first two photographs of each category
    assert min(number for scenes in seen for _, number in scenes) >= 2
    assert len(seen[0]) > 6


def test_photographs_that_the_table_does_not_name_may_be_backgrounds(folder, tmp_path, composed):
    """Negative control of the test above: without their names in the table, all photographs are in the pool."""
    table = (folder / "waterbirds_v1.0/metadata.csv").read_text()
    for category in CATEGORIES:
        table = table.replace(f"/{category}/", "/none/")
    changed = tmp_path / "waterbirds"
    changed.mkdir()
    for path in (folder / "waterbirds_v1.0").iterdir():
        if path.is_dir():
            (changed / path.name).symlink_to(path)
    (changed / "metadata.csv").write_text(table)
    options = {"segmentations_dir": str(folder / "segmentations"), "places_dir": str(folder / "places")}
    pairs = load(changed, **options).pairs
    numbers = {bird_and_scene(image)[1][1] for side in "ab" for image in pairs[f"image_{side}"]}
    assert numbers & {0, 1}


def test_the_pairs_of_waterbirds_are_a_function_of_the_seed(folder, composed):
    options = {"segmentations_dir": str(folder / "segmentations"), "places_dir": str(folder / "places")}
    fewer = load(folder, num_pairs=5, oriented_pairs=False, correlation="100", **options)
    assert len(fewer.pairs) == 5 and sum(fewer.pairs["attribute_a"]) == 2
    for pair in fewer.pairs:
        source = fewer.train[pair["source_id"]]
        assert source["label"] == source["attribute"] == pair["label"]
        for side in "ab":
            bird, (category, _) = bird_and_scene(pair[f"image_{side}"])
            assert category // 2 == pair[f"attribute_{side}"]
            assert bird == np.asarray(source["image"])[BOX[1], BOX[0], 1]
    assert len(fewer.test_pairs) == len(fewer.test)
    again, other = (load(folder, seed=seed, **options) for seed in (0, 1))
    tables = [[np.asarray(image).tobytes() for image in data.pairs["image_a"]] for data in (composed, again, other)]
    assert tables[0] == tables[1] != tables[2]
    with pytest.raises(ValueError, match="num_pairs=99, but 18"):
        load(folder, num_pairs=99, **options)


def test_the_number_of_evaluation_pairs_has_a_limit(folder, monkeypatch):
    monkeypatch.setattr(waterbirds, "NUM_HELD_OUT_PAIRS", 3)
    options = {"segmentations_dir": str(folder / "segmentations"), "places_dir": str(folder / "places")}
    data = load(folder, **options)
    assert (len(data.pairs), len(data.validation_pairs), len(data.test_pairs)) == (18, 3, 3)


def test_backgrounds_may_be_photographs_of_your_own(folder, tmp_path):
    for kind, category in (("land", 0), ("water", 2)):
        for number in range(5):
            write(Image.new("RGB", (25, 50), scene_color(category, number)), tmp_path / kind / f"{number}.png")
    options = {"segmentations_dir": str(folder / "segmentations"), "places_dir": str(tmp_path)}
    pairs = load(folder, **options).pairs
    assert {bird_and_scene(image)[1][0] for image in pairs["image_b"]} == {2}
    (tmp_path / "land/0.png").unlink()
    (tmp_path / "land/1.png").unlink()
    with pytest.raises(ValueError, match="has 3 photographs of land"):
        load(folder, **options)


@pytest.fixture
def on_the_hub(folder, tmp_path, monkeypatch):
    """Writes the Hub set as Parquet files. Only the call that would download it is replaced."""
    plain = {"label": datasets.Value("int64"), "place": datasets.Value("int64"), "place_bird": datasets.Value("int64")}
    data, files = load(folder), {}
    for split in SPLITS:
        rows = getattr(data, split)
        columns = {"image": rows["image"][:], "label": rows["label"][:], "place": rows["attribute"][:]}
        columns["place_bird"] = [7] * len(rows)
        features = datasets.Features({"image": datasets.Image(), **plain})
        files[split] = str(tmp_path / f"{split}.parquet")
        datasets.Dataset.from_dict(columns, features=features).to_parquet(files[split])
    fetch, called = datasets.load_dataset, []

    def load_dataset(name):
        called.append(name)
        return fetch("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))

    monkeypatch.delenv("IPG_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return called, files


def test_the_hub_set_gives_the_same_waterbirds(folder, on_the_hub):
    hub, own = load_waterbirds(correlation="100"), load(folder, correlation="100")
    assert on_the_hub[0] == ["grodino/waterbirds"]
    for split in SPLITS:
        ours, theirs = getattr(own, split), getattr(hub, split)
        assert ours.features == theirs.features
        for name in ("label", "attribute"):
            assert ours[name][:] == theirs[name][:]
        for a, b in zip(ours["image"], theirs["image"], strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert hub.pairs is None
    with pytest.raises(ValueError, match="the Hub set does not have"):
        load_waterbirds(segmentations_dir="x", places_dir="y")


def test_a_hub_set_without_a_column_or_split_is_refused(on_the_hub):
    _, files = on_the_hub
    for file in files.values():
        datasets.Dataset.from_dict({"label": [0], "place": [1]}).to_parquet(file)
    with pytest.raises(ValueError, match=r"train of grodino/waterbirds has no columns \['image'\]"):
        load_waterbirds()
    del files["validation"]
    with pytest.raises(ValueError, match=r"no splits \['validation'\]"):
        load_waterbirds()


def test_missing_files_give_an_error_that_says_how_to_get_them(tmp_path, monkeypatch):
    # conftest.py sets HF_HUB_OFFLINE
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no metadata\.csv, and no folder waterbirds or "):
        load_waterbirds(data_dir=str(tmp_path))
    monkeypatch.delenv("IPG_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"IPG_DATA is not set, and .* grodino/waterbirds .*metadata\.csv"):
        load_waterbirds()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("place_filename", "background"), r"no columns \['place_filename'\]"),
        ((".jpg,0,", ".jpg,2,"), "label of train of .* has the values"),
        ((",0,0,/x", ",0,north,/x"), "place of .* is not a number"),
        ((",1,0,/", ",5,0,/"), r"split of .* has the values \[5\]"),
    ],
)
def test_a_damaged_table_is_refused(folder, tmp_path, change, message):
    text = (folder / "waterbirds_v1.0/metadata.csv").read_text()
    assert change[0] in text
    (tmp_path / "metadata.csv").write_text(text.replace(*change))
    for path in (folder / "waterbirds_v1.0").iterdir():
        if path.is_dir():
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_missing_files_are_named(folder, tmp_path):
    (tmp_path / "metadata.csv").write_text((folder / "waterbirds_v1.0/metadata.csv").read_text())
    with pytest.raises(FileNotFoundError, match=r"Some_Bird_\d+\.jpg is missing"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"Some_Bird_\d+\.png is missing"):
        load(folder, segmentations_dir=str(tmp_path), places_dir=str(folder / "places"))
    with pytest.raises(FileNotFoundError, match="neither a folder land nor Places365's b/bamboo_forest and f/forest"):
        load(folder, segmentations_dir=str(folder / "segmentations"), places_dir=str(tmp_path))
    for options in ({"segmentations_dir": "x"}, {"places_dir": "x"}):
        with pytest.raises(ValueError, match="Give both or none"):
            load(folder, **options)
    with pytest.raises(ValueError, match="correlation='90' is unknown"):
        load(folder, correlation="90")


# ---- The recipes, for two steps with a tiny network ----


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}
    ResNetForImageClassification(ResNetConfig(**sizes)).save_pretrained(path)
    ViTImageProcessor(size={"height": small.SIZE, "width": small.SIZE}).save_pretrained(path)
    return path


def run(recipe, out, data_dir, tiny, *more):
    flags = ["--data_dir", str(data_dir), "--model_name_or_path", str(tiny), "--output_dir", str(out)]
    flags += ["--num_train_epochs", "2", "--use_cpu", "true", "--dataloader_num_workers", "0", "--disable_tqdm", "true"]
    assert main(["train", "--config", str(RECIPES / recipe), *flags, *more]) == 0
    return json.loads((out / "run.json").read_text())


def test_the_recipes_of_waterbirds_run(folder, tmp_path, tiny):
    options = {"correlation": "100", "segmentations_dir": str(folder / "segmentations")}
    options = json.dumps({**options, "places_dir": str(folder / "places")})
    more = ["--dataset_options", options, "--num_pairs", "10"]
    exact = run("waterbirds/ipg_resnet50.yaml", tmp_path / "exact", folder, tiny, *more)
    assert exact["data"]["pair_sets"]["pairs"]["pairs"] == 10 and exact["data"]["train"] == 14
    assert "every training image" in exact["about"]["shortcut"]
    assert "flip_rate" in exact["metrics"]["test"]
    paper = run("waterbirds/ipg_paper_resnet50.yaml", tmp_path / "paper", folder, tiny, *more)
    assert paper["data"] == exact["data"] and paper["settings"]["invariance_distance"] == "rationale"
    matched = run("waterbirds/ipg_match_resnet50.yaml", tmp_path / "match", folder, tiny)
    assert matched["data"]["pair_sets"]["pairs"]["pairs"] == 4 and matched["data"]["train"] == 18
    plain = run("waterbirds/erm_resnet50.yaml", tmp_path / "erm", folder, tiny)
    assert plain["data"]["pair_sets"] == {} and plain["about"]["title"] == "Waterbirds without minority groups"


# ---- Scenes ----


def test_scenes_leave_out_the_minority_groups_of_training(tmp_path, monkeypatch):
    image, feature = (
        Image.new("RGB", (8, 8)),
        datasets.Features(
            {
                "image": datasets.Image(),
                "label": datasets.ClassLabel(names=["landbird", "waterbird"]),
                "place": datasets.ClassLabel(names=["land", "water"]),
                "aligned": datasets.Value("bool"),
                "fg_id": datasets.Value("string"),
            }
        ),
    )
    (tmp_path / "scenes/data").mkdir(parents=True)
    for split in SPLITS:
        columns = {"image": [image] * 8, "label": [0, 0, 1, 1] * 2, "place": [0, 1] * 4, "aligned": [1, 0, 0, 1] * 2}
        columns["fg_id"] = ["a", "a", "b", "b", "c", "c", "d", "d"]
        path = tmp_path / f"scenes/data/{split}-00000-of-00001.parquet"
        datasets.Dataset.from_dict(columns, features=feature).to_parquet(str(path))
    data = load_scenes(data_dir=str(tmp_path / "scenes"))
    assert (len(data.train), len(data.test_pairs), data.pairs) == (8, 4, None)
    monkeypatch.setenv("IPG_DATA", str(tmp_path))
    aligned = load_scenes(correlation="100")
    assert groups(aligned.train) == [2, 0, 0, 2] and len(aligned.test) == 8
    with pytest.raises(ValueError, match="correlation='50'"):
        load_scenes(correlation="50")


@pytest.mark.parametrize("given", [True, False])
def test_missing_scenes_give_an_error_that_names_waterbirds(tmp_path, monkeypatch, given):
    monkeypatch.delenv("IPG_DATA", raising=False)
    with pytest.raises(FileNotFoundError) as caught:
        load_scenes(data_dir=str(tmp_path) if given else None)
    assert "not for redistribution" in str(caught.value)
    assert "recipes/waterbirds/erm_resnet50.yaml" in str(caught.value)
    assert (RECIPES / "waterbirds/erm_resnet50.yaml").is_file()
