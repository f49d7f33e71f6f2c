# SPDX-License-Identifier: Apache-2.0
"""Options of version 0.1 that have another place now. They work in this release, with a warning that names the place.

Everything here goes in the next release: this module, its uses in `config`, `trainer` and `recipe`, and its test. Two
lines of `callbacks.PairProgress.restore` read checkpoints of 0.1: they go too.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import yaml

# option -> (module of ipg_hf.baselines, its config class, the old default)
MOVED = {
    "pair_objective": ("pair_penalties", "PairPenaltyConfig", "ipg"),
    "pair_penalty_weight": ("pair_penalties", "PairPenaltyConfig", 1.0),
    "environment_penalty_weight": ("environments", "EnvironmentConfig", 1.0),
    "environment_penalty_start": ("environments", "EnvironmentConfig", 0),
    "loss_scaling": ("ablations", "AblationConfig", "adaptive"),
    "shared_optimizer_state": ("ablations", "AblationConfig", True),
    "rationale_norm": ("ablations", "AblationConfig", "spectral"),
    "pair_combination": ("ablations", "AblationConfig", "mean"),
}
# option -> (values that change nothing, what to do instead)
REMOVED = {
    "pair_source": (("pairs",), "give the trainer a pair_dataset: pairs of the training batch were slower and worse"),
    "pair_cache": (("none", "cpu", "device"), "use ImageRows(..., preload=True), or preload: true in a recipe"),
    "pair_seed": ((None,), "set data_seed, which the order of the pairs follows"),
    "pair_num_workers": ((None,), "set dataloader_num_workers, which loads the pairs too"),
}
# the same of settings that only recipes had
REMOVED_FROM_RECIPES = {
    "degrade_pairs": ((None, {}), "make the pairs in Python with ipg_hf.baselines.degrade_pairs"),
}
ENVIRONMENT_OBJECTIVES = ("irm", "vrex")
# options that did nothing without the option that chose the baseline -> that option, and the values that chose it
CHOSEN_BY = {
    "pair_penalty_weight": ("pair_objective", ("kl", "features", "rationales", "augmentation")),
    "environment_penalty_weight": ("objective", ENVIRONMENT_OBJECTIVES),
    "environment_penalty_start": ("objective", ENVIRONMENT_OBJECTIVES),
}
# mappings of a recipe -> their keys that have another name now
MAPPINGS = {"last_layer": {}, "repeat_errors": {"steps": "first_steps", "factor": "upweight"}}


def accept_moved_options(config: type) -> type:
    """Class decorator of `IPGConfig`: takes the moved options, and makes the config of the baseline that has them.

    Raises:
        ValueError: options of two baselines, or a removed option with a value that cannot be ignored.
    """
    init = config.__init__

    @functools.wraps(init)
    def with_moved(self: Any, *args: Any, **given: Any) -> None:
        kept, place = _without_moved(given)
        if place is None:
            init(self, *args, **kept)
            return
        module, name = place
        self.__class__ = getattr(import_module(f".baselines.{module}", __package__), name)
        self.__init__(*args, **kept)

    config.__init__ = with_moved
    return config


def trainer_for(trainer: type, args: Any) -> type:
    """The trainer class that belongs to a config which [`accept_moved_options`] turned into one of a baseline.

    Raises:
        ValueError: `trainer` is a user's own subclass of `IPGTrainer`, which does not do what the baseline does.
    """
    from .baselines import METHODS

    for method in METHODS.values():
        if type(args) is not method.config or issubclass(trainer, method.trainer):
            continue
        if issubclass(method.trainer, trainer):
            return method.trainer
        if isinstance(args, trainer.config_class):
            raise ValueError(
                f"args is a {type(args).__name__}, on which {trainer.__name__} does not act: make {trainer.__name__} "
                f"extend {method.trainer.__module__}.{method.trainer.__name__}."
            )
    return trainer


def moved_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a recipe of version 0.1 under their names of today.

    Args:
        given: key -> value, of the YAML file or of flags.

    Raises:
        ValueError: a removed setting with a value that cannot be ignored; settings that no one method has.
    """
    settings = dict(given)
    for name, removed in (REMOVED | REMOVED_FROM_RECIPES).items():
        if name in settings:
            _check_removed(name, settings.pop(name), removed)
    method = settings.get("method") or "ipg"
    if method not in ("ipg", "erm"):
        return settings  # a recipe of today
    with_pairs, without_pairs, own = {}, {}, {}  # old setting -> method of today; settings of that method
    for name in [name for name in MOVED if name in settings]:
        module, _, default = MOVED[name]
        option, values = CHOSEN_BY.get(name, (name, ()))
        if name == "pair_objective":
            value = settings.pop(name)
            if value not in (None, default):
                with_pairs[name] = value
        elif module == "ablations":
            if settings[name] in (None, default) or method == "erm":
                del settings[name]
            else:
                with_pairs[name] = "ablation"
        elif given.get(option) not in values or (module == "pair_penalties" and method == "erm"):
            del settings[name]
    if settings.get("objective") in ENVIRONMENT_OBJECTIVES:
        without_pairs["objective"] = settings.pop("objective")
    for name, renamed in MAPPINGS.items():
        options = settings.pop(name, None) or {}
        options = yaml.safe_load(options) if isinstance(options, str) else options
        if not isinstance(options, Mapping):
            raise ValueError(f"{name}={options!r} must be a mapping of names to values.")
        own |= {renamed.get(key, key): value for key, value in options.items()}
        if options:
            without_pairs[name] = own.pop("method", "dfr or project") if name == "last_layer" else "jtt"
    if method == "ipg" and without_pairs:
        name, other = next(iter(without_pairs.items()))
        raise ValueError(f"{name} does not combine with method='ipg': write method: {other}, which trains as erm does.")
    chosen = with_pairs if method == "ipg" else without_pairs
    if len({*chosen.values()}) > 1:
        raise ValueError(f"{', '.join(chosen)} are settings of several methods ({[*chosen.values()]}): choose one.")
    if chosen:
        own["method"] = next(iter(chosen.values()))
    moved = [name for name in given if name in {*MOVED, *MAPPINGS} or name in chosen]
    if moved:
        now = ", ".join(f"{key}: {value}" for key, value in own.items()) or "nothing"
        _warn(f"{', '.join(moved)} moved in ipg_hf 0.2: write {now} in a recipe of method {method} instead.")
    return settings | own


