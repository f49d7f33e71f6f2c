# SPDX-License-Identifier: Apache-2.0
"""Loading an image classifier of any origin as a transformers model."""

from __future__ import annotations

import inspect
import os
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedModel, TimmWrapperConfig
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperForImageClassification


def load_image_classifier(
    name_or_path: str | os.PathLike | nn.Module, num_labels: int | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Loads an image classifier that `Trainer`, `save_pretrained` and `push_to_hub` take.

    Args:
        name_or_path: a Hub id (`"google/vit-base-patch16-224"`, `"timm/resnet50.a1_in1k"`), a local folder made by
            `save_pretrained`, or a timm module (`timm.create_model(...)`), whose weights are kept.
        num_labels: number of classes; a head of another width is replaced by a fresh one. `None` keeps the model's.
        **kwargs: for `AutoModelForImageClassification.from_pretrained` (`id2label`, `dtype`, `revision`, ...); with a
            timm module for its config (`id2label`, `label2id`), and `model_args`, the arguments that
            `timm.create_model` was called with beside the name (timm modules do not remember them).

    Returns:
        A transformers image classifier; timm models inside `TimmWrapperForImageClassification`.

    Raises:
        ValueError: a timm module that cannot be built again from its name and `model_args`.
        OSError: nothing is found under the name.
    """
    if isinstance(name_or_path, PreTrainedModel):
        raise ValueError(f"{type(name_or_path).__name__} is a transformers model already: pass it to the trainer.")
    if isinstance(name_or_path, nn.Module):
        return _wrap_timm(name_or_path, num_labels, **kwargs)
    if num_labels is not None:
        kwargs = {"num_labels": num_labels, "ignore_mismatched_sizes": True, **kwargs}
    return AutoModelForImageClassification.from_pretrained(name_or_path, **kwargs)


def forward_inputs(model: nn.Module) -> list[str]:
    """Names of the inputs of a model's forward, without labels; the main one, that of the images, first.

    Adapters (PEFT) are looked through: their own forward names no inputs.
    """
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = [p.name for p in _forward_parameters(model) if p.kind not in kinds and p.name != "labels"]
    main = getattr(model, "main_input_name", None) or next(iter(names), "pixel_values")
    return [main, *(name for name in names if name != main)]


def takes_labels(model: nn.Module) -> bool:
    """Whether a model's forward takes `labels`, and so computes the loss itself.

    A transformers model that takes them names them; any other module with `**kwargs` is trusted to do so.
    """
    parameters = _forward_parameters(model)
    has_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    named = any(parameter.name == "labels" for parameter in parameters)
    return named or (has_any and not isinstance(_base(model), PreTrainedModel))


def check_all_loaded(model: nn.Module, missing: Collection[str]) -> None:
    """Raises ValueError where weights that a model saves were `missing` from the checkpoint that was loaded."""
    lost = set(missing) - set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    if lost:
        raise ValueError(
            f"the checkpoint lacks {len(lost)} of the model's weights, such as {min(lost)}. One saved by Trainer "
            "may have other names (transformers issue 43701): load it by from_pretrained and train from there."
        )


def _base(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _forward_parameters(model: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(_base(model).forward).parameters.values())


def _wrap_timm(module: nn.Module, num_labels: int | None, **kwargs: Any) -> PreTrainedModel:
    known = getattr(module, "pretrained_cfg", None)
    if not known or not hasattr(module, "reset_classifier"):
        raise ValueError(
            f"{type(module).__name__} is not a timm image classifier: pass one made by timm.create_model, or a name."
        )
    if num_labels is not None and num_labels != module.num_classes:
        module.reset_classifier(num_labels)
    config = TimmWrapperConfig(
        architecture=known["architecture"], num_labels=module.num_classes, pretrained_cfg=_plain(known), **kwargs
    )
    # on the meta device: the wrapper builds a network of its own, which is thrown away
    with torch.device("meta"):
        model = TimmWrapperForImageClassification(config)
    wanted = {name: tuple(value.shape) for name, value in model.timm_model.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    if wanted != given:
        name = next(name for name in sorted({*wanted, *given}) if wanted.get(name) != given.get(name))
        raise ValueError(
            f"timm.create_model({known['architecture']!r}) builds another network than the one given ({name}: "
            f"{wanted.get(name)} against {given.get(name)}), so that a saved model could not be loaded. Pass the "
            "arguments that it was made with, e.g. load_image_classifier(module, model_args={'img_size': 32})."
        )
    model.timm_model = module
    return model


def _plain(known: Any) -> dict[str, Any]:
    """timm's pretrained config as JSON values, without the label count that the model's own config holds."""
    values = known if isinstance(known, dict) else known.to_dict()
    drop = {"num_classes", "label_names", "label_descriptions", "state_dict", "custom_load", "notes"}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items() if name not in drop}
