# SPDX-License-Identifier: Apache-2.0
"""Every shipped recipe and suite is read; every published figure is made of records; records stay as they are."""

import hashlib
import inspect
import json
import re
import sys
from collections import Counter
from dataclasses import fields
from functools import cache
from pathlib import Path
from statistics import fmean, stdev

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from small import RATE, SIZE, descending, pairs, trainer
from small_suite import TINY
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    TrainingArguments,
)

from ipg_hf import IPGTrainer
from ipg_hf.baselines import METHODS
from ipg_hf.bench.figures import guided_records
from ipg_hf.bench.suite import load_suite
from ipg_hf.bench.tables import paired_difference, suite_rows
from ipg_hf.config import IPGConfig
from ipg_hf.data import LOADERS
from ipg_hf.pairs import pairs_from_table
from ipg_hf.pairs.exchanging import BOXES, region
from ipg_hf.recipe import MAKERS, MASKED, parse_recipe, parse_settings
from ipg_hf.record import NOT_RECORDED, read_records, resolved_settings
from ipg_hf.run import train
from ipg_hf.step import GuidedStep

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
RECORDS, RESULTS = RECIPES / "records", RECIPES / "results"
DATASETS = ("celeba", "colored_mnist", "cue_conflict", "digits", "marked_digits", "scenes", "stroke_mass", "waterbirds")
TRAINING = sorted(path for name in DATASETS for path in (RECIPES / name).rglob("*.yaml"))
SUITES = sorted(RECIPES.glob("suites/*.yaml"))
NAMES = yaml.safe_load((RECIPES / "names.yaml").read_text())
# suite -> what its differences are taken to, where that is not plain training
REFERENCES = {"few_pairs_long": "kl", "scaling_scenes_100": "ipg_outputs"}
# asked over a grid
QUESTIONS = ("extended_pairs", "interval_", "num_pairs", "scaling_colored_mnist", "scaling_digits", "sensitivity_")
MEASURED = ("mask_quality", "planted")  # collections of records that are not those of a recipe's training
# of the records that were made from old files
UNTOUCHED = ("seed", "metrics", "chosen_step", "steps", "course", "seconds", "versions", "commit", "hardware")


def title(path):
    return f"{path.parent.name}/{path.stem}"


@cache
def parsed(path):
    return parse_recipe(str(path))


@cache
def records(collection):
    return read_records(RECORDS / f"{collection}.jsonl")


@cache
def suite(name):
    read = load_suite(RECIPES / "suites" / f"{name}.yaml")  # every method, draw and point of a grid is parsed
    return read, suite_rows(read)  # refuses records of other settings, and of no run of the suite


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES / "scripts"))
    for name in (
        "table",
        "seeds",
        "run",
        "mask_quality",
        "pair_quality",
        "planted",
        "readability",
        "checkpoints",
        "variants",
    ):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import table

    return table


# ---- Recipes


def test_all_files_are_found():
    assert len(TRAINING) == 59 and len(SUITES) == 35
    assert {path.parent.name for path in TRAINING} == {*DATASETS}
    others = {path.relative_to(RECIPES).as_posix() for path in RECIPES.rglob("*.yaml")} - {
        path.relative_to(RECIPES).as_posix() for path in [*TRAINING, *SUITES]
    }
    assert others == {"names.yaml", "accelerate/cpu_2.yaml", "accelerate/fsdp2.yaml"}


def test_every_recipe_is_valid_and_says_how_it_is_launched_and_what_to_expect():
    for path in TRAINING:
        recipe, args, given = parsed(path)
        of_files = path.parent.name in ("scenes", "cue_conflict") or path.stem == "ipg_match_balanced_lite0"
        assert recipe.dataset == ("files" if of_files else path.parent.name)
        metric = "worst_group_mae" if recipe.dataset == "stroke_mass" else "worst_group_accuracy"
        metric = "pair_accuracy" if "found_masks" in path.stem else metric  # that recipe knows no group
        assert args.metric_for_best_model == metric and args.load_best_model_at_end, path
        assert args.greater_is_better is (metric != "worst_group_mae")
        assert args.output_dir == f"outputs/{path.parent.name}-{path.stem}".replace("_", "-")
        assert "output_dir" in given
        head = path.read_text().splitlines()
        assert head[0].startswith(f"# ipg train --config recipes/{title(path)}.yaml"), path
        # what has records says what to expect, what has none says so
        ran = any(record["run"].startswith(f"{path.stem}-seed") for record in records(path.parent.name))
        says = "\n".join(line for line in head[1:4] if line.startswith("#"))
        assert ("xpected" in says) is ran and ("# Not run here: " in says) is not ran, path
        assert ran or "there are no records" in (path.parent / "README.md").read_text()
        # options of its loader and of the makers of its pairs; what was not run here has no other proof of them
        assert {*recipe.dataset_options} <= {*inspect.signature(LOADERS[recipe.dataset]).parameters}, path
        for options in [recipe.pairs] if "maker" in recipe.pairs else recipe.pairs.values():
            own = {"maker", "segmenter"} if options["maker"] in MASKED else {"maker"}
            assert {*options} - own <= {*inspect.signature(MAKERS[options["maker"]]).parameters}, path


