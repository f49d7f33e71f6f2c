# SPDX-License-Identifier: Apache-2.0
"""Draws the figures of an audit report from the numbers of the report."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

INK, FAINT = "#1b1f24", "#57606a"
COLORS = ("#0b5cad", "#b35900")  # of the first and the second model, as on the page
VALUES = "tab10"  # matplotlib's colours for labels, attributes and groups
WIDTH = 4.4  # inches: legible on a phone, which shows a figure at about its width
MARKS = ("o", "s")  # of the first and the second model, so that they differ without colour too
DRAWN_GROUPS = 24
DRAWN_LINES = 8
NAMED = 10  # values that differ clearly by colour
LETTERS = 24  # length of a name in a figure
GUIDED = ("distance", "divergence", "violated", "loss_scale")
COURSES = {
    "accuracy": "validation accuracy by group",
    "distance": "distance d of the pairs",
    "divergence": "invariance divergence c",
    "violated": "share of violated steps",
    "loss_scale": "factor on the task gradient",
}


@dataclass(frozen=True)
class Drawn:
    """A figure."""

    name: str  # of its file, without suffix
    caption: str
    alt: str  # the text for readers who do not see it
    image: bytes  # PNG


def draw_figures(report: Mapping[str, Any]) -> dict[str, list[list[Drawn]]]:
    """Draws all figures of a report.

    Args:
        report: the report of `audit.measure.audit`.

    Returns:
        Section (`groups`, `projection`, `rationales`, `training`, `guidance`) -> a list of figures for each model.
        `groups` has one list, since its figure shows both models. Figures of the same kind have the same axes for both
        models.
    """
    models = report["models"]
    figures = {
        "groups": [[_groups(models)]],
        "projection": [_projections(entry, number, report) for number, entry in enumerate(models)],
        "rationales": [_rationales(models, number) for number in range(len(models))],
        "training": [_courses(models, number, ["accuracy"]) for number in range(len(models))],
        "guidance": [_courses(models, number, GUIDED) for number in range(len(models))],
    }
    return {section: parts for section, parts in figures.items() if any(parts)}


def _draw(plot: Callable[[Any], None], height: float = 3.3) -> bytes:
    # the object interface: the backend that the user has chosen stays as it is
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colors = {"text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT, "grid.color": FAINT}
    colors |= {"xtick.color": INK, "ytick.color": INK}
    # names of classes may hold a $
    settings = {"font.size": 9, "text.parse_math": False, "grid.alpha": 0.3, "axes.titlesize": 10}
    with matplotlib.style.context(["default", colors | settings]):
        figure = Figure(figsize=(WIDTH, height), dpi=160, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        plot(figure.subplots())
        buffer = io.BytesIO()
        canvas.print_png(buffer)
    return buffer.getvalue()


def group_names(group: Mapping[str, Any]) -> list[str]:
    """The label and the attribute of a group; the label alone where images have no attribute."""
    return [group[key] for key in ("label", "attribute") if group[key]]


def _short(name: str) -> str:
    return name if len(name) <= LETTERS else name[: LETTERS - 1] + "…"


def _of(models: Sequence[Mapping[str, Any]], number: int) -> str:
    return f"{models[number]['name']}: " if len(models) > 1 else ""


def _limits(values: Iterable[float | None], log: bool = False, margin: float = 0.06) -> tuple[float, float]:
    """Axis limits around finite values, with a margin, a share of their range."""
    known = [v for v in values if v is not None and math.isfinite(v) and (v > 0 or not log)]
    if not known:
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = min(known), max(known)
    if log:
        return low / 1.5, high * 1.5
    room = margin * (high - low) or 0.5
    return low - room, high + room


# ---- Groups ----


def _groups(models: Sequence[Mapping[str, Any]]) -> Drawn:
    rows = range(len(models[0]["groups"]))
    if len(rows) > DRAWN_GROUPS:
        lowest = {row: min(entry["groups"][row]["accuracy"] for entry in models) for row in rows}
        rows = sorted(sorted(lowest, key=lowest.get)[:DRAWN_GROUPS])

    def plot(axes: Any) -> None:
        for number, entry in enumerate(models):
            groups = [entry["groups"][row] for row in rows]
            shift = (number - (len(models) - 1) / 2) * 0.26
            values = [group["accuracy"] for group in groups]
            # rounding must not make a length negative
            spread = [[max(0, value - group["low"]) for value, group in zip(values, groups, strict=True)]]
            spread += [[max(0, group["high"] - value) for value, group in zip(values, groups, strict=True)]]
            places = [place + shift for place in range(len(groups))]
            style = {"fmt": MARKS[number], "color": COLORS[number], "markersize": 5, "capsize": 2.5}
            axes.errorbar(values, places, xerr=spread, label=_short(entry["name"]), clip_on=False, zorder=3, **style)
        names = [" / ".join(map(_short, group_names(models[0]["groups"][row]))) for row in rows]
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(0, 1)
        axes.set_xlabel("accuracy, 95 % interval")
        axes.grid(axis="x")
        if len(models) > 1:
            axes.figure.legend(loc="outside upper center", ncols=2, frameon=False)

    total = len(models[0]["groups"])
    which = f"the {len(rows)} of {total} groups with the lowest accuracy" if len(rows) < total else "each group"
    caption = f"Accuracy of {which} (label / attribute) with its 95 % interval"
    alt = f"{caption}; the numbers are in the table."
    return Drawn("groups", caption, alt, _draw(plot, 1.1 + 0.3 * len(rows) + 0.25 * (len(models) > 1)))


# ---- Features ----


def _projections(entry: Mapping[str, Any], number: int, report: Mapping[str, Any]) -> list[Drawn]:
    found = entry["projection"]
    if found is None:
        return []
    of = _of(report["models"], number)
    drawn = []
    for column, key in ((2, "label"), (3, "attribute")):
        names = report[f"{key}s"]
        if names == [""]:  # there is no attribute
            continue

        def plot(axes: Any, column: int = column, names: Sequence[str] = names) -> None:
            x, y, values = ([point[place] for point in found["points"]] for place in (0, 1, column))
            style = {"s": 12, "alpha": 0.7, "linewidths": 0.3, "edgecolors": FAINT}
            if len(names) > NAMED:
                axes.figure.colorbar(axes.scatter(x, y, c=values, cmap="viridis", **style), ax=axes)
            else:
                for value, (name, color) in enumerate(zip(names, _colors(names), strict=True)):
                    rows = [row for row, other in enumerate(values) if other == value]
                    if rows:
                        axes.scatter(
                            [x[r] for r in rows], [y[r] for r in rows], label=_short(name), color=color, **style
                        )
                axes.figure.legend(loc="outside upper center", ncols=3, frameon=False, markerscale=2)
            for axis, share in zip((axes.set_xlabel, axes.set_ylabel), found["explained"], strict=True):
                axis(f"component {1 if axis == axes.set_xlabel else 2} ({100 * share:.3g} % of variance)")
            axes.grid()

        caption = f"{of}features z, coloured by {key}"
        alt = f"{caption}: {found['shown']} of {found['of']} images on the first two principal components."
        drawn.append(Drawn(f"projection-{key}-{number + 1}", caption, alt, _draw(plot)))
    return drawn


def _colors(names: Sequence[str]) -> list[Any]:
    """A colour for each of at most [`NAMED`] values. Values that are all names of colours get these colours."""
    import matplotlib
    from matplotlib.colors import CSS4_COLORS

    if all(name in CSS4_COLORS for name in names):
        return [*names]
    return [*matplotlib.colormaps[VALUES].colors[: len(names)]]


def _rationales(models: Sequence[Mapping[str, Any]], number: int) -> list[Drawn]:
    if not models[number]["rationales"]:
        return []
    every = [entry["rationales"] or {} for entry in models]
    several = len(models[number]["rationales"]) > 1
    drawn = []
    for key, classes in models[number]["rationales"].items():
        parts = [part for found in every for other in found.get(key, []) for part in _bars(other)]
        limits = _limits([0.0, *(value for _, value in parts)], margin=0.18)  # room for the numbers
        for place, part in enumerate(classes):

            def plot(axes: Any, part: Any = part, limits: tuple[float, float] = limits) -> None:
                bars = _bars(part)
                colors = [*[COLORS[number]] * (len(bars) - 2), FAINT, INK]
                drawn_bars = axes.barh(range(len(bars)), [value for _, value in bars], color=colors)
                axes.bar_label(drawn_bars, [f"{value:.3g}" for _, value in bars], padding=3, fontsize=8)
                axes.set_yticks(range(len(bars)), [name for name, _ in bars])
                axes.invert_yaxis()
                axes.set_xlim(*limits)
                axes.axvline(0, color=INK, linewidth=0.8)
                axes.set_xlabel("contribution to logit a − logit b")
                axes.grid(axis="x")

            of = _of(models, number)
            caption = f"{of}{f'pairs of {key}, ' if several else ''}class {part['label']}"
            alt = f"{caption}: contributions of the largest features to the logit difference of the two sides."
            slug = f"rationales-{f'{_slug(key)}-' if several else ''}{place + 1}-{number + 1}"
            drawn.append(Drawn(slug, caption, alt, _draw(plot)))
    return drawn


def _bars(part: Mapping[str, Any]) -> list[tuple[str, float]]:
    bars = [(f"z{feature['feature']}", feature["contribution"]) for feature in part["features"]]
    return [
        *bars,
        (f"{part['rest']['features']} others", part["rest"]["contribution"]),
        ("sum", part["logit_difference"]),
    ]


def _slug(name: str) -> str:
    return "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in name)


# ---- Training ----


def _courses(models: Sequence[Mapping[str, Any]], number: int, panels: Sequence[str]) -> list[Drawn]:
    course = models[number]["training"]
    if course is None:
        return []
    courses = [entry["training"] for entry in models if entry["training"]]
    steps = _limits([0, *(entry["step"] for c in courses for part in ("guided", "evaluated") for entry in c[part])])
    drawn = []
    for key in panels:
        if not course["evaluated" if key == "accuracy" else "guided"]:
            continue
        lines = [values for c in courses for values in _lines(c, key).values()]
        known = [value for values in lines for _, value in values]
        thresholds = [c["threshold"] for c in courses if c["guided"] and _is_drawn(c["threshold"])]
        log = key in ("distance", "divergence") and any(value > 0 for value in known)
        limits = _limits([*known, *(thresholds if key == "divergence" else ())], log)
        if key in ("violated", "accuracy"):
            limits = (-0.03, 1.03)

        def plot(axes: Any, key: str = key, limits: tuple[float, float] = limits, log: bool = log) -> None:
            from matplotlib.ticker import LogLocator

            _plot_course(axes, course, key, number)
            axes.set_xlim(*steps)
            if log:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter(lambda tick, _: f"{tick:g}")
                axes.yaxis.set_minor_formatter(lambda tick, _: "")
            axes.set_ylim(*limits)

        caption = f"{_of(models, number)}{COURSES[key]}"
        alt = f"{caption} over the optimizer steps of the training."
        drawn.append(Drawn(f"training-{key}-{number + 1}", caption, alt, _draw(plot)))
    return drawn


def _is_drawn(threshold: float | None) -> bool:
    return threshold is not None and 0 < threshold < math.inf


def _lines(course: Mapping[str, Any], key: str) -> dict[str, list[tuple[int, float]]]:
    """The lines of a panel: name -> (step, value). Values that are not known are left out."""
    if key != "accuracy":
        lines = {"": [(entry["step"], entry[key]) for entry in course["guided"]]}
    else:
        last = course["evaluated"][-1]["groups"] if course["evaluated"] else {}
        shown = sorted(sorted(last, key=last.get)[:DRAWN_LINES])
        lines = {name: [(entry["step"], entry["groups"].get(name)) for entry in course["evaluated"]] for name in shown}
        lines["worst group"] = [(entry["step"], entry["worst_group_accuracy"]) for entry in course["evaluated"]]
    return {
        name: [(step, value) for step, value in values if value is not None and math.isfinite(value)]
        for name, values in lines.items()
    }


def _plot_course(axes: Any, course: Mapping[str, Any], key: str, number: int) -> None:
    for name, values in _lines(course, key).items():
        style = {"color": COLORS[number], "marker": "."} if not name else {"linewidth": 1.1}
        if name == "worst group":
            style = {"color": INK, "linewidth": 2.2}
        axes.plot(*zip(*values, strict=True), label=_short(name), **style) if values else None
    if key == "divergence" and _is_drawn(course["threshold"]):
        axes.axhline(course["threshold"], color=FAINT, linestyle="--", label=f"t = {course['threshold']:g}")
    if key in ("divergence", "accuracy") and axes.get_legend_handles_labels()[0]:
        axes.figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    axes.set_xlabel("optimizer step")
    axes.grid()
