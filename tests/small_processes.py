# SPDX-License-Identifier: Apache-2.0
"""A process of its own for a run that is killed: a fork, which has nothing to import anew."""

import multiprocessing
import os
import sys
from pathlib import Path


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
