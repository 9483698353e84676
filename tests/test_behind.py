"""One call at a time beside the caller."""

from __future__ import annotations

import threading

import pytest

from raylux.engine.behind import Behind


def test_calls_run_beside_the_caller_one_after_the_other() -> None:
    behind, go, seen = Behind(), threading.Event(), list[object]()

    def call(name: str) -> str:
        go.wait(30)
        seen.append((name, threading.current_thread() is threading.main_thread()))
        return name

    first = behind.call(call, "first")
    assert not seen, "it is under way while the caller goes on"
    threading.Timer(0.05, go.set).start()
    second = behind.call(call, name="second")
    assert seen[0] == ("first", False), "the second is handed over when the first has ended"
    assert (first.result(30), second.result(30)) == ("first", "second")
    assert seen == [("first", False), ("second", False)]


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
