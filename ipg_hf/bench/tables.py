# SPDX-License-Identifier: Apache-2.0
"""Table and CSV of a suite, made of its records."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

from ..metrics import METRICS, WORST_GROUP
from .suite import Suite, chosen, draw_runs, points, seed_runs, suite_records, validation_score

NOTE = "Metrics on the test set; spread: sample standard deviation over seeds."
NOTE_OF_DIFFERENCES = (
    " Differences: worst group, method minus other on the "
    "same seeds, with the 95 % t-interval over these seeds in brackets, each comparison for itself; the best other "
    "has, of the methods with the most of these seeds, the best mean on them."
)
NOTE_OF_GRIDS = " The grid shows what a setting does on the test set; no setting is chosen by it."
NOTE_OF_POINTS = (
    " Differences are taken at one point of the grid; a method that the grid does not vary is run once and compared at "
    "every point."
)
NOTE_OF_ERRORS = " Worst group: the highest error; a negative difference is the better one."


@dataclass(frozen=True)
class Row:
    """The runs of a method, at one point where it is run over a grid.

    Args:
        name: the method.
        point: the point; without a key where there is no grid, or where the grid does not vary the method.
        records: seed -> record.
        draw: number of the draw that its settings come from; `None` without tuning, or before tuning is done.
        drawn: the settings of that draw.
        scores: validation score of each draw that has run, as [`~suite.validation_score`] gives it.
    """

    name: str
    point: Mapping[str, Any]
    records: Mapping[int, Mapping[str, Any]]
    draw: int | None
    drawn: Mapping[str, Any]
    scores: Sequence[float]

    def values(self, metric: str) -> dict[int, float]:
        """Seed -> a metric on the test set."""
        tests = {seed: record["metrics"]["test"] for seed, record in self.records.items()}
        return {seed: test[metric] for seed, test in tests.items() if metric in test}


@dataclass(frozen=True)
class Interval:
    """A mean of n values and its 95 % t-interval; `low` and `high` are NaN for one value."""

    mean: float
    low: float
    high: float
    n: int


def t_interval(values: Sequence[float]) -> Interval:
    """The mean of at least one value ± t(0.975, n - 1) · sd / √n."""
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval | None:
    """The differences of two methods on the seeds that both have; `None` where they share no seed."""
    seeds = [seed for seed in ours if seed in theirs]
    return t_interval([ours[seed] - theirs[seed] for seed in seeds]) if seeds else None


def best_other(name: str, scores: Mapping[str, Mapping[int, float]]) -> str | None:
    """Of the other methods with the most seeds in common with this one, that with the best mean on these.

    Args:
        name: the method.
        scores: method -> seed -> a score, higher is better.

    Returns:
        Its name; `None` where no other method has a seed in common.
    """
    common = {other: [scores[other][seed] for seed in scores[name] if seed in scores[other]] for other in scores}
    others = [other for other, values in common.items() if other != name and values]
    return max(others, key=lambda other: (len(common[other]), statistics.fmean(common[other])), default=None)


def suite_rows(suite: Suite) -> list[Row]:
    """A row for each method and point of the grid, in the suite's order; those that are retired at the end.

    Raises:
        RecipeError: a record does not belong to the suite, as [`~suite.suite_records`] describes.
    """
    records, rows = suite_records(suite), []
    for name in suite.methods:
        choice = chosen(suite, name, records)
        draw, drawn = choice or (None, {})
        scores = [validation_score(records[run.name]) for run in draw_runs(suite, name) if run.name in records]
        for point in points(suite, name):
            runs = seed_runs(suite, name, drawn, point) if choice else []
            made = {run.settings["seed"]: records[run.name] for run in runs if run.name in records}
            rows.append(Row(name, point, made, draw, drawn, scores))
    for name in suite.retired:
        made = {record["seed"]: record for run, record in records.items() if run == f"{name}-seed{record['seed']}"}
        rows.append(Row(name, {}, made, None, {}, []))
    return rows


def markdown(suite: Suite, rows: Sequence[Row]) -> str:
    """The table, a line on each method's settings, and the code and machines that made the runs."""
    metrics = measured(rows)
    titles = ["method", *(f"`{key}`" for key in suite.grid), "seeds"]
    for metric in metrics:
        title, direction = METRICS[metric]
        spreads = [f"{title}, mean ± sd", "median", "lowest" if direction == "higher" else "highest"]
        titles += spreads if metric in WORST_GROUP else [title]
    several = len(suite.methods) > 1
    against = [*(f"`{name}`" for name in suite.references), "the best other"] if several else []
    titles += ["seconds a run", *(f"against {other}" for other in against)]
    cells = [titles, ["---"] * len(titles), *(_cells(suite, row, rows, metrics) for row in rows)]
    lines = ["| " + " | ".join(part) + " |" for part in cells]
    lines[1] = "|" + "---|" * len(titles)
    first = {row.name: row for row in reversed(rows)}
    settings = [f"- `{name}`: {_settings(suite, first[name])}" for name in suite.methods]
    settings += [f"- `{name}` can no longer be run: {reason}." for name, reason in suite.retired.items()]
    note = NOTE + (NOTE_OF_DIFFERENCES if several else "") + (NOTE_OF_GRIDS if suite.grid else "")
    note += NOTE_OF_POINTS if several and suite.grid else ""
    note += NOTE_OF_ERRORS if METRICS[worst_group(rows)].direction == "lower" else ""
    return "\n".join([*lines, "", f"{note} {_provenance(rows)}".strip(), "", *settings])


