# SPDX-License-Identifier: Apache-2.0
"""The rules of the guided step, each with a run that would break it."""

import math
from types import SimpleNamespace

import pytest
import small
import torch
from accelerate import ParallelismConfig
from accelerate.utils import DistributedType
from small import Around, bit_equal, descending, differences, logged, scales, trainer, weights
from torch import nn
from transformers import Trainer, TrainerCallback

from ipg_hf import IPGTrainer, find_head
from ipg_hf.callbacks import PairProgress
from ipg_hf.step import GuidedStep, check_launch

MODELS = {"vit": small.vit, "resnet": small.resnet, "timm": small.timm_resnet}
NEVER_REACHED = 1e9  # as a threshold, of a divergence
every_distance = pytest.mark.parametrize("distance", small.DISTANCES)


def corrected(around):
    """Whether each step's first update moved something: before a step against before its second update."""
    return [not bit_equal(old[0], new[0]) for old, new in zip(around.before, around.middle, strict=True)]


def guided(folder, **settings):
    run, around = descending(folder, **{"max_steps": 5, **small.SCALED, **settings})
    run.train()
    return run, around


# ---- R1, R2: numerics and the pair forward ----


@every_distance
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 model", "bf16 autocast"])
def test_measures_are_float32_below_it(tmp_path, monkeypatch, autocast, distance):
    seen, add = {}, PairProgress.add
    monkeypatch.setattr(PairProgress, "add", lambda self, values: (seen.update(values), add(self, values)))
    dtype = torch.float32 if autocast else torch.bfloat16
    train, pairs = small.rows(16, dtype=dtype), small.pairs(10, dtype=dtype)
    run = trainer(
        tmp_path, small.vit().to(dtype), train, pairs, max_steps=2, bf16=autocast, **small.DISTANCES[distance]
    )
    run.train()
    assert {"distance", "divergence", "corrective_grad_norm", "loss_grad_norm", "loss_scale"} <= seen.keys()
    assert {name: value.dtype for name, value in seen.items()} == dict.fromkeys(seen, torch.float32)
    assert all(math.isfinite(entry["ipg/distance"]) and entry["ipg/distance"] > 0 for entry in logged(run))


@pytest.mark.parametrize(
    "distance",
    [{}, small.DIVERGENCE, small.PAPER | {"rationale_reduction": "pair"}],
    ids=["default", "divergence", "pair"],
)
def test_identical_members_give_zero_to_the_last_bit(tmp_path, distance):
    around, same = Around(), small.pairs(10, same=True)
    settings = distance | {"invariance_threshold": 0.0, "optim": "sgd", "callbacks": [around]}
    run = trainer(tmp_path, small.vit(dropout=0.9), pair_dataset=same, **settings)
    run.train()
    for entry in logged(run):
        assert entry["ipg/distance"] == entry["ipg/divergence"] == entry["ipg/corrective_grad_norm"] == 0.0
        assert entry["ipg/violated"] == 0.0 and entry["ipg/skipped"] == 0.0
    assert corrected(around) == [False] * 3  # a zero gradient moves nothing
    assert not bit_equal(around.before[0][0], around.after[0][0])
    assert all(torch.isfinite(value).all() for value in weights(run.model).values())
    run.model.train()  # the control: in training mode dropout makes the members differ
    a, b = run.model(pixel_values=torch.stack([same[0]["pixel_values_a"]] * 2)).logits
    assert not torch.equal(a, b)


def test_what_a_network_keeps_at_inference_does_not_reach_the_next_correction(tmp_path):
    """LeViT keeps its attention biases from one inference forward to the next: of an evaluation, without a graph."""
    results = []
    for every in (1, 100):
        # of 4 × 4 tokens, so that attention has something to do
        levit = nn.Sequential(nn.Upsample(scale_factor=4), small.levit_with_teacher(image_size=64))
        evaluated = small.rows(8, dtype=torch.float64)
        settings = {"eval_dataset": evaluated, "eval_strategy": "steps", "eval_steps": every, "freeze_norm": True}
        settings["learning_rate"] = 1e-4
        run, around = descending(tmp_path, build=lambda levit=levit: small.Wrapped(levit), max_steps=3, **settings)
        run.train()
        assert corrected(around) == [True] * 3
        results.append(weights(run.model))
    assert bit_equal(*results)


