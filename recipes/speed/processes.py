# SPDX-License-Identifier: Apache-2.0
"""A guided step on two processes that share the batches (gloo, one machine), and the messages that it adds.

    python recipes/speed/processes.py [--rounds 3] [--write]

Steps: the batches of step.py on one process and on two, one thread each, plain training and guided, in turn. Messages:
the mean of all gradients over the two processes, in buckets as the library does it and a message a parameter, in turn
in one pair of processes. `--write` keeps the record beside this file. README.md says what the figures mean.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from step import CASES, MODELS, SIZES, data_of, quartiles, ratio, seconds_a_step

from ipg_hf.gradients import average_gradients
from ipg_hf.record import commit, hardware, versions, write_json

ROOT = Path(__file__).resolve().parents[2]
STEPS = ("mlp", "vit_tiny_hf")
MESSAGES = ("mlp", "resnet18_hf", "vit_tiny_hf")


def one_a_parameter(model, accelerator):
    for parameter in model.parameters():
        parameter.grad = accelerator.reduce(parameter.grad, "mean")


def step_job(case, arm):
    processes, size = int(os.environ.get("WORLD_SIZE", "1")), SIZES[CASES[case]["size"]]
    shares = {
        "per_device_train_batch_size": size["images"] // processes,
        "per_device_pair_batch_size": size["pairs"] // processes,
    }
    return seconds_a_step(case, arm, *data_of(case), **shares)


def message_job(case, rounds):
    accelerator, model = Accelerator(cpu=True), MODELS[case]()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    ways = {"buckets": average_gradients, "one_a_parameter": one_a_parameter}
    seconds = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, average in ways.items():
            accelerator.wait_for_everyone()
            start = time.perf_counter()
            average(model, accelerator)
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    gradients = [parameter.grad for parameter in model.parameters()]
    return {"tensors": len(gradients), "bytes": sum(g.nbytes for g in gradients), "seconds": seconds}


def run(processes, *job):
    """What a job returns, on the first of its processes."""
    command = [sys.executable]
    if processes > 1:
        config = str(ROOT / "recipes/accelerate/cpu_2.yaml")
        command += ["-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", "0"]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "result.json")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command += [__file__, "--job", str(target), *map(str, job)]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        return json.loads(target.read_text())


def work(target, job, *arguments):
    torch.set_num_threads(1)
    result = step_job(*arguments) if job == "step" else message_job(arguments[0], int(arguments[1]))
    if os.environ.get("RANK", "0") == "0":
        Path(target).write_text(json.dumps(result))
    # torch's own threads may abort the interpreter's orderly end
    os._exit(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="keep the record")
    parser.add_argument("--job", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        return work(*options.job)
    record = {"rounds": options.rounds, "threads_a_process": 1, "steps": {}, "messages": {}, "load": []}
    for case in STEPS:
        seconds = {f"{arm}_{n}": [] for arm in ("erm", "ipg") for n in (1, 2)}
        for _ in range(options.rounds):
            record["load"].append(os.getloadavg()[0])
            for name, found in seconds.items():
                arm, processes = name.split("_")
                found.append(run(int(processes), "step", case, arm))
        record["steps"][case] = {
            kind: {
                "seconds": {name: quartiles([pair[i] for pair in found]) for name, found in seconds.items()},
                **{
                    f"{arm}, two processes to one": ratio(
                        *([pair[i] for pair in seconds[f"{arm}_{processes}"]] for processes in (2, 1))
                    )
                    for arm in ("erm", "ipg")
                },
            }
            for i, kind in ((0, "wall"), (1, "cpu"))
        }
        print(case, json.dumps(record["steps"][case], indent=1), flush=True)
    for case in MESSAGES:
        found = run(2, "message", case, 40)
        seconds = found.pop("seconds")
        record["messages"][case] = {
            **found,
            "seconds": {name: quartiles(values) for name, values in seconds.items()},
            "buckets to one_a_parameter": ratio(seconds["buckets"], seconds["one_a_parameter"]),
        }
        print(case, json.dumps(record["messages"][case]), flush=True)
    record["load"] = quartiles(record["load"])
    record |= {"versions": versions(), "commit": commit(), "hardware": hardware()}
    if options.write:
        write_json(Path(__file__).with_suffix(".json"), record)


if __name__ == "__main__":
    main()
