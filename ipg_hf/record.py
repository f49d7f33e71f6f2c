# SPDX-License-Identifier: Apache-2.0
"""The record of a run: every setting with the value that the run used, what was measured, and on what.

A record is one dict. `run.json` in an output folder holds it; a collection is a JSONL file, one record a line.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from enum import Enum
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import Trainer

from .metrics import OF_PAIRS, WORST_GROUP
from .pairs import ImageRows, check_pairs
from .seeding import first_row

# the value of a setting that an old record does not have and that nothing else tells
NOT_RECORDED = "not recorded"

# options that came after the first records, with the value that stands for what the code did before
LATER = {"pair_loss_weight": 0.0, "layer_lr_decay": 1.0, "head_learning_rate": None, "extend_pairs": {}}

# the split of the metrics of held-out pairs, where there are several evaluation sets
PAIRS = "held-out pairs"

RECORDED_PACKAGES = ("ipg_hf", "torch", "transformers", "accelerate", "timm", "datasets")

# settings that name a place, an account or a stage of the work; they change nothing in what is computed
NO_SETTINGS = re.compile(
    r"output_dir|overwrite_output_dir|data_dir|preload_dir|logging_dir|resume_from_checkpoint|run_name|about"
    r"|push_to_hub|hub_\w+|trackio_\w+|\w+_token|local_rank|do_(train|eval|predict)|_\w+"
)

TIMINGS = ("_runtime", "_per_second", "_preparation_time")


# ---- Settings


def resolved_settings(*sources: Any) -> dict[str, Any]:
    """Every setting of a run with its value, whether it was given or is a default.

    Args:
        sources: dataclass instances: a recipe and its training arguments, or the training arguments alone.

    Returns:
        Name -> a value that JSON has. Settings that name a folder, an account or a token are left out, and of an
        absolute path the last part is kept.
    """
    found = {}
    for source in sources:
        for entry in fields(source):
            if not NO_SETTINGS.fullmatch(entry.name):
                found[entry.name] = _plain(getattr(source, entry.name))
    return found


def recorded_names(given: Iterable[str]) -> list[str]:
    """The names of the given settings, without those that no record has."""
    return [name for name in given if not NO_SETTINGS.fullmatch(name)]


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, str):
        return Path(value).name if os.path.isabs(value) else value
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(part) for part in value]
    if is_dataclass(value):
        return _plain(asdict(value))
    return str(value)


# ---- The record of a training


def make_record(
    trainer: Trainer,
    *,
    settings: Mapping[str, Any],
    metrics: Mapping[str, Mapping[str, Any]],
    seconds: float | None,
    method: str,
    given: Iterable[str] | None = None,
    commit: str | None = None,
    base_model: str | None = None,
    about: Mapping[str, Any] | None = None,
    baseline: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The record of a training that has ended.

    Args:
        trainer: the trainer.
        settings: what [`resolved_settings`] returns.
        metrics: split -> name of a metric -> its value.
        seconds: duration of the training.
        method: key of `baselines.METHODS`.
        given: names of the settings that the user gave; `None` where that is not known.
        commit: commit of the code.
        base_model: Hub id of the model that was fine-tuned.
        about: the fields of `data.About`.
        baseline: what a baseline reports of itself, such as the number of errors that it repeats.
    """
    state = trainer.state
    record = {
        "method": method,
        "settings": dict(settings),
        "given": None if given is None else recorded_names(given),
        "seed": trainer.args.seed,
        "metrics": {split: dict(values) for split, values in metrics.items()},
        "chosen_step": state.best_global_step or state.global_step,
        "steps": state.global_step,
        "course": course(state.log_history),
        "seconds": None if seconds is None else round(seconds, 1),
        "versions": versions(),
        "commit": commit,
        "hardware": hardware(),
        "base_model": base_model,
        "about": None if about is None else dict(about),
        "data": data_facts(trainer),
    }
    return record | ({"baseline": dict(baseline)} if baseline else {})