def split_moved_flags(flags: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Splits flags into old settings (parsed) and the remaining words; [`moved_settings`] takes the settings."""
    names = {*MOVED, *REMOVED, *REMOVED_FROM_RECIPES, *MAPPINGS, "method", "objective"}
    settings, rest, words = {}, [], list(flags)
    while words:
        name, is_joined, value = words.pop(0).partition("=")
        key = name.removeprefix("--")
        if not name.startswith("--") or key not in names or not (is_joined or words):
            rest.append(f"{name}{is_joined}{value}")
            continue
        settings[key] = yaml.safe_load(value if is_joined else words.pop(0))
    return settings, rest


def _without_moved(given: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, str] | None]:
    """The options without those that change nothing, and the module and class of the config that the others need."""
    kept, places = dict(given), set()
    for name in [name for name in REMOVED if name in kept]:
        _check_removed(name, kept.pop(name), REMOVED[name])
    for name in [name for name in MOVED if name in kept]:
        module, config, default = MOVED[name]
        option, values = CHOSEN_BY.get(name, (name, (kept[name],)))
        if kept[name] == default or given.get(option) not in values:
            _warn(f"{name} moved to ipg_hf.baselines.{module}.{config}: leave it out, it changes nothing here.")
            del kept[name]
            continue
        _warn(f"{name} moved to ipg_hf.baselines.{module}.{config}: use that config, and its trainer.")
        places.add((module, config))
    if kept.get("objective") in ENVIRONMENT_OBJECTIVES:
        _warn(f"objective={kept['objective']!r} moved to ipg_hf.baselines.environments.EnvironmentConfig.")
        places.add(("environments", "EnvironmentConfig"))
    if len(places) > 1:
        raise ValueError(
            f"{', '.join(name for name in kept if name in {*MOVED, 'objective'})} are options of several baselines "
            f"({', '.join(sorted(config for _, config in places))}): choose one."
        )
    return kept, next(iter(places), None)


def _check_removed(name: str, value: Any, removed: tuple[tuple, str]) -> None:
    ignored, instead = removed
    if value not in ignored:
        raise ValueError(f"{name}={value!r} was removed in ipg_hf 0.2: {instead}.")
    _warn(f"{name} was removed in ipg_hf 0.2 and is ignored: {instead}.")


def _warn(text: str) -> None:
    warnings.warn(text, FutureWarning, stacklevel=4)
