# SPDX-License-Identifier: Apache-2.0
"""The pair linter: clean sets give infos alone, each planted defect its own code with the planted rows."""

import io
import random

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from small import SIZE, Wrapped, vit
from torch import nn
from transformers import ViTImageProcessor

from ipg_hf.data import load_digits
from ipg_hf.guidance import invariance_divergence
from ipg_hf.pairs import ImageRows, overlay_pairs
from ipg_hf.pairs.linter import CODES, FAST_PAIRS, Finding, check_pairs, format_findings
from ipg_hf.pairs.makers import draw_swap
from ipg_hf.pairs.scores import score_pairs

N, PIXELS = 60, 48
NAMES = datasets.ClassLabel(names=["x", "y"])
IMAGE = datasets.Image()
PROCESSOR = ViTImageProcessor(size={"height": SIZE, "width": SIZE})


def photographs(n, seed=0, pixels=PIXELS):
    """Noise as in photographs, the finer the fainter, colours coarse; uint8, (n, pixels, pixels, 3)."""
    rng = np.random.default_rng(seed)
    total = np.zeros((n, pixels, pixels, 3))
    for cells in (2, 4, 8, 16, pixels):
        noise = rng.normal(size=(n, cells, cells, 3)) * (cells < 16) + rng.normal(size=(n, cells, cells, 1))
        index = np.arange(pixels) * cells // pixels
        total += noise[:, index][:, :, index] * 60 / cells
    return (128 + total).clip(0, 255).astype(np.uint8)


def with_sticker(images, color):
    images = images.copy()
    images[:, 4:16, 20:32] = color
    return images


def stored(image, form="png", **kwargs):
    data = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(data, form, **kwargs)
    return {"bytes": data.getvalue(), "path": None}


def pixels_of(value):
    return np.asarray(Image.open(io.BytesIO(value["bytes"])))


def columns_of(n=N, seed=0):
    scenes = photographs(n, seed)
    return {
        "image_a": [stored(image) for image in with_sticker(scenes, (220, 30, 30))],
        "image_b": [stored(image) for image in with_sticker(scenes, (30, 60, 220))],
        "label": [i % 2 for i in range(n)],
        "attribute_a": [0] * n,
        "attribute_b": [1] * n,
    }


def as_dataset(columns):
    kinds = {"image": IMAGE, "label": NAMES, "attrib": NAMES}
    return datasets.Dataset.from_dict(
        columns, datasets.Features({name: kinds[name[:6].rstrip("_")] for name in columns})
    )


def swapped(columns, rows):
    columns = {name: list(values) for name, values in columns.items()}
    for kind in ("image", "attribute"):
        for row in rows:
            a, b = (columns[f"{kind}_{side}"] for side in "ab")
            a[row], b[row] = b[row], a[row]
    return columns


def without_attributes(columns):
    return {name: values for name, values in columns.items() if not name.startswith("attribute")}


def problems(findings):
    """Code -> rows of all but the infos."""
    return {finding.code: list(finding.rows) for finding in findings if finding.severity != "info"}


def of_code(findings, code):
    (finding,) = (finding for finding in findings if finding.code == code)
    return finding


def images_of(values, **more):
    return as_dataset({"image": list(values), **more})


# ---- Clean sets ----


@pytest.mark.parametrize("seed", range(3))
def test_clean_photographs(seed):
    findings = check_pairs(
        as_dataset(columns_of(seed=seed)),
        evaluation={"test": images_of(map(stored, photographs(40, seed=9)), label=[0, 1] * 20)},
        held_out=as_dataset(columns_of(20, seed=8)),
        seed=seed,
    )
    assert [finding.code for finding in findings] == ["change-share"]
    share = 12 * 12 / PIXELS**2
    assert f"{share:.1%}" in findings[0].message


def test_clean_digits():
    data = load_digits()
    findings = check_pairs(
        data.pairs, evaluation={"validation": data.validation, "test": data.test}, held_out=data.validation_pairs
    )
    assert [finding.code for finding in findings] == ["change-share"]


