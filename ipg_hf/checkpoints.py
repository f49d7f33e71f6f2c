# SPDX-License-Identifier: Apache-2.0
"""Writes checkpoints completely or not at all, under the names that `Trainer` loads, and finds the newest one."""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

logger = logging.get_logger(__name__)


@contextmanager
def whole_or_removed(folder: str | os.PathLike, writes: bool = True) -> Iterator[None]:
    """Within the block, a checkpoint is saved. It is complete when the last process has written its part.

    If saving fails, the incomplete checkpoint is removed, because a resume would take it for the newest. All processes
    must enter the block.

    Args:
        folder: folder of the checkpoint.
        writes: whether this process writes the marker of an unfinished checkpoint and removes it.

    Raises:
        OSError: the files could not be written; the message has the cause and the fix. (safetensors and torch raise
            errors of other types then.)
        Exception: any other failure as it is, with a note of what became of the checkpoint.
    """
    folder = Path(folder)
    several = dist.is_available() and dist.is_initialized()
    try:
        if writes:
            # an older checkpoint of this name would look complete until it is overwritten
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
            folder.parent.mkdir(parents=True, exist_ok=True)
            _mark(folder).touch()
        yield
        if several:
            dist.barrier()  # other processes may still be writing their files
    except Exception as failure:
        if _damage(folder) is None:
            if writes and not several:
                _mark(folder).unlink(missing_ok=True)
            raise
        if writes:
            shutil.rmtree(folder, ignore_errors=True)
            _mark(folder).unlink(missing_ok=True)
        kept = "which was removed; those before it are whole" if writes else "which a resume will pass over"
        said, fix = f"could not save {folder.name}, {kept}.", _fix(failure, folder)
        if fix is None:
            failure.add_note(said)
            raise
        raise OSError(f"{said} The cause: {' '.join(str(failure).split())}. {fix}") from failure
    if writes:
        _mark(folder).unlink()


def _fix(failure: Exception, folder: Path) -> str | None:
    """Returns how to mend a failure to write files, or `None` if the failure is another one."""
    text = str(failure)
    of_safetensors, of_torch = (
        re.search(r"\(os error (\d+)\)", text),
        re.search(r"inline_container\.cc|basic_ios", text),
    )
    number = int(of_safetensors[1]) if of_safetensors else failure.errno if isinstance(failure, OSError) else None
    # torch says why it could not open a file, and not why it could not write on
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or (of_torch and "strerror" not in text):
        return "Free disk space, or save less (save_total_limit, save_only_model)."
    return f"See whether {folder.parent} can be written to." if number or of_torch else None


@contextmanager
def own_names(model: nn.Module) -> Iterator[None]:
    """Within the block, `model.save_pretrained` writes the parameters under the names that they have in the model.

    By default it writes the names of the first release of the architecture, for example for ViT. `Trainer` does not
    translate them back when it loads a checkpoint and would continue with fresh weights (transformers issue 43701).

    Args:
        model: the model. Nothing changes unless it is a transformers model.
    """
    if not isinstance(model, PreTrainedModel):
        yield
        return
    model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)
    try:
        yield
    finally:
        del model.save_pretrained


def newest_checkpoint(folder: str | os.PathLike) -> str:
    """Returns the path of the newest complete checkpoint of a run. It skips damaged ones, with a warning that says why.

    A run that is killed while saving leaves a checkpoint that is marked as unfinished. A machine that crashes leaves
    files that are cut off, empty or missing. Names, headers and lengths of the files show this; no tensor is read and
    nothing is unpickled. A changed value in a file of the right length (bit rot) is not detected.

    Args:
        folder: output folder of the run.

    Raises:
        ValueError: the folder has no checkpoint, or all are damaged.
    """
    found = [path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdigit()]
    faults = []
    for path in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        fault = "it was not written to its end" if _mark(path).exists() else _damage(path)
        if fault is None:
            return str(path)
        logger.warning(f"{path} is passed over: {fault}.")
        faults.append(f"{path.name}: {fault}")
    damaged = f" All are damaged ({'; '.join(faults)})." if faults else ""
    raise ValueError(
        f"No valid checkpoint found in output directory ({os.fspath(folder)}): train without "
        f"resume_from_checkpoint=True.{damaged}"
    )


def _mark(checkpoint: Path) -> Path:
    """The marker file beside a checkpoint that is being written. `Trainer` does not upload names that start with _."""
    return checkpoint.with_name(f"_{checkpoint.name}_is_being_written")


def _damage(checkpoint: Path) -> str | None:
    """Returns why a run cannot continue from the checkpoint, or `None` if it can."""
    if not (checkpoint / TRAINER_STATE_NAME).exists():
        return f"it was not written to its end, {TRAINER_STATE_NAME} is missing"
    for check, patterns in CHECKS.items():
        for path in sorted(path for pattern in patterns for path in checkpoint.glob(pattern) if path.is_file()):
            try:
                check(path)
            except Exception as failure:  # any error means that the file is damaged
                return f"{path.relative_to(checkpoint)} is damaged ({failure})"
    missing = {name for name, patterns in PARTS.items() if not any(any(checkpoint.glob(p)) for p in patterns)}
    if "the weights" in missing:
        return "the weights are missing"
    # save_only_model leaves out all three; DeepSpeed has them in a folder of its own
    if 0 < len(missing) < 3 and not any(checkpoint.glob("global_step*")):
        return f"{' and '.join(sorted(missing))} missing"
    return None


def _check_json(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    for shard in set(content.get("weight_map", {}).values()):
        if not (path.parent / shard).is_file():
            raise ValueError(f"{shard} is missing")


def _check_safetensors(path: Path) -> None:
    with safe_open(path, framework="pt"):  # compares the header with the length of the file
        pass


def _check_torch(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:  # reads the directory, which is at the end of the file
        if archive.infolist()[0].header_offset != 0:
            raise ValueError("its length does not match its parts")


# The files that a resume reads. Other files in a checkpoint are not checked.
CHECKS: dict[Callable[[Path], None], tuple[str, ...]] = {
    _check_json: (TRAINER_STATE_NAME, "config.json", "*.index.json", "adapter_config.json", "*/adapter_config.json"),
    _check_safetensors: ("model*.safetensors", "adapter_model.safetensors", "*/adapter_model.safetensors"),
    _check_torch: (
        *("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth"),
        *("pytorch_model*.bin", "adapter_model.bin", "*/adapter_model.bin"),
    ),
}
PARTS: dict[str, tuple[str, ...]] = {
    "the weights": ("model*.safetensors", "pytorch_model*", "adapter_model.*", "*/adapter_model.*", "global_step*"),
    "optimizer.pt": ("*optimizer*",),
    "scheduler.pt": ("scheduler.pt",),
    "rng_state.pth": ("rng_state*.pth",),
}
