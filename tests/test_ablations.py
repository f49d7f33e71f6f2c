# SPDX-License-Identifier: Apache-2.0
"""Ablations of the step: each changes one part, and with none of them the step is the method."""

import pytest
import small
import torch
from small import Around, bit_equal, descending, differences, logged, scales, trainer, weights

from ipg_hf import IPGTrainer
from ipg_hf.baselines import AblationTrainer


def ablated(folder, **settings):
    run, around = descending(folder, **{"kind": AblationTrainer, "max_steps": 5, **small.SCALED, **settings})
    run.train()
    return run, around


def test_without_an_ablation_it_is_the_method(tmp_path):
    ends = [weights(ablated(tmp_path, kind=kind)[0].model) for kind in (IPGTrainer, AblationTrainer)]
    assert bit_equal(*ends)


# ---- The factor of step 4 ----


def test_a_fixed_scale_of_the_task_gradient(tmp_path):
    def end(**settings):
        run, _ = ablated(tmp_path, correction_interval=2, **settings)
        return weights(run.model), scales(run)

    quarter, factors = end(loss_scaling="fixed", alpha=0.25)
    assert factors == [0.25] * 5  # where the pairs are looked at, and in between
    # a factor of 1 is no scaling: the ablation without step 4, to the last bit
    one, unscaled = end(loss_scaling="fixed", alpha=1.0), end(invariance_threshold=float("inf"))
    assert one[1] == unscaled[1] == [1.0] * 5 and bit_equal(one[0], unscaled[0])
    adaptive = end(alpha=0.25)
    assert adaptive[1] != factors
    for other in (adaptive[0], one[0]):
        assert differences(quarter, other) > 1e-5


def test_a_fixed_scale_ends_at_the_threshold(tmp_path):
    run, _ = ablated(tmp_path, loss_scaling="fixed", alpha=0.25, invariance_threshold=2e-5)
    assert scales(run) == [0.25 if log["ipg/violated"] else 1.0 for log in logged(run)]
    assert {*scales(run)} == {0.25, 1.0}


# ---- The optimizer's state ----


@pytest.mark.parametrize("optim", ["sgd", "adamw"])
def test_separate_optimizer_states(tmp_path, optim):
    """The second update's momentum knows nothing of the first update, and the other way round."""
    ends = []
    for shared in (True, False):
        model, around = small.vit(), Around()
        kinds = {"sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9), "adamw": lambda p: torch.optim.AdamW(p, 0.01)}
        run = trainer(
            tmp_path,
            model,
            kind=AblationTrainer,
            optimizers=(kinds[optim](model.parameters()), None),
            shared_optimizer_state=shared,
            callbacks=[around],
            max_steps=2,
        )
        run.train()
        ends.append(weights(model))
        assert bit_equal(around.before[1][1], around.middle[1][1]) is not shared
    assert differences(*ends) > 1e-5


def test_separate_states_cannot_be_resumed(tmp_path):
    with pytest.raises(ValueError, match="shared_optimizer_state=False"):
        run = trainer(tmp_path, kind=AblationTrainer, shared_optimizer_state=False)
        run.train(resume_from_checkpoint=True)


# ---- The distance ----


def test_the_frobenius_norm_of_the_rationales(tmp_path):
    """The logged distance is the norm worked from the head's input; of identical members it is 0, without NaN."""
    pairs = small.pairs(4)
    model = small.vit()
    settings = {"kind": AblationTrainer, "rationale_norm": "frobenius", "max_steps": 1, **small.PAPER}
    with torch.no_grad():
        sides = [torch.stack([row[f"pixel_values_{side}"] for row in pairs]) for side in "ab"]
        z_a, z_b = (model.eval().vit(pixel_values=side).last_hidden_state[:, 0] for side in sides)
    wanted = torch.linalg.matrix_norm(model.classifier.weight * (z_a - z_b).mean(0), "fro").item()
    run = trainer(tmp_path, model, pair_dataset=pairs, **settings)
    run.train()
    assert logged(run)[0]["ipg/distance"] == pytest.approx(wanted, rel=1e-5)
    spectral = trainer(tmp_path, pair_dataset=pairs, **settings | {"rationale_norm": "spectral"})
    spectral.train()
    assert logged(spectral)[0]["ipg/distance"] < 0.999 * wanted
    same = trainer(tmp_path, pair_dataset=small.pairs(4, same=True), **settings)
    same.train()
    assert logged(same)[0]["ipg/distance"] == logged(same)[0]["ipg/corrective_grad_norm"] == 0.0
    assert all(torch.isfinite(value).all() for value in weights(same.model).values())


def test_the_sum_of_several_sets(tmp_path):
    """With plain SGD the corrective update along the sum of two sets is twice that along their mean (R11)."""
    sets = {name: small.pairs(4, seed=seed, dtype=torch.float64) for name, seed in (("colour", 1), ("frame", 7))}
    moved, distances = {}, {}
    for combination in ("mean", "sum"):
        run, around = ablated(tmp_path, pair_dataset=sets, pair_combination=combination, max_steps=1)
        before, middle = around.before[0][0], around.middle[0][0]
        moved[combination] = {name: middle[name] - before[name] for name in before}
        distances[combination] = logged(run)[0]["ipg/distance"]
        parts = [logged(run)[0][f"ipg/{name}/distance"] for name in sets]
    assert differences(moved["sum"], {name: 2 * value for name, value in moved["mean"].items()}) < 1e-12
    assert differences(moved["sum"], moved["mean"]) > 1e-4
    assert distances["sum"] == pytest.approx(sum(parts)) == pytest.approx(2 * distances["mean"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rationale_norm": "nuclear"}, "rationale_norm='nuclear' is not valid: it must be one of spectral, frobenius"),
        ({"pair_combination": "max"}, "pair_combination='max' is not valid: it must be one of mean, sum"),
        ({"loss_scaling": "none"}, "loss_scaling='none' is not valid: it must be one of adaptive, fixed"),
    ],
)
def test_settings_that_cannot_work(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        small.config(tmp_path, AblationTrainer.config_class, **settings)
