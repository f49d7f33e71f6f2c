# SPDX-License-Identifier: Apache-2.0
"""Every shipped recipe is read, every published figure has its record."""

import importlib.util
import inspect
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

from ipg_hf.bench.figures import guided_courses
from ipg_hf.bench.suite import load_suite
from ipg_hf.bench.tables import comma_separated, standings
from ipg_hf.config import IPGConfig
from ipg_hf.data import LOADERS
from ipg_hf.recipe import MAKERS, parse_recipe

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
TRAINING = sorted(path for path in RECIPES.rglob("*.yaml") if path.parent.name not in ("accelerate", "suites"))
SUITES = sorted(RECIPES.glob("suites/*.yaml"))
QUESTIONS = [
    "interval_colored_mnist",
    "interval_digits",
    "num_pairs",
    "scaling_colored_mnist",
    "scaling_digits",
    "sensitivity_colored_mnist",
    "sensitivity_digits",
    "sensitivity_scenes_100",
]
WITHOUT_ERM = {"few_pairs_long": "kl", "scaling_scenes_100": "adaptive"}  # suite -> what its differences are taken to
RECORDS = sorted(RECIPES.glob("*/results/*.json"))
SUITE_RECORDS = sorted(RECIPES.glob("suites/results/*/*.json"))
REPEATS = sorted(path.relative_to(RECIPES / "suites/repeats") for path in RECIPES.glob("suites/repeats/*/*.json"))


def script(name):
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_recipes_are_all_found():
    assert len(TRAINING) == 45
    assert {path.parent.name for path in TRAINING} == {
        "digits",
        "colored_mnist",
        "marked_digits",
        "stroke_mass",
        "scenes",
        "waterbirds",
        "celeba",
    }
    benchmarks = ["colored_mnist", "digits", "scenes_100"]
    comparisons = [*benchmarks, "scenes_95", "few_pairs", "norm_colored_mnist", "makers_scenes_95"]
    comparisons += ["few_pairs_long", "few_pairs_tuned", "scaling_scenes_100", "stability_scenes_100"]
    comparisons += [f"{kind}_{name}" for name in benchmarks for kind in ("transfer", "speed")]
    assert [path.stem for path in SUITES] == sorted([*QUESTIONS, *comparisons])


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_is_valid_and_says_how_it_is_launched(path):
    recipe, args, given = parse_recipe(str(path))
    assert recipe.dataset == {"scenes": "files"}.get(path.parent.name, path.parent.name)
    assert recipe.method == ("erm" if path.stem.startswith(("erm", "jtt")) else "ipg")
    assert args.metric_for_best_model == (
        "worst_group_mae" if recipe.dataset == "stroke_mass" else "worst_group_accuracy"
    )
    assert args.greater_is_better is (recipe.dataset != "stroke_mass") and args.load_best_model_at_end
    assert given["output_dir"] == f"outputs/{path.parent.name}-{path.stem}".replace("_", "-")
    head = path.read_text().splitlines()
    assert head[0].startswith(f"# ipg train --config recipes/{path.parent.name}/{path.name}")
    # what has records says what to expect, what has none says so
    ran = any(record.stem.rsplit("-seed", 1)[0] == path.stem for record in path.parent.glob("results/*.json"))
    says = "\n".join(line for line in head[1:4] if line.startswith("#"))
    assert ("xpected" in says) is ran and ("# Not run here: " in says) is not ran
    assert ran or "has been run here: there are no records" in (path.parent / "README.md").read_text()


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_options_of_a_recipe_are_arguments(path):
    """Of its loader and of the makers of its pairs; what was not run here has no other proof of it."""
    recipe, _, _ = parse_recipe(str(path))
    assert {*recipe.dataset_options} <= {*inspect.signature(LOADERS[recipe.dataset]).parameters}
    for options in [recipe.pairs] if "maker" in recipe.pairs else recipe.pairs.values():
        known = {*inspect.signature(MAKERS[options["maker"]]).parameters}
        assert {*options} - {"maker"} <= known


