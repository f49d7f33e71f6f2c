# SPDX-License-Identifier: Apache-2.0
"""A user's own data: layouts of a folder, classes by name, missing splits, damaged images, sets on the Hub."""

import io
import itertools
import json
import logging

import datasets
import numpy as np
import pytest
from PIL import Image
from small import vit
from transformers import ViTConfig, ViTImageProcessor

from ipg_hf.cli import main
from ipg_hf.data import Benchmark, describe, files, load_files, load_hub
from ipg_hf.pairs import pairs_from_columns, pairs_from_folders, pairs_from_table
from ipg_hf.pairs.classes import order_of_base, order_of_model, sorted_names

SPLITS = ("train", "validation", "test")
NAMES = ("ant", "bee", "cow")


def picture(number=0, size=(12, 8), mode="RGB"):
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)).convert(mode)


def encoded(number=0, kind="PNG"):
    buffer = io.BytesIO()
    picture(number).save(buffer, kind)
    return buffer.getvalue()


def save(path, number=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(number).save(path)
    return path


def tree(root, groups, splits=SPLITS, count=3, suffix=".png"):
    """Images in split/group/, whose names are numbers; a group is a label or label/attribute."""
    number = itertools.count()
    for split in splits:
        for group in groups:
            for _ in range(count):
                save(root / split / group / f"{next(number)}{suffix}", 0)
    return str(root)


def table(labels, kind=None, **columns):
    rows = {"image": [{"bytes": encoded(n), "path": None} for n in range(len(labels))], "label": labels, **columns}
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    return dataset.cast_column("label", kind) if kind else dataset


def write_splits(root, **splits):
    for split, dataset in splits.items():
        dataset.to_parquet(str(root / f"{split}.parquet"))
    return str(root)


def named(dataset, column="label"):
    """The names of a column's values, row by row."""
    return [dataset.features[column].names[value] for value in dataset[column]]


@pytest.fixture
def warnings(monkeypatch):
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    monkeypatch.setattr(files.logger, "handlers", [handler])
    return messages


# ---- Classes by name ----


@pytest.mark.parametrize("order", itertools.permutations(NAMES))
@pytest.mark.parametrize("column", ["label", "attribute"])
def test_class_labels_of_any_order_are_numbered_as_in_training(tmp_path, order, column):
    values = {"label": [*NAMES] * 2, "attribute": [*NAMES] * 2}
    splits = {}
    for split in SPLITS:
        names = order if split == "test" else NAMES
        kind = datasets.ClassLabel(names=list(names))
        other = "attribute" if column == "label" else "label"
        dataset = table(["x", "y"] * 3).remove_columns("label")
        dataset = dataset.add_column(column, [names.index(value) for value in values[column]])
        splits[split] = dataset.cast_column(column, kind).add_column(other, ["x", "y"] * 3)
    data = load_files(data_dir=write_splits(tmp_path, **splits))
    for split in SPLITS:
        assert getattr(data, split).features[column].names == [*NAMES]
        assert named(getattr(data, split), column) == values[column]


@pytest.mark.parametrize("subset", [("ant",), ("bee", "cow"), ("cow", "ant")])
def test_a_split_without_some_classes_has_the_numbers_of_training(tmp_path, subset):
    tree(tmp_path, NAMES, ("train",))
    tree(tmp_path, subset, ("validation", "test"))
    data = load_files(data_dir=str(tmp_path))
    for split in SPLITS:
        assert getattr(data, split).features["label"].names == [*NAMES]
    assert set(named(data.test)) == {*subset}


def test_names_that_are_numbers_are_sorted_as_numbers(tmp_path):
    numbers = [str(number) for number in range(12)]
    data = load_files(data_dir=tree(tmp_path / "tree", numbers, count=1))
    assert data.test.features["label"].names == numbers
    whole = table([*range(12)], datasets.Value("int64"))
    data = load_files(data_dir=write_splits(tmp_path, train=whole, validation=whole, test=whole))
    assert data.test["label"][:] == [*range(12)]
    assert sorted_names(["10", "9", "-1", "2.5"]) == ["-1", "2.5", "9", "10"]
    assert sorted_names(["10", "9", "x"]) == ["10", "9", "x"]


@pytest.mark.parametrize(
    ("values", "names"),
    [([7, 3, 7, 3], ["3", "7"]), ([True, False] * 2, ["false", "true"]), (["b", "a"] * 2, ["a", "b"])],
)
def test_stored_types_of_classes(tmp_path, values, names):
    whole = table(values)
    data = load_files(data_dir=write_splits(tmp_path, train=whole, validation=whole.select([0]), test=whole))
    assert data.train.features["label"].names == data.validation.features["label"].names == names
    assert named(data.train) == [str(value).lower() for value in values]


def test_texts_and_class_labels_are_matched_by_name(tmp_path):
    texts, kind = table(["b", "a"]), datasets.ClassLabel(names=["b", "a"])
    splits = {"train": texts, "validation": texts, "test": table([0, 1], kind)}
    data = load_files(data_dir=write_splits(tmp_path, **splits))
    assert [named(getattr(data, split)) for split in SPLITS] == [["b", "a"]] * 3
    assert len({tuple(getattr(data, split).features["label"].names) for split in SPLITS}) == 1


def test_one_name_in_two_unicode_forms_is_one_class(tmp_path):
    composed, parts = "w\u00e4rme", "wa\u0308rme"
    tree(tmp_path, ["ant", composed], ["train"])
    tree(tmp_path, ["ant", parts], ["validation"])
    tree(tmp_path, [composed, parts, "ant"], ["test"], count=1)
    data = load_files(data_dir=str(tmp_path))
    assert data.label_names == ["ant", composed] and data.test["label"][:].count(1) == 2
    for order in (["ant", parts], [parts, "ant"]):
        config = ViTConfig(id2label=dict(enumerate(order)))
        assert order_of_model(data.label_names, config, "m")[order.index(parts)] == composed
    for side, name in (("a", composed), ("b", parts)):
        save(tmp_path / "sides" / side / f"{name}.png")
    assert len(pairs_from_folders(tmp_path / "sides/a", tmp_path / "sides/b")) == 1


@pytest.mark.parametrize("column", ["label", "attribute"])
@pytest.mark.parametrize("other", ["Ant", "ANT", "ant ", " ant"])
def test_names_that_look_alike_are_said(tmp_path, caplog, column, other):
    columns = {"label": ["ant", "bee", "ant"], "attribute": ["bee", "ant", "ant"]}
    columns[column] = ["ant", "bee", other]
    whole = table(columns["label"], attribute=columns["attribute"])
    load_files(data_dir=write_splits(tmp_path, train=whole, validation=whole, test=whole))
    alike = ", ".join(map(repr, sorted(["ant", other])))
    assert f"The names {alike} differ only in capitals or spaces" in caplog.text


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_label_that_training_lacks_is_refused(tmp_path, split):
    tree(tmp_path, NAMES[:2])
    save(tmp_path / split / "wasp" / "0.png")
    with pytest.raises(ValueError, match=rf"{split} of .* has the labels 'wasp', which train has not"):
        load_files(data_dir=str(tmp_path))


def test_an_attribute_that_training_lacks_gets_a_number_of_its_own(tmp_path):
    tree(tmp_path, ["a/red", "b/red", "a/teal", "b/teal"])
    save(tmp_path / "test" / "a" / "blue" / "0.png")
    data = load_files(data_dir=str(tmp_path))
    assert {tuple(getattr(data, split).features["attribute"].names) for split in SPLITS} == {("blue", "red", "teal")}
    assert set(named(data.train, "attribute")) == {"red", "teal"}


@pytest.mark.parametrize("column", ["label", "attribute"])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([None, "b", "a"], r"the {} of test of .* is missing in 1 of 3 rows, the first is row 0"),
        (["a", "", ""], r"the {} of test of .* is missing in 2 of 3 rows, the first is row 1"),
        ([["a"], ["b"], ["a"]], r"the {} of test of .* is a List"),
    ],
)
def test_values_that_are_no_classes_are_refused(tmp_path, column, values, message):
    good = table(["a", "b", "a"]).add_column("attribute", ["a", "b", "a"])
    bad = good.remove_columns(column).add_column(column, values)
    with pytest.raises(ValueError, match=message.format(column)):
        load_files(data_dir=write_splits(tmp_path, train=good, validation=good, test=bad))


