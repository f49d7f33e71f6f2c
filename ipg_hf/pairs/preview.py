# SPDX-License-Identifier: Apache-2.0
"""The contact sheet of a pair set: its pairs side by side with their difference, as a web page and as a picture."""

from __future__ import annotations

import base64
import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image, ImageChops, UnidentifiedImageError

from .picture import LISTED, SMALL, ShownPair, draw_sheet, frame_ratio
from .transforms import ImageRows

SIDES = ("image_a", "image_b")
LABELS = ("label", "label_a", "label_b")
COUNTED = {  # column -> what the head calls it
    "label": "labels",
    "label_a": "labels of a",
    "label_b": "labels of b",
    "attribute_a": "attributes of a",
    "attribute_b": "attributes of b",
}
THUMBNAIL = 224  # pixels of the longer side
CHANGED = 16  # as in the linter: a pixel has changed where a channel differs by more than this
PICTURE_PAIRS = 24


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
    """Writes the contact sheet of a pair set: side a, side b and their absolute difference, amplified in each pair so
    that its largest value is 255 (the factor is stated).

    Without scores the rows are a random draw, sorted, stratified by label: each label has as many as every other, as
    far as its rows go. With scores, half of them (rounded up) are those of the largest divergence, the largest first,
    and the others such a draw from the rest. With one seed, fewer random rows are a subset of more.

    Args:
        pairs: a pair set with raw images, or an [`ImageRows`], of which the raw images are shown. `label` (or
            `label_a` and `label_b`), `attribute_a`, `attribute_b` and `source_id` are shown where there are any.
        path: of the two files, without suffix; `.html` or `.png` at its end is dropped. Its folder is made.
        num_pairs: number of pairs on the page, at least 1; all where the set has fewer. The picture shows at most 24.
        scores: arrays over all P rows of the set: `divergence`, float, shape (P,), where NaN counts as the largest;
            and optionally `prediction_a` and `prediction_b`, predicted classes, and `flipped`, bool, whether they
            differ. Other keys are not looked at.
        title: of the page.
        findings: listed at the top: objects with `severity`, `code`, `message`, `rows` and `fix`.
        seed: non-negative; seed of the draws.
        overwrite: replaces the files where they exist.

    Returns:
        The picture, `<path>.png`, and the page, `<path>.html`: one file that needs no other and no script.

    Raises:
        ValueError: the set is empty or has no columns of images; `num_pairs` is below 1; `scores` have no divergence,
            or one of them is not of shape (P,).
        FileExistsError: a file exists and `overwrite` is off.
    """
    raw = _raw(pairs)
    if num_pairs < 1:
        raise ValueError(f"num_pairs={num_pairs} is not valid: show at least 1 pair.")
    scores = _checked_scores(scores, len(raw))
    files = _files(path, overwrite)
    names = _names(raw)
    labels, divergence = names.get("label", names.get("label_a")), None if scores is None else scores["divergence"]
    groups, few = (
        choose_rows(len(raw), count, labels, divergence, seed) for count in (num_pairs, min(num_pairs, PICTURE_PAIRS))
    )
    shown = {row: _read_pair(raw, row, scores) for _, rows in groups for row in rows}
    facts = _facts(len(raw), names, scores)
    told = _told(groups, len(raw), seed, labels is not None)
    page = _page(
        title, facts | {"rows": told}, findings, [(name, [shown[row] for row in rows]) for name, rows in groups]
    )
    facts["rows"] = _told(few, len(raw), seed, labels is not None)
    picture = draw_sheet(title, facts, [*map(_finding, findings)], [shown[row] for _, rows in few for row in rows])
    write_files({files[0]: picture, files[1]: page.encode()})
    return files


def choose_rows(
    total: int, count: int, labels: Sequence[str] | None, divergence: np.ndarray | None, seed: int
) -> list[tuple[str, list[int]]]:
    """The rows that [`preview_pairs`] shows of a set of `total`, under their headings ("" without a divergence)."""
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
    """What the sheet shows of some rows of a pair set, without scores; an image that cannot be read is noted."""
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


def _files(path: str | os.PathLike, overwrite: bool) -> list[Path]:
    path = Path(path)
    path = path.with_suffix("") if path.suffix.lower() in (".html", ".png") else path
    files = [path.with_name(path.name + suffix) for suffix in (".png", ".html")]
    for file in files:
        if file.exists() and not overwrite:
            raise FileExistsError(f"{file} exists: set overwrite=True to replace it, or give another path.")
    return files


def write_files(files: Mapping[Path, bytes]) -> None:
    """Writes files whole or not at all."""
    partial = {file.with_name(file.name + ".partial"): file for file in files}
    try:
        for part, file in partial.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(files[file])
        for part, file in partial.items():
            os.replace(part, file)
    finally:
        for part in partial:
            part.unlink(missing_ok=True)


def _names(pairs: datasets.Dataset) -> dict[str, list[str]]:
    """The values of labels and attributes as names; without columns that have no classes (fractions, lists)."""

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
    """What the head of the sheet says of the whole set."""
    facts = {"pairs": str(total)} | {COUNTED[column]: _counted(values) for column, values in names.items()}
    if scores is not None:
        facts["mean divergence"] = f"{scores['divergence'].mean():.3g}"
        if "flipped" in scores:
            flips = int(scores["flipped"].astype(bool).sum())
            facts["flips"] = f"{flips} of {total} pairs ({_percent(flips / total)})"
    return facts


def _told(groups: Sequence[tuple[str, list[int]]], total: int, seed: int, by_label: bool) -> str:
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
    told = [name for name in (*LABELS, "attribute_a", "attribute_b", "source_id") if name in kinds]
    values = pairs.select_columns([*SIDES, *told])[row]
    texts = {name: _name(kinds[name], values[name]) for name in told}
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
    """An image as the training reads it, or what is wrong with it."""
    if value is None:
        return "there is no image"
    try:
        return datasets.Image(mode=mode).decode_example(value)
    except UnidentifiedImageError:  # its message holds an address in memory, another one in each run
        return f"not an image that PIL knows ({value['path'] or str(len(value['bytes'])) + ' bytes'})"
    except Exception as failure:
        return f"{type(failure).__name__}: {failure}"


def _pictured(sides: Sequence[Image.Image | str]) -> tuple[list[Image.Image | None], list[str], str, float]:
    """The thumbnails of both sides and of their difference, what prevents each, the share of pixels, the factor."""
    plain = [None if isinstance(side, str) else side.convert("RGB") for side in sides]  # as the training does
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
    """A difference at the size it is looked at: the largest of each block, since a mean would hide a dot."""
    block = -(-max(difference.shape[:2]) // SMALL)
    for axis in (0, 1):
        starts = np.arange(0, difference.shape[axis], block)
        difference = np.maximum.reduceat(difference, starts, axis=axis)
    return difference


def _percent(share: float) -> str:
    """A share in per cent, of which only nothing is 0 and only everything 100."""
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


def rendered(template: str, filters: Mapping[str, Any] | None = None, **values: Any) -> str:
    """A page made of a template of the package, whose values are escaped and whose every name must be given."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ipg_hf", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"uri": png_uri, **(filters or {})}
    return environment.get_template(template).render(**values)


def _finding(finding: Any) -> dict[str, Any]:
    rows = [] if finding.rows is None else [int(row) for row in finding.rows]
    severity = str(getattr(finding.severity, "value", finding.severity))
    return {"severity": severity, "rows": rows, **{key: getattr(finding, key) for key in ("code", "message", "fix")}}


def png_uri(image: Image.Image) -> str:
    """An image as a data URI."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
