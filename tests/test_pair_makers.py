# SPDX-License-Identifier: Apache-2.0
"""Pairs made by rendering: every column, the draws, and what is refused."""

import io
import time
from functools import partial

import datasets
import numpy as np
import pytest
import small
from PIL import Image
from transformers import ViTImageProcessor

from ipg_hf.data.files import held_out_pairs
from ipg_hf.pairs import (
    ImageRows,
    background_pairs,
    check_pairs,
    match_pairs,
    mix_pairs,
    overlay_pairs,
    pairs_from_columns,
    recolor_pairs,
    score_pairs,
)
from ipg_hf.pairs.makers import encode_png, pairs_from_render

COLUMNS = {"image_a", "image_b", "label", "attribute_a", "attribute_b", "source_id"}
CHANNEL = {"red": 0, "green": 1}


def rows(count=12, size=6):
    pixels = np.random.default_rng(0).integers(1, 256, (count, size, size)).astype(np.uint8)
    return [{"pixels": image, "label": number % 3} for number, image in enumerate(pixels)]


def colored(row, attribute):
    image = np.zeros((*np.shape(row["pixels"]), 3), dtype=np.uint8)
    image[:, :, CHANNEL[attribute]] = row["pixels"]
    return image


def make(source=None, render=colored, attributes=("red", "green"), **settings):
    return pairs_from_render(rows() if source is None else source, render, attributes, **settings)


@pytest.mark.parametrize("as_image", [False, True])
def test_pairs_from_render_fills_every_column(as_image):
    source = rows()
    render = (lambda row, color: Image.fromarray(colored(row, color))) if as_image else colored
    pairs = make(source, render)
    assert set(pairs.column_names) == COLUMNS
    assert isinstance(pairs.features["image_a"], datasets.Image)
    assert pairs.features["attribute_a"] == pairs.features["attribute_b"] == datasets.ClassLabel(names=["red", "green"])
    assert pairs.features["source_id"] == datasets.Value("int64")
    assert pairs["source_id"][:] == list(range(12))
    assert pairs["label"][:] == [row["label"] for row in source]
    assert set(pairs["attribute_a"]) == {0}
    assert set(pairs["attribute_b"]) == {1}
    for pair, row in zip(pairs, source, strict=True):
        assert pair["image_a"].mode == pair["image_b"].mode == "RGB"
        np.testing.assert_array_equal(np.asarray(pair["image_a"]), colored(row, "red"))
        np.testing.assert_array_equal(np.asarray(pair["image_b"]), colored(row, "green"))


def test_pairs_keep_the_features_of_their_source():
    label = datasets.ClassLabel(names=["x", "y", "z"])
    place = datasets.ClassLabel(names=["sea", "land"])
    features = datasets.Features({"picture": datasets.Image(), "label": label, "attribute": place})
    pictures = [Image.fromarray(colored(row, "red")) for row in rows()]
    source = datasets.Dataset.from_dict(
        {"picture": pictures, "label": [0, 1, 2] * 4, "attribute": [0] * 12}, features=features
    )

    def render(row, attribute):
        return row["picture"] if attribute == "land" else row["picture"].transpose(Image.Transpose.ROTATE_90)

    pairs = make(source, render, ("land", "sea"), num_pairs=5)
    assert pairs.features["label"] == label
    assert pairs.features["attribute_a"] == place
    assert set(pairs["attribute_a"]) == {1}
    assert set(pairs["attribute_b"]) == {0}
    for pair in pairs:
        assert pair["label"] == source[pair["source_id"]]["label"]
        np.testing.assert_array_equal(np.asarray(pair["image_a"]), np.asarray(pictures[pair["source_id"]]))
    # ids of the same ClassLabel
    by_id = make(source, lambda row, attribute: render(row, place.names[attribute]), (1, 0), num_pairs=5)
    assert by_id[:]["attribute_a"] == pairs[:]["attribute_a"]


def test_attributes_given_as_ints_are_ids():
    pairs = make(render=lambda row, value: colored(row, ["red", "green"][value]), attributes=(1, 0))
    assert pairs.features["attribute_a"].names == ["0", "1"]
    assert set(pairs["attribute_a"]) == {1}


def test_the_label_is_optional_and_its_feature_can_be_given():
    without = make([{"pixels": row["pixels"]} for row in rows()])
    assert set(without.column_names) == COLUMNS - {"label"}
    label = datasets.ClassLabel(names=["x", "y", "z"])
    named = make([{**row, "label": "xyz"[row["label"]]} for row in rows()], features={"label": label})
    assert named.features["label"] == label
    assert named["label"][:] == [0, 1, 2] * 4
    assert make().features["label"] == datasets.Value("int64")


