# SPDX-License-Identifier: Apache-2.0
"""Options of version 0.1 that have another place now. They work in this release, with a warning that names the place.

Everything here goes in the next release: this module, its uses in `config`, `trainer` and `recipe`, and its test.
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
ENVIRONMENT_OBJECTIVES = ("irm", "vrex")


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
    """The trainer class that belongs to a config which [`accept_moved_options`] turned into one of a baseline."""
    from .baselines import METHODS

    for method in METHODS.values():
        if type(args) is method.config and not issubclass(trainer, method.trainer):
            return method.trainer
    return trainer


def moved_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a recipe of version 0.1 under their names of today.

    Args:
        given: key -> value, of the YAML file or of flags.

    Raises:
        ValueError: a removed setting with a value that cannot be ignored.
    """
    settings, changes = dict(given), {}
    if settings.get("pair_objective", "ipg") != "ipg":
        changes["method"] = settings["pair_objective"]
    settings.pop("pair_objective", None)
    if settings.get("objective") in ENVIRONMENT_OBJECTIVES:
        changes["method"] = settings.pop("objective")
    layer, errors = settings.pop("last_layer", None), settings.pop("repeat_errors", None)
    if isinstance(layer, Mapping) and layer:
        changes |= dict(layer)  # its key `method` is dfr or project
    if isinstance(errors, Mapping) and errors:
        changes |= {"method": "jtt", "first_steps": errors.get("steps"), "upweight": errors.get("factor")}
    for name, (module, _, default) in MOVED.items():
        if module == "ablations" and name in settings:
            if settings[name] == default:
                del settings[name]
            else:
                changes["method"] = "ablation"
    for name in REMOVED:
        if name in settings:
            _check_removed(name, settings.pop(name))
    if settings != dict(given):
        now = {key: value for key, value in changes.items()} or "nothing"
        gone = sorted({*given} - {*settings})
        _warn(f"{', '.join(gone)} moved in ipg_hf 0.2: write {now} in a recipe instead.")
    return settings | changes


def split_moved_flags(flags: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The moved settings among command-line flags, as a recipe would give them, and the other words."""
    settings, rest, words = {}, [], list(flags)
    while words:
        name, is_joined, value = words.pop(0).partition("=")
        key = name.removeprefix("--")
        if not name.startswith("--") or key not in {*MOVED, *REMOVED, "last_layer", "repeat_errors"}:
            rest.append(f"{name}{is_joined}{value}")
            continue
        settings[key] = yaml.safe_load(value if is_joined else words.pop(0) if words else "")
    return settings, rest


def _without_moved(given: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, str] | None]:
    """The options without those that change nothing, and the module and class of the config that the others need."""
    kept, places = dict(given), set()
    for name in [name for name in REMOVED if name in kept]:
        _check_removed(name, kept.pop(name))
    for name in [name for name in MOVED if name in kept]:
        module, config, default = MOVED[name]
        if kept[name] == default:
            _warn(f"{name} moved to ipg_hf.baselines.{module}.{config}: leave it out, {default!r} is what happens.")
            del kept[name]
            continue
        _warn(f"{name} moved to ipg_hf.baselines.{module}.{config}: use that config, and its trainer.")
        places.add((module, config))
    if kept.get("objective") in ENVIRONMENT_OBJECTIVES:
        _warn(f"objective={kept['objective']!r} moved to ipg_hf.baselines.environments.EnvironmentConfig.")
        places.add(("environments", "EnvironmentConfig"))
    if len(places) > 1:
        raise ValueError(f"{sorted(given)} hold options of {len(places)} baselines ({sorted(places)}): choose one.")
    return kept, next(iter(places), None)


def _check_removed(name: str, value: Any) -> None:
    ignored, instead = REMOVED[name]
    if value not in ignored:
        raise ValueError(f"{name}={value!r} was removed in ipg_hf 0.2: {instead}.")
    _warn(f"{name} was removed in ipg_hf 0.2 and is ignored: {instead}.")


def _warn(text: str) -> None:
    warnings.warn(text, FutureWarning, stacklevel=4)
