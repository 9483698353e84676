"""What a cluster's dashboard answers over HTTP, each question with a bounded time: its version, and what it has.

Ray's own client of the job server waits for ever where nobody answers; here the address, the token and the version
are tried before it is made. Does not import ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any
from urllib.parse import urlsplit

import requests

from raylux.engine import auth
from raylux.engine.capacity import Node
from raylux.errors import UserError

DEFAULT = "http://127.0.0.1:8265"
# Seconds to connect, and between two bytes of an answer.
_PATIENCE = (3.0, 6.0)


@dataclass(frozen=True)
class Dashboard:
    """A dashboard that answered.

    Attributes:
        url: as ``http://HOST:8265``.
        headers: the token; empty where the cluster asks for none.
        ray: the cluster's version of Ray.
    """

    url: str
    headers: dict[str, str]
    ray: str

    def nodes(self) -> list[Node]:
        """The living nodes. Raises UserError."""
        answer = _get(self.url, "/api/v0/nodes?detail=1&limit=10000", self.headers)
        try:
            found = answer["data"]["result"]["result"]
            living = [node for node in found if node["state"] == "ALIVE"]
            return [
                Node(
                    {name: float(size) for name, size in node["resources_total"].items()},
                    {str(name): str(value) for name, value in (node.get("labels") or {}).items()},
                )
                for node in living
            ]
        except (KeyError, TypeError, AttributeError, ValueError):
            raise UserError(f"{self.url}: does not say what its nodes have; is its Ray {version('ray')}?") from None


def reach(address: str) -> Dashboard:
    """Find the dashboard at an address, with the environment's token.

    Raises:
        UserError: no such address, nobody answers in some seconds, no or a wrong token, another version of Ray.
    """
    url = normal(address)
    token, _ = auth.bearer()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    said = _get(url, "/api/version", headers)
    found = said.get("ray_version") if isinstance(said, Mapping) else None
    if not isinstance(found, str):
        raise UserError(f"{url}: answers, but is no Ray dashboard (its usual port is 8265)")
    if found != version("ray"):
        raise UserError(
            f"{url} runs Ray {found}, here is Ray {version('ray')}: they must be the same; "
            f"pip install 'ray[default]=={found}' here, or bring the cluster to {version('ray')}"
        )
    return Dashboard(url, headers, found)


def normal(address: str) -> str:
    """An address as a URL without a path's last slash. Raises UserError for what cannot be a dashboard's address."""
    text = address.strip()
    text = (text if "://" in text else f"http://{text}").rstrip("/")
    how = "give the dashboard's address, as in http://HOST:8265"
    try:
        parts = urlsplit(text)
        port, host = parts.port, parts.hostname
    except ValueError:
        raise UserError(f"{address}: no address; {how}") from None
    if parts.scheme not in ("http", "https"):
        raise UserError(f"{address}: a job cannot be submitted to {parts.scheme}://; {how}")
    if not host or host == "auto" or parts.query or parts.fragment or parts.username:
        raise UserError(f"{address}: no address; {how}")
    return text if port or parts.path or parts.scheme == "https" else f"{text}:8265"


def _get(url: str, path: str, headers: Mapping[str, str]) -> Any:
    """The JSON at a path. Raises UserError."""
    try:
        answer = requests.get(url + path, headers=dict(headers), timeout=_PATIENCE)
    except requests.Timeout as error:
        seconds = _PATIENCE[isinstance(error, requests.ReadTimeout)]
        raise UserError(
            f"{url}: no answer in {seconds:.0f} s; is the cluster up, and can this machine reach it?"
        ) from None
    except (requests.RequestException, ValueError) as error:
        raise UserError(
            f"{url}: no Ray dashboard answers there ({_cause(error)}); is the cluster up, and is this its dashboard's "
            "address (port 8265, not 6379)?"
        ) from None
    if answer.status_code == 401:
        raise UserError(f"{url} asks for a token, and none is named here: {auth.HOW}")
    if answer.status_code == 403:
        where = auth.bearer()[1] or "this environment"
        raise UserError(f"{url} refuses the token of {where}: {auth.HOW}")
    try:
        if answer.ok:
            return answer.json()
    except ValueError:
        pass
    raise UserError(f"{url}: answers {answer.status_code} to {path.partition('?')[0]}; is it a Ray dashboard?")


def _cause(error: BaseException) -> str:
    """The innermost of a chain of errors, for the others quote each other; none of what was answered is quoted."""
    inner = error
    while (next_one := inner.__cause__ or inner.__context__) is not None:
        inner = next_one
    return inner.strerror if isinstance(inner, OSError) and inner.strerror else type(inner).__name__