def test_a_header_has_the_numbers_of_the_records():
    """Mean and spread of the worst group, with three digits, and the number of seeds."""
    checked = 0
    for path in TRAINING:
        head = "\n".join(line for line in path.read_text().splitlines()[1:4] if line.startswith("#"))
        found = re.search(r"worst[ -]group (?:error )?(\d\.\d+)(?: ± (\d\.\d+))? \((\d+) seeds?\)", head)
        if not found:
            continue
        runs = [record for record in records(path.parent.name) if record["run"].rsplit("-seed", 1)[0] == path.stem]
        metric = "worst_group_mae" if "stroke_mass" in str(path) else "worst_group_accuracy"
        values = [run["metrics"]["test"][metric] for run in runs]
        spread = f"{stdev(values):.3f}" if len(values) > 1 else None
        assert (found[1], found[2], int(found[3])) == (f"{fmean(values):.3f}", spread, len(values)), path
        checked += 1
    assert checked >= 30


def test_a_recipe_of_the_defaults_departs_from_none():
    """Of the pairs and of the schedule; the learning rate, the batch and the norm are the benchmark's."""
    own = {field.name for field in fields(IPGConfig)} - {field.name for field in fields(TrainingArguments)}
    benchmark = {"per_device_pair_batch_size", "freeze_norm"}
    default = IPGConfig("out")
    for name in ("digits/ipg_resnet", "colored_mnist/ipg_mlp"):
        _, args, _ = parsed(RECIPES / f"{name}.yaml")
        for setting in [*sorted(own - benchmark), "warmup_steps", "lr_scheduler_type", "optim"]:
            assert getattr(args, setting) == getattr(default, setting), (name, setting)


def test_every_recipe_from_scratch_builds_its_model():
    elsewhere = ["--dataset", "digits", "--dataset_options", "{}", "--pairs", "{}"]
    built = Counter()
    for path in TRAINING:
        if parsed(path)[0].model_type is None:
            continue
        recipe, _, _ = parse_recipe(str(path), elsewhere)
        recipe.pair_sets = None
        shape = (recipe.model_type, json.dumps(recipe.model_config))
        built[shape] += 1
        if built[shape] > 1:  # the same network once more
            continue
        data = recipe.load_data(0)
        assert recipe.build_model(data.train).config.id2label == {0: "small", 1: "large"}
        assert recipe.build_processor().size == {"height": 16, "width": 16} or recipe.model_type != "resnet"
    assert sum(built.values()) >= 35 and len(built) == 4


@pytest.mark.parametrize(
    ("ablation", "of", "change"),
    [
        ("colored_mnist/ablation_no_scaling_mlp", "ipg_pair_mlp", {"invariance_threshold": float("inf")}),
        (
            "colored_mnist/ablation_separate_states_mlp",
            "ipg_pair_mlp",
            {"method": "ablation", "shared_optimizer_state": False},
        ),
        ("colored_mnist/ablation_unoriented_mean_mlp", "ipg_paper_mlp", {"oriented_pairs": False}),
        ("digits/ablation_free_norm_resnet", "ipg_pair_resnet", {"freeze_norm": False}),
        ("digits/ablation_alpha_3_resnet", "ipg_pair_resnet", {"alpha": 3.0}),
        ("digits/ipg_paper_resnet", "ipg_pair_resnet", {"rationale_reduction": "mean"}),
        ("digits/dfr_resnet", "erm_resnet", {"method": "dfr"}),
        ("digits/project_resnet", "erm_resnet", {"method": "project", "rank": 1}),
        ("digits/jtt_resnet", "erm_resnet", {"method": "jtt", "first_steps": 1, "upweight": 20}),
    ],
)
def test_an_ablation_changes_one_thing(ablation, of, change):
    path = RECIPES / f"{ablation}.yaml"
    changed, whole = (yaml.safe_load(p.read_text()) for p in (path, path.with_name(f"{of}.yaml")))
    del changed["output_dir"], whole["output_dir"]
    assert changed == whole | change and changed != whole


# ---- Names


