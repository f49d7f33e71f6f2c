# SPDX-License-Identifier: Apache-2.0
"""Model cards: what a card says is read out of its text, by a parser of its own, and compared with the run's record."""

import json
import math
import re
import statistics
import sys
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path

import pytest
import small
import yaml
from huggingface_hub import ModelCard
from small import trainer

from ipg_hf import IPGTrainer
from ipg_hf.baselines import METHODS
from ipg_hf.cli import main
from ipg_hf.data import ABOUT, LOADERS
from ipg_hf.hub.card import MADE, MARKER, METHOD_TEXTS, NEEDS_PAIRS, OWN_SETTINGS, SETTINGS, model_card
from ipg_hf.metrics import GroupMetrics
from ipg_hf.recipe import MAKERS, parse_settings
from ipg_hf.record import NOT_RECORDED, hub_id, resolved_settings

ROOT = Path(__file__).resolve().parent.parent

RECIPE, ARGS, GIVEN = parse_settings(
    {
        "dataset": "files",
        "pairs": {"maker": "match", "num_pairs": 40},
        "alpha": 0.5,
        "invariance_distance": "rationale",
        "learning_rate": 0.01,
        "max_steps": 150,
        "eval_strategy": "steps",
        "eval_steps": 50,
        "save_strategy": "steps",
        "save_steps": 50,
        "load_best_model_at_end": True,
        "metric_for_best_model": "worst_group_accuracy",
        "output_dir": "/home/me/out",
        "hub_token": "hf_planted",
    },
    title="the test's recipe",
)
RECORD = {
    "method": "ipg",
    "settings": resolved_settings(RECIPE, ARGS),
    "given": [*GIVEN],
    "seed": 3,
    "metrics": {
        "validation": {"accuracy": 0.5},
        "test": {
            "loss": 0.1,
            "accuracy": 0.9,
            "worst_group_accuracy": 0.75,
            "adjusted_accuracy": 0.95,
            "group_accuracy/cat/indoor": 0.75,
            "group_n/cat/indoor": 20.0,
            "group_accuracy/cat/outdoor": 1.0,
            "group_n/cat/outdoor": 30.0,
            "flip_rate": 0.125,
        },
    },
    "chosen_step": 50,
    "steps": 150,
    "seconds": 12.34,
    "versions": {"python": "3.11.7", "ipg_hf": "0.2.0", "timm": None},
    "commit": "abc123",
    "hardware": {"cpus": 2, "gpus": []},
    "base_model": "someone/net",
    "about": {**asdict(ABOUT["files"]), "title": "Pets", "license": "CC0", "attribute": "the place"},
    "data": {
        "train": 100,
        "pair_sets": {
            "pairs": {"pairs": 40, "labelled": True, "findings": [["warning", "few-pairs", "the set has 40 pairs"]]}
        },
    },
}
OTHER = {**RECORD, "seed": 4, "metrics": {"test": {"accuracy": 0.7, "worst_group_accuracy": 0.25}}}
ERM = {
    **RECORD,
    "method": "erm",
    "settings": {**RECORD["settings"], "learning_rate": 0.02},
    "metrics": {"test": {"accuracy": 0.6, "worst_group_accuracy": 0.1, "group_accuracy/cat/indoor": 0.1}},
}


def text_of(name="pets", **changes):
    return str(model_card({**RECORD, **changes}, name=name))


def with_settings(**settings):
    return text_of(settings={**RECORD["settings"], **settings})


# ---- What a card says, and where it contradicts the records

TITLES = {
    "accuracy": "accuracy",
    "worst-group accuracy": "worst_group_accuracy",
    "adjusted accuracy": "adjusted_accuracy",
    "flip rate": "flip_rate",
    "pair accuracy": "pair_accuracy",
    "mean absolute error": "mae",
    "worst-group mean absolute error": "worst_group_mae",
    "mean absolute difference within pairs": "difference",
}
SCORES = ("accuracy", "worst_group_accuracy", "mae", "worst_group_mae")
PAPER = {"invariance_distance": "rationale", "max_loss_scale": math.inf, "correction_schedule": "always"}
PAPER |= {"rationale_reduction": "mean", "correction_interval": 1, "corrective_layers": None, "pair_loss_weight": 0.0}


