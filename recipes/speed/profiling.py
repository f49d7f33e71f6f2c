# SPDX-License-Identifier: Apache-2.0
"""For step.py: a clock of training steps, and where the time of one goes."""

import cProfile
import functools
import pstats
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch.profiler import ProfilerActivity
from transformers import Trainer, TrainerCallback

from ipg_hf import step
from ipg_hf.pairs.loader import PairLoader
from ipg_hf.record import commit, hardware, versions
from ipg_hf.step import GuidedStep

# parts of a guided step: what is called, and its name; the time of a part is without the parts that it calls
PARTS = [
    (Trainer, "get_batch_samples", "images: loading"),
    (Trainer, "compute_loss", "images: forward"),
    (Trainer, "_clip_grad_norm", "clipping of the second update"),
    (PairLoader, "__next__", "pairs: loading"),
    (GuidedStep, "forward", "pairs: forward"),
    (GuidedStep, "distance_and_divergence", "pairs: distance and divergence"),
    (step, "inference", "pairs: modes of the modules"),
    (GuidedStep, "measure", "pairs: the rest"),
    (GuidedStep, "corrective_update", "first update, without the optimizer"),
    (GuidedStep, "after_task", "step 4: norm and factor"),
    (AcceleratedOptimizer, "step", "optimizer, both updates"),
    (Accelerator, "backward", "backward"),
]


class Clock(TrainerCallback):
    """Seconds that pass, and seconds of this process's processors, a step, over the steps after the first `warm`."""

    def __init__(self, warm, steps, at_start=None):
        self.warm, self.steps, self.at_start = warm, steps, at_start

    def on_step_end(self, args, state, control, **kwargs):
        """As `TrainerCallback.on_step_end`."""
        if state.global_step == self.warm:
            if self.at_start:
                self.at_start()
            self.start = self.now()
        if state.global_step == self.warm + self.steps:
            self.seconds = [(end - start) / self.steps for start, end in zip(self.start, self.now(), strict=True)]

    @staticmethod
    def now():
        """Both clocks, when the device has nothing left to do."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


class Parts:
    """Processor seconds by part while the block is open."""

    def __init__(self):
        self.seconds, self.open, self.last = defaultdict(float), ["everything else"], 0.0

    def turn(self, part=None):
        """Enters a part, or leaves the innermost."""
        now = time.process_time()
        self.seconds[self.open[-1]] += now - self.last
        self.last = now
        self.open.append(part) if part else self.open.pop()

    def start(self):
        """Counts from now on."""
        self.seconds.clear()
        self.last = time.process_time()

    def wrapped(self, function, part):
        """The function, counted as a part."""

        def name():
            of_pairs = "pairs: the rest" in self.open
            return f"{'pairs' if of_pairs else 'images'}: backward" if part == "backward" else part

        @functools.wraps(function)
        def counted(*args, **kwargs):
            self.turn(name())
            try:
                return function(*args, **kwargs)
            finally:
                self.turn()

        @functools.wraps(function)
        @contextmanager
        def counted_block(*args, **kwargs):
            with ExitStack() as stack:
                self.turn(part)
                stack.enter_context(function(*args, **kwargs))
                self.turn()
                yield
                self.turn(part)
                stack.close()
                self.turn()

        return counted_block if part == "pairs: modes of the modules" else counted

    @contextmanager
    def watching(self):
        """Counts for the block."""
        plain = [(owner, name, owner.__dict__[name]) for owner, name, _ in PARTS]
        try:
            for owner, name, part in PARTS:
                setattr(owner, name, self.wrapped(owner.__dict__[name], part))
            yield
        finally:
            for owner, name, function in plain:
                setattr(owner, name, function)


def profiled(size, trainer_of, case, images, pairs, steps=None):
    """Milliseconds a step: by part, by operator of torch, and by function of this library; and the whole of each run.

    Processor time, but for the operators, which torch.profiler times by the wall clock.
    """
    steps = steps or max(2, size["steps"])
    parts, operators, calls = Parts(), torch.profiler.profile(activities=[ProfilerActivity.CPU]), cProfile.Profile()
    starts = {"parts": parts.start, "operators": operators.start, "functions": calls.enable}
    clocks = {}
    for kind, start in starts.items():
        clocks[kind] = Clock(size["warm"], steps, start)
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            changes = {"max_steps": size["warm"] + steps}
            trainer = trainer_of(case, "ipg", folder, images, pairs, clocks[kind], **changes)
            if kind == "parts":
                stack.enter_context(parts.watching())
            trainer.train()
        if kind == "parts":
            parts.turn("end")
        elif kind == "operators":
            operators.stop()
        else:
            calls.disable()
    own = Path(step.__file__).parent
    functions = {
        f"{Path(file).relative_to(own)}: {name}": 1e3 * row[2] / steps
        for (file, _, name), row in pstats.Stats(calls).stats.items()
        if file.startswith(f"{own}/")
    }
    return {
        "size": size,
        "seconds": clocks["parts"].seconds[1],
        "parts": {name: 1e3 * seconds / steps for name, seconds in parts.seconds.items()},
        "operators": {row.key: row.self_cpu_time_total / 1e3 / steps for row in operators.key_averages()},
        "functions": functions,
        "whole": {kind: 1e3 * clocks[kind].seconds[0 if kind == "operators" else 1] for kind in starts},
    }


def profile_page(found):
    """The profiles of several cases as a page."""
    packages = ", ".join(f"{name} {value}" for name, value in versions().items())
    machine = hardware()
    lines = [
        "# Where the time of a guided step goes",
        "",
        f"Made by `python recipes/speed/step.py {' '.join(found)} --profile --write`: {packages}; "
        f"{machine['machine']}, {machine['torch_threads']} thread; commit {commit()}. Milliseconds a step. "
        "Parts are timed without the parts inside them; operators by torch.profiler, functions of ipg_hf by cProfile, "
        "without what they call; each kind in a run of its own, of whose step the shares are. Processor time, that of "
        "the operators of the wall clock. [README.md](README.md) explains the largest.",
    ]
    for case, row in found.items():
        size = row["size"]
        lines += ["", f"## {case}: {size['images']} images, {size['pairs']} pairs, {size['pixels']} pixels"]
        for kind, count in (("parts", None), ("operators", 8), ("functions", 5)):
            top = sorted(row[kind].items(), key=lambda entry: -entry[1])[:count]
            total = row["whole"][kind]
            lines += ["", f"| {kind[:-1]} | ms | share of its step of {milliseconds(total)} |", "|---|---|---|"]
            for name, value in top:
                lines.append(f"| {name} | {milliseconds(value)} | {100 * value / total:.1f} % |")
    return "\n".join(lines) + "\n"


def milliseconds(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
