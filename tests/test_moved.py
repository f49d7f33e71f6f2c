# SPDX-License-Identifier: Apache-2.0
"""Options of version 0.1 that have another place now do what they did, and warn of the new place."""

import warnings

import datasets
import pytest
import small
import torch
import yaml
from safetensors.torch import load_file

from ipg_hf import IPGConfig, IPGTrainer, moved
from ipg_hf.baselines import (
    METHODS,
    AblationConfig,
    AblationTrainer,
    DFRConfig,
    EnvironmentConfig,
    EnvironmentTrainer,
    JTTConfig,
    PairPenaltyConfig,
    PairPenaltyTrainer,
    ProjectionConfig,
)
from ipg_hf.cli import main
from ipg_hf.recipe import parse_settings
from ipg_hf.record import resolved_settings

# options of 0.1, as they were given; the config and the trainer of today
PLACES = [
    ({"pair_objective": "kl"}, PairPenaltyConfig, PairPenaltyTrainer),
    ({"pair_objective": "features", "pair_penalty_weight": 7.0}, PairPenaltyConfig, PairPenaltyTrainer),
    ({"objective": "irm", "environment_penalty_weight": 50.0}, EnvironmentConfig, EnvironmentTrainer),
    ({"objective": "vrex", "environment_penalty_start": 2}, EnvironmentConfig, EnvironmentTrainer),
    ({"loss_scaling": "fixed"}, AblationConfig, AblationTrainer),
    ({"shared_optimizer_state": False}, AblationConfig, AblationTrainer),
    ({"rationale_norm": "frobenius", "invariance_distance": "rationale"}, AblationConfig, AblationTrainer),
    ({"pair_combination": "sum"}, AblationConfig, AblationTrainer),
]
DEFAULTS = [{name: default} for name, (_, _, default) in moved.MOVED.items()]
WITHOUT_EFFECT = [{"pair_penalty_weight": 7.0}, {"environment_penalty_weight": 50.0}, {"environment_penalty_start": 2}]
IGNORED = [{name: value} for name, (values, _) in moved.REMOVED.items() for value in values]
REFUSED = [
    ({"pair_source": "batch"}, "pair_source='batch' was removed.*pair_dataset"),
    ({"pair_cache": "disk"}, "pair_cache='disk' was removed.*preload"),
    ({"pair_seed": 3}, "pair_seed=3 was removed.*data_seed"),
    ({"pair_num_workers": 2}, "pair_num_workers=2 was removed.*dataloader_num_workers"),
]


def of(options):
    return ", ".join(f"{name}={value}" for name, value in options.items()) if isinstance(options, dict) else ""


def with_environments(n=24):
    """Rows with a column `environment`; three rows of four have the first, so that a penalty sees a difference."""
    rows = small.rows(n)
    columns = {name: [torch.as_tensor(row[name]).tolist() for row in rows] for name in rows[0]}
    return datasets.Dataset.from_dict({**columns, "environment": [int(i % 4 == 3) for i in range(n)]}).with_format(
        "torch"
    )


def build(kind, folder, config=IPGConfig, **options):
    """A trainer with two pair sets, or with environments; step 4 acts at every step."""
    args = small.config(folder, config, learning_rate=1e-2, **small.SCALED, **options)
    pairs = None if isinstance(args, EnvironmentConfig) else {"one": small.pairs(10), "two": small.pairs(6, seed=4)}
    return kind(small.vit(), args, train_dataset=with_environments(), pair_dataset=pairs)


# ---- In Python


@pytest.mark.parametrize(("options", "config", "kind"), PLACES, ids=of)
def test_a_moved_option_makes_the_trainer_of_the_baseline_that_has_it(tmp_path, options, config, kind):
    with pytest.warns(FutureWarning, match=rf"moved to ipg_hf\.baselines\.\w+\.{config.__name__}"):
        old = build(IPGTrainer, tmp_path, **options)
    assert type(old) is kind and type(old.args) is config
    assert resolved_settings(old.args) == resolved_settings(
        small.config(tmp_path, config, learning_rate=1e-2, **small.SCALED, **options)
    )
    assert resolved_settings(old.args).items() >= options.items()


