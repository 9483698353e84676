"""Runs whose folder, corpus and model lie on a real S3 server (Ceph's), in all weathers, and what it may refuse."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import yaml

import raylux
from jobs.faults.inputs import Work
from jobs.object_store import BUCKET, object_store, page, using
from jobs.storage.gateway import Gateway, environment, missing, through
from jobs.storage.weather import FAILURES, Weather
from raylux.api import run
from raylux.cli import main
from raylux.config import Config
from raylux.store import Lease, RunFolder, bucket
from raylux.store.files import Files
from tests.small import Inputs, contents, differing, make_inputs

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(bool(missing()), reason=missing() or "installed")]
pytest.importorskip("s3fs", reason="not installed: s3fs (make object-store)")

TINY = Work(
    documents=40, fitted=40, unit_tokens=1200, unit_size=20, queries=2, layers=1, width=16, probes=4, snapshot=60
)
# The page of docs/results is of 5 % and 200 ms; the kinds of failure are the same.
RATE, LATENCY = 0.08, 0.01


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with Gateway(tmp_path_factory.mktemp("ceph") / "gateway") as found:
        yield found


@pytest.fixture
def there(gateway: Gateway) -> Iterator[Gateway]:
    """This process as the owner of the bucket ``tests``."""
    with using(gateway.env):
        with contextlib.suppress(FileExistsError):
            fsspec.filesystem("s3").mkdir("tests")
        yield gateway


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"), "gpt2", n_layer=1)


def test_in_any_weather_and_killed_a_run_on_an_object_store_has_the_bits_of_a_local_one(
    gateway: Gateway, tmp_path: Path
) -> None:
    outcome = object_store(TINY, tmp_path, gateway, LATENCY, RATE, kills=(0.5,), seed=1)
    for weathered in (outcome.fair, outcome.foul, outcome.killed):
        assert (weathered.differing, weathered.problems) == ([], [])
    assert outcome.arrays > 15 and outcome.starts == 2
    failed = sum(outcome.foul.failed.values())
    assert failed > 3 and set(outcome.foul.failed) <= set(FAILURES)
    # The failed ones were asked again.
    assert outcome.foul.requests >= outcome.fair.requests + failed // 2
    said = page(outcome, TINY, "command", LATENCY, RATE)
    assert f"| {outcome.foul.requests} | {failed} | 0 |" in said
    with using(gateway.env):
        report = fsspec.filesystem("s3").cat_file(f"{BUCKET}/foul/report/index.html").decode()
        assert "q000" in report and report.rstrip().endswith("</html>")
        assert list(raylux.open_run(f"s3://{BUCKET}/foul").top("q001", k=3)["rank"]) == [1, 2, 3]


def test_every_kind_of_path_leads_to_the_same_bits(there: Gateway, inputs: Inputs, tmp_path: Path) -> None:
    usual = contents(inputs.run(tmp_path / "usual").folder)
    system = fsspec.filesystem("s3")
    system.put(str(inputs.model), "tests/in/model", recursive=True)
    for name in ("corpus", "queries"):
        system.put(str(getattr(inputs, name)), f"tests/in/{name}.jsonl")
    for base, folder in (("s3://tests/in", "s3://tests/run"), (f"file://{inputs.base}", f"file://{tmp_path}/run")):
        paths = [f"model.path={base}/model", f"corpus.path={base}/corpus.jsonl", f"queries.path={base}/queries.jsonl"]
        found = inputs.run(folder, *paths)
        assert differing(contents(found.folder), usual) == []
    # A folder of the store as a corpus, and a second command on the same run, which finds all done.
    before = RunFolder("s3://tests/run").units("score")
    inputs.run("s3://tests/run", "corpus.path=s3://tests/in/corpus.jsonl", "model.path=s3://tests/in/model")
    assert RunFolder("s3://tests/run").units("score") == before
    assert main(["inspect", "s3://tests/run"]) == 0 and main(["top", "s3://tests/run", "--query", "a"]) == 0


def test_of_drivers_that_create_a_lease_at_once_one_wins(there: Gateway) -> None:
    """By the server's own conditional write: all of them look before any of them writes."""
    together = threading.Barrier(4)
    usual = bucket.Bucket._create

    def create(self: bucket.Bucket, path: str, whole: bytes) -> None:
        together.wait(30)
        usual(self, path, whole)

    won: list[bool] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bucket.Bucket, "_create", create)
        drivers = [
            threading.Thread(target=lambda n=n: won.append(Files("s3://tests/race").create("lease/1", b"%d" % n)))
            for n in range(4)
        ]
        for driver in drivers:
            driver.start()
        for driver in drivers:
            driver.join()
    assert sorted(won) == [False, False, False, True]