# ---- R3: batch norm ----


@pytest.mark.parametrize("name", ["resnet", "timm"])
def test_the_pair_forward_leaves_running_statistics(tmp_path, name, monkeypatch):
    run = trainer(tmp_path, MODELS[name](), max_steps=1)
    before = weights(run.model)
    monkeypatch.setattr(Trainer, "training_step", lambda self, *args: torch.zeros(()))
    monkeypatch.setattr(GuidedStep, "after_task", lambda self, model: setattr(self, "metrics", None))
    run.train()
    changed = {key for key, value in weights(run.model).items() if not torch.equal(value, before[key])}
    assert changed
    assert not {key for key in changed if "running" in key or "num_batches" in key}


# ---- R4, R5: what each update touches ----


def with_a_part_in_training_only(model):
    """A parameter that adds to the loss in training mode and to nothing at inference."""
    model.extra = nn.Parameter(torch.ones(3))
    forward = model.forward

    def forward_with_part(pixel_values=None, labels=None, **kwargs):
        output = forward(pixel_values, labels=labels, **kwargs)
        if model.training and output.loss is not None:
            output.loss = output.loss + model.extra.square().sum()
        return output

    model.forward = forward_with_part
    return model


@every_distance
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_parameter_that_the_distance_does_not_depend_on_is_not_corrected(tmp_path, kind, distance):
    """Its momentum is left too. The paper's distance does not depend on the head's bias."""
    model, around = with_a_part_in_training_only(small.vit()), Around()
    settings = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer, settings = kind(model.parameters(), 0.01, weight_decay=0.5, **settings), small.DISTANCES[distance]
    run = trainer(tmp_path, model, optimizers=(optimizer, None), callbacks=[around], max_steps=2, **settings)
    run.train()
    left = {"extra", "classifier.bias"} if distance == "paper" else {"extra"}
    (values, state), (middle, middle_state) = around.before[1], around.middle[1]
    assert {name for name in values if torch.equal(values[name], middle[name])} == left
    entries = {name for name in state if name.split("/")[0] in left}
    assert entries and all(torch.equal(state[name], middle_state[name]) for name in entries)
    assert not any(torch.equal(middle[name], around.after[1][0][name]) for name in left)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.5}


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_weight_decay_leaves_the_first_update(tmp_path, kind):
    """Identical members have zero gradients, which show the decay alone."""
    model, around = small.vit(), Around()
    optimizer = kind(model.parameters(), 0.1, weight_decay=0.5)
    same = small.pairs(10, same=True)
    trainer(tmp_path, model, pair_dataset=same, optimizers=(optimizer, None), callbacks=[around], max_steps=1).train()
    assert corrected(around) == [False]


def test_weight_decay_acts_in_the_second_update(tmp_path):
    """A parameter with zero gradients shows the decay alone."""
    model = small.vit()
    model.extra = nn.Parameter(torch.ones(3))
    forward = model.forward

    def touching(pixel_values=None, labels=None, **kwargs):
        output = forward(pixel_values, labels=labels, **kwargs)
        output.logits = output.logits + 0 * model.extra.sum()
        output.loss = None if output.loss is None else output.loss + 0 * model.extra.sum()
        return output

    model.forward = touching
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.5)
    trainer(tmp_path, model, optimizers=(optimizer, None), max_steps=1, max_grad_norm=0.0).train()
    torch.testing.assert_close(model.extra.detach(), torch.full((3,), 1 - 0.1 * 0.5))


# ---- R6: accumulation ----


