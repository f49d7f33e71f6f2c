# SPDX-License-Identifier: Apache-2.0
"""The digits and ColoredMNIST: splits, colour statistics, columns, seeds, files; and IRM's perceptron."""

import dataclasses
import hashlib
import inspect
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import sklearn.datasets
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageClassification, ViTImageProcessor, pipeline

from ipg_hf.data import (
    ABOUT,
    LOADERS,
    About,
    ColoredMnistMLPConfig,
    ColoredMnistMLPForImageClassification,
    colored_mnist,
    describe,
    load_colored_mnist,
    load_digits,
    load_scenes,
)
from ipg_hf.data.about import VARIANTS
from ipg_hf.heads import find_head

LABEL = datasets.ClassLabel(names=["small", "large"])
COLOR = datasets.ClassLabel(names=["red", "green"])
PARTS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def synthetic_mnist(folder, num_train=2400, num_test=400, name="mnist.npz", **changes):
    """Writes a file with the keys of MNIST. The first pixels of an image encode its number and its file."""
    rng = np.random.default_rng(0)
    arrays = {}
    for suffix, count in (("tr", num_train), ("te", num_test)):
        images = rng.integers(0, 256, (count, 28, 28)).astype(np.uint8)
        images[:, 0, 0], images[:, 0, 1] = np.divmod(np.arange(count), 256)
        images[:, 0, 2] = 1 if suffix == "te" else 2
        arrays[f"x{suffix}"] = images
        arrays[f"y{suffix}"] = rng.integers(0, 10, count).astype(np.uint8)
    arrays = {name: value for name, value in {**arrays, **changes}.items() if value is not None}
    np.savez(folder / name, **arrays)
    return arrays


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mnist")
    return folder, synthetic_mnist(folder)


@pytest.fixture(scope="module")
def colored(mnist):
    return load_colored_mnist(data_dir=str(mnist[0]), num_pairs=500)


def gray(images):
    """Returns the digits without their colour, and the channel that they are in. All other channels must be black."""
    pixels = np.stack([np.asarray(image) for image in images])
    assert pixels.dtype == np.uint8 and pixels.shape[3] == 3
    assert not pixels[..., 2].any()
    channel = pixels[..., 1].any((1, 2)).astype(int)
    assert not pixels[np.arange(len(pixels)), :, :, 1 - channel].any()
    return pixels.max(3), channel


def aligned_by_label(part):
    labels, colors = np.array(part["label"][:]), np.array(part["attribute"][:])
    return [(colors == labels)[labels == label] for label in range(2)]


def number_of(images, size_of_train):
    """Reads the numbers that `synthetic_mnist` writes into the first pixels."""
    return images[:, 0, 0] * 256 + images[:, 0, 1] + np.where(images[:, 0, 2] == 1, size_of_train, 0)


@pytest.mark.parametrize("name", ["digits", "colored_mnist"])
def test_a_benchmark_has_the_columns_of_the_contract(name, digits, colored):
    benchmark = {"digits": digits, "colored_mnist": colored}[name]
    for part in PARTS:
        rows = getattr(benchmark, part)
        extra = ["environment"] if (name, part) == ("colored_mnist", "train") else []
        assert rows.column_names == ["image", "label", "attribute", *extra]
        assert isinstance(rows.features["image"], datasets.Image)
        assert (rows.features["label"], rows.features["attribute"]) == (LABEL, COLOR)
        assert rows[0]["image"].mode == "RGB"
        assert rows[0]["image"].size == {"digits": (16, 16), "colored_mnist": (28, 28)}[name]
        np.testing.assert_array_equal(gray(rows["image"][:])[1], rows["attribute"][:])
    for part in ("pairs", "validation_pairs", "test_pairs"):
        rows = getattr(benchmark, part)
        assert set(rows.column_names) == {"image_a", "image_b", "label", "attribute_a", "attribute_b", "source_id"}
        assert rows.features["label"] == LABEL
        assert rows.features["attribute_a"] == rows.features["attribute_b"] == COLOR
        assert rows.features["source_id"] == datasets.Value("int64")
        (a, color_a), (b, color_b) = (gray(rows[f"image_{side}"][:]) for side in "ab")
        np.testing.assert_array_equal(a, b)
        assert set(color_a) == set(rows["attribute_a"]) == {0}
        assert set(color_b) == set(rows["attribute_b"]) == {1}