def test_rows_without_a_class_are_refused(tmp_path):
    kind = datasets.ClassLabel(names=["a", "b"])
    good = table([0, 1], kind)
    with pytest.raises(ValueError, match=r"the label of test of .* is -1 in row 0 \(2 of 2 rows\)"):
        load_files(data_dir=write_splits(tmp_path, train=good, validation=good, test=table([-1, -1], kind)))
    one = table([0, 0], kind)
    with pytest.raises(ValueError, match="only the label 'a'"):
        load_files(data_dir=write_splits(tmp_path, train=one, validation=one, test=one))


def test_fractions_are_the_labels_of_a_regression(tmp_path):
    fractions, whole = table([0.25, 1.75, 3.25]), table([1, 2, 3])
    data = load_files(data_dir=write_splits(tmp_path, train=fractions, validation=whole, test=fractions))
    assert data.label_names is None
    assert data.train["label"][:] == [0.25, 1.75, 3.25]
    assert data.validation["label"][:] == [1.0, 2.0, 3.0]
    write_splits(tmp_path, test=table(["a", "b", "c"]))
    with pytest.raises(ValueError, match=r"the label of test of .* has names, but that of another split has fractions"):
        load_files(data_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"the attribute of train of .* has numbers like 0\.25"):
        attributes = table(["a", "b"]).add_column("attribute", [0.25, 1.0])
        load_files(data_dir=write_splits(tmp_path, train=attributes, validation=attributes, test=attributes))


def test_whole_numbers_stored_as_fractions_are_said_to_be_numbers(tmp_path, warnings):
    whole = table([0.0, 1.0])
    data = load_files(data_dir=write_splits(tmp_path, train=whole, validation=whole, test=whole))
    assert data.label_names is None
    assert "taken for numbers (a regression)" in warnings[0]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_classes_stored_as_fractions_in_another_split_are_classes(tmp_path, split):
    """A table with an empty cell writes its whole numbers as fractions; train says what the labels are."""
    splits = dict.fromkeys(SPLITS, table([3, 1])) | {split: table([1.0, 3.0])}
    data = load_files(data_dir=write_splits(tmp_path, **splits))
    assert data.label_names == ["1", "3"] and getattr(data, split)["label"][:] == [0, 1]
    write_splits(tmp_path, **{split: table([1.5, 3.0])})
    assert load_files(data_dir=str(tmp_path)).label_names is None


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), 0.5])
def test_numbers_that_are_no_groups(tmp_path, value):
    whole = table(["a", "b"]).add_column("attribute", [value, 1.0])
    with pytest.raises(ValueError, match=rf"the attribute of train of .* has numbers like {value}"):
        load_files(data_dir=write_splits(tmp_path, train=whole, validation=whole, test=whole))


