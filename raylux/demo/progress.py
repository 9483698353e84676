"""A progress bar for the training where there is a terminal, a plain line now and then where there is none."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_LINES = 10


class TrainingProgress:
    """Shows step, time left and loss; used as a context manager around the training."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> TrainingProgress:
        if self._console.is_terminal:
            columns = (TextColumn("  training"), BarColumn(), TextColumn("loss {task.fields[loss]:.2f}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console, transient=True)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, steps: int, loss: float) -> None:
        """Take note of a step, with its loss per token in nats."""
        if self._bar is None:
            if step * _LINES // steps > (step - 1) * _LINES // steps:
                self._console.print(f"  training: step {step} of {steps}, loss {loss:.2f} per token", markup=False)
            return
        if self._task is None:
            self._task = self._bar.add_task("training", total=steps, loss=loss)
        self._bar.update(self._task, completed=step, loss=loss)
