# SPDX-License-Identifier: Apache-2.0
"""Figures of a suite, made of its records: methods, settings over a grid, the divergence over the training."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from ..metrics import METRICS
from .suite import Suite
from .tables import (
    Row,
    comma_separated,
    machines,
    markdown,
    progress,
    spread,
    suite_rows,
    t_interval,
    worst_group,
    written,
)

FIGURES = ("figure", "cost", "guidance")
GUIDANCE = {"divergence": "divergence c of the pairs", "violated": "share of steps with c > t"}
GUIDED = ("ipg", "ablation")


def write_comparison(suite: Suite) -> list[Path]:
    """Writes `table.md` and `table.csv`, and once a run has finished `figure.png`.

    Of a suite without a grid also `cost.png`, and `guidance.png` where records have the divergence over the training.

    Returns:
        The paths of the files that were written.

    Raises:
        RecipeError: a record does not belong to the suite, as [`~suite.suite_records`] describes.
    """
    rows = suite_rows(suite)
    suite.results.mkdir(parents=True, exist_ok=True)
    table, values = suite.results / "table.md", suite.results / "table.csv"
    table.write_text(f"# {suite.title}\n\n{markdown(suite, rows)}\n", encoding="utf-8")
    values.write_text(comma_separated(suite, rows), encoding="utf-8")
    paths, (figure, cost, guidance) = [table, values], (suite.results / f"{name}.png" for name in FIGURES)
    for path in (figure, cost, guidance):
        path.unlink(missing_ok=True)
    if any(row.records for row in rows):
        draw = {0: draw_methods, 1: draw_lines, 2: draw_maps}[len(suite.grid)]
        draw(suite, rows, figure)
        paths.append(figure)
        if not suite.grid:
            draw_costs(suite, rows, cost)
            paths.append(cost)
    guided = [] if suite.grid else guided_records(rows)
    if guided:
        draw_guidance(suite, guided, guidance)
        paths.append(guidance)
    return paths


def draw_methods(suite: Suite, rows: Sequence[Row], path: Path) -> None:
    """Draws the worst group on the test set as a PNG: a dot for each seed, mean and 95 % t-interval for each method."""
    metric = worst_group(rows)
    figure = _figure(6.4, 1.2 + 0.42 * len(rows))
    axes = figure.subplots()
    for place, row in enumerate(rows):
        values = [*row.values(metric).values()]
        if not values:
            continue
        axes.scatter(values, [place + 0.16] * len(values), s=16, color="tab:blue", alpha=0.55, linewidths=0)
        interval = t_interval(values)
        if interval.n > 1:
            axes.plot([interval.low, interval.high], [place - 0.1] * 2, color="black", linewidth=1.2)
        axes.plot([interval.mean], [place - 0.1], marker="D", markersize=5, color="black")
    axes.set_yticks(range(len(rows)), [_label(suite, row) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(f"{METRICS[metric].title}, test\nseeds, their mean and 95 % t-interval", loc="right")
    axes.set_xlim(*((-0.02, 1.02) if _is_higher(metric) else (0, None)))
    _title(figure, suite)
    axes.grid(axis="x", alpha=0.3)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=140)


def _look(number: int) -> dict[str, str]:
    """Color and marker of the n-th of at most fifty methods; after ten, the colors repeat with another marker."""
    return {"color": f"C{number % 10}", "marker": "os^Dv"[number // 10 % 5]}


def draw_costs(suite: Suite, rows: Sequence[Row], path: Path) -> None:
    """Draws the worst group on the test set against the median seconds of a training as a PNG, a mark for each method.

    Bars are one sample standard deviation over seeds. The axis says so where the runs were made on several kinds of
    machines.
    """
    metric = worst_group(rows)
    figure = _figure(7.6, 4.2)
    axes = figure.subplots()
    for number, row in enumerate(rows):
        values = [*row.values(metric).values()]
        if not values:
            continue
        seconds = statistics.median(record["seconds"] for record in row.records.values())
        around = statistics.stdev(values) if len(values) > 1 else 0.0
        look = _look(number) | {"markersize": 6}
        label = _label(suite, row)
        axes.errorbar([seconds], [statistics.fmean(values)], around, linestyle="", capsize=2, label=label, **look)
    axes.set_xlim(0, None)
    mixed = "\non different machines: these seconds do not compare" if len(machines(rows)) > 1 else ""
    axes.set_xlabel(f"seconds of a training with its evaluations, median{mixed}")
    _save_worst_groups(figure, axes, suite, metric, path)


def draw_lines(suite: Suite, rows: Sequence[Row], path: Path) -> None:
    """Draws the worst group on the test set over a grid of one key, as a PNG.

    For each method a line of the means over seeds in a band of one sample standard deviation to each side (none for one
    seed); dashed and level for a method outside the grid.
    """
    metric = worst_group(rows)
    ((key, values),) = suite.grid.items()
    places, logarithmic = _places(values)
    figure = _figure(7.6, 4.2)
    axes = figure.subplots()
    for number, name in enumerate(suite.methods):
        runs = [row for row in rows if row.name == name]
        measured = {one.point.get(key): [*one.values(metric).values()] for one in runs if one.values(metric)}
        if name in suite.ungridded:
            measured = dict.fromkeys(values, measured[None]) if measured else {}
        drawn = sorted((places[value], scores) for value, scores in measured.items())
        means = [statistics.fmean(scores) for _, scores in drawn]
        around = [statistics.stdev(scores) if len(scores) > 1 else 0.0 for _, scores in drawn]
        x, look = [place for place, _ in drawn], _look(number) | {"markersize": 4}
        look |= {"linestyle": "--", "marker": ""} if name in suite.ungridded else {}
        axes.plot(x, means, label=_name_and_seeds(suite, name, runs), **look)
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


def draw_maps(suite: Suite, rows: Sequence[Row], path: Path) -> None:
    """Draws the worst group on the test set over a grid of two keys, as a PNG.

    For each method of the grid a map: in each cell mean and sample standard deviation over seeds, colored by the mean.
    A method outside the grid is a line of text below.
    """
    metric = worst_group(rows)
    (key, down), (other, across) = suite.grid.items()
    gridded = [name for name in suite.methods if name not in suite.ungridded]
    wide, tall = 1.6 + 0.85 * len(across), 1.6 + 0.55 * len(down)
    figure = _figure(wide * len(gridded) + 0.8, tall)
    panels = figure.subplots(1, len(gridded), squeeze=False)[0]
    means = [statistics.fmean(one.values(metric).values()) for one in rows if one.point and one.values(metric)]
    low, high = (0.0, 1.0) if _is_higher(metric) else (0.0, max(means, default=1.0))
    for axes, name in zip(panels, gridded, strict=True):
        runs = [row for row in rows if row.name == name]
        cells = [[math.nan] * len(across) for _ in down]
        for row in runs:
            scores = [*row.values(metric).values()]
            y, x = down.index(row.point[key]), across.index(row.point[other])
            cells[y][x] = statistics.fmean(scores) if scores else math.nan
            # light on the dark half of the map
            dark = scores and (cells[y][x] - low < (high - low) / 2) == _is_higher(metric)
            text = spread(scores).replace(" ", "\n", 1) if scores else "not run"
            axes.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
        colors = "viridis" if _is_higher(metric) else "viridis_r"
        image = axes.imshow(cells, cmap=colors, vmin=low, vmax=high, aspect="auto")
        axes.set_xticks(range(len(across)), [written(value) for value in across])
        axes.set_yticks(range(len(down)), [written(value) for value in down])
        axes.set_xlabel(other)
        axes.set_ylabel(key)
        axes.set_title(_name_and_seeds(suite, name, runs), fontsize=9)
        axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=[*panels], label=METRICS[metric].title)
    _title(figure, suite)
    level = [f"{one.name}: {spread([*one.values(metric).values()])}" for one in rows if not one.point]
    figure.supxlabel("\n".join(["Test set, mean ± sd over seeds. No setting is chosen by it.", *level]), fontsize=8)
    figure.savefig(path, dpi=140)


def guided_records(rows: Sequence[Row]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Of each method that corrects by its pairs, the records that have the divergence over the training."""
    found = []
    for row in rows:
        records = [one for one in row.records.values() if "divergence" in one.get("course", {}).get("guidance", {})]
        records = [one for one in records if one["method"] in GUIDED]
        if records:
            found.append((row.name, records))
    return found