def meaning(name):
    """The settings that a name stands for, by the table of names."""
    method = max((key for key in NAMES["methods"] if f"{name}_".startswith(f"{key}_")), key=len)
    found, rest = dict(NAMES["methods"][method]), name.removeprefix(method)
    while rest:
        known = NAMES["additions"] | NAMES["networks"]
        part = max((key for key in known if f"{rest}_".startswith(f"_{key}_")), key=len, default=None)
        assert part, f"{name}: {rest} is not in the table"
        found |= known[part]
        rest = rest.removeprefix(f"_{part}")
    return found


def agrees(wanted, value):
    if wanted == "given":
        return value not in (None, {}, [])
    if isinstance(wanted, dict):
        return isinstance(value, dict) and all(agrees(part, value.get(key)) for key, part in wanted.items())
    return wanted == value


def test_a_name_means_the_same_in_every_recipe_and_suite():
    checked = 0
    for path in TRAINING:
        if title(path) not in NAMES["others"]:
            settings = resolved_settings(*parsed(path)[:2])
            for key, wanted in meaning(path.stem).items():
                assert agrees(wanted, settings[key]), (path, key, settings[key])
            checked += 1
    for path in SUITES:
        read, rows = suite(path.stem)
        for row, changes in read.methods.items():
            settings = resolved_settings(*parse_settings({**read.base, **changes}, title=row)[:2])
            for key, wanted in meaning(row).items():
                assert agrees(wanted, settings[key]) or key in read.grid, (path.stem, row, key, settings[key])
            checked += 1
        for row in rows:  # and so do the records
            for record in row.records.values():
                assert record["method"] == NAMES["methods"].get(row.name, {}).get("method", record["method"])
    assert checked == 54 + sum(len(suite(path.stem)[0].methods) for path in SUITES)


def test_the_table_of_names_is_used_and_a_wrong_row_is_noticed():
    assert {*NAMES["others"]} < {title(path) for path in TRAINING}
    used = [path.stem for path in TRAINING] + [row for path in SUITES for row in suite(path.stem)[0].methods]
    for part in NAMES["additions"]:
        assert any(f"_{part}_" in f"{name}_" for name in used), part
    assert {*NAMES["methods"]} <= {*used} | {name.rsplit("_", 1)[0] for name in used}
    assert meaning("ipg_pair_limited_violated") == {
        **NAMES["methods"]["ipg_pair"], "max_loss_scale": 1.0, "correction_schedule": "violated",
    }  # fmt: skip
    assert not agrees({"maker": "match"}, {"maker": "recolor"}) and not agrees("given", None)
    default = resolved_settings(*parse_settings({}, title="")[:2])
    assert all(agrees(wanted, default[key]) for key, wanted in meaning("ipg").items())
    assert not all(agrees(wanted, default[key]) for key, wanted in meaning("ipg_paper").items())


# ---- Suites


def test_every_suite_is_valid_and_has_its_results():
    incomplete = set()
    for path in SUITES:
        read, rows = suite(path.stem)
        assert path.read_text().startswith(f"# ipg bench recipes/suites/{path.name}")
        assert bool(read.grid) is path.stem.startswith(QUESTIONS), path
        assert read.grid or read.references[0] == REFERENCES.get(path.stem, "erm"), path
        assert read.base["load_best_model_at_end"] is not path.stem.startswith("stability")  # which is of last states
        assert read.base["metric_for_best_model"].startswith("worst_group")
        assert read.records == RECORDS / f"{path.stem}.jsonl" and read.results == RESULTS / path.stem
        expected = {"table.md", "table.csv", "figure.png"} | (set() if read.grid else {"cost.png"})
        expected |= {"guidance.png"} if guided_records(rows) and not read.grid else set()
        assert {file.name for file in read.results.iterdir()} == expected, path
        incomplete |= {(path.stem, row.name) for row in rows if len(row.records) < len(read.seeds)}
    # nothing is left to run but what lost with its first seeds, and some rows of faces with half of the seeds
    lost = {"few_pairs": ("ipg_outputs", "kl", "ipg_outputs_sgd_resnet", "kl_sgd_resnet")}
    matched = ("match_features", "match_random", "match_features_group_dro", "match_features_balanced_group_dro")
    unlabelled = ("unlabelled_match_features", "unlabelled_match_features_group_dro")
    lost["scenes_dinov2"] = ["ipg_paper", "ipg_last_layers"]
    lost["celeba_10k"] = [f"ipg_{name}" for name in (*matched, *unlabelled, "generated", "generated_filtered")]
    assert incomplete == {(name, row) for name, rows in lost.items() for row in rows}


