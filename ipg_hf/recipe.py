# SPDX-License-Identifier: Apache-2.0
"""A recipe: a YAML file of settings, overridden by flags, and the data, model and image processor that it names."""

from __future__ import annotations

import argparse
import difflib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from inspect import signature
from typing import Any, Literal

import datasets
import torch
import yaml
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    PreTrainedModel,
    TrainingArguments,
    ViTImageProcessor,
)

from .baselines.degrade import degrade_pairs
from .baselines.last_layer import check_fits, check_rank
from .baselines.stages import check_repeats
from .config import IPGConfig
from .data import LOADERS, About, Benchmark
from .models import load_image_classifier
from .pairs import (
    AdversarialPairs,
    background_pairs,
    match_pairs,
    mix_pairs,
    overlay_pairs,
    pairs_from_folders,
    pairs_from_table,
    recolor_pairs,
)
from .pairs.checks import named_sets

# makers of the training images, and of files
MAKERS: dict[str, Callable] = {
    "recolor": recolor_pairs,
    "overlay": overlay_pairs,
    "background": background_pairs,
    "match": match_pairs,
    "adversarial": AdversarialPairs,
    "folders": pairs_from_folders,
    "table": pairs_from_table,
}
FROM_FILES = ("folders", "table")
# ways to change a last layer -> their options
LAST_LAYERS = {"dfr": ("num_fits", "strengths"), "project": ("rank",)}

MAPPINGS = (
    *("dataset_options", "pairs", "degrade_pairs", "mix_pairs", "last_layer", "repeat_errors"),
    *("model_config", "image_processor", "about"),
)


class RecipeError(ValueError):
    """A recipe or a flag that cannot be used; the message names it and the fix."""


