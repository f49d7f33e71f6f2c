# SPDX-License-Identifier: Apache-2.0
"""Writes the JSONL records from the JSON files that runs left until November 2026: the work of one day, kept as proof.

    python recipes/scripts/migrate_records.py --write    writes recipes/records/*.jsonl and migrated.json

The JSON files are read from the history of the repository, at the last commit that has them. Such a file keeps only the
settings that somebody typed, and two changes of defaults wrote a setting into files of earlier runs. A migrated record
has every setting of its run:

- What was typed at the time of the run: from the file as it was before the two changes.
- Defaults of the recipe and of the method: from `recipe.py` and `config.py` at the record's commit.
- Defaults of `TrainingArguments`: from the installed transformers, where the record has its version (or one whose
  `TrainingArguments` are the same); otherwise the value is "not recorded".
- An option of today that the commit does not have: the value that it had when it was introduced, which is what the
  code did before.

Metrics, seconds, the course, versions, commit and hardware are copied. `migrated.json` holds a digest of these for each
file, made from the old files; a test makes it from the JSONL. A row and a recipe have the names of today: `NAMES`.
"""

import argparse
import ast
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path

import transformers
from transformers import TrainingArguments

from ipg_hf.baselines import METHODS
from ipg_hf.baselines.dfr import STRENGTHS
from ipg_hf.data import describe
from ipg_hf.recipe import MAPPINGS, Recipe
from ipg_hf.record import NO_SETTINGS, NOT_RECORDED, hub_id, resolved_settings

ROOT = Path(__file__).resolve().parent.parent.parent
RECORDS = ROOT / "recipes/records"
LAST = "399d828"  # has the JSON files
CHANGES = ("35ffd01", "285c0e7")  # each wrote a default of before into files of earlier runs
# the fields of TrainingArguments and their defaults are the same in these
SAME_ARGUMENTS = {"5.23.0", "5.24.0"}
UNTOUCHED = ("seed", "metrics", "chosen_step", "steps", "course", "seconds", "versions", "commit", "hardware")

