# SPDX-License-Identifier: Apache-2.0
"""Runs recipes over seeds and appends the record of each run; what has a record is not run again.

Launch: python recipes/scripts/run.py recipes/digits/ipg_pair_vit_tiny.yaml --seeds 0 1 2 3 4

A record is the run `<recipe>-seed<n>` in `recipes/records/<dataset>.jsonl`; the models go to `outputs/`.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from ipg_hf.record import append_record, read_json, read_records

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "recipes/records"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    options = parser.parse_args()
    for seed in options.seeds:
        for recipe in options.recipes:
            recipe = recipe.resolve().relative_to(ROOT)
            name, records = f"{recipe.stem}-seed{seed}", RECORDS / f"{recipe.parent.name}.jsonl"
            if any(record["run"] == name for record in read_records(records)):
                continue
            output = Path("outputs") / f"{recipe.parent.name}-{name}"
            command = [sys.executable, "-m", "ipg_hf.cli", "train", "--config", str(recipe), "--seed", str(seed)]
            # what an earlier attempt left unfinished
            command += ["--output_dir", str(output), "--overwrite_output_dir", "true"]
            print(" ".join(command), flush=True)
            if status := subprocess.run(command, cwd=ROOT).returncode:
                return status
            append_record(records, {"run": name, **read_json(ROOT / output / "run.json")})
    return 0


if __name__ == "__main__":
    sys.exit(main())
