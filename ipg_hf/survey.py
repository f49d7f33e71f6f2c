# SPDX-License-Identifier: Apache-2.0
"""Finds the classifier head of many models: the table that `ipg heads` prints."""

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
from .names import nearest

# A number of labels that is the width of no hidden layer.
NUM_LABELS = 7
# Models with more parameters than this stay on the meta device.
MANY = 500_000_000
# Pixels: a model of larger images runs on images of MODEST_SIZE, if it accepts other sizes than its own.
LARGE_SIZE, MODEST_SIZE = 256, 224
# Changes to default configs that are larger than needed, or that do not build (Perceiver: 261 channels for 8 heads).
SMALLER: dict[str, dict[str, Any]] = {
    "EfficientNetConfig": {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280, "image_size": 224},
    "PerceiverConfig": {"num_blocks": 1, "num_self_attends_per_block": 1, "num_cross_attention_heads": 1},
    "TextNetConfig": {"image_size": 224},
}


@dataclass(frozen=True)
class Finding:
    """The classifier head of one model, or the reason why the model is refused.

    Args:
        model: name of the model.
        path: path of the head in the model. If the model averages several heads, their paths are joined by " + ". Empty
            if there is no head.
        kind: `kind` of the `ClassifierHead`. Empty if there is no head.
        features: D, the number of features that enter the head. 0 if there is no head.
        problem: why the model is refused. Empty if it is accepted.
        parameters: number of parameters of the model.
    """

    model: str
    path: str
    kind: str
    features: int
    problem: str
    parameters: int


def examine(name: str, model: nn.Module, size: int | None = None) -> Finding:
    """Finds the classifier head of one model and verifies it on noise images.

    Args:
        name: name of the model in the finding.
        model: an image classifier.
        size: height and width of the noise images in pixels. By default the image size of the model.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    try:
        inputs = noise_inputs(model, size) if size else None
        head = find_head(model, inputs=inputs)
        head.verify(model, inputs or noise_inputs(model))
    except ValueError as failure:
        return Finding(name, "", "", 0, str(failure), parameters)
    return Finding(name, " + ".join(head.paths), head.kind, head.weight.shape[1], "", parameters)


def survey(patterns: Sequence[str] = ()) -> Iterator[Finding]:
    """Examines models with random weights. The only download is the config of a Hub id.

    Args:
        patterns: names of models: `timm/...` or a class name of transformers (`ViTForImageClassification`), both also
            with wildcards; folders; Hub ids. By default every class of transformers and every model of timm.

    Yields:
        One finding for each model. A timm model that a wildcard names is built on the meta device, without numbers:
        only the shapes and the layers that reach the logits are verified. A model that is named in full is computed.

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
            try:
                config = AutoConfig.from_pretrained(pattern)
            except OSError as failure:
                hint = nearest(pattern, [model_class.__name__ for _, model_class in transformers_classes()])
                raise ValueError(
                    f"{pattern} is no image classifier of transformers, no folder here, and no model of that name was "
                    f"fetched.{hint}"
                ) from failure
            yield examine(pattern, AutoModelForImageClassification.from_config(config))


def _of_timm(pattern: str) -> Iterator[Finding]:
    names = timm.list_models(pattern.split(".")[0])
    if not names:
        raise ValueError(f"timm has no model {pattern!r}: timm.list_models() lists the names.")
    for name in names:
        yield examine_timm(name, "meta" if "*" in pattern else "cpu")


def examine_timm(name: str, device: str = "cpu") -> Finding:
    """Examines a timm model with random weights.

    Args:
        name: name of the model in timm.
        device: device on which the model is built. On `"meta"` nothing is computed, only shapes are verified.
    """
    with torch.device(device):
        model = timm.create_model(name, num_classes=NUM_LABELS)
    known = model.pretrained_cfg
    # a smaller image than the model's own gives the same finding in less time
    size = MODEST_SIZE if max(known["input_size"]) > LARGE_SIZE and not known["fixed_input_size"] else None
    return examine(f"timm/{name}", model, size if device == "cpu" else None)


def transformers_classes() -> list[tuple[type, type]]:
    """Lists (config class, model class) of every image classifier of transformers itself, without registered ones."""
    pairs = []
    for config_class, classes in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.items():
        pairs += [(config_class, kind) for kind in (classes if isinstance(classes, tuple) else (classes,))]
    return [pair for pair in pairs if pair[1].__module__.startswith("transformers.")]


def build_shallow(config_class: type, model_class: type) -> nn.Module:
    """Builds a model with random weights from its default config, with one hidden layer if the config counts layers."""
    config = config_class(**SMALLER.get(config_class.__name__, {}))
    for part in (config, getattr(config, "vision_config", None)):
        if isinstance(part, PreTrainedConfig) and hasattr(part, "num_hidden_layers") and not hasattr(part, "depths"):
            part.num_hidden_layers = 1
    config.num_labels = NUM_LABELS
    with torch.device("meta"):
        model = model_class(config)
    return model if sum(p.numel() for p in model.parameters()) > MANY else model_class(config)
