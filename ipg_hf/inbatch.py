# SPDX-License-Identifier: Apache-2.0
"""The optimizer step whose pairs are the training batch and its counterparts, both gradients at one point."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer
from transformers.utils import logging

from . import correction
from .callbacks import output_spread
from .config import IPGConfig
from .gradients import scale_gradients
from .guidance import ProblemType
from .guided import GuidedStep, pair_settings
from .heads import features_of, hooked
from .inference import logits_of
from .layers import moving_only
from .norms import norm_layers
from .pairs.loader import check_sides, is_stream
from .seeding import seeded

logger = logging.get_logger(__name__)

WHOLE_MODEL = ""  # its dotted path


class InBatchStep(GuidedStep):
    """The guided steps of a training run with `pair_source="batch"`.

    The training batch is side a. Its forward is the task's own, in the mode of the task (R2 of the inference forward
    does not hold: dropout draws anew for each side), and its graph serves both gradients; side b has a forward of its
    own. Both gradients are those at the point θ that the step begins at, so that the second update's is not the one at
    the corrected θ:

        θ' = σ(θ, η, ∇d(θ)), then σ(θ', η, s ∇L(θ)) with the same optimizer, s by step 4 of the method.

    The arithmetic is a forward of 2B images and a backward of 3B, since each of the two gradients goes back through
    side a, where B drawn pairs take 3B and 3B: what is saved is one forward of the batch. One forward of [a; b] would
    be no cheaper: the backward of the task's loss would then go through side b too, with zeros.

    Under accumulation ∇d is the mean over all pairs of the optimizer step, and so is c.

    Args:
        trainer: as in `GuidedStep`, and so the next two.
        forward: of side b.
        problem_type: of the outputs.
    """

    def __init__(self, trainer: Trainer, forward: Callable[..., tuple[Tensor, Tensor]], problem_type: ProblemType):
        super().__init__(trainer, forward, {}, problem_type)
        self._forward = forward
        self._is_root = self.args.invariance_distance == "divergence"
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._parts: list[tuple[int, Tensor, Tensor, Tensor]] = []

    def begin(self, model: nn.Module) -> None:
        """Nothing is corrected before the task's forward, which is the pairs' own."""

    @contextmanager
    def watching(self, model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Takes the task's forward in the block for side a, and adds this micro-batch's part of ∇d.

        Args:
            model: as the trainer forwards it.
            inputs: the micro-batch, with the counterparts (`<main_input>_b`).

        Raises:
            ValueError: there are no counterparts, they are no pair, or d depends on no trainable parameter.
        """
        module = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        sides = both_sides(inputs, self.trainer._inputs)
        entered: dict[str, list[Tensor]] = {path: [] for path in self.trainer.head.paths}
        outputs: list[Any] = []

        def look(path: str, args: tuple, kwargs: dict, output: Any) -> None:
            if path == WHOLE_MODEL:
                outputs.append(output)
            else:
                entered[path].extend((*args, *kwargs.values()))

        with hooked({**self.trainer.head.layers, WHOLE_MODEL: module}, look):
            yield
        with moving_only(module, self._corrected):
            logits, z = self._forward(module, {name: b for name, (_, b) in sides.items()})
        logits = torch.cat([logits_of(outputs[0]), logits])
        self._add(module, logits, torch.cat([features_of(entered), z]))

    def end(self, model: nn.Module) -> None:
        """Both updates' gradients are there: the first is made, and the second's scaled."""
        module = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        of_the_loss = {parameter: parameter.grad for parameter in module.parameters()}
        self._metrics = self._correct(model)
        for parameter, gradient in of_the_loss.items():
            parameter.grad = gradient
        super().end(model)

    def _add(self, module: nn.Module, logits: Tensor, z: Tensor) -> None:
        settings = pair_settings(self.args, self.problem_type)
        distance, divergence = correction.pair_measures(self.trainer.head, logits, z, self.accelerator, **settings)
        named = dict(module.named_parameters(remove_duplicate=False))
        chosen = {p: None for name, p in named.items() if self._corrected is None or name in self._corrected}
        parameters = [parameter for parameter in chosen if parameter.requires_grad]
        pairs, gradients = len(z) // 2, [None]
        if distance.requires_grad:
            # the root's gradient is no sum over micro-batches, that of the divergence is
            share = pairs * (2 * distance.detach() if self._is_root else 1)
            # not into .grad, where those of the task's loss accumulate
            gradients = torch.autograd.grad(share * distance, parameters, retain_graph=True, allow_unused=True)
        if all(gradient is None for gradient in gradients):
            raise ValueError(correction.NOTHING_TO_CORRECT)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                self._sums[parameter] = self._sums[parameter] + gradient if parameter in self._sums else gradient
        self._parts.append((pairs, distance.detach(), divergence, output_spread(logits.detach())))

    def _look(self, module: nn.Module) -> dict[str, Tensor]:
        """What the pairs of all micro-batches are together; leaves their gradient as the parameters' own."""
        parts, self._parts = self._parts, []
        sums, self._sums = self._sums, {}
        total = sum(pairs for pairs, *_ in parts)
        distance, divergence = (sum(part[0] * part[i] for part in parts) / total for i in (1, 2))
        for parameter in module.parameters():
            parameter.grad = sums[parameter] / total if parameter in sums else None
        if self._is_root:
            distance = divergence.sqrt()
            scale_gradients(module, torch.where(distance > 0, 0.5 / distance, 0.0))
        metrics = {"distance": distance, "divergence": divergence}
        if self.problem_type == "single_label_classification":
            metrics["spread"] = torch.stack([spread for *_, spread in parts]).max()
        metrics["violated"] = (metrics["divergence"] > self.args.invariance_threshold).float()
        return metrics


