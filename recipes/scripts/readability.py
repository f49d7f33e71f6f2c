# SPDX-License-Identifier: Apache-2.0
"""What a linear probe reads from the features z, before the training and after it; `table.py` makes table and figure.

Launch: python recipes/scripts/readability.py RECIPE ... [--seeds 0 1 2 3 4]

There are probes for the label and for the attribute, fitted on validation and scored on the test set, where every group
counts the same (`ipg_hf.audit.numbers.linear_probe`). A record is the run `<recipe>-seed<n>` in
`recipes/records/readability_<dataset>.jsonl`: that of the training, with `probes`. What has a record is not run again.
"""

import statistics
from dataclasses import replace
from pathlib import Path

import seeds
from transformers import set_seed

from ipg_hf.audit.measure import audit
from ipg_hf.bench.tables import spread
from ipg_hf.record import read_records
from ipg_hf.run import load_trained

DATASETS = ("digits", "colored_mnist", "scenes")
TIMES, TARGETS = ("before", "after"), ("label", "attribute")


def run(path: Path, seed: int) -> None:
    """Probes one seed of a recipe as it began and as it ended; trains it where `run.py` has not."""
    dataset, name = seeds.dataset_of(path), f"{path.stem}-seed{seed}"
    output = seeds.ROOT / "outputs" / f"{dataset}-{name}"  # run.py's
    seeds.record_once(f"readability_{dataset}", name, lambda: probe(path, seed, output))


def probe(path: Path, seed: int, output: Path) -> dict:
    """The record of a training, with its probes."""
    recipe, args, given = seeds.settings(path, seed, output)
    record = seeds.trained(recipe, args, given)
    data = recipe.load_data(args.data_order_seed)
    set_seed(args.seed)  # as the training began
    before, (after, processor) = recipe.build_model(data.train), load_trained(str(output), recipe, data)
    models = {"before": ("", before, processor), "after": (str(output), after, processor)}
    # the audit of held-out pairs is not wanted here
    report, _ = audit(models, replace(data, test_pairs=None), batch_size=args.per_device_eval_batch_size)
    return record | {"probes": {entry["name"]: entry["probes"] for entry in report["models"]}}


def scores(dataset: str) -> dict[str, dict[tuple[str, str], list[float]]]:
    """Recipe -> time and target -> the scores, one a seed."""
    found: dict = {}
    for record in read_records(seeds.RECORDS / f"readability_{dataset}.jsonl"):
        recipe = found.setdefault(record["run"].rsplit("-seed", 1)[0], {})
        for time in TIMES:
            for target in TARGETS:
                recipe.setdefault((time, target), []).append(record["probes"][time][target]["score"])
    return found


def table(dataset: str) -> str:
    """The scores of a dataset, mean ± sample standard deviation over seeds."""
    heads = [f"{target}, {time}" for target in TARGETS for time in TIMES]
    lines = [f"| recipe | seeds | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
    for recipe, found in scores(dataset).items():
        columns = [found[time, target] for target in TARGETS for time in TIMES]
        lines.append(f"| `{recipe}` | {len(columns[0])} | {' | '.join(map(spread, columns))} |")
    return "\n".join(lines)


def page() -> str:
    """The tables of all datasets."""
    note = (
        "Balanced accuracy of a linear probe on the features z of the test set, before the training and after it, "
        "mean ± sample standard deviation over seeds."
    )
    parts = ["# What the features tell", note, "![scores of the probes](readability.png)"]
    return "\n\n".join([*parts, *(f"## {name}\n\n{table(name)}" for name in DATASETS)]) + "\n"


def draw(path: Path) -> None:
    """Draws a line from before to after for each recipe, label and attribute in a panel each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    found = [(f"{name}: {recipe}", values) for name in DATASETS for recipe, values in scores(name).items()]
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
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    seeds.for_each(seeds.parser(__doc__).parse_args(), run)
