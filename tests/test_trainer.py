# SPDX-License-Identifier: Apache-2.0
"""The rules of the guided step, each with a run that would break it."""

import copy
import math

import pytest
import small
import torch
from small import Around, bit_equal, logged, trainer, weights
from torch import nn
from transformers import Trainer, TrainingArguments

from ipg_hf import IPGConfig, IPGTrainer, find_head
from ipg_hf.guidance import invariance_divergence, rationale_distance
from ipg_hf.step import GuidedStep

MODELS = {"vit": small.vit, "resnet": small.resnet, "timm": small.timm_resnet}
RUNTIME = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
RUNTIME |= {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}


@pytest.fixture
def warnings_of(caplog):
    """The library's warnings so far."""
    return lambda: [r.getMessage() for r in caplog.records if r.name.startswith("ipg_hf") and r.levelname == "WARNING"]


# ---- R1, R2: numerics and the pair forward ----


@pytest.mark.parametrize("settings", [{}, {"bf16": True}], ids=["bf16 model", "bf16 autocast"])
def test_measures_are_float32_below_it(tmp_path, monkeypatch, settings):
    seen = {}
    run = trainer(tmp_path, small.vit() if settings else small.vit().bfloat16(), max_steps=2, **settings)
    if not settings:
        run.train_dataset = small.rows(24, dtype=torch.bfloat16)
        run.pair_datasets[""] = small.pairs(10, dtype=torch.bfloat16)

    from ipg_hf.callbacks import PairProgress

    add = PairProgress.add
    monkeypatch.setattr(PairProgress, "add", lambda self, values: (seen.update(values), add(self, values)))
    run.train()
    assert {"distance", "divergence", "corrective_grad_norm", "loss_grad_norm", "loss_scale"} <= seen.keys()
    assert {name: value.dtype for name, value in seen.items()} == dict.fromkeys(seen, torch.float32)
    assert all(math.isfinite(entry["ipg/distance"]) and entry["ipg/distance"] > 0 for entry in logged(run))


@pytest.mark.parametrize("norm", ["spectral", "frobenius"])
@pytest.mark.parametrize("dropout", [0.0, 0.9])
def test_identical_members_give_zero_to_the_last_bit(tmp_path, norm, dropout):
    around = Around()
    run = trainer(
        tmp_path,
        small.vit(dropout=dropout),
        pair_dataset=small.pairs(10, same=True),
        invariance_threshold=0.0,
        rationale_norm=norm,
        rationale_reduction="pair",
        optim="sgd",
        callbacks=[around],
    )
    run.train()
    for entry in logged(run):
        assert entry["ipg/distance"] == entry["ipg/divergence"] == entry["ipg/corrective_grad_norm"] == 0.0
        assert entry["ipg/violated"] == 0.0 and entry["ipg/skipped"] == 0.0
    assert bit_equal(around.before[0][0], around.middle[0][0])  # a zero gradient moves nothing
    assert not bit_equal(around.before[0][0], around.after[0][0])
    assert all(torch.isfinite(value).all() for value in weights(run.model).values())
    if dropout:  # the control: in training mode the members differ
        run.model.train()
        batch = torch.stack([small.pairs(1, same=True)[0]["pixel_values_a"]] * 2)
        a, b = run.model(pixel_values=batch).logits
        assert not torch.equal(a, b)


# ---- R3: batch norm ----


@pytest.mark.parametrize("name", ["resnet", "timm"])
def test_the_pair_forward_leaves_running_statistics(tmp_path, name, monkeypatch):
    run = trainer(tmp_path, MODELS[name](), max_steps=1)
    before = weights(run.model)
    monkeypatch.setattr(Trainer, "training_step", lambda self, *args: torch.zeros(()))
    monkeypatch.setattr(GuidedStep, "end", lambda self, model: setattr(self, "_metrics", None))
    run.train()
    changed = {key for key, value in weights(run.model).items() if not torch.equal(value, before[key])}
    assert changed
    assert not {key for key in changed if "running" in key or "num_batches" in key}


def test_freeze_norm_leaves_statistics_and_trains_the_affine_parameters(tmp_path, warnings_of):
    changed = {}
    for freeze in (True, False):
        run = trainer(tmp_path, small.resnet(), freeze_norm=freeze, max_steps=2)
        assert any("freeze_norm=True" in message for message in warnings_of()) is not freeze
        before = weights(run.model)
        run.train()
        changed[freeze] = {key for key, value in weights(run.model).items() if not torch.equal(value, before[key])}
    assert not any("running" in key or "num_batches" in key for key in changed[True])
    assert any("running" in key for key in changed[False])
    affine = {key for key in before if "normalization.weight" in key or "normalization.bias" in key}
    assert affine and affine <= changed[True]