def test_the_defaults_are_what_was_measured_on_all_benchmarks():
    for name in ("colored_mnist", "digits", "scenes_100"):
        read, rows = suite(f"transfer_{name}")
        measured = read.methods["ipg_outputs"]
        assert set(measured) == {"invariance_distance", "max_loss_scale", "alpha", "invariance_threshold"}
        # the distance of these runs is that of the outputs alone; ipg of the recipes has the default
        assert measured == {key: getattr(IPGConfig, key) for key in measured} | {"invariance_distance": "divergence"}
        (found,) = [row for row in rows if row.name == "ipg_outputs"]
        assert len(found.records) == len(read.seeds)
    for dataset, row, seeds in (
        ("digits", "ipg_resnet", 5),
        ("colored_mnist", "ipg_mlp", 10),
        ("scenes", "ipg_lite0", 5),
    ):
        made = [record for record in records(dataset) if record["run"].startswith(f"{row}-seed")]
        assert len(made) == seeds
        keys = [*measured, "pair_loss_weight"]
        assert all(record["settings"][key] == getattr(IPGConfig, key) for record in made for key in keys)


def test_the_tables_are_those_of_the_records(script, monkeypatch):
    monkeypatch.setattr(script, "load_suite", lambda path: suite(path.stem)[0])
    monkeypatch.setattr(script, "suite_rows", lambda read: suite(read.path.stem)[1])
    made = script.tables()
    assert len(made) == 2 * len(SUITES) + 5
    for name, text in made.items():
        assert (RESULTS / name).read_text() == text, name
    assert {path.relative_to(RESULTS).as_posix() for path in RESULTS.rglob("*.md")} == {
        name for name in made if name.endswith(".md")
    }


def test_a_row_of_recipes_by_hand(script):
    runs = [
        {"metrics": {"test": {"accuracy": a, "worst_group_accuracy": a / 2, "flip_rate": 0.5}}, "seconds": 10}
        for a in (0.8, 0.6)
    ]
    # mean .7, sd = sqrt((.1² + .1²) / 1) = .141; halves for the worst group
    row = script.recipe_row("x", runs, ["accuracy", "worst_group_accuracy", "flip_rate"])
    assert row == "| `x` | 2 | 0.700 ± 0.141 | 0.350 ± 0.071 | 0.300 | 0.500 ± 0.000 | 10 |"


# ---- Records


def test_every_record_is_whole_and_names_no_folder():
    places = re.compile(r'"[^"]*(?:/root/|/tmp/|/home/|/work/)')
    for path in sorted(RECORDS.glob("*.jsonl")):
        runs = [record["run"] for record in records(path.stem)]
        assert runs and len({*runs}) == len(runs), path
        for record in records(path.stem):
            place = (path.stem, record["run"])
            assert record["commit"] and not record["commit"].endswith("-dirty"), place
            needed = {"settings", "seed", "seconds", "versions", "hardware"}
            assert needed <= {*record}, place
            if path.stem in MEASURED:
                continue
            assert {"given", "metrics", "base_model", "about"} <= {*record}, place
            method = METHODS[record["method"]]
            settings = record["settings"]
            assert settings["method"] == record["method"] and settings["seed"] == record["seed"], place
            assert {entry.name for entry in fields(method.config)} - {*settings} <= OUTSIDE, place
            assert all(settings[key] == value for key, value in method.settings.items()), place
            assert {*record["given"]} <= {*settings}, place
            assert f"-seed{record['seed']}" in record["run"] or "-draw" in record["run"], place
            assert ("test" in record["metrics"]) is ("-draw" not in record["run"]), place
            assert not any(str(value).startswith("/") for value in settings.values()), place
        assert not places.search(path.read_text()), path


OUTSIDE = {
    *("output_dir", "run_name", "resume_from_checkpoint", "local_rank", "do_train", "do_eval", "do_predict"),
    *(entry.name for entry in fields(TrainingArguments) if entry.name.startswith(("hub_", "trackio_", "push_to_hub"))),
}


def test_every_recipe_has_records_of_its_settings():
    for dataset in ("colored_mnist", "digits", "marked_digits", "scenes", "stroke_mass"):
        for record in records(dataset):
            recipe, args, given = parsed(RECIPES / dataset / f"{record['run'].rsplit('-seed', 1)[0]}.yaml")
            wanted = json.loads(json.dumps(resolved_settings(recipe, args)))
            # the pairs of the records were made before the value that means "has the overlay" had to be named
            for options in wanted["pairs"].values():
                if isinstance(options, dict):
                    options.pop("present", None)
            # defaults of transformers may change, and so may those of a corrective update that there is not
            corrects = recipe.method in ("ipg", "ablation")
            unrelated = {entry.name for entry in fields(TrainingArguments if corrects else IPGConfig)}
            for key in {*wanted} - (unrelated - {*given}) - {"seed"}:
                assert record["settings"][key] in (NOT_RECORDED, wanted[key]), (dataset, record["run"], key)


