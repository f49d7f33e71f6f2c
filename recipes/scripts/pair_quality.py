# SPDX-License-Identifier: Apache-2.0
"""How worst-group accuracy falls with the quality of the pairs: runs, table and figure.

    python recipes/pair_quality.py RECIPE ... [--seeds 0 1 2 3 4] [--kinds mislabelled unoriented residual]
    python recipes/pair_quality.py --write   puts the tables into README.md and draws pair_quality.png

A record is `recipes/<dataset>/results/pair_quality/<recipe>-<kind>-<level>-seed<n>.json`; what has one is not run
again.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from ipg_hf.bench.tables import spread
from ipg_hf.report import fill_marked

ROOT = Path(__file__).resolve().parent.parent
PAGE, FIGURE = ROOT / "recipes/README.md", ROOT / "recipes/pair_quality.png"
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


def run(recipe: Path, seed: int, kinds: list[str]) -> None:
    """One seed of a recipe: the pairs as they are, and each kind of fault at each level."""
    recipe = recipe.resolve().relative_to(ROOT)
    for kind, level in [("none", 0.0), *((fault, level) for fault in kinds for level in LEVELS[fault])]:
        name = f"{recipe.stem}-{kind}-{level:g}-seed{seed}"
        record = ROOT / recipe.parent / "results/pair_quality" / f"{name}.json"
        if record.exists():
            continue
        output = Path("outputs") / f"{recipe.parent.name}-{name}"
        command = [sys.executable, "-m", "ipg_hf.cli", "train", "--config", str(recipe), "--seed", str(seed)]
        command += ["--output_dir", str(output), "--overwrite_output_dir", "true"]
        if level:
            command += ["--degrade_pairs", json.dumps({kind: level})]
        print(" ".join(command), flush=True)
        subprocess.run(command, cwd=ROOT, check=True)
        record.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / output / "run.json", record)
        shutil.rmtree(ROOT / output)


def curves(dataset: str) -> dict[str, dict[str, dict[float, list[float]]]]:
    """Recipe -> kind -> level -> worst-group accuracies on the test set, one a seed; level 0 is the clean set."""
    found: dict = {}
    for path in sorted((ROOT / "recipes" / dataset / "results/pair_quality").glob("*.json")):
        metrics = json.loads(path.read_text())["metrics"]["test"]
        recipe, kind, level, _ = path.stem.rsplit("-", 3)
        for name in TITLES if kind == "none" else (kind,):
            levels = found.setdefault(recipe, {}).setdefault(name, {})
            levels.setdefault(float(level), []).append(metrics["worst_group_accuracy"])
    return {
        recipe: {k: dict(sorted(v.items())) for k, v in kinds.items() if len(v) > 1} for recipe, kinds in found.items()
    }


def table(dataset: str) -> str:
    """Worst-group accuracy, mean ± sample standard deviation over seeds, a row for each recipe, kind and level."""
    lines = [
        "| recipe | fault of the pairs | level | seeds | worst group, mean ± sd | lowest |",
        "|---|---|---|---|---|---|",
    ]
    for recipe, kinds in curves(dataset).items():
        for kind, levels in kinds.items():
            for level, values in levels.items():
                cells = [f"`{recipe}`", kind, f"{level:g}", len(values), spread(values)]
                lines.append("| " + " | ".join(map(str, [*cells, f"{min(values):.3f}"])) + " |")
    return "\n".join(lines)


def rendered(page: str) -> str:
    """The page with each table put anew between `<!-- pair quality: DATASET -->` and `<!-- end -->`."""
    return fill_marked(page, "pair quality", table)


def draw(datasets: tuple[str, ...] = ("digits", "colored_mnist")) -> None:
    """A panel for each kind of fault: mean and single seeds of every recipe."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 4.3), layout="constrained")
    FigureCanvasAgg(figure)
    found = [(f"{name}: {recipe}", kinds) for name in datasets for recipe, kinds in curves(name).items()]
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
    figure.savefig(FIGURE, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--kinds", nargs="+", choices=list(LEVELS), default=list(LEVELS))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    for seed in options.seeds:
        for recipe in options.recipes:
            run(recipe, seed, options.kinds)
    if options.write:
        PAGE.write_text(rendered(PAGE.read_text()))
        draw()


if __name__ == "__main__":
    main()