def tables(text):
    """The rows of each table, as lists of cells, without the two lines of the header."""
    found = re.findall(r"(?:^\|.*\n)+", text, re.M)
    return [[[cell.strip() for cell in row.strip("| ").split(" | ")] for row in t.splitlines()[2:]] for t in found]


def one(pattern, text):
    """The groups of the only match, or its whole text; None without a match, or with several."""
    found = re.findall(pattern, text)
    return found[0] if len(found) == 1 else None


def said_and_recorded(text, record, others=(), erm=None):
    """For each statement of a card: its name, what the card says and what the records say."""
    header, body = text.split("---\n", 2)[1:]
    data, settings = yaml.safe_load(header), {**record["settings"], "seed": record["seed"]}
    metrics, about = record["metrics"]["test"], record["about"]
    plain = erm["metrics"]["test"] if erm else {}
    parts = dict(re.findall(r"^## (.*)\n((?:(?!^## ).*\n)*)", body + "\n", re.M))
    names = {title.split(", ")[0]: name for title, name in TITLES.items()}

    # metadata
    index = data["model-index"][0]
    [result] = index["results"]
    yield "name", {index["name"], one(r"\n# (\S+)\n", body)}, {index["name"]}
    recorded = [{"type": m, "value": metrics[m], "name": t} for t, m in TITLES.items() if m in metrics and m in SCORES]
    yield "index", result["metrics"], recorded
    place = {"name": about["title"], "type": about["hub_set"] or settings["dataset"], "split": "test"}
    yield "index, data", result["dataset"], place
    yield "base model", data.get("base_model"), record["base_model"]
    yield "tag ipg", "ipg" in data["tags"], record["method"] in ("ipg", "ablation")

    # method
    ipg = "Invariance pair-guided learning (IPG, [arXiv 2502.18975]" in body
    yield "method", ipg, record["method"] == "ipg"
    distance = settings["invariance_distance"]
    agree = "rationales of" if distance == "rationale" else "outputs on"
    both = "pair, and feature by feature their rationales, agree" in body
    sets = record["data"]["pair_sets"].values()
    labelled = (
        settings["pair_loss_weight"] > 0 and record["method"] == "ipg" and any(s.get("labelled", True) for s in sets)
    )
    yield "labels of pairs", "agree and lowers the task loss of both." in body, labelled
    yield "distance, both", both, record["method"] == "ipg" and distance == "rationale_divergence"
    yield "distance", f"makes the {agree} the two images" in body, record["method"] == "ipg"
    differences = dict(re.findall(r"`(\w+)` is (\S+) \(paper: [\w.]+\)", body))
    skipped = set() if distance == "rationale" else {"rationale_reduction"}
    skipped |= set() if labelled else {"pair_loss_weight"}
    yield (
        "departures",
        differences,
        {k: str(settings[k]) for k in PAPER if settings.get(k, PAPER[k]) != PAPER[k] and k not in skipped},
    )
    yield (
        "departures, paper",
        dict(re.findall(r"`(\w+)` is \S+ \(paper: ([\w.]+)\)", body)),
        {k: str(PAPER[k]) for k in differences},
    )
    yield "paper's own", "This is the method of the paper." in body, not differences

    # results
    results = parts["Results"]
    yield (
        "drawn",
        one(r"Measured on the test split of (.*) \(`(\w+)`, drawn with seed (\d+)\)", results),
        (
            about["title"],
            settings["dataset"],
            str(record["seed"]),
        ),
    )
    yield (
        "chosen",
        one(r"The checkpoint of step (\d+) was chosen by `(\w+)`", results),
        (
            str(record["chosen_step"]),
            settings["metric_for_best_model"],
        ),
    )
    overall, *by_group = tables(results)
    for title, *cells in overall:
        name, _, pair_set = title.partition(", ")
        key = f"{pair_set}/{names[name]}" if pair_set else names[name]
        yield title, cells, shown(key, metrics, plain, erm)
    yield "scores", len(overall), sum(key.split("/")[-1] in TITLES.values() for key in metrics)
    kind = "group_mae/" if "mae" in metrics else "group_accuracy/"
    for label, attribute, count, *cells in (row for table in by_group for row in table):
        key = f"{label}/{attribute}"
        yield f"images of {key}", count, str(int(metrics[f"group_n/{key}"]))
        yield key, cells, shown(kind + key, metrics, plain, erm)
    yield "groups", sum(map(len, by_group)), sum(key.startswith("group_n/") for key in metrics)
    if erm:
        yield "seed of ERM", erm["seed"], record["seed"]
        common = {name: str(erm["settings"][name]) for name in SETTINGS if name != "seed"}
        both = {name: (value, str(settings[name])) for name, value in common.items() if value != str(settings[name])}
        line = one(r"ERM: .*", results)
        yield (
            "ERM's settings",
            {n: (a, b) for n, a, b in re.findall(r"`(\w+)` (\S+) \(this model: (\S+?)\)", line)},
            both,
        )
        yield "ERM the same", line.endswith("with the same seed and the same settings."), not both
    if others:
        runs = [record, *others]
        count, seeds, own, rest = one(r"over (\d+) seeds \((.*); this model: (\d+)\): (.*)\.\n", results)
        yield "number of seeds", int(count), len(runs)
        yield "seeds", seeds.split(", "), [str(run["seed"]) for run in runs]
        yield "own seed", own, str(record["seed"])
        spread = {}
        for part in rest.split(", "):
            title, mean, deviation = re.fullmatch(r"(.*) ([\d.]+) ± ([\d.]+)", part).groups()
            spread[names[title]] = [mean, deviation]
        values = {name: [run["metrics"]["test"][name] for run in runs] for name in SCORES if name in metrics}
        yield (
            "spread",
            spread,
            {name: [f"{of(v):.3f}" for of in (statistics.mean, statistics.stdev)] for name, v in values.items()},
        )

    # data
    sets = record["data"]["pair_sets"]
    numbers = {name: entry["pairs"] for name, entry in sets.items()}
    if [*numbers.values()] == [NOT_RECORDED] and not settings["pairs"] and settings["num_pairs"]:
        numbers = {"": settings["num_pairs"]}
    counted = one(r"Number of pairs: (.*)\.", parts["Data"])
    said = dict(reversed(re.fullmatch(r"(.*?)(?: \((.*)\))?", part).groups()) for part in counted.split(", "))
    numbers = {name if len(sets) > 1 else None: str(number) for name, number in numbers.items()}
    yield "pairs", said, numbers
    if settings["num_pairs"] and not any(settings.get(name) for name in ("pairs", "extend_pairs", "mix_pairs")):
        yield "pairs as set", set(said.values()), {str(settings["num_pairs"])}
    findings = [
        (severity, code, name if len(sets) > 1 else "", message)
        for name, entry in sets.items()
        if isinstance(entry["findings"], list)
        for severity, code, message in entry["findings"]
        if severity != "info"
    ]
    yield "findings", re.findall(r"^- (\w+) `([\w-]+)`(?: \((\w+)\))?: (.*)$", parts["Data"], re.M), findings
    checked = any(isinstance(entry["findings"], list) for entry in sets.values())
    yield "check recorded", "Result of `ipg pairs check`: not recorded." in parts["Data"], not checked

    # training
    training = parts["Training"]
    steps, seconds, machine, software = one(
        r"Optimizer steps: (.*); seconds: (.*); hardware: (.*); software: (.*)\.", training
    )
    yield "steps", int(steps), record["steps"]
    yield "seconds", float(seconds), round(record["seconds"])
    yield "hardware", one(r"(\d+) processor", machine), str(record["hardware"]["cpus"])
    versions = {name: version for name, version in record["versions"].items() if version}
    yield "software", dict(part.split(" ") for part in software.split(", ")), versions
    [rows] = tables(training)
    table = {name.strip("`"): value for name, value in rows}
    yield "settings", table, {name: str(settings[name]) for name in table}
    needed = {*OWN_SETTINGS[record["method"]], *SETTINGS} - {"rationale_reduction", "warmup_steps"}
    needed -= set() if labelled else {"pair_loss_weight"}
    yield "settings, all", needed - table.keys() <= {"max_steps", "num_train_epochs"}, True

    # the rest
    licence = re.findall(r"Licence of this model: (.*)\. Licence of the images: (.*)\.\n", parts["Limits"])
    yield "licences", licence, [(data.get("license", "none was given"), about["license"])]
    yield "commit", one(r"commit `(\w+)`", parts["How to reproduce"]), record["commit"]
    recipe = yaml.safe_load(one(r"```yaml\n([\s\S]*?)```", parts["How to reproduce"]))
    yield "recipe", recipe, {name: settings[name] for name in recipe}
    named = {n for n in record["given"] if n in settings and settings[n] not in (None, {}, [], NOT_RECORDED)}
    yield "recipe, all", named - recipe.keys(), set()
    yield "id", one(r'model="(.*)"\)', parts["How to use"]), f"<your-name>/{index['name']}"


