# SPDX-License-Identifier: Apache-2.0
"""The audit report: statistics worked by hand, what it measures against the model's own outputs, and the page."""

import json
import math
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from small import TINY_RECIPE, deit_with_teacher, timm_resnet, vit
from torch import nn
from transformers import ViTImageProcessor

from ipg_hf.audit.figures import draw_figures
from ipg_hf.audit.measure import audit, named_models
from ipg_hf.audit.numbers import (
    combined_interval,
    linear_probe,
    paired_difference,
    projection,
    rationale_differences,
    training_course,
    wilson_interval,
)
from ipg_hf.audit.page import audit_table, write_report
from ipg_hf.cli import main
from ipg_hf.data import load_digits, load_marked_digits

TINY = {
    **TINY_RECIPE,
    "max_steps": 12,
    "learning_rate": "3e-3",
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 500,
    "logging_steps": 4,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "save_strategy": "no",
}
PROCESSOR = ViTImageProcessor(size={"height": 16, "width": 16})
VOID = {"meta", "img", "br"}


def save(folder, model):
    model.save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    return str(folder)


def recipe(path, **changes):
    path.write_text(yaml.safe_dump({**TINY, **changes}))
    return str(path)


def part_of(data, rows=60):
    """A benchmark with the first rows of each of its sets for measuring."""

    def part(value):
        return {key: part(one) for key, one in value.items()} if isinstance(value, dict) else value.select(range(rows))

    names = ("validation", "test", "validation_pairs", "test_pairs")
    return SimpleNamespace(train=data.train, **{name: part(getattr(data, name)) for name in names})


class Page(HTMLParser):
    """Headings, tables, images and text of a page; fails where tags are not closed in order."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text("utf-8")
        self.open, self.headings, self.tags, self.rows, self.text = [], [], [], [], ""
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += f"{data} "
        if self.open and self.open[-1] in ("h2", "h3"):
            self.headings.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += f"{data}|"

    def row(self, name):
        return next(row for row in self.rows if row and row[0].split("|")[0] == name)


# ---- Statistics ----


def test_wilson_interval_by_hand():
    # 8 of 10: (0.8 + 0.19207 ± sqrt(0.16 · 0.38415 + 0.19207²)) / 1.38415
    assert wilson_interval(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    # none of 10: its upper end is z² / (10 + z²), its lower exactly 0
    assert wilson_interval(0, 10) == (0.0, pytest.approx(3.841459 / 13.841459, abs=1e-6))
    assert wilson_interval(10, 10) == (pytest.approx(10 / 13.841459, abs=1e-6), 1.0)
    low, high = wilson_interval(8000, 10000)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.8 * 0.2 / 10000), rel=1e-3)


def test_the_interval_of_a_mean_is_put_together_from_those_of_its_shares():
    assert combined_interval([8], [10], [1.0]) == pytest.approx(wilson_interval(8, 10))
    # half of 8 of 10 and half of 0 of 10: below, only the first leaves room
    low, high = combined_interval([8, 0], [10, 10], [0.5, 0.5])
    assert low == pytest.approx(0.4 - 0.5 * (0.8 - 0.490162), abs=1e-6)
    assert high == pytest.approx(0.4 + 0.5 * math.hypot(0.943318 - 0.8, 0.277533), abs=1e-6)


def test_equal_models_differ_by_exactly_nothing():
    rng = np.random.default_rng(0)
    right, groups = rng.random(90) < 0.7, rng.integers(4, size=90)
    for part in paired_difference(right, right.copy(), groups).values():
        assert part == {"difference": 0.0, "low": 0.0, "high": 0.0}


def test_paired_difference_by_hand():
    # group 0: first right on 3 of 4, second on 1; group 1: first right on 1 of 2, second on both
    first = np.array([1, 1, 1, 0, 1, 0], bool)
    second = np.array([1, 0, 0, 0, 1, 1], bool)
    found = paired_difference(first, second, np.array([0, 0, 0, 0, 1, 1]))
    assert found["accuracy"]["difference"] == pytest.approx(4 / 6 - 3 / 6)
    assert found["worst_group_accuracy"]["difference"] == pytest.approx(1 / 2 - 1 / 4)
    assert found["accuracy"]["low"] < 0 < found["accuracy"]["high"]  # six images tell nothing
    back = paired_difference(second, first, np.array([0, 0, 0, 0, 1, 1]))
    assert back["accuracy"]["difference"] == -found["accuracy"]["difference"]


def test_bootstrap_interval_is_that_of_paired_shares():
    # 400 images, of which 60 are right under the first model alone and 20 under the second alone
    first = np.r_[np.ones(60), np.zeros(20), np.ones(220), np.zeros(100)].astype(bool)
    second = np.r_[np.zeros(60), np.ones(20), np.ones(220), np.zeros(100)].astype(bool)
    one_group = np.zeros(400, int)
    found = paired_difference(first, second, one_group)["accuracy"]
    spread = math.sqrt((80 / 400 - 0.1**2) / 400)
    assert found["difference"] == pytest.approx(0.1)
    assert found["low"] == pytest.approx(0.1 - 1.96 * spread, abs=0.004)
    assert found["high"] == pytest.approx(0.1 + 1.96 * spread, abs=0.004)
    assert found["low"] > 0
    # unpaired it would be wider: the same shares, right on other images
    unpaired = paired_difference(first, np.roll(second, 150), one_group)["accuracy"]
    assert unpaired["difference"] == found["difference"]
    assert unpaired["high"] - unpaired["low"] > 1.2 * (found["high"] - found["low"])
    assert paired_difference(first, second, one_group)["accuracy"] == found
    assert any(paired_difference(first, second, one_group, seed=s)["accuracy"] != found for s in range(1, 9))


def labelled(count, share, seed):
    """Labels, and attributes that equal the label in this share."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    return labels, np.where(rng.random(count) < share, labels, 1 - labels)


