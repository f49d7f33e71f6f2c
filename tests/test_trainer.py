# SPDX-License-Identifier: Apache-2.0
import copy
import inspect
import math

import datasets
import numpy as np
import pytest
import small
import timm
import torch
from PIL import Image
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTImageProcessor

from ipg_hf import IPGConfig, IPGTrainer, find_head
from ipg_hf.guidance import invariance_divergence, rationale_distance

MODELS = {"vit": small.vit, "resnet": small.resnet, "timm": small.timm_resnet}
RUNTIME = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
RUNTIME |= {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}


def trainer(tmp_path, model=None, train=None, pair_dataset=None, kind=IPGTrainer, **kwargs):
    names = set(inspect.signature(kind.__init__).parameters)
    given = {name: kwargs.pop(name) for name in list(kwargs) if name in names - {"args"}}
    if kind is IPGTrainer:
        given["pair_dataset"] = small.pairs(10) if pair_dataset is None else pair_dataset
    model = small.vit() if model is None else model
    train = small.rows(24) if train is None else train
    return kind(model=model, args=small.config(tmp_path, **kwargs), train_dataset=train, **given)


def logged(run, key="loss"):
    return [entry for entry in run.state.log_history if key in entry]


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def bit_equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def warnings_of(caplog):
    """The library's warnings so far."""
    return lambda: [r.getMessage() for r in caplog.records if r.name.startswith("ipg_hf") and r.levelname == "WARNING"]


class Around(TrainerCallback):
    """Parameters and optimizer state as the corrective update leaves them, and before and after each step."""

    def __init__(self):
        self.before, self.middle, self.after = [], [], []

    @staticmethod
    def look(model, optimizer):
        return weights(model), small.optimizer_state(model, optimizer)

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.before.append(self.look(model, optimizer))

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.middle.append(self.look(model, optimizer))

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.after.append(self.look(model, optimizer))


# ---- R1, R2: numerics and the pair forward ----


@pytest.mark.parametrize("settings", [{}, {"bf16": True}], ids=["bf16 model", "bf16 autocast"])
def test_measures_are_float32_below_it(tmp_path, monkeypatch, settings):
    seen = {}
    run = trainer(tmp_path, small.vit() if settings else small.vit().bfloat16(), max_steps=2, **settings)
    if not settings:
        run.train_dataset = small.rows(24, dtype=torch.bfloat16)
        run.pair_datasets[""] = small.pairs(10, dtype=torch.bfloat16)

    from ipg_hf.progress import PairProgress

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
    monkeypatch.setattr(IPGTrainer, "_scale_loss_gradient", lambda self, model: None)
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
def test_the_first_update_leaves_the_bias_and_decays_nothing(tmp_path, optim):
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


def test_weight_decay_acts_once(tmp_path):
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
    assert files == own_files and any("checkpoint-6/optimizer.pt" in name for name in files)


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


# ---- Skipped steps, logs, collapse ----


class Poisoned(TrainerCallback):
    """A gradient that is not finite in the corrective backward of the chosen steps."""

    def __init__(self, model, *steps):
        self.steps, self.now = steps, -1
        model.classifier.weight.register_hook(lambda grad: grad * self.factor(model))

    def factor(self, model):
        return math.nan if self.now in self.steps and not model.training else 1.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.now = state.global_step


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch_fused"])
def test_a_gradient_that_is_not_finite_skips_the_whole_step(tmp_path, optim):
    model, around = small.vit(), Around()
    run = trainer(
        tmp_path,
        model,
        callbacks=[Poisoned(model, 1, 2), around],
        max_steps=4,
        optim=optim,
        gradient_accumulation_steps=2,
        weight_decay=0.1,
    )
    run.train()
    for step in range(4):
        for before, after in zip(around.before[step], around.after[step], strict=True):
            assert bit_equal(before, after) is (step in (1, 2)) or not before
    assert [entry["ipg/skipped"] for entry in logged(run)] == [0.0, 1.0, 1.0, 0.0]
    assert ["ipg/distance" in entry for entry in logged(run)] == [True, False, False, True]
    assert all(torch.isfinite(value).all() for value in weights(model).values())


