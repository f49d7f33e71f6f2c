# SPDX-License-Identifier: Apache-2.0
"""Just Train Twice: the training rows that a first, short training gets wrong stand several times in a second one.

Source: Liu et al., arXiv 2107.09044.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import datasets
import numpy as np
from torch.utils.data import Subset
from transformers import PrinterCallback, set_seed
from transformers.utils import logging

from ..config import IPGConfig
from ..pairs.transforms import ImageRows
from ..record import write_json
from ..trainer import IPGTrainer

logger = logging.get_logger(__name__)

ERRORS = "first_model_errors.json"


@dataclass
class JTTConfig(IPGConfig):
    """Settings of [`JTTTrainer`]: those of [`IPGConfig`], and these.

    Args:
        first_steps (`int`, *optional*, defaults to `50`):
            Number of optimizer steps of the first training, at least 1. The whole schedule of the learning rate runs
            over them. With a warm-up the first step has the rate 0, so that a single step trains nothing: take more
            steps than the warm-up has, or `warmup_steps=0`.
        upweight (`int`, *optional*, defaults to `20`):
            How often a row that the first model gets wrong stands in the second training, at least 1 (λ_up).
    """

    first_steps: int = field(default=50, metadata={"help": "Optimizer steps of the first training."})
    upweight: int = field(default=20, metadata={"help": "How often an error of the first model stands in the second."})

    def check(self) -> None:
        """Raises ValueError for a setting that is not valid, its own settings included."""
        super().check()
        for name in ("first_steps", "upweight"):
            value = getattr(self, name)
            self._require(name, isinstance(value, int) and not isinstance(value, bool) and value >= 1, "1 or more")
        self._require("objective", self.objective == "erm", "'erm': both trainings minimise the mean loss")


class JTTTrainer(IPGTrainer):
    """Trains twice without pairs; the errors of the first training are repeated in the second.

    The rows that the first model gets wrong are kept in the output folder, so that a resumed run goes on with them.

    Args:
        args: a [`JTTConfig`].
        train_dataset: a `datasets.Dataset` (or an `ImageRows`) with a column `label` of classes.

    All other arguments are those of [`IPGTrainer`], without `pair_dataset`.
    """

    _tag_names = ()
    config_class = JTTConfig

    def __init__(self, *positional: Any, **named: Any):
        super().__init__(*positional, **named)
        if self.is_guided:
            raise ValueError("jtt trains without pairs: leave pair_dataset out.")
        stored = self.train_dataset.dataset if isinstance(self.train_dataset, ImageRows) else self.train_dataset
        if not isinstance(stored, datasets.Dataset) or not isinstance(
            stored.features.get("label"), datasets.ClassLabel
        ):
            raise ValueError(
                "jtt counts wrong classes: give a train_dataset (datasets.Dataset) with a ClassLabel `label`."
            )
        self.first_dataset, self.first_labels = self.train_dataset, np.asarray(stored["label"][:])

    @property
    def method(self) -> str:
        """The method that a run record names."""
        return "jtt"

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As `Trainer.train`, after the first training; `method_facts` holds the number of its errors afterwards."""
        path = Path(self.args.output_dir) / ERRORS
        if resume_from_checkpoint and path.is_file():  # the training goes on with the rows that it began with
            rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
            wrong = np.isin(np.arange(len(self.first_labels)), rows)
        else:
            wrong = self._first_errors()
            if self.args.process_index == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, {"rows": np.flatnonzero(wrong).tolist()})
        self.train_dataset = repeat_errors(self.first_dataset, wrong, self.args.upweight)
        self.method_facts = {"errors": int(wrong.sum()), "rows": len(self.train_dataset)}
        set_seed(self.args.seed)  # as if there had been no first training
        return super().train(resume_from_checkpoint, **kwargs)

    def _first_errors(self) -> np.ndarray:
        """Trains a copy of the model for a few steps, and finds the training rows that it gets wrong: bool, (N,)."""
        settings = {entry.name: getattr(self.args, entry.name) for entry in fields(IPGConfig) if entry.init}
        settings |= {
            "save_strategy": "no",
            "eval_strategy": "no",
            "load_best_model_at_end": False,
            "push_to_hub": False,
        }
        settings |= {"enable_jit_checkpoint": False, "resume_from_checkpoint": None, "report_to": "none"}
        args = IPGConfig(**{**settings, "max_steps": self.args.first_steps, "output_dir": gettempdir()})
        trainer = IPGTrainer(
            model=copy.deepcopy(self.model),
            args=args,
            train_dataset=self.first_dataset,
            processing_class=self.processing_class,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.args.dataloader_drop_last = False  # every row is asked
        logits = trainer.predict(self.first_dataset).predictions
        wrong = (logits[0] if isinstance(logits, tuple) else logits).argmax(-1) != self.first_labels
        if not wrong.any():
            logger.warning(
                f"After {self.args.first_steps} steps the first model makes no error on the training set: nothing is "
                "repeated. Set fewer first_steps."
            )
        return wrong


def repeat_errors(dataset: Any, wrong: np.ndarray, factor: int) -> Any:
    """A training set in which the rows that a first model gets wrong stand several times.

    Args:
        dataset: N rows, a `datasets.Dataset` or any other map-style set; nothing of it is read.
        wrong: bool, (N,).
        factor: how often such a row stands in the result, at least 1; all others stand once.

    Returns:
        The rows in their order, repeats next to each other: a `Dataset` of a `Dataset`, else a `Subset`.

    Raises:
        ValueError: `wrong` is not one bool a row.
    """
    wrong = np.asarray(wrong)
    if wrong.shape != (len(dataset),) or wrong.dtype != bool:
        raise ValueError(
            f"wrong is {wrong.dtype} of shape {wrong.shape}: give one bool for each of the {len(dataset)} rows."
        )
    return rows_of(dataset, np.repeat(np.arange(len(wrong)), np.where(wrong, factor, 1)))


def rows_of(dataset: Any, rows: np.ndarray) -> Any:
    """Rows of a map-style set by their numbers, ints; nothing of them is read."""
    return dataset.select(rows) if isinstance(dataset, datasets.Dataset) else Subset(dataset, rows.tolist())
