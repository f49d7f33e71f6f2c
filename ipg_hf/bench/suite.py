# SPDX-License-Identifier: Apache-2.0
"""A suite: a YAML file that names the methods to compare on one benchmark; its runs and their records."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
from transformers import TrainingArguments

from ..baselines import METHODS
from ..metrics import METRICS, WORST_GROUP
from ..names import nearest
from ..recipe import Recipe, RecipeError, parse_settings, read_yaml
from ..record import NOT_RECORDED, read_records, resolved_settings

# settings that ipg bench gives each run; in a suite they would break the protocol
OWN = (
    "seed",
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "measure_test",
    "compare",
    "push_to_hub",
)
# the first five are needed
KEYS = ("title", "recipe", "seeds", "reference", "methods", "settings", "tuning", "grid", "ungridded", "retired")
ALL = "all"
OF_TRAINER = {entry.name for entry in fields(TrainingArguments)}


@dataclass(frozen=True)
class Tuning:
    """How settings are chosen: every method gets the same number of random configurations.

    Args:
        draws: number of random configurations of each method.
        seed: seed of the draws, and of their runs.
        ranges: `"all"` or a method's name -> key -> `[low, high, "log" or "linear"]`, or a list of choices.
    """

    draws: int
    ranges: Mapping[str, Mapping[str, list]]
    seed: int = 0


@dataclass(frozen=True)
class Suite:
    """A comparison of methods.

    Args:
        path: the YAML file.
        title: title of the table and the figure.
        base: the settings that all methods share; a key that the suite sets to null is left out.
        seeds: seeds of the runs that are compared.
        references: the methods that differences are taken to.
        methods: name of a row -> the settings in which it departs from the shared ones; a mapping as a value replaces
            the shared mapping whole.
        tuning: how settings are chosen, or `None` where they are given.
        grid: one key or two -> the values that the key takes, with a run for each seed at every point. Tuning chooses
            by the shared settings, and its choice is used at every point. Empty: no grid.
        ungridded: methods that the grid does not vary; they run by the shared settings alone.
        retired: name of a row that no code can run any more -> why. Its records stay, and are shown.
    """

    path: Path
    title: str
    base: Mapping[str, Any]
    seeds: Sequence[int]
    references: Sequence[str]
    methods: Mapping[str, Mapping[str, Any]]
    tuning: Tuning | None
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    ungridded: Sequence[str] = ()
    retired: Mapping[str, str] = field(default_factory=dict)

    @property
    def records(self) -> Path:
        """The file of the suite's records; `records` lies beside the suite, or beside its folder `suites`."""
        return self._home / "records" / f"{self.path.stem}.jsonl"

    @property
    def results(self) -> Path:
        """The folder of the suite's table and figures; `results` lies beside `records`."""
        return self._home / "results" / self.path.stem

    @property
    def _home(self) -> Path:
        folder = self.path.resolve().parent
        return folder.parent if folder.name == "suites" else folder


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        name: `<method>-draw<k>`, `<method>-seed<n>`, or at a point of a grid `<method>-<key>-<value>-seed<n>`.
        settings: what is given to it.
        records: the file that its record is appended to.
    """

    name: str
    settings: Mapping[str, Any]
    records: Path


def load_suite(path: str | Path) -> Suite:
    """Reads a suite and validates the settings of each of its runs.

    Raises:
        RecipeError: the file, its recipe or a value cannot be used; the message names the value and the fix.
    """
    path = Path(path)
    given = read_yaml(path)
    _known(given, KEYS, str(path))
    for key in KEYS[:5]:
        _require(key in given, f"{path}: {key} is missing.")
    given["reference"] = [given["reference"]] if isinstance(given["reference"], str) else given["reference"]
    for key, kind in {"title": str, "recipe": str, "seeds": list, "reference": list, "methods": dict}.items():
        _require(isinstance(given[key], kind), f"{path}: {key}={given[key]!r} must be a {kind.__name__}.")
    recipe, changes = path.parent / given["recipe"], _changes(given.get("settings"), f"{path}: settings")
    shared = read_yaml(recipe)
    _check(shared, str(recipe))
    suite = Suite(
        path=path,
        title=given["title"],
        base={key: value for key, value in {**shared, **changes}.items() if key not in OWN and value is not None},
        seeds=given["seeds"],
        references=given["reference"],
        methods={name: _changes(value, f"{path}: methods: {name}") for name, value in given["methods"].items()},
        tuning=_tuning(given.get("tuning"), f"{path}: tuning"),
        grid=_grid(given.get("grid"), f"{path}: grid"),
        ungridded=given.get("ungridded", []),
        retired=given.get("retired") or {},
    )
    _validate(suite)
    return suite


def draws(suite: Suite, method: str) -> list[dict[str, Any]]:
    """The settings that tuning tries for a method.

    Draw k of a key depends only on the seed, the key and its range. So methods with the same range get the same draws,
    and further draws, methods or keys change none of the others.

    Returns:
        `tuning.draws` dicts of key -> value, numbers with three significant digits.
    """
    config = METHODS[{**suite.base, **suite.methods[method]}.get("method", Recipe.method)].config
    hints = get_type_hints(config) | get_type_hints(Recipe)
    columns = {}
    for key, values in _ranges(suite, method).items():
        stream = np.random.default_rng([suite.tuning.seed, zlib.crc32(key.encode())])
        # an int, or one that may be None
        whole = hints[key] is int or int in get_args(hints[key])
        columns[key] = [_at(values, share, whole) for share in stream.random(suite.tuning.draws)]
    return [{key: column[number] for key, column in columns.items()} for number in range(suite.tuning.draws)]


def draw_runs(suite: Suite, method: str) -> list[Run]:
    """The tuning runs of a method, which do not read the test set; an empty list without tuning."""
    if suite.tuning is None:
        return []
    own = {"seed": suite.tuning.seed, "measure_test": False}
    return [
        _run(suite, f"{method}-draw{number}", {**suite.methods[method], **drawn, **own})
        for number, drawn in enumerate(draws(suite, method))
    ]


def points(suite: Suite, method: str) -> list[dict[str, Any]]:
    """The points of the grid at which a method is run; one point without a key where the grid does not vary it."""
    if method in suite.ungridded:
        return [{}]
    return [dict(zip(suite.grid, values, strict=True)) for values in product(*suite.grid.values())]


def seed_runs(suite: Suite, method: str, drawn: Mapping[str, Any], point: Mapping[str, Any] | None = None) -> list[Run]:
    """The runs of a method that are compared.

    Args:
        suite: the suite.
        method: one of its methods.
        drawn: the settings that tuning has chosen.
        point: point of the grid, one of those that [`points`] returns.
    """
    point = point or {}
    name = "-".join([method, *(f"{key}-{_word(value)}" for key, value in point.items())])
    changes = {**suite.methods[method], **drawn, **point}
    return [_run(suite, f"{name}-seed{seed}", {**changes, "seed": seed}) for seed in suite.seeds]


def chosen(
    suite: Suite, method: str, records: Mapping[str, Mapping[str, Any]]
) -> tuple[int | None, dict[str, Any]] | None:
    """The draw with the best worst group on validation (accuracy highest or error lowest; of equals the earliest).

    Args:
        suite: the suite.
        method: one of its methods.
        records: name of a run -> its record.

    Returns:
        Its number and its settings; `(None, {})` without tuning; `None` while a draw has no record.
    """
    if suite.tuning is None:
        return None, {}
    tried = draw_runs(suite, method)
    if any(run.name not in records for run in tried):
        return None
    scores = [validation_score(records[run.name]) for run in tried]
    number = scores.index(max(scores))
    return number, draws(suite, method)[number]


def validation_score(record: Mapping[str, Any]) -> float:
    """The score that tuning maximises: worst-group accuracy or minus the worst-group error; -inf of a diverged run."""
    metrics = record["metrics"].get("validation", {})  # none of a run that diverged
    for name in WORST_GROUP:
        if name in metrics and not math.isnan(metrics[name]):
            return metrics[name] if METRICS[name].direction == "higher" else -metrics[name]
    return -math.inf


def suite_records(suite: Suite) -> dict[str, dict[str, Any]]:
    """The records of a suite, by the name of the run.

    Raises:
        RecipeError: a record was made with other settings, stands twice, belongs to no run of the suite, or to a method
            whose settings are not chosen.
    """
    found: dict[str, dict[str, Any]] = {}
    for record in read_records(suite.records):
        _require(record["run"] not in found, f"{suite.records} has two records of {record['run']}: remove one line.")
        found[record["run"]] = record
    expected, waiting = {}, {}
    for method in suite.methods:
        tried, choice = draw_runs(suite, method), chosen(suite, method, found)
        runs = [
            run for point in points(suite, method) for run in seed_runs(suite, method, (choice or (0, {}))[1], point)
        ]
        expected |= {run.name: run for run in [*tried, *(runs if choice else [])]}
        waiting |= {run.name: len(tried) for run in runs if not choice}
    for name, record in found.items():
        if name in waiting:
            raise RecipeError(
                f"{suite.records} has {name}, but of the {waiting[name]} draws that choose its settings some have no "
                f"record: run ipg bench {suite.path} --only tune, or remove its line."
            )
        if name in expected:
            _check_settings(record, expected[name])
        elif not any(re.fullmatch(rf"{retired}-.*", name) for retired in suite.retired):
            raise RecipeError(
                f"{suite.records} has {name}, which is no run of {suite.path}: put its method, seed or draw back into "
                "the suite, or remove its line."
            )
    return found


def _check_settings(record: Mapping[str, Any], run: Run) -> None:
    """Compares the settings of a record with those of its run; "not recorded" is no difference."""
    recorded, wanted = record["settings"], _resolved(run.settings)
    # of TrainingArguments only what the suite gives: other defaults come with other versions of transformers
    keys = [key for key in wanted if key not in OF_TRAINER or key in run.settings]
    differing = [key for key in keys if recorded.get(key) not in (NOT_RECORDED, wanted[key])]
    if differing:
        shown = ", ".join(f"{key}={recorded.get(key)!r} (now {wanted[key]!r})" for key in differing[:3])
        raise RecipeError(
            f"{run.records} has {run.name}, made with other settings than the suite has now: {shown}. Put the suite "
            "back as it was, or remove its line so that the run is made anew."
        )


def _resolved(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a run's record will have, as JSON gives them back."""
    own = {key: settings[key] for key in ("seed", "measure_test") if key in settings}
    shared = {key: value for key, value in settings.items() if key not in own}
    return _resolved_text(json.dumps(shared)) | own


