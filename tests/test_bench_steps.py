# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of whole steps: they run, their records are whole, and their page holds what the records hold."""

import importlib
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "recipes/speed"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.fixture
def tiny(script, monkeypatch):
    step = script("step")
    size = {"images": 8, "pairs": 6, "pixels": 28, "warm": 1, "steps": 2, "target": 1.25}
    monkeypatch.setitem(step.SIZES, "mlp", size)
    return step


def test_a_case_is_measured(tiny):
    row = tiny.measured("mlp", 2)
    for kind in ("wall", "cpu"):
        seconds = {arm: row[kind]["seconds"][arm][1] for arm in tiny.ARMS}
        assert all(value > 0 for value in seconds.values())
        scaled = row[kind]["to_erm"]["ratio"] * 8 / 20
        assert row[kind]["to_scaled_erm"]["ratio"] == pytest.approx(scaled, rel=0.01, abs=2e-3)


def test_the_arms_train_on_what_they_are_named_for(tiny, tmp_path):
    data = tiny.data_of("mlp")
    sizes, kinds = {}, {}
    for arm in tiny.ARMS:
        trainer = tiny.trainer_of("mlp", arm, str(tmp_path), *data, tiny.Clock(1, 2))
        sizes[arm] = trainer.args.train_batch_size
        kinds[arm] = type(trainer).__name__
    assert sizes == {"erm": 8, "ipg": 8, "ipg_outputs": 8, "bound": 20}
    assert kinds == {"erm": "Trainer", "ipg": "IPGTrainer", "ipg_outputs": "IPGTrainer", "bound": "Trainer"}


def test_batch_norm_is_held_in_every_arm(tiny, tmp_path):
    import torch

    after = {}
    for arm in tiny.ARMS:
        sizes = {"per_device_train_batch_size": 2, "per_device_pair_batch_size": 2, "max_steps": 2}
        data = tiny.data_of("resnet18_hf")
        trainer = tiny.trainer_of("resnet18_hf", arm, str(tmp_path), *data, tiny.Clock(1, 1), **sizes)
        trainer.train()
        after[arm] = [layer.running_mean for layer in tiny.norm_layers(trainer.model)]
        assert trainer.model.training
    for means in after.values():
        assert means and all(torch.equal(mean, torch.zeros_like(mean)) for mean in means)


def test_ratios_by_hand(tiny):
    """Medians 4 and 2; the rounds' own ratios 1, 2 and 4."""
    found = tiny.ratio([2.0, 4.0, 8.0], [2.0, 2.0, 2.0])
    assert found == {"ratio": 2.0, "quartiles": [1.5, 2.0, 3.0]}


def test_the_parts_of_a_step_add_up_and_leave_the_library_as_it_was(tiny, script):
    profiling = script("profiling")
    before = [owner.__dict__[name] for owner, name, _ in profiling.PARTS]
    found = tiny.profiled(tiny.SIZES["mlp"], tiny.trainer_of, "mlp", *tiny.data_of("mlp"))
    assert [owner.__dict__[name] for owner, name, _ in profiling.PARTS] == before
    parts = found["parts"]
    assert {part for *_, part in profiling.PARTS} - {"backward"} < parts.keys()
    assert {"pairs: backward", "images: backward"} < parts.keys()
    assert sum(parts.values()) / 1e3 >= 0.9 * found["seconds"]
    assert "guidance.py: rationale_divergence" in found["functions"] and "aten::addmm" in found["operators"]
    assert "| pairs: forward |" in profiling.profile_page({"mlp": found})


def test_the_record_has_a_row_for_every_case(script):
    record = json.loads((FOLDER / "step.json").read_text())
    gone = {"resnet18_timm_in_batch", "vit_tiny_hf_in_batch"}  # cases that no code of today can run
    assert {*record} == {*script("step").CASES} | gone
    for row in record.values():
        assert row == "not run" or {"commit", "versions", "hardware", "load", "rounds"} <= row.keys()


def test_the_page_is_made_of_the_records(script):
    page = (FOLDER / "README.md").read_text()
    assert script("page").rendered(page) == page


def test_the_bytes_of_the_page_are_those_of_the_network():
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    from ipg_hf.gradients import BUCKET_BYTES

    with torch.device("meta"):
        parameters = list(ViTForImageClassification(ViTConfig(num_labels=2)).parameters())
    number, buckets, held = sum(p.numel() for p in parameters), 1, 0
    for size in (4 * p.numel() for p in parameters):
        full = held and held + size > BUCKET_BYTES
        buckets, held = (buckets + 1, size) if full else (buckets, held + size)
    page = (FOLDER / "README.md").read_text()
    assert f"{4 * number:,} ({number:,} parameters with two classes), in {buckets} buckets" in page
    sent = 2 * 63 / 64 * 4 * number
    assert f"{sent / 1e6:.0f} MB, {sent / 100e6:.1f} ms at 100 GB/s between devices and {sent / 25e6:.0f} ms" in page
    assert f"| {2 * 768 * 4:,} |" in page
