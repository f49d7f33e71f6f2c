# SPDX-License-Identifier: Apache-2.0
"""Processes that share the batches take the steps of one that has them whole."""

import json
import os

import pytest
import small
import torch
from safetensors.torch import load_file, save_file
from small_processes import run_together
from small_runs import TINY, record_of, write

from ipg_hf import gradients
from ipg_hf.baselines import METHODS
from ipg_hf.cli import main
from ipg_hf.pairs import AdversarialPairs

# divisible by 2 and 3 processes and 3 micro-batches
IMAGES, PAIRS, STEPS = 18, 6, 4
ACCUMULATED = {"gradient_accumulation_steps": 3}
# both branches of step 4 occur, and alpha lets it act
SCALED = {"invariance_threshold": 2e-5, "alpha": 0.1}
PAPER = small.PAPER | SCALED  # its distance is a norm of means, or a mean of norms
BY_PAIRS = PAPER | {"rationale_reduction": "pair"}
LABELLED = {"pair_loss_weight": 0.5, "label_smoothing_factor": 0.1}
# the part of a name up to the comma is the model; `method` is a key of METHODS
CASES = {
    "vit": {},
    "vit, accumulated, clipped": {**ACCUMULATED, "max_grad_norm": 0.05},
    "vit, no search for unused parameters": {"ddp_find_unused_parameters": False},
    "vit, in chunks": {"pair_chunk_size": 1},
    "vit, divergence": small.DIVERGENCE,
    "vit, divergence, in chunks, accumulated": small.DIVERGENCE | ACCUMULATED | {"pair_chunk_size": 1},
    "vit, labelled pairs": LABELLED,
    "vit, labelled pairs, in chunks, accumulated": LABELLED | ACCUMULATED | {"pair_chunk_size": 1},
    "vit, paper": PAPER,
    "vit, paper, accumulated": {**PAPER, **ACCUMULATED},
    "vit, paper, in chunks": {**PAPER, "pair_chunk_size": 1},
    "vit, paper by pairs": BY_PAIRS,
    "vit, paper by pairs, accumulated, clipped": {**BY_PAIRS, **ACCUMULATED, "max_grad_norm": 0.05},
    "resnet, frozen norm": {**BY_PAIRS, "freeze_norm": True},
    "timm, frozen norm, accumulated": {**PAPER, **ACCUMULATED, "freeze_norm": True},
    "resnet, running norm, accumulated": {**ACCUMULATED, "running_norm": True},
    "no labels": {},
    "two heads": {},
    "two heads, paper": PAPER,
    "adversarial": {},
    "vit, now and then": {"correction_interval": 2, "correction_schedule": "violated"},
    "vit, some layers, accumulated": {**ACCUMULATED, "corrective_layers": ["vit.layers.1", "classifier"]},
    "vit, group_dro, accumulated": {**ACCUMULATED, "objective": "group_dro", "group_dro_step_size": 1.0},
    "vit, reweight": {"objective": "reweight"},
    "vit, kl": {"method": "kl", "pair_penalty_weight": 50.0},
    "vit, features, in chunks, accumulated": {
        **ACCUMULATED,
        "method": "features",
        "pair_penalty_weight": 5.0,
        "pair_chunk_size": 1,
    },
}
# of three processes, which no power of two divides, each kind of sum over processes once
OF_THREE = [
    "vit",
    "vit, paper, accumulated",
    "vit, paper by pairs, accumulated, clipped",
    "vit, paper, in chunks",
    "vit, divergence",
    "vit, labelled pairs",
    "two heads",
    "resnet, running norm, accumulated",
    "adversarial",
    "vit, features, in chunks, accumulated",
    "vit, group_dro, accumulated",
]
FIGURES = ("distance", "penalty", "divergence", "violated", "loss_scale", "corrective_grad_norm", "loss_grad_norm")
BATCH_STATISTICS = "resnet, batch statistics"  # of each process's share
HALF = "resnet, bfloat16"
UNEVEN = "uneven"
# cases of CASES again, in another way: gradients go in many messages; each process corrects by its own pairs
IN_MANY_MESSAGES = "vit, paper by pairs, accumulated, clipped; many messages"
WITHOUT_REDUCTION = [
    f"{case}; no reduction"
    for case in ("vit", "vit, divergence", "vit, labelled pairs", "vit, paper", "vit, paper by pairs")
]
# recipes that `ipg train` runs
COMMANDS = {
    "dfr": {"method": "dfr", "num_fits": 2, "strengths": [1.0, 0.3]},
    "project": {"method": "project", "rank": 1},
    "jtt": {"method": "jtt", "first_steps": 1, "upweight": 3, "warmup_steps": 2},
}

