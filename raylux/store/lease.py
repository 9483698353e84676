"""One driver at a time: the right to write into a run folder, kept alive by a heartbeat.

Leases are numbered objects, ``lease/000001.json``; the highest number owns the run, and a number is never used
twice. Taking one is an exclusive create of the next number, so of several drivers that try one wins. The owner
rewrites its object every few seconds; others watch it change by their own clock and never compare two clocks.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from raylux.errors import RayluxError, UserError
from raylux.store.damage import broken_seal, seal_json
from raylux.store.files import LEASE, Files

TTL = 30.0
BEAT = 5.0
# Process start times are told to about a second; a number is not given to a new process that soon.
_SAME_START = 2.0


class LeaseLostError(RayluxError):
    """Another driver has taken the run folder over; this one may not write there any more."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lease.

    Attributes:
        host: the machine's name.
        pid: process number there.
        started: when the process started, seconds since 1970 as that machine counts.
        space: which boot and which namespace of processes ``pid`` belongs to; empty where that is not known.
        since: when the lease was taken, UTC.
        token: random, tells two holders apart whatever else they share.
    """

    host: str
    pid: int
    started: float
    space: str
    since: str
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    @classmethod
    def this(cls) -> Holder:
        """This process, from now on."""
        now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        pid = os.getpid()
        return cls(platform.node(), pid, psutil.Process(pid).create_time(), _space(), now)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    @property
    def dead(self) -> bool:
        """True if it is certain that the process has ended: it ran on this very machine and is gone."""
        if not self.space or self.space != _space():
            return False
        try:
            process = psutil.Process(self.pid)
            ended = process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
            return ended or abs(process.create_time() - self.started) > _SAME_START
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False


def _space() -> str:
    """This boot of this machine, and the namespace in which process numbers count."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


class Lease:
    """The right to write into a run folder, held until ``release`` or the end of a ``with`` block.

    Attributes:
        number: of its object.
        holder: who holds it.
        inherited: the one before was not given up, its holder died.
    """

    def __init__(self, files: Files, number: int, holder: Holder, beat: float) -> None:
        self._files, self.number, self.holder = files, number, holder
        self.inherited = False
        self._beats, self._every = 0, beat
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="raylux-lease", daemon=True)

    @classmethod
    def take(
        cls,
        files: Files,
        wait: float = 0.0,
        ttl: float = TTL,
        beat: float = BEAT,
        say: Callable[[str], object] | None = None,
    ) -> Lease:
        """Take the lease of a run folder and keep it alive.

        A lease whose process has ended on this machine is taken over at once; another one after ``ttl`` seconds
        without a beat.

        Args:
            files: the run folder's.
            wait: seconds to wait for a live holder to end; 0 refuses as soon as a beat is seen.
            ttl: seconds without a beat after which a lease counts as left behind.
            beat: seconds between two beats; a fraction of ``ttl``.
            say: called with a line when there is something to wait for.

        Raises:
            UserError: another driver holds it.
        """
        me, until = Holder.this(), time.monotonic() + wait
        watch = _Watch(files, ttl, say or (lambda line: None))
        while True:
            number, holder = watch.free_after(until)
            lease = cls(files, number + 1, me, beat)
            if files.create(_key(number + 1), lease._record()):
                break
            # Somebody was faster: see who.
        for old in _numbers(files):
            if old < lease.number:
                files.delete(_key(old))
        lease.inherited = holder is not None
        if holder is not None:
            watch.say(f"{files.place}: taken over from {holder}, which is gone")
        lease._thread.start()
        return lease

    def check(self) -> None:
        """Raises LeaseLostError if another driver has taken over."""
        newest = max(_numbers(self._files), default=0)
        found = _read(self._files, newest)
        other = found.holder
        # The token: somebody may have removed the folder and begun another run in its place.
        if newest == self.number and (other is None or other.token == self.holder.token):
            return
        raise LeaseLostError(
            f"{self._files.place}: taken over by {other or 'another driver'}, as this process "
            f"({self.holder.pid} on {self.holder.host}) gave no sign of life; nothing more is written here"
        )

    def beat(self) -> None:
        """Show that the holder is alive. Raises LeaseLostError if another driver has taken over."""
        self.check()
        self._beats += 1
        self._files.put(_key(self.number), self._record())

    def release(self) -> None:
        """Give it up. The object stays, marked, so that its number is not used again.

        Where nothing was written beside it, nothing stays.
        """
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        try:
            self.check()
        except LeaseLostError:
            return
        if self._files.empty():
            self._files.clear([_key(number) for number in _numbers(self._files)])
            self._files.vanish()
        else:
            self._files.put(_key(self.number), self._record(released=True))

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.release()
        except RayluxError:
            if error is None:  # what went wrong first is what the user should read
                raise

    def _record(self, released: bool = False) -> bytes:
        data = {"beat": self._beats, "released": released, "holder": self.holder.__dict__}
        return seal_json(_key(self.number), data)

    def _keep(self) -> None:
        while not self._stop.wait(self._every):
            try:
                self.beat()
            except LeaseLostError:  # ``check`` tells the driver
                return
            except RayluxError:  # the storage failed: others wait for ``ttl``, so the next beat may still be in time
                continue


