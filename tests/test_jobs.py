"""Following a job: nothing twice, nothing lost, and an end to it, whatever the connection does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
import requests

from raylux.engine import jobs
from raylux.engine.jobs import JobServer
from raylux.errors import RayluxError, UserError

LOG = "".join(f"line {place}\n" for place in range(40))


class Client:
    """Ray's client of a job that ends when its whole log was told.

    Each entry of ``connections`` is how many chunks of 7 characters come before the connection "breaks", "closes" or
    falls "silent".
    """

    def __init__(self, *connections: tuple[int, str], status: str = "SUCCEEDED") -> None:
        self.connections, self.status, self.answers = list(connections), status, True
        self.over = False

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        count, ending = self.connections.pop(0) if self.connections else (0, "breaks")
        for place in range(count):
            yield LOG[7 * place : 7 * place + 7]
        if ending == "breaks":
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
        if ending == "silent":
            raise TimeoutError
        self.over = 7 * count >= len(LOG)

    def get_job_info(self, name: str) -> Any:
        if not self.answers:
            raise requests.ConnectionError("gone")
        return SimpleNamespace(
            submission_id=name, status=self.status if self.over else "RUNNING", entrypoint="", message="",
            metadata={}, start_time=1, end_time=2, driver_exit_code=0 if self.over else None,
        )  # fmt: skip

    def get_job_logs(self, name: str) -> str:
        return LOG + "the last word\n"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_POLL", 0.0)
    monkeypatch.setattr(jobs, "_SETTLES", 0.0)


def _server(client: Client) -> JobServer:
    server = object.__new__(JobServer)
    server.url, server._client = "http://stub:8265", client  # type: ignore[assignment]
    return server


@pytest.mark.parametrize(
    "connections",
    [
        [(50, "closes")],
        [(3, "breaks"), (9, "breaks"), (50, "closes")],
        [(5, "silent"), (5, "silent"), (5, "silent"), (5, "silent"), (5, "silent"), (5, "silent"), (50, "closes")],
        [(0, "breaks"), (20, "closes"), (2, "breaks"), (50, "closes")],
    ],
)
def test_a_log_is_passed_on_once_whatever_the_connection_does(quick: None, connections: list[tuple[int, str]]) -> None:
    written: list[str] = []
    job = _server(Client(*connections)).follow("one", written.append)
    assert "".join(written) == LOG + "the last word\n"
    assert (job.status, job.exit_code) == ("SUCCEEDED", 0)


def test_a_server_that_is_gone_is_given_up_and_that_is_no_exit_code_of_the_job(quick: None) -> None:
    client = Client((4, "breaks"))
    client.answers = False
    with pytest.raises(RayluxError, match="lost sight of one") as error:
        _server(client).follow("one", lambda text: None)
    assert not isinstance(error.value, UserError) and error.value.exit_code == 1


@pytest.mark.parametrize(
    ("said", "kind", "part"),
    [
        ("Request failed with status code 400: Job with submission_id one already exists.", jobs.InUseError, "in use"),
        ("Request failed with status code 404: Job one does not exist.", UserError, "no job one"),
        ("Request failed with status code 500: Traceback\n  File", UserError, "500"),
    ],
)
def test_what_ray_says_becomes_a_line(said: str, kind: type[UserError], part: str) -> None:
    with pytest.raises(kind, match=part) as error, _server(Client())._plainly("one"):
        raise RuntimeError(said)
    assert "\n" not in str(error.value)