def test_log_keys(tmp_path):
    run = trainer(tmp_path, max_steps=4, logging_steps=2)
    run.train()
    names = {"distance", "divergence", "violated", "corrective_grad_norm", "loss_grad_norm", "loss_scale", "skipped"}
    for entry in logged(run):
        assert {key for key in entry if key.startswith("ipg/")} == {f"ipg/{name}" for name in {*names, "collapsed"}}
    assert not any(key.startswith("ipg/") for key in logged(run, "train_loss")[0])


def test_logs_are_means_over_the_steps_since_the_last(tmp_path):
    every, second = (trainer(tmp_path, max_steps=4, logging_steps=steps) for steps in (1, 2))
    every.train()
    second.train()
    values = [entry["ipg/distance"] for entry in logged(every)]
    wanted = [np.mean(values[:2]), np.mean(values[2:])]
    assert [entry["ipg/distance"] for entry in logged(second)] == pytest.approx(wanted, rel=1e-12)


class Constant(TrainerCallback):
    """From a step on, the model's output is one constant."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step >= self.step:
            with torch.no_grad():
                model.classifier.weight.zero_()


def test_a_collapse_is_logged_and_warned_of_once(tmp_path, warnings_of):
    model = small.vit()
    with torch.no_grad():
        model.classifier.weight.mul_(50)
    run = trainer(tmp_path, model, max_steps=6, callbacks=[Constant(3)], alpha=0.25, learning_rate=1e-6)
    run.train()
    assert [entry["ipg/collapsed"] for entry in logged(run)] == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    (message,) = warnings_of()
    assert "alpha (now 0.25)" in message and "learning_rate (now 1e-06)" in message


def test_a_fresh_zero_head_is_no_collapse(tmp_path, warnings_of):
    run = trainer(tmp_path, callbacks=[Constant(0)], max_steps=3)
    run.train()
    assert [entry["ipg/collapsed"] for entry in logged(run)] == [0.0] * 3
    assert warnings_of() == []


# ---- Data ----


def hf_rows(n, seed=0, attribute=True):
    rng = np.random.default_rng(seed)
    images = [Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)) for _ in range(n)]
    columns = {"image": images, "label": [i % 2 for i in range(n)]}
    columns |= {"attribute": [i // 2 % 2 for i in range(n)], "note": ["x"] * n} if attribute else {}
    return datasets.Dataset.from_dict(columns)


def hf_pairs(n, seed=1):
    a, b = hf_rows(n, seed), hf_rows(n, seed + 100)
    return datasets.Dataset.from_dict({"image_a": a["image"][:], "image_b": b["image"][:], "source_id": list(range(n))})


PROCESSOR = {"size": {"height": small.SIZE, "width": small.SIZE}}


@pytest.mark.parametrize("remove", [True, False])
def test_attributes_reach_metrics_and_never_the_model(tmp_path, remove):
    given, forwards = [], []
    model = small.vit()
    model.register_forward_pre_hook(lambda _, args, kwargs: forwards.append(set(kwargs)), with_kwargs=True)

    def metrics(prediction):
        given.append(prediction.label_ids)
        return {"seen": 1.0}

    rows = small.rows(10, attribute=True) if not remove else None
    settings = {"processing_class": ViTImageProcessor(**PROCESSOR)} if remove else {}
    train = hf_rows(24) if remove else small.rows(24, attribute=True)
    run = trainer(
        tmp_path,
        model,
        train,
        eval_dataset=hf_rows(10) if remove else rows,
        compute_metrics=metrics,
        remove_unused_columns=remove,
        max_steps=1,
        **settings,
    )
    run.train()
    run.evaluate()
    labels, attributes = given[0]
    assert labels.tolist() == [i % 2 for i in range(10)]
    assert attributes.tolist() == [i // 2 % 2 for i in range(10)]
    assert forwards and not any("attribute" in names or "note" in names for names in forwards)
    # a set without the column has plain labels
    run.evaluate(hf_rows(6, attribute=False) if remove else small.rows(6))
    assert given[1].tolist() == [i % 2 for i in range(6)]


def test_raw_images_are_transformed(tmp_path):
    """Train, evaluation and pair sets give what the processor gives."""
    processor = ViTImageProcessor(**PROCESSOR)
    seen = []
    model = small.vit()
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((module.training, kwargs["pixel_values"])), with_kwargs=True
    )
    train, pair_dataset = hf_rows(8), hf_pairs(4)
    run = trainer(
        tmp_path,
        model,
        train,
        pair_dataset,
        eval_dataset=hf_rows(6, seed=9),
        processing_class=processor,
        max_steps=1,
        train_sampling_strategy="sequential",
    )
    run.train()
    run.evaluate()

    def processed(images):
        return processor(list(images), return_tensors="pt")["pixel_values"]

    batches = [values for training, values in seen if training]
    assert torch.equal(batches[0], processed(train["image"]))
    pair_batch = next(values for training, values in seen if not training and len(values) == 8)
    wanted = processed([*pair_dataset["image_a"], *pair_dataset["image_b"]])
    order = [next(i for i in range(4) if torch.equal(wanted[i], image)) for image in pair_batch[:4]]
    assert sorted(order) == [0, 1, 2, 3]
    assert torch.equal(pair_batch[4:], wanted[[4 + i for i in order]])
    assert torch.equal(seen[-1][1], processed(hf_rows(6, seed=9)["image"]))
    measured = run.evaluate_pairs(pair_dataset)
    assert measured == pytest.approx(run.evaluate_pairs([
        {"pixel_values_a": a, "pixel_values_b": b} for a, b in zip(*wanted.chunk(2), strict=True)
    ]))  # fmt: skip


def test_a_pair_batch_larger_than_the_set_uses_all(tmp_path, warnings_of):
    recorded = small.Recorded(small.pairs(3))
    run = trainer(tmp_path, pair_dataset=recorded, per_device_pair_batch_size=8, max_steps=2, check_pairs=False)
    (message,) = warnings_of()
    assert "3 pairs" in message and "8" in message
    recorded.drawn.clear()
    run.train()
    steps = recorded.drawn[-6:]
    assert sorted(steps[:3]) == sorted(steps[3:]) == [0, 1, 2]
    assert run.progress.positions == {"": 6}


def test_pairs_do_not_disturb_the_global_generators(tmp_path):
    """Random transforms of the user's own: what the run draws besides is the same with any pair set."""

    class Noisy(small.Recorded):
        def __getitem__(self, row):
            noise = torch.rand(()).item() + np.random.rand()
            return {name: value + noise for name, value in super().__getitem__(row).items()}

    states = []
    for pair_dataset in (small.pairs(10), Noisy(small.pairs(10))):
        run = trainer(tmp_path, small.vit(dropout=0.5), pair_dataset=pair_dataset, check_pairs=False, max_steps=2)
        torch.manual_seed(0)
        np.random.seed(0)
        run.train()
        run.evaluate_pairs(small.pairs(4))
        states.append((torch.get_rng_state(), np.random.get_state()[1]))
    assert torch.equal(states[0][0], states[1][0])
    assert np.array_equal(states[0][1], states[1][1])


