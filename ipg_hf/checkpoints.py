# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are whole or not there, and that hold the model under the names it is loaded by."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

logger = logging.get_logger(__name__)


@contextmanager
def whole_or_removed(folder: str | os.PathLike, writes: bool = True) -> Iterator[None]:
    """Saves a checkpoint in the block: one that fails half-way is removed, as it would be taken for the newest.

    Args:
        folder: the checkpoint's folder.
        writes: whether this process is the one that writes it.

    Raises:
        OSError: for any error; safetensors and torch report a full disk by errors of their own.
    """
    if writes:
        # an older checkpoint of that name would look whole until it is overwritten to its end
        Path(folder, TRAINER_STATE_NAME).unlink(missing_ok=True)
    try:
        yield
    except Exception as failure:
        if _is_whole(Path(folder)):
            raise
        if writes:
            shutil.rmtree(folder, ignore_errors=True)
        raise OSError(
            f"could not save {Path(folder).name}, which was removed; those before it are whole. Make room, or save "
            f"less (save_total_limit, save_only_model). The cause: {failure}"
        ) from failure


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
    """The last checkpoint of a run that was written to its end; a run killed while saving leaves one that was not.

    Args:
        folder: the run's output folder.

    Raises:
        ValueError: there is none.
    """
    found = [path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdigit()]
    for path in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if _is_whole(path):
            return str(path)
        logger.warning(f"{path} was not written to its end: it is passed over.")
    raise ValueError(f"No whole checkpoint in {os.fspath(folder)!r}: train without resume_from_checkpoint=True.")


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
