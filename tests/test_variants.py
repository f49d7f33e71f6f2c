# SPDX-License-Identifier: Apache-2.0
"""Digits with two shortcuts, a regression on digits, and a user's own files: their contents, and a training."""

from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessor

from ipg_hf import IPGConfig, IPGTrainer
from ipg_hf.data import (
    ColoredMnistMLPConfig,
    ColoredMnistMLPForImageClassification,
    load_files,
    load_marked_digits,
    load_stroke_mass,
)
from ipg_hf.metrics import GroupErrors, GroupMetrics
from ipg_hf.pairs import ImageRows


def array(image):
    return np.asarray(image).astype(int)


@pytest.fixture(scope="module")
def marked():
    return load_marked_digits()


@pytest.fixture(scope="module")
def mass():
    return load_stroke_mass()


# ---- Two shortcuts ----


def test_each_of_the_two_shortcuts_equals_the_training_label(marked):
    train = marked.train
    assert {(row["label"], row["attribute"]) for row in train.remove_columns("image")} == {(0, 0), (1, 3)}
    for row in train.select(range(20)):
        image = array(row["image"])
        is_marked = (image[:3, :3] == 255).all()
        assert is_marked == (row["label"] == 1)
        assert image[3:, 3:, 1 - row["label"]].max() == 0
    for split in (marked.validation, marked.test):
        counts = np.bincount(4 * np.array(split["label"][:]) + np.array(split["attribute"][:]))
        assert len(counts) == 8
        assert len(set(counts[:4])) == len(set(counts[4:])) == 1
    assert train.features["attribute"].names[3] == "green-marked"


def test_a_pair_set_differs_in_its_own_attribute_alone(marked):
    for name, pairs in marked.pairs.items():
        assert len(pairs) == 300
        others = set()
        for row in pairs.select(range(40)):
            a, b = array(row["image_a"]), array(row["image_b"])
            if name == "mark":
                assert (a[3:] == b[3:]).all() and (b[:3, :3] == 255).all() and (a[:3, :3] < 255).any()
                others.add(int(a[3:, 3:, 0].max() > 0))
            else:
                assert (a[3:, 3:, 0] == b[3:, 3:, 1]).all()
                others.add(int((a[:3, :3] == 255).all()))
        assert others == {0, 1}  # the other attribute varies from pair to pair
    assert set(marked.validation_pairs) == {"color", "mark"}
    with pytest.raises(ValueError, match="oriented_pairs"):
        load_marked_digits(oriented_pairs=False)


def decoded(data):
    """The parts of the benchmark that a training reads, as inputs of a model, in memory."""
    processor = ViTImageProcessor(size={"height": 16, "width": 16}, do_normalize=False)
    single, double = {"image": "pixel_values"}, {"image_a": "pixel_values_a", "image_b": "pixel_values_b"}

    def inputs(dataset, columns):
        return ImageRows(dataset, processor, columns, keep=("label", "attribute"), preload=True)

    return SimpleNamespace(
        train=inputs(data.train, single),
        test=inputs(data.test, single),
        pairs={name: inputs(pairs, double) for name, pairs in data.pairs.items()},
        test_pairs={name: inputs(pairs, double) for name, pairs in data.test_pairs.items()},
        metrics=GroupMetrics(data.train),
    )