def test_the_migration_touched_no_metric():
    """The digests were made from the old files (at commit 399d828), whose `ipg` is `ipg_outputs` today."""
    digests = json.loads((RECORDS / "migrated.json").read_text())
    assert sum(entry["records"] for entry in digests.values()) == 2404
    for collection, entry in digests.items():
        kept = [
            [re.sub("^ipg_outputs", "ipg", record["run"]), *(record.get(key) for key in UNTOUCHED)]
            for record in records(collection)[: entry["records"]]  # later records are below
        ]
        assert hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest() == entry["sha256"], collection


def test_a_repeated_run_is_its_record_again_and_names_the_processor():
    compared = 0
    for name in ("methods_scenes_100", "transfer_scenes_100"):
        before = {record["run"]: record for record in records(name)}
        for repeat in records(f"repeats_{name}"):
            record = before[repeat["run"]]
            assert repeat["hardware"]["cpu"] and "cpu" not in record["hardware"]
            for key in ("seed", "metrics", "course", "chosen_step", "versions", "data"):
                assert repeat[key] == record[key], key
            given = {key: repeat["settings"][key] for key in repeat["given"]}
            assert given == {key: record["settings"][key] for key in repeat["given"]}
            compared += 1
    assert compared == 3


# ---- Pages beside them


def test_what_the_findings_say_of_the_choice_of_a_checkpoint_holds():
    held_out = {"digits": 60, "colored_mnist": 4000, "scenes": 192}
    for name, count in held_out.items():
        made = records(f"checkpoints_{name}")
        assert [record["seed"] for record in made] == [0, 1, 2, 3, 4]
        assert {record["data"]["held_out"]["from_training"] for record in made} == {count}
        found = {
            rule: {record["seed"]: record["choices"][rule]["test"]["worst_group_accuracy"] for record in made}
            for rule in made[0]["choices"]
        }
        for rule, values in found.items():
            gap = paired_difference(values, found["worst_group_accuracy"])
            assert gap.low <= 0 <= gap.high, (name, rule)
        recipe = {"digits": "ipg_outputs_resnet", "colored_mnist": "ipg_outputs_mlp", "scenes": "ipg_outputs_lite0"}[
            name
        ]
        whole = {record["seed"]: record["metrics"]["test"]["worst_group_accuracy"] for record in records(name)
                 if record["run"] == f"{recipe}-seed{record['seed']}"}  # fmt: skip
        assert paired_difference(whole, found["worst_group_accuracy"]).low <= 0, name
    means = {rule: fmean(values.values()) for rule, values in found.items()}  # of scenes
    assert {*sorted(means, key=means.get)[:2]} == {"from_validation/flip_rate", "from_training/flip_rate"}


def test_the_launchers_page_names_tests_that_exist_and_the_recorded_memory():
    page = (RECIPES / "guides/distributed.md").read_text()
    for file, name in re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", page):
        text = (RECIPES.parent / "tests" / file).read_text()
        assert not name or f"def {name}(" in text, name
    measured = json.loads((RECIPES / "speed/pair_memory.json").read_text())["mebibytes"]
    assert measured["512"]["chunked"] < 1.5 * measured["32"]["chunked"]


# ---- Scripts


@pytest.fixture
def elsewhere(script, tmp_path, monkeypatch):
    """The scripts with folders of their own, and a recipe of a few steps."""
    import seeds

    monkeypatch.setattr(seeds, "ROOT", tmp_path)
    monkeypatch.setattr(seeds, "RECORDS", tmp_path / "records")
    path = tmp_path / "digits/tiny.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump({**TINY, "learning_rate": 1e-2}))
    return path


def written(path, collection):
    """The records that a script has written beside a recipe."""
    return read_records(path.parents[1] / "records" / f"{collection}.jsonl")


def test_a_recipe_is_run_once_a_seed(elsewhere):
    import run
    import seeds

    options = seeds.parser("").parse_args([str(elsewhere), "--seeds", "3", "5"])
    for _ in range(2):  # what has a record is not run again
        seeds.for_each(options, run.run)
    found = written(elsewhere, "digits")
    assert [(record["run"], record["seed"]) for record in found] == [("tiny-seed3", 3), ("tiny-seed5", 5)]
    assert found[0]["metrics"] != found[1]["metrics"]


def dinov2():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 1}
    return Dinov2ForImageClassification(Dinov2Config(**sizes, image_size=SIZE, patch_size=4, num_labels=2))


def tokens_of(folder, step):
    """What the blocks get in the one forward of pairs, of which two have equal sides, and in that of images."""
    model, seen = dinov2(), []
    model.dinov2.encoder.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    kind = type("VariantTrainer", (IPGTrainer,), {"step_class": step})
    trainer(folder, model, pair_dataset=pairs(2, same=True), kind=kind, max_steps=1).train()
    return seen[-2:]  # before them the head is looked for


