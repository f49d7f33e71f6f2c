# SPDX-License-Identifier: Apache-2.0
"""What the trainer counts, logs and saves between steps."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.utils import logging

from .losses import GroupLoss
from .pairs.checks import ONLY_SET
from .pairs.transforms import ImageRows

logger = logging.get_logger(__name__)

# Spread: the largest difference of a class's probability between any two images of a pair batch. Outputs have become
# one constant where it falls below the first after a step above the second.
COLLAPSED_SPREAD, NOT_FRESH = 1e-3, 0.1
# A training stalls where it is below the first for that many steps in a row and more than the warm-up, and no step has
# been above the last. (A head that begins at zero has left it by then, and a fresh one may be above 0.1.)
STALLED_SPREAD, STALLED_STEPS, HAS_LEARNED = 5e-3, 100, 0.5


def restored(kind: type, callbacks: list[TrainerCallback], state: TrainerState) -> tuple[Any, bool]:
    """The trainer's callback of a kind, as the checkpoint that `state` comes from left it, or anew.

    Returns:
        The callback, and whether a run goes on whose checkpoint has nothing of it.
    """
    # Trainer may have replaced the callback by a restored copy, and a checkpoint of another trainer has no entry
    callback = next(callback for callback in callbacks if isinstance(callback, kind))
    saved = state.stateful_callbacks.get(kind.__name__) if state.global_step else None
    lost = bool(state.global_step and not (saved or {}).get("attributes"))
    callback.restore(None if lost else saved)
    state.stateful_callbacks[kind.__name__] = callback.state()
    return callback, lost


class GroupShares(TrainerCallback, ExportableState):
    """Keeps GroupDRO's group weights q in `trainer_state.json`, as plain numbers; an empty list before the first step.

    Attributes:
        loss: the loss of the run, whose `shares` are q; None before the first step.
    """

    def __init__(self) -> None:
        self.loss: GroupLoss | None = None
        self.shares: list[float] = []

    def state(self) -> dict[str, Any]:
        """The state as plain numbers (see `transformers.trainer_callback.ExportableState`)."""
        return {"args": {}, "attributes": {"shares": list(self.loss.shares if self.loss else self.shares)}}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Goes on from what `state()` gave, or from the start."""
        self.loss, self.shares = None, list(state["attributes"]["shares"]) if state else []


