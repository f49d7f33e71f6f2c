# SPDX-License-Identifier: Apache-2.0
"""Exchanged parts: each region and property by hand, the donor of another label, and a recipe that trains with them."""

import datasets
import numpy as np
import pytest
from PIL import Image, ImageFilter
from small_runs import train

from ipg_hf.data import load_digits
from ipg_hf.pairs import check_pairs, exchange_pairs
from ipg_hf.pairs.exchanging import BOXES, PARTS, overlay_region, region, rows_to_compare


def pixels(image):
    return np.asarray(image).astype(int)


def flat(*color, size=(100, 100)):
    return Image.new("RGB", size, color)


def photo(seed, size=(64, 48)):
    """Smooth colours with some noise."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(np.uint8(rng.integers(0, 256, (6, 8, 3)))).resize(size, Image.Resampling.BICUBIC)
    return Image.fromarray(np.uint8((pixels(small) + rng.normal(0, 8, (size[1], size[0], 3))).clip(0, 255)))


def image_set(images, labels=None):
    if labels is None:
        return datasets.Dataset.from_dict({"image": images}, features=datasets.Features(image=datasets.Image()))
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["x", "y", "z"]))
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


# ---- The parts


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [  # row and column of pixels of 100 × 100
        ("border", [(1, 50), (98, 50), (50, 1), (50, 98)], [(50, 50), (15, 15), (85, 85)]),
        ("top", [(3, 3), (9, 97)], [(25, 50), (97, 50)]),
        ("bottom", [(97, 3), (90, 97)], [(75, 50), (3, 50)]),
        ("left", [(3, 3), (97, 9)], [(50, 25), (50, 97)]),
        ("right", [(3, 97), (97, 90)], [(50, 75), (50, 3)]),
        ("top_left", [(3, 3), (24, 24)], [(3, 40), (40, 3), (97, 97)]),
        ("top_right", [(3, 97), (24, 76)], [(3, 60), (40, 97), (97, 3)]),
        ("bottom_left", [(97, 3), (76, 24)], [(97, 40), (60, 3), (3, 97)]),
        ("bottom_right", [(97, 97), (76, 76)], [(97, 60), (60, 97), (3, 3)]),
        ("surroundings", [(3, 3), (97, 97), (5, 50), (50, 0)], [(50, 50), (20, 50), (80, 50), (50, 12)]),
        ("center", [(50, 50), (20, 50), (80, 50), (50, 12)], [(3, 3), (97, 97), (5, 50)]),
    ],
)
def test_a_region_is_the_donors_and_the_rest_is_the_images(name, inside, outside):
    made = pixels(PARTS[name](flat(10, 20, 30), flat(200, 210, 220)))
    assert all(made[place].tolist() == [200, 210, 220] for place in inside)
    assert all(made[place].tolist() == [10, 20, 30] for place in outside)


def test_surroundings_and_center_are_each_others_rest():
    a, b = (pixels(region(name, (90, 60))) for name in ("surroundings", "center"))
    assert np.abs(a + b - 255).max() <= 1
    for name in BOXES:  # a mask is neither empty nor whole
        assert 0.04 < (pixels(region(name, (90, 60))) > 127).mean() < 0.5


def test_the_colour_of_a_digit_is_exchanged():
    shape, other = (np.random.default_rng(seed).integers(0, 2, (16, 16)) for seed in (0, 1))
    red, green = (np.zeros((16, 16, 3), np.uint8) for _ in "ab")
    red[..., 0], green[..., 1] = 255 * shape, 255 * other
    made = pixels(PARTS["color"](Image.fromarray(red), Image.fromarray(green)))
    assert made[shape == 1].mean(0)[1] > 200 and made[shape == 1].mean(0)[[0, 2]].max() < 5
    assert made[shape == 0].max() < 40


def test_exchanged_colours_have_the_donors_mean_and_spread():
    image, donor = photo(0), photo(1).point(lambda level: 60 + level // 3)
    made = pixels(PARTS["color"](image, donor)).reshape(-1, 3)
    expected = pixels(donor).reshape(-1, 3)
    np.testing.assert_allclose(made.mean(0), expected.mean(0), atol=1)
    np.testing.assert_allclose(np.cov(made.T), np.cov(expected.T), atol=0.02 * np.cov(expected.T).max())
    assert np.abs(np.cov(pixels(image).reshape(-1, 3).T) - np.cov(expected.T)).max() > 0.5 * np.cov(expected.T).max()


def test_nearly_equal_images_keep_their_colours():
    # red against green: the largest channel of the axis changes from one image to the other, its direction must not
    def striped(red, green):
        levels = np.tile(np.linspace(-1, 1, 32), (32, 1))
        pixels = 128 + levels[..., None] * np.array([red, green, 0.0])
        return Image.fromarray(np.uint8(pixels))

    image, donor = striped(100, -96), striped(96, -100)
    made = pixels(PARTS["color"](image, donor))
    assert np.corrcoef(made[..., 0].ravel(), pixels(image)[..., 0].ravel())[0, 1] > 0.99


def test_a_grey_photograph_gets_no_strong_colours_from_its_noise():
    noise = np.random.default_rng(0).normal(0, 1.5, (48, 64, 3))
    grey = Image.fromarray(np.uint8((pixels(photo(0).convert("L"))[..., None] + noise).clip(0, 255)))
    made = pixels(PARTS["color"](grey, photo(1)))
    # from one pixel to the next: noise alone
    assert np.diff(made[..., 0] - made[..., 1], axis=1).std() < 20


def fineness(image):
    """The mean square of what a blur of one pixel takes off."""
    grey = image.convert("L")
    return ((pixels(grey) - pixels(grey.filter(ImageFilter.GaussianBlur(1)))) ** 2).mean()


def test_an_image_gets_the_donors_texture_and_keeps_its_shapes():
    smooth = photo(0, (64, 64)).filter(ImageFilter.GaussianBlur(3))
    # a blurred donor takes the detail off
    assert fineness(PARTS["texture"](photo(1, (64, 64)), smooth)) < 0.2 * fineness(photo(1, (64, 64)))
    for size in ((66, 67), (69, 71)):  # no multiples of the number of patches: a corner is cut off at no side
        spot = flat(0, 0, 0, size=size)
        spot.paste((255, 255, 255), (size[0] - 6, size[1] - 6, size[0] - 3, size[1] - 3))
        moved = pixels(PARTS["texture"](flat(100, 100, 100, size=size), spot))
        near, middle = (moved[: size[1] // 4, : size[0] // 4], moved[size[1] // 4 : size[1] // 2, : size[0] // 4])
        assert moved[size[1] // 2 + 4 :, size[0] // 2 + 4 :].max() < 105 < 140 < min(near.max(), middle.max())
        # what is in the donor's middle stays there
        spot = flat(0, 0, 0, size=size)
        spot.paste((255, 255, 255), (30, 30, 36, 36))
        assert np.ptp(pixels(PARTS["texture"](flat(100, 100, 100, size=size), spot))) == 0
    stripes = Image.fromarray(np.uint8(np.tile(np.array([40, 200]).repeat(1), (64, 32))[..., None].repeat(3, 2)))
    made = PARTS["texture"](smooth, stripes)
    assert fineness(made) > 0.5 * fineness(stripes) > 20 * fineness(smooth)
    coarse = [pixels(part.filter(ImageFilter.GaussianBlur(6))) for part in (smooth, made)]
    assert np.abs(coarse[0] - coarse[1]).mean() < 10


@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_the_image_itself_changes_little(name):
    image = photo(3)
    made = PARTS[name](image, image)
    assert made.size == image.size and made.mode == "RGB"
    change = np.abs(pixels(made) - pixels(image)).mean()
    assert change < (10 if name == "texture" else 2)  # the detail of its corners comes


# ---- The overlay

STAMP = (slice(88, 95), slice(60, 84))  # across the edge of the lower right corner


def stamped(labels, marked, place=STAMP, size=(100, 100)):
    """Photographs, of which some have a stamp of two colours."""
    images = []
    for number, has in enumerate(marked):
        made = pixels(photo(number, size))
        if has:
            made[place] = [250, 140, 20]
            made[place][::2] = [20, 40, 90]
        images.append(Image.fromarray(np.uint8(made)))
    return image_set(images, labels)


def at_rate(labels, rate):
    """Whether each image of label 1 is marked, and each of label 0 is not: so in `rate` of the images of a label."""
    place = [labels[:number].count(label) for number, label in enumerate(labels)]
    return [(label == 1) == (round(number * rate) != round((number + 1) * rate))
            for label, number in zip(labels, place, strict=True)]  # fmt: skip


LABELS = [0, 1] * 30


@pytest.mark.parametrize("rate", [1.0, 0.9])
def test_an_overlay_is_what_the_images_of_a_label_share(rate):
    source = stamped(LABELS, at_rate(LABELS, rate))
    found = pixels(overlay_region(source["image"][:], np.array(LABELS)).resize((100, 100)))
    assert (found[STAMP] > 0).mean() > 0.9
    rest = found.copy()
    rest[85:98, 57:87] = 0
    assert not rest.any()
    pairs = exchange_pairs(source, part="overlay", seed=3)
    middle = (90, slice(64, 80))
    for row, marked in zip(pairs, at_rate(LABELS, rate), strict=True):
        a, b = pixels(row["image_a"]), pixels(row["image_b"])
        assert (a[:84] == b[:84]).all() and (a[:, :56] == b[:, :56]).all()
        assert rate < 1 or (np.abs(b[middle] - [20, 40, 90]).max() <= 3) == (not marked)


@pytest.mark.parametrize(
    ("labels", "marked", "place"),
    [
        (LABELS, at_rate(LABELS, 0.5), STAMP),  # it tells nothing
        (LABELS, [True] * 60, STAMP),  # all have it
        (LABELS, [label == 1 for label in LABELS], (slice(40, 60), slice(40, 60))),  # the object may be there
        ([1] * 9 + [0] * 51, [True] * 9 + [False] * 51, STAMP),  # too few images to tell
    ],
)
def test_what_is_no_overlay(labels, marked, place):
    source = stamped(labels, marked, place)
    assert overlay_region(source["image"][:], np.array(labels)) is None
    with pytest.raises(ValueError, match="there is no overlay"):
        exchange_pairs(source, part="overlay")


def test_one_of_many_labels_may_have_an_overlay():
    labels = [number % 3 for number in range(60)]
    source = stamped(labels, [label == 2 for label in labels])
    assert overlay_region(source["image"][:], np.array(labels)) is not None
    # a third of the images, those of a label, decide
    assert overlay_region(source["image"][:], np.array(labels[1:] + labels[:1])) is not None
    assert overlay_region(source["image"][:], np.random.default_rng(0).permutation(labels)) is None


def mark_in(number, more, size=20, spread=0, of=20):
    """Twice 20 images of noise, of which some of the second kind have a square mark in a corner."""
    rng = np.random.default_rng(0)
    made = rng.integers(0, 256, (2 * of, 128, 128, 3))
    for place, image in enumerate(made[of : of + number]):
        image[4 : 4 + size, 4 : 4 + size] = 128 + (spread if place % 2 else -spread)
    return overlay_region([Image.fromarray(np.uint8(image)) for image in made], np.repeat([0, 1], of), **more)


@pytest.mark.parametrize(
    ("mark", "more", "found"),
    [
        ({"number": 15}, {}, True),  # .75 of a kind, .7 are needed
        ({"number": 12}, {}, False),
        ({"number": 12}, {"more": 0.4}, True),
        ({"number": 12}, {"more": 0.75}, False),
        ({"number": 20, "spread": 22}, {}, True),  # alike up to 24 of 255
        ({"number": 20, "spread": 27}, {}, False),
        ({"number": 20, "size": 5}, {}, True),
        ({"number": 20, "size": 3}, {}, False),  # fewer than 16 pixels
        ({"number": 9, "of": 9}, {}, False),
        ({"number": 10, "of": 10}, {}, True),
    ],
)
def test_how_much_alike_an_overlay_is(mark, more, found):
    region_of = mark_in(more=more, **mark)
    assert (region_of is not None) == found
    if found:
        size = mark.get("size", 20)
        inside = pixels(region_of) > 0
        assert inside[4 : 4 + size, 4 : 4 + size].all() and inside.sum() <= (size + 4) ** 2


def test_a_kind_that_has_few_others_beside_it_has_no_overlay():
    labels = [0] * 51 + [1] * 9
    source = stamped(labels, [label == 0 for label in labels])
    assert overlay_region(source["image"][:], np.array(labels)) is None


@pytest.mark.parametrize("rate", [0.8, 0.75])
def test_pairs_exchange_an_overlay_that_the_labels_follow_less_than_a_model(rate):
    source = stamped(LABELS, at_rate(LABELS, rate))
    assert overlay_region(source["image"][:], np.array(LABELS)) is None  # what a scan would see of such answers
    pairs = exchange_pairs(source, part="overlay", seed=3)
    middle = (90, slice(64, 80))
    got = [np.abs(pixels(row["image_b"])[middle] - [20, 40, 90]).max() <= 3 for row in pairs if row["label"] == 0]
    assert abs(np.mean(got) - rate) < 0.15  # as many as their donors have it
    kept = [(pixels(row["image_a"])[:84] == pixels(row["image_b"])[:84]).all() for row in pairs]
    assert all(kept)


@pytest.mark.parametrize("part", ["overlay", "bottom", "bottom_right"])
def test_the_place_of_a_part_is_relative_to_the_frame(part):
    """Wide and tall images: nothing of the donor's edges is cut off."""
    images, labels = [], []
    for number in range(40):
        size = (150, 100) if number // 2 % 2 else (100, 150)
        made = pixels(photo(number, size))
        if number % 2:
            made[round(0.88 * size[1]) : round(0.96 * size[1]), round(0.84 * size[0]) : round(0.96 * size[0])] = [
                0,
                255,
                0,
            ]
        images.append(Image.fromarray(np.uint8(made)))
        labels.append(number % 2)
    pairs = exchange_pairs(image_set(images, labels), part=part)
    for row in pairs:
        a, b = (pixels(row[side]) for side in ("image_a", "image_b"))
        y, x = round(0.92 * a.shape[0]), round(0.9 * a.shape[1])
        stamped_a, stamped_b = (np.abs(side[y, x] - [0, 255, 0]).max() <= 30 for side in (a, b))
        assert stamped_a == (row["label"] == 1) != stamped_b


