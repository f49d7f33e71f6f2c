# SPDX-License-Identifier: Apache-2.0
"""Mixtures of pairs: where their pixels come from, what is drawn, and that a recipe trains with them."""

import io
import json

import datasets
import numpy as np
import pytest
from PIL import Image

from ipg_hf.baselines.degrade import degrade_pairs
from ipg_hf.data import load_digits
from ipg_hf.pairs import check_pairs, mix_pairs
from ipg_hf.recipe import Recipe, RecipeError

GRID = 4
CELL = 16 // GRID  # pixels


def pixels(image):
    return np.asarray(image).astype(int)


def cells(image):
    """The cells of the grid, shape (GRID·GRID, CELL, CELL, 3)."""
    blocks = pixels(image).reshape(GRID, CELL, GRID, CELL, 3)
    return blocks.transpose(0, 2, 1, 3, 4).reshape(GRID * GRID, CELL, CELL, 3)


def images(*colors, size=(8, 8)):
    return [Image.new("RGB", size, color) for color in colors]


def stored(pairs):
    for side in ("image_a", "image_b"):
        pairs = pairs.cast_column(side, datasets.Image(decode=False))
    return [(row["image_a"]["bytes"], row["image_b"]["bytes"]) for row in pairs]


@pytest.fixture(scope="module")
def pairs():
    return load_digits(num_pairs=20).pairs


@pytest.fixture(scope="module")
def mixed(pairs):
    return mix_pairs(pairs, num_pairs=120, grid=GRID, seed=3)


def test_mix_pairs_keeps_the_pairs_and_then_mixes_each_in_turn(pairs, mixed):
    assert len(mixed) == 120 and mixed.features == pairs.features
    assert stored(mixed)[:20] == stored(pairs)
    for name in ("source_id", "label", "attribute_a", "attribute_b"):
        assert mixed[name][:] == pairs[name][:] * 6


def test_a_cell_comes_from_the_same_pair_on_both_sides(pairs, mixed):
    sides = [(cells(row["image_a"]), cells(row["image_b"])) for row in pairs]
    shares = []
    for number in range(20, 120):
        row = mixed[number]
        mixture = cells(row["image_a"]), cells(row["image_b"])
        own = sides[number % 20]
        others = []
        for partner, candidate in enumerate(sides):
            if partner == number % 20 or pairs[partner]["label"] != row["label"]:
                continue
            fits = [
                all((mixture[i][cell] == candidate[i][cell]).all() for i in (0, 1))
                or all((mixture[i][cell] == own[i][cell]).all() for i in (0, 1))
                for cell in range(GRID * GRID)
            ]
            if all(fits):
                others.append(np.mean([(mixture[0][cell] == own[0][cell]).all() for cell in range(GRID * GRID)]))
        assert others, number
        shares.append(others[0])
    assert 0.4 < np.mean(shares) < 0.9  # half of the cells, and the cells that are equal in both digits
    assert len({row["image_a"].tobytes() for row in mixed}) > 115


def test_the_sides_of_a_mixture_differ_in_the_colour_alone(mixed):
    for row in mixed:
        assert (pixels(row["image_a"])[..., [1, 0, 2]] == pixels(row["image_b"])).all()


def test_a_cell_comes_from_either_pair_with_probability_one_half():
    # the colour of a pixel identifies its pair
    pairs = datasets.Dataset.from_dict({"image_a": images("black", "white"), "image_b": images("red", "blue")})
    mixed = mix_pairs(pairs, num_pairs=1002, grid=8)
    own = np.stack([(pixels(row["image_a"])[..., 0] == (255 if number % 2 else 0)) for number, row in enumerate(mixed)])
    assert own[:2].all()
    # cells are independent: the mean of all 64,000 is within three standard errors of 1/2, and the mean of the 1,000
    # draws of each cell within four
    assert abs(own[2:].mean() - 0.5) < 3 * 0.5 / np.sqrt(64_000)
    assert np.abs(own[2:].mean(0) - 0.5).max() < 4 * 0.5 / np.sqrt(1000)
    assert abs(own[2:].mean((1, 2)).std() - 0.5 / 8) < 0.005
    for row in mixed.select(range(2, 50)):
        black, red = (pixels(row["image_a"]) == 0).all(-1), (pixels(row["image_b"]) == (255, 0, 0)).all(-1)
        assert (black == red).all()


def test_the_draws_depend_on_the_seed_and_the_row_alone(pairs, mixed):
    assert stored(mix_pairs(pairs, num_pairs=50, grid=GRID, seed=3)) == stored(mixed)[:50]
    assert stored(mix_pairs(pairs, num_pairs=50, grid=GRID, seed=4))[20:] != stored(mixed)[20:50]
    assert stored(mix_pairs(pairs, num_pairs=50, grid=7, seed=3))[20:] != stored(mixed)[20:50]


def test_a_partner_has_the_attribute_on_the_same_side(pairs):
    mixed = mix_pairs(degrade_pairs(pairs, unoriented=0.5), num_pairs=200, grid=GRID)
    red = [pixels(row["image_a"])[..., 0].any() for row in mixed]
    green = [pixels(row["image_a"])[..., 1].any() for row in mixed]
    assert not (np.array(red) & np.array(green)).any() and any(red) and any(green)