def test_the_pairs_of_a_variant_are_smaller_or_have_fewer_tokens_alike_on_both_sides(script, tmp_path):
    import variants

    whole = 1 + (SIZE // 4) ** 2
    for step, number in ((GuidedStep, whole), (variants.SmallPairs, 1 + 4), (variants.FewTokens, 1 + 4)):
        of_pairs, of_images = tokens_of(tmp_path / step.__name__, step)
        assert of_pairs.shape[:2] == (4, number) and of_images.shape[:2] == (8, whole)
        a, b = of_pairs.chunk(2)
        assert torch.equal(a, b)
    every, few = (tokens_of(tmp_path / name, step)[0] for name, step in (("a", GuidedStep), ("b", variants.FewTokens)))
    places = [[(every[pair] == token).all(-1).nonzero().item() for token in few[pair]] for pair in range(2)]
    assert all(kept[0] == 0 and len({*kept}) == 5 for kept in places) and places[0] != places[1]


def test_a_variant_has_four_times_the_rate_for_the_correction_alone(script, tmp_path):
    import variants

    moves = []
    for step in (GuidedStep, variants.LargeSteps):
        kind = type("VariantTrainer", (IPGTrainer,), {"step_class": step})
        run, around = descending(tmp_path / step.__name__, kind=kind, max_steps=1)
        run.train()
        (before, _), (middle, _) = around.before[0], around.middle[0]
        moves.append({name: middle[name] - before[name] for name in before})
        rates = {group["lr"] for group in run.optimizer.param_groups}
        assert rates == {RATE}
    plain, large = moves
    assert max(move.abs().max() for move in plain.values()) > 1e-4
    for name, move in plain.items():
        assert torch.allclose(large[name], 4 * move, rtol=1e-9, atol=1e-12)


def test_a_variant_learns_adapters_and_the_head_alone(elsewhere):
    import seeds
    import variants

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": SIZE, "patch_size": 4}
    elsewhere.write_text(yaml.safe_dump({**TINY, "model_type": "dinov2", "model_config": sizes}))
    record = variants.made(elsewhere, "lora", 0, elsewhere.parent / "lora")
    recipe, _, _ = seeds.settings(elsewhere, 0, elsewhere.parent / "again")
    kept = {entry.name: getattr(recipe, entry.name) for entry in fields(recipe)}
    model = variants.AdaptedRecipe(**kept).build_model(recipe.load_data(0).train)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name or "classifier.modules_to_save" in name for name in trained)
    assert record["variant"] == "lora" and record["settings"]["learning_rate"] == 1.5e-3


def test_a_variant_is_run_once_and_leaves_the_method_as_it_was(elsewhere):
    import variants

    elsewhere.write_text(yaml.safe_dump({**TINY, "learning_rate": 1e-2, "warmup_steps": 0}))
    trainer_of_the_method = METHODS["ipg"].trainer
    for _ in range(2):
        variants.run(elsewhere, 0, ["every_4th", "every_4th_large"])
    found = written(elsewhere, "variants_digits")
    assert [record["run"] for record in found] == ["tiny-every_4th-seed0", "tiny-every_4th_large-seed0"]
    assert found[0]["settings"] == found[1]["settings"] and found[0]["settings"]["correction_interval"] == 4
    assert found[0]["metrics"] != found[1]["metrics"]
    assert METHODS["ipg"].trainer is trainer_of_the_method


def test_pairs_are_spoiled_for_a_run_and_its_record_says_so(elsewhere, monkeypatch):
    import pair_quality

    monkeypatch.setitem(pair_quality.LEVELS, "mislabelled", (1.0,))
    pair_quality.run(elsewhere, 0, ["mislabelled"])
    clean, spoiled = written(elsewhere, "pair_quality_digits")
    assert [clean["run"], spoiled["run"]] == ["tiny-none-0-seed0", "tiny-mislabelled-1-seed0"]
    assert [run["settings"].pop("degrade_pairs") for run in (clean, spoiled)] == [{}, {"mislabelled": 1.0}]
    assert clean["settings"] == spoiled["settings"] and clean["metrics"] != spoiled["metrics"]