@pytest.mark.parametrize(
    ("name", "distance"),
    [
        ("vit", {}),
        ("vit", small.DIVERGENCE),
        ("vit", {"invariance_distance": "rationale"}),
        ("resnet", {}),
        ("timm", {}),
    ],
    ids=["vit", "vit-divergence", "vit-paper", "resnet", "timm"],
)
def test_accumulation_equals_one_batch(tmp_path, name, distance):
    """24 rows in whole steps; 22 in steps of 9, the last of which is short and ends in an uneven micro-batch."""

    def run(rows, batch, steps):
        settings = {"num_train_epochs": 1, "max_steps": -1, "freeze_norm": True, **small.SCALED, **distance}
        settings |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}
        train, pairs = small.rows(rows, dtype=torch.float64), small.pairs(6, dtype=torch.float64)
        done, _ = descending(tmp_path, train, pairs, MODELS[name], lr_scheduler_type="linear", **settings)
        done.train()
        assert 0 < max(scales(done)) < 1
        return weights(done.model), [entry["loss"] for entry in logged(done)]

    for rows, *ways in ((24, (8, 1), (2, 4)), (22, (9, 1), (3, 3))):
        (whole, losses), (split, split_losses) = (run(rows, *way) for way in ways)
        assert differences(whole, split) < 1e-6
        assert split_losses == pytest.approx(losses, abs=1e-5)


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


# ---- R8: a gradient that is not finite ----


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


# ---- R11, R12: several invariances, other problem types ----


def test_several_pair_sets_correct_along_the_mean_of_their_gradients(tmp_path):
    """With plain SGD the corrective update is the mean of the two sets' own."""
    sets = {name: small.pairs(4, seed=seed, dtype=torch.float64) for name, seed in (("colour", 1), ("long name, b", 7))}
    moved, logs = {}, {}
    for name, chosen in {"both": sets, **{name: {name: dataset} for name, dataset in sets.items()}}.items():
        run, around = guided(tmp_path, pair_dataset=chosen, max_steps=1)
        moved[name] = {key: around.middle[0][0][key] - value for key, value in around.before[0][0].items()}
        logs[name] = logged(run)[0]
    wanted = {key: sum(moved[name][key] for name in sets) / 2 for key in moved["both"]}
    assert differences(moved["both"], wanted) < 1e-12
    assert differences(moved["both"], {key: 0 * value for key, value in wanted.items()}) > 1e-4
    distances = [logs["both"][f"ipg/{name}/distance"] for name in sets]
    divergences = [logs["both"][f"ipg/{name}/divergence"] for name in sets]
    assert distances == pytest.approx([logs[name]["ipg/distance"] for name in sets])
    assert logs["both"]["ipg/distance"] == pytest.approx(sum(distances) / 2)
    assert logs["both"]["ipg/divergence"] == max(divergences)


def test_violated_if_any_set_is(tmp_path):
    sets = {"same": small.pairs(4, same=True), "other": small.pairs(4)}
    run = trainer(tmp_path, pair_dataset=sets, max_steps=1, invariance_threshold=0.0)
    run.train()
    assert logged(run)[0]["ipg/same/divergence"] == 0.0
    assert logged(run)[0]["ipg/violated"] == 1.0


@every_distance
@pytest.mark.parametrize("kind", ["regression", "multi-label"])
def test_other_problem_types(tmp_path, kind, distance):
    labels = 1 if kind == "regression" else 3
    model, generator = small.vit(num_labels=labels), torch.Generator().manual_seed(0)
    rows = small.rows(16)
    for row in rows:
        row["labels"] = torch.rand(labels, generator=generator).round() if labels > 1 else float(torch.rand(()))
    pairs = small.pairs(4)
    with torch.no_grad():
        sides = [torch.stack([row[f"pixel_values_{side}"] for row in pairs]) for side in "ab"]
        a, b = (model(side).logits for side in sides)
    if kind == "regression":
        wanted = ((a - b) ** 2).mean()
    else:
        p, q = a.sigmoid(), b.sigmoid()
        one = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        other = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
        wanted = ((one + other) / 2).sum(-1).mean()
    z = find_head(model).run(model, {"pixel_values": torch.cat(sides)})[1]
    gap = z[: len(pairs)] - z[len(pairs) :]
    squares = (gap.square() @ model.classifier.weight.square().T).detach()
    if kind == "regression":
        of_rationales = squares.mean()
    else:
        p = (a.sigmoid() + b.sigmoid()) / 2
        of_rationales = (p * (1 - p) * squares).sum(-1).mean() / 2
    run = trainer(tmp_path, model, rows, pairs, max_steps=1, **small.DISTANCES[distance])
    before = weights(model)
    run.train()
    entry = logged(run)[0]
    assert entry["ipg/divergence"] == pytest.approx(wanted.item(), rel=1e-4)
    roots = {"divergence": wanted.sqrt(), "default": (wanted + of_rationales + 1e-3).sqrt() - 1e-3**0.5}
    for name, root in roots.items():
        assert (entry["ipg/distance"] == pytest.approx(root.item(), rel=1e-4)) is (distance == name)
    assert "ipg/collapsed" not in entry  # a constant output is told from class probabilities
    assert not bit_equal(before, weights(model))