def draw_guidance(suite: Suite, guided: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], path: Path) -> None:
    """Draws the divergence of the pair batches, and the share of steps in which it was above the threshold, as a PNG.

    The figure has a column for each method and a line for each seed, over the steps of the training. A point is the
    mean since the log line before.

    Args:
        suite: the suite.
        guided: names of methods with their records, as [`guided_records`] returns them, at least one.
        path: file to write.
    """
    figure = _figure(1.2 + 3.0 * len(guided), 5.2)
    panels = figure.subplots(2, len(guided), sharex=True, sharey="row", squeeze=False)
    for column, (name, records) in enumerate(guided):
        for line, key in enumerate(GUIDANCE):
            axes = panels[line][column]
            for record in records:
                logged = record["course"]["guidance"]
                if key in logged:
                    axes.plot(logged["step"], logged[key], color="tab:blue", alpha=0.5, linewidth=1)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0][column].set_title(f"{name} ({len(records)} seed{'s' if len(records) > 1 else ''})", fontsize=9)
        panels[1][column].set_xlabel("optimizer step")
        threshold = records[0]["settings"]["invariance_threshold"]  # the seeds of a method have one
        if 0 < threshold < math.inf:
            label = f"threshold t = {threshold:g}"
            panels[0][column].axhline(threshold, color="tab:red", linestyle="--", linewidth=1, label=label)
            panels[0][column].legend(fontsize=8, loc="upper right")
    divergences = [
        value for _, records in guided for one in records for value in one["course"]["guidance"]["divergence"]
    ]
    if any(value > 0 for value in divergences):
        panels[0][0].set_yscale("log")
    panels[1][0].set_ylim(-0.03, 1.03)
    for line, title in enumerate(GUIDANCE.values()):
        panels[line][0].set_ylabel(title)
    _title(figure, suite)
    figure.savefig(path, dpi=140)