def test_clean_recoloured_photographs():
    scenes = photographs(N, 3)
    columns = columns_of()
    columns["image_a"] = [stored(image) for image in (scenes * np.array([1, 0.8, 0.5])).astype(np.uint8)]
    columns["image_b"] = [stored(image) for image in (scenes * np.array([0.5, 0.8, 1])).astype(np.uint8)]
    for kept in (columns, without_attributes(columns)):
        assert problems(check_pairs(as_dataset(kept))) == {}


def test_clean_pairs_whose_direction_is_none_of_the_pixels():
    # grey on side b: single pixels go either way, colourfulness one way
    scenes = photographs(N, 3)
    columns = without_attributes(columns_of())
    columns["image_a"] = [stored(image) for image in scenes]
    columns["image_b"] = [stored(Image.fromarray(image).convert("L").convert("RGB")) for image in scenes]
    assert problems(check_pairs(as_dataset(columns))) == {}


def test_large_jpegs_are_read_reduced_and_still_compare():
    large = [Image.fromarray(image).resize((1100, 1300)) for image in photographs(4, 5)]
    edited = [ImageOps.invert(image) for image in large]
    columns = {
        "image_a": [stored(image, "jpeg") for image in large],
        "image_b": [*(stored(image, "jpeg") for image in edited[:2]), stored(edited[2]), stored(large[3], "jpeg")],
    }
    assert problems(check_pairs(as_dataset(columns))) == {"few-pairs": [], "sides-identical": [3]}
    hidden = pixels_of(columns["image_a"][3]).copy()  # the same but for one pixel
    hidden[500, 500] ^= 1
    columns["image_b"][3] = stored(hidden)
    assert problems(check_pairs(as_dataset(columns))) == {"few-pairs": [], "change-tiny": [3]}


# ---- Planted defects ----

PLANTED = [7, 23, 41]


def plant_labels(columns):
    columns["label_a"] = columns.pop("label")
    columns["label_b"] = [1 - v if i in PLANTED else v for i, v in enumerate(columns["label_a"])]
    return {"label-differs": PLANTED}


def plant_identical(columns):
    for row in PLANTED:
        columns["image_b"][row] = stored(pixels_of(columns["image_a"][row]), compress_level=1)
    return {"sides-identical": PLANTED}


def plant_attributes(columns):
    for row in PLANTED:
        columns["attribute_b"][row] = columns["attribute_a"][row]
    return {"attribute-same": PLANTED}


def plant_swaps(columns):
    columns.update(swapped(columns, PLANTED))
    return {"attributes-swapped": PLANTED}


def plant_lies(columns):
    columns["image_a"], columns["image_b"] = (swapped(columns, PLANTED)[name] for name in ("image_a", "image_b"))
    return {"sides-swapped": PLANTED}


def plant_repeats(columns):
    for row in PLANTED:
        for side in "ab":
            columns[f"image_{side}"][row] = columns[f"image_{side}"][3]
    return {"pair-repeated": PLANTED}


def plant_sizes(columns):
    for row in PLANTED:
        columns["image_b"][row] = stored(pixels_of(columns["image_b"][row])[1:])
    return {"sides-shape": PLANTED}


def plant_side_modes(columns):
    for row in PLANTED:
        columns["image_b"][row] = stored(Image.fromarray(pixels_of(columns["image_b"][row])).convert("RGBA"))
    return {"sides-shape": PLANTED}


def plant_row_modes(columns):
    for row in PLANTED:
        for side in "ab":
            columns[f"image_{side}"][row] = stored(
                Image.fromarray(pixels_of(columns[f"image_{side}"][row])).convert("RGBA")
            )
    return {"modes-differ": PLANTED}


def plant_unreadable(columns):
    columns["image_a"][7] = {"bytes": b"no image", "path": None}
    columns["image_b"][23] = {"bytes": None, "path": "/nothing/here.png"}
    columns["image_a"][41] = None
    return {"image-unreadable": PLANTED}


def plant_truncated(columns):
    for row in PLANTED:
        columns["image_b"][row] = {"bytes": columns["image_b"][row]["bytes"][:2000], "path": None}
    return {"image-unreadable": PLANTED}


def plant_deep(columns):
    for row, side in enumerate("ab"):
        for i in PLANTED:
            deep = pixels_of(columns[f"image_{side}"][i])[..., 0].astype(np.uint16) * 256
            columns[f"image_{side}"][i] = stored(Image.fromarray(deep + row))
    return {"image-deep": PLANTED}


