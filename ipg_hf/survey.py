# SPDX-License-Identifier: Apache-2.0
"""Which classifier head is found in which model: the table that `ipg heads` prints."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

from .heads import find_head, noise_inputs

# Ours: a number of labels that no hidden layer has as its width by chance.
NUM_LABELS = 7
# Models of more parameters stay on the meta device.
MANY = 500_000_000
# Pixels: models of larger images that are not bound to their size are computed on MODEST_SIZE.
LARGE_SIZE, MODEST_SIZE = 256, 224
# Default configs that are larger than a look at the head needs, or do not build (Perceiver: 261 channels for 8 heads).
SMALLER: dict[str, dict[str, Any]] = {
    "EfficientNetConfig": {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280, "image_size": 224},
    "PerceiverConfig": {"num_blocks": 1, "num_self_attends_per_block": 1, "num_cross_attention_heads": 1},
    "TextNetConfig": {"image_size": 224},
}


@dataclass(frozen=True)
class Finding:
    """What was found in one model.

    Args:
        model: its name.
        path: of the head, paths joined by " + " where several are averaged; empty where there is none.
        kind: see `ClassifierHead.kind`; empty where there is none.
        features: D, the width of z; 0 where there is no head.
        problem: why the model is refused; empty where it is accepted.
        parameters: their number.
    """

    model: str
    path: str
    kind: str
    features: int
    problem: str
    parameters: int


def examine(name: str, model: nn.Module, size: int | None = None) -> Finding:
    """Finds and proves the head of one model on noise, in its own image size by default."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    try:
        inputs = noise_inputs(model, size) if size else None
        head = find_head(model, inputs=inputs)
        head.verify(model, inputs or noise_inputs(model))
    except ValueError as failure:
        return Finding(name, "", "", 0, str(failure), parameters)
    return Finding(name, " + ".join(head.paths), head.kind, head.weight.shape[1], "", parameters)


def survey(patterns: Sequence[str] = ()) -> Iterator[Finding]:
    """Examines models with random weights; nothing is downloaded but the config of a Hub id.

    Args:
        patterns: names as `load_image_classifier` takes them: `timm/...`, also with wildcards; class names of
            transformers (`ViTForImageClassification`), also with wildcards; folders and Hub ids. By default every class
            of transformers and every model of timm.

    Yields:
        A row for each model. Where a wildcard names timm models, they are built on the meta device, without numbers:
        which layers reach the logits, and the shapes, are proven; a model named in full is computed.

    Raises:
        ValueError: a pattern names no model.
    """
    for pattern in patterns or ("*ForImageClassification*", "timm/*"):
        if pattern.startswith("timm/"):
            yield from _of_timm(pattern.removeprefix("timm/"))
            continue
        classes = [pair for pair in transformers_classes() if fnmatch.fnmatchcase(pair[1].__name__, pattern)]
        for config_class, model_class in classes:
            yield examine(model_class.__name__, build_shallow(config_class, model_class))
        if not classes:
            config = AutoConfig.from_pretrained(pattern)
            yield examine(pattern, AutoModelForImageClassification.from_config(config))


def _of_timm(pattern: str) -> Iterator[Finding]:
    names = timm.list_models(pattern.split(".")[0])
    if not names:
        raise ValueError(f"timm has no model {pattern!r}.")
    for name in names:
        yield examine_timm(name, "meta" if "*" in pattern else "cpu")


def examine_timm(name: str, device: str = "cpu") -> Finding:
    """Examines a timm model with random weights, built on a device (`"meta"`: without numbers)."""
    with torch.device(device):
        model = timm.create_model(name, num_classes=NUM_LABELS)
    known = model.pretrained_cfg
    # a smaller image than its own tells the same in less time
    size = MODEST_SIZE if max(known["input_size"]) > LARGE_SIZE and not known["fixed_input_size"] else None
    return examine(f"timm/{name}", model, size if device == "cpu" else None)


def transformers_classes() -> list[tuple[type, type]]:
    """(config class, model class) of every image classifier of transformers, without those registered by others."""
    pairs = []
    for config_class, classes in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.items():
        pairs += [(config_class, kind) for kind in (classes if isinstance(classes, tuple) else (classes,))]
    return [pair for pair in pairs if pair[1].__module__.startswith("transformers.")]


def build_shallow(config_class: type, model_class: type) -> nn.Module:
    """A model with random weights as its default config has it, but of one layer where layers are counted."""
    config = config_class(**SMALLER.get(config_class.__name__, {}))
    for part in (config, getattr(config, "vision_config", None)):
        if isinstance(part, PreTrainedConfig) and hasattr(part, "num_hidden_layers") and not hasattr(part, "depths"):
            part.num_hidden_layers = 1
    config.num_labels = NUM_LABELS
    with torch.device("meta"):
        model = model_class(config)
    return model if sum(p.numel() for p in model.parameters()) > MANY else model_class(config)