SUITES = {name: f"methods_{name}" for name in ("colored_mnist", "digits", "scenes_100", "scenes_95")}
SCALING = {"adaptive": "ipg", "none": "ipg_no_scaling", "fixed": "ipg_fixed_scaling"}
INTERVAL = {"always": "ipg", "violated": "ipg_violated"}
TRANSFER = {"ipg": "ipg_pair", "root": "ipg", "root_schedule": "ipg_schedule"}
SPEED = {
    "ipg": "ipg_pair",
    "root": "ipg",
    "root_violated": "ipg_violated",
    "root_every_4th": "ipg_every_4th",
    "root_every_16th": "ipg_every_16th",
    "root_violated_4": "ipg_violated_every_4th",
    "root_last_layers": "ipg_last_layers",
    "root_last_stage": "ipg_last_layers",
    "root_last_stages": "ipg_last_layers",
    "root_own_pairs": "ipg_background",
    "root_in_batch": "ipg_in_batch",
}
# suite (its name of then) -> row of then -> row of today; a row that is not here keeps its name
NAMES = {
    "colored_mnist": {
        "ipg": "ipg_pair",
        "ipg_mean": "ipg_paper",
        "ipg_root": "ipg",
        "ipg_group_dro": "ipg_pair_group_dro",
    },
    "digits": {
        "ipg": "ipg_pair",
        "ipg_mean": "ipg_paper",
        "ipg_root": "ipg",
        "ipg_adversarial": "ipg_pair_adversarial",
    },
    "scenes_100": {"ipg": "ipg_pair_limited_violated", "ipg_mean": "ipg_paper", "ipg_root": "ipg_violated"},
    "scenes_95": {
        "ipg": "ipg_pair_limited_violated",
        "ipg_mean": "ipg_paper",
        "ipg_root": "ipg_violated",
        "ipg_root_group_dro": "ipg_violated_group_dro",
    },
    "few_pairs": {
        "adam_root": "ipg",
        "adam_kl": "kl",
        "sgd_root": "ipg_sgd",
        "sgd_kl": "kl_sgd",
        "resnet_root": "ipg_sgd_resnet",
        "resnet_kl": "kl_sgd_resnet",
    },
    "few_pairs_long": {"root": "ipg"},
    "few_pairs_tuned": {"root": "ipg", "root_mixed": "ipg_mixed"},
    "interval_colored_mnist": INTERVAL,
    "interval_digits": INTERVAL,
    "makers_scenes_95": {
        "exact": "ipg",
        "background": "ipg_background",
        "match_features": "ipg_match_features",
        "match_random": "ipg_match_random",
        "adversarial": "ipg_adversarial",
    },
    "norm_colored_mnist": {
        "batch": "ipg",
        "frozen": "ipg_freeze_norm",
        "running": "ipg_running_norm",
        "vit": "ipg_vit",
    },
    "num_pairs": {
        "ipg": "ipg_pair",
        "ipg_mean": "ipg_paper",
        "ipg_root": "ipg_unlimited",
        "root": "ipg",
        "root_mixed": "ipg_mixed",
    },
    "scaling_colored_mnist": SCALING,
    "scaling_digits": SCALING,
    "scaling_scenes_100": SCALING,
    "sensitivity_colored_mnist": {"root": "ipg"},
    "sensitivity_digits": {"root": "ipg"},
    "sensitivity_scenes_100": {"root": "ipg"},
    "speed_colored_mnist": SPEED,
    "speed_digits": {**SPEED, "ipg": "ipg_pair_limited"},
    "speed_scenes_100": SPEED,
    "stability_scenes_100": {
        "rationale": "ipg_pair",
        "rationale_limited": "ipg_pair_limited",
        "root_unlimited": "ipg_unlimited",
        "root": "ipg",
        "root_violated": "ipg_violated",
        "root_warmup": "ipg_warmup",
        "root_half_rate": "ipg_half_rate",
        "root_decay": "ipg_decay",
        "root_schedule": "ipg_schedule",
    },
    "transfer_colored_mnist": TRANSFER,
    "transfer_digits": TRANSFER,
    "transfer_scenes_100": TRANSFER,
}
# dataset -> recipe of then -> recipe of today
RECIPES = {
    "colored_mnist": {
        "ipg_default_mlp": "ipg_mlp",
        "ipg_mlp": "ipg_pair_mlp",
        "ipg_mean_mlp": "ipg_paper_mlp",
        "ipg_recolor_mlp": "ipg_pair_recolor_mlp",
        "ipg_vit_tiny": "ipg_pair_vit_tiny",
    },
    "digits": {
        "ipg_default_resnet": "ipg_resnet",
        "ipg_resnet": "ipg_pair_resnet",
        "ipg_mean_resnet": "ipg_paper_resnet",
        "ipg_vit_tiny": "ipg_pair_vit_tiny",
        "ipg_adversarial_resnet": "ipg_pair_adversarial_resnet",
        "ipg_300_vit_tiny": "ipg_pair_300_vit_tiny",
        "erm_dfr_resnet": "dfr_resnet",
        "erm_project_resnet": "project_resnet",
    },
    "marked_digits": {
        "ipg_resnet": "ipg_pair_resnet",
        "ipg_color_only_resnet": "ipg_pair_color_only_resnet",
        "ipg_makers_resnet": "ipg_pair_makers_resnet",
        "ipg_mark_only_resnet": "ipg_pair_mark_only_resnet",
    },
    "stroke_mass": {"ipg_resnet": "ipg_pair_resnet"},
    "scenes": {"ipg_exact_lite0": "ipg_lite0"},
}


# ---- The old files


def git(*command: str) -> bytes:
    return subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, check=True).stdout