def _save_worst_groups(figure: Any, axes: Any, suite: Suite, metric: str, path: Path) -> None:
    """Labels, limits and legend of the figures with the worst group on the vertical axis."""
    axes.set_ylabel(f"{METRICS[metric].title}, test: mean ± sd")
    axes.set_ylim(*((-0.02, 1.02) if _is_higher(metric) else (0, None)))
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
    """The places of a key's values on an axis, and whether the axis is logarithmic.

    It is logarithmic where the values are more than a decade apart. Words have equal distances, and so have numbers
    with an infinite one among them.
    """
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    if not numbers or not all(map(math.isfinite, values)):
        return {value: place for place, value in enumerate(values)}, False
    return {value: value for value in values}, min(values) > 0 and max(values) > 10 * min(values)


def _is_higher(metric: str) -> bool:
    """Whether higher values are better."""
    return METRICS[metric].direction == "higher"


def _label(suite: Suite, row: Row) -> str:
    done = len(row.records)
    text = progress(suite, row)
    return row.name if done == len(suite.seeds) else f"{row.name} ({text}{' seeds' if done else ''})"


def _name_and_seeds(suite: Suite, name: str, rows: Sequence[Row]) -> str:
    """The name of a method, with the number of its runs where some are missing."""
    done, planned = sum(len(one.records) for one in rows), len(rows) * len(suite.seeds)
    return name if done == planned else f"{name} ({done} of {planned} runs)"
