# SPDX-License-Identifier: Apache-2.0
"""Extended pairs: the colour map by hand, the side of an image, what is refused, and that a recipe trains with them."""

import json

import datasets
import numpy as np
import pytest
from PIL import Image
from small_runs import record_of, train

from ipg_hf.baselines.degrade import degrade_pairs
from ipg_hf.data import load_digits
from ipg_hf.pairs import check_pairs, extend_pairs, mix_pairs
from ipg_hf.pairs.extending import learn_colors
from ipg_hf.pairs.images import stored_images
from ipg_hf.recipe import Recipe, RecipeError

SIDES = ("image_a", "image_b")


def pixels(image):
    return np.asarray(image).astype(int)


def picture(values):
    return Image.fromarray(np.uint8(values))


def pair_set(sides, **columns):
    return datasets.Dataset.from_dict({**dict(zip(SIDES, map(list, zip(*sides, strict=True)), strict=True)), **columns})


def image_set(images, **columns):
    return datasets.Dataset.from_dict({"image": list(images), **columns})


def stored(pairs):
    return [(row["image_a"]["bytes"], row["image_b"]["bytes"]) for row in stored_images(pairs, SIDES)]


def grey(*levels):
    """A grey image with one pixel for each level."""
    return picture(np.repeat(np.array([levels])[..., None], 3, 2))


