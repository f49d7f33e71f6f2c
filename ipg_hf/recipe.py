# SPDX-License-Identifier: Apache-2.0
"""A recipe: a YAML file of settings, overridden by flags, and the data, model and image processor that it names."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from functools import partial
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

from .baselines import METHODS
from .config import IPGConfig
from .data import LOADERS, About, Benchmark, load_hub
from .models import load_image_classifier
from .moved import moved_settings, split_moved_flags
from .names import nearest
from .pairs import (
    AdversarialPairs,
    add_masks,
    background_pairs,
    exchange_pairs,
    extend_pairs,
    match_pairs,
    mix_pairs,
    overlay_pairs,
    pairs_from_folders,
    pairs_from_table,
    recolor_pairs,
)
from .pairs.checks import ONLY_SET, named_sets, title_of
from .pairs.classes import match_labels
from .pairs.masking import load_segmenter

logger = logging.getLogger(__name__)

# makers of the training images, and of files
MAKERS: dict[str, Callable] = {
    "recolor": recolor_pairs,
    "overlay": overlay_pairs,
    "background": background_pairs,
    "exchange": exchange_pairs,
    "match": match_pairs,
    "adversarial": AdversarialPairs,
    "folders": pairs_from_folders,
    "table": pairs_from_table,
}
FROM_FILES = ("folders", "table")
MASKED = ("background", "exchange")  # makers that need masks, which a `segmenter` can make
EDITS = (
    "recolor",
    "overlay",
    "exchange",
)  # makers of pairs of any single image, so also of those of validation and test
MAPPINGS = ("dataset_options", "pairs", "extend_pairs", "mix_pairs", "model_config", "image_processor", "about")


class RecipeError(ValueError):
    """A recipe or a flag that cannot be used; the message names it and the fix."""


@dataclass
class Recipe:
    """The data, the model and the method of a run; the settings of the training are those of the method's config.

    Args:
        dataset: name of a benchmark in `ipg_hf.data.LOADERS`; `"files"` is a folder of your own, `"user/name"` a set on
            the Hub.
        dataset_options: further arguments of its loader.
        data_dir: folder of the benchmark's files; without it the environment variable `IPG_DATA`, then the Hub.
        num_pairs: number of training pairs; `None` is the benchmark's own number.
        oriented_pairs: `False` swaps the sides of a random half of the training pairs (an ablation).
        pairs: how the training pairs are made: `{"maker": NAME, ...}` with the arguments of a maker of [`MAKERS`]
            (of a maker that needs masks also `segmenter`, the name of a model that makes them), or
            `{SET: {"maker": ...}, ...}` for several sets; by default the benchmark's own pairs.
        pair_sets: names of the pair sets to train with, where a benchmark has several; by default all.
        extend_pairs: `{"num_pairs": 20000}` makes that many pairs of the training images, by the colour map that the
            training pairs show (`pairs.extend_pairs`); `{"num_pairs": null}` uses all training images.
        mix_pairs: `{"num_pairs": 20000}` makes that many pairs by mixing the training pairs (`pairs.mix_pairs`).
        method: name of a method in `ipg_hf.baselines.METHODS`: `"ipg"`; `"erm"`, plain training without the pairs; or a
            baseline, whose config has settings of its own.
        compare: `"erm"` trains the same model without pairs too, in the folder `erm` of the output folder.
        model_name_or_path: a Hub id or a local folder to fine-tune.
        model_type: a transformers model type to train from scratch, instead of `model_name_or_path`.
        model_config: settings of the config of that model type.
        image_processor: settings of a `ViTImageProcessor`, for a model from scratch, or to replace the processor of a
            pretrained model (for another size, say).
        channels_last: store the weights of convolutions channels last (`torch.channels_last`). Image networks run
            faster so on most processors, and with reduced precision on GPUs.
        preload: transform all images once and keep them in memory; only without random crops and flips.
        preload_dir: with `preload`, a folder that keeps the transformed images for the next run. They are used as long
            as the images, the processor and the versions of the packages are the same.
        measure_test: read the test set, once, at the end; `False` for a run by which settings are chosen.
        about: what the model card says of the data, in place of what is known of the benchmark: the fields of
            `data.About` (`title`, `attribute`, `shortcut`, `pairs`, `license`, `source`, `hub_set`).
        license: licence of the trained model, for its card, as the Hub spells it (`apache-2.0`).
        overwrite_output_dir: remove the run that the output folder holds.
    """

    dataset: str = field(default="digits", metadata={"help": f"A benchmark: {', '.join(LOADERS)}; or a Hub id."})
    dataset_options: dict | str | None = field(default=None, metadata={"help": "Arguments of its loader, as JSON."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder of the data files (else IPG_DATA, the Hub)."})
    num_pairs: int | None = field(default=None, metadata={"help": "Number of training pairs."})
    oriented_pairs: bool = field(default=True, metadata={"help": "Keep one attribute value on each side."})
    pairs: dict | str | None = field(default=None, metadata={"help": "A maker of pairs and its arguments, as JSON."})
    pair_sets: list[str] | None = field(default=None, metadata={"help": "Names of the pair sets to train with."})
    extend_pairs: dict | str | None = field(default=None, metadata={"help": "Make more by their colours, as JSON."})
    mix_pairs: dict | str | None = field(default=None, metadata={"help": "Enlarge the training pairs, as JSON."})
    method: str = field(default="ipg", metadata={"help": f"One of {', '.join(METHODS)}."})
    compare: Literal["none", "erm"] = field(default="none", metadata={"help": "Train without pairs (erm) too."})
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
        if self.dataset not in LOADERS and os.path.isdir(self.dataset):
            raise RecipeError(f"dataset={self.dataset!r} is a folder: set dataset: files and data_dir: {self.dataset}.")
        if self.dataset not in LOADERS and "/" not in self.dataset:
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
        if self.method not in METHODS:
            raise RecipeError(f"method={self.method!r} is unknown.{nearest(self.method, METHODS)}")

    @property
    def uses_pairs(self) -> bool:
        """Whether the method reads the training pairs."""
        return METHODS[self.method].uses_pairs

    def load_data(
        self, seed: int, *, with_pairs: bool = True, held_out: Sequence[str] = ("validation", "test")
    ) -> Benchmark:
        """Loads the benchmark.

        Args:
            seed: seed of all that is drawn.
            with_pairs: whether the recipe's makers make the training pairs, which an evaluation does not read.
            held_out: splits that are measured on held-out pairs. Where the benchmark has none of them, a maker that
                edits images makes them of the images of the split.
        """
        defaults = {"data_dir": self.data_dir, "num_pairs": self.num_pairs, "oriented_pairs": self.oriented_pairs}
        data = _called(self._loader(), self.dataset_options, seed=seed, **defaults)
        if self.pairs:
            made = {f"{split}_pairs": self._held_out_pairs(data, split, seed) for split in held_out}
            data = replace(data, **made)
        if not with_pairs:
            return replace(data, pairs=None)
        if self.pairs:
            if "maker" in self.pairs:
                pairs = self._make_pairs(self.pairs, data, seed)
            else:
                pairs = {name: self._make_pairs(options, data, seed) for name, options in self.pairs.items()}
            data = replace(data, pairs=pairs)
        if self.pair_sets is not None:
            sets = data.pairs if isinstance(data.pairs, dict) else {}
            for name in self.pair_sets:
                if name not in sets:
                    raise RecipeError(f"pair_sets: {self.dataset} has no pair set {name!r}.{nearest(name, sets)}")
            data = replace(data, pairs={name: sets[name] for name in self.pair_sets})
        if self.extend_pairs:
            data = self._enlarged(data, extend_pairs, self.extend_pairs, data.train, seed=seed)
        if self.mix_pairs:
            data = self._enlarged(data, mix_pairs, self.mix_pairs, seed=seed)
        return data

    def _enlarged(self, data: Benchmark, function: Callable, options: Mapping, *args: Any, seed: int) -> Benchmark:
        """The benchmark with each of its pair sets enlarged by `function(pairs, *args, **options)`."""
        made = {}
        for name, pairs in named_sets(data.pairs).items():
            try:
                made[name] = _called(function, options, pairs, *args, seed=seed)
            except ValueError as failure:
                raise RecipeError(f"{title_of('pairs', name)}: {failure}") from failure
        return replace(data, pairs=made if isinstance(data.pairs, dict) else made[ONLY_SET])

    def _held_out_pairs(self, data: Benchmark, split: str, seed: int) -> Any:
        """The held-out pairs of a split: those of the benchmark, or else those that the recipe's makers make of it."""
        own, images = getattr(data, f"{split}_pairs"), getattr(data, split)
        sets = {ONLY_SET: self.pairs} if "maker" in self.pairs else self.pairs
        if own is not None or not isinstance(images, datasets.Dataset):
            return own
        edits = {}
        for name, options in sets.items():
            options = dict(options) if isinstance(options, Mapping) else {"maker": options}
            needed = {options.get("attribute", "image")}
            is_masked = options.get("part") == "background" and "segmenter" not in options
            needed |= {options.get("mask", "mask")} if is_masked else set()
            if options.get("maker") not in EDITS or not needed <= {*images.column_names}:
                continue
            options |= {"num_pairs": None, "skip_unchanged": True}  # one grey image must not stop a training
            try:
                made = self._make_pairs(options, replace(data, train=images), seed)
            except ValueError as failure:
                if options["maker"] != "exchange":
                    raise
                # a split of one label, or without labels, has no images to exchange parts with
                logger.warning(f"{title_of('pairs', name)}: there are no held-out pairs of {split}: {failure}")
                continue
            if len(made):
                edits[name] = made
            else:
                logger.warning(
                    f"{title_of('pairs', name)}: maker {options['maker']} changes no image of {split}, so that there "
                    "are no held-out pairs of that split."
                )
        return edits.get(ONLY_SET, edits or None)

    def _loader(self) -> Callable[..., Benchmark]:
        """The loader of the benchmark, or of the Hub set where `dataset` is no benchmark's name."""
        return LOADERS.get(self.dataset) or partial(load_hub, self.dataset)

    def _make_pairs(self, options: Any, data: Benchmark, seed: int) -> Any:
        options = dict(options) if isinstance(options, Mapping) else {"maker": options}
        name = options.pop("maker", None)
        if name not in MAKERS:
            raise RecipeError(f"pairs: maker={name!r} is unknown.{nearest(str(name), MAKERS)}")
        maker, defaults = MAKERS[name], {"seed": seed, "num_pairs": self.num_pairs}
        if name in FROM_FILES:
            pairs = _called(maker, options, **defaults, oriented=self.oriented_pairs)
            names = data.label_names
            return match_labels(pairs, names, f"the pair set of maker {name}") if names else pairs
        if name == "adversarial":
            return _called(maker, options, data.train)
        if name in MASKED and (segmenter := options.pop("segmenter", None)):
            if name == "exchange" and options.get("part") != "background":
                raise RecipeError(f"pairs: part={options.get('part')!r} needs no masks: leave segmenter out.")
            column = {"column": options["mask"]} if "mask" in options else {}
            data = replace(data, train=_called(add_masks, column, data.train, *load_segmenter(segmenter)))
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