def test_features_are_probed_before_and_after_a_training(elsewhere):
    import readability
    import run

    run.run(elsewhere, 0)
    readability.run(elsewhere, 0)
    (trained,), (record,) = written(elsewhere, "digits"), written(elsewhere, "readability_digits")
    assert record == {**trained, "probes": record["probes"]}  # the training was not made again
    assert record["run"] == "tiny-seed0" and {*record["probes"]} == {"before", "after"}
    assert record["probes"]["before"]["label"] != record["probes"]["after"]["label"]
    published = read_records(RECORDS / "readability_digits.jsonl")[0]
    assert {*published["probes"]["before"]} == {*record["probes"]["before"]}
    elsewhere.write_text(yaml.safe_dump({**TINY, "learning_rate": 1e-3}))
    with pytest.raises(SystemExit, match="learning_rate"):
        readability.probe(elsewhere, 0, elsewhere.parents[1] / "outputs/digits-tiny-seed0")


def test_a_shortcut_is_planted_found_and_repaired(script, tmp_path, monkeypatch):
    """On a network of a few steps: it runs, and marks are where they should be."""
    import planted

    birds, rng = range(100), np.random.default_rng(0)
    rows = [(bird, place) for bird in birds for place in (0, 1)]
    pixels = rng.integers(0, 128, (len(rows), 64, 64, 3), dtype=np.uint8)
    pixels[[bird % 2 == 1 for bird, _ in rows]] += 60  # a network that learns anything has two answers
    mask = Image.fromarray(np.pad(np.full((24, 24), 255, np.uint8), 20))
    columns = {
        "image": [Image.fromarray(values) for values in pixels],
        "mask": [mask] * len(rows),
        "label": [bird % 2 for bird, _ in rows],
        "place": [place for _, place in rows],
        "fg_id": [bird for bird, _ in rows],
    }
    kinds = {"image": datasets.Image(), "mask": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    kinds |= dict.fromkeys(("place", "fg_id"), datasets.Value("int64"))
    made = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    for split, chosen in (("validation", range(80)), ("test", range(80, 200))):
        made.select(chosen).to_parquet(tmp_path / "birds" / f"{split}.parquet")
    place = str(tmp_path / "birds")
    for kind, (mark, _) in planted.MARKS.items():
        training, scanned, balanced = planted.planted(place, kind, 1.0, 0)
        assert (len(training), len(scanned), len(balanced)) == (66, 34, 34)
        assert training["mark"] == training["label"] and scanned["mark"] == scanned["label"] != balanced["mark"]
        assert not {*training["fg_id"]} & {*scanned["fg_id"]} and scanned["fg_id"] == balanced["fg_id"]
        if mark is None:
            assert training["place"] == training["label"]
        else:
            own = {(row["fg_id"], row["place"]): np.asarray(row["image"]) for row in made}
            changed = [(own[row["fg_id"], row["place"]] != np.asarray(row["image"])).any() for row in training]
            assert changed == [mark == 1 for mark in training["mark"]]
    for kind, (mark, parts) in planted.MARKS.items():  # and most of a mark is in the part that is to be found
        held = next((part for part in parts if part in BOXES), None)
        if held:
            image = Image.fromarray(rng.integers(0, 100, (224, 224, 3), dtype=np.uint8))
            moved = (np.asarray(mark(image.copy())) != np.asarray(image)).any(2)
            inside = np.asarray(region(held, image.size)) > 127
            assert moved[inside].sum() > 0.7 * moved.sum() > 0, kind
    half = planted.planted(place, "ruler", 0.5, 0)[0]
    assert half["mark"] != half["label"]

    ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ).save_pretrained(tmp_path / "network")
    monkeypatch.setattr(planted, "STEPS", 20)
    monkeypatch.setattr(planted, "RATE", 1e-2)
    monkeypatch.setattr(planted, "SCANNED", 25)
    found = {"part": "bottom", "strength": "strong", "effect": 0.9}
    monkeypatch.setattr(planted, "strong_parts", lambda record: ["bottom"])
    record = planted.run(place, str(tmp_path / "network"), "ruler", 1.0, 0)
    assert record["repair"]["part"] == "bottom" and record["repair"]["num_pairs"] == 66
    assert record["repair"]["findings"] != record["findings"]
    assert planted.run(place, str(tmp_path / "network"), "ruler", 0.5, 0)["repair"] is None
    monkeypatch.undo()
    # the place of the mark among what was found, without the center
    findings = [
        found | {"part": "center"},
        found | {"part": "top"},
        found,
        found | {"part": "left", "strength": "weak"},
    ]
    assert planted.rank(record | {"findings": findings}) == 2
    weak = [found | {"strength": "weak"}]
    assert planted.rank(record | {"findings": findings[:2] + weak}) is None
    assert planted.is_planted(record) and not planted.is_planted(record | {"rate": planted.CONTROL})
    unplaced = next(kind for kind, parts in planted.PARTS.items() if not parts)
    assert not planted.is_planted(record | {"kind": unplaced})


