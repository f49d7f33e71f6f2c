# SPDX-License-Identifier: Apache-2.0
"""Makes all tables and figures in `recipes/results` from the records in `recipes/records`.

Launch: python recipes/scripts/table.py          names the tables that differ from the records
        python recipes/scripts/table.py --write  writes all tables and figures

- `<suite>/table.md`, `table.csv` and figures: each suite, as `ipg bench SUITE --only render` makes them.
- `recipes.md`: the recipes, a table for each dataset.
- `pair_quality.md` and `readability.md`, with a figure each, `planted.md` and `mask_quality.md`: what the scripts of
  these names found.

The pages (`README.md`, `recipes/findings.md`) take their numbers from `page_tables.py`.
"""

import argparse
import statistics
import sys
from pathlib import Path

import mask_quality
import pair_quality
import planted
import readability

from ipg_hf.bench.figures import write_comparison
from ipg_hf.bench.suite import load_suite
from ipg_hf.bench.tables import comma_separated, markdown, spread, suite_rows
from ipg_hf.metrics import METRICS, WORST_GROUP
from ipg_hf.record import read_records

RECIPES = Path(__file__).resolve().parents[1]
RESULTS = RECIPES / "results"


def recipe_row(name: str, runs: list[dict], metrics: list[str]) -> str:
    """A line of the table of a dataset; the spread is the sample standard deviation over seeds."""
    cells = [f"`{name}`", str(len(runs))]
    for metric in metrics:
        values = [run["metrics"]["test"][metric] for run in runs]
        cells.append(spread(values))
        if metric in WORST_GROUP:
            cells.append(f"{(min if METRICS[metric].direction == 'higher' else max)(values):.3f}")
    cells.append(f"{statistics.median(run['seconds'] for run in runs):.0f}")
    return f"| {' | '.join(cells)} |"


def recipe_table(dataset: str) -> str:
    """The table of a dataset: a row for each recipe that has records."""
    runs: dict[str, list[dict]] = {}
    for record in read_records(RECIPES / "records" / f"{dataset}.jsonl"):
        runs.setdefault(record["run"].rsplit("-seed", 1)[0], []).append(record)
    tests = [record["metrics"]["test"] for records in runs.values() for record in records]
    metrics = [metric for metric in METRICS if all(metric in test for test in tests)]
    titles = ["recipe", "seeds"]
    for metric in metrics:
        title, direction = METRICS[metric]
        titles += [title, "lowest" if direction == "higher" else "highest"] if metric in WORST_GROUP else [title]
    titles.append("seconds a run")
    rows = [recipe_row(name, records, metrics) for name, records in runs.items()]
    return "\n".join([f"| {' | '.join(titles)} |", "|---" * len(titles) + "|", *rows])


def tables() -> dict[str, str]:
    """Name of a file in `recipes/results` -> its text."""
    found = {}
    for path in sorted(RECIPES.glob("suites/*.yaml")):
        suite = load_suite(path)
        rows = suite_rows(suite)
        found[f"{path.stem}/table.md"] = f"# {suite.title}\n\n{markdown(suite, rows)}\n"
        found[f"{path.stem}/table.csv"] = comma_separated(suite, rows)
    note = "Metrics on the test set, mean ± sample standard deviation over seeds."
    datasets = [path.stem for path in sorted(RECIPES.glob("records/*.jsonl")) if (RECIPES / path.stem).is_dir()]
    parts = ["# The recipes", note, *(f"## {name}\n\n{recipe_table(name)}" for name in datasets)]
    found["recipes.md"] = "\n\n".join(parts) + "\n"
    for script in (mask_quality, pair_quality, planted, readability):
        found[f"{script.__name__}.md"] = script.page()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write them, and the figures")
    options, made = parser.parse_args(), tables()
    if not options.write:
        differing = [
            name
            for name, text in made.items()
            if not (RESULTS / name).is_file() or (RESULTS / name).read_text() != text
        ]
        print("\n".join(differing) or "every table is as the records say")
        return int(bool(differing))
    for path in sorted(RECIPES.glob("suites/*.yaml")):
        write_comparison(load_suite(path))
    for name, text in made.items():
        (RESULTS / name).parent.mkdir(parents=True, exist_ok=True)
        (RESULTS / name).write_text(text, encoding="utf-8")
    pair_quality.draw(RESULTS / "pair_quality.png")
    readability.draw(RESULTS / "readability.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
