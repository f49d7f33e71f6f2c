# SPDX-License-Identifier: Apache-2.0
"""Checks a pair set for faults that would teach a model the wrong thing: what, in which rows, and how to mend it."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps
from torch import nn

from ..guidance import ProblemType
from .images import file_of, upright_size
from .scores import LABELS, SIDES, raw_images, score_pairs
from .transforms import ImageRows

MISSING = ["None", "nan", "-100", "-1"]  # the last only in a ClassLabel
DEEP = ["I", "F", "I;16", "I;16B", "I;16L", "I;16N"]  # modes of more than 8 bits a channel
SIDE = 16  # pixels of a thumbnail
ENOUGH = 512  # pixels: a JPEG of at least twice this size is decoded at a half, a quarter or an eighth
CHUNK = 1024  # rows that are compared with all others at a time
FAST_PAIRS = 256  # pairs that the fast form looks at
FEW = 10  # fewer pairs than this get a warning
ENOUGH_PAIRS = 20  # pairs that are needed to compare with shuffled partners
SURE_PAIRS = 100  # pairs that are needed to say that the sides have no common direction
CHANGED = 16  # a pixel has changed if a channel differs by more than this
TINY = 0.001  # share of changed pixels
NEAR = 0.1  # RMS difference over contrast; measured: photographs saved again 0.02 to 0.07, different ones from 0.24
CLEAR = 5.0  # robust standard deviations between most rows and a row that differs
Z_LIMIT = 3.0  # standard errors between two sets that differ
MOST = 0.9  # share of the pairs of one label
SHARE_GAP = 0.2  # total variation of label shares

# code -> severity, fix; in the report's order
CODES = {
    "empty": ("error", "Give the set at least one pair."),
    "image-unreadable": ("error", "Replace these images, or drop the rows: pairs.select(...)."),
    "sides-shape": ("error", "Make both sides of a pair with one size and one mode."),
    "sides-identical": ("error", "Drop these rows, or make one side anew with the other attribute."),
    "label-differs": ("error", "A pair shows one label twice: mend the labels, or the partner."),
    "attribute-same": ("error", "The sides must differ in the attribute: mend the columns, or the partner."),
    "evaluation-image": ("error", "Drop these pairs: what is trained on cannot be measured on."),
    "scores-failed": ("error", "Give the model's own image processor, with one size that fits the model."),
    "attributes-swapped": ("warning", "Swap the sides of these rows, or keep off rationale_reduction='mean'."),
    "sides-unoriented": ("warning", "One attribute value on side a, or keep off rationale_reduction='mean'."),
    "sides-swapped": ("warning", "Look at these rows: swap their sides, or keep off rationale_reduction='mean'."),
    "evaluation-near": ("warning", "Look at these pairs; drop those that show an image of the evaluation set."),
    "pair-repeated": ("warning", "Drop these rows: each holds the two images of an earlier one."),
    "partner-unlike": ("warning", "Look at these rows: a side may have got a wrong partner."),
    "change-tiny": ("warning", "Look at these rows: the attribute may not have been changed."),
    "image-deep": ("warning", "Scale these images to 8 bits a channel (0..255): a processor cuts them off."),
    "modes-differ": ("warning", "Convert all images to one mode: image.convert('RGB')."),
    "label-missing": ("warning", "Give these rows a label, -100 where it is not known, or drop the column."),
    "attribute-missing": ("warning", "Give these rows both attribute values, or drop the columns."),
    "evaluation-unreadable": ("warning", "Replace these images, or drop their rows: a measurement would stop there."),
    "few-pairs": ("warning", "Make more pairs: a model becomes invariant to what they show."),
    "one-label": (
        "warning",
        "Draw as many pairs of each label, or set pair_loss_weight=0: the loss of these pairs favours one label.",
    ),
    "held-out-worse": ("warning", "The pairs do not generalise: make more of them, and more different ones."),
    "sizes-differ": ("info", "Fine where the image processor resizes to one size; else resize the images."),
    "pair-near": ("info", "Look at these rows: each is nearly an earlier pair and adds little."),
    "sides-unmatched": ("info", "Check that these are matched pairs: the same content twice."),
    "label-shares": ("info", "Fine where it is meant; else draw the pairs by label."),
    "change-share": ("info", "Fine where it fits the attribute."),
    "model-scores": ("info", "Look at the first rows: there the attribute sways the model most."),
}


@dataclass(frozen=True)
class Finding:
    """A finding about a pair set. An error makes a training wrong, a warning is doubtful, an info is good to know."""

    code: str  # a key of `CODES`
    severity: Literal["error", "warning", "info"]
    message: str  # what was found, with numbers
    rows: tuple[int, ...]  # all rows concerned, ascending (`model-scores`: worst first); () for the whole set
    fix: str


def check_pairs(
    pairs: datasets.Dataset | ImageRows,
    *,
    evaluation: Mapping[str, datasets.Dataset] | None = None,
    held_out: datasets.Dataset | ImageRows | None = None,
    model: nn.Module | None = None,
    processor: Any = None,
    fast: bool = False,
    seed: int = 0,
    problem_type: ProblemType | None = None,
) -> list[Finding]:
    """Checks a pair set for faults that would teach a model the wrong thing.

    Args:
        pairs: a pair set with the raw images `image_a` and `image_b`. The columns `label` (or `label_a` and `label_b`),
            `attribute_a` and `attribute_b` are checked if they exist. The raw images of an `ImageRows` are checked,
            without random draws.
        evaluation: name -> set of images (`image`, or `image_a` and `image_b`) that must not be in the pairs.
        held_out: a pair set with raw images that is not trained on. Its images must not be in the pairs. With a model,
            its scores are compared with those of the pairs.
        model: an image classifier, for the flips and the divergence of each pair.
        processor: image processor of the model; by default that of the `ImageRows`.
        fast: look at the images of at most 256 pairs, drawn by the seed, and at other sets only for their scores. Of a
            set that holds model inputs instead of images, only labels and attributes are checked.
        seed: seed of all draws, not negative.
        problem_type: problem type of the model; by default that of its config.

    Returns:
        Errors, then warnings, then infos, each in the order of `CODES`.

    Raises:
        ValueError: a set lacks its image columns, or there is a model but no processor.
    """
    processor = processor or (pairs.processor if isinstance(pairs, ImageRows) else None)
    if model is not None and processor is None:
        raise ValueError("check_pairs(model=...) needs processor=..., the model's image processor.")
    if fast and isinstance(pairs, datasets.Dataset) and not set(SIDES) & set(pairs.column_names):
        labels = [name for name in pairs.column_names if name in LABELS] or pairs.column_names[:1]
        return _sorted(_check_columns(pairs.with_format(None).select_columns(labels), {})[0])
    raw, limit = raw_images(pairs, "pairs", SIDES), FAST_PAIRS if fast else None
    others = {**(evaluation or {}), **({} if held_out is None else {"held_out": held_out})}
    others = {
        name: raw_images(other, name, SIDES if other is held_out else ["image"]) for name, other in others.items()
    }
    if not len(raw):
        return _found("empty", "the set has no pairs")
    looks = _look_at(raw, np.sort(np.random.default_rng((seed, 0)).permutation(len(raw))[:limit]))
    whole = looks[looks["whole"]]
    found, is_swapped = _check_columns(raw, others)
    found += _check_images(looks, processor)
    if len(whole):
        found += _check_pixels(whole) + _check_partners(whole, seed)
        found += [] if is_swapped else _check_orientation(whole, seed)
    for name in [] if fast else others:
        theirs = _look_at(others[name], np.arange(len(others[name])))
        found += _check_readable(name, theirs) + _check_leaks(whole, name, theirs)
    if len(whole) and model is not None:
        sets = {"pairs": raw.select(whole["row"])}
        if held_out is not None:
            sets["held_out"] = others["held_out"].shuffle(seed).select(range(len(held_out))[:limit])
        found += _check_scores(sets, whole["row"], model, processor, 64, problem_type)
    return _sorted(found)


def format_findings(findings: Sequence[Finding], name: str, max_rows: int = 10) -> str:
    """Formats findings as text.

    Args:
        findings: the findings.
        name: name of the pair set, for the first line.
        max_rows: number of rows that are listed for a finding.

    Returns:
        A line of counts, then severity, code, message, first rows and fix of each finding.
    """
    counts = Counter(finding.severity for finding in findings)
    texts = [f"{count} {kind}{'s' * (count > 1)}" for kind, count in counts.items()]
    lines = [f"{name}: {', '.join(texts) or 'no findings'}"]
    for finding in findings:
        rows = f"  rows: {', '.join(map(str, finding.rows[:max_rows]))}" if finding.rows else ""
        rows += f", ... ({len(finding.rows)} in all)" if len(finding.rows) > max_rows else ""
        lines += [f"{finding.severity} [{finding.code}] {finding.message}", rows, f"  fix: {finding.fix}"]
    return "\n".join(filter(None, lines))


def _sorted(found: list[Finding]) -> list[Finding]:
    return sorted(found, key=lambda finding: ("ewi".index(finding.severity[0]), [*CODES].index(finding.code)))


def _found(code: str, what: str, rows: Any = (), mask: Any = None, severity: Any = None) -> list[Finding]:
    """A finding, in a list. With a mask the finding names the rows in the mask, and the list is empty without any."""
    if mask is not None:
        what, rows = f"{np.count_nonzero(mask)} of {len(rows)} pairs {what}", rows[mask]
        if not len(rows):
            return []
    return [Finding(code, severity or CODES[code][0], what, tuple(int(row) for row in rows), CODES[code][1])]


def _look_at(raw: datasets.Dataset, rows: np.ndarray) -> np.ndarray:
    """What is kept of n rows of S images (one image, or both sides of a pair): records of shape (n,)."""
    raw = raw.select_columns([name for name in raw.column_names if name not in LABELS])
    sides = len(raw.column_names)
    for column in raw.column_names:
        raw = raw.cast_column(column, datasets.Image(decode=False))
    fields = [("row", "i8"), ("failure", "O"), ("whole", "?"), ("changed", "f4"), ("size", "i8", (sides, 2))]
    fields += [("mode", "U8", (sides,)), ("digest", "i8", (sides,)), ("sharpness", "f4", (sides,))]
    looks = np.zeros(len(rows), [*fields, ("thumb", "u1", (sides, SIDE, SIDE, 3))])
    looks["row"], looks["failure"] = rows, ""
    with ThreadPoolExecutor() as threads:  # PIL lets go of the interpreter while it decodes
        [*threads.map(lambda record: _look(record, [*raw[int(record["row"])].values()]), looks)]
    return looks


def _look(record: np.void, values: Sequence[Any]) -> None:
    try:
        images = [_decoded(value, ENOUGH) for value in values]
        a, b = images[0], images[-1]
        if a is not b and (a["digest"] == b["digest"] or a["pixels"].shape != b["pixels"].shape):
            images = a, b = [_decoded(value) for value in values]  # reducing may have hidden a difference, or made one
    except Exception as failure:
        missing = [value for value in values if value is None or (value["bytes"] is None and value["path"] is None)]
        files = "".join(file for file in map(file_of, values) if file not in str(failure))
        record["failure"] = "there is no image" if missing else (str(failure) or type(failure).__name__) + files
        return
    for name in ("size", "mode", "digest", "sharpness", "thumb"):
        record[name] = [image[name] for image in images]
    a_kind, b_kind = ((image["size"], image["mode"], image["pixels"].shape) for image in (a, b))
    record["whole"] = a_kind == b_kind and a["mode"] not in DEEP
    if record["whole"]:
        differs = np.maximum(a["pixels"], b["pixels"]) - np.minimum(a["pixels"], b["pixels"]) > CHANGED
        record["changed"] = (differs[..., 0] | differs[..., 1] | differs[..., 2]).mean()


def _decoded(value: Any, enough: int | None = None) -> dict[str, Any]:
    """The pixels of an encoded image, uint8 (H, W, 3), and what is kept of it."""
    with Image.open(io.BytesIO(value["bytes"]) if value["bytes"] is not None else value["path"]) as image:
        size, mode = upright_size(image), image.mode
        image.draft(None, (enough, enough) if enough else None)
        ImageOps.exif_transpose(image, in_place=True)
        image = image if image.mode == "RGB" else image.convert("RGB")
        thumb, data = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX)), image.tobytes()
    pixels, digest = np.frombuffer(data, np.uint8).reshape(image.height, image.width, 3), hash((image.size, data))
    green, beside = pixels[..., 1].copy(), np.roll(pixels[..., 1], 1, 1)
    sharpness = (np.maximum(green, beside) - np.minimum(green, beside)).mean()
    return {"pixels": pixels, "size": size, "mode": mode, "digest": digest, "thumb": thumb, "sharpness": sharpness}


def _near(left: np.ndarray, right: np.ndarray | None = None) -> np.ndarray:
    """Which of n thumbnails (n, S, ...) nearly equal one of `right` on every side, or else an earlier one of `left`."""
    others = left if right is None else right
    flat, to = (thumbs.reshape(len(thumbs), np.prod(thumbs.shape[1:])) - np.float32(128) for thumbs in (left, others))
    found = np.zeros(len(left), bool)
    for start in range(0, len(left) if len(others) else 0, CHUNK):
        part = slice(start, start + CHUNK)
        to = flat[: part.stop] if right is None else to
        apart = (to**2).sum(1) - 2 * flat[part] @ to.T  # squared distances but for what a row shares
        if right is None:
            apart[np.arange(len(to)) >= np.arange(len(left))[part, None]] = np.inf
        a, b = left[part].astype(np.float32), others[apart.argmin(1)].astype(np.float32)
        limit = NEAR * np.sqrt(a.var((2, 3)).mean(-1))
        found[part] = (np.sqrt(((a - b) ** 2).mean((2, 3, 4))) < limit).all(1) & np.isfinite(apart.min(1))
    return found


def _check_columns(raw: datasets.Dataset, others: Mapping[str, datasets.Dataset]) -> tuple[list[Finding], bool]:
    """Findings about labels and attributes of all rows, and whether some sides are swapped by their attributes."""
    rows, swapped = np.arange(len(raw)), np.zeros(1, bool)
    found = _found("few-pairs", f"the set has {len(raw)} pairs") if len(raw) < FEW else []
    for kind in ("label", "attribute"):
        values = {name: _texts(raw, name) for name in raw.column_names if name.startswith(kind)}
        last = {name: 3 + isinstance(raw.features[name], datasets.ClassLabel) for name in values}
        known = np.all([~np.isin(values[name], MISSING[: last[name]]) for name in values] or [rows >= 0], axis=0)
        found += _found(f"{kind}-missing", f"have no {kind} (None, NaN, -100, or -1 of a ClassLabel)", rows, ~known)
        a, b = (values.get(f"{kind}_{side}", next(iter(values.values()), rows)) for side in "ab")
        differs = known & (a != b)
        if kind == "label":
            found += _found("label-differs", "have label_a other than label_b", rows, differs)
            label, count = Counter(a[known].tolist()).most_common(1)[0] if known.any() else (None, 0)
            most = f"{'all' if count == len(raw) else f'{count} of'} {len(raw)} pairs have the label {label}"
            found += _found("one-label", most) if count >= max(MOST * known.sum(), 2) else []
        elif len(values) == 2:
            found += _found("attribute-same", "have one attribute value on both sides", rows, known & ~differs)
            usual = [Counter(side[differs].tolist() or [""]).most_common(1)[0][0] for side in (a, b)]
            swapped = min((differs & (side != most) for side, most in zip((a, b), usual, strict=True)), key=np.sum)
            what = f"have not the attribute of most on their sides ({usual[0]} on a, {usual[1]} on b)"
            found += _found("attributes-swapped", what, rows, swapped)
    for name, other in others.items():
        if all(isinstance(dataset.features.get("label"), datasets.ClassLabel) for dataset in (raw, other)):
            ours, theirs = (Counter(dataset["label"][:]) for dataset in (raw, other))
            gap = (
                sum(abs(ours[label] / len(raw) - theirs[label] / max(len(other), 1)) for label in {*ours, *theirs}) / 2
            )
            what = f"the label shares differ from those of {name!r} by {gap:.0%} (total variation)"
            found += _found("label-shares", what) if gap > SHARE_GAP else []
    return found, bool(swapped.any())


def _texts(rows: datasets.Dataset, name: str) -> np.ndarray:
    """The values of a column as texts, (n,)."""
    values = rows.select_columns([name]).with_format("arrow")[:][name].combine_chunks()
    if pa.types.is_nested(values.type) or isinstance(values, pa.ExtensionArray):
        return np.array([*map(str, rows[name][:])])
    encoded = values.dictionary_encode()  # a text for each value, not for each row: there may be millions
    texts = np.array([*map(str, encoded.dictionary.to_pylist()), str(None)])
    return texts[encoded.indices.fill_null(len(texts) - 1).to_numpy(zero_copy_only=False)]


def _check_images(looks: np.ndarray, processor: Any) -> list[Finding]:
    rows, whole, broken = looks["row"], looks["whole"], looks["failure"] != ""
    deep = np.isin(looks["mode"], DEEP).all(1)
    found = _found("image-unreadable", f"cannot be read ({max(looks['failure'])})", rows, broken)
    found += _found("sides-shape", "have sides of different size or mode", rows, ~broken & ~whole & ~deep)
    found += _found("image-deep", "have more than 8 bits a channel; they are not looked at further", rows, deep)
    for kind in ("mode", "size"):
        values = np.array([str(value) for value in looks[kind][:, 0].tolist()])
        usual = Counter(values[whole].tolist() or [""]).most_common(1)[0][0]
        severity = None if kind == "mode" or getattr(processor, "do_resize", True) else "warning"
        what = f"have another {kind} than most ({usual})"
        found += _found(f"{kind}s-differ", what, rows, whole & (values != usual), severity)
    return found


def _check_pixels(whole: np.ndarray) -> list[Finding]:
    """Findings about the change between the sides, and about pairs that are repeated."""
    rows, same = whole["row"], whole["digest"][:, 0] == whole["digest"][:, 1]
    found = _found("sides-identical", "have the same pixels on both sides", rows, same)
    tiny = ~same & (whole["changed"] < TINY)
    found += _found("change-tiny", f"differ clearly in less than {TINY:.1%} of their pixels", rows, tiny)
    if not same.all():
        low, median, high = np.quantile(whole["changed"][~same], [0, 0.5, 1])
        what = f"between the sides {median:.1%} of the pixels change clearly (median; {low:.1%} to {high:.1%})"
        found += _found("change-share", what)
    _, first, group = np.unique(np.sort(whole["digest"], axis=1), axis=0, return_index=True, return_inverse=True)
    repeated = first[group.reshape(-1)] != np.arange(len(whole))
    found += _found("pair-repeated", "repeat an earlier pair", rows, repeated)
    return found + _found("pair-near", "are nearly an earlier pair", rows[~repeated], _near(whole["thumb"][~repeated]))


def _check_partners(whole: np.ndarray, seed: int) -> list[Finding]:
    """Findings about sides that are no more alike than those of shuffled partners."""
    grey = whole["thumb"].mean(-1, dtype=np.float32).reshape(len(whole), 2, -1)
    # the half of the pixels that changes least in the set
    calm = np.argsort(np.median(np.abs(grey[:, 0] - grey[:, 1]), axis=0), kind="stable")[: grey.shape[-1] // 2]
    grey -= grey.mean(0)  # what all rows share makes no two alike
    shows = (grey.std(-1) > 1).all(1)  # a plain side correlates with nothing
    if shows.sum() < ENOUGH_PAIRS:
        return []
    alike, chance = _likeness(grey[shows], seed)
    limit, usual = np.quantile(chance, 0.95), np.median(alike)
    if usual - limit > CLEAR * 1.4826 * np.median(np.abs(alike - usual)):
        # in an image of little contrast, an overlay at one place outweighs the rest: these pixels show the partner
        alike_there, chance_there = _likeness(grey[shows][..., calm], seed)
        unlike = (alike < limit) & (alike_there < np.quantile(chance_there, 0.95))
        what = f"have sides no more alike than shuffled partners (correlation below {limit:.2f}; most {usual:.2f})"
        return _found("partner-unlike", what, whole["row"][shows], unlike)
    what = f"the sides are no more alike (correlation {alike.mean():.2f}) than those of shuffled partners"
    return _found("sides-unmatched", what) if alike.mean() <= chance.mean(1).max() else []


def _likeness(grey: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Correlation of the sides of n pairs (n, 2, pixels), without its sign: (n,), and of shuffled partners (..., n)."""
    grey = grey - grey.mean(-1, keepdims=True)
    a, b = (grey / np.maximum(np.linalg.norm(grey, axis=-1, keepdims=True), 1e-6)).swapaxes(0, 1)
    order = np.random.default_rng((seed, 1)).permutation(len(a))
    chance = np.abs([(a[order] * b[np.roll(order, step)]).sum(-1) for step in range(1, ENOUGH_PAIRS)])
    return np.abs((a * b).sum(-1)), chance


