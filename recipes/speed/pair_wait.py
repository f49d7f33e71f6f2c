# SPDX-License-Identifier: Apache-2.0
"""The share of the steps' time that pairs are waited for, by network and by where the pairs come from.

    python recipes/speed/pair_wait.py [CASE ...] [--write]

`ipg/pair_wait` as the trainer logs it, over all steps but the first quarter: pairs that the step itself decodes and
transforms, and two worker processes, which load the images too; one thread of computation. The ViT of the coloured
digits and the MLP of ColoredMNIST (`IPG_DATA`: a folder with mnist.npz) have steps of some hundredths of a second, far
below any photograph's; the others have JPEG images of 224 pixels, 32 images and 16 pairs a step. All draw flips but
`mlp_tensors`, whose pairs are finished tensors in memory, as `preload` keeps them. Other programs on the machine raise
the share; the record keeps how busy it was. It was measured when pairs had workers of their own and could be kept as
decoded images (`cache`).

`--write` keeps the figures of these cases in the record beside this file.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import datasets
import torch
from pair_check import write_images
from step import MODELS, Images
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from ipg_hf import IPGConfig, IPGTrainer
from ipg_hf.data import load_colored_mnist, load_digits
from ipg_hf.record import commit, hardware, versions, write_json

RECORD = Path(__file__).with_suffix(".json")
VIT = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
CASES = {  # images and pairs a step, pixels, steps
    "mlp": (256, 300, 28, 200),
    "mlp_tensors": (256, 300, 28, 200),
    "digits_vit": (64, 64, 16, 200),
    **{name: (32, 16, 224, 12) for name in ("resnet18_timm", "vit_tiny_hf")},
}
ARMS = {
    "no worker": {"dataloader_num_workers": 0},
    "2 workers": {"dataloader_num_workers": 2},
}


def data_of(case, folder):
    """Training images and pairs."""
    if case == "mlp_tensors":
        return Images(28), Images(28, ("_a", "_b"))
    if case in ("mlp", "digits_vit"):
        data = load_digits() if case == "digits_vit" else load_colored_mnist()
        return data.train, data.pairs
    pairs = write_images(folder / "pairs.parquet", ("image_a", "image_b"), 256, "JPEG", 0)
    images = pairs.select_columns(["image_a", "label"]).rename_column("image_a", "image")
    return images.cast_column("label", datasets.ClassLabel(2)), pairs.remove_columns("label")


def measure(case, folder, images, pairs, settings):
    per_step, pairs_per_step, pixels, steps = CASES[case]
    raw = case != "mlp_tensors"
    torch.manual_seed(0)
    args = IPGConfig(
        folder,
        max_steps=steps,
        logging_steps=steps // 4,
        per_device_train_batch_size=per_step,
        per_device_pair_batch_size=pairs_per_step,
        invariance_distance="rationale",
        rationale_reduction="pair",
        freeze_norm=True,
        random_flip=raw,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        **settings,
    )
    own = case == "digits_vit"
    trainer = IPGTrainer(
        ViTForImageClassification(ViTConfig(**VIT, image_size=16, patch_size=8))
        if own
        else MODELS[case.removesuffix("_tensors")](),
        args,
        train_dataset=images,
        pair_dataset=pairs,
        processing_class=ViTImageProcessor(size={"height": pixels, "width": pixels}) if raw else None,
    )
    trainer.train()
    shares = [entry["ipg/pair_wait"] for entry in trainer.state.log_history if "ipg/pair_wait" in entry][1:]
    return round(sum(shares) / len(shares), 4)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; by default all")
    parser.add_argument("--write", action="store_true", help="keep the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = json.loads(RECORD.read_text()) if RECORD.exists() else dict.fromkeys(CASES, "not run")
    for case in options.cases or CASES:
        found = {}
        with tempfile.TemporaryDirectory() as folder:
            images, pairs = data_of(case, Path(folder))
            for name, settings in ARMS.items():
                found[name] = measure(case, str(Path(folder, "run")), images, pairs, settings)
                print(case, name, found[name], flush=True)
        facts = {"versions": versions(), "commit": commit(), "hardware": hardware()}
        facts |= {"load_average_of_5_minutes": round(os.getloadavg()[1], 1)}
        record[case] = {"share": found, "steps": CASES[case][-1], **facts}
        if options.write:
            write_json(RECORD, record)


if __name__ == "__main__":
    main()
