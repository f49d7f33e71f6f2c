# SPDX-License-Identifier: Apache-2.0
"""Table and CSV of a suite, from its records alone."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

from .suite import (
    HIGHER,
    LOWER,
    Suite,
    check_records,
    chosen,
    draw_runs,
    points,
    read_record,
    seed_runs,
    validation_score,
)

# title -> metric, in the order of the columns; the third is the worst group
CLASSES = {
    "test accuracy": "accuracy",
    "adjusted": "adjusted_accuracy",
    "worst group": HIGHER,
    "flip rate": "flip_rate",
}
NUMBERS = {"test error (MAE)": "mae", "worst group": LOWER, "pairs' difference": "difference"}
NOTE = "Spread: sample standard deviation over seeds."
NOTE_OF_DIFFERENCES = (
    " Differences: worst group on the test set, method minus other on the "
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
class Standing:
    """What there is of a method, at one point where it is run over a grid.

    Args:
        name: the method.
        point: of the grid; without a key where there is none, or the method stands outside it.
        records: seed -> record.
        draw: number of the draw that its settings come from; `None` without tuning, or before it is done.
        drawn: these settings.
        scores: validation score of each draw that has run, see [`~suite.validation_score`].
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
    """The differences of two methods on the seeds that both have; `None` where there are none."""
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


def standings(suite: Suite) -> list[Standing]:
    """A standing for each method and point of the grid, in the suite's order.

    Raises:
        RecipeError: see [`~suite.check_records`].
    """
    check_records(suite)
    found = []
    for name in suite.methods:
        choice = chosen(suite, name)
        draw, drawn = choice or (None, {})
        scores = [validation_score(record) for run in draw_runs(suite, name) if (record := read_record(run))]
        for point in points(suite, name):
            runs = seed_runs(suite, name, drawn, point) if choice else []
            records = {run.settings["seed"]: record for run in runs if (record := read_record(run))}
            found.append(Standing(name, point, records, draw, drawn, scores))
    return found