def test_no_batch_norm_no_warning(tmp_path, warnings_of):
    trainer(tmp_path)
    assert warnings_of() == []


# ---- R4, R5: what each update touches ----


@pytest.mark.parametrize("optim", ["sgd", "adamw"])
def test_the_first_update_leaves_the_bias(tmp_path, optim):
    model, around = small.vit(), Around()
    if optim == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.5)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.5)
    run = trainer(tmp_path, model, optimizers=(optimizer, None), callbacks=[around], max_steps=2)
    run.train()
    (values, state), (middle, middle_state) = around.before[1], around.middle[1]
    for key in ("classifier.bias",):
        assert torch.equal(values[key], middle[key])
        entries = {name for name in state if name.startswith(f"{key}/")}
        assert entries and all(torch.equal(state[name], middle_state[name]) for name in entries)
    changed = {name for name in values if not torch.equal(values[name], middle[name])}
    assert changed == set(values) - {"classifier.bias"}
    assert not torch.equal(middle["classifier.bias"], around.after[1][0]["classifier.bias"])
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.5}


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_weight_decay_leaves_the_first_update(tmp_path, kind):
    """Identical members have zero gradients, which show the decay alone."""
    model, around = small.vit(), Around()
    optimizer = kind(model.parameters(), 0.1, weight_decay=0.5)
    same = small.pairs(10, same=True)
    trainer(tmp_path, model, pair_dataset=same, optimizers=(optimizer, None), callbacks=[around], max_steps=1).train()
    assert bit_equal(around.before[0][0], around.middle[0][0])


def test_weight_decay_acts_in_the_second_update(tmp_path):
    """A parameter with zero gradients shows the decay alone."""
    model = small.vit()
    model.extra = nn.Parameter(torch.ones(3))
    forward = model.forward
    model.forward = lambda pixel_values=None, labels=None, **kwargs: _touch(
        forward(pixel_values, labels=labels, **kwargs), model.extra
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.5)
    run = trainer(
        tmp_path, model, optimizers=(optimizer, None), max_steps=1, max_grad_norm=0.0, invariance_threshold=math.inf
    )
    run.train()
    torch.testing.assert_close(model.extra.detach(), torch.full((3,), 1 - 0.1 * 0.5))


def _touch(output, extra):
    output.logits = output.logits + 0 * extra.sum()
    if output.loss is not None:
        output.loss = output.loss + 0 * extra.sum()
    return output


# ---- R6: accumulation ----


@pytest.mark.parametrize("name", MODELS)
def test_accumulation_equals_one_batch(tmp_path, name):
    """24 rows in whole steps; 22 in steps of 6 or 9, the last of which is short and ends in an uneven micro-batch."""

    def run(batch, steps, rows, kind=IPGTrainer):
        model = MODELS[name]().double()
        train, pair_dataset = small.rows(rows, dtype=torch.float64), small.pairs(6, dtype=torch.float64)
        settings = {"num_train_epochs": 1, "max_steps": -1, "optim": "sgd", "learning_rate": 0.05}
        settings |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "freeze_norm": True}
        done = trainer(tmp_path, model, train, pair_dataset, kind, train_sampling_strategy="sequential", **settings)
        done.train()
        return weights(done.model), [entry["loss"] for entry in logged(done)]

    for rows, ways in ((24, [(8, 1), (4, 2), (2, 4)]), (22, [(6, 1), (3, 2), (1, 6)]), (22, [(9, 1), (3, 3)])):
        (whole, losses), *others = [run(*way, rows) for way in ways]
        for other, other_losses in others:
            assert small.differences(whole, other) < 1e-6
            assert other_losses == pytest.approx(losses, abs=1e-5)


def test_transformers_own_accumulation_differs_for_resnet(tmp_path):
    """Transformers issue 47688. When this fails the workaround in `IPGTrainer` can go."""
    ends = []
    for batch, steps in ((8, 1), (2, 4)):
        settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "optim": "sgd"}
        model = small.resnet().eval()
        model.train = lambda mode=True, model=model: model  # batch statistics would differ too
        run = trainer(tmp_path, model, kind=Trainer, train_sampling_strategy="sequential", max_steps=2, **settings)
        run.train()
        ends.append([entry["loss"] for entry in logged(run)])
    assert ends[1][0] > 2 * ends[0][0]


# ---- R10: no pairs ----