def test_a_pair_without_a_possible_partner_is_repeated():
    pairs = datasets.Dataset.from_dict(
        {"image_a": images("black", "white", "gray"), "image_b": images("red", "blue", "lime"), "label": [0, 1, 1]}
    )
    mixed = mix_pairs(pairs, num_pairs=9, grid=2)
    for row in (3, 6):
        assert mixed[row]["image_b"].getpixel((0, 0)) == (255, 0, 0) and len(mixed[row]["image_b"].getcolors()) == 1


def test_mix_pairs_refuses_what_it_cannot_mix(pairs):
    with pytest.raises(
        ValueError, match="num_pairs=19 of mix_pairs must be at least the number of pairs in the set, 20"
    ):
        mix_pairs(pairs, num_pairs=19)
    with pytest.raises(ValueError, match="at least two pairs to mix, but the set has 1"):
        mix_pairs(pairs.select([0]), num_pairs=5)
    with pytest.raises(ValueError, match="grid=1 is not valid"):
        mix_pairs(pairs, num_pairs=30, grid=1)
    with pytest.raises(ValueError, match="grid=17 is more than the 16 pixels"):
        mix_pairs(pairs, num_pairs=30, grid=17)
    with pytest.raises(ValueError, match=r"must be a datasets\.Dataset, but is of type IterableDataset"):
        mix_pairs(pairs.to_iterable_dataset(), num_pairs=30)
    sizes = datasets.Dataset.from_dict(
        {"image_a": images("black") + images("white", size=(9, 8)), "image_b": images("red", "blue")}
    )
    with pytest.raises(ValueError, match=r"pair 0 has 8×8 pixels and pair 1 9×8: resize the images first"):
        mix_pairs(sizes, num_pairs=3)


def test_mixtures_of_grey_and_transparent_images_are_rgb():
    pairs = datasets.Dataset.from_dict(
        {
            "image_a": [Image.new("L", (8, 8), 0), Image.new("RGBA", (8, 8), "white")],
            "image_b": images("red", "blue"),
        }
    )
    assert {mix_pairs(pairs, num_pairs=6)[row]["image_a"].mode for row in range(2, 6)} == {"RGB"}


def test_mix_pairs_keeps_the_paths_of_unchanged_images(tmp_path):
    for name, color in (("a", "black"), ("b", "red"), ("c", "white"), ("d", "blue")):
        Image.new("RGB", (8, 8), color).save(tmp_path / f"{name}.png")
    paths = [str(tmp_path / f"{name}.png") for name in "abcd"]
    features = datasets.Features({"image_a": datasets.Image(), "image_b": datasets.Image()})
    pairs = datasets.Dataset.from_dict({"image_a": paths[::2], "image_b": paths[1::2]}, features=features)
    mixed = mix_pairs(pairs, num_pairs=3).cast_column("image_a", datasets.Image(decode=False))
    assert [row["image_a"]["path"] for row in mixed] == [paths[0], paths[2], None]
    assert Image.open(io.BytesIO(mixed[2]["image_a"]["bytes"])).size == (8, 8)


def test_mix_pairs_turns_a_photograph_as_datasets_does():
    """The mixture of an image with itself is that image, turned by its EXIF orientation."""
    row = np.zeros((8, 8, 3), np.uint8)
    row[:4] = 255
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    Image.fromarray(row).save(buffer, "PNG", exif=exif)
    stored_image = {"bytes": buffer.getvalue(), "path": None}
    features = datasets.Features({"image_a": datasets.Image(), "image_b": datasets.Image()})
    pairs = datasets.Dataset.from_dict({side: [stored_image] * 2 for side in features}, features=features)
    assert (pixels(pairs[0]["image_a"]) != row).any()
    for changed in (mix_pairs(pairs, num_pairs=3)[2]["image_a"], degrade_pairs(pairs, residual=0.5)[0]["image_b"]):
        assert (pixels(changed) == pixels(pairs[0]["image_a"])).all()


def test_a_recipe_mixes_its_training_pairs_only():
    plain = Recipe(num_pairs=20).load_data(seed=1)
    data = Recipe(num_pairs=20, mix_pairs=json.dumps({"num_pairs": 90, "grid": GRID})).load_data(seed=1)
    assert stored(data.pairs) == stored(mix_pairs(plain.pairs, num_pairs=90, grid=GRID, seed=1))
    assert stored(data.validation_pairs) == stored(plain.validation_pairs)

    assert {finding.severity for finding in check_pairs(data.pairs)} == {
        "info"
    }  # no warning about repeated pairs, for example

    sets = Recipe(dataset="marked_digits", num_pairs=20, mix_pairs={"num_pairs": 50}).load_data(seed=0).pairs
    assert {name: len(rows) for name, rows in sets.items()} == {"color": 50, "mark": 50}
    with pytest.raises(RecipeError, match="mix_pairs has no option 'num_pair'"):
        Recipe(mix_pairs={"num_pair": 50}).load_data(seed=0)
    with pytest.raises(RecipeError, match=r"mix_pairs with grid=4: .*num_pairs"):
        Recipe(mix_pairs={"grid": 4}).load_data(seed=0)