@pytest.mark.parametrize("options", [{"pair_objective": "kl"}, {"objective": "irm"}, {"loss_scaling": "fixed"}], ids=of)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_moved_option_trains_as_the_baseline_that_has_it(tmp_path, options):
    config, kind = next((config, kind) for given, config, kind in PLACES if given.items() >= options.items())
    new, old = build(kind, tmp_path / "new", config, **options), build(IPGTrainer, tmp_path / "old", **options)
    args = small.config(tmp_path / "without", learning_rate=1e-2, **small.SCALED)
    pairs = new.pair_datasets or None
    runs = [old, new, IPGTrainer(small.vit(), args, train_dataset=with_environments(), pair_dataset=pairs)]
    for run in runs:
        run.train()
    old, new, without = (small.weights(run.model) for run in runs)
    assert small.bit_equal(old, new) and small.differences(old, without) > 1e-6


@pytest.mark.parametrize("options", [*DEFAULTS, *WITHOUT_EFFECT, *IGNORED], ids=of)
def test_an_option_that_changes_nothing_leaves_the_method(tmp_path, options):
    with pytest.warns(FutureWarning, match=next(iter(options))):
        args = IPGConfig(str(tmp_path), **options)
    assert type(args) is IPGConfig and resolved_settings(args) == resolved_settings(IPGConfig(str(tmp_path)))


@pytest.mark.parametrize(("options", "expected"), REFUSED, ids=of)
def test_a_removed_option_that_would_change_the_run_is_refused(tmp_path, options, expected):
    with pytest.raises(ValueError, match=expected):
        IPGConfig(str(tmp_path), **options)
    with pytest.raises(ValueError, match=expected):
        parse_settings(options, title="recipe.yaml")


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"pair_objective": "kl", "loss_scaling": "fixed"},
        {"pair_objective": "kl", "objective": "irm"},
        {"pair_combination": "sum", "objective": "vrex"},
    ],
    ids=of,
)
def test_options_of_two_baselines_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match=r"options of several baselines.*choose one"):
        IPGConfig(str(tmp_path), **options)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_trainer_of_ones_own_is_not_replaced_by_another(tmp_path):
    class Mine(IPGTrainer):
        pass

    class MinePenalised(PairPenaltyTrainer):
        pass

    arguments = {"args": small.config(tmp_path, pair_objective="kl"), "pair_dataset": small.pairs(4)}
    with pytest.raises(
        ValueError, match=r"Mine does not act: make Mine extend ipg_hf\.baselines\.pair_penalties\.Pair"
    ):
        Mine(small.vit(), **arguments)
    assert type(MinePenalised(small.vit(), **arguments)) is MinePenalised
    assert type(Mine(small.vit(), small.config(tmp_path), pair_dataset=small.pairs(4))) is Mine
    # a trainer of another baseline refuses the config as it refuses any wrong one
    with pytest.raises(ValueError, match="args is a PairPenaltyConfig: make it a AblationConfig"):
        AblationTrainer(small.vit(), **arguments)


def test_settings_of_today_warn_of_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        for config in {method.config for method in METHODS.values()}:
            config(str(tmp_path))
        for name, method in METHODS.items():
            _, args, _ = parse_settings({"method": name}, title="recipe.yaml")
            assert type(args) is method.config
        parse_settings({"method": "kl", "pair_penalty_weight": 3}, ["--pair_penalty_weight", "4"], title="recipe.yaml")


# ---- In recipes and as flags

# a recipe of 0.1; its method, its config and some of its settings today
RECIPES = [
    ({"pair_objective": "kl", "pair_penalty_weight": 10}, "kl", PairPenaltyConfig, {"pair_penalty_weight": 10.0}),
    ({"pair_objective": "rationales"}, "rationales", PairPenaltyConfig, {}),
    (
        {"method": "erm", "objective": "vrex", "environment_penalty_weight": 3},
        "vrex",
        EnvironmentConfig,
        {"environment_penalty_weight": 3.0},
    ),
    (
        {"loss_scaling": "fixed", "shared_optimizer_state": False},
        "ablation",
        AblationConfig,
        {"loss_scaling": "fixed", "shared_optimizer_state": False},
    ),
    (
        {"method": "erm", "last_layer": {"method": "dfr", "num_fits": 2, "strengths": [1.0, 0.3]}},
        "dfr",
        DFRConfig,
        {"num_fits": 2, "strengths": [1.0, 0.3]},
    ),
    ({"method": "erm", "last_layer": {"method": "project", "rank": 0.5}}, "project", ProjectionConfig, {"rank": 0.5}),
    (
        {"method": "erm", "repeat_errors": {"steps": 2, "factor": 3}},
        "jtt",
        JTTConfig,
        {"first_steps": 2, "upweight": 3},
    ),
]