def test_the_draws_are_a_function_of_the_seed():
    source = rows(40)
    first, again, other = (make(source, num_pairs=15, oriented=False, seed=seed) for seed in (3, 3, 4))
    assert first["source_id"][:] == again["source_id"][:]
    assert first["attribute_a"][:] == again["attribute_a"][:]
    assert first["source_id"][:] != other["source_id"][:]
    assert len(set(first["source_id"])) == 15
    assert set(make(source, num_pairs=8, seed=3)["source_id"]) < set(first["source_id"])


def test_unoriented_pairs_swap_half_of_the_sides_with_their_attributes():
    source = rows(40)
    pairs = make(source, oriented=False)
    assert sum(pairs["attribute_a"]) == 20
    for pair, row in zip(pairs, source, strict=True):
        assert pair["attribute_b"] == 1 - pair["attribute_a"]
        for side in "ab":
            color = ["red", "green"][pair[f"attribute_{side}"]]
            np.testing.assert_array_equal(np.asarray(pair[f"image_{side}"]), colored(row, color))
    assert make(source, oriented=False, seed=1)["attribute_a"][:] != pairs["attribute_a"][:]


@pytest.mark.parametrize("mode", ["L", "RGBA", "RGB", "1"])
@pytest.mark.parametrize("size", [8, 80])
def test_pairs_keep_the_mode_and_size_of_their_images(mode, size):
    rng = np.random.default_rng(0)
    images = {
        name: Image.fromarray(rng.integers(0, 256, (size, size + 1, 3)).astype(np.uint8)).convert(mode)
        for name in CHANNEL
    }
    pair = make(rows(1), lambda row, name: images[name])[0]
    assert pair["image_a"].mode == mode
    np.testing.assert_array_equal(np.asarray(pair["image_a"]), np.asarray(images["red"]))
    np.testing.assert_array_equal(np.asarray(pair["image_b"]), np.asarray(images["green"]))


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (2, 28, 28), (1, 64, 64)])
def test_encode_png_writes_what_pil_reads(shape):
    images = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    for file, image in zip(encode_png(images), images, strict=True):
        with Image.open(io.BytesIO(file)) as opened:
            opened.verify()  # checks the checksums
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(file))), image)


def test_pairs_from_render_is_fast_for_many_small_images():
    source = rows(2000, size=28)
    start = time.perf_counter()
    pairs = make(source)
    assert (
        time.perf_counter() - start < 5
    )  # it takes about 0.3 s; encoding rows with `datasets` takes many times as long
    assert len(pairs) == 2000
    # there are more rows than one Arrow chunk has
    np.testing.assert_array_equal(np.asarray(pairs[1999]["image_a"]), colored(source[1999], "red"))


def grow(row, color):
    return np.zeros((6, 6 + CHANNEL[color], 3), dtype=np.uint8)


def change_mode(row, color):
    return Image.new("RGB" if color == "red" else "L", (6, 6))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_pairs": 13}, r"num_pairs=13, but 12 source rows"),
        ({"num_pairs": 0}, "num_pairs=0 must be at least 1"),
        ({"source": []}, "no source rows"),
        ({"render": grow}, r"row 0 .* RGB of \(6, 6\) .* RGB of \(7, 6\)"),
        ({"render": change_mode}, r"row 0 .* RGB of .* L of"),
        ({"render": lambda row, color: colored(row, "red")}, "row 0 was rendered the same .*'red' and with 'green'"),
        ({"render": lambda row, color: row["pixels"]}, r"render gave uint8 \(6, 6\) for row 0"),
        ({"render": lambda row, color: colored(row, color) / 255}, r"render gave float64 \(6, 6, 3\)"),
        ({"render": lambda row, color: None}, "render gave NoneType"),
        ({"render": lambda row, color: Image.new("CMYK", (6, 6), CHANNEL[color])}, "mode CMYK"),
        ({"render": lambda row, color: Image.new("I;16", (6, 6), CHANNEL[color])}, "row 0 has the mode 'I;16'"),
        ({"render": lambda row, color: Image.new("F", (6, 6), CHANNEL[color])}, "row 0 has the mode 'F'"),
        ({"attributes": ("red", "red")}, "two different values"),
        ({"attributes": ("red", "green", "blue")}, "two different values"),
        ({"attributes": "ab"}, "two different values"),
        ({"features": {"attribute": datasets.ClassLabel(names=["red", "blue"])}}, "'green' is none of"),
        ({"features": {"attribute": datasets.ClassLabel(names=["red", "green"])}, "attributes": ("red", 0)}, "twice"),
        ({"features": {"image": datasets.Image()}}, "image"),
        ({"source": [*rows(3), {"pixels": rows(4)[3]["pixels"]}]}, "row 3 of the source has no label"),
    ],
)
def test_pairs_from_render_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_an_error_names_the_row_by_its_number_in_the_source():
    source = rows(30)
    same = lambda row, color: colored(row, "red" if row is source[17] else color)  # noqa: E731
    with pytest.raises(ValueError, match="row 17 "):
        make(source, same)


