# SPDX-License-Identifier: Apache-2.0
"""Shows the result of a scan: a table, and a page with pictures and the recipe line that makes pairs."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import yaml

from ..html import rendered, write_files
from ..pairs.exchanging import BACKGROUND, CENTER, OVERLAY
from ..record import check_unused, read_json
from .measure import Finding, Scan
from .properties import FileProperty

PAGE, NUMBERS = "scan.html", "scan.json"
SHOWN = 5  # answers whose typical property is named


def first_suspect(result: Scan) -> str | None:
    """The part against which pairs should be made: the first strong finding but for the center, if there is one."""
    found = _first(result)
    return found and found.part


def _first(result: Scan) -> Finding | None:
    return next((found for found in result.findings if _is_suspect(found)), None)


def _is_suspect(found: Finding) -> bool:
    return found.strength == "strong" and found.part != CENTER


def scan_table(result: Scan, before: Scan | None = None) -> str:
    """The findings as text, a line each.

    Args:
        result: the scan.
        before: an earlier scan, of [`read_scan`]. Its effects get a column, and what only it has gets a line.
    """
    was = {found.part: f"{found.effect:+.2f}" for found in before.findings} if before else {}
    heads = [f"{'part':<14}{'strength':<10}", *([f"{'before':>8}"] if before else [])]
    lines = ["".join([*heads, f"{'effect':>8}  {'95 % interval':<18}{'changed':>8}{'control':>9}"])]
    for found in result.findings:
        cells = [f"{found.part:<14}{found.strength:<10}"]
        cells += [f"{was.get(found.part, '-'):>8}"] if before else []
        interval = f"[{found.low:+.2f}, {found.high:+.2f}]"
        cells += [f"{found.effect:>+8.2f}  {interval:<18}{found.changed:>8.2f}{found.control:>9.2f}"]
        lines.append("".join(cells))
    lines += [f"{part:<14}{now:<10}{was[part]:>8}" for part, now in _gone(result, before).items()]
    lines += [f"\n{property_sentence(found)}" for found in result.properties if found.tells]
    return "\n".join(lines)


def _gone(result: Scan, before: Scan | None) -> dict[str, str]:
    """The parts that an earlier scan has and this one has not, and why: no overlay goes with the answers any more."""
    parts = {found.part for found in result.findings}
    missing = [found.part for found in before.findings if found.part not in parts] if before else []
    return {part: "not found" if part == OVERLAY else "not run" for part in missing}


def property_sentence(found: FileProperty) -> str:
    """What a property of the files tells, in two sentences."""
    values = [
        f"{answer} {value if isinstance(value, str) else f'{value:.10g}'}" for answer, value in found.typical.items()
    ]
    more = f" and {len(values) - SHOWN} more" if len(values) > SHOWN else ""
    told, low, high, chance = (f"{100 * share:.0f}" for share in (found.told, found.low, found.high, found.chance))
    return (
        f"From the {found.name} of its file alone, the answer to an image is guessed rightly in {told} % (each answer "
        f"weighs the same; 95 % interval {low} to {high} %, by chance {chance} %). "
        f"Typical: {', '.join(values[:SHOWN])}{more}."
    )


def pairs_setting(part: str, result: Scan) -> dict[str, str]:
    """The setting `pairs` of a recipe that makes pairs against a part, with the masks that the scan had."""
    setting = {"maker": "exchange", "part": part}
    if part == BACKGROUND:
        setting |= {"mask": result.mask} if result.mask not in (None, "mask") else {}
        setting |= {"segmenter": result.segmenter} if result.segmenter else {}
    return setting


def recipe_against(result: Scan, model: str, data: str, *, freeze_norm: bool = False) -> str:
    """Returns a recipe that trains a scanned model on, with pairs against the first strong finding, in YAML.

    The card of the trained model will say what was found.

    Args:
        result: the scan.
        model: folder or Hub id of the model.
        data: folder or Hub id of the set. It has labels and a training split.
        freeze_norm: whether to keep batch-norm layers as they are; for models that have some.

    Raises:
        ValueError: the scan has no strong finding but for the center.
    """
    found = _first(result)
    if found is None:
        raise ValueError("the scan has no strong finding beside the center: there is nothing to train against.")
    settings = {"dataset": "files", "data_dir": data} if os.path.isdir(data) else {"dataset": data}
    settings |= {"pairs": pairs_setting(found.part, result), "model_name_or_path": model}
    settings |= {"freeze_norm": True} if freeze_norm else {}
    settings |= {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    settings |= {"metric_for_best_model": "pair_accuracy", "output_dir": "outputs/repaired"}
    name = Path(model).name if os.path.isabs(model) else model  # a card names no place of a machine
    shortcut = f"A scan of {name} before this training (`ipg scan`, {result.num_images} images): {sentence(found)}"
    settings |= {"about": {"attribute": what(found.part), "shortcut": shortcut}}
    head = f"# Fine-tunes {model} so that it no longer follows {what(found.part)}. The rest are defaults.\n"
    head += f"# {CAUTIONS[found.part]}\n" if found.part in CAUTIONS else ""
    return head + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=120)


def read_scan(folder: str | os.PathLike) -> Scan:
    """Reads a scan that [`write_scan`] wrote into a folder, without the pictures.

    Raises:
        ValueError: the folder holds no scan, or a damaged one.
    """
    path = Path(folder) / NUMBERS
    if not path.is_file():
        raise ValueError(f"{folder} holds no scan ({NUMBERS}): give the folder of a `--report`.")
    try:
        values = {**read_json(path), "examples": {}}
        findings = [Finding(**found) for found in values.pop("findings")]
        values["properties"] = [FileProperty(**found) for found in values.get("properties", [])]
        del values["title"]
        return Scan(findings, **values)
    except (AttributeError, KeyError, TypeError) as failure:
        raise ValueError(f"{path} is no scan: make it again, by `ipg scan --report`.") from failure


def check_folder(folder: str | os.PathLike) -> None:
    """Raises an error if a folder holds a scan, or if a file stands where the folder would be made.

    Raises:
        FileExistsError: the folder holds a scan.
        NotADirectoryError: the folder, or one that it would stand in, is a file.
    """
    check_unused(folder, (PAGE, NUMBERS), "scan")


def write_scan(
    result: Scan, folder: str | os.PathLike, *, title: str = "Scan", before: Scan | None = None
) -> list[Path]:
    """Writes a scan into a folder: `scan.html`, a page that needs no other file, and `scan.json`, its numbers.

    Args:
        result: the scan.
        folder: the folder. It is made.
        title: title of the page.
        before: an earlier scan, of [`read_scan`]. The page shows its effects beside these.

    Returns:
        The files, the page first.

    Raises:
        FileExistsError: the folder holds a scan.
        NotADirectoryError: the folder, or one that it would stand in, is a file.
    """
    check_folder(folder)
    folder = Path(folder)
    numbers = {name: value for name, value in vars(result).items() if name not in ("findings", "examples")}
    for name in ("findings", "properties"):
        numbers[name] = [asdict(found) for found in getattr(result, name)]
    numbers["title"] = title
    page = rendered(
        "scan/page.html",
        {"signed": lambda value: f"{value:+.2f}".replace("-", "−"), "percent": lambda value: f"{100 * value:.0f} %"},
        title=title,
        result=result,
        before={found.part: found.effect for found in before.findings} if before else {},
        gone=_gone(result, before),
        sentences={found.part: sentence(found) for found in result.findings},
        lines={found.part: _line(found.part, result) for found in result.findings},
        cautions=CAUTIONS,
        properties=[property_sentence(found) for found in result.properties if found.tells],
        strong=[found.part for found in result.findings if _is_suspect(found)],
    )
    files = {folder / PAGE: page.encode(), folder / NUMBERS: (json.dumps(numbers, indent=1) + "\n").encode()}
    write_files(files)
    return [*files]


def _line(part: str, result: Scan) -> str:
    setting = pairs_setting(part, result)
    return "pairs: " + yaml.safe_dump(setting, default_flow_style=True, sort_keys=False, width=200)


WHAT = {
    "border": "the border of the frame",
    "surroundings": "the surroundings of the middle",
    CENTER: "the middle of the frame",
    "overlay": "what the images of an answer share outside of the middle",
    "color": "the colours",
    "texture": "the fine detail",
    "background": "the background",
}


def what(part: str) -> str:
    """A part in words."""
    name = part.replace("_", " ")
    return WHAT.get(part, f"the {name} {'corner' if ' ' in name else 'edge'} of the frame")


# part -> what pairs against it did not do where we measured them (recipes/results/planted.md)
CAUTIONS = {
    "texture": "Pairs of exchanged detail repaired none of our models: look for images that break the shortcut.",
    "color": "Pairs of exchanged colours repaired a tint, but grey images only in part.",
}


def sentence(finding: Finding) -> str:
    """What a finding says, in two sentences."""
    verb = {"strong": "The answer follows", "weak": "The answer weakly follows"}
    turned = "The control moves the answer more often than the exchange of"
    follows = verb.get(finding.strength, turned if finding.high < 0 else "No significant effect of")
    return (
        f"{follows} {what(finding.part)}. The answer changes in {100 * finding.changed:.0f} % of the images if the "
        f"part is from an image of another answer, and in {100 * finding.control:.0f} % if it is from an image of the "
        "same answer."
    )
