# SPDX-License-Identifier: Apache-2.0
"""A plain `Trainer` script on the data and settings of a recipe: what whole.py compares `ipg train` with.

    python recipes/speed/plain_trainer.py JOB

JOB is a JSON file: the keys of a recipe. A step takes B + 2P images, the number that a guided step computes. At the end
validation and test are measured together with the images of their held-out pairs, as `ipg train` does. Batch norm
stays on its running statistics where the recipe says so.
"""

import json
import sys
from dataclasses import fields

import datasets
import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    ViTImageProcessor,
    default_data_collator,
)

from ipg_hf.data import LOADERS

with open(sys.argv[1]) as file:
    job = json.load(file)
options = job.get("dataset_options", {}) | ({"data_dir": job["data_dir"]} if "data_dir" in job else {})
data = LOADERS[job["dataset"]](**options, seed=42)  # that of TrainingArguments
processor = ViTImageProcessor(**job["image_processor"])


def transformed(images):
    """Model inputs of a set, made once, as `preload` makes them."""
    rows = []
    for start in range(0, len(images), 256):
        part = images[start : start + 256]
        pixels = processor(part["image"], return_tensors="pt")["pixel_values"]
        rows += [{"pixel_values": one, "labels": label} for one, label in zip(pixels, part["label"], strict=True)]
    return rows


def measured(images, pairs):
    """The rows of a split, and those of its held-out pairs."""
    rows = transformed(images)
    if pairs is not None:
        for side in ("image_a", "image_b"):
            one = pairs.select_columns([side]).rename_column(side, "image")
            rows += transformed(one.add_column("label", [0] * len(one)))
    return rows


def worst_group(images):
    groups = 2 * np.array(images["label"]) + np.array(images["attribute"])

    def compute(prediction):
        right = prediction.predictions.argmax(-1)[: len(groups)] == prediction.label_ids[: len(groups)]
        return {"worst_group_accuracy": min(right[groups == group].mean() for group in np.unique(groups))}

    return compute


if "model_name_or_path" in job:
    model = AutoModelForImageClassification.from_pretrained(
        job["model_name_or_path"], num_labels=2, dtype=torch.float32, ignore_mismatched_sizes=True
    )
else:
    config = AutoConfig.for_model(job["model_type"], num_labels=2, **job.get("model_config", {}))
    model = AutoModelForImageClassification.from_config(config)
if job.get("channels_last"):
    model = model.to(memory_format=torch.channels_last)
if job.get("freeze_norm"):
    for layer in filter(lambda module: isinstance(module, torch.nn.BatchNorm2d), model.modules()):
        layer.eval()
        layer.train = lambda mode=True, layer=layer: layer
settings = {field.name: job[field.name] for field in fields(TrainingArguments) if field.name in job}
settings["per_device_train_batch_size"] += 2 * job["per_device_pair_batch_size"]
trainer = Trainer(
    model,
    TrainingArguments(**settings),
    train_dataset=transformed(data.train),
    eval_dataset=transformed(data.validation),
    processing_class=processor,
    data_collator=default_data_collator,
    compute_metrics=worst_group(data.validation),
)
datasets.disable_progress_bars()
trainer.train()
trainer.predict(measured(data.validation, data.validation_pairs))
trainer.compute_metrics = worst_group(data.test)
test = trainer.predict(measured(data.test, data.test_pairs))
trainer.save_model()
trainer.save_state()
trainer.log_metrics("test", test.metrics)