@dataclass(frozen=True)
class _Seen:
    """A lease object as it was read: its bytes, and what they say where they are whole."""

    raw: bytes
    holder: Holder | None = None
    released: bool = False


def present_holder(files: Files) -> Holder | None:
    """Who holds a run folder now: None where its last lease was given back, or its holder has certainly ended."""
    found = _read(files, max(_numbers(files), default=0))
    return None if found.released or found.holder is None or found.holder.dead else found.holder


class _Watch:
    """Looks at the present lease until it is free, or certainly is not."""

    def __init__(self, files: Files, ttl: float, say: Callable[[str], object]) -> None:
        self._files, self._ttl, self.say = files, ttl, say

    def free_after(self, until: float) -> tuple[int, Holder | None]:
        """The highest number, once nobody holds it, and who left it behind (None: it was released).

        Args:
            until: up to when to wait for a live holder to end, by the monotonic clock.

        Raises:
            UserError: it is held and ``until`` is over.
        """
        number, seen, since, told = 0, _Seen(b""), time.monotonic(), False
        pause = min(1.0, self._ttl / 20)
        while True:
            newest = max(_numbers(self._files), default=0)
            found = _read(self._files, newest)
            if not newest or found.released:
                return newest, None
            if found.holder is not None and found.holder.dead:
                return newest, found.holder
            if newest != number:
                number, seen, since = newest, found, time.monotonic()
            elif found.raw != seen.raw:  # it beats
                if time.monotonic() >= until:
                    raise UserError(self._refusal(found.holder))
                seen, since = found, time.monotonic()
            elif time.monotonic() - since >= self._ttl:
                return newest, found.holder
            if not told:
                self.say(f"{self._files.place}: held by {found.holder or 'another driver'}; seeing whether it is alive")
                told = True
            time.sleep(pause)

    def _refusal(self, holder: Holder | None) -> str:
        return (
            f"{self._files.place}: another driver is writing into this run folder ({holder or 'unknown'}); "
            "wait until it has ended, or end it, and run the same command again"
        )


def _key(number: int) -> str:
    return f"{LEASE}/{number:06d}.json"


def _numbers(files: Files) -> list[int]:
    names = (name.removesuffix(".json") for name in files.names(LEASE, ".json"))
    return [int(name) for name in names if name.isdigit()]


def _read(files: Files, number: int) -> _Seen:
    """A lease object; without a holder where it is gone or not whole (0: there is none)."""
    try:
        raw = files.get(_key(number)) if number else b""
    except FileNotFoundError:
        return _Seen(b"")
    if broken_seal(_key(number), raw):
        return _Seen(raw)
    data: dict[str, Any] = json.loads(raw)
    return _Seen(raw, Holder(**data["holder"]), data["released"])
