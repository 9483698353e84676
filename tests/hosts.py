"""Two hosts on this machine: network namespaces joined by a virtual cable, each with its own address and host name."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

# Of the range that is set aside for tests of networks (RFC 2544); no packet leaves the two namespaces.
ADDRESSES = ("198.18.77.1", "198.18.77.2")


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def not_permitted() -> str:
    """Why there can be no network namespaces here; empty if there can."""
    if shutil.which("ip") is None:
        return "not installed: ip (Debian's iproute2)"
    name = f"raylux-{uuid.uuid4().hex[:6]}"
    try:
        _ip("netns", "add", name)
        try:
            _ip("-n", name, "link", "add", "name", "try", "type", "veth", "peer", "name", "tried")
        finally:
            _ip("netns", "del", name)
    except RuntimeError as error:
        return f"no network namespaces here ({error})"
    return ""


class Host:
    """One of the two.

    Args:
        name: of the namespace, and of the host.
        address: of its end of the cable.
        env: of what runs there.
        hidden: a folder that is empty there, as the disk of another machine; None: nothing is hidden.
    """

    def __init__(self, name: str, address: str, env: Mapping[str, str], hidden: Path | None = None) -> None:
        self.name, self.address, self.env, self._hidden = name, address, dict(env), hidden
        self.before = ("ip", "netns", "exec", name)  # which has mounts of its own

    def _command(self, words: tuple[str, ...]) -> list[str]:
        hide = f"mount -t tmpfs hidden {shlex.quote(str(self._hidden))} && " if self._hidden else ""
        script = f"{hide}hostname {self.name} && cd / && exec {shlex.join(words)}"
        return [*self.before, "unshare", "--uts", "sh", "-c", script]

    def run(self, *words: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, **self.env}
        return subprocess.run(self._command(words), env=env, capture_output=True, text=True, timeout=timeout)

    def start(self, log: Path, *words: str) -> subprocess.Popen[bytes]:
        with open(log, "ab") as said:
            env = {**os.environ, **self.env}
            return subprocess.Popen(self._command(words), env=env, stdin=subprocess.DEVNULL, stdout=said, stderr=said)

    def processes(self) -> list[int]:
        """What runs there."""
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, timeout=30)
        return [int(pid) for pid in found.stdout.split()]


@contextlib.contextmanager
def joined() -> Iterator[tuple[str, str]]:
    """The names of two namespaces joined by a cable; at the end, whatever still runs in them is killed."""
    mark = uuid.uuid4().hex[:6]
    names = (f"raylux-{mark}-a", f"raylux-{mark}-b")
    made: list[str] = []
    try:
        for name in names:
            _ip("netns", "add", name)
            made.append(name)
        # Made inside, so that this machine's own interfaces never see it.
        _ip("-n", names[0], "link", "add", "name", "cable", "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            for link in ("lo", "cable"):
                _ip("-n", name, "link", "set", link, "up")
        yield names
    finally:
        for name in made:
            _end(Host(name, "", {}))
            _ip("netns", "del", name)


def _end(host: Host) -> None:
    until = time.monotonic() + 20
    while (left := host.processes()) and time.monotonic() < until:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)