# ---- Errors of the constructor ----


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alpha": 0.0}, ["alpha=0.0", "above 0"]),
        ({"alpha": -1.0}, ["alpha=-1.0", "above 0"]),
        ({"alpha": math.nan}, ["alpha=nan", "above 0"]),
        ({"alpha": math.inf}, ["alpha=inf", "finite"]),
        ({"invariance_threshold": -1.0}, ["invariance_threshold=-1.0", "0 or more"]),
        ({"invariance_threshold": math.nan}, ["invariance_threshold=nan", "not NaN"]),
        ({"rationale_norm": "nuclear"}, ["rationale_norm='nuclear'", "spectral", "frobenius"]),
        ({"rationale_reduction": "sum"}, ["rationale_reduction='sum'", "mean", "pair"]),
        ({"pair_combination": "max"}, ["pair_combination='max'", "mean", "sum"]),
        ({"per_device_pair_batch_size": 0}, ["per_device_pair_batch_size=0", "1 or more"]),
        ({"random_crop_scale": 0.0}, ["random_crop_scale=0.0", "(0, 1]"]),
        ({"pair_num_workers": -1}, ["pair_num_workers=-1", "0 or more"]),
    ],
)
def test_settings_that_cannot_work(tmp_path, settings, words):
    with pytest.raises(ValueError) as error:
        IPGConfig(str(tmp_path), use_cpu=True, **settings)
    assert all(word in str(error.value) for word in words)