def files_at(commit: str) -> dict[str, dict]:
    """Path below `recipes` -> record, of all records that a commit has."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(git("archive", commit, "recipes"))) as archive:
        for member in archive.getmembers():
            path = member.name.removeprefix("recipes/")
            if path.endswith(".json") and not path.startswith("bench/"):
                found[path] = json.load(archive.extractfile(member))
    return found


def place(path: str) -> tuple[str, str]:
    """The JSONL file and the name of a run, from the path of its old file."""
    *folders, file = path.removesuffix(".json").split("/")
    if folders[0] == "suites":
        kind, suite = folders[1:]
        row, rest = re.fullmatch(r"(\w+?)(-.*)", file).groups()
        renamed = SUITES.get(suite, suite)
        return f"repeats_{renamed}" if kind == "repeats" else renamed, NAMES.get(suite, {}).get(row, row) + rest
    dataset, *rest = folders
    recipe, ending = re.fullmatch(r"(\w+?)(-.*)", file).groups()
    question = f"{rest[1]}_" if len(rest) == 2 else ""
    return f"{question}{dataset}", RECIPES.get(dataset, {}).get(recipe, recipe) + ending


def in_order(name: str) -> list:
    """A key that sorts runs by row, and within a row draws before seeds, numbers by size."""
    words = re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", name.replace("-draw", "-0draw"))
    return [(0, float(word), "") if number % 2 else (1, 0.0, word) for number, word in enumerate(words)]


# ---- Settings


@cache
def defaults(commit: str, file: str, class_name: str) -> dict:
    """Name of a field -> its default, in a dataclass of a module at a commit; the module is not run."""
    tree = ast.parse(git("show", f"{commit}:ipg_hf/{file}"))
    (found,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name]
    values = {}
    for node in found.body:
        if isinstance(node, ast.AnnAssign):
            (default,) = [word.value for word in node.value.keywords if word.arg == "default"]
            values[node.target.id] = ast.literal_eval(default)
    return values


@cache
def introduced() -> dict:
    """Name of an option of the method -> its default at the commit that introduced it."""
    values = {}
    commits = git("log", "--reverse", "--format=%h", LAST, "--", "ipg_hf/config.py").decode().split()
    for commit in commits:
        values = {**defaults(commit, "config.py", "IPGConfig"), **values}
    # TrainingArguments has it too, until IPGConfig changed its default
    del values["warmup_steps"]
    return values


def method_of(config: dict) -> str:
    """What ran, by the names of `METHODS`."""
    layer = config.get("last_layer") or {}
    if layer or config.get("repeat_errors"):
        return layer.get("method", "jtt")
    if config["method"] == "erm":
        objective = config.get("objective")
        return objective if objective in ("irm", "vrex") else "erm"
    if config.get("loss_scaling", "adaptive") != "adaptive" or config.get("shared_optimizer_state") is False:
        return "ablation"
    return config.get("pair_objective", "ipg")


def of_baseline(config: dict) -> dict:
    """Settings of methods that had another form then."""
    layer, errors = config.get("last_layer") or {}, config.get("repeat_errors") or {}
    if layer.get("method") == "dfr":
        return {"num_fits": layer.get("num_fits", 10), "strengths": layer.get("strengths", list(STRENGTHS))}
    if layer:
        return {"rank": layer["rank"]}
    return {"first_steps": errors["steps"], "upweight": errors["factor"]} if errors else {}


def settings_of(typed: dict, commit: str, transformers_version: str) -> dict:
    """Every setting of a run.

    Args:
        typed: the settings that somebody typed.
        commit: commit of the code that ran.
        transformers_version: its version of transformers.
    """
    method = method_of(typed)
    recipe, own = defaults(commit, "recipe.py", "Recipe"), defaults(commit, "config.py", "IPGConfig")
    of_trainer = {entry.name for entry in fields(TrainingArguments)}
    given = {name: value for name, value in typed.items() if name in of_trainer}
    given |= {name: value for name, value in own.items() if name in of_trainer and name not in typed}
    resolved = resolved_settings(TrainingArguments(**{"output_dir": "out", **given}))
    if transformers_version not in SAME_ARGUMENTS:
        resolved = {name: value if name in given else NOT_RECORDED for name, value in resolved.items()}
    wanted = {entry.name for entry in fields(METHODS[method].config)}
    later = {name: value for name, value in introduced().items() if name in wanted}
    # options of a recipe that came later have a default that changes nothing
    later_recipe = {name: getattr(Recipe, name) for name in (entry.name for entry in fields(Recipe))}
    settings = {**later_recipe, **recipe, **resolved, **later, **own, **typed, **resolved}
    settings = {name: value for name, value in settings.items() if not NO_SETTINGS.fullmatch(name)}
    for name in (*MAPPINGS, "degrade_pairs"):
        if name in settings:
            settings[name] = settings[name] or {}
    if settings["max_loss_scale"] is None:  # no limit, until its default changed
        settings["max_loss_scale"] = float("inf")
    for name in ("last_layer", "repeat_errors"):
        settings.pop(name, None)
    if settings.get("pair_objective") == "ipg":
        del settings["pair_objective"]
    if not settings.get("degrade_pairs"):
        settings.pop("degrade_pairs", None)
    # YAML and flags gave a number as it stood there, the config a float
    floats = {entry.name for entry in fields(METHODS[method].config) if "float" in str(entry.type)}
    settings = {
        name: float(value) if name in floats and type(value) is int else value for name, value in settings.items()
    }
    return settings | of_baseline(typed) | {"method": method}


# ---- Records


def migrated(old: dict, name: str, typed: dict) -> dict:
    """A record of today from an old one.

    Args:
        old: the old record.
        name: name of the run.
        typed: the settings that somebody typed.
    """
    settings = settings_of(typed, old["commit"], old["versions"]["transformers"])
    check(settings, old, typed)
    given = [key for key in typed if not NO_SETTINGS.fullmatch(key) and key not in ("last_layer", "repeat_errors")]
    given += list(of_baseline(typed))
    method = settings["method"]
    about = asdict(describe(settings["dataset"], settings["dataset_options"])) | (typed.get("about") or {})
    unknown = {"train": NOT_RECORDED, "pair_sets": {}}
    if METHODS[method].uses_pairs:
        unknown["pair_sets"] = {"pairs": {"pairs": NOT_RECORDED, "findings": None}}
    data = old.get("data", unknown)
    record = {"run": name, "method": method, "settings": settings, "given": given}
    record |= {key: old[key] for key in UNTOUCHED if key in old}
    record["base_model"] = old.get("base_model", hub_id(settings["model_name_or_path"]))
    record["about"] = old.get("about", about)
    record["data"] = data | {"pair_sets": {key or "pairs": value for key, value in data["pair_sets"].items()}}
    record |= {key: old[key] for key in ("diverged", "probes") if key in old}
    facts = {**old.get("last_layer", {}), **old.get("repeat_errors", {})}
    facts = {key: value for key, value in facts.items() if key not in ("method", "steps", "factor")}
    return record | ({"baseline": facts} if facts else {})


def check(settings: dict, old: dict, typed: dict) -> None:
    """What the file says today, and the code's defaults of then, must agree."""
    moved = {"method", "last_layer", "repeat_errors", "report_to", "pair_objective"}
    for name, value in {**old["config"], **typed}.items():
        if name not in moved and not NO_SETTINGS.fullmatch(name) and settings[name] != value:
            raise SystemExit(f"{name}={value!r} in the old file, {settings[name]!r} by the code of {old['commit']}")


