# SPDX-License-Identifier: Apache-2.0
"""The scan: planted shortcuts are found in networks that follow them, by hand-made models; page, command and recipe."""

import io
import json
import re
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessor,
)
from transformers.modeling_outputs import ImageClassifierOutput

from ipg_hf.cli import main
from ipg_hf.recipe import parse_recipe
from ipg_hf.scan import first_suspect, load_images, read_scan, scan, scan_table, write_scan
from ipg_hf.scan.measure import Finding, _donors, _finding, _ranked
from ipg_hf.scan.page import _line, property_sentence, sentence
from ipg_hf.scan.properties import STANDARD_MEAN, _quality, file_properties

SIZE = 40
PROCESSOR = ViTImageProcessor(size={"height": SIZE, "width": SIZE}, do_normalize=False, resample=0)
CLASSES = {0: "dark", 1: "light"}


class Looks(PreTrainedModel):
    """Answers "light" if a function of the pixels, of shape (N, 3, 40, 40) in [0, 1], is above 0.5."""

    config_class = PretrainedConfig
    main_input_name = "pixel_values"

    def __init__(self, function, classes=CLASSES):
        super().__init__(PretrainedConfig(id2label=classes))
        self.function, self.weight = function, nn.Parameter(torch.ones(1))

    def forward(self, pixel_values, labels=None):
        values = self.function(pixel_values) * self.weight
        return ImageClassifierOutput(logits=torch.stack([0.5 - values, values - 0.5], -1))


LOOKS = {
    "bottom": lambda x: x[:, :, 36:, :].mean((1, 2, 3)),
    "top_left": lambda x: x[:, :, :8, :8].mean((1, 2, 3)),
    "right": lambda x: x[:, :, 8:32, 37:].mean((1, 2, 3)),
    "border": lambda x: torch.cat([x[:, :, :2], x[:, :, -2:], x[..., :2].mT, x[..., -2:].mT], 2).mean((1, 2, 3)),
    "center": lambda x: x[:, :, 15:25, 15:25].mean((1, 2, 3)),
    # the share of red
    "color": lambda x: x[:, 0].mean((1, 2)) / (x[:, 0] + x[:, 1]).mean((1, 2)),
    # the differences of neighbours
    "texture": lambda x: 0.5 * (x[..., 1:] - x[..., :-1]).abs().mean((1, 2, 3)) / 0.06,
}