def shown(key, metrics, plain, erm):
    def cell(values):
        return f"{values[key]:.3f}" if key in values else NOT_RECORDED

    return [cell(metrics), *([cell(plain)] if erm else [])]


def contradictions(text, record, others=(), erm=None):
    """The statements of a card that differ from the records; a text that cannot be read counts as one."""
    try:
        return [(name, said, kept) for name, said, kept in said_and_recorded(text, record, others, erm) if said != kept]
    except (KeyError, TypeError, ValueError, AttributeError) as failure:
        return [("not readable", repr(failure), None)]


@cache
def published():
    """File name of each published card -> the records that it is made from."""
    sys.path.insert(0, str(ROOT / "recipes/scripts"))
    try:
        import cards
    finally:
        sys.path.pop(0)
    return cards.sources(), cards.cards()


def test_published_cards_say_what_their_records_say():
    sources, made = published()
    found = {path.name: path.read_text() for path in (ROOT / "model_cards").glob("*")}
    assert 6 <= len(found) <= 10 and found.keys() == sources.keys()
    for name, (record, others, erm) in sources.items():
        assert contradictions(found[name], record, others, erm) == [], name
        assert found[name] == made[name], name


def test_the_card_of_a_run_says_what_its_record_says():
    card = model_card(RECORD, name="pets", erm=ERM, others=[OTHER], license="mit", tags=["cats"])
    assert contradictions(str(card), RECORD, [OTHER], ERM) == []
    assert card.data.tags == ["ipg", "robustness", "spurious-correlation", "cats"]
    assert (card.data.license, card.data.model_name) == ("mit", "pets")
    assert "`learning_rate` 0.02 (this model: 0.01)" in str(card)
    assert "hf_planted" not in str(card) and "/home/me" not in str(card)