# ---- The model's classes ----


def trained(folder, names):
    """A model that always says the first of its classes."""
    model = vit(
        len(names), id2label=dict(enumerate(names)), label2id={name: number for number, name in enumerate(names)}
    )
    model.classifier.weight.data.zero_()
    model.classifier.bias.data[:] = -model.classifier.bias.new_tensor(range(len(names)))
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def recipe(tmp_path):
    tree(tmp_path / "data", ["ant/x", "ant/y", "bee/x", "bee/y"])

    def write(**settings):
        settings = {"dataset": "files", "data_dir": str(tmp_path / "data"), **settings}
        settings |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
        (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
        return str(tmp_path / "recipe.yaml")

    return write


@pytest.mark.parametrize("names", itertools.permutations(("ant", "bee", "wasp")))
def test_a_model_is_measured_by_the_names_of_its_classes(tmp_path, recipe, names):
    model = trained(tmp_path / "model", names)
    assert main(["evaluate", model, "--config", recipe(), "--output", str(tmp_path / "out.json")]) == 0
    metrics = json.loads((tmp_path / "out.json").read_text())["metrics"]
    for name in ("ant", "bee"):
        assert metrics[f"group_accuracy/{name}/x"] == float(name == names[0])


@pytest.mark.parametrize("names", [("ant", "wasp"), ("fly", "wasp"), ("ant",)])
def test_a_model_of_other_classes_is_not_measured(tmp_path, recipe, capsys, names):
    model = trained(tmp_path / "model", names)
    assert main(["evaluate", model, "--config", recipe()]) == 2
    assert "but not the data's 'bee'" in capsys.readouterr().err.replace("'ant', 'bee'", "'bee'")


def test_training_goes_on_from_the_head_of_a_model_in_its_own_order(tmp_path, recipe):
    base = trained(tmp_path / "base", ["bee", "ant"])
    settings = {"method": "erm", "model_name_or_path": base, "max_steps": 1, "learning_rate": 1e-12}
    config = recipe(**settings, output_dir=str(tmp_path / "out"), save_strategy="no")
    assert main(["train", "--config", config]) == 0
    saved = ViTConfig.from_pretrained(tmp_path / "out")
    assert saved.id2label == {0: "bee", 1: "ant"}
    metrics = json.loads((tmp_path / "out/run.json").read_text())["metrics"]["test"]
    assert metrics["group_accuracy/bee/x"] == 1 and metrics["group_accuracy/ant/x"] == 0


def test_the_order_of_a_models_classes():
    def config(*names):
        return ViTConfig(id2label=dict(enumerate(names)))

    for order in (order_of_base, order_of_model):
        assert order(["a", "b"], config("b", "a"), "m") == ["b", "a"]
        assert order(["a", "b"], ViTConfig(num_labels=2), "m") == ["a", "b"]
    assert order_of_model(["a", "b"], config("c", "b", "a"), "m") == ["c", "b", "a"]
    assert order_of_base(["a", "b"], config("c", "b", "a"), "m") == ["a", "b"]  # the head is replaced
    assert order_of_base(["a", "b"], config("c", "d"), "m") == ["a", "b"]  # with a warning
    with pytest.raises(ValueError, match="m has the labels 'b', 'c', the data has 'a', 'b'"):
        order_of_base(["a", "b"], config("b", "c"), "m")
    for names in (["B", "A"], ["b ", "A"]):  # the same classes, spelled otherwise
        with pytest.raises(ValueError, match="Give the classes that are the same one name"):
            order_of_base(["a", "b"], config(*names), "m")
    with pytest.raises(ValueError, match="m has 3 labels, the data has 2"):
        order_of_model(["a", "b"], ViTConfig(num_labels=3), "m")


def test_a_benchmark_takes_another_order_of_its_classes(tmp_path):
    tree(tmp_path, ["ant/x", "ant/y", "bee/x", "bee/y"])
    data = load_files(data_dir=str(tmp_path))
    pairs = pairs_from_columns(
        datasets.Dataset.from_dict({"image_a": ["x"], "image_b": ["y"], "label": ["bee"]}), "image_a", "image_b"
    )
    other = Benchmark(**{**vars(data), "pairs": {"set": pairs}}).with_labels(["wasp", "bee", "ant"])
    for split in SPLITS:
        assert named(getattr(other, split)) == named(getattr(data, split))
        assert getattr(other, split).features["label"].names == ["wasp", "bee", "ant"]
    assert other.pairs["set"]["label"][:] == [1]
    with pytest.raises(ValueError, match="has the label 'ant', but"):
        data.with_labels(["bee", "wasp"])


# ---- Layouts ----


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".tif", ".gif", ".webp", ".bmp", ".jfif", ".ppm"])
def test_all_formats_that_pillow_reads(tmp_path, suffix):
    data = load_files(data_dir=tree(tmp_path, NAMES, suffix=suffix, count=1))
    assert len(data.train) == 3 and data.train[0]["image"].size == (8, 12)