def comma_separated(suite: Suite, rows: Sequence[Row]) -> str:
    """The table with all digits, a line for each method and point of the grid; empty cells are not known."""
    lines = []
    for row in rows:
        at = {f"grid_{key}": row.point.get(key, "") for key in suite.grid}
        line: dict[str, Any] = {"method": row.name, **at, "seeds": len(row.records)}
        for metric in measured(rows):
            values = [*row.values(metric).values()]
            line[f"{metric}_mean"] = statistics.fmean(values) if values else ""
            line[f"{metric}_sd"] = statistics.stdev(values) if len(values) > 1 else ""
            if metric in WORST_GROUP:
                line[f"{metric}_median"] = statistics.median(values) if values else ""
                extreme = _worst(metric)
                line[f"{metric}_{extreme.__name__}"] = extreme(values) if values else ""
        seconds = [record["seconds"] for record in row.records.values()]
        line["seconds_median"] = statistics.median(seconds) if seconds else ""
        for title, (other, difference) in _differences(suite, row, rows).items():
            line[title] = other or ""
            for part in ("mean", "low", "high", "n"):
                value = getattr(difference, part, "")
                line[f"{title}_difference_{part}"] = "" if value != value else value
        line["draws"], line["draw"] = len(row.scores), "" if row.draw is None else row.draw
        line["settings"] = json.dumps({**suite.methods.get(row.name, {}), **row.drawn, **row.point})
        lines.append(line)
    text = io.StringIO()
    writer = csv.DictWriter(text, [*lines[0]], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def measured(rows: Sequence[Row]) -> list[str]:
    """The test metrics that the records have, in the order of `METRICS`; before any run, the metrics of classes."""
    tests = [record["metrics"]["test"] for row in rows for record in row.records.values()]
    found = [metric for metric in METRICS if any(metric in test for test in tests)]
    return found or ["accuracy", "worst_group_accuracy", "adjusted_accuracy", "flip_rate"]


def worst_group(rows: Sequence[Row]) -> str:
    """The one metric of the worst group that the records have."""
    return next(metric for metric in WORST_GROUP if metric in measured(rows))


def _worst(metric: str) -> Callable:
    return min if METRICS[metric].direction == "higher" else max


def _cells(suite: Suite, row: Row, rows: Sequence[Row], metrics: Sequence[str]) -> list[str]:
    at = [written(row.point[key]) if row.point else "-" for key in suite.grid]
    cells = [f"`{row.name}`", *at, progress(suite, row)]
    for metric in metrics:
        values = [*row.values(metric).values()]
        cells.append(spread(values))
        if metric in WORST_GROUP:
            cells += [f"{f(values):.3f}" if values else "-" for f in (statistics.median, _worst(metric))]
    seconds = [record["seconds"] for record in row.records.values()]
    cells.append(f"{statistics.median(seconds):.0f}" if seconds else "-")
    differences = _differences(suite, row, rows) if len(suite.methods) > 1 else {}
    for title, (other, difference) in differences.items():
        named = f"`{other}`: " if title == "best_other" and difference else ""
        cells.append(f"{named}{_interval(difference)}" if difference else "-")
    return cells


def _differences(suite: Suite, row: Row, rows: Sequence[Row]) -> dict[str, tuple[str | None, Interval | None]]:
    """Differences of the worst group at one point of the grid: to each reference, and to the best other method."""
    metric = worst_group(rows)
    worst = {other.name: other.values(metric) for other in rows if other.point in (row.point, {})}
    sign = 1 if METRICS[metric].direction == "higher" else -1
    scores = {name: {seed: sign * value for seed, value in values.items()} for name, values in worst.items()}
    others = {
        f"reference_{number}" if number > 1 else "reference": name if name in worst.keys() - {row.name} else None
        for number, name in enumerate(suite.references, 1)
    }
    others["best_other"] = best_other(row.name, scores)
    return {
        title: (other, paired_difference(worst[row.name], worst[other]) if other else None)
        for title, other in others.items()
    }


def progress(suite: Suite, row: Row) -> str:
    """How many of the seeds have run; before the first, how many draws of the tuning."""
    if row.records:
        done, planned = len(row.records), len(suite.seeds)
        return str(done) if done == planned else f"{done} of {planned}"
    if suite.tuning and row.draw is None and row.scores:
        return f"not run ({len(row.scores)} of {suite.tuning.draws} draws)"
    return "not run"


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation; "-" without a value."""
    if not values:
        return "-"
    around = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{around}"


def _interval(interval: Interval) -> str:
    if interval.n == 1:
        return f"{interval.mean:+.3f} (1 seed)"
    return f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def _settings(suite: Suite, row: Row) -> str:
    given = _listed(suite.methods[row.name])
    if suite.tuning is None:
        return f"{given}."
    if row.draw is None:
        return f"{given}; {len(row.scores)} of {suite.tuning.draws} draws have run."
    score, diverged = abs(row.scores[row.draw]), row.scores.count(-math.inf)
    tried = f"{suite.tuning.draws} draws{f', of which {diverged} diverged,' if diverged else ''}"
    return (
        f"{given}; of {tried} number {row.draw} is the best on validation (worst group "
        f"{score:.3f}, seed {suite.tuning.seed}): {_listed(row.drawn)}."
    )


def written(value: Any) -> str:
    """A value of a grid in a table or a figure."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _listed(settings: Mapping[str, Any]) -> str:
    listed = (f"`{key}={value if isinstance(value, str) else json.dumps(value)}`" for key, value in settings.items())
    return ", ".join(listed) or "the shared settings"


def _provenance(rows: Sequence[Row]) -> str:
    """The code and the machines that made the runs."""
    records = [record for row in rows for record in row.records.values()]
    if not records:
        return ""
    commits = sorted({_short(record["commit"]) for record in records})
    return f"Code: {', '.join(commits)}. Machine: {'; '.join(machines(rows))}."


def machines(rows: Sequence[Row]) -> list[str]:
    """The machines that made the runs, each kind once. Seconds compare on one kind only."""
    return sorted({_machine(record["hardware"]) for row in rows for record in row.records.values()})


def _short(commit: str | None) -> str:
    return "commit not known" if commit is None else commit[:10] + ("-dirty" if commit.endswith("-dirty") else "")


def _machine(hardware: Mapping[str, Any]) -> str:
    threads = f"{hardware['torch_threads']} of {hardware['cpus']} processors"
    return ", ".join([hardware.get("cpu", hardware["machine"]), threads, *hardware["gpus"]])
