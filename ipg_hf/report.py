# SPDX-License-Identifier: Apache-2.0
"""Tables and the figure of a run, and pages with generated parts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .metrics import METRICS, group_parts


def fill_marked(page: str, marker: str, made: Callable[..., str]) -> str:
    """A page with each part between `<!-- MARKER: WORD ... -->` and `<!-- end -->` made anew.

    Args:
        page: the text of the page.
        marker: the word after `<!-- `.
        made: called with the words of a marker, returns the text of its part.
    """
    start = f"<!-- {marker}: "
    parts = page.split(start)
    for number, part in enumerate(parts[1:], 1):
        words, rest = part.split(" -->", 1)[0], part.split("<!-- end -->", 1)[1]
        parts[number] = f"{words} -->\n{made(*words.split())}\n<!-- end -->{rest}"
    return start.join(parts)


def summary_table(columns: Mapping[str, Mapping[str, float]], split: str = "test") -> str:
    """A table with a row for each of `METRICS` that a model has, one column a model.

    Args:
        columns: model name -> metrics with the keys of `run.json`.
        split: the split that they were measured on, the table's title.
    """
    found = [key for key in METRICS if any(key in metrics for metrics in columns.values())]
    first = max(len(title) for title in [split, *(METRICS[key].title for key in found)])
    width = max(8, *(len(name) for name in columns)) + 2
    lines = [f"{split:<{first}}" + "".join(f"{name:>{width}}" for name in columns)]
    for key in found:
        cells = [f"{metrics[key]:.3f}" if key in metrics else "-" for metrics in columns.values()]
        lines.append(f"{METRICS[key].title:<{first}}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)


def group_table(metrics: Mapping[str, float]) -> str:
    """A table of the accuracy (of a regression: the error) of each group with its size; empty without groups."""
    errors = any(key.startswith("group_mae/") for key in metrics)
    prefix = "group_mae/" if errors else "group_accuracy/"
    groups = {key[len(prefix) :]: value for key, value in metrics.items() if key.startswith(prefix)}
    if not groups:
        return ""
    # a line break in a name would tear the table
    rows = [(" ".join("/".join(group_parts(name)).split()), name, value) for name, value in groups.items()]
    width = max([len("label/attribute"), *(len(title) for title, _, _ in rows)]) + 2
    lines = [f"{'label/attribute':<{width}}{'error' if errors else 'accuracy':>9}{'n':>8}"]
    lines += [f"{title:<{width}}{value:>9.3f}{int(metrics[f'group_n/{name}']):>8}" for title, name, value in rows]
    return "\n".join(lines)


def plot_training(history: Sequence[Mapping[str, float]], path: str | os.PathLike, threshold: float) -> None:
    """Draws distance, divergence against the threshold, and validation group accuracies over the steps, as a PNG.

    Args:
        history: `trainer.state.log_history`.
        path: file to write.
        threshold: t; a line where it is finite and above 0.
    """
    # the object interface: the backend that the user has chosen stays as it is
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    guided = [entry for entry in history if "ipg/distance" in entry]
    evaluated = [entry for entry in history if "eval_accuracy" in entry]
    panels = (["distance", "divergence"] if guided else []) + (["accuracy"] if evaluated else [])
    if not panels:
        return
    figure = Figure(figsize=(4.6 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
        if panel == "accuracy":
            _plot_groups(axes, evaluated)
            continue
        axes.plot([e["step"] for e in guided], [e[f"ipg/{panel}"] for e in guided], color="tab:blue")
        axes.set_title({"distance": "distance d", "divergence": "invariance divergence c"}[panel])
        if any(e[f"ipg/{panel}"] > 0 for e in guided):
            axes.set_yscale("log")
        if panel == "divergence" and 0 < threshold < float("inf"):
            axes.axhline(threshold, color="tab:red", linestyle="--", label=f"threshold t = {threshold:g}")
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _plot_groups(axes: Any, evaluated: Sequence[Mapping[str, float]]) -> None:
    steps = [entry["step"] for entry in evaluated]
    prefix = "eval_group_accuracy/"
    for key in sorted({key for entry in evaluated for key in entry if key.startswith(prefix)}):
        axes.plot(steps, [entry.get(key, float("nan")) for entry in evaluated], lw=1, label=key[len(prefix) :])
    if "eval_worst_group_accuracy" in evaluated[0]:
        worst = [entry["eval_worst_group_accuracy"] for entry in evaluated]
        axes.plot(steps, worst, color="black", lw=2, label="worst group")
        axes.set_title("validation accuracy by group")
    else:
        axes.plot(steps, [entry["eval_accuracy"] for entry in evaluated], color="black", lw=2, label="all images")
        axes.set_title("validation accuracy")
    axes.set_ylim(0, 1)
    axes.legend(fontsize=7)
