# SPDX-License-Identifier: Apache-2.0
"""`IPGTrainer`: `transformers.Trainer` with invariance pair-guided updates."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from . import correction
from .callbacks import GroupShares, PairProgress, RowEpochs, restored
from .checkpoints import SaveAtStepEnd, newest_checkpoint, own_names, whole_or_removed
from .config import IPGConfig
from .guidance import ProblemType
from .guided import GuidedStep, pair_settings
from .heads import ClassifierHead, CompiledRun, find_head
from .hub.publish import PublishingTrainer
from .inbatch import InBatchStep, check_in_batch, first_pair
from .inference import logits_of
from .launch import check_launch
from .layers import parameters_matching
from .models import check_all_loaded, forward_inputs, takes_labels
from .norms import RunningNorm, norm_layers, warn_of_batch_statistics
from .objectives import classification_loss, find_problem_type
from .pairs.adversarial import AdversarialLoader, AdversarialPairs, Twins, search_partners
from .pairs.cache import check_cacheable
from .pairs.checks import check_labels, check_pair_labels, check_pair_set, check_pair_stream, named_sets, title_of
from .pairs.loader import PairCollator, PairLoader, is_stream, loader_of
from .pairs.transforms import as_model_inputs
from .task import ATTRIBUTE, TaskObjective, row_columns

logger = logging.get_logger(__name__)


class IPGTrainer(PublishingTrainer):
    """Fine-tunes an image classifier so that it ignores what the two sides of its pairs differ in.

    Example:

    ```python
    from ipg_hf import IPGConfig, IPGTrainer, load_image_classifier
    from ipg_hf.data import load_digits
    from transformers import ViTImageProcessor

    data = load_digits()
    trainer = IPGTrainer(
        model=load_image_classifier("path/or/hub-id", num_labels=2),
        args=IPGConfig("out"),
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
        data_collator: as in `Trainer`; pairs have their own.
        train_dataset: as in `Trainer`. With `processing_class` an image processor, a `datasets` set with an `image`
            column is transformed by the trainer; `label` and `attribute` columns stay.
        eval_dataset: as in `Trainer`. Where rows have an `attribute`, `compute_metrics` gets
            `label_ids=(labels, attributes)`; the model never sees it.
        pair_dataset: pairs, as one map-style or iterable data set or as a dict of them, one for each invariance. Rows
            hold `<main_input>_a` and `<main_input>_b`, e.g. `pixel_values_a`, or raw `image_a` and `image_b`. Without
            them the trainer is `Trainer`, but with `pair_source="batch"`, where the training set holds the pairs.
        processing_class, model_init, callbacks, optimizers: as in `Trainer`.
        compute_metrics: as in `Trainer`, e.g. [`~metrics.GroupMetrics`].
        head: dotted path of the last linear layer, or several, where it is not found by itself (see `find_head`).
        **trainer_kwargs: every other argument of `Trainer`.

    Raises:
        ValueError: at construction, for settings, data or a model that cannot work.
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
        head: str | Sequence[str] | None = None,
        **trainer_kwargs: Any,
    ):
        args = args or IPGConfig(output_dir="tmp_trainer")
        if not isinstance(args, IPGConfig):
            raise ValueError(f"args is a {type(args).__name__}: make it an IPGConfig, which takes the same arguments.")
        if model is not None and not isinstance(model, PreTrainedModel) and hasattr(model, "pretrained_cfg"):
            raise ValueError(f"model is the timm module {type(model).__name__}: pass load_image_classifier(model).")
        sets = named_sets(pair_dataset)
        self.pair_datasets = {name: dataset for name, dataset in sets.items() if dataset is not None}
        in_batch = args.pair_source == "batch"
        if in_batch and self.pair_datasets:
            raise ValueError("pair_source='batch' takes its pairs from train_dataset: leave pair_dataset out.")
        self.is_guided = bool(self.pair_datasets) or (in_batch and train_dataset is not None)
        self.head_path = head
        self._resumed_from: str | None = None
        self._guided_state = None  # the TrainerState of the training run that the pair loaders belong to
        self._task_state = None  # likewise of the objective's group weights
        self._pair_loaders: dict[str, PairLoader | AdversarialLoader] = {}
        self._at_end = ExitStack()

        trainer_kwargs |= {"compute_metrics": compute_metrics, "callbacks": callbacks, "optimizers": optimizers}
        super().__init__(
            model, args, data_collator, train_dataset, eval_dataset, processing_class, model_init, **trainer_kwargs
        )
        for callback in [RowEpochs(), *([SaveAtStepEnd(self)] if args.enable_jit_checkpoint else [])]:
            self.add_callback(callback)

        # ---- Data and guidance
        num_labels = getattr(getattr(self.model, "config", None), "num_labels", None)
        check_labels(train_dataset, "train_dataset", num_labels)
        for name, dataset in named_sets(eval_dataset).items():
            check_labels(dataset, title_of("eval_dataset", name), num_labels)
        self._inputs = forward_inputs(self.model)
        self._row_columns = row_columns(args.objective)
        self._row_columns += [f"{name}_b" for name in self._inputs] if in_batch else []
        self._pair_collator = PairCollator(self._inputs, self._inputs[0])
        self._computes_loss = self.compute_loss_func is None and not takes_labels(self.model)
        if self._computes_loss:
            # of the model that is trained then: model_init makes others
            self.compute_loss_func = lambda *outputs_and_labels, **kwargs: classification_loss(
                self.model, *outputs_and_labels, **kwargs, smoothing=args.label_smoothing_factor
            )
            self.label_names = self.label_names or ["labels"]
        args.check_together(is_compiled=self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO)
        self._running_norm = RunningNorm() if args.running_norm else None
        self._task: TaskObjective | None = None
        if args.objective != "erm":
            if self.compute_loss_func is not None and not self._computes_loss:
                raise ValueError(f"objective={args.objective!r} computes the loss: leave compute_loss_func out.")
            self._task = TaskObjective(args, self.model, train_dataset)
            self.add_callback(GroupShares())
            self.model_accepts_loss_kwargs = True  # its loss is that of the whole step: nothing more is to be divided
        if self.is_guided:
            self._prepare_guidance()

    def _prepare_guidance(self) -> None:
        check_launch(self.accelerator, self.args.n_gpu, self.is_model_parallel, self.args.optim.value)
        labels = self.args.pair_objective == "augmentation"
        self._with_labels = PairCollator(self._inputs, self._inputs[0], labels=labels)
        wanted = self.args.per_device_pair_batch_size * self.args.world_size
        for name, dataset in self.pair_datasets.items():
            title = title_of("pair_dataset", name)
            check_pair_labels(dataset, title)
            source = dataset.source if isinstance(dataset, AdversarialPairs) else dataset
            check_pair_stream(source, title, every_row=self.args.check_pairs)
            inputs = self._as_inputs(source, is_training=True, seed=self.args.pair_order_seed(name))
            if isinstance(dataset, AdversarialPairs):
                inputs = Twins(dataset, inputs, self._inputs[0])
            self.pair_datasets[name] = dataset = inputs
            check_pair_set(dataset, title, self._pair_collator, every_row=self.args.check_pairs, per_step=wanted)
            if labels and not is_stream(dataset):
                self._with_labels([dataset[0]])
            if self.args.pair_cache != "none":
                check_cacheable(dataset, title, self.args.pair_cache)
        if self.args.pair_source == "batch":
            check_in_batch(self.args, self.model, self.accelerator)
        elif not self.args.holds_norm:
            warn_of_batch_statistics(self.model)
        parameters_matching(self.model, self.args.corrective_layers)
        self.head = self._proven_head()
        self.progress = PairProgress()
        self.add_callback(self.progress)
        # Several models (ResNet among them) ignore `num_items_in_batch` but are taken to have divided by it
        # (transformers issue 47688): here compute_loss does the division for every model.
        if self.compute_loss_func is None and self.label_smoother is None:
            self.model_accepts_loss_kwargs = True

    # ---- Data ----

    def _as_inputs(self, dataset: Any, is_training: bool, seed: int) -> Any:
        """Raw images through the image processor; any other data set as it is."""
        if not isinstance(self.processing_class, (BaseImageProcessor, ImageProcessingMixin)):
            return dataset
        draws = {"random_flip": self.args.random_flip, "random_crop_scale": self.args.random_crop_scale}
        draws = draws if is_training else {}
        main_input, keep = self._pair_collator.main_input, ("label", "labels", "label_ids", *self._row_columns)
        return as_model_inputs(dataset, self.processing_class, main_input, keep=keep, **draws, seed=seed)

    def _get_dataloader(self, dataset, description, batch_size, sampler_fn=None, is_training=False, **kwargs):
        dataset = self._as_inputs(dataset, is_training, self.args.data_order_seed)
        return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in self._row_columns if name not in self._signature_columns]

    def _pair_loader(self, name: str, module: nn.Module, problem_type: ProblemType) -> PairLoader | AdversarialLoader:
        loader = loader_of(self.args, self.pair_datasets[name], self._with_labels, name)
        self._at_end.callback(loader.close)
        loader.position = self.progress.positions.get(name, 0)
        if not isinstance(loader.dataset, Twins):
            return loader
        search = partial(search_partners, self.head.run, module, problem_type=problem_type)
        searching = AdversarialLoader(loader, search, self, chunk_size=self.args.pair_chunk_size)
        if self._resumed_from:
            searching.load(self._resumed_from, name)
        return searching

    def _proven_head(self, dataset: Any = None) -> ClassifierHead:
        if dataset is None and self.args.pair_source == "batch":
            rows = self._as_inputs(self.train_dataset, is_training=True, seed=self.args.data_order_seed)
            pair = self._prepare_inputs(first_pair(rows, self._inputs))
        else:
            dataset = next(iter(self.pair_datasets.values())) if dataset is None else dataset
            # by a loader: random transforms must not draw from the global generators, whose state a resume restores
            pair = self._prepare_inputs(next(PairLoader(dataset, self._pair_collator, 1, seed=self.args.seed)))
        head = find_head(self.model, self.head_path, pair)
        head.verify(self.model, pair)
        return head

    # ---- The step ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As `Trainer.create_optimizer`; before it, when the model is whole for the last time, the head is proven anew:
        it may have been replaced since construction (`reset_classifier`, `model_init`)."""
        if self.is_guided:
            self.head = self._proven_head()
        return super().create_optimizer(model)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        """As `Trainer.train`.

        Raises:
            ValueError: resuming a run whose updates have separate optimizer states, which checkpoints do not hold.
        """
        if resume_from_checkpoint and self.is_guided and not self.args.shared_optimizer_state:
            raise ValueError("shared_optimizer_state=False cannot be resumed: checkpoints hold one optimizer state.")
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_checkpoint(self.args.output_dir)
        self._resumed_from = resume_from_checkpoint
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self._guided_state = self._task_state = None
            self._at_end.close()

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As `Trainer.training_step`, the guidance before an optimizer step's first micro-batch and after its last."""
        if self.is_guided:
            if self._guided_state is not self.state:
                self._begin_guidance(model, inputs)
            self._guided_step.begin(model)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            if self.is_guided:
                self._guided_step.end(model)
            if self._running_norm is not None:
                self._running_norm.end_step(self.accelerator)
            if self._task is not None:
                self._task.end_step(self.accelerator)
        return loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """As `Trainer.get_batch_samples`; an objective over groups counts the step's rows of each."""
        batches, count = super().get_batch_samples(*args, **kwargs)
        if self._task is not None and batches:
            if self._task_state is not self.state:
                self._task.shares = restored(GroupShares, self.callback_handler.callbacks, self.state)[0]
                self._task_state = self.state
            self._task.begin_step(batches, self.accelerator)
        return batches, count

    def _begin_guidance(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Called at the first step of each training run, when the state of a checkpoint has been loaded."""
        self._at_end.close()  # an attempt that auto_find_batch_size gave up
        self.progress = PairProgress.resumed(self.callback_handler.callbacks, self.state)
        problem_type = find_problem_type(self.model, inputs.get("labels"))
        module = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        self._pair_loaders |= {name: self._pair_loader(name, module, problem_type) for name in self.pair_datasets}
        self._at_end.callback(self._pair_loaders.clear)  # and with them the pairs that are kept in memory
        if self._running_norm is not None:
            self._at_end.callback(self._running_norm.clear)
        compiler = self.accelerator.state.dynamo_plugin
        forward: Callable[..., tuple[Tensor, Tensor]] = self.head.run
        if compiler.backend != DynamoBackend.NO:
            forward = CompiledRun(self.head, **compiler.to_kwargs())
            self._at_end.callback(forward.close)
        if self.args.pair_source == "batch":
            self._guided_step: GuidedStep = InBatchStep(self, forward, problem_type)
        else:
            self._guided_step = GuidedStep(self, forward, self._pair_loaders, problem_type)
        self._guided_state = self.state

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As `Trainer.compute_loss`, without the `attribute` column; with pairs, exact under accumulation (R6)."""
        if not model.training:
            return self._task_loss(model, inputs, return_outputs, num_items_in_batch)
        with ExitStack() as around:
            if self.args.holds_norm:
                for layer in norm_layers(self.model):
                    layer.eval()
            if self.is_guided and self.args.pair_source == "batch":
                around.enter_context(self._guided_step.watching(model, inputs))
            if self._running_norm is not None:
                around.enter_context(self._running_norm.collecting(self.model))
            return self._task_loss(model, inputs, return_outputs, num_items_in_batch)

    def _task_loss(self, model, inputs, return_outputs, num_items_in_batch):
        given, inputs = inputs, self._of_the_model(inputs)
        if self._task is not None and model.training:
            outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
            loss = self._task.loss(logits_of(outputs), given, self.accelerator, self.state.global_step)
            return (loss, outputs) if return_outputs else loss
        if self._task is not None:
            num_items_in_batch = None  # Trainer has a count in evaluation too, which timm's forward does not take
        if not self.is_guided or self.compute_loss_func is not None or self.label_smoother is not None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if num_items_in_batch is not None:
            # the batch's mean, weighted by its share of what is accumulated and, in DDP's mean, of all processes
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            count = inputs["labels"].ne(-100).sum().to(torch.promote_types(loss.dtype, torch.float32))
            loss = loss * (count / num_items_in_batch * processes)
        return (loss, outputs) if return_outputs else loss

    def _of_the_model(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in inputs.items() if name in self._inputs or name not in self._row_columns}

    # ---- Evaluation ----

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """As `Trainer.prediction_step`; with an `attribute` column the labels are (labels, attributes)."""
        attributes = inputs.get(ATTRIBUTE)
        inputs = self._of_the_model(inputs)
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        logits = logits[0] if self._computes_loss and isinstance(logits, tuple) else logits
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
        dataset = self._as_inputs(pair_dataset, is_training=False, seed=0)
        check_pair_set(dataset, "pair_dataset", self._pair_collator, every_row=False)
        own = torch.Generator()  # measuring during training must not draw from the global one
        batches = DataLoader(dataset, self.args.eval_batch_size, collate_fn=self._pair_collator, generator=own)
        head, settings = self._proven_head(dataset), pair_settings(self.args, find_problem_type(self.model, None))
        with self.compute_loss_context_manager():
            measured = correction.evaluate_sides(head, self.model, map(self._prepare_inputs, batches), **settings)
        return {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}

    # ---- Logs and checkpoints ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`; training logs get the `ipg/...` means over the steps since the last."""
        if self.is_guided and "loss" in logs:
            logs = {**logs, **self.progress.pop(self.args.alpha, self.args.learning_rate)}
        super().log(logs, start_time)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        super()._issue_warnings_after_load(load_result)
        check_all_loaded(self.model, load_result.missing_keys)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # with save_strategy="best" Trainer keeps what this calls a new best alone, and not what SIGTERM asks for
        callbacks = [callback for callback in self.callback_handler.callbacks if isinstance(callback, SaveAtStepEnd)]
        return super()._determine_best_metric(metrics, trial) or any(callback.stopping for callback in callbacks)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = os.path.join(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        with whole_or_removed(folder, writes=self.args.should_save), own_names(self.model):
            os.makedirs(folder, exist_ok=True)
            for name, loader in self._pair_loaders.items():  # before Trainer pushes the folder
                if isinstance(loader, AdversarialLoader):
                    loader.save(folder, name)
            super()._save_checkpoint(model, trial)
