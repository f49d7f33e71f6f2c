# SPDX-License-Identifier: Apache-2.0
"""What ten million pairs cost before the first step, and at step 1,000,000: seconds and memory.

    python recipes/speed/scale.py [--write]

The pairs are 28-pixel PNG images in one memory-mapped Arrow file of 10,000 rows, which the large set has a thousand
times over. Each number of rows has a process of its own. `--write` keeps the record beside this file.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

RECORD = Path(__file__).with_suffix(".json")
BASE, ROWS, PAIRS, STEP = 10_000, (10_000, 10_000_000), 300, 1_000_000


def megabytes():
    """The process's peak memory in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write_pairs(folder):
    """Writes the file of pairs."""
    import datasets

    from ipg_hf.pairs.makers import encode_png

    sides = np.random.default_rng(0).integers(0, 256, (2, BASE, 28, 28, 3), dtype=np.uint8)
    columns = dict(zip(("image_a", "image_b"), map(encode_png, sides), strict=True))
    rows = {name: [{"bytes": file, "path": None} for file in files] for name, files in columns.items()}
    rows["label"] = (np.arange(BASE) % 2).tolist()
    features = {"image_a": datasets.Image(), "image_b": datasets.Image()}
    features["label"] = datasets.ClassLabel(names=["x", "y"])
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).save_to_disk(folder)


def measure(folder, rows):
    """Seconds to the first step of a training, to its second, and to the first batch at step 1,000,000; memory."""
    import datasets
    import torch
    from transformers import TrainerCallback, ViTImageProcessor

    from ipg_hf import IPGConfig, IPGTrainer
    from ipg_hf.data.colored_mnist import ColoredMnistMLPConfig, ColoredMnistMLPForImageClassification
    from ipg_hf.pairs import ImageRows, PairCollator, PairLoader

    torch.set_num_threads(1)
    base = datasets.Dataset.load_from_disk(folder)
    images = base.select_columns(["image_a", "label"]).rename_column("image_a", "image")
    pairs = datasets.concatenate_datasets([base] * (rows // BASE))
    processor, ends = ViTImageProcessor(size={"height": 28, "width": 28}), []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(time.perf_counter())

    before, start = megabytes(), time.perf_counter()
    with tempfile.TemporaryDirectory() as output:
        settings = {"max_steps": 3, "per_device_pair_batch_size": PAIRS, "save_strategy": "no", "report_to": "none"}
        trainer = IPGTrainer(
            ColoredMnistMLPForImageClassification(ColoredMnistMLPConfig()),
            IPGConfig(output, use_cpu=True, disable_tqdm=True, **settings),
            train_dataset=images,
            pair_dataset=pairs,
            processing_class=processor,
            callbacks=[Clock()],
        )
        trainer.train()
    after, resumed = megabytes(), time.perf_counter()
    inputs = ImageRows(pairs, processor, {"image_a": "pixel_values_a", "image_b": "pixel_values_b"}, keep=["label"])
    loader = PairLoader(inputs, PairCollator(["pixel_values"], labels=True), PAIRS, seed=0)
    loader.position = STEP * PAIRS
    next(loader)
    return {
        "first_step": round(ends[0] - start, 2),
        "second_step": round(ends[1] - ends[0], 2),
        "resumed": round(time.perf_counter() - resumed, 2),
        "mebibytes": round(after - before),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the record")
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(measure(options.job[0], int(options.job[1]))))
        return
    from ipg_hf.record import commit, hardware, versions, write_json

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        write_pairs(folder)
        for rows in ROWS:
            command = [sys.executable, __file__, "--job", folder, str(rows)]
            done = subprocess.run(command, check=True, env={**os.environ}, stdout=subprocess.PIPE, text=True)
            found[f"{rows:,}"] = json.loads(done.stdout.splitlines()[-1])
    record = {"pairs_a_step": PAIRS, "step": STEP, "rows": found}
    record |= {"versions": versions(), "commit": commit(), "hardware": hardware()}
    print(json.dumps(record["rows"], indent=1))
    if options.write:
        write_json(RECORD, record)


if __name__ == "__main__":
    main()
