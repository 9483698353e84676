"""Progress of a run: a bar on a terminal, plain lines elsewhere, and progress.jsonl in the run folder."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from raylux import profiling
from raylux.shown import plain, redacted, redacted_values
from raylux.store import RunFolder

_LINE_EVERY = 10.0

Listener = Callable[[str, Mapping[str, Any]], None]
"""Told an event: its kind, and what is said of it."""


class Task:
    """One stretch of work of known length."""

    def __init__(self, owner: Reporter, stage: str, total: int, what: str) -> None:
        self._owner, self.stage, self.total, self.what = owner, stage, total, what
        self.done = 0
        self._from = 0
        self.started = self._line = time.monotonic()
        self._cpu = time.process_time()

    def advance(self, count: int = 1) -> None:
        self.reach(self.done + count)

    def go_on(self, done: int) -> None:
        """So many were done by an earlier command: they say nothing of this one's pace."""
        self._from = done
        self.reach(done)

    def reach(self, done: int) -> None:
        """So many are done; fewer than before, where some have to be done again."""
        self.done = done
        self._owner.moved(self)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def cpu(self) -> float:
        """CPU seconds of the driver's process since, all threads: in process, those of the work itself."""
        return time.process_time() - self._cpu

    @property
    def left(self) -> float | None:
        """Seconds left by the pace so far."""
        own = self.done - self._from
        return self.seconds / own * (self.total - self.done) if own > 0 else None

    def due(self) -> bool:
        """Whether it is time for another plain line."""
        now = time.monotonic()
        if now - self._line < _LINE_EVERY:
            return False
        self._line = now
        return True


class Untold(Task):
    """A stretch within another one, of which nobody is told."""

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def go_on(self, done: int) -> None:
        pass

    def reach(self, done: int) -> None:
        pass


class Reporter:
    """Tells of a run's progress; ``quiet`` keeps the terminal clean, the file is written all the same."""

    def __init__(self, folder: RunFolder, quiet: bool = False) -> None:
        self.clock = profiling.Clock()
        self._task: Task | None = None
        self._file = None if folder.files.remote else Path(folder.files.where("progress.jsonl"))
        self._listeners: list[Listener] = []
        self.console = Console(stderr=True, quiet=quiet)
        self._bar: Progress | None = None
        self._id: object = None

    @contextmanager
    def task(self, stage: str, total: int, what: str) -> Iterator[Task]:
        """A bar for ``total`` things called ``what``."""
        task = Task(self, stage, total, what)
        live = self.console.is_terminal and not self.console.quiet
        self._write(task, "started")
        self._task = task
        try:
            with self.clock.running(), self._shown(task, live):
                yield task
            self._write(task, "done")
            if not live:
                self.say(f"{stage}: {task.done} {what} in {task.seconds:.1f} s")
        finally:
            self._spent(task)
            self._task = None

    @contextmanager
    def _shown(self, task: Task, live: bool) -> Iterator[None]:
        try:
            if live:
                columns = (
                    TextColumn("{task.description:<11}"),
                    BarColumn(bar_width=28),
                    MofNCompleteColumn(),
                    TextColumn(task.what),
                    TimeElapsedColumn(),
                    TextColumn("left"),
                    TimeRemainingColumn(),
                )
                with Progress(*columns, console=self.console) as bar:
                    self._bar, self._id = bar, bar.add_task(task.stage, total=task.total)
                    yield
            else:
                yield
        finally:
            self._bar = None

    def moved(self, task: Task) -> None:
        if self._bar is not None:
            self._bar.update(self._id, completed=task.done)  # type: ignore[arg-type]
        if task.due():
            self._write(task, "running")
            self._spent(task)
            if self._bar is None and task.left is not None:
                self.say(f"{task.stage}: {task.done} of {task.total} {task.what}, about {task.left:.0f} s left")

    def say(self, text: str) -> None:
        self.console.print(plain(redacted(text)), highlight=False, markup=False, emoji=False, soft_wrap=True)

    def listen(self, listener: Listener) -> None:
        """Tell every event to another one, too."""
        self._listeners.append(listener)

    def unlisten(self, listener: Listener) -> None:
        self._listeners.remove(listener)

    def event(self, kind: str, **facts: object) -> None:
        """A line of progress.jsonl: what happened, when."""
        if self._task is not None:
            facts.setdefault("task", self._task.stage)
        for listener in self._listeners:
            listener(kind, facts)
        if self._file is None:
            return
        record = redacted_values({"time": round(time.time(), 3), "event": kind, **facts})
        # One write to a file opened for appending: lines of two processes do not mix.
        with contextlib.suppress(OSError), self._file.open("ab", buffering=0) as file:
            file.write(json.dumps(record, default=str).encode() + b"\n")

    def _spent(self, task: Task) -> None:
        """Tell what the driver, and the shards that it asked, have spent on a task since this was last told."""
        for who, spent in (("driver", self.clock.take()), ("shard", self.clock.take_helped())):
            if spent.kinds:
                self.event("spent", task=task.stage, who=who, **profiling.facts(spent))

    def _write(self, task: Task, state: str) -> None:
        self.event(
            "task",
            stage=task.stage,
            state=state,
            done=task.done,
            total=task.total,
            what=task.what,
            seconds=round(task.seconds, 3),
            cpu=round(task.cpu, 3),
        )