def parse_recipe(config: str | None, flags: Sequence[str] = ()) -> tuple[Recipe, IPGConfig, list[str]]:
    """Reads a recipe.

    Args:
        config: path of a YAML file of `key: value`; the keys are the fields of [`Recipe`] and of the method's config.
        flags: `--key value ...`, which win over the file.

    Returns:
        The recipe, the training settings (an instance of the method's config), and the names of the settings that the
        file or a flag gave.

    Raises:
        RecipeError: the file is missing or not a mapping; a key is unknown (the nearest is named); a value is of the
            wrong type or out of range.
    """
    return parse_settings(read_yaml(config) if config else {}, flags, title=str(config))


def parse_settings(
    given: Mapping[str, Any], flags: Sequence[str] = (), *, title: str
) -> tuple[Recipe, IPGConfig, list[str]]:
    """As [`parse_recipe`], of the settings in a file; `title` names the file in an error."""
    moved, flags = split_moved_flags(flags)
    given = moved_settings({**given, **moved})
    name = _method_of(given, flags)
    method = METHODS[name]
    parser = _Parser((Recipe, method.config), allow_abbrev=False, add_help=False)
    actions = {option: action for action in parser._actions for option in action.option_strings}
    for key in given:
        if f"--{key}" not in actions:
            raise RecipeError(f"{title}: unknown key {key!r}.{_hint(key, name, [option[2:] for option in actions])}")
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # what is not given has the defaults of the two classes
    words = [word for key, value in given.items() for word in _as_flag(key, value)]
    try:
        parser.parse_args(words)
    except RecipeError as failure:
        raise RecipeError(f"{title}: {failure}") from failure
    for word in flags:
        flag = word.split("=")[0]
        if word.startswith("--") and flag not in actions:
            raise RecipeError(f"unknown flag {flag}.{_hint(flag[2:], name, [option[2:] for option in actions])}")
    values = vars(parser.parse_args([*words, *flags]))
    for key, value in method.settings.items():
        if key in values:
            raise RecipeError(f"{title}: method={name!r} sets {key}={value!r} itself: leave {key} out.")
    names, of_recipe = [*values], {entry.name for entry in fields(Recipe)}
    settings = {key: value for key, value in values.items() if key not in of_recipe} | method.settings
    try:
        recipe = Recipe(**{key: value for key, value in values.items() if key in of_recipe})
        args = method.config(**settings)
    except RecipeError:
        raise
    except ValueError as failure:
        raise RecipeError(str(failure)) from failure
    return recipe, args, names


