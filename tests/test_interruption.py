# SPDX-License-Identifier: Apache-2.0
"""Runs that are asked to stop, or of whose processes one or all are killed, end as the run that is left alone.

Run as a script, this file is the run on two processes: `python test_interruption.py FOLDER [slow] [resume] [full]`.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import small
import torch
from safetensors.torch import load_file
from small_processes import Child, run_together
from test_resume import LOG, SAVE, STEPS, FullDisk, history
from transformers import TrainerCallback, TrainerControl

from ipg_hf import IPGTrainer, cli
from ipg_hf.callbacks import SaveAtStepEnd
from ipg_hf.checkpoints import newest_checkpoint
from ipg_hf.pairs.checks import ONLY_SET

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 120  # seconds for a process to do what it is waited for
TIMES = ("_runtime", "_per_second", "_preparation_time", "pair_wait")

# ---- The run ----


def manager():
    """What takes SIGTERM for the trainer."""
    return getattr(signal.getsignal(signal.SIGTERM), "__self__", None)


class Watched(TrainerCallback):
    """Records the pairs drawn; where asked to, takes its time between the two updates, and says how far it is."""

    def __init__(self, pairs, folder, slow):
        self.pairs, self.folder, self.slow = pairs, Path(folder), slow

    def on_train_begin(self, args, state, control, **kwargs):
        self.pairs.drawn.clear()  # the rows that were looked at before
        if self.slow:
            (self.folder / f"pid_{args.process_index}").write_text(str(os.getpid()))
        if args.enable_jit_checkpoint:
            manager().kill_wait = 0.2

    def on_substep_end(self, args, state, control, **kwargs):
        if self.slow:
            (self.folder / f"after_{state.global_step}").touch()
            time.sleep(0.08)


def run(folder, *callbacks, resume=None, slow=False, **settings):
    """Dropout, three micro-batches a step, four steps an epoch (two on two processes), evaluations, float64."""
    torch.set_num_threads(1)
    pairs = small.Recorded(small.pairs(10, dtype=torch.float64))
    settings = {"max_steps": STEPS, "logging_steps": LOG, "eval_strategy": "steps", "eval_steps": LOG} | settings
    settings = {"save_strategy": "steps", "save_steps": SAVE, "learning_rate": 1e-3} | settings
    settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, **small.SCALED}
    trainer = IPGTrainer(
        small.vit(dropout=0.2).double(),
        small.config(folder, **settings),
        train_dataset=small.rows(24, dtype=torch.float64),
        eval_dataset=small.rows(6, seed=3, dtype=torch.float64),
        pair_dataset=pairs,
        callbacks=[Watched(pairs, folder, slow), *callbacks],
    )
    trainer.train(resume_from_checkpoint=resume)
    return {
        "weights": small.weights(trainer.model),
        "optimizer": small.optimizer_state(trainer.model, trainer.optimizer),
        "position": trainer.progress.positions[ONLY_SET],
        "drawn": list(pairs.drawn),
        "history": [{k: v for k, v in line.items() if not k.endswith(TIMES)} for line in trainer.state.log_history],
    }


def slowly(folder, **settings):
    run(folder, slow=True, **settings)


def main(folder, *words):
    """With `full` the run is made twice: the second time the disk of the first process is full."""
    folder, rank = Path(folder), os.environ["RANK"]
    result = run(folder, resume="resume" in words or None, slow="slow" in words)
    torch.save(result, folder / f"result_{rank}.pt")
    if "full" in words:
        size = (folder / "checkpoint-4" / "optimizer.pt").stat().st_size - 1000
        run(folder / "full", *([FullDisk(size)] if rank == "0" else []))


def check_equal(whole, resumed, *stops):
    """The run ends as the whole one, and has drawn the pairs that were left at the last step it was resumed from."""
    for name in ("weights", "optimizer"):
        assert whole[name] and small.bit_equal(whole[name], resumed[name])
    assert resumed["position"] == whole["position"]
    assert resumed["drawn"] == whole["drawn"][4 * stops[-1] :] and len(whole["drawn"]) == 4 * STEPS
    for stop in stops:
        whole, resumed = ({**end, "history": history(end, stop)} for end in (whole, resumed))
    assert whole["history"] == resumed["history"]
    for name in ("ipg/distance", "grad_norm", "eval_loss"):
        assert sum(name in line for line in whole["history"]) >= 2


# ---- Stopping it ----


def start(folder, *words):
    for left in folder.glob("after_*"):
        left.unlink()
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu_2.yaml"]
    return python(*launcher, "--main_process_port", "0", __file__, folder, *words)


def python(*words):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, words)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def ended(process, status):
    try:
        errors = process.communicate(timeout=LIMIT)[1]
    finally:
        process.kill()
    assert process.returncode == status, errors
    return errors


def wait_for(process, path):
    """Waits until a run has written a file, and then for a random time."""
    deadline = time.monotonic() + LIMIT
    while not path.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail("ended or stuck before its time: " + stopped(process))
        time.sleep(0.01)
    time.sleep(random.Random(time.time_ns()).uniform(0, 0.3))


def stopped(process):
    """The error messages of a process that is killed."""
    if isinstance(process, Child):
        os.kill(process.pid, signal.SIGKILL)
        return process.ended(LIMIT)[1]
    process.kill()
    return process.communicate()[1]


def kill(folder, *ranks):
    for rank in ranks:
        os.kill(int((folder / f"pid_{rank}").read_text()), signal.SIGKILL)


def step_of(folder):
    return int(newest_checkpoint(folder).rpartition("-")[2])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def whole_of_two(tmp_path_factory):
    """The folder, the ends and the error messages of a run on two processes, and of another whose disk is full."""
    folder = tmp_path_factory.mktemp("whole_of_two")
    errors = ended(start(folder, "full"), 1)
    return folder, [torch.load(folder / f"result_{rank}.pt") for rank in (0, 1)], errors


# ---- SIGTERM ----


def test_terminated_it_saves_at_the_end_of_the_step_where_asked_to(tmp_path, whole):
    child = Child(tmp_path, partial(slowly, enable_jit_checkpoint=True, save_steps=100), tmp_path)
    wait_for(child, tmp_path / "after_2")
    os.kill(child.pid, signal.SIGTERM)
    assert child.ended(LIMIT)[0] == 0
    at = step_of(tmp_path)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{at}"] and 2 < at < STEPS
    check_equal(whole, run(tmp_path, resume=True), at)


def test_terminated_it_leaves_the_last_checkpoint(tmp_path, whole):
    child = Child(tmp_path, slowly, tmp_path)
    wait_for(child, tmp_path / f"after_{SAVE + 1}")
    os.kill(child.pid, signal.SIGTERM)
    assert child.ended(LIMIT)[0] == -signal.SIGTERM
    at = step_of(tmp_path)
    assert SAVE <= at < STEPS
    check_equal(whole, run(tmp_path, resume=True), at)


class Asked(TrainerCallback):
    """SIGTERM's wait ends at this event of this step."""

    def __init__(self, event, step):
        self.step = step
        setattr(self, event, self.ask)

    def ask(self, args, state, control, **kwargs):
        if state.global_step == self.step and args.enable_jit_checkpoint:
            manager().is_checkpoint_requested = True