def plant_floats(columns):
    for side in "ab":
        for i in PLANTED:
            values = Image.fromarray(pixels_of(columns[f"image_{side}"][i])[..., 0].astype(np.float32))
            columns[f"image_{side}"][i] = stored(values, "tiff")
    return {"image-deep": PLANTED}


def plant_tiny(columns):
    for row in PLANTED:
        image = pixels_of(columns["image_a"][row]).copy()
        image[0, 0] = 255 - image[0, 0] // 8
        image[0, 0, 0] = (int(image[0, 0, 0]) + 128) % 256
        columns["image_b"][row] = stored(image)
    return {"change-tiny": PLANTED}


def plant_partners(columns):
    for row, other in zip(PLANTED, np.roll(PLANTED, 1), strict=True):
        columns["image_b"][row] = stored(with_sticker(photographs(1, 100 + other), (30, 60, 220))[0])
    return {"partner-unlike": PLANTED}


def plant_missing_labels(columns):
    columns["label"][7], columns["label"][23], columns["label"][41] = None, -1, None
    return {"label-missing": PLANTED}


def plant_missing_attributes(columns):
    columns["attribute_a"][7] = columns["attribute_b"][23] = columns["attribute_b"][41] = None
    return {"attribute-missing": PLANTED}


def plant_one_label(columns):
    columns["label"] = [1] * N
    return {"one-label": []}