# what says nothing of the run: links, the description of the data, the citation, the year of a citation
NO_STATEMENTS = re.compile(r"arXiv [\d.]+|abs/[\d.]+|Source: .*|A pair: .*?\. Number|## Citation[\s\S]*|ipg_hf 0.2.0")


@pytest.mark.parametrize("name", ["digits-ipg-pair-vit-tiny.md", "marked-digits-ipg-pair-makers-resnet.md"])
def test_every_number_in_a_card_is_compared(name):
    """The negative control: with any other digit somewhere, the card contradicts its record."""
    sources, made = published()
    text, (record, others, erm) = made[name], sources[name]
    exempt = [range(*match.span()) for match in NO_STATEMENTS.finditer(text)]
    missed, tried = [], 0
    for match in re.finditer(r"\d(?![\d])", text):
        place = match.start()
        if any(place in part for part in exempt):
            continue
        tried += 1
        changed = f"{text[:place]}{(int(text[place]) + 1) % 10}{text[place + 1 :]}"
        if not contradictions(changed, record, others, erm):
            missed.append(text[max(0, place - 40) : place + 20])
    assert tried > 140 and missed == []


@pytest.mark.parametrize(
    ("said", "other"),
    [
        ("- ipg\n", ""),
        ("Invariance pair-guided learning (IPG", "Just Train Twice (JTT"),
        ("makes the rationales of", "makes the outputs on"),
        ("(paper: mean)", "(paper: pair)"),
        ("by `worst_group_accuracy` on", "by `accuracy` on"),
        ("| small | green |", "| large | green |"),
        ("| `optim` | adamw_torch_fused |", "| `optim` | sgd |"),
        ("  type: digits\n", "  type: scenes\n"),
        ("and the same settings", "and other settings: `max_steps` 500 (this model: 3000)"),
        ("pairs check`: not recorded", "pairs check`: no faults"),
    ],
)
def test_words_in_a_card_are_compared(said, other):
    sources, made = published()
    text, (record, others, erm) = made["digits-ipg-pair-vit-tiny.md"], sources["digits-ipg-pair-vit-tiny.md"]
    assert text.count(said) == 1 and contradictions(text.replace(said, other), record, others, erm)


