# SPDX-License-Identifier: Apache-2.0
"""Small models and data for the trainer's tests."""

import inspect

import datasets
import numpy as np
import timm
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    LevitConfig,
    LevitForImageClassificationWithTeacher,
    PerceiverConfig,
    PerceiverForImageClassificationConvProcessing,
    PPLCNetConfig,
    PPLCNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.modeling_outputs import ImageClassifierOutput

from ipg_hf import IPGConfig, IPGTrainer, load_image_classifier
from ipg_hf.inference import logits_of

SIZE = 16

# The method of the paper: the distance of rationales, and a step 4 that scales the task gradient up as well as down.
# A test takes it where it computes the paper's distance or its factor by hand, or where the distances take
# different ways through the code. The threshold lets step 4 act on freshly initialised models.
PAPER = {"invariance_distance": "rationale", "invariance_threshold": 1e-4, "max_loss_scale": float("inf")}
DIVERGENCE = {"invariance_distance": "divergence"}
DISTANCES = {"default": {}, "divergence": DIVERGENCE, "paper": PAPER}

# Step 4 acts at every step: the outputs of freshly initialised models differ by less than the default threshold, and
# an alpha of 1 would ask for a factor above the default limit of 1. `scales` shows that it did.
SCALED = {"invariance_threshold": 0.0, "alpha": 0.1}


def vit(num_labels=2, dropout=0.0, **kwargs):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=SIZE,
        patch_size=4,
        num_labels=num_labels,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        **kwargs,
    )
    return ViTForImageClassification(config)


def resnet(num_labels=2):
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=num_labels
    )
    return ResNetForImageClassification(config)


def timm_resnet(num_labels=2):
    torch.manual_seed(0)
    return load_image_classifier(timm.create_model("test_resnet", num_classes=num_labels))


class Wrapped(nn.Module):
    """A forward that takes images and returns logits, as users write it around any network."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, pixel_values):
        return ImageClassifierOutput(logits=logits_of(self.inner(pixel_values)))


def conv_head(num_labels=2):
    torch.manual_seed(0)
    settings = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16), "stem_chs": 8}
    return Wrapped(timm.create_model("resnetv2_18", num_classes=num_labels, **settings))


def no_bias(num_labels=2):
    torch.manual_seed(0)
    first = nn.Linear(3 * SIZE**2, 8)
    return Wrapped(nn.Sequential(nn.Flatten(), nn.Sequential(first, nn.GELU()), nn.Linear(8, num_labels, bias=False)))


def distinguishing(model, image_size=SIZE, kernels=10, noise=0.0):
    """The model with larger kernels, noise in its parameters, and batch norm that has seen random images.

    Fresh models of its kind give all images one output, on which nothing about pairs could be shown.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(kernels if parameter.dim() == 4 else 1).add_(noise * torch.randn(parameter.shape))
        for layer in layers:
            layer.momentum = 1.0
        model(torch.randn(16, 3, image_size, image_size))
    for layer in layers:
        layer.momentum = 0.1
        layer.running_var.clamp_(min=0.01)  # smaller ones would make gradients of thousands
    return model


def deit_with_teacher(num_labels=2):
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = DeiTConfig(**settings, image_size=SIZE, patch_size=4, num_labels=num_labels)
    return DeiTForImageClassificationWithTeacher(config)


def levit_with_teacher(num_labels=2, image_size=SIZE):
    torch.manual_seed(0)
    stages = {"hidden_sizes": [16, 24, 32], "num_attention_heads": [1, 1, 1], "depths": [1, 1, 1], "key_dim": [8, 8, 8]}
    config = LevitConfig(image_size=image_size, **stages, num_labels=num_labels)
    return distinguishing(LevitForImageClassificationWithTeacher(config), image_size)


def crossvit(num_labels=2):
    torch.manual_seed(0)
    branches = {"patch_size": (4, 8), "embed_dim": (8, 16), "depth": ((1, 1, 0), (1, 1, 0)), "num_heads": (2, 2)}
    settings = {"img_size": SIZE, "img_scale": (1.0, 1.0), "mlp_ratio": (1.0, 1.0, 1.0)}
    return Wrapped(timm.models.crossvit.CrossVit(**branches, **settings, num_classes=num_labels))