@pytest.mark.parametrize("name", ["digits", "colored_mnist"])
def test_evaluation_pairs_are_the_images_in_both_colors(name, digits, colored):
    benchmark = {"digits": digits, "colored_mnist": colored}[name]
    for part in ("validation", "test"):
        rows, pairs = getattr(benchmark, part), getattr(benchmark, f"{part}_pairs")
        assert len(rows) == len(pairs)
        assert rows["label"][:] == pairs["label"][:]
        np.testing.assert_array_equal(gray(rows["image"][:])[0], gray(pairs["image_a"][:])[0])


def test_the_split_of_the_digits_is_stratified(digits):
    assert [len(getattr(digits, part)) for part in PARTS] == [997, 300, 500]
    every = load_digits(num_pairs=997).pairs
    index = [every["source_id"][:], digits.validation_pairs["source_id"][:], digits.test_pairs["source_id"][:]]
    assert sorted(np.concatenate(index)) == list(range(1797))
    source = sklearn.datasets.load_digits()
    for part, rows in zip(PARTS, index, strict=True):
        # the share of each digit is that of the whole set, up to two images
        shares = np.bincount(source.target[rows], minlength=10) / np.bincount(source.target)
        np.testing.assert_allclose(shares, len(rows) / 1797, atol=2 / 174)
        if part != "train":
            pixels, _ = gray(getattr(digits, part)["image"][:])
            np.testing.assert_array_equal(pixels[:, ::2, ::2], np.rint(source.images[rows] * 255 / 16))
            np.testing.assert_array_equal(pixels[:, 1::2, 1::2], pixels[:, ::2, ::2])
            assert getattr(digits, part)["label"][:] == (source.target[rows] >= 5).astype(int).tolist()


def test_the_colors_of_the_digits_mislead_in_the_test_set(digits):
    assert all(aligned.all() for aligned in aligned_by_label(digits.train))
    for aligned in aligned_by_label(digits.validation):
        assert abs(2 * aligned.sum() - len(aligned)) <= 1
    for aligned in aligned_by_label(digits.test):
        assert (~aligned).sum() == round(0.9 * len(aligned))
        assert aligned.sum() >= 20


def test_the_pairs_of_the_digits_are_training_digits(digits):
    assert len(digits.pairs) == 300
    ids = digits.pairs["source_id"][:]
    assert len(set(ids)) == 300
    assert not set(ids) & {*digits.validation_pairs["source_id"], *digits.test_pairs["source_id"]}
    np.testing.assert_array_equal(digits.pairs["label"][:], sklearn.datasets.load_digits().target[ids] >= 5)


@pytest.mark.parametrize("name", ["digits", "colored_mnist"])
def test_a_benchmark_is_a_function_of_the_seed(name, mnist):
    def load(**settings):
        return LOADERS[name](data_dir=str(mnist[0]), num_pairs=100, **settings)

    first, again, other = load(seed=1), load(seed=1), load(seed=2)
    for part in dataclasses.fields(first):
        rows = [getattr(benchmark, part.name).data.table for benchmark in (first, again, other)]
        assert rows[0].equals(rows[1]), part.name
        if name == "digits" and part.name in ("train", "validation_pairs", "test_pairs"):
            assert rows[0].equals(rows[2])  # nothing is drawn here
        else:
            assert not rows[0].equals(rows[2]), part.name


@pytest.mark.parametrize("name", ["digits", "colored_mnist"])
def test_unoriented_pairs_swap_half_of_the_sides(name, mnist):
    plain, mixed = (
        LOADERS[name](data_dir=str(mnist[0]), num_pairs=100, oriented_pairs=oriented) for oriented in (True, False)
    )
    assert sum(mixed.pairs["attribute_a"]) == 50
    assert mixed.pairs["source_id"][:] == plain.pairs["source_id"][:]
    for side in "ab":
        pixels, channel = gray(mixed.pairs[f"image_{side}"][:])
        np.testing.assert_array_equal(channel, mixed.pairs[f"attribute_{side}"][:])
        np.testing.assert_array_equal(pixels, gray(plain.pairs["image_a"][:])[0])
    assert set(mixed.test_pairs["attribute_a"]) == {0}
    assert mixed.train.data.table.equals(plain.train.data.table)


