# SPDX-License-Identifier: Apache-2.0
"""Pairs in chunks: the gradient of the whole pair batch, with the graph of a few pairs held at a time."""

import os
import platform
import subprocess
import sys

import pytest
import small
import torch
from small import differences, logged, pairs, rows, trainer, weights

from ipg_hf.norms import norm_layers
from ipg_hf.step import GuidedStep

PAPER = {"invariance_distance": "rationale"}
DISTANCES = small.DISTANCES | {"paper": PAPER}
every_distance = pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES)


def run(folder, build, chunk, **kwargs):
    model = build().double()
    training = trainer(
        folder,
        model,
        train=rows(24, dtype=torch.float64),
        pair_dataset=pairs(10, dtype=torch.float64),
        per_device_pair_batch_size=7,
        pair_chunk_size=chunk,
        optim="sgd",  # Adam makes whole steps of gradients that are rounding alone
        learning_rate=0.1,
        **{"freeze_norm": True, **kwargs},
    )
    training.train()
    return weights(model), logged(training)


BUILDS = [small.vit, small.resnet, small.timm_resnet, small.deit_with_teacher, small.levit_with_teacher, small.lcnet]


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(
    "distance",
    [{}, small.DIVERGENCE, {**PAPER, "rationale_reduction": "mean"}, {**PAPER, "rationale_reduction": "pair"}],
    ids=["default", "divergence", "mean", "pair"],
)
def test_chunks_give_the_gradient_of_the_whole(tmp_path, build, distance):
    whole, log = run(tmp_path, build, None, **distance)
    for chunk in (1, 3, 6):
        ours, our_log = run(tmp_path, build, chunk, **distance)
        assert differences(whole, ours) < 1e-9
        for entry, other in zip(log, our_log, strict=True):
            entry, other = ({name: e[name] for name in e if name != "ipg/pair_wait"} for e in (entry, other))
            assert entry == pytest.approx(other, abs=1e-9, rel=1e-6)


def test_another_batch_size_is_not_the_same(tmp_path):
    """The control: pairs a step in place of pairs at a time."""
    whole, _ = run(tmp_path, small.vit, None)
    model = small.vit().double()
    settings = {"train": rows(24, dtype=torch.float64), "pair_dataset": pairs(10, dtype=torch.float64)}
    trainer(tmp_path, model, **settings, per_device_pair_batch_size=3, optim="sgd", learning_rate=0.1).train()
    assert differences(whole, weights(model)) > 1e-4


@every_distance
def test_a_chunk_holds_the_graph_of_its_pairs_alone(tmp_path, monkeypatch, distance):
    sizes, plain = [], GuidedStep.forward

    def watched(step, module, batch):
        logits, z = plain(step, module, batch)
        sizes.append((len(logits) // 2, logits.requires_grad))
        return logits, z

    monkeypatch.setattr(GuidedStep, "forward", watched)
    run(tmp_path, small.vit, 3, max_steps=1, **distance)
    without, attached = [(3, False), (3, False), (1, False)], [(3, True), (3, True), (1, True)]
    assert sizes == without + attached


@every_distance
@pytest.mark.parametrize("frozen", ["backbone", "head", "both"])
def test_frozen_parts_in_chunks(tmp_path, frozen, distance):
    """The bias of the head is never frozen: the outputs depend on it, the rationales do not."""

    def build():
        model = small.vit()
        for name, parameter in model.named_parameters():
            part = "head" if name.startswith("classifier") else "backbone"
            parameter.requires_grad_(frozen not in (part, "both") or name == "classifier.bias")
        return model

    if frozen == "both" and distance == PAPER:
        with pytest.raises(ValueError, match="depends on no trainable parameter"):
            run(tmp_path, build, 2, **distance)
        return
    assert differences(run(tmp_path, build, None, **distance)[0], run(tmp_path, build, 2, **distance)[0]) < 1e-9


@pytest.mark.parametrize("build", [small.vit, small.levit_with_teacher])
def test_chunks_with_several_sets_accumulation_and_checkpointing(tmp_path, build):
    sets = {"color": pairs(10, dtype=torch.float64), "frame": pairs(8, seed=5, dtype=torch.float64)}
    results = []
    for chunk in (None, 2):
        model = build().double()
        trainer(
            tmp_path,
            model,
            train=rows(24, dtype=torch.float64),
            pair_dataset=sets,
            pair_chunk_size=chunk,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=4,
            activation_checkpointing=build is small.vit,
            freeze_norm=True,
            optim="sgd",
            learning_rate=0.1,
        ).train()
        results.append(weights(model))
    assert differences(*results) < 1e-9


@pytest.mark.parametrize("chunk", [None, 3])
def test_timms_checkpointing_forwards_once_more_in_the_mode_of_the_pairs(tmp_path, chunk):
    def build():
        model = small.timm_resnet()
        model.timm_model.set_grad_checkpointing()
        # batch norm moves its averages once more in a checkpointed task forward, pairs or none
        for layer in norm_layers(model):
            layer.momentum, layer.num_batches_tracked = 0.0, None
        return model

    def plain():
        model = build()
        model.timm_model.set_grad_checkpointing(False)
        return model

    settings = {"freeze_norm": False}
    expected, _ = run(tmp_path, plain, None, **settings)
    assert differences(expected, run(tmp_path, build, chunk, **settings)[0]) < 1e-9


def test_the_setting_is_checked(tmp_path):
    with pytest.raises(ValueError, match="pair_chunk_size=0 is not valid"):
        small.config(tmp_path, pair_chunk_size=0)


# ---- The C library's memory


FAULTS = """
import resource, sys
import torch
from ipg_hf.run import keep_memory
if sys.argv[1] == "keep":
    keep_memory()
torch.set_num_threads(1)
for _ in range(3):
    torch.zeros(2**24)  # 64 MiB, given back at once
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.zeros(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_memory_of_a_step_is_kept_for_the_next_unless_the_user_set_it_otherwise():
    """Page faults of ten tensors of 64 MiB, one after the other."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    set_by_user = plain | {"MALLOC_MMAP_MAX_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_TOP_PAD_": "0"}

    def faults(environment, argument):
        command = [sys.executable, "-c", FAULTS, argument]
        return int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)

    assert faults(plain, "keep") < 100 < 1000 < faults(plain, "give back")
    assert faults(set_by_user, "keep") > 1000
