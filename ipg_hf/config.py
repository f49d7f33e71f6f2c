# SPDX-License-Identifier: Apache-2.0
"""The settings of a run: `transformers.TrainingArguments` and what a user of the method sets."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from typing import Literal, get_args, get_origin, get_type_hints

from transformers import TrainingArguments

from .guidance import Distance, Reduction
from .losses import Objective
from .metrics import OF_PAIRS, is_higher_better
from .moved import accept_moved_options

CorrectionSchedule = Literal["always", "violated"]
OWN_GROUPS = ("galore", "apollo", "lomo", "adalomo")  # starts of `optim` that group the parameters themselves


@accept_moved_options
@dataclass
class IPGConfig(TrainingArguments):
    """Settings of [`IPGTrainer`]: all of [`~transformers.TrainingArguments`], two with other defaults, and these.

    Args:
        warmup_steps (`float`, *optional*, defaults to `0.1`):
            A setting of `TrainingArguments`, where the default is 0: number of optimizer steps over which the learning
            rate rises from 0; below 1, their share of the training, rounded up. A guided step has two updates, and at a
            high rate the first steps can make all outputs one constant, which has no divergence either. On photographs
            this happened in one of five seeds without a warm-up and in none with one (recipes/findings.md).
            `lr_scheduler_type="constant"` has no warm-up, `"constant_with_warmup"` has one.
        greater_is_better (`bool`, *optional*):
            A setting of `TrainingArguments`. By default it follows from `metric_for_best_model`: the lower value is
            better for a loss, an error, a flip rate, a divergence and a distance, and the higher for the rest.
        alpha (`float`, *optional*, defaults to `1.0`):
            Scale α > 0 of the task gradient while the outputs of the pairs disagree: its norm is limited to α times
            the norm of the corrective gradient (with `max_loss_scale=inf` it becomes that). Smaller values slow the
            task down more.
        invariance_threshold (`float`, *optional*, defaults to `0.01`):
            Threshold t >= 0 of the invariance divergence, in nats. While the divergence of the pair batch is above it,
            the task gradient is scaled. `inf` never scales it. The paper's values go from 2e-6 to 1e-1 by benchmark.
        max_loss_scale (`float`, *optional*, defaults to `1.0`):
            Largest factor on the task gradient, above 0 (ours). Once the training images are fitted, their gradient is
            tiny and step 4 would amplify it to α times the corrective gradient; `1.0` only ever scales it down. `inf`
            sets no limit, as in the paper.
        invariance_distance (`str`, *optional*, defaults to `"rationale_divergence"`):
            The quantity that the corrective update reduces. `"rationale_divergence"` (ours) is the root of two
            divergences of each pair together: that of the outputs, and that of the rationales, feature by feature.
            `"divergence"` (ours) is √c, the root of the first alone; it needs no linear classifier head.
            `"rationale"` (the paper's) is the distance between the rationales of the two sides. With the two roots one
            α and one t serve digits, ColoredMNIST and photographs; with the paper's distance they do not
            (recipes/findings.md).
        rationale_reduction (`str`, *optional*, defaults to `"mean"`):
            For `invariance_distance="rationale"`. `"mean"` (the paper's) is the distance of the mean rationales of the
            two sides; it needs oriented pairs. `"pair"` (ours) is the mean over pairs of the distance within a pair.
        pair_loss_weight (`float`, *optional*, defaults to `1.0`):
            For pairs with a column `label`: weight of the task loss of both sides in the corrective update (ours). It
            is the plain mean loss, whatever `objective` is, and costs no time. 0 reads no label, as in the paper. Pairs
            without labels have no such loss.
        per_device_pair_batch_size (`int`, *optional*, defaults to `32`):
            Number of pairs in each optimizer step and on each device. If the pair set is smaller, every step uses all
            of its pairs.
        pair_chunk_size (`int`, *optional*):
            Number of pairs whose graph is in memory at a time; by default all pairs of a step. The result is the same,
            and each step runs a second forward of its pairs. Checkpointing of activations does not act in the pair
            forward, which is an inference forward; this setting bounds its memory instead.
        correction_interval (`int`, *optional*, defaults to `1`):
            Apply the corrective update every N optimizer steps (ours). The steps between read no pairs and scale the
            task gradient by the last measurement.
        correction_schedule (`str`, *optional*, defaults to `"always"`):
            `"always"` applies a corrective update at every `correction_interval`-th step. With `"violated"` (ours) a
            pair set whose divergence is at most the threshold gives no corrective gradient; while any set disagrees,
            every step draws pairs; after all agree, the next draw comes `correction_interval` steps later.
        corrective_layers (`list[str]`, *optional*):
            Parameters that the corrective update moves (ours); by default all. Each entry is a regular expression that
            matches a parameter's whole name, or its start up to a dot: `"classifier"`, `"vit.layers.1[01]"`. Only the
            task gradient moves the other parameters, no backward of the pairs runs below the lowest chosen one, and
            the norm of the corrective gradient in step 4 is the norm over the chosen ones.
        freeze_norm (`bool`, *optional*, defaults to `False`):
            Keep batch-norm layers on their running statistics in the task forward, as in the pair forward and at
            inference (rule R3). Use it to fine-tune a pretrained network with batch norm.
        running_norm (`bool`, *optional*, defaults to `False`):
            For a network with batch norm trained from scratch (ours): batch-norm layers use their running statistics in
            the task forward, without a gradient through them, and each optimizer step updates the statistics with all
            of its rows. Does not combine with `freeze_norm` or `torch_compile`.
        objective (`str`, *optional*, defaults to `"erm"`):
            The task loss. `"erm"`: the mean loss. `"class_balanced"`: all classes weigh the same. With an `attribute`
            column also `"group_dro"` (the worst group's loss, online) and `"reweight"` (all groups weigh the same).
        group_dro_step_size (`float`, *optional*, defaults to `0.01`):
            Step size η_q of GroupDRO's group weights, at least 0.
        layer_lr_decay (`float`, *optional*, defaults to `1.0`):
            Factor in (0, 1] between the learning rates of two layers: each layer has this factor times the rate of the
            layer above it, and the highest has `learning_rate`. To fine-tune a pretrained vision transformer 0.65 to
            0.9 is usual (BEiT, MAE). `ipg_hf.rates.layer_depths` says what a layer is; 1.0 gives all the same rate.
        head_learning_rate (`float`, *optional*):
            Learning rate of the classifier head, above 0; by default `learning_rate`. The head is then no layer of
            `layer_lr_decay`: the highest layer below it has `learning_rate`, which is also the rate that is logged.
        check_pairs (`bool`, *optional*, defaults to `True`):
            Look at every row of a stored pair set before training (shapes, dtypes, labels, finite values), and stop if
            `ipg_hf.pairs.check_pairs` finds an error in 256 of them. Of more than 20,000 pairs of raw images, so many
            are looked at, evenly spaced. `False` trains on such pairs too. The pairs of each step are checked in any
            case.
        random_flip (`bool`, *optional*, defaults to `False`):
            Flip training images and pairs left-right half of the time. Both sides of a pair get the same draw. Only for
            raw images that the trainer transforms (a `processing_class` and an `image` column), not for the training
            images of a `get_train_dataloader` of your own that does not call super.
        random_crop_scale (`float`, *optional*, defaults to `1.0`):
            Smallest share of the area, in (0, 1], that a random crop keeps; `1.0` crops nothing. Both sides of a pair
            get the same draw. Only for raw images that the trainer transforms.
    """

    warmup_steps: float = field(
        default=0.1, metadata={"help": "Steps over which the learning rate rises from 0; below 1, their share of all."}
    )
    alpha: float = field(
        default=1.0, metadata={"help": "Scale of the task gradient while the pairs' outputs disagree."}
    )
    invariance_threshold: float = field(
        default=1e-2, metadata={"help": "Divergence (nats) above which the task gradient is scaled."}
    )
    max_loss_scale: float = field(default=1.0, metadata={"help": "Largest factor on the task gradient."})
    invariance_distance: Distance = field(
        default="rationale_divergence",
        metadata={"help": "What the corrective update reduces: a root of divergences, or the paper's distance."},
    )
    rationale_reduction: Reduction = field(
        default="mean", metadata={"help": "Distance of mean rationales (mean) or mean distance of pairs (pair)."}
    )
    pair_loss_weight: float = field(
        default=1.0, metadata={"help": "Weight of the task loss of labelled pairs in the corrective update."}
    )
    per_device_pair_batch_size: int = field(default=32, metadata={"help": "Pairs per optimizer step and device."})
    pair_chunk_size: int | None = field(
        default=None, metadata={"help": "Pairs whose graph is in memory at a time; by default all of a step."}
    )
    correction_interval: int = field(
        default=1, metadata={"help": "Apply the corrective update every N optimizer steps."}
    )
    correction_schedule: CorrectionSchedule = field(
        default="always", metadata={"help": "Correct always, or only while the pairs' outputs disagree (violated)."}
    )
    corrective_layers: list[str] | None = field(
        default=None, metadata={"help": "Parameters (regular expressions, or starts of names) that pairs correct."}
    )
    freeze_norm: bool = field(
        default=False, metadata={"help": "Keep batch-norm layers on their running statistics in the task forward."}
    )
    running_norm: bool = field(
        default=False, metadata={"help": "As freeze_norm, but let each step update the running statistics."}
    )
    objective: Objective = field(default="erm", metadata={"help": "The task loss."})
    group_dro_step_size: float = field(default=0.01, metadata={"help": "Step size of GroupDRO's group weights."})
    layer_lr_decay: float = field(
        default=1.0, metadata={"help": "Learning rate of a layer, in units of that of the layer above it."}
    )
    head_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the classifier head; by default learning_rate."}
    )
    check_pairs: bool = field(
        default=True, metadata={"help": "Look at every pair before training; false goes on despite errors."}
    )
    random_flip: bool = field(default=False, metadata={"help": "Random left-right flips, one draw per pair."})
    random_crop_scale: float = field(
        default=1.0, metadata={"help": "Smallest share of the area that a random crop keeps; 1.0 crops nothing."}
    )

    def __post_init__(self):
        # TrainingArguments takes every metric but a loss for one whose higher values are better
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = is_higher_better(self.metric_for_best_model)
        super().__post_init__()
        self.check()

    def check(self) -> None:
        """Looks at the settings beside those of `TrainingArguments`; the trainer does so again before it trains.

        Raises:
            ValueError: names the setting, its value and what it must be.
        """
        self._require("alpha", math.isfinite(self.alpha) and self.alpha > 0, "a finite number above 0")
        self._require("invariance_threshold", self.invariance_threshold >= 0, "0 or more, and not NaN")
        self._require("pair_loss_weight", 0 <= self.pair_loss_weight < math.inf, "0 or more, and finite")
        self._require("per_device_pair_batch_size", self.per_device_pair_batch_size >= 1, "1 or more")
        self._require("random_crop_scale", 0 < self.random_crop_scale <= 1, "in (0, 1]")
        self._require("max_loss_scale", self.max_loss_scale > 0, "above 0; inf is no limit")
        self._require("correction_interval", self.correction_interval >= 1, "1 or more")
        self._require("group_dro_step_size", 0 <= self.group_dro_step_size < math.inf, "0 or more, and finite")
        self._require("layer_lr_decay", 0 < self.layer_lr_decay <= 1, "in (0, 1]")
        rate = self.head_learning_rate
        self._require("head_learning_rate", rate is None or 0 < rate < math.inf, "above 0 and finite, or None")
        if self.has_layer_rates and self.optim.value.startswith(OWN_GROUPS):
            raise ValueError(
                f"layer_lr_decay and head_learning_rate do not combine with optim={self.optim.value!r}, which groups "
                "the parameters by itself: choose another optim, or leave the two out."
            )
        chunk, layers = self.pair_chunk_size, self.corrective_layers
        self._require("pair_chunk_size", chunk is None or chunk >= 1, "1 or more, or None")
        valid = layers is None or (isinstance(layers, list) and layers and all(map(_is_pattern, layers)))
        self._require("corrective_layers", bool(valid), "None or a list of regular expressions, at least one")
        inherited, hints = {entry.name for entry in fields(TrainingArguments)}, get_type_hints(type(self))
        for name in (entry.name for entry in fields(self) if entry.name not in inherited):
            if get_origin(hints[name]) is Literal:
                choices = get_args(hints[name])
                self._require(name, getattr(self, name) in choices, f"one of {', '.join(map(str, choices))}")
        for name in ("freeze_norm", "torch_compile"):
            if self.running_norm and getattr(self, name):
                raise ValueError(f"running_norm=True does not combine with {name}=True: leave one of the two out.")
        if self.correction_schedule == "violated" and self.invariance_threshold == math.inf:
            raise ValueError(
                "correction_schedule='violated' with invariance_threshold=inf would never correct, since no divergence "
                "is above it: give a finite threshold, or correction_schedule='always'."
            )

    @property
    def uses_running_statistics(self) -> bool:
        """Whether batch-norm layers normalise by their running statistics in training too."""
        return self.freeze_norm or self.running_norm

    @property
    def has_layer_rates(self) -> bool:
        """Whether layers, or the head, have learning rates of their own."""
        return self.layer_lr_decay < 1 or self.head_learning_rate is not None

    @property
    def data_order_seed(self) -> int:
        """Seed of the order and the augmentation of the training set: `data_seed`, else `seed`."""
        return self.seed if self.data_seed is None else self.data_seed

    def _require(self, name: str, valid: bool, rule: str) -> None:
        if not valid:
            raise ValueError(f"{name}={getattr(self, name)!r} is not valid: it must be {rule}.")


def _is_pattern(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(value) and re.compile(value) is not None
    except re.error:
        return False


def chooses_by_pairs(args: TrainingArguments) -> bool:
    """Tells whether `metric_for_best_model` names a metric that is measured on held-out pairs."""
    name = (args.metric_for_best_model or "").removeprefix("eval_")
    return name.rpartition("/")[2] in OF_PAIRS