def plant_mostly_one_label(columns):
    columns["label"] = [0] * (N // 10) + [1] * (N - N // 10)
    return {"one-label": []}


def plant_few(columns):
    columns.update({name: values[:6] for name, values in columns.items()})
    return {"few-pairs": []}


DEFECTS = [value for name, value in list(globals().items()) if name.startswith("plant_")]


@pytest.mark.parametrize("plant", DEFECTS, ids=lambda plant: plant.__name__)
def test_planted_defects(plant):
    columns = columns_of()
    expected = plant(columns)
    findings = check_pairs(as_dataset(columns))
    assert problems(findings) == expected
    assert {finding.code for finding in findings} <= {*expected, "change-share"}
    for finding in findings:
        assert (finding.severity, finding.fix) == CODES[finding.code]


def test_labels_that_are_ignored():
    columns = columns_of()
    columns["label"][7], columns["label"][23] = -100, -100
    dataset = as_dataset({name: values for name, values in columns.items() if name != "label"})
    assert problems(check_pairs(dataset.add_column("label", columns["label"]))) == {"label-missing": [7, 23]}
    # -1 is a number like others but for a ClassLabel
    assert problems(check_pairs(dataset.add_column("label", [-1, 1] * (N // 2)))) == {}


def test_an_empty_set():
    (finding,) = check_pairs(as_dataset(columns_of()).select([]))
    assert (finding.code, finding.severity, finding.rows) == ("empty", "error", ())


def test_several_defects_at_once():
    columns, expected = columns_of(), {}
    for plant in (plant_unreadable, plant_attributes):
        expected |= plant(columns)
    columns["image_b"][5] = columns["image_a"][5]
    findings = check_pairs(as_dataset(columns))
    assert problems(findings) == {**expected, "sides-identical": [5]}
    severities = [finding.severity for finding in findings]
    assert severities == sorted(severities)  # error, info, warning: no warning among them


def test_no_image_can_be_read():
    columns = columns_of()
    columns["image_a"] = [{"bytes": b"", "path": None}] * N
    assert problems(check_pairs(as_dataset(columns))) == {"image-unreadable": [*range(N)]}


def test_sizes_that_differ_between_rows():
    columns = columns_of()
    for row in PLANTED:
        for side in "ab":
            columns[f"image_{side}"][row] = stored(pixels_of(columns[f"image_{side}"][row])[2:])
    for processor, severity in ((None, "info"), (PROCESSOR, "info"), (ViTImageProcessor(do_resize=False), "warning")):
        finding = of_code(check_pairs(as_dataset(columns), processor=processor), "sizes-differ")
        assert (finding.severity, list(finding.rows)) == (severity, PLANTED)


def test_near_repeats_and_shared_sources():
    columns = columns_of()
    for side in "ab":  # the same pair, saved again
        columns[f"image_{side}"][9] = stored(pixels_of(columns[f"image_{side}"][3]), "jpeg", quality=90, subsampling=0)
    columns["image_a"][11] = columns["image_a"][5]  # one source, another side b: no repeat
    columns["image_b"][11] = stored(with_sticker(pixels_of(columns["image_a"][5])[None], (250, 250, 30))[0])
    findings = check_pairs(as_dataset(columns))
    assert problems(findings) == {}
    assert of_code(findings, "pair-near").rows == (9,)


def test_a_repeat_on_swapped_sides():
    columns = columns_of()
    for side, other in ("ab", "ba"):
        columns[f"image_{side}"][8] = columns[f"image_{other}"][2]
    assert problems(check_pairs(as_dataset(columns)))["pair-repeated"] == [8]


def test_sides_that_have_nothing_in_common():
    columns = columns_of()
    columns["image_b"] = [stored(image) for image in photographs(N, 4)]
    findings = check_pairs(as_dataset(columns))
    assert of_code(findings, "sides-unmatched").severity == "info"
    assert "partner-unlike" not in problems(findings)


def test_other_backgrounds_are_fine():
    # three quarters of the picture change: dark scenes on side a, bright ones on side b
    things, dark, bright = (photographs(N, seed) for seed in (4, 5, 6))
    dark, bright = dark // 2, bright // 2 + 120
    for scenes in (dark, bright):
        scenes[:, 12:36, 12:36] = things[:, 12:36, 12:36]
    columns = without_attributes(columns_of())
    columns |= {"image_a": [*map(stored, dark)], "image_b": [*map(stored, bright)]}
    assert [finding.code for finding in check_pairs(as_dataset(columns))] == ["change-share"]
    finding = of_code(check_pairs(as_dataset(swapped_images(columns, draw_swap(N, 0)))), "sides-unoriented")
    assert finding.severity == "warning" or finding.rows == ()


# ---- Orientation ----


def swapped_images(columns, mask):
    columns = {name: list(values) for name, values in columns.items()}
    for row in np.flatnonzero(mask):
        columns["image_a"][row], columns["image_b"][row] = columns["image_b"][row], columns["image_a"][row]
    return columns


def with_ruler(scenes, size):
    """Pairs of images of 96 pixels without and with a bright ruler at one place."""
    ruler = np.full((44, 300, 4), (245, 240, 215, 255), np.uint8)
    ruler[:20, ::6, :3] = 20
    source = images_of(stored(scene.clip(0, 255).astype(np.uint8)) for scene in scenes)
    pairs = overlay_pairs(source, overlay=Image.fromarray(ruler), size=size)
    columns = {name: pairs.cast_column(name, datasets.Image(decode=False))[name][:] for name in ("image_a", "image_b")}
    return columns | {name: pairs[name][:] for name in ("attribute_a", "attribute_b")}


@pytest.mark.parametrize("size", [0.08, 0.2])
def test_an_overlay_makes_most_images_brighter_and_a_few_darker(size):
    rng = np.random.default_rng(5)
    contrast, brightness = rng.uniform(0.15, 1, (120, 1, 1, 1)), rng.uniform(38, 228, (120, 1, 1, 1))
    columns = with_ruler(brightness + contrast * (photographs(120, 5, pixels=96) - 128.0), size)
    assert problems(check_pairs(as_dataset(columns))) == {}
    rows = np.isin(np.arange(120), [3, 40, 77, 100])
    found = problems(check_pairs(as_dataset(swapped_images(columns, rows))))
    assert found == {"sides-swapped": np.flatnonzero(rows).tolist()}


def test_an_overlay_outweighs_dim_images_of_little_contrast():
    is_dim = (np.arange(120) % 40 == 7)[:, None, None, None]
    cells = np.random.default_rng(5).normal(size=(120, 16, 16, 1)).repeat(6, 1).repeat(6, 2).repeat(3, 3)
    columns = with_ruler(np.where(is_dim, 20 + 3 * cells, 150 + 40 * cells), 0.3)
    assert problems(check_pairs(as_dataset(columns))) == {}
    wrong = {12: 13, 13: 14, 14: 12}
    columns["image_b"] = [columns["image_b"][wrong.get(row, row)] for row in range(120)]
    assert problems(check_pairs(as_dataset(columns))) == {"partner-unlike": [*wrong]}


@pytest.mark.parametrize("share", [0.1, 0.2])
@pytest.mark.parametrize("kind", ["attributes", "lying attributes", "none"])
def test_a_minority_on_swapped_sides(kind, share):
    rows = np.sort(np.random.default_rng(1).permutation(N)[: round(share * N)]).tolist()
    columns = swapped(columns_of(), rows)
    if kind == "lying attributes":
        columns |= {"attribute_a": [0] * N, "attribute_b": [1] * N}
    columns = without_attributes(columns) if kind == "none" else columns
    code = "attributes-swapped" if kind == "attributes" else "sides-swapped"
    assert problems(check_pairs(as_dataset(columns))) == {code: rows}


@pytest.mark.parametrize("kind", ["attributes", "lying attributes", "none"])
def test_half_on_swapped_sides(kind):
    mask = draw_swap(N + 1, 2)
    columns = swapped(columns_of(N + 1), np.flatnonzero(mask))
    if kind == "lying attributes":
        columns |= {"attribute_a": [0] * (N + 1), "attribute_b": [1] * (N + 1)}
    columns = without_attributes(columns) if kind == "none" else columns
    code = "attributes-swapped" if kind == "attributes" else "sides-unoriented"
    findings = check_pairs(as_dataset(columns))
    assert problems(findings) == {code: np.flatnonzero(mask).tolist()}
    if kind != "attributes":
        assert "times that of unoriented pairs" in of_code(findings, code).message


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_unoriented_digits(share):
    data = load_digits(num_pairs=101, oriented_pairs=share < 0.5)
    if share == 0.5:
        rows = np.flatnonzero(draw_swap(101, 0)).tolist()
        assert problems(check_pairs(data.pairs)) == {"attributes-swapped": rows}
        bare = data.pairs.remove_columns(["attribute_a", "attribute_b"])
        assert problems(check_pairs(bare)) == {"sides-unoriented": rows}
    else:
        columns = {
            name: data.pairs.cast_column(name, datasets.Image(decode=False))[name][:] for name in ("image_a", "image_b")
        }
        rows = np.arange(101) % 10 == 3
        assert problems(check_pairs(as_dataset(swapped_images(columns, rows)))) == {
            "sides-swapped": np.flatnonzero(rows).tolist()
        }


def test_an_attribute_of_many_values():
    # side b is always grey, side a of any colour: oriented. Mixed on both sides: not
    columns = columns_of(30)
    dataset = as_dataset(without_attributes(columns))
    colors = [f"color {i % 5}" for i in range(30)]
    oriented = dataset.add_column("attribute_a", colors).add_column("attribute_b", ["grey"] * 30)
    assert problems(check_pairs(oriented)) == {}
    mixed = dataset.add_column("attribute_a", colors).add_column("attribute_b", colors[1:] + colors[:1])
    assert problems(check_pairs(mixed))["attributes-swapped"] == [i for i in range(30) if i % 5]


# ---- Evaluation images ----


@pytest.mark.parametrize("side", "ab")
def test_evaluation_images_in_the_pairs(side):
    columns = columns_of()
    leaked = [stored(pixels_of(columns[f"image_{side}"][row]), "bmp") for row in PLANTED]
    others = [*map(stored, photographs(30, 9))]
    findings = check_pairs(
        as_dataset(columns), evaluation={"validation": images_of(others), "test": images_of(others + leaked)}
    )
    assert problems(findings) == {"evaluation-image": PLANTED}
    assert "'test'" in of_code(findings, "evaluation-image").message


@pytest.mark.parametrize("change", ["jpeg", "larger", "noise"])
def test_near_evaluation_images(change):
    columns = columns_of()
    leaked = [pixels_of(columns["image_b"][row]) for row in PLANTED]
    changed = {
        "jpeg": [stored(image, "jpeg", quality=90, subsampling=0) for image in leaked],
        "larger": [stored(Image.fromarray(image).resize((96, 96), Image.Resampling.BICUBIC)) for image in leaked],
        "noise": [stored(image // 4 * 4) for image in leaked],
    }[change]
    evaluation = {"test": images_of([*map(stored, photographs(30, 9)), *changed])}
    assert problems(check_pairs(as_dataset(columns), evaluation=evaluation)) == {"evaluation-near": PLANTED}
    assert problems(check_pairs(as_dataset(columns), evaluation=evaluation, fast=True)) == {}


def test_flat_images_are_near_to_nothing():
    columns = columns_of()
    blank = [stored(Image.new("RGB", (PIXELS, PIXELS), (level, level, level))) for level in range(20)]
    columns["image_a"][:20] = blank
    found = problems(
        check_pairs(as_dataset(columns), evaluation={"test": images_of([stored(Image.new("RGB", (9, 9)))])})
    )
    assert "evaluation-near" not in found


def test_held_out_pairs_that_are_not():
    columns = columns_of()
    held_out = columns_of(20, 5)
    held_out["image_a"][4] = columns["image_a"][23]
    findings = check_pairs(as_dataset(columns), held_out=as_dataset(held_out))
    assert problems(findings) == {"evaluation-image": [23]}
    assert "'held_out'" in of_code(findings, "evaluation-image").message


def test_evaluation_images_that_cannot_be_used():
    broken = images_of([{"bytes": b"no", "path": None}, None, *map(stored, photographs(3, 9))], label=[0, 1, 0, 1, 0])
    findings = check_pairs(as_dataset(columns_of()), evaluation={"test": broken, "none": broken.select([])})
    assert problems(findings) == {"evaluation-unreadable": []}
    (finding,) = (finding for finding in findings if finding.severity != "info")
    assert finding.message.startswith("2 of 5 rows of 'test' have images that cannot be used, first row 0: cannot")


def test_label_shares():
    others = [*map(stored, photographs(20, 9))]
    for labels, expected in (([0, 1] * 10, False), ([0] * 18 + [1] * 2, True)):
        findings = check_pairs(as_dataset(columns_of()), evaluation={"test": images_of(others, label=labels)})
        assert any(finding.code == "label-shares" for finding in findings) is expected
        assert problems(findings) == {}


# ---- Models ----


class Redness(nn.Module):
    """Two logits from the red of the picture: it flips wherever the sticker changes its colour."""

    def __init__(self, gain=1.0):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, pixel_values):
        red = (pixel_values[:, 0] - pixel_values[:, 2]).mean((1, 2)) * self.gain
        return torch.stack([red, -red], 1)


@pytest.mark.parametrize(
    "problem_type", [None, "single_label_classification", "multi_label_classification", "regression"]
)
def test_scores_of_pairs(problem_type):
    model, raw = vit(num_labels=3, dropout=0.5).train(), as_dataset(columns_of(10))
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    scores = score_pairs(raw, model, PROCESSOR, batch_size=4, problem_type=problem_type)
    assert model.training
    assert states[0] == random.getstate()
    assert np.array_equal(states[1], np.random.get_state()[1])
    assert torch.equal(states[2], torch.get_rng_state())
    assert {name: (values.shape, values.dtype.name) for name, values in scores.items()} == {
        "divergence": ((10,), "float64"),
        "flipped": ((10,), "bool"),
        "logits_a": ((10, 3), "float32"),
        "logits_b": ((10, 3), "float32"),
    }
    model.eval()
    with torch.no_grad():
        for side in "ab":
            inputs = PROCESSOR(raw[f"image_{side}"][:], return_tensors="pt")
            torch.testing.assert_close(torch.from_numpy(scores[f"logits_{side}"]), model(**inputs).logits)
    a, b = (torch.from_numpy(scores[f"logits_{side}"]) for side in "ab")
    kind = problem_type or "single_label_classification"
    whole = invariance_divergence(a.double(), b.double(), problem_type=kind).item()
    assert scores["divergence"].mean() == pytest.approx(whole, rel=1e-6)
    for row in range(10):
        one = invariance_divergence(a[row : row + 1], b[row : row + 1], problem_type=kind).item()
        assert scores["divergence"][row] == pytest.approx(one, rel=1e-3, abs=1e-9)
    flips = {"multi_label_classification": ((a > 0) != (b > 0)).any(1), "regression": torch.zeros(10, dtype=torch.bool)}
    assert scores["flipped"].tolist() == flips.get(kind, a.argmax(1) != b.argmax(1)).tolist()


def test_scores_do_not_depend_on_the_batch_and_take_image_rows():
    model, raw = vit(), as_dataset(columns_of(10))
    rows = ImageRows(raw, PROCESSOR, {"image_a": "pixel_values_a", "image_b": "pixel_values_b"}, random_flip=True)
    whole, parts = score_pairs(raw, model, PROCESSOR), score_pairs(rows, model, batch_size=3)
    for name in whole:
        np.testing.assert_allclose(whole[name], parts[name], rtol=1e-4, atol=1e-6)


def test_scores_in_half_precision():
    scores = score_pairs(as_dataset(columns_of(4)), vit().bfloat16(), PROCESSOR)
    assert scores["logits_a"].dtype == np.float32
    assert np.isfinite(scores["divergence"]).all()


def test_scores_of_nothing():
    with pytest.raises(ValueError, match=r"0 pairs, processor given: give pairs"):
        score_pairs(as_dataset(columns_of()).select([]), vit(), PROCESSOR)
    with pytest.raises(ValueError, match=r"4 pairs, processor None: give pairs, and the image processor"):
        score_pairs(as_dataset(columns_of(4)), vit())


def test_what_a_model_makes_of_the_pairs():
    columns = columns_of()
    plant_unreadable(columns)
    raw = as_dataset(columns)
    finding = of_code(check_pairs(raw, model=vit(), processor=PROCESSOR), "model-scores")
    rest = [row for row in range(N) if row not in PLANTED]
    scores = score_pairs(raw.select(rest), vit(), PROCESSOR)
    assert list(finding.rows) == [rest[i] for i in np.argsort(-scores["divergence"], kind="stable")]
    assert f"flip rate {scores['flipped'].mean():.1%}" in finding.message
    assert f"divergence {scores['divergence'].mean():.3g}" in finding.message


@pytest.mark.parametrize("swap", [False, True])
def test_held_out_pairs_that_the_model_is_not_invariant_to(swap):
    scenes = photographs(40, 5)
    still = without_attributes(columns_of(40))  # the sticker goes from dark to bright: no change of redness
    still["image_a"] = [*map(stored, with_sticker(scenes, (60, 60, 60)))]
    still["image_b"] = [*map(stored, with_sticker(scenes, (200, 200, 200)))]
    sets = [as_dataset(still), as_dataset(columns_of(40, 6))]
    pairs, held_out = reversed(sets) if swap else sets
    findings = check_pairs(pairs, held_out=held_out, model=Wrapped(Redness(50.0)), processor=PROCESSOR)
    assert problems(findings) == ({} if swap else {"held-out-worse": []})
    assert "on held_out" in of_code(findings, "model-scores").message


def test_held_out_pairs_like_the_others():
    findings = check_pairs(
        as_dataset(columns_of()), held_out=as_dataset(columns_of(40, 6)), model=vit(), processor=PROCESSOR
    )
    assert problems(findings) == {}


def test_a_processor_that_does_not_fit():
    wrong = ViTImageProcessor(size={"height": 8, "width": 8})
    finding = of_code(check_pairs(as_dataset(columns_of(12)), model=vit(), processor=wrong), "scores-failed")
    assert finding.severity == "error"
    with pytest.raises(ValueError, match=r"needs processor=\.\.\."):
        check_pairs(as_dataset(columns_of(12)), model=vit())


# ---- Inputs, samples, text ----


def test_image_rows_give_the_same():
    columns = columns_of()
    plant_attributes(columns), plant_identical(columns)
    raw = as_dataset(columns)
    keep = ("label", "attribute_a", "attribute_b")
    names = {"image_a": "pixel_values_a", "image_b": "pixel_values_b"}
    rows = ImageRows(raw, PROCESSOR, names, keep=keep, random_flip=True, random_crop_scale=0.5)
    assert check_pairs(rows) == check_pairs(raw) == check_pairs(raw.with_format("torch"))
    assert check_pairs(rows, model=vit()) == check_pairs(raw, model=vit(), processor=PROCESSOR)
    images = raw.rename_column("image_a", "image").remove_columns(["image_b", "attribute_a", "attribute_b"])
    evaluation = {"test": ImageRows(images, PROCESSOR, {"image": "pixel_values"})}
    assert problems(check_pairs(raw, evaluation=evaluation))["evaluation-image"] == [*range(N)]


def test_other_columns_are_passed_over():
    raw = as_dataset(columns_of()).add_column("mask", [None] * N).add_column("label_note", ["x"] * N)
    assert problems(check_pairs(raw)) == {}


@pytest.mark.parametrize(
    "wrong",
    [
        [{"image_a": 1}],
        datasets.Dataset.from_dict({"image_a": ["x.png"], "image_b": ["y.png"]}),
        images_of([stored(np.zeros((4, 4, 3), np.uint8))]),
    ],
    ids=["a list", "no images", "one image a row"],
)
def test_sets_that_are_no_pairs(wrong):
    with pytest.raises(ValueError, match=r"pairs must be a datasets\.Dataset"):
        check_pairs(wrong)
    with pytest.raises(ValueError, match="held_out must be"):
        check_pairs(as_dataset(columns_of(4)), held_out=wrong)


def test_images_in_files(tmp_path):
    columns = columns_of()
    for name in ("image_a", "image_b"):
        for row, value in enumerate(columns[name]):
            (tmp_path / f"{name}{row}.png").write_bytes(value["bytes"])
            columns[name][row] = str(tmp_path / f"{name}{row}.png")
    assert problems(check_pairs(as_dataset(columns))) == {}


def test_a_fast_look():
    few, many = columns_of(), {}
    for name, values in few.items():
        many[name] = values * 6
    many["attribute_b"][301] = many["label"][302] = None
    raw = as_dataset(many)
    fast, whole = check_pairs(raw, fast=True), check_pairs(raw)
    for findings in (fast, whole):  # columns are looked at whole
        assert of_code(findings, "attribute-missing").rows == (301,)
        assert of_code(findings, "label-missing").rows == (302,)
    repeated = of_code(fast, "pair-repeated")
    assert f" of {FAST_PAIRS} pairs" in repeated.message
    assert max(repeated.rows) >= FAST_PAIRS
    assert of_code(whole, "pair-repeated").rows == tuple(range(N, 6 * N))
    assert fast == check_pairs(raw, fast=True)
    assert repeated.rows != of_code(check_pairs(raw, fast=True, seed=1), "pair-repeated").rows
    scored = of_code(check_pairs(raw, fast=True, model=vit(), processor=PROCESSOR), "model-scores")
    assert len(scored.rows) == FAST_PAIRS


def test_a_seed_repeats():
    columns = columns_of()
    plant_partners(columns), plant_lies(columns)
    raw, states = as_dataset(columns), (np.random.get_state()[1].copy(), torch.get_rng_state())
    assert check_pairs(raw, seed=3) == check_pairs(raw, seed=3)
    assert np.array_equal(states[0], np.random.get_state()[1])
    assert torch.equal(states[1], torch.get_rng_state())


def test_the_text():
    findings = [
        Finding("label-differs", "error", "12 of 60 pairs have other labels", tuple(range(12)), "Mend them."),
        Finding("few-pairs", "warning", "the set has 5 pairs", (), "Make more."),
        Finding("one-label", "warning", "all 5 pairs have the label 1", (3,), "Make others."),
    ]
    assert format_findings(findings, "pairs") == (
        "pairs: 1 error, 2 warnings\n"
        "error [label-differs] 12 of 60 pairs have other labels\n"
        "  rows: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ... (12 in all)\n"
        "  fix: Mend them.\n"
        "warning [few-pairs] the set has 5 pairs\n"
        "  fix: Make more.\n"
        "warning [one-label] all 5 pairs have the label 1\n"
        "  rows: 3\n"
        "  fix: Make others."
    )
    assert format_findings([], "pairs") == "pairs: no findings"


def test_codes_are_in_the_order_of_severity():
    severities = [severity for severity, _ in CODES.values()]
    assert severities == sorted(severities, key=["error", "warning", "info"].index)
    assert all(fix.endswith((".", ")")) for _, fix in CODES.values())