def cells(count=80, seed=0, masks=False):
    """Images of 5 × 5 cells, each of a level of its own: no region tells another one."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        grid = rng.integers(0, 256, (5, 5, 1)).repeat(3, 2) * rng.choice([[1, 0.4, 0.4], [0.4, 1, 0.4]])
        pixels = np.kron(grid, np.ones((SIZE // 5, SIZE // 5, 1)))
        for edge in (pixels[36:], pixels[:, 37:], pixels[:8, :8]):
            edge[:] = rng.integers(0, 256)
        if rng.random() < 0.5:
            pixels += rng.normal(0, 25, pixels.shape[:2])[..., None]
        images.append(Image.fromarray(np.uint8(pixels.clip(0, 255))))
    return datasets.Dataset.from_dict({"image": images}, features=datasets.Features(image=datasets.Image()))


def middling(function, images):
    """A model that answers by whether the function is above its mean over these images."""
    with torch.no_grad():
        values = function(PROCESSOR(images["image"][:], return_tensors="pt").pixel_values)
    middle = float(values.mean())
    return Looks(lambda x: function(x) - middle + 0.5)


@pytest.mark.parametrize("part", [name for name in LOOKS if name != "center"])
def test_the_part_that_a_model_looks_at_is_the_first_finding(part):
    images = cells()
    result = scan(middling(LOOKS[part], images), images, PROCESSOR)
    assert result.findings[0].part == part == first_suspect(result)
    assert result.findings[0].strength == "strong" and result.findings[0].effect > 0.5
    assert {found.part for found in result.findings} >= {*LOOKS, "surroundings"}


def test_a_model_of_the_center_has_no_suspect_region():
    images = cells()
    result = scan(middling(LOOKS["center"], images), images, PROCESSOR)
    effects = {found.part: found for found in result.findings}
    assert result.findings[-1].part == "center" and effects["center"].effect > 0.9
    regions = [name for name in effects if name not in ("center", "color", "texture")]
    assert all(effects[name].strength == "none" and effects[name].effect == 0 for name in regions)


def test_the_background_is_exchanged_by_masks():
    rng, images, masks = np.random.default_rng(0), [], []
    for _ in range(60):
        image = Image.new("RGB", (SIZE, SIZE), (int(rng.integers(256)),) * 3)
        mask = Image.new("L", (SIZE, SIZE))
        image.paste((int(rng.integers(256)),) * 3, (2, 2, 38, 26))  # an object that fills the surroundings too
        mask.paste(255, (2, 2, 38, 26))
        images.append(image), masks.append(mask)
    features = datasets.Features(image=datasets.Image(), mask=datasets.Image())
    rows = datasets.Dataset.from_dict({"image": images, "mask": masks}, features=features)
    model = middling(lambda x: x[:, :, 30:36, 10:30].mean((1, 2, 3)), rows)
    result = scan(model, rows, PROCESSOR, mask="mask")
    assert {found.part: found.effect for found in result.findings}["background"] > 0.8
    assert "background" not in {found.part for found in scan(model, rows, PROCESSOR).findings}


def test_effect_control_and_interval_by_hand():
    #          answer, donor's answer, with the donor's part, with the part of an image of the same answer
    before = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    donors = np.array([4, 5, 6, 7, 0, 1, 2, 3])
    after = np.array([1, 1, 1, 0, 0, 0, 1, 1])
    control = np.array([0, 1, 0, 0, 1, 1, 1, 1])
    found = _finding("top", before, after, control, donors, CLASSES)
    # moved: 1, 0, 1, 0, 1, 1, 0, 0
    assert found.effect == 0.5 and found.changed == 5 / 8 and found.control == 1 / 8
    error = 1.96 * np.sqrt((8 * 0.25 + 1) / 9 / 8)
    assert (found.low, found.high) == (pytest.approx(0.5 - error), pytest.approx(0.5 + error))
    assert found.by_answer == {"dark": 0.5, "light": 0.5} and found.strength == "weak"  # from 0.0999
    # what the edit does whatever its content is no effect
    same = _finding("top", before, after, after, donors, CLASSES)
    assert same.effect == 0 and same.strength == "none" and same.low < 0 < same.high


def test_the_smallest_part_with_most_of_an_effect_comes_first():
    def order(**effects):
        return [found.part for found in _ranked([replace(FOUND, part=part, effect=e) for part, e in effects.items()])]

    assert order(surroundings=0.9, border=0.46, top=0.44) == ["border", "surroundings", "top"]  # .46 > .45 > .44
    assert order(surroundings=0.9, border=0.44, top=0.43) == ["surroundings", "top", "border"]
    assert order(surroundings=0.8, background=0.83) == ["background", "surroundings"]  # of one size
    assert order(surroundings=0.45, color=0.5, center=0.9) == ["color", "surroundings", "center"]
    assert order(color=-0.1, top=-0.3) == ["color", "top"] and order() == []


FOUND = Finding("top", 0, 0, 0, 0, 0, {}, "none")


def test_a_stamp_that_no_other_part_holds_whole_is_the_first_finding():
    """It stands across the edge of a corner, and the model looks at all of it."""
    rng = np.random.default_rng(4)
    images = cells()["image"][:]
    for number, image in enumerate(images):
        if number % 2:
            image.paste(Image.new("RGB", (16, 4), (250, 140, 20)), (20, 33))
        images[number] = image
    rows = datasets.Dataset.from_dict({"image": [images[n] for n in rng.permutation(80)]}, features=cells(1).features)
    stamp = torch.tensor([250, 140, 20])[:, None, None] / 255
    model = Looks(lambda x: ((x[:, :, 33:37, 20:36] - stamp).abs().amax(1) < 0.1).float().mean((1, 2)))
    result = scan(model, rows, PROCESSOR)
    found = {entry.part: entry for entry in result.findings}
    assert first_suspect(result) == "overlay" and found["overlay"].effect > 0.9
    assert found["bottom_right"].effect < 0.7
    assert "pairs: {maker: exchange, part: overlay}" in _line("overlay", result)
    assert "The answer follows what the images of an answer share" in sentence(found["overlay"])


def test_donors_have_another_answer_or_the_same():
    answers = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    for seed in range(20):
        other, same = _donors(answers, np.random.default_rng(seed))
        assert (answers[other] != answers).all() and (answers[same] == answers).all()
        assert (same != np.arange(8)).all()


def test_a_scan_follows_its_seed_and_takes_as_many_images_as_asked():
    images = cells()
    model = middling(LOOKS["color"], images)
    results = [scan(model, images, PROCESSOR, num_images=30, seed=seed) for seed in (1, 1, 2)]
    assert results[0].findings == results[1].findings != results[2].findings
    assert results[0].num_images == 30 == sum(results[0].answers.values())
    # the size of a forward changes nothing
    assert scan(model, images, PROCESSOR, num_images=30, seed=1, batch_size=7).findings == results[0].findings


def test_an_interrupted_scan_goes_on(tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    model, images = ResNetForImageClassification(config).eval(), cells(40)
    with torch.no_grad():  # each answer for a half of the images
        logits = model(PROCESSOR(images["image"][:], return_tensors="pt").pixel_values).logits
        model.classifier[1].bias[0] -= (logits[:, 0] - logits[:, 1]).median()
    calls, limit = [], 1000

    def count(*_):
        calls.append(1)
        if len(calls) == limit:
            raise KeyboardInterrupt

    model.register_forward_hook(count)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "one")
    whole = scan(model, images, PROCESSOR)
    needed = len(calls)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "other")
    calls.clear()
    limit = needed // 2
    with pytest.raises(KeyboardInterrupt):
        scan(model, images, PROCESSOR)
    calls.clear()
    limit = 1000
    again = scan(model, images, PROCESSOR)
    assert again.findings == whole.findings and again.answers == whole.answers
    assert needed // 2 - 2 <= len(calls) <= needed // 2 + 5
    calls.clear()
    assert scan(model, images, PROCESSOR, seed=1).findings != whole.findings  # other donors
    assert len(calls) > needed // 2
    calls.clear()
    with torch.no_grad():
        model.classifier[1].weight.mul_(1.01)
    scan(model, images, PROCESSOR)
    assert len(calls) >= needed


def test_large_images_are_made_as_small_as_the_model_needs():
    rows = cells(30)
    large = rows.map(lambda row: {"image": row["image"].resize((300, 200))})
    result = scan(middling(LOOKS["color"], rows), large, PROCESSOR)
    shown = next(example for part in result.examples.values() for example in part)
    assert shown.image.size == shown.edited.size == (120, 80)  # twice the model's 40
    # a processor that does not scale gets the images as they are
    whole = scan(middling(LOOKS["color"], rows), large, ViTImageProcessor(do_resize=False, do_normalize=False))
    assert next(example for part in whole.examples.values() for example in part).image.size == (300, 200)


def test_examples_are_images_whose_answers_moved():
    images = cells()
    result = scan(middling(LOOKS["bottom"], images), images, PROCESSOR)
    shown = result.examples["bottom"]
    assert len(shown) == 4
    for example in shown:
        assert example.answer != example.answer_after
        edited, donor = (np.asarray(image)[38] for image in (example.edited, example.donor))
        assert (edited == donor).all()
        assert (np.asarray(example.edited)[:30] == np.asarray(example.image)[:30]).all()


def test_accuracy_needs_the_labels_of_the_model():
    images = cells()
    model = middling(LOOKS["top_left"], images)
    with torch.no_grad():
        answers = model(**PROCESSOR(images["image"][:], return_tensors="pt")).logits.argmax(-1).tolist()

    def labelled(names):
        wrong = [answer if place % 4 else 1 - answer for place, answer in enumerate(answers)]
        numbers = [names.index(CLASSES[answer]) if CLASSES[answer] in names else answer for answer in wrong]
        rows = images.add_column("label", numbers)
        return rows.cast_column("label", datasets.ClassLabel(names=names))

    assert scan(model, labelled(["dark", "light"]), PROCESSOR).accuracy == 0.75
    assert scan(model, labelled(["light", "dark"]), PROCESSOR).accuracy == 0.75  # by name, not by number
    assert scan(model, labelled(["cat", "dog"]), PROCESSOR).accuracy is None
    assert scan(model, images, PROCESSOR).accuracy is None
    # an unknown label is neither right nor wrong
    half = labelled(["dark", "light"]).map(lambda row, n: {"label": row["label"] if n % 2 else -1}, with_indices=True)
    assert scan(model, half, PROCESSOR).accuracy == 1.0
    none = half.map(lambda row: {"label": -1})
    assert scan(model, none, PROCESSOR).accuracy is None
    texts = images.add_column("label", [CLASSES[answer] for answer in answers])
    assert scan(model, texts, PROCESSOR).accuracy == 1.0


class Levels(Looks):
    """Answers with the tens of the mean level of the bottom, of up to 26 classes."""

    def __init__(self):
        super().__init__(None, {number: f"level {number}" for number in range(26)})

    def forward(self, pixel_values, labels=None):
        tens = (pixel_values[:, :, 36:].mean((1, 2, 3)) * 25.5 * self.weight).long().clamp(0, 25)
        return ImageClassifierOutput(logits=nn.functional.one_hot(tens, 26).float())


def test_an_answer_that_one_image_has_alone_is_left_out(caplog):
    rows = [Image.new("RGB", (SIZE, SIZE), (level,) * 3) for level in [20, 60, 200] * 10 + [140]]
    images = datasets.Dataset.from_dict({"image": rows}, features=datasets.Features(image=datasets.Image()))
    result = scan(Levels(), images, PROCESSOR)
    assert result.num_images == 30 and result.answers["level 14"] == 1
    assert "1 images are not scanned" in caplog.text
    assert {found.part: found.effect for found in result.findings}["bottom"] == 1
    assert {found.part: found.effect for found in result.findings}["top"] == 0
    with pytest.raises(ValueError, match="19 of 20 images have an answer that another image has too"):
        scan(Levels(), images.select([*range(19), 30]), PROCESSOR)


def test_classes_of_one_name_are_told_apart():
    images = cells()
    model = middling(LOOKS["bottom"], images)
    model.config.id2label = {0: "crane", 1: "crane"}
    assert {*scan(model, images, PROCESSOR).answers} == {"crane (0)", "crane (1)"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_images": 10}, "num_images=10"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"mask": "shape"}, "no column 'shape'"),
        ({"dataset": cells(12)}, "12 of 12 images have an answer.*a scan needs 20 images"),
        ({"dataset": cells(30).map(lambda row: {"image": row["image"].resize((30, 4))})}, "row 0: an image of 30×4"),
        ({"dataset": [{}] * 30}, "must be a datasets.Dataset"),
        ({"model": Looks(lambda x: x.mean((1, 2, 3)) * 0)}, "one answer to all images"),
        ({"model": Looks(lambda x: x, {0: "height"})}, "predicts a number"),
    ],
)
def test_what_cannot_be_scanned_is_refused(change, message):
    images = cells(30)
    given = {"model": middling(LOOKS["color"], images), "dataset": images} | change
    with pytest.raises(ValueError, match=message):
        scan(given.pop("model"), given.pop("dataset"), PROCESSOR, **given)


def test_the_page_and_the_numbers_say_what_was_found(tmp_path):
    images = cells()
    result = scan(middling(LOOKS["bottom"], images), images, PROCESSOR)
    page, numbers = write_scan(result, tmp_path / "scan", title="A <scan>")
    found = json.loads(numbers.read_text())
    assert found["title"] == "A <scan>" and found["findings"][0]["part"] == "bottom"
    assert found["num_images"] == 80 and "examples" not in found
    text = page.read_text()
    assert "A &lt;scan&gt;" in text and "pairs: {maker: exchange, part: bottom}" in text
    assert "part: center" not in text and "part: top_left" not in text  # no lines against what was not found
    assert text.count("data:image/png") >= 12
    assert "The answer follows the bottom edge of the frame" in text
    assert "<th>before</th>" not in text
    made = replace(result, mask="mask", segmenter="some/vit")
    assert "pairs: {maker: exchange, part: background, mask: shape}" in _line(
        "background", replace(result, mask="shape")
    )
    assert "pairs: {maker: exchange, part: background, segmenter: some/vit}" in _line("background", made)
    assert _line("bottom", made) == _line("bottom", result) == "pairs: {maker: exchange, part: bottom}\n"
    with pytest.raises(FileExistsError, match="holds another scan"):
        write_scan(result, tmp_path / "scan")
    lines = scan_table(result).splitlines()
    assert lines[1].split()[:2] == ["bottom", "strong"] and len(lines) == len(result.findings) + 1


def test_an_earlier_scan_stands_beside_a_later_one(tmp_path):
    images = cells()
    first = scan(middling(LOOKS["bottom"], images), images, PROCESSOR)
    write_scan(first, tmp_path / "first")
    before = read_scan(tmp_path / "first")
    after = scan(middling(LOOKS["right"], images), images, PROCESSOR)
    assert before == replace(first, examples={})
    was, now = (f"{_of(result, 'bottom').effect:+.2f}" for result in (before, after))
    assert was != now
    lines = {line.split()[0]: line.split() for line in scan_table(after, before).splitlines()}
    assert lines["part"][2:4] == ["before", "effect"] and lines["bottom"][2:4] == [was, now]
    assert "before" not in scan_table(after)
    text = write_scan(after, tmp_path / "second", before=before)[0].read_text()
    assert f"<td>bottom</td><td>{was}</td><td>{now}</td>".replace("-", "−") in text
    # a part that the earlier scan had not
    before.findings.remove(_of(before, "bottom"))
    before.findings.append(replace(FOUND, part="overlay", effect=0.875))  # and parts that the later one has not
    before.findings.append(replace(FOUND, part="background", effect=0.5))
    last = [line.split() for line in scan_table(after, before).splitlines()[-2:]]
    assert last == [["overlay", "not", "found", "+0.88"], ["background", "not", "run", "+0.50"]]
    text = write_scan(after, tmp_path / "third", before=before)[0].read_text()
    assert "<td>overlay</td><td>+0.88</td><td>not found</td>" in text
    assert next(line for line in scan_table(after, before).splitlines() if line.startswith("bottom ")).split()[2] == "-"
    with pytest.raises(ValueError, match="holds no scan"):
        read_scan(tmp_path)
    for content in ('{"findings": [{"part": "top"}]}', "{}", "[]"):
        (tmp_path / "scan.json").write_text(content)
        with pytest.raises(ValueError, match="is no scan"):
            read_scan(tmp_path)


# ---- Properties of files

ANSWERS = ["a", "b"] * 30


def encoded(rng, size=(20, 20), kind="JPEG", **options):
    """The file of an image without content."""
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).save(file, kind, **options)
    return {"bytes": file.getvalue(), "path": None}


def camera(name):
    exif = Image.Exif()
    exif[271], exif[272] = name, "X1"
    return exif


PLANTED = {
    "width": lambda b: {"size": (24 if b else 20, 20)},
    "height": lambda b: {"size": (20, 22 if b else 20)},
    "JPEG quality": lambda b: {"quality": 70 if b else 90},
    "format": lambda b: {"kind": "PNG" if b else "JPEG"},
    "camera": lambda b: {"exif": camera("One" if b else "Two")},
}


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("rate", [1.0, 0.9, 0.5])
def test_a_property_of_the_files_that_goes_with_the_answer_is_found(name, rate):
    rng = np.random.default_rng(1)
    goes = np.arange(60) // 2 % 30 < 30 * rate  # as many of either answer
    marks = (np.array(ANSWERS) == "b") == goes
    found = {one.name: one for one in file_properties([encoded(rng, **PLANTED[name](b)) for b in marks], ANSWERS)}
    assert {*found} == {name} | ({"aspect ratio"} if name in ("width", "height") else set())
    one = found[name]
    assert one.told == (pytest.approx(rate) if rate > 0.5 else pytest.approx(0.5, abs=0.15)) and one.chance == 0.5
    assert one.tells == (rate > 0.5) and one.low < one.told <= one.high <= 1
    typical = PLANTED[name](True), PLANTED[name](False)
    if name == "JPEG quality" and rate > 0.5:
        assert one.typical == {"a": typical[1]["quality"], "b": typical[0]["quality"]}
    if name == "camera" and rate > 0.5:
        assert one.typical == {"a": "Two X1", "b": "One X1"}


def test_properties_need_files_that_differ_and_answers_of_several_images():
    rng = np.random.default_rng(0)
    files = [encoded(rng, (20 + number % 2, 20)) for number in range(60)]
    assert file_properties(files[::2], ANSWERS[:30]) == []  # all alike
    assert file_properties(files[:18], ANSWERS[:18]) == [] and file_properties(files, ["a"] * 60) == []
    rare = ["a", "b"] * 28 + ["c"] * 4
    assert {*file_properties(files, rare)[0].typical} == {"a", "b"}
    # the middle of a range needs two thresholds
    widths = [encoded(rng, (30 if answer == "a" else 20 + 20 * (n % 4 == 1), 20)) for n, answer in enumerate(ANSWERS)]
    assert next(one for one in file_properties(widths, ANSWERS) if one.name == "width").told == 1.0
    turned = Image.Exif()
    turned[274] = 6  # stored on its side
    sideways = [encoded(rng, (20, 30), exif=turned) if a == "a" else encoded(rng, (30, 20)) for a in ANSWERS]
    assert {one.name for one in file_properties(sideways, ANSWERS)} == set()


@pytest.mark.parametrize("count", [10, 40])
@pytest.mark.parametrize("name", ["width", "camera"])
def test_a_property_may_tell_many_answers(count, name):
    rng, answers = np.random.default_rng(0), [str(number % count) for number in range(6 * count)]
    # two cameras of each answer, which do not follow each other in the alphabet
    cameras = {(n, turn): f"{'xkcdab'[(n + turn) % 6]}{n}-{turn}" for n in range(count) for turn in (0, 1)}
    files = [
        encoded(rng, (8 + int(answer), 8)) if name == "width" else
        encoded(rng, exif=camera(cameras[int(answer), number // count % 2]))
        for number, answer in enumerate(answers)
    ]  # fmt: skip
    one = next(one for one in file_properties(files, answers) if one.name == name)
    assert one.tells and one.told > 0.9 and one.chance == 1 / count
    text = property_sentence(one)
    assert f"and {count - 5} more." in text and text.count(",") < 9


def test_what_is_drawn_at_random_tells_nothing_however_many_values_it_has():
    rng = np.random.default_rng(5)
    answers = ["a"] * 100 + ["b"] * 20
    widths = [encoded(rng, (int(width), 8)) for width in rng.integers(8, 200, 120)]
    cameras = [encoded(rng, exif=camera(f"model {number}")) for number in rng.integers(0, 60, 120)]
    for files in (widths, cameras):
        for one in file_properties(files, answers):
            assert abs(one.told - 0.5) < 0.15 and not one.tells, one


def test_each_answer_weighs_the_same():
    rng, answers = np.random.default_rng(2), ["a"] * 90 + ["b"] * 10
    # every b and 40 of the 90 of a are wide: balanced, wide says b
    files = [encoded(rng, (12 if answer == "b" or number < 40 else 8, 8)) for number, answer in enumerate(answers)]
    one = next(one for one in file_properties(files, answers) if one.name == "width")
    assert one.told == pytest.approx((50 / 90 + 1) / 2) and one.tells
    # 51 / 92 and 11 / 12: shares with one more of either kind
    variance = 51 / 92 * 41 / 92 / 90 / 4 + 11 / 12 * 1 / 12 / 10 / 4
    assert one.high - one.told == pytest.approx(1.96 * variance**0.5)


def test_a_file_that_pil_does_not_open_and_any_seed_are_no_error(caplog):
    rng = np.random.default_rng(0)
    files = [encoded(rng, (20 + number % 2, 20)) for number in range(60)]
    assert file_properties([{"bytes": None, "path": "zip://a.png::b.zip"}, *files[1:]], ANSWERS) == []
    assert file_properties(files, ANSWERS, seed=2**40)[0].told == 1.0
    assert _quality({1: [STANDARD_MEAN] * 64, 2: [1] * 64}) == 50 and _quality({}) is None
    named = file_properties([encoded(rng, exif=camera("\x1b[31m" + a * 100)) for a in ANSWERS], ANSWERS)[0]
    assert named.typical["a"] == "[31m" + "a" * 36


def test_a_scan_says_which_properties_of_the_files_tell_the_answers(tmp_path):
    images = cells()
    model = middling(LOOKS["bottom"], images)
    plain = scan(model, images, PROCESSOR)
    assert plain.properties == [] and "of the files" not in scan_table(plain)
    answers = [LOOKS["bottom"](PROCESSOR(image, return_tensors="pt").pixel_values).item() for image in images["image"]]
    middle = np.median(answers)
    files = []
    for image, answer in zip(images["image"], answers, strict=True):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=95 if answer > middle else 90)
        files.append({"bytes": file.getvalue(), "path": None})
    saved = datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image())
    result = scan(model, saved, PROCESSOR)
    assert [one.name for one in result.properties] == ["JPEG quality"]
    text = property_sentence(result.properties[0])
    assert (
        text.startswith("From the JPEG quality of its file alone, the answer to an image is guessed rightly in 9")
        and "dark 90, light 95" in text
    )
    assert text in scan_table(result)
    page = write_scan(result, tmp_path / "scan")[0].read_text()
    assert text in page and "properties of the files" in page
    assert read_scan(tmp_path / "scan") == replace(result, examples={})
    numbers = json.loads((tmp_path / "scan" / "scan.json").read_text())
    del numbers["properties"]  # a scan of an earlier version
    (tmp_path / "scan" / "scan.json").write_text(json.dumps(numbers))
    assert read_scan(tmp_path / "scan").properties == []


def _of(result, part):
    return next(found for found in result.findings if found.part == part)


# ---- From a folder to a repaired model


@pytest.fixture(scope="module")
def shortcut(tmp_path_factory):
    """A folder of digits whose colour tells the label, and a network trained on them."""
    from ipg_hf.data import load_digits

    folder = tmp_path_factory.mktemp("digits")
    data = load_digits()
    for split, rows in (("train", data.train.select(range(600))), ("test", data.train.select(range(600, 800)))):
        for number, row in enumerate(rows):
            place = folder / "photos" / split / data.label_names[row["label"]]
            place.mkdir(parents=True, exist_ok=True)
            row["image"].save(place / f"{number}.png")
    recipe = {
        "dataset": "files",
        "data_dir": str(folder / "photos"),
        "method": "erm",
        "model_type": "resnet",
        "model_config": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        "image_processor": {"size": {"height": 16, "width": 16}},
        "max_steps": 60,
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 32,
        "output_dir": str(folder / "model"),
        "report_to": "none",
        "use_cpu": True,
    }
    (folder / "plain.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", "--config", str(folder / "plain.yaml")]) == 0
    return folder


def test_the_command_finds_the_colour_and_its_recipe_trains(shortcut, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["scan", str(shortcut / "model"), "--data", str(shortcut / "photos"), "--num_images", "60"]
    assert main([*command, "--report", "found", "--write_recipe", "guard.yaml"]) == 0
    printed = capsys.readouterr().out
    assert "Is 'color' a shortcut? Look at the pictures." in printed and "found/scan.html" in printed
    page = (tmp_path / "found" / "scan.html").read_text()
    for told in (printed, page, (tmp_path / "guard.yaml").read_text()):
        assert "grey images only in part" in told and "exchanged detail" not in told
    assert json.loads((tmp_path / "found" / "scan.json").read_text())["findings"][0]["part"] == "color"
    recipe, args, _ = parse_recipe("guard.yaml", [])
    assert recipe.pairs == {"maker": "exchange", "part": "color"} and args.freeze_norm
    assert recipe.about["attribute"] == "the colours"
    flags = ["--max_steps", "4", "--use_cpu", "true", "--report_to", "none", "--learning_rate", "1e-3"]
    assert main(["train", "--config", "guard.yaml", *flags]) == 0
    card = (tmp_path / "outputs" / "repaired" / "README.md").read_text()
    assert "to ignore the colours" in card and "The answer follows the colours." in card and "pair accuracy" in card
    capsys.readouterr()
    again = ["scan", "outputs/repaired", *command[2:], "--before"]
    assert main([*again, "found", "--report", "after"]) == 0
    assert "before" in capsys.readouterr().out and "<th>before</th>" in (tmp_path / "after" / "scan.html").read_text()
    assert main([*again, "nothing"]) == 2
    assert "nothing holds no scan" in capsys.readouterr().err
    # nothing is replaced, and a wrong place is told before the work
    for flags, message in (
        (["--report", "found"], "holds another scan"),
        (["--write_recipe", "guard.yaml"], "guard.yaml exists"),
        (["--write_recipe", "guard.yaml/other.yaml"], "guard.yaml is a file"),
        (["--split", "tests"], "no split 'tests'.* Did you mean 'test'"),
        (["--num_images", "3"], "num_images=3"),
    ):
        capsys.readouterr()
        assert main([*command, *flags]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("ipg scan: error: ")
        assert re.search(message, error)


def test_a_recipe_needs_labels_and_a_name_that_it_can_give(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.new("RGB", (9, 9)).save(tmp_path / "photos" / f"{number}.png")
    command = ["scan", "nowhere", "--write_recipe", str(tmp_path / "new.yaml"), "--data"]
    for data, message in ((str(tmp_path / "photos"), "put them there"), ("digits", "cannot name the set 'digits'")):
        assert main([*command, data]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new.yaml").exists()


def test_images_are_loaded_without_labels(tmp_path):
    for split, count in (("train", 3), ("validation", 2)):
        (tmp_path / "some" / split).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (4, 4)).save(tmp_path / "some" / split / f"{number}.png")
    assert len(load_images(tmp_path / "some")) == 2  # validation before train
    assert len(load_images(tmp_path / "some", "train")) == 3
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_images(tmp_path / "none")
    rows = datasets.Dataset.from_dict({"photo": [Image.new("RGB", (4, 4))]})
    (tmp_path / "other").mkdir()
    rows.to_parquet(tmp_path / "other" / "train-0.parquet")
    assert load_images(tmp_path / "other").column_names == ["image"]


def test_a_folder_is_read_as_a_training_reads_it(tmp_path, tmp_path_factory, caplog, shortcut):
    folder = tmp_path_factory.mktemp("tables")
    number = 0
    for label in ("cat", "dog"):
        for attribute in ("indoor", "outdoor"):
            (tmp_path / label / attribute).mkdir(parents=True)
            for _ in range(20):
                number += 1
                Image.new("RGB", (9, 9), (number, 0, 0)).save(tmp_path / label / attribute / f"{number}.png")
    images = load_images(tmp_path)  # all: a folder without splits is one set
    assert images.features["label"].dtype == "string" and {*images["label"]} == {"cat", "dog"} and len(images) == 80
    for split in ("train", "holdout"):  # a split that a training does not know
        images.select(range(len(split))).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    assert len(load_images(folder, "holdout")) == 7 and len(load_images(folder)) == 5
    (tmp_path / "val").mkdir()
    for label in ("cat", "dog"):
        (tmp_path / label).rename(tmp_path / "val" / label)
    assert "could not read" not in caplog.text
    assert len(load_images(tmp_path, "val")) == 80  # no training split: no training, but a scan
    assert "could not read" in caplog.text
    with pytest.raises(ValueError, match=r"no split 'tests'.* Did you mean 'test'"):
        load_images(shortcut / "photos", "tests")


def test_a_recipe_is_not_written_for_what_no_training_reads(tmp_path, capsys):
    for number in range(30):
        place = tmp_path / "photos" / "test" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(place / f"{number}.png")
    command = ["scan", "nowhere", "--data", str(tmp_path / "photos"), "--write_recipe", str(tmp_path / "new.yaml")]
    assert main(command) == 2
    assert "has no training split" in capsys.readouterr().err