def test_probe_tells_whether_the_attribute_can_be_read():
    rng = np.random.default_rng(1)
    sets = [labelled(400, 0.5, 2), labelled(400, 0.1, 3)]
    for weight, expected in ((1.0, 1.0), (0.0, 0.5)):
        features = [
            np.c_[labels + rng.normal(0, 0.1, 400), weight * attributes + rng.normal(0, 0.1, 400)]
            for labels, attributes in sets
        ]
        fit, test = ((z, a, y) for z, (y, a) in zip(features, sets, strict=True))
        found = linear_probe(fit, test)
        assert found["score"] == pytest.approx(expected, abs=0.06 if expected == 0.5 else 1e-9)
        assert found["low"] <= found["score"] <= found["high"] and found["chance"] == 0.5
        assert (found["low"] > 0.5) == (expected == 1.0)
        fit, test = ((z, y, a) for z, (y, a) in zip(features, sets, strict=True))
        assert linear_probe(fit, test)["score"] == pytest.approx(1.0, abs=0.01)


def test_reading_the_label_does_not_pass_for_reading_the_attribute():
    # attribute and label are opposite in nine of ten scored images: the label alone guesses the attribute there
    (fit_y, fit_a), (y, a) = labelled(300, 0.52, 4), labelled(500, 0.1, 5)
    found = linear_probe((fit_y[:, None].astype(float), fit_a, fit_y), (y[:, None].astype(float), a, y))
    assert found["score"] == 0.5
    recalls = [(y[a == value] != value).mean() for value in (0, 1)]
    assert np.mean(recalls) > 0.85  # what a plain balanced accuracy may make of it


def test_probe_score_by_hand():
    # 1 of the 4 images in group (1, 1) lies on the wrong side: (1 + 1 + 1 + 3/4) / 4
    targets, others = np.repeat([0, 0, 1, 1], 4), np.repeat([0, 1, 0, 1], 4)
    z = np.where(targets == 1, 1.0, -1.0)[:, None]
    wrong = z.copy()
    wrong[-1] = -1
    found = linear_probe((z, targets, others), (wrong, targets, others))
    assert found["score"] == pytest.approx(0.9375)
    assert (found["fitted_on"], found["scored_on"], found["empty_groups"]) == (16, 16, 0)
    kept = ~((targets == 0) & (others == 1))
    found = linear_probe((z, targets, others), (wrong[kept], targets[kept], others[kept]))
    assert found["score"] == pytest.approx((1 + (1 + 3 / 4) / 2) / 2) and found["empty_groups"] == 1
    assert "one value" in linear_probe((z, targets * 0, others), (z, targets, others))["missing"]
    assert "scored" in linear_probe((z, targets, others), (z, targets * 0, others))["missing"]


