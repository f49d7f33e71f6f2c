# SPDX-License-Identifier: Apache-2.0
"""Shows the pairs of a set side by side with their difference, on a web page."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image, ImageChops, UnidentifiedImageError

from ..html import rendered, write_files
from .images import file_of, is_deep
from .transforms import ImageRows

SIDES = ("image_a", "image_b")
LABELS = ("label", "label_a", "label_b")
COUNTED = {  # column -> its name in the head of the page
    "label": "labels",
    "label_a": "labels of a",
    "label_b": "labels of b",
    "attribute_a": "attributes of a",
    "attribute_b": "attributes of b",
}
THUMBNAIL = 224  # pixels of the longer side
SMALL = 112  # about the size of an image on the page: smaller images are enlarged by whole pixels
LISTED = 12  # values of a column, and rows of a finding, that are listed
CHANGED = 16  # as in the linter: a pixel has changed if a channel differs by more than this


@dataclass(frozen=True)
class ShownPair:
    """What a page shows of one pair."""

    row: int
    label: str  # "" if there is none
    place: str  # row and source
    captions: list[str]  # of side a, side b and the difference; `images` and `notes` have the same order
    images: list[Image.Image | None]
    notes: list[str]  # the text in place of an image that is missing
    facts: dict[str, str]
    flipped: bool


def preview_pairs(
    pairs: datasets.Dataset | ImageRows,
    path: str | os.PathLike,
    *,
    num_pairs: int = 24,
    scores: Mapping[str, np.ndarray] | None = None,
    title: str = "Pairs",
    findings: Sequence[Any] = (),
    seed: int = 0,
    overwrite: bool = False,
) -> list[Path]:
    """Writes a page that shows pairs: side a, side b and their absolute difference.

    The difference is amplified in each pair so that its largest value is 255. The page states the factor.

    Without scores the rows are drawn at random and sorted. The draw takes the same number of each label, as far as
    there are rows. With scores, the first half of the rows (rounded up) are those of the largest divergence, the
    largest first; the other half is drawn at random from the rest. For one seed, fewer random rows are a subset of
    more.

    Args:
        pairs: a pair set with raw images, or an [`ImageRows`], of which the raw images are shown. The columns `label`
            (or `label_a` and `label_b`), `attribute_a`, `attribute_b` and `source_id` are shown if they exist.
        path: the page. The suffix `.html` is added if the path has not got it. The folder is made.
        num_pairs: number of pairs on the page, at least 1. A smaller set is shown completely.
        scores: arrays over all P rows of the set: `divergence`, float, shape (P,), where NaN counts as the largest;
            optionally `prediction_a` and `prediction_b`, predicted classes; optionally `flipped`, bool, whether the
            predictions differ. Other keys are ignored.
        title: title of the page.
        findings: findings of [`~linter.check_pairs`], listed at the top.
        seed: seed of the draws, not negative.
        overwrite: replace the page if it exists.

    Returns:
        The files that were written: the page. It needs no other file and no script.

    Raises:
        ValueError: the set is empty or has no image columns; `num_pairs` is below 1; `scores` has no divergence, or one
            of the scores is not of shape (P,).
        FileExistsError: the page exists and `overwrite` is off.
    """
    raw = _raw(pairs)
    if num_pairs < 1:
        raise ValueError(f"num_pairs={num_pairs} is not valid: show at least 1 pair.")
    scores = _checked_scores(scores, len(raw))
    file = Path(path)
    file = file if file.suffix.lower() == ".html" else file.with_name(f"{file.name}.html")
    if file.exists() and not overwrite:
        raise FileExistsError(f"{file} exists: set overwrite=True to replace it, or give another path.")
    names = _names(raw)
    labels, divergence = names.get("label", names.get("label_a")), None if scores is None else scores["divergence"]
    groups = choose_rows(len(raw), num_pairs, labels, divergence, seed)
    facts = _facts(len(raw), names, scores) | {"rows": _choice(groups, len(raw), seed, labels is not None)}
    shown = [(heading, [_read_pair(raw, row, scores) for row in rows]) for heading, rows in groups]
    write_files({file: _page(title, facts, findings, shown).encode()})
    return [file]


def frame_ratio(pairs: Sequence[ShownPair]) -> float:
    """Returns width over height of the frames of images: that of the median image, within 1/2 and 2."""
    ratios = [image.width / image.height for pair in pairs for image in pair.images if image is not None]
    return float(np.clip(np.median(ratios or [1.0]), 0.5, 2.0))


def choose_rows(
    total: int, count: int, labels: Sequence[str] | None, divergence: np.ndarray | None, seed: int
) -> list[tuple[str, list[int]]]:
    """Chooses the rows that [`preview_pairs`] shows.

    Args:
        total: number of rows of the set.
        count: number of rows to choose.
        labels: label of each row.
        divergence: divergence of each row.
        seed: seed of the draw.

    Returns:
        Headings with their rows. Without a divergence there is one heading, "".
    """
    drawn = np.random.default_rng((seed, 20)).permutation(total)
    if labels is not None:
        # the labels take turns, so that any beginning of the order has as many of each
        turns, turn = Counter(), []
        for row in drawn:
            turn.append(turns[labels[row]])
            turns[labels[row]] += 1
        drawn = drawn[np.argsort(turn, kind="stable")]
    if divergence is None:
        return [("", sorted(drawn[:count].tolist()))]
    order = np.argsort(-np.where(np.isnan(divergence), np.inf, divergence), kind="stable")
    worst = order[: (min(count, total) + 1) // 2]
    rest = drawn[~np.isin(drawn, worst)][: count - len(worst)]
    groups = [("Largest divergence", worst.tolist()), ("Random draw of the others", sorted(rest.tolist()))]
    return [group for group in groups if group[1]]


def shown_pairs(pairs: datasets.Dataset | ImageRows, rows: Sequence[int]) -> list[ShownPair]:
    """Reads what a page shows of some rows of a pair set, without scores. An image that cannot be read is noted."""
    raw = _raw(pairs)
    return [_read_pair(raw, row, None) for row in rows]


def _raw(pairs: Any) -> datasets.Dataset:
    raw = pairs.dataset if isinstance(pairs, ImageRows) else pairs
    if not isinstance(raw, datasets.Dataset):
        raise ValueError(
            f"preview_pairs shows a datasets.Dataset with the images image_a and image_b, not a {type(raw).__name__}. "
            "Of a stream, take some rows: datasets.Dataset.from_list(list(stream.take(100)), features=stream.features)."
        )
    if len(raw) == 0:
        raise ValueError("the pair set is empty: there is nothing to show. Give it at least one pair.")
    for column in SIDES:
        if not isinstance(raw.features.get(column), datasets.Image):
            kind = type(raw.features[column]).__name__ if column in raw.features else None
            raise ValueError(
                f"the column {column} is a {kind}, not an Image: cast it, "
                f"dataset.cast_column({column!r}, datasets.Image())."
                if kind
                else f"the pair set has no column {column}, only {raw.column_names}: rename_column gives it one."
            )
        # bytes, so that an unreadable image is an error of its own row alone
        raw = raw.cast_column(column, datasets.Image(mode=raw.features[column].mode, decode=False))
    return raw.with_format(None)


def _checked_scores(scores: Mapping[str, Any] | None, count: int) -> dict[str, np.ndarray] | None:
    if scores is None:
        return None
    if "divergence" not in scores:
        raise ValueError(f"scores={sorted(scores)} lack the divergence: give scores['divergence'], shape ({count},).")
    known = ("divergence", "flipped", "prediction_a", "prediction_b")
    arrays = {name: np.asarray(scores[name]) for name in known if scores.get(name) is not None}
    for name, values in arrays.items():
        if values.shape != (count,):
            raise ValueError(
                f"scores[{name!r}] has the shape {values.shape}, but the set has {count} pairs: give one score for "
                "every row of the set, not for those that are shown alone."
            )
    if "flipped" not in arrays and {"prediction_a", "prediction_b"} <= set(arrays):
        arrays["flipped"] = arrays["prediction_a"] != arrays["prediction_b"]
    arrays["divergence"] = arrays["divergence"].astype(np.float64)
    return arrays


def _names(pairs: datasets.Dataset) -> dict[str, list[str]]:
    """The values of labels and attributes as names. Columns without classes (fractions, lists) are left out."""

    def has_classes(kind: Any) -> bool:
        stored = kind.pa_type if isinstance(kind, (datasets.ClassLabel, datasets.Value)) else pa.null()
        return not (pa.types.is_floating(stored) or pa.types.is_null(stored))

    columns = [name for name in COUNTED if name in pairs.features and has_classes(pairs.features[name])]
    table = pairs.select_columns(columns).with_format("arrow")[:] if columns else {}
    found = {}
    for column in columns:
        coded = table[column].combine_chunks().dictionary_encode("encode")
        names = np.array([_name(pairs.features[column], value) for value in coded.dictionary.to_pylist()], object)
        found[column] = names[coded.indices.to_numpy()].tolist()
    return found


def _name(kind: Any, value: Any) -> str:
    if isinstance(value, (int, np.integer)) and isinstance(kind, datasets.ClassLabel) and 0 <= value < len(kind.names):
        return kind.names[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _counted(names: Sequence[str]) -> str:
    """Names with their counts, the most frequent first."""
    counts = sorted(Counter(names).items(), key=lambda item: (-item[1], item[0]))
    more = f" and {len(counts) - LISTED} more" if len(counts) > LISTED else ""
    return ", ".join(f"{name} ({count})" for name, count in counts[:LISTED]) + more


def _facts(total: int, names: Mapping[str, Sequence[str]], scores: Mapping[str, np.ndarray] | None) -> dict[str, str]:
    """What the head of the page says of the whole set."""
    facts = {"pairs": str(total)} | {COUNTED[column]: _counted(values) for column, values in names.items()}
    if scores is not None:
        facts["mean divergence"] = f"{scores['divergence'].mean():.3g}"
        if "flipped" in scores:
            flips = int(scores["flipped"].astype(bool).sum())
            facts["flips"] = f"{flips} of {total} pairs ({_percent(flips / total)})"
    return facts


def _choice(groups: Sequence[tuple[str, list[int]]], total: int, seed: int, by_label: bool) -> str:
    """Which rows are shown, in words."""
    sizes, drawn = [len(rows) for _, rows in groups], f"at random with seed {seed}"
    drawn += ", as evenly over the labels as possible" if by_label else ""
    if not groups[0][0]:
        return f"all {total}" if sizes[0] == total else f"{sizes[0]} of {total}, drawn {drawn}"
    if sum(sizes) == total:
        return f"all {total}: first the {sizes[0]} of largest divergence"
    rest = f", then {sizes[1]} of the others, drawn {drawn}" if len(sizes) > 1 else ""
    return f"{sum(sizes)} of {total}: the {sizes[0]} of largest divergence{rest}"


def _read_pair(pairs: datasets.Dataset, row: int, scores: Mapping[str, np.ndarray] | None) -> ShownPair:
    kinds = pairs.features
    described = [name for name in (*LABELS, "attribute_a", "attribute_b", "source_id") if name in kinds]
    values = pairs.select_columns([*SIDES, *described])[row]
    texts = {name: _name(kinds[name], values[name]) for name in described}
    images, notes, changed, factor = _pictured([_decoded(values[name], kinds[name].mode) for name in SIDES])
    facts = {"pixels changed": changed} if changed else {}
    if scores is not None:
        facts["divergence"] = f"{scores['divergence'][row]:.3g}"
        if {"prediction_a", "prediction_b"} <= set(scores):
            kind = next((kinds[name] for name in LABELS if name in kinds), None)
            classes = [_name(kind, scores[f"prediction_{side}"][row].item()) for side in "ab"]
            facts["predicted"] = " → ".join(classes) if classes[0] != classes[1] else f"{classes[0]} on both sides"
    captions = [side + (f": {texts[f'attribute_{side}']}" if f"attribute_{side}" in texts else "") for side in "ab"]
    return ShownPair(
        row=row,
        label=" / ".join(dict.fromkeys(texts[name] for name in LABELS if name in texts)),
        place=f"row {row}" + (f" · source {texts['source_id']}" if "source_id" in texts else ""),
        captions=[*captions, "difference" + (f" ×{factor:.3g}" if factor else "")],
        images=images,
        notes=notes,
        facts=facts,
        flipped=scores is not None and "flipped" in scores and bool(scores["flipped"][row]),
    )


def _decoded(value: Mapping[str, Any] | None, mode: str | None) -> Image.Image | str:
    """The image as a training reads it, or what is wrong with it."""
    if value is None:
        return "there is no image"
    try:
        image = datasets.Image(mode=mode).decode_example(value)
        deep = f"the mode {image.mode} has more than 8 bits a channel{file_of(value)}"
        return deep if is_deep(image.mode) else image
    except UnidentifiedImageError:  # the message holds an address in memory, which differs between runs
        return f"not an image that PIL knows ({value['path'] or str(len(value['bytes'])) + ' bytes'})"
    except Exception as failure:
        text = f"{type(failure).__name__}: {failure}"
        return text if (value["path"] or "") in text else text + file_of(value)


def _pictured(sides: Sequence[Image.Image | str]) -> tuple[list[Image.Image | None], list[str], str, float]:
    """Thumbnails of both sides and of their difference, notes on missing ones, share of changed pixels, and factor."""
    plain = [None if isinstance(side, str) else side.convert("RGB") for side in sides]  # as a training does
    images = [None if image is None else _thumbnail(image) for image in plain]
    notes = [side if isinstance(side, str) else "" for side in sides]
    if None in plain:
        return [*images, None], [*notes, "no difference: an image cannot be read"], "", 0.0
    if (sides[0].size, sides[0].mode) != (sides[1].size, sides[1].mode):
        kinds = [f"{side.mode} of {side.width}×{side.height}" for side in sides]
        return [*images, None], [*notes, f"no difference: a is {kinds[0]} pixels, b {kinds[1]}"], "", 0.0
    difference = np.asarray(ImageChops.difference(*plain))
    largest, strongest = int(difference.max()), difference.max(-1)
    factor = 255 / largest if largest else 1.0
    shown = Image.fromarray(np.rint(_shrunk(difference) * factor).astype(np.uint8))
    changed, touched = (strongest > CHANGED).mean(), (strongest > 0).mean()
    share = _percent(changed) + (f" ({_percent(touched)} by any amount)" if touched != changed else "")
    return [*images, shown], [*notes, ""], share, factor


def _thumbnail(image: Image.Image) -> Image.Image:
    scale = THUMBNAIL / max(image.size)
    if scale >= 1:
        return image
    return image.resize([max(1, round(length * scale)) for length in image.size], Image.Resampling.LANCZOS)


def _shrunk(difference: np.ndarray) -> np.ndarray:
    """A difference at the size of the page: the largest value of each block, since a mean would hide a dot."""
    block = -(-max(difference.shape[:2]) // SMALL)
    for axis in (0, 1):
        starts = np.arange(0, difference.shape[axis], block)
        difference = np.maximum.reduceat(difference, starts, axis=axis)
    return difference


def _percent(share: float) -> str:
    """A share in per cent. Only no pixel at all is 0 %, and only all pixels are 100 %."""
    if 0 < share < 0.001:
        return "<0.1 %"
    return ">99.9 %" if 0.999 < share < 1 else f"{100 * share:.3g} %"


def _page(
    title: str, facts: Mapping[str, str], findings: Sequence[Any], groups: Sequence[tuple[str, list[ShownPair]]]
) -> str:
    pairs = [pair for _, group in groups for pair in group]
    return rendered(
        "pairs/preview.html",
        title=title,
        facts=facts,
        findings=[_finding(finding) for finding in findings],
        groups=groups,
        shown={pair.row for pair in pairs},
        ratio=frame_ratio(pairs),
        changed=CHANGED,
        listed=LISTED,
        small=SMALL,
    )


def _finding(finding: Any) -> dict[str, Any]:
    rows = [] if finding.rows is None else [int(row) for row in finding.rows]
    severity = str(getattr(finding.severity, "value", finding.severity))
    return {"severity": severity, "rows": rows, **{key: getattr(finding, key) for key in ("code", "message", "fix")}}