@pytest.mark.parametrize(("name", "available"), [("digits", 997), ("colored_mnist", 2000)])
def test_a_benchmark_gives_at_most_a_pair_for_each_training_image(name, available, mnist):
    with pytest.raises(ValueError, match=f"num_pairs={available + 1}, but {available} training"):
        LOADERS[name](data_dir=str(mnist[0]), num_pairs=available + 1)
    with pytest.raises(ValueError, match="num_pairs=0"):
        LOADERS[name](data_dir=str(mnist[0]), num_pairs=0)
    assert len(LOADERS[name](data_dir=str(mnist[0]), num_pairs=available).pairs) == available


def test_the_split_of_irm_is_that_of_its_code(mnist, colored):
    _, arrays = mnist
    assert [len(getattr(colored, part)) for part in PARTS] == [2000, 200, 400]
    numbers = {part: number_of(gray(getattr(colored, part)["image"][:])[0].astype(int), 2400) for part in PARTS}
    assert sorted(numbers["train"]) == list(range(2000))
    assert list(numbers["train"]) != list(range(2000))
    assert list(numbers["test"]) == colored.test_pairs["source_id"][:] == list(range(2000, 2400))
    assert list(numbers["validation"]) == colored.validation_pairs["source_id"][:] == list(range(2400, 2800, 2))
    pixels, _ = gray(colored.train["image"][:])
    np.testing.assert_array_equal(pixels, arrays["xtr"][numbers["train"]])
    assert np.bincount(colored.train["environment"][:]).tolist() == [1000, 1000]


def test_the_noise_and_colors_of_irm_have_their_probabilities(mnist, colored):
    digit = np.concatenate([mnist[1]["ytr"], mnist[1]["yte"]])
    for part, pairs in (("test", colored.test_pairs), ("validation", colored.validation_pairs)):
        clean = digit[pairs["source_id"][:]] >= 5
        noise = np.mean(clean != np.array(getattr(colored, part)["label"][:]))
        assert noise == pytest.approx(0.25, abs=0.1), part  # over 3 standard errors
    train = colored.train.with_format("numpy").select_columns(["label", "attribute", "environment"])[:]
    number = number_of(gray(colored.train["image"][:])[0].astype(int), 2400)
    assert np.mean((digit[number] >= 5) != train["label"]) == pytest.approx(0.25, abs=0.04)
    flipped = train["label"] != train["attribute"]
    assert flipped[train["environment"] == 0].mean() == pytest.approx(0.2, abs=0.045)
    assert flipped[train["environment"] == 1].mean() == pytest.approx(0.1, abs=0.035)
    # colour follows the noisy label: it contains no information about whether the label is noise
    noisy = (digit[number] >= 5) != train["label"]
    assert flipped[noisy].mean() == pytest.approx(flipped[~noisy].mean(), abs=0.07)
    assert np.mean(np.array(colored.test["label"][:]) != colored.test["attribute"][:]) == pytest.approx(0.9, abs=0.05)
    mixed = np.mean(np.array(colored.validation["label"][:]) != colored.validation["attribute"][:])
    assert mixed == pytest.approx(0.5, abs=0.12)


def test_the_pairs_of_colored_mnist_are_training_images_with_their_noisy_labels(colored):
    pixels, _ = gray(colored.train["image"][:])
    label_of = dict(zip(number_of(pixels.astype(int), 2400), colored.train["label"][:], strict=True))
    ids = colored.pairs["source_id"][:]
    assert len(set(ids)) == len(ids) == 500
    assert [label_of[i] for i in ids] == colored.pairs["label"][:]
    np.testing.assert_array_equal(number_of(gray(colored.pairs["image_b"][:])[0].astype(int), 2400), ids)


def test_the_default_number_of_pairs_is_at_most_the_number_of_training_images(mnist, monkeypatch):
    monkeypatch.setattr(colored_mnist, "NUM_PAIRS", 150)
    assert len(load_colored_mnist(data_dir=str(mnist[0])).pairs) == 150
    monkeypatch.setattr(colored_mnist, "NUM_PAIRS", 20_000)
    assert len(load_colored_mnist(data_dir=str(mnist[0])).pairs) == 2000