# ---- The training ----


def build(case):
    builders = {"resnet": small.resnet, "timm": small.timm_resnet, "two heads": small.deit_with_teacher}
    model = builders.get(case.split(",")[0], small.vit)(2)
    model = model.bfloat16() if case == HALF else model.double()
    return small.Wrapped(model) if case == "no labels" else model


def as_bfloat16(rows):
    return [{k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in row.items()} for row in rows]


def train(folder, name):
    case, _, way = name.partition("; ")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    settings = dict(CASES.get(case, {}))
    micro = settings.get("gradient_accumulation_steps", 1)
    method = METHODS[settings.pop("method", "ipg")]
    images, pairs = 200, 10
    if case == UNEVEN:  # 11 images in batches of 6, 11 pairs in batches of 6, over two epochs and a bit
        images, pairs, settings = 11, 11, {"num_train_epochs": 3, "max_steps": -1}
    if case == HALF:
        settings = {**PAPER, "freeze_norm": True, "max_steps": 1}
    args = small.config(
        folder,
        method.config,
        **{"max_steps": STEPS} | SCALED | settings | dict(method.settings),
        optim="sgd",
        learning_rate=0.05,
        per_device_train_batch_size=(6 if case == UNEVEN else IMAGES) // processes // micro,
        per_device_pair_batch_size=PAIRS // processes,
        check_pairs=False,
    )
    sides = small.pairs(pairs, dtype=torch.float64)
    if "pair_loss_weight" in settings:  # few labels are known: in most steps some process has none
        sides = [{**pair, "label": {0: 0, 3: 1}.get(row, -100)} for row, pair in enumerate(sides)]
    if case == HALF:  # sides that nearly agree, as they do once a training has got anywhere
        sides = [{"pixel_values_a": a, "pixel_values_b": 0.98 * a} for a in (pair["pixel_values_a"] for pair in sides)]
    drawn = small.Recorded(as_bfloat16(sides) if case == HALF else sides)
    pair_set = AdversarialPairs(small.images(pairs, dtype=torch.float64)) if case == "adversarial" else drawn
    rows = small.grouped(images) if "objective" in settings else small.rows(images, dtype=torch.float64)
    rows = as_bfloat16(rows) if case == HALF else rows
    trainer = method.trainer(build(case), args, train_dataset=rows, pair_dataset=pair_set)
    drawn.drawn.clear()
    bytes_of_a_message = gradients.BUCKET_BYTES
    if way == "no reduction":
        trainer.accelerator.reduce = lambda tensor, *_, **__: tensor
    if way == "many messages":
        gradients.BUCKET_BYTES = 100
    trainer.train()
    gradients.BUCKET_BYTES = bytes_of_a_message
    rank = trainer.args.process_index
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    (folder / f"rank{rank}.json").write_text(json.dumps({"logs": logs, "drawn": drawn.drawn}))
    if rank == 0:
        state = {name: value.contiguous().clone() for name, value in trainer.model.state_dict().items()}
        save_file(state, folder / "state.safetensors")


def run_command(folder, name):
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    batch = TINY["per_device_train_batch_size"] // processes
    settings = {"optim": "sgd", "learning_rate": 0.05, "per_device_train_batch_size": batch}
    if int(os.environ.get("RANK", "0")) == 0:
        write(folder, **settings, **COMMANDS[name])
    if processes > 1:
        torch.distributed.barrier()  # another training has set the processes up
    assert main(["train", "--config", str(folder / "recipe.yaml")]) == 0


def run_all(folder, names):
    torch.set_num_threads(1)
    for name in names:
        (folder / name).mkdir(exist_ok=True)
        (run_command if name in COMMANDS else train)(folder / name, name)


