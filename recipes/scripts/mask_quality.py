# SPDX-License-Identifier: Apache-2.0
"""How well do masks that a pretrained network makes agree with true ones?

Launch: python recipes/scripts/mask_quality.py FOLDER SEGMENTER ... [--num_images 300]

FOLDER is a folder of Parquet files with the columns `image` and `mask`, such as the scenes (recipes/scenes); its test
images are drawn from. A SEGMENTER is a folder or Hub id, as `segmenter` in a recipe, or `oval`: the central oval, for
comparison. A record is a line of `recipes/records/mask_quality.jsonl`; `table.py` makes the table.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import seeds
from PIL import Image, ImageOps

from ipg_hf.pairs import add_masks
from ipg_hf.pairs.exchanging import CENTER, region
from ipg_hf.pairs.masking import load_segmenter
from ipg_hf.record import commit, hardware, read_records, versions
from ipg_hf.run import keep_memory

OVAL = "oval"


def run(data_dir: str, segmenter: str, num_images: int, seed: int = 0) -> dict:
    """Makes masks of some images, and compares them with the true ones."""
    start = time.monotonic()
    images = datasets.load_dataset(data_dir, split="test").shuffle(seed=seed)
    images = images.select(range(min(num_images, len(images))))
    finder: tuple[Any, ...] = (lambda image: region(CENTER, image.size),)
    made = add_masks(images, *(finder if segmenter == OVAL else load_segmenter(segmenter)), column="found")
    shares = [overlap(row["found"], row["mask"]) for row in made] + [0.0] * (len(images) - len(made))
    return {
        "segmenter": Path(segmenter).name,
        "iou": {"mean": float(np.mean(shares)), "median": float(np.median(shares))},
        "share_above_half": float(np.mean(np.array(shares) > 0.5)),
        "left_out": len(images) - len(made),
        "settings": {"data_dir": Path(data_dir).name, "num_images": len(images)},
        "seed": seed,
        "seconds": round(time.monotonic() - start, 1),
        "versions": versions(),
        "commit": commit(),
        "hardware": hardware(),
    }


def overlap(first: Image.Image, second: Image.Image) -> float:
    """Intersection over union of two masks; what is brighter than half is object."""
    one, other = (np.asarray(ImageOps.grayscale(mask)) > 127 for mask in (first, second))
    return float((one & other).sum() / max((one | other).sum(), 1))


def page() -> str:
    """The table of all records."""
    note = (
        "Masks of `add_masks` against true ones: intersection over union (IoU) by image. *Left out* are images without "
        f"a usable mask; they count as 0. `{OVAL}` is the middle of the frame."
    )
    lines = ["| segmenter | images | left out | mean IoU | median | above .5 |", "|---" * 6 + "|"]
    for record in read_records(seeds.RECORDS / "mask_quality.jsonl"):
        iou = record["iou"]
        lines.append(
            f"| {record['segmenter']} | {record['settings']['num_images']} | {record['left_out']} | {iou['mean']:.2f} "
            f"| {iou['median']:.2f} | {100 * record['share_above_half']:.0f} % |"
        )
    return "\n\n".join(["# Masks that are made", note, "\n".join(lines)]) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir")
    parser.add_argument("segmenters", nargs="+")
    parser.add_argument("--num_images", type=int, default=300)
    options = parser.parse_args()
    keep_memory()
    for segmenter in options.segmenters:
        name = f"{Path(options.data_dir).name}-{Path(segmenter).name}-{options.num_images}"
        seeds.record_once(
            "mask_quality", name, lambda segmenter=segmenter: run(options.data_dir, segmenter, options.num_images)
        )