BEST = {"save_strategy": "best", "metric_for_best_model": "loss"}
EPOCHS = {"logging_strategy": "epoch", "eval_strategy": "epoch", "save_strategy": "epoch"}


@pytest.mark.parametrize(
    ("event", "step", "at", "settings"),
    [
        ("on_step_begin", 4, 5, {}),  # the first of an epoch
        ("on_substep_end", 4, 5, {}),  # the corrective update has been made
        ("on_optimizer_step", 2, 3, {}),  # logs and an evaluation are due
        ("on_step_end", 5, 5, {}),
        ("on_optimizer_step", 3, 4, EPOCHS),  # the last of an epoch, whose logs are due
        ("on_optimizer_step", 5, 6, EPOCHS),  # the middle of an epoch, which has none
        ("on_optimizer_step", 5, 6, {**BEST, "greater_is_better": True}),  # one of the two evaluations is no new best
        ("on_optimizer_step", 5, 6, {**BEST, "greater_is_better": False}),
    ],
)
def test_wherever_in_a_step_it_is_asked_to_stop(tmp_path, whole, event, step, at, settings):
    before = signal.getsignal(signal.SIGTERM)
    settings = {"save_steps": 100, **settings}
    folder = tmp_path / "asked"
    run(folder, Asked(event, step), enable_jit_checkpoint=True, **settings)
    assert signal.getsignal(signal.SIGTERM) is before
    assert step_of(folder) == at
    expected = run(tmp_path / "whole", **settings) if len(settings) > 1 else whole
    check_equal(expected, run(folder, resume=True, **settings), at)


