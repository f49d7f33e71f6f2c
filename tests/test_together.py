# SPDX-License-Identifier: Apache-2.0
"""What else `Trainer` offers, together with pairs."""

import multiprocessing

import pytest
import small
from small import bit_equal, config, logged, trainer, weights
from transformers import EarlyStoppingCallback, TrainerCallback

from ipg_hf import IPGTrainer
from ipg_hf.metrics import GroupMetrics
from ipg_hf.search import ipg_search_space, worst_group_objective


class OutOfMemory:
    """Makes a model's forward fail as a full accelerator does, for batches that are larger than it takes."""

    def __init__(self, model, largest, in_training):
        self.failures, self.largest, self.in_training = 0, largest, in_training
        self.forward, self.model = model.forward, model
        model.forward = self

    def __call__(self, pixel_values=None, labels=None, **kwargs):
        if self.model.training == self.in_training and len(pixel_values) > self.largest:
            self.failures += 1
            raise RuntimeError("CUDA out of memory. Tried to allocate all there is.")
        return self.forward(pixel_values=pixel_values, labels=labels, **kwargs)


def test_a_smaller_batch_found_is_a_run_of_that_batch(tmp_path):
    results = []
    for wanted, largest in ((8, 4), (4, 8)):
        model = small.vit()
        pair_set = small.Recorded(small.pairs(10))
        shortage = OutOfMemory(model, largest, in_training=True)
        run = trainer(
            tmp_path,
            model,
            train=small.rows(32),
            pair_dataset=pair_set,
            per_device_train_batch_size=wanted,
            auto_find_batch_size=True,
            learning_rate=0.01,
            check_pairs=False,
        )
        run.train()
        assert (shortage.failures > 0) == (wanted > largest)
        results.append((weights(model), [entry["ipg/distance"] for entry in logged(run)], pair_set.drawn[-12:]))
    # the failed attempt has taken a corrective step before its task forward failed
    assert results[0][2] == results[1][2]
    assert results[0][1][0] != results[1][1][0]


def test_pairs_that_do_not_fit_are_an_error_that_names_the_settings(tmp_path):
    model = small.vit()
    OutOfMemory(model, 4, in_training=False)
    run = trainer(tmp_path, model, per_device_pair_batch_size=4, auto_find_batch_size=True)
    with pytest.raises(MemoryError, match="the pairs do not fit into memory: set pair_chunk_size"):
        run.train()
    model = small.vit()
    OutOfMemory(model, 4, in_training=False)
    trainer(tmp_path, model, per_device_pair_batch_size=4, pair_chunk_size=2, auto_find_batch_size=True).train()


def test_a_search_over_the_settings(tmp_path):
    pytest.importorskip("optuna")

    class Seen(TrainerCallback):
        def __init__(self):
            self.trials = []

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            values = (args.alpha, args.invariance_threshold, args.per_device_pair_batch_size)
            self.trials.append((values, model.classifier.weight.detach().clone()))

    pair_set, seen = small.Recorded(small.pairs(200)), Seen()
    run = IPGTrainer(
        args=config(tmp_path, max_steps=2, eval_strategy="no", check_pairs=False),
        model_init=lambda: small.vit(),
        train_dataset=small.rows(24, attribute=True),
        eval_dataset=small.rows(16, seed=3, attribute=True),
        pair_dataset=pair_set,
        compute_metrics=GroupMetrics(),
        callbacks=[seen],
    )
    sizes, drawn = [], len(pair_set.drawn)

    def objective(metrics):
        sizes.append(len(pair_set.drawn) - drawn - sum(sizes))
        return worst_group_objective(metrics)

    best = run.hyperparameter_search(ipg_search_space, objective, n_trials=3, direction="maximize", backend="optuna")
    assert 0 <= best.objective <= 1
    assert set(best.hyperparameters) == {"alpha", "invariance_threshold", "per_device_pair_batch_size"}
    settings = [values for values, _ in seen.trials]
    assert len(settings) == len(set(settings)) == 3
    for alpha, threshold, pairs in settings:
        assert 0.1 <= alpha <= 10 and 1e-6 <= threshold <= 1e-1 and pairs in (8, 16, 32, 64)
    assert bit_equal(*({"": weight} for _, weight in seen.trials[:2]))  # each begins anew
    # two steps of pairs, and those at which the head was proven
    assert all(2 * pairs <= size <= 2 * pairs + 4 for size, (_, _, pairs) in zip(sizes, settings, strict=True))


def test_the_objective_of_several_sets_and_of_none():
    assert worst_group_objective({"eval_a_worst_group_accuracy": 0.5, "eval_b_worst_group_accuracy": 0.25}) == 0.25
    with pytest.raises(ValueError, match=r"only \['eval_loss'\].*GroupMetrics.*attribute"):
        worst_group_objective({"eval_loss": 1.0})


def test_early_stopping_keeps_the_best(tmp_path):
    scores = iter([0.5, 0.9, 0.4, 0.3, 0.2, 0.1])
    kept = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            kept[state.global_step] = weights(model)

    run = trainer(
        tmp_path,
        max_steps=6,
        learning_rate=0.01,
        eval_dataset=small.rows(8, attribute=True),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="worst_group_accuracy",
        compute_metrics=lambda _: {"worst_group_accuracy": next(scores)},
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2), Keep()],
    )
    run.train()
    assert run.state.global_step == 4 and run.state.best_global_step == 2
    assert bit_equal(weights(run.model), kept[2])


def test_several_evaluation_sets(tmp_path):
    sets = {name: small.rows(8, seed=seed, attribute=True) for name, seed in (("near", 3), ("far", 4))}
    run = trainer(
        tmp_path, eval_dataset=sets, eval_strategy="steps", eval_steps=2, compute_metrics=GroupMetrics(), max_steps=2
    )
    run.train()
    (near,) = [entry for entry in run.state.log_history if "eval_near_worst_group_accuracy" in entry]
    (far,) = [entry for entry in run.state.log_history if "eval_far_worst_group_accuracy" in entry]
    assert {name for name in near if "group_accuracy/" in name} != {name for name in far if "group_accuracy/" in name}
    assert near["eval_near_loss"] != far["eval_far_loss"]


def test_emptying_the_cache_changes_nothing(tmp_path):
    results = []
    for steps in (None, 1):
        model = small.vit()
        trainer(tmp_path, model, torch_empty_cache_steps=steps, learning_rate=0.01).train()
        results.append(weights(model))
    assert bit_equal(*results)


def test_workers_that_stay_change_nothing_and_end_with_the_run(tmp_path):
    results = []
    for workers in (0, 2):
        model = small.vit()
        run = trainer(
            tmp_path,
            model,
            train=small.rows(16),
            pair_dataset=small.pairs(7),
            num_train_epochs=3,
            max_steps=-1,
            learning_rate=0.01,
            dataloader_num_workers=workers,
            dataloader_persistent_workers=workers > 0,
            dataloader_prefetch_factor=2 if workers else None,
        )
        run.train()
        results.append((weights(model), [entry["ipg/distance"] for entry in logged(run)]))
        assert not run._pair_loaders
    assert bit_equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]
    del run
    assert len(multiprocessing.active_children()) <= 2  # those of Trainer's own loader end with it
