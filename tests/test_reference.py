# SPDX-License-Identifier: Apache-2.0
"""The trainer against the method written down once more, in plain PyTorch and float64, without the library's parts."""

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import small
import torch
import torch.nn.functional as F
from torch import nn
from transformers import TrainerCallback

from ipg_hf import IPGTrainer
from ipg_hf.baselines import AblationTrainer

STEPS, PAIRS, BATCH, LABELS = 3, 4, 6, 3
# model, paths of its head or heads
MODELS = {
    "vit": (small.vit, ["classifier"]),
    "resnet": (small.resnet, ["classifier.1"]),
    "timm": (small.timm_resnet, ["timm_model.fc"]),
    "convolution": (small.conv_head, ["inner.head.fc"]),
    "no bias": (small.no_bias, ["inner.2"]),
    "two heads": (small.deit_with_teacher, ["cls_classifier", "distillation_classifier"]),
    "heads of two widths": (small.crossvit, ["inner.head.0", "inner.head.1"]),
    "batch norm before the heads": (small.levit_with_teacher, ["classifier.linear", "classifier_distill.linear"]),
    "one token": (small.perceiver, ["inner.perceiver.decoder.decoder.final_layer"]),
    "no logits entry": (small.lcnet, ["head"]),
}


@dataclass(frozen=True)
class Case:
    model: str = "vit"
    freeze_norm: bool = False
    optimizer: str = "sgd"
    reduction: str = "mean"
    norm: str = (
        "default"  # or "root", the root of the divergence; of the rationales' distance "spectral" or "frobenius"
    )
    accumulation: int = 1
    max_grad_norm: float = 0.0
    threshold: float = 0.0
    limit: float = math.inf
    alpha: float = 0.7

    def __str__(self):
        return "-".join(str(value) for value in vars(self).values())


FACTORS = {
    "model, freeze_norm": [("vit", False), ("resnet", False), ("resnet", True), ("timm", True), ("timm", False)],
    "optimizer": ["sgd", "adamw"],
    "reduction": ["mean", "pair"],
    "norm": ["spectral", "frobenius", "root", "default"],
    "accumulation": [1, 3],
    "max_grad_norm": [0.0, 0.05],
    "threshold": [0.0, math.inf],
    "limit": [math.inf, 1.0],  # the paper's, and the default
}


def cases():
    """Few cases in which every two values of different factors meet."""

    def met(values):
        return set(itertools.combinations(enumerate(values), 2))

    everything = list(itertools.product(*FACTORS.values()))
    missing = set().union(*map(met, everything))
    chosen = []
    while missing:
        chosen.append(max(everything, key=lambda values: len(met(values) & missing)))
        missing -= met(chosen[-1])
    names = ("model", "freeze_norm", *list(FACTORS)[1:])
    return [Case(**dict(zip(names, (*values[0], *values[1:]), strict=True))) for values in chosen]


# ---- The reference ----