def test_projection_keeps_what_varies():
    labels = np.array([0, 1, 2, 1])
    found = projection(np.array([[0, 0, 5.0], [3, 4, 5], [6, 8, 5], [9, 12, 5]]), labels, labels[::-1])
    assert np.abs([x for x, *_ in found["points"]]) == pytest.approx([7.5, 2.5, 2.5, 7.5])
    assert found["explained"] == pytest.approx([1, 0], abs=1e-12)
    assert [point[2:] for point in found["points"]] == [[0, 1], [1, 2], [2, 1], [1, 0]]
    flat = projection(np.array([[1.0], [2.0]]), labels[:2], labels[:2])
    assert [point[1] for point in flat["points"]] == [0, 0] and flat["explained"] == [1, 0]
    assert projection(np.ones((3, 4)), labels[:3], labels[:3])["explained"] == [0, 0]


def test_rationale_differences_by_hand():
    weight = np.array([[1.0, 2.0], [0.0, -1.0]])
    z_a, z_b = np.array([[1.0, 1.0], [3.0, 0.0]]), np.array([[0.0, 1.0], [1.0, 2.0]])  # mean difference 1.5, -1
    first, second = rationale_differences(weight, z_a, z_b, ["cat", "dog"])
    assert first["logit_difference"] == -0.5 and first["absolute"] == 1.5  # pairs differ by 1 and by 2 - 4
    assert first["features"] == [
        {"feature": 1, "contribution": -2.0, "share": 4.0},
        {"feature": 0, "contribution": 1.5, "share": -3.0},
    ]
    assert second["label"] == "dog" and second["logit_difference"] == 1.0
    assert second["features"][0] == {"feature": 1, "contribution": 1.0, "share": 1.0}
    assert first["rest"] == {"features": 0, "contribution": 0.0, "share": 0.0}


def test_contributions_add_up_to_the_logit_difference():
    rng = np.random.default_rng(0)
    weight, z_a, z_b = rng.normal(size=(9, 50)), rng.normal(1, 1, size=(30, 50)), rng.normal(size=(30, 50))
    found = rationale_differences(weight, z_a, z_b, [*map(str, range(9))])
    sizes = np.abs(weight * (z_a - z_b).mean(0)).sum(1)
    assert [part["label"] for part in found] == [str(c) for c in sorted(np.argsort(-sizes)[:6])]
    for part in found:
        parts = [*part["features"], part["rest"]]
        assert math.fsum(p["contribution"] for p in parts) == part["logit_difference"]
        assert sum(p["share"] for p in parts) == pytest.approx(1, abs=1e-12)
        logits = ((z_a - z_b) @ weight.T).mean(0)
        assert part["logit_difference"] == pytest.approx(logits[int(part["label"])], abs=1e-12)
    (cancelled,) = rationale_differences(np.array([[1.0, -1.0]]), np.ones((2, 2)), np.zeros((2, 2)), ["x"])
    assert cancelled["logit_difference"] == 0 and cancelled["features"][0]["share"] is None


def test_course_of_a_training(tmp_path):
    line = {"ipg/distance": 1.0, "ipg/divergence": 0.1, "ipg/loss_scale": 0.5}
    history = [
        {"step": 50, "loss": 1.0, **line, "ipg/violated": 1.0},
        {"step": 50, "eval_accuracy": 0.5, "eval_worst_group_accuracy": 0.25, "eval_group_accuracy/a/b": 0.25},
        {"step": 60, "loss": 1.0, **line, "ipg/distance": 0.5, "ipg/violated": 0.4},
    ]
    state = tmp_path / "checkpoint-60"
    state.mkdir()
    (state / "trainer_state.json").write_text(json.dumps({"global_step": 60, "log_history": history}))
    (tmp_path / "run.json").write_text(
        json.dumps({"settings": {"invariance_threshold": 0.02}, "method": "ipg", "chosen_step": 50, "seconds": 2.5})
    )
    found = training_course(str(state))
    assert found["violated_share"] == pytest.approx((50 * 1.0 + 10 * 0.4) / 60)
    assert found["threshold"] == 0.02 and found["chosen_step"] == 50 and found["last"]["distance"] == 0.5
    assert found["evaluated"] == [{"step": 50, "accuracy": 0.5, "worst_group_accuracy": 0.25, "groups": {"a/b": 0.25}}]
    (tmp_path / "run.json").write_text(json.dumps({"settings": {"invariance_threshold": "not recorded"}}))
    assert training_course(str(state))["threshold"] is None  # of an old record
    assert training_course(str(tmp_path)) is None and training_course("a/hub-id") is None


