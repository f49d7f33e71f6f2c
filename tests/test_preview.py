# SPDX-License-Identifier: Apache-2.0
"""The page of a pair set: which pairs it shows, what it says about them, and that it needs no other file."""

import base64
import io
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessor

from ipg_hf.data import load_digits
from ipg_hf.pairs import ImageRows
from ipg_hf.pairs.preview import CHANGED, SMALL, THUMBNAIL, choose_rows, preview_pairs

DIGITS = load_digits(num_pairs=120).pairs
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """The pairs of a page; fails where tags are not closed in order."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text("utf-8")
        self.open, self.pairs, self.headings, self.tags, self.resources = [], [], [], [], []
        self.feed(self.source)
        self.close()
        assert not self.open
        self.rows = [pair["row"] for pair in self.pairs]

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.resources += [value for key, value in attributes.items() if key in ("src", "href", "srcset", "action")]
        if tag == "article":
            row = int(attributes["id"].removeprefix("row-"))
            self.pairs.append({"row": row, "text": "", "images": [], "alt": [], "classes": attributes["class"].split()})
        if tag == "img":
            data = base64.b64decode(attributes["src"].removeprefix("data:image/png;base64,"))
            image = Image.open(io.BytesIO(data))
            assert image.format == "PNG" and max(image.size) <= THUMBNAIL
            self.pairs[-1]["images"].append(np.asarray(image))
            self.pairs[-1]["alt"].append(attributes["alt"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)
        if "article" in self.open:
            self.pairs[-1]["text"] += data

    @property
    def text(self):
        body = re.sub(r"<style>.*?</style>", "", self.source, flags=re.DOTALL)
        return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", body))


def shown(tmp_path, pairs, **settings):
    settings = {"num_pairs": 6, **settings}
    (page,) = preview_pairs(pairs, tmp_path / "page", overwrite=True, **settings)
    return Page(page)


def photograph(seed, size=(60, 40)):
    """A smooth image with noise, as uint8 of shape (height, width, 3)."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    return np.clip(np.asarray(coarse) + rng.normal(0, 5, (size[1], size[0], 3)), 0, 255).astype(np.uint8)


def encoded(image, form="PNG"):
    data = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(data, form)
    return {"bytes": data.getvalue(), "path": None}


def pair_set(sides, **columns):
    """A set of pairs of images, or of stored values, with further columns as values or (values, feature)."""
    images = {
        f"image_{side}": [
            value if value is None or isinstance(value, dict) else encoded(value)
            for value in (pair[i] for pair in sides)
        ]
        for i, side in enumerate("ab")
    }
    dataset = datasets.Dataset.from_dict(images, datasets.Features(dict.fromkeys(images, datasets.Image())))
    for name, values in columns.items():
        values, feature = values if isinstance(values, tuple) else (values, None)
        dataset = dataset.add_column(name, values, feature=feature)
    return dataset


def plain_pairs(count=6, size=(60, 40), **columns):
    return pair_set([(photograph(i, size), photograph(1000 + i, size)) for i in range(count)], **columns)


# ---- the page ----


@pytest.mark.parametrize("num_pairs", [1, 7, 24, 120, 500])
def test_as_many_pairs_as_asked_for(tmp_path, num_pairs):
    page = shown(tmp_path, DIGITS, num_pairs=num_pairs)
    assert len(page.pairs) == len({*page.rows}) == min(num_pairs, 120)
    assert page.rows == sorted(page.rows)
    assert all(len(pair["images"]) == 3 for pair in page.pairs)


def test_a_page_needs_nothing_else(tmp_path):
    pairs = plain_pairs(3, label=["http://example.org/x.png", "b", "c"])
    for page in (shown(tmp_path, DIGITS), shown(tmp_path, pairs)):
        assert page.resources and all(value.startswith(("data:image/png;base64,", "#")) for value in page.resources)
        assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"}
        assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
        styles = re.search(r"<style>(.*?)</style>", page.source, re.DOTALL)[1]
        assert "url(" not in styles and "@import" not in styles and "prefers-color-scheme: dark" in styles
        assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert "http:" not in shown(tmp_path, DIGITS).text


