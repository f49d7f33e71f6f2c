# SPDX-License-Identifier: Apache-2.0
"""The pages that people read: their code runs, their links resolve, and what they list is what the code has."""

import dataclasses
import importlib
import io
import re
import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import yaml
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

import ipg_hf.pairs
from ipg_hf import IPGConfig
from ipg_hf.baselines import METHODS
from ipg_hf.bench.suite import load_suite
from ipg_hf.cli import main
from ipg_hf.recipe import MAKERS, Recipe, parse_settings

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
GUIDES = ROOT / "recipes" / "guides"
PAGES = [README, *sorted(path for path in (ROOT / "recipes").rglob("*.md") if "results" not in path.parts)]
HUB_NAME = "google/vit-base-patch16-224"


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def prose(page):
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)


def anchors(page):
    """The anchors that GitHub gives the headings of a page."""
    found = []
    for title in re.findall(r"^#+ (.*)$", prose(page), re.M):
        title = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).replace("`", "").lower()
        anchor = re.sub(r"[^\w\- ]", "", title).replace(" ", "-")
        found.append(anchor if anchor not in found else f"{anchor}-{found.count(anchor)}")
    return found


def table_after(page, heading):
    """The rows of the first table after a heading, without its header; code marks are taken off."""
    text = page.read_text().split(f"\n## {heading}\n", 1)[1]
    lines = re.search(r"(?:^\|.*\n)+", text, re.M).group().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def names_in(cell):
    return re.findall(r"`([^`]+)`", cell)


def links(page):
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)


# ---- Links and length


def test_every_link_of_a_page_resolves():
    local = [(page, link) for page in PAGES for link in links(page) if not link.startswith(("http://", "https://"))]
    assert len(local) > 100
    for page, link in local:
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), (name_of(page), link)
        assert not anchor or anchor in anchors(target), (name_of(page), link)


def test_a_wrong_anchor_is_noticed():
    assert "rules" in anchors(GUIDES / "method.md")
    assert "the-rules" not in anchors(GUIDES / "method.md")


def test_every_file_that_a_page_names_is_there():
    for page in PAGES:
        for path in re.findall(r"\b((?:ipg_hf|recipes|tests)/[\w./-]*\w)", page.read_text()):
            assert (ROOT / path).exists(), (name_of(page), path)


def test_every_guide_is_linked_from_the_readme():
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links(README) if not link.startswith("http")}
    assert {*GUIDES.glob("*.md"), ROOT / "recipes" / "README.md", ROOT / "recipes" / "findings.md"} <= linked


def test_the_readme_is_short():
    assert len(README.read_text().split()) <= 1100


def test_the_findings_are_short():
    words = [word for word in (ROOT / "recipes" / "findings.md").read_text().split() if re.search("[a-z]", word, re.I)]
    assert len(words) <= 2750


def test_the_readme_has_the_two_commands_of_a_newcomer():
    lines = [line for block in blocks(README, "bash") for line in block.splitlines()]
    assert "pip install . && ipg train --config recipes/digits/ipg_resnet.yaml --compare erm" in lines
    assert 'pip install ".[test]" && python -m pytest -n 2 -q' in lines


def test_equations_have_nothing_that_markdown_takes_for_its_own():
    equations = [found for page in PAGES for found in re.findall(r"\$\$(.+?)\$\$", page.read_text(), re.S)]
    assert len(equations) > 5
    for equation in equations:
        assert not re.search(r"\\[^a-zA-Z ]|\*", equation), equation
        assert equation.count("{") == equation.count("}"), equation


# ---- Code


@pytest.fixture
def hub_names(monkeypatch):
    """A tiny model stands in for the one that the pages name on the Hub."""

    def model(name, num_labels=2, **kwargs):
        assert name == HUB_NAME and kwargs["output_loading_info"]
        size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        made = ViTForImageClassification(ViTConfig(**size, image_size=16, patch_size=8, num_labels=num_labels))
        return made, {"missing_keys": set(), "mismatched_keys": set()}

    def processor(name):
        assert name == HUB_NAME
        return ViTImageProcessor(size={"height": 16, "width": 16})

    monkeypatch.setattr(AutoModelForImageClassification, "from_pretrained", model)
    monkeypatch.setattr(AutoImageProcessor, "from_pretrained", processor)


