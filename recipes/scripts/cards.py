# SPDX-License-Identifier: Apache-2.0
"""Renders the model card of every recipe that has run records, into `model_cards/`.

    python recipes/cards.py          names the cards that differ from the records
    python recipes/cards.py --write  writes them

A card is that of the first seed, with the mean and spread of all; beside it stands the same seed of the plain training
(`erm_...`) of the same model, where there is one.
"""

import argparse
import sys
from dataclasses import asdict

import yaml
from table import FOLDER, records

from ipg_hf.data import describe
from ipg_hf.hub.card import model_card
from ipg_hf.record import hub_id

CARDS = FOLDER.parent / "model_cards"


def completed(record, recipe):
    """A record with what the recipe says of the data and of the model it starts from."""
    known = describe(record["config"]["dataset"], record["config"].get("dataset_options"))
    about = {**asdict(known), **recipe.get("about", {})}
    base = recipe.get("model_name_or_path")  # the record's may be a copy of it on the machine that ran it
    config = {**record["config"], **({"model_name_or_path": base} if base else {})}
    return {"about": about, "base_model": hub_id(base), **record, "config": config}


def cards():
    """File name -> text of every card."""
    made = {}
    for folder in sorted(path.parent for path in FOLDER.glob("*/results")):
        found = records(folder.name)
        for name, runs in found.items():
            recipe = yaml.safe_load((folder / f"{name}.yaml").read_text())
            first, *others = (completed(run, recipe) for run in sorted(runs, key=lambda run: run["seed"]))
            plain = next((n for n in found if n.startswith("erm_") and name.endswith(n.removeprefix("erm"))), None)
            same = [run for run in found.get(plain, []) if run["seed"] == first["seed"]]
            twin = same[0] if same and first["method"] == "ipg" else None
            title = f"{folder.name}-{name}".replace("_", "-")
            made[f"{title}.md"] = f"{model_card(first, name=title, twin=twin, others=others)}\n"
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write them")
    made, options = cards(), parser.parse_args()
    if options.write:
        CARDS.mkdir(exist_ok=True)
        for path in CARDS.glob("*.md"):
            path.unlink()
        for name, text in made.items():
            (CARDS / name).write_text(text, encoding="utf-8")
        return 0
    old = {path.name: path.read_text(encoding="utf-8") for path in CARDS.glob("*.md")}
    differing = sorted(name for name in {*old, *made} if old.get(name) != made.get(name))
    print("\n".join(differing) or "every card is as its records say")
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main())