def trainer_record(trainer: Trainer) -> dict[str, Any]:
    """The record of a training without a recipe; its metrics are those of the evaluation at the chosen step.

    Where there are several evaluation sets, their names take the place of a split's, and `PAIRS` has the metrics of
    held-out pairs.

    The last evaluation in the log is not that of the best checkpoint (transformers issue 15547).
    """
    state, args = trainer.state, trainer.args
    step = state.best_global_step if args.load_best_model_at_end and state.best_global_step else state.global_step
    several = trainer.eval_dataset if isinstance(trainer.eval_dataset, Mapping) else {}
    prefixes = {name: f"eval_{name}_" for name in several} or {"evaluation": "eval_"}
    metrics, measured_at, history = {}, step, state.log_history
    for name, prefix in prefixes.items():
        found = [entry for entry in history if f"{prefix}loss" in entry and entry["step"] <= step]
        if found:
            measured_at = found[-1]["step"]
            metrics[name] = {
                key.removeprefix(prefix): value
                for key, value in found[-1].items()
                if key.startswith(prefix) and not key.endswith(TIMINGS)
            }
    if several:  # the entry of one of the sets has them, by names without a set
        of_pairs = [{k: v for k, v in entry.items() if _is_of_pairs(k)} for entry in history if entry["step"] <= step]
        if found := [values for values in of_pairs if values]:
            metrics[PAIRS] = {key.removeprefix("eval_"): value for key, value in found[-1].items()}
    record = make_record(
        trainer,
        settings=resolved_settings(args),
        metrics=metrics,
        seconds=next((entry["train_runtime"] for entry in state.log_history if "train_runtime" in entry), None),
        method=trainer.method if hasattr(trainer, "method") else "erm",  # a plain Trainer has no such name
        base_model=hub_id(getattr(getattr(trainer.model, "config", None), "_name_or_path", None)),
    )
    return record | {"chosen_step": measured_at}


def _is_of_pairs(key: str) -> bool:
    """Whether a logged value is a metric of held-out pairs: `eval_METRIC`, or `eval_SET/METRIC` of a pair set."""
    return re.fullmatch(rf"eval_([^/]+/)?({'|'.join(OF_PAIRS)})", key) is not None


def data_facts(trainer: Trainer) -> dict[str, Any]:
    """What a record keeps of a trainer's data: number of training rows, and of each pair set the number of pairs,
    whether they are known to have labels, and what the fast form of the linter finds (`None` for a stream, or where
    partners are searched in training)."""

    def of(dataset: Any) -> dict[str, Any]:
        looked = isinstance(dataset, (ImageRows, datasets.Dataset)) and getattr(dataset, "format", {})
        is_stored = isinstance(dataset, ImageRows) or (looked and looked["type"] != "custom")
        findings = check_pairs(dataset, fast=True) if is_stored else None
        kept = None if findings is None else [[f.severity, f.code, f.message] for f in findings]
        number = len(dataset) if hasattr(dataset, "__len__") else None
        columns = first_row(dataset) if number else getattr(dataset, "features", None) or ()  # of a stream
        return {"pairs": number, "labelled": "label" in columns, "findings": kept}

    train = trainer.train_dataset
    sets = getattr(trainer, "pair_datasets", {})  # a plain Trainer has none
    return {
        "train": len(train) if hasattr(train, "__len__") else None,
        "pair_sets": {name: of(dataset) for name, dataset in sets.items()},
    }


def course(history: Sequence[Mapping[str, Any]], points: int = 50) -> dict[str, dict[str, list[float]]]:
    """What was logged over the steps of a training, for figures.

    Args:
        history: `trainer.state.log_history`.
        points: largest number of steps to keep. They are evenly spread, with the first and the last among them.

    Returns:
        `guidance` (`divergence`, `violated`, `loss_scale`) and `validation` (`worst_group_accuracy` or
        `worst_group_mae`), each in columns beside `step`, with four significant digits. What was not logged is left
        out.
    """
    kept = {
        "guidance": ("ipg/divergence", "ipg/violated", "ipg/loss_scale"),
        "validation": tuple(f"eval_{name}" for name in WORST_GROUP),
    }
    found = {}
    for part, keys in kept.items():
        entries = [entry for entry in history if any(key in entry for key in keys)]
        if len(entries) > points:
            entries = [entries[round(i * (len(entries) - 1) / (points - 1))] for i in range(points)]
        names = [key for key in keys if all(key in entry for entry in entries)]
        if entries:
            columns = {name.split("/")[-1].removeprefix("eval_"): [entry[name] for entry in entries] for name in names}
            columns = {name: [float(f"{value:.4g}") for value in values] for name, values in columns.items()}
            found[part] = {"step": [entry["step"] for entry in entries], **columns}
    return found


