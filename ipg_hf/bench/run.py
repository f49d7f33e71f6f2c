# SPDX-License-Identifier: Apache-2.0
"""Makes the runs of a suite, each in a process of its own. A run that has a record is not repeated."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from ..metrics import METRICS, WORST_GROUP, DivergedError
from ..names import nearest
from ..recipe import RecipeError, parse_recipe
from ..record import (
    append_record,
    commit,
    hardware,
    read_json,
    read_records,
    recorded_names,
    resolved_settings,
    versions,
    write_json,
)
from ..run import RECORD, train
from .figures import write_comparison
from .suite import Run, Suite, chosen, draw_runs, load_suite, points, seed_runs, suite_records, validation_score

LOG = "log.txt"


def bench(
    path: str,
    *,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    jobs: int = 1,
    only: Literal["tune", "run", "render"] | None = None,
    output_dir: str | None = None,
    keep_models: bool = False,
) -> None:
    """Makes the runs that have no record yet, and the table and figures of the suite.

    Args:
        path: file of the suite.
        methods: names of the methods to run; by default all.
        seeds: seeds to run; by default all of the suite.
        jobs: number of runs at a time; with more than one, each has one thread.
        only: name of one of the three stages.
        output_dir: folder in which the runs work; by default `outputs/bench-<suite>`.
        keep_models: keep the folder of each run; by default it is removed when the record is written.

    Raises:
        RecipeError: the suite, a method or a seed cannot be used; a record was made with other settings; a run failed.
    """
    suite = load_suite(path)
    for name in methods or ():
        if name not in suite.methods:
            raise RecipeError(f"--methods: {suite.path} has no method {name!r}.{nearest(name, suite.methods)}")
    for seed in seeds or ():
        if seed not in suite.seeds:
            raise RecipeError(f"--seeds: {seed} is not among the seeds of {suite.path}, {suite.seeds}: add it there.")
    if jobs < 1:
        raise RecipeError(f"--jobs {jobs} must be 1 or more.")
    suite_records(suite)
    if only != "render" and (commit() or "").endswith("-dirty"):
        print("The code or the recipes have changes that are not committed: the records will say so.", file=sys.stderr)
    wanted = [name for name in suite.methods if name in (methods or suite.methods)]
    folder = Path(output_dir or f"outputs/bench-{suite.path.stem}")
    if only in (None, "tune"):
        tried = [draw_runs(suite, name) for name in wanted]
        # round by round: after a stop all methods have as many draws
        execute([run for part in zip(*tried, strict=True) for run in part], jobs, folder, keep_models)
    if only in (None, "run"):
        execute(_compared(suite, wanted, seeds or suite.seeds), jobs, folder, keep_models)
    if only in (None, "render"):
        print("\n".join(map(str, write_comparison(suite))))


def _compared(suite: Suite, methods: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    runs, records = [], suite_records(suite)
    for name in methods:
        choice = chosen(suite, name, records)
        if choice is None:
            raise RecipeError(f"{name} has draws without a record: its settings are not chosen. Run --only tune first.")
        runs += [run for point in points(suite, name) for run in seed_runs(suite, name, choice[1], point)]
    # seed by seed: after a stop all methods have the same seeds
    return [run for seed in suite.seeds if seed in seeds for run in runs if run.settings["seed"] == seed]


def execute(runs: Sequence[Run], jobs: int, folder: Path, keep_models: bool = False) -> None:
    """Makes the runs that have no record.

    Args:
        runs: the runs, in the order in which they start.
        jobs: number of runs at a time.
        folder: each run works in a folder of its name in this folder, and begins anew what an earlier attempt left
            there. With `preload`, the transformed images of a seed stay until the last run with that seed has ended.
        keep_models: keep the folders of the runs.

    Raises:
        RecipeError: a run failed. Runs at the same time have ended before.
    """
    made = {record["run"] for path in {run.records for run in runs} for record in read_records(path)}
    waiting = [run for run in runs if run.name not in made]
    total, done, failures = len(waiting), 0, []
    going: list[tuple[Run, BaseProcess]] = []
    with _ended(going):
        while going or (waiting and not failures):
            while waiting and len(going) < jobs and not failures:
                going.append((waiting[0], _start(waiting[0], folder / waiting[0].name, jobs)))
                del waiting[0]
            for run, process in [entry for entry in going if entry[1].exitcode is not None]:
                going.remove((run, process))
                if process.exitcode:
                    failures.append(_failure(run, process.exitcode, folder / run.name / LOG))
                    continue
                done += 1
                if run.settings["seed"] not in {
                    other.settings["seed"] for other in [*waiting, *(entry[0] for entry in going)]
                }:
                    shutil.rmtree(_images(folder, run), ignore_errors=True)
                print(f"[{done}/{total}] {run.name}: {_finish(run, folder / run.name, keep_models)}", flush=True)
            time.sleep(0.1)
    if failures:
        raise RecipeError("\n".join(failures))


def _start(run: Run, folder: Path, jobs: int) -> BaseProcess:
    folder.mkdir(parents=True, exist_ok=True)
    settings = {**run.settings, "output_dir": str(folder), "overwrite_output_dir": True}
    if settings.get("preload"):
        settings.setdefault("preload_dir", str(_images(folder.parent, run)))
    config = folder / "recipe.yaml"
    config.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    (folder / LOG).write_bytes(b"")
    threads = {"OMP_NUM_THREADS": "1"} if jobs > 1 else {}
    process = _processes().Process(target=_train, args=(str(config), str(folder / LOG), bool(threads), commit()))
    # the package that this one is, wherever it was found
    paths = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    # read by the server, which is started with the first process
    with _environment({**os.environ, **threads, "PYTHONPATH": os.pathsep.join(paths)}):
        process.start()
    return process


def _images(folder: Path, run: Run) -> Path:
    return folder / f"images-seed{run.settings['seed']}"


@cache
def _processes() -> BaseContext:
    """How processes start: forked from a process that has only imported the library, which takes longer than a short
    run; as new interpreters on systems where forking after imports is not safe."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _train(config: str, log: str, on_one_thread: bool, code: str | None) -> None:
    """Does what `ipg train --config FILE` does, in a process of its own, and writes its output to a file.

    A draw that diverges leaves a record without metrics.

    Args:
        config: path of the recipe.
        log: path of the file for the output.
        on_one_thread: whether other runs go on at the same time.
        code: commit of the code that was imported; the source tree may change during the suite.
    """
    multiprocessing.set_start_method(None, force=True)  # of worker processes: this run's, not the server's
    with open(log, "wb") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    if on_one_thread:
        torch.set_num_threads(1)
    begun = time.monotonic()
    try:
        recipe, args, given = parse_recipe(config, [])
        train(recipe, args, given, commit=code)
    except (ValueError, OSError) as failure:
        if not isinstance(failure, DivergedError) or recipe.measure_test:
            sys.exit(f"error: {failure}")
        record = {"method": recipe.method, "settings": resolved_settings(recipe, args), "given": recorded_names(given)}
        record |= {"seed": args.seed, "metrics": {}, "diverged": str(failure)}
        record |= {"seconds": round(time.monotonic() - begun, 1), "versions": versions()}
        write_json(Path(args.output_dir) / RECORD, record | {"commit": code, "hardware": hardware()})


def _finish(run: Run, folder: Path, keep_models: bool) -> str:
    """Appends the record to the suite's, and returns a line on the result."""
    record = read_json(folder / RECORD)
    append_record(run.records, {"run": run.name, **record})
    if not keep_models:
        shutil.rmtree(folder)
    if "diverged" in record:
        return f"diverged, {record['seconds']:.0f} s"
    (metric,) = [name for name in WORST_GROUP if name in record["metrics"]["validation"]]
    return f"{METRICS[metric].title} on validation {abs(validation_score(record)):.3f}, {record['seconds']:.0f} s"


def _failure(run: Run, status: int, log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{run.name} failed (status {status}), finished runs are kept; the end of {log}:\n" + "\n".join(lines[-12:])


@contextmanager
def _ended(going: list[tuple[Run, BaseProcess]]) -> Iterator[None]:
    """At the end of the block, ends the processes that still run; also after an interrupt or SIGTERM."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        for _, process in going:
            process.terminate()
        for _, process in going:
            process.join(30)
            if process.exitcode is None:
                process.kill()
        signal.signal(signal.SIGTERM, before)