def _method_of(given: Mapping[str, Any], flags: Sequence[str]) -> str:
    """The method that a file or a flag names; the flag wins, the last of several."""
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    reader.add_argument("--method", default=given.get("method") or Recipe.method)
    try:
        name = str(reader.parse_known_args([*flags])[0].method)
    except argparse.ArgumentError as failure:
        raise RecipeError(str(failure)) from failure
    if name not in METHODS:
        raise RecipeError(f"method={name!r} is unknown.{nearest(name, METHODS)}")
    return name


def _hint(key: str, method: str, known: Sequence[str]) -> str:
    """The end of an error message of an unknown key: the methods that have it, or the nearest known name."""
    having = [name for name, entry in METHODS.items() if key in {part.name for part in fields(entry.config)}]
    if having:
        return f" method={method!r} has no such setting; it belongs to method {' or '.join(having)}."
    return nearest(key, known)


def _called(function: Callable, options: Mapping[str, Any], *args: Any, **defaults: Any) -> Any:
    """Calls a function of the library with options of a recipe; drops defaults that the function does not take.

    Raises:
        RecipeError: an option is none of its arguments, or one that it needs is missing.
    """
    known = [*signature(function).parameters][len(args) :]
    for name in options:
        if name not in known and "options" not in known:
            raise RecipeError(f"{_title(function)} has no option {name!r}.{nearest(name, known)}")
    defaults = {name: value for name, value in defaults.items() if name in known or "options" in known}
    try:
        return function(*args, **{**defaults, **options})
    except TypeError as failure:
        given = f" with {', '.join(f'{key}={value!r}' for key, value in options.items())}" if options else ""
        raise RecipeError(f"{_title(function)}{given}: {failure}.") from failure