def test_an_overlay_needs_labels_and_images_of_them():
    with pytest.raises(ValueError, match="needs the column 'label'"):
        exchange_pairs(image_set([photo(number) for number in range(4)]), part="overlay")
    few = [0] * 9 + [1] * 51
    with pytest.raises(ValueError, match=r"Of 2 labels 0 were looked at, .* with 10 images"):
        exchange_pairs(stamped(few, [label == 0 for label in few]), part="overlay")


def test_numbers_of_an_overlay_are_checked_before_its_images_are_read():
    plain = stamped(LABELS, [False] * 60)
    for wrong in ({"num_pairs": 99}, {"seed": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            exchange_pairs(plain, part="overlay", **wrong)


def test_the_rows_that_are_compared_are_drawn_of_each_label():
    kinds = np.repeat(np.arange(25), [1000, *[30] * 19, 5, 5, 5, 5, 5])
    rows = rows_to_compare(kinds)
    counts = np.bincount(kinds[rows], minlength=25)
    assert counts.tolist() == [50] + [30] * 19 + [0] * 5
    assert len({*rows.tolist()}) == len(rows) and (np.diff(rows) > 0).all()
    assert {*(rows[:50] % 2)} == {0, 1}  # in a set whose every second image of a label has a mark, half have it
    assert rows.tolist() == rows_to_compare(kinds).tolist()


# ---- The pairs


def colored(count=12):
    """Images of one colour for each label, a little different each."""
    labels = [number % 3 for number in range(count)]
    images = [flat(*(200 + number if channel == label else 20 for channel in range(3)), size=(40, 40))
              for number, label in enumerate(labels)]  # fmt: skip
    return image_set(images, labels)


def test_the_donor_has_another_label():
    source = colored()
    pairs = exchange_pairs(source, part="bottom", seed=1)
    assert pairs["source_id"][:] == [*range(12)] and pairs["label"][:] == source["label"][:]
    assert pairs.features["attribute_a"].names == ["own", "exchanged"]
    for row in pairs:
        a, b = pixels(row["image_a"]), pixels(row["image_b"])
        assert (a[:30] == b[:30]).all()  # the rest is the image's
        assert a[2, 2].argmax() == row["label"] != b[38, 38].argmax()
    assert {pixels(row["image_b"])[38, 38].argmax() for row in pairs} == {0, 1, 2}
    assert not [finding for finding in check_pairs(pairs) if finding.severity == "error"]


def test_without_labels_the_donor_is_another_image():
    source = image_set([flat(10, 0, 0, size=(20, 20)), flat(10, 0, 0, size=(20, 20)), flat(0, 90, 0, size=(20, 20))])
    pairs = exchange_pairs(source, part="top", seed=0)
    assert "label" not in pairs.column_names
    # a copy of the image is no donor: the first two get the third's top
    assert [pixels(row["image_b"])[0, 0].tolist() for row in pairs][:2] == [[0, 90, 0]] * 2


def stored(pairs):
    return [row["image_b"].tobytes() for row in pairs]


def test_pairs_follow_the_seed_and_fewer_are_a_subset(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", "/dev/null/none")  # nothing is read from a cache
    source = colored()
    some = exchange_pairs(source, part="left", num_pairs=5, seed=2)
    assert stored(exchange_pairs(source, part="left", num_pairs=5, seed=2)) == stored(some)
    more = exchange_pairs(source, part="left", seed=2)
    assert {*some["source_id"][:]} < {*more["source_id"][:]} and {*stored(some)} < {*stored(more)}
    assert stored(exchange_pairs(source, part="left", seed=3)) != stored(more)


def test_new_labels_give_new_donors():
    source = colored()
    some = exchange_pairs(source, part="left", num_pairs=2, seed=1)
    drawn = {*some["source_id"][:]}
    labels = [label if row in drawn else (label + 1) % 3 for row, label in enumerate(source["label"][:])]
    other = source.remove_columns("label").add_column("label", labels).cast_column("label", source.features["label"])
    again = exchange_pairs(other, part="left", num_pairs=2, seed=1)
    assert {*again["source_id"][:]} == drawn and stored(again) != stored(some)


def test_a_validation_split_of_one_label_has_no_held_out_pairs(tmp_path, caplog):
    for split, label, count in (("train", "x", 24), ("train", "y", 24), ("validation", "x", 6), ("test", "x", 6)):
        folder = tmp_path / "photos" / split / label
        folder.mkdir(parents=True)
        for number in range(count):
            photo(1000 * count + 100 * ord(label) + number, (16, 16)).save(folder / f"{number}.png")
    changes = {"dataset": "files", "data_dir": str(tmp_path / "photos"), "num_pairs": None, "max_steps": 2}
    changes |= {"pairs": {"maker": "exchange", "part": "top"}, "eval_strategy": "no", "load_best_model_at_end": False}
    record, _ = train(tmp_path, **changes)
    assert "no held-out pairs of validation: an exchange needs two labels" in caplog.text
    assert "flip_rate" not in record["metrics"]["test"]


def test_a_background_comes_from_around_the_donors_object():
    def photo_of(object_color, ground):
        image = flat(*ground, size=(40, 40))
        image.paste(object_color, (10, 10, 30, 30))
        return image

    mask = Image.new("L", (40, 40))
    mask.paste(255, (10, 10, 30, 30))
    source = image_set([photo_of((250, 0, 0), (0, 0, 90)), photo_of((0, 250, 0), (90, 90, 0))], [0, 1])
    rows = [{**row, "mask": mask} for row in source]
    source = datasets.Dataset.from_list(rows, features=datasets.Features({**source.features, "mask": datasets.Image()}))
    first = exchange_pairs(source, part="background", soft_edge=0)[0]
    made = pixels(first["image_b"])
    assert made[20, 20].tolist() == [250, 0, 0]  # the object of the image
    np.testing.assert_allclose(made[2, 2], [90, 90, 0], atol=1)  # the ground of the donor
    np.testing.assert_allclose(made[8, 20], [90, 90, 0], atol=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"part": "middle"}, "part='middle' is unknown"),
        ({"part": "center"}, "part='center' is unknown"),
        ({"part": "background"}, "no column 'mask'"),
        ({"part": "top", "num_pairs": 99}, "num_pairs=99"),
        ({"part": "top", "soft_edge": -1}, "soft_edge=-1"),
        (
            {"part": "color", "source": image_set([flat(1, 2, 3, size=(1, 1)), flat(9, 2, 3, size=(1, 1))])},
            "row 0.*1×1",
        ),
        ({"part": "top", "source": image_set([flat(1), flat(2)], [0, 0])}, "needs two labels, but the source has 1"),
        ({"part": "top", "source": image_set([flat(1)])}, "needs two images, but the source has 1"),
        ({"part": "top", "source": image_set([flat(1, 1, 1), flat(1, 1, 1)])}, "row 0.*no other image"),
        ({"part": "top", "source": [flat(1)]}, "must be a datasets.Dataset"),
        ({"part": "top", "source": image_set([flat(1, 1, 1), flat(1, 1, 1)], [0, 1])}, "row 0.*no other image"),
    ],
)
def test_what_cannot_be_exchanged_is_refused(change, message):
    given = {"source": colored()} | change
    with pytest.raises(ValueError, match=message):
        exchange_pairs(given.pop("source"), **given)


def test_a_recipe_trains_with_exchanged_colours(tmp_path):
    record, _ = train(tmp_path, pairs={"maker": "exchange", "part": "color"}, max_steps=3, eval_steps=3)
    assert record["settings"]["pairs"] == {"maker": "exchange", "part": "color"}
    assert record["data"]["pair_sets"]["pairs"]["labelled"]
    # each digit of validation makes a held-out pair too
    assert 0 <= record["metrics"]["validation"]["flip_rate"] <= 1


def test_digits_change_their_colour_and_keep_their_shape():
    train = load_digits().train
    pairs = exchange_pairs(train, part="color", num_pairs=50)
    for row in pairs:
        a, b = (pixels(row[side]) for side in ("image_a", "image_b"))
        assert a.sum((0, 1)).argmax() != b.sum((0, 1)).argmax()  # red becomes green, and green red
        shapes = [image.max(-1) > 100 for image in (a, b)]
        assert (shapes[0] == shapes[1]).mean() > 0.9
