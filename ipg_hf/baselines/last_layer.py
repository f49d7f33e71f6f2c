# SPDX-License-Identifier: Apache-2.0
"""What the methods share that change only the last layer of a trained classifier.

The network below stays as it is, and the model an ordinary checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import Trainer

from ..heads import ClassifierHead, find_head
from ..inference import inference
from ..losses import ATTRIBUTE
from ..models import forward_inputs
from ..pairs.transforms import as_model_inputs

TARGETS = ("labels", ATTRIBUTE)


def check_whole(trainer: Trainer) -> None:
    """Raises ValueError where the model is sharded: the last layer of a whole model is changed."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            "these methods change the last layer, which each process must hold whole: launch without sharding."
        )


def batches_of(trainer: Trainer, dataset: Any, collate: Any) -> Iterator[Mapping[str, Tensor]]:
    """Batches of a data set as inputs of the trainer's model, with `labels` and `attribute`, in the set's order."""
    names = forward_inputs(trainer.model)
    inputs = as_model_inputs(dataset, trainer.processing_class, names[0], keep=("label", ATTRIBUTE))
    args, own = trainer.args, torch.Generator()  # measuring must not draw from the global one
    loader = DataLoader(
        inputs, args.eval_batch_size, collate_fn=collate, num_workers=args.dataloader_num_workers, generator=own
    )
    for batch in loader:
        yield {name: value for name, value in batch.items() if name in (*names, *TARGETS)}


def same_on_all_processes(head: ClassifierHead) -> None:
    """Gives all processes the layer of the first: on unlike devices the fits may differ by rounding."""
    for parameter in head.modules[0].parameters():
        parameter.data.copy_(broadcast(parameter.data.contiguous()))


def check_head(head: ClassifierHead) -> None:
    """Raises ValueError where a head is not one layer that this process holds whole."""
    if len(head.modules) > 1:
        raise ValueError(
            f"the logits are the mean of {len(head.modules)} layers ({', '.join(head.paths)}): which of them a new "
            "last layer should replace is not defined. Use a model with one classifier."
        )
    if isinstance(head.modules[0].weight, DTensor):
        raise ValueError(f"{head.path} is sharded: change the last layer of a whole model (data parallel, not FSDP).")


def check_classes(model: nn.Module, head: ClassifierHead) -> None:
    """Raises ValueError where the outputs of a model are not those of exclusive classes."""
    kind = getattr(getattr(model, "config", None), "problem_type", None)
    if len(head.weight) < 2 or kind in ("regression", "multi_label_classification"):
        raise ValueError(
            f"the last layer has {len(head.weight)} outputs ({kind or 'one number'}): only that of a classifier with "
            "exclusive classes is fitted anew."
        )


def head_and_features(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], path: str | None, pairs: bool = False
) -> tuple[ClassifierHead, np.ndarray, dict[str, list[np.ndarray]]]:
    """The proven head, its inputs in inference mode, (N, D) or (2, P, D) of pairs, and the other columns."""
    parameter = next(model.parameters())
    head: ClassifierHead | None = None
    features, columns = [], {name: [] for name in TARGETS}
    for batch in batches:
        inputs = {name: _moved(value, parameter) for name, value in batch.items() if name not in TARGETS}
        if head is None:
            head = find_head(model, path, inputs)
            check_head(head)
            head.verify(model, inputs)
        with torch.no_grad(), inference(model):
            z = head.run(model, inputs)[1].double().cpu().numpy()
        features.append(z.reshape(2, -1, z.shape[1]) if pairs else z)
        for name in columns:
            columns[name] += [np.asarray(batch[name])] if name in batch else []
    if head is None:
        raise ValueError("there are no rows: give at least one batch.")
    return head, np.concatenate(features, 1 if pairs else 0), columns


def _moved(value: Any, like: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(like.device, like.dtype if value.is_floating_point() else None)


@torch.no_grad()
def write_head(head: ClassifierHead, weight: np.ndarray, bias: np.ndarray | None) -> None:
    layer = head.modules[0]
    layer.weight.copy_(torch.from_numpy(weight).view(layer.weight.shape))
    if bias is not None and layer.bias is not None:
        layer.bias.copy_(torch.from_numpy(bias))