class PairProgress(TrainerCallback, ExportableState):
    """Sums of the guidance metrics since the last log line, and the place reached in each pair set.

    `Trainer` writes the state of exportable callbacks into `trainer_state.json`, the file it writes last: a checkpoint
    is either whole or not one. The sums stay tensors on their device until they are logged or saved.
    """

    def __init__(self, trainer_name: str = "the trainer") -> None:
        self.trainer_name = trainer_name
        self.positions: dict[str, int] = {}
        self.counts: dict[str, int] = {}  # pairs of each set that is no stream
        self.sums: dict[str, Tensor | float] = {}
        self.steps = 0
        self.skipped = 0
        self.peak_spread: Tensor | float = 0.0  # the largest of any step
        self.constant_steps: Tensor | int = 0  # optimizer steps in a row, up to the last, below STALLED_SPREAD
        self.warmup_steps = 0
        self.warned = False  # of a collapse
        self.warned_of_stall = False
        self.wait = 0  # optimizer steps until the next pair batch
        self.last: dict[str, Tensor] = {}  # metrics of the last pair batch, for the steps without one
        self.waited = self.stepped = 0.0  # seconds since the last log line: waiting for pairs, and in optimizer steps
        self.is_called = False  # whether the trainer's step has run in this training
        self._began = 0.0

    @classmethod
    def resumed(cls, callbacks: list[TrainerCallback], state: TrainerState) -> PairProgress:
        """The trainer's instance among its callbacks, as the checkpoint that `state` comes from left it, or anew."""
        progress, lost = restored(cls, callbacks, state)
        if lost:
            logger.warning("The checkpoint holds no position in the pairs: they are drawn from the start.")
        return progress

    def state(self) -> dict[str, Any]:
        """The state as plain numbers (see `transformers.trainer_callback.ExportableState`)."""
        attributes = {
            "positions": dict(self.positions),
            "counts": dict(self.counts),
            "sums": {name: float(value) for name, value in self.sums.items()},
            "steps": self.steps,
            "skipped": self.skipped,
            "peak_spread": float(self.peak_spread),
            "constant_steps": int(self.constant_steps),
            "warned": self.warned,
            "warned_of_stall": self.warned_of_stall,
            "wait": self.wait,
            "last": {name: float(value) for name, value in self.last.items()},
        }
        return {"args": {}, "attributes": attributes}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Goes on from what `state()` gave, or from nothing."""
        attributes = PairProgress().state()["attributes"] | (state["attributes"] if state else {})
        attributes = {"last" if name == "held" else name: value for name, value in attributes.items()}  # before 0.2
        for name, value in attributes.items():
            setattr(self, name, value)
        self.positions = {name or ONLY_SET: value for name, value in self.positions.items()}  # before 0.2
        self.waited = self.stepped = 0.0
        self.last = {name: torch.tensor(value, dtype=torch.float64) for name, value in self.last.items()}

    def on_train_begin(self, args, state, control, **kwargs):
        """As `TrainerCallback.on_train_begin`."""
        self.is_called = False
        self.warmup_steps = args.get_warmup_steps(state.max_steps)

    def on_train_end(self, args, state, control, **kwargs):
        """As `TrainerCallback.on_train_end`; the steps since the last log line may have to be warned of too."""
        if self.is_called:  # not where a finished training is resumed
            self._is_constant(args.alpha, args.learning_rate)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """As `TrainerCallback.on_pre_optimizer_step`.

        Raises:
            ValueError: the trainer's own `training_step` has not run, so that the pairs would be ignored.
        """
        if not self.is_called:
            raise ValueError(
                f"{self.trainer_name} overrides training_step without calling super().training_step(), which reads the "
                "pairs: call it, or leave pair_dataset out."
            )

    def on_step_begin(self, args, state, control, **kwargs):
        """As `TrainerCallback.on_step_begin`."""
        self._began = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        """As `TrainerCallback.on_step_end`."""
        self.stepped += time.monotonic() - self._began

    def draw(self, name: str, loader: Any) -> Any:
        """The next batch of a pair set's loader; notes the place reached and the time it took."""
        started = time.monotonic()
        batch = next(loader)
        self.waited += time.monotonic() - started
        self.positions[name] = loader.position
        if hasattr(loader.dataset, "__len__"):
            count, before = len(loader.dataset), self.counts.get(name, len(loader.dataset))
            if count != before:
                logger.warning(
                    f"The pair set {name!r} has {count} pairs, and had {before} when the checkpoint was saved: the "
                    "training goes on with other pairs. Give the same pairs, or begin a new training."
                )
            self.counts[name] = count
        return batch

    def is_due(self) -> bool:
        """Whether this optimizer step draws pairs; counts down to the next that does."""
        self.wait = max(0, self.wait - 1) if self.last else 0
        return self.wait == 0

    def keep(self, metrics: dict[str, Tensor], wait: int) -> None:
        """Keeps the metrics (detached scalars) for `wait` optimizer steps, until the next pair batch."""
        self.last, self.wait = dict(metrics), wait

    def add(self, values: dict[str, Tensor]) -> None:
        """Adds the metrics of one optimizer step (detached scalars)."""
        for name, value in values.items():
            value = value if value.device.type == "mps" else value.double()  # MPS has no float64
            self.sums[name] = self.sums.get(name, 0.0) + value
        if "spread" in values:
            self.peak_spread = values["spread"].clamp(min=self.peak_spread)
            self.constant_steps = (self.constant_steps + 1) * (values["spread"] < STALLED_SPREAD)
        self.steps += 1

    def pop(self, alpha: float, learning_rate: float) -> dict[str, float]:
        """The means since the last call, as log entries; warns where the outputs on the pairs are one constant.

        Each of the two warnings comes once a training: of outputs that have become constant, and of outputs that have
        been from the start. `ipg/collapsed` is 1 as long as they are. Outputs of a regression or of several labels have
        no such entry and no warning.
        """
        logs: dict[str, float] = {}
        if self.steps:
            collapsed = self._is_constant(alpha, learning_rate)
            logs = {f"ipg/{name}": float(value) / self.steps for name, value in self.sums.items() if name != "spread"}
            if collapsed is not None:
                logs["ipg/collapsed"] = float(collapsed)
        if logs or self.skipped:
            logs["ipg/skipped"] = float(self.skipped)
        if logs and self.stepped:
            logs["ipg/pair_wait"] = self.waited / self.stepped
        self.sums, self.steps, self.skipped = {}, 0, 0
        self.waited = self.stepped = 0.0
        return logs

    def _is_constant(self, alpha: float, learning_rate: float) -> bool | None:
        """Whether the outputs on the pairs are one constant, with a warning; None where that is not known."""
        if "spread" not in self.sums:
            return None
        spread, peak, steps = float(self.sums["spread"]) / self.steps, float(self.peak_spread), int(self.constant_steps)
        collapsed = spread < COLLAPSED_SPREAD and peak > NOT_FRESH
        stalled = steps > max(self.warmup_steps, STALLED_STEPS) and peak < HAS_LEARNED
        of_one_label = "(Pairs of one label alone look like this in a sound run too.)"
        if collapsed and not self.warned:
            logger.warning(
                "The model's outputs on the pairs have become one constant: the trivial solution, which has distance "
                "and divergence 0. Use the defaults of invariance_distance, pair_loss_weight, max_loss_scale, "
                "warmup_steps and lr_scheduler_type where they were changed ('constant' has no warm-up), "
                f"a larger alpha (now {alpha}) or a smaller learning_rate (now {learning_rate}), and choose "
                f"the checkpoint by worst-group accuracy on validation. {of_one_label}"
            )
            self.warned = True
        if stalled and not self.warned and not self.warned_of_stall:
            logger.warning(
                f"The model's outputs on the pairs have been nearly one constant for {steps} steps, and it has not "
                "begun to learn the task: the corrective updates keep it there, with distance and divergence about 0. "
                "Use correction_schedule='violated', which corrects only while the outputs disagree, and more steps; "
                f"or a smaller learning_rate (now {learning_rate}), or more warmup_steps (now {self.warmup_steps}). "
                f"{of_one_label}"
            )
            self.warned_of_stall = True
        return collapsed or stalled


