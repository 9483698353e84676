"""A real S3 server on this machine: Ceph's RADOS Gateway over a monitor and one OSD that keeps its data in memory.

Debian's ``radosgw``, ``ceph-mon`` and ``ceph-osd`` (``make object-store`` installs them). The cluster has no replicas
and no manager, listens on the address that it is given and on loopback, and is gone with its folder.
"""

from __future__ import annotations

import secrets
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import requests

_PROGRAMS = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
_START = 90.0
_CONF = """
[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{monitor}
public addr = 127.0.0.1
ms bind ipv6 = false
keyring = {folder}/keyring
run dir = {folder}
crash dir = {folder}
admin socket =
log file = {folder}/$name.log
mon data = {folder}/mon
mon data avail crit = 1
mon data avail warn = 2
mon allow pool size one = true
auth allow insecure global id reclaim = false
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = {capacity}
[client.rgw]
rgw data = {folder}/rgw
rgw frontends = beast endpoint={host}:{port}
rgw thread pool size = 32
"""


def missing() -> str:
    """Why there can be no gateway here; empty if there can."""
    absent = [name for name in _PROGRAMS if shutil.which(name) is None]
    return f"not installed: {', '.join(absent)} (make object-store)" if absent else ""


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Gateway:
    """Ceph's S3 server, running inside a ``with`` block.

    Args:
        folder: for its settings, logs and what it keeps on disk; not there yet.
        host: the address that it answers at.
        before: what its commands are run by, as ``ip netns exec NAME``.
        capacity: bytes of memory that objects may take.

    Attributes:
        url: of the server.
        env: what a process needs to use it: endpoint and keys.

    Raises:
        RuntimeError: it does not start; with the end of what it said.
    """

    def __init__(
        self, folder: Path, host: str = "127.0.0.1", before: Sequence[str] = (), capacity: int = 1 << 30
    ) -> None:
        self.folder, self.before = folder, tuple(before)
        self.url = f"http://{host}:{free_port()}"
        self._facts = {
            "fsid": uuid.uuid4(),
            "folder": folder,
            "host": host,
            "port": self.url.rsplit(":", 1)[1],
            "monitor": free_port(),
            "capacity": capacity,
        }
        self._started: list[subprocess.Popen[bytes]] = []
        self.env: dict[str, str] = {}

    def __enter__(self) -> Gateway:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def user(self, name: str) -> dict[str, str]:
        """Make a user, who owns nothing yet; the environment of one who has its keys."""
        key, secret = f"key-of-{name}", secrets.token_hex(16)
        self._run("radosgw-admin", "-n", "client.rgw", "user", "create", f"--uid={name}", f"--display-name={name}",
                  f"--access-key={key}", f"--secret-key={secret}")  # fmt: skip
        return environment(self.url, key, secret)

    def _start(self) -> None:
        for name in ("mon", "osd", "rgw"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "ceph.conf").write_text(_CONF.format(**self._facts), encoding="utf-8")
        self._keys()
        monitors, identity = self.folder / "monmap", str(uuid.uuid4())
        address = f"[v2:127.0.0.1:{self._facts['monitor']}]"
        self._run("monmaptool", "--create", "--addv", "a", address, "--fsid", str(self._facts["fsid"]), str(monitors))
        self._run("ceph-mon", "-i", "a", "--mkfs", "--monmap", str(monitors))
        self._serve("ceph-mon", "-i", "a", "-f")
        self._run("ceph", "osd", "new", identity)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", identity)
        self._serve("ceph-osd", "-i", "0", "-f")
        self.env = self.user("owner")  # waits until objects can be written
        self._serve("radosgw", "-n", "client.rgw", "-f")
        self._await()

    def _keys(self) -> None:
        keyring = str(self.folder / "keyring")
        caps = ["--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *"]
        for place, name in enumerate(("mon.", "client.admin", "osd.0", "client.rgw")):
            create = [] if place else ["--create-keyring"]
            self._run("ceph-authtool", keyring, *create, "--gen-key", "-n", name, *caps)

    def _command(self, program: str, arguments: Sequence[str]) -> list[str]:
        conf = [] if program in ("ceph-authtool", "monmaptool") else ["-c", str(self.folder / "ceph.conf")]
        return [*self.before, program, *conf, *arguments]

    def _run(self, program: str, *arguments: str) -> None:
        try:
            done = subprocess.run(
                self._command(program, arguments), capture_output=True, text=True, timeout=_START, cwd=self.folder
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{program} does not end; {self._said()}") from None
        if done.returncode:
            raise RuntimeError(f"{program} {' '.join(arguments)}: {done.stderr[-2000:]} {self._said()}")

    def _serve(self, program: str, *arguments: str) -> None:
        with open(self.folder / "said", "ab") as said:
            process = subprocess.Popen(
                self._command(program, arguments), stdin=subprocess.DEVNULL, stdout=said, stderr=said, cwd=self.folder
            )
        self._started.append(process)

    def _await(self) -> None:
        """Until it answers, asked from where it listens."""
        until = time.monotonic() + _START
        while time.monotonic() < until:
            if any(process.poll() is not None for process in self._started):
                break
            if self._answers():
                return
            time.sleep(0.2)
        raise RuntimeError(f"the gateway does not answer at {self.url}; {self._said()}")

    def _answers(self) -> bool:
        if self.before:
            port = self._facts["port"]
            asked = subprocess.run([*self.before, "ss", "-Hltn", f"sport = :{port}"], capture_output=True, text=True)
            return bool(asked.stdout.strip())
        try:
            return requests.get(self.url, timeout=5).ok
        except requests.RequestException:
            return False

    def _said(self) -> str:
        said = self.folder / "said"
        return said.read_text(encoding="utf-8", errors="replace")[-2000:] if said.exists() else ""

    def _stop(self) -> None:
        # The gateway first: it would wait for the others. What is in memory may go.
        for process in reversed(self._started):
            process.kill()
            process.wait()
        self._started.clear()


def environment(url: str, key: str, secret: str) -> dict[str, str]:
    """What botocore, and so s3fs, reads."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "default",
        # No other keys than these, wherever the tests run.
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    }


def through(env: Mapping[str, str], url: str) -> dict[str, str]:
    """The same user by way of another address, as that of a proxy."""
    return {**env, "AWS_ENDPOINT_URL": url}
