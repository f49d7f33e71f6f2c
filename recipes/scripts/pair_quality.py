# SPDX-License-Identifier: Apache-2.0
"""How worst-group accuracy falls with the quality of the pairs: makes the runs; `table.py` makes table and figure.

Launch: python recipes/scripts/pair_quality.py RECIPE ... [--seeds 0 1 2 3 4] [--kinds mislabelled unoriented residual]

A record is the run `<recipe>-<kind>-<level>-seed<n>` in `recipes/records/pair_quality_<dataset>.jsonl`. What has a
record is not run again.
"""

import re
import shutil
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path

import seeds

from ipg_hf.baselines import degrade_pairs
from ipg_hf.bench.tables import spread
from ipg_hf.record import read_records
from ipg_hf.run import train

DATASETS = ("digits", "colored_mnist")
LEVELS = {
    "mislabelled": (0.1, 0.3, 0.6, 1.0),
    "unoriented": (0.1, 0.25, 0.5),
    "residual": (0.1, 0.3, 0.6, 1.0),
}
TITLES = {
    "mislabelled": "share of pairs with two labels",
    "unoriented": "share of pairs with swapped sides",
    "residual": "strength of a residual difference",
}


def run(path: Path, seed: int, kinds: list[str]) -> None:
    """Trains one seed of a recipe: on the pairs as they are, and on pairs with each kind of fault at each level."""
    dataset = seeds.dataset_of(path)
    for kind, level in [("none", 0.0), *((fault, level) for fault in kinds for level in LEVELS[fault])]:
        name, faults = f"{path.stem}-{kind}-{level:g}-seed{seed}", {kind: level} if level else {}
        output = seeds.ROOT / "outputs" / f"pair-quality-{dataset}-{name}"
        seeds.record_once(f"pair_quality_{dataset}", name, partial(train_on, path, seed, output, faults))


def train_on(path: Path, seed: int, output: Path, faults: dict[str, float]) -> dict:
    """Trains one seed of a recipe on pairs with faults."""
    recipe, args, given = seeds.settings(path, seed, output)
    data = recipe.load_data(args.data_order_seed)
    data = replace(data, pairs=degrade_pairs(data.pairs, **faults, seed=args.data_order_seed)) if faults else data
    record = train(recipe, args, given, data=data)
    record["settings"]["degrade_pairs"] = faults
    shutil.rmtree(output)
    return record


def curves(dataset: str) -> dict[str, dict[str, dict[float, list[float]]]]:
    """Recipe -> kind -> level -> worst-group accuracies on the test set, one a seed; level 0 is the clean set."""
    found: dict = {}
    for record in read_records(seeds.RECORDS / f"pair_quality_{dataset}.jsonl"):
        recipe, kind, level = re.fullmatch(r"(\w+)-(\w+)-([\d.]+)-seed\d+", record["run"]).groups()
        for name in TITLES if kind == "none" else (kind,):
            levels = found.setdefault(recipe, {}).setdefault(name, {})
            levels.setdefault(float(level), []).append(record["metrics"]["test"]["worst_group_accuracy"])
    return {
        recipe: {k: dict(sorted(v.items())) for k, v in kinds.items() if len(v) > 1} for recipe, kinds in found.items()
    }


def table(dataset: str) -> str:
    """Worst-group accuracy, mean ± sample standard deviation over seeds, a row for each recipe, kind and level."""
    lines = [
        "| recipe | fault of the pairs | level | seeds | worst-group accuracy | lowest |",
        "|---|---|---|---|---|---|",
    ]
    for recipe, kinds in curves(dataset).items():
        for kind, levels in kinds.items():
            for level, values in levels.items():
                cells = [f"`{recipe}`", kind, f"{level:g}", len(values), spread(values)]
                lines.append("| " + " | ".join(map(str, [*cells, f"{min(values):.3f}"])) + " |")
    return "\n".join(lines)


def page() -> str:
    """The tables of all datasets, with what a level means."""
    meaning = "; ".join(f"{kind}, {title}" for kind, title in TITLES.items())
    note = f"Test set, mean ± sample standard deviation over seeds. The level is: {meaning}."
    parts = ["# Pairs with faults", note, "![worst group by level](pair_quality.png)"]
    return "\n\n".join([*parts, *(f"## {name}\n\n{table(name)}" for name in DATASETS)]) + "\n"


def draw(path: Path) -> None:
    """Draws a panel for each kind of fault: mean and single seeds of every recipe."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 4.3), layout="constrained")
    FigureCanvasAgg(figure)
    found = [(f"{name}: {recipe}", kinds) for name in DATASETS for recipe, kinds in curves(name).items()]
    for axes, kind in zip(figure.subplots(1, len(TITLES), sharey=True), TITLES, strict=True):
        for number, (label, kinds) in enumerate(found):
            levels = kinds.get(kind, {})
            axes.plot(
                [*levels], [statistics.mean(v) for v in levels.values()], marker="o", color=f"C{number}", label=label
            )
            points = [(level, value) for level, values in levels.items() for value in values]
            axes.scatter(*zip(*points, strict=True), s=9, alpha=0.5, color=f"C{number}") if points else None
        axes.set_xlabel(TITLES[kind])
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("worst-group accuracy (test)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize=8, ncols=3, loc="outside lower center")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = seeds.parser(__doc__)
    parser.add_argument("--kinds", nargs="+", choices=list(LEVELS), default=list(LEVELS))
    options = parser.parse_args()
    seeds.for_each(options, partial(run, kinds=options.kinds))
