# SPDX-License-Identifier: Apache-2.0
"""A training on all cores, on an idle machine and beside busy processes, by how long waiting threads spin.

    python recipes/speed/threads.py [--rounds 2] [--write]

The first command of README, with fewer steps and without its plain twin, in three arms: as `ipg train` sets
`GOMP_SPINCOUNT` (GNU OpenMP, which torch has on Linux), as the library's default is (300,000), and with one thread.
Each round starts all arms once, in turn, on the idle machine and then beside as many busy processes as there are cores.
Nothing else should run. `--write` keeps the record beside this file.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ipg_hf.record import commit, hardware, versions, write_json

RECIPE = Path(__file__).resolve().parent.parent / "digits" / "ipg_resnet.yaml"
STEPS = 200
ARMS = {"ipg": {}, "default": {"GOMP_SPINCOUNT": "300000"}, "one thread": {"OMP_NUM_THREADS": "1"}}


def seconds(settings):
    """Wall seconds of one training."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ipg_hf.cli", "train", "--config", str(RECIPE), "--max_steps", str(STEPS)]
        start = time.perf_counter()
        done = subprocess.run(
            [*command, "--output_dir", f"{folder}/run"], env=environment | settings, capture_output=True
        )
        if done.returncode:
            raise SystemExit(done.stderr.decode()[-2000:])
        return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="keep the record")
    options = parser.parse_args()
    record = {"steps": STEPS, "rounds": options.rounds, "cores": os.cpu_count(), "load_before": os.getloadavg()[0]}
    for busy in (0, os.cpu_count()):
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
        try:
            found = {arm: [] for arm in ARMS}
            for _ in range(options.rounds):
                for arm, settings in ARMS.items():
                    found[arm].append(round(seconds(settings), 2))
                    print(busy, "busy processes,", arm, found[arm][-1], flush=True)
        finally:
            for other in others:
                other.kill()
        medians = {arm: round(statistics.median(values), 2) for arm, values in found.items()}
        record[f"beside {busy} busy"] = {
            "seconds": found,
            "to_default": {arm: round(value / medians["default"], 3) for arm, value in medians.items()},
        }
    record |= {"versions": versions(), "commit": commit(), "hardware": hardware()}
    print(record)
    if options.write:
        write_json(Path(__file__).with_suffix(".json"), record)


if __name__ == "__main__":
    main()