def test_what_the_head_says(tmp_path):
    page = shown(tmp_path, DIGITS, title="Digits in two colours", seed=3)
    labels = np.bincount(DIGITS["label"][:])
    assert page.headings == ["Digits in two colours"]
    for text in ("pairs 120", f"small ({labels[0]})", f"large ({labels[1]})", "red (120)", "green (120)"):
        assert text in page.text
    assert "6 of 120, drawn at random with seed 3, as evenly over the labels as possible" in page.text
    assert "rows all 120" in shown(tmp_path, DIGITS, num_pairs=120).text


def test_what_a_pair_says(tmp_path):
    page = shown(tmp_path, DIGITS)
    for pair in page.pairs:
        row = DIGITS[pair["row"]]
        assert ["small", "large"][row["label"]] in pair["text"]
        assert f"row {pair['row']} · source {row['source_id']}" in pair["text"]
        assert pair["alt"][:2] == [f"a: red, row {pair['row']}", f"b: green, row {pair['row']}"]
        assert np.array_equal(pair["images"][0], np.asarray(row["image_a"]))
        assert np.array_equal(pair["images"][1], np.asarray(row["image_b"]))


def test_everything_given_is_escaped(tmp_path):
    evil = "<b>\"&'<script>alert(1)</script>"
    name = datasets.ClassLabel(names=[evil, "x"])
    pairs = plain_pairs(
        4, label=([0, 0, 1, 0], name), attribute_a=([0] * 4, name), attribute_b=([1] * 4, name), source_id=[evil] * 4
    )
    finding = SimpleNamespace(severity=evil, code=evil, message=evil, rows=(1,), fix=evil)
    page = shown(tmp_path, pairs, title=evil, findings=[finding])
    assert "<b>" not in page.source and "<script" not in page.source
    assert "&lt;b&gt;" in page.source and {"b", "script"}.isdisjoint(tag for tag, _ in page.tags)
    assert page.headings[0] == evil and evil in page.pairs[0]["text"]


def test_sets_without_labels_and_attributes(tmp_path):
    page = shown(tmp_path, plain_pairs(30), num_pairs=5)
    assert len(page.pairs) == 5 and "label" not in page.text.split("Difference")[0]
    assert "5 of 30, drawn at random with seed 0 " in page.text
    a, b, difference = page.pairs[0]["alt"]
    assert (a, b) == (f"a, row {page.rows[0]}", f"b, row {page.rows[0]}")
    assert re.fullmatch(rf"difference ×1(\.\d+)?, row {page.rows[0]}", difference)


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"label": ["cat", "dog", "cat"]}, "labels cat (2), dog (1)"),
        ({"label": [7, 7, None]}, "labels 7 (2), None (1)"),
        ({"label": [0.5, 1.5, 2.5]}, None),
        ({"label": [[0, 1], [1, 1], [0, 0]]}, None),
        ({"label": ([-1, 0, 0], datasets.ClassLabel(names=["x"]))}, "labels x (2), -1 (1)"),
        ({"label_a": [1, 1, 2], "label_b": [1, 2, 2]}, "labels of a 1 (2), 2 (1) labels of b 2 (2), 1 (1)"),
        ({"label": [True, True, False]}, "labels True (2), False (1)"),
        ({"attribute_a": [3, 3, 4], "source_id": ["u", "v", "w"]}, "attributes of a 3 (2), 4 (1)"),
    ],
)
def test_kinds_of_labels(tmp_path, columns, told):
    page = shown(tmp_path, plain_pairs(3, **columns), scores={"divergence": [1, 2, 3], "prediction_a": [0, 1, 2]})
    assert len(page.pairs) == 3
    assert told is None or told in page.text


