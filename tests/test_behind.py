"""One call at a time beside the caller."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from raylux.engine.behind import Behind


def test_calls_run_beside_the_caller_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first goes on until somebody waits for it; when the second is handed over, it has ended."""
    behind, waited, ran, handed = Behind(), threading.Event(), list[str](), list[list[str]]()
    submit, result = ThreadPoolExecutor.submit, Future.result

    def call(name: str) -> str:
        assert waited.wait(30) and threading.current_thread() is not threading.main_thread()
        ran.append(name)
        return name

    monkeypatch.setattr(
        ThreadPoolExecutor, "submit", lambda *args, **how: handed.append([*ran]) or submit(*args, **how)
    )
    monkeypatch.setattr(Future, "result", lambda self, *args: waited.set() or result(self, *args))
    first = behind.call(call, "first")
    assert not ran and not first.done(), "it is under way while the caller goes on"
    second = behind.call(call, name="second")
    assert handed == [[], ["first"]]
    assert (first.result(30), second.result(30)) == ("first", "second")


def test_an_error_is_told_to_whoever_asks_for_the_result_alone() -> None:
    behind = Behind()
    behind.wait()

    def fail() -> None:
        raise OSError("full")

    failed = behind.call(fail)
    behind.wait()
    assert behind.call(int, "7").result(30) == 7
    with pytest.raises(OSError, match="full"):
        failed.result(30)