# ---- Step 4: the factor ----


def test_the_task_gradient_is_only_scaled_down(tmp_path):
    """The factor of the paper is above 1 in some of these steps; the default limits it, at 1."""
    ends = []
    for limit in ({"max_loss_scale": math.inf}, {}):
        run, _ = guided(tmp_path, alpha=1.5, **limit)
        ends.append((scales(run), weights(run.model)))
    (free, free_end), (limited, limited_end) = ends
    assert min(limited) < 1 < max(free) and max(limited) == 1
    assert limited[0] == min(1.0, free[0])
    assert differences(free_end, limited_end) > 1e-5


# ---- Corrections now and then ----


def test_an_interval_corrects_every_second_step(tmp_path):
    run, around = guided(tmp_path, correction_interval=2)
    assert corrected(around) == [True, False, True, False, True]
    assert run.progress.positions == {"pairs": 12}
    logs = logged(run)
    for measured, between in ((0, 1), (2, 3)):
        # in between the task gradient gets the norm of the last corrective gradient, times alpha
        assert logs[between]["ipg/corrective_grad_norm"] == logs[measured]["ipg/corrective_grad_norm"]
        scaled = logs[between]["ipg/loss_scale"] * logs[between]["ipg/loss_grad_norm"]
        assert scaled == pytest.approx(0.1 * logs[between]["ipg/corrective_grad_norm"], rel=1e-6)
    assert logs[2]["ipg/corrective_grad_norm"] != logs[0]["ipg/corrective_grad_norm"]


def test_an_interval_resumes_where_it_was(tmp_path):
    settings = {"correction_interval": 3, "save_strategy": "steps", "save_steps": 1}
    whole, around = guided(tmp_path, **settings)
    assert corrected(around) == [True, False, False, True, False]
    for step in (2, 3):  # between two corrections, and right before the second
        again, _ = descending(tmp_path, max_steps=5, **small.SCALED, **settings)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert bit_equal(weights(whole.model), weights(again.model))
        assert whole.progress.positions == again.progress.positions == {"pairs": 8}


@every_distance
def test_the_schedule_violated_corrects_only_above_the_threshold(tmp_path, distance):
    ends = {}
    for threshold in (0.0, NEVER_REACHED):
        for schedule in ("always", "violated"):
            settings = {**small.DISTANCES[distance], "correction_schedule": schedule, "max_steps": 3}
            settings["invariance_threshold"] = threshold
            run, around = guided(tmp_path, **settings)
            ends[threshold, schedule] = weights(run.model)
            assert corrected(around) == [schedule == "always" or threshold == 0] * 3
            if threshold and schedule == "violated":  # in chunks too
                assert not any(corrected(guided(tmp_path, pair_chunk_size=2, **settings)[1]))
    assert bit_equal(ends[0.0, "always"], ends[0.0, "violated"])
    assert differences(ends[NEVER_REACHED, "always"], ends[NEVER_REACHED, "violated"]) > 1e-5


def test_pairs_that_agree_are_drawn_again_after_the_interval(tmp_path):
    settings = {"correction_schedule": "violated", "correction_interval": 3, "max_steps": 7}
    run, _ = guided(tmp_path, **settings | {"invariance_threshold": NEVER_REACHED})
    assert run.progress.positions == {"pairs": 4 * 3}  # steps 1, 4 and 7
    run, _ = guided(tmp_path, **settings)
    assert run.progress.positions == {"pairs": 4 * 7}


# ---- Optimizers and launchers ----