def test_labels_that_differ_are_both_shown(tmp_path):
    page = shown(tmp_path, plain_pairs(2, label_a=["cat", "dog"], label_b=["cat", "fox"]))
    assert "cat / " not in page.pairs[0]["text"] and "dog / fox" in page.pairs[1]["text"]


def test_a_label_for_each_row_does_not_fill_the_page(tmp_path):
    page = shown(tmp_path, plain_pairs(30, label=[f"word{i:02}" for i in range(30)]), num_pairs=3)
    assert "word11 (1) and 18 more" in page.text and "word12 (1)," not in page.text


def test_long_names_and_dollars(tmp_path):
    names = ["a$x$_y^{", "long " * 60, "unbroken" * 40, "two\nlines"]
    page = shown(tmp_path, plain_pairs(4, label=names), title="a title $of$ words " * 20)
    assert all(name in pair["text"] for name, pair in zip(names, page.pairs, strict=True))
    assert "overflow-wrap: anywhere" in page.source


# ---- differences ----


def test_the_difference_is_amplified_to_the_full_range(tmp_path):
    a = photograph(0)
    a = np.clip(a, 0, 245)
    b = a.copy()
    b[:10, :20] += 3
    b[0, 0, 1] += 7
    page = shown(tmp_path, pair_set([(a, b)]))
    difference = page.pairs[0]["images"][2]
    assert np.array_equal(difference, np.rint(np.abs(b.astype(float) - a) * 255 / 10))
    assert "difference ×25.5" in page.pairs[0]["text"]
    assert "0 % (8.33 % by any amount)" in page.pairs[0]["text"]


def test_share_of_changed_pixels(tmp_path):
    a = np.full((20, 50, 3), 100, np.uint8)
    tiny, half, most = a.copy(), a.copy(), a.copy()
    tiny[0, 0, 2] += CHANGED  # at the limit: not changed
    half[:10, :, 0] += CHANGED + 1
    most[:, :, 1] += 100
    most[3, 3] = a[3, 3]
    large = np.zeros((200, 200, 3), np.uint8)
    dotted = large.copy()
    dotted[5, 5] = 255
    page = shown(tmp_path, pair_set([(a, a), (a, tiny), (a, half), (a, most), (large, dotted), (large, large + 255)]))
    shares = [re.search(r"pixels changed\s*(.*)", pair["text"])[1] for pair in page.pairs]
    assert shares == ["0 %", "0 % (0.1 % by any amount)", "50 %", "99.9 %", "<0.1 %", "100 %"]
    assert "difference ×1" in page.pairs[0]["text"]


def test_a_dot_in_a_large_image_stays_visible(tmp_path):
    a = photograph(0, (1100, 700))
    a[3, 7] = 10
    b = a.copy()
    b[3, 7] = 200
    page = shown(tmp_path, pair_set([(a, b)]))
    difference = page.pairs[0]["images"][2]
    assert difference.max() == 255 and max(difference.shape) <= SMALL
    assert page.pairs[0]["images"][0].shape == (143, 224, 3)


def test_small_images_stay_sharp(tmp_path):
    for pairs, is_small in ((DIGITS, True), (plain_pairs(2, (300, 200)), False)):
        page = shown(tmp_path, pairs, num_pairs=2)
        images = [attributes for tag, attributes in page.tags if tag == "img"]
        assert all(("class" in image) == is_small for image in images if "difference" not in image["alt"])
    assert "image-rendering: pixelated" in page.source


# ---- what cannot be shown ----


def test_sides_that_do_not_fit_together(tmp_path):
    a = photograph(0)
    gray = Image.fromarray(a).convert("L")
    page = shown(tmp_path, pair_set([(a, photograph(1, (40, 60))), (gray, a), (a, photograph(2))]))
    assert [len(pair["images"]) for pair in page.pairs] == [2, 2, 3]
    assert "no difference: a is RGB of 60×40 pixels, b RGB of 40×60" in page.pairs[0]["text"]
    assert "no difference: a is L of 60×40 pixels, b RGB of 60×40" in page.pairs[1]["text"]
    assert "pixels changed" not in page.pairs[0]["text"] + page.pairs[1]["text"]