def perceiver(num_labels=2):
    torch.manual_seed(0)
    config = PerceiverConfig(
        num_latents=4,
        d_latents=16,
        num_blocks=1,
        num_self_attends_per_block=1,
        num_self_attention_heads=2,
        num_cross_attention_heads=1,
        attention_probs_dropout_prob=0.0,
        num_labels=num_labels,
    )
    return Wrapped(distinguishing(PerceiverForImageClassificationConvProcessing(config), kernels=1, noise=0.1))


def lcnet(num_labels=2):
    torch.manual_seed(0)
    # one block a stage: kernel, channels in and out, stride, squeeze-excite
    blocks = [[[3, 16 if stage == 0 else 32, 32, 1, stage == 4]] for stage in range(5)]
    config = PPLCNetConfig(
        num_labels=num_labels, scale=0.25, hidden_dropout_prob=0.0, block_configs=blocks, class_expand=16
    )
    return distinguishing(PPLCNetForImageClassification(config))


def rows(n, num_labels=2, seed=0, dtype=torch.float32, attribute=False):
    generator = torch.Generator().manual_seed(seed)
    extra = [{"attribute": i // 2 % 2} if attribute else {} for i in range(n)]
    return [
        {
            "pixel_values": torch.randn(3, SIZE, SIZE, generator=generator, dtype=torch.float64).to(dtype),
            "labels": i % num_labels,
            **extra[i],
        }
        for i in range(n)
    ]


def grouped(n=24, attribute="attribute", seed=0):
    """Labels alternate; the attribute is the label in three rows of four."""
    images_of = rows(n, dtype=torch.float64, seed=seed)
    extra = [(i % 2) ^ (i % 4 == 3 or i % 8 == 4) for i in range(n)]
    table = {"pixel_values": [row["pixel_values"].tolist() for row in images_of], "label": [i % 2 for i in range(n)]}
    features = datasets.Features(
        {
            "pixel_values": datasets.Array3D((3, SIZE, SIZE), "float64"),
            "label": datasets.ClassLabel(names=["no", "yes"]),
            attribute: datasets.Value("int64"),
        }
    )
    stored = datasets.Dataset.from_dict(table | {attribute: extra}, features=features)
    # the format "torch" would make float32 of the pixels
    return stored.with_transform(
        lambda batch: {name: torch.tensor(np.asarray(values)) for name, values in batch.items()}
    )


def pairs(n, seed=1, dtype=torch.float32, same=False):
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(2, 3, SIZE, SIZE, generator=generator, dtype=torch.float64).to(dtype) for _ in range(n)]
    return [{"pixel_values_a": a, "pixel_values_b": a.clone() if same else b} for a, b in images]


def images(n, seed=3, dtype=torch.float32):
    """Rows of pixels in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(n, 3, SIZE, SIZE, generator=generator, dtype=torch.float64).to(dtype)
    return [{"pixel_values": image, "labels": i % 2} for i, image in enumerate(pixels)]


class Recorded(Dataset):
    """Rows that remember which of them were drawn."""

    def __init__(self, items):
        self.items = items
        self.drawn = []

    def __len__(self):
        return len(self.items)

    def __getitem__(self, row):
        self.drawn.append(row)
        return self.items[row]


def config(output_dir, kind=IPGConfig, **kwargs):
    """A config for three steps on the CPU; all settings of the method have the defaults that are shipped."""
    settings = {
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "per_device_pair_batch_size": 4,
        "warmup_steps": 0,  # of three steps the first would move nothing
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
    }
    return kind(str(output_dir), **{**settings, **kwargs})


def differences(ours, theirs):
    """Largest absolute difference of two dicts of tensors with the same keys."""
    if ours.keys() != theirs.keys():
        raise ValueError(f"different entries: {sorted(ours.keys() ^ theirs.keys())}")
    return max(((ours[name] - theirs[name]).abs().max().item() for name in ours), default=0.0)


def optimizer_state(model, optimizer):
    """The optimizer's state by parameter name and entry."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    return {
        f"{name}/{entry}": torch.as_tensor(value).detach().clone().double()
        for name, parameter in model.named_parameters()
        for entry, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }


