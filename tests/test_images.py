# SPDX-License-Identifier: Apache-2.0
"""Images as users have them (modes, depths, sizes, orientations, damage) at every place that reads images.

Each combination gives the right pixels, or a ValueError that names the row and the file.
"""

import io
import re

import datasets
import numpy as np
import pytest
import small
from PIL import Image, ImageOps
from transformers import ViTImageProcessor

from ipg_hf.audit.measure import audit
from ipg_hf.baselines.degrade import degrade_pairs
from ipg_hf.data import Benchmark
from ipg_hf.pairs import (
    AdversarialPairs,
    ImageRows,
    background_pairs,
    check_pairs,
    format_findings,
    match_pairs,
    mix_pairs,
    overlay_pairs,
    preview_pairs,
    recolor_pairs,
    score_pairs,
)
from ipg_hf.pairs.images import read_image
from ipg_hf.pairs.transforms import as_model_inputs

ROW = 2  # the row that holds the image
ROWS = 6
SIZE = (24, 20)
PROCESSOR = ViTImageProcessor(size={"height": small.SIZE, "width": small.SIZE})
FEATURES = {
    "image": datasets.Image(),
    "label": datasets.ClassLabel(names=["cat", "dog"]),
    "attribute": datasets.ClassLabel(names=["land", "water"]),
    "mask": datasets.Image(),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def picture(seed=0, size=SIZE):
    """An image whose corners have different colours, so that a turned or mirrored image is another one."""
    corners = np.random.default_rng(seed).integers(20, 220, (2, 2, 3), dtype=np.uint8)
    corners[0, 0] = [240, 30, 60]
    return Image.fromarray(corners).resize(size, Image.Resampling.BICUBIC)


def encoded(image, kind="PNG", **settings):
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def turned(orientation):
    tag = Image.Exif()
    tag[0x0112] = orientation
    return tag


MODES = {
    "bilevel": ("1", "PNG"),
    "grey": ("L", "PNG"),
    "grey and alpha": ("LA", "PNG"),
    "palette": ("P", "PNG"),
    "palette and alpha": ("PA", "TIFF"),
    "gif": ("P", "GIF"),
    "colour": ("RGB", "PNG"),
    "bmp": ("RGB", "BMP"),
    "tiff": ("RGB", "TIFF"),
    "webp": ("RGB", "WEBP"),
    "jpeg": ("RGB", "JPEG"),
    "grey jpeg": ("L", "JPEG"),
    "colour and alpha": ("RGBA", "PNG"),
    "webp and alpha": ("RGBA", "WEBP"),
    "print": ("CMYK", "JPEG"),
    "print tiff": ("CMYK", "TIFF"),
    "video": ("YCbCr", "TIFF"),
    "lab": ("LAB", "TIFF"),
}
GREYS = ("bilevel", "grey", "grey and alpha", "grey jpeg")
RIGHT = {name: encoded(picture().convert(mode), kind) for name, (mode, kind) in MODES.items()}
RIGHT |= {f"orientation {n}": encoded(picture(), "JPEG", exif=turned(n)) for n in range(1, 9)}
RIGHT |= {f"orientation {n} png": encoded(picture(), "PNG", exif=turned(n)) for n in (3, 6)}
RIGHT |= {f"orientation {n} tiff": encoded(picture(), "TIFF", exif=turned(n)) for n in (3, 6)}
RIGHT |= {
    f"{w} by {h}": encoded(picture(size=(w, h)))
    for w, h in ((1, 1), (1, 40), (40, 1), (3, 40), (40, 3), (3, 3), (70, 65))
}
JPEG, PNG = encoded(picture(size=(64, 64)), "JPEG"), encoded(picture(size=(64, 64)))
HUGE = (
    PNG[:16] + (2**20).to_bytes(4, "big") * 2 + PNG[24:]
)  # a header that promises a million lines of a million pixels
DEEP = {
    "16 bits": encoded(Image.fromarray(257 * np.uint16(np.asarray(picture().convert("L"))))),
    "16 bits big-endian": encoded(Image.new("I;16B", SIZE, 4000), "TIFF"),
    "32 bits": encoded(Image.fromarray(np.int32(np.asarray(picture().convert("L")))), "TIFF"),
    "floats": encoded(Image.fromarray(np.float32(np.asarray(picture().convert("L")) / 255)), "TIFF"),
}
BROKEN = {
    "cut jpeg": JPEG[: len(JPEG) // 2],
    "cut png": PNG[: len(PNG) // 2],
    "cut header": PNG[:20],
    "no bytes": b"",
    "a text": b"<html>not found</html>",
    "huge": HUGE,
}


def stored(tmp_path, name):
    """The image as a data set stores it: bytes, a file, or none."""
    if name == "none":
        return None
    if name == "no file":
        return {"bytes": None, "path": str(tmp_path / "nowhere.png")}
    if name == "a folder":
        (tmp_path / "folder.png").mkdir(exist_ok=True)
        return {"bytes": None, "path": str(tmp_path / "folder.png")}
    data = {**RIGHT, **DEEP, **BROKEN}[name.removesuffix(" in a file")]
    if not name.endswith(" in a file"):
        return {"bytes": data, "path": None}
    (tmp_path / "image.file").write_bytes(data)
    return {"bytes": None, "path": str(tmp_path / "image.file")}


WRONG = (
    *DEEP,
    *BROKEN,
    "none",
    "no file",
    "a folder",
    "16 bits in a file",
    "cut jpeg in a file",
    "a text in a file",
)


def source(value):
    """Six images with masks, of which row 2 is the given one."""
    images = [as_png(picture(seed)) for seed in range(ROWS)]
    images[ROW] = value
    mask = Image.new("L", (16, 16))
    mask.paste(255, (5, 5, 10, 10))
    table = {
        "image": images,
        "label": [0, 1] * (ROWS // 2),
        "attribute": [0, 0, 1, 1, 0, 1],
        "mask": [as_png(mask)] * ROWS,
    }
    return datasets.Dataset.from_dict(table, features=datasets.Features(FEATURES))


def pairs(value, side="a"):
    """Six pairs, of which one side of row 2 is the given image. The other side has its size and mode."""
    table = {f"image_{s}": [as_png(picture(10 * row + (s == "b"))) for row in range(ROWS)] for s in "ab"}
    table[f"image_{side}"][ROW] = value
    if is_right(value):
        image = datasets.Image().decode_example(value)
        other = picture(77, image.size).convert(image.mode)
        kind = "PNG" if image.mode in PNGS else "TIFF"
        table["image_b" if side == "a" else "image_a"][ROW] = {"bytes": encoded(other, kind), "path": None}
    features = {"image_a": datasets.Image(), "image_b": datasets.Image(), "label": FEATURES["label"]}
    return datasets.Dataset.from_dict(table | {"label": [0, 1] * (ROWS // 2)}, features=datasets.Features(features))


def as_png(image):
    return {"bytes": encoded(image), "path": None}


def is_right(value):
    return value is not None and value["bytes"] in RIGHT.values()


PNGS = ("1", "L", "LA", "P", "RGB", "RGBA")


def truth(value):
    """The image as `datasets` decodes it, in RGB."""
    return datasets.Image().decode_example(value).convert("RGB")


def pixels(image):
    return np.asarray(image.convert("RGB")).astype(int)


def inputs_of(image):
    """What the model should get: the image, resized by PIL, from -1 to 1."""
    resized = image.resize((small.SIZE, small.SIZE), Image.Resampling.BILINEAR)
    return (np.asarray(resized, float) / 127.5 - 1).transpose(2, 0, 1)


def is_close(inputs, image):
    return np.abs(np.asarray(inputs, float) - inputs_of(image)).max() < 0.05


def plain():
    return as_png(picture())


# ---- Entry points: each returns whether the image was read rightly, or raises ----


def trains(tmp_path, **settings):
    settings = {"train": source(plain()), "processing_class": PROCESSOR, "max_steps": 1, "logging_steps": 9} | settings
    small.trainer(tmp_path, **settings, per_device_train_batch_size=ROWS, per_device_pair_batch_size=ROWS).train()
    return True


def reads_a_row(tmp_path, value):
    return is_close(ImageRows(source(value), PROCESSOR, {"image": "pixel_values"})[ROW]["pixel_values"], truth(value))


def reads_a_preloaded_row(tmp_path, value):
    rows = ImageRows(source(value), PROCESSOR, {"image": "x"}, preload=True, preload_dir=str(tmp_path))
    return is_close(rows[ROW]["x"], truth(value))


def reads_a_cropped_row(tmp_path, value):
    rows = ImageRows(source(value), PROCESSOR, {"image": "x"}, random_flip=True, random_crop_scale=0.5)
    return bool(rows[ROW]["x"].isfinite().all())


def reads_a_stream(tmp_path, value):
    rows = as_model_inputs(source(value).to_iterable_dataset(), PROCESSOR, "x")
    return is_close([*rows][ROW]["x"], truth(value))


def trains_on_images(tmp_path, value):
    return trains(tmp_path, train=source(value))


def trains_on_pairs(tmp_path, value):
    return trains(tmp_path, pair_dataset=pairs(value))


def trains_on_partners(tmp_path, value):
    return trains(tmp_path, pair_dataset={"first": pairs(plain()), "second": pairs(value, "b")})


def trains_on_a_stream_of_pairs(tmp_path, value):
    return trains(tmp_path, pair_dataset=pairs(value).to_iterable_dataset())


def trains_on_adversarial_pairs(tmp_path, value):
    return trains(tmp_path, pair_dataset=AdversarialPairs(source(value), steps=1))


def evaluates(tmp_path, value):
    settings = {"train": source(plain()), "eval_dataset": source(value), "processing_class": PROCESSOR}
    return small.trainer(tmp_path, **settings).evaluate()["eval_loss"] > 0


def recolors(tmp_path, value):
    return keeps(recolor_pairs(source(value)), value)


def overlays(tmp_path, value):
    return keeps(overlay_pairs(source(value), overlay="mark", color=(10, 250, 10)), value)


def overlays_by_a_function(tmp_path, value):
    return keeps(overlay_pairs(source(value), overlay=lambda image, rng: Image.eval(image, lambda v: 255 - v)), value)


def overlays_a_stream(tmp_path, value):
    made = [*overlay_pairs(source(value).to_iterable_dataset(), overlay="frame", color=(10, 250, 10))]
    return (pixels(made[ROW]["image_a"]) == pixels(truth(value))).all()


def keeps(made, value):
    a, b = made[ROW]["image_a"], made[ROW]["image_b"]
    return (pixels(a) == pixels(truth(value))).all() and a.mode == b.mode == "RGB" and a.size == b.size


def changes_backgrounds(tmp_path, value):
    made = background_pairs(source(value), backgrounds=([picture(8)], [picture(9)]), soft_edge=0)
    return same_foreground(made[ROW]["image_a"], value)


def fills_backgrounds(tmp_path, value):
    made = background_pairs(source(value), soft_edge=0, keep_own=True)
    return (pixels(made[ROW]["image_b"]) == pixels(truth(value))).all()  # its own kind of background


def uses_a_background(tmp_path, value):
    images = datasets.Dataset.from_dict({"image": [plain(), plain(), value]}, features=BACKGROUNDS)
    made = background_pairs(source(plain()), backgrounds=([picture(1)], images), soft_edge=0)
    fitted = ImageOps.fit(truth(value), SIZE, Image.Resampling.BICUBIC)
    corners = [pixels(image)[0, 0].tolist() for image in made["image_b"]]
    return pixels(fitted)[0, 0].tolist() in corners  # of six draws from three, some are the image


BACKGROUNDS = datasets.Features(image=datasets.Image())


def same_foreground(image, value):
    if min(image.size) <= 3:  # the mask has no pixel of its full strength
        return image.size == truth(value).size
    middle = np.s_[image.height * 7 // 16, image.width * 7 // 16]
    return image.size == truth(value).size and (pixels(image)[middle] == pixels(truth(value))[middle]).all()


def matches(tmp_path, value):
    made = match_pairs(source(value), model=small.vit(), processor=PROCESSOR)
    return (pixels(made[made["source_id_b"][:].index(ROW)]["image_b"]) == pixels(truth(value))).all()


def matches_and_crops(tmp_path, value):
    made = match_pairs(source(value), match_on="random", size=(12, 10))
    fitted = ImageOps.fit(truth(value), (12, 10), Image.Resampling.BICUBIC)
    return (pixels(made[made["source_id_b"][:].index(ROW)]["image_b"]) == pixels(fitted)).all()


def mixes(tmp_path, value):
    made = mix_pairs(pairs(value), num_pairs=3 * ROWS, grid=2)
    corner = {tuple(pixels(made[ROW + ROWS * turn]["image_a"])[0, 0]) for turn in (1, 2)}
    return (pixels(made[ROW]["image_a"]) == pixels(truth(value))).all() and len(corner) <= 2


def degrades(tmp_path, value):
    return degrade_pairs(pairs(value, "b"), residual=0.5)[ROW]["image_b"].size == truth(value).size


def lints(tmp_path, value):
    return lint(pairs(value))


def lints_partners(tmp_path, value):
    return lint(pairs(value, "b"), fast=True)


def lints_evaluation_images(tmp_path, value):
    return lint(pairs(plain()), evaluation={"test": source(value)})


def lint(made, **settings):
    codes = ("image-deep", "image-unreadable", "sides-shape", "evaluation-unreadable")
    found = [finding for finding in check_pairs(made, **settings) if finding.code in codes]
    if found:
        raise ValueError(format_findings(found, "pairs"))
    return True


def previews(tmp_path, value):
    (page,) = preview_pairs(pairs(value), tmp_path / "page", overwrite=True)
    text = page.read_text()
    if "no difference" in text:
        raise ValueError(text)
    return True


def scores(tmp_path, value):
    return score_pairs(pairs(value), small.vit(), PROCESSOR)["divergence"].shape == (ROWS,)


def audits(tmp_path, value, test_pairs=None):
    part = source(plain())
    data = Benchmark(
        train=part, validation=part, test=source(value), pairs=None, validation_pairs=None, test_pairs=test_pairs
    )
    return audit({"m": ("nowhere", small.vit(), PROCESSOR)}, data)[0]["images"] == ROWS


def test_an_audit_names_the_row_without_a_label_or_attribute():
    part = source(plain())
    for column in ("label", "attribute"):
        for split in ("test", "validation"):
            unknown = part.remove_columns(column).add_column(column, [0, 1, 0, 1, -1, 0], feature=FEATURES[column])
            sets = {"train": part, "validation": part, "test": part} | {split: unknown}
            data = Benchmark(**sets, pairs=None, validation_pairs=None, test_pairs=None)
            with pytest.raises(ValueError, match=rf"row 4 of {split} has no {column} \(-1\)"):
                audit({"m": ("nowhere", small.vit(), PROCESSOR)}, data)


def audits_pairs(tmp_path, value):
    return audits(tmp_path, plain(), pairs(value, "b"))


ENTRIES = {
    entry.__name__: entry
    for entry in (
        reads_a_row,
        reads_a_preloaded_row,
        reads_a_cropped_row,
        reads_a_stream,
        trains_on_images,
        trains_on_pairs,
        trains_on_partners,
        trains_on_a_stream_of_pairs,
        trains_on_adversarial_pairs,
        evaluates,
        recolors,
        overlays,
        overlays_by_a_function,
        overlays_a_stream,
        changes_backgrounds,
        fills_backgrounds,
        uses_a_background,
        matches,
        matches_and_crops,
        mixes,
        degrades,
        lints,
        lints_partners,
        lints_evaluation_images,
        previews,
        scores,
        audits,
        audits_pairs,
    )
}


def refuses(entry, name):
    """What an entry point says of an image that it cannot use, although it can be read."""
    width, height = truth({"bytes": RIGHT[name], "path": None}).size
    if entry == "recolors" and name in GREYS:
        return "the two sides of row 2 are equal"
    if min(width, height) <= 3 and entry in ("changes_backgrounds", "fills_backgrounds"):
        return r"row 2.* the mask has no foreground|row 2"
    if entry in ("mixes", "degrades") and (width, height) != SIZE:
        return "mixes images of one size"
    if entry == "degrades" and datasets.Image().decode_example({"bytes": RIGHT[name], "path": None}).mode != "RGB":
        return "mixes images of"
    return None


def test_what_is_no_image():
    for value, what in (
        ({"bytes": None, "path": None}, "there is none"),
        ("cat.png", "is a str"),
        ([[0, 1]], "is a list"),
    ):
        with pytest.raises(ValueError, match=f"image of row 7 .*{what}"):
            read_image(value, "image of row 7")


def test_an_image_has_the_mode_of_its_feature(tmp_path):
    value = stored(None, "colour")
    for mode in ("L", "RGBA"):
        part = source(value).cast_column("image", datasets.Image(mode=mode))
        rows = ImageRows(part, PROCESSOR, {"image": "x"})
        assert is_close(rows[ROW]["x"], part[ROW]["image"].convert("RGB"))
        made = overlay_pairs(part, overlay="mark", color=(10, 250, 10))
        assert (pixels(made[ROW]["image_a"]) == pixels(part[ROW]["image"])).all()
        assert made[ROW]["image_a"].mode == "RGB"
    both = (
        pairs(value).cast_column("image_a", datasets.Image(mode="L")).cast_column("image_b", datasets.Image(mode="L"))
    )
    mixed = mix_pairs(both, num_pairs=12, grid=2)
    assert mixed[ROW]["image_a"].mode == mixed[ROW + ROWS]["image_a"].mode == "L"
    assert trains(tmp_path, pair_dataset=both)


# of these images the entry points that build a trainer or an audit read some: each takes a tenth of a second
SOME = (
    "grey",
    "palette and alpha",
    "colour and alpha",
    "print",
    "lab",
    "orientation 3",
    "orientation 6",
    "1 by 1",
    "3 by 40",
)


@pytest.mark.parametrize("entry", ENTRIES)
def test_images_of_8_bits_are_read_as_datasets_decodes_them(tmp_path, entry):
    faults = {}
    for name in SOME if entry.startswith(("trains", "audits", "evaluates")) else RIGHT:
        try:
            if not ENTRIES[entry](tmp_path, stored(tmp_path, name)):
                faults[name] = "other pixels"
        except Exception as failure:
            expected = refuses(entry, name)
            if not (isinstance(failure, ValueError) and expected and re.search(expected, str(failure))):
                faults[name] = repr(failure)
    assert not faults


@pytest.mark.parametrize("entry", ENTRIES)
def test_images_that_cannot_be_used_are_errors_with_row_and_file(tmp_path, entry):
    faults = {}
    for name in WRONG:
        value = stored(tmp_path, name)
        try:
            faults[name] = ENTRIES[entry](tmp_path, value)
        except ValueError as failure:
            file = (value or {}).get("path") or ""
            if re.search("image-deep|sides-shape|evaluation-unreadable", str(failure)):
                file = ""  # an image that can be decoded: the finding lists rows
            names_row = re.search(rf"\b(row|pair) {ROW}\b|rows: {ROW}$", str(failure), re.MULTILINE)
            if not names_row or file not in str(failure):
                faults[name] = repr(failure)
        except Exception as failure:
            faults[name] = repr(failure)
    assert not faults