def test_unreadable_images(tmp_path):
    cut = encoded(photograph(0))
    cut["bytes"] = cut["bytes"][:200]
    bad = [{"bytes": b"no image", "path": None}, {"bytes": None, "path": "/nothing/here.png"}, None, cut]
    pairs = pair_set([(photograph(1), value) for value in bad] + [(None, None)])
    first = shown(tmp_path, pairs)
    assert [len(pair["images"]) for pair in first.pairs] == [1, 1, 1, 1, 0]
    for pair, message in zip(
        first.pairs,
        ["not an image that PIL knows (8 bytes)", "No such file", "no image", "OSError", "no image"],
        strict=True,
    ):
        assert message in pair["text"] and "no difference: an image cannot be read" in pair["text"]
    assert shown(tmp_path, pairs).source == first.source  # no address in memory


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_images_of_more_than_8_bits(tmp_path, mode):
    gray = np.asarray(Image.fromarray(photograph(0)).convert("L"))
    deep = Image.fromarray(gray.astype({"I;16": np.uint16, "F": np.float32}[mode]))
    assert deep.mode == mode
    (pair,) = shown(tmp_path, pair_set([(photograph(1), encoded(deep, "TIFF"))])).pairs
    assert len(pair["images"]) == 1 and f"the mode {mode} has more than 8 bits a channel" in pair["text"]


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK"])
def test_modes(tmp_path, mode):
    sides = [Image.fromarray(photograph(i)).convert(mode) for i in range(2)]
    assert {side.mode for side in sides} == {mode}
    page = shown(tmp_path, pair_set([[encoded(side, "TIFF") for side in sides]]))
    assert [image.shape for image in page.pairs[0]["images"]] == [(40, 60, 3)] * 3


def test_odd_shapes(tmp_path):
    sizes = [(1, 1), (3, 900), (900, 3), (1, 2)]
    page = shown(tmp_path, pair_set([(photograph(0, size), photograph(1, size)) for size in sizes]))
    assert [len(pair["images"]) for pair in page.pairs] == [3] * 4


# ---- which rows ----


def test_labels_are_drawn_evenly():
    labels = np.array(["a"] * 900 + ["b"] * 90 + ["c"] * 3)
    [(_, rows)] = choose_rows(993, 24, labels, None, 0)
    assert rows == sorted({*rows})
    assert np.unique(labels[rows], return_counts=True)[1].tolist() in ([11, 10, 3], [10, 11, 3])
    [(_, few)] = choose_rows(993, 3, labels, None, 0)
    assert sorted(labels[few]) == ["a", "b", "c"] and {*few} <= {*rows}


def test_seeds_repeat_and_differ(tmp_path):
    first, again, other = (shown(tmp_path, DIGITS, seed=seed) for seed in (1, 1, 2))
    assert first.source == again.source and first.rows != other.rows


def test_the_draw_leaves_the_global_generators_alone(tmp_path):
    state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    shown(tmp_path, DIGITS, num_pairs=2)
    assert np.array_equal(np.random.get_state()[1], state) and torch.equal(torch.get_rng_state(), torch_state)


def some_scores(seed=0):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 2, (2, len(DIGITS)))
    return {"divergence": rng.exponential(size=len(DIGITS)), "prediction_a": a, "prediction_b": b}