@pytest.mark.parametrize("deeper", ["", "/patient/visit"])
def test_labels_alone_and_deeper_folders(tmp_path, deeper):
    plain = load_files(data_dir=tree(tmp_path / "plain", NAMES))
    assert plain.train.column_names == ["image", "label"]
    data = load_files(data_dir=tree(tmp_path / "both", [f"{name}/{value}{deeper}" for name in NAMES for value in "xy"]))
    assert (data.train.features["label"].names, data.train.features["attribute"].names) == ([*NAMES], ["x", "y"])
    assert "attribute" not in load_files(data_dir=str(tmp_path / "both"), attribute=None).train.column_names


def test_what_is_left_out_is_counted_and_said(tmp_path, warnings):
    root = tree(tmp_path, ["ant/x", "bee/x"])
    for hidden in (".ipynb_checkpoints/0.png", "ant/.hidden/0.png", "ant/__MACOSX/0.png", "ant/x/.0.png"):
        save(tmp_path / "train" / hidden)
    for name in ("ant/x/photo.heic", "ant/x/notes.txt", "notes.txt"):
        (tmp_path / "train" / name).write_text("text")
    save(tmp_path / "train" / "loose.png")
    (tmp_path / "train_old").mkdir()
    data = load_files(data_dir=root)
    assert len(data.train) == 6 and data.train.features["attribute"].names == ["x"]
    assert "'train_old' are left out" in warnings[0]
    assert "4 of 10 files are left out (2 .txt, 1 .png, 1 .heic" in warnings[1].replace(
        "1 .heic, 1 .png", "1 .png, 1 .heic"
    )


def test_names_of_splits_are_exact(tmp_path, warnings):
    whole = table(["a", "b"])
    names = ("train", "train_old", "validation", "test", "test_ood", "testing2")
    data = load_files(data_dir=write_splits(tmp_path, **dict.fromkeys(names, whole)))
    assert [len(getattr(data, split)) for split in SPLITS] == [2, 2, 2]
    assert "'test_ood.parquet', 'testing2.parquet', 'train_old.parquet' are left out" in warnings[0]
    write_splits(tmp_path, val=whole)
    with pytest.raises(ValueError, match=r"has validation twice, .*val\.parquet and .*validation\.parquet"):
        load_files(data_dir=str(tmp_path))


@pytest.mark.parametrize("names", [("Train", "val", "Test"), ("training", "dev", "eval")])
def test_other_names_of_splits(tmp_path, names):
    tree(tmp_path, NAMES, names[:1], count=4)
    tree(tmp_path, NAMES, names[1:2], count=2)
    tree(tmp_path, NAMES, names[2:], count=1)
    data = load_files(data_dir=str(tmp_path))
    assert [len(getattr(data, split)) for split in SPLITS] == [12, 6, 3]


def test_all_parts_of_a_split_must_be_there(tmp_path):
    whole = table(["a", "b"])
    (tmp_path / "data").mkdir()
    for part in range(3):
        write_splits(tmp_path / "data", **{f"train-0000{part}-of-00003": whole})
    write_splits(tmp_path, validation=whole, test=whole)
    assert len(load_files(data_dir=str(tmp_path)).train) == 6
    (tmp_path / "data/train-00001-of-00003.parquet").unlink()
    with pytest.raises(ValueError, match="must be the parts 0 to 2 of one set"):
        load_files(data_dir=str(tmp_path))


@pytest.mark.parametrize("change", ["order", "column"])
def test_parts_of_a_split_must_have_the_same_classes(tmp_path, change):
    kind, other = (datasets.ClassLabel(names=names) for names in (["a", "b"], ["b", "a"]))
    write_splits(tmp_path, **{"train-00000-of-00002": table([0, 1], kind)})
    part = table([0, 1], other) if change == "order" else table([0, 1], kind).rename_column("label", "other")
    write_splits(tmp_path, **{"train-00001-of-00002": part})
    with pytest.raises(
        ValueError, match=r"train-00000-of-00002\.parquet and .*train-00001.* have another column 'label'"
    ):
        load_files(data_dir=str(tmp_path))


@pytest.mark.parametrize("name", ["train.tsv", "test.json", "training.xlsx", "Train.ZIP", "val.tar"])
def test_tables_and_archives_that_are_not_read_are_named(tmp_path, warnings, name):
    """Without them, two folders of images beside the tables would be taken for two classes."""
    tree(tmp_path, ["left", "right"], ["."])
    (tmp_path / name).write_text("x")
    with pytest.raises(ValueError, match=f"has '{name}', which are not read"):
        load_files(data_dir=str(tmp_path))
    tree(tmp_path, ["left", "right"])
    load_files(data_dir=str(tmp_path))
    assert f"'{name}'" in warnings[0] and "are left out" in warnings[0]


@pytest.mark.parametrize("mark", [";", "\t"])
def test_a_table_with_other_marks_between_columns_is_named(tmp_path, mark):
    save(tmp_path / "img/0.png")
    (tmp_path / "train.csv").write_text(f"image{mark}label\nimg/0.png{mark}ant\n")
    with pytest.raises(ValueError, match=r"train\.csv has the one column .*: save it with commas"):
        load_files(data_dir=str(tmp_path))


