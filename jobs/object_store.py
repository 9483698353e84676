"""A run whose folder, corpus and model lie on an object store, in fair and in foul weather, against a local one.

The store is Ceph's S3 gateway on this machine (`make object-store` installs it), with a proxy in front of it that adds
latency and lets requests fail. The same config runs in process with a local folder; at the store undisturbed; at the
store with slow and failing requests; and, as a process of its own, killed at commits and started again.

    python -m jobs.object_store --write docs/results/object-store.md
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import fsspec
import torch

from jobs.faults.driver import Driver
from jobs.faults.inputs import Work, write_config, write_inputs
from jobs.faults.verdict import count, differing, problems
from jobs.storage.gateway import Gateway, missing, through
from jobs.storage.weather import FAILURES, Weather
from raylux.api import run
from raylux.config import Config

BUCKET = "raylux"
FULL = Work(
    documents=200, fitted=150, unit_tokens=2000, unit_size=60, queries=4, layers=2, width=64, probes=8, snapshot=60
)
_PATIENCE = 600.0


@dataclass(frozen=True)
class Weathered:
    """One run at the store.

    Attributes:
        seconds: of the run alone.
        requests: that reached the proxy.
        failed: kind -> so many of them failed.
        differing: names of arrays whose bits are not those of the local run.
        problems: of the ledger.
    """

    seconds: float
    requests: int
    failed: Mapping[str, int]
    differing: list[str]
    problems: list[str]

    @property
    def good(self) -> bool:
        return not (self.differing or self.problems)


@dataclass(frozen=True)
class Outcome:
    """What the runs showed.

    Attributes:
        local: seconds of the local run.
        arrays: compared.
        fair: at the store, undisturbed.
        foul: with slow and failing requests.
        killed: with kills, all its processes and their starts together.
        starts: of the driver that was killed.
    """

    local: float
    arrays: int
    fair: Weathered
    foul: Weathered
    killed: Weathered
    starts: int

    @property
    def good(self) -> bool:
        return self.fair.good and self.foul.good and self.killed.good


@contextmanager
def using(env: Mapping[str, str]) -> Iterator[None]:
    """This process as a user of the store: fsspec keeps the connections of an environment that is over."""
    system = fsspec.get_filesystem_class("s3")
    with patch.dict(os.environ, env):
        system.clear_instance_cache()
        yield
    system.clear_instance_cache()


def object_store(
    work: Work, base: Path, gateway: Gateway, latency: float, rate: float, kills: Sequence[float], seed: int = 0
) -> Outcome:
    """Run locally, at the store, in foul weather, and with kills.

    Args:
        work: how much there is to do.
        base: a folder for the inputs and what is local.
        gateway: a fresh one.
        latency: seconds that each request takes more.
        rate: share of requests that fail.
        kills: after which shares of the commits the driver is killed.
        seed: of the failures.
    """
    sections = write_inputs(base / "inputs", work)
    usual = base / "usual"
    local, _ = _timed(_config(base, sections, str(usual)))
    with using(gateway.env):
        there = _upload(base / "inputs", sections)
    with Weather(gateway.url) as fair:
        commits: list[str] = []
        fair.watch = lambda method, path: commits.append(path) if _is_commit(method, path) else None
        first = _weathered(gateway, fair, _config(base, there, f"s3://{BUCKET}/fair"), usual)
    with Weather(gateway.url, latency, rate, seed) as foul:
        second = _weathered(gateway, foul, _config(base, there, f"s3://{BUCKET}/foul"), usual)
    with Weather(gateway.url) as deadly:
        config = _config(base, there, f"s3://{BUCKET}/killed")
        driver = Driver(config, {**os.environ, **through(gateway.env, deadly.url)}, base / "killed.log")
        third = _killed(gateway, deadly, driver, [max(1, int(share * len(commits))) for share in kills], usual)
    return Outcome(local, count(usual), first, second, third, driver.starts)


def _config(base: Path, sections: dict[str, Any], folder: str) -> Path:
    return write_config(base / f"{folder.rsplit('/', 1)[-1]}.yaml", sections, folder, backend="local")


def _upload(inputs: Path, sections: dict[str, Any]) -> dict[str, Any]:
    """Put the inputs into the bucket; the sections with their new paths."""
    system = fsspec.filesystem("s3")
    system.mkdir(BUCKET)
    moved = {**sections}
    for name in ("model", "corpus", "queries"):
        path = Path(sections[name]["path"])
        url = f"s3://{BUCKET}/{path.relative_to(inputs)}"
        system.put(str(path), url, recursive=path.is_dir())
        moved[name] = {**sections[name], "path": url}
    return moved


def _timed(config: Path) -> tuple[float, str]:
    loaded, started = Config.load(config), time.monotonic()
    run(loaded)
    return time.monotonic() - started, loaded.run.folder


def _weathered(gateway: Gateway, weather: Weather, config: Path, usual: Path) -> Weathered:
    # An empty cache: the model is brought from the store in every weather.
    with (
        tempfile.TemporaryDirectory() as cache,
        using({**through(gateway.env, weather.url), "RAYLUX_CACHE": cache}),
    ):
        seconds, folder = _timed(config)
        requests, failed = weather.requests.total(), dict(weather.failed)
    return _judged(gateway, seconds, requests, failed, folder, usual)


def _killed(gateway: Gateway, weather: Weather, driver: Driver, commits: list[int], usual: Path) -> Weathered:
    left, seen = sorted(commits), 0

    def watch(method: str, path: str) -> None:
        nonlocal seen
        seen += _is_commit(method, path)
        if left and seen >= left[0]:
            left.pop(0)
            driver.kill()

    weather.watch = watch
    started = time.monotonic()
    for _ in range(len(commits) + 1):
        driver.start()
        driver.wait(_PATIENCE)
        if driver.code == 0:
            break
    if driver.code != 0 or left:
        raise RuntimeError(f"the driver ended with {driver.code} after {seen} commits:\n{driver.said()}")
    seconds, requests = time.monotonic() - started, weather.requests.total()
    return _judged(gateway, seconds, requests, {}, f"s3://{BUCKET}/killed", usual)


def _judged(
    gateway: Gateway, seconds: float, requests: int, failed: Mapping[str, int], folder: str, usual: Path
) -> Weathered:
    with using(gateway.env):
        return Weathered(seconds, requests, failed, differing(folder, usual), problems(folder))


def _is_commit(method: str, path: str) -> bool:
    return method == "PUT" and "/ledger/" in path


def page(outcome: Outcome, work: Work, command: str, latency: float, rate: float) -> str:
    """The page of docs/results."""
    kinds = ", ".join(f"{outcome.foul.failed.get(kind, 0)} {kind}" for kind in FAILURES)
    rows: list[tuple[str, float, Weathered | None]] = [
        ("local disk", outcome.local, None),
        ("store, undisturbed", outcome.fair.seconds, outcome.fair),
        (f"store, {latency * 1000:g} ms and {rate:.0%} failing", outcome.foul.seconds, outcome.foul),
    ]
    table = "\n".join(
        f"| {name} | {seconds:.1f} | {seconds / outcome.local:.1f} | {at.requests if at else ''} | "
        f"{sum(at.failed.values()) if at else ''} | {len(at.differing) if at else ''} |"
        for name, seconds, at in rows
    )
    killed = outcome.killed
    return f"""# A run on an object store

    {command}