def test_the_recipe_of_a_card_gives_the_settings_of_its_record():
    sources, made = published()
    for name, (record, _, _) in sources.items():
        recipe = yaml.safe_load(re.search(r"```yaml\n([\s\S]*?)```", made[name])[1])
        settings = resolved_settings(*parse_settings(recipe, title=name)[:2])
        known = {n: value for n, value in record["settings"].items() if n in settings and value != NOT_RECORDED}
        assert len(known) > 100 and {n: settings[n] for n in known} == known, name


# ---- What is said of a method, and where a record lacks something


@pytest.mark.parametrize("method", METHODS)
def test_a_card_names_the_method_that_ran(method):
    settings = {**RECORD["settings"], **dict.fromkeys(OWN_SETTINGS.get(method, ()), 7)}
    settings |= {"invariance_distance": "divergence", "max_steps": 150}
    facts = {"rows": 7, "strength": 7, "errors": 7}
    text = str(model_card({**RECORD, "method": method, "settings": settings, "baseline": facts}, name="pets"))
    tags = ModelCard(text).data.tags or []
    assert ("ipg" in tags) is (method in ("ipg", "ablation")) and ("robustness" in tags) is (method != "erm")
    assert ("Number of pairs: 40." in text) is METHODS[method].uses_pairs
    assert ("makes the outputs on the two images of each pair agree" in text) is (method in ("ipg", "ablation"))
    sentence = METHOD_TEXTS[method]
    assert sentence.split("{")[0] in text
    described = text.split("## Results")[0]
    assert not re.search(r"[{}]", described) and NOT_RECORDED not in described
    others = set(METHOD_TEXTS) - {method}
    assert not [other for other in others if METHOD_TEXTS[other].split("{")[0] in text]


def test_the_texts_cover_every_method_and_maker():
    assert METHOD_TEXTS.keys() == METHODS.keys() and MADE.keys() == MAKERS.keys()
    assert {*NEEDS_PAIRS} == {name for name, method in METHODS.items() if method.uses_pairs}
    for name, method in METHODS.items():
        assert {*OWN_SETTINGS.get(name, ()), *SETTINGS} <= {entry.name for entry in fields(method.config)}, name
    assert ABOUT.keys() == LOADERS.keys()


def test_the_method_of_the_paper_is_called_so():
    paper = with_settings(max_loss_scale=math.inf, pair_loss_weight=0.0)
    assert "This is the method of the paper." in paper and "Differences from" not in paper
    pair = with_settings(max_loss_scale=math.inf, rationale_reduction="pair", pair_loss_weight=0.0)
    assert "method of the paper: `rationale_reduction` is pair (paper: mean).\n" in pair
    assert "This is the method of the paper." not in pair
    labelled = with_settings(max_loss_scale=math.inf, pair_loss_weight=0.5)
    assert "method of the paper: `pair_loss_weight` is 0.5 (paper: 0.0).\n" in labelled
    assert (
        "| `pair_loss_weight` | 0.5 |" in labelled and "pair_loss_weight" not in paper.split("## How to reproduce")[0]
    )
    assert "agree and lowers the task loss of both." in labelled and "lowers the task loss" not in paper
    unlabelled = {"pair_sets": {"pairs": {"pairs": 40, "labelled": False, "findings": None}}}
    without = text_of(settings={**RECORD["settings"], "max_loss_scale": math.inf}, data=unlabelled)
    assert "lowers the task loss" not in without and "This is the method of the paper." in without
    for distance in ("divergence", "rationale_divergence"):
        assert "| `rationale_reduction` |" not in with_settings(invariance_distance=distance)
    assert "makes the outputs on the two images of each pair, and feature by feature their rationales, agree" in (
        with_settings(invariance_distance="rationale_divergence")
    )