def test_colored_mnist_reads_the_folder_of_the_environment_variable(mnist, monkeypatch):
    monkeypatch.setenv("IPG_DATA", str(mnist[0]))
    assert len(load_colored_mnist(num_pairs=5).train) == 2000


def test_a_file_of_another_size_gives_a_warning(mnist, monkeypatch):
    messages = []
    monkeypatch.setattr(colored_mnist.logger, "warning", messages.append)
    load_colored_mnist(data_dir=str(mnist[0]), num_pairs=5)
    assert len(messages) == 1 and "2400 and 400" in messages[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"yte": None}, r"lacks the arrays \['yte'\]"),
        ({"xtr": np.zeros((2400, 784), np.uint8)}, r"xtr of .*mnist.npz is uint8 \(2400, 784\)"),
        ({"xte": np.zeros((400, 28, 28), np.float32)}, "xte of .* is float32"),
        ({"ytr": np.zeros(2399, np.uint8)}, r"ytr of .* is uint8 \(2399,\), but must be uint8 \(2400,\)"),
        ({"yte": np.full(400, 10, np.uint8)}, "yte of .* has the label 10"),
        ({"xte": np.zeros((0, 28, 28), np.uint8), "yte": np.zeros(0, np.uint8)}, "xte of .* has 0 rows"),
    ],
)
def test_a_file_with_wrong_arrays_is_refused(tmp_path, changes, message):
    synthetic_mnist(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_colored_mnist(data_dir=str(tmp_path))


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.999])
def test_a_file_that_is_cut_off_is_refused(tmp_path, mnist, kept):
    whole = (mnist[0] / "mnist.npz").read_bytes()
    (tmp_path / "mnist.npz").write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=r"mnist\.npz cannot be read, it is damaged"):
        load_colored_mnist(data_dir=str(tmp_path))


def test_a_file_with_a_changed_byte_is_refused(tmp_path, mnist):
    damaged = bytearray((mnist[0] / "mnist.npz").read_bytes())
    damaged[len(damaged) // 2] ^= 255
    (tmp_path / "mnist.npz").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"mnist\.npz cannot be read"):
        load_colored_mnist(data_dir=str(tmp_path))


def test_missing_images_give_an_error_that_says_how_to_get_them(tmp_path, monkeypatch):
    # conftest.py sets HF_HUB_OFFLINE
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"data_dir=.* has no mnist\.npz\. Put mnist\.npz"):
        load_colored_mnist(data_dir=str(tmp_path))
    for folder in (None, str(tmp_path)):
        monkeypatch.delenv("IPG_DATA", raising=False)
        if folder:
            monkeypatch.setenv("IPG_DATA", folder)
        with pytest.raises(FileNotFoundError) as caught:
            load_colored_mnist()
        for part in ("mnist.npz", "IPG_DATA", "ylecun/mnist", "recipes/digits/ipg_resnet.yaml", folder or "not set"):
            assert part in str(caught.value)


