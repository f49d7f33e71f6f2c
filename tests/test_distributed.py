# SPDX-License-Identifier: Apache-2.0
"""Processes that share the batches take the steps of one that has them whole; run as a script, this file trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
# divisible by 2 and 3 processes and 3 micro-batches
IMAGES, PAIRS, STEPS = 18, 6, 5
CASES = {
    "vit": {},
    "vit, pair": {"rationale_reduction": "pair"},
    "vit, accumulated": {"gradient_accumulation_steps": 3},
    "vit, pair, accumulated, clipped": {
        "rationale_reduction": "pair",
        "gradient_accumulation_steps": 3,
        "max_grad_norm": 0.05,
    },
    "vit, no search for unused parameters": {"ddp_find_unused_parameters": False},
    "vit, in chunks": {"pair_chunk_size": 1},
    "vit, root, accumulated": {"invariance_distance": "divergence", "gradient_accumulation_steps": 3},
    "resnet, frozen norm": {"freeze_norm": True, "rationale_reduction": "pair"},
    "timm, frozen norm, accumulated": {"freeze_norm": True, "gradient_accumulation_steps": 3},
    "resnet, running norm, accumulated": {
        "running_norm": True,
        "rationale_reduction": "pair",
        "gradient_accumulation_steps": 3,
    },
    "no labels": {},
    "two heads": {},
    "adversarial": {},
    "vit, kl": {"pair_objective": "kl", "pair_penalty_weight": 50.0},
    "vit, features, in chunks, accumulated": {
        "pair_objective": "features",
        "pair_penalty_weight": 5.0,
        "pair_chunk_size": 1,
        "gradient_accumulation_steps": 3,
    },
    "vit, now and then": {"correction_interval": 2, "correction_schedule": "violated"},
    "vit, group_dro, accumulated": {
        "objective": "group_dro",
        "group_dro_step_size": 1.0,
        "gradient_accumulation_steps": 3,
    },
    "vit, some layers, accumulated": {
        "corrective_layers": ["vit.layers.1", "classifier"],
        "gradient_accumulation_steps": 3,
    },
    "vit, in the batch": {"pair_source": "batch", "max_grad_norm": 0.05},
    "resnet, in the batch, accumulated": {
        "pair_source": "batch",
        "rationale_reduction": "pair",
        "freeze_norm": True,
        "gradient_accumulation_steps": 3,
        "corrective_layers": ["classifier", "resnet.encoder.stages.1"],
    },
    "vit, root, in the batch, accumulated": {
        "pair_source": "batch",
        "invariance_distance": "divergence",
        "gradient_accumulation_steps": 3,
    },
    "vit, reweight": {"objective": "reweight"},
}
FIGURES = ("distance", "penalty", "divergence", "violated", "loss_scale", "corrective_grad_norm", "loss_grad_norm")
BATCH_STATISTICS = "resnet, batch statistics"  # of each process's share
HALF = "resnet, bfloat16"
UNEVEN = "uneven"


def build(case):
    import small

    builders = {"resnet": small.resnet, "timm": small.timm_resnet, "two heads": small.deit_with_teacher}
    model = builders.get(case.split(",")[0], small.vit)(2)
    model = model.bfloat16() if case == HALF else model.double()
    return small.Wrapped(model) if case == "no labels" else model


def as_bfloat16(rows):
    return [{k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in row.items()} for row in rows]


def train(folder, case):
    import small

    from ipg_hf import IPGTrainer
    from ipg_hf.pairs import AdversarialPairs

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    settings = dict(CASES.get(case, {}))
    micro = settings.get("gradient_accumulation_steps", 1)
    images, pairs = 200, 10
    if case == UNEVEN:  # 11 images in batches of 6, 11 pairs in batches of 6, over two epochs and a bit
        images, pairs, settings = 11, 11, {"num_train_epochs": 3, "max_steps": -1}
    if case == HALF:
        settings = {"freeze_norm": True, "max_steps": 1}
    args = small.config(
        folder,
        **{"max_steps": STEPS} | settings,
        optim="sgd",
        learning_rate=0.05,
        invariance_threshold=2e-5,
        per_device_train_batch_size=(6 if case == UNEVEN else IMAGES) // processes // micro,
        per_device_pair_batch_size=PAIRS // processes,
        check_pairs=False,
    )
    sides = small.pairs(pairs, dtype=torch.float64)
    if case == HALF:  # sides that nearly agree, as they do once a training has got anywhere
        sides = [{"pixel_values_a": a, "pixel_values_b": 0.98 * a} for a in (pair["pixel_values_a"] for pair in sides)]
    drawn = small.Recorded(as_bfloat16(sides) if case == HALF else sides)
    pair_set = AdversarialPairs(small.images(pairs, dtype=torch.float64)) if case == "adversarial" else drawn
    grouped = "objective" in settings
    rows = small.grouped(images) if grouped else small.rows(images, dtype=torch.float64)
    if "pair_source" in settings:
        others = small.rows(images, seed=7, dtype=torch.float64)
        rows = [row | {"pixel_values_b": other["pixel_values"]} for row, other in zip(rows, others, strict=True)]
        pair_set = None
    rows = as_bfloat16(rows) if case == HALF else rows
    trainer = IPGTrainer(build(case), args, train_dataset=rows, pair_dataset=pair_set)
    drawn.drawn.clear()
    if os.environ.get("WITHOUT_REDUCTION"):  # the control: each process corrects by its own pairs
        trainer.accelerator.reduce = lambda tensor, *_, **__: tensor
    if os.environ.get("SMALL_BUCKETS"):
        from ipg_hf import gradients

        gradients.BUCKET_BYTES = 100
    trainer.train()
    rank = trainer.args.process_index
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps({"logs": logs, "drawn": drawn.drawn}))
    if rank == 0:
        state = {name: value.contiguous().clone() for name, value in trainer.model.state_dict().items()}
        save_file(state, Path(folder) / "state.safetensors")


def launch(folder, processes, cases, **environment):
    command = [sys.executable]
    if processes > 1:
        config = str(ROOT / "recipes/accelerate/cpu_2.yaml")
        command += ["-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", "0"]
        command += ["--num_processes", str(processes)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    subprocess.run([*command, __file__, str(folder), *cases], check=True, env=environment, timeout=400)
    return folder


def difference(one, other):
    ours, theirs = (load_file(folder / "state.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    return max((ours[name].double() - theirs[name].double()).abs().max().item() for name in ours)


def of_rank(folder, rank):
    return json.loads((folder / f"rank{rank}.json").read_text())


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("one"), 1, [*CASES, BATCH_STATISTICS, UNEVEN])


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_equal_one(tmp_path, one, processes):
    several = launch(tmp_path, processes, [*CASES, BATCH_STATISTICS, UNEVEN])
    for case in CASES:
        assert difference(one / case, several / case) < 1e-9, case
        expected = of_rank(one / case, 0)["logs"]
        for rank in range(processes):  # every process has the same figures, and so takes the same branch of step 4
            for ours, theirs in zip(expected, of_rank(several / case, rank)["logs"], strict=True):
                for name in FIGURES:
                    figures = [entry.get(f"ipg/{name}", 0.0) for entry in (ours, theirs)]
                    assert figures[1] == pytest.approx(figures[0], rel=1e-6, abs=1e-9), (case, name)
                assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5)
    branches = {entry["ipg/violated"] for case in CASES for entry in of_rank(one / case, 0)["logs"]}
    assert branches == {0.0, 1.0}
    assert difference(one / BATCH_STATISTICS, several / BATCH_STATISTICS) > 1e-5

    # nothing is dropped: over one pass of the pairs every row is drawn by some process
    steps = len(of_rank(one / UNEVEN, 0)["logs"])
    assert steps == len(of_rank(several / UNEVEN, 0)["logs"]) == 6
    rows = [row for rank in range(processes) for row in of_rank(several / UNEVEN, rank)["drawn"]]
    assert sorted({*rows}) == list(range(11))
    assert len(rows) >= steps * PAIRS


def test_gradients_in_many_messages_equal_one_process(tmp_path, one):
    case = "vit, pair, accumulated, clipped"
    assert difference(one / case, launch(tmp_path, 2, [case], SMALL_BUCKETS="1") / case) < 1e-9


def test_features_of_half_precision_are_averaged_in_full(tmp_path):
    """The mean features of two processes, rounded to bfloat16, would hide what the sides differ by."""
    distances = []
    for processes in (1, 2):
        folder = launch(tmp_path / str(processes), processes, [HALF])
        distances.append(of_rank(folder / HALF, 0)["logs"][0]["ipg/distance"])
    assert distances[1] == pytest.approx(distances[0], rel=1e-4)


@pytest.mark.parametrize("case", ["vit", "vit, pair"])
def test_without_the_reduction_over_processes_they_differ(tmp_path, one, case):
    assert difference(one / case, launch(tmp_path, 2, [case], WITHOUT_REDUCTION="1") / case) > 1e-5


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        target = Path(sys.argv[1]) / name
        target.mkdir(parents=True, exist_ok=True)
        train(str(target), name)
    # torch's own threads may abort the interpreter's orderly end ("terminate called without an active exception")
    sys.stdout.flush()
    os._exit(0)
