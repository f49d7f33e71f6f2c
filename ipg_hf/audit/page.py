# SPDX-License-Identifier: Apache-2.0
"""Writes an audit report into a folder: a page, its figures and its numbers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..html import rendered, write_files
from ..metrics import METRICS
from ..pairs.preview import SMALL, ShownPair, frame_ratio
from ..record import check_unused
from ..report import summary_table
from .figures import Drawn, draw_figures, group_names

PAGE, NUMBERS = "report.html", "report.json"


def check_folder(folder: str | os.PathLike) -> None:
    """Raises an error if a folder holds a report, or if a file stands where the folder would be made.

    Raises:
        FileExistsError: the folder holds a report.
        NotADirectoryError: the folder, or one that it would stand in, is a file.
    """
    check_unused(folder, (PAGE, NUMBERS), "report")


def write_report(
    report: Mapping[str, Any], pictures: Mapping[str, Sequence[ShownPair]], folder: str | os.PathLike
) -> list[Path]:
    """Writes a report: `report.html`, a page that needs no other file, `report.json`, and the figures as PNG.

    The page and the figures show only what `report.json` holds, and the pictures of pairs.

    Args:
        report: the report of `measure.audit`. Numbers that are not finite become null.
        pictures: pair set -> its pairs of largest divergence, as in the report.
        folder: the folder. It is made if it does not exist.

    Returns:
        The files, the page first.

    Raises:
        FileExistsError: the folder holds a report, or a file with the name of a figure.
    """
    check_folder(folder)
    numbers = json.dumps(_plain(report), indent=1, allow_nan=False) + "\n"
    report = json.loads(numbers)
    figures = draw_figures(report)
    files = {PAGE: _page(report, pictures, figures).encode(), NUMBERS: numbers.encode()}
    for drawn in (figure for parts in figures.values() for part in parts for figure in part):
        files[f"{drawn.name}.png"] = drawn.image
    written = {Path(folder) / name: content for name, content in files.items()}
    for path in written:
        if path.exists():
            raise FileExistsError(f"{path} exists, and is not replaced: remove it, or give another folder.")
    write_files(written)
    return [*written]


def audit_table(result: Mapping[str, Any]) -> str:
    """Returns the numbers of a report as text: summary, groups with intervals, flips, probes and differences."""
    models = result["models"]
    columns = {entry["name"]: dict(entry["metrics"]) for entry in models}
    for entry in models:
        if entry["pairs"]:
            columns[entry["name"]]["flip_rate"] = max(part["flip_rate"] for part in entry["pairs"].values())
    lines = [summary_table(columns, result["split"]), ""]
    names = ["/".join(group_names(group)) for group in models[0]["groups"]]
    wide, cell = max([15, *map(len, names)]) + 2, max([26, *(len(entry["name"]) + 2 for entry in models)])
    lines.append(f"{'label/attribute':<{wide}}{'n':>7}" + "".join(f"{entry['name']:>{cell}}" for entry in models))
    for number, name in enumerate(names):
        groups = [entry["groups"][number] for entry in models]
        cells = "".join(f"{_spread(group['accuracy'], group):>{cell}}" for group in groups)
        lines.append(f"{name:<{wide}}{groups[0]['n']:>7}{cells}")
    for key in models[0]["pairs"]:
        parts = [entry["pairs"][key] for entry in models]
        title = f"flip rate {key}" if len(models[0]["pairs"]) > 1 else "flip rate"
        cells = "".join(f"{_spread(part['flip_rate'], part):>{cell}}" for part in parts)
        lines.append(f"{title:<{wide}}{parts[0]['n']:>7}{cells}")
    for target in ("label", "attribute"):
        probes = [entry["probes"][target] for entry in models if entry["probes"]]
        if len(probes) == len(models) and all("score" in probe for probe in probes):
            cells = "".join(f"{_spread(probe['score'], probe):>{cell}}" for probe in probes)
            lines.append(f"{f'{target} in z':<{wide}}{probes[0]['scored_on']:>7}{cells}")
    for key, part in (result["difference"] or {}).items():
        metric, _, pair_set = key.partition("/")
        name = f"{METRICS[metric].title}{f', {pair_set}' if pair_set else ''}"
        lines.append(f"difference of {name}: {_spread(part['difference'], part)}")
    return "\n".join(lines)


def _spread(value: float, part: Mapping[str, float]) -> str:
    return f"{value:.3f} [{part['low']:.3f}, {part['high']:.3f}]"


def _names(report: Mapping[str, Any]) -> list[str]:
    return [entry["name"] for entry in report["models"]]


def _plain(value: Any) -> Any:
    """A value as JSON takes it: numpy's numbers become Python's, and a number that is not finite becomes None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(part) for part in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None, form: str, factor: float = 1, unit: str = "") -> str:
    text = "–" if value is None else f"{format(factor * value, form)}{unit}"
    return f"−{text[1:]}" if text.startswith("-") else text


def _page(
    report: Mapping[str, Any],
    pictures: Mapping[str, Sequence[ShownPair]],
    figures: Mapping[str, Sequence[Sequence[Drawn]]],
) -> str:
    filters = {
        "three": partial(_number, form=".3f"),
        "short": partial(_number, form=".3g"),
        "signed": partial(_number, form="+.3f"),
        "percent": partial(_number, form=".1f", factor=100, unit=" %"),
        "group": lambda group: " / ".join(group_names(group)),
    }
    return rendered(
        "audit/page.html",
        filters,
        report=report,
        titles={name: metric.title for name, metric in METRICS.items()},
        models=report["models"],
        names=_names(report),
        pictures=pictures,
        figures=figures,
        ratio=frame_ratio([pair for pairs in pictures.values() for pair in pairs]),
        small=SMALL,
    )
