# SPDX-License-Identifier: Apache-2.0
"""Pairs made from images: by recolouring, overlays, other backgrounds, matching; and pairs from files and columns."""

import csv
import importlib
import io
import itertools
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import datasets
import numpy as np
import pytest
import small
import torch
from PIL import Image, ImageChops
from transformers import ViTImageProcessor

from ipg_hf.baselines.degrade import degrade_pairs
from ipg_hf.data import load_digits
from ipg_hf.pairs import (
    AdversarialPairs,
    background_pairs,
    makers,
    match_pairs,
    matching,
    mix_pairs,
    overlay_pairs,
    pairs_from_columns,
    pairs_from_folders,
    pairs_from_table,
    recolor_pairs,
)
from ipg_hf.pairs.edits import fill_foreground
from ipg_hf.pairs.matching import _assigned, extract_features
from ipg_hf.recipe import Recipe

COLUMNS = ["image_a", "image_b", "label", "attribute_a", "attribute_b", "source_id"]
PLACE = datasets.ClassLabel(names=["land", "water"])
LABEL = datasets.ClassLabel(names=["cat", "dog"])


def photo(seed, size=32):
    """An image of smooth random colours, like a photograph."""
    coarse = np.random.default_rng(seed).integers(20, 236, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


def photos(count=8, masks=False):
    columns = {
        "image": [photo(seed) for seed in range(count)],
        "label": [number % 2 for number in range(count)],
        "attribute": [number // 2 % 2 for number in range(count)],
    }
    features = {"image": datasets.Image(), "label": LABEL, "attribute": PLACE}
    if masks:
        mask = Image.new("L", (32, 32))
        mask.paste(255, (8, 8, 20, 20))
        columns["mask"], features["mask"] = [mask] * count, datasets.Image()
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def pixels(image):
    return np.asarray(image).astype(int)


def equal(one, other):
    return len(one) == len(other) and all(
        {k: v for k, v in a.items() if "image" not in k} == {k: v for k, v in b.items() if "image" not in k}
        and all((pixels(a[k]) == pixels(b[k])).all() for k in ("image_a", "image_b"))
        for a, b in zip(one, other, strict=True)
    )


# ---- Every maker ----


def matched_by_features(source, **kwargs):
    processor = ViTImageProcessor(size={"height": small.SIZE, "width": small.SIZE})
    return match_pairs(source, model=small.vit(), processor=processor, **kwargs)


MAKERS = {
    "recolor": recolor_pairs,
    "overlay": lambda source, **kwargs: overlay_pairs(source, random_position=True, overlay="mark", **kwargs),
    "background": background_pairs,
    "matched": matched_by_features,
    "matched at random": lambda source, **kwargs: match_pairs(source, match_on="random", **kwargs),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_maker_gives_a_pair_set_of_the_contract(tmp_path, name):
    make, source = MAKERS[name], photos(12, masks=True)
    pairs = make(source, seed=3)
    assert pairs.column_names[:6] == COLUMNS
    assert pairs.features["label"] == LABEL
    assert len(pairs) == (12 if "matched" not in name else 6)
    for row in pairs:
        assert row["label"] == source[row["source_id"]]["label"]
        assert row["attribute_a"] != row["attribute_b"]
        assert row["image_a"].size == row["image_b"].size == (32, 32)
        assert row["image_a"].mode == row["image_b"].mode == "RGB"
        assert ImageChops.difference(row["image_a"], row["image_b"]).getbbox()
    assert equal(pairs, make(source, seed=3))
    if name != "matched":
        assert not equal(pairs, make(source, seed=4))
    fewer = make(source, seed=3, num_pairs=3)
    assert len(fewer) == 3
    assert set(fewer["source_id"][:]) <= set(pairs["source_id"][:])
    with pytest.raises(ValueError, match="num_pairs=99"):
        make(source, num_pairs=99)
    # the pairs are an ordinary data set: they can be saved, read, mapped and streamed
    pairs.save_to_disk(str(tmp_path / "set"))
    assert equal(datasets.load_from_disk(str(tmp_path / "set")), pairs)
    pairs.to_parquet(str(tmp_path / "set.parquet"))
    assert equal(pairs_from_table(tmp_path / "set.parquet"), pairs.select_columns(COLUMNS))
    assert next(iter(pairs.to_iterable_dataset()))["label"] == pairs[0]["label"]
    assert pairs.map(lambda row: {"twice": 2 * row["label"]})["twice"][:] == [2 * label for label in pairs["label"]]


@pytest.mark.parametrize("name", ["recolor", "overlay"])
def test_a_maker_turns_a_stream_into_the_stream_of_the_same_pairs(name):
    make, source = MAKERS[name], photos()
    stream = make(source.to_iterable_dataset(), seed=3)
    assert isinstance(stream, datasets.IterableDataset)
    assert equal(list(stream), list(make(source, seed=3)))
    with pytest.raises(ValueError, match="no length"):
        make(source.to_iterable_dataset(), num_pairs=2)


NUMBERS = {  # option -> values that it takes, and values of the right type that it does not
    "amount": ([-30, 400.5], []),
    "size": ([0.3, 1, np.float32(0.5)], [0, -0.1, 1.01]),
    "opacity": ([0.3, 1], [0, -0.1, 1.01]),
    "soft_edge": ([0, 2.5], [-1]),
    "batch_size": ([1, 3], [0, -1, 2.5]),
    "max_per_group": ([1, None], [0, -1, 2.5]),
    "color": ([[1, 2, 3], (0, 0, 255)], [[1, 2], [1, 2, 3, 4], [-1, 2, 3], [1, 2, 256], [1, 2, 0.5], "red"]),
    "order": (["brg"], ["rg", "rgbr", "xyz", ["r", "g", "b"]]),
    "text": (["a"], [["a"]]),
    "seed": ([0, np.int64(3)], [-1, 0.5]),
    "num_pairs": ([2, None], [0, -1, 99, 1.5]),
}
ADVERSARIAL = {
    **dict.fromkeys(("color", "contrast", "brightness", "blur", "noise"), ([0, 1], [-0.1, 1.1])),
    **dict.fromkeys(("steps", "every"), ([1, 2], [0, -1, 1.5])),
    "step_size": ([0.5, 3, None], [0, -1]),
}
OPTIONS = {
    "recolor": ["amount", "order", "seed", "num_pairs"],
    "overlay": ["size", "opacity", "color", "text", "seed", "num_pairs"],
    "background": ["soft_edge", "seed", "num_pairs"],
    "matched": ["batch_size", "max_per_group", "seed", "num_pairs"],
    "mixed": ["grid", "num_pairs", "seed"],
    "adversarial": [*ADVERSARIAL],
}


@pytest.mark.parametrize(("maker", "option"), [(maker, option) for maker in OPTIONS for option in OPTIONS[maker]])
def test_an_option_of_a_maker_is_right_or_named(maker, option):
    """No error of numpy or PIL, and nothing made of a value that means nothing."""
    source = photos(6, masks=True)
    make, known = MAKERS.get(maker), NUMBERS
    if maker == "mixed":
        source = recolor_pairs(source)
        known = {"grid": ([2, 8], [1, 0, -1, 2.5]), "num_pairs": ([6, 9], [5, 0, -1, 7.5]), "seed": NUMBERS["seed"]}
        make = partial(mix_pairs, **({} if option == "num_pairs" else {"num_pairs": 8}))
    if maker == "adversarial":
        known, make = ADVERSARIAL, AdversarialPairs
    if maker == "overlay":
        make = partial(overlay_pairs, overlay="text")
    right, wrong = known[option]
    for value in right:
        assert len(getattr(made := make(source, **{option: value}), "source", made))
    for value in [*wrong, float("nan"), float("inf"), "1", True, [], {}]:
        if option == "text" and isinstance(value, str):
            continue
        with pytest.raises(ValueError, match=f"^{option}=") as error:
            make(source, **{option: value})
        assert repr(value) in str(error.value) and "\n" not in str(error.value)


# ---- Recolouring ----


def test_recolored_digits_are_the_rendered_digits():
    """The maker sees only the coloured training images. The benchmark renders its pairs from the strokes."""
    data = load_digits(num_pairs=997)
    made = recolor_pairs(data.train, change="channels", attribute="attribute")
    rendered = {pixels(row["image_a"]).tobytes(): row for row in data.pairs}
    for ours in made:
        theirs = rendered[pixels(ours["image_a"]).tobytes()]
        assert (pixels(ours["image_b"]) == pixels(theirs["image_b"])).all()
        assert ours["attribute_a"] == theirs["attribute_a"] == 0


def test_recolor_pairs_changes_gray_channels_and_hue():
    source = photos(2)
    gray = recolor_pairs(source, change="gray")[0]
    assert (pixels(gray["image_a"]) == pixels(source[0]["image"])).all()
    assert np.ptp(pixels(gray["image_b"]), axis=2).max() == 0
    turned = pixels(recolor_pairs(source, change="channels", order="brg")[0]["image_b"])
    assert (turned == pixels(source[0]["image"])[..., [2, 0, 1]]).all()
    red = datasets.Dataset.from_dict({"image": [Image.new("RGB", (4, 4), (200, 0, 0))]})
    assert recolor_pairs(red, change="hue", amount=120)[0]["image_b"].getpixel((0, 0))[1] > 190
    with pytest.raises(ValueError, match=r"two sides of row 0 are equal.*Leave out rows"):
        recolor_pairs(datasets.Dataset.from_dict({"image": [Image.new("RGB", (4, 4), "gray")]}), change="gray")
    for wrong in ({"change": "blue"}, {"change": "channels", "order": "rgx"}, {"attribute": "colour"}):
        with pytest.raises(ValueError, match=r"unknown|must be three|no column"):
            recolor_pairs(source, **wrong)


# ---- Overlays ----


@pytest.mark.parametrize("grey", [[], [0], [2, 5], [*range(6)]])
def test_images_that_do_not_change_may_be_left_out(grey, caplog):
    """The others make the pairs that they make alone, and the next caller without the option gets the error."""
    whole = photos(6)
    rows = [dict(row) for row in whole]
    for row in grey:
        rows[row]["image"] = rows[row]["image"].convert("L").convert("RGB")
    source = datasets.Dataset.from_list(rows, features=whole.features)
    kept = [row for row in range(6) if row not in grey]
    for given in (source, source.to_iterable_dataset()):
        made = list(recolor_pairs(given, change="hue", skip_unchanged=True))
        assert [row["source_id"] for row in made] == kept
        assert equal(made, list(recolor_pairs(whole, change="hue").select(kept)))
    assert (f"{len(grey)} of 6 images make no pair" in caplog.text) == bool(grey)
    if grey:
        with pytest.raises(ValueError, match=f"row {grey[0]}.* are equal.*skip_unchanged=True"):
            recolor_pairs(source, change="hue")
    with pytest.raises(ValueError, match="differ in size"):
        overlay_pairs(source, overlay=lambda image, rng: image.resize((3, 3)), skip_unchanged=True)


@pytest.mark.parametrize("overlay", ["mark", "frame", "text", "watermark", "ruler"])
def test_an_overlay_covers_its_own_area_only(overlay):
    source = photos(3)
    pairs = overlay_pairs(source, overlay=overlay, size=0.25, color=(250, 250, 250))
    half = overlay_pairs(source, overlay=overlay, size=0.25, color=(250, 250, 250), opacity=0.5)
    for row, image, faint in zip(pairs, source["image"], half, strict=True):
        assert (pixels(row["image_a"]) == pixels(image)).all()
        changed = (pixels(row["image_a"]) != pixels(row["image_b"])).any(2)
        assert 0.01 < changed.mean() < 0.8
        there = pixels(row["image_b"]) - pixels(row["image_a"])
        assert np.abs((pixels(faint["image_b"]) - pixels(faint["image_a"])) - there / 2).max() <= 2
        if overlay == "mark":
            assert changed[:8, :8].all()
            assert changed.sum() == 64
        if overlay == "frame":
            assert not changed[8:-8, 8:-8].any()
            assert changed[:, :8].mean() > 0.95
        if overlay == "ruler":
            assert not changed[:-8].any()


def test_an_overlay_may_be_an_image_or_a_function():
    source = photos(8)
    logo = Image.new("RGBA", (10, 10), (0, 0, 0, 0))
    logo.paste((255, 0, 0, 255), (0, 0, 5, 10))
    row = overlay_pairs(source, overlay=logo, size=0.5)[0]
    changed = (pixels(row["image_a"]) != pixels(row["image_b"])).any(2)
    assert changed[:16, :6].all()
    assert not changed[:, 10:].any()

    def inverted(image, rng):
        return ImageChops.invert(image)

    assert (pixels(overlay_pairs(source, overlay=inverted)[1]["image_b"]) == 255 - pixels(source[1]["image"])).all()


def test_overlay_pairs_leaves_out_images_that_have_the_overlay_already():
    source = photos(8)
    clean = overlay_pairs(source, attribute="attribute", present="water")
    assert clean["source_id"][:] == [0, 1, 4, 5]
    assert len(list(overlay_pairs(source.to_iterable_dataset(), attribute="attribute", present="water"))) == 4
    for wrong in ({"overlay": "stamp"}, {"size": 0}, {"opacity": 2}, {"attribute": "marked"}):
        with pytest.raises(ValueError, match=r"'stamp' is neither mark|not valid|no column"):
            overlay_pairs(source, **wrong)


def of_values(values, feature, count=8):
    """Eight photographs whose attribute has the given values in turn."""
    table = {"image": [photo(seed) for seed in range(count)], "x": [values[row % len(values)] for row in range(count)]}
    return datasets.Dataset.from_dict(table, features=datasets.Features(image=datasets.Image(), x=feature))


@pytest.mark.parametrize("names", [*itertools.permutations(["ruler", "skin", "Stift"])])
def test_the_order_of_names_does_not_say_which_images_have_the_overlay(names):
    for source in (
        of_values(names, datasets.ClassLabel(names=list(names))),
        of_values(names, datasets.Value("string")),
    ):
        clean = [row for row in range(8) if names[row % 3] == "skin"]
        made = overlay_pairs(source, overlay="ruler", attribute="x", present=["ruler", "Stift"])
        assert made["source_id"][:] == clean
        made = overlay_pairs(source, overlay="ruler", attribute="x", present="skin")
        assert made["source_id"][:] == [row for row in range(8) if row not in clean]
        with pytest.raises(ValueError, match=r"'x' has the values .*'ruler'.*present="):
            overlay_pairs(source, overlay="ruler", attribute="x")
        with pytest.raises(ValueError, match=r"present='pen' is no value of 'x', which has .*'ruler'"):
            overlay_pairs(source, overlay="ruler", attribute="x", present="pen")
    stream = of_values(names, datasets.ClassLabel(names=list(names))).to_iterable_dataset()
    made = [*overlay_pairs(stream, overlay="ruler", attribute="x", present=["ruler", "Stift"])]
    assert [row["source_id"] for row in made] == clean


@pytest.mark.parametrize(
    ("values", "feature"),
    [
        ([0, 1], datasets.Value("int64")),
        ([0.0, 1.0], datasets.Value("float32")),
        ([False, True], datasets.Value("bool")),
        ([0, 1], datasets.ClassLabel(names=["0", "1"])),
        ([0, 1], datasets.ClassLabel(names=["No", "Yes"])),
        ([0, 1], datasets.ClassLabel(names=["without", "with"])),
    ],
)
def test_zero_and_one_say_which_images_have_the_overlay(values, feature):
    source = of_values(values, feature)
    for made in (overlay_pairs(source, attribute="x"), overlay_pairs(source, attribute="x", present=values[1])):
        assert made["source_id"][:] == [0, 2, 4, 6]
    assert overlay_pairs(source, attribute="x", present=values[0])["source_id"][:] == [1, 3, 5, 7]


@pytest.mark.parametrize(
    ("values", "feature"),
    [
        ([0, 1, 2], datasets.Value("int64")),
        ([0, 1, None], datasets.Value("int64")),
        ([0.0, 1.0, float("nan")], datasets.Value("float64")),
        ([0, 1, -1], datasets.ClassLabel(names=["no", "yes"])),
        (["no", "yes", None], datasets.Value("string")),
    ],
)
def test_a_value_that_does_not_say_whether_there_is_an_overlay_is_refused(values, feature):
    present = "yes" if "yes" in values else None
    with pytest.raises(ValueError, match=r"x=.* does not say whether an image has the overlay"):
        overlay_pairs(of_values(values, feature), attribute="x", present=present)
    stream = of_values(values, feature).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"x=.* does not say whether an image has the overlay"):
        list(overlay_pairs(stream, attribute="x", present=present))
    lists = of_values([[0], [1]], datasets.List(datasets.Value("int64")))
    with pytest.raises(ValueError, match="'x' is a List"):
        overlay_pairs(lists, attribute="x")


def test_the_number_of_a_class_that_is_the_name_of_another_is_refused():
    source = of_values([0, 1], datasets.ClassLabel(names=["1", "0"]))
    with pytest.raises(ValueError, match="present=1 is the number of the class '0' of 'x', and the name of another"):
        overlay_pairs(source, attribute="x", present=1)
    assert overlay_pairs(source, attribute="x", present="1")["source_id"][:] == [1, 3, 5, 7]
    with pytest.raises(ValueError, match="all 8 images have the overlay already"):
        overlay_pairs(source, attribute="x", present=["0", "1"])


def test_a_value_that_a_stream_does_not_show_is_said(caplog):
    stream = of_values(["ruler", "skin"], datasets.Value("string")).to_iterable_dataset()
    assert len([*overlay_pairs(stream, attribute="x", present="Ruler")]) == 8
    assert (
        "present='Ruler' is no value of 'x' in the first rows of the stream, which have ['ruler', 'skin']"
        in caplog.text
    )
    caplog.clear()
    assert len([*overlay_pairs(stream, attribute="x", present="ruler")]) == 4 and not caplog.text
    unnamed = datasets.IterableDataset.from_generator(lambda: iter([{"image": photo(0)}]))
    with pytest.raises(ValueError, match="the stream does not say what its columns are"):
        overlay_pairs(unnamed)


@pytest.mark.parametrize("names", [["green", "red"], ["red", "green"]])
def test_a_text_attribute_works_like_a_class_label(names):
    """Texts are put in alphabetical order, as those of folders are."""
    texts = of_values(names, datasets.Value("string"))
    ids = of_values([sorted(names).index(name) for name in names], datasets.ClassLabel(names=sorted(names)))
    for source, changes in ((texts, [{"attribute": "x"}]), (ids, [{"attribute": "x"}])):
        made = [recolor_pairs(source, change="channels", **change) for change in changes]
        for pairs in made:
            assert pairs.features["attribute_a"].names == ["green", "red"]
            for row, image, value in zip(pairs, source["image"], itertools.cycle(names), strict=False):
                own = "image_a" if value == "green" else "image_b"
                assert (pixels(row[own]) == pixels(image)).all()
    with pytest.raises(ValueError, match=r"'x' must have two values, but has \['blue', 'green', 'red'\]"):
        recolor_pairs(of_values(["red", "green", "blue"], datasets.Value("string")), change="channels", attribute="x")
    with pytest.raises(ValueError, match=r"row 2.*x=None is none of the two values"):
        recolor_pairs(of_values([*names, None], datasets.Value("string")), change="channels", attribute="x")
    three = of_values([0, 1, 2], datasets.ClassLabel(names=["blue", "green", "red"]))
    with pytest.raises(ValueError, match=r"row 2.*x=2 is none of the two values"):
        recolor_pairs(three, change="channels", attribute="x")
    with pytest.raises(ValueError, match="a stream does not tell which there are"):
        recolor_pairs(texts.to_iterable_dataset(), change="channels", attribute="x")


def test_an_overlay_may_be_the_path_of_a_picture(tmp_path):
    logo = Image.new("RGBA", (10, 10), (0, 0, 0, 0))
    logo.paste((255, 0, 0, 255), (0, 0, 5, 10))
    logo.save(tmp_path / "logo.png")
    source = photos(4)
    expected = overlay_pairs(source, overlay=logo, size=0.5)
    for path in (tmp_path / "logo.png", str(tmp_path / "logo.png")):
        assert equal(overlay_pairs(source, overlay=path, size=0.5), expected)
    options = {"maker": "overlay", "overlay": str(tmp_path / "logo.png"), "size": 0.5, "num_pairs": 4}
    data = Recipe(dataset="digits", pairs=options).load_data(seed=0)
    assert equal(data.pairs, overlay_pairs(data.train, overlay=logo, size=0.5, num_pairs=4))
    (tmp_path / "cut.png").write_bytes((tmp_path / "logo.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"the overlay \(.*cut\.png\) cannot be read as an image"):
        overlay_pairs(source, overlay=tmp_path / "cut.png")
    with pytest.raises(ValueError, match=r"nowhere\.png' is neither mark"):
        overlay_pairs(source, overlay="nowhere.png")
    with pytest.raises(ValueError, match="overlay is a list"):
        overlay_pairs(source, overlay=[1])
    with pytest.raises(ValueError, match="row 0: the overlay function returned a NoneType"):
        overlay_pairs(source, overlay=lambda image, rng: image.paste((0, 0, 0), (0, 0, 5, 5)))


# ---- Pairs on disk: as fresh as the images, the settings and the code ----


def made_in(folder, monkeypatch, make):
    """Makes pairs with a cache folder of its own. Returns them and the names of the files in it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    made = make()
    return made, {path.name for path in (folder / "pairs").glob("*.arrow")} if (folder / "pairs").exists() else set()


def test_the_same_pairs_are_made_once(tmp_path, monkeypatch):
    """Each further change makes pairs anew: of an image, a setting, a seed, a row, the code of the package."""
    source = as_files(photos(6, masks=True), "PNG")
    path = tmp_path / "image.png"
    photo(50).save(path)
    of_file = datasets.Dataset.from_dict({"image": [str(path)]}, features=datasets.Features(image=datasets.Image()))
    known = set()

    def is_new(make):
        nonlocal known
        made, names = made_in(tmp_path / "cache", monkeypatch, make)
        assert made.cache_files and equal(made, make())  # read from the disk the second time
        new, known = names - known, names | known
        return bool(new)

    for make in (
        lambda: recolor_pairs(source),
        lambda: recolor_pairs(source, seed=1),
        lambda: recolor_pairs(source, num_pairs=3),
        lambda: recolor_pairs(source, amount=70),
        lambda: recolor_pairs(source, change="channels"),
        lambda: recolor_pairs(source, change="channels", order="gbr"),
        lambda: recolor_pairs(source.select([1, 0, 2, 3, 4, 5])),
        lambda: recolor_pairs(as_files(source, "JPEG")),
        lambda: overlay_pairs(source, overlay="text"),
        lambda: overlay_pairs(source, overlay="text", text="B"),
        lambda: overlay_pairs(source, overlay=Image.new("RGB", (4, 4), "red")),
        lambda: overlay_pairs(source, overlay=Image.new("RGB", (4, 4), "blue")),
        lambda: overlay_pairs(source, overlay=Image.new("RGB", (2, 8), "blue")),
        lambda: background_pairs(source),
        lambda: background_pairs(source, keep_own=True),
        lambda: background_pairs(source, backgrounds=(source.select([2, 3]), source.select([0]))),
        lambda: background_pairs(source, backgrounds=(source.select([2, 3]), source.select([1]))),
        lambda: match_pairs(source, match_on="random", size=(8, 8)),
        lambda: match_pairs(source, match_on="random", size=(8, 9)),
        lambda: recolor_pairs(of_file),
    ):
        assert is_new(make) and not is_new(make)
    photo(51).save(path)
    os.utime(path, ns=(1, 1))
    assert is_new(lambda: recolor_pairs(of_file))
    monkeypatch.setattr(makers, "_code", lambda: b"another version")
    assert is_new(lambda: recolor_pairs(source))


def test_pairs_of_an_edited_function_are_made_anew(tmp_path, monkeypatch):
    """The function is one of an importable module, of which `datasets` would hash the name alone."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    source = photos(4)
    source.to_parquet(str(tmp_path / "set.parquet"))
    source = datasets.Dataset.from_parquet(str(tmp_path / "set.parquet"), cache_dir=str(tmp_path / "read"))
    for color in ((255, 0, 0), (0, 0, 255)):
        (tmp_path / "sticker.py").write_text(
            f"def put(image, rng):\n    image.paste({color}, (0, 0, 6, 6))\n    return image"
        )
        sys.modules.pop("sticker", None)
        importlib.invalidate_caches()
        put = importlib.import_module("sticker").put
        pairs, kept = made_in(tmp_path / "cache", monkeypatch, partial(overlay_pairs, source, overlay=put))
        assert pairs[3]["image_b"].getpixel((2, 2)) == color
        assert not kept and pairs.cache_files  # on disk until the process ends


class OwnProcessor(ViTImageProcessor):
    """Its code may change from one start to the next."""


def test_features_for_matching_are_computed_once(tmp_path, monkeypatch):
    """They are computed anew for another weight, processor, image or row, and always with code that no hash knows."""
    computed = []

    def counted(*args, **settings):
        computed.append(extract_features(*args, **settings))
        return computed[-1]

    monkeypatch.setattr(matching, "extract_features", counted)
    source, other = as_files(photos(8), "PNG"), as_files(photos(16).select(range(8, 16)), "PNG")
    model, changed, own = small.vit(), small.vit(), small.vit()
    with torch.no_grad():
        changed.vit.embeddings.cls_token[..., 0] += 1
    own.vit.layernorm = type("OwnNorm", (torch.nn.LayerNorm,), {})(own.config.hidden_size)
    processor = ViTImageProcessor(size={"height": small.SIZE, "width": small.SIZE})
    darker = ViTImageProcessor(**{**processor.to_dict(), "image_mean": [0.6] * 3})
    for used, given, rows in (
        (model, processor, source),
        (changed, processor, source),
        (model, darker, source),
        (model, processor, other),
        (model, processor, source.select(range(8)[::-1])),
    ):
        match = partial(match_pairs, rows, model=used, processor=given)
        count = len(computed)
        made, _ = made_in(tmp_path / "cache", monkeypatch, match)
        assert len(computed) == count + 1 and equal(match(), made) and len(computed) == count + 1
    new_head = small.vit()
    torch.nn.init.normal_(new_head.classifier.weight)
    count = len(computed)
    made, _ = made_in(tmp_path / "cache", monkeypatch, partial(match_pairs, source, model=model, processor=processor))
    assert equal(match_pairs(source, model=new_head, processor=processor), made) and len(computed) == count
    for settings in (
        {"model": own, "processor": processor},
        {"model": model, "processor": OwnProcessor.from_dict(processor.to_dict())},
    ):
        count = len(computed)
        for _ in range(2):
            match_pairs(source, **settings)
        assert len(computed) == count + 2


def test_pairs_are_made_where_nothing_can_be_kept(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    pairs, _ = made_in(tmp_path / "file", monkeypatch, lambda: recolor_pairs(photos(2)))
    monkeypatch.setattr(datasets.fingerprint, "_CACHING_ENABLED", False)
    again, names = made_in(tmp_path / "cache", monkeypatch, lambda: recolor_pairs(photos(2)))
    assert equal(pairs, again) and not names


def test_processes_that_start_together_make_the_pairs_once(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    source, made = photos(4), []

    def edit(row, number):
        made.append(number)
        time.sleep(0.05)
        return {"twice": 2 * number}

    options = {"remove_columns": source.column_names, "features": datasets.Features(twice=datasets.Value("int64"))}
    raw = source.cast_column("image", datasets.Image(decode=False))
    with ThreadPoolExecutor(4) as threads:
        results = [*threads.map(lambda _: makers.map_cached(raw, edit, ["a fact"], **options)["twice"][:], range(4))]
    assert results == [[0, 2, 4, 6]] * 4 and made == [0, 1, 2, 3]


def test_overlay_pairs_fills_the_overlay_of_images_that_have_it_already():
    source = photos(8)
    settings = {"overlay": "mark", "size": 0.25, "attribute": "attribute", "present": "water", "fill_present": True}
    pairs = overlay_pairs(source, **settings)
    assert pairs["source_id"][:] == list(range(8))
    for row, of in zip(pairs, source, strict=True):
        original, other = ("image_b", "image_a") if of["attribute"] else ("image_a", "image_b")
        assert (pixels(row[original]) == pixels(of["image"])).all()
        changed = (pixels(row["image_a"]) != pixels(row["image_b"])).any(2)
        assert changed[:8, :8].any()
        assert not changed[8:].any() and not changed[:, 8:].any()
        if of["attribute"]:  # filled from the nearest pixels: the last row of the mark from the row below it
            assert (pixels(row[other])[7, :7] == pixels(of["image"])[8, :7]).all()
    streamed = list(overlay_pairs(source.to_iterable_dataset(), **settings))
    assert equal(streamed, pairs)
    for wrong in (
        {"attribute": None, "present": None},
        {"random_position": True},
        {"overlay": lambda image, rng: image},
    ):
        with pytest.raises(ValueError, match="fill_present=True needs"):
            overlay_pairs(source, **{**settings, **wrong})
    with pytest.raises(ValueError, match="covers the whole image"):
        overlay_pairs(source, **{**settings, "size": 1.0})


# ---- Backgrounds ----


def test_background_pairs_changes_everything_but_the_foreground():
    source = photos(4, masks=True)
    land, water = [Image.new("RGB", (40, 20), "green")], [Image.new("RGB", (10, 10), "blue")]
    hard = background_pairs(source, backgrounds=(land, water), soft_edge=0)
    for row, image in zip(hard, source["image"], strict=True):
        for side, color in (("image_a", (0, 128, 0)), ("image_b", (0, 0, 255))):
            values = pixels(row[side])
            assert (values[8:20, 8:20] == pixels(image)[8:20, 8:20]).all()
            values[8:20, 8:20] = color
            assert (values == color).all()
    soft = pixels(background_pairs(source, backgrounds=(land, water), soft_edge=2)[0]["image_b"])
    edge, ground = soft[14, 8], np.array([0, 0, 255])
    assert 0 < np.abs(edge - ground).sum() < np.abs(soft[14, 14] - ground).sum() + 200
    assert (soft[0, 0] == ground).all()


def as_files(source, kind, mode="RGB"):
    """Stores the images of a set as JPEG or PNG files in memory."""
    files = []
    for image in source["image"]:
        buffer = io.BytesIO()
        image.convert(mode).save(buffer, kind)
        files.append({"bytes": buffer.getvalue(), "path": None})
    return source.remove_columns("image").add_column("image", files, feature=datasets.Image())


def stored(pairs, column):
    return [row["bytes"] for row in pairs.cast_column(column, datasets.Image(decode=False))[column]]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_an_unchanged_side_keeps_the_file_of_its_image(kind):
    source = as_files(photos(), kind)
    pairs = recolor_pairs(source)
    own = stored(source, "image")
    assert stored(pairs, "image_a") == own and not {*stored(pairs, "image_b")} & {*own}
    other = recolor_pairs(as_files(photos(), kind, {"JPEG": "CMYK", "PNG": "P"}[kind]))
    assert all(row["image_a"].mode == "RGB" for row in other)  # images of another mode are converted


def test_background_pairs_can_keep_the_image_as_the_side_of_its_own_kind():
    source = as_files(photos(masks=True), "JPEG")
    pairs = background_pairs(source, keep_own=True, soft_edge=0)
    plain = background_pairs(source, soft_edge=0)
    own = stored(source, "image")
    for number, place in enumerate(source["attribute"]):
        sides = [stored(pairs, f"image_{side}")[number] for side in "ab"]
        assert sides[place] == own[number] != sides[1 - place]
        assert own[number] not in [stored(plain, f"image_{side}")[number] for side in "ab"]
        composed, image = pixels(pairs[number]["image_" + "ab"[1 - place]]), pixels(source[number]["image"])
        assert (composed[8:20, 8:20] == image[8:20, 8:20]).all() and (composed[:8] != image[:8]).any()
    wrong = source.remove_columns("attribute").add_column("attribute", [2] * len(source))
    with pytest.raises(ValueError, match="keep_own=True needs 'attribute' to be 0 or 1, but it is 2"):
        background_pairs(wrong, keep_own=True, backgrounds=([photo(1)], [photo(2)]))


def test_background_pairs_fills_the_foreground_of_backgrounds_from_the_set_itself():
    image = Image.new("RGB", (64, 64), "green")
    image.paste("red", (20, 20, 40, 40))
    mask = Image.new("L", (32, 32))  # of another size than the image
    mask.paste(255, (10, 10, 20, 20))
    assert np.asarray(fill_foreground(image, mask))[..., 0].max() == 0
    with pytest.raises(ValueError, match="covers the whole image"):
        fill_foreground(image, Image.new("L", (32, 32), 255))
    source = photos(8, masks=True)
    for row in background_pairs(source):
        inside = np.s_[11:17, 11:17]
        assert np.abs(pixels(row["image_a"])[inside] - pixels(row["image_b"])[inside]).max() <= 30
    with pytest.raises(ValueError, match="no column 'mask'"):
        background_pairs(photos())
    with pytest.raises(ValueError, match="both 0 and 1"):
        background_pairs(source.filter(lambda row: row["attribute"] == 0))
    with pytest.raises(ValueError, match="soft_edge=-1"):
        background_pairs(source, soft_edge=-1)
    empty = source.map(lambda row: {"mask": Image.new("L", (32, 32))})
    with pytest.raises(ValueError, match="no foreground"):
        background_pairs(empty)


def test_a_new_foreground_hides_the_filled_area_of_its_background():
    rows = []
    for number in range(8):
        mask = Image.new("L", (32, 32))
        mask.paste(
            255, (16 * (number % 2), 16 * (number // 2 % 2), 12 + 16 * (number % 2), 12 + 16 * (number // 2 % 2))
        )
        image = Image.new("RGB", (32, 32), (30 * number, 0, 0))
        image.paste((0, 255, 0), mask=mask)
        rows.append({"image": image, "label": number % 2, "attribute": number // 4, "mask": mask})
    source = datasets.Dataset.from_list(rows)
    for row in background_pairs(source, soft_edge=0):
        number = row["source_id"]
        colors = [{tuple(color) for color in pixels(row[side]).reshape(-1, 3)} for side in ("image_a", "image_b")]
        # there are four images of each kind: the one with its foreground at the same position is used
        assert colors == [{(0, 255, 0), (30 * (number % 4 + 4 * kind), 0, 0)} for kind in range(2)]


@pytest.mark.parametrize("coding", ["0 and 1", "1 bit", "0 and 200", "16 bits", "floats", "palette", "RGB", "RGBA"])
def test_masks_of_any_coding_are_the_same_masks(coding):
    source = photos(4, masks=True)
    (inside,) = {np.asarray(mask).tobytes() for mask in source["mask"]}
    inside = np.frombuffer(inside, np.uint8).reshape(32, 32) > 0
    whole = Image.fromarray(np.uint8(255 * inside))
    mask = {
        "0 and 1": Image.fromarray(np.uint8(inside)),
        "1 bit": whole.convert("1"),
        "0 and 200": Image.fromarray(np.uint8(200 * inside)),
        "16 bits": Image.fromarray(np.uint16(65535 * np.uint16(inside))),
        "floats": Image.fromarray(np.float32(inside)),
        "palette": whole.convert("P"),
        "RGB": whole.convert("RGB"),
        "RGBA": whole.convert("RGBA"),
    }[coding]
    kind = "TIFF" if coding == "floats" else "PNG"
    buffer = io.BytesIO()
    mask.save(buffer, kind)
    stored_masks = [{"bytes": buffer.getvalue(), "path": None}] * 4
    coded = source.remove_columns("mask").add_column("mask", stored_masks, feature=datasets.Image())
    for settings in ({}, {"backgrounds": ([photo(8)], [photo(9)])}):
        assert equal(background_pairs(coded, **settings), background_pairs(source, **settings))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Image.fromarray(np.uint8([[1, 2], [3, 2]])), "row 0.* run from 1 to 3"),
        (Image.fromarray(np.int32([[0, 300], [20, 2]])), "row 0.* run from 0 to 300"),
        (Image.new("RGB", (4, 4), (255, 0, 0)), "row 0.* has colours"),
        (Image.new("RGBA", (4, 4), (255, 255, 255, 0)), "row 0.* has transparent pixels"),
        (Image.new("L", (4, 4)), "row 0.* no foreground"),
        (Image.new("L", (4, 4), 255), "row 0.* covers the whole image"),
        (None, "the mask of row 0 cannot be read as an image: there is none"),
    ],
)
def test_what_is_no_mask_is_refused(mask, message):
    source = photos(2, masks=True)
    column = [None if mask is None else datasets.Image().encode_example(mask)] * 2
    source = source.remove_columns("mask").add_column("mask", column, feature=datasets.Image())
    with pytest.raises(ValueError, match=message):
        background_pairs(source, backgrounds=([photo(8)], [photo(9)]))


def test_a_mask_that_lies_on_its_side_is_refused():
    """The image was turned as its EXIF orientation says, and its mask was drawn on the file's pixels."""
    source = photos(2, masks=True)
    tall = source.map(lambda row: {"image": row["image"].resize((20, 32)), "mask": row["mask"].resize((40, 25))})
    with pytest.raises(ValueError, match="mask of row 0 has 40×25 pixels and its image 20×32: one of them is turned"):
        background_pairs(tall, backgrounds=([photo(8)], [photo(9)]))
    square = tall.map(lambda row: {"mask": row["mask"].resize((32, 32))})  # of a network with square inputs
    assert len(background_pairs(square, backgrounds=([photo(8)], [photo(9)]))) == 2


@pytest.mark.parametrize("backgrounds", [([photo(8)],), ([photo(8)], []), ([photo(8)], [b"no image"])])
def test_background_pairs_refuses_backgrounds_that_are_none(backgrounds):
    with pytest.raises(
        ValueError, match=r"1 entries: give|no images in the backgrounds for side b|of row 0 of the back"
    ):
        background_pairs(photos(2, masks=True), backgrounds=backgrounds)


# ---- Matching ----


def test_match_pairs_finds_the_most_similar_image():
    """Each image has a near copy with the other attribute. Matching by features finds it, random matching does not."""
    count = 20
    features = datasets.Features({"image": datasets.Image(), "label": LABEL, "attribute": PLACE})
    images = [photo(seed) for seed in range(count)]
    copies = [Image.fromarray(np.clip(pixels(image) + 3, 0, 255).astype(np.uint8)) for image in images]
    columns = {"image": images + copies, "label": [0, 1] * count, "attribute": [0] * count + [1] * count}
    source = datasets.Dataset.from_dict(columns, features=features)
    pairs = matched_by_features(source)
    assert [b - a for a, b in zip(pairs["source_id"], pairs["source_id_b"], strict=True)] == [count] * count
    assert sorted(pairs["source_id"][:]) == list(range(count))
    random = match_pairs(source, match_on="random")
    assert sum(b - a == count for a, b in zip(random["source_id"], random["source_id_b"], strict=True)) < count / 2
    nearest = matched_by_features(source, num_pairs=5)
    assert max(nearest["distance"]) <= sorted(pairs["distance"])[4]
    turned = matched_by_features(source, attributes=("water", "land"))
    assert set(turned["attribute_a"][:]) == {1}


def test_match_pairs_minimises_the_sum_of_the_distances():
    features = np.array([[0.0, 0.0], [3.0, 0.0], [3.0, 1.0], [0.0, 4.0]])
    # the distances 0-3 and 1-2 are 4 and 1, the distances 0-2 and 1-3 are √10 and 5
    a, b, distances, mean = _assigned(features, np.array([0, 1]), np.array([2, 3]))
    assert dict(zip(a, b, strict=True)) == {0: 3, 1: 2}
    assert distances.tolist() == [4, 1]
    assert mean == pytest.approx((4 + 1 + 10**0.5 + 5) / 4)


def test_match_pairs_uses_at_most_max_per_group_images():
    source = photos(24)
    groups = 2 * np.array(source["label"][:]) + source["attribute"][:]
    assert np.bincount(groups).tolist() == [6, 6, 6, 6]
    whole = matched_by_features(source, seed=3)
    assert equal(whole, matched_by_features(source, seed=3, max_per_group=6))  # the groups have no more
    processed = []

    class Watched(ViTImageProcessor):
        def __call__(self, images, **kwargs):
            processed.append(len(images))
            return super().__call__(images, **kwargs)

    processor = Watched(size={"height": small.SIZE, "width": small.SIZE})
    capped = match_pairs(source, model=small.vit(), processor=processor, max_per_group=2, seed=3)
    assert sum(processed) == 8  # only the drawn images get features
    assert len(capped) == 4 and len({*capped["source_id"], *capped["source_id_b"]}) == 8
    for row in capped:  # row numbers are those of the whole set
        sides = [source[row[name]] for name in ("source_id", "source_id_b")]
        assert [side["attribute"] for side in sides] == [0, 1]
        assert [side["label"] for side in sides] == [row["label"]] * 2
        for side, name in zip(sides, ("image_a", "image_b"), strict=True):
            assert ImageChops.difference(side["image"], row[name]).getbbox() is None
    assert len(match_pairs(source, match_on="random", max_per_group=1)) == 2
    with pytest.raises(ValueError, match="max_per_group=0"):
        match_pairs(source, match_on="random", max_per_group=0)


def test_match_pairs_crops_images_of_different_sizes_to_one_size():
    columns = photos(8)[:]
    columns["image"] = [photo(n).resize((32 + 8 * n, 40)).convert("L" if n == 3 else "RGB") for n in range(8)]
    source = datasets.Dataset.from_dict(columns, features=photos(8).features)
    plain = match_pairs(source, match_on="random")
    assert any(row["image_a"].size != row["image_b"].size for row in plain)
    pairs = match_pairs(source, match_on="random", size=[24, 20])
    assert pairs.remove_columns(["image_a", "image_b"])[:] == plain.remove_columns(["image_a", "image_b"])[:]
    for row in pairs:
        for side, number in (("a", row["source_id"]), ("b", row["source_id_b"])):
            image = row[f"image_{side}"]
            assert (image.size, image.mode) == ((24, 20), "RGB")
            # scaled and cropped at the centre, not squeezed: the centre of the image stays the centre
            middle = np.asarray(source[number]["image"].convert("RGB"), float)
            middle = middle[20, middle.shape[1] // 2]
            assert np.abs(np.asarray(image)[10, 12] - middle).max() < 30


def test_extract_features_returns_the_input_of_the_head():
    model, source = small.vit(), photos(5)
    processor = ViTImageProcessor(size={"height": small.SIZE, "width": small.SIZE})
    features = extract_features(source, model, processor, batch_size=2)
    inputs = processor(source["image"][:], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model.eval().classifier(torch.from_numpy(features))
        assert torch.allclose(expected, model(inputs).logits, atol=1e-6)


def test_match_pairs_refuses_what_it_cannot_match():
    source = photos(8)
    for settings, match in (
        ({"match_on": "colour"}, "unknown"),
        ({}, "needs a model"),
        ({"match_on": "random", "attribute": "place"}, "no column 'place'"),
        ({"match_on": "random", "attributes": ("land", "air")}, "two different values"),
    ):
        with pytest.raises(ValueError, match=match):
            match_pairs(source, **settings)
    for column in ("label", "attribute"):
        unknown = source.add_column("y", [*source[column][:-1], None]).remove_columns(column).rename_column("y", column)
        with pytest.raises(ValueError, match=rf"row 7 of the source has no {column} \(None\)"):
            match_pairs(unknown, match_on="random")
    lone = source.filter(lambda row: row["label"] == row["attribute"])
    with pytest.raises(ValueError, match="nothing to match"):
        match_pairs(lone, match_on="random")


# ---- Files and columns ----


@pytest.fixture
def folders(tmp_path):
    for side, suffix in (("summer", "png"), ("winter", "jpg")):
        for number in range(6):
            path = tmp_path / side / LABEL.names[number % 2] / f"{number}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            photo(number + (100 if side == "winter" else 0)).save(path)
    return tmp_path


def test_two_folders_give_pairs_of_equal_names(folders):
    pairs = pairs_from_folders(folders / "summer", folders / "winter")
    assert pairs["source_id"][:] == ["cat/0", "cat/2", "cat/4", "dog/1", "dog/3", "dog/5"]
    assert pairs.features["label"].names == ["cat", "dog"]
    assert pairs.features["attribute_a"].names == ["summer", "winter"]
    assert (pixels(pairs[3]["image_a"]) == pixels(photo(1))).all()
    raw = pairs.cast_column("image_a", datasets.Image(decode=False))[0]["image_a"]
    assert raw["bytes"] is None  # no file is read before it is used
    swapped = pairs_from_folders(folders / "summer", folders / "winter", oriented=False, seed=1)
    assert sorted(swapped["attribute_a"][:]) == [0, 0, 0, 1, 1, 1]
    row = swapped["attribute_a"][:].index(1)
    assert (pixels(swapped[row]["image_b"]) == pixels(pairs[row]["image_a"])).all()
    assert len(pairs_from_folders(folders / "summer", folders / "winter", num_pairs=2)) == 2


def test_pairs_from_folders_refuses_folders_that_do_not_match(folders):
    (folders / "winter/cat/0.jpg").unlink()
    with pytest.raises(ValueError, match=r"'cat/0' in .*summer"):
        pairs_from_folders(folders / "summer", folders / "winter")
    with pytest.raises(ValueError, match="is not a folder"):
        pairs_from_folders(folders / "spring", folders / "winter")
    photo(0).save(folders / "summer/cat/0.bmp")
    with pytest.raises(ValueError, match="twice"):
        pairs_from_folders(folders / "summer", folders / "winter")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_of_paths_gives_pairs(folders, kind):
    rows = [
        {"left": f"summer/{name}/{i}.png", "right": f"winter/{name}/{i}.jpg", "label": name}
        for i in range(6)
        for name in [LABEL.names[i % 2]]
    ]
    path = folders / f"pairs.{kind}"
    if kind == "csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    pairs = pairs_from_table(path, column_a="left", column_b="right")
    assert pairs.features["label"].names == ["cat", "dog"]
    assert (pixels(pairs[1]["image_a"]) == pixels(photo(1))).all()
    (folders / "winter/dog/3.jpg").unlink()
    with pytest.raises(ValueError, match=r"row 3 names .*3\.jpg"):
        pairs_from_table(path, column_a="left", column_b="right")
    with pytest.raises(ValueError, match="is not there"):
        pairs_from_table(folders / "none.csv")


def test_two_columns_give_pairs():
    source = photos(4).rename_columns({"image": "before", "attribute": "x"}).add_column("n", [5, 6, 7, 8])
    source = source.add_column("after", [{"bytes": None, "path": None}] * 4).cast_column("after", datasets.Image())
    source = source.map(lambda row: {"after": photo(row["n"])})
    pairs = pairs_from_columns(source, "before", "after")
    assert set(pairs.column_names) == {"image_a", "image_b", "label", "source_id"}
    assert (pixels(pairs[2]["image_b"]) == pixels(photo(7))).all()
    assert isinstance(pairs_from_columns(source.to_iterable_dataset(), "before", "after"), datasets.IterableDataset)
    with pytest.raises(ValueError, match="no column 'later'"):
        pairs_from_columns(source, "before", "later")
    with pytest.raises(ValueError, match="must have images"):
        pairs_from_columns(source, "before", "n")


# ---- Degraded pairs ----


def test_degrade_pairs_spoils_the_given_share():
    pairs = load_digits(num_pairs=100).pairs
    assert equal(degrade_pairs(pairs), pairs)
    assert degrade_pairs(pairs, residual=0.5).features == pairs.features

    unoriented = degrade_pairs(pairs, unoriented=0.3, seed=2)
    swapped = np.array(unoriented["attribute_a"][:]) == 1
    assert swapped.sum() == 30
    more = np.array(degrade_pairs(pairs, unoriented=0.6, seed=2)["attribute_a"][:]) == 1
    assert (more | ~swapped).all()  # the pairs of a smaller share are among those of a larger one
    for row, changed in zip(range(100), swapped, strict=True):
        assert (pixels(unoriented[row]["image_b" if changed else "image_a"]) == pixels(pairs[row]["image_a"])).all()

    def changed_b(spoiled):
        return [(pixels(a["image_b"]) != pixels(b["image_b"])).any() for a, b in zip(spoiled, pairs, strict=True)]

    assert sum(changed_b(degrade_pairs(pairs, mislabelled=0.2))) == 20
    owner = {pixels(row["image_b"]).tobytes(): row["label"] for row in pairs}
    wrong = [owner[pixels(row["image_b"]).tobytes()] != row["label"] for row in degrade_pairs(pairs, mislabelled=0.2)]
    assert sum(wrong) == 20

    whole = degrade_pairs(pairs, residual=1.0)
    assert all(changed_b(whole))
    assert all(owner[pixels(row["image_b"]).tobytes()] == row["label"] for row in whole)
    half = degrade_pairs(pairs, residual=0.5)
    for clean, mixed, other in zip(pairs, half, whole, strict=True):
        mean = (pixels(clean["image_b"]) + pixels(other["image_b"])) / 2
        assert np.abs(pixels(mixed["image_b"]) - mean).max() <= 1
    for settings in ({"residual": 1.5}, {"unoriented": -0.1}):
        with pytest.raises(ValueError, match="is not valid"):
            degrade_pairs(pairs, **settings)
    with pytest.raises(ValueError, match="at least two labels"):
        degrade_pairs(pairs.remove_columns("label"), mislabelled=0.5)
