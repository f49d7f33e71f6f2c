# SPDX-License-Identifier: Apache-2.0
"""Writes the model cards of `model_cards/` from the run records.

    python recipes/scripts/cards.py          names the cards that differ from the records
    python recipes/scripts/cards.py --write  writes them

A card is that of the run with the first seed, with mean and standard deviation over all seeds. The run of plain
training (ERM) with the same seed is in its second column.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

from ipg_hf.hub.card import model_card
from ipg_hf.record import read_records

RECIPES = Path(__file__).resolve().parent.parent
CARDS = RECIPES.parent / "model_cards"
# dataset -> recipe of a model that somebody would publish -> recipe of its plain training
PUBLISHED = {
    "digits": {"ipg_pair_vit_tiny": "erm_vit_tiny", "ipg_resnet": "erm_resnet", "ipg_paper_resnet": "erm_resnet"},
    "colored_mnist": {"ipg_mlp": "erm_mlp", "ipg_fashion_mlp": "erm_fashion_mlp"},
    "scenes": {"ipg_lite0": "erm_lite0"},
    "marked_digits": {"ipg_pair_makers_resnet": "erm_resnet"},
    "stroke_mass": {"ipg_pair_resnet": "erm_resnet"},
}


def sources():
    """File name of each card -> its records: the card's own, those of the other seeds, and that of ERM."""
    found = {}
    for dataset, recipes in PUBLISHED.items():
        by_recipe = defaultdict(list)
        for record in read_records(RECIPES / "records" / f"{dataset}.jsonl"):
            by_recipe[record["run"].rsplit("-seed", 1)[0]].append(record)
        for recipe, plain in recipes.items():
            first, *others = sorted(by_recipe[recipe], key=lambda record: record["seed"])
            erm = next(record for record in by_recipe[plain] if record["seed"] == first["seed"])
            found[f"{dataset}-{recipe}".replace("_", "-") + ".md"] = (first, others, erm)
    return found


def cards():
    """File name -> text of each card."""
    return {
        name: f"{model_card(record, name=Path(name).stem, others=others, erm=erm)}\n"
        for name, (record, others, erm) in sources().items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the cards, and remove those of no record")
    made, options = cards(), parser.parse_args()
    old = {path.name: path.read_text(encoding="utf-8") for path in CARDS.glob("*.md")}
    if not options.write:
        differing = sorted(name for name in {*old, *made} if old.get(name) != made.get(name))
        print("\n".join(differing) or "every card is as its records say")
        return int(bool(differing))
    CARDS.mkdir(exist_ok=True)
    for name in old.keys() - made.keys():
        (CARDS / name).unlink()
    for name, text in made.items():
        (CARDS / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
