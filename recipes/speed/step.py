# SPDX-License-Identifier: Apache-2.0
"""What a guided step costs: `IPGTrainer` on B images and P pairs against `Trainer` on B images and on its bound.

The guided step is the default on pairs with labels; `ipg_outputs` is the distance of the outputs, without labels.

    python recipes/speed/step.py [CASE ...] [--device cuda] [--rounds 5] [--write]
    python recipes/speed/step.py mlp vit_tiny_hf --profile [--write]

A guided step does the arithmetic of B + 2P images, so that plain training on so many is the bound. In every round each
arm trains for a few steps, in turn and in reverse turn, so that a busy moment of the machine falls on all; the first
steps of each (buffers, compilation) are not timed. Weights and images are random and in memory; the time of a step
holds its data loading. `--profile` says where the time of one guided step goes. `--write` keeps the figures of these
cases in the record beside this file (the profile in profile.md). README.md says what they mean.
"""

import argparse
import gc
import json
import os
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import peft
import torch
from profiling import Clock, profile_page, profiled
from timm import create_model
from torch.utils.data import Dataset
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
)

from ipg_hf import IPGConfig, IPGTrainer, load_image_classifier
from ipg_hf.data.colored_mnist import ColoredMnistMLPConfig, ColoredMnistMLPForImageClassification
from ipg_hf.norms import norm_layers
from ipg_hf.record import commit, hardware, versions, write_json

RECORD = Path(__file__).with_suffix(".json")
POOL, ROWS = 64, 50_000  # different images; rows that a data set says it has, so that no epoch ends
TINY = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
BASIC = {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}
ADAPTERS = {"r": 8, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}


def dinov2(pixels):
    """A ViT-S/14 of 12 blocks."""
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=pixels, patch_size=14)
    return Dinov2ForImageClassification(config)


MODELS = {
    "mlp": lambda: ColoredMnistMLPForImageClassification(ColoredMnistMLPConfig()),
    "resnet18_hf": lambda: ResNetForImageClassification(ResNetConfig(**BASIC)),
    "resnet18_timm": lambda: load_image_classifier(create_model("resnet18", num_classes=2)),
    "vit_tiny_hf": lambda: ViTForImageClassification(ViTConfig(**TINY)),
    "vit_tiny_timm": lambda: load_image_classifier(create_model("vit_tiny_patch16_224", num_classes=2)),
    "dinov2_small": lambda: dinov2(112),
    "dinov2_small_224": lambda: dinov2(224),
    "dinov2_small_lora": lambda: peft.get_peft_model(dinov2(112), peft.LoraConfig(**ADAPTERS)),
    "resnet50": lambda: load_image_classifier(create_model("resnet50", num_classes=2)),
    "vit_b16": lambda: ViTForImageClassification(ViTConfig()),
}
SIZES = {  # by device: B, P, pixels, steps warmed up and timed a round, the target for the ratio to the bound
    "mlp": {"images": 256, "pairs": 300, "pixels": 28, "warm": 5, "steps": 40, "target": 1.25},
    "cpu": {"images": 32, "pairs": 16, "pixels": 224, "warm": 1, "steps": 1, "target": 1.05},
    "vit": {"images": 20, "pairs": 20, "pixels": 112, "warm": 1, "steps": 1, "target": 1.05},
    "mlp_quarter": {"images": 256, "pairs": 75, "pixels": 28, "warm": 5, "steps": 40, "target": 1.25},
    "cpu_quarter": {"images": 32, "pairs": 4, "pixels": 224, "warm": 1, "steps": 1, "target": 1.05},
    "vit_224": {"images": 8, "pairs": 8, "pixels": 224, "warm": 1, "steps": 1, "target": 1.05},
    "vit_b": {"images": 4, "pairs": 4, "pixels": 224, "warm": 1, "steps": 1, "target": 1.05},
    "cuda": {"images": 128, "pairs": 64, "pixels": 224, "warm": 10, "steps": 30, "target": 1.05},
}
HALF = {"use_cpu": False, "bf16": True}
PAPER = {"invariance_distance": "rationale", "rationale_reduction": "pair", "pair_loss_weight": 0.0}
OUTPUTS = {"invariance_distance": "divergence", "pair_loss_weight": 0.0}
CASES = {
    "mlp": {"model": "mlp", "size": "mlp", "settings": {}},
    "mlp_paper": {"model": "mlp", "size": "mlp", "settings": PAPER},
    "mlp_every_4th": {"model": "mlp", "size": "mlp", "settings": {"correction_interval": 4}},
    "mlp_quarter": {"model": "mlp", "size": "mlp_quarter", "settings": {}},
    **{name: {"model": name, "size": "cpu", "settings": {}} for name in list(MODELS)[1:5]},
    "resnet18_timm_quarter": {"model": "resnet18_timm", "size": "cpu_quarter", "settings": {}},
    "dinov2_small": {"model": "dinov2_small", "size": "vit", "settings": {}},
    "dinov2_small_bf16": {"model": "dinov2_small", "size": "vit", "settings": {"bf16": True}},
    "dinov2_small_chunks": {"model": "dinov2_small", "size": "vit", "settings": {"pair_chunk_size": 5}},
    "dinov2_small_lora": {"model": "dinov2_small_lora", "size": "vit", "settings": {}},
    "dinov2_small_224": {"model": "dinov2_small_224", "size": "vit_224", "settings": {}},
    "vit_b16_cpu": {"model": "vit_b16", "size": "vit_b", "settings": {}},
    **{name: {"model": name, "size": "cuda", "settings": HALF} for name in ("resnet50", "vit_b16")},
    **{
        f"{name}_compiled": {"model": name, "size": "cuda", "settings": {**HALF, "torch_compile": True}}
        for name in ("resnet50", "vit_b16")
    },
}
# Trainer on B, IPGTrainer on B and P, the same with the distance of the outputs, Trainer on the images of the bound
ARMS = ("erm", "ipg", "ipg_outputs", "bound")


