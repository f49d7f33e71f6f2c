# SPDX-License-Identifier: Apache-2.0
"""Projection: last layers without the directions in which the features of pairs differ."""

import copy

import datasets
import numpy as np
import pytest
import small
import torch
from small_runs import train, write
from test_dfr import MODELS, logits_and_z

from ipg_hf import IPGTrainer, find_head
from ipg_hf.baselines import ProjectionConfig, ProjectionTrainer
from ipg_hf.baselines.projection import project_last_layer, project_out
from ipg_hf.cli import main
from ipg_hf.recipe import RecipeError, parse_recipe


def pair_batches(pairs, size=3):
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        yield {"pixel_values": torch.stack([row[f"pixel_values_{side}"] for side in "ab" for row in part])}


# ---- The projection ----


def test_a_projection_by_hand():
    weight = np.array([[3.0, 4.0], [1.0, 0.0]])
    # e1 holds 4 + 16 = 20 of 21 of the squares
    differences = np.array([[2.0, 0.0], [-4.0, 0.0], [0.0, 1.0]])
    for rank in (1, 0.9):
        projected, facts = project_out(weight, differences, rank=rank)
        assert np.abs(projected - [[0, 4], [0, 0]]).max() < 1e-15
        assert facts["rank"] == 1 and facts["pairs"] == 3
        assert facts["variance_removed"] == pytest.approx(20 / 21)
        assert facts["weight_removed"] == pytest.approx(10 / 26)
    # V = (1, 1)/√2: I - V Vᵀ = [[.5, -.5], [-.5, .5]]
    projected, facts = project_out([[1.0, 0.0], [2.0, 2.0]], [[3.0, 3.0], [1.0, 1.0]], rank=1.0)
    assert np.abs(projected - [[0.5, -0.5], [0, 0]]).max() < 1e-15 and facts["rank"] == 1


def test_a_share_is_the_fewest_directions_that_hold_it():
    differences = np.diag([3.0, 2.0, 1.0, 0.0])  # squares 9, 4, 1 of 14
    weight = np.ones((2, 4))
    ranks = {share: project_out(weight, differences, rank=share)[1]["rank"] for share in (0.1, 9 / 14, 0.65, 0.99, 1.0)}
    assert ranks == {0.1: 1, 9 / 14: 1, 0.65: 2, 0.99: 3, 1.0: 3}


@pytest.mark.parametrize("kind", MODELS)
def test_pairs_are_answered_alike_once_all_they_differ_in_is_out(kind):
    pairs = small.pairs(5, dtype=torch.float64)
    sides = [[{"pixel_values": row[f"pixel_values_{side}"]} for row in pairs] for side in "ab"]

    def difference(model):
        logits = [logits_and_z(model, side)[0] for side in sides]
        return (logits[0] - logits[1]).abs().max().item()

    plain, some, none = (MODELS[kind]().double() for _ in range(3))
    _, of_one = project_last_layer(some, pair_batches(pairs), rank=1)
    head, of_all = project_last_layer(none, pair_batches(pairs), rank=1.0)
    assert (of_one["rank"], of_all["rank"]) == (1, 5)
    assert difference(none) < 1e-12 < 1e-6 < min(difference(some), difference(plain))
    # the bias is what it was; the model answers as its new head does
    assert torch.equal(head.bias, find_head(plain).bias)
    unseen = small.rows(6, seed=8, dtype=torch.float64)
    logits, z = logits_and_z(none, unseen)
    assert (logits - (z @ head.weight.T + head.bias)).abs().max() < 1e-12
    assert (logits - logits_and_z(plain, unseen)[0]).abs().max() > 1e-6


def test_batches_of_pairs_are_one_set():
    pairs, one, several = small.pairs(7), small.vit(), small.vit()
    project_last_layer(one, pair_batches(pairs, 7), rank=2)
    project_last_layer(several, pair_batches(pairs, 3), rank=2)
    assert small.differences(small.weights(one), small.weights(several)) < 1e-6


def test_a_regression_is_projected_too():
    model = small.vit(1)
    head, _ = project_last_layer(model, pair_batches(small.pairs(4)), rank=1)
    assert head.weight.shape[0] == 1 and (head.weight - find_head(small.vit(1)).weight).abs().max() > 1e-4


@pytest.mark.parametrize("rank", [0, -1, 1.5, 0.0, float("nan"), True, "1", None])
def test_ranks_that_are_none(rank):
    with pytest.raises(ValueError, match="rank="):
        project_out(np.ones((2, 3)), np.eye(3), rank=rank)


@pytest.mark.parametrize(
    ("differences", "rank", "expected"),
    [
        (np.zeros((4, 3)), 1, "same features"),
        (np.array([[1.0, 2, 3], [2, 4, 6]]), 2, "1 directions alone"),
        (np.eye(3), 3, "constant"),
        (np.eye(3), 1.0, "constant"),
    ],
)
def test_projections_that_leave_nothing_or_take_nothing(differences, rank, expected):
    with pytest.raises(ValueError, match=expected):
        project_out(np.ones((2, 3)), differences, rank=rank)


def test_a_head_of_several_layers_is_not_projected():
    model = small.deit_with_teacher()
    before = copy.deepcopy(small.weights(model))
    with pytest.raises(ValueError, match="mean of 2 layers"):
        project_last_layer(model, pair_batches(small.pairs(3)), rank=1)
    assert small.bit_equal(small.weights(model), before)