def run_blocks(page):
    """Runs the Python blocks of a page in their order; returns the names that they define and what they print."""
    names, printed = {}, io.StringIO()
    for number, code in enumerate(blocks(page, "python")):
        code = code.replace("num_train_epochs=3", "max_steps=4").replace("logging_steps=10", "logging_steps=2")
        with redirect_stdout(printed):
            exec(compile(code, f"{page.name}, block {number + 1}", "exec"), names)
    return names, printed.getvalue()


@pytest.mark.parametrize("page", [page for page in PAGES[1:] if blocks(page, "python")], ids=name_of)
def test_the_code_of_a_page_runs(page, hub_names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_blocks(page)


def test_the_code_of_the_readme_prints_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, printed = run_blocks(README)
    documented = dict(re.findall(r"^(worst group|flip rate) (\S+)$", blocks(README, "text")[0], re.M))
    found = dict(re.findall(r"^(worst group|flip rate) (\S+)$", printed, re.M))
    assert {*documented} == {*found} == {"worst group", "flip rate"}
    for name, value in documented.items():  # another processor rounds otherwise, which is as much as another seed
        assert float(found[name]) == pytest.approx(float(value), abs=0.05), name


def test_every_command_of_a_page_has_known_flags_and_files(capsys):
    lines = [line for page in PAGES for line in "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()]
    found = [
        re.search(r"(?:\bipg|ipg_hf\.cli) (train|evaluate|pairs|scan|heads|card|bench)\b.*", line) for line in lines
    ]
    commands = [shlex.split(match.group(), comments=True) for match in found if match]
    assert {words[1] for words in commands} == {"train", "evaluate", "pairs", "scan", "heads", "card", "bench"}
    settings = {field.name for kind in (Recipe, IPGConfig) for field in dataclasses.fields(kind)}
    for words in commands:
        with pytest.raises(SystemExit):
            main([words[1], "--help"])
        known = {*re.findall(r"--(\w+)", capsys.readouterr().out), *settings}
        for word, value in zip(words, [*words[1:], ""], strict=True):
            assert not word.startswith("--") or word[2:] in known, words
            is_shown = any(f"`{value}`:\n\n```yaml" in page.read_text() for page in PAGES)  # the reader writes it
            is_shown |= any(f"--write_recipe {value}" in page.read_text() for page in PAGES)  # a command writes it
            assert word != "--config" or (ROOT / value).is_file() or is_shown, words
        assert words[1] != "bench" or (ROOT / words[2]).is_file(), words


def test_every_yaml_of_a_page_is_valid(tmp_path):
    for block in [block for page in PAGES for block in blocks(page, "yaml")]:
        given = yaml.safe_load(block)
        if "methods" in given:
            given["recipe"] = str(ROOT / "recipes" / "suites" / given["recipe"])
            (tmp_path / "suite.yaml").write_text(yaml.safe_dump(given))
            load_suite(tmp_path / "suite.yaml")
        else:
            parse_settings({"output_dir": "out", **given}, title="a page")


# ---- Numbers


@pytest.fixture
def page_tables(monkeypatch):
    """The script that makes the tables of the pages."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes" / "scripts"))
    monkeypatch.delitem(sys.modules, "page_tables", raising=False)
    return importlib.import_module("page_tables")


def test_the_numbers_of_the_pages_are_those_of_the_records(page_tables):
    for page in page_tables.PAGES:
        text = page.read_text()
        assert "<!-- numbers: " in text
        assert page_tables.rendered(text) == text, page
    assert page_tables.rendered(re.sub(r"\d\.\d{3}", "0.111", text)) == text  # whatever stands there is made anew


def test_every_table_that_the_script_makes_is_on_a_page(page_tables):
    text = "".join(page.read_text() for page in page_tables.PAGES)
    assert set(re.findall(r"<!-- numbers: (\w+) -->", text)) == {function.__name__ for function in page_tables.TABLES}


def test_a_cell_has_an_arrow_where_the_interval_of_the_difference_excludes_zero(page_tables, monkeypatch):
    def row(*scores):
        return {seed: {"metrics": {"test": {"worst_group_accuracy": score}}} for seed, score in enumerate(scores)}

    found = {
        "ipg": row(0.5, 0.6, 0.7),
        "better": row(0.68, 0.8, 0.92),  # differences .18, .20, .22: ±4.30 · .02 / √3 = ±.05 around .20
        "wider": row(0.6, 0.8, 1.0),  # differences .1, .2, .3: ±.25 around .20
        "worse": row(0.32, 0.4, 0.48),
        "one": row(0.1),
    }
    monkeypatch.setattr(page_tables, "runs", lambda collection: found)
    assert page_tables.cell("any", "better", "ipg") == "0.800 ± 0.120 ↑"
    assert page_tables.cell("any", "wider", "ipg") == "0.800 ± 0.200"
    assert page_tables.cell("any", "worse", "ipg") == "0.400 ± 0.080 ↓"
    assert page_tables.cell("any", ("missing", "ipg"), "ipg") == "0.600 ± 0.100"
    assert page_tables.cell("any", "one", "ipg") == "0.100"
    assert page_tables.cell("any", "missing", "ipg") == "-"


def test_what_the_findings_say_of_the_methods_holds(page_tables):
    def arrows(collections, row, reference=page_tables.OUTPUTS):
        return [page_tables.cell(name, row, reference)[-1] for name in collections]

    def steady(marks):
        return not {"↑", "↓"} & {*marks}

    tuned = ["methods_digits", "methods_colored_mnist", "methods_scenes_100", "methods_scenes_95"]
    speed = ["speed_digits", "speed_colored_mnist", "speed_scenes_100"]
    assert steady(arrows(tuned, "kl"))
    assert arrows(tuned, "group_dro") == ["↓"] * 4
    assert "↑" not in [mark for row in ("ipg_paper", "ipg_pair") for mark in arrows(tuned, row)]
    assert arrows(tuned[:2], "augmentation") == ["↓", "↓"]
    assert arrows(tuned[3:], "augmentation") == ["↑"]
    assert steady(arrows(speed, "ipg_outputs_violated_every_4th"))
    assert arrows(speed[1:], "ipg_outputs_every_4th") == ["↓", "↓"]
    assert arrows(["few_pairs_long"], "kl") == ["↓"]
    assert steady(arrows(speed, "ipg_outputs_quarter")) and arrows(["scenes_dinov2"], "ipg_quarter", "ipg") == ["↓"]
    for row in ("augmentation", "kl", "ipg_paper", "dfr"):
        assert arrows(["scenes_dinov2"], row, "ipg") == ["↓"], row
    for row in ("reweight", "group_dro", "dfr"):
        assert arrows(["scenes_95_dinov2"], row, "ipg") == ["↓"], row
    for variant in ("lora", "small", "tokens"):
        assert arrows(["variants_scenes"], f"ipg_dinov2-{variant}", "scenes_dinov2:ipg") == ["↓"], variant
    every_4th = ["variants_colored_mnist"], "ipg_mlp-every_4th_large"
    assert arrows(*every_4th, "ipg_mlp-every_4th") == ["↑"] and arrows(*every_4th, "colored_mnist:ipg_mlp") == ["↓"]
    assert arrows(["transfer_digits"], "augmentation_schedule", "digits:ipg_resnet") == ["↓"]
    for name, network in (("digits", "resnet"), ("colored_mnist", "mlp"), ("scenes", "lite0")):  # without a tuning
        suite = {"scenes": "transfer_scenes_100"}.get(name, f"transfer_{name}")
        assert steady(arrows([name], f"ipg_unlabelled_{network}", f"ipg_{network}")), name
        assert steady(arrows([name], f"ipg_unlabelled_{network}", f"ipg_outputs_{network}")), name
        assert arrows([suite], ("kl_schedule", "kl"), f"{name}:ipg_{network}")[0] != "↑", name
    lowest = {
        row: float(page_tables.lowest("stability_scenes_100", row))
        for row in ("ipg_outputs", "ipg_outputs_decay", "ipg_outputs_schedule")
    }
    assert lowest["ipg_outputs"] == lowest["ipg_outputs_decay"] == 0 < lowest["ipg_outputs_schedule"]


def test_what_the_findings_say_of_planted_shortcuts_holds(page_tables):
    lines = page_tables.planted_marks().splitlines()[2:]
    cells = {line.split(" | ")[0].lstrip("| "): [cell.strip(" |") for cell in line.split(" | ")[1:]] for line in lines}
    ranks = {(name, at): row[at] for name, row in cells.items() for at in (1, 3) if row[at] != "-"}
    assert [place for place, rank in ranks.items() if rank != "1"] == [("grey", 1)] and ranks["grey", 1] == "2"
    assert {row[5] for row in cells.values()} == {"nothing", "-"} and len(ranks) == 23
    marks = ("ruler", "date", "logo", "frame", "glare")
    assert all(float(cells[name][4]) > 0.8 > float(cells[name][0]) for name in marks)
    assert all(float(cells[name][4]) < 0.1 for name in ("jpeg", "blur", "grey"))


def test_no_result_stands_in_the_prose_of_the_findings():
    text = re.sub(r"<!-- numbers: .*?<!-- end -->", "", (ROOT / "recipes" / "findings.md").read_text(), flags=re.S)
    assert not re.findall(r"(?<![\w.])0?\.\d{2,}", text)


# ---- What the pages list


def test_the_guide_lists_every_setting_with_its_default():
    rows = {
        names_in(row[0])[0]: yaml.safe_load(names_in(row[1])[0])
        for row in table_after(GUIDES / "training.md", "Settings")
    }
    inherited = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    own = {
        field.name: field.default
        for field in dataclasses.fields(IPGConfig)
        if field.name not in inherited or inherited[field.name] is not field.default
    }
    assert {name: None if value == "None" else value for name, value in rows.items()} == own


def test_the_guide_lists_what_the_trainer_logs(hub_names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = run_blocks(GUIDES / "training.md")[0]["trainer"]
    logged = {key for entry in trainer.state.log_history for key in entry if key.startswith("ipg/")}
    assert logged == {names_in(row[0])[0] for row in table_after(GUIDES / "training.md", "What is logged")}


def test_the_guide_lists_every_maker():
    rows = table_after(GUIDES / "pairs.md", "Make pairs")
    functions = {names_in(row[0])[0] for row in rows}
    made = {name for name in ipg_hf.pairs.__all__ if name.startswith("pairs_from") or name.endswith("_pairs")}
    made -= {"check_pairs", "preview_pairs", "score_pairs", "extend_pairs", "mix_pairs"}
    assert functions == made | {"AdversarialPairs"}
    assert {name for row in rows for name in names_in(row[1])} == {*MAKERS}


def test_the_guide_names_every_method():
    text = (GUIDES / "training.md").read_text().split("\n## Other methods\n")[1]
    assert {*METHODS} <= {*names_in(text)}


def test_the_guide_has_every_rule_that_a_comment_cites():
    rules = re.findall(r"^- \*\*(R\d+), ", (GUIDES / "method.md").read_text(), re.M)
    assert rules == [f"R{number}" for number in range(1, 13)]
    for path in (ROOT / "ipg_hf").rglob("*.py"):
        assert {*re.findall(r"\bR\d+\b", path.read_text())} <= {*rules}, path


def test_the_settings_of_the_papers_method_are_those_that_the_guide_says():
    rows = table_after(GUIDES / "method.md", "The paper's method and the default")
    names = {}
    exec(blocks(GUIDES / "method.md", "python")[1], names)
    default = IPGConfig("out")
    for setting, paper, ours in ((names_in(row[0])[0], row[1], row[2]) for row in rows):
        assert str(getattr(default, setting)) in names_in(ours)[0].strip('"'), setting
        if names_in(paper):
            assert str(getattr(names["args"], setting)) == names_in(paper)[0].strip('"'), setting