@pytest.mark.parametrize("num_pairs", [1, 2, 9, 24, 120, 300])
def test_worst_first_then_the_others(tmp_path, num_pairs):
    scores = some_scores()
    page = shown(tmp_path, DIGITS, scores=scores, num_pairs=num_pairs)
    worst = (min(num_pairs, 120) + 1) // 2
    assert page.rows[:worst] == np.argsort(-scores["divergence"])[:worst].tolist()
    assert page.rows[worst:] == sorted(page.rows[worst:])
    assert len({*page.rows}) == min(num_pairs, 120)
    assert page.headings[1:] == ["Largest divergence", "Random draw of the others"][: 1 + (num_pairs > 1)]
    if num_pairs == 9:
        assert "9 of 120: the 5 of largest divergence, then 4 of the others, drawn at random with seed 0" in page.text
    if num_pairs >= 120:
        assert "all 120: first the 60 of largest divergence" in page.text


def test_fewer_rows_are_among_more():
    labels, divergence = np.array(DIGITS["label"][:]), some_scores()["divergence"]
    for measured in (None, divergence):
        few, many = ({row for _, rows in choose_rows(120, n, labels, measured, 0) for row in rows} for n in (24, 100))
        assert few < many


def test_nan_is_the_worst(tmp_path):
    divergence = np.arange(120.0)
    divergence[[5, 80]] = np.nan
    page = shown(tmp_path, DIGITS, scores={"divergence": divergence}, num_pairs=8)
    assert page.rows[:4] == [5, 80, 119, 118]
    assert re.search(r"divergence\s*nan", page.pairs[0]["text"])


def test_flips_are_marked(tmp_path):
    scores = some_scores()
    flips = scores["prediction_a"] != scores["prediction_b"]
    page = shown(tmp_path, DIGITS, scores=scores)
    assert 0 < flips[page.rows].sum() < len(page.rows)
    for pair in page.pairs:
        row, names = pair["row"], ["small", "large"]
        a, b = (names[scores[f"prediction_{side}"][row]] for side in "ab")
        assert ("flipped" in pair["classes"]) == ("flips" in pair["text"]) == flips[row]
        assert (f"{a} → {b}" if flips[row] else f"{a} on both sides") in pair["text"]
        assert f"{scores['divergence'][row]:.3g}" in pair["text"]
    assert f"{flips.sum()} of 120 pairs" in page.text
    calm = shown(tmp_path, DIGITS, scores={**scores, "prediction_b": scores["prediction_a"]})
    assert not any("flipped" in pair["classes"] for pair in calm.pairs)


def test_flips_without_predictions_and_tensors(tmp_path):
    flipped = torch.arange(120) % 2 == 0
    page = shown(tmp_path, DIGITS, scores={"divergence": torch.ones(120), "flipped": flipped, "distance": None})
    assert all(("flipped" in pair["classes"]) == (pair["row"] % 2 == 0) for pair in page.pairs)
    assert "predicted" not in page.text and "60 of 120 pairs (50 %)" in page.text
    assert "flip" not in shown(tmp_path, DIGITS, scores={"divergence": np.ones(120)}).text


# ---- findings ----


def test_findings_come_first(tmp_path):
    findings = [
        SimpleNamespace(severity="error", code="label-differs", message="2 labels", rows=(0, 3), fix="Mend them."),
        SimpleNamespace(severity="warning", code="few-pairs", message="only 6", rows=tuple(range(40)), fix=""),
        SimpleNamespace(severity="info", code="change-share", message="64 %", rows=(), fix="Fine."),
    ]
    page = shown(tmp_path, plain_pairs(6), findings=findings)
    assert page.source.index("label-differs") < page.source.index("few-pairs") < page.source.index("<article")
    assert "Rows: 0 , 3 Fix: Mend them." in page.text and "11 and 28 more" in page.text
    assert [attributes["data-severity"] for _, attributes in page.tags if "data-severity" in attributes] == [
        "error",
        "warning",
        "info",
    ]
    links = [value for value in page.resources if value.startswith("#")]
    assert links == ["#row-0", "#row-3", *(f"#row-{row}" for row in range(6))]
    assert shown(tmp_path, plain_pairs(6), findings=findings * 20).source.count("label-differs") == 20


# ---- sets, files, errors ----