# ---- The trainer ----


def stored(pairs):
    columns = {name: [row[name].tolist() for row in pairs] for name in pairs[0]}
    return datasets.Dataset.from_dict(columns).with_format("torch")


def trained(kind, folder, pairs=None, **settings):
    given = {} if pairs is None else {"pair_dataset": pairs}
    run = kind(small.vit(), small.config(folder, kind.config_class, **settings), train_dataset=small.rows(24), **given)
    run.train()
    return run


def test_the_trainer_projects_all_pair_sets_together_and_does_not_train_with_them(tmp_path):
    one, two = small.pairs(4), small.pairs(3, seed=4)
    plain = trained(IPGTrainer, tmp_path)
    expected = copy.deepcopy(plain.model)
    _, facts = project_last_layer(expected, pair_batches([*one, *two]), rank=2)
    run = trained(ProjectionTrainer, tmp_path, {"one": stored(one), "two": stored(two)}, rank=2)
    assert run.method_facts == pytest.approx(facts, rel=1e-5) and facts["pairs"] == 7 and facts["rank"] == 2
    assert small.differences(small.weights(run.model), small.weights(expected)) < 1e-6
    before, after = small.weights(plain.model), small.weights(run.model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"classifier.weight"}
    assert run.method == "project" and not run.is_guided
    # with only one of the sets other directions go
    alone = trained(ProjectionTrainer, tmp_path, stored(one), rank=2)
    assert small.differences(small.weights(alone.model), after) > 1e-4


def test_pairs_that_cannot_be_projected_are_refused_at_construction(tmp_path):
    args = small.config(tmp_path, ProjectionConfig)
    with pytest.raises(ValueError, match="pair_dataset is missing"):
        ProjectionTrainer(small.vit(), args, train_dataset=small.rows(8))
    with pytest.raises(ValueError, match="needs stored pairs, but pair_dataset is a list"):
        ProjectionTrainer(small.vit(), args, train_dataset=small.rows(8), pair_dataset=small.pairs(4))


# ---- Recipes ----


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rank": 1.5}, "rank=1.5"),
        ({"rank": 0}, "rank=0"),
        ({"rank": "half"}, "rank='half'"),
        ({"num_fits": 3}, "'num_fits'.*belongs to method dfr"),
    ],
)
def test_settings_that_are_none(tmp_path, settings, expected):
    with pytest.raises(RecipeError, match=expected):
        parse_recipe(write(tmp_path, method="project", **settings))


def test_a_rank_is_a_number_or_a_share(tmp_path):
    for flag, rank in (("3", 3), ("0.5", 0.5), ("1.0", 1.0)):
        recipe, args, given = parse_recipe(write(tmp_path, method="project"), ["--rank", flag])
        assert args.rank == rank and type(args.rank) is type(rank) and "rank" in given and recipe.uses_pairs
    assert parse_recipe(write(tmp_path, method="project", rank=0.9))[1].rank == 0.9
    assert parse_recipe(write(tmp_path, method="project"))[1].rank == 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"pairs": {"maker": "adversarial"}}, "AdversarialPairs"),
        ({"rank": 16}, "rank=16 is more than the 15 directions"),
        ({"rank": 5, "num_pairs": 4}, "rank=5 is more than the 4 directions"),
    ],
)
def test_what_cannot_be_projected_is_named_before_a_training(tmp_path, capsys, changes, expected):
    settings = {"method": "project", "num_pairs": None, **changes}
    assert main(["train", "--config", write(tmp_path, **settings)]) == 2
    assert expected in capsys.readouterr().err
    assert not [*tmp_path.glob("out/checkpoint-*")] and not (tmp_path / "out" / "run.json").exists()


def test_pairs_that_were_not_trained_with_are_projected_out(tmp_path):
    plain, before = train(tmp_path / "plain", method="erm")
    record, weights = train(tmp_path, method="project", rank=1)
    facts = record["baseline"]
    assert record["method"] == "project" and facts["pairs"] == 40 and facts["rank"] == 1
    assert 0.5 < facts["variance_removed"] <= 1 and 0 < facts["weight_removed"] < 1
    assert record["data"]["pair_sets"]["pairs"]["pairs"] == 40 and plain["data"]["pair_sets"] == {}
    assert {*record["course"]} == {"validation"}  # no guidance: they took no part in the training
    changed = {name for name in weights if not torch.equal(weights[name], before[name])}
    assert changed == {"classifier.weight"}
    for split in ("validation", "test"):
        assert record["metrics"][split]["flip_rate"] < 0.5 < plain["metrics"][split]["flip_rate"]
    assert "features of pairs differ most were taken out" in (tmp_path / "out" / "README.md").read_text()
    raw, _ = train(tmp_path / "raw", method="project", rank=1, preload=False, measure_test=False)
    assert raw["baseline"] == pytest.approx(facts, rel=1e-4)


def test_all_pair_sets_of_a_benchmark_are_projected_out(tmp_path):
    record, _ = train(tmp_path, dataset="marked_digits", method="project", rank=2, measure_test=False)
    assert record["baseline"]["pairs"] == 80