def test_a_table_from_windows(tmp_path, warnings):
    for number in range(2):
        save(tmp_path / "img" / "day 1" / f"{number}.png", number)
    for split in SPLITS:
        (tmp_path / f"{split}.csv").write_bytes(
            b"\xef\xbb\xbfimage,label\r\nimg\\day 1\\0.png,ant\r\nimg\\day 1\\1.png,bee\r\n"
        )
    data = load_files(data_dir=str(tmp_path))
    assert [np.asarray(row["image"]).tolist() for row in data.train] == [
        np.asarray(picture(n)).tolist() for n in (0, 1)
    ]
    assert not warnings  # the folder of the images is not left out


@pytest.mark.parametrize("labels", [["ant"], ["ant", "bee"]])
def test_splits_in_another_place_are_named(tmp_path, labels):
    for label in labels:
        tree(tmp_path / label, [""], count=1)
    advice = f"give --data_dir {tmp_path}/ant" if len(labels) == 1 else "put the splits above the labels, test/ant"
    with pytest.raises(ValueError, match=advice):
        load_files(data_dir=str(tmp_path))


def test_a_link_to_nothing_is_named(tmp_path):
    tree(tmp_path, ["ant", "bee"])
    (tmp_path / "train/ant/gone.png").symlink_to(tmp_path / "elsewhere.png")
    with pytest.raises(ValueError, match=r"row 3 of train of .*gone\.png.* cannot be read"):
        load_files(data_dir=str(tmp_path))


def test_folders_may_be_links(tmp_path):
    tree(tmp_path, ["ant", "bee"])
    (tmp_path / "train" / "cow").symlink_to(tmp_path / "train" / "bee")
    tree(tmp_path / "elsewhere", ["x"], ["moth"])
    (tmp_path / "train" / "moth").symlink_to(tmp_path / "elsewhere" / "moth" / "x")
    assert load_files(data_dir=str(tmp_path)).train.features["label"].names == ["ant", "bee", "cow", "moth"]
    (tmp_path / "train" / "ant" / "loop").symlink_to(tmp_path / "train")
    images, _ = files.image_files(tmp_path / "train")
    assert len(images) == 12


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("place", ["each", "root", "split"])
def test_metadata_of_images(tmp_path, kind, place):
    rows = []
    for number, split in enumerate(SPLITS * 4):
        path = save(tmp_path / split / f"{number}.png", number)
        row = {"label": "ab"[number // 3 % 2], "attribute": ["N/A", "None"][number // 6], "number": number}
        base = path.parent if place == "each" else tmp_path
        rows.append((split, {"file_name": path.relative_to(base).as_posix(), **row}))
    for split in SPLITS if place == "each" else [None]:
        part = [
            {**row, **({"split": name} if place == "split" else {})}
            for name, row in rows
            if split is None or name == split
        ]
        path = str((tmp_path / split if split else tmp_path) / f"metadata.{kind}")
        dataset = datasets.Dataset.from_list(part)
        {"csv": dataset.to_csv, "jsonl": dataset.to_json, "parquet": dataset.to_parquet}[kind](path)
    data = load_files(data_dir=str(tmp_path))
    for split in SPLITS:
        part = getattr(data, split)
        assert len(part) == 4 and part.features["attribute"].names == ["N/A", "None"]
        for row in part:
            assert (np.asarray(row["image"]) == np.asarray(picture(row["number"]))).all()
            assert row["label"] == row["number"] // 3 % 2


def test_tables_of_paths(tmp_path):
    for number in range(4):
        save(tmp_path / "photos" / f"{number}.png", number)
    for split in SPLITS:
        lines = [f"photos/{number}.png,{'cow' if number % 2 else 'ant'},{number // 2}" for number in range(4)]
        (tmp_path / f"{split}.csv").write_text("\n".join(["path,kind,hospital", *lines]))
    data = load_files(data_dir=str(tmp_path), image="path", label="kind", attribute="hospital")
    assert named(data.test) == ["ant", "cow"] * 2 and named(data.test, "attribute") == ["0", "0", "1", "1"]
    (tmp_path / "photos/2.png").unlink()
    with pytest.raises(ValueError, match=r"train\.csv: row 2 names .*2\.png"):
        load_files(data_dir=str(tmp_path), image="path", label="kind", attribute="hospital")


def test_columns_that_are_missing_or_clear(tmp_path):
    kind = datasets.ClassLabel(names=["a", "b"])
    whole = table([0, 1], kind).rename_columns({"image": "img", "label": "fine_label"})
    root = write_splits(tmp_path, train=whole, validation=whole, test=whole)
    assert load_files(data_dir=root).train.column_names == ["image", "label"]
    two = whole.add_column("coarse", [0, 1]).cast_column("coarse", kind)
    write_splits(tmp_path, train=two, validation=two, test=two)
    with pytest.raises(ValueError, match="no column 'label' for label, only 'img', 'fine_label', 'coarse'"):
        load_files(data_dir=root)
    assert load_files(data_dir=root, attribute="coarse").train.column_names == ["image", "label", "attribute"]
    with pytest.raises(ValueError, match="no column 'place' for attribute"):
        load_files(data_dir=root, label="coarse", attribute="place")
    with pytest.raises(ValueError, match="must be three columns"):
        load_files(data_dir=root, label="coarse", attribute="coarse")
    with pytest.raises(ValueError, match=r"the column of images of train of .* is a string"):
        names = datasets.Dataset.from_dict({"image": ["x"] * 2, "label": ["a", "b"]})
        files._benchmark(dict.fromkeys(SPLITS, names), "d", "image", "label", "attribute", None, None)


def test_training_needs_no_attribute(tmp_path):
    whole = table(["a", "b"]).add_column("attribute", ["x", "y"])
    root = write_splits(tmp_path, train=whole.remove_columns("attribute"), validation=whole, test=whole)
    data = load_files(data_dir=root)
    assert "attribute" not in data.train.column_names and named(data.test, "attribute") == ["x", "y"]


def test_keep_takes_names(tmp_path):
    root = tree(tmp_path, ["ant/1", "ant/2", "bee/1", "bee/2"])
    for keep, count in (({"label": "ant"}, 6), ({"attribute": 2, "label": "bee"}, 3), ({"attribute": "1"}, 6)):
        data = load_files(data_dir=root, keep=keep)
        assert len(data.train) == count and len(data.test) == 12
    for keep, message in (({"label": 0}, "label='0'; its values are 'ant', 'bee'"), ({"x": 1}, "no column 'x'")):
        with pytest.raises(ValueError, match=f"keep: .*{message}"):
            load_files(data_dir=root, keep=keep)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_folder_without_splits_is_for_training(tmp_path, warnings, depth):
    groups = [f"{name}/{value}" if depth == 2 else name for name in NAMES for value in "xy"[:depth]]
    tree(tmp_path / "nature", groups, ["animals"], count=20)
    data = load_files(data_dir=str(tmp_path / "nature/animals"))
    assert data.train.features["label"].names == [*NAMES] and ("attribute" in data.train.features) == (depth == 2)
    assert ["has no validation split" in warnings[0], "has no test split" in warnings[1]] == [True, True]
    tree(tmp_path / "sets/birds", NAMES)
    with pytest.raises(ValueError, match=r"give --data_dir .*birds"):
        load_files(data_dir=str(tmp_path / "sets"))


def test_a_missing_split_is_drawn_by_group(tmp_path, warnings):
    groups = {"ant/x": 40, "ant/y": 20, "bee/x": 2, "bee/y": 100}
    for group, count in groups.items():
        tree(tmp_path, [group], ["train", "test"], count=count)
    first, again = (load_files(data_dir=str(tmp_path), seed=seed) for seed in (0, 1))

    def sizes(part):
        pairs = list(zip(named(part), named(part, "attribute"), strict=True))
        return {group: pairs.count(tuple(group.split("/"))) for group in groups}

    assert sizes(first.validation) == {"ant/x": 6, "ant/y": 3, "bee/x": 1, "bee/y": 15}
    paths = [
        part.cast_column("image", datasets.Image(decode=False))["image"][:] for part in vars(first).values() if part
    ]
    paths = [[image["path"] for image in part] for part in paths]
    assert not {*paths[0]} & {*paths[1]} and len(paths[0]) + len(paths[1]) == 162
    assert first.validation.data.table.equals(again.validation.data.table)
    assert "24" in warnings[0].replace("25", "24") and "162 training images are drawn" in warnings[0]


def test_a_drawn_split_has_whole_objects(tmp_path):
    names = [f"patient {number // 5}" for number in range(100)]
    whole = table(["a", "b"] * 50).add_column("patient", names).add_column("attribute", [0, 0, 1, 1, 1] * 20)
    data = load_files(data_dir=write_splits(tmp_path, train=whole, test=whole), instance="patient")
    assert not {*data.train["patient"]} & {*data.validation["patient"]}
    assert len(data.validation) % 5 == 0 and len(data.validation_pairs) > 0


# ---- Damage ----


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0, 0.3, 0.8])
def test_a_cut_image_is_named_before_training(tmp_path, kind, share):
    root = tree(tmp_path, NAMES)
    whole = encoded(3, kind)
    path = tmp_path / "test" / "bee" / f"9.{kind.lower()}"
    path.write_bytes(whole)
    load_files(data_dir=root)
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=rf"row \d of test of .*{path.name}"):
        load_files(data_dir=root)