# ---- What is measured ----


@pytest.mark.parametrize("make", [vit, timm_resnet, deit_with_teacher])
def test_the_report_agrees_with_the_model(make):
    data, model = part_of(load_digits(num_pairs=8)), make()
    model.train()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    result, pictures = audit({"m": ("nowhere", model, PROCESSOR)}, data, dataset="digits", batch_size=25)
    assert torch.equal(torch.get_rng_state(), state) and all(module.training for module in model.modules())
    (entry,) = result["models"]
    model.eval()
    inputs = {side: PROCESSOR(data.test_pairs[f"image_{side}"][:], return_tensors="pt") for side in "ab"}
    with torch.no_grad():
        a, b = (model(**inputs[side]).logits.double() for side in "ab")
        logits = model(**PROCESSOR(data.test["image"][:], return_tensors="pt")).logits
    labels = np.asarray(data.test["label"][:])
    right = logits.argmax(-1).numpy() == labels
    assert entry["accuracy"]["accuracy"] == right.mean() and entry["accuracy"]["n"] == 60
    attributes = np.asarray(data.test["attribute"][:])
    shares = [right[(labels == y) & (attributes == t)].mean() for y in (0, 1) for t in (0, 1)]
    assert [group["accuracy"] for group in entry["groups"]] == pytest.approx(shares)
    assert entry["worst_group"]["accuracy"] == pytest.approx(min(shares))
    assert [group["n_train"] for group in entry["groups"]] == [500, 0, 0, 497]
    flips = a.argmax(-1) != b.argmax(-1)
    assert entry["pairs"]["pairs"]["count"] == int(flips.sum())
    pa, pb = a.softmax(-1), b.softmax(-1)
    divergence = ((pa - pb) * (pa.log() - pb.log())).sum(-1) / 2
    assert entry["pairs"]["pairs"]["divergence"] == pytest.approx(divergence.mean().item(), rel=1e-4)
    # the head is proven, so that the contributions of its features are the difference of the logits
    for c, part in enumerate(entry["rationales"]["pairs"]):
        assert part["logit_difference"] == pytest.approx((a - b).mean(0)[c].item(), abs=1e-5)
        assert part["absolute"] == pytest.approx((a - b).abs().mean(0)[c].item(), abs=1e-5)
    worst = np.argsort(-divergence.numpy())[:6]
    assert sorted(card["row"] for card in result["pairs"]["pairs"]["cards"]) == sorted(worst.tolist())
    card = result["pairs"]["pairs"]["cards"][0]
    predicted = card["predictions"]["m"]["a"]
    assert predicted["class"] == ["small", "large"][a[card["row"]].argmax()]
    assert predicted["probability"] == pytest.approx(pa[card["row"]].max().item(), abs=1e-5)
    assert [pair.row for pair in pictures["pairs"]] == [card["row"] for card in result["pairs"]["pairs"]["cards"]]
    assert result["pairs"]["pairs"]["sides"] == ["red", "green"] and entry["training"] is None


class Bent(nn.Module):
    """Logits that are no linear function of features."""

    def __init__(self):
        super().__init__()
        self.inner = vit()
        self.config = self.inner.config

    def forward(self, pixel_values):
        return self.inner(pixel_values).logits ** 3