def trainer(tmp_path, model=None, train=None, pair_dataset=None, kind=IPGTrainer, **kwargs):
    is_ours = issubclass(kind, IPGTrainer)
    names = set(inspect.signature(IPGTrainer.__init__ if is_ours else kind.__init__).parameters)
    given = {name: kwargs.pop(name) for name in list(kwargs) if name in names - {"args"}}
    if is_ours:
        given["pair_dataset"] = pairs(10) if pair_dataset is None else pair_dataset
        if isinstance(pair_dataset, dict) and not pair_dataset:
            given["pair_dataset"] = None  # no pairs
    model = vit() if model is None else model
    train = rows(24) if train is None else train
    args = config(tmp_path, kind.config_class if is_ours else IPGConfig, **kwargs)
    return kind(model=model, args=args, train_dataset=train, **given)


def logged(run, key="loss"):
    return [entry for entry in run.state.log_history if key in entry]


def scales(run):
    """The factor of step 4 at each logged step."""
    return [entry["ipg/loss_scale"] for entry in logged(run)]


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def distance_by_hand(name, weight, z, logits):
    """A distance of `DISTANCES` from its definition, and the divergence of the outputs: one class an image.

    Args:
        name: a key of `DISTANCES`.
        weight: of the head, (C, D).
        z: the head's inputs, (2P, D), the a sides in the first half.
        logits: (2P, C).
    """
    p, q = logits.softmax(-1).chunk(2)
    divergence = ((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1)).mean() / 2
    a, b = (weight * z.unsqueeze(1)).chunk(2)  # rationales
    if name == "paper":
        return torch.linalg.svdvals(a.mean(0) - b.mean(0))[0], divergence
    if name == "divergence":
        return divergence.sqrt(), divergence
    mean = ((p + q) / 2).detach().unsqueeze(-1)
    variance = (mean * (a - b - (mean * (a - b)).sum(1, keepdim=True)) ** 2).sum(1)
    return (divergence + variance.sum(-1).mean() / 2 + 1e-3).sqrt() - 1e-3**0.5, divergence


def bit_equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


class Around(TrainerCallback):
    """Parameters and optimizer state as the corrective update leaves them, and before and after each step."""

    def __init__(self):
        self.before, self.middle, self.after = [], [], []

    @staticmethod
    def look(model, optimizer):
        return weights(model), optimizer_state(model, optimizer)

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.before.append(self.look(model, optimizer))

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.middle.append(self.look(model, optimizer))

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.after.append(self.look(model, optimizer))


# ---- Plain gradient descent, which the tests of losses and of updates compute by hand ----

RATE = 0.05


def descending(folder, train=None, pair_dataset=None, build=vit, kind=IPGTrainer, **settings):
    """A trainer of a float64 model by SGD at a constant rate without clipping, and what it looks like around steps."""
    around = Around()
    settings = {"optim": "sgd", "learning_rate": RATE, "lr_scheduler_type": "constant", "max_grad_norm": 0.0} | settings
    settings = {"train_sampling_strategy": "sequential", "callbacks": [around]} | settings
    train = rows(64, dtype=torch.float64) if train is None else train
    pair_dataset = pairs(8, dtype=torch.float64) if pair_dataset is None else pair_dataset
    return trainer(folder, build().double(), train, pair_dataset, kind, **settings), around


def descended(folder, train=None, pair_dataset=None, **settings):
    """The trainer of `descending` after its training; without pairs and of two steps where nothing else is said."""
    run, _ = descending(folder, train, {} if pair_dataset is None else pair_dataset, **{"max_steps": 2, **settings})
    run.train()
    return run


def descended_by_hand(model, train, loss_of, steps=2, batch=8, attribute="attribute"):
    """The weights after descent on `loss_of(losses, logits, labels, attributes, step)` of the set from `grouped`."""
    stored = train[:]
    inputs, labels, attributes = stored["pixel_values"].double(), stored["label"], stored[attribute]
    for step in range(steps):
        part = slice(batch * step, batch * (step + 1))
        logits = model(inputs[part]).logits
        losses = nn.functional.cross_entropy(logits, labels[part], reduction="none")
        model.zero_grad()
        loss_of(losses, logits, labels[part], attributes[part], step).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= RATE * parameter.grad
    return weights(model)


# a small ViT on the digits, by the command line; what a test adds is how it is trained
TINY_RECIPE = {
    "dataset": "digits",
    "num_pairs": 40,
    "model_type": "vit",
    "model_config": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 16,
        "patch_size": 8,
    },
    "image_processor": {"size": {"height": 16, "width": 16}},
    "preload": True,
    "learning_rate": "1e-3",
    "per_device_train_batch_size": 16,
    "per_device_pair_batch_size": 8,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}