def _title(function: Callable) -> str:
    return (function.func if isinstance(function, partial) else function).__name__


def settings_help() -> str:
    """A line for each setting of a recipe, of the method and of the baselines, with its default."""
    inherited = {entry.name: entry.default for entry in fields(TrainingArguments)}
    own = [f for f in fields(IPGConfig) if f.name not in inherited or inherited[f.name] is not f.default]
    lines = ["settings, in the file or as flags, beside all of transformers.TrainingArguments:"]
    lines += [_help_line(entry) for entry in [*fields(Recipe), *own]]
    known = {entry.name for entry in fields(IPGConfig)}
    for name, method in METHODS.items():
        own = [f for f in fields(method.config) if f.name not in known and f.name not in method.settings]
        lines += [f"settings of method {name}:", *map(_help_line, own)] if own else []
    return "\n".join(lines)


def _help_line(entry: Field) -> str:
    default = entry.default if entry.default_factory is MISSING else entry.default_factory()
    return f"  --{entry.name:<28}{entry.metadata['help']} [{default}]"


class _UniqueKeys(yaml.SafeLoader):
    """YAML, which forbids a key that stands twice in a mapping. PyYAML takes the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for number, key in enumerate(keys):
            if key.value in [other.value for other in keys[:number]]:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"the key {key.value!r} stands twice, again in line {line}: leave one out.")
        return super().construct_mapping(node, deep)


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """The mapping that a YAML file holds."""
    if not os.path.isfile(path):
        raise RecipeError(f"{path} is a folder: name a YAML file." if os.path.isdir(path) else f"{path}: no such file.")
    with open(path, encoding="utf-8") as file:
        try:
            values = yaml.load(file, _UniqueKeys)
        except yaml.YAMLError as failure:
            raise RecipeError(f"{path} is not YAML: {failure}") from failure
        except UnicodeDecodeError as failure:
            raise RecipeError(f"{path} is not UTF-8 ({failure}): save it as UTF-8.") from failure
    if not isinstance(values, dict):
        raise RecipeError(f"{path} must be a mapping of keys to values, but is a {type(values).__name__}.")
    if wrong := [key for key in values if not isinstance(key, str)]:
        raise RecipeError(f"{path}: the key {wrong[0]!r} is no text: write the name of a setting.")
    return values


def _as_flag(key: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, dict):
        return [f"--{key}", json.dumps(value)]
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    # one word, so that a negative number is not read as a flag
    return [f"--{key}={value}"]