def test_what_a_record_lacks_is_said():
    """Never a default of the present code."""
    settings = dict.fromkeys(RECORD["settings"], NOT_RECORDED) | {"dataset": "files"}
    settings |= {"pairs": {}, "extend_pairs": {}, "mix_pairs": {}}
    lacks = {"commit": None, "seconds": None, "base_model": None, "about": None, "data": None, "metrics": {}}
    text = text_of(settings=settings, given=None, **lacks)
    assert "(base model not recorded)" in text and "This model has not been evaluated." in text
    assert "Training data: not recorded." in text and "A pair: not recorded. Number of pairs: not recorded." in text
    assert "Result of `ipg pairs check`: not recorded." in text and "seconds: not recorded;" in text
    assert "Licence of this model: none was given. Licence of the images: not recorded." in text
    assert "Trained by ipg_hf 0.2.0." in text
    values = [value for name, value in tables(text)[-1] if name != "`seed`"]
    assert len(values) > 20 and {*values} == {NOT_RECORDED}
    recipe = yaml.safe_load(re.search(r"```yaml\n([\s\S]*?)```", text)[1])
    assert recipe == {"method": "ipg", "dataset": "files", "seed": 3}
    read = ModelCard(text).data
    assert read.eval_results is None and read.license is None and read.base_model is None
    assert "None" not in text.replace("(paper: None)", "") and "\n\n\n" not in text


def test_the_number_of_pairs_is_that_of_the_training():
    old = {"train": 100, "pair_sets": {"pairs": {"pairs": NOT_RECORDED, "findings": NOT_RECORDED}}}
    settings = {**RECORD["settings"], "pairs": {}, "num_pairs": 997}
    assert "Number of pairs: 997." in text_of(data=old, settings=settings)
    # how many were made or mixed is not known from the setting alone
    for change in (
        {"pairs": {"maker": "match"}},
        {"extend_pairs": {"num_pairs": 9000}},
        {"mix_pairs": {"num_pairs": 9000}},
    ):
        assert "Number of pairs: not recorded." in text_of(data=old, settings={**settings, **change})
    extended = text_of(settings={**settings, "extend_pairs": {"num_pairs": 40}})
    sentence = "A colour map learned from fewer pairs made the others of training images (`extend_pairs`)."
    assert f"Number of pairs: 40. {sentence}\n" in extended and sentence not in text_of(settings=settings)
    mixed = text_of(settings={**settings, "mix_pairs": {"num_pairs": 40}})
    assert "Number of pairs: 40. Mixtures made them from fewer pairs (`mix_pairs`)." in mixed
    two = {"pair_sets": {"color": {"pairs": 5, "findings": []}, "mark": {"pairs": None, "findings": None}}}
    assert "Number of pairs: 5 (color), not recorded (mark)." in text_of(data=two)
    assert "The sides of a random half of them were swapped on purpose." in with_settings(oriented_pairs=False)


def test_an_evaluation_set_without_a_name_has_a_heading():
    text = text_of(metrics={"": {"accuracy": 0.5}, "ood": {"accuracy": 0.25}})
    assert "Measured on the (no name), ood sets" in text and "\n### (no name)\n" in text and "\n### ood\n" in text


def test_findings_of_the_pair_check():
    def text(*findings):
        return text_of(data={"pair_sets": {"a": {"pairs": 5, "findings": [*findings]}}})

    for found in (text(), text(["info", "change-share", "x"])):
        assert "The fast form of `ipg pairs check` found no errors and no warnings." in found
    assert "found:\n\n- error `empty`: x\n" in text(["error", "empty", "x"])


def test_a_regression_and_other_base_models():
    metrics = {"mae": 0.1, "worst_group_mae": 0.2, "group_mae/above/red": 0.2, "group_n/above/red": 4.0}
    text = text_of(metrics={"test": metrics})
    assert "trained to predict a number and to ignore the place." in text
    assert "| worst-group mean absolute error | 0.200 |" in text and "| above | red | 4 | 0.200 |" in text
    assert "Worst group: the largest error of these groups.\n" in text and "Flip rate" not in text
    scratch = text_of(base_model=None, settings={**RECORD["settings"], "model_type": "vit"})
    assert "A `vit` from random weights, trained" in scratch
    assert 'model="me/pets")\n' in text_of(name="me/pets")
    validation = text_of(metrics={"validation": {"accuracy": 0.5}})
    assert "- The evaluation data may have chosen the checkpoint." in validation


