# SPDX-License-Identifier: Apache-2.0
"""The share of the steps' time that pairs are waited for: the ViT of the digits with flips, by where pairs come from.

    python recipes/bench/pair_wait.py [--steps 200] [--write]

`ipg/pair_wait` as the trainer logs it, over all steps but the first quarter: pairs that the step itself decodes, two
worker processes, and `pair_cache="cpu"`. The network and batches are those of `recipes/digits/ipg_vit_tiny.yaml`, with
flips in place of crops. Other programs on the machine raise it; the record keeps how busy it was. `--write` keeps the
record beside this file.
"""

import argparse
import os
import tempfile
from pathlib import Path

import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from ipg_hf import IPGConfig, IPGTrainer, report
from ipg_hf.data import load_digits

VIT = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
ARMS = {
    "no worker": {"pair_num_workers": 0},
    "2 workers": {"pair_num_workers": 2},
    "cache": {"pair_cache": "cpu"},
}


def measure(folder, data, steps, settings):
    torch.manual_seed(0)
    args = IPGConfig(
        folder,
        max_steps=steps,
        logging_steps=steps // 4,
        per_device_train_batch_size=64,
        per_device_pair_batch_size=64,
        rationale_reduction="pair",
        random_flip=True,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        **settings,
    )
    trainer = IPGTrainer(
        ViTForImageClassification(ViTConfig(**VIT, image_size=16, patch_size=8, num_labels=2)),
        args,
        train_dataset=data.train,
        pair_dataset=data.pairs,
        processing_class=ViTImageProcessor(size={"height": 16, "width": 16}),
    )
    trainer.train()
    shares = [entry["ipg/pair_wait"] for entry in trainer.state.log_history if "ipg/pair_wait" in entry][1:]
    return round(sum(shares) / len(shares), 4)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of each training")
    parser.add_argument("--write", action="store_true", help="keep the record")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data, found = load_digits(), {}
    for name, settings in ARMS.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = measure(folder, data, options.steps, settings)
        print(name, found[name])
    if options.write:
        facts = {"versions": report.versions(), "commit": report.commit(), "hardware": report.hardware()}
        facts |= {"load_average_of_5_minutes": round(os.getloadavg()[1], 1)}
        report.write_json(Path(__file__).with_suffix(".json"), {"share": found, "steps": options.steps, **facts})


if __name__ == "__main__":
    main()
