# SPDX-License-Identifier: Apache-2.0
"""FSDP2 on two processes takes the step that one process takes; run as a script, this file is the trainings.

accelerate offers FSDP on accelerators alone, while PyTorch's runs on the CPU with gloo: the script says that its
devices are several of a kind, and gives a CPU mesh. All the rest is what `accelerate launch` sets up.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
CASES = {
    "mean": {},
    "pair, accumulated, clipped": {
        "rationale_reduction": "pair",
        "gradient_accumulation_steps": 3,
        "max_grad_norm": 0.05,
    },
    "chunks": {"pair_chunk_size": 1},
    "some layers": {"corrective_layers": ["vit.layers.1", "classifier"], "gradient_accumulation_steps": 3},
    "two heads": {},
    "adversarial": {},
    # by pairs: for the mean distance every process has the whole gradient of W
    "head in a group of its own": {"rationale_reduction": "pair"},
}
BLOCKS = {"two heads": "DeiTLayer", "head in a group of its own": "ViTLayer,Linear"}


def train(folder, case, processes, resume=None):
    import small
    from accelerate import ParallelismConfig, PartialState
    from accelerate.utils import DistributedType

    from ipg_hf import IPGTrainer
    from ipg_hf.pairs import AdversarialPairs

    sharded = {"parallelism_config": ParallelismConfig(dp_shard_size=processes)} if processes > 1 else {}
    settings = CASES[case]
    micro = settings.get("gradient_accumulation_steps", 1)
    args = small.config(
        folder,
        max_steps=5,
        optim="sgd",
        learning_rate=0.1,
        invariance_threshold=1e-5,
        per_device_train_batch_size=12 // processes // micro,
        per_device_pair_batch_size=4 // processes,
        save_strategy="steps",
        save_steps=2,
        **settings,
        **sharded,
    )
    if processes > 1 and args.device:  # the device's set-up makes the state anew
        PartialState().distributed_type = DistributedType.MULTI_GPU
    model = small.deit_with_teacher() if case == "two heads" else small.vit()
    # the sign of the noise's slope may be that of rounding
    pair_set = AdversarialPairs(small.images(10), noise=0) if case == "adversarial" else small.pairs(10)
    trainer = IPGTrainer(model, args, train_dataset=small.rows(200), pair_dataset=pair_set)
    if os.environ.get("PLAIN_FULL_TENSOR"):  # the control: each process's own gradient of W
        from torch.distributed.tensor import DTensor

        from ipg_hf import heads

        heads._whole = lambda value: value.full_tensor() if isinstance(value, DTensor) else value
    trainer.train(resume_from_checkpoint=resume)
    final = Path(folder) / ("resumed" if resume else "final")
    trainer.save_model(str(final))
    if trainer.is_world_process_zero():
        (final / "log.json").write_text(json.dumps(small.logged(trainer)))
        kinds = sorted({type(parameter).__name__ for parameter in trainer.model.parameters()})
        (final / "kinds.json").write_text(json.dumps(kinds))


def launch(folder, cases, processes, **environment):
    blocks = environment.pop("blocks", "ViTLayer")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable]
    if processes > 1:
        text = (ROOT / "recipes/accelerate/fsdp2.yaml").read_text().replace(" ViTLayer", f" {blocks}")
        config = folder.parent / f"{folder.name}.yaml"
        config.write_text(f"{text}\nuse_cpu: true\n")
        command += ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
    subprocess.run([*command, __file__, str(folder), str(processes), *cases], check=True, env=environment, timeout=300)


def difference(one, two):
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def logs(folder):
    return json.loads((folder / "log.json").read_text())


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    launch(folder, CASES, 1)
    return folder


@pytest.mark.parametrize("blocks", ["ViTLayer", *BLOCKS.values()])
def test_two_shards_equal_one_process(tmp_path, one, blocks):
    cases = [case for case in CASES if BLOCKS.get(case, "ViTLayer") == blocks]
    two = tmp_path / "two"
    launch(two, cases, 2, blocks=blocks)
    for case in cases:
        assert json.loads((two / case / "final/kinds.json").read_text()) == ["DTensor"]
        assert difference(one / case / "final", two / case / "final") < 1e-6, case
        for ours, theirs in zip(logs(one / case / "final"), logs(two / case / "final"), strict=True):
            for name in ("loss", "ipg/distance", "ipg/divergence", "ipg/corrective_grad_norm", "ipg/loss_scale"):
                assert theirs[name] == pytest.approx(ours[name], abs=1e-6, rel=1e-5), (case, name)
    if "mean" in cases:  # the same launch went on from its second step, too
        assert difference(two / "mean/final", two / "mean/resumed") == 0
        assert [entry["ipg/distance"] for entry in logs(two / "mean/resumed")] == [
            entry["ipg/distance"] for entry in logs(two / "mean/final")
        ]


def test_a_gradient_that_stays_on_its_process_differs(tmp_path, one):
    case = "head in a group of its own"
    two = tmp_path / "two"
    launch(two, [case], 2, blocks=BLOCKS[case], PLAIN_FULL_TENSOR="1")
    assert difference(one / case / "final", two / case / "final") > 1e-4


if __name__ == "__main__":
    torch.set_num_threads(1)
    where, number = Path(sys.argv[1]), int(sys.argv[2])
    for name in sys.argv[3:]:
        train(str(where / name), name, number)
    if number > 1 and "mean" in sys.argv[3:]:
        train(str(where / "mean"), "mean", number, resume=str(where / "mean/checkpoint-2"))
    # torch's own threads may abort the interpreter's orderly end ("terminate called without an active exception")
    sys.stdout.flush()
    os._exit(0)
