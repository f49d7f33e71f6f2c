# SPDX-License-Identifier: Apache-2.0
"""Seconds that the linter takes for many pairs of 224 pixels, without a model.

    python recipes/speed/pair_check.py [--pairs 10000] [--evaluation 1000] [--write]

The images are random textures with the spectrum of photographs (amplitude 1/f), kept as JPEG and as PNG files; side b
is side a in a warmer tone. `--write` keeps the record beside this file. The exit status is 1 above a minute.
"""

import argparse
import io
import sys
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from ipg_hf.pairs import check_pairs
from ipg_hf.record import commit, hardware, versions, write_json

SIZE, LIMIT = 224, 60.0  # pixels, seconds
WARMER = np.float32([1.1, 1.0, 0.8])
SAVE = {"JPEG": {"quality": 90}, "PNG": {}}


def texture(rng):
    """(224, 224, 3) float32, 0 to 255, with amplitudes that fall as one over the frequency."""
    frequency = np.hypot(np.fft.fftfreq(SIZE)[:, None], np.fft.rfftfreq(SIZE))
    frequency[0, 0] = np.inf
    waves = rng.normal(size=(2, 3, *frequency.shape)) / frequency
    image = np.fft.irfft2(waves[0] + 1j * waves[1], s=(SIZE, SIZE)).transpose(1, 2, 0)
    return np.clip(128 + 48 * image / image.std(), 0, 255).astype(np.float32)


def encoded(pixels, kind):
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(buffer, kind, **SAVE[kind])
    return {"bytes": buffer.getvalue(), "path": None}


def write_images(path, columns, count, kind, seed):
    """A Parquet file of `count` rows, read back, so that no image is in memory beforehand."""
    rng, made = np.random.default_rng(seed), {column: [] for column in columns}
    textures = [texture(rng) for _ in range(32)]
    for _ in range(count):
        # a texture goes on across its edges: shifted far, it is another image
        pixels = np.roll(textures[rng.integers(32)], rng.integers(SIZE, size=2), (0, 1))
        for column, tone in zip(columns, (1.0, WARMER), strict=False):
            made[column].append(encoded(pixels * tone, kind))
    if len(columns) == 2:
        made["label"] = rng.integers(2, size=count).tolist()
    images = datasets.Dataset.from_dict(made)
    for column in columns:
        images = images.cast_column(column, datasets.Image())
    images.to_parquet(path)
    return datasets.Dataset.from_parquet(str(path), cache_dir=str(path.parent / "cache"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--evaluation", type=int, default=1_000, help="images of an evaluation set to compare with")
    parser.add_argument("--write", action="store_true", help="keep the record")
    options = parser.parse_args()
    datasets.disable_progress_bars()
    rows = {}
    for kind in SAVE:
        with tempfile.TemporaryDirectory() as folder:
            pairs = write_images(Path(folder, "pairs.parquet"), ("image_a", "image_b"), options.pairs, kind, 0)
            test = write_images(Path(folder, "test.parquet"), ("image",), options.evaluation, kind, 1)
            start, cpu_start = time.perf_counter(), time.process_time()
            found = check_pairs(pairs, evaluation={"test": test})
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
            rows[kind] = {"seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1)}
            codes = [finding.code for finding in found]
            print(f"{kind}: {seconds:.1f} s ({cpu_seconds:.1f} s of processor time); found {', '.join(codes)}")
    if options.write:
        record = {
            "pairs": options.pairs,
            "evaluation_images": options.evaluation,
            "pixels": SIZE,
            "kinds": rows,
            "versions": versions(),
            "commit": commit(),
            "hardware": hardware(),
        }
        write_json(Path(__file__).with_suffix(".json"), record)
    return int(max(row["seconds"] for row in rows.values()) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
