# SPDX-License-Identifier: Apache-2.0
"""Loads an image classifier from transformers or timm as a transformers model."""

from __future__ import annotations

import inspect
import os
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from pickle import UnpicklingError  # what torch raises for a file that it does not load
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedModel

from .inference import inference

TIMM = "timm_wrapper"  # `model_type` of a timm model in transformers


def load_image_classifier(
    name_or_path: str | os.PathLike | nn.Module, num_labels: int | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Loads an image classifier that works with `Trainer`, `save_pretrained` and `push_to_hub`.

    Args:
        name_or_path: a Hub id (`"google/vit-base-patch16-224"`, `"timm/resnet50.a1_in1k"`), a local folder made by
            `save_pretrained`, or a timm module (`timm.create_model(...)`). A timm module keeps its weights.
        num_labels: number of classes. A head with another number of outputs is replaced by a new one. `None` keeps the
            number of the model.
        **kwargs: for a name or folder, the arguments of `AutoModelForImageClassification.from_pretrained` (`id2label`,
            `dtype`, `revision`, ...). For a timm module, the arguments of its config (`id2label`, `label2id`) and
            `model_args`: a dict of the arguments that `timm.create_model` got besides the name. timm modules do not
            store them.

    Returns:
        A transformers image classifier. A timm model is wrapped in `TimmWrapperForImageClassification`.

    Raises:
        ValueError: `name_or_path` is a transformers model already; it is a module that is not timm's; timm's
            architecture and `model_args` do not build the given module again; the model is no image classifier; or its
            weights are damaged, or have other shapes than its config says.
        OSError: nothing is found under the name.
    """
    if isinstance(name_or_path, PreTrainedModel):
        raise ValueError(
            f"{type(name_or_path).__name__} is a transformers model already. Pass it to the trainer as it is."
        )
    if isinstance(name_or_path, nn.Module):
        return _wrap_timm(name_or_path, num_labels, **kwargs)
    if num_labels is not None:
        kwargs = {"num_labels": num_labels, "ignore_mismatched_sizes": True, **kwargs}
    return _from_pretrained(name_or_path, kwargs)[0]


def load_trained_classifier(name_or_path: str | os.PathLike) -> PreTrainedModel:
    """As [`load_image_classifier`], for a model that is measured as it is: all of its weights must be stored.

    Raises:
        ValueError: also if the model has a weight that is not stored, and so would be random.
    """
    model, missing = _from_pretrained(name_or_path, {})
    lost = [] if model._hf_peft_config_loaded else without_aliases(model, missing)  # an adapter has weights of its own
    if lost:
        raise ValueError(
            f"{name_or_path} lacks {len(lost)} of the model's weights, for example {min(lost)}: they would be random. "
            "Give a model that has been trained as a classifier."
        )
    return model


def on_accelerator(model: nn.Module) -> nn.Module:
    """Moves a model to the accelerator, if there is one, and returns it."""
    return model.to(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else model


def _from_pretrained(name_or_path: str | os.PathLike, kwargs: Mapping[str, Any]) -> tuple[PreTrainedModel, set[str]]:
    """The model, and the names of its weights that were not stored under this name."""
    try:
        model, info = AutoModelForImageClassification.from_pretrained(name_or_path, **kwargs, output_loading_info=True)
    except OSError as failure:
        if os.path.isdir(name_or_path):
            raise OSError(f"the model in {name_or_path} cannot be read: {failure}") from failure
        raise OSError(
            f"{name_or_path} is no folder here, and no model of that name was fetched: {failure}"
        ) from failure
    except (SafetensorError, UnpicklingError, EOFError) as failure:
        raise ValueError(_damaged(name_or_path, failure)) from failure
    except RuntimeError as failure:
        if "mismatched" in str(failure):
            raise ValueError(
                f"the weights in {name_or_path} have other shapes than its config.json says (the report above lists "
                "them): give the config that the model was saved with."
            ) from failure
        if "zip archive" in str(failure):
            raise ValueError(_damaged(name_or_path, failure)) from failure
        raise
    except ValueError as failure:
        if "Unrecognized configuration class" not in str(failure):
            raise
        raise ValueError(f"{name_or_path} is no image classifier: {str(failure).split(' for ')[0]}.") from failure
    # ignore_mismatched_sizes is meant for the head, and would make any other layer random without an error
    other = sorted(name for name, stored, own in info["mismatched_keys"] if stored[1:] != own[1:])
    if other:
        raise ValueError(
            f"weights in {name_or_path} have other shapes than its config.json says, for example "
            f"{other[0]}: give the config that the model was saved with."
        )
    if model.config.model_type == TIMM:
        _set_input_size(model.config)
    return model, info["missing_keys"]


def _damaged(name_or_path: str | os.PathLike, failure: Exception) -> str:
    why = (str(failure) or type(failure).__name__).splitlines()[0]
    return f"the weights in {name_or_path} are damaged ({why}): fetch or save them again."


def forward_inputs(model: nn.Module) -> list[str]:
    """Lists the names of a model's forward inputs, except `labels`. The images' input comes first.

    For a PEFT model the base model is inspected: the forward of the adapter names no inputs.
    """
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = [p.name for p in _forward_parameters(model) if p.kind not in kinds and p.name != "labels"]
    main = getattr(model, "main_input_name", None) or next(iter(names), "pixel_values")
    return [main, *(name for name in names if name != main)]


def model_inputs(model: nn.Module, batch: Mapping[str, torch.Tensor], device: Any = None) -> dict[str, torch.Tensor]:
    """Returns what a model takes of a batch of an image processor, in the model's precision.

    Args:
        model: the model.
        batch: name -> tensor.
        device: where the tensors go. By default the device of the model.
    """
    weight = next(model.parameters())
    return {
        name: batch[name].to(device or weight.device, weight.dtype if batch[name].is_floating_point() else None)
        for name in forward_inputs(model)
        if name in batch
    }


def takes_labels(model: nn.Module) -> bool:
    """Tells whether a model's forward takes `labels` and computes the loss itself.

    A transformers model must name `labels` in its forward. For any other module `**kwargs` is enough.
    """
    parameters = _forward_parameters(model)
    has_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    named = any(parameter.name == "labels" for parameter in parameters)
    return named or (has_any and not isinstance(_base(model), PreTrainedModel))


def shared_weights(model: nn.Module) -> list[list[str]]:
    """Lists the names of each parameter and buffer of a model that has several names."""
    names = defaultdict(list)
    for named in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, value in named:
            names[_memory_of(value)].append(name)
    return [group for group in names.values() if len(group) > 1]


def _memory_of(value: torch.Tensor) -> Any:
    """What is equal for two tensors of the same memory: that, or of a tensor without memory of its own the object."""
    if type(value) not in (nn.Parameter, torch.Tensor) or value.is_meta or not value.numel():
        return id(value)
    return value.data_ptr(), value.shape, value.stride()


def without_aliases(model: nn.Module, missing: Collection[str]) -> list[str]:
    """Of the weights that a checkpoint does not have, those that it has under no other name either."""
    aliases = {name for names in shared_weights(model) if not {*missing} >= {*names} for name in names}
    return [name for name in missing if name not in aliases]


def check_can_be_saved(model: nn.Module) -> None:
    """Raises a ValueError if `save_pretrained` would refuse a transformers model for weights that it shares."""
    model = _base(model)
    if not isinstance(model, PreTrainedModel):
        return
    declared = [
        f"{prefix}.{pattern}" if prefix else pattern
        for prefix, module in model.named_modules()
        if isinstance(module, PreTrainedModel)
        for pattern in module._tied_weights_keys or ()
    ]
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for names in shared_weights(model):
        own = [name for name in names if name in parameters and not any(re.search(p, name) for p in declared)]
        if len(own) > 1:
            ties = {name: own[0] for name in own[1:]}
            raise ValueError(
                f"{type(model).__name__} has weights that share one tensor, {' and '.join(own)}, and save_pretrained "
                f"refuses what is not declared: add the class attribute _tied_weights_keys = {ties}, and set "
                "tie_word_embeddings=True in the config, by which from_pretrained ties any weights."
            )


@torch.no_grad()
def check_image_size(model: nn.Module, processor: Any) -> None:
    """Runs a model on one image as its processor gives it.

    Raises:
        ValueError: the model cannot run on such an image; the message has its size and the network.
    """
    batch = processor([Image.new("RGB", (64, 64))], return_tensors="pt")
    try:
        with inference(model):
            model(**model_inputs(model, batch))
    except (ValueError, RuntimeError, AssertionError, IndexError) as failure:
        shape = "×".join(map(str, batch[forward_inputs(model)[0]].shape[1:]))
        why = (str(failure) or type(failure).__name__).splitlines()[0].rstrip(".")
        raise ValueError(
            f"{type(_base(model)).__name__} cannot run on images of {shape}, as the image processor gives them "
            f"({why}): set image_processor: {{size: {{height: ..., width: ...}}}} to a size that the network takes."
        ) from failure


def check_all_loaded(model: nn.Module, missing: Collection[str]) -> None:
    """Checks that a checkpoint had all the weights that the model saves.

    Args:
        model: the model after loading.
        missing: names of the weights that the checkpoint did not have.

    Raises:
        ValueError: `missing` has a weight that the model saves.
    """
    lost = set(missing) - set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    if lost:
        raise ValueError(
            f"the checkpoint lacks {len(lost)} of the model's weights, for example {min(lost)}. A checkpoint saved by "
            "Trainer may use other names (transformers issue 43701). Load it with from_pretrained and start a new "
            "training from it."
        )


def _base(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _forward_parameters(model: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(_base(model).forward).parameters.values())


def _wrap_timm(module: nn.Module, num_labels: int | None, **kwargs: Any) -> PreTrainedModel:
    # with timm, half a second that others do not wait
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    known = getattr(module, "pretrained_cfg", None)
    if not known or not hasattr(module, "reset_classifier"):
        raise ValueError(
            f"{type(module).__name__} is not a timm image classifier: pass one made by timm.create_model, or the name "
            "of a model."
        )
    if num_labels is not None and num_labels != module.num_classes:
        module.reset_classifier(num_labels)
    config = TimmWrapperConfig(
        architecture=known["architecture"], num_labels=module.num_classes, pretrained_cfg=_plain(known), **kwargs
    )
    # the wrapper builds a network of its own, which is replaced below: on the meta device it costs nothing
    with torch.device("meta"):
        model = TimmWrapperForImageClassification(config)
    _set_input_size(config)
    wanted, given = _shapes(model.timm_model), _shapes(module)
    if wanted != given:
        name = next(name for name in sorted({*wanted, *given}) if wanted.get(name) != given.get(name))
        raise ValueError(
            f"timm.create_model({known['architecture']!r}) does not build the given network again ({name}: "
            f"{wanted.get(name)} instead of {given.get(name)}), so a saved model could not be loaded. Pass the "
            "arguments that it was made with, for example load_image_classifier(module, model_args={'img_size': 32})."
        )
    model.timm_model = module
    return model


def _set_input_size(config: Any) -> None:
    """Sets the image size of a timm model's config to that of `model_args`, by which its image processor is made."""
    size = (config.model_args or {}).get("img_size")
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        channels = (config.pretrained_cfg.get("input_size") or [3])[0]
        config.pretrained_cfg = {**config.pretrained_cfg, "input_size": [channels, height, width]}


def _shapes(module: nn.Module) -> dict[str, Any]:
    """Shapes of the weights and, of a network of patches, the image size."""
    shapes: dict[str, Any] = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    if hasattr(module, "patch_embed") and hasattr(module.patch_embed, "img_size"):
        shapes["the image size"] = module.patch_embed.img_size
    return shapes


def _plain(known: Any) -> dict[str, Any]:
    """timm's pretrained config as JSON values, without the number of labels: the model's config has it."""
    values = known if isinstance(known, dict) else known.to_dict()
    drop = {"num_classes", "label_names", "label_descriptions", "state_dict", "custom_load", "notes"}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items() if name not in drop}
