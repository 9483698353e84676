"""A head of cluster/local.sh for tests, and a folder that looks like a clone to its commands."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

from raylux.engine import auth
from tests.small import CUT, Inputs

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@dataclass
class Head:
    """The head of cluster/local.sh.

    Attributes:
        folder: with its token and pid.
        work: the working directory of what is submitted.
        cpus: of the head.
        port: of the dashboard; gcs: of the rest.
        said: by the commands of the README.
        code: their exit code.
    """

    folder: Path
    work: Path
    cpus: int = 2
    port: int = field(default_factory=free_port)
    gcs: int = field(default_factory=free_port)
    said: str = ""
    code: int = -1

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def sh(self, *lines: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "RAYLUX_LOCAL": str(self.folder), "RAYLUX_LOCAL_PORT": str(self.port)}
        env |= {"RAYLUX_LOCAL_GCS_PORT": str(self.gcs), "RAYLUX_LOCAL_CPUS": str(self.cpus)}
        for name in (auth.MODE, auth.TOKEN_PATH):
            env.pop(name, None)
        script = "\n".join(["set -e", *lines])
        return subprocess.run(
            ["bash", "-c", script], cwd=self.work, env=env, capture_output=True, text=True, timeout=280
        )

    @contextmanager
    def ended_by(self, *lines: str) -> Iterator[None]:
        """Run the lines at the end, and see that nothing is left of the head."""
        seen: list[psutil.Process] = []
        try:
            yield
            seen = self.processes()
        finally:
            ended = self.sh(*lines)
        assert ended.returncode == 0, ended.stderr
        left = [process for process in seen if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
        assert left == []

    def processes(self) -> list[psutil.Process]:
        """The head and what it started."""
        head = psutil.Process(int((self.folder / "pid").read_text()))
        return [head, *head.children(recursive=True)]


def like_a_clone(work: Path, inputs: Inputs) -> None:
    """cluster/, .venv and config.yaml: a small run of one worker, its folder left to the command."""
    (work / "cluster").symlink_to(ROOT / "cluster")
    (work / ".venv").symlink_to(sys.prefix)
    sections = inputs.sections("overridden")
    for text in CUT:
        place, value = text.split("=")
        section, key = place.split(".")
        sections.setdefault(section, {})[key] = yaml.safe_load(value)
    sections["engine"] |= {"backend": "ray", "workers": 1}
    (work / "config.yaml").write_text(yaml.safe_dump(sections), encoding="utf-8")