def both_sides(inputs: Mapping[str, Any], names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """The inputs of both sides by name, of a row or a batch.

    Args:
        inputs: with `<name>` and `<name>_b`.
        names: the inputs of the model's forward, the main one first.

    Raises:
        ValueError: there are no counterparts of the main input, or a side differs in shape or dtype.
    """
    if not {names[0], f"{names[0]}_b"} <= inputs.keys():
        raise ValueError(
            f"pair_source='batch' needs the counterpart of each training image in the training set, a column image_b "
            f"beside image (raw, with a processing_class) or {names[0]}_b beside {names[0]}, but its rows hold "
            f"{sorted(inputs)}. Add it, or give a pair_dataset and pair_source='pairs'."
        )
    found = [name for name in names if name in inputs and f"{name}_b" in inputs]
    sides = {name: (torch.as_tensor(inputs[name]), torch.as_tensor(inputs[f"{name}_b"])) for name in found}
    for name, (a, b) in sides.items():
        check_sides(name, a, b, "the training set")
    return sides


def first_pair(dataset: Any, names: list[str]) -> dict[str, Tensor]:
    """A batch of the first pair of a training set, the a side first.

    Args:
        dataset: its rows as model inputs.
        names: as in [`both_sides`].

    Raises:
        ValueError: see [`both_sides`].
    """
    with seeded(0):  # a random transform of the user's own draws from the global generators
        row = next(iter(dataset)) if is_stream(dataset) else dataset[0]
    return {name: torch.stack(sides) for name, sides in both_sides(row, names).items()}


def check_in_batch(args: IPGConfig, model: nn.Module, accelerator: Accelerator) -> None:
    """Warns of what `pair_source="batch"` makes doubtful.

    Raises:
        ValueError: the model or the launch is one under which it would not be exact.
    """
    if norm_layers(model) and not args.holds_norm:
        raise ValueError(
            f"pair_source='batch' measures the pairs in the task's forward, and {type(model).__name__} has batch-norm "
            "layers, which make an image's features depend on the others there: set freeze_norm=True, or running_norm."
        )
    if isinstance(model, FSDPModule) or accelerator.is_fsdp2:
        raise ValueError("pair_source='batch' takes two backwards of one forward, which FSDP does not: use plain DDP.")
    if args.means_rationales:
        logger.warning(
            "pair_source='batch' with rationale_reduction='mean' needs training images that all have one value of the "
            "attribute, since the mean distance of pairs in both directions cancels out: use "
            "rationale_reduction='pair' otherwise."
        )
    if any(isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 for module in model.modules()):
        logger.warning(
            "pair_source='batch' measures the pairs in the task's forward, where dropout draws anew for each side, so "
            "that equal sides are apart: set the dropout to 0, or use a pair_dataset and pair_source='pairs'."
        )