def test_a_model_without_a_linear_head_is_measured_without_features(tmp_path):
    data = part_of(load_digits(num_pairs=8), 30)
    models = {"bent": ("x", Bent(), PROCESSOR), "vit": ("y", vit(), PROCESSOR)}
    result, pictures = audit(models, data)
    bent, plain = result["models"]
    assert bent["probes"] is None and plain["probes"]["label"]["chance"] == 0.5
    assert bent["accuracy"] == plain["accuracy"] and bent["pairs"]["pairs"]["count"] == plain["pairs"]["pairs"]["count"]
    page = Page(write_report(result, pictures, tmp_path / "r")[0])
    assert "bent has no linear head that could be proven" in page.text and not list((tmp_path / "r").glob("*-1.png"))
    assert (tmp_path / "r" / "projection-label-2.png").exists()
    assert "label in z" not in audit_table(result)


def test_labels_in_another_order_are_refused():
    data, model = part_of(load_digits(num_pairs=8), 20), vit()
    model.config.id2label = {0: "large", 1: "small"}
    with pytest.raises(ValueError, match=r"nowhere orders its labels \['large', 'small'\]"):
        audit({"m": ("nowhere", model, PROCESSOR)}, data)
    model.config.id2label = {0: "small", 1: "large"}
    assert audit({"m": ("nowhere", model, PROCESSOR)}, data, split="validation")[0]["fit_split"] == "test"


def test_models_get_names_that_differ(tmp_path):
    assert named_models(["outputs/ipg", "outputs/ipg/erm/"]) == {"ipg": "outputs/ipg", "erm": "outputs/ipg/erm/"}
    assert named_models(["a/run", "b/run"]) == {"a/run": "a/run", "b/run": "b/run"}
    assert list(named_models(["a/run", "a/run"])) == ["a/run (1)", "a/run (2)"]


# ---- The command and the page ----


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    config = recipe(folder / "recipe.yaml", output_dir=str(folder / "ipg"))
    assert main(["train", "--config", config, "--compare", "erm"]) == 0
    against = ["--against", str(folder / "ipg" / "erm")]
    assert main(["evaluate", str(folder / "ipg"), *against, "--config", config, "--report", str(folder / "r")]) == 0
    return folder


def test_report_holds_what_evaluate_measures(reported):
    report = json.loads((reported / "r" / "report.json").read_text())
    assert [entry["name"] for entry in report["models"]] == ["ipg", "erm"]
    for entry in report["models"]:
        metrics = json.loads((reported.joinpath(entry["model"]) / "run.json").read_text())["metrics"]["test"]
        assert entry["metrics"] == pytest.approx({key: metrics[key] for key in entry["metrics"]}, abs=1e-9)
        assert {"accuracy", "worst_group_accuracy", "adjusted_accuracy"} == set(entry["metrics"])
        assert entry["adjusted"]["low"] <= entry["metrics"]["adjusted_accuracy"] <= entry["adjusted"]["high"]
        assert entry["pairs"]["pairs"]["flip_rate"] == metrics["flip_rate"]
        assert entry["pairs"]["pairs"]["divergence"] == pytest.approx(metrics["divergence"], rel=1e-4)
        for group in entry["groups"]:
            assert group["accuracy"] == metrics[f"group_accuracy/{group['label']}/{group['attribute']}"]
            assert group["n"] == metrics[f"group_n/{group['label']}/{group['attribute']}"]
    ipg, erm = report["models"]
    assert len(ipg["training"]["guided"]) == 3 and erm["training"]["guided"] == []
    settings = json.loads((reported / "ipg" / "run.json").read_text())["settings"]
    assert ipg["training"]["threshold"] == settings["invariance_threshold"] > 0 and erm["training"]["threshold"] is None
    assert erm["training"]["method"] == "erm" and len(erm["training"]["evaluated"]) == 3
    difference = report["difference"]
    assert difference["accuracy"]["difference"] == pytest.approx(
        ipg["accuracy"]["accuracy"] - erm["accuracy"]["accuracy"]
    )
    assert difference["flip_rate"]["difference"] == pytest.approx(
        ipg["pairs"]["pairs"]["flip_rate"] - erm["pairs"]["pairs"]["flip_rate"]
    )
    assert difference["accuracy"]["low"] <= difference["accuracy"]["difference"] <= difference["accuracy"]["high"]


