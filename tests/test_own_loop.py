# SPDX-License-Identifier: Apache-2.0
"""The training loop of the training guide takes the steps of IPGTrainer, however many micro-batches it accumulates."""

import os
import re
from pathlib import Path

import pytest
import small
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file, save_file
from small_processes import run_together
from torch.utils.data import DataLoader
from transformers import get_constant_schedule
from transformers.data.data_collator import default_data_collator

from ipg_hf import step
from ipg_hf.guidance import root_divergence
from ipg_hf.pairs import PairLoader

GUIDE = Path(__file__).resolve().parent.parent / "recipes" / "guides" / "training.md"
SECTION = GUIDE.read_text().split("\n## In a loop of your own\n")[1].split("\n## ")[0]
CODE = re.search(r"^```python\n(.*?)^```", SECTION, re.M | re.S).group(1)
IMAGES, PAIRS, STEPS = 8, 6, 3  # a step
# as the guide writes them, but for a threshold that fresh models exceed
SHARED = {"threshold=0.01": "threshold=0.0", "alpha=1.0": "alpha=0.1"}


@pytest.fixture(autouse=True)
def fresh_state():
    """accelerate keeps its settings for the whole process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def loop_of_the_guide(code=CODE):
    """The functions of the guide."""
    for written, tested in SHARED.items():
        assert code.count(written) == 1
        code = code.replace(written, tested)
    names = {}
    exec(compile(code, "the loop of the guide", "exec"), names)
    return names


def looped(micro_batches=1, names=None, optim=torch.optim.AdamW, **settings):
    """The weights after the guide's loop on a float64 model."""
    names = names or loop_of_the_guide()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=micro_batches, **settings)
    model = small.vit().double()
    # as Trainer: no decay of biases and layer norms
    decayed = [p for name, p in model.named_parameters() if p.dim() > 1 and "layernorm" not in name]
    others = [p for p in model.parameters() if not any(p is other for other in decayed)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = optim(groups, lr=1e-3)
    share = IMAGES // micro_batches // accelerator.num_processes
    loader = DataLoader(small.rows(IMAGES * STEPS, dtype=torch.float64), share, collate_fn=default_data_collator)
    prepared = accelerator.prepare(model, optimizer, get_constant_schedule(optimizer), loader)
    pair_set = small.pairs(10, dtype=torch.float64)
    pair_loader = names["pair_loader_of"](pair_set, accelerator, PAIRS // accelerator.num_processes)
    model.train()
    names["train_epoch"](*prepared, pair_loader, accelerator)
    return small.weights(model)


def by_trainer(folder, micro_batches=1, **settings):
    run = small.trainer(
        folder,
        small.vit().double(),
        small.rows(IMAGES * STEPS, dtype=torch.float64),
        small.pairs(10, dtype=torch.float64),
        per_device_train_batch_size=IMAGES // micro_batches,
        per_device_pair_batch_size=PAIRS,
        gradient_accumulation_steps=micro_batches,
        max_steps=STEPS,
        learning_rate=1e-3,
        weight_decay=0.1,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        seed=0,
        data_seed=0,
        **small.SCALED,
        **settings,
    )
    run.train()
    assert all(scale < 1 for scale in small.scales(run))  # step 4 acts
    return small.weights(run.model)


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_the_loop_of_the_guide_is_that_of_the_trainer(tmp_path, micro_batches):
    expected = by_trainer(tmp_path / "trainer", micro_batches)
    assert small.differences(looped(micro_batches), expected) < 1e-9
    assert small.differences(looped(micro_batches), by_trainer(tmp_path / "whole")) < 1e-9


# what the guide names for the other distances: each name of `invariance_distance` -> the new d, the new forward
DISTANCE = 'root_divergence(own, accelerator.reduce(own.detach(), "mean"), floor=ROOT_FLOOR)'
FORWARD = "logits, z = head.run(network, send_to_device(next(pair_loader), accelerator.device))"
OTHERS = {
    "rationale": ("rationale_distance(head.weight, *z.chunk(2))", FORWARD),
    "divergence": ("root_divergence(of_outputs, c)", "logits = logits_of(network(**next(pair_loader)))"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_distances_are_those_of_the_trainer(tmp_path, name):
    """With the changes that the guide names."""
    distance, forward = OTHERS[name]
    assert f"`d = {distance}`" in SECTION and ("`logits = logits_of(network(...))`" in SECTION or forward is FORWARD)
    code = CODE.replace("import inference\n", "import inference, logits_of\n")
    code = code.replace("    rationale_divergence,\n", "    rationale_distance,\n    rationale_divergence,\n")
    if forward is not FORWARD:
        code = re.sub(r" *(own = |head = ).*\n", "", code)
    for written, changed in {DISTANCE: distance, FORWARD: forward}.items():
        assert code.count(written) == 1
        code = code.replace(written, changed)
    expected = by_trainer(tmp_path, invariance_distance=name)
    assert small.differences(looped(2, loop_of_the_guide(code)), expected) < 1e-9
    assert small.differences(looped(2), expected) > 1e-4


def test_by_hand_the_correction_is_divided_and_left_out(tmp_path):
    """What one writes without corrective_update: accelerate takes the pairs for a micro-batch."""

    def plain(distance, module, optimizer, accelerator):
        accelerator.backward(distance)
        norm = names["gradient_norm"](module)
        optimizer.step()
        module.zero_grad()
        return norm

    names = loop_of_the_guide()
    names["corrective_update"] = plain
    expected = by_trainer(tmp_path)
    assert small.differences(looped(2, names), expected) > 1e-4
    names["corrective_update"] = lambda distance, *others: torch.ones((), dtype=torch.float64)
    assert small.differences(looped(1, names), expected) > 1e-4


def in_processes(folder):
    """The guide's loop as one of several processes."""
    ended = looped(2)
    if os.environ.get("RANK", "0") == "0":
        save_file(ended, folder / "ended.safetensors")


def test_two_processes_take_the_steps_of_one(tmp_path):
    run_together(tmp_path, 2, in_processes, tmp_path)
    assert small.differences(load_file(tmp_path / "ended.safetensors"), by_trainer(tmp_path / "whole")) < 1e-9


# ---- corrective_update ----


def at_a_step(micro_batches=2, **settings):
    """A loop's accelerator, optimizer and model, and the distance of a pair batch."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=micro_batches, **settings)
    model = small.vit()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.5))
    pairs = loop_of_the_guide()["pair_loader_of"](small.pairs(8), accelerator, 8)
    assert isinstance(pairs, PairLoader)
    distance = root_divergence(step.invariance_divergence(*model(**next(pairs)).logits.chunk(2)))
    return accelerator, model, optimizer, distance


@pytest.mark.parametrize("limit", [0.0, 1e-3])
def test_the_update_is_one_of_gradient_descent(limit):
    accelerator, model, optimizer, distance = at_a_step(micro_batches=3)
    parameters = [p for p in model.parameters()]
    gradients = torch.autograd.grad(distance, parameters, retain_graph=True, allow_unused=True)
    norm = torch.nn.utils.get_total_norm([g for g in gradients if g is not None])
    factor = 1.0 if limit == 0 else limit / norm
    expected = [p.detach() - (0 if g is None else 0.1 * factor * g) for p, g in zip(parameters, gradients, strict=True)]
    accelerator.gradient_state._set_sync_gradients(False)  # before the last micro-batch
    found = step.corrective_update(distance, model, optimizer, accelerator, limit)
    torch.testing.assert_close(found, norm)
    torch.testing.assert_close([p.detach() for p in parameters], expected, rtol=1e-3, atol=1e-8)
    assert all(parameter.grad is None for parameter in parameters)
    assert (accelerator.sync_gradients, accelerator.gradient_accumulation_steps) == (False, 3)


def test_a_second_micro_batch_is_no_place_for_the_pairs():
    accelerator, model, optimizer, distance = at_a_step()
    model(**default_data_collator(small.rows(4))).loss.backward()
    with pytest.raises(ValueError, match="before the first micro-batch"):
        step.corrective_update(distance, model, optimizer, accelerator)


def test_a_distance_without_a_graph_is_refused():
    accelerator, model, optimizer, distance = at_a_step()
    with pytest.raises(ValueError, match="no trainable parameter"):
        step.corrective_update(distance.detach(), model, optimizer, accelerator)


def test_a_gradient_that_is_not_finite_updates_nothing():
    accelerator, model, optimizer, distance = at_a_step()
    before = small.weights(model)
    with pytest.raises(FloatingPointError, match="not finite"):
        step.corrective_update(distance * torch.inf, model, optimizer, accelerator)
    assert small.bit_equal(before, small.weights(model))


def test_scaled_gradients_are_refused():
    accelerator, model, optimizer, distance = at_a_step()
    accelerator.scaler = torch.amp.GradScaler("cpu")  # as mixed_precision="fp16" makes one
    with pytest.raises(ValueError, match="use 'bf16'"):
        step.corrective_update(distance, model, optimizer, accelerator)
