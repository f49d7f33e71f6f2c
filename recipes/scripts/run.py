# SPDX-License-Identifier: Apache-2.0
"""Runs recipes over seeds and keeps the record of each run; what has a record already is not run again.

Launch: python recipes/run.py recipes/digits/ipg_vit_tiny.yaml --seeds 0 1 2 3 4
A record is `recipes/<dataset>/results/<recipe>-seed<n>.json`; the models go to `outputs/`.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    options = parser.parse_args()
    for seed in options.seeds:
        for recipe in options.recipes:
            recipe = recipe.resolve().relative_to(ROOT)
            record = ROOT / recipe.parent / "results" / f"{recipe.stem}-seed{seed}.json"
            if record.exists():
                continue
            output = Path("outputs") / f"{recipe.parent.name}-{recipe.stem}-seed{seed}"
            command = [sys.executable, "-m", "ipg_hf.cli", "train", "--config", str(recipe), "--seed", str(seed)]
            # what an earlier attempt left unfinished
            command += ["--output_dir", str(output), "--overwrite_output_dir", "true"]
            print(" ".join(command), flush=True)
            if status := subprocess.run(command, cwd=ROOT).returncode:
                return status
            record.parent.mkdir(exist_ok=True)
            shutil.copyfile(ROOT / output / "run.json", record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