class SaveAtStepEnd(JITCheckpointCallback):
    """Saves and stops after SIGTERM (`TrainingArguments.enable_jit_checkpoint`) where a step has ended.

    The callback of transformers that it takes the place of saves where it stands: mostly before the optimizer's step,
    when the corrective update has been made and the task update has not, and else before the step's log line. Neither
    goes on to the same result. This one saves after the step's logs and evaluation, as at every `save_steps`.

    Args:
        trainer: made with `enable_jit_checkpoint=True`.
    """

    def __init__(self, trainer: Trainer):
        super().__init__()
        self.trainer = trainer
        self.jit_manager = trainer.pop_callback(JITCheckpointCallback).jit_manager
        self.stopping = False

    def on_train_begin(self, args, state, control, **kwargs):
        """As `TrainerCallback.on_train_begin`."""
        self.stopping = False

    def on_step_begin(self, args, state, control, **kwargs):
        """Nothing: the data of the step have been drawn."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Nothing: the corrective update has been made."""

    def on_step_end(self, args, state, control, **kwargs):
        """As `TrainerCallback.on_step_end`."""
        requested = torch.tensor(float(self.jit_manager.is_checkpoint_requested), device=args.device)
        if args.world_size > 1:  # the signal comes to each at another time, and who stops alone leaves the rest waiting
            requested = self.trainer.accelerator.reduce(requested)
        if requested:
            self.jit_manager.is_checkpoint_requested = False
            self.stopping = control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        """As `TrainerCallback.on_epoch_end`."""
        if not self.stopping:
            return
        # Trainer calls this in the middle of an epoch too, where the run that goes on has no logs and no evaluation
        due = state.epoch % 1 == 0 and (control.should_log or control.should_evaluate)
        control.should_save = due
        if not due:
            control.should_log = control.should_evaluate = False


class RowEpochs(TrainerCallback):
    """Tells raw training images their epoch, for new random draws: accelerate does so only where nothing is resumed or
    shared between processes (its loader's `set_epoch` stops at a sampler that has one)."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        """As `TrainerCallback.on_epoch_begin`."""
        dataset = getattr(train_dataloader, "dataset", None)
        if isinstance(dataset, ImageRows):
            dataset.set_epoch(int(state.epoch or 0))


def output_spread(logits: Tensor) -> Tensor:
    """Largest difference of a class's probability between any two images, a scalar in [0, 1].

    Args:
        logits: shape (N, C).
    """
    probabilities = torch.softmax(logits.float(), dim=-1)
    return (probabilities.amax(0) - probabilities.amin(0)).amax()