@dataclass
class Recipe:
    """What to train on what; the settings of the training itself are [`IPGConfig`]'s.

    Args:
        dataset: a benchmark of `ipg_hf.data`, by its name in `LOADERS`; `"files"` is a folder of your own.
        dataset_options: further arguments of its loader.
        data_dir: folder of the benchmark's files; without it the environment variable `IPG_DATA`, then the Hub.
        num_pairs: number of training pairs; `None` is the benchmark's own number.
        oriented_pairs: `False` swaps the sides of a random half of the training pairs (an ablation).
        pairs: how the training pairs are made, `{"maker": NAME, ...}` with the arguments of a maker of [`MAKERS`], or
            `{SET: {"maker": ...}, ...}` for several sets; by default the benchmark's own.
        pair_sets: of a benchmark with several pair sets, the names of those to train with; by default all.
        degrade_pairs: shares and strengths that spoil the training pairs (an ablation, see `pairs.degrade_pairs`).
        mix_pairs: `{"num_pairs": 20000}` enlarges the training pairs to so many by mixtures (see `pairs.mix_pairs`).
        method: `"ipg"`, or `"erm"` for plain training without the pairs.
        compare: `"erm"` trains the twin without pairs too, in the folder `erm` of the output folder.
        last_layer: what becomes of the last layer after the training (a comparison, see `last_layer`):
            `{"method": "dfr"}`, with `num_fits` and `strengths` if need be, fits it anew to half of the validation
            images, as many of each group, and leaves the other half to be measured on; `{"method": "project",
            "rank": 1}` takes out of it the directions in which the training pairs differ most, which `erm` has not
            trained with.
        repeat_errors: `{"steps": 50, "factor": 20}` trains a first model for so many steps (more than the learning
            rate's warm-up takes, or it learns nothing), and then another from the start, for which the training images
            that the first gets wrong stand `factor` times (a comparison, Just Train Twice; `erm` alone).
        model_name_or_path: a Hub id or a local folder to fine-tune.
        model_type: a transformers model type to train from scratch, instead of `model_name_or_path`.
        model_config: settings of its config.
        image_processor: settings of a `ViTImageProcessor`, for a model from scratch, or in place of the processor of a
            pretrained one (another size, say).
        channels_last: keep the weights of convolutions channels last (`torch.channels_last`), as image networks run
            faster on most processors and with reduced precision on GPUs.
        preload: transform all images once and keep them in memory; only without random crops and flips.
        preload_dir: with `preload`, a folder that keeps the transformed images for the next run, as long as the images,
            the processor and the versions of the packages are the same; by default nothing is kept.
        measure_test: read the test set, once, at the end; `False` for a run that settings are chosen by.
        about: what the model card is to say of the data, beside or in place of what is known of the benchmark: see
            `data.About` (`title`, `attribute`, `shortcut`, `pairs`, `license`, `source`, `hub_set`).
        license: of the trained model, for its card, as the Hub spells it (`apache-2.0`).
        overwrite_output_dir: remove the run that the output folder holds.
    """

    dataset: str = field(default="digits", metadata={"help": f"A benchmark: {', '.join(LOADERS)}."})
    dataset_options: dict | str | None = field(default=None, metadata={"help": "Arguments of its loader, as JSON."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder of the data files (else IPG_DATA, the Hub)."})
    num_pairs: int | None = field(default=None, metadata={"help": "Number of training pairs."})
    oriented_pairs: bool = field(default=True, metadata={"help": "Keep one attribute value on each side."})
    pairs: dict | str | None = field(default=None, metadata={"help": "A maker of pairs and its arguments, as JSON."})
    pair_sets: list[str] | None = field(default=None, metadata={"help": "Names of the pair sets to train with."})
    degrade_pairs: dict | str | None = field(default=None, metadata={"help": "Spoil the training pairs, as JSON."})
    mix_pairs: dict | str | None = field(default=None, metadata={"help": "Enlarge the training pairs, as JSON."})
    method: Literal["ipg", "erm"] = field(default="ipg", metadata={"help": "ipg, or erm: without the pairs."})
    compare: Literal["none", "erm"] = field(default="none", metadata={"help": "Train this twin too."})
    last_layer: dict | str | None = field(default=None, metadata={"help": "Change it after training, as JSON."})
    repeat_errors: dict | str | None = field(default=None, metadata={"help": "Just Train Twice, as JSON."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or folder to fine-tune."})
    model_type: str | None = field(default=None, metadata={"help": "Model type to train from scratch."})
    model_config: dict | str | None = field(default=None, metadata={"help": "Its config, as JSON."})
    image_processor: dict | str | None = field(default=None, metadata={"help": "Its image processor, as JSON."})
    channels_last: bool = field(default=False, metadata={"help": "Keep weights of convolutions channels last."})
    preload: bool = field(default=False, metadata={"help": "Keep all transformed images in memory."})
    preload_dir: str | None = field(default=None, metadata={"help": "Keep them in this folder for the next run."})
    measure_test: bool = field(default=True, metadata={"help": "Read the test set at the end."})
    about: dict | str | None = field(default=None, metadata={"help": "What the card says of the data, as JSON."})
    license: str | None = field(default=None, metadata={"help": "Licence of the trained model, for its card."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Remove the run in the output folder."})

    def __post_init__(self):
        if self.dataset not in LOADERS:
            raise RecipeError(f"dataset={self.dataset!r} is unknown.{nearest(self.dataset, LOADERS)}")
        for name in MAPPINGS:
            value = getattr(self, name) or {}
            try:
                value = json.loads(value) if isinstance(value, str) else value
            except json.JSONDecodeError as failure:
                raise RecipeError(f"{name}={value!r} is not JSON: {failure}") from failure
            if not isinstance(value, dict):
                raise RecipeError(f"{name}={value!r} must be a mapping of names to values.")
            setattr(self, name, value)
        known = [entry.name for entry in fields(About)]
        for name in self.about:
            if name not in known:
                raise RecipeError(f"about: {name!r} is unknown.{nearest(name, known)}")
        self._check_comparisons()

    @property
    def uses_pairs(self) -> bool:
        """Whether the training pairs are used: by the training, or after it."""
        return self.method == "ipg" or self.last_layer.get("method") == "project"

    def _check_comparisons(self) -> None:
        if self.last_layer:
            name = self.last_layer.get("method")
            if name not in LAST_LAYERS:
                raise RecipeError(f"last_layer: method={name!r} is unknown.{nearest(str(name), LAST_LAYERS)}")
            _check_keys("last_layer", self.last_layer, ["method", *LAST_LAYERS[name]])
            if name == "project":
                check_rank(self.last_layer.get("rank"))
            else:
                check_fits(self.last_layer.get("num_fits", 1), self.last_layer.get("strengths", [1]))
        if self.repeat_errors:
            _check_keys("repeat_errors", self.repeat_errors, ["steps", "factor"])
            check_repeats(self.repeat_errors.get("steps"), self.repeat_errors.get("factor"))
            if self.method != "erm":
                raise RecipeError(
                    f"repeat_errors is a comparison with plain training: set method: erm (now {self.method})."
                )

    def load_data(self, seed: int) -> Benchmark:
        """Loads the benchmark; `seed` drives what it draws."""
        defaults = {"data_dir": self.data_dir, "num_pairs": self.num_pairs, "oriented_pairs": self.oriented_pairs}
        data = _called(LOADERS[self.dataset], self.dataset_options, seed=seed, **defaults)
        if self.pairs:
            named = {"": self.pairs} if "maker" in self.pairs else self.pairs
            made = {name: self._make_pairs(options, data, seed) for name, options in named.items()}
            data = replace(data, pairs=made[""] if "maker" in self.pairs else made)
        if self.pair_sets is not None:
            sets = data.pairs if isinstance(data.pairs, dict) else {}
            for name in self.pair_sets:
                if name not in sets:
                    raise RecipeError(f"pair_sets: {self.dataset} has no pair set {name!r}.{nearest(name, sets)}")
            data = replace(data, pairs={name: sets[name] for name in self.pair_sets})
        for change, options in ((degrade_pairs, self.degrade_pairs), (mix_pairs, self.mix_pairs)):
            if options:
                sets = named_sets(data.pairs).items()
                changed = {name: _called(change, options, pairs, seed=seed) for name, pairs in sets}
                data = replace(data, pairs=changed if isinstance(data.pairs, dict) else changed[""])
        return data

    def _make_pairs(self, options: Any, data: Benchmark, seed: int) -> Any:
        options = dict(options) if isinstance(options, Mapping) else {"maker": options}
        name = options.pop("maker", None)
        if name not in MAKERS:
            raise RecipeError(f"pairs: maker={name!r} is unknown.{nearest(str(name), MAKERS)}")
        maker, defaults = MAKERS[name], {"seed": seed, "num_pairs": self.num_pairs}
        if name in FROM_FILES:
            return _called(maker, options, **defaults, oriented=self.oriented_pairs)
        if name == "adversarial":
            return _called(maker, options, data.train)
        if name == "match" and options.get("match_on", "features") == "features":
            options["model"] = options.get("model", self.model_name_or_path)
            if options["model"] is None:
                raise RecipeError("pairs: matching on features needs a model, a folder or Hub id.")
            options["processor"] = AutoImageProcessor.from_pretrained(options["model"])
            options["model"] = load_image_classifier(options["model"])
        return _called(maker, options, data.train, **defaults)

    def build_model(self, train: datasets.Dataset) -> PreTrainedModel:
        """The model, with the class names of `train`, or one output where its label is a number.

        Weights from scratch come from the global torch generator.
        """
        model = self._build_model(train)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model

    def _build_model(self, train: datasets.Dataset) -> PreTrainedModel:
        label = train.features["label"]
        labels: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
        if isinstance(label, datasets.ClassLabel):
            ids = {name: number for number, name in enumerate(label.names)}
            labels = {"num_labels": len(ids), "id2label": dict(enumerate(ids)), "label2id": ids}
        if (self.model_name_or_path is None) == (self.model_type is None):
            raise RecipeError("give one of model_name_or_path (to fine-tune) and model_type (from scratch).")
        if self.model_name_or_path is not None:
            return load_image_classifier(self.model_name_or_path, **labels)
        try:
            known = AutoConfig.for_model(self.model_type).to_dict()
        except ValueError as failure:
            known_types = [config.model_type for config in AutoModelForImageClassification._model_mapping]
            raise RecipeError(
                f"model_type={self.model_type!r} is unknown.{nearest(self.model_type, known_types)}"
            ) from failure
        for key in self.model_config:
            if key not in known:
                raise RecipeError(f"model_config of {self.model_type} has no {key!r}.{nearest(key, known)}")
        config = AutoConfig.for_model(self.model_type, **self.model_config, **labels)
        return AutoModelForImageClassification.from_config(config)

    def build_processor(self) -> Any:
        """The image processor that belongs to the model."""
        if self.model_name_or_path is not None and not self.image_processor:
            return AutoImageProcessor.from_pretrained(self.model_name_or_path)
        return ViTImageProcessor(**self.image_processor)


class _Parser(HfArgumentParser):
    def error(self, message: str):
        raise RecipeError(message)


def parse_recipe(config: str | None, flags: Sequence[str] = ()) -> tuple[Recipe, IPGConfig, dict[str, Any]]:
    """Reads a recipe.

    Args:
        config: path of a YAML file of `key: value`, the keys being the fields of [`Recipe`] and [`IPGConfig`].
        flags: `--key value ...`, which win over the file.

    Returns:
        The recipe, the training settings, and all that was given, as plain values.

    Raises:
        RecipeError: the file is missing or not a mapping; a key is unknown (the nearest is named); a value is of the
            wrong type or out of range.
    """
    return parse_settings(read_yaml(config) if config else {}, flags, title=str(config))


def parse_settings(
    given: Mapping[str, Any], flags: Sequence[str] = (), *, title: str
) -> tuple[Recipe, IPGConfig, dict[str, Any]]:
    """As [`parse_recipe`], of the settings that a file holds; `title` names their place in an error."""
    parser = _Parser((Recipe, IPGConfig), allow_abbrev=False, add_help=False)
    actions = {option: action for action in parser._actions for option in action.option_strings}
    for key in given:
        if f"--{key}" not in actions:
            raise RecipeError(f"{title}: unknown key {key!r}.{nearest(key, [name[2:] for name in actions])}")
    words = [word for key, value in given.items() for word in _as_flag(key, value)]
    try:
        parser.parse_args(words)
    except RecipeError as failure:
        raise RecipeError(f"{title}: {failure}") from failure
    for word in flags:
        name = word.split("=")[0]
        if word.startswith("--") and name not in actions:
            raise RecipeError(f"unknown flag {name}.{nearest(name, actions)}")
    values = vars(_only_given(words, flags))
    try:
        recipe, args = parser.parse_args_into_dataclasses([*words, *flags], look_for_args_file=False)
    except RecipeError:
        raise
    except ValueError as failure:
        raise RecipeError(str(failure)) from failure
    if recipe.repeat_errors and args.objective != "erm":
        raise RecipeError(f"repeat_errors trains plainly twice: leave objective at erm (now {args.objective}).")
    return recipe, args, {key: getattr(recipe, key, value) for key, value in values.items()}


def _called(function: Callable, options: Mapping[str, Any], *args: Any, **defaults: Any) -> Any:
    """Calls a function of the library with options of a recipe, which win over the defaults that it knows.

    Raises:
        RecipeError: an option is none of its arguments, or one that it needs is missing.
    """
    known = [*signature(function).parameters][len(args) :]
    for name in options:
        if name not in known and "options" not in known:
            raise RecipeError(f"{function.__name__} has no option {name!r}.{nearest(name, known)}")
    defaults = {name: value for name, value in defaults.items() if name in known or "options" in known}
    try:
        return function(*args, **{**defaults, **options})
    except TypeError as failure:
        raise RecipeError(f"{function.__name__}: {failure}.") from failure


def settings_help() -> str:
    """A line for each setting of a recipe and of the method, with its default."""
    inherited = {field.name: field.default for field in fields(TrainingArguments)}
    settings = [f for f in fields(IPGConfig) if f.name not in inherited or inherited[f.name] is not f.default]
    own = [*fields(Recipe), *settings]
    lines = [f"  --{field.name:<28}{field.metadata['help']} [{field.default}]" for field in own]
    return "\n".join(["settings, in the file or as flags, beside all of transformers.TrainingArguments:", *lines])


def _only_given(*words: Sequence[str]) -> argparse.Namespace:
    """What was said, without the defaults."""
    parser = _Parser((Recipe, IPGConfig), allow_abbrev=False, add_help=False)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return parser.parse_args([word for part in words for word in part])


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """The mapping that a YAML file holds."""
    if not os.path.isfile(path):
        raise RecipeError(f"{path}: no such file.")
    with open(path, encoding="utf-8") as file:
        try:
            values = yaml.safe_load(file)
        except yaml.YAMLError as failure:
            raise RecipeError(f"{path} is not YAML: {failure}") from failure
    if not isinstance(values, dict):
        raise RecipeError(f"{path} must be a mapping of keys to values, but is a {type(values).__name__}.")
    return values


def _check_keys(setting: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise RecipeError(f"{setting}: {name!r} is unknown.{nearest(name, known)}")


def _as_flag(key: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, dict):
        return [f"--{key}", json.dumps(value)]
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    # one word, so that a negative number is not read as a flag
    return [f"--{key}={value}"]


def nearest(name: str, known: Any) -> str:
    """The end of an error message: the known name that is meant, or the known names."""
    near = difflib.get_close_matches(name, [*map(str, known)], n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(sorted(map(str, known))[:12])}."