@pytest.mark.parametrize(
    ("schedule", "has_warmup"),
    [("linear", True), ("constant_with_warmup", True), ("constant", False), ("reduce_lr_on_plateau", False)],
)
def test_a_warm_up_is_shown_where_the_schedule_has_one(schedule, has_warmup):
    text = with_settings(lr_scheduler_type=schedule, warmup_steps=0.2)
    assert ("| `warmup_steps` | 0.2 |" in text) is has_warmup


def test_ids_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/net").mkdir(parents=True)
    assert hub_id("google/vit-base-patch16-224") == "google/vit-base-patch16-224"
    assert [hub_id(name) for name in (None, "", "net", "models/net", "/a/b", "a/b/c")] == [None] * 6


# ---- From a trainer, and from the command line


def test_a_trainers_card_has_the_metrics_of_the_chosen_step(tmp_path):
    """The best evaluation, not the last (transformers issue 15547)."""
    training = trainer(
        tmp_path,
        train=small.rows(24),
        eval_dataset=small.rows(11, attribute=True),
        compute_metrics=GroupMetrics(),
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="worst_group_accuracy",
        learning_rate=0.05,
    )
    training.train()
    training.create_model_card(license="mit", tags="cats")
    text = (tmp_path / "README.md").read_text()
    card = ModelCard(text)
    evaluated = {entry["step"]: entry for entry in training.state.log_history if "eval_worst_group_accuracy" in entry}
    best = evaluated[training.state.best_global_step]
    assert any(entry["eval_accuracy"] != best["eval_accuracy"] for entry in evaluated.values())
    assert {r.metric_type: r.metric_value for r in card.data.eval_results} == {
        "accuracy": best["eval_accuracy"],
        "worst_group_accuracy": best["eval_worst_group_accuracy"],
    }
    assert {r.dataset_split for r in card.data.eval_results} == {"evaluation"}
    assert card.data.license == "mit" and card.data.tags == ["ipg", "robustness", "spurious-correlation", "cats"]
    assert "Number of pairs: 10." in text and "The training script is not recorded" in text
    assert f"| `learning_rate` | {training.args.learning_rate} |" in text


def test_a_trainer_without_pairs_has_no_tag_of_the_method(tmp_path):
    training = IPGTrainer(small.vit(), small.config(tmp_path), train_dataset=small.rows(24))
    training.create_model_card(tags=["ipg"])  # as the push does, with the tags of the trainer's class
    text = (tmp_path / "README.md").read_text()
    assert "This model has not been evaluated." in text and "Plain training (ERM), without pairs." in text
    assert ModelCard(text).data.tags is None


def test_a_readme_of_ones_own_stays(tmp_path, caplog):
    training = IPGTrainer(small.vit(), small.config(tmp_path), train_dataset=small.rows(24))
    training.create_model_card(license="mit")
    training.create_model_card(license="cc0-1.0")  # a card of ipg_hf is written again
    card = (tmp_path / "README.md").read_text()
    assert ModelCard(card).data.license == "cc0-1.0"
    mine = card.replace(MARKER, "<!-- mine")
    (tmp_path / "README.md").write_text(mine)
    assert not caplog.records
    training.create_model_card(license="mit")
    assert (tmp_path / "README.md").read_text() == mine
    assert "is not changed" in caplog.text


def test_ipg_card(tmp_path, capsys):
    run = tmp_path / "pets"
    (run / "erm").mkdir(parents=True)
    (run / "run.json").write_text(json.dumps(RECORD))
    assert main(["card", str(run)]) == 0
    alone = capsys.readouterr().out
    assert contradictions(alone, RECORD) == [] and "ERM" not in alone
    (run / "erm" / "run.json").write_text(json.dumps(ERM))
    assert main(["card", str(run), "--name", "me/pets", "--license", "mit"]) == 0
    assert capsys.readouterr().out == str(model_card(RECORD, name="me/pets", erm=ERM, license="mit")) + "\n"
    assert main(["card", str(tmp_path)]) == 2
    assert "holds no run.json" in capsys.readouterr().err
    (run / "run.json").write_text(json.dumps({"config": {}}))
    assert main(["card", str(run)]) == 2
    assert "an earlier version" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["card", str(run), "--licence", "mit"])
