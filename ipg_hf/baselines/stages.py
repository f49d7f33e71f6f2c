# SPDX-License-Identifier: Apache-2.0
"""What comparison methods do before and after a training: Just Train Twice, and another last layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from tempfile import gettempdir
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.utils import broadcast
from torch.utils.data import DataLoader, Subset
from transformers import PrinterCallback, default_data_collator
from transformers.utils import logging

from ..config import IPGConfig
from ..heads import find_head
from ..models import forward_inputs
from ..pairs import ImageRows
from ..pairs.checks import named_sets
from ..pairs.loader import PairCollator
from ..pairs.transforms import as_model_inputs
from ..task import ATTRIBUTE
from ..trainer import IPGTrainer
from .last_layer import (
    TARGETS,
    check_classes,
    check_groups,
    check_head,
    project_last_layer,
    refit_last_layer,
    split_groups,
)

logger = logging.get_logger(__name__)


# ---- Before the training ----


def repeat_errors(dataset: Any, wrong: np.ndarray, factor: int) -> Any:
    """A training set in which the rows that a first model gets wrong stand several times: Just Train Twice.

    Liu et al. (arXiv 2107.09044), where `factor` is λ_up.

    Args:
        dataset: N rows, a `datasets.Dataset` or any other map-style set; nothing of it is read.
        wrong: bool, (N,).
        factor: how often such a row stands in the result, at least 1; all others stand once.

    Returns:
        The rows in their order, repeats next to each other: a `Dataset` of a `Dataset`, else a `Subset`.

    Raises:
        ValueError: `wrong` is not one bool a row; `factor` is no whole number of at least 1.
    """
    wrong = np.asarray(wrong)
    if wrong.shape != (len(dataset),) or wrong.dtype != bool:
        raise ValueError(
            f"wrong is {wrong.dtype} of shape {wrong.shape}: give one bool for each of the {len(dataset)} rows."
        )
    check_repeats(1, factor)
    return rows_of(dataset, np.repeat(np.arange(len(wrong)), np.where(wrong, factor, 1)))


def check_repeats(steps: int, factor: int) -> None:
    """Raises ValueError where the steps of a first model, or the factor, are no whole number of at least 1."""
    for name, value in (("steps", steps), ("factor", factor)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")


def first_errors(
    model: Any, args: IPGConfig, dataset: Any, labels: np.ndarray, processor: Any, *, steps: int
) -> np.ndarray:
    """Trains a first model plainly, and returns which training rows it gets wrong.

    Args:
        model: the classifier to train, as it is before the training that follows.
        args: of that training. The first differs by its number of steps, over which the learning rate's schedule is
            stretched (a warm-up of as many steps leaves the model as it is); it is neither measured nor saved.
        dataset: N training rows.
        labels: ints, (N,).
        processor: the model's image processor.
        steps: number of optimizer steps.

    Returns:
        bool, (N,), equal on all processes.
    """
    unsaved = {"save_strategy": "no", "eval_strategy": "no", "load_best_model_at_end": False, "push_to_hub": False}
    unsaved |= {"enable_jit_checkpoint": False, "resume_from_checkpoint": None, "report_to": "none"}
    args = replace(args, max_steps=steps, output_dir=gettempdir(), **unsaved)
    trainer = IPGTrainer(model=model, args=args, train_dataset=dataset, processing_class=processor)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.args.dataloader_drop_last = False  # every row is asked
    logits = trainer.predict(dataset).predictions
    wrong = (logits[0] if isinstance(logits, tuple) else logits).argmax(-1) != labels
    if not wrong.any():
        logger.warning(f"After {steps} steps the first model makes no error on the training set: nothing is repeated.")
    return wrong


def rows_of(dataset: Any, rows: np.ndarray) -> Any:
    """Rows of a map-style set by their numbers, ints; nothing of them is read."""
    return dataset.select(rows) if isinstance(dataset, datasets.Dataset) else Subset(dataset, rows.tolist())


# ---- After the training ----


def check_last_layer(settings: Mapping[str, Any], trainer: IPGTrainer, sets: Mapping[str, Any], rows: Any) -> None:
    """Looks, before the training, whether the last layer can be changed after it.

    Args:
        settings: the `last_layer` of a recipe.
        trainer: the trainer of the model.
        sets: the sets of the run by name; of them `pairs`.
        rows: the validation set as it was loaded, for its columns `label` and `attribute`.

    Raises:
        ValueError: it cannot; the message says why.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError("last_layer changes a model that each process holds whole: launch it without sharding.")
    head = find_head(trainer.model)
    check_head(head)
    if settings["method"] == "dfr":
        check_classes(trainer.model, head)
        check_groups(*_targets(rows), len(head.weight))
        return
    for name, pairs in named_sets(sets["pairs"]).items():
        if not isinstance(pairs, (datasets.Dataset, ImageRows)):
            raise ValueError(
                f"last_layer: project needs stored pairs, but the set {name or 'of pairs'} is a {type(pairs).__name__}."
            )
    most = min(head.weight.shape[1] - 1, sum(map(len, named_sets(sets["pairs"]).values())))
    if isinstance(settings["rank"], int) and settings["rank"] > most:
        raise ValueError(
            f"last_layer: rank={settings['rank']} is more than the {most} directions that these pairs and "
            f"{head.weight.shape[1]} features can give: set {most} or less, or a share such as 0.9."
        )