def hub_id(name: str | None) -> str | None:
    """The name of a base model if it is an id of the Hub, `None` if it is a folder."""
    return name if name and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists() else None


# ---- What a run ran on


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

    It is read once: the source tree may change while a suite runs.
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

    On Linux `cpu` names the processor and the instructions that torch uses. They decide how sums are rounded, so that
    one seed gives different trainings on different processors.
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


# ---- Files


def json_values(value: Any) -> Any:
    """A value with the texts `"Infinity"`, `"-Infinity"` and `"NaN"` for the numbers that JSON does not have.

    `float` reads the texts.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")
    if isinstance(value, Mapping):
        return {key: json_values(part) for key, part in value.items()}
    return [json_values(part) for part in value] if isinstance(value, (list, tuple)) else value


def from_json(text: str) -> Any:
    """What a text in JSON says, with numbers for the texts that [`json_values`] writes."""

    def number(value: Any) -> Any:
        if isinstance(value, list):
            return [number(part) for part in value]
        return float(value) if value in ("Infinity", "-Infinity", "NaN") else value

    return json.loads(text, object_hook=lambda entries: {key: number(value) for key, value in entries.items()})


def read_json(path: str | os.PathLike) -> Any:
    """What a JSON file says.

    Raises:
        ValueError: the file is not JSON; the message names it.
    """
    try:
        return from_json(Path(path).read_text(encoding="utf-8"))
    except ValueError as failure:
        raise ValueError(f"{path} is damaged ({failure}): write it again.") from failure


def check_place(path: str | os.PathLike) -> None:
    """Raises a NotADirectoryError if a file stands where a folder of the path is, or would be made."""
    for place in Path(path).parents:
        if place.exists() and not place.is_dir():
            raise NotADirectoryError(f"{place} is a file, and no folder for {Path(path).name}: name another folder.")


def check_unused(folder: str | os.PathLike, names: Iterable[str], what: str) -> None:
    """Raises an error if a folder holds some files, or if a file stands where the folder would be made.

    Args:
        folder: the folder.
        names: names of the files.
        what: what the files are, for the message, for example `"report"`.

    Raises:
        FileExistsError: the folder holds one of the files.
        NotADirectoryError: the folder, or one that it would stand in, is a file.
    """
    for name in names:
        check_place(Path(folder) / name)
        if (Path(folder) / name).exists():
            raise FileExistsError(f"{folder} holds another {what} ({name}): remove it, or give another folder.")


def write_json(path: str | os.PathLike, record: Mapping[str, Any]) -> None:
    """Writes a JSON file whole or not at all, in a folder that is made if there is none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(json_values(record), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def append_record(path: str | os.PathLike, record: Mapping[str, Any]) -> None:
    """Appends a record to a JSONL file, as one line in one write.

    A last line without its end was left by a process that was killed, and is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(json_values(record), separators=(",", ":"), allow_nan=False) + "\n").encode()
    with open(path, "a+b", buffering=0) as file:
        file.seek(0)
        text = file.read()
        if text and not text.endswith(b"\n"):
            file.truncate(text.rfind(b"\n") + 1)
        file.write(line)


def read_records(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of a JSONL file, in its order; none where there is no file.

    Settings that a record is older than have the value of `LATER`. A last line without its end was left by a process
    that was killed, and is not read.

    Raises:
        ValueError: another line is not JSON.
    """
    path, found = Path(path), []
    if not path.exists():
        return found
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            record = from_json(line)
        except json.JSONDecodeError as failure:
            raise ValueError(f"{path}, line {number} is not a record ({failure}): remove the line.") from failure
        if "settings" in record:
            record["settings"] = LATER | record["settings"]
        found.append(record)
    return found
