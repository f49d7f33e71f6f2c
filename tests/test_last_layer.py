# SPDX-License-Identifier: Apache-2.0
"""Last layers fitted anew to balanced groups, or without the directions in which pairs differ."""

import copy

import numpy as np
import pytest
import small
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoModelForImageClassification

from ipg_hf import find_head
from ipg_hf.baselines.dfr import fit_balanced, refit_last_layer, split_groups
from ipg_hf.baselines.projection import project_last_layer, project_out

MODELS = {"vit": small.vit, "resnet": small.resnet, "timm": small.timm_resnet, "1x1 convolution": small.conv_head}
L1 = {"penalty": "l1"} if LogisticRegression().penalty == "l2" else {"l1_ratio": 1.0}


def planted(n_of_group, seed=0, dims=6, clear=3.0):
    """Features whose first coordinate is the label, noisily, and whose second is the attribute, clearly."""
    rng = np.random.default_rng(seed)
    labels = np.repeat([0, 0, 1, 1], n_of_group)
    attributes = np.repeat([0, 1, 0, 1], n_of_group)
    z = rng.normal(size=(len(labels), dims))
    z[:, 0] += clear * (2 * labels - 1)
    z[:, 1] = 2 * (2 * attributes - 1) + 0.1 * rng.normal(size=len(labels))
    return z * [1, 5, 1, 1, 1, 0.2] + 3, labels, attributes


def worst_group(weight, bias, z, labels, attributes):
    right = (z @ weight.T + bias).argmax(1) == labels
    return min(
        right[(labels == y) & (attributes == a)].mean() for y in np.unique(labels) for a in np.unique(attributes)
    )


def batches_of(rows, size=7):
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        yield {name: torch.stack([torch.as_tensor(row[name]) for row in part]) for name in part[0]}


def pair_batches(pairs, size=3):
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        yield {"pixel_values": torch.stack([row[f"pixel_values_{side}"] for side in "ab" for row in part])}


def logits_and_z(model, rows):
    model.eval()
    inputs = {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}
    with torch.no_grad():
        return find_head(model, None, inputs).run(model, inputs)


# ---- Fitted anew ----


def test_what_plain_training_gets_wrong_a_balanced_fit_repairs():
    z, labels, _ = planted([400, 2, 2, 400], seed=1, clear=1.5)
    plain = LogisticRegression(C=1.0).fit(z, labels)
    test = planted([300] * 4, seed=2, clear=1.5)
    twice = np.concatenate([-plain.coef_, plain.coef_]), np.concatenate([-plain.intercept_, plain.intercept_])
    weight, bias, facts = fit_balanced(*planted([40] * 4, seed=3, clear=1.5), num_labels=2, seed=0)
    # a fit to the skewed groups leans on the attribute
    assert worst_group(*twice, *test) < 0.5 < 0.85 < worst_group(weight, bias, *test)
    leaning = np.abs(plain.coef_[0, 1] / plain.coef_[0, 0])
    assert np.abs(weight[1, 1] / weight[1, 0]) < 0.2 * leaning
    assert facts["rows"] == facts["rows_a_fit"] == 160 and facts["fits"] == 10


def test_the_two_logits_are_the_logistic_regression():
    z, labels, attributes = planted([12] * 4)  # balanced, so that a fit has all rows
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, solver="liblinear", random_state=0, **L1))
    expected = pipeline.fit(z, labels).decision_function(z)
    weight, bias, _ = fit_balanced(z, labels, attributes, num_labels=2, seed=0, num_fits=1, strengths=[0.3])
    logits = z @ weight.T + bias
    assert np.abs(logits[:, 1] - logits[:, 0] - expected).max() < 1e-9
    assert (weight[0] == -weight[1]).all() and (bias[0] == -bias[1]).all()
    other, shift, _ = fit_balanced(z, labels, attributes, num_labels=2, seed=0, num_fits=1, strengths=[0.1])
    assert np.abs(np.diff(z @ other.T + shift)[:, 0] - expected).max() > 0.1


def test_more_classes_are_each_against_the_rest():
    rng = np.random.default_rng(0)
    labels, attributes = np.repeat([0, 1, 2], 20), np.tile([0, 1], 30)
    z = rng.normal(size=(60, 4)) + 4 * np.eye(3, 4)[labels]
    weight, bias, _ = fit_balanced(z, labels, attributes, num_labels=3, seed=0, num_fits=1, strengths=[1])
    assert weight.shape == (3, 4) and bias.shape == (3,)
    single = LogisticRegression(C=1, solver="liblinear", random_state=0, **L1)
    expected = make_pipeline(StandardScaler(), single).fit(z, labels == 2).decision_function(z)
    assert np.abs(z @ weight[2] + bias[2] - expected).max() < 1e-9
    assert ((z @ weight.T + bias).argmax(1) == labels).mean() > 0.9


def test_every_fit_has_as_many_rows_of_each_group_as_the_smallest():
    z, labels, attributes = planted([50, 9, 30, 12])
    weight, bias, facts = fit_balanced(z, labels, attributes, num_labels=2, seed=0, num_fits=2, strengths=[0.5])
    assert facts["rows_a_fit"] == 36
    again = fit_balanced(z, labels, attributes, num_labels=2, seed=0, num_fits=2, strengths=[0.5])
    assert (again[0] == weight).all() and (again[1] == bias).all()
    other = fit_balanced(z, labels, attributes, num_labels=2, seed=1, num_fits=2, strengths=[0.5])
    assert np.abs(other[0] - weight).max() > 1e-3