def test_page_stands_alone(reported):
    page = Page(reported / "r" / "report.html")
    assert re.search(r"<title>Audit of ipg and erm on digits</title>", page.source)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object")
        for key in ("src", "href"):
            assert attributes.get(key, "#").startswith(("data:image/png;base64,", "#")), (tag, key)
        if tag == "img":
            assert len(attributes["alt"]) > 5
    assert "url(" not in page.source and "prefers-color-scheme: dark" in page.source
    targets = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    links = {attributes["href"][1:] for tag, attributes in page.tags if tag == "a"}
    assert links == targets and len(links) == 7
    # tables scroll in a box of their own
    assert page.source.count("<table>") == page.source.count('<div class="scroll"><table>') > 5
    images = [attributes for tag, attributes in page.tags if tag == "img" and attributes.get("class") == "drawn"]
    assert len({image["src"] for image in images}) == len(images) == len([*(reported / "r").glob("*.png")]) > 10
    for file in (reported / "r").glob("*.png"):
        assert min(Image.open(file).size) > 200


def test_settings_of_matplotlib_change_no_figure(reported):
    import matplotlib

    report, backend = json.loads((reported / "r" / "report.json").read_text()), matplotlib.get_backend()
    with matplotlib.rc_context({"savefig.bbox": "tight", "savefig.dpi": 30, "figure.dpi": 50, "axes.facecolor": "red"}):
        figures = draw_figures(report)
    for figure in (figure for parts in figures.values() for part in parts for figure in part):
        assert figure.image == (reported / "r" / f"{figure.name}.png").read_bytes()
    assert matplotlib.get_backend() == backend


NUMBER = r"\d[\d.,]*\de-\d+|\d[\d.,]*\d|\d"


def numbers_in(value):
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        return set().union(*map(numbers_in, value))
    if isinstance(value, bool) or value is None:
        return set()
    if isinstance(value, str):
        return {*re.findall(NUMBER, value)}
    value = abs(value)
    return {f"{value:.3f}", f"{value:.3g}", f"{100 * value:.1f}", f"{value:,}", str(value)}


def test_every_number_of_the_page_is_in_the_json(reported):
    report = json.loads((reported / "r" / "report.json").read_text())
    known = numbers_in(report) | {"0", "1", "95", "100"}  # of the explanations
    known |= {report["commit"][:12]} if report["commit"] else set()
    text = Page(reported / "r" / "report.html").text.replace(report["commit"][:12] if report["commit"] else " ", " ")
    shown = re.findall(NUMBER, text)
    assert len(shown) > 150
    assert {number for number in shown if number not in known} == set()
    assert f"{report['models'][0]['worst_group']['accuracy']:.3f}" in shown


def test_page_shows_the_numbers_in_their_places(reported):
    report = json.loads((reported / "r" / "report.json").read_text())
    page = Page(reported / "r" / "report.html")
    for name, key in (("accuracy", "accuracy"), ("worst-group accuracy", "worst_group")):
        cells = page.row(name)[1:]
        for cell, entry in zip(cells, report["models"], strict=False):
            value = entry[key]
            assert cell.startswith(f"{value['accuracy']:.3f}|{value['low']:.3f}–{value['high']:.3f}")
    gap = report["difference"]["accuracy"]
    assert page.row("accuracy")[3].startswith(f"{gap['difference']:+.3f}".replace("-", "−"))
    assert f"seed {report['seed']}" in page.text.replace("\n", " ") and "paired bootstrap" in page.text
    assert {"Summary", "Groups", "Held-out pairs", "What the features hold", "Training"} <= set(page.headings)
    for card in report["pairs"]["pairs"]["cards"]:
        assert f"row {card['row']} ·" in page.text and card["facts"]["erm"] in page.text


def test_a_model_against_itself():
    data, model = part_of(load_digits(num_pairs=8), 30), vit()
    result, _ = audit({"a": ("x", model, PROCESSOR), "b": ("x", model, PROCESSOR)}, data)
    zero = {"difference": 0.0, "low": 0.0, "high": 0.0}
    assert result["difference"] == dict.fromkeys(["accuracy", "worst_group_accuracy", "flip_rate"], zero)
    assert "difference of worst-group accuracy: 0.000 [0.000, 0.000]" in audit_table(result)


