# SPDX-License-Identifier: Apache-2.0
"""Figures of a suite, from its records alone: methods, settings over a grid, the course of the guidance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from ..config import IPGConfig
from .suite import HIGHER, Suite
from .tables import (
    Standing,
    comma_separated,
    machines,
    markdown,
    measured_columns,
    progress,
    spread,
    standings,
    t_interval,
    written,
)

FIGURES = ("figure", "cost", "course")
COURSE = {"divergence": "divergence c of the pairs", "violated": "share of steps with c > t"}


def write_comparison(suite: Suite) -> list[Path]:
    """Writes `table.md` and `table.csv` beside the records; where a run has finished `figure.png`; of a suite without a
    grid `cost.png` too, and where its records hold the course of a guided training, `course.png`.

    Returns:
        The paths of those that were written.

    Raises:
        RecipeError: see [`~suite.check_records`].
    """
    found = standings(suite)
    suite.results.mkdir(parents=True, exist_ok=True)
    table, rows = suite.results / "table.md", suite.results / "table.csv"
    table.write_text(f"# {suite.title}\n\n{markdown(suite, found)}\n", encoding="utf-8")
    rows.write_text(comma_separated(suite, found), encoding="utf-8")
    paths, (figure, cost, course) = [table, rows], (suite.results / f"{name}.png" for name in FIGURES)
    for path in (figure, cost, course):
        path.unlink(missing_ok=True)
    if any(standing.records for standing in found):
        draw = {0: draw_methods, 1: draw_lines, 2: draw_maps}[len(suite.grid)]
        draw(suite, found, figure)
        paths.append(figure)
        if not suite.grid:
            draw_costs(suite, found, cost)
            paths.append(cost)
    guided = [] if suite.grid else guided_courses(suite, found)
    if guided:
        draw_courses(suite, guided, course)
        paths.append(course)
    return paths


def draw_methods(suite: Suite, found: Sequence[Standing], path: Path) -> None:
    """Draws the worst group on the test set: a dot for each seed, mean and 95 % t-interval for each method, as PNG."""
    metric = measured_columns(found)["worst group"]
    figure = _figure(6.4, 1.2 + 0.42 * len(found))
    axes = figure.subplots()
    for place, standing in enumerate(found):
        values = [*standing.values(metric).values()]
        if not values:
            continue
        axes.scatter(values, [place + 0.16] * len(values), s=16, color="tab:blue", alpha=0.55, linewidths=0)
        interval = t_interval(values)
        if interval.n > 1:
            axes.plot([interval.low, interval.high], [place - 0.1] * 2, color="black", linewidth=1.2)
        axes.plot([interval.mean], [place - 0.1], marker="D", markersize=5, color="black")
    axes.set_yticks(range(len(found)), [_label(suite, standing) for standing in found])
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlabel(f"worst-group {_measure(metric)}, test\nseeds, their mean and 95 % t-interval")
    axes.set_xlim(*((-0.02, 1.02) if metric == HIGHER else (0, None)))
    _title(figure, suite)
    axes.grid(axis="x", alpha=0.3)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=140)


def _look(number: int) -> dict[str, str]:
    """Color and marker of the n-th of at most fifty methods: colors come again after ten, with another marker."""
    return {"color": f"C{number % 10}", "marker": "os^Dv"[number // 10 % 5]}


def draw_costs(suite: Suite, found: Sequence[Standing], path: Path) -> None:
    """Draws the worst group on the test set (mean and sample standard deviation over seeds) against the median seconds
    of a training, a mark for each method, as PNG; says so where the runs were made on more than one kind of machine."""
    metric = measured_columns(found)["worst group"]
    figure = _figure(7.6, 4.2)
    axes = figure.subplots()
    for number, standing in enumerate(found):
        values = [*standing.values(metric).values()]
        if not values:
            continue
        seconds = statistics.median(record["seconds"] for record in standing.records.values())
        around = statistics.stdev(values) if len(values) > 1 else 0.0
        look = _look(number) | {"markersize": 6}
        label = _label(suite, standing)
        axes.errorbar([seconds], [statistics.fmean(values)], around, linestyle="", capsize=2, label=label, **look)
    axes.set_xlim(0, None)
    mixed = "\non different machines: these seconds do not compare" if len(machines(found)) > 1 else ""
    axes.set_xlabel(f"seconds of a training with its evaluations, median{mixed}")
    _save_worst_groups(figure, axes, suite, metric, path)


def draw_lines(suite: Suite, found: Sequence[Standing], path: Path) -> None:
    """Draws the worst group on the test set over a grid of one key, as PNG.

    For each method a line of the means over seeds in a band of one sample standard deviation to each side (none for one
    seed); dashed and level for a method outside the grid.
    """
    metric = measured_columns(found)["worst group"]
    ((key, values),) = suite.grid.items()
    places, logarithmic = _places(values)
    figure = _figure(7.6, 4.2)
    axes = figure.subplots()
    for number, name in enumerate(suite.methods):
        rows = [standing for standing in found if standing.name == name]
        measured = {one.point.get(key): [*one.values(metric).values()] for one in rows if one.values(metric)}
        if name in suite.ungridded:
            measured = dict.fromkeys(values, measured[None]) if measured else {}
        drawn = sorted((places[value], scores) for value, scores in measured.items())
        means = [statistics.fmean(scores) for _, scores in drawn]
        around = [statistics.stdev(scores) if len(scores) > 1 else 0.0 for _, scores in drawn]
        x, look = [place for place, _ in drawn], _look(number) | {"markersize": 4}
        look |= {"linestyle": "--", "marker": ""} if name in suite.ungridded else {}
        axes.plot(x, means, label=_name_and_seeds(suite, name, rows), **look)
        low, high = (
            zip(*((m - sd, m + sd) for m, sd in zip(means, around, strict=True)), strict=True) if x else ((), ())
        )
        axes.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)
    if logarithmic:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks([*places.values()], [written(value) for value in places])
    axes.set_xlabel(key)
    _save_worst_groups(figure, axes, suite, metric, path)


def draw_maps(suite: Suite, found: Sequence[Standing], path: Path) -> None:
    """Draws the worst group on the test set over a grid of two keys, as PNG.

    For each method of the grid a map: in each cell mean and sample standard deviation over seeds, colored by the mean.
    A method outside the grid is a line of text below.
    """
    metric = measured_columns(found)["worst group"]
    (key, down), (other, across) = suite.grid.items()
    gridded = [name for name in suite.methods if name not in suite.ungridded]
    wide, tall = 1.6 + 0.85 * len(across), 1.6 + 0.55 * len(down)
    figure = _figure(wide * len(gridded) + 0.8, tall)
    panels = figure.subplots(1, len(gridded), squeeze=False)[0]
    means = [statistics.fmean(one.values(metric).values()) for one in found if one.point and one.values(metric)]
    low, high = (0.0, 1.0) if metric == HIGHER else (0.0, max(means, default=1.0))
    for axes, name in zip(panels, gridded, strict=True):
        rows = [standing for standing in found if standing.name == name]
        cells = [[math.nan] * len(across) for _ in down]
        for standing in rows:
            scores = [*standing.values(metric).values()]
            y, x = down.index(standing.point[key]), across.index(standing.point[other])
            cells[y][x] = statistics.fmean(scores) if scores else math.nan
            # light on the dark half of the map
            dark = scores and (cells[y][x] - low < (high - low) / 2) == (metric == HIGHER)
            text = spread(scores).replace(" ", "\n", 1) if scores else "not run"
            axes.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
        colors = "viridis" if metric == HIGHER else "viridis_r"
        image = axes.imshow(cells, cmap=colors, vmin=low, vmax=high, aspect="auto")
        axes.set_xticks(range(len(across)), [written(value) for value in across])
        axes.set_yticks(range(len(down)), [written(value) for value in down])
        axes.set_xlabel(other)
        axes.set_ylabel(key)
        axes.set_title(_name_and_seeds(suite, name, rows), fontsize=9)
        axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=[*panels], label=f"worst-group {_measure(metric)}")
    _title(figure, suite)
    level = [f"{one.name}: {spread([*one.values(metric).values()])}" for one in found if not one.point]
    figure.supxlabel("\n".join(["Test set, mean ± sd over seeds. No setting is chosen by it.", *level]), fontsize=8)
    figure.savefig(path, dpi=140)


def guided_courses(suite: Suite, found: Sequence[Standing]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """The methods that guide by their pairs, with those of their records that hold the course of the divergence."""
    courses = []
    for standing in found:
        settings = {**suite.base, **suite.methods[standing.name], **standing.drawn}
        guided = settings.get("method", "ipg") == "ipg" and settings.get("pair_objective", "ipg") == "ipg"
        records = [
            one for one in standing.records.values() if "divergence" in one.get("course", {}).get("guidance", {})
        ]
        if guided and records:
            courses.append((standing.name, records))
    return courses


def draw_courses(suite: Suite, courses: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], path: Path) -> None:
    """Draws the divergence of the pair batches against the threshold, and the share of steps in which it was above, as
    PNG: over the training, a column for each method, a line for each seed (means between two log lines).

    Args:
        suite: the suite.
        courses: see [`guided_courses`], not empty.
        path: file to write.
    """
    figure = _figure(1.2 + 3.0 * len(courses), 5.2)
    panels = figure.subplots(2, len(courses), sharex=True, sharey="row", squeeze=False)
    for column, (name, records) in enumerate(courses):
        for row, key in enumerate(COURSE):
            axes = panels[row][column]
            for record in records:
                guidance = record["course"]["guidance"]
                if key in guidance:
                    axes.plot(guidance["step"], guidance[key], color="tab:blue", alpha=0.5, linewidth=1)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0][column].set_title(f"{name} ({len(records)} seed{'s' if len(records) > 1 else ''})", fontsize=9)
        panels[1][column].set_xlabel("optimizer step")
        # the seeds of a method have one setting
        threshold = records[0]["config"].get("invariance_threshold", IPGConfig.invariance_threshold)
        if 0 < threshold < math.inf:
            label = f"threshold t = {threshold:g}"
            panels[0][column].axhline(threshold, color="tab:red", linestyle="--", linewidth=1, label=label)
            panels[0][column].legend(fontsize=8, loc="upper right")
    divergences = [
        value for _, records in courses for one in records for value in one["course"]["guidance"]["divergence"]
    ]
    if any(value > 0 for value in divergences):
        panels[0][0].set_yscale("log")
    panels[1][0].set_ylim(-0.03, 1.03)
    for row, title in enumerate(COURSE.values()):
        panels[row][0].set_ylabel(title)
    _title(figure, suite)
    figure.savefig(path, dpi=140)


def _save_worst_groups(figure: Any, axes: Any, suite: Suite, metric: str, path: Path) -> None:
    """What the figures with the worst group upwards share."""
    axes.set_ylabel(f"worst-group {_measure(metric)}, test: mean ± sd")
    axes.set_ylim(*((-0.02, 1.02) if metric == HIGHER else (0, None)))
    _title(figure, suite)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", fontsize=9, frameon=False)
    figure.savefig(path, dpi=140)


def _title(figure: Any, suite: Suite) -> None:
    # over the whole width, since the axes begin where the names of the methods end
    figure.suptitle(fill(suite.title, 12 * int(figure.get_figwidth())), fontsize=10)


def _figure(width: float, height: float) -> Any:
    # the object interface: the backend that the user has chosen stays as it is
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _places(values: Sequence[Any]) -> tuple[dict[Any, float], bool]:
    """Where the values of a key stand on an axis, and whether that is logarithmic: they are more than a decade apart.

    Words stand side by side, and so do numbers with an infinite one among them.
    """
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    if not numbers or not all(map(math.isfinite, values)):
        return {value: place for place, value in enumerate(values)}, False
    return {value: value for value in values}, min(values) > 0 and max(values) > 10 * min(values)


def _measure(metric: str) -> str:
    return "accuracy" if metric == HIGHER else "error (MAE)"


def _label(suite: Suite, standing: Standing) -> str:
    done = len(standing.records)
    text = progress(suite, standing)
    return standing.name if done == len(suite.seeds) else f"{standing.name} ({text}{' seeds' if done else ''})"


def _name_and_seeds(suite: Suite, name: str, rows: Sequence[Standing]) -> str:
    """A method with what is missing of its runs."""
    done, planned = sum(len(one.records) for one in rows), len(rows) * len(suite.seeds)
    return name if done == planned else f"{name} ({done} of {planned} runs)"