class Reference:
    """`wrong` names one mistake to make, for the controls."""

    RATE, MOMENTUM, DECAY, BETAS, EPS = 0.05, 0.9, 0.1, (0.9, 0.999), 1e-8

    def __init__(self, case, model, wrong=None):
        self.case, self.model, self.wrong = case, model, wrong
        self.parameters = dict(model.named_parameters())
        self.states = {"first": {}, "second": {}}
        if wrong != "separate states":
            self.states["second"] = self.states["first"]
        self.heads = [model.get_submodule(path) for path in MODELS[case.model][1]]

    @property
    def rate(self):
        return self.RATE if self.case.optimizer == "sgd" else self.RATE / 10

    def pair_gradient(self, a, b):
        self.model.train(self.wrong == "pair forward in train mode")
        seen = {}
        hooks = [
            head.register_forward_pre_hook(lambda head, inputs: seen.update({head: inputs[0].flatten(1)}))
            for head in self.heads
        ]
        logits = self.logits(torch.cat([a, b]))
        for hook in hooks:
            hook.remove()
        n = len(self.heads)
        rationales = torch.cat([head.weight.flatten(1) * seen[head].unsqueeze(1) / n for head in self.heads], -1)
        bias = 0 if self.heads[0].bias is None else sum(head.bias for head in self.heads) / n
        assert torch.allclose(rationales.sum(-1) + bias, logits)
        difference = of_pairs = rationales[: len(a)] - rationales[len(a) :]
        if self.case.reduction == "mean":
            difference = difference.mean(0, keepdim=True)
        p, q = logits.softmax(-1).chunk(2)
        divergence = ((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1)).mean() / 2
        if self.case.norm == "spectral":
            distance = torch.linalg.svdvals(difference)[:, 0].mean()
        elif self.case.norm == "frobenius":
            distance = torch.linalg.matrix_norm(difference, "fro").mean()
        elif self.case.norm == "root":
            distance = divergence.sqrt()
        else:
            mean = ((p + q) / 2).detach().unsqueeze(-1)
            variance = (mean * (of_pairs - (mean * of_pairs).sum(1, keepdim=True)) ** 2).sum(1)
            distance = (divergence + variance.sum(-1).mean() / 2 + 1e-3).sqrt() - 1e-3**0.5
        gradients = torch.autograd.grad(distance, list(self.parameters.values()), allow_unused=True)
        return distance.detach(), divergence.detach(), self.named(gradients)

    def logits(self, images):
        outputs = self.model(pixel_values=images)
        return outputs.logits if "logits" in outputs else outputs.last_hidden_state

    def named(self, gradients):
        return {name: g for name, g in zip(self.parameters, gradients, strict=True) if g is not None}

    def task_gradient(self, micro_batches):
        self.model.train()
        if self.case.freeze_norm:
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        items = sum(len(labels) for _, labels in micro_batches)
        loss = sum(
            F.cross_entropy(self.logits(images), labels, reduction="sum") / items for images, labels in micro_batches
        )
        return loss.detach(), self.named(torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True))

    def clipped(self, gradients):
        if not self.case.max_grad_norm:
            return gradients
        factor = min(1.0, self.case.max_grad_norm / (total_norm(gradients) + 1e-6))
        return {name: gradient * factor for name, gradient in gradients.items()}

    @torch.no_grad()
    def update(self, which, gradients, rate, decay):
        state = self.states[which]
        for name, gradient in gradients.items():
            parameter = self.parameters[name]
            if self.case.optimizer == "sgd":
                gradient = gradient + decay * parameter
                own = state.setdefault(name, {"momentum_buffer": torch.zeros_like(parameter)})
                own["momentum_buffer"] = self.MOMENTUM * own["momentum_buffer"] + gradient
                parameter -= rate * own["momentum_buffer"]
            else:
                zeros = torch.zeros_like(parameter)
                own = state.setdefault(name, {"step": torch.zeros(()), "exp_avg": zeros, "exp_avg_sq": zeros})
                own["step"] = own["step"] + 1
                own["exp_avg"] = self.BETAS[0] * own["exp_avg"] + (1 - self.BETAS[0]) * gradient
                own["exp_avg_sq"] = self.BETAS[1] * own["exp_avg_sq"] + (1 - self.BETAS[1]) * gradient**2
                mean = own["exp_avg"] / (1 - self.BETAS[0] ** own["step"].item())
                square = own["exp_avg_sq"] / (1 - self.BETAS[1] ** own["step"].item())
                parameter.mul_(1 - rate * decay).sub_(rate * mean / (square.sqrt() + self.EPS))

    def step(self, number, pair_batch, micro_batches):
        case, rate = self.case, self.rate * (1 - number / STEPS)
        distance, divergence, gradients = self.pair_gradient(*pair_batch)
        first_norm = total_norm(gradients)
        if self.wrong == "norms of clipped gradients":
            first_norm = total_norm(self.clipped(gradients))
        self.update("first", self.clipped(gradients), rate, self.DECAY if self.wrong == "decay twice" else 0.0)
        loss, gradients = self.task_gradient(micro_batches)
        second_norm = total_norm(gradients)
        if self.wrong == "norms of clipped gradients":
            second_norm = total_norm(self.clipped(gradients))
        scale = (case.alpha * first_norm / second_norm).clamp(max=math.inf if self.wrong == "no limit" else case.limit)
        if divergence <= case.threshold:
            scale = torch.ones(())
        if self.wrong == "no step 4":
            scale = torch.ones(())
        gradients = {name: gradient * scale for name, gradient in gradients.items()}
        self.update("second", self.clipped(gradients), rate, self.DECAY)
        return {
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": total_norm(gradients),
            "ipg/distance": distance,
            "ipg/divergence": divergence,
            "ipg/corrective_grad_norm": first_norm,
            "ipg/loss_grad_norm": second_norm,
            "ipg/loss_scale": scale,
            "ipg/violated": float(divergence > case.threshold),
        }


def total_norm(gradients):
    return torch.sqrt(sum(gradient.square().sum() for gradient in gradients.values()))


# ---- Both runs ----