def test_an_infinite_threshold_and_none_at_all_are_settings(tmp_path):
    IPGConfig(str(tmp_path), use_cpu=True, invariance_threshold=math.inf)
    IPGConfig(str(tmp_path), use_cpu=True, invariance_threshold=0.0)


def without_linear_head():
    model = small.vit()
    model.classifier = nn.Sequential(nn.Flatten(), nn.LayerNorm(32), nn.Bilinear(32, 32, 2))
    return model


def with_labels(labels):
    return datasets.Dataset.from_dict({"pixel_values": [[0.0]] * len(labels), "label": labels})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"args": "plain"}, ["TrainingArguments", "IPGConfig"]),
        ({"model": "timm"}, ["timm module", "load_image_classifier(model)"]),
        ({"fp16": True}, ["fp16=True", "bf16=True"]),
        ({"train": with_labels([0, 1, 2])}, ["train_dataset", "label 2", "row 2", "num_labels"]),
        ({"eval_dataset": {"far": with_labels([0, -1])}}, ["eval_dataset['far']", "label -1", "row 1"]),
        ({"model": "no head"}, ["ViTForImageClassification", "no linear layer", "head="]),
        ({"head": "vit.layers"}, ["head='vit.layers'"]),
        ({"pair_dataset": {"empty": small.Recorded([])}}, ["pair_dataset['empty']", "empty"]),
    ],
    ids=str,
)
def test_constructors_that_cannot_work(tmp_path, arguments, words):
    if arguments.get("model") == "timm":
        arguments = {"model": timm.create_model("test_vit", num_classes=2)}
    if arguments.get("model") == "no head":
        arguments = {"model": without_linear_head()}
    with pytest.raises(ValueError) as error:
        if arguments.get("args") == "plain":
            IPGTrainer(small.vit(), TrainingArguments(str(tmp_path), use_cpu=True), pair_dataset=small.pairs(4))
        else:
            trainer(tmp_path, **arguments)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_ignored_labels_are_in_range(tmp_path):
    trainer(tmp_path, train=with_labels([0, 1, -100]))


def test_nothing_to_correct_is_an_error(tmp_path):
    model = small.vit()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "classifier.bias")
    with pytest.raises(ValueError, match="unfreeze"):
        trainer(tmp_path, model).train()


def test_separate_states_cannot_be_resumed(tmp_path):
    with pytest.raises(ValueError, match="shared_optimizer_state=False"):
        trainer(tmp_path, shared_optimizer_state=False).train(resume_from_checkpoint=True)


# ---- Other ----


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
    head.module.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
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


def test_augmentation_changes_with_the_epoch(tmp_path):
    seen = []
    model = small.vit()
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"]) if module.training else None, with_kwargs=True
    )
    run = trainer(
        tmp_path,
        model,
        hf_rows(8),
        hf_pairs(4),
        processing_class=ViTImageProcessor(**PROCESSOR),
        random_crop_scale=0.3,
        random_flip=True,
        max_steps=2,
        train_sampling_strategy="sequential",
    )
    run.train()
    assert all(not torch.equal(a, b) for a, b in zip(*seen, strict=True))
