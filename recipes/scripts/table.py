# SPDX-License-Identifier: Apache-2.0
"""Renders the measured tables of `README.md` and `recipes/README.md` from the run records, those of suites too.

Launch: python recipes/table.py          prints them
        python recipes/table.py --write  puts them between the markers of the two pages
"""

import json
import statistics
import sys
from pathlib import Path

from ipg_hf.bench.figures import FIGURES
from ipg_hf.bench.suite import load_suite
from ipg_hf.bench.tables import markdown, spread, standings
from ipg_hf.report import fill_marked

FOLDER = Path(__file__).resolve().parent
PAGES = (FOLDER / "README.md", FOLDER.parent / "README.md")
# title -> metric; of the worst group also the worst of all seeds
CLASSES = {"test accuracy": "accuracy", "worst group, mean ± sd": "worst_group_accuracy", "flip rate": "flip_rate"}
NUMBERS = {"test error (MAE)": "mae", "worst group, mean ± sd": "worst_group_mae", "pairs' difference": "difference"}


def records(dataset: str) -> dict[str, list[dict]]:
    """Recipe -> its run records, in the order of the names."""
    found: dict[str, list[dict]] = {}
    for path in sorted((FOLDER / dataset / "results").glob("*-seed*.json")):
        found.setdefault(path.stem.rsplit("-seed", 1)[0], []).append(json.loads(path.read_text()))
    return found


def row(name: str, runs: list[dict], columns: dict[str, str]) -> str:
    """One line of the table; sd is the sample standard deviation over seeds."""

    def column(key: str) -> str:
        return spread([run["metrics"]["test"][key] for run in runs])

    whole, group, pairs = columns.values()
    worst = (min if columns is CLASSES else max)(run["metrics"]["test"][group] for run in runs)
    seconds = statistics.median(run["seconds"] for run in runs)
    cells = [f"`{name}`", str(len(runs)), column(whole), column(group), f"{worst:.3f}", column(pairs), f"{seconds:.0f}"]
    return "| " + " | ".join(cells) + " |"


def table(dataset: str, *names: str) -> str:
    """The table of a dataset: a row for each recipe named, or for each that has records."""
    found = records(dataset)
    columns = NUMBERS if any("mae" in runs[0]["metrics"]["test"] for runs in found.values()) else CLASSES
    whole, group, pairs = columns
    worst = "lowest" if columns is CLASSES else "highest"
    titles = ("recipe", "seeds", whole, group, worst, pairs, "seconds a run")
    header = f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|"
    return "\n".join([header, *(row(name, found[name], columns) for name in names or found)])


def suite_table(name: str) -> str:
    """The table of a suite, with the settings of its methods."""
    suite = load_suite(FOLDER / "suites" / f"{name}.yaml")
    found = standings(suite)
    if not any(standing.records for standing in found):
        return f"{suite.title}: not run yet."
    return f"{suite.title}\n\n{markdown(suite, found)}"


def suite_section(name: str) -> str:
    """The table of a suite and below it the figures that there are, for the page in this folder."""
    figures = [f"suites/results/{name}/{figure}.png" for figure in FIGURES]
    links = [f"![{name}: {Path(path).stem}]({path})" for path in figures if (FOLDER / path).exists()]
    return "\n\n".join([suite_table(name), *links])


def rendered(page: str) -> str:
    """The page with each table put anew between its marker and `<!-- end -->`.

    A marker is `<!-- table: DATASET [RECIPE ...] -->` or, with figures, `<!-- suite: NAME -->`.
    """
    for marker, made in (("table", table), ("suite", suite_section)):
        page = fill_marked(page, marker, made)
    return page


if __name__ == "__main__":
    if "--write" in sys.argv:
        for readme in PAGES:
            readme.write_text(rendered(readme.read_text()))
    else:
        for folder in sorted(FOLDER.glob("*/results")):
            if folder.parent.name != "suites":
                print(f"## {folder.parent.name}\n\n{table(folder.parent.name)}\n")
        for path in sorted(FOLDER.glob("suites/*.yaml")):
            print(f"## suite {path.stem}\n\n{suite_table(path.stem)}\n")
