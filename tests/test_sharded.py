# SPDX-License-Identifier: Apache-2.0
"""FSDP2 on two processes takes the step that one process takes; run as a script, this file is their trainings.

accelerate offers FSDP on accelerators alone, while PyTorch's runs on the CPU with gloo: the script says that its
devices are several of a kind, and gives a CPU mesh. All the rest is what `accelerate launch` sets up.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small
import torch
from accelerate import ParallelismConfig, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from small_processes import run_together
from torch.distributed.tensor import DTensor

from ipg_hf import IPGTrainer, heads
from ipg_hf.pairs import AdversarialPairs

ROOT = Path(__file__).resolve().parent.parent
PAPER = {"invariance_distance": "rationale", "max_loss_scale": float("inf")}
CASES = {
    "default": {},
    "default, chunks": {"pair_chunk_size": 1},
    "divergence": small.DIVERGENCE,
    "labelled pairs, chunks": {"pair_loss_weight": 0.5, "pair_chunk_size": 1},
    "default, some layers": {"corrective_layers": ["vit.layers.1", "classifier"], "gradient_accumulation_steps": 3},
    "adversarial": {},
    # the gradient of W comes from all processes only where they share it
    "paper": PAPER,
    "paper by pairs, accumulated, clipped": {
        **PAPER,
        "rationale_reduction": "pair",
        "gradient_accumulation_steps": 3,
        "max_grad_norm": 0.05,
    },
    "paper, chunks": {**PAPER, "pair_chunk_size": 1},
    "two heads": {"invariance_threshold": 0.0},
    "two heads, paper": PAPER,
    "head in a group of its own": {},
    # by pairs: for the mean distance every process has the whole gradient of W
    "head in a group of its own, paper": {**PAPER, "rationale_reduction": "pair"},
}
HEADS = ("head in a group of its own", "head in a group of its own, paper")
BLOCKS = {"two heads": "DeiTLayer", "two heads, paper": "DeiTLayer", **dict.fromkeys(HEADS, "ViTLayer,Linear")}
CONTROLS = [f"{case}; gradients that stay on their process" for case in HEADS]
RESUMED = "default"


def train(folder, name, processes, resume=None):
    case, _, control = name.partition("; ")
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = BLOCKS.get(case, "ViTLayer")  # as the launcher's file sets it
    sharded = {"parallelism_config": ParallelismConfig(dp_shard_size=processes)} if processes > 1 else {}
    settings = CASES[case]
    micro = settings.get("gradient_accumulation_steps", 1)
    args = small.config(
        folder,
        max_steps=4,
        optim="sgd",
        learning_rate=0.1,
        per_device_train_batch_size=12 // processes // micro,
        per_device_pair_batch_size=4 // processes,
        save_strategy="steps" if case == RESUMED else "no",
        save_steps=2,
        **{"alpha": 0.1, "invariance_threshold": 1e-5} | settings,  # step 4 acts
        **sharded,
    )
    if processes > 1 and args.device:  # the device's set-up makes the state anew
        PartialState().distributed_type = DistributedType.MULTI_GPU
    model = small.deit_with_teacher() if case.startswith("two heads") else small.vit()
    # the sign of the noise's slope may be that of rounding
    pair_set = AdversarialPairs(small.images(10), noise=0) if case == "adversarial" else small.pairs(10)
    if "pair_loss_weight" in settings:
        pair_set = [{**pair, "label": (0, -100, 1)[row % 3]} for row, pair in enumerate(pair_set)]
    trainer = IPGTrainer(model, args, train_dataset=small.rows(200), pair_dataset=pair_set)
    whole = heads._whole
    if control:  # each process's own gradient of W
        heads._whole = lambda value: value.full_tensor() if isinstance(value, DTensor) else value
    trainer.train(resume_from_checkpoint=resume)
    heads._whole = whole
    final = folder / ("resumed" if resume else "final")
    trainer.save_model(str(final))
    if trainer.is_world_process_zero():
        (final / "log.json").write_text(json.dumps(small.logged(trainer)))
        kinds = sorted({type(parameter).__name__ for parameter in trainer.model.parameters()})
        (final / "kinds.json").write_text(json.dumps(kinds))


def train_all(folder, names, processes):
    torch.set_num_threads(1)
    for name in names:
        train(folder / name, name, processes)


def launch(folder, names):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    config = folder.parent / f"{folder.name}.yaml"
    config.write_text(f"{(ROOT / 'recipes/accelerate/fsdp2.yaml').read_text()}\nuse_cpu: true\n")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--main_process_port", "0", __file__, str(folder), *names]
    subprocess.run(command, check=True, env=environment, timeout=300)
    return folder


def difference(one, two):
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def logs(folder):
    return json.loads((folder / "log.json").read_text())


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    run_together(folder, 1, train_all, folder, CASES, 1)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("two"), [*CASES, *CONTROLS])


@pytest.mark.parametrize("case", CASES)
def test_two_shards_equal_one_process(one, two, case):
    assert json.loads((two / case / "final/kinds.json").read_text()) == ["DTensor"]
    assert difference(one / case / "final", two / case / "final") < 1e-6
    expected = logs(one / case / "final")
    for ours, theirs in zip(expected, logs(two / case / "final"), strict=True):
        for name in ("loss", "ipg/distance", "ipg/divergence", "ipg/corrective_grad_norm", "ipg/loss_scale"):
            assert theirs[name] == pytest.approx(ours[name], abs=1e-6, rel=1e-5), name
    assert any(entry["ipg/loss_scale"] != 1 for entry in expected)


def test_shards_resume_to_the_bit(two):
    """The launch went on from its second step, too."""
    folder = two / RESUMED
    assert difference(folder / "final", folder / "resumed") == 0
    distances = [[entry["ipg/distance"] for entry in logs(folder / name)] for name in ("resumed", "final")]
    assert distances[0] == distances[1]


@pytest.mark.parametrize("control", CONTROLS)
def test_a_gradient_that_stays_on_its_process_differs(one, two, control):
    assert difference(one / control.partition(";")[0] / "final", two / control / "final") > 1e-4


if __name__ == "__main__":
    where = Path(sys.argv[1])
    train_all(where, sys.argv[2:], 2)
    train(where / RESUMED, RESUMED, 2, resume=str(where / RESUMED / "checkpoint-2"))
    # torch's own threads may abort the interpreter's orderly end ("terminate called without an active exception")
    sys.stdout.flush()
    os._exit(0)