@cache  # the runs of a row differ in little more than the seed, and reading settings takes some hundredths of a second
def _resolved_text(settings: str) -> dict[str, Any]:
    recipe, args, _ = parse_settings(json.loads(settings), title="settings")
    return json.loads(json.dumps(resolved_settings(recipe, args)))


def _run(suite: Suite, name: str, changes: Mapping[str, Any]) -> Run:
    return Run(name, {**suite.base, **changes}, suite.records)


def _ranges(suite: Suite, method: str) -> dict[str, list]:
    return {**suite.tuning.ranges.get(ALL, {}), **suite.tuning.ranges.get(method, {})}


def _at(values: list, share: float, whole: bool) -> Any:
    """The value of a range at a share in [0, 1) of it."""
    if not _is_interval(values):
        return values[int(share * len(values))]
    low, high, scale = values
    value = low * (high / low) ** share if scale == "log" else low + (high - low) * share
    return round(value) if whole else float(f"{value:.3g}")


def _is_interval(values: list) -> bool:
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values[:2])
    return len(values) == 3 and numbers and isinstance(values[2], str)


def _tuning(given: Any, place: str) -> Tuning | None:
    if given is None:
        return None
    _require(isinstance(given, dict), f"{place}={given!r} must be a mapping of draws, seed and ranges.")
    _known(given, [field.name for field in fields(Tuning)], place)
    for key in ("draws", "ranges"):
        _require(key in given, f"{place}: {key} is missing.")
    draws, seed, ranges = given["draws"], given.get("seed", 0), given["ranges"]
    _require(isinstance(draws, int) and draws >= 1, f"{place}: draws={draws!r} must be a whole number of 1 or more.")
    _require(isinstance(seed, int) and seed >= 0, f"{place}: seed={seed!r} must be a whole number of 0 or more.")
    _require(isinstance(ranges, dict), f"{place}: ranges={ranges!r} must be a mapping of {ALL!r} or a method to keys.")
    for name, part in ranges.items():
        for key, values in _changes(part, f"{place}: ranges: {name}").items():
            _check_range(values, f"{place}: ranges: {name}: {key}={values!r}")
    return Tuning(draws, {name: part or {} for name, part in ranges.items()}, seed)


