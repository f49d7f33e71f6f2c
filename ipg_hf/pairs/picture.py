# SPDX-License-Identifier: Apache-2.0
"""The contact sheet of a pair set as a picture."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

SMALL = 112  # about the size that an image has on a page: what is no larger is shown in whole pixels
LISTED = 12  # names of a column, and rows of a finding, that are listed
CELL, GAP, LINE = SMALL, 6, 16  # of the picture, in pixels: an image's width, a gap, a line of text
INK, FAINT, LIGHT, RED = "#1b1f24", "#57606a", "#d0d7de", "#b3261e"
SEVERITIES = {"error": RED, "warning": "#8a5a00", "info": "#0b5cad"}


@dataclass(frozen=True)
class ShownPair:
    """What the sheet shows of one pair."""

    row: int
    label: str  # "" where there is none
    place: str  # row and source
    captions: list[str]  # of side a, side b and the difference, as the next two
    images: list[Image.Image | None]
    notes: list[str]  # what stands in the place of an absent image
    facts: dict[str, str]
    flipped: bool


def frame_ratio(pairs: Sequence[ShownPair]) -> float:
    """Width over height of the frames: that of the median image, within 1/2 and 2."""
    ratios = [image.width / image.height for pair in pairs for image in pair.images if image is not None]
    return float(np.clip(np.median(ratios or [1.0]), 0.5, 2.0))


def draw_sheet(
    title: str, facts: Mapping[str, str], findings: Sequence[Mapping[str, Any]], pairs: Sequence[ShownPair]
) -> bytes:
    """The sheet as a PNG, images and text placed by the pixel.

    Args:
        title: of the sheet.
        facts: name -> text, for the head.
        findings: dicts with `severity`, `code` and `message`, for the head.
        pairs: at least one.
    """
    # the object interface: the backend that the user has chosen stays as it is
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns, tall = min(3, max(2, len(pairs))), round(CELL / frame_ratio(pairs))
    step_x, step_y = 3 * CELL + 5 * GAP, tall + (2 + max(len(pair.facts) for pair in pairs)) * LINE + 4 * GAP
    width = columns * step_x + GAP
    head = _head(facts, findings, int((width - 4 * GAP) / 6.5))
    top = 3 * LINE + len(head) * LINE
    height = top + -(-len(pairs) // columns) * step_y + GAP
    figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    _text(figure, 2 * GAP, LINE, title, width - 4 * GAP, fontsize=13, weight="bold")
    for number, (line, color) in enumerate(head):
        _text(figure, 2 * GAP, (number + 2.5) * LINE, line, width - 4 * GAP, color=color)
    for number, pair in enumerate(pairs):
        place = (GAP + number % columns * step_x, top + number // columns * step_y)
        _draw_pair(figure, pair, *place, step_x - GAP, step_y - GAP, tall)
    buffer = io.BytesIO()
    canvas.print_png(buffer)  # unlike savefig, at the size asked for, whatever matplotlib's settings
    return buffer.getvalue()


def _head(facts: Mapping[str, str], findings: Sequence[Mapping[str, Any]], letters: int) -> list[tuple[str, str]]:
    """The lines above the pairs of the picture, each with its colour."""
    head = [(line, INK) for name, fact in facts.items() for line in textwrap.wrap(f"{name}: {fact}", letters)]
    for finding in findings[:LISTED]:
        text = f"{finding['severity']} {finding['code']}: {finding['message']}"
        head += [(line, SEVERITIES.get(finding["severity"], INK)) for line in textwrap.wrap(text, letters)]
    more = len(findings) - LISTED
    return head + ([(f"and {more} more findings, on the page", INK)] if more > 0 else [])


def _draw_pair(figure: Any, pair: ShownPair, x: int, y: int, wide: int, tall: int, high: int) -> None:
    _frame(figure, x, y, wide, tall, RED if pair.flipped else LIGHT)
    title = " · ".join(text for text in (pair.label, pair.place) if text)
    _text(figure, x + GAP, y + GAP, title, wide - 2 * GAP - 40 * pair.flipped, weight="bold")
    if pair.flipped:
        _text(figure, x + wide - GAP, y + GAP, "flips", 40, ha="right", weight="bold", color=RED)
    upper = y + 2 * GAP + LINE
    for i, image in enumerate(pair.images):
        left = x + GAP + i * (CELL + GAP)
        _text(figure, left, upper + high + 2, pair.captions[i], CELL, color=FAINT)
        if image is None:
            _frame(figure, left, upper, CELL, high, FAINT)
            for number, line in enumerate(textwrap.wrap(pair.notes[i], 16)[: (high - GAP) // LINE]):
                _text(figure, left + GAP, upper + GAP + number * LINE, line, CELL - 2 * GAP, color=FAINT)
            continue
        image = _fitted(image, CELL, high)
        corner = left + (CELL - image.width) // 2, upper + (high - image.height) // 2
        _frame(figure, corner[0] - 1, corner[1] - 1, image.width + 2, image.height + 2, LIGHT)
        figure.figimage(np.asarray(image), corner[0], figure.bbox.height - corner[1] - image.height, origin="upper")
    for number, (name, fact) in enumerate(pair.facts.items()):
        _text(figure, x + GAP, upper + high + (number + 1) * LINE + GAP, f"{name}: {fact}", wide - 2 * GAP)


def _fitted(image: Image.Image, wide: int, tall: int) -> Image.Image:
    scale = min(wide / image.width, tall / image.height)
    method = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    return image.resize([max(1, round(length * scale)) for length in image.size], method)


def _frame(figure: Any, x: int, y: int, wide: int, tall: int, color: str) -> None:
    from matplotlib.patches import Rectangle
    from matplotlib.transforms import IdentityTransform

    # a line one pixel wide on the outermost pixels of the box: matplotlib snaps it to the pixel right of and below
    corner = x, figure.bbox.height - y - tall + 1
    box = Rectangle(corner, wide - 1, tall - 1, fill=False, edgecolor=color, linewidth=0.72)
    box.set_transform(IdentityTransform())
    figure.add_artist(box)


def _text(figure: Any, x: float, y: float, text: str, room: float, **style: Any) -> None:
    """One line of text whose top left corner is at (x, y) in pixels from the top left; cut off where it is too wide."""
    text = " ".join(text.split())
    place = (x / figure.bbox.width, 1 - y / figure.bbox.height)
    style = {"fontsize": 8, "color": INK, **style}
    words = figure.text(*place, text, va="top", parse_math=False, usetex=False, **style)
    while len(text) > 1 and (over := words.get_window_extent().width / room) > 1:
        text = text[: min(len(text) - 1, int(len(text) / over))]
        words.set_text(text + "…")
