"""What raylux doctor finds: each check says ok where all is well, and names what is not and what to do."""

from __future__ import annotations

import gzip
import json
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import yaml
from fsspec import AbstractFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from raylux.cli import main
from raylux.doctor import FAIL, OK, WARN, Finding, answer, examine, storage, versions
from raylux.doctor.case import Case
from raylux.doctor.cluster import resources
from raylux.doctor.finding import NotChecked, guarded
from raylux.doctor.need import need
from raylux.errors import UserError
from tests.small import CUT, SEQUENCES, Inputs, make_inputs, write_lines

# A run without Ray, on a processor.
ORDER = "config versions auth ray model queries corpus resources disk store answer".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("doctor"), "gpt2")


@pytest.fixture
def inputs(model: Inputs, tmp_path: Path) -> Inputs:
    """Good input, its files this test's own."""
    own = Inputs(tmp_path / "inputs")
    own.base.mkdir()
    own.model.symlink_to(model.model)
    own.corpus.write_bytes(model.corpus.read_bytes())
    own.queries.write_bytes(model.queries.read_bytes())
    return own


def _config(inputs: Inputs, run: str | Path, **more: dict[str, Any]) -> str:
    path = inputs.base / "config.yaml"
    path.write_text(yaml.safe_dump(inputs.sections(run, **more)), encoding="utf-8")
    return str(path)


def case_of(inputs: Inputs, run: str | Path, *overrides: str) -> Case:
    return Case(_config(inputs, run), overrides)


def _by_name(findings: Iterator[Finding]) -> dict[str, Finding]:
    found = list(findings)
    assert len({one.name for one in found}) == len(found)
    return {one.name: one for one in found}


def _tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# ------------------------------------------------------------------------------------------ as a whole


def test_good_input_is_ok_throughout_and_nothing_is_left(inputs: Inputs, tmp_path: Path) -> None:
    config = _config(inputs, tmp_path / "deep" / "run")
    before = _tree(tmp_path)
    found = _by_name(examine(config))
    assert list(found) == ORDER
    assert {name: one for name, one in found.items() if one.state != OK} == {}
    assert _tree(tmp_path) == before