def _check_range(values: Any, place: str) -> None:
    whole = isinstance(values, list) and len(values) > 0
    _require(whole, f"{place} must be [low, high, log], [low, high, linear] or a list of choices.")
    if _is_interval(values):
        low, high, scale = values
        _require(scale in ("log", "linear"), f"{place}: the scale must be log or linear.")
        _require(-math.inf < low < high < math.inf, f"{place}: the first number must be the lower one, both finite.")
        _require(scale == "linear" or low > 0, f"{place}: a log range must begin above 0.")


def _validate(suite: Suite) -> None:
    path = suite.path
    _require(len(suite.methods) > 0, f"{path}: methods is empty.")
    for name in suite.methods:
        valid = isinstance(name, str) and re.fullmatch(r"\w+", name) and name != ALL
        _require(bool(valid), f"{path}: methods: {name!r} must be of letters, digits and _, and not {ALL!r}.")
    _require(
        isinstance(suite.retired, dict), f"{path}: retired={suite.retired!r} must be a mapping of rows to reasons."
    )
    for name in suite.retired:
        _require(name not in suite.methods, f"{path}: retired: {name!r} is one of the methods too: leave one out.")
    seeds = suite.seeds
    valid = seeds and all(type(seed) is int and seed >= 0 for seed in seeds) and len({*seeds}) == len(seeds)
    _require(bool(valid), f"{path}: seeds={seeds!r} must be different whole numbers of 0 or more.")
    _known(suite.references, suite.methods, f"{path}: reference")
    if suite.tuning:
        _known(suite.tuning.ranges, [ALL, *suite.methods], f"{path}: tuning: ranges")
    for name, changes in suite.methods.items():
        place = f"{path}: methods: {name}"
        _check({**suite.base, **changes}, place)
        if suite.tuning is None:
            continue
        ranges = _ranges(suite, name)
        _require(bool(ranges), f"{place}: tuning has nothing to draw for it: give tuning: ranges: {name}, or {ALL}.")
        for key, values in ranges.items():
            for value in values[:2] if _is_interval(values) else values:
                _check({**suite.base, **changes, key: value}, f"{path}: tuning: ranges of {name}: {key}={value!r}")
        for number, drawn in enumerate(draws(suite, name)):
            _check({**suite.base, **changes, **drawn}, f"{place}: draw {number}, {drawn}")
    _validate_grid(suite)


