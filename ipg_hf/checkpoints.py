# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are whole or not there, and that hold the model under the names it is loaded by."""

from __future__ import annotations

import functools
import json
import os
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
    """Saves a checkpoint in the block, on all processes: it counts as whole when the last has written its part.

    One that fails half-way is removed, as it would be taken for the newest.

    Args:
        folder: the checkpoint's folder.
        writes: whether this process is the one that writes it.

    Raises:
        OSError: for any error; safetensors and torch report a full disk by errors of their own.
    """
    folder = Path(folder)
    several = dist.is_available() and dist.is_initialized()
    try:
        if writes:
            # an older checkpoint of that name would look whole until it is overwritten to its end
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
            folder.parent.mkdir(parents=True, exist_ok=True)
            _mark(folder).touch()
        yield
        if several:
            dist.barrier()  # the first process has written the last file, others may not have written theirs
    except Exception as failure:
        if _damage(folder) is None:
            if writes and not several:
                _mark(folder).unlink(missing_ok=True)
            raise
        if writes:
            shutil.rmtree(folder, ignore_errors=True)
            _mark(folder).unlink(missing_ok=True)
        kept = "which was removed; those before it are whole" if writes else "which a resume passes over"
        raise OSError(
            f"could not save {folder.name}, {kept}. Make room, or save less (save_total_limit, save_only_model). "
            f"The cause: {failure}"
        ) from failure
    if writes:
        _mark(folder).unlink()


@contextmanager
def own_names(model: nn.Module) -> Iterator[None]:
    """Makes `model.save_pretrained` keep the names that the parameters have in the model, for the block.

    By default it writes the names of the architecture's first release, ViT's among them; `Trainer` reads checkpoints
    back without translating them, and so would go on with fresh weights (transformers issue 43701).
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
    """The last whole checkpoint of a run; each one after it is passed over with a warning that names the file.

    A run killed while saving leaves a checkpoint that is marked as unfinished, a machine that went down leaves files
    that are cut off, empty or missing. That is seen from names, headers and lengths, without reading tensors or
    unpickling. A value that has changed in a file of the right length (bit rot) is not seen.

    Args:
        folder: the run's output folder.

    Raises:
        ValueError: there is none, or none is whole.
    """
    found = [path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdigit()]
    faults = []
    for path in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        fault = "it was not written to its end" if _mark(path).exists() else _damage(path)
        if fault is None:
            return str(path)
        logger.warning(f"{path} is passed over: {fault}.")
        faults.append(f"{path.name}: {fault}")
    damaged = f" Every one is damaged ({'; '.join(faults)})." if faults else ""
    raise ValueError(
        f"No whole checkpoint in {os.fspath(folder)!r}: train without resume_from_checkpoint=True.{damaged}"
    )


def _mark(checkpoint: Path) -> Path:
    """A file that is there while the checkpoint is written, beside it: `Trainer` sends no name in _ to the Hub."""
    return checkpoint.with_name(f"_{checkpoint.name}_is_being_written")


def _damage(checkpoint: Path) -> str | None:
    """What keeps a run from going on from the checkpoint, if anything."""
    if not (checkpoint / TRAINER_STATE_NAME).exists():
        return f"it was not written to its end, {TRAINER_STATE_NAME}"
    for check, patterns in CHECKS.items():
        for path in sorted(path for pattern in patterns for path in checkpoint.glob(pattern) if path.is_file()):
            try:
                check(path)
            except Exception as failure:  # of whatever kind: what is read is damaged
                return f"{path.relative_to(checkpoint)} is damaged ({failure})"
    missing = {name for name, patterns in PARTS.items() if not any(any(checkpoint.glob(p)) for p in patterns)}
    if "the weights" in missing:
        return "the weights are missing"
    # save_only_model leaves all three out, DeepSpeed keeps them in a folder of its own
    if 0 < len(missing) < 3 and not any(checkpoint.glob("global_step*")):
        return f"{' and '.join(sorted(missing))} missing"
    return None


def _check_json(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    for shard in set(content.get("weight_map", {}).values()):
        if not (path.parent / shard).is_file():
            raise ValueError(f"{shard} is missing")


def _check_safetensors(path: Path) -> None:
    with safe_open(path, framework="pt"):  # compares the header with the file's length
        pass


def _check_torch(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:  # reads the directory, which lies at the file's end
        if archive.infolist()[0].header_offset != 0:
            raise ValueError("its length is not that of its parts")


# What a resume reads; files that others keep beside it are none of ours.
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
