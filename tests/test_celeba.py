# SPDX-License-Identifier: Apache-2.0
"""CelebA, on synthetic images in the three layouts of its files, and as the Hub set."""

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
from ipg_hf.data import load_celeba

SPLITS = ("train", "validation", "test")
GROUPS = {"train": (6, 5, 4, 2), "validation": (2, 1, 2, 1), "test": (2, 2, 1, 1)}
ATTRIBUTES = ("5_o_Clock_Shadow", "Blond_Hair", "Blurry", "Male", "Young")
SIZE = (18, 22)
RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def faces():
    """Name, split and attributes (-1 or 1) of each image. The splits are mixed, so the order matters."""
    rows = []
    for split, counts in enumerate(GROUPS.values()):
        for group, count in enumerate(counts):
            rows += [(split, group // 2, group % 2)] * count
    order = np.random.default_rng(0).permutation(len(rows))
    return [
        (f"{number + 1:06}.jpg", rows[i][0], [1, 2 * rows[i][1] - 1, -1, 2 * rows[i][2] - 1, -1])
        for number, i in enumerate(order)
    ]


def face(number):
    """An image whose red value is the number of the row."""
    return Image.new("RGB", SIZE, (number, 0, 0))


def write_csv(folder, images="img_align_celeba"):
    """Writes the layout of Kaggle."""
    attributes = [",".join(["image_id", *ATTRIBUTES])]
    partition = ["image_id,partition"]
    (folder / images).mkdir(parents=True)
    for number, (name, split, values) in enumerate(faces()):
        attributes.append(",".join([name, *map(str, values)]))
        partition.append(f"{name},{split}")
        face(number).save(folder / images / name, "PNG")
    (folder / "list_attr_celeba.csv").write_text("\n".join(attributes) + "\n")
    (folder / "list_eval_partition.csv").write_text("\n".join(partition) + "\n")
    return folder


def write_txt(folder):
    """Writes the layout of the authors' page: blanks between the values, the number of images before the names."""
    rows = faces()
    attributes = [str(len(rows)), " ".join(ATTRIBUTES) + " "]
    (folder / "Img/img_align_celeba").mkdir(parents=True)
    for number, (name, _, values) in enumerate(rows):
        attributes.append(f"{name} " + " ".join(f"{value:2}" for value in values))
        face(number).save(folder / "Img/img_align_celeba" / name, "PNG")
    (folder / "Anno").mkdir()
    (folder / "Eval").mkdir()
    (folder / "Anno/list_attr_celeba.txt").write_text("\n".join(attributes) + "\n")
    lines = [f"{name} {split}" for name, split, _ in rows]
    (folder / "Eval/list_eval_partition.txt").write_text("\n".join(lines) + "\n")
    return folder


def kaggle(folder):
    """Writes the layout of Kaggle as it is unpacked: the images are in two nested folders of the same name."""
    return write_csv(folder, images="img_align_celeba/img_align_celeba")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("celeba") / "celebA_v1.0").parent


def check(data):
    rows_of = {split: [row for row in faces() if row[1] == number] for number, split in enumerate(SPLITS)}
    numbers = {name: number for number, (name, _, _) in enumerate(faces())}
    for split in SPLITS:
        rows = getattr(data, split)
        assert rows.column_names == ["image", "label", "attribute"]
        assert rows.features["label"].names == ["not_blond", "blond"]
        assert rows.features["attribute"].names == ["female", "male"]
        assert [(row["label"], row["attribute"]) for row in rows] == [
            (int(values[1] == 1), int(values[3] == 1)) for _, _, values in rows_of[split]
        ]
        assert [image.getpixel((3, 3))[0] for image in rows["image"]] == [numbers[name] for name, *_ in rows_of[split]]
        groups = np.bincount(2 * np.array(rows["label"][:]) + rows["attribute"][:], minlength=4)
        assert groups.tolist() == list(GROUPS[split])
    assert (data.pairs, data.validation_pairs, data.test_pairs) == (None, None, None)


@pytest.mark.parametrize("write", [write_csv, write_txt, kaggle])
def test_celeba_reads_each_layout_of_its_files(tmp_path, write):
    check(load_celeba(data_dir=str(write(tmp_path / "here"))))


def test_celeba_reads_the_folder_of_the_environment_variable(folder, monkeypatch):
    monkeypatch.setenv("IPG_DATA", str(folder))
    check(load_celeba())
    check(load_celeba(data_dir=str(folder)))


def hub_set(tmp_path, monkeypatch, names=("train", "valid", "test"), **changes):
    """Writes the Hub set as Parquet files. Only the call that would download it is replaced."""
    features = {"image": datasets.Image(), "celeb_id": datasets.Value("int64")}
    features = datasets.Features({**features, **{name: datasets.Value("bool") for name in ATTRIBUTES}})
    files = {}
    for number, split in enumerate(names):
        rows = [(place, row) for place, row in enumerate(faces()) if row[1] == number]
        columns = {"image": [face(place) for place, _ in rows], "celeb_id": [place for place, _ in rows]}
        columns |= {name: [row[2][i] == 1 for _, row in rows] for i, name in enumerate(ATTRIBUTES)}
        files[split] = str(tmp_path / f"{split}.parquet")
        made = datasets.Dataset.from_dict(columns, features=features)
        made.rename_columns(changes).to_parquet(files[split])
    fetch = datasets.load_dataset
    fetched = {"flwrlabs/celeba": lambda: fetch("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))}
    monkeypatch.delenv("IPG_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", lambda name: fetched[name]())


def test_the_hub_set_gives_the_same_celeba(tmp_path, monkeypatch):
    hub_set(tmp_path, monkeypatch)
    check(load_celeba())


def test_a_hub_set_without_a_column_is_refused(tmp_path, monkeypatch):
    hub_set(tmp_path, monkeypatch, Male="male")
    with pytest.raises(ValueError, match=r"train of flwrlabs/celeba has no columns \['Male'\]"):
        load_celeba()


def test_a_hub_set_without_a_split_is_refused(tmp_path, monkeypatch):
    hub_set(tmp_path, monkeypatch, names=("train", "validation", "test"))
    with pytest.raises(ValueError, match=r"has no splits \['valid'\]"):
        load_celeba()


def test_missing_files_give_an_error_that_says_how_to_get_them(tmp_path, monkeypatch):
    # conftest.py sets HF_HUB_OFFLINE
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no list_attr_celeba\.csv or "):
        load_celeba(data_dir=str(tmp_path))
    monkeypatch.delenv("IPG_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"IPG_DATA is not set, and .* flwrlabs/celeba .*img_align_celeba"):
        load_celeba()


@pytest.mark.parametrize(
    ("file", "change", "error", "message"),
    [
        ("list_attr_celeba.csv", ("Blond_Hair", "Fair_Hair"), ValueError, r"no columns \['Blond_Hair'\]"),
        ("list_attr_celeba.csv", (".jpg,1,1,", ".jpg,1,0,"), ValueError, r"Blond_Hair of .* has the values \[0\]"),
        ("list_attr_celeba.csv", (".jpg,1,1,", ".jpg,1,yes,"), ValueError, "cut off or has no number"),
        ("list_attr_celeba.csv", ("000003.jpg", "000099.jpg"), ValueError, "do not name the same images"),
        ("list_eval_partition.csv", (".jpg,2", ".jpg,3"), ValueError, r"partition\.csv has the values \[3\]"),
        ("list_eval_partition.csv", (".jpg,2", ".jpg,1"), ValueError, "test of .* has no rows"),
        ("list_eval_partition.csv", ("partition", "part"), ValueError, r"no columns \['partition'\]"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path, file, change, error, message):
    path = write_csv(tmp_path / "here") / file
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change))
    with pytest.raises(error, match=message):
        load_celeba(data_dir=str(tmp_path / "here"))


def test_a_missing_image_or_table_is_named(tmp_path):
    here = write_csv(tmp_path / "here")
    (here / "img_align_celeba/000005.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of 29 images, the first 000005\.jpg"):
        load_celeba(data_dir=str(here))
    (here / "list_eval_partition.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"has none of list_eval_partition\.csv"):
        load_celeba(data_dir=str(here))


def test_the_recipes_of_celeba_run(folder, tmp_path):
    """They run for two steps, with a tiny network."""
    torch.manual_seed(0)
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}
    ResNetForImageClassification(ResNetConfig(**sizes)).save_pretrained(tmp_path / "tiny")
    ViTImageProcessor(size={"height": small.SIZE, "width": small.SIZE}).save_pretrained(tmp_path / "tiny")
    flags = ["--data_dir", str(folder), "--model_name_or_path", str(tmp_path / "tiny"), "--num_train_epochs", "2"]
    flags += ["--use_cpu", "true", "--dataloader_num_workers", "0", "--disable_tqdm", "true"]
    records = {}
    for name in ("ipg_resnet50", "ipg_paper_group_dro_resnet50", "erm_resnet50"):
        own = ["--config", str(RECIPES / f"celeba/{name}.yaml"), "--output_dir", str(tmp_path / name)]
        assert main(["train", *own, *flags]) == 0
        records[name] = json.loads((tmp_path / name / "run.json").read_text())
        assert records[name]["data"]["train"] == 17
        assert "group_accuracy/blond/male" in records[name]["metrics"]["test"]
        assert "flip_rate" not in records[name]["metrics"]["test"]
    # each label gives as many pairs as its smaller group has images: 5 and 2
    assert records["ipg_resnet50"]["data"]["pair_sets"]["pairs"]["pairs"] == 7
    paper = records["ipg_paper_group_dro_resnet50"]
    assert paper["data"] == records["ipg_resnet50"]["data"]
    assert paper["settings"]["objective"] == "group_dro"
    assert records["erm_resnet50"]["data"]["pair_sets"] == {}