The store is **Ceph's RADOS Gateway** (Debian's `radosgw`, a real S3 server, over one monitor and one OSD in memory)
on this machine, with a proxy on loopback in front of it. Run folder, corpus, queries and model are on `s3://`: a GPT-2
with random weights ({work.layers} layers, width {work.width}), {work.documents} openings of Wikipedia articles,
{work.fitted} sequences fitted, {work.queries} queries against all, one thread, in process, report and all. The proxy
delays each request, and a share of them fails in one of five ways: answered 503 or 500, connection reset before the
server sees the request, answer lost after the server did what was asked, answer cut in the middle.

| run | s | of local | requests | failed | arrays that differ |
|---|---:|---:|---:|---:|---:|
{table}

{outcome.arrays} arrays were compared bit by bit. Of the failures, {kinds}.

Killed (SIGKILL) at {outcome.starts - 1} commits and started again by the same command, {outcome.starts} processes in
all: {len(killed.differing)} arrays differ, and the ledger has {len(killed.problems)} problems.

The time goes into waiting: {outcome.foul.requests} requests, each {latency * 1000:g} ms late, most of them one after
the other; the small objects of a group and the entries of the ledger travel side by side. So many requests belong to so
many units, layers and blocks of queries, however long those compute: the work here takes {outcome.local:.0f} s, and
where a unit computes for a minute the share of waiting is small. Seconds are of one run each, on cores that others
may have used meanwhile.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write the page; 1 where a bit differs, 2 where there is no gateway."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=0.2, help="seconds that each request takes more")
    parser.add_argument("--rate", type=float, default=0.05, help="share of requests that fail")
    parser.add_argument("--seed", type=int, default=0, help="of the failures")
    parser.add_argument("--write", type=Path, help="write the page here, as docs/results/object-store.md")
    options = parser.parse_args(arguments)
    if reason := missing():
        print(reason, file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="raylux-store-") as temporary:
        base = Path(temporary)
        with Gateway(base / "gateway") as gateway:
            outcome = object_store(FULL, base, gateway, options.latency, options.rate, (0.3, 0.7), options.seed)
    command = f"python -m jobs.object_store --latency {options.latency:g} --rate {options.rate:g} --seed {options.seed}"
    text = page(outcome, FULL, command, options.latency, options.rate)
    print(text)
    if options.write:
        options.write.write_text(text, encoding="utf-8")
    return 0 if outcome.good else 1


if __name__ == "__main__":
    sys.exit(main())
