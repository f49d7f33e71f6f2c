# SPDX-License-Identifier: Apache-2.0
"""Two processes take the step that one takes on the batches of both; run as a script, this file is one training."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent


def train(output, per_device, reduction):
    """Three float64 steps with 8 images and 4 pairs in all, whatever the number of processes."""
    from transformers import ViTConfig, ViTForImageClassification

    from ipg_hf import IPGConfig, IPGTrainer

    torch.manual_seed(0)
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = ViTForImageClassification(ViTConfig(**settings, image_size=8, patch_size=4, num_labels=2)).double()
    images = torch.randn(24, 3, 8, 8, dtype=torch.float64)
    sides = torch.randn(2, 12, 3, 8, 8, dtype=torch.float64)
    args = IPGConfig(
        output, max_steps=3, learning_rate=0.1, optim="sgd", per_device_train_batch_size=8 // per_device,
        per_device_pair_batch_size=4 // per_device, rationale_reduction=reduction, invariance_threshold=0,
        logging_steps=1, report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no", max_grad_norm=0,
    )  # fmt: skip
    trainer = IPGTrainer(
        model,
        args,
        train_dataset=[{"pixel_values": image, "labels": number % 2} for number, image in enumerate(images)],
        pair_dataset=[{"pixel_values_a": a, "pixel_values_b": b} for a, b in zip(*sides, strict=True)],
    )
    if os.environ.get("WITHOUT_REDUCTION"):  # the control: each process corrects by its own pairs
        trainer.accelerator.reduce = lambda tensor, *_, **__: tensor
    trainer.train()
    if trainer.is_world_process_zero():
        trainer.save_model()
        trainer.state.save_to_json(str(Path(output) / "trainer_state.json"))


def launch(output, processes, reduction, **environment):
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "recipes/accelerate/cpu_2.yaml")] if processes == 2 else ["--cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command += ["--num_processes", str(processes)] if processes == 1 else ["--main_process_port", "0"]
    subprocess.run(
        [*command, __file__, str(output), str(processes), reduction], check=True, env=environment, timeout=300
    )
    return load_file(output / "model.safetensors")


@pytest.mark.parametrize("reduction", ["mean", "pair"])
def test_two_processes_equal_one(tmp_path, reduction):
    one = launch(tmp_path / "one", 1, reduction)
    two = launch(tmp_path / "two", 2, reduction)
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-9


def test_without_the_reduction_over_processes_they_differ(tmp_path):
    one = launch(tmp_path / "one", 1, "mean")
    two = launch(tmp_path / "two", 2, "mean", WITHOUT_REDUCTION="1")
    assert max((one[name] - two[name]).abs().max() for name in one) > 1e-5


if __name__ == "__main__":
    train(sys.argv[1], int(sys.argv[2]), sys.argv[3])