def test_bad_images_of_a_table_are_named(tmp_path):
    good = table(["a", "b", "a"])
    for stored, message in (
        ({"bytes": encoded()[:300], "path": None}, "row 1 of test"),
        ({"bytes": None, "path": None}, r"row 1 of test .*\(None\)"),
        (None, r"row 1 of test .*\(None\)"),
        ({"bytes": b"<html>", "path": None}, "row 1 of test"),
    ):
        images = [{"bytes": encoded(), "path": None}, stored, {"bytes": encoded(), "path": None}]
        bad = datasets.Dataset.from_dict({"image": images, "label": ["a", "b", "a"]})
        bad = bad.cast(datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")}))
        with pytest.raises(ValueError, match=message):
            load_files(data_dir=write_splits(tmp_path, train=good, validation=good, test=bad))


@pytest.mark.parametrize("content", ["größe".encode("latin-1"), "a,b\nc,d".encode("utf-16"), b""])
def test_a_table_that_is_not_utf8_is_named(tmp_path, content):
    (tmp_path / "pairs.csv").write_bytes(b"image_a,image_b\nx.png,y.png\n"[: 99 if content else 0] + content)
    with pytest.raises(ValueError, match=r"pairs\.csv is (not UTF-8|empty)") as caught:
        pairs_from_table(tmp_path / "pairs.csv")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["train.parquet", "train.jsonl"])