def halved(count=10, seed=0):
    """Grey pairs: a level x of side a, from 0 to 200, is x / 2 + 20 on side b, from 20 to 120."""
    rng = np.random.default_rng(seed)
    drawn = [[0, 200, *(2 * rng.integers(0, 101, 6))] for _ in range(count)]
    return pair_set([(grey(*levels), grey(*(level // 2 + 20 for level in levels))) for levels in drawn])


def noise(seed, size=(8, 8)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3))


@pytest.fixture(scope="module")
def digits():
    return load_digits(num_pairs=30)


@pytest.fixture(scope="module")
def extended(digits):
    return extend_pairs(digits.pairs, digits.train)


# ---- The map and the side


def test_a_hand_worked_map_is_applied_from_either_side():
    source = image_set([grey(0, 200, 100, 10), grey(20, 120, 30, 90)])
    made = extend_pairs(halved(), source)
    assert len(made) == 12 and made.column_names == [*SIDES]
    # the first is like side a: 0, 100, 50 and 5 plus 20
    assert [pixels(made[10][side])[0, :, 0].tolist() for side in SIDES] == [[0, 200, 100, 10], [20, 120, 70, 25]]
    # the second like side b: twice as much less 40
    assert [pixels(made[11][side])[0, :, 0].tolist() for side in SIDES] == [[0, 200, 20, 140], [20, 120, 30, 90]]


def test_values_beyond_the_range_are_its_ends():
    source = image_set([grey(10, 120, 140, 30), grey(0, 250, 2, 8)])
    made = extend_pairs(halved(), source)
    assert pixels(made[10]["image_a"])[0, :, 1].tolist() == [0, 200, 240, 20]  # 2 · 10 - 40 is below 0
    assert pixels(made[11]["image_b"])[0, :, 1].tolist() == [20, 145, 21, 24]


def test_a_map_between_channels_is_recovered_with_its_inverse():
    """Red and green are exchanged, and blue is mixed of all three and a constant."""
    matrix, offset = np.array([[0, 1, 0.125], [1, 0, -0.125], [0, 0, 0.5]]), np.array([0, 0, 40 / 255])
    sides = [(noise(n) / 255, noise(n) / 255 @ matrix + offset) for n in range(20)]
    pairs = pair_set([(picture(a * 255), picture(np.rint(b * 255))) for a, b in sides])
    learned = learn_colors(stored_images(pairs, SIDES), [None, None])
    np.testing.assert_allclose(learned.to_b, [*(matrix - np.eye(3)), offset], atol=2e-3)
    inverse = np.linalg.inv(matrix)
    np.testing.assert_allclose(learned.to_a, [*(inverse - np.eye(3)), -offset @ inverse], atol=2e-2)


def test_colours_that_no_pair_shows_stay_as_they_are(digits):
    """The pairs are red and green digits on black."""
    learned = learn_colors(stored_images(digits.pairs, SIDES), [None, None])
    np.testing.assert_allclose(learned.to_b, [[-1, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]], atol=1e-4)
    np.testing.assert_allclose(learned.to_a, [[0, 0, 0], [1, -1, 0], [0, 0, 0], [0, 0, 0]], atol=1e-4)


def test_extended_digits_are_the_rendered_digits(extended):
    """The exchange of channels is recovered exactly: the benchmark renders its pairs from the strokes."""
    rendered = {pixels(row["image_a"]).tobytes(): row for row in load_digits(num_pairs=997).pairs}
    assert len(extended) == len({row["image_a"].tobytes() for row in extended}) == len(rendered) == 997
    for ours in extended:
        theirs = rendered[pixels(ours["image_a"]).tobytes()]
        assert (pixels(ours["image_b"]) == pixels(theirs["image_b"])).all() and ours["label"] == theirs["label"]
        # the orientation of the pairs, whichever colour the training image has
        assert pixels(ours["image_a"])[..., 0].any() and not pixels(ours["image_a"])[..., 1].any()


def test_the_training_images_give_pairs_of_either_side(digits, extended):
    own = {
        image.tobytes(): color for image, color in zip(digits.train["image"], digits.train["attribute"], strict=True)
    }
    assert {own[row["image_a"].tobytes()] for row in extended if row["image_a"].tobytes() in own} == {0}
    assert {own[row["image_b"].tobytes()] for row in extended if row["image_b"].tobytes() in own} == {1}
    assert sum(row["image_b"].tobytes() in own for row in extended) == sum(digits.train["attribute"]) > 400


# ---- The rows of the result


def test_the_pairs_come_first_and_their_images_make_no_further_pair(digits, extended):
    assert stored(extended)[:30] == stored(digits.pairs)
    assert extended["label"][:30] == digits.pairs["label"][:]
    assert len(extended) == len(digits.train) == 997  # 30, and 967 others
    changed = degrade_pairs(digits.pairs, residual=0.01)  # their sides b are no training images any more
    red = {a for a, _ in stored(changed)} & {row["bytes"] for row in stored_images(digits.train, ["image"])["image"]}
    assert 0 < len(red) < 30 and len(extend_pairs(changed, digits.train)) == 30 + 997 - len(red)
    assert [finding.code for finding in check_pairs(extended) if finding.severity != "info"] == []


def test_the_draw_depends_on_the_seed_alone(digits):
    few, again, more, other = (
        stored(extend_pairs(digits.pairs, digits.train, num_pairs=number, seed=seed))
        for number, seed in ((100, 1), (100, 1), (200, 1), (100, 2))
    )
    assert few == again and len(few) == 100 and len(more) == 200
    assert {*few} < {*more} and {*few} != {*other}


def test_pairs_are_kept_on_disk_under_what_they_were_learned_from(digits, extended, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    assert extended.cache_files
    others = digits.validation_pairs.select(range(30))  # none of their images is a training image
    blue = others.map(lambda row: {"image_b": picture(pixels(row["image_b"])[..., [0, 2, 1]])})
    to_green, to_blue, again = (extend_pairs(pairs, digits.train, num_pairs=70) for pairs in (others, blue, others))
    assert len([*(tmp_path / "pairs").glob("*.arrow")]) == 2
    assert stored(to_green) == stored(again) and len(to_green) == 70
    assert all(pixels(row["image_b"])[..., 2].any() for row in to_blue)
    assert not any(pixels(row["image_b"])[..., 2].any() for row in to_green)


def test_labels_are_those_of_the_training_images_by_name(digits):
    names = digits.train.features["label"].names
    turned = datasets.ClassLabel(names=names[::-1])
    labels = [1 - label for label in digits.pairs["label"]]
    pairs = digits.pairs.remove_columns("label").add_column("label", labels).cast_column("label", turned)
    made = extend_pairs(pairs, digits.train)
    assert made.features["label"] == digits.train.features["label"]
    assert made["label"][:30] == digits.pairs["label"][:]
    assert made["label"][:] == extend_pairs(digits.pairs, digits.train)["label"][:]
    for sets in ((digits.pairs.remove_columns("label"), digits.train), (pairs, digits.train.remove_columns("label"))):
        assert extend_pairs(*sets).column_names == [*SIDES]


def test_the_label_of_a_regression_is_a_number():
    levels = [0.5 * row for row in range(10)]
    pairs = halved().add_column("label", levels)
    made = extend_pairs(pairs, image_set([grey(0, 200, 100, 10)], label=[7.25]))
    assert made["label"][:] == [*levels, 7.25]
    with pytest.raises(
        ValueError, match=r"'label' of the pairs is .*float64.* and that of the training images .*int64"
    ):
        extend_pairs(pairs, image_set([grey(0, 200, 100, 10)], label=[7]))


def test_an_image_that_its_map_does_not_change_makes_no_pair(digits, caplog):
    blue = [
        picture(pixels(image)[..., [2, 1, 0]])
        for image in digits.train.filter(lambda row: not row["attribute"])[:4]["image"]
    ]
    red = image_set([*blue, digits.train[0]["image"], digits.train[1]["image"]]).cast_column("image", datasets.Image())
    made = extend_pairs(digits.pairs, red)
    assert len(made) == 32 and "4 of 6 training images make no pair" in caplog.text
    assert {*digits.pairs["label"]} == {0, 1}  # the pairs have labels and these images have none
    with pytest.raises(ValueError, match="change none of 4 training images: give pairs of images like them"):
        extend_pairs(digits.pairs, image_set(blue))


def test_a_training_image_keeps_its_file(tmp_path):
    grey(0, 200, 100, 10).save(tmp_path / "own.png")
    source = image_set([str(tmp_path / "own.png")]).cast_column("image", datasets.Image())
    row = stored_images(extend_pairs(halved(), source), SIDES)[10]
    assert row["image_a"]["path"] == str(tmp_path / "own.png")
    assert row["image_b"]["path"] is None and row["image_b"]["bytes"]


def test_images_of_other_modes_become_rgb():
    source = image_set([grey(0, 200, 100, 10).convert(mode) for mode in ("L", "RGBA")])
    made = extend_pairs(halved(), source)
    for row in (10, 11):
        assert {made[row][side].mode for side in SIDES} == {"RGB"}
        assert pixels(made[row]["image_b"])[0, :, 0].tolist() == [20, 120, 70, 25]
    for mode in ("L", "RGB"):
        pairs = pair_set([[row[side].convert("RGBA") for side in SIDES] for row in halved()])
        pairs = pairs.cast(datasets.Features(dict.fromkeys(SIDES, datasets.Image(mode=mode))))
        made = extend_pairs(pairs, source)
        assert {row[side].mode for row in made for side in SIDES} == {mode}


# ---- What is refused


def test_the_share_that_a_map_explains_by_hand():
    """From black no map can tell black from grey 128: it takes the mean, which is 64 off of both.

    The squared differences of the sides are 0 and 128², the missed ones 64² and 64²: 1 - 2 · 64² / 128² = 1/2. From
    both greys to black there is a map. Each of the five parts has one of the pairs of either kind.
    """
    pairs = pair_set([(grey(0), grey(128 * (row >= 5))) for row in range(10)])
    with pytest.raises(ValueError, match=r"0\.50 of the squared difference from side a to b and 1\.00 from b to a"):
        extend_pairs(pairs, image_set([grey(1)]))
    pairs = pair_set([(grey(128 * (row >= 5)), grey(0)) for row in range(10)])
    with pytest.raises(ValueError, match=r"1\.00 of the squared difference from side a to b and 0\.50 from b to a"):
        extend_pairs(pairs, image_set([grey(1)]))


def test_the_share_is_that_of_pairs_that_were_held_out():
    """Each of the five parts has two equal pairs of one pixel: black, red, green, blue, black, and the complement.

    One map, 1 - x, is right for all. Without the red pairs, black says "+1" and nothing says what red changes: red
    becomes (2, 1, 1) instead of (0, 1, 1), which misses 4. The same of green and of blue, and nothing of black, whose
    other pairs are kept: 12 of 5 · 3, which leaves 1/5.
    From b to a, without the cyan pairs, red is 1 in all others and looks like the constant: each gets a half. Cyan
    becomes (-1/2, -1/2, -1/2) instead of (1, 0, 0), which misses 9/4 + 1/4 + 1/4: 33/4 of 15, which leaves 9/20.
    """
    colors = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 0]] * 2)
    pairs = pair_set([(picture([[color]]), picture([[255 - color]])) for color in colors])
    with pytest.raises(ValueError, match=r"0\.20 of the squared difference from side a to b and 0\.45 from b to a"):
        extend_pairs(pairs, image_set([grey(1)]))


def backgrounds(count=20):
    """A white square on two noises."""
    sides = [[noise((n, side)) for side in (0, 1)] for n in range(count)]
    for both in sides:
        for side in both:
            side[2:5, 2:5] = 255
    return pair_set([[picture(side) for side in both] for both in sides])


def test_pairs_that_no_colour_map_explains_are_refused_before_any_pair_is_made(digits, monkeypatch):
    monkeypatch.setattr("ipg_hf.pairs.extending.map_cached", lambda *args, **kwargs: pytest.fail("pairs were made"))
    with pytest.raises(
        ValueError, match=r"explains -?0\.\d\d of .* needs 0\.9 of both.*use mix_pairs instead, or more"
    ):
        extend_pairs(backgrounds(), image_set([picture(noise(5))]))
    equal = pair_set([(grey(n, 5), grey(n, 5)) for n in range(10)])
    with pytest.raises(ValueError, match=r"0\.00 of the squared difference from side a to b and 0\.00"):
        extend_pairs(equal, image_set([grey(99, 5)]))
    wrong_partners = degrade_pairs(digits.pairs, mislabelled=0.6)
    with pytest.raises(ValueError, match="no colour map turns the sides of these pairs into each other"):
        extend_pairs(wrong_partners, digits.train)


def test_sides_that_cannot_be_told_are_refused(digits):
    """Without orientation, red and green are still exchanged by one map, its own inverse."""
    with pytest.raises(
        ValueError, match=r"of held-out pairs 0\.\d\d of the sides are recognised, .* needs 0\.95\. Put"
    ):
        extend_pairs(degrade_pairs(digits.pairs, unoriented=0.5), digits.train)


def test_the_sides_of_held_out_pairs_must_be_told():
    """In noise nothing tells one order of the channels from another, but twelve features fit these ten pairs."""
    pairs = pair_set([(picture(noise(n)), picture(noise(n)[..., [1, 2, 0]])) for n in range(20, 30)])
    with pytest.raises(ValueError, match=r"of held-out pairs 0\.70 of the sides are recognised"):
        extend_pairs(pairs, image_set([picture(noise(99))]))


def test_a_wrong_pair_among_many_does_not_stop_it(digits):
    rows = [row if row["source_id"] != digits.pairs[3]["source_id"] else {**row, "image_b": row["image_a"]}
            for row in digits.pairs]  # fmt: skip
    made = extend_pairs(datasets.Dataset.from_list(rows, features=digits.pairs.features), digits.train)
    exchanged = [abs(pixels(row["image_a"])[..., [1, 0, 2]] - pixels(row["image_b"])).max() for row in made]
    assert exchanged[3] > 100 and max(exchanged[30:]) < 30


def test_what_is_given_is_right_or_named(digits):
    pairs, train = digits.pairs, digits.train
    for number in (30, 0, -1):
        with pytest.raises(
            ValueError, match=f"num_pairs={number} of extend_pairs must be above the number of pairs, 30"
        ):
            extend_pairs(pairs, train, num_pairs=number)
    for number in (40.5, "40", True, float("nan")):
        with pytest.raises(ValueError, match=r"num_pairs=.* is not valid: it must be a whole number"):
            extend_pairs(pairs, train, num_pairs=number)
    with pytest.raises(ValueError, match=r"num_pairs=998, .*30 pairs and 967 training images .*at most 997 pairs"):
        extend_pairs(pairs, train, num_pairs=998)
    with pytest.raises(ValueError, match="seed=-1 is not valid"):
        extend_pairs(pairs, train, seed=-1)
    with pytest.raises(ValueError, match="at least 10 pairs, but the set has 9"):
        extend_pairs(pairs.select(range(9)), train)
    with pytest.raises(ValueError, match=r"pair set that extend_pairs enlarges must be .*type IterableDataset"):
        extend_pairs(pairs.to_iterable_dataset(), train)
    with pytest.raises(ValueError, match=r"training images of extend_pairs must be .*type IterableDataset"):
        extend_pairs(pairs, train.to_iterable_dataset())
    with pytest.raises(ValueError, match="no column 'image_b'"):
        extend_pairs(pairs.remove_columns("image_b"), train)
    with pytest.raises(ValueError, match="no column 'image'"):
        extend_pairs(pairs, pairs)
    with pytest.raises(ValueError, match="all training images are in the pairs already"):
        extend_pairs(pairs, pairs.rename_column("image_a", "image"))
    sizes = pair_set([*((row["image_a"], row["image_b"]) for row in halved()), (grey(1, 2), grey(1, 2, 3))])
    with pytest.raises(ValueError, match="the sides of pair 10 have 2×1 and 3×1 pixels"):
        extend_pairs(sizes, image_set([grey(0, 200)]))


# ---- Recipes


def test_a_recipe_extends_its_training_pairs_before_it_mixes_them():
    plain = Recipe(num_pairs=20).load_data(seed=1)
    data = Recipe(num_pairs=20, extend_pairs=json.dumps({"num_pairs": 90})).load_data(seed=1)
    assert stored(data.pairs) == stored(extend_pairs(plain.pairs, plain.train, num_pairs=90, seed=1))
    assert stored(data.validation_pairs) == stored(plain.validation_pairs)
    assert len(Recipe(num_pairs=20, extend_pairs={"num_pairs": None}).load_data(seed=1).pairs) == 997
    both = Recipe(num_pairs=20, extend_pairs={"num_pairs": 90}, mix_pairs={"num_pairs": 95}).load_data(seed=1)
    assert stored(both.pairs) == stored(mix_pairs(data.pairs, num_pairs=95, seed=1))


def test_a_recipe_says_which_pairs_it_cannot_extend():
    with pytest.raises(RecipeError, match="extend_pairs has no option 'num_pair'"):
        Recipe(extend_pairs={"num_pair": 50}).load_data(seed=0)
    with pytest.raises(RecipeError, match=r"num_pairs=20 of extend_pairs must be above"):
        Recipe(num_pairs=20, extend_pairs={"num_pairs": 20}).load_data(seed=0)
    sets = {"dataset": "marked_digits", "num_pairs": 20, "extend_pairs": {"num_pairs": 50}}
    with pytest.raises(RecipeError, match=r"pairs\['mark'\]: no colour map turns the sides"):
        Recipe(**sets).load_data(seed=0)
    colors = Recipe(**sets, pair_sets=["color"]).load_data(seed=0).pairs
    assert {name: len(rows) for name, rows in colors.items()} == {"color": 50}
    made = Recipe(pairs={"maker": "recolor", "change": "channels", "attribute": "attribute"}, num_pairs=20)
    assert len(made.load_data(seed=0).pairs) == 20
    made.extend_pairs = {"num_pairs": 60}
    assert len(made.load_data(seed=0).pairs) == 60


def test_a_training_with_extended_pairs_is_resumed_as_it_would_have_gone_on(tmp_path):
    settings = {"extend_pairs": {"num_pairs": 60}, "num_pairs": 20, "measure_test": False, "save_total_limit": 2}
    settings |= {"lr_scheduler_type": "constant"}
    whole, weights = train(tmp_path / "whole", **settings)
    assert whole["data"]["pair_sets"]["pairs"]["pairs"] == 60 and whole["settings"]["extend_pairs"] == {"num_pairs": 60}
    train(tmp_path / "cut", **settings, max_steps=3)
    assert record_of(tmp_path / "cut")["steps"] == 3
    resumed, again = train(tmp_path / "cut", "--resume_from_checkpoint", "last", **settings)
    assert resumed["steps"] == 6 and resumed["metrics"] == whole["metrics"]
    assert all((weights[name] == again[name]).all() for name in weights)
    _, few = train(tmp_path / "few", **{**settings, "extend_pairs": {}})
    assert any((weights[name] != few[name]).any() for name in weights)
