# SPDX-License-Identifier: Apache-2.0
"""The record of a run, its table and its figure."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RECORDED_PACKAGES = ("ipg_hf", "torch", "transformers", "accelerate", "timm", "datasets")
SUMMARY = {
    "accuracy": "accuracy",
    "worst_group_accuracy": "worst group",
    "flip_rate": "flip rate",
    "mae": "error (MAE)",
    "worst_group_mae": "worst group",
    "difference": "pairs' diff.",
}


def write_json(path: str | os.PathLike, record: Mapping[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def fill_marked(page: str, marker: str, made: Callable[..., str]) -> str:
    """A page with each part between `<!-- MARKER: WORD ... -->` and `<!-- end -->` made anew by `made(*words)`."""
    start = f"<!-- {marker}: "
    parts = page.split(start)
    for number, part in enumerate(parts[1:], 1):
        words, rest = part.split(" -->", 1)[0], part.split("<!-- end -->", 1)[1]
        parts[number] = f"{words} -->\n{made(*words.split())}\n<!-- end -->{rest}"
    return start.join(parts)


def versions() -> dict[str, str | None]:
    """Versions of the packages that a result depends on; `None` for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


@cache
def commit() -> str | None:
    """The commit of the source tree that the package was imported from, `-dirty` where it has changes; else `None`.

    As it is at the first call: the folder may move on later.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        # records and pages may be new: only the code and the recipes decide what a run computes
        code = [*git, "status", "--porcelain", "--", "ipg_hf", "recipes/**/*.yaml", "pyproject.toml"]
        changed = subprocess.run(code, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-dirty" if changed else head


def hardware() -> dict[str, Any]:
    """The machine: processor type and count, threads that torch uses, accelerators.

    On Linux `cpu` names the processor and the instructions that torch uses: they decide how sums are rounded, so that
    a seed is another training on another one.
    """
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cpus, threads = os.cpu_count(), torch.get_num_threads()
    found = {"machine": platform.machine(), "cpus": cpus, "torch_threads": threads, "gpus": gpus}
    listed = Path("/proc/cpuinfo")
    name = processor_name(listed.read_text(errors="replace")) if listed.exists() else ""
    return found | ({"cpu": f"{name}, {torch.backends.cpu.get_cpu_capability()}"} if name else {})


def processor_name(cpuinfo: str) -> str:
    """Name, family and model of the first processor in a `/proc/cpuinfo`, empty where it has no name."""
    lines = [line.partition(":") for line in cpuinfo.split("\n\n")[0].splitlines()]
    known = {key.strip(): value.strip() for key, _, value in lines}
    numbers = [f"{key.split()[-1]} {known[key]}" for key in ("cpu family", "model") if key in known]
    return ", ".join([known["model name"], *numbers]) if known.get("model name") else ""


def summary_table(columns: Mapping[str, Mapping[str, float]], split: str = "test") -> str:
    """A table of accuracy, worst group and flip rate, one column a model.

    Args:
        columns: model name -> metrics with the keys of `run.json`.
        split: the split that they were measured on, the table's title.
    """
    width = max(8, *(len(name) for name in columns)) + 2
    lines = [f"{split:<14}" + "".join(f"{name:>{width}}" for name in columns)]
    for key, title in SUMMARY.items():
        if not any(key in metrics for metrics in columns.values()):
            continue
        cells = [f"{metrics[key]:.3f}" if key in metrics else "-" for metrics in columns.values()]
        lines.append(f"{title:<14}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)


def group_table(metrics: Mapping[str, float]) -> str:
    """A table of the accuracy (of a regression: the error) of each group with its size."""
    errors = any(key.startswith("group_mae/") for key in metrics)
    prefix = "group_mae/" if errors else "group_accuracy/"
    rows = [(key[len(prefix) :], value) for key, value in metrics.items() if key.startswith(prefix)]
    width = max([len("label/attribute"), *(len(name) for name, _ in rows)]) + 2
    lines = [f"{'label/attribute':<{width}}{'error' if errors else 'accuracy':>9}{'n':>8}"]
    lines += [f"{name:<{width}}{value:>9.3f}{int(metrics[f'group_n/{name}']):>8}" for name, value in rows]
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
    axes.set_ylim(0, 1)
    axes.legend(fontsize=7)
