"""A driver of its own: the command ``raylux run``, started again by the same words whenever it was killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

# SIGUSR1 asks it where it is.
_PROGRAM = """
import faulthandler, signal, sys
faulthandler.register(signal.SIGUSR1, all_threads=True)
from raylux.cli import main
sys.exit(main(sys.argv[1:]))
"""


class Driver:
    """One command line.

    Args:
        config: the file that it runs.
        env: its environment, with ``RAY_ADDRESS``.
        log: where its output goes.
    """

    def __init__(self, config: Path, env: Mapping[str, str], log: Path) -> None:
        self._command = [sys.executable, "-c", _PROGRAM, "run", str(config)]
        self._env, self._log = dict(env), log
        self._process: subprocess.Popen[bytes] | None = None
        self.starts = 0

    def start(self) -> None:
        self.starts += 1
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(self._command, env=self._env, stdout=log, stderr=log)

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.poll() if self._process else None

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def wait(self, timeout: float) -> None:
        """For its end. Raises subprocess.TimeoutExpired."""
        if self._process is not None:
            self._process.wait(timeout)

    def where(self) -> str:
        """The end of what it said, with the place at which each of its threads waits."""
        if self._process is not None and self.code is None:
            os.kill(self._process.pid, signal.SIGUSR1)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=2)
        return self.said()

    def said(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")[-6000:] if self._log.exists() else ""
