# SPDX-License-Identifier: Apache-2.0
"""Processes of their own for runs that are killed, or that share their batches: forks, which import nothing anew."""

import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

from accelerate.state import AcceleratorState


class Child:
    """A function that runs in a process of its own, in a new session.

    Args:
        folder: where its error messages go, to the file `stderr`.
        function: what it runs.
        arguments: arguments of the function.
    """

    def __init__(self, folder, function, *arguments):
        folder.mkdir(parents=True, exist_ok=True)
        self.errors = Path(folder) / "stderr"
        self.process = multiprocessing.get_context("fork").Process(target=self._run, args=(function, *arguments))
        self.process.start()
        self.pid = self.process.pid

    def _run(self, function, *arguments):
        os.setsid()  # loader workers go with it
        file = os.open(self.errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1)
        function(*arguments)

    def poll(self):
        """The exit status, or None while it runs; minus the signal that ended it."""
        return self.process.exitcode

    def ended(self, timeout):
        """Waits for the end; returns the exit status and the error messages."""
        self.process.join(timeout)
        status = self.process.exitcode
        if status is None:
            self.process.kill()
        return status, self.errors.read_text()


def run_together(folder, processes, function, *arguments, timeout=400):
    """Runs a function in several processes that find each other, as `accelerate launch` starts them.

    Args:
        folder: where the error messages of each go.
        processes: how many.
        function: what each runs.
        *arguments: arguments of the function.
        timeout: seconds.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    children = []
    for rank in range(processes):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)} if processes > 1 else {}
        environment = place | ranks | {"ACCELERATE_USE_CPU": "true"}
        children.append(Child(folder / f"process{rank}", _with_environment, environment, function, *arguments))
    deadline = time.monotonic() + timeout
    while any(child.poll() is None for child in children) and not any(child.poll() for child in children):
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    failed = [child for child in children if child.poll() != 0]
    errors = [child.ended(0.1)[1] for child in failed]
    assert not failed, "\n".join(errors)


def _with_environment(environment, function, *arguments):
    os.environ.update(environment)
    AcceleratorState._reset_state(reset_partial_state=True)
    function(*arguments)
    sys.stdout.flush()
    # torch's own threads may abort the interpreter's orderly end ("terminate called without an active exception")
    os._exit(0)