def train_mlp(folder, data, names):
    """Worst-group accuracy, flip rates and logs of a training with the named pair sets."""
    torch.manual_seed(0)
    config = ColoredMnistMLPConfig(image_size=16, subsample=1, hidden_size=64, num_labels=2)
    args = IPGConfig(
        str(folder),
        max_steps=100,
        learning_rate=3e-3,
        pair_loss_weight=0.0,  # the labels of these pairs teach the digit, whatever the pairs guard
        per_device_train_batch_size=64,
        per_device_eval_batch_size=512,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = IPGTrainer(
        ColoredMnistMLPForImageClassification(config),
        args,
        train_dataset=data.train,
        eval_dataset=data.test,
        pair_dataset={name: data.pairs[name] for name in names} or None,
        compute_metrics=data.metrics,
    )
    trainer.train()
    flips = {name: trainer.evaluate_pairs(pairs)["eval_flip_rate"] for name, pairs in data.test_pairs.items()}
    return trainer.evaluate()["eval_worst_group_accuracy"], flips, trainer.state.log_history


def test_the_pairs_of_one_shortcut_leave_the_other(tmp_path):
    data = decoded(load_marked_digits(num_pairs=997))
    none, flips, _ = train_mlp(tmp_path, data, [])
    assert none < 0.1
    assert max(flips.values()) > 0.9
    for guarded, left in (("color", "mark"), ("mark", "color")):
        worst, flips, _ = train_mlp(tmp_path, data, [guarded])
        assert worst < 0.1, guarded
        assert flips[guarded] < 0.05
        assert flips[left] > 0.9
    worst, flips, logs = train_mlp(tmp_path, data, ["color", "mark"])
    assert worst > 0.85  # 0.93 when this was written
    assert max(flips.values()) < 0.1
    entry = next(entry for entry in logs if "ipg/distance" in entry)
    assert {f"ipg/{name}/{key}" for name in ("color", "mark") for key in ("distance", "divergence")} <= set(entry)
    mean = (entry["ipg/color/distance"] + entry["ipg/mark/distance"]) / 2
    assert entry["ipg/distance"] == pytest.approx(mean, rel=1e-5)


# ---- A regression ----


def test_the_stroke_mass_is_the_ink_and_its_color_misleads(mass):
    labels = np.array(mass.train["label"][:])
    assert labels.mean() == pytest.approx(0, abs=1e-5)
    assert labels.std() == pytest.approx(1, abs=1e-5)
    ink = np.array([array(image).sum() for image in mass.train["image"][:200]])
    assert np.corrcoef(ink, labels[:200])[0, 1] > 0.999
    above = labels > np.median(labels)
    assert (np.array(mass.train["attribute"][:]) == above).all()
    test_above = np.array(mass.test["label"][:]) > np.median(labels)
    misled = np.array(mass.test["attribute"][:]) != test_above
    assert misled.mean() == pytest.approx(0.9, abs=0.01)
    row = mass.pairs[0]
    assert (array(row["image_a"])[..., 0] == array(row["image_b"])[..., 1]).all()


def test_group_errors_by_hand():
    names = datasets.ClassLabel(names=["red", "green"])
    features = datasets.Features({"label": datasets.Value("float32"), "attribute": names})
    train = datasets.Dataset.from_dict({"label": [0.0, 1.0, 2.0], "attribute": [0, 1, 1]}, features=features)
    measure = GroupErrors(train)
    labels, attributes = np.array([0.0, 0.5, 2.0, 3.0]), np.array([0, 1, 1, 1])
    outputs = np.array([[1.0], [0.0], [2.0], [2.0]])
    found = measure(SimpleNamespace(predictions=outputs, label_ids=(labels, attributes)))
    assert found["mae"] == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert found["group_mae/below/red"] == found["worst_group_mae"] == 1
    assert found["group_mae/below/green"] == found["group_mae/above/green"] == 0.5
    assert found["group_n/above/green"] == 2
    assert "group_mae/above/red" not in found
    assert measure(SimpleNamespace(predictions=outputs[:, 0], label_ids=labels)) == {"mae": found["mae"]}
    with pytest.raises(ValueError, match="NaN"):
        measure(SimpleNamespace(predictions=outputs * np.nan, label_ids=labels))


# ---- A user's own files ----


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8))


def own_rows(count):
    return {
        "image": [picture(number) for number in range(count)],
        "kind": ["cat", "dog"] * (count // 2),
        "place": ["in", "in", "out", "out"] * (count // 4),
        "aligned": [True, False, False, True] * (count // 4),
        "object": [number // 4 for number in range(count)],
    }


@pytest.fixture
def folder(tmp_path):
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "kind": datasets.Value("string"),
            "place": datasets.Value("string"),
            "aligned": datasets.Value("bool"),
            "object": datasets.Value("int64"),
        }
    )
    for split in ("train", "validation", "test"):
        path = tmp_path / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(exist_ok=True)
        datasets.Dataset.from_dict(own_rows(8), features=features).to_parquet(str(path))
    pairs = {"image_a": [picture(1)] * 3, "image_b": [picture(2)] * 3, "place_a": [0] * 3, "place_b": [1] * 3}
    images = {"image_a": datasets.Image(), "image_b": datasets.Image()}
    ints = {"place_a": datasets.Value("int64"), "place_b": datasets.Value("int64")}
    (tmp_path / "pairs").mkdir()
    whole = datasets.Dataset.from_dict(pairs, features=datasets.Features({**images, **ints}))
    whole.to_parquet(str(tmp_path / "pairs/train.parquet"))
    return tmp_path


def test_load_files_reads_parquet_files(folder):
    data = load_files(data_dir=str(folder), label="kind", attribute="place", instance="object", keep={"aligned": True})
    assert data.train.features["label"].names == ["cat", "dog"]
    assert len(data.train) == 4
    assert set(zip(data.train["label"], data.train["attribute"], strict=True)) == {(0, 0), (1, 1)}
    assert len(data.test) == 8
    assert len(data.pairs) == 3
    assert data.pairs["attribute_b"][:] == [1, 1, 1]
    assert data.test_pairs["source_id"][:] == ["0", "0", "1", "1"]  # an object of two kinds: a pair of each
    row = data.test_pairs[2]
    assert (array(row["image_a"]) == array(picture(4))).all()
    assert (array(row["image_b"]) == array(picture(6))).all()
    assert load_files(data_dir=str(folder), label="kind", attribute="place", pairs=None).pairs is None
    with pytest.raises(ValueError, match="no column 'label'"):
        load_files(data_dir=str(folder))
    with pytest.raises(FileNotFoundError, match="is no folder"):
        load_files(data_dir=str(folder / "nothing"))
    with pytest.raises(FileNotFoundError, match="is no folder"):
        load_files()


def test_load_files_reads_image_folders(tmp_path):
    for split in ("train", "validation", "test"):
        for number in range(4):
            path = tmp_path / split / ["cat", "dog"][number % 2] / ["in", "out"][number // 2] / f"{number}.png"
            path.parent.mkdir(parents=True)
            picture(number).save(path)
    data = load_files(data_dir=str(tmp_path))
    assert data.train.features["attribute"].names == ["in", "out"]
    assert len(data.validation) == 4
    assert data.pairs is None
    assert data.test_pairs is None