def test_image_rows_and_formats(tmp_path):
    rows = ImageRows(
        DIGITS,
        ViTImageProcessor(size={"height": 4, "width": 4}),
        {"image_a": "pixel_values_a", "image_b": "pixel_values_b"},
        keep=["label"],
        random_flip=True,
    )
    first = shown(tmp_path, rows)
    assert first.rows == shown(tmp_path, DIGITS).rows
    assert np.array_equal(first.pairs[0]["images"][0], np.asarray(DIGITS[first.rows[0]]["image_a"]))
    for other in (DIGITS.with_format("torch"), DIGITS.with_transform(lambda batch: {"x": [0] * len(batch["label"])})):
        assert shown(tmp_path, other).rows == first.rows
    undecoded = DIGITS.cast_column("image_a", datasets.Image(decode=False))
    assert shown(tmp_path, undecoded).source == shown(tmp_path, DIGITS).source


def test_rows_are_those_of_a_selection(tmp_path):
    chosen = DIGITS.select([50, 3, 70])
    page = shown(tmp_path, chosen)
    assert page.rows == [0, 1, 2]
    for pair, row in zip(page.pairs, (50, 3, 70), strict=True):
        assert f"source {DIGITS[row]['source_id']}" in pair["text"]


def test_sets_that_cannot_be_shown(tmp_path):
    for pairs, message in [
        (DIGITS.select([]), "the pair set is empty"),
        (DIGITS.to_iterable_dataset(), "not a IterableDataset.*from_list"),
        ([{"image_a": 0}], "not a list"),
        (DIGITS.rename_column("image_b", "other"), r"has no column image_b, only \['image_a', 'other'"),
        (datasets.Dataset.from_dict({"image_a": [1], "image_b": [1]}), r"image_a is a Value, .*cast_column\('image_a'"),
    ]:
        with pytest.raises(ValueError, match=message):
            preview_pairs(pairs, tmp_path / "page")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_pairs": 0}, "num_pairs=0 is not valid: show at least 1"),
        ({"num_pairs": -3}, "num_pairs=-3"),
        ({"scores": {"flipped": np.zeros(120)}}, r"scores=\['flipped'\] lack the divergence"),
        ({"scores": {"divergence": np.zeros(24)}}, r"scores\['divergence'\] has the shape \(24,\), but .* 120 pairs"),
        ({"scores": {"divergence": np.zeros((120, 1))}}, r"the shape \(120, 1\)"),
        ({"scores": {"divergence": np.zeros(120), "flipped": [True]}}, r"scores\['flipped'\] has the shape \(1,\)"),
    ],
)
def test_settings_that_are_wrong(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        preview_pairs(DIGITS, tmp_path / "page", **settings)
    assert not any(tmp_path.iterdir())


def test_files(tmp_path):
    page = tmp_path / "new" / "folder" / "page.v2.html"
    assert preview_pairs(DIGITS, page.with_suffix(""), num_pairs=1) == [page]
    assert [*page.parent.iterdir()] == [page]
    before = page.read_bytes()
    for path in (page, page.with_suffix("")):
        with pytest.raises(FileExistsError, match=r"page\.v2\.html exists: set overwrite=True"):
            preview_pairs(DIGITS, path, num_pairs=2)
    assert page.read_bytes() == before
    assert preview_pairs(DIGITS, page, num_pairs=2, overwrite=True) == [page]
    assert page.read_bytes() != before


def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch):
    (page,) = preview_pairs(DIGITS, tmp_path / "page", num_pairs=1)
    before = page.read_bytes()

    def full(self, data):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes", full)
        with pytest.raises(OSError, match="No space"):
            preview_pairs(DIGITS, tmp_path / "page", num_pairs=2, overwrite=True)
    with pytest.raises(RuntimeError):
        preview_pairs(DIGITS, tmp_path / "page", overwrite=True, findings=Broken())
    assert page.read_bytes() == before and [*tmp_path.iterdir()] == [page]


class Broken(list):
    def __iter__(self):
        raise RuntimeError("a finding cannot be read")