def test_an_existing_report_stays(reported, capsys):
    arguments = ["evaluate", str(reported / "ipg"), "--config", str(reported / "recipe.yaml")]
    before = (reported / "r" / "report.html").read_bytes()
    assert main([*arguments, "--report", str(reported / "r")]) == 2
    assert "holds another report (report.html): remove it" in capsys.readouterr().err
    assert (reported / "r" / "report.html").read_bytes() == before
    assert main([*arguments, "--against", str(reported / "ipg")]) == 2
    assert "--report DIR" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--report", "r", "--output", "m.json"])


def test_several_pair_sets(tmp_path):
    data = part_of(load_marked_digits(num_pairs=8))
    data.test = load_marked_digits(num_pairs=8).test.select(range(0, 2000, 20))  # all eight groups
    result, pictures = audit({"m": ("nowhere", vit(), PROCESSOR)}, data, dataset="marked_digits")
    report = json.loads(write_report(result, pictures, tmp_path / "r")[1].read_text())
    (entry,) = report["models"]
    assert set(entry["pairs"]) == set(entry["rationales"]) == set(report["pairs"]) == {"color", "mark"}
    assert report["pairs"]["mark"]["sides"] == ["plain", "marked"] and len(entry["groups"]) == 8
    assert entry["probes"]["label"]["empty_groups"] == 0 and entry["probes"]["label"]["chance"] == 0.5
    page = Page(tmp_path / "r" / "report.html")
    for name, part in entry["pairs"].items():
        assert page.row(name)[1].startswith(f"{part['flip_rate']:.3f} flip|") and part["n"] == 60
        assert page.row(f"flip rate ({name})")[1].startswith(f"{part['flip_rate']:.3f}|")
    assert entry["pairs"]["color"]["divergence"] != entry["pairs"]["mark"]["divergence"]
    assert {f"rationales-{name}-1-1.png" for name in ("color", "mark")} <= {
        file.name for file in (tmp_path / "r").iterdir()
    }
    assert {"flip rate color", "flip rate mark"} <= {line[:15].strip() for line in audit_table(result).splitlines()}
    assert "has no record of its training" in page.text and "difference of" not in audit_table(result)


def test_many_classes_without_pairs_and_odd_names(tmp_path):
    rng = np.random.default_rng(0)
    labels, attributes = ["<b>bold", "cat & dog", "$x$"], ["day", "night", "'quoted'"]
    for split, count in (("train", 2), ("validation", 3), ("test", 4)):
        for y, label in enumerate(labels):
            for t, attribute in enumerate(attributes):
                folder = tmp_path / "data" / split / label / attribute
                folder.mkdir(parents=True)
                for number in range(count):
                    pixels = rng.integers(0, 60, (16, 16, 3), dtype=np.uint8)
                    pixels[:8, :, y] += 150
                    pixels[8:, :, t] += 150
                    Image.fromarray(pixels).save(folder / f"{number}.png")
    config = recipe(tmp_path / "recipe.yaml", dataset="files", data_dir=str(tmp_path / "data"))
    model = save(tmp_path / "m<i>", vit(num_labels=3))
    assert main(["evaluate", model, "--config", config, "--report", str(tmp_path / "r")]) == 0
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    (entry,) = report["models"]
    assert report["labels"] == sorted(labels) and len(entry["groups"]) == 9
    assert [group["n"] for group in entry["groups"]] == [4] * 9
    assert entry["pairs"] == {} and entry["probes"]["attribute"]["chance"] == pytest.approx(1 / 3)
    page = Page(tmp_path / "r" / "report.html")
    assert "has no held-out pairs, so that flip rate, divergence and rationale differences are left out" in page.text
    assert not any(tag in ("b", "i", "article") for tag, _ in page.tags)
    assert "&lt;b&gt;bold" in page.source and "m<i>" in page.text
    assert not list((tmp_path / "r").glob("rationales*"))


def test_a_regression_is_refused_with_the_way_out(tmp_path, capsys):
    config = recipe(tmp_path / "recipe.yaml", dataset="stroke_mass")
    model = save(tmp_path / "m", vit(num_labels=1))
    assert main(["evaluate", model, "--config", config, "--report", str(tmp_path / "r")]) == 2
    assert "ipg evaluate without --report gives the errors by group" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
