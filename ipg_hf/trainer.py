# SPDX-License-Identifier: Apache-2.0
"""`IPGTrainer`: `transformers.Trainer` with invariance pair-guided updates."""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from transformers import BaseImageProcessor, PreTrainedModel, Trainer
from transformers.image_processing_base import ImageProcessingMixin
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .config import IPGConfig
from .guidance import invariance_divergence, loss_gradient_scale, rationale_distance
from .heads import find_head, inference
from .pairs.checks import check_labels, check_pair_labels, check_pair_set
from .pairs.loader import PairCollator, PairLoader
from .pairs.transforms import as_model_inputs
from .progress import PairProgress, output_spread

logger = logging.get_logger(__name__)

ATTRIBUTE = "attribute"


class IPGTrainer(Trainer):
    """Fine-tunes an image classifier so that it ignores what the two sides of its pairs differ in.

    Example:

    ```python
    from ipg_hf import IPGConfig, IPGTrainer, load_image_classifier
    from ipg_hf.data import load_digits
    from transformers import ViTImageProcessor

    data = load_digits()
    trainer = IPGTrainer(
        model=load_image_classifier("path/or/hub-id", num_labels=2),
        args=IPGConfig("out", alpha=1.0, invariance_threshold=1e-3),
        train_dataset=data.train,  # image, label
        eval_dataset=data.validation,
        pair_dataset=data.pairs,  # image_a, image_b
        processing_class=ViTImageProcessor(size={"height": 16, "width": 16}),
    )
    trainer.train()
    ```

    Args:
        model: a transformers image classifier (`load_image_classifier` wraps timm models into one).
        args: an [`IPGConfig`].
        data_collator: as in `Trainer`; pairs have a collator of their own.
        train_dataset: as in `Trainer`. With `processing_class` an image processor, a `datasets` set with an `image`
            column is transformed by the trainer; `label` and `attribute` columns stay.
        eval_dataset: as in `Trainer`. Where rows have an `attribute`, `compute_metrics` gets
            `label_ids=(labels, attributes)`; the model never sees it.
        pair_dataset: pairs, as one map-style or iterable data set or as a dict of them, one for each invariance. Rows
            hold `<main_input>_a` and `<main_input>_b`, e.g. `pixel_values_a`, or raw `image_a` and `image_b`.
            `None`: the trainer is `Trainer`.
        processing_class: as in `Trainer`.
        model_init: as in `Trainer`.
        compute_metrics: as in `Trainer`, e.g. [`~metrics.GroupMetrics`].
        callbacks: as in `Trainer`.
        optimizers: as in `Trainer`.
        head: dotted path of the last linear layer, where it is not found by itself.
        **trainer_kwargs: every other argument of `Trainer`.

    Raises:
        ValueError: at construction, for settings, data or a model that cannot work; the message names the value.
    """

    _tag_names = ("ipg",)

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: IPGConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        pair_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        head: str | None = None,
        **trainer_kwargs: Any,
    ):
        # ---- 1. Arguments
        if args is None:
            args = IPGConfig(output_dir="tmp_trainer")
        if not isinstance(args, IPGConfig):
            raise ValueError(f"args is a {type(args).__name__}: make it an IPGConfig, which takes the same arguments.")
        if model is not None and not isinstance(model, PreTrainedModel) and hasattr(model, "pretrained_cfg"):
            raise ValueError(
                f"model is the timm module {type(model).__name__}, which has no loss: pass load_image_classifier(model)."
            )
        named = pair_dataset if isinstance(pair_dataset, Mapping) else {"": pair_dataset}
        self.pair_datasets = {name: dataset for name, dataset in named.items() if dataset is not None}
        self.head_path = head
        self._guided_state = None  # the TrainerState of the training run that the pair loaders belong to
        self._pair_loaders: dict[str, PairLoader] = {}

        # ---- 2. Trainer
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            **trainer_kwargs,
        )
        for name, dataset in {"train_dataset": train_dataset, **_by_name("eval_dataset", eval_dataset)}.items():
            check_labels(dataset, name, getattr(getattr(self.model, "config", None), "num_labels", None))

        # ---- 3. Guidance
        if self.pair_datasets:
            self._prepare_guidance()

    def _prepare_guidance(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError("IPGTrainer with pairs does not run under DeepSpeed or FSDP: use plain data parallelism.")
        if self.args.fp16:
            raise ValueError("fp16=True is not supported with pairs: use bf16=True, which needs no loss scaling.")
        self.head = find_head(self.model, self.head_path)
        self.main_input = getattr(self.model, "main_input_name", "pixel_values")
        inputs = set(inspect.signature(self.model.forward).parameters) - {"labels"}
        self._pair_collator = PairCollator(inputs, self.main_input)
        for name, dataset in self.pair_datasets.items():
            title = f"pair_dataset[{name!r}]" if name else "pair_dataset"
            check_pair_labels(dataset, title)
            self.pair_datasets[name] = dataset = self._as_inputs(dataset, is_training=True, seed=self._pair_seed(name))
            check_pair_set(dataset, title, self._pair_collator, every_row=self.args.check_pairs)
            self._warn_about_size(dataset, title)
        if not self.args.freeze_norm and self._norm_layers():
            logger.warning(
                f"{type(self.model).__name__} has batch-norm layers that hold statistics, and freeze_norm is off: what "
                "the pairs teach under the running statistics may not reach the task forward, which uses its batch's. "
                "Set freeze_norm=True when fine-tuning a pretrained network."
            )
        self.progress = PairProgress()
        self.add_callback(self.progress)
        # Several models (ResNet among them) ignore `num_items_in_batch` but are taken to have divided by it
        # (transformers issue 47688): here compute_loss does the division for every model.
        if self.compute_loss_func is None and self.label_smoother is None:
            self.model_accepts_loss_kwargs = True

    def _warn_about_size(self, dataset: Any, title: str) -> None:
        wanted = self.args.per_device_pair_batch_size * self.args.world_size
        if hasattr(dataset, "__len__") and len(dataset) < wanted:
            logger.warning(f"{title} has {len(dataset)} pairs, fewer than the {wanted} a step: every step uses all.")

    def _norm_layers(self) -> list[nn.Module]:
        return [
            module for module in self.model.modules() if isinstance(module, nn.modules.batchnorm._NormBase)
            and module.running_mean is not None
        ]  # fmt: skip

    # ---- Data ----

    def _as_inputs(self, dataset: Any, is_training: bool, seed: int) -> Any:
        """Raw images through the image processor; any other data set as it is."""
        if not isinstance(self.processing_class, (BaseImageProcessor, ImageProcessingMixin)):
            return dataset
        return as_model_inputs(
            dataset,
            self.processing_class,
            getattr(self.model, "main_input_name", "pixel_values"),
            keep=("label", "labels", "label_ids", ATTRIBUTE),
            random_flip=is_training and self.args.random_flip,
            random_crop_scale=self.args.random_crop_scale if is_training else 1.0,
            seed=seed,
        )

    def _get_dataloader(self, dataset, description, batch_size, sampler_fn=None, is_training=False, **kwargs):
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        dataset = self._as_inputs(dataset, is_training, seed)
        return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if ATTRIBUTE not in self._signature_columns:
            self._signature_columns.append(ATTRIBUTE)

    def _pair_seed(self, name: str) -> int:
        seeds = (self.args.pair_seed, self.args.data_seed, self.args.seed)
        seed = next(seed for seed in seeds if seed is not None)
        # each set its own order, whatever the other sets are
        return seed if not name else seed + 1 + sum(256**i * byte for i, byte in enumerate(name.encode()))

    def _pair_loader(self, name: str) -> PairLoader:
        args = self.args
        workers = args.dataloader_num_workers if args.pair_num_workers is None else args.pair_num_workers
        loader = PairLoader(
            self.pair_datasets[name],
            self._pair_collator,
            args.per_device_pair_batch_size,
            seed=self._pair_seed(name),
            rank=args.process_index,
            world_size=args.world_size,
            num_workers=workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )
        loader.position = self.progress.positions.get(name, 0)
        return loader

    # ---- The step ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        """As `Trainer.train`.

        Raises:
            ValueError: resuming a run whose updates have separate optimizer states, which checkpoints do not hold.
        """
        if resume_from_checkpoint and self.pair_datasets and not self.args.shared_optimizer_state:
            raise ValueError("shared_optimizer_state=False cannot be resumed: checkpoints hold one optimizer state.")
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self._guided_state = None
            for loader in self._pair_loaders.values():
                loader.close()

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch: before the first of an optimizer step the corrective update, after the last the scaling.

        Returns:
            The detached loss of the micro-batch, a scalar.
        """
        if not self.pair_datasets:
            return super().training_step(model, inputs, num_items_in_batch)
        if self._guided_state is not self.state:
            self._begin_guidance(inputs)
        if self._correction is None:
            self._correction = self._correct(model)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._scale_loss_gradient(model)
        return loss

    def _begin_guidance(self, inputs: Mapping[str, Any]) -> None:
        """Called at the first step of each training run, when the state of a checkpoint has been loaded."""
        name = PairProgress.__name__
        # Trainer may have replaced the callback by a restored copy, and a checkpoint of another trainer has no entry
        self.progress = next(cb for cb in self.callback_handler.callbacks if isinstance(cb, PairProgress))
        saved = self.state.stateful_callbacks.get(name) if self.state.global_step else None
        if self.state.global_step and not (saved or {}).get("attributes"):
            logger.warning("The checkpoint holds no position in the pairs: they are drawn from the start.")
            saved = None
        self.progress.restore(saved)
        self.state.stateful_callbacks[name] = self.progress.state()

        self.head = find_head(self.model, self.head_path)
        self._pair_loaders = {name: self._pair_loader(name) for name in self.pair_datasets}
        self._problem_type = _problem_type(self.model, inputs.get("labels"))
        self._corrective_state = None
        self._correction: dict[str, Tensor] | None = None
        first = self._prepare_inputs(self._pair_collator([_first_row(next(iter(self.pair_datasets.values())))]))
        self.head.verify(self.model, first)
        self._guided_state = self.state

    def _correct(self, model: nn.Module) -> dict[str, Tensor]:
        """Steps 1 and 2 of the method: θ ← σ(θ, η, ∇d). Returns the step's metrics, none where it is skipped."""
        module = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        weight = 1.0 if self.args.pair_combination == "sum" else 1 / len(self._pair_loaders)
        metrics: dict[str, Tensor] = {}
        distances, divergences, spreads = [], [], []
        with inference(module):  # R2: what is made invariant is what will be deployed
            for name, loader in self._pair_loaders.items():
                batch = self._prepare_inputs(next(loader))
                self.progress.positions[name] = loader.position
                with self.compute_loss_context_manager():
                    logits, z = self.head.run(module, batch)
                distance, divergence = self._measure(logits, z)
                if not distance.requires_grad:
                    raise ValueError("the distance depends on no trainable parameter: unfreeze the head or the network.")
                self.accelerator.backward(weight * distance)
                distances.append(weight * distance.detach())
                divergences.append(divergence)
                spreads.append(output_spread(logits.detach()))
                if name:
                    metrics |= {f"{name}/distance": distance.detach(), f"{name}/divergence": divergence}
        metrics["distance"] = torch.stack(distances).sum()
        metrics["divergence"] = torch.stack(divergences).max()
        if self._problem_type == "single_label_classification":
            metrics["spread"] = torch.stack(spreads).max()
        norm = metrics["corrective_grad_norm"] = self._reduced_norm(module)
        if torch.isfinite(norm):
            if self.args.max_grad_norm:
                nn.utils.clip_grads_with_norm_(module.parameters(), self.args.max_grad_norm, norm)
            self._corrective_update()
        else:
            metrics = {}
            self.progress.skipped += 1
        module.zero_grad()
        return metrics

    def _measure(self, logits: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """d, attached, and c, detached, of the pair batch that all processes hold together (R7)."""
        mean = self.args.rationale_reduction == "mean"
        if mean and self.args.world_size > 1:
            # the norm of the mean is not the mean of norms: every process moves its features to the common mean
            halves = torch.stack([side.mean(0) for side in z.detach().chunk(2)])
            shift = self.accelerator.reduce(halves, "mean") - halves
            z = z + shift.repeat_interleave(len(z) // 2, 0)
        distance = rationale_distance(
            self.head.weight, *z.chunk(2), reduction=self.args.rationale_reduction, norm=self.args.rationale_norm
        )
        divergence = invariance_divergence(*logits.detach().chunk(2), problem_type=self._problem_type)
        if self.args.world_size > 1:
            divergence = self.accelerator.reduce(divergence, "mean")
            if not mean:
                distance = distance + (self.accelerator.reduce(distance.detach(), "mean") - distance.detach())
        return distance, divergence

    def _reduced_norm(self, module: nn.Module) -> Tensor:
        """Averages the corrective gradients over processes, and returns the norm of all of them together."""
        if self.args.world_size > 1:
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        return gradient_norm(module)

    def _corrective_update(self) -> None:
        optimizer = self.optimizer.optimizer  # inside accelerate's wrapper, which has no setter for its state
        gradient_state = self.accelerator.gradient_state
        synchronized = gradient_state.sync_gradients
        shared = optimizer.state
        if not self.args.shared_optimizer_state:
            optimizer.state = self._corrective_state if self._corrective_state is not None else type(shared)(dict)
        # accelerate skips a step on the micro-batches before the last (accelerate issues 439, 641)
        gradient_state._set_sync_gradients(True)
        try:
            with _without_weight_decay(optimizer):  # R5
                self.optimizer.step()
        finally:
            gradient_state._set_sync_gradients(synchronized)
            if not self.args.shared_optimizer_state:
                self._corrective_state, optimizer.state = optimizer.state, shared

    def _scale_loss_gradient(self, model: nn.Module) -> None:
        """Step 4 of the method, once an optimizer step, on the accumulated gradient."""
        metrics, self._correction = self._correction, None
        if not metrics:
            model.zero_grad()  # parameters without a gradient are left alone by the update: the step is skipped
            return
        metrics["loss_grad_norm"] = gradient_norm(model)
        metrics["loss_scale"] = loss_gradient_scale(
            metrics["corrective_grad_norm"],
            metrics["loss_grad_norm"],
            metrics["divergence"],
            alpha=self.args.alpha,
            threshold=self.args.invariance_threshold,
        )
        torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], metrics["loss_scale"])
        metrics["violated"] = (metrics["divergence"] > self.args.invariance_threshold).float()
        self.progress.add(metrics)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As `Trainer.compute_loss`, without the `attribute` column; with pairs, exact under accumulation (R6)."""
        if ATTRIBUTE not in inspect.signature(self.model.forward).parameters:
            inputs = {name: value for name, value in inputs.items() if name != ATTRIBUTE}
        if self.args.freeze_norm and model.training:
            for module in self._norm_layers():
                module.eval()
        if not self.pair_datasets or self.compute_loss_func is not None or self.label_smoother is not None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if num_items_in_batch is not None:
            # the batch's mean, weighted by its share of what is accumulated and, in DDP's mean, of all processes
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            loss = loss * (inputs["labels"].ne(-100).sum() / num_items_in_batch * processes)
        return (loss, outputs) if return_outputs else loss

    # ---- Evaluation ----

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """As `Trainer.prediction_step`; with an `attribute` column the labels are (labels, attributes)."""
        attributes = inputs.get(ATTRIBUTE)
        inputs = {name: value for name, value in inputs.items() if name != ATTRIBUTE}
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if attributes is not None and labels is not None:
            labels = (labels, self._prepare_input(attributes))
        return loss, logits, labels

    @torch.no_grad()
    def evaluate_pairs(self, pair_dataset: Any, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Measures a (held-out) map-style pair set, in inference mode.

        Args:
            pair_dataset: rows as in training; raw images are not augmented.
            metric_key_prefix: put before each key.

        Returns:
            `<prefix>_flip_rate`, the share of pairs whose predicted classes differ; `<prefix>_divergence` and
            `<prefix>_distance` of all pairs together.
        """
        head = find_head(self.model, self.head_path)
        main_input = getattr(self.model, "main_input_name", "pixel_values")
        collator = PairCollator(set(inspect.signature(self.model.forward).parameters) - {"labels"}, main_input)
        dataset = self._as_inputs(pair_dataset, is_training=False, seed=0)
        batches = torch.utils.data.DataLoader(dataset, self.args.eval_batch_size, collate_fn=collator)
        sides: dict[str, list[Tensor]] = {"logits_a": [], "logits_b": [], "z_a": [], "z_b": []}
        with inference(self.model):
            for batch in batches:
                with self.compute_loss_context_manager():
                    logits, z = head.run(self.model, self._prepare_inputs(batch))
                for name, part in zip(sides, (*logits.chunk(2), *z.chunk(2)), strict=True):
                    sides[name].append(part)
        a, b, z_a, z_b = (torch.cat(parts) for parts in sides.values())
        settings = {"reduction": self.args.rationale_reduction, "norm": self.args.rationale_norm}
        measured = {
            "flip_rate": (a.argmax(-1) != b.argmax(-1)).double().mean(),
            "divergence": invariance_divergence(a, b, problem_type=_problem_type(self.model, None)),
            "distance": rationale_distance(head.weight, z_a, z_b, **settings),
        }
        return {f"{metric_key_prefix}_{name}": value.item() for name, value in measured.items()}

    # ---- Logs and checkpoints ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`; training logs get the `ipg/...` means over the steps since the last."""
        if self.pair_datasets and "loss" in logs:
            advice = (
                f"Use a larger alpha (now {self.args.alpha}) or a smaller learning_rate (now {self.args.learning_rate}), "
                "and choose the checkpoint by worst-group accuracy on validation."
            )
            logs = {**logs, **self.progress.pop(advice)}
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except OSError as failure:
            # what was written of it would be taken for the newest checkpoint
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            path = os.path.join(self._get_output_dir(trial=trial), folder)
            if self.args.should_save:
                shutil.rmtree(path, ignore_errors=True)
            raise OSError(
                failure.errno, f"could not save {folder} ({failure.strerror}); it was removed, those before it are whole"
            ) from failure


def gradient_norm(model: nn.Module) -> Tensor:
    """The 2-norm of all gradients of a model together: a float32 scalar (float64 for float64 parameters).

    Parameters without a gradient count as zero.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    gradients = [grad if grad.dtype in (torch.float32, torch.float64) else grad.float() for grad in gradients]
    return nn.utils.get_total_norm(gradients)


@contextmanager
def _without_weight_decay(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    decays = [group.get("weight_decay") for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        if "weight_decay" in group:
            group["weight_decay"] = 0.0
    try:
        yield
    finally:
        for group, decay in zip(optimizer.param_groups, decays, strict=True):
            if "weight_decay" in group:
                group["weight_decay"] = decay


def _problem_type(model: nn.Module, labels: Tensor | None) -> str:
    """The model's problem type, inferred as transformers' loss infers it where the config names none."""
    config = getattr(model, "config", None)
    named = getattr(config, "problem_type", None)
    if named is not None:
        return named
    if getattr(config, "num_labels", None) == 1:
        return "regression"
    floating = labels is not None and labels.is_floating_point()
    return "multi_label_classification" if floating else "single_label_classification"


def _by_name(name: str, dataset: Any) -> dict[str, Any]:
    if isinstance(dataset, dict):
        return {f"{name}[{key!r}]": value for key, value in dataset.items()}
    return {name: dataset}


def _first_row(dataset: Any) -> Mapping[str, Any]:
    return dataset[0] if hasattr(dataset, "__getitem__") else next(iter(dataset))