def digest(records: list[dict]) -> str:
    """Of what migration must not touch, in the order of the records."""
    kept = [[record["run"], *(record.get(key) for key in UNTOUCHED)] for record in records]
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the files")
    options = parser.parse_args()
    if transformers.__version__ not in SAME_ARGUMENTS:
        sys.exit(f"The records are of transformers {sorted(SAME_ARGUMENTS)}: install one of them.")
    files, before = files_at(LAST), [files_at(f"{commit}^") for commit in CHANGES]
    collections: dict[str, dict[str, tuple[dict, dict]]] = {}
    for path, old in files.items():
        # the file as it was before a default was written into it, where it is of the same run
        versions = [found[path] for found in before if path in found and found[path]["commit"] == old["commit"]]
        collection, name = place(path)
        runs = collections.setdefault(collection, {})
        if name in runs:
            sys.exit(f"{path}: there are two runs {name} in {collection}")
        runs[name] = (old, versions[0]["config"] if versions else old["config"])
    digests = {}
    for collection, runs in sorted(collections.items()):
        names = sorted(runs, key=in_order)
        digests[collection] = {
            "records": len(names),
            "sha256": digest([{**runs[name][0], "run": name} for name in names]),
        }
        lines = [json.dumps(migrated(runs[name][0], name, runs[name][1]), separators=(",", ":")) for name in names]
        print(f"{collection}.jsonl: {len(lines)} records")
        if options.write:
            RECORDS.mkdir(exist_ok=True)
            (RECORDS / f"{collection}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if options.write:
        (RECORDS / "migrated.json").write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