class Snapshots(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        values = {name: value.detach().clone().double() for name, value in model.state_dict().items()}
        self.steps.append((values, small.optimizer_state(model, optimizer)))


def build(case):
    model = MODELS[case.model][0](LABELS).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, buffer in model.named_buffers():  # statistics unlike those of any batch
            if name.endswith("running_var") and case.model != "no logits entry":  # whose features would vanish
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
        for parameter in model.parameters():  # fresh heads are small or zero
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def data(case):
    train = small.rows(STEPS * case.accumulation * BATCH, LABELS, dtype=torch.float64)
    return train, small.pairs(10, dtype=torch.float64)


def trained(case, tmp_path):
    train, pairs = data(case)
    pairs, model, snapshots = small.Recorded(pairs), build(case), Snapshots()
    rate = Reference(case, model).rate
    if case.optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), rate, Reference.MOMENTUM, weight_decay=Reference.DECAY)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=Reference.DECAY)
    kind = AblationTrainer if case.norm == "frobenius" else IPGTrainer
    distance = {"root": {"invariance_distance": "divergence"}, "default": {}}
    distance = distance.get(case.norm, {"invariance_distance": "rationale"})
    args = small.config(
        tmp_path,
        kind.config_class,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        per_device_pair_batch_size=PAIRS,
        gradient_accumulation_steps=case.accumulation,
        train_sampling_strategy="sequential",
        alpha=case.alpha,
        invariance_threshold=case.threshold,
        max_loss_scale=case.limit,
        rationale_reduction=case.reduction,
        **distance | ({"rationale_norm": "frobenius"} if kind is AblationTrainer else {}),
        freeze_norm=case.freeze_norm,
        max_grad_norm=case.max_grad_norm,
        check_pairs=False,
    )
    trainer = kind(
        model, args, train_dataset=train, pair_dataset=pairs, optimizers=(optimizer, None), callbacks=[snapshots]
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return snapshots.steps, logs, pairs.drawn[-STEPS * PAIRS :]


def referred(case, drawn, wrong=None):
    train, pairs = data(case)
    model = build(case)
    reference = Reference(case, model, wrong)
    steps, logs = [], []
    for number in range(STEPS):
        chosen = [pairs[row] for row in drawn[number * PAIRS : (number + 1) * PAIRS]]
        sides = [torch.stack([row[f"pixel_values_{side}"] for row in chosen]) for side in "ab"]
        micro_batches = []
        for micro in range(case.accumulation):
            start = (number * case.accumulation + micro) * BATCH
            batch = train[start : start + BATCH]
            images = torch.stack([row["pixel_values"] for row in batch])
            micro_batches.append((images, torch.tensor([row["labels"] for row in batch])))
        logs.append(reference.step(number, sides, micro_batches))
        values = {name: value.detach().clone().double() for name, value in model.state_dict().items()}
        state = reference.states["second"]
        steps.append((values, {f"{n}/{e}": v.double() for n, own in state.items() for e, v in own.items()}))
    return steps, logs


# kinds of heads: z and W of the rationales are another thing in each; clipped, since gradients are large in some
HEADS = [
    Case(model=name, freeze_norm=True, norm=norm, max_grad_norm=0.003)
    for name in MODELS
    for norm in ("spectral", "default")
    if name not in ("vit", "resnet", "timm")
]


@pytest.mark.parametrize("case", cases() + HEADS, ids=str)
def test_every_step_equals_the_reference(case, tmp_path):
    steps, logs, drawn = trained(case, tmp_path)
    wanted_steps, wanted_logs = referred(case, drawn)
    assert len(steps) == len(logs) == STEPS
    for number in range(STEPS):
        for ours, wanted in zip(steps[number], wanted_steps[number], strict=True):
            assert ours
            assert small.differences(ours, wanted) < 1e-8, f"step {number + 1}"
        for name, value in wanted_logs[number].items():
            # transformers keeps its own loss in float32
            tolerance = 1e-6 if name == "loss" else 1e-8
            assert abs(logs[number][name] - float(value)) < tolerance * max(1.0, abs(float(value))), name
        assert logs[number]["ipg/skipped"] == 0
        if case.max_grad_norm:
            assert min(logs[number]["ipg/corrective_grad_norm"], logs[number]["grad_norm"]) > case.max_grad_norm


@pytest.mark.parametrize(
    ("wrong", "changes"),
    [
        ("no step 4", {}),
        ("decay twice", {}),
        ("decay twice", {"optimizer": "adamw"}),
        ("pair forward in train mode", {"model": "resnet", "freeze_norm": True}),
        ("separate states", {}),
        ("separate states", {"optimizer": "adamw"}),
        ("no limit", {"limit": 1.0, "alpha": 5.0}),
        ("norms of clipped gradients", {"optimizer": "adamw"}),
    ],
)
def test_a_wrong_reference_differs(wrong, changes, tmp_path):
    # a bound on the gradient between the two norms: clipping the one alone changes their ratio
    bound = 1.0 if wrong == "norms of clipped gradients" else 0.0
    case = replace(Case(max_grad_norm=bound), **changes)
    steps, _, drawn = trained(case, tmp_path)
    assert small.differences(steps[-1][0], referred(case, drawn)[0][-1][0]) < 1e-8
    assert small.differences(steps[-1][0], referred(case, drawn, wrong)[0][-1][0]) > 1e-4