# ---- Held-out pairs: one object, two values of the attribute ----


def test_held_out_pairs_never_show_two_labels():
    """The first image of an object with each value and label: rows 0 and 3 of p1, rows 2 and 5 of p2."""
    table = {
        "image": [Image.new("RGB", (4, 4), (20 * row, 0, 0)) for row in range(9)],
        "label": [0, 1, 1, 0, 0, 1, 0, 1, 0],
        "attribute": [0, 1, 0, 1, 0, 1, 1, 0, 0],
        "patient": ["p1", "p1", "p2", "p1", "p3", "p2", None, "p4", None],
    }
    features = datasets.Features(
        image=datasets.Image(),
        label=datasets.ClassLabel(names=["benign", "malignant"]),
        attribute=datasets.ClassLabel(names=["clear", "ruler"]),
        patient=datasets.Value("string"),
    )
    pairs = held_out_pairs(datasets.Dataset.from_dict(table, features=features), "patient")
    assert pairs["source_id"][:] == ["p1", "p2"]
    assert pairs["label"][:] == [0, 1]
    assert [[row[side].getpixel((0, 0))[0] for side in ("image_a", "image_b")] for row in pairs] == [[0, 60], [40, 100]]
    # without the rows 2 and 3 no object has both values with one label
    rest = datasets.Dataset.from_dict(table, features=features).select([0, 1, 4, 5, 6, 7, 8])
    with pytest.raises(ValueError, match="'patient' occurs with both values of the attribute and one label"):
        held_out_pairs(rest, "patient")


# ---- What is given as the source ----


def images():
    kind = datasets.ClassLabel(names=["a", "b"])
    mask = Image.new("L", (16, 16))
    mask.paste(255, (4, 4, 9, 9))
    columns = {"image": [noise(seed) for seed in range(4)], "label": [0, 1, 0, 1], "attribute": [0, 0, 1, 1]}
    features = {"image": datasets.Image(), "label": kind, "attribute": kind, "mask": datasets.Image()}
    return datasets.Dataset.from_dict({**columns, "mask": [mask] * 4}, features=datasets.Features(features))


def noise(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def pairs():
    sides = {f"image_{side}": [noise((seed, k)) for seed in range(4)] for k, side in enumerate("ab")}
    return datasets.Dataset.from_dict(sides)


PROCESSOR = ViTImageProcessor(size={"height": 16, "width": 16})
# entry -> its call, a set that is right, whether a stream is right
ENTRIES = {
    "recolor": (recolor_pairs, images, True),
    "overlay": (overlay_pairs, images, True),
    "background": (partial(background_pairs, backgrounds=([noise(8)], [noise(9)])), images, True),
    "match": (partial(match_pairs, match_on="random"), images, False),
    "columns": (partial(pairs_from_columns, column_a="image_a", column_b="image_b"), pairs, True),
    "mix": (partial(mix_pairs, num_pairs=8), pairs, False),
    "check": (check_pairs, pairs, False),
    "scores": (partial(score_pairs, model=small.vit(), processor=PROCESSOR), pairs, False),
    "rows": (partial(ImageRows, processor=PROCESSOR, columns={"image": "pixel_values"}), images, False),
}
FORMS = {
    "list": lambda right: [dict(row) for row in right],
    "DatasetDict": lambda right: datasets.DatasetDict(train=right),
    "dict": lambda right: {"train": right},
    "DataFrame": lambda right: right.to_pandas(),
    "IterableDataset": lambda right: right.to_iterable_dataset(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_source_is_a_set_or_a_clear_error(entry, form):
    call, make, takes_streams = ENTRIES[entry]
    given = FORMS[form](make())
    if form == "IterableDataset" and takes_streams:
        assert len([*call(given)]) == 4
        return
    with pytest.raises(ValueError, match=rf"must be a datasets\.Dataset.*, but is of type {form}: ") as failure:
        call(given)
    advice = str(failure.value).split(": ", 1)[1]
    if form in ("DatasetDict", "dict"):
        assert advice == "give one of its sets, ['train']."
        assert call(given["train"]) is not None
    elif form == "DataFrame":
        assert len(datasets.Dataset.from_list(given.to_dict("records"))) == 4 and "frame.to_dict('records')" in advice
    elif form == "list":
        assert advice == "make one of its rows, datasets.Dataset.from_list(list(rows))."
        made = datasets.Dataset.from_list(list(given))
        features = make().features
        assert call(made.cast(features) if features != made.features else made) is not None
    elif form == "IterableDataset":
        rows = list(given.decode(False).take(1000))
        assert "list(stream.decode(False).take(1000)), features=stream.features" in advice
        assert call(datasets.Dataset.from_list(rows, features=given.features)) is not None