def test_processes_stop_at_one_step(tmp_path):
    """The signal may reach one before the end of a step and another after it."""
    callback = small.trainer(tmp_path, enable_jit_checkpoint=True).pop_callback(SaveAtStepEnd)
    assert manager() is callback.jit_manager
    callback.on_train_end(None, None, None)
    assert manager() is None
    args = SimpleNamespace(world_size=2, device="cpu")
    for others in (0, 1):
        callback.trainer = SimpleNamespace(accelerator=SimpleNamespace(reduce=lambda own, others=others: own + others))
        control = TrainerControl()
        callback.on_step_end(args, None, control)
        assert control.should_save == control.should_training_stop == bool(others)


# ---- Two processes ----


def test_two_processes_killed_together_and_then_one_of_them(tmp_path, whole_of_two):
    process = start(tmp_path, "slow")
    wait_for(process, tmp_path / f"after_{SAVE + 1}")
    process.kill()
    kill(tmp_path, 0, 1)
    ended(process, -signal.SIGKILL)
    first = step_of(tmp_path)
    assert SAVE <= first < STEPS

    process = start(tmp_path, "slow", "resume")
    wait_for(process, tmp_path / f"after_{first + 1}")
    kill(tmp_path, 1)
    ended(process, 1)
    with pytest.raises(ProcessLookupError):
        kill(tmp_path, 0)
    at = step_of(tmp_path)
    assert first <= at < STEPS

    run_together(tmp_path, 2, main, tmp_path, "resume")
    ends = [torch.load(tmp_path / f"result_{rank}.pt") for rank in (0, 1)]
    for expected, end in zip(whole_of_two[1], ends, strict=True):
        end["history"] = ends[0]["history"]  # the logs that are saved; the other's means may be rounded otherwise
        check_equal({**expected, "history": whole_of_two[1][0]["history"]}, end, first, at)


def test_a_full_disk_under_two_processes(whole_of_two):
    folder, _, errors = whole_of_two
    expected = folder / "checkpoint-4"
    assert "OSError: could not save checkpoint-6, which was removed; those before it are whole." in errors
    newest = Path(newest_checkpoint(folder / "full"))
    assert newest.name == "checkpoint-4"
    assert {path.name for path in newest.iterdir()} == {path.name for path in expected.iterdir()}
    assert small.bit_equal(load_file(expected / "model.safetensors"), load_file(newest / "model.safetensors"))


# ---- The command ----


def test_an_interrupted_command_goes_on(tmp_path, capsys):
    recipe = str(ROOT / "recipes/digits/ipg_pair_vit_tiny.yaml")
    settings = {"max_steps": 40, "num_pairs": 64, "per_device_pair_batch_size": 32, "warmup_steps": 5}
    settings |= {"logging_steps": 5, "eval_steps": 10, "save_steps": 10, "disable_tqdm": True}
    flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    command = ["train", "--config", recipe, *flags, "--output_dir"]
    folder, other = tmp_path / "interrupted", tmp_path / "other"
    process = python("-m", "ipg_hf.cli", *command, folder)
    wait_for(process, folder / "checkpoint-10" / "trainer_state.json")
    process.send_signal(signal.SIGINT)
    errors = ended(process, 130)
    assert "ipg train: interrupted." in errors and "--resume_from_checkpoint last" in errors
    assert step_of(folder) < 40 and not (folder / "run.json").exists()

    assert cli.main([*command, str(folder), "--resume_from_checkpoint", "last"]) == 0
    assert cli.main([*command, str(other)]) == 0
    ours, theirs = (json.loads((path / "run.json").read_text()) for path in (folder, other))
    assert ours["metrics"] == theirs["metrics"] and ours["steps"] == theirs["steps"] == 40
    assert small.bit_equal(*(load_file(path / "model.safetensors") for path in (folder, other)))
    capsys.readouterr()
    assert cli.main(["evaluate", str(folder), "--config", recipe]) == 0
    assert f"{ours['metrics']['test']['accuracy']:.3f}" in capsys.readouterr().out


if __name__ == "__main__":
    main(*sys.argv[1:])
    # torch's own threads may abort the interpreter's orderly end ("terminate called without an active exception")
    sys.stdout.flush()
    os._exit(0)
