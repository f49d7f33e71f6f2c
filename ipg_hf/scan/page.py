# SPDX-License-Identifier: Apache-2.0
"""Shows the result of a scan: a table, and a page with pictures and the recipe line that makes pairs."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import yaml

from ..html import rendered, write_files
from ..pairs.exchanging import BACKGROUND, CENTER
from ..record import check_unused
from .measure import Finding, Scan

PAGE, NUMBERS = "scan.html", "scan.json"


def first_suspect(result: Scan) -> str | None:
    """The part against which pairs should be made: of the strong findings the first, but not the center."""
    return next((found.part for found in result.findings if _is_suspect(found)), None)


def _is_suspect(found: Finding) -> bool:
    return found.strength == "strong" and found.part != CENTER


def scan_table(result: Scan) -> str:
    """The findings as text, a line each."""
    lines = [f"{'part':<14}{'strength':<10}{'effect':>8}  {'95 % interval':<18}{'changed':>8}{'control':>9}"]
    for found in result.findings:
        interval = f"[{found.low:+.2f}, {found.high:+.2f}]"
        lines.append(
            f"{found.part:<14}{found.strength:<10}{found.effect:>+8.2f}  {interval:<18}{found.changed:>8.2f}"
            f"{found.control:>9.2f}"
        )
    return "\n".join(lines)


def pairs_setting(part: str, mask: str | None, segmenter: str | None = None) -> dict[str, str]:
    """The setting `pairs` of a recipe that makes pairs against a part.

    Args:
        part: the part.
        mask: column of the masks, if there are any.
        segmenter: the model that makes the masks, if the set has none.
    """
    has_mask = part == BACKGROUND and mask not in (None, "mask")
    setting = {"maker": "exchange", "part": part, **({"mask": mask} if has_mask else {})}
    return setting | ({"segmenter": segmenter} if part == BACKGROUND and segmenter else {})


def recipe_against(
    part: str,
    model: str,
    data: str,
    *,
    mask: str | None = None,
    segmenter: str | None = None,
    freeze_norm: bool = False,
) -> str:
    """Returns a recipe that trains a scanned model on, with pairs against a part, in YAML.

    Args:
        part: the part.
        model: folder or Hub id of the model.
        data: folder or Hub id of the set. It has labels and a training split.
        mask: column of the masks, if there are any.
        segmenter: folder or Hub id of the model that makes the masks, if the set has none.
        freeze_norm: whether to keep batch-norm layers as they are; for models that have some.
    """
    settings = {"dataset": "files", "data_dir": data} if os.path.isdir(data) else {"dataset": data}
    settings |= {"pairs": pairs_setting(part, mask, segmenter), "model_name_or_path": model}
    settings |= {"freeze_norm": True} if freeze_norm else {}
    settings |= {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    settings |= {"metric_for_best_model": "pair_accuracy", "output_dir": "outputs/repaired"}
    head = f"# Fine-tunes {model} so that it no longer follows the {part.replace('_', ' ')}. The rest are defaults.\n"
    return head + yaml.safe_dump(settings, sort_keys=False)


def check_folder(folder: str | os.PathLike) -> None:
    """Raises an error if a folder holds a scan, or if a file stands where the folder would be made.

    Raises:
        FileExistsError: the folder holds a scan.
        NotADirectoryError: the folder, or one that it would stand in, is a file.
    """
    check_unused(folder, (PAGE, NUMBERS), "scan")


def write_scan(
    result: Scan, folder: str | os.PathLike, *, title: str = "Scan", segmenter: str | None = None
) -> list[Path]:
    """Writes a scan into a folder: `scan.html`, a page that needs no other file, and `scan.json`, its numbers.

    Args:
        result: the scan.
        folder: the folder. It is made.
        title: title of the page.
        segmenter: folder or Hub id of the model that made the masks, for the recipe lines.

    Returns:
        The files, the page first.

    Raises:
        FileExistsError: the folder holds a scan.
        NotADirectoryError: the folder, or one that it would stand in, is a file.
    """
    check_folder(folder)
    folder = Path(folder)
    numbers = {name: value for name, value in vars(result).items() if name not in ("findings", "examples")}
    numbers |= {"title": title, "segmenter": segmenter, "findings": [asdict(found) for found in result.findings]}
    page = rendered(
        "scan/page.html",
        {"signed": lambda value: f"{value:+.2f}".replace("-", "−"), "percent": lambda value: f"{100 * value:.0f} %"},
        title=title,
        result=result,
        sentences={found.part: sentence(found) for found in result.findings},
        lines={found.part: _line(found.part, result.mask, segmenter) for found in result.findings},
        strong=[found.part for found in result.findings if _is_suspect(found)],
    )
    files = {folder / PAGE: page.encode(), folder / NUMBERS: (json.dumps(numbers, indent=1) + "\n").encode()}
    write_files(files)
    return [*files]


def _line(part: str, mask: str | None, segmenter: str | None = None) -> str:
    setting = pairs_setting(part, mask, segmenter)
    return "pairs: " + yaml.safe_dump(setting, default_flow_style=True, sort_keys=False, width=200)


WHAT = {
    "border": "the border of the frame",
    "surroundings": "the surroundings of the middle",
    CENTER: "the middle of the frame",
    "color": "the colours",
    "texture": "the fine detail",
    "background": "the background",
}


def sentence(finding: Finding) -> str:
    """What a finding says, in one sentence."""
    part = finding.part.replace("_", " ")
    what = WHAT.get(finding.part, f"the {part} {'corner' if ' ' in part else 'edge'} of the frame")
    verb = {"strong": "The answer follows", "weak": "The answer follows a little"}
    follows = verb.get(finding.strength, "Nothing shows that the answer follows")
    return (
        f"{follows} {what}. With that of an image of another answer it changes in {100 * finding.changed:.0f} % of the "
        f"images, with that of an image of the same answer in {100 * finding.control:.0f} %."
    )