@pytest.mark.parametrize(("given", "method", "config", "settings"), RECIPES, ids=[row[1] for row in RECIPES])
def test_a_recipe_of_the_last_release_names_the_method_of_today(given, method, config, settings):
    flags = [f"--{key}={yaml.safe_dump(value, default_flow_style=True).strip()}" for key, value in given.items()]
    flags = [flag.removesuffix("\n...") for flag in flags]
    for arguments in ((given, []), ({}, flags)):
        with pytest.warns(FutureWarning, match=f"moved in ipg_hf 0.2: write .*method: {method}"):
            recipe, args, names = parse_settings(*arguments, title="recipe.yaml")
        assert recipe.method == method and type(args) is config
        assert {name: getattr(args, name) for name in settings} == settings
        assert {"method", *settings} <= {*names} and not {"last_layer", "repeat_errors", "pair_objective"} & {*names}


@pytest.mark.parametrize(
    ("given", "flags", "method", "config"),
    [
        ({"pair_objective": "kl", "pair_penalty_weight": 10}, ["--method", "erm"], "erm", IPGConfig),
        ({"method": "erm", "pair_objective": "kl", "loss_scaling": "fixed"}, [], "erm", IPGConfig),
        ({"pair_penalty_weight": 10}, [], "ipg", IPGConfig),
        ({"pair_objective": "ipg", "rationale_norm": "spectral"}, [], "ipg", IPGConfig),
        ({"method": "erm", "environment_penalty_start": 5}, ["--method=ipg"], "ipg", IPGConfig),
        ({"method": "erm", "last_layer": {}, "repeat_errors": None}, [], "erm", IPGConfig),
    ],
)
def test_settings_that_had_no_effect_have_none(given, flags, method, config):
    with pytest.warns(FutureWarning, match="write nothing in a recipe"):
        recipe, args, _ = parse_settings(given, flags, title="recipe.yaml")
    assert recipe.method == method and type(args) is config


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"objective": "irm"}, "objective does not combine with method='ipg': write method: irm"),
        ({"last_layer": {"method": "dfr"}}, "last_layer does not combine with method='ipg': write method: dfr"),
        ({"repeat_errors": {"steps": 1}, "method": "ipg"}, "repeat_errors does not combine.*write method: jtt"),
        ({"method": "erm", "last_layer": {"rank": 1}}, "method='dfr or project'"),
        ({"method": "erm", "last_layer": {"method": "dfrr"}}, "method='dfrr' is unknown.*'dfr'"),
        ({"method": "erm", "last_layer": {"method": "dfr", "num_fit": 3}}, "'num_fit'.*'num_fits'"),
        ({"method": "erm", "last_layer": {"method": "dfr", "rank": 3}}, "'rank'.*belongs to method project"),
        ({"method": "erm", "last_layer": "[1]"}, "last_layer=.* must be a mapping"),
        ({"method": "erm", "repeat_errors": {"steps": 3, "epochs": 1}}, "'epochs'"),
        (
            {"method": "erm", "last_layer": {"method": "dfr"}, "repeat_errors": {"steps": 1, "factor": 2}},
            "several methods.*choose one",
        ),
        ({"pair_objective": "kl", "pair_combination": "sum"}, "several methods.*choose one"),
        ({"pair_objective": "kll"}, "method='kll' is unknown.*'kl'"),
        ({"degrade_pairs": {"blur": 1}}, "degrade_pairs=.* was removed.*ipg_hf.baselines.degrade_pairs"),
    ],
)
def test_recipes_that_no_method_of_today_follows_are_refused(given, expected):
    with pytest.raises(ValueError, match=expected):
        parse_settings(given, title="recipe.yaml")


def test_a_recipe_of_the_last_release_trains_as_one_of_today(tmp_path):
    recipe = {**small.TINY_RECIPE, "max_steps": 3, "measure_test": False, "save_strategy": "no"}
    with pytest.warns(FutureWarning, match="pair_objective, pair_penalty_weight moved"):
        old = run(tmp_path / "old", recipe, pair_objective="features", pair_penalty_weight=5)
    new = run(tmp_path / "new", recipe, method="features", pair_penalty_weight=5)
    ipg = run(tmp_path / "ipg", recipe)
    assert small.bit_equal(old, new) and small.differences(old, ipg) > 1e-6


def run(folder, recipe, **changes):
    folder.mkdir()
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe, **changes, "output_dir": str(folder / "out")}))
    assert main(["train", "--config", str(path)]) == 0
    return load_file(folder / "out" / "model.safetensors")