def test_the_command_prints_one_line_each_and_ends_in_0(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", _config(inputs, tmp_path / "run")]) == 0
    said = capsys.readouterr()
    assert [line.split()[:2] for line in said.out.splitlines()] == [["ok", name] for name in ORDER]
    assert said.err == ""


def test_what_a_worker_holds_of_its_weights_is_said(inputs: Inputs, tmp_path: Path) -> None:
    """Where it is read from disk; and a map that cannot be is what is wrong with the resources."""
    case = case_of(inputs, tmp_path / "run", 'model.device_map={"": cpu, transformer.h: disk}')
    assert re.search(r"; weights of a worker: [0-9.]+ GiB on cpu, [0-9.]+ GiB read each time", resources(case).detail)
    placed = case.placement_on("cpu")
    assert placed is not None and len(placed.reads) == 2
    whole = case_of(inputs, tmp_path / "run").demand.worker_bytes
    assert whole - case.demand.worker_bytes == 4 * (case.model.coverage.parameters - placed.held("cpu"))
    with pytest.raises(UserError, match=r"no module 'h'"):
        resources(case_of(inputs, tmp_path / "run", "model.device_map={h: disk}"))


def test_a_mistake_is_one_fail_and_what_rests_on_it_is_not_checked(inputs: Inputs, tmp_path: Path) -> None:
    found = _by_name(examine(_config(inputs, tmp_path / "run", model={"path": str(tmp_path / "nowhere")})))
    assert [name for name, one in found.items() if one.state == FAIL] == ["model"]
    assert "nowhere" in found["model"].detail
    skipped = [name for name, one in found.items() if one.state == WARN]
    assert skipped == ["queries", "corpus", "resources", "disk"]
    assert all("needs the model" in found[name].detail for name in skipped)
    assert found["store"].state == found["answer"].state == OK


def test_a_config_that_cannot_be_read_leaves_the_checks_of_this_machine(tmp_path: Path) -> None:
    found = _by_name(examine(str(tmp_path / "no.yaml")))
    assert list(found) == ["config", "versions", "auth", "ray", "answer"]
    assert found["config"].state == FAIL and "no such config file" in found["config"].detail


def test_the_command_ends_in_2_where_something_failed(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", _config(inputs, tmp_path / "run"), "prefilter.topp=3"]) == 2
    said = capsys.readouterr()
    (line,) = [line for line in said.out.splitlines() if line.startswith("FAIL")]
    assert "did you mean 'top'" in line
    assert said.err == "raylux: 1 check failed\n"


@pytest.mark.parametrize(
    ("error", "state", "said"),
    [
        (UserError("x: gone; do y"), FAIL, "x: gone; do y"),
        (ZeroDivisionError("nobody foresaw\nthis"), FAIL, "ZeroDivisionError: nobody foresaw"),
        (NotChecked("model"), WARN, "it needs the model"),
    ],
)
def test_a_check_that_breaks_is_a_finding(error: Exception, state: str, said: str) -> None:
    def check() -> Finding:
        raise error

    (found,) = guarded("thing", check)
    assert (found.name, found.state) == ("thing", state)
    assert said in found.detail
    assert "this" not in found.detail


# ------------------------------------------------------------------------------------------ user's input


@pytest.mark.parametrize(
    ("name", "says", "rest"),
    [("queries", "'completion'", {"resources", "disk"}), ("corpus", "'text'", {"disk"})],
)
def test_bad_files_are_named(inputs: Inputs, tmp_path: Path, name: str, says: str, rest: set[str]) -> None:
    if name == "queries":
        write_lines(inputs.queries, [{"id": "q", "prompt": "anna"}])
    else:
        rows = [json.loads(line) for line in inputs.corpus.read_text(encoding="utf-8").splitlines()]
        del rows[2]["text"]
        write_lines(inputs.corpus, rows)
    found = _by_name(examine(_config(inputs, tmp_path / "run")))
    assert found[name].state == FAIL
    assert says in found[name].detail
    assert {other for other, one in found.items() if one.state == WARN} == rest


def test_trusted_code_is_pointed_out(inputs: Inputs, tmp_path: Path) -> None:
    found = _by_name(examine(_config(inputs, tmp_path / "run", model={"trust_remote_code": True})))
    assert found["model"].state == WARN
    assert "trust_remote_code" in found["model"].advice


# ---------------------------------------------------------------------------------------------- versions


@pytest.mark.parametrize(
    ("found", "floor", "older"),
    [("2.6", "2.13", True), ("2.13.0+cpu", "2.13", False), ("3", "3.0.0", False), ("0.9.9", "0.10", True)],
)
def test_versions_compare_by_number(found: str, floor: str, older: bool) -> None:
    assert versions.older(found, floor) is older


def test_an_old_and_a_missing_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["torch>=99.1", "no-such-package>=1", "zarr>=3", 'gguf>=99; extra == "gguf"', 'ruff>=99; extra == "dev"']
    monkeypatch.setattr(versions, "requires", lambda name: asked)
    found = versions.check(None)
    assert found.state == FAIL
    assert "torch 2" in found.detail and "older than 99.1" in found.detail
    assert "no-such-package is not installed" in found.detail
    assert found.advice == "pip install --upgrade 'torch>=99.1' 'no-such-package>=1'"


def test_an_extra_counts_where_the_config_needs_it(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "requires", lambda name: ['s3fs>=9999; extra == "s3"'])
    assert versions.check(case_of(inputs, tmp_path / "run")).state == OK
    found = versions.check(case_of(inputs, "s3://bucket/run"))
    assert found.state == FAIL
    assert "raylux[s3]" in found.advice


# ------------------------------------------------------------------------------------------------- disk


def test_the_need_is_that_of_the_run(inputs: Inputs, tmp_path: Path) -> None:
    """An estimate of 0.7 to 3 times the bytes of the arrays that a run writes; Zarr's own files apart."""
    folder = tmp_path / "run"
    case = case_of(inputs, folder, *CUT)
    wanted = need(case)
    assert wanted.documents == SEQUENCES
    inputs.run(folder)
    for part, want in (("factors", wanted.factors), ("queries", wanted.queries), ("scores", wanted.scores)):
        files = [path for path in (folder / part).rglob("*") if path.is_file() and path.name != "zarr.json"]
        assert 0.7 <= want / sum(path.stat().st_size for path in files) <= 3, part


def test_a_long_corpus_is_judged_by_its_first_rows(inputs: Inputs, tmp_path: Path) -> None:
    rows = [{"id": str(place), "shelf": 0, "text": "anna bought the red boat " * 8} for place in range(3000)]
    write_lines(inputs.corpus, rows)
    whole = need(case_of(inputs, tmp_path / "run"))
    assert whole.documents is not None and 2700 < whole.documents < 4000
    limited = need(case_of(inputs, tmp_path / "run", "corpus.limit=300"))
    assert limited.documents == 300 and 5 * limited.corpus < whole.corpus
    packed = inputs.base / "corpus.jsonl.gz"
    packed.write_bytes(gzip.compress(inputs.corpus.read_bytes()))
    # How far it unpacks cannot be known; it is not taken for less than it has on disk.
    unpacked = need(case_of(inputs, tmp_path / "run", f"corpus.path={packed}"))
    assert unpacked.documents is not None and unpacked.corpus > packed.stat().st_size


def test_too_little_room_fails_with_the_numbers(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of(inputs, tmp_path / "run")
    total = need(case).total
    for free, state in ((total - 1, FAIL), (total + 1, WARN), (2 * total, OK)):
        usage = type("Usage", (), {"free": free})
        monkeypatch.setattr("shutil.disk_usage", lambda place, usage=usage: usage)
        found = storage.disk(case)
        assert found.state == state, found
        assert "KiB free" in found.detail and "factors" in found.detail


# ------------------------------------------------------------------------------------------------ store


def test_a_place_that_is_a_file_fails(inputs: Inputs, tmp_path: Path) -> None:
    """Permissions bind no superuser, a file in the way binds everybody."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("else")
    found = storage.store(case_of(inputs, tmp_path / "full"))
    assert found.state == FAIL and "holds no run" in found.detail
    (refused,) = guarded("store", lambda: storage._try_local(tmp_path / "full" / "something"))
    assert refused.state == FAIL and "cannot write" in refused.detail


class _NoRename(MemoryFileSystem):
    """An object store that takes, gives and deletes, and renames nothing."""

    protocol = "norename"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012

    cp_file = AbstractFileSystem.cp_file  # fsspec's own, which does nothing but refuse


class _Forgetful(_NoRename):
    """One that loses the last byte."""

    protocol = "forgetful"

    def cat_file(self, path: str, *args: Any, **kwargs: Any) -> bytes:
        return bytes(super().cat_file(path, *args, **kwargs))[:-1]


class _ReadOnly(_NoRename):
    protocol = "readonly"

    def pipe_file(self, *args: Any, **kwargs: Any) -> None:
        raise PermissionError("Access Denied for s3://KEY:SECRETSECRET@host")


for kind in (_NoRename, _Forgetful, _ReadOnly):
    fsspec.register_implementation(kind.protocol, kind, clobber=True)


@pytest.mark.parametrize(
    ("protocol", "state", "said"),
    [
        ("memory", OK, "write, rename, read, delete"),
        ("norename", OK, "refuses to rename"),
        ("forgetful", FAIL, "not what was written"),
        ("readonly", FAIL, "Access Denied"),
    ],
)
def test_a_store_behind_a_url_is_tried_too(inputs: Inputs, protocol: str, state: str, said: str) -> None:
    system = fsspec.filesystem(protocol)
    base = f"{uuid.uuid4().hex}/run"
    found = storage.store(case_of(inputs, f"{protocol}://{base}"))
    assert (found.state, said in found.detail) == (state, True), found
    assert not system.exists(base)


def test_a_folder_that_was_there_stays(inputs: Inputs, tmp_path: Path) -> None:
    url = f"memory://{uuid.uuid4().hex}/run"
    fsspec.filesystem("memory").makedirs(url)
    assert storage.store(case_of(inputs, url)).state == OK
    assert fsspec.filesystem("memory").ls(url) == []
    (tmp_path / "run").mkdir()
    assert storage.store(case_of(inputs, tmp_path / "run")).state == OK
    assert list((tmp_path / "run").iterdir()) == []


# ------------------------------------------------------------------------------------------------ answer


def test_the_tiny_run_agrees_with_autograd_far_within_the_bound() -> None:
    found = answer.check()
    assert found.state == OK
    error = float(found.detail.split(" by ")[1].split()[0])
    assert error < 1e-9


@pytest.mark.parametrize("spoil", [lambda x: x * (1 + 1e-5), lambda x: -x, lambda x: x[:, ::-1], lambda x: x * np.nan])
def test_other_scores_than_the_known_ones_fail(spoil: Any) -> None:
    expected = answer.reference(answer._model(), answer._sequences(), answer._asked())
    assert answer.judge(expected, expected).state == OK
    found = answer.judge(spoil(expected), expected)
    assert found.state == FAIL and "do not trust" in found.advice


def test_other_weights_than_the_model_had_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run and the reference do not share their numbers: a weight that is off by a thousandth shows."""
    run = answer._run

    def other(model: Any, *rest: Any) -> np.ndarray:
        model.transformer.h[0].mlp.c_fc.weight[0, 0] += 1e-3
        try:
            return run(model, *rest)
        finally:
            model.transformer.h[0].mlp.c_fc.weight[0, 0] -= 1e-3

    monkeypatch.setattr(answer, "_run", other)
    assert answer.check().state == FAIL


def test_the_users_cache_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAYLUX_CACHE", str(tmp_path / "cache"))
    assert answer.check().state == OK
    assert os.environ["RAYLUX_CACHE"] == str(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