def _check_orientation(whole: np.ndarray, seed: int) -> list[Finding]:
    """Findings about the direction in which the sides differ: in pixels, contrast, colourfulness or sharpness."""
    small = whole["thumb"].reshape(-1, 2, SIDE // 2, 2, SIDE // 2, 2, 3).mean((3, 5), dtype=np.float32)
    traits = [small, small.std((2, 3)).mean(-1), np.ptp(small, -1).mean((2, 3)), whole["sharpness"]]
    gaps = [(trait[:, 0] - trait[:, 1]).reshape(len(whole), -1) for trait in traits]
    moved = gaps[0].any(1)
    rows, gaps, count = whole["row"][moved], [gap[moved] for gap in gaps], np.count_nonzero(moved)
    if count < ENOUGH_PAIRS:
        return []
    signs = np.random.default_rng((seed, 2)).choice(np.float32([-1, 1]), (201, count))
    signs[0] = 1
    # squared mean difference, over what random signs give on average
    ratios = np.max([((signs @ gap) ** 2).sum(1) / max((gap**2).sum(), 1e-9) for gap in gaps], axis=0)
    found, chance = ratios[0], ratios[1:].max()
    far = gaps[0] @ np.linalg.eigh(gaps[0].T @ gaps[0])[1][:, -1]  # in the direction in which the sides differ most
    far *= np.sign(np.sign(far).sum()) or np.sign(far[0])
    along = far / np.linalg.norm(gaps[0], axis=1)
    usual = np.median(np.abs(along))
    is_clear = usual > CLEAR * 1.4826 * np.median(np.abs(np.abs(along) - usual))
    # a difference smaller than most has no sure direction: a bright overlay on a bright image may make it darker
    swapped = is_clear & (along < -usual / 2) & (far < -np.median(np.abs(far)) / 2)
    what = f"squared mean difference of the sides {found:.3g} times that of unoriented pairs, by chance to {chance:.3g}"
    if found > chance:
        return _found("sides-swapped", f"differ the other way round than most ({what})", rows, swapped)
    severity = "warning" if swapped.any() or count >= SURE_PAIRS else "info"
    return _found("sides-unoriented", f"the sides show no common direction: {what}", rows[swapped], severity=severity)


def _check_readable(name: str, looks: np.ndarray) -> list[Finding]:
    """Findings about images of another set that no measurement can use."""
    deep = np.isin(looks["mode"], DEEP).any(1)
    bad = looks[deep | (looks["failure"] != "")]
    if not len(bad):
        return []
    why = bad[0]["failure"] or f"more than 8 bits a channel, mode {bad[0]['mode'][0]}"
    what = (
        f"{len(bad)} of {len(looks)} rows of {name!r} have images that cannot be used, first row {bad[0]['row']}: {why}"
    )
    return _found("evaluation-unreadable", what)


def _check_leaks(whole: np.ndarray, name: str, other: np.ndarray) -> list[Finding]:
    theirs = other[other["whole"]]
    exact = np.isin(whole["digest"], theirs["digest"]).any(1)
    found, rest = _found("evaluation-image", f"hold an image of {name!r}", whole["row"], exact), whole[~exact]
    single = [thumbs.reshape(-1, 1, SIDE, SIDE, 3) for thumbs in (rest["thumb"], theirs["thumb"])]
    near = _near(*single).reshape(-1, 2).any(1)
    return found + _found("evaluation-near", f"nearly hold an image of {name!r}", rest["row"], near)


def _check_scores(sets: Mapping[str, datasets.Dataset], rows: np.ndarray, *settings: Any) -> list[Finding]:
    """Flips and divergence of the pairs, and whether those of the held-out pairs are larger."""
    try:
        scores = {name: score_pairs(dataset, *settings) for name, dataset in sets.items()}
    except (ValueError, OSError) as failure:
        return _found("scores-failed", f"the model gave no scores: {failure}")
    values = {name: np.array([score["flipped"], score["divergence"]]) for name, score in scores.items()}
    texts = [f"flip rate {v[0].mean():.1%}, mean divergence {v[1].mean():.3g} on {name}" for name, v in values.items()]
    found = _found("model-scores", "; ".join(texts), rows[np.argsort(-values["pairs"][1], kind="stable")])
    own, other = values["pairs"], values.get("held_out", values["pairs"])
    error = np.concatenate([own, other], 1).std(1) * np.sqrt(1 / own.shape[1] + 1 / other.shape[1])
    is_worse = other.shape[1] >= FEW and (other.mean(1) - own.mean(1) > Z_LIMIT * error).any()
    return found + (_found("held-out-worse", "; ".join(texts)) if is_worse else [])
