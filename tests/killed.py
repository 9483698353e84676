"""Kills a driver at the n-th step that the file system sees, for every n, and looks at what it left.

``python -m tests.killed FOLDER`` prints the number of places and leaves with 0 if all is well. A process is forked
for each place, from one that has everything imported but has started no thread.
"""

from __future__ import annotations

import builtins
import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from raylux.store import Lease, RunFolder

KILLED = 77
STEPS = ("fsync", "replace", "rename", "link", "unlink", "mkdir", "rmdir")


def steps(folder: RunFolder, lease: Lease) -> list[Callable[[], object]]:
    """What the driver does, one change of the run's state each, or none."""

    def write(stage: str, unit: str, version: int) -> None:
        key, objects = folder.write(f"scores/{unit}", {"a": np.full((3, 2), version)})
        table, more = folder.put("corpus/table", ".parquet", b"%d" % version * 50)
        folder.commit(stage, unit, objects | more, key=key, table=table, version=version)

    def again(version: int) -> None:
        before = folder.manifest("fit.snapshot", "s").objects
        write("fit.snapshot", "s", version)
        folder.delete(before)

    return [
        lambda: folder.write_settings({"config": {"version": 1}}),
        lease.beat,
        lambda: write("score", "u0", 1),
        lambda: write("fit.snapshot", "s", 1),
        lambda: again(2),
        lambda: folder.write_settings({"config": {"version": 2}}),
        lambda: folder.forget("fit.snapshot", "s"),
        lambda: write("tokens", "t/ü", 2),
        lambda: folder.drop(["tokens"]),
        folder.sweep,
        lambda: write("score", "u1", 4),
    ]


def drive(root: str, done: Callable[[RunFolder], None]) -> None:
    """Take the lease and do all steps; ``done`` is told before the first and after each."""
    folder = RunFolder(root)
    with Lease.take(folder.files, beat=1e6) as lease:
        folder.guard = lease.check
        done(folder)
        for step in steps(folder, lease):
            step()
            done(folder)


def state(folder: RunFolder) -> dict[str, Any]:
    """What a reader sees, every object read in full."""
    seen: dict[str, Any] = {}
    if folder.exists:
        seen["run.yaml"] = folder.settings()["config"]["version"]
    for stage in folder.stages():
        for unit, manifest in folder.units(stage).items():
            group, version = folder.group(manifest.meta["key"]), manifest.meta["version"]
            assert (group.read("a") == version).all()
            assert folder.read(manifest, manifest.meta["table"]) == b"%d" % version * 50
            seen[f"{stage} {unit}"] = version
    problems = folder.check(checksums=True)
    assert not problems or ("run.yaml" not in seen and len(problems) == 1), problems
    return seen


class Killer:
    """Ends the process at the n-th step; a write that it ends is left half done."""

    def __init__(self, place: int) -> None:
        self.left = place

    def due(self) -> bool:
        self.left -= 1
        return self.left == 0

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **keys: Any) -> Any:
            if self.due():
                os._exit(KILLED)
            return call(*args, **keys)

        return wrapped

    def open(self, usual: Callable[..., Any]) -> Callable[..., Any]:
        def opened(path: Any, mode: str = "r", *args: Any, **keys: Any) -> Any:
            if not set(mode) & set("wxa+"):
                return usual(path, mode, *args, **keys)
            if self.due():
                os._exit(KILLED)
            file = usual(path, mode, *args, **keys)
            return _Torn(file, self)

        return opened


class _Torn:
    def __init__(self, file: Any, killer: Killer) -> None:
        self._file, self._killer = file, killer

    def write(self, data: Any) -> int:
        if self._killer.due():
            self._file.write(bytes(data)[: len(data) // 2])
            self._file.flush()
            os._exit(KILLED)
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Torn:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _forked(body: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        body()
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _killed_run(root: str, place: int, progress: int) -> None:
    killer = Killer(place)
    for name in STEPS:
        setattr(os, name, killer.wrap(getattr(os, name)))
    builtins.open = killer.open(builtins.open)  # type: ignore[assignment]
    drive(root, lambda folder: os.write(progress, b"."))


def _look(root: str, begun: int, states: list[dict[str, Any]]) -> None:
    folder = RunFolder(root)
    found = state(folder)
    assert found in states[max(0, begun - 1) : begun + 1], (begun, found)
    drive(root, lambda folder: None)
    folder.guard = lambda: None
    folder.sweep()
    assert state(folder) == states[-1], state(folder)
    named = {key for stage in folder.stages() for unit in folder.units(stage).values() for key in unit.objects}
    left = {str(path.relative_to(root)) for path in Path(root).rglob("*") if path.is_file()}
    rest = {name for name in left - named if not name.startswith(("ledger/", "lease/"))}
    assert named <= left and rest == {"run.yaml"}, rest
    # A part under lease/ may belong to a driver that is trying at this moment: the sweep leaves those.
    assert not [name for name in left if name.endswith(".part") and not name.startswith("lease/")]


def _states(root: str) -> list[dict[str, Any]]:
    """What a reader sees before the first step and after each, undisturbed."""
    reading, writing = os.pipe()

    def body() -> None:
        drive(root, lambda folder: os.write(writing, repr(state(folder)).encode() + b"\n") and None)

    assert _forked(body) == 0
    os.close(writing)
    with os.fdopen(reading) as file:
        return [eval(line, {}) for line in file]


def main(base: str) -> int:
    """The number of places where the driver was killed."""
    gc.freeze()  # a collection in a fork would copy every page
    os.fsync = lambda handle: None  # a kill loses nothing that was written; the calls are counted all the same
    states = _states(f"{base}/whole")
    for place in _counted():
        root = f"{base}/{place}"
        reading, writing = os.pipe()
        code = _forked(lambda root=root, place=place, writing=writing: _killed_run(root, place, writing))
        os.close(writing)
        with os.fdopen(reading, "rb") as file:
            begun = len(file.read())
        if code == 0:
            return place - 1
        assert code == KILLED, (place, code)
        assert _forked(lambda root=root, begun=begun: _look(root, begun, states)) == 0, f"killed at place {place}"
    raise AssertionError


def _counted() -> Iterator[int]:
    place = 0
    while True:
        place += 1
        yield place


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        print(main(sys.argv[1]))
