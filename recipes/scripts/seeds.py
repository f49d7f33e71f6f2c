# SPDX-License-Identifier: Apache-2.0
"""What the scripts share that train recipes over seeds: their command line, their runs and their records."""

import argparse
from collections.abc import Callable
from pathlib import Path

from ipg_hf.config import IPGConfig
from ipg_hf.data.benchmark import Benchmark
from ipg_hf.recipe import Recipe, parse_recipe
from ipg_hf.record import append_record, read_json, read_records, resolved_settings
from ipg_hf.run import train

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "recipes/records"


def parser(description: str) -> argparse.ArgumentParser:
    """Reads the recipes and the seeds; a script adds its own options."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    return parser


def for_each(options: argparse.Namespace, run: Callable[[Path, int], None]) -> None:
    """Calls `run(recipe, seed)`, seed by seed: after a stop all recipes have the same seeds."""
    for seed in options.seeds:
        for recipe in options.recipes:
            run(recipe, seed)


def dataset_of(recipe: Path) -> str:
    """The folder of a recipe, which names its data."""
    return recipe.resolve().parent.name


def record_once(collection: str, name: str, make: Callable[[], dict]) -> None:
    """Appends the record of a run to `recipes/records/<collection>.jsonl`; what has a record is not run again."""
    records = RECORDS / f"{collection}.jsonl"
    if any(record["run"] == name for record in read_records(records)):
        return
    print(f"{collection}: {name}", flush=True)
    append_record(records, {"run": name, **make()})


def settings(recipe: Path, seed: int, output: Path, *flags: str) -> tuple[Recipe, IPGConfig, list[str]]:
    """Reads a recipe for a run in a folder; what an earlier attempt left in the folder is replaced."""
    own = ["--seed", str(seed), "--output_dir", str(output), "--overwrite_output_dir", "true"]
    return parse_recipe(str(recipe), [*own, *flags])


def trained(recipe: Recipe, args: IPGConfig, given: list[str], data: Benchmark | None = None) -> dict:
    """Trains, or reads the record of the training that has ended in the same folder.

    Raises:
        SystemExit: the folder holds a training with other settings.
    """
    finished = Path(args.output_dir) / "run.json"
    record = read_json(finished) if finished.exists() else train(recipe, args, given, data=data)
    wanted = resolved_settings(recipe, args)
    other = [key for key, value in record["settings"].items() if value != wanted.get(key)]
    if other:
        raise SystemExit(f"{args.output_dir} holds a run with other settings ({', '.join(other)}): remove it.")
    return record