def test_the_hub_set_gives_the_same_benchmark_as_the_file(mnist, monkeypatch):
    _, arrays = mnist
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    )
    splits = {
        split: datasets.Dataset.from_dict(
            {"image": [Image.fromarray(x) for x in arrays[f"x{suffix}"]], "label": arrays[f"y{suffix}"]}, features
        )
        for split, suffix in (("train", "tr"), ("test", "te"))
    }
    monkeypatch.delenv("IPG_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"ylecun/mnist": datasets.DatasetDict(splits)}[name])
    hub, file = load_colored_mnist(num_pairs=50), load_colored_mnist(data_dir=str(mnist[0]), num_pairs=50)
    for part in dataclasses.fields(file):
        assert getattr(hub, part.name).data.table.equals(getattr(file, part.name).data.table)


def columns_of(rows, *names):
    return [np.array(rows[name][:]) for name in names]


def test_the_draws_of_irm_never_change(colored):
    """Committed records are runs on these draws. The digest is of the labels, colours, environments and rows."""
    drawn = columns_of(colored.train, "label", "attribute", "environment")
    for rows in (colored.validation, colored.test):
        drawn += columns_of(rows, "label", "attribute")
    for pairs in (colored.pairs, colored.validation_pairs, colored.test_pairs):
        drawn += columns_of(pairs, "label", "attribute_a", "source_id")
    digest = hashlib.sha256(b"".join(values.astype("<i8").tobytes() for values in drawn)).hexdigest()
    assert digest == "5c7a0680fd607ea36778bcb501b53df6fe7bea31d1b32fbedd699cc40994a18e"


@pytest.fixture(scope="module")
def domainbed(mnist):
    return load_colored_mnist(data_dir=str(mnist[0]), num_pairs=500, protocol="domainbed")


def test_the_split_of_domainbed_holds_out_a_fifth_of_two_environments(mnist, domainbed):
    """The 2,800 images of both files are in three environments of 934, 933 and 933."""
    assert [len(getattr(domainbed, part)) for part in PARTS] == [748 + 747, 186 + 186, 933]
    numbers = {part: number_of(gray(getattr(domainbed, part)["image"][:])[0].astype(int), 2400) for part in PARTS}
    assert sorted(np.concatenate([*numbers.values()])) == list(range(2800))
    # each split has images of the training file and of the test file, 6 to 1
    for part in PARTS:
        assert np.mean(numbers[part] < 2400) == pytest.approx(6 / 7, abs=0.06), part
    assert list(numbers["test"]) == domainbed.test_pairs["source_id"][:]
    assert list(numbers["validation"]) == domainbed.validation_pairs["source_id"][:]
    assert {*domainbed.pairs["source_id"]} <= {*numbers["train"].tolist()}
    label_of = dict(zip(numbers["train"].tolist(), domainbed.train["label"][:], strict=True))
    assert [label_of[i] for i in domainbed.pairs["source_id"]] == domainbed.pairs["label"][:]
    assert np.bincount(domainbed.train["environment"][:]).tolist() == [748, 747]


def test_the_noise_and_colors_of_domainbed_have_their_probabilities(mnist, domainbed):
    digit = np.concatenate([mnist[1]["ytr"], mnist[1]["yte"]])
    label, color, environment = columns_of(domainbed.train, "label", "attribute", "environment")
    for number, flip in enumerate((0.1, 0.2)):
        assert np.mean((label != color)[environment == number]) == pytest.approx(flip, abs=0.045)
    for part, flip in (("validation", 0.15), ("test", 0.9)):
        label, color = columns_of(getattr(domainbed, part), "label", "attribute")
        assert np.mean(label != color) == pytest.approx(flip, abs=0.055), part
        clean = digit[getattr(domainbed, f"{part}_pairs")["source_id"][:]] >= 5
        assert np.mean(clean != label) == pytest.approx(0.25, abs=0.07), part


def test_a_groups_expected_accuracy_does_not_depend_on_the_flip():
    """The worst group of validation can choose a checkpoint of DomainBed's protocol: a classifier that knows the digit
    and ignores colour is right in 0.75 of each group, on validation (flips 0.1, 0.2) as on test (flip 0.9)."""
    count = 100_000
    digits = np.random.default_rng(0).integers(0, 10, count)
    for flips, minority in ((np.repeat([0.1, 0.2], count // 2), [1, 2]), (np.full(count, 0.9), [0, 3])):
        label, color = colored_mnist._draw_noise(digits, flips, np.random.default_rng(1))
        group, right = 2 * label + color, (digits >= 5) == label
        sizes = np.bincount(group)
        assert sizes[minority].max() < sizes.max() / 3
        # the smallest group has 5,000 rows: 3 standard errors are 0.018
        np.testing.assert_allclose(np.bincount(group, weights=right) / sizes, 0.75, atol=0.02)


def test_the_protocols_differ_and_are_functions_of_the_seed(mnist, colored, domainbed):
    again = load_colored_mnist(data_dir=str(mnist[0]), num_pairs=500, protocol="domainbed")
    other = load_colored_mnist(data_dir=str(mnist[0]), num_pairs=500, protocol="domainbed", seed=1)
    for part in dataclasses.fields(domainbed):
        table = getattr(domainbed, part.name).data.table
        assert table.equals(getattr(again, part.name).data.table), part.name
        assert not table.equals(getattr(other, part.name).data.table), part.name
        assert not table.equals(getattr(colored, part.name).data.table), part.name


@pytest.mark.parametrize("protocol", ["irm", "domainbed"])
def test_fashion_mnist_differs_in_its_file_and_label_names_only(tmp_path, mnist, monkeypatch, protocol):
    """The same arrays under the name of Fashion-MNIST give the same sets, except for the names of the labels."""
    synthetic_mnist(tmp_path, name="fashion_mnist.npz")
    options = {"num_pairs": 20, "protocol": protocol}
    fashion = load_colored_mnist(data_dir=str(tmp_path), images="fashion_mnist", **options)
    digits = load_colored_mnist(data_dir=str(mnist[0]), **options)
    for part in dataclasses.fields(digits):
        ours, theirs = getattr(fashion, part.name), getattr(digits, part.name)
        assert ours.features["label"].names == ["first_five", "last_five"]
        for name in ours.column_names:
            assert ours.data.column(name).equals(theirs.data.column(name)), (part.name, name)
    with pytest.raises(FileNotFoundError, match=r"has no mnist\.npz"):
        load_colored_mnist(data_dir=str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.delenv("IPG_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"zalando-datasets/fashion_mnist cannot be loaded.*fashion_mnist\.npz"):
        load_colored_mnist(images="fashion_mnist")


@pytest.mark.parametrize("option", [{"images": "kmnist"}, {"protocol": "wilds"}])
def test_colored_mnist_refuses_unknown_options(mnist, option):
    with pytest.raises(ValueError, match=f"{next(iter(option))}='.*' is unknown: choose from"):
        load_colored_mnist(data_dir=str(mnist[0]), **option)


def test_the_facts_of_a_benchmark_depend_on_its_options():
    assert describe("colored_mnist") == describe("colored_mnist", {"images": "mnist", "protocol": "irm"})
    assert describe("colored_mnist") == ABOUT["colored_mnist"]
    fashion = describe("colored_mnist", {"images": "fashion_mnist", "protocol": "domainbed"})
    assert (fashion.title, fashion.license) == ("Coloured Fashion-MNIST, protocol of DomainBed", "MIT")
    assert fashion.hub_set == "zalando-datasets/fashion_mnist"
    assert describe("colored_mnist", {"protocol": "domainbed"}).license == "CC BY-SA 3.0"
    for given in ("100", 100):
        assert "every training image" in describe("waterbirds", {"correlation": given}).shortcut
    assert "95 %" in describe("waterbirds", {"correlation": "95"}).shortcut
    # each variant names options of its loader, with other values than the defaults
    for name, options, changes in VARIANTS:
        known = inspect.signature(LOADERS[name]).parameters
        assert {*options} <= {*known} and all(known[key].default != value for key, value in options.items())
        assert describe(name, options) != ABOUT[name] and {*changes} <= {f.name for f in dataclasses.fields(About)}


def needs(name):
    found = (Path(os.environ.get("IPG_DATA") or "/nonexistent") / name).exists()
    return pytest.mark.skipif(not found, reason=f"IPG_DATA names no folder with {name}")


@needs("fashion_mnist.npz")
def test_fashion_mnist_by_domainbed_has_its_documented_sizes():
    benchmark = load_colored_mnist(images="fashion_mnist", protocol="domainbed")
    sizes = [len(getattr(benchmark, field.name)) for field in dataclasses.fields(benchmark)]
    assert sizes == [37_335, 9_332, 23_333, 20_000, 9_332, 23_333]
    label, color = columns_of(benchmark.validation, "label", "attribute")
    assert np.bincount(2 * label + color).min() > 600


@needs("scenes")
def test_scenes_have_their_documented_sizes():
    for correlation, groups in (("95", [1092, 58, 24, 456]), ("100", [1092, 0, 0, 456])):
        benchmark = load_scenes(correlation=correlation)
        label, place = columns_of(benchmark.train, "label", "attribute")
        assert np.bincount(2 * label + place, minlength=4).tolist() == groups
        sizes = [len(getattr(benchmark, field.name)) for field in dataclasses.fields(benchmark)]
        assert sizes[1:] == [480, 880, 960, 240, 440]


@needs("mnist.npz")
def test_mnist_by_irm_has_its_documented_sizes():
    benchmark = load_colored_mnist()
    sizes = [len(getattr(benchmark, field.name)) for field in dataclasses.fields(benchmark)]
    assert sizes == [50_000, 5_000, 10_000, 20_000, 5_000, 10_000]
    columns = benchmark.train.with_format("numpy").select_columns(["label", "attribute", "environment"])[:]
    flipped = columns["label"] != columns["attribute"]
    for environment, flip in enumerate((0.2, 0.1)):
        assert flipped[columns["environment"] == environment].mean() == pytest.approx(flip, abs=0.01)
    for part, flip in (("validation", 0.5), ("test", 0.9)):
        columns = getattr(benchmark, part).with_format("numpy").select_columns(["label", "attribute"])[:]
        assert np.mean(columns["label"] != columns["attribute"]) == pytest.approx(flip, abs=0.03)
        assert np.bincount(columns["label"] * 2 + columns["attribute"]).min() > 400


def test_the_perceptron_is_that_of_irm():
    torch.manual_seed(0)
    model = ColoredMnistMLPForImageClassification(ColoredMnistMLPConfig())
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    assert shapes == [(390, 392), (390,), (390, 390), (390,), (2, 390), (2,)]
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        else:
            bound = (6 / sum(parameter.shape)) ** 0.5
            assert 0.95 * bound < parameter.abs().max() <= bound
            assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert find_head(model).path == "classifier"
    # by hand: two layers with ReLU, on every second pixel of the first two channels
    images = torch.rand(3, 3, 28, 28)
    first, _, second, _ = model.hidden
    x = images[:, :2, ::2, ::2].reshape(3, 392)
    z = second(first(x).clamp(min=0)).clamp(min=0)
    labels = torch.tensor([0, 1, 1])
    outputs = model(images, labels=labels)
    torch.testing.assert_close(outputs.logits, z @ model.classifier.weight.T)
    torch.testing.assert_close(outputs.loss, torch.nn.functional.cross_entropy(outputs.logits, labels))
    torch.testing.assert_close(model(images, labels=labels, num_items_in_batch=6).loss, outputs.loss / 2)
    unseen = images.clone()
    unseen[:, 2] = 9
    unseen[:, :, 1::2] = 9
    torch.testing.assert_close(model(unseen).logits, outputs.logits)


def test_a_saved_perceptron_loads_as_it_was(tmp_path):
    config = AutoConfig.for_model("colored_mnist_mlp", hidden_size=16, num_labels=3, id2label={0: "a", 1: "b", 2: "c"})
    model = AutoModelForImageClassification.from_config(config)
    assert isinstance(model, ColoredMnistMLPForImageClassification)
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 28, "width": 28}, do_normalize=False).save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.hidden_size == 16
    for (name, saved), read in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(saved, read), name
    image = np.random.default_rng(0).integers(0, 256, (28, 28, 3)).astype(np.uint8)
    scores = pipeline("image-classification", model=str(tmp_path), device="cpu")(Image.fromarray(image), top_k=3)
    with torch.no_grad():
        expected = model(torch.from_numpy(image / np.float32(255)).permute(2, 0, 1)[None]).logits.softmax(1)[0]
    assert {score["label"]: score["score"] for score in scores} == {
        name: pytest.approx(value.item(), abs=1e-5) for name, value in zip("abc", expected, strict=True)
    }
    # a head for other classes is new, and initialised as in IRM
    other = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert other.classifier.weight.abs().max() > 0
    assert not other.classifier.bias.any()
    assert torch.equal(other.hidden[0].weight, model.hidden[0].weight)


def test_the_perceptron_may_have_other_sizes():
    config = ColoredMnistMLPConfig(hidden_size=4, num_hidden_layers=1, image_size=7, num_channels=2, subsample=3)
    model = ColoredMnistMLPForImageClassification(config)
    assert model.hidden[0].in_features == 2 * 3 * 3
    assert model(torch.zeros(2, 2, 7, 7)).logits.shape == (2, 2)
    with pytest.raises(ValueError, match=r"\(1, 3, 28, 28\), but this model takes \(batch, 2, 7, 7\)"):
        model(torch.zeros(1, 3, 28, 28))


@pytest.mark.parametrize("wrong", [{"subsample": 0}, {"num_channels": 1}, {"hidden_size": "390"}, {"image_size": 0}])
def test_the_perceptron_refuses_wrong_sizes(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ColoredMnistMLPConfig(**wrong)