def test_the_strength_with_the_best_worst_group_is_taken_the_first_of_equals():
    z, labels, attributes = planted([15] * 4)
    strengths = [1e-9, 1.0, 0.9]  # the first leaves nothing but zeros
    _, _, facts = fit_balanced(z, labels, attributes, num_labels=2, seed=0, num_fits=1, strengths=strengths)
    assert facts["scores"][1e-9] == 0 and facts["scores"][1.0] == facts["scores"][0.9] > 0.8
    assert facts["strength"] == 1.0


def test_without_a_bias_none_is_needed():
    z, labels, attributes = planted([20] * 4)
    weight, bias, _ = fit_balanced(z, labels, attributes, num_labels=2, seed=0, with_bias=False)
    assert (bias == 0).all() and np.abs(weight).max() > 0.1
    single = LogisticRegression(C=1, solver="liblinear", fit_intercept=False, random_state=0, **L1)
    expected = single.fit(z / z.std(0), labels).decision_function(z / z.std(0))
    weight, _, _ = fit_balanced(z, labels, attributes, num_labels=2, seed=0, num_fits=1, strengths=[1], with_bias=False)
    assert np.abs(np.diff(z @ weight.T)[:, 0] - expected).max() < 1e-3  # the solver's own tolerance


def test_halves_have_half_of_every_group():
    _, labels, attributes = planted([5, 4, 3, 8])
    first, second = split_groups(labels, attributes, seed=0)
    assert sorted([*first, *second]) == list(range(20))
    groups = 2 * labels + attributes
    assert np.bincount(groups[first]).tolist() == [3, 2, 2, 4] and np.bincount(groups[second]).tolist() == [2, 2, 1, 4]
    assert (split_groups(labels, attributes, seed=0)[0] == first).all()
    assert any((split_groups(labels, attributes, seed=seed)[0] != first).any() for seed in (1, 2))


@pytest.mark.parametrize("kind", MODELS)
def test_the_model_answers_as_the_refitted_head(kind, tmp_path):
    model = MODELS[kind]()
    rows = small.rows(64, attribute=True)
    before, (_, z) = small.weights(model), logits_and_z(model, rows)
    model.train()
    torch.manual_seed(5)
    drawn = torch.get_rng_state()
    head, facts = refit_last_layer(model, batches_of(rows), seed=3, num_fits=2, strengths=[3.0, 0.3])
    assert torch.equal(torch.get_rng_state(), drawn) and all(module.training for module in model.modules())
    after = small.weights(model)
    own = {f"{path}.{name}" for path in head.paths for name in ("weight", "bias")}
    assert {name for name in before if not torch.equal(before[name], after[name])} == own & set(after)
    labels, attributes = (np.array([row[name] for row in rows]) for name in ("labels", "attribute"))
    weight, bias, again = fit_balanced(
        z.numpy(), labels, attributes, num_labels=2, seed=3, num_fits=2, strengths=[3.0, 0.3]
    )
    assert again == facts and facts["rows"] == 64
    unseen = small.rows(9, seed=8)
    logits, z = logits_and_z(model, unseen)
    expected = z.double().numpy() @ weight.T + bias
    assert np.abs(logits.numpy() - expected).max() < 1e-4 * (1 + np.abs(expected).max())
    assert (logits - (z @ head.weight.T + head.bias)).abs().max() < 1e-4
    assert np.abs(expected).max() > 0.01


def test_a_refitted_model_is_an_ordinary_checkpoint(tmp_path):
    model, rows = small.vit(), small.rows(32, attribute=True)
    refit_last_layer(model, batches_of(rows), seed=0, num_fits=1)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(logits_and_z(loaded, rows)[0], logits_and_z(model, rows)[0])
    assert not torch.equal(logits_and_z(small.vit(), rows)[0], logits_and_z(model, rows)[0])


def test_a_layer_without_a_bias_is_refitted():
    model, rows = small.no_bias(), small.rows(40, attribute=True)
    head, _ = refit_last_layer(model, batches_of(rows), seed=0, num_fits=1, head="inner.2")
    logits, z = logits_and_z(model, rows)
    assert head.bias is None and (logits - z @ head.weight.T).abs().max() < 1e-5


def missing_group(rows):
    return [row for row in rows if (row["labels"], row["attribute"]) != (1, 0)]


@pytest.mark.parametrize(
    ("build", "change", "options", "expected"),
    [
        (small.vit, missing_group, {}, "label=1, attribute=0 has 0"),
        (small.deit_with_teacher, list, {}, "mean of 2 layers"),
        (lambda: small.vit(1), list, {}, "1 outputs"),
        (lambda: small.vit(problem_type="multi_label_classification"), list, {}, "multi_label"),
        (small.vit, lambda rows: small.rows(8), {}, "labels and attribute"),
        (small.vit, lambda rows: [], {}, "no rows"),
        (small.vit, lambda rows: [{**row, "labels": 2} for row in rows], {}, "0..1"),
        (small.vit, list, {"num_fits": 0}, "num_fits=0"),
        (small.vit, list, {"strengths": []}, "strengths"),
        (small.vit, list, {"strengths": [0.1, -1]}, "strengths"),
    ],
)
def test_what_cannot_be_refitted_is_named_and_left_alone(build, change, options, expected):
    model = build()
    before = small.weights(model)
    with pytest.raises(ValueError, match=expected):
        refit_last_layer(model, batches_of(change(small.rows(16, attribute=True))), seed=0, **options)
    assert small.bit_equal(small.weights(model), before)


# ---- Projected ----


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