def test_masks_are_measured_against_true_ones(script, tmp_path, monkeypatch):
    import mask_quality

    one, other = (Image.fromarray(np.uint8(255 * np.array(rows))) for rows in ([[1, 1, 0, 0]], [[0, 1, 1, 0]]))
    assert mask_quality.overlap(one, other) == pytest.approx(1 / 3) and mask_quality.overlap(one, one) == 1
    images = [Image.new("RGB", (50, 40), (value, 0, 0)) for value in range(30)]
    oval, small = region("center", (50, 40)), Image.new("L", (50, 40))
    small.paste(255, (20, 15, 30, 25))  # 100 pixels, all in the oval
    columns = {"image": images, "mask": [oval] * 20 + [small] * 10}
    features = datasets.Features(dict.fromkeys(columns, datasets.Image()))
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "set/test.parquet")
    found = mask_quality.run(str(tmp_path / "set"), "oval", 30)
    share = 100 / (np.asarray(oval) > 127).sum()
    assert found["iou"] == pytest.approx({"mean": (20 + 10 * share) / 30, "median": 1})
    assert found["share_above_half"] == pytest.approx(2 / 3) and found["left_out"] == 0


def test_a_learned_editor_makes_pairs_of_the_training_images(elsewhere, tmp_path, monkeypatch):
    import generated

    monkeypatch.setattr(sys, "argv", ["generated.py", str(elsewhere), str(tmp_path / "out"), "--size", "16",
                                      "--steps", "2", "--num_pairs", "40"])  # fmt: skip
    generated.main()
    weights = (tmp_path / "out/editor.pt").stat().st_mtime_ns
    pairs = {name: pairs_from_table(tmp_path / "out" / f"{name}.parquet") for name in ("all", "kept")}
    assert 0 < len(pairs["kept"]) < len(pairs["all"]) <= 40 and (tmp_path / "out/pairs.html").exists()
    (tmp_path / "out/kept.parquet").unlink()
    generated.main()  # goes on from what is there
    assert (tmp_path / "out/editor.pt").stat().st_mtime_ns == weights
    assert pairs_from_table(tmp_path / "out/kept.parquet")[:] == pairs["kept"][:]
    for flags, message in ((["--steps", "3"], "was made with"), (["--size", "18"], "2")):
        monkeypatch.setattr(sys, "argv", ["generated.py", str(elsewhere), str(tmp_path / "out"), *flags])
        with pytest.raises(SystemExit, match=message):
            generated.main()
    # the difference is made for the wanted value, and added at full size
    image = Image.fromarray(np.random.default_rng(0).integers(60, 200, (20, 10, 3), dtype=np.uint8))
    edit = generated.edit_with(lambda images, values: images + 0.2 * values[:, None, None, None], ["red", "green"], 16)
    made = edit([image, image], ["red", "green"], [0, 1])
    changes = [np.asarray(one).astype(int) - np.asarray(image) for one in made]
    assert [{*np.abs(change).ravel().tolist()} <= {25, 26} for change in changes] == [True, True]
    assert changes[0].max() < 0 < changes[1].min()


def test_a_choice_is_that_of_a_training_with_its_metric(elsewhere):
    """On the same pairs: the metric changes nothing but the choice."""
    import checkpoints
    import seeds

    elsewhere.write_text(yaml.safe_dump({**TINY, "learning_rate": 1e-2, "max_steps": 8}))
    checkpoints.run(elsewhere, 1)
    (record,) = written(elsewhere, "checkpoints_digits")
    assert record["data"]["pair_sets"]["pairs"]["pairs"] == 32
    assert record["data"]["held_out"] == {"from_validation": 300, "from_training": 8}
    choices = record["choices"]
    assert [*choices] == [*checkpoints.RULES, "last"] and choices["last"]["step"] == 8
    assert choices[checkpoints.PAIR_ACCURACY]["step"] == record["chosen_step"]
    assert choices["last"]["step"] != choices["worst_group_accuracy"]["step"] != record["chosen_step"]
    flags = ["--metric_for_best_model", "worst_group_accuracy"]
    recipe, args, given = seeds.settings(elsewhere, 1, elsewhere.parent / "alone", *flags)
    alone = train(recipe, args, given, data=checkpoints.with_held_out(recipe.load_data(1), 1))
    chosen = {
        "step": alone["chosen_step"],
        "test": {name: alone["metrics"]["test"][name] for name in checkpoints.MEASURED},
    }
    assert chosen == choices["worst_group_accuracy"]


def test_of_equal_checkpoints_the_earliest_is_chosen(script):
    from checkpoints import chosen_step

    looks = [{"step": 10 * n, "eval_accuracy": a, "eval_x/flip_rate": 1 - a} for n, a in enumerate([0.5, 0.9, 0.9])]
    assert chosen_step(looks, "accuracy") == chosen_step(looks, "x/flip_rate") == 10