@pytest.mark.parametrize("path", [p for p in TRAINING if "_default_" in p.stem], ids=lambda path: path.stem)
def test_a_recipe_of_the_defaults_departs_from_none(path):
    """Of the pairs and of the schedule; the learning rate, the batch and the norm are the benchmark's."""
    _, args, _ = parse_recipe(str(path))
    own = {field.name for field in fields(IPGConfig)} - {field.name for field in fields(TrainingArguments)}
    benchmark = {"per_device_pair_batch_size", "freeze_norm"}
    default = IPGConfig("out")
    for name in [*sorted(own - benchmark), "warmup_steps", "lr_scheduler_type", "optim"]:
        assert getattr(args, name) == getattr(default, name), name


FROM_SCRATCH = [path for path in TRAINING if "model_type" in yaml.safe_load(path.read_text())]


@pytest.mark.parametrize("path", FROM_SCRATCH, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_builds_its_model(path):
    elsewhere = ["--dataset", "digits", "--dataset_options", "{}", "--pairs", "{}"]
    recipe, _, _ = parse_recipe(str(path), elsewhere)
    recipe.pair_sets = None
    data = recipe.load_data(0)
    assert recipe.build_model(data.train).config.id2label == {0: "small", 1: "large"}
    assert recipe.build_processor().size == {"height": 16, "width": 16} or recipe.model_type != "resnet"


@pytest.mark.parametrize(
    ("ablation", "of", "change"),
    [
        ("colored_mnist/ablation_no_scaling_mlp", "ipg_mlp", {"invariance_threshold": float("inf")}),
        ("colored_mnist/ablation_separate_states_mlp", "ipg_mlp", {"shared_optimizer_state": False}),
        ("colored_mnist/ablation_unoriented_mean_mlp", "ipg_mean_mlp", {"oriented_pairs": False}),
        ("digits/ablation_free_norm_resnet", "ipg_resnet", {"freeze_norm": False}),
        ("digits/ablation_alpha_3_resnet", "ipg_resnet", {"alpha": 3.0}),
        ("digits/ipg_mean_resnet", "ipg_resnet", {"rationale_reduction": "mean"}),
        ("digits/erm_dfr_resnet", "erm_resnet", {"last_layer": {"method": "dfr"}}),
        ("digits/erm_project_resnet", "erm_resnet", {"last_layer": {"method": "project", "rank": 1}}),
        ("digits/jtt_resnet", "erm_resnet", {"repeat_errors": {"steps": 1, "factor": 20}}),
    ],
)
def test_an_ablation_changes_one_thing(ablation, of, change):
    path = RECIPES / f"{ablation}.yaml"
    changed, whole = (yaml.safe_load(p.read_text()) for p in (path, path.with_name(f"{of}.yaml")))
    del changed["output_dir"], whole["output_dir"]
    assert changed == whole | change and changed != whole


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_belongs_to_its_recipe(path):
    record = json.loads(path.read_text())
    name, seed = path.stem.rsplit("-seed", 1)
    assert record["seed"] == int(seed)
    assert record["commit"] and not record["commit"].endswith("-dirty")
    assert {"config", "metrics", "seconds", "versions", "hardware"} <= set(record)
    _, _, given = parse_recipe(str(path.parent.parent / f"{name}.yaml"))
    own = {"seed", "output_dir", "overwrite_output_dir", "about"}  # the last is for the card alone
    if path.parent.parent.name == "scenes":
        own |= {"model_name_or_path"}  # a folder with the weights that the recipe names
    assert {k: v for k, v in record["config"].items() if k not in own} == {
        k: v for k, v in given.items() if k not in own
    }
    assert not any(text.startswith("/") for text in record["config"].values() if isinstance(text, str))


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_a_suite_is_valid_and_its_files_are_those_of_its_records(path):
    suite = load_suite(path)  # every method, draw and point of a grid is parsed
    assert path.read_text().startswith(f"# ipg bench recipes/suites/{path.name}")
    assert bool(suite.grid) is (path.stem in QUESTIONS)
    assert suite.grid or suite.references[0] == WITHOUT_ERM.get(path.stem, "erm")
    assert suite.methods.get("erm", {"method": "erm"})["method"] == "erm"
    assert suite.base["load_best_model_at_end"] is not path.stem.startswith("stability")  # which is of last states
    assert suite.base["metric_for_best_model"].startswith("worst_group")
    found = standings(suite)  # refuses records of other settings, and of no run of the suite
    assert f"<!-- suite: {path.stem} -->" in (RECIPES / "README.md").read_text()
    if any(standing.records for standing in found):
        table = f"# {script('table').suite_table(path.stem)}\n"
        assert (suite.results / "table.md").read_text() == table
        assert (suite.results / "table.csv").read_text() == comma_separated(suite, found)
        assert (suite.results / "figure.png").exists()
        assert (suite.results / "cost.png").exists() is not bool(suite.grid)
        assert (suite.results / "course.png").exists() is bool(guided_courses(suite, found) and not suite.grid)


def test_the_defaults_are_what_was_measured_on_all_benchmarks():
    suites = [load_suite(path) for path in SUITES if path.stem.startswith("transfer_")]
    assert len(suites) == 3
    for suite in suites:
        measured = suite.methods["root"]
        assert set(measured) == {"invariance_distance", "max_loss_scale", "alpha", "invariance_threshold"}
        assert measured == {name: getattr(IPGConfig, name) for name in measured}
        (found,) = [standing for standing in standings(suite) if standing.name == "root"]
        assert len(found.records) == len(suite.seeds)


def test_no_record_names_a_folder_of_the_machine_that_made_it():
    for path in RECIPES.rglob("*.json"):
        config = json.loads(path.read_text()).get("config", {})
        assert not [value for value in config.values() if str(value).startswith("/")], path


@pytest.mark.parametrize("path", SUITE_RECORDS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_record_of_a_suite_says_what_made_it(path):
    record = json.loads(path.read_text())
    assert record["commit"] and not record["commit"].endswith("-dirty")
    assert ("test" in record["metrics"]) == ("-seed" in path.stem)
    assert not any(text.startswith("/") for text in record["config"].values() if isinstance(text, str))
    assert (RECIPES / "suites" / f"{path.parent.name}.yaml").exists()


@pytest.mark.parametrize("path", REPEATS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_repeated_run_is_its_record_again_and_names_the_processor(path):
    repeat, record = (json.loads((RECIPES / "suites" / kind / path).read_text()) for kind in ("repeats", "results"))
    assert repeat["hardware"]["cpu"] and "cpu" not in record["hardware"]
    for run in (repeat, record):
        run["config"].pop("output_dir", None)
    for key in ("config", "seed", "metrics", "course", "chosen_step", "versions", "data"):
        assert repeat[key] == record[key], key


@pytest.mark.parametrize("page", script("table").PAGES, ids=lambda page: str(page.relative_to(RECIPES.parent)))
def test_the_tables_are_those_of_the_records(page):
    text = page.read_text()
    assert script("table").rendered(text) == text
    for dataset in ("digits", "colored_mnist"):
        assert f"<!-- table: {dataset}" in text
    for name in ("pair_quality", "readability"):
        assert script(name).rendered(text) == text


def test_a_row_by_hand():
    runs = [
        {"metrics": {"test": {"accuracy": a, "worst_group_accuracy": a / 2, "flip_rate": 0.5}}, "seconds": 10}
        for a in (0.8, 0.6)
    ]
    # mean .7, sd = sqrt((.1² + .1²) / 1) = .141; halves for the worst group
    table = script("table")
    assert (
        table.row("x", runs, table.CLASSES)
        == "| `x` | 2 | 0.700 ± 0.141 | 0.350 ± 0.071 | 0.300 | 0.500 ± 0.000 | 10 |"
    )


def test_the_launchers_page_names_tests_that_exist_and_the_recorded_memory():
    page = (RECIPES / "accelerate/README.md").read_text()
    named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", page)
    assert len(named) >= 8
    for file, name in named:
        text = (RECIPES.parent / "tests" / file).read_text()
        assert not name or f"def {name}(" in text, name
    measured = json.loads((RECIPES / "bench/pair_memory.json").read_text())["mebibytes"]
    for pairs, row in measured.items():
        assert f"| {pairs} | {row['whole']:.0f} MiB | {row['chunked']:.0f} MiB |" in page
    assert measured["512"]["chunked"] < 1.5 * measured["32"]["chunked"]


def test_the_front_page_has_the_recorded_seconds_of_the_linter():
    record = json.loads((RECIPES / "bench/pair_check.json").read_text())
    seconds = {kind: f"{measured['seconds']:.0f} s" for kind, measured in record["kinds"].items()}
    page = (RECIPES.parent / "README.md").read_text()
    assert f"{record['pairs']:,} pairs of {record['pixels']} pixels take {seconds['JPEG']} as JPEG and" in page
    assert f"and {seconds['PNG']} as PNG on two cores" in page
    assert record["hardware"]["cpus"] == 2