class InTwoModes(torch.optim.SGD):
    """Steps in training mode alone, as schedule-free optimizers do."""

    is_training = False

    def train(self):
        self.is_training = True

    def eval(self):
        self.is_training = False

    def step(self, closure=None):
        assert self.is_training, "Optimizer was not in train mode when step is called"
        return super().step(closure)


def test_an_optimizer_of_two_modes(tmp_path):
    results = []
    for kind in (torch.optim.SGD, InTwoModes):
        model = small.vit()
        settings = {"eval_dataset": small.rows(4), "eval_strategy": "steps", "eval_steps": 1}
        trainer(tmp_path, model, optimizers=(kind(model.parameters(), lr=0.05), None), **settings).train()
        results.append(weights(model))
    assert bit_equal(*results) and not bit_equal(results[0], weights(small.vit()))


def launched(kind="MULTI_GPU", fsdp_version=None, parallel=None):
    plugin = fsdp_version and SimpleNamespace(fsdp_version=fsdp_version)
    state = SimpleNamespace(fsdp_plugin=plugin)
    return SimpleNamespace(distributed_type=DistributedType(kind), state=state, parallelism_config=parallel)


@pytest.mark.parametrize(
    ("accelerator", "others", "words"),
    [
        (launched("DEEPSPEED"), {}, ["DEEPSPEED", "engine"]),
        (launched("MEGATRON_LM"), {}, ["MEGATRON_LM"]),
        (launched("FSDP", fsdp_version=1), {}, ["FSDP1"]),
        (launched(parallel=ParallelismConfig(tp_size=2)), {}, ["tensor or context parallelism"]),
        (launched(parallel=ParallelismConfig(cp_size=2)), {}, ["tensor or context parallelism"]),
        (launched("NO"), {"devices": 2}, ["this one has 2", "DataParallel"]),
        (launched("NO"), {"is_model_parallel": True}, ["spread over several"]),
    ],
    ids=["deepspeed", "megatron", "fsdp1", "tensor parallel", "context parallel", "DataParallel", "model parallel"],
)
def test_launchers_that_are_refused(accelerator, others, words):
    with pytest.raises(ValueError) as error:
        check_launch(accelerator, **others)
    assert all(word in str(error.value) for word in [*words, "--multi_gpu", "--fsdp_version 2"]), str(error.value)


def test_launchers_that_are_taken():
    sharded = launched("FSDP", fsdp_version=2, parallel=ParallelismConfig(dp_shard_size=2))
    for accelerator in (launched("NO"), launched("MULTI_GPU"), launched("MULTI_CPU"), sharded):
        check_launch(accelerator)


def test_a_refused_launcher_stops_the_trainer(tmp_path):
    settings = small.config(tmp_path)
    assert settings.device.type == "cpu"
    settings._n_gpu = 2  # what a machine of two gives a script that was started by itself
    with pytest.raises(ValueError, match="one device a process, and this one has 2"):
        IPGTrainer(small.vit(), settings, train_dataset=small.rows(4), pair_dataset=small.pairs(4))
    IPGTrainer(small.vit(), settings, train_dataset=small.rows(4))  # without pairs it is Trainer


@pytest.mark.parametrize(
    ("optim", "instead"),
    [("lomo", "adamw_torch"), ("galore_adamw_layerwise", "galore_adamw"), ("adalomo", "adamw_torch")],
)
def test_optimizers_that_step_in_the_backward_are_refused(tmp_path, optim, instead):
    with pytest.raises(ValueError, match=f"optim='{optim}', which moves .* Use '{instead}"):
        trainer(tmp_path, optim=optim)
    trainer(tmp_path, pair_dataset={}, optim=optim)  # plain training is Trainer's


# ---- Nothing to correct ----


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize(
    ("trained", "distance"),
    [("extra", {}), ("extra", small.DIVERGENCE), ("classifier.bias", small.PAPER)],
    ids=["default", "divergence", "paper"],
)
def test_a_distance_that_no_trainable_parameter_changes_is_an_error(tmp_path, trained, distance, chunk):
    model = with_a_part_in_training_only(small.vit())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == trained)
    with pytest.raises(ValueError, match="unfreeze the head or network"):
        trainer(tmp_path, model, pair_chunk_size=chunk, **distance).train()
