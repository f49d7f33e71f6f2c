# SPDX-License-Identifier: Apache-2.0
"""Measures what it saves on a CPU that the C library keeps its memory between steps (`ipg_hf.run.keep_memory`).

    python recipes/speed/kept_memory.py [--rounds 3] [--write]

Guided steps of step.py, one thread, each time in an interpreter of its own: with the memory kept, as `ipg train` does,
and given back, as glibc does by default, in turn. Seconds are those of the processor. `--write` keeps the record beside
this file.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from step import data_of, quartiles, ratio, seconds_a_step

from ipg_hf.record import commit, hardware, versions, write_json
from ipg_hf.run import keep_memory

CASES = ("mlp", "resnet18_timm", "vit_tiny_hf")
ARMS = ("kept", "given back")


def seconds(case, arm):
    """The processor's seconds of a step, measured in another interpreter."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, __file__, "--job", case, arm]
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def job(case, arm):
    torch.set_num_threads(1)
    if arm == "kept":
        keep_memory()
    print(json.dumps(seconds_a_step(case, "ipg", *data_of(case))[1]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="keep the record")
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        return job(*options.job)
    record = {"rounds": options.rounds, "threads": 1, "load": [], "cases": {}}
    for case in CASES:
        found = {arm: [] for arm in ARMS}
        for number in range(options.rounds):
            record["load"].append(os.getloadavg()[0])
            for arm in ARMS[:: -1 if number % 2 else 1]:
                found[arm].append(seconds(case, arm))
        record["cases"][case] = {arm: quartiles(values) for arm, values in found.items()} | ratio(*found.values())
        print(case, json.dumps(record["cases"][case]), flush=True)
    record |= {"load": quartiles(record["load"]), "versions": versions(), "commit": commit(), "hardware": hardware()}
    if options.write:
        write_json(Path(__file__).with_suffix(".json"), record)


if __name__ == "__main__":
    main()
