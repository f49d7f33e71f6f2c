# SPDX-License-Identifier: Apache-2.0
"""Held-out pairs in the evaluation of a training, and the checkpoint that they choose."""

import itertools
import math

import datasets
import numpy as np
import pytest
import small
import torch
from torch import nn
from transformers import EarlyStoppingCallback
from transformers.modeling_outputs import ImageClassifierOutput

from ipg_hf import IPGConfig, IPGTrainer
from ipg_hf.metrics import METRICS, OF_PAIRS
from ipg_hf.pairs.held_out import hold_out_pairs


class Sign(nn.Module):
    """Predicts class 1 where the mean of an image is above `limit`; every optimizer step changes the limit."""

    def __init__(self, limit=0.0):
        super().__init__()
        self.limit = nn.Parameter(torch.tensor(limit))

    def forward(self, pixel_values, labels=None):
        score = pixel_values.flatten(1).mean(1) - self.limit
        logits = torch.stack([-score, score], 1)
        loss = None if labels is None else self.limit.clone()  # gradient 1: SGD lowers the limit by its rate
        return ImageClassifierOutput(loss=loss, logits=logits)


def pairs_of(sides, labels=None):
    rows = []
    for number, (a, b) in enumerate(sides):
        row = {f"pixel_values_{side}": torch.full((3, 4, 4), value) for side, value in (("a", a), ("b", b))}
        rows.append(row | ({} if labels is None else {"label": labels[number]}))
    return rows


def rows_of(values):
    return [{"pixel_values": torch.full((3, 4, 4), value), "labels": int(value > 0)} for value in values]


# sides above 0 are predicted as 1: two pairs are right on both sides, two flip, one is wrong on both; one has no label
SIDES = [(1.0, 2.0), (-1.0, -2.0), (1.0, -1.0), (-1.0, 1.0), (3.0, 4.0), (-5.0, -5.0)]
LABELS = [1, 0, 1, 1, 0, -100]


def sign_trainer(folder, limit=0.0, pair_dataset=None, **kwargs):
    given = {"eval_dataset": rows_of([1.0, -1.0]), "pair_dataset": pair_dataset or {}, **kwargs}
    return small.trainer(folder, Sign(limit), rows_of([1.0, -1.0] * 8), **given)


def test_pair_accuracy_by_hand(tmp_path):
    run = sign_trainer(tmp_path)
    measured = run.evaluate_pairs(pairs_of(SIDES, LABELS), "held")
    assert measured["held_pair_accuracy"] == 2 / 5 and measured["held_flip_rate"] == pytest.approx(2 / 6)
    without = run.evaluate_pairs(pairs_of(SIDES), "held")
    assert without == {name: value for name, value in measured.items() if name != "held_pair_accuracy"}
    nothing = run.evaluate_pairs(pairs_of(SIDES, [-100] * 6))
    assert "eval_pair_accuracy" not in nothing
    # batches of two pairs measure the same
    batched = sign_trainer(tmp_path, per_device_eval_batch_size=2).evaluate_pairs(pairs_of(SIDES, LABELS), "held")
    assert batched == pytest.approx(measured)


def test_of_several_sets_the_worst_counts(tmp_path):
    sets = {"good": pairs_of(SIDES[:2], LABELS[:2]), "bad": pairs_of(SIDES, LABELS), "bare": pairs_of(SIDES[:3])}
    measured = sign_trainer(tmp_path, eval_pair_dataset=sets).evaluate()
    assert measured["eval_good/pair_accuracy"] == 1.0 and measured["eval_bad/pair_accuracy"] == 0.4
    assert "eval_bare/pair_accuracy" not in measured and measured["eval_bare/flip_rate"] == pytest.approx(1 / 3)
    assert measured["eval_pair_accuracy"] == 0.4 and measured["eval_flip_rate"] == pytest.approx(1 / 3)
    assert measured["eval_divergence"] == max(measured[f"eval_{name}/divergence"] for name in sets)


@pytest.mark.parametrize("metric", ["pair_accuracy", "flip_rate"])
def test_held_out_pairs_choose_the_checkpoint(tmp_path, metric):
    """The limit falls 2.5, 1.5, 0.5, -0.5, -1.5: all held-out pairs are right, and none flips, at 0.5 alone."""
    held_out = pairs_of([(1.0, 2.0), (2.0, 1.0), (0.0, -1.0), (-1.0, 0.0)], [1, 1, 0, 0])
    settings = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 5}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": metric}
    run = sign_trainer(tmp_path, 2.5, eval_pair_dataset=held_out, callbacks=[EarlyStoppingCallback(2)], **settings)
    run.train()
    logged = [entry[f"eval_{metric}"] for entry in small.logged(run, "eval_loss")]
    expected = {"pair_accuracy": [0.5, 1.0, 0.5, 0.5], "flip_rate": [0.5, 0.0, 0.5, 0.0]}
    assert logged == [expected[metric][step] for step in range(4)]
    assert run.state.best_global_step == 2 and run.state.global_step == 4  # the early stopping reads it too
    assert run.model.limit.item() == 0.5


