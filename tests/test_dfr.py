# SPDX-License-Identifier: Apache-2.0
"""Deep feature reweighting: last layers that are fitted again to groups of equal size."""

import json

import numpy as np
import pytest
import small
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from small_runs import train, write
from transformers import AutoImageProcessor, AutoModelForImageClassification, TrainerCallback

from ipg_hf import IPGTrainer, find_head
from ipg_hf.baselines import DFRConfig, DFRTrainer
from ipg_hf.baselines.dfr import fit_balanced, refit_last_layer, split_groups
from ipg_hf.cli import main
from ipg_hf.data import load_digits
from ipg_hf.pairs import ImageRows
from ipg_hf.recipe import Recipe, RecipeError, parse_recipe

MODELS = {"vit": small.vit, "resnet": small.resnet, "timm": small.timm_resnet, "1x1 convolution": small.conv_head}
DFR = {"method": "dfr", "num_fits": 2, "strengths": [1.0, 0.3]}
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


def logits_and_z(model, rows):
    model.eval()
    inputs = {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}
    with torch.no_grad():
        return find_head(model, None, inputs).run(model, inputs)


# ---- The fit ----


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


# ---- The trainer ----


class StopAt(TrainerCallback):
    """Ends a training after one step, as a signal does."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


def build(folder, kind=DFRTrainer, *callbacks, **settings):
    model = small.vit()
    args = small.config(folder, kind.config_class, **settings)
    held_out = small.grouped(48, seed=6)
    return kind(model, args, train_dataset=small.grouped(24), eval_dataset=held_out, callbacks=list(callbacks))


def test_the_trainer_fits_half_of_every_group_and_leaves_the_other_half_to_measure(tmp_path):
    plain, run = build(tmp_path, IPGTrainer), build(tmp_path, num_fits=2, strengths=[3.0, 0.3], seed=5)
    plain.args.seed = 5
    held_out = run.eval_dataset
    plain.train()
    run.train()
    labels, attributes = (np.asarray(held_out[:][name]) for name in ("label", "attribute"))
    fitted, measured = split_groups(labels, attributes, seed=5)
    expected, left = held_out.select(measured)[:], run.eval_dataset[:]
    assert torch.equal(left["pixel_values"], expected["pixel_values"]) and len(left["label"]) == 24
    rows = [{"pixel_values": held_out[int(row)]["pixel_values"].float()} for row in fitted]
    weight, bias, facts = fit_balanced(
        logits_and_z(plain.model, rows)[1].double().numpy(),
        labels[fitted],
        attributes[fitted],
        num_labels=2,
        seed=5,
        num_fits=2,
        strengths=[3.0, 0.3],
    )
    assert run.method_facts == {**facts, "rows_left_to_measure": 24} and run.method == "dfr"
    classifier = run.model.classifier
    assert np.abs(classifier.weight.detach().numpy() - weight).max() < 1e-5 * np.abs(weight).max()
    assert np.abs(classifier.bias.detach().numpy() - bias).max() < 1e-4 * np.abs(weight).max()
    before, after = small.weights(plain.model), small.weights(run.model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        "classifier.weight",
        "classifier.bias",
    }


def test_pairs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="dfr trains without pairs"):
        DFRTrainer(
            small.vit(),
            small.config(tmp_path, DFRConfig),
            train_dataset=small.grouped(24),
            eval_dataset=small.grouped(48),
            pair_dataset=small.pairs(4),
        )


def test_a_training_that_is_stopped_is_not_fitted(tmp_path):
    plain, run = build(tmp_path, IPGTrainer, StopAt()), build(tmp_path, DFRTrainer, StopAt())
    plain.train()
    run.train()
    assert small.bit_equal(small.weights(run.model), small.weights(plain.model))
    assert len(run.eval_dataset) == 48 and run.method_facts == {}


# ---- Recipes ----


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_fit": 3}, "'num_fits'"),
        ({"rank": 3}, "'rank'.*belongs to method project"),
        ({"num_fits": 0}, "num_fits=0"),
        ({"strengths": [0.1, -1]}, "strengths"),
        ({"strengths": "all"}, "strengths"),
        ({"method": "dfrr"}, "'dfr'"),
    ],
)
def test_settings_that_are_none(tmp_path, settings, expected):
    with pytest.raises(RecipeError, match=expected):
        parse_recipe(write(tmp_path, **{**DFR, **settings}))


def test_settings_as_flags(tmp_path):
    recipe, args, given = parse_recipe(
        write(tmp_path), ["--method", "dfr", "--num_fits", "3", "--strengths", "0.5", "2"]
    )
    assert (type(args), args.num_fits, args.strengths) == (DFRConfig, 3, [0.5, 2.0])
    assert {"method", "num_fits", "strengths"} <= {*given} and not recipe.uses_pairs and Recipe().uses_pairs


def test_a_regression_is_refused_before_its_training(tmp_path, capsys):
    settings = {"dataset": "stroke_mass", "num_pairs": None, "metric_for_best_model": "loss"}
    assert main(["train", "--config", write(tmp_path, **DFR, **settings)]) == 2
    assert "1 outputs" in capsys.readouterr().err
    assert not [*tmp_path.glob("out/checkpoint-*")] and not (tmp_path / "out" / "run.json").exists()


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted")
    return folder, *train(folder, **DFR)


def test_a_run_is_measured_by_the_rows_that_were_not_fitted(tmp_path, fitted):
    folder, record, weights = fitted
    plain, before = train(tmp_path / "plain", method="erm")
    facts, validation = record["baseline"], record["metrics"]["validation"]
    assert record["method"] == "dfr" and facts["strength"] in (1.0, 0.3) and facts["fits"] == 2
    # 75 digits a group: 38 are fitted
    assert (facts["rows"], facts["rows_a_fit"], facts["rows_left_to_measure"]) == (152, 152, 148)
    assert {validation[key] for key in validation if key.startswith("group_n/")} == {37.0}
    # its pairs hold images that were fitted
    assert "flip_rate" not in validation and "flip_rate" in record["metrics"]["test"]
    assert {name for name in weights if not torch.equal(weights[name], before[name])} == {
        "classifier.weight",
        "classifier.bias",
    }
    # the colour alone leaves a group without a right answer
    assert record["metrics"]["test"]["worst_group_accuracy"] > 0.2
    assert plain["metrics"]["test"]["worst_group_accuracy"] == 0
    card = (folder / "out" / "README.md").read_text()
    assert " 152 validation images" in card and "Plain training" not in card
    raw, same = train(tmp_path / "raw", **DFR, preload=False)
    assert raw["metrics"]["test"] == pytest.approx(record["metrics"]["test"], abs=1e-6)
    assert small.differences(weights, same) < 1e-5


def test_the_saved_head_is_the_one_that_was_fitted(fitted):
    folder, record, weights = fitted
    model = AutoModelForImageClassification.from_pretrained(folder / "out")
    head = find_head(model)
    assert torch.equal(head.weight, weights["classifier.weight"])
    assert torch.equal(head.weight[0], -head.weight[1]) and torch.equal(head.bias[0], -head.bias[1])
    processor = AutoImageProcessor.from_pretrained(folder / "out")
    rows = ImageRows(load_digits(num_pairs=1).test.select(range(8)), processor, {"image": "pixel_values"})
    inputs = {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}
    logits, z = head.run(model.eval(), inputs)
    assert (logits - (z @ head.weight.T + head.bias)).abs().max() < 1e-5
    output = folder / "metrics.json"
    config = str(folder / "recipe.yaml")
    assert main(["evaluate", str(folder / "out"), "--config", config, "--output", str(output)]) == 0
    assert json.loads(output.read_text())["metrics"] == pytest.approx(record["metrics"]["test"], abs=1e-6)