def markdown(suite: Suite, found: Sequence[Standing]) -> str:
    """The table, a line on each method's settings, and what the runs were made by."""
    columns = measured_columns(found)
    worst = columns["worst group"]
    titles = ["method", *(f"`{key}`" for key in suite.grid), "seeds"]
    for title in columns:
        extreme = "lowest" if worst == HIGHER else "highest"
        titles += ["worst group, mean ± sd", "median", extreme] if title == "worst group" else [title]
    several = len(suite.methods) > 1
    against = [*(f"`{name}`" for name in suite.references), "the best other"] if several else []
    titles += ["seconds a run", *(f"against {other}" for other in against)]
    rows = [titles, ["---"] * len(titles), *(_row(suite, standing, found, columns) for standing in found)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines[1] = "|" + "---|" * len(titles)
    first = {standing.name: standing for standing in reversed(found)}
    settings = [f"- `{name}`: {_settings(suite, first[name])}" for name in suite.methods]
    note = NOTE + (NOTE_OF_DIFFERENCES if several else "") + (NOTE_OF_GRIDS if suite.grid else "")
    note += (NOTE_OF_POINTS if several and suite.grid else "") + (NOTE_OF_ERRORS if worst == LOWER else "")
    return "\n".join([*lines, "", f"{note} {_provenance(found)}".strip(), "", *settings])


def comma_separated(suite: Suite, found: Sequence[Standing]) -> str:
    """The table with all digits, a row for each method and point of the grid; empty cells are not known."""
    columns = measured_columns(found)
    rows = []
    for standing in found:
        at = {f"grid_{key}": standing.point.get(key, "") for key in suite.grid}
        row: dict[str, Any] = {"method": standing.name, **at, "seeds": len(standing.records)}
        for metric in columns.values():
            values = [*standing.values(metric).values()]
            row[f"{metric}_mean"] = statistics.fmean(values) if values else ""
            row[f"{metric}_sd"] = statistics.stdev(values) if len(values) > 1 else ""
            if metric in (HIGHER, LOWER):
                row[f"{metric}_median"] = statistics.median(values) if values else ""
                extreme = min if metric == HIGHER else max
                row[f"{metric}_{extreme.__name__}"] = extreme(values) if values else ""
        seconds = [record["seconds"] for record in standing.records.values()]
        row["seconds_median"] = statistics.median(seconds) if seconds else ""
        for title, (other, difference) in _differences(suite, standing, found).items():
            row[title] = other or ""
            for part in ("mean", "low", "high", "n"):
                value = getattr(difference, part, "")
                row[f"{title}_difference_{part}"] = "" if value != value else value
        row["draws"], row["draw"] = len(standing.scores), "" if standing.draw is None else standing.draw
        row["settings"] = json.dumps({**suite.methods[standing.name], **standing.drawn, **standing.point})
        rows.append(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, [*rows[0]], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def measured_columns(found: Sequence[Standing]) -> dict[str, str]:
    """Of `CLASSES` or `NUMBERS`, what the records hold."""
    tests = [record["metrics"]["test"] for standing in found for record in standing.records.values()]
    columns = NUMBERS if any(LOWER in test for test in tests) else CLASSES
    measured = {title: metric for title, metric in columns.items() if any(metric in test for test in tests)}
    return measured or columns


def _row(suite: Suite, standing: Standing, found: Sequence[Standing], columns: Mapping[str, str]) -> list[str]:
    at = [written(standing.point[key]) if standing.point else "-" for key in suite.grid]
    cells = [f"`{standing.name}`", *at, progress(suite, standing)]
    for title, metric in columns.items():
        values = [*standing.values(metric).values()]
        cells.append(spread(values))
        if title == "worst group":
            extreme = min if metric == HIGHER else max
            cells += [f"{f(values):.3f}" if values else "-" for f in (statistics.median, extreme)]
    seconds = [record["seconds"] for record in standing.records.values()]
    cells.append(f"{statistics.median(seconds):.0f}" if seconds else "-")
    differences = _differences(suite, standing, found) if len(suite.methods) > 1 else {}
    for title, (other, difference) in differences.items():
        named = f"`{other}`: " if title == "best_other" and difference else ""
        cells.append(f"{named}{_interval(difference)}" if difference else "-")
    return cells


def _differences(
    suite: Suite, standing: Standing, found: Sequence[Standing]
) -> dict[str, tuple[str | None, Interval | None]]:
    """Of the worst group at one point of the grid: to each reference, and to the best other method."""
    metric = measured_columns(found)["worst group"]
    worst = {other.name: other.values(metric) for other in found if other.point in (standing.point, {})}
    sign = 1 if metric == HIGHER else -1
    scores = {name: {seed: sign * value for seed, value in values.items()} for name, values in worst.items()}
    others = {
        f"reference_{number}" if number > 1 else "reference": name if name in worst.keys() - {standing.name} else None
        for number, name in enumerate(suite.references, 1)
    }
    others["best_other"] = best_other(standing.name, scores)
    return {
        title: (other, paired_difference(worst[standing.name], worst[other]) if other else None)
        for title, other in others.items()
    }


def progress(suite: Suite, standing: Standing) -> str:
    """How many of the seeds have run, or what there is of the tuning."""
    if standing.records:
        done, planned = len(standing.records), len(suite.seeds)
        return str(done) if done == planned else f"{done} of {planned}"
    if suite.tuning and standing.draw is None and standing.scores:
        return f"not run ({len(standing.scores)} of {suite.tuning.draws} draws)"
    return "not run"


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation, "-" of no value."""
    if not values:
        return "-"
    around = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{around}"


def _interval(interval: Interval) -> str:
    if interval.n == 1:
        return f"{interval.mean:+.3f} (1 seed)"
    return f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def _settings(suite: Suite, standing: Standing) -> str:
    given = _listed(suite.methods[standing.name])
    if suite.tuning is None:
        return f"{given}."
    if standing.draw is None:
        return f"{given}; {len(standing.scores)} of {suite.tuning.draws} draws have run."
    score, diverged = abs(standing.scores[standing.draw]), standing.scores.count(-math.inf)
    tried = f"{suite.tuning.draws} draws{f', of which {diverged} diverged,' if diverged else ''}"
    return (
        f"{given}; of {tried} number {standing.draw} is the best on validation (worst group "
        f"{score:.3f}, seed {suite.tuning.seed}): {_listed(standing.drawn)}."
    )


def written(value: Any) -> str:
    """A value of a grid in a table or a figure."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _listed(settings: Mapping[str, Any]) -> str:
    listed = (f"`{key}={value if isinstance(value, str) else json.dumps(value)}`" for key, value in settings.items())
    return ", ".join(listed) or "the shared settings"


def _provenance(found: Sequence[Standing]) -> str:
    """Of which code and on what the runs were made."""
    records = [record for standing in found for record in standing.records.values()]
    if not records:
        return ""
    commits = sorted({_short(record["commit"]) for record in records})
    return f"Code: {', '.join(commits)}. Machine: {'; '.join(machines(found))}."


def machines(found: Sequence[Standing]) -> list[str]:
    """On what the runs were made, each kind once; seconds compare within one."""
    return sorted({_machine(record["hardware"]) for standing in found for record in standing.records.values()})


def _short(commit: str | None) -> str:
    return "commit not known" if commit is None else commit[:10] + ("-dirty" if commit.endswith("-dirty") else "")


def _machine(hardware: Mapping[str, Any]) -> str:
    threads = f"{hardware['torch_threads']} of {hardware['cpus']} processors"
    return ", ".join([hardware.get("cpu", hardware["machine"]), threads, *hardware["gpus"]])