class Images(Dataset):
    """Rows of a label and of an image, or of the two sides of a pair."""

    def __init__(self, pixels, sides=("",)):
        self.values = {f"pixel_values{side}": torch.randn(POOL, 3, pixels, pixels) for side in sides}
        self.label = "labels" if "" in sides else "label"

    def __len__(self):
        return ROWS

    def __getitem__(self, row):
        found = {name: values[row % POOL] for name, values in self.values.items()}
        return found | {self.label: row % 2}


def work(case):
    """Images of the bound."""
    size = SIZES[CASES[case]["size"]]
    return size["images"] + 2 * size["pairs"]


def data_of(case):
    """Images, and pairs."""
    pixels = SIZES[CASES[case]["size"]]["pixels"]
    return Images(pixels), Images(pixels, ("_a", "_b"))


def with_norm_held(model):
    """The model with its batch norm at the running statistics in training too, as `freeze_norm` does to the guided."""
    for layer in norm_layers(model):
        layer.eval()
        layer.train = lambda mode=True, layer=layer: layer
    return model


def trainer_of(case, arm, folder, images, pairs, callback, **changes):
    """A trainer of this arm that is about to train for the steps of one round."""
    size = SIZES[CASES[case]["size"]]
    torch.manual_seed(0)
    settings = {
        "max_steps": size["warm"] + size["steps"],
        "per_device_train_batch_size": work(case) if arm == "bound" else size["images"],
        "per_device_pair_batch_size": size["pairs"],
        "learning_rate": 1e-5,
        "logging_steps": 10_000,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "check_pairs": False,
        "freeze_norm": True,
        **CASES[case]["settings"],
        **(OUTPUTS if arm == "ipg_outputs" else {}),
        **changes,
    }
    given = {"args": IPGConfig(folder, **settings), "train_dataset": images, "callbacks": [callback]}
    model = MODELS[CASES[case]["model"]]()
    guided = arm in ("ipg", "ipg_outputs")
    return IPGTrainer(model, pair_dataset=pairs, **given) if guided else Trainer(with_norm_held(model), **given)


def seconds_a_step(case, arm, images, pairs, **changes):
    """Seconds that pass, and seconds of this process's processors, a step."""
    size = SIZES[CASES[case]["size"]]
    clock = Clock(size["warm"], size["steps"])
    with tempfile.TemporaryDirectory() as folder:
        trainer_of(case, arm, folder, images, pairs, clock, **changes).train()
    gc.collect()
    return clock.seconds


def quartiles(values):
    return [round(float(value), 4) for value in np.quantile(values, (0.25, 0.5, 0.75))]


def ratio(ours, theirs):
    """Of medians; and the quartiles of the rounds' own ratios."""
    rounds = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"ratio": round(median(ours) / median(theirs), 3), "quartiles": quartiles(rounds)}


def measured(case, rounds):
    size, seconds, loads = SIZES[CASES[case]["size"]], {arm: [] for arm in ARMS}, []
    images, pairs = data_of(case)
    for number in range(rounds):
        loads.append(os.getloadavg()[0])
        for arm in ARMS[:: -1 if number % 2 else 1]:
            seconds[arm].append(seconds_a_step(case, arm, images, pairs))
    times = {kind: {arm: [pair[i] for pair in seconds[arm]] for arm in ARMS} for i, kind in ((0, "wall"), (1, "cpu"))}
    share = work(case) / size["images"]  # the work of the bound at the speed of batches of B
    row = {**size, "rounds": rounds, "settings": CASES[case]["settings"], "load": quartiles(loads)}
    for kind in times if CASES[case]["size"] != "cuda" else ["wall"]:
        found = times[kind]
        row[kind] = {
            "seconds": {arm: quartiles(found[arm]) for arm in ARMS},
            "to_bound": ratio(found["ipg"], found["bound"]),
            "to_scaled_erm": ratio(found["ipg"], [share * value for value in found["erm"]]),
            "to_erm": ratio(found["ipg"], found["erm"]),
            "to_outputs": ratio(found["ipg"], found["ipg_outputs"]),
        }
    return row | {"versions": versions(), "commit": commit(), "hardware": hardware()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; by default the device's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="where the time of a guided step goes")
    parser.add_argument("--write", action="store_true", help="keep the figures")
    options = parser.parse_args()
    of_device = [name for name, case in CASES.items() if (case["size"] == "cuda") is (options.device == "cuda")]
    if options.device == "cpu":
        torch.set_num_threads(1)
    if options.profile:
        size_of = {case: SIZES[CASES[case]["size"]] for case in options.cases or ["mlp", "vit_tiny_hf"]}
        found = {case: profiled(size, trainer_of, case, *data_of(case)) for case, size in size_of.items()}
        page = profile_page(found)
        print(page)
        if options.write:
            RECORD.with_name("profile.md").write_text(page)
        return
    kept = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    record = {name: kept.pop(name, "not run") for name in CASES} | kept  # at the end, cases of earlier code
    for case in options.cases or of_device:
        record[case] = measured(case, options.rounds)
        for kind in ("wall", "cpu"):
            print(case, kind, json.dumps(record[case].get(kind)), flush=True)
        if options.write:
            write_json(RECORD, record)


if __name__ == "__main__":
    main()
