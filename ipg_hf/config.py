# SPDX-License-Identifier: Apache-2.0
"""The settings of a run: `transformers.TrainingArguments` and what the method adds."""

from __future__ import annotations

import math
import re
import zlib
from dataclasses import dataclass, field
from typing import Literal, get_args

from transformers import TrainingArguments

from .guidance import Distance, LossScaling
from .objectives import Objective, PairObjective

RationaleReduction = Literal["mean", "pair"]
RationaleNorm = Literal["spectral", "frobenius"]
PairCombination = Literal["mean", "sum"]
CorrectionSchedule = Literal["always", "violated"]
PairSource = Literal["pairs", "batch"]
PairCache = Literal["none", "cpu", "device"]


@dataclass
class IPGConfig(TrainingArguments):
    """Settings of [`IPGTrainer`]: every one of [`~transformers.TrainingArguments`], one of them with another default,
    and these.

    Args:
        warmup_steps (`float`, *optional*, defaults to `0.1`):
            As in `TrainingArguments`, where it is 0: optimizer steps over which the learning rate rises from 0, below 1
            their share of the training, rounded up (the first step has the rate 0). A step has two updates, and at a
            high rate the first steps can drive all outputs to one constant, which has no divergence either: on
            photographs one of five seeds without a warm-up, none with one (recipes/README.md,
            "stability_scenes_100"). `lr_scheduler_type="constant"` has no warm-up, whatever is set here;
            `"constant_with_warmup"` has.
        alpha (`float`, *optional*, defaults to `1.0`):
            Scale α > 0 of the task gradient while the pairs' outputs disagree: its norm becomes α times the norm of
            the corrective gradient. Smaller values hold the task back more.
        invariance_threshold (`float`, *optional*, defaults to `0.01`):
            Threshold t >= 0 of the invariance divergence (nats). While the divergence of the pair batch is above it,
            the task gradient is scaled; `inf` never scales it (an ablation; not with
            `correction_schedule="violated"`, which would never correct). The paper's go from 2e-6 to 1e-1 by benchmark.
        loss_scaling (`str`, *optional*, defaults to `"adaptive"`):
            How it is scaled. `"adaptive"`: by α·‖g_d‖/‖g_L‖, the method. `"fixed"`: by α itself, whatever the norms of
            the corrective and the task gradient are, and at most by `max_loss_scale` (an ablation).
        max_loss_scale (`float`, *optional*, defaults to `1.0`):
            Largest factor on the task gradient, above 0 (ours). Once the training images are fitted their gradient is
            tiny, and step 4 amplifies it to α times the corrective gradient; at `1.0` it is only ever scaled down.
            `inf`: no limit, as in the paper.
        invariance_distance (`str`, *optional*, defaults to `"divergence"`):
            What the corrective gradient descends on. `"rationale"`: the distance d between the rationales of the two
            sides, the paper's. `"divergence"` (ours): √c, the root of the divergence of their outputs, whose gradient
            gives most weight to the pairs that disagree most; the settings of rationales then change nothing. It is the
            default since one α and one t serve the three benchmarks it was chosen on, with the paper's they do not
            (recipes/README.md, "One setting for all benchmarks").
        rationale_reduction (`str`, *optional*, defaults to `"mean"`):
            `"mean"`: distance of the mean rationales of the two sides (the paper's); needs oriented pairs.
            `"pair"`: mean over pairs of the distance within a pair (ours).
        rationale_norm (`str`, *optional*, defaults to `"spectral"`):
            Matrix norm of the rationale difference: `"spectral"` or `"frobenius"`.
        per_device_pair_batch_size (`int`, *optional*, defaults to `32`):
            Pairs drawn per optimizer step and device. Larger than the pair set: all pairs at every step.
        pair_source (`str`, *optional*, defaults to `"pairs"`):
            `"pairs"`: a `pair_dataset`. `"batch"` (ours): the training batch is side a and the training set has the
            counterparts, in a column `image_b` (or `<main_input>_b`); there is no `pair_dataset`. Both gradients are
            then taken at the point that the step begins at, not the task's at the corrected one, and one forward of the
            batch serves both: of the arithmetic of B pairs and B images one forward in three is saved, and no backward.
            The pairs go through the task's forward: batch norm needs `freeze_norm`, and dropout draws anew for each
            side, so that equal sides are apart. With the rationales' distance `rationale_reduction="pair"`, unless all
            training images have one value of the attribute.
        pair_chunk_size (`int`, *optional*):
            Pairs whose graph is held in memory at a time. The result is the same; each step has a second forward of its
            pairs. Defaults to all pairs of a step. Checkpointing of activations does not act in the pair forward, which
            is an inference forward: this bounds its memory instead.
        pair_combination (`str`, *optional*, defaults to `"mean"`):
            With several pair sets, the corrective gradient is the `"mean"` or the `"sum"` of theirs.
        correction_interval (`int`, *optional*, defaults to `1`):
            Correct at every so many-th optimizer step only (ours). In between no pair is read, and the task gradient is
            scaled by what was measured last.
        correction_schedule (`str`, *optional*, defaults to `"always"`):
            `"always"`: a corrective update at every `correction_interval`-th step. `"violated"` (ours): a pair set
            whose divergence is at most the threshold corrects nothing; the pairs are looked at again
            `correction_interval` steps after they all agreed, and at every step before that.
        corrective_layers (`list[str]`, *optional*):
            Parameters that the corrective gradient moves (or a penalty's gradient, with another `pair_objective`): each
            entry is a regular expression that matches a parameter's whole name or its start up to a dot, such as
            `"classifier"` or `"vit.layers.1[01]"` (ours). The others are moved by the task
            gradient only, no backward of the pairs runs below the lowest of them, and the norm of the corrective
            gradient that step 4 scales by is the norm over these parameters. Defaults to all.
        freeze_norm (`bool`, *optional*, defaults to `False`):
            Keep batch-norm layers on their running statistics in the task forward too, as they are in the pair forward
            and at inference. Advised for pretrained networks with batch norm.
        running_norm (`bool`, *optional*, defaults to `False`):
            The same for networks from scratch (ours): batch-norm layers normalise by their running statistics in the
            task forward too, without a gradient through them, and each optimizer step moves the statistics on by all
            its rows. Not together with `freeze_norm` or `torch_compile`.
        shared_optimizer_state (`bool`, *optional*, defaults to `True`):
            Whether the corrective and the task update share the optimizer's state (momentum, Adam moments). `False` is
            an ablation; such a run cannot be resumed.
        pair_objective (`str`, *optional*, defaults to `"ipg"`):
            `"ipg"`: the method. For comparison, a penalty on the same pairs that is added to the loss, with one update
            a step: `"kl"` (symmetric KL of the outputs), `"features"` (squared distance of the features),
            `"rationales"` (of the rationales) or `"augmentation"` (the loss of both sides, whose `label` column the
            pairs then need). See `objectives.pair_penalty`.
        pair_penalty_weight (`float`, *optional*, defaults to `1.0`):
            Factor of that penalty, above 0.
        objective (`str`, *optional*, defaults to `"erm"`):
            What the task update minimises: `"erm"`, the mean loss; `"class_balanced"`, classes of equal weight; with
            an `attribute` column `"group_dro"` (the worst group's, online) or `"reweight"` (groups of equal weight);
            with an `environment` column `"irm"` or `"vrex"`.
        group_dro_step_size (`float`, *optional*, defaults to `0.01`):
            Step size η_q of GroupDRO's group weights, at least 0.
        environment_penalty_weight (`float`, *optional*, defaults to `1.0`):
            Factor of the penalty of IRM and V-REx, at least 0. Where it is above 1 the loss is divided by it.
        environment_penalty_start (`int`, *optional*, defaults to `0`):
            Optimizer step from which that factor holds; before, it is at most 1, as in IRM's code.
        pair_seed (`int`, *optional*):
            Seed of the order and the augmentation of pairs. Defaults to `data_seed`, else `seed`.
        pair_num_workers (`int`, *optional*):
            Worker processes that load pairs. Defaults to `dataloader_num_workers`.
        pair_cache (`str`, *optional*, defaults to `"none"`):
            For small sets of raw images, decode and resize them once, before training, and keep them in memory: on the
            `"cpu"` or on the training `"device"`, of each process, 8 bits a value where that is exact. Steps draw the
            same pairs and the same flips as without it; worker processes for pairs are not used. Not for random crops
            (made before the resizing), streams, adversarial pairs and sets that are model inputs already.
        check_pairs (`bool`, *optional*, defaults to `True`):
            Look at every row of a map-style pair set before training (shapes, dtypes, labels, finite values). What is
            drawn is checked in any case.
        random_flip (`bool`, *optional*, defaults to `False`):
            Flip training images and pairs left-right half of the time. Only for raw images that the trainer
            transforms itself (a `processing_class` and an `image` column). Both sides of a pair get the same draw.
        random_crop_scale (`float`, *optional*, defaults to `1.0`):
            Smallest share of the area, in (0, 1], that a random crop keeps; `1.0` crops nothing. Same conditions.
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
    loss_scaling: LossScaling = field(
        default="adaptive", metadata={"help": "Scale the task gradient by alpha times a ratio of norms, or by alpha."}
    )
    max_loss_scale: float = field(default=1.0, metadata={"help": "Largest factor on the task gradient."})
    invariance_distance: Distance = field(
        default="divergence", metadata={"help": "What is corrected: the rationales' distance, or the root of c."}
    )
    rationale_reduction: RationaleReduction = field(
        default="mean", metadata={"help": "Distance of mean rationales (mean) or mean distance of pairs (pair)."}
    )
    rationale_norm: RationaleNorm = field(default="spectral", metadata={"help": "Norm of the rationale difference."})
    per_device_pair_batch_size: int = field(default=32, metadata={"help": "Pairs per optimizer step and device."})
    pair_source: PairSource = field(
        default="pairs", metadata={"help": "A pair set (pairs), or the training batch and its counterparts (batch)."}
    )
    pair_chunk_size: int | None = field(
        default=None, metadata={"help": "Pairs whose graph is held in memory at a time; by default all of a step."}
    )
    pair_combination: PairCombination = field(
        default="mean", metadata={"help": "How the corrective gradients of several pair sets combine."}
    )
    correction_interval: int = field(default=1, metadata={"help": "Correct at every so many-th optimizer step."})
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
    shared_optimizer_state: bool = field(
        default=True, metadata={"help": "Share the optimizer's state between the two updates (False: an ablation)."}
    )
    pair_objective: PairObjective = field(
        default="ipg", metadata={"help": "What the pairs do: the method, or a penalty to compare it with."}
    )
    pair_penalty_weight: float = field(default=1.0, metadata={"help": "Factor of the penalty on pairs."})
    objective: Objective = field(default="erm", metadata={"help": "What the task update minimises."})
    group_dro_step_size: float = field(default=0.01, metadata={"help": "Step size of GroupDRO's group weights."})
    environment_penalty_weight: float = field(default=1.0, metadata={"help": "Factor of IRM's and V-REx's penalty."})
    environment_penalty_start: int = field(default=0, metadata={"help": "Step from which that factor is above 1."})
    pair_seed: int | None = field(default=None, metadata={"help": "Seed of the pairs' order and augmentation."})
    pair_num_workers: int | None = field(default=None, metadata={"help": "Worker processes that load pairs."})
    pair_cache: PairCache = field(
        default="none", metadata={"help": "Keep all pairs of raw images in memory: none, cpu or device."}
    )
    check_pairs: bool = field(default=True, metadata={"help": "Look at every pair before training."})
    random_flip: bool = field(default=False, metadata={"help": "Random left-right flips, one draw per pair."})
    random_crop_scale: float = field(
        default=1.0, metadata={"help": "Smallest share of the area that a random crop keeps; 1.0 crops nothing."}
    )

    def __post_init__(self):
        super().__post_init__()
        self._require("alpha", math.isfinite(self.alpha) and self.alpha > 0, "a finite number above 0")
        self._require("invariance_threshold", self.invariance_threshold >= 0, "0 or more, and not NaN")
        self._require("per_device_pair_batch_size", self.per_device_pair_batch_size >= 1, "1 or more")
        self._require("random_crop_scale", 0 < self.random_crop_scale <= 1, "in (0, 1]")
        self._require("max_loss_scale", self.max_loss_scale > 0, "above 0; inf is no limit")
        self._require("correction_interval", self.correction_interval >= 1, "1 or more")
        for name in ("group_dro_step_size", "environment_penalty_weight", "environment_penalty_start"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "0 or more, and finite")
        self._require("pair_penalty_weight", 0 < self.pair_penalty_weight < math.inf, "a finite number above 0")
        chunk = self.pair_chunk_size
        self._require("pair_chunk_size", chunk is None or chunk >= 1, "1 or more, or None")
        layers = self.corrective_layers
        valid = layers is None or (isinstance(layers, list) and layers and all(map(_is_pattern, layers)))
        self._require("corrective_layers", bool(valid), "None or a list of regular expressions, at least one")
        workers = self.pair_num_workers
        self._require("pair_num_workers", workers is None or workers >= 0, "0 or more, or None")
        for name, choices in (
            ("loss_scaling", LossScaling),
            ("invariance_distance", Distance),
            ("rationale_reduction", RationaleReduction),
            ("rationale_norm", RationaleNorm),
            ("pair_combination", PairCombination),
            ("correction_schedule", CorrectionSchedule),
            ("pair_source", PairSource),
            ("pair_cache", PairCache),
            ("pair_objective", PairObjective),
            ("objective", Objective),
        ):
            self._require(name, getattr(self, name) in get_args(choices), f"one of {', '.join(get_args(choices))}")

        self.check_together()

    def check_together(self, is_compiled: bool = False) -> None:
        """Looks for settings that do not go together; the trainer does so again, as a launcher may have added some.

        Args:
            is_compiled: whether accelerate compiles the model, whatever `torch_compile` is.

        Raises:
            ValueError: names the settings, and which to leave out.
        """
        own = {name: getattr(self, name) for name in self.__dataclass_fields__}
        # where accelerate launch asks for them, the fields stay as they were
        own |= {"fp16": self.mixed_precision == "fp16", "torch_compile": self.torch_compile or is_compiled}
        for name in ("freeze_norm", "torch_compile"):
            if self.running_norm and own[name]:
                raise ValueError(f"running_norm=True does not go with {name}=True: leave one of the two out.")
        if self.correction_schedule == "violated" and self.invariance_threshold == math.inf:
            raise ValueError(
                "correction_schedule='violated' with invariance_threshold=inf would never correct, since no divergence "
                "is above it: give a finite threshold, or correction_schedule='always'."
            )
        if self.pair_objective != "ipg":
            wanted = {"correction_interval": 1, "correction_schedule": "always", "shared_optimizer_state": True}
            for name, value in wanted.items():
                if own[name] != value:
                    raise ValueError(
                        f"{name}={own[name]!r} does not go with pair_objective={self.pair_objective!r}, a penalty that "
                        f"is part of every step's one update: set {name}={value!r}."
                    )
        if self.pair_source != "batch":
            return
        wanted = {"pair_objective": "ipg", "pair_chunk_size": None, "correction_interval": 1, "pair_cache": "none"}
        wanted |= {"fp16": False, "torch_compile": False}
        for name, value in wanted.items():
            if own[name] != value:
                raise ValueError(
                    f"{name}={own[name]!r} does not go with pair_source='batch': set {name}={value!r}, or "
                    "pair_source='pairs' with a pair_dataset."
                )
        if self.means_rationales and self.gradient_accumulation_steps > 1:
            raise ValueError(
                "pair_source='batch' with rationale_reduction='mean' is exact for whole batches alone, since the norm "
                f"of a mean is no mean of norms: set rationale_reduction='pair', or gradient_accumulation_steps=1 "
                f"instead of {self.gradient_accumulation_steps}."
            )

    @property
    def holds_norm(self) -> bool:
        """Whether batch-norm layers normalise by their running statistics in training too."""
        return self.freeze_norm or self.running_norm

    @property
    def means_rationales(self) -> bool:
        """Whether the distance is that of the sides' mean rationales, which is no mean over pairs."""
        return self.invariance_distance == "rationale" and self.rationale_reduction == "mean"

    @property
    def data_order_seed(self) -> int:
        """Seed of the order and the augmentation of the training set: `data_seed`, else `seed`."""
        return self.seed if self.data_seed is None else self.data_seed

    def pair_order_seed(self, name: str) -> int:
        """Seed of the order and the augmentation of a pair set: its own, whatever the other sets are."""
        seed = self.data_order_seed if self.pair_seed is None else self.pair_seed
        return seed if not name else seed + 1 + zlib.crc32(name.encode())

    def _require(self, name: str, valid: bool, rule: str) -> None:
        if not valid:
            raise ValueError(f"{name}={getattr(self, name)!r} is not valid: it must be {rule}.")


def _is_pattern(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(value) and re.compile(value) is not None
    except re.error:
        return False
