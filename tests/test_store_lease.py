"""The lease: one driver at a time on a run folder, on disks and object stores; a dead driver's is taken over."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import pytest

from raylux.errors import UserError
from raylux.store import Lease, LeaseLostError, RunFolder
from raylux.store import lease as lease_module
from raylux.store.files import Files

FAST = {"ttl": 60.0, "beat": 0.02}  # refused at the first beat, whatever else the machine does
SOON = {"ttl": 0.4, "beat": 0.02}  # takes over soon
STILL = {"ttl": 60.0, "beat": 1e6}  # a holder that never beats


@pytest.fixture(params=["local", "memory"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Files:
    if request.param == "memory":
        return Files(f"memory://{uuid.uuid4().hex}/run")
    return Files(str(tmp_path / "run"))


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process of the test seems to live on a machine of its own: only beats tell life."""
    monkeypatch.setattr(lease_module, "_space", lambda: uuid.uuid4().hex)


def test_a_second_driver_is_refused_and_may_follow(files: Files) -> None:
    with Lease.take(files, **FAST) as first:
        files.put("run.yaml", b"x")
        assert first.number == 1
        with pytest.raises(UserError, match=rf"another driver.*process {os.getpid()} on .*since 20.*run the same") as e:
            Lease.take(files, **FAST)
        assert "\n" not in str(e.value) and e.value.exit_code == 2
        first.check()
    with Lease.take(files, **FAST) as second:
        assert second.number == 2
        with pytest.raises(LeaseLostError):
            first.check()
    assert files.names("lease") == ["000002.json"]


def test_a_driver_that_waits_gets_it_after_the_first(files: Files) -> None:
    files.put("run.yaml", b"x")
    first, said = Lease.take(files, **FAST), threading.Event()
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        said.set()

    def leave() -> None:
        said.wait()
        first.release()

    leaving = threading.Thread(target=leave)
    leaving.start()
    with Lease.take(files, wait=60, say=say, **FAST) as second:
        assert second.number == 2 and first.number == 1
    leaving.join()
    assert len(lines) == 1 and "seeing whether it is alive" in lines[0]


def test_a_lease_that_does_not_beat_is_taken_over(files: Files, elsewhere: None) -> None:
    lines: list[str] = []
    folder = RunFolder(files.root)
    first = Lease.take(folder.files, **STILL)
    folder.guard = first.check
    folder.write_settings({})
    folder.commit("stage", "before")
    with Lease.take(files, say=lines.append, **SOON) as second:
        assert second.number == 2
        assert any("taken over from process" in line for line in lines)
        for write in (
            lambda: folder.commit("stage", "after"),
            lambda: folder.write_settings({}),
            lambda: folder.drop(["stage"]),
            lambda: folder.forget("stage", "before"),
            folder.sweep,
            first.beat,
        ):
            with pytest.raises(LeaseLostError, match=r"taken over by process .* nothing more is written here"):
                write()
        first.release()  # it has nothing to give up: the second stays
        second.check()
        assert folder.committed("stage") == {"before"}


@pytest.mark.parametrize("end", ["os._exit(1)", "os.kill(os.getpid(), 9)"])
def test_a_dead_process_of_this_machine_is_known_at_once(tmp_path: Path, end: str) -> None:
    files = Files(str(tmp_path / "run"))
    code = f"import os; from raylux.store import RunFolder, Lease; Lease.take(RunFolder({files.root!r}).files); {end}"
    dead = subprocess.Popen([sys.executable, "-c", code])
    while not files.names("lease", ".json") and dead.poll() is None:
        os.sched_yield()
    # Not waited for: a zombie is dead, too.
    os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
    with Lease.take(files, ttl=1e6) as lease:  # no test would wait that long for a beat
        assert lease.number == 2
    dead.wait()
    with Lease.take(files, ttl=1e6) as lease:
        lease.check()


def test_a_number_of_a_process_that_was_given_away_is_dead() -> None:
    me = lease_module.Holder.this()
    assert not me.dead
    assert lease_module.Holder(me.host, me.pid, me.started - 100, me.space, me.since).dead
    assert not lease_module.Holder(me.host, me.pid, me.started - 100, "another boot", me.since).dead
    assert not lease_module.Holder(me.host, me.pid, me.started - 100, "", me.since).dead


def test_of_many_at_once_one_gets_it(files: Files, elsewhere: None) -> None:
    files.put("run.yaml", b"x")
    Lease.take(files, **STILL)  # left behind: all see it die at the same moment
    start, won, refused = threading.Barrier(6), [], []

    def driver() -> None:
        start.wait()
        try:
            won.append(Lease.take(Files(files.root), ttl=4.0, beat=0.02))
        except UserError:
            refused.append(1)

    threads = [threading.Thread(target=driver) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and len(refused) == 5 and won[0].number == 2
    won[0].check()
    won[0].release()


def test_a_failing_storage_does_not_end_the_beat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, beaten = Files(str(tmp_path / "run")), threading.Event()
    failures, usual = iter([OSError(28, "No space left on device")] * 3), os.replace

    def replace(*args: str) -> None:
        for failure in failures:
            raise failure
        usual(*args)
        beaten.set()

    with Lease.take(files, ttl=60, beat=0.01):
        monkeypatch.setattr(os, "replace", replace)
        assert beaten.wait(60)


def test_where_nothing_was_written_nothing_stays(tmp_path: Path) -> None:
    files = Files(str(tmp_path / "run"))
    with Lease.take(files, **FAST):
        assert files.empty() and (tmp_path / "run").exists()
    assert not (tmp_path / "run").exists()


def test_a_run_begun_anew_in_the_same_place_is_not_ours(files: Files, elsewhere: None) -> None:
    first = Lease.take(files, **STILL)
    files.clear(["lease/000001.json"])
    with pytest.raises(LeaseLostError):
        first.check()
    with Lease.take(files, **STILL) as second:
        assert second.number == first.number
        with pytest.raises(LeaseLostError):
            first.check()


@pytest.mark.parametrize("data", [b"", b"{", b'{"checksum": "00000000"}'])
def test_a_damaged_lease_counts_as_left_behind_when_it_does_not_change(files: Files, data: bytes) -> None:
    files.put("run.yaml", b"x")
    files.put("lease/000007.json", data)
    with Lease.take(files, **SOON) as lease:
        assert lease.number == 8
