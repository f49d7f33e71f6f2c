# SPDX-License-Identifier: Apache-2.0
"""Projection: the directions in which the features of pairs differ are taken out of a trained last layer.

After Noisy Counterfactual Matching (Bai et al., arXiv 2505.24843), which trains a linear classifier under a constraint
given by pairs that should get the same answer. Projecting trained weights, along the leading singular directions of
z_a - z_b, is our reading.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
from torch import nn

from ..config import IPGConfig
from ..heads import ClassifierHead, find_head
from ..models import forward_inputs
from ..pairs.checks import named_sets, title_of
from ..pairs.loader import PairCollator
from ..pairs.transforms import ImageRows
from ..trainer import IPGTrainer
from .last_layer import batches_of, check_head, check_whole, head_and_features, same_on_all_processes, write_head


@dataclass
class ProjectionConfig(IPGConfig):
    """Settings of [`ProjectionTrainer`]: those of [`IPGConfig`], and this.

    Args:
        rank (`str`, *optional*, defaults to `"1"`):
            A whole number: the number of directions that are taken out. A share in (0, 1) such as `"0.9"`, or `"1.0"`:
            the fewest directions that hold this share of the squared differences. May also be an int or a float.
    """

    rank: str = field(default="1", metadata={"help": "Number of directions to take out, or a share such as 0.9."})

    def check(self) -> None:
        """Raises ValueError for a setting that is not valid, its own settings included."""
        super().check()
        if isinstance(self.rank, str):
            with suppress(ValueError):
                self.rank = float(self.rank) if "." in self.rank else int(self.rank)
        check_rank(self.rank)


class ProjectionTrainer(IPGTrainer):
    """Trains without the pairs, then takes out of the last layer the directions in which their features differ most.

    Args:
        args: a [`ProjectionConfig`].
        pair_dataset: stored pairs, one set or a dict of sets.

    All other arguments are those of [`IPGTrainer`].
    """

    _tag_names = ()
    config_class = ProjectionConfig

    def __init__(self, *positional: Any, pair_dataset: Any = None, **named: Any):
        super().__init__(*positional, **named)
        if pair_dataset is None:
            raise ValueError("pair_dataset is missing: the projection takes out what the sides of pairs differ in.")
        self.pair_datasets = named_sets(pair_dataset)
        check_whole(self)
        head = find_head(self.model, self.head_path)
        check_head(head)
        for name, pairs in self.pair_datasets.items():
            if not isinstance(pairs, (datasets.Dataset, ImageRows)):
                title = title_of("pair_dataset", name)
                raise ValueError(f"the projection needs stored pairs, but {title} is a {type(pairs).__name__}.")
        rank, features = self.args.rank, head.weight.shape[1]
        most = min(features - 1, sum(map(len, self.pair_datasets.values())))
        if isinstance(rank, int) and rank > most:
            raise ValueError(
                f"rank={rank} is more than the {most} directions that these pairs and {features} features can give: "
                f"set {most} or less, or a share such as 0.9."
            )

    @property
    def method(self) -> str:
        """The method that a run record names."""
        return "project"

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`, and then the projection; see [`project_out`] for what `method_facts` holds afterwards."""
        output = super().train(*args, **kwargs)
        if self.state.global_step < self.state.max_steps:
            return output  # stopped before its end
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        names = forward_inputs(model)
        collate = PairCollator(names, names[0])
        batches = (batch for pairs in self.pair_datasets.values() for batch in batches_of(self, pairs, collate))
        head, self.method_facts = project_last_layer(model, batches, rank=self.args.rank, head=self.head_path)
        same_on_all_processes(head)
        return output


def project_last_layer(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, rank: int | float, head: str | None = None
) -> tuple[ClassifierHead, dict[str, Any]]:
    """Takes out of the last layer the directions in which the features of pairs differ most: W <- W (I - V Vᵀ).

    After Noisy Counterfactual Matching (Bai et al., arXiv 2505.24843), which trains a linear classifier under a
    constraint given by pairs that should be answered alike. That trained weights are projected instead, and that V are
    the leading singular directions of z_a - z_b, is our reading.

    Args:
        model: the classifier; the weight of its last layer is overwritten, its bias stays.
        batches: inputs of its forward, the a sides of P pairs in the first half of each.
        rank: see [`project_out`].
        head: dotted path of the last layer, where it is not found by itself.

    Returns:
        The head, whose `weight` is the new one, and what [`project_out`] tells of it.

    Raises:
        ValueError: the head consists of several layers, or is sharded; see [`project_out`].
    """
    check_rank(rank)
    found, z, _ = head_and_features(model, batches, head, pairs=True)
    weight, facts = project_out(found.weight.detach().double().cpu().numpy(), z[0] - z[1], rank=rank)
    write_head(found, weight, None)
    return found, facts


def project_out(weight: np.ndarray, differences: np.ndarray, *, rank: int | float) -> tuple[np.ndarray, dict[str, Any]]:
    """A weight without the directions in which differences are largest: W (I - V Vᵀ).

    Args:
        weight: W, float (C, D).
        differences: z_a - z_b of P pairs, float (P, D); they are not centred, since their mean is what oriented pairs
            share.
        rank: an int, the number of leading right singular directions V, at least 1; or a float in (0, 1], the fewest
            that hold this share of the sum of squared differences (1.0: all in which they differ, so that the logits
            of the two sides become equal).

    Returns:
        The new weight, float64 (C, D), and `pairs`; `rank`, the number of directions; `variance_removed`, their share
        of the sum of squares; `weight_removed`, the share of the squared norm of W that went.

    Raises:
        ValueError: `rank` is out of range; the differences have fewer directions, or none; nothing of W would be left.
    """
    check_rank(rank)
    weight, differences = np.asarray(weight, np.float64), np.asarray(differences, np.float64)
    _, lengths, axes = np.linalg.svd(differences, full_matrices=False)
    number = int((lengths > lengths[0] * max(differences.shape) * np.finfo(np.float64).eps).sum())
    shares = (lengths**2).cumsum() / max((lengths**2).sum(), np.finfo(np.float64).tiny)
    if number == 0:
        raise ValueError("the sides of every pair have the same features: there is no direction to take out.")
    if isinstance(rank, int):
        taken = rank
    else:
        taken = number if rank == 1 else min(number, int(np.searchsorted(shares, rank)) + 1)
    if taken > number:
        raise ValueError(f"rank={rank}: the features of {len(differences)} pairs differ in {number} directions alone.")
    if taken == weight.shape[1]:
        raise ValueError(
            f"rank={rank} takes out all {taken} directions of the features, so that the outputs would be constant: "
            "give fewer, or a smaller share."
        )
    axes = axes[:taken]
    projected = weight - weight @ axes.T @ axes
    removed = 1 - (projected**2).sum() / max((weight**2).sum(), np.finfo(np.float64).tiny)
    facts = {"pairs": len(differences), "rank": taken, "variance_removed": float(shares[taken - 1])}
    return projected, facts | {"weight_removed": float(removed)}


def check_rank(rank: int | float) -> None:
    """Raises ValueError where the rank of [`project_out`] is neither an int from 1 on nor a share in (0, 1]."""
    is_number = isinstance(rank, (int, float)) and not isinstance(rank, bool)
    if not is_number or not (rank >= 1 if isinstance(rank, int) else 0 < rank <= 1):
        raise ValueError(f"rank={rank!r} must be a whole number of at least 1, or a share in (0, 1] such as 0.9.")