def test_failing_requests_neither_lose_nor_double_anything(there: Gateway) -> None:
    """A third of the requests: objects, lists, exclusive creates and deletes are what they would be without."""
    with Weather(there.url, rate=0.3, seed=2) as weather, using(through(there.env, weather.url)):
        folder = RunFolder("s3://tests/flaky")
        with Lease.take(folder.files, beat=60) as lease:
            assert lease.number == 1
            folder.guard = lease.check
            folder.write_settings({"value": 1})
            for unit in range(3):
                key, objects = folder.write(f"scores/u{unit}", {"a": np.arange(unit + 1)})
                folder.commit("score", f"u{unit}", objects, key=key)
            folder.forget("score", "u1")
            assert folder.sweep()[0] == len(objects)
        assert folder.check(checksums=True) == [] and folder.committed("score") == {"u0", "u2"}
        assert weather.failed.total() > 10


BAD = (
    ("wrong secret", {"AWS_SECRET_ACCESS_KEY": "wrong"}, {}, "no permission"),
    ("unknown key", {"AWS_ACCESS_KEY_ID": "nobody"}, {}, "no permission"),
    ("no keys", {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, {}, "credentials"),
    ("nobody there", {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, {}, "127.0.0.1:1"),
    ("no bucket", {}, {"run.folder": "s3://missing/run"}, "there is no such bucket"),
    ("no name of a bucket", {}, {"run.folder": "s3://Bad_Name/run"}, "s3://Bad_Name/run"),
    ("another's bucket", {}, {"run.folder": "s3://private/run"}, "no permission"),
    (
        "corpus without bucket",
        {},
        {"corpus.path": "s3://missing/corpus.jsonl"},
        "s3://missing/corpus.jsonl: no",
    ),
    ("another's corpus", {}, {"corpus.path": "s3://private/corpus.jsonl"}, "s3://private/corpus.jsonl: cannot be"),
    ("model without bucket", {}, {"model.path": "s3://missing/model"}, "model.path 's3://missing/model'"),
    ("another's model", {}, {"model.path": "s3://private/model"}, "model.path 's3://private/model'"),
    ("queries that are not there", {}, {"queries.path": "s3://tests/no.jsonl"}, "s3://tests/no.jsonl"),
)


@pytest.fixture(scope="module")
def private(gateway: Gateway) -> str:
    """A bucket that belongs to somebody else."""
    with using(gateway.user("somebody")):
        fsspec.filesystem("s3").mkdir("private")
    return "private"


@pytest.mark.parametrize(("env", "keys", "part"), [pytest.param(*case[1:], id=case[0]) for case in BAD])
def test_what_cannot_be_is_one_line(
    there: Gateway,
    private: str,
    inputs: Inputs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    env: dict[str, str],
    keys: dict[str, str],
    part: str,
) -> None:
    # No call may go on for longer than a store is greeted: a wrong word is not asked for a minute.
    monkeypatch.setattr(bucket, "RETRY_SECONDS", 1e6)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(inputs.sections("s3://tests/refused")), encoding="utf-8")
    with using({**there.env, **env}):
        for name in [name for name, value in env.items() if not value]:
            del os.environ[name]
        code = main(["run", str(path), *(f"{key}={value}" for key, value in keys.items())])
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len([line for line in said if "error" in line]) == 1, said
    assert part in said[-1] and len(said[-1]) < 500, said
    assert fsspec.filesystem("s3").find("tests/refused") == []


def test_a_bucket_that_may_only_be_read(there: Gateway, inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    system = fsspec.filesystem("s3")
    system.mkdir("shown")
    statement = {
        "Effect": "Allow",
        "Principal": {"AWS": ["arn:aws:iam:::user/guest"]},
        "Action": ["s3:GetObject", "s3:ListBucket"],
        "Resource": ["arn:aws:s3:::shown", "arn:aws:s3:::shown/*"],
    }
    policy = {"Version": "2012-10-17", "Statement": [statement]}
    guest = there.user("guest")
    system.call_s3("put_bucket_policy", Bucket="shown", Policy=json.dumps(policy))
    run(Config.parse(inputs.sections("s3://shown/run")))
    with using(guest):
        assert main(["top", "s3://shown/run", "--query", "a"]) == 0
        assert "rank" in capsys.readouterr().out
        with pytest.raises(raylux.UserError, match=r"s3://shown/.*cannot be written, no permission \(AccessDenied\)"):
            run(Config.parse(inputs.sections("s3://shown/other")))


def test_the_environment_names_one_user_alone() -> None:
    env = environment("http://127.0.0.1:9", "key", "secret")
    assert env["AWS_ENDPOINT_URL"] == "http://127.0.0.1:9" and env["AWS_SHARED_CREDENTIALS_FILE"] == os.devnull
