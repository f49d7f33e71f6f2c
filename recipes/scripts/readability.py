# SPDX-License-Identifier: Apache-2.0
"""What a linear probe reads from the features z, before the training and after it: runs, table and figure.

    python recipes/readability.py RECIPE ... [--seeds 0 1 2 3 4]
    python recipes/readability.py --write   puts the tables into README.md and draws readability.png

Probes for the label and for the attribute, fitted on validation and scored on the test set, every group counting the
same (`ipg_hf.audit.numbers.linear_probe`). A record is `recipes/<dataset>/results/readability/<recipe>-seed<n>.json`,
the record of the run with its `probes`; what has one is not run again. The models stay in `outputs/`.
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path

from ipg_hf.bench.tables import spread
from ipg_hf.report import fill_marked

ROOT = Path(__file__).resolve().parent.parent
PAGE, FIGURE = ROOT / "recipes/README.md", ROOT / "recipes/readability.png"
TIMES, TARGETS = ("before", "after"), ("label", "attribute")
PLACES = ("output_dir", "overwrite_output_dir")


def run(recipe_file: Path, seed: int) -> None:
    """Probes one seed of a recipe as it began and as it ended; trains it where `run.py` has not."""
    from transformers import set_seed

    from ipg_hf.audit.measure import audit
    from ipg_hf.recipe import parse_recipe
    from ipg_hf.report import write_json
    from ipg_hf.run import load_trained, train

    recipe_file = recipe_file.resolve()
    name = f"{recipe_file.stem}-seed{seed}"
    path = recipe_file.parent / "results/readability" / f"{name}.json"
    if path.exists():
        return
    output = ROOT / "outputs" / f"{recipe_file.parent.name}-{name}"  # run.py's
    flags = ["--seed", str(seed), "--output_dir", str(output), "--overwrite_output_dir", "true"]
    recipe, args, given = parse_recipe(str(recipe_file), flags)
    finished = output / "run.json"
    record = json.loads(finished.read_text()) if finished.exists() else train(recipe, args, given)
    other = [key for key, value in record["config"].items() if key not in PLACES and value != given.get(key)]
    if other:
        raise SystemExit(f"{output} holds a run with other settings ({', '.join(other)}): remove it.")
    data = recipe.load_data(args.data_order_seed)
    set_seed(args.seed)  # as the training began
    before, (after, processor) = recipe.build_model(data.train), load_trained(str(output), recipe, data)
    models = {"before": ("", before, processor), "after": (str(output), after, processor)}
    # of the held-out pairs nothing is wanted here
    report, _ = audit(models, replace(data, test_pairs=None), batch_size=args.per_device_eval_batch_size)
    record["probes"] = {entry["name"]: entry["probes"] for entry in report["models"]}
    for place in PLACES:
        record["config"].pop(place, None)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)


def scores(dataset: str) -> dict[str, dict[tuple[str, str], list[float]]]:
    """Recipe -> time and target -> the scores, one a seed."""
    found: dict = {}
    for path in sorted((ROOT / "recipes" / dataset / "results/readability").glob("*.json")):
        probes = json.loads(path.read_text())["probes"]
        recipe = found.setdefault(path.stem.rsplit("-", 1)[0], {})
        for time in TIMES:
            for target in TARGETS:
                recipe.setdefault((time, target), []).append(probes[time][target]["score"])
    return found


def table(dataset: str) -> str:
    """Mean ± sample standard deviation over seeds."""
    heads = [f"{target}, {time}" for target in TARGETS for time in TIMES]
    lines = [f"| recipe | seeds | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
    for recipe, found in scores(dataset).items():
        columns = [found[time, target] for target in TARGETS for time in TIMES]
        lines.append(f"| `{recipe}` | {len(columns[0])} | {' | '.join(map(spread, columns))} |")
    return "\n".join(lines)


def rendered(page: str) -> str:
    """The page with each table put anew between `<!-- readability: DATASET -->` and `<!-- end -->`."""
    return fill_marked(page, "readability", table)


def draw(datasets: tuple[str, ...] = ("digits", "colored_mnist", "scenes")) -> None:
    """A line from before to after for each recipe, label and attribute in a panel each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    found = [(f"{name}: {recipe}", values) for name in datasets for recipe, values in scores(name).items()]
    for axes, target in zip(figure.subplots(1, len(TARGETS), sharey=True), TARGETS, strict=True):
        for number, (label, values) in enumerate(found):
            points = [values[time, target] for time in TIMES]
            axes.plot(TIMES, [statistics.mean(part) for part in points], marker="o", color=f"C{number}", label=label)
            for time, part in zip(TIMES, points, strict=True):
                axes.scatter([time] * len(part), part, s=9, alpha=0.5, color=f"C{number}")
        axes.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
        axes.set_title(f"{target} read from z")
        axes.set_ylim(0.4, 1.02)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("balanced accuracy of a linear probe (test)")
    figure.axes[-1].legend(fontsize=8)
    figure.savefig(FIGURE, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    for seed in options.seeds:
        for recipe in options.recipes:
            run(recipe, seed)
    if options.write:
        PAGE.write_text(rendered(PAGE.read_text()))
        draw()


if __name__ == "__main__":
    main()
