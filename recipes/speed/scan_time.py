# SPDX-License-Identifier: Apache-2.0
"""Seconds of a scan of 1,000 images of 224 pixels.

    python recipes/speed/scan_time.py MODEL [MODEL ...] [--write]

MODEL is a pretrained network, a folder or Hub id. Its new head is random; the bias is set so that the answers differ.
The images are those of pair_check.py, as JPEG files. `--write` keeps the record beside this file. The exit
status is 1 above ten minutes.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import datasets
import torch
from pair_check import SIZE, write_images
from transformers import ViTImageProcessor, set_seed

from ipg_hf import find_head, load_image_classifier
from ipg_hf.inference import logits_of
from ipg_hf.record import commit, hardware, read_json, versions, write_json
from ipg_hf.run import keep_memory
from ipg_hf.scan import scan

IMAGES, LIMIT = 1000, 600.0  # seconds
RECORD = Path(__file__).with_suffix(".json")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--write", action="store_true", help="keep the record")
    options = parser.parse_args()
    keep_memory()
    processor = ViTImageProcessor(size={"height": SIZE, "width": SIZE})
    rows = read_json(RECORD) if RECORD.exists() else {}
    for name in options.models:
        set_seed(0)
        model = load_image_classifier(name, num_labels=4).to(memory_format=torch.channels_last)
        with tempfile.TemporaryDirectory() as folder:
            images = write_images(Path(folder, "images.parquet"), ("image",), IMAGES, "JPEG", 0)
            with torch.no_grad():
                some = processor(images[:32]["image"], return_tensors="pt")["pixel_values"]
                logits = logits_of(model.eval()(pixel_values=some))
                next(iter(find_head(model).layers.values())).bias -= logits.mean(0)
            datasets.config.HF_DATASETS_CACHE = Path(folder, "kept")  # nothing of an earlier scan is read
            start, cpu_start = time.perf_counter(), time.process_time()
            found = scan(model, images, processor, num_images=IMAGES)
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        rows[Path(name).name] = {
            "images": found.num_images,
            "pixels": SIZE,
            "parts": len(found.findings),
            "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu_seconds, 1),
            "load": round(os.getloadavg()[1], 2),
            "versions": versions(),
            "commit": commit(),
            "hardware": hardware(),
        }
        print(f"{name}: {found.num_images} images in {seconds:.0f} s ({cpu_seconds:.0f} s of processor time)")
        if options.write:
            write_json(RECORD, rows)
    return int(max(rows[Path(name).name]["seconds"] for name in options.models) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
