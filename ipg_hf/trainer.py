# SPDX-License-Identifier: Apache-2.0
"""`IPGTrainer`: `transformers.Trainer` with invariance pair-guided updates."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.utils import DynamoBackend
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate
from transformers import PreTrainedModel, Trainer, default_data_collator
from transformers.image_processing_base import ImageProcessingMixin
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .callbacks import GroupShares, PairProgress, RowEpochs, SaveAtStepEnd, restored
from .checkpoints import newest_checkpoint, own_names, whole_or_removed
from .config import IPGConfig, chooses_by_pairs
from .gradients import check_optimizer, parameters_matching
from .guidance import ROOT_FLOOR, invariance_divergence, rationale_divergence, root_divergence
from .heads import ClassifierHead, CompiledRun, find_head
from .hub.publish import PublishingTrainer
from .inference import inference, logits_of
from .losses import ATTRIBUTE, GroupLoss, classification_loss, find_problem_type
from .metrics import IGNORED, OF_PAIRS, is_higher_better, metric_of, training_group_counts
from .models import check_all_loaded, check_can_be_saved, forward_inputs, takes_labels, without_aliases
from .moved import trainer_for
from .norms import RunningNorm, norm_layers, warn_of_batch_statistics
from .pairs.adversarial import AdversarialLoader, AdversarialPairs, SameImagePairs
from .pairs.checks import (
    LABEL_COLUMNS,
    ONLY_SET,
    PAIR_LABELS,
    check_labels,
    check_pair_labels,
    check_pair_set,
    check_pair_stream,
    first_label,
    named_sets,
    title_of,
)
from .pairs.classes import shown
from .pairs.held_out import hold_out_pairs
from .pairs.loader import PairCollator, PairLoader, is_stream
from .pairs.transforms import ImageRows, as_model_inputs
from .rates import set_rates
from .seeding import first_row
from .sets import (
    check_columns,
    check_names,
    check_pair_columns,
    check_row,
    class_columns,
    names_for_training,
    pair_sets,
    with_attribute_ids,
)
from .step import GuidedStep, check_launch

logger = logging.get_logger(__name__)


def _checked_batch(collator: Callable, title: str, inputs: Sequence[str], rows: Sequence[Any]) -> Any:
    check_row(rows[0], title, inputs)  # of a stream: no row is known before
    return collator(rows)


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
        data_collator: an argument of `Trainer`, for training and evaluation batches; pairs have their own collator.
        train_dataset: an argument of `Trainer`. With an image processor as `processing_class`, the trainer transforms
            a `datasets` set with an `image` column; its `label` and `attribute` columns stay.
        eval_dataset: an argument of `Trainer`. The model never sees the column `attribute`.
        pair_dataset: pairs, as one map-style or iterable data set, or as a dict of sets, one for each attribute to
            ignore. Rows hold `<main_input>_a` and `<main_input>_b`, e.g. `pixel_values_a`, or raw `image_a` and
            `image_b`, and if it is known `label`. Without pairs the trainer is `Trainer`.
        eval_pair_dataset: held-out pairs, in the same forms but no stream. Each evaluation during training measures
            them (`eval_flip_rate`, `eval_pair_accuracy`, ...), so that `metric_for_best_model="pair_accuracy"` chooses
            a checkpoint without an attribute. If that setting names a metric of pairs and none are given, a fifth of
            the training pairs is held out.
        processing_class, model_init, callbacks, optimizers: arguments of `Trainer`.
        compute_metrics: an argument of `Trainer`, e.g. [`~metrics.GroupMetrics`]. A metric with the attribute
            `takes_attributes = True`, as `GroupMetrics`, gets `label_ids=(labels, attributes)` where rows have an
            `attribute`; any other metric gets the labels alone.
        head: dotted path of the last linear layer, or several paths, where `find_head` does not find it.
            `invariance_distance="divergence"` needs no head; one that is given here is proven in any case.
        **trainer_kwargs: every other argument of `Trainer`.

    Raises:
        ValueError: at construction, for settings, data or a model that cannot work.
    """

    _tag_names = ("ipg",)
    config_class: type[IPGConfig] = IPGConfig
    step_class: type[GuidedStep] = GuidedStep
    row_columns: tuple[str, ...] = (ATTRIBUTE,)  # of training rows, beside image and label
    _kept_columns: Sequence[str] = ()  # of row_columns, by the data loader that is made

    def __new__(cls, model: Any = None, args: Any = None, *_: Any, **__: Any) -> IPGTrainer:
        """Makes the trainer of a baseline for a config that was made with moved options (see `moved`)."""
        return super().__new__(trainer_for(cls, args))

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: IPGConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        *,
        pair_dataset: Any = None,
        eval_pair_dataset: Any = None,
        head: str | Sequence[str] | None = None,
        **trainer_kwargs: Any,
    ):
        args = args or self.config_class(output_dir="tmp_trainer")
        if not isinstance(args, self.config_class):
            wanted = self.config_class.__name__
            raise ValueError(f"args is a {type(args).__name__}: make it a {wanted}, which takes the same arguments.")
        if model is not None and not isinstance(model, PreTrainedModel) and hasattr(model, "pretrained_cfg"):
            raise ValueError(f"model is the timm module {type(model).__name__}: pass load_image_classifier(model).")
        self.pair_datasets = pair_sets(pair_dataset, "pair_dataset")
        self.eval_pair_datasets = pair_sets(eval_pair_dataset, "eval_pair_dataset")
        self._prefix_of_pairs: str | None = None  # of the metrics of held-out pairs that an evaluation still has to add
        self.is_guided = bool(self.pair_datasets)
        self.head_path = head
        self.head: ClassifierHead | None = None
        self.method_facts: dict[str, Any] = {}  # what a subclass adds to the run record
        self._resumed_from: str | None = None
        self._guided_state = None  # the TrainerState of the training run that the pair loaders belong to
        self._loss_state = None  # the TrainerState of the training run that the group weights belong to
        self._pair_loaders: dict[str, PairLoader | AdversarialLoader] = {}
        self._at_end = ExitStack()
        self._optimizer_by_layer: torch.optim.Optimizer | None = None  # the one that has the rates of the settings

        trainer_kwargs |= {"compute_metrics": compute_metrics, "callbacks": callbacks, "optimizers": optimizers}
        super().__init__(
            model, args, data_collator, train_dataset, eval_dataset, processing_class, model_init, **trainer_kwargs
        )
        check_can_be_saved(self.model)
        if args.has_layer_rates and self.optimizer is not None:
            raise ValueError(
                "layer_lr_decay and head_learning_rate set the rates of the optimizer that the trainer makes, but "
                f"optimizers= gives it a {type(self.optimizer).__name__}: leave the two out, or the optimizer."
            )
        held_out = {} if self.eval_pair_datasets or not chooses_by_pairs(args) else dict(self.pair_datasets)
        for name, dataset in held_out.items():
            title, seed = title_of("pair_dataset", name), self._pair_seed(name)
            self.pair_datasets[name], self.eval_pair_datasets[name] = hold_out_pairs(dataset, title, seed=seed)
            held = len(self.eval_pair_datasets[name])
            logger.info(f"{held} of {len(dataset)} pairs of {title} are held out, for metric_for_best_model.")
        if args.random_flip or args.random_crop_scale < 1 or getattr(train_dataset, "is_random", False):
            self.add_callback(RowEpochs())
        if args.enable_jit_checkpoint:
            self.add_callback(SaveAtStepEnd(self))

        # ---- Data
        self._inputs = forward_inputs(self.model)
        self._check_sets(has_own_collator=data_collator is not None)
        self._pair_collator = PairCollator(self._inputs, self._inputs[0])
        # once, from the model and the data set: a batch may have soft labels (mixup)
        self.problem_type = find_problem_type(self.model, first_label(train_dataset))

        # ---- Task loss
        self._computes_loss = self.compute_loss_func is None and not takes_labels(self.model)
        if self._computes_loss:
            # self.model at the time of the call: model_init makes others
            self.compute_loss_func = lambda *outputs_and_labels, **kwargs: classification_loss(
                self.model, *outputs_and_labels, **kwargs, smoothing=args.label_smoothing_factor
            )
            self.label_names = self.label_names or ["labels"]
        if args.running_norm and self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
            raise ValueError(
                "running_norm=True does not combine with a compiled model (accelerate launch --dynamo...)."
            )
        self._running_norm = RunningNorm() if args.running_norm else None
        self.task_loss = None if args.objective == "erm" else self._make_task_loss()
        if self.task_loss is not None:
            self.add_callback(GroupShares())
            self.model_accepts_loss_kwargs = True  # its loss is that of the whole step: nothing more is to be divided

        # ---- Pairs
        if self.is_guided:
            self._prepare_guidance()
        for name, dataset in self.eval_pair_datasets.items():
            self._check_held_out(dataset, title_of("eval_pair_dataset", name))

    def _check_sets(self, has_own_collator: bool) -> None:
        """Checks columns, labels and names of the training and evaluation sets, and numbers attributes by name.

        Raises:
            ValueError: a set cannot be used, or two of them give one number to classes of different names.
        """
        config, num_labels = getattr(self.model, "config", None), self._num_labels
        sets = {"train_dataset": self.train_dataset}
        sets |= {title_of("eval_dataset", name): dataset for name, dataset in named_sets(self.eval_dataset).items()}
        sets = {title: dataset for title, dataset in sets.items() if dataset is not None}
        own_loss = type(self).compute_loss is not IPGTrainer.compute_loss or self.compute_loss_func is not None
        for title, dataset in sets.items():
            is_training = title == "train_dataset"
            getter = "get_train_dataloader" if is_training else "get_eval_dataloader"
            makes_batches = has_own_collator and not self.args.remove_unused_columns
            if not makes_batches and getattr(type(self), getter) is getattr(Trainer, getter):
                check_columns(
                    dataset,
                    title,
                    self._inputs,
                    has_processor=self._has_image_processor(),
                    needs_label=not own_loss if is_training else self.compute_metrics is not None,
                    label_names=self.args.label_names or (),
                    num_labels=num_labels,
                    problem_type=getattr(config, "problem_type", None),
                )
            check_labels(dataset, title, num_labels)
        self._label_columns = class_columns(sets, LABEL_COLUMNS)
        own = names_for_training(self.model, self._label_columns)
        check_names(self._label_columns | self._label_columns_of_pairs(), own)
        check_names(class_columns(sets, [ATTRIBUTE]))
        used = {
            t: d for t, d in sets.items() if (t != "train_dataset" and self._takes_attributes()) or self._by_group()
        }
        # names of attributes in the order of the metrics' training set, and whether it has them all
        settings = getattr(self.compute_metrics, "settings", {}) if self._takes_attributes() else {}
        count = settings.get("num_attributes")
        known = settings.get("attribute_names") or (list(map(str, range(count))) if count else None)
        used, names = with_attribute_ids(used, known, all_known=bool(count))
        self._attribute_names = {"known": names, "all_known": bool(count)}
        sets |= used
        self.train_dataset = sets.get("train_dataset")
        is_dict = isinstance(self.eval_dataset, Mapping)
        evaluated = {name: sets.get(title_of("eval_dataset", name)) for name in named_sets(self.eval_dataset)}
        self.eval_dataset = evaluated if is_dict else evaluated[ONLY_SET]

    def _label_columns_of_pairs(self) -> dict[str, Any]:
        sets = {title_of("pair_dataset", name): pairs for name, pairs in self.pair_datasets.items()}
        sets |= {title_of("eval_pair_dataset", name): pairs for name, pairs in self.eval_pair_datasets.items()}
        for title, pairs in sets.items():
            if self.pairs_with_labels:
                check_labels(pairs, title, self._num_labels)
            check_pair_columns(
                pairs,
                title,
                self._inputs[0],
                has_processor=self._has_image_processor(),
                uses_labels=self.pairs_with_labels or title.startswith("eval"),
            )
            check_names(class_columns({title: pairs}, ["attribute_a", "attribute_b"]))
        return class_columns(sets, PAIR_LABELS)

    def _check_measured(self, dataset: Any, title: str) -> None:
        """Raises a ValueError if a set that is measured has a label out of range, or numbers its classes otherwise."""
        check_labels(dataset, title, self._num_labels)
        columns = class_columns({title: dataset}, {*LABEL_COLUMNS, *PAIR_LABELS})
        check_names(self._label_columns | columns, names_for_training(self.model, {}))

    @property
    def _num_labels(self) -> int | None:
        return getattr(getattr(self.model, "config", None), "num_labels", None)

    def _takes_attributes(self) -> bool:
        """Whether the user's metrics ask for the attributes of the rows."""
        return getattr(self.compute_metrics, "takes_attributes", False)

    def _by_group(self) -> bool:
        """Whether the task loss needs the attributes of the training rows."""
        return self.args.objective in ("group_dro", "reweight")

    @property
    def method(self) -> str:
        """The method that a run record names."""
        return "ipg" if self.is_guided else "erm"

    @property
    def pairs_with_labels(self) -> bool:
        """Whether a batch of labelled pairs holds `labels` too."""
        return self.args.pair_loss_weight > 0

    @property
    def needs_pair_labels(self) -> bool:
        """Whether pairs without labels cannot be trained with."""
        return False

    def _make_task_loss(self) -> GroupLoss:
        """The loss of an objective over groups.

        Raises:
            ValueError: the objective cannot be computed for this model or data.
        """
        objective = self.args.objective
        column = "label" if objective == "class_balanced" else ATTRIBUTE
        stored = self._stored_training_set(objective, column)
        counts = torch.from_numpy(training_group_counts(stored, by_attribute=column == ATTRIBUTE))
        return GroupLoss(objective, counts, self.args.group_dro_step_size, self.args.label_smoothing_factor)

    def _stored_training_set(self, objective: str, column: str) -> datasets.Dataset:
        """The training set as a `datasets.Dataset` with the column that an objective reads.

        Raises:
            ValueError: there is none, the trainer was given another loss, or the problem has not one class an image.
        """
        if self.compute_loss_func is not None and not self._computes_loss:
            raise ValueError(f"objective={objective!r} computes the loss: leave compute_loss_func out.")
        if self.problem_type != "single_label_classification":
            raise ValueError(f"objective={objective!r} needs one class an image, but this is {self.problem_type}.")
        stored = self.train_dataset.dataset if isinstance(self.train_dataset, ImageRows) else self.train_dataset
        if not isinstance(stored, datasets.Dataset) or column not in stored.column_names:
            found = stored.column_names if isinstance(stored, datasets.Dataset) else type(stored).__name__
            raise ValueError(
                f"objective={objective!r} needs a train_dataset (datasets.Dataset) with a column {column!r}, but it "
                f"has {found}."
            )
        return stored

    def _prepare_guidance(self) -> None:
        check_launch(self.accelerator, self.args.n_gpu, self.is_model_parallel, self.args.optim.value)
        wanted = self.args.per_device_pair_batch_size * self.args.world_size
        for name, dataset in self.pair_datasets.items():
            title = title_of("pair_dataset", name)
            check_pair_labels(dataset, title)
            source = dataset.source if isinstance(dataset, AdversarialPairs) else dataset
            check_pair_stream(source, title, every_row=self.args.check_pairs)
            inputs = self._as_inputs(source, is_training=True, seed=self._pair_seed(name))
            if isinstance(dataset, AdversarialPairs):
                inputs = SameImagePairs(dataset, inputs, self._inputs[0])
            self.pair_datasets[name] = dataset = inputs
            check_pair_set(dataset, title, self._pair_collator, every_row=self.args.check_pairs, per_step=wanted)
            if self.pairs_with_labels and not is_stream(dataset):
                self._check_pair_label(dataset, title)
        if not self.args.uses_running_statistics:
            warn_of_batch_statistics(self.model)
        parameters_matching(self.model, self.args.corrective_layers)
        self.head = self._find_needed_head()
        self.progress = PairProgress(type(self).__name__)
        self.add_callback(self.progress)
        # Several models (ResNet among them) ignore `num_items_in_batch` but are taken to have divided by it
        # (transformers issue 47688): here compute_loss does the division for every model.
        # A compute_loss of the user's own divides, or is divided, as in `Trainer`.
        overridden = type(self).compute_loss is not IPGTrainer.compute_loss
        if self.compute_loss_func is None and self.label_smoother is None and not overridden:
            self.model_accepts_loss_kwargs = True

    def _check_pair_label(self, pairs: Any, title: str) -> None:
        """Raises a ValueError if the first pair has a label that gives no loss, or lacks one that is needed."""
        row = first_row(pairs)
        if "label" not in row:
            if self.needs_pair_labels:
                raise ValueError(f"{title} needs a column 'label' for the loss of its sides, but has {sorted(row)}.")
            return
        if row["label"] is None:
            raise ValueError(f"{title} has no label in row 0: give it one, or {IGNORED} where it is not known.")
        label = torch.as_tensor(row["label"])
        wanted = {
            "single_label_classification": ("one class an image (its number, an integer)", ()),
            "multi_label_classification": (f"{self._num_labels} labels, 0 or 1 each", (self._num_labels,)),
            "regression": (f"{self._num_labels} outputs (as many numbers)", (self._num_labels,)),
        }
        what, shape = wanted[self.problem_type]
        fits = tuple(label.shape) == shape or (self.problem_type == "regression" and label.numel() == self._num_labels)
        if not fits or (not shape and label.is_floating_point()):
            raise ValueError(
                f"{title} has the label {label.tolist()} in row 0, but the model has {what}. Make it so, remove the "
                "column 'label', or read no labels of pairs: pair_loss_weight=0."
            )

    def _check_held_out(self, dataset: Any, title: str) -> None:
        if is_stream(dataset) or isinstance(dataset, AdversarialPairs):
            raise ValueError(
                f"{title} is a {type(dataset).__name__}: give a stored set of pairs, of a stream for example "
                "datasets.Dataset.from_list(list(stream.take(500)))."
            )
        check_pair_labels(dataset, title)
        self._check_measured(dataset, title)
        inputs = self._as_inputs(dataset, is_training=False, seed=0)
        check_pair_set(inputs, title, self._pair_collator, every_row=self.args.check_pairs)
        self._find_needed_head(inputs, trains=False)
        has_labels = self._has_labels(inputs, title)
        if metric_of(self.args.metric_for_best_model or "") == "pair_accuracy" and not has_labels:
            raise ValueError(
                f"metric_for_best_model={self.args.metric_for_best_model!r} needs one class a pair, but {title} has no "
                f"column 'label', or the problem is {self.problem_type}: add the column, or choose by 'flip_rate'."
            )

    def _has_labels(self, pairs: Any, title: str) -> bool:
        """Whether the pairs, as model inputs, have one class a pair.

        Raises:
            ValueError: the first pair has several numbers as label, and the model one class an image.
        """
        row = first_row(pairs)
        if self.problem_type != "single_label_classification" or "label" not in row:
            return False
        if np.ndim(row["label"]):
            raise ValueError(
                f"{title} has the label {np.asarray(row['label']).tolist()} in row 0, but a pair must have one class: "
                "make one number of it, or remove the column 'label'."
            )
        return True

    # ---- Data ----

    def _has_image_processor(self) -> bool:
        return isinstance(self.processing_class, ImageProcessingMixin)

    def _as_inputs(self, dataset: Any, is_training: bool, seed: int) -> Any:
        """Raw images through the image processor; any other data set as it is."""
        if not self._has_image_processor():
            return dataset
        draws = {"random_flip": self.args.random_flip, "random_crop_scale": self.args.random_crop_scale}
        draws = draws if is_training else {}
        main_input, keep = self._pair_collator.main_input, (*LABEL_COLUMNS, *self._needed_columns(is_training))
        return as_model_inputs(dataset, self.processing_class, main_input, keep=keep, **draws, seed=seed)

    def _get_dataloader(self, dataset, description, batch_size, sampler_fn=None, is_training=False, **kwargs):
        if not is_training:
            self._check_measured(dataset, f"the {description.lower()} set")
        if not is_training and self._takes_attributes():
            dataset = with_attribute_ids({description: dataset}, **self._attribute_names)[0][description]
        self._signature_columns, self._kept_columns = None, self._needed_columns(is_training)
        dataset = self._as_inputs(dataset, is_training, self.args.data_order_seed)
        return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, **kwargs)

    def _get_collator_with_removed_columns(self, data_collator: Callable, description: str | None = None) -> Callable:
        collator = super()._get_collator_with_removed_columns(data_collator, description)
        if data_collator is not default_data_collator:
            return collator
        return partial(_checked_batch, collator, f"the {description} set".lower(), self._inputs)

    def _check_own_loader(self, loader: Any, getter: str) -> None:
        """Raises a ValueError if an overridden getter gives raw images to a collator that makes no batch of them."""
        is_own = isinstance(loader, DataLoader) and getattr(type(self), getter) is not getattr(Trainer, getter)
        if not is_own or loader.collate_fn not in (default_collate, default_data_collator):
            return
        if is_stream(loader.dataset) or not len(loader.dataset):
            return
        row = first_row(loader.dataset)
        images = [name for name, value in row.items() if isinstance(value, Image)] if isinstance(row, Mapping) else []
        if images and self._inputs[0] not in row:
            raise ValueError(
                f"{type(self).__name__}.{getter} loads raw images ({shown(images)}) without the image processor: call "
                f"super().{getter}(), which applies it (processing_class), and override _get_train_sampler to choose "
                "rows. Or load ipg_hf.pairs.ImageRows(dataset, processor, "
                f"{{{images[0]!r}: {self._inputs[0]!r}}}, keep=['label'])."
            )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in self._kept_columns if name not in self._signature_columns]

    def _needed_columns(self, is_training: bool) -> list[str]:
        """The columns of rows, beside image and label, that the task loss, the metrics or the model need."""
        by_loss = is_training and self.task_loss is not None
        by_metric = not is_training and self._takes_attributes()
        return [
            name for name in self.row_columns if by_loss or (by_metric and name == ATTRIBUTE) or name in self._inputs
        ]

    def _pair_seed(self, name: str) -> int:
        """Seed of the order and the augmentation of a pair set; it does not depend on the other sets."""
        seed = self.args.data_order_seed
        return seed if name == ONLY_SET else seed + 1 + zlib.crc32(name.encode())

    def _pair_loader(self, name: str, module: nn.Module) -> PairLoader | AdversarialLoader:
        loader = PairLoader(
            self.pair_datasets[name],
            PairCollator(self._inputs, self._inputs[0], labels=self.pairs_with_labels),
            self.args.per_device_pair_batch_size,
            seed=self._pair_seed(name),
            rank=self.args.process_index,
            world_size=self.args.world_size,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
        )
        self._at_end.callback(loader.close)
        loader.position = self.progress.positions.get(name, 0)
        if not isinstance(loader.dataset, SameImagePairs):
            return loader
        searching = AdversarialLoader(loader, module, self, self.problem_type, chunk_size=self.args.pair_chunk_size)
        if self._resumed_from:
            searching.load(self._resumed_from, name)
        return searching

    # ---- The head ----

    def needs_head(self) -> bool:
        """Whether what the pairs minimise is computed from the classifier head."""
        return self.args.invariance_distance != "divergence"

    def _find_needed_head(self, dataset: Any = None, *, trains: bool = True) -> ClassifierHead | None:
        """The head, proven on a pair of the data set, by default of the first pair set; None where none is needed.

        Args:
            dataset: pairs as model inputs.
            trains: whether the pairs train the model. Pairs that are measured need a head for the distance alone; a
                model without one has no such metric.

        Raises:
            ValueError: no head is found for the training, or the one that the user gave is none.
        """
        needed = self.needs_head() if trains else self.args.invariance_distance != "divergence"
        if not needed and self.head_path is None:
            return None
        dataset = next(iter(self.pair_datasets.values())) if dataset is None else dataset
        # by a loader: random transforms must not draw from the global generators, whose state a resume restores
        pair = self._prepare_inputs(next(PairLoader(dataset, self._pair_collator, 1, seed=self.args.seed)))
        try:
            head = find_head(self.model, self.head_path, pair)
            head.verify(self.model, pair)
        except ValueError as failure:
            if not trains and self.head_path is None:
                return None
            raise ValueError(f"{failure} {self.step_class.without_head}" if needed else str(failure)) from None
        return head

    # ---- The step ----

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, *args: Any) -> tuple[Any, Any]:
        """As in `Trainer`. Before it, the head is found and proven anew, and a loader of the user's own is looked at.

        The head may have been replaced since construction (`reset_classifier`, `model_init`), and the model is not yet
        sharded here.
        """
        self._check_own_loader(train_dataloader, "get_train_dataloader")
        if self.is_guided:
            self.head = self._find_needed_head()
            check_optimizer(self.optimizer, self.model)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, *args)
        if self.args.has_layer_rates and self.optimizer.optimizer is not self._optimizer_by_layer:
            raise ValueError(
                "layer_lr_decay and head_learning_rate act in IPGTrainer.create_optimizer, but this optimizer was made "
                f"before they were set, or {type(self).__name__} overrides create_optimizer without super: leave the "
                "two out, or set trainer.optimizer = None before train()."
            )
        return prepared

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As `Trainer.create_optimizer`, with the learning rates of layers and head that the settings ask for."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.args.has_layer_rates:
            wrapped = self.model if model is None else model
            module = self.accelerator.unwrap_model(wrapped, keep_torch_compile=False)
            rate, head = self.args.head_learning_rate, set()
            if rate is not None:
                layers = (self.head or find_head(module, self.head_path)).layers
                head = {f"{path}.{name}" for path, layer in layers.items() for name, _ in layer.named_parameters()}
            set_rates(optimizer, module, self.args.layer_lr_decay, head, rate)
            self._optimizer_by_layer = optimizer
        return optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        """As `Trainer.train`; `resume_from_checkpoint=True` goes on from the newest whole checkpoint."""
        self.args.check()  # a search changes settings after construction
        metric = self.args.metric_for_best_model
        if metric_of(metric or "") == "pair_accuracy" and not self.eval_pair_datasets:
            raise ValueError(
                f"metric_for_best_model={metric!r} is measured on held-out pairs: give them as eval_pair_dataset."
            )
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_checkpoint(self.args.output_dir)
        self._resumed_from = resume_from_checkpoint
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self._guided_state = self._loss_state = None
            self._at_end.close()

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        """As in `Trainer`, for a training that goes on: not past its last step, and not without its pairs.

        Raises:
            ValueError: the checkpoint is of a training with a pair set that this trainer does not have.
        """
        updates_per_epoch, num_epochs, resumed, trial = args
        begun = super()._init_training_state(max_steps, updates_per_epoch, num_epochs, resumed, trial)
        if not self.state.global_step:
            return begun
        saved = self.state.stateful_callbacks.get(PairProgress.__name__) or {}
        before = [name or ONLY_SET for name in saved.get("attributes", {}).get("positions", {})]
        lost = [name for name in before if name not in self.pair_datasets]
        if lost:
            raise ValueError(
                f"{resumed} is of a training with pairs ({', '.join(map(repr, before))}), and pair_dataset lacks "
                f"{', '.join(map(repr, lost))}: give the same pairs, or begin a new training from the saved weights."
            )
        # Trainer makes one step before it looks whether the last has been made
        return (num_epochs, 0) if self.state.global_step >= max_steps else begun

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As `Trainer.training_step`, with the pairs before a step's first micro-batch and after its last."""
        if self.is_guided:
            if self._guided_state is not self.state:
                self._begin_guidance(model)
            self._guided_step.before_task(model)
            self.progress.is_called = True
        if self.task_loss is None:
            inputs = self._of_the_model(inputs)  # a user's compute_loss may pass on all that it gets
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            if self.is_guided:
                self._guided_step.after_task(model)
            if self._running_norm is not None:
                self._running_norm.end_step(self.accelerator)
            if self.task_loss is not None and not self.task_loss.was_used:
                raise ValueError(
                    f"objective={self.args.objective!r} is computed in IPGTrainer.compute_loss, and "
                    f"{type(self).__name__} overrides compute_loss without calling it: leave objective at 'erm', or "
                    "call super().compute_loss()."
                )
            if self.task_loss is not None:
                self.task_loss.end_step(self.accelerator)
        return loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """As `Trainer.get_batch_samples`; an objective over groups then counts the rows of each group."""
        batches, count = super().get_batch_samples(*args, **kwargs)
        if self.task_loss is not None and batches:
            if self._loss_state is not self.state:
                kept = restored(GroupShares, self.callback_handler.callbacks, self.state)[0]
                self.task_loss.begin_training(kept.shares)
                kept.loss, self._loss_state = self.task_loss, self.state
            self.task_loss.was_used = False
            if self._by_group() and ATTRIBUTE not in batches[0]:
                raise ValueError(
                    f"objective={self.args.objective!r} needs {ATTRIBUTE!r} in each batch, but the data loader of "
                    f"{type(self).__name__} gives {shown(batches[0])}: keep the column in its collator."
                )
            self.task_loss.begin_step(batches, self.accelerator)
        return batches, count

    def _begin_guidance(self, model: nn.Module) -> None:
        """Called at the first step of each training run, after the state of a checkpoint has been loaded."""
        self._at_end.close()  # an attempt that auto_find_batch_size gave up
        self.progress = PairProgress.resumed(self.callback_handler.callbacks, self.state)
        module = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        self._pair_loaders |= {name: self._pair_loader(name, module) for name in self.pair_datasets}
        self._at_end.callback(self._pair_loaders.clear)
        if self._running_norm is not None:
            self._at_end.callback(self._running_norm.clear)
        compiler, compiled = self.accelerator.state.dynamo_plugin, None
        if compiler.backend != DynamoBackend.NO:
            compiled = CompiledRun(self.head, **compiler.to_kwargs())
            self._at_end.callback(compiled.close)
        self._guided_step = self.step_class(self, self._pair_loaders, self.problem_type, compiled)
        self._guided_state = self.state

    def compute_loss_context_manager(self) -> ExitStack:
        """As `Trainer.compute_loss_context_manager`; in training, batch norm uses its running statistics if asked (R3).

        It stands here since users override `compute_loss` without super.
        """
        stack = super().compute_loss_context_manager()
        if self.model.training and self.args.uses_running_statistics:
            for layer in norm_layers(self.model):
                layer.eval()
            if self._running_norm is not None:
                stack.enter_context(self._running_norm.collecting(self.model))
        return stack

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As `Trainer.compute_loss`, without the `attribute` column; with pairs, exact under accumulation (R6)."""
        given, inputs = inputs, self._of_the_model(inputs)
        if self.task_loss is not None and model.training:
            outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
            self.task_loss.was_used = True
            loss = self.task_loss.loss(logits_of(outputs), given, self.accelerator, self.state.global_step)
            return (loss, outputs) if return_outputs else loss
        if self.task_loss is not None:
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

    def _of_the_model(self, inputs: Any) -> Any:
        if not isinstance(inputs, Mapping):
            return inputs  # a user's own loader and compute_loss may agree on tuples
        return {name: value for name, value in inputs.items() if name in self._inputs or name not in self.row_columns}

    # ---- Evaluation ----

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """As `Trainer.prediction_step`; for metrics that take attributes, the labels are (labels, attributes)."""
        attributes = inputs.get(ATTRIBUTE) if self._takes_attributes() else None
        inputs = self._of_the_model(inputs)
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        logits = logits[0] if self._computes_loss and isinstance(logits, tuple) else logits
        if attributes is not None and labels is not None:
            labels = (labels, self._prepare_input(attributes))
        return loss, logits, labels

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As `Trainer.evaluate`; with the trainer's own evaluation set, its held-out pairs are measured too."""
        if eval_dataset is None and self.eval_pair_datasets:
            self._prefix_of_pairs = metric_key_prefix
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._prefix_of_pairs = None

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.evaluation_loop`; the first of an evaluation adds the metrics of the held-out pairs."""
        is_test = description == "Prediction"  # as Trainer.predict says
        self._check_own_loader(dataloader, "get_test_dataloader" if is_test else "get_eval_dataloader")
        output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        prefix, self._prefix_of_pairs = self._prefix_of_pairs, None
        if prefix is not None:  # here, before they are logged and callbacks read them
            output.metrics.update(self.evaluate_pair_sets(self.eval_pair_datasets, prefix))
        return output

    def evaluate_pair_sets(self, pair_datasets: Any, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Measures one or several (held-out) pair sets by [`evaluate_pairs`].

        Args:
            pair_datasets: a map-style pair set, or a dict of them.
            metric_key_prefix: put before each key.

        Returns:
            The metrics of a set that is given alone. Of several sets `<prefix>_<set>/<metric>`, and `<prefix>_<metric>`
            of the set where the metric is worst.
        """
        if not isinstance(pair_datasets, Mapping) or [*pair_datasets] == [ONLY_SET]:
            return self.evaluate_pairs(named_sets(pair_datasets)[ONLY_SET], metric_key_prefix)
        of_sets = {name: self.evaluate_pairs(pairs, "") for name, pairs in pair_datasets.items()}
        names = [name for name in OF_PAIRS if any(f"_{name}" in found for found in of_sets.values())]
        measured = {f"{s}/{name}": f[f"_{name}"] for s, f in of_sets.items() for name in names if f"_{name}" in f}
        for name in names:
            worst = min if is_higher_better(name) else max
            measured[name] = worst(found[f"_{name}"] for found in of_sets.values() if f"_{name}" in found)
        return {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}

    @torch.no_grad()
    def evaluate_pairs(self, pair_dataset: Any, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Measures a (held-out) map-style pair set, in inference mode.

        Args:
            pair_dataset: rows as in training; raw images are not augmented.
            metric_key_prefix: put before each key.

        Returns:
            `<prefix>_flip_rate`, the share of pairs whose predicted classes differ (with several labels: any of them),
            or for a regression `<prefix>_difference`, the mean absolute difference of the outputs;
            `<prefix>_pair_accuracy`, the share of labelled pairs with both sides predicted right, where pairs have a
            `label` and an image has one class; `<prefix>_divergence` and `<prefix>_distance` of all pairs together
            (no distance if `invariance_distance` needs a linear head and the model has none).
        """
        self._check_measured(pair_dataset, "pair_dataset")
        dataset = self._as_inputs(pair_dataset, is_training=False, seed=0)
        check_pair_set(dataset, "pair_dataset", self._pair_collator, every_row=False)
        own = torch.Generator()  # measuring during training must not draw from the global one
        collator = PairCollator(self._inputs, self._inputs[0], labels=self._has_labels(dataset, "pair_dataset"))
        batches = DataLoader(dataset, self.args.eval_batch_size, collate_fn=collator, generator=own)
        head, problem_type = self._find_needed_head(dataset, trains=False), self.problem_type
        sides, labels = [], []
        with self.autocast_smart_context_manager(), inference(self.model):
            for batch in map(self._prepare_inputs, batches):
                labels += [batch.pop("labels").chunk(2)[0]] if collator.labels else []
                outputs = head.run(self.model, batch) if head else (logits_of(self.model(**batch)),)
                sides.append([side for output in outputs for side in output.chunk(2)])
            a, b, *z = (torch.cat(parts) for parts in zip(*sides, strict=True))
            if problem_type == "regression":
                measured = {"difference": (a - b).abs().mean().item()}
            elif problem_type == "multi_label_classification":
                measured = {"flip_rate": ((a > 0) != (b > 0)).any(-1).sum().item() / len(a)}
            else:
                measured = {"flip_rate": (a.argmax(-1) != b.argmax(-1)).sum().item() / len(a)}
                if labels and (known := (label := torch.cat(labels)) != IGNORED).any():
                    is_right = (a.argmax(-1) == label) & (b.argmax(-1) == label)
                    measured["pair_accuracy"] = is_right[known].sum().item() / known.sum().item()
            divergence = invariance_divergence(a, b, problem_type=problem_type)
            measured["divergence"] = divergence.item()
            if self.args.invariance_distance == "divergence":
                measured["distance"] = root_divergence(divergence).item()
            elif head is not None and self.args.invariance_distance == "rationale_divergence":
                of_rationales = rationale_divergence(head.weight, *z, a, b, problem_type=problem_type)
                measured["distance"] = root_divergence(divergence + of_rationales, floor=ROOT_FLOOR).item()
            elif head is not None:
                measured["distance"] = self.step_class.distance_of_rationales(self.args, head, *z).item()
        return {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}

    # ---- Logs and checkpoints ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`; training logs get the `ipg/...` means over the steps since the last log."""
        if self.is_guided and "loss" in logs:
            logs = {**logs, **self.progress.pop(self.args.alpha, self.args.learning_rate)}
        super().log(logs, start_time)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        missing = without_aliases(self.model, load_result.missing_keys) if load_result.missing_keys else []
        load_result = load_result._replace(missing_keys=missing)
        check_all_loaded(self.model, missing)  # before Trainer, which takes any model for one of transformers
        super()._issue_warnings_after_load(load_result)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # with save_strategy="best" Trainer saves only what this calls a new best, and not what SIGTERM asks for
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