def change_last_layer(
    settings: Mapping[str, Any], trainer: IPGTrainer, sets: dict[str, Any], rows: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Changes the last layer of a trained model; on every process alike.

    `dfr` takes half of every group of validation. The other half alone is left to be measured on, and no validation
    pairs, since half of their images were fitted.

    Args:
        settings: the `last_layer` of a recipe.
        trainer: the trainer, after the training; the model's inputs come from its image processor.
        sets: `validation`, `validation_pairs`, `pairs`: raw or as model inputs.
        rows: the validation set as it was loaded, for its columns `label` and `attribute`.

    Returns:
        What the record keeps of it, and the sets to measure on.
    """
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    options = {name: value for name, value in settings.items() if name != "method"}
    if settings["method"] == "dfr":
        fitted, measured = split_groups(*_targets(rows), seed=trainer.args.seed)
        batches = _batches(trainer, rows_of(sets["validation"], fitted), default_data_collator)
        head, facts = refit_last_layer(model, batches, seed=trainer.args.seed, **options)
        sets = sets | {"validation": rows_of(sets["validation"], measured), "validation_pairs": None}
        facts |= {"rows_left_to_measure": len(measured)}
    else:
        names = forward_inputs(model)
        collator = PairCollator(names, names[0])
        pair_sets = named_sets(sets["pairs"]).values()
        batches = (batch for pairs in pair_sets for batch in _batches(trainer, pairs, collator))
        head, facts = project_last_layer(model, batches, **options)
    for parameter in head.modules[0].parameters():  # processes on unlike devices may differ by rounding
        parameter.data.copy_(broadcast(parameter.data.contiguous()))
    return {"method": settings["method"], **facts}, sets


def _targets(rows: datasets.Dataset) -> tuple[np.ndarray, np.ndarray]:
    missing = [name for name in ("label", ATTRIBUTE) if name not in rows.column_names]
    if missing:
        raise ValueError(f"last_layer: dfr needs the column {missing[0]!r} of validation, to balance its groups.")
    return np.asarray(rows["label"][:]), np.asarray(rows[ATTRIBUTE][:])


def _batches(trainer: IPGTrainer, dataset: Any, collate: Any) -> Iterator[Mapping[str, torch.Tensor]]:
    names = forward_inputs(trainer.model)
    inputs = as_model_inputs(dataset, trainer.processing_class, names[0], keep=("label", ATTRIBUTE))
    args, own = trainer.args, torch.Generator()  # measuring must not draw from the global one
    loader = DataLoader(
        inputs, args.eval_batch_size, collate_fn=collate, num_workers=args.dataloader_num_workers, generator=own
    )
    for batch in loader:
        yield {name: value for name, value in batch.items() if name in (*names, *TARGETS)}
