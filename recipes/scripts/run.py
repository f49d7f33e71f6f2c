# SPDX-License-Identifier: Apache-2.0
"""Runs recipes over seeds and appends the record of each run; what has a record is not run again.

Launch: python recipes/scripts/run.py recipes/digits/ipg_pair_vit_tiny.yaml --seeds 0 1 2 3 4

A record is the run `<recipe>-seed<n>` in `recipes/records/<dataset>.jsonl`; the models go to `outputs/`.
"""

from pathlib import Path

import seeds

from ipg_hf.run import train


def run(path: Path, seed: int) -> None:
    """Trains one seed of a recipe."""
    dataset, name = seeds.dataset_of(path), f"{path.stem}-seed{seed}"
    output = seeds.ROOT / "outputs" / f"{dataset}-{name}"
    seeds.record_once(dataset, name, lambda: train(*seeds.settings(path, seed, output)))


if __name__ == "__main__":
    seeds.for_each(seeds.parser(__doc__).parse_args(), run)