def _grid(given: Any, place: str) -> dict[str, list]:
    if given is None:
        return {}
    valid = isinstance(given, dict) and len(given) in (1, 2)
    _require(valid, f"{place}={given!r} must be a mapping of one key or two to lists of values.")
    for key, values in _changes(given, place).items():
        named = f"{place}: {key}={values!r}"
        _require(isinstance(values, list) and len(values) > 0, f"{named} must be a list of values.")
        for value in values:
            number = isinstance(value, (int, float)) and value == value
            valid = number or (isinstance(value, str) and re.fullmatch(r"[a-zA-Z]\w*", value))
            _require(
                bool(valid), f"{named}: {value!r} must be a number (as YAML reads it: 1.0e-4, not 1e-4) or a word."
            )
        _require(len({*map(_word, values)}) == len(values), f"{named}: each value may be given once.")
    return given


def _word(value: Any) -> str:
    """A value of a grid in the name of a file."""
    exact = isinstance(value, float) and float(f"{value:g}") == value
    return (f"{value:g}" if exact else str(value)).replace("+", "")


def _validate_grid(suite: Suite) -> None:
    path, ungridded = suite.path, suite.ungridded
    valid = isinstance(ungridded, list) and (bool(suite.grid) or not ungridded)
    _require(valid, f"{path}: ungridded={ungridded!r} must be a list of methods, beside a grid.")
    _known(ungridded, suite.methods, f"{path}: ungridded")
    gridded = [name for name in suite.methods if name not in ungridded]
    _require(bool(gridded), f"{path}: ungridded names every method: leave one to the grid.")
    for name in gridded if suite.grid else ():
        ranges = _ranges(suite, name) if suite.tuning else {}
        for key in suite.grid:
            twice = key in suite.methods[name] or key in ranges
            _require(not twice, f"{path}: methods: {name}: {key!r} is set by the grid too: leave one out.")
        for point in points(suite, name):
            _check({**suite.base, **suite.methods[name], **point}, f"{path}: grid: {name} at {point}")


def _check(settings: Mapping[str, Any], place: str) -> None:
    """Reads settings; `place` names them in an error."""
    try:
        _resolved(settings)
    except RecipeError as failure:
        raise RecipeError(f"{place}: {failure}") from failure


def _changes(given: Any, place: str) -> dict[str, Any]:
    given = {} if given is None else given
    _require(isinstance(given, dict), f"{place}={given!r} must be a mapping of keys to values.")
    for key in given:
        _require(key not in OWN, f"{place}: {key!r} is set for each run by ipg bench: leave it out.")
    return given


def _known(names: Any, known: Any, place: str) -> None:
    for name in names:
        _require(name in known, f"{place}: {name!r} is unknown.{nearest(str(name), known)}")


def _require(valid: bool, message: str) -> None:
    if not valid:
        raise RecipeError(message)