def test_a_damaged_table_is_named_in_one_line(tmp_path, name):
    whole = table(["a", "b"])
    write_splits(tmp_path, train=whole, validation=whole, test=whole)
    content = (tmp_path / "train.parquet").read_bytes()
    (tmp_path / "train.parquet").unlink()
    (tmp_path / name).write_bytes(content[: len(content) // 2] if name.endswith("parquet") else b'{"image": ')
    with pytest.raises(ValueError, match=rf"{name} cannot be read") as caught:
        load_files(data_dir=str(tmp_path))
    assert "\n" not in str(caught.value)


# ---- Pairs ----


def test_the_labels_of_pairs_are_those_of_the_images(tmp_path):
    tree(tmp_path, ["2/x", "10/x", "2/y", "10/y"])
    (tmp_path / "pairs").mkdir()
    rows = {side: [{"bytes": encoded(), "path": None}] * 2 for side in ("image_a", "image_b")}
    rows |= {"label": ["10", "2"], "attribute_a": ["y", "y"], "attribute_b": ["x", "x"]}
    pairs = datasets.Dataset.from_dict(rows)
    for split in ("train", "test"):
        pairs.to_parquet(str(tmp_path / "pairs" / f"{split}.parquet"))
    data = load_files(data_dir=str(tmp_path))
    assert len(data.pairs) == 2 and data.pairs["label"][:] == [1, 0]
    assert (data.pairs["attribute_a"][:], data.pairs["attribute_b"][:]) == ([1, 1], [0, 0])
    pairs = pairs.remove_columns("label").add_column("label", ["10", "3"])
    pairs.to_parquet(str(tmp_path / "pairs" / "train.parquet"))
    with pytest.raises(ValueError, match="pairs has the label '3', but the training set has only '2', '10'"):
        load_files(data_dir=str(tmp_path))
    (tmp_path / "pairs" / "train.parquet").unlink()
    with pytest.raises(ValueError, match=r"'test.parquet', but no train\.parquet"):
        load_files(data_dir=str(tmp_path))


@pytest.mark.parametrize("kind", ["texts", "class labels"])
def test_the_attributes_of_both_sides_have_one_numbering(kind):
    rows = {"image_a": ["x"] * 3, "image_b": ["y"] * 3, "attribute_a": ["new", "old", "new"]}
    source = datasets.Dataset.from_dict({**rows, "attribute_b": ["old", "new", "old"]})
    if kind == "class labels":
        source = source.cast_column("attribute_a", datasets.ClassLabel(names=["old", "new"]))
        source = source.cast_column("attribute_b", datasets.ClassLabel(names=["new", "old"]))
    pairs = pairs_from_columns(source, "image_a", "image_b")
    assert pairs.features["attribute_a"] == pairs.features["attribute_b"]
    assert named(pairs, "attribute_a") == rows["attribute_a"] and named(pairs, "attribute_b") == ["old", "new", "old"]


def test_folders_of_pairs_skip_hidden_files_and_sort_numbers(tmp_path):
    for side in ("summer", "winter"):
        for label in ("2", "10"):
            save(tmp_path / side / label / "0.png")
        save(tmp_path / side / ".cache" / "0.png")
    pairs = pairs_from_folders(tmp_path / "summer", tmp_path / "winter")
    assert pairs.features["label"].names == ["2", "10"] and len(pairs) == 2


def test_pairs_of_files_in_a_recipe_have_the_labels_of_the_data(tmp_path, recipe, capsys):
    for side in ("summer", "winter"):
        for label in ("bee", "wasp"):
            save(tmp_path / side / label / "0.png")
    pairs = {"maker": "folders", "folder_a": str(tmp_path / "summer"), "folder_b": str(tmp_path / "winter")}
    assert main(["pairs", "check", "--config", recipe(pairs=pairs)]) == 2
    assert "has the label 'wasp', but the training set has only 'ant', 'bee'" in capsys.readouterr().err


# ---- The Hub ----


def test_a_hub_set_by_its_columns(monkeypatch, tmp_path):
    whole = table([1, 0, 1, 0], datasets.ClassLabel(names=["z", "a"])).add_column("place", ["in", "out", "out", "in"])
    whole = whole.rename_columns({"image": "img", "label": "fine_label"})
    loaded = datasets.DatasetDict({"train": whole, "validation": whole, "test": whole, "extra": whole})
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: asked.append((args, options)) or loaded)
    data = load_hub("user/name", config="small", revision="v1", attribute="place")
    assert asked == [(("user/name", "small"), {"revision": "v1", "streaming": False})]
    assert named(data.test) == ["a", "z"] * 2 and named(data.test, "attribute") == ["in", "out", "out", "in"]
    assert data.pairs is None
    assert describe("user/name").hub_set == "user/name"


def test_a_recipe_takes_a_hub_set(monkeypatch, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(
        "dataset: user/name\ndataset_options: {image: img, attribute: place}\nreport_to: none\n"
        "pairs: {maker: recolor, change: channels}\n"
    )
    whole = table(["a", "b"] * 4).add_column("place", ["in", "out"] * 4).rename_column("image", "img")
    sets = datasets.DatasetDict(dict.fromkeys(SPLITS, whole))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: sets)
    assert main(["pairs", "check", "--config", str(tmp_path / "recipe.yaml")]) in (0, 1)
    assert "user/name" in capsys.readouterr().out

    def fails(*args, **options):
        raise ValueError("no such set\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    assert main(["pairs", "check", "--config", str(tmp_path / "recipe.yaml")]) == 2
    assert "dataset='user/name' cannot be loaded from the Hub: no such set on the Hub" in capsys.readouterr().err
    (tmp_path / "recipe.yaml").write_text(f"dataset: {tmp_path}\n")
    assert main(["pairs", "check", "--config", str(tmp_path / "recipe.yaml")]) == 2
    assert f"set dataset: files and data_dir: {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize("without", [("train",), SPLITS])
def test_an_audit_of_data_without_the_attribute(tmp_path, recipe, capsys, without):
    for split in without:
        for path in sorted((tmp_path / "data" / split).glob("*/*/*.png")):
            path.rename(path.parents[1] / path.name)
            if not any(path.parent.iterdir()):
                path.parent.rmdir()
    models = [trained(tmp_path / name, names) for name, names in (("m", ("bee", "ant")), ("n", ("ant", "bee")))]
    assert main(["evaluate", models[0], "--config", recipe(), "--report", str(tmp_path / "report")]) == 0
    shown, titles = capsys.readouterr().out, ["bee/x", "bee / x"] if without == ("train",) else ["\nbee  ", ">bee<"]
    assert all(title in shown + (tmp_path / "report/report.html").read_text() for title in titles)
    report = json.loads((tmp_path / "report/report.json").read_text())
    found = {f"{group['label']}/{group['attribute']}": group["accuracy"] for group in report["models"][0]["groups"]}
    values = ["x", "y"] if without == ("train",) else [""]
    assert found == {f"{name}/{value}": float(name == "bee") for name in ("bee", "ant") for value in values}
    arguments = ["--against", models[1], "--config", recipe(), "--report", str(tmp_path / "both")]
    assert main(["evaluate", models[0], *arguments]) == 2
    assert "orders its labels ['ant', 'bee'], the data ['bee', 'ant']" in capsys.readouterr().err


@pytest.mark.parametrize("names", [("ant", "bee"), ("bee", "ant")])
def test_a_streamed_training_set(tmp_path, monkeypatch, capsys, recipe, names):
    kind = datasets.ClassLabel(names=["ant", "bee"])
    values = {"label": [0, 1] * 8, "place": [0, 0, 1, 1] * 4}
    whole = table(values["label"], kind).rename_column("image", "img").add_column("place", values["place"])
    hub = tmp_path / "hub"
    hub.mkdir()
    write_splits(hub, **dict.fromkeys(SPLITS, whole.cast_column("place", datasets.ClassLabel(names=["in", "out"]))))
    load = datasets.load_dataset

    def from_folder(name, *args, **options):
        return load(str(hub) if name == "user/name" else name, *args, **options)

    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    data = load_hub("user/name", attribute="place", streaming=True)
    read = list(data.train)
    assert sorted((row["label"], row["attribute"]) for row in read) == sorted(zip(*values.values(), strict=True))
    assert [row["label"] for row in read] != values["label"]  # shuffled
    other = data.with_labels(["bee", "ant"])
    assert [row["label"] for row in other.train] == [1 - row["label"] for row in read]
    assert other.label_names == ["bee", "ant"]
    base = trained(tmp_path / "base", names)
    options = {"attribute": "place", "streaming": True}
    settings = {"dataset": "user/name", "dataset_options": options, "pairs": {"maker": "recolor", "change": "channels"}}
    settings |= {
        "model_name_or_path": base,
        "max_steps": 2,
        "learning_rate": 1e-12,
        "output_dir": str(tmp_path / "out"),
    }
    assert main(["train", "--config", recipe(**settings)]) == 0
    assert (
        main(["evaluate", str(tmp_path / "out"), "--config", recipe(**settings), "--report", str(tmp_path / "r")]) == 0
    )
    (entry,) = json.loads((tmp_path / "r/report.json").read_text())["models"]
    found = {f"{group['label']}/{group['attribute']}": group["accuracy"] for group in entry["groups"]}
    assert found == {f"{name}/{value}": float(name == names[0]) for name in names for value in ("in", "out")}
    # a stream of pairs is checked and shown by its first rows
    capsys.readouterr()
    assert main(["pairs", "check", "--config", recipe(**settings)]) == 1  # the splits have the same images
    assert "the first 16 pairs of user/name" in capsys.readouterr().out
    page = tmp_path / "first.html"
    assert main(["pairs", "preview", "--config", recipe(**settings), "--output", str(page)]) == 0
    assert "the first 16 pairs of user/name" in page.read_text()


def test_a_measurement_needs_the_training_split(tmp_path, capsys):
    write_splits(tmp_path, test=table(["a", "b"]))
    (tmp_path / "r.yaml").write_text(f"dataset: files\ndata_dir: {tmp_path}\n")
    assert main(["evaluate", str(tmp_path / "model"), "--config", str(tmp_path / "r.yaml")]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "no training split" in line and "A measurement needs it too" in line


@pytest.mark.parametrize("lacks", ["a split", "names"])
def test_what_cannot_be_streamed_is_refused(tmp_path, lacks):
    texts = table(["a", "b"])
    whole = texts if lacks == "names" else texts.class_encode_column("label")
    splits = SPLITS if lacks == "names" else SPLITS[::2]
    write_splits(tmp_path, **dict.fromkeys(splits, whole))
    with pytest.raises(ValueError, match="Set streaming: false"):
        load_hub(str(tmp_path), streaming=True)
