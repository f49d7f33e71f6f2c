# SPDX-License-Identifier: Apache-2.0
"""Whole trainings, from the start of the process to its end: `ipg train` against a plain `Trainer` script.

    python recipes/speed/whole.py [CASE ...] [--rounds 3] [--write]

Each case is a recipe, with fewer steps where a step takes seconds. Each round starts both once, in turn: the recipe by
`ipg train`, and plain_trainer.py with batches of B + 2P images on the same data, with the same evaluations and
checkpoints. `ipg train` alone also transforms the pairs, and writes a record, a card and a plot. Both keep their memory
between steps, which only `ipg train` does by itself (kept_memory.py). Measured: seconds to the first step, seconds to
the exit, the processor's seconds; one thread a process. `import` compares `from ipg_hf import IPGTrainer` with
`from transformers import Trainer`, and `help` is `ipg --help`.

`IPG_DATA` names the folder of the data, and of dinov2_small_9l. `--write` keeps these cases in the record beside this
file.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from ipg_hf.record import commit, hardware, read_json, versions, write_json
from ipg_hf.run import KEEP_MEMORY

FOLDER = Path(__file__).resolve().parent
RECORD = Path(__file__).with_suffix(".json")
CASES = {  # recipe, and what is changed of it
    "mlp": ("colored_mnist/ipg_mlp", {}),
    "resnet": ("digits/ipg_resnet", {}),
    "lite0": ("scenes/ipg_lite0", {"max_steps": 40, "eval_steps": 20, "save_steps": 20}),
    "dinov2": ("scenes/ipg_dinov2", {"max_steps": 24, "eval_steps": 12, "save_steps": 12}),
}
COMMANDS = {
    "import": {"ipg": "from ipg_hf import IPGTrainer", "plain": "from transformers import Trainer"},
    "help": {"ipg": "from ipg_hf.cli import main; main(['--help'])", "plain": "pass"},
}
# what is timed runs below this clock, which notes when the first step begins
CLOCK = """
import runpy, sys, time
from transformers import TrainerCallback, trainer
note, target = sys.argv[1:3]
class Clock(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            open(note, "w").write(str(time.time()))
trainer.DEFAULT_CALLBACKS.append(Clock)
sys.argv = sys.argv[2:]
if target.endswith(".py"):
    runpy.run_path(target, run_name="__main__")
else:
    runpy.run_module(target, run_name="__main__", alter_sys=True)
"""


def timed(command):
    """Wall and processor's seconds of a process with one thread, and the time at which it was started."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {name: str(value) for name, _, value in KEEP_MEMORY}
    done = subprocess.run([sys.executable, "-c", *command], env=environment, capture_output=True, text=True)
    wall, after = time.time() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return {"wall": wall, "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}, start


def job_of(case):
    """The keys of a case's recipe."""
    recipe, changes = CASES[case]
    job = yaml.safe_load((FOLDER.parent / f"{recipe}.yaml").read_text()) | changes
    data = Path(os.environ["IPG_DATA"])
    if "data_dir" in job:
        job["data_dir"] = str(data / Path(job["data_dir"]).name)
    if job.get("model_name_or_path", "").startswith("data/"):
        job["model_name_or_path"] = str(data / Path(job["model_name_or_path"]).name)
    return job


def training(case, arm):
    """The seconds of one training."""
    with tempfile.TemporaryDirectory() as folder:
        job = job_of(case) | {"output_dir": str(Path(folder, "run"))}
        file, note = Path(folder, "job.json"), Path(folder, "first_step")
        file.write_text(json.dumps(job))
        ours = ["ipg_hf.cli", "train", "--config", str(file)]
        target = ours if arm == "ipg" else [str(FOLDER / "plain_trainer.py"), str(file)]
        seconds, start = timed([CLOCK, str(note), *target])
        return {**seconds, "first_step": float(note.read_text()) - start}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join([*COMMANDS, *CASES])}; by default all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="keep the figures")
    options = parser.parse_args()
    record = read_json(RECORD) if RECORD.exists() else {}
    for case in options.cases or [*COMMANDS, *CASES]:
        rounds = []
        for number in range(options.rounds):
            made = {}
            for arm in ("plain", "ipg") if number % 2 else ("ipg", "plain"):
                made[arm] = timed([COMMANDS[case][arm]])[0] if case in COMMANDS else training(case, arm)
                print(case, arm, {name: round(value, 2) for name, value in made[arm].items()}, flush=True)
            rounds.append(made)
        of = {arm: {name: [made[arm][name] for made in rounds] for name in rounds[0][arm]} for arm in ("ipg", "plain")}
        found = {
            "seconds": {arm: {name: round(statistics.median(v), 2) for name, v in of[arm].items()} for arm in of},
            "ratio": {
                name: [round(value, 3) for value in sorted(a / b for a, b in zip(of["ipg"][name], v, strict=True))]
                for name, v in of["plain"].items()
            },
        }
        changes = CASES[case][1] if case in CASES else {}
        facts = {"versions": versions(), "commit": commit(), "hardware": hardware(), "load": os.getloadavg()[1]}
        record[case] = {**found, "rounds": options.rounds, "changes": changes, **facts}
        print(case, found, flush=True)
        if options.write:
            write_json(RECORD, record)


if __name__ == "__main__":
    main()