def test_without_pairs_it_is_trainer_bit_for_bit(tmp_path):
    ends = []
    for kind in (Trainer, IPGTrainer):
        folder = tmp_path / kind.__name__
        run = trainer(
            folder,
            small.vit(dropout=0.1),
            small.rows(22),
            {},
            kind,
            eval_dataset=small.rows(10, seed=5),
            compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
            max_steps=8,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=3,
        )
        run.train()
        history = [{k: v for k, v in entry.items() if k not in RUNTIME} for entry in run.state.log_history]
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
        ends.append((weights(run.model), small.optimizer_state(run.model, run.optimizer), history, files))
    (model, state, history, files), (own_model, own_state, own_history, own_files) = ends
    assert bit_equal(model, own_model) and bit_equal(state, own_state) and state
    assert history == own_history and any("eval_accuracy" in entry for entry in history)
    assert [name.replace("training_args.bin", "training_args.json") for name in files] == own_files
    assert any("checkpoint-6/optimizer.pt" in name for name in files)


def test_one_default_is_another_than_transformers(tmp_path):
    """What keeps a first few steps at a high rate from the constant output; told otherwise it is Trainer's."""
    given = {"max_steps": 20, "logging_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    given |= {"save_strategy": "no"}
    ends = []
    for args in (
        IPGConfig(str(tmp_path), **given),
        TrainingArguments(str(tmp_path), **given, warmup_steps=0.1),
        IPGConfig(str(tmp_path), **given, warmup_steps=0),
        TrainingArguments(str(tmp_path), **given),
    ):
        kind = IPGTrainer if isinstance(args, IPGConfig) else Trainer
        run = kind(small.vit(), args, train_dataset=small.rows(24))
        run.train()
        ends.append(([entry["learning_rate"] for entry in logged(run)], weights(run.model)))
    (ours, our_model), (warm, warm_model), (told, told_model), (theirs, their_model) = ends
    assert ours == warm and bit_equal(our_model, warm_model) and ours[:3] == pytest.approx([0, 2.5e-5, 5e-5])
    assert told == theirs and bit_equal(told_model, their_model) and theirs[0] == 5e-5 == max(theirs)
    assert not bit_equal(our_model, their_model)


# ---- R11, R12: several invariances, other problem types ----


@pytest.mark.parametrize("combination", ["mean", "sum"])
def test_several_pair_sets(tmp_path, combination):
    """With plain SGD the corrective update is the combination of the two sets' own."""
    sets = {"colour": small.pairs(4), "background, long-named": small.pairs(4, seed=7)}
    moved, logs = {}, {}
    for name, chosen in {"both": sets, **{name: {name: dataset} for name, dataset in sets.items()}}.items():
        around = Around()
        run = trainer(
            tmp_path,
            small.vit().double(),
            small.rows(24, dtype=torch.float64),
            {key: [{k: v.double() for k, v in row.items()} for row in dataset] for key, dataset in chosen.items()},
            max_steps=1,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
            pair_combination=combination,
            callbacks=[around],
        )
        run.train()
        moved[name] = {key: around.middle[0][0][key] - value for key, value in around.before[0][0].items()}
        logs[name] = logged(run)[0]
    weight = 0.5 if combination == "mean" else 1.0
    wanted = {key: weight * sum(moved[name][key] for name in sets) for key in moved["both"]}
    assert small.differences(moved["both"], wanted) < 1e-12
    assert small.differences(moved["both"], {key: 0 * value for key, value in wanted.items()}) > 1e-4
    distances = [logs["both"][f"ipg/{name}/distance"] for name in sets]
    divergences = [logs["both"][f"ipg/{name}/divergence"] for name in sets]
    assert distances == pytest.approx([logs[name]["ipg/distance"] for name in sets])
    assert logs["both"]["ipg/distance"] == pytest.approx(weight * sum(distances))
    assert logs["both"]["ipg/divergence"] == max(divergences)


def test_violated_if_any_set_is(tmp_path):
    sets = {"same": small.pairs(4, same=True), "other": small.pairs(4)}
    run = trainer(tmp_path, pair_dataset=sets, max_steps=1, invariance_threshold=0.0)
    run.train()
    assert logged(run)[0]["ipg/same/divergence"] == 0.0
    assert logged(run)[0]["ipg/violated"] == 1.0


@pytest.mark.parametrize("kind", ["regression", "multi-label"])
def test_other_problem_types(tmp_path, kind):
    labels = 1 if kind == "regression" else 3
    model, generator = small.vit(num_labels=labels), torch.Generator().manual_seed(0)
    rows = small.rows(16)
    for row in rows:
        row["labels"] = torch.rand(labels, generator=generator).round() if labels > 1 else float(torch.rand(()))
    pairs = small.pairs(4)
    with torch.no_grad():
        a, b = (model(torch.stack([row[f"pixel_values_{side}"] for row in pairs])).logits for side in "ab")
    if kind == "regression":
        wanted = ((a - b) ** 2).mean()
    else:
        p, q = a.sigmoid(), b.sigmoid()
        one = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        other = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
        wanted = ((one + other) / 2).sum(-1).mean()
    run = trainer(tmp_path, model, rows, pairs, max_steps=1, invariance_threshold=0.0)
    before = weights(model)
    run.train()
    assert logged(run)[0]["ipg/divergence"] == pytest.approx(wanted.item(), rel=1e-4)
    assert "ipg/collapsed" not in logged(run)[0]  # a constant output is told from class probabilities
    assert not bit_equal(before, weights(model))


# ---- Ablations ----


@pytest.mark.parametrize("optim", ["sgd", "adamw"])
def test_separate_states_are_an_ablation(tmp_path, optim):
    """The second update's momentum knows nothing of the first update, and the other way round."""
    ends = []
    for shared in (True, False):
        model, around = small.vit(), Around()
        kinds = {"sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9), "adamw": lambda p: torch.optim.AdamW(p, 0.01)}
        run = trainer(
            tmp_path,
            model,
            optimizers=(kinds[optim](model.parameters()), None),
            shared_optimizer_state=shared,
            callbacks=[around],
            max_steps=2,
        )
        run.train()
        ends.append(weights(model))
        assert bit_equal(around.before[1][1], around.middle[1][1]) is not shared
    assert small.differences(*ends) > 1e-5


def test_evaluate_pairs(tmp_path):
    pairs = small.pairs(11)
    run = trainer(tmp_path, small.vit(dropout=0.5), per_device_eval_batch_size=4, rationale_reduction="pair")
    run.model.train()
    measured = run.evaluate_pairs(pairs, metric_key_prefix="test")
    assert run.model.training
    model = copy.deepcopy(run.model).eval()
    head, features = find_head(model), []
    head.modules[0].register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    with torch.no_grad():
        a, b = (model(torch.stack([row[f"pixel_values_{side}"] for row in pairs])).logits for side in "ab")
    distance = rationale_distance(head.weight, *features, reduction="pair")
    assert measured == {
        "test_flip_rate": pytest.approx((a.argmax(-1) != b.argmax(-1)).float().mean().item()),
        "test_divergence": pytest.approx(invariance_divergence(a, b).item(), rel=1e-5),
        "test_distance": pytest.approx(distance.item(), rel=1e-5),
    }
    assert run.evaluate_pairs(small.pairs(5, same=True)) == dict.fromkeys(
        ["eval_flip_rate", "eval_divergence", "eval_distance"], 0.0
    )
    with pytest.raises(ValueError, match="empty"):
        run.evaluate_pairs(small.Recorded([]))


def test_a_second_run_starts_the_pairs_anew(tmp_path):
    recorded = small.Recorded(small.pairs(10))
    run = trainer(tmp_path, pair_dataset=recorded, check_pairs=False)
    drawn = []
    for _ in range(2):
        recorded.drawn.clear()
        run.train()
        drawn.append(list(recorded.drawn))
    assert drawn[0] == drawn[1]
    assert run.progress.positions == {"": 12}


def test_model_init(tmp_path):
    run = trainer(tmp_path, model=None)
    fresh = IPGTrainer(
        model_init=lambda: small.vit(),
        args=small.config(tmp_path),
        train_dataset=small.rows(24),
        pair_dataset=small.pairs(10),
    )
    run.train()
    fresh.train()
    assert bit_equal(weights(run.model), weights(fresh.model))


def test_each_named_set_has_an_order_of_its_own(tmp_path):
    sets = {name: small.Recorded(small.pairs(10)) for name in ("one", "other")}
    trainer(tmp_path, pair_dataset=sets, check_pairs=False).train()
    assert sets["one"].drawn[-12:] != sets["other"].drawn[-12:]


def test_what_a_network_keeps_at_inference_does_not_reach_the_next_correction(tmp_path):
    """LeViT keeps its attention biases from one inference forward to the next: of an evaluation, without a graph."""
    results = []
    for every in (1, 100):
        # of 4 × 4 tokens, so that attention has something to do
        levit = nn.Sequential(nn.Upsample(scale_factor=4), small.levit_with_teacher(image_size=64))
        model = small.Wrapped(levit).double()
        run = trainer(
            tmp_path,
            model,
            train=small.rows(40, dtype=torch.float64),
            eval_dataset=small.rows(8, dtype=torch.float64),
            eval_strategy="steps",
            eval_steps=every,
            pair_dataset=small.pairs(10, dtype=torch.float64),
            freeze_norm=True,
            optim="sgd",
            learning_rate=0.1,
            max_steps=5,
        )
        run.train()
        results.append(weights(model))
    assert bit_equal(*results)