def launch(folder, processes, names):
    run_together(folder, processes, run_all, folder, names)
    return folder


# ---- The comparison ----


def difference(one, other):
    ours, theirs = (load_file(folder / "state.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    return max((ours[name].double() - theirs[name].double()).abs().max().item() for name in ours)


def of_rank(folder, rank):
    return json.loads((folder / f"rank{rank}.json").read_text())


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("one"), 1, [*CASES, BATCH_STATISTICS, UNEVEN, HALF, *COMMANDS])


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    names = [*CASES, BATCH_STATISTICS, UNEVEN, HALF, IN_MANY_MESSAGES, *WITHOUT_REDUCTION, *COMMANDS]
    return launch(tmp_path_factory.mktemp("two"), 2, names)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("three"), 3, [*OF_THREE, UNEVEN])


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_equal_one(request, one, processes):
    several = request.getfixturevalue("two" if processes == 2 else "three")
    for case in CASES if processes == 2 else OF_THREE:
        assert difference(one / case, several / case) < 1e-9, case
        expected = of_rank(one / case, 0)["logs"]
        for rank in range(processes):  # every process has the same figures, and so takes the same branch of step 4
            for ours, theirs in zip(expected, of_rank(several / case, rank)["logs"], strict=True):
                for name in FIGURES:
                    figures = [entry.get(f"ipg/{name}", 0.0) for entry in (ours, theirs)]
                    rel = 1e-5 if "group_dro" in case else 1e-6  # its weights come from sums in float32
                    assert figures[1] == pytest.approx(figures[0], rel=rel, abs=1e-9), (case, name)
                assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5)
        if "method" not in CASES[case]:
            assert any(entry["ipg/loss_scale"] != 1 for entry in expected), case
    branches = {entry["ipg/violated"] for case in CASES for entry in of_rank(one / case, 0)["logs"]}
    assert branches == {0.0, 1.0}

    # nothing is dropped: over one pass of the pairs every row is drawn by some process
    steps = len(of_rank(one / UNEVEN, 0)["logs"])
    assert steps == len(of_rank(several / UNEVEN, 0)["logs"]) == 6
    rows = [row for rank in range(processes) for row in of_rank(several / UNEVEN, rank)["drawn"]]
    assert sorted({*rows}) == list(range(11))
    assert len(rows) >= steps * PAIRS


def test_batch_statistics_of_a_share_differ_from_those_of_the_batch(one, two):
    assert difference(one / BATCH_STATISTICS, two / BATCH_STATISTICS) > 1e-5


def test_gradients_in_many_messages_equal_one_process(one, two):
    assert difference(one / IN_MANY_MESSAGES.partition(";")[0], two / IN_MANY_MESSAGES) < 1e-9


def test_features_of_half_precision_are_averaged_in_full(one, two):
    """The mean features of two processes, rounded to bfloat16, would hide what the sides differ by."""
    distances = [of_rank(folder / HALF, 0)["logs"][0]["ipg/distance"] for folder in (one, two)]
    assert distances[1] == pytest.approx(distances[0], rel=1e-4)


@pytest.mark.parametrize("name", WITHOUT_REDUCTION)
def test_without_the_reduction_over_processes_they_differ(one, two, name):
    assert difference(one / name.partition(";")[0], two / name) > 1e-5


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_on_two_processes_does_what_it_does_on_one(one, two, name):
    expected, record = record_of(one / name), record_of(two / name)
    assert expected["baseline"].keys() == record["baseline"].keys()
    for fact, value in expected["baseline"].items():
        wanted = value if isinstance(value, int) else pytest.approx(value, rel=1e-3)
        assert record["baseline"][fact] == wanted, fact
    ours, theirs = (load_file(folder / name / "out/model.safetensors") for folder in (one, two))
    assert small.differences(ours, theirs) < 1e-3 * max(value.abs().max().item() for value in ours.values())
    for split in expected["metrics"]:
        del expected["metrics"][split]["loss"], record["metrics"][split]["loss"]  # Trainer's is of whole batches
        assert record["metrics"][split] == pytest.approx(expected["metrics"][split], abs=1e-3)