def test_an_evaluation_of_another_set_measures_no_pairs(tmp_path):
    run = sign_trainer(tmp_path, eval_pair_dataset=pairs_of(SIDES, LABELS))
    assert not [name for name in run.evaluate(rows_of([1.0])) if "flip_rate" in name]
    assert run.evaluate(metric_key_prefix="here")["here_flip_rate"] == pytest.approx(1 / 3)
    # of several evaluation sets, once and without the name of one
    run = sign_trainer(
        tmp_path, eval_pair_dataset=pairs_of(SIDES), eval_dataset={"iid": rows_of([1.0]), "ood": rows_of([-1.0])}
    )
    measured = run.evaluate()
    assert [name for name in measured if name.endswith("flip_rate")] == ["eval_flip_rate"]
    assert {"eval_iid_loss", "eval_ood_loss"} <= measured.keys()


def test_measuring_held_out_pairs_changes_nothing_in_the_training(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": small.rows(8), "max_steps": 4}
    runs = []
    for held_out in (None, small.pairs(6, seed=7)):
        runs.append(small.trainer(tmp_path, small.vit(dropout=0.2), eval_pair_dataset=held_out, **settings))
        runs[-1].train()
    assert small.bit_equal(*(small.weights(run.model) for run in runs))
    assert "eval_flip_rate" in small.logged(runs[1], "eval_loss")[0]


# ---- Splitting them off ----


def stored(n, per_image=1, labels=True):
    columns = {f"pixel_values_{side}": [[[[float(i)]]] * 3 for i in range(n)] for side in "ab"}
    columns |= {"source_id": [i // per_image for i in range(n)]} | (
        {"label": [i % 2 for i in range(n)]} if labels else {}
    )
    return datasets.Dataset.from_dict(columns)


@pytest.mark.parametrize(("n", "per_image"), [(10, 1), (50, 1), (60, 3), (97, 4)])
def test_a_fifth_of_the_images_is_held_out(n, per_image):
    pairs = stored(n, per_image)
    seen = set()
    for seed in range(8):
        kept, held = hold_out_pairs(pairs, "pairs", seed=seed)
        again = hold_out_pairs(pairs, "pairs", seed=seed)
        assert [part["source_id"][:] for part in again] == [kept["source_id"][:], held["source_id"][:]]
        values = [[row[0][0][0] for row in part["pixel_values_a"][:]] for part in (kept, held)]
        assert sorted(values[0] + values[1]) == [*range(n)] and values[0] == sorted(values[0])
        ids = [{*part["source_id"][:]} for part in (kept, held)]
        assert not ids[0] & ids[1] and len(ids[1]) == round(math.ceil(n / per_image) / 5)
        seen.add(tuple(sorted(ids[1])))
    assert len(seen) > 4


def test_a_metric_of_pairs_holds_some_out_of_the_training(tmp_path):
    settings = {"eval_strategy": "steps", "eval_dataset": small.rows(8), "max_steps": 1}
    labelled = [{**row, "label": number % 2} for number, row in enumerate(small.pairs(20))]
    run = small.trainer(tmp_path, pair_dataset=labelled, metric_for_best_model="eval_pair_accuracy", **settings)
    kept, held = run.pair_datasets["pairs"], run.eval_pair_datasets["pairs"]
    drawn = [{row["pixel_values_a"].sum().item() for row in part} for part in (kept, held)]
    assert (len(kept), len(held)) == (16, 4) and not drawn[0] & drawn[1]
    other = small.trainer(tmp_path, pair_dataset=labelled, metric_for_best_model="accuracy", **settings)
    assert len(other.pair_datasets["pairs"]) == 20 and other.eval_pair_datasets == {}
    given = small.trainer(
        tmp_path, pair_dataset=labelled, eval_pair_dataset=labelled, metric_for_best_model="pair_accuracy", **settings
    )
    assert len(given.pair_datasets["pairs"]) == 20


@pytest.mark.parametrize(
    ("pair_dataset", "held_out", "words"),
    [
        (small.pairs(20), None, ["pair_accuracy", "'label'", "flip_rate"]),
        (small.pairs(9), None, ["9 images", "eval_pair_dataset"]),
        (small.pairs(20), small.pairs(5), ["eval_pair_dataset", "'label'"]),
        (small.pairs(20), [{"image_a": 1}], ["pixel_values_a"]),
        (stored(20).to_iterable_dataset(), None, ["pair_dataset", "no stored set"]),
        (small.pairs(20), stored(20).to_iterable_dataset(), ["eval_pair_dataset", "IterableDataset", "from_list"]),
    ],
    ids=["no labels", "few", "held-out without labels", "no pairs", "a stream", "a stream held out"],
)
def test_pairs_that_cannot_choose_are_refused_before_training(tmp_path, pair_dataset, held_out, words):
    with pytest.raises(ValueError) as error:
        small.trainer(
            tmp_path, pair_dataset=pair_dataset, eval_pair_dataset=held_out, metric_for_best_model="pair_accuracy"
        )
    assert all(word in str(error.value) for word in words), str(error.value)


def test_without_any_pairs_there_is_nothing_to_choose_by(tmp_path):
    run = small.trainer(tmp_path, pair_dataset={}, metric_for_best_model="pair_accuracy")
    with pytest.raises(ValueError, match="give them as eval_pair_dataset"):
        run.train()


# ---- Which checkpoint is better ----


def test_the_direction_of_every_metric_is_known(tmp_path):
    prefixes = ["", "eval_", "eval_color/", "eval_ood_"]
    for prefix, name in itertools.product(prefixes, [*METRICS, *OF_PAIRS, "loss"]):
        is_lower = name == "loss" or name not in METRICS or METRICS[name].direction == "lower"
        args = IPGConfig(str(tmp_path), metric_for_best_model=f"{prefix}{name}")
        assert args.greater_is_better is not is_lower, f"{prefix}{name}"
    known = {"group_mae/below/red": False, "eval_group_accuracy/cat/in_loss": True, "their_own": True}
    for name, is_greater in known.items():
        assert IPGConfig(str(tmp_path), metric_for_best_model=name).greater_is_better is is_greater
    # what is given wins, and without a metric nothing is set
    assert IPGConfig(str(tmp_path), metric_for_best_model="mae", greater_is_better=True).greater_is_better is True
    assert IPGConfig(str(tmp_path)).greater_is_better is None
    assert (
        IPGConfig(str(tmp_path), lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps").greater_is_better
        is False
    )


def test_a_regression_keeps_its_smallest_error(tmp_path):
    errors = iter([3.0, 1.0, 2.0])
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    run = small.trainer(
        tmp_path,
        pair_dataset={},
        eval_dataset=small.rows(8),
        compute_metrics=lambda prediction: {"worst_group_mae": next(errors)},
        load_best_model_at_end=True,
        metric_for_best_model="worst_group_mae",
        **settings,
    )
    run.train()
    assert run.state.best_global_step == 2 and run.state.best_metric == 1.0


# ---- Going on ----


def test_a_finished_training_that_is_resumed_makes_no_step(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant", "learning_rate": 1e-3}
    for max_steps, num_epochs in ((3, 1), (6, 1), (-1, 1)):  # an epoch has 3 steps
        folder = tmp_path / str(max_steps)
        settings |= {"max_steps": max_steps, "num_train_epochs": num_epochs}
        run = small.trainer(folder, **settings)
        run.train()
        again = small.trainer(folder, small.vit(dropout=0.1), **settings)
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == run.state.global_step
        assert small.bit_equal(small.weights(run.model), small.weights(again.model))
    # a training of more steps does go on
    settings |= {"max_steps": 7}
    longer = small.trainer(tmp_path / "6", **settings)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 7


@pytest.mark.parametrize("before", [None, "two"])
def test_a_guided_training_is_not_resumed_without_its_pairs(tmp_path, before):
    sets = small.pairs(10) if before is None else {"color": small.pairs(10), "mark": small.pairs(7, seed=2)}
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    small.trainer(tmp_path, pair_dataset=sets, **settings).train()
    fewer = {} if before is None else {"color": small.pairs(10)}
    settings["max_steps"] = 4
    with pytest.raises(
        ValueError, match=r"checkpoint-2 is of a training with pairs .*pair_dataset lacks '(pairs|mark)'"
    ):
        small.trainer(tmp_path, pair_dataset=fewer, **settings).train(resume_from_checkpoint=True)
    run = small.trainer(tmp_path, pair_dataset=sets, **settings)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 4


def test_a_plain_trainer_goes_on_as_before(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "pair_dataset": {}}
    small.trainer(tmp_path, max_steps=2, **settings).train()
    run = small.trainer(tmp_path, max_steps=4, kind=IPGTrainer, **settings)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 4 and np.isfinite(run.state.log_history[-1]["train_loss"])
