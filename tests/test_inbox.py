"""A folder in which query files arrive: taken once, whole, as they were; or put aside, with the reason."""

from __future__ import annotations

import json
import os
from pathlib import Path

import fsspec
import numpy as np
import pytest

from raylux.batch.inbox import Inbox
from raylux.engine.progress import Reporter
from raylux.errors import UserError
from raylux.ledger import ASIDE, TAKEN
from raylux.queries import Query
from raylux.store import RunFolder


def parse(text: str, name: str) -> list[Query]:
    """Words, one query each; "bad" is none."""
    words = text.split()
    if "bad" in words:
        raise UserError(f"{name} query {words.index('bad')}: bad\n\x1b[31m")
    nothing = np.zeros(0, np.int32)
    return [Query(word, "logprob", (), {"id": word}, nothing) for word in words]


class Box:
    """An inbox with a run folder; ``again`` is another driver on both."""

    def __init__(self, base: Path, place: str) -> None:
        self.folder, self.place = RunFolder(str(base / "run")), place
        self.again()

    def again(self) -> Inbox:
        self.inbox = Inbox(self.place, self.folder, parse, Reporter(self.folder, quiet=True))
        return self.inbox

    def asked(self, name: str) -> list[str]:
        return [query.id for query in self.inbox.taken(name).queries]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "files").mkdir()
    return tmp_path / "files"


@pytest.fixture
def box(tmp_path: Path, files: Path) -> Box:
    return Box(tmp_path, str(files))


def test_a_file_is_taken_when_two_looks_find_the_same_bytes(box: Box, files: Path) -> None:
    (files / "one.yaml").write_text("a")
    assert box.inbox.look() == [] and box.inbox.growing
    (files / "one.yaml").write_text("a b")  # it was still being written
    assert box.inbox.look() == [] and box.inbox.growing
    assert box.inbox.look() == ["one.yaml"] and not box.inbox.growing
    assert box.asked("one.yaml") == ["one.yaml/a", "one.yaml/b"]


def test_what_was_taken_is_asked_whatever_becomes_of_the_file(box: Box, files: Path) -> None:
    (files / "one.yaml").write_text("a")
    assert [box.inbox.look(), box.inbox.look()] == [[], ["one.yaml"]]
    os.unlink(files / "one.yaml")
    assert box.inbox.look() == ["one.yaml"] and box.inbox.aside == {}
    assert box.again().look() == ["one.yaml"] and box.asked("one.yaml") == ["one.yaml/a"]


def test_a_file_that_changes_is_put_aside_and_named_until_it_is_put_back(box: Box, files: Path) -> None:
    (files / "one.yaml").write_text("a")
    for _ in range(2):
        box.inbox.look()
    for word in ("b", "c"):
        (files / "one.yaml").write_text(word)
        box.inbox.look()
        assert list(box.inbox.aside) == ["one.yaml"] and "changed after it was taken" in box.inbox.aside["one.yaml"]
    assert box.again().look() == ["one.yaml"] and list(box.inbox.aside) == ["one.yaml"]
    assert box.asked("one.yaml") == ["one.yaml/a"]
    (files / "one.yaml").write_text("a")
    assert box.inbox.look() == ["one.yaml"] and box.inbox.aside == {} and not box.folder.committed(ASIDE)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a bad", "one.yaml query 1: bad"),
        (b"\xff\xfe\x00", "holds a NUL"),
        (b"caf\xe9", "not UTF-8"),
        (b"own", "the run has a query 'one.yaml/own' of its own"),
    ],
)
def test_a_file_that_cannot_be_answered_is_put_aside_with_its_reason(
    box: Box, files: Path, content: bytes, reason: str
) -> None:
    box.folder.commit("queries", "q0", queries=[{"id": "one.yaml/own", "fingerprint": "", "record": {}}])
    box.again()
    (files / "one.yaml").write_bytes(content)
    (files / "two.yaml").write_text("fine")
    for _ in range(2):
        box.inbox.look()
    assert box.inbox.look() == ["two.yaml"]
    said = box.inbox.aside["one.yaml"]
    assert reason in said and said.isprintable()
    committed = box.folder.manifest(ASIDE, "one.yaml")
    assert committed.meta["reason"] == said
    assert box.again().look() == ["two.yaml"] and box.inbox.aside == {"one.yaml": said}
    log = [json.loads(line) for line in Path(box.folder.files.where("progress.jsonl")).read_text().splitlines()]
    assert [event["file"] for event in log if event.get("state") == "aside"] == ["one.yaml"], "it is said once"
    # Corrected, it is taken; removed, it is forgotten.
    (files / "one.yaml").write_text("b")
    for _ in range(2):
        box.inbox.look()
    assert box.inbox.aside == {} and box.folder.committed(TAKEN) == {"one.yaml", "two.yaml"}
    (files / "three.yaml").write_text("bad")
    for _ in range(2):
        box.inbox.look()
    assert list(box.inbox.aside) == ["three.yaml"]
    os.unlink(files / "three.yaml")
    box.inbox.look()
    assert box.inbox.aside == {} and not box.folder.committed(ASIDE)


def test_what_is_no_query_file_is_left_alone(box: Box, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (".hidden.yaml", "notes.txt", "one.yaml.part"):
        (files / name).write_text("a")
    (files / "folder.yaml").mkdir()
    os.mkfifo(files / "pipe.yaml")
    for _ in range(3):
        assert box.inbox.look() == [] and not box.inbox.growing
    assert box.inbox.aside == {}
    monkeypatch.setattr("raylux.batch.inbox._LARGEST", 3)
    (files / "large.yaml").write_text("a b c")
    box.inbox.look()
    assert "5 bytes are too many" in box.inbox.aside["large.yaml"]


def test_a_prefix_of_a_store_is_looked_into_alike(tmp_path: Path) -> None:
    """An object is whole when it is there: it is taken at the first look."""
    place = f"memory://{tmp_path.name}/inbox"
    box = Box(tmp_path, place)
    assert box.inbox.look() == []
    for name, text in (("one.json", "a"), ("two.json", "bad"), ("deep/three.json", "c"), ("notes.txt", "d")):
        with fsspec.open(f"{place}/{name}", "w") as file:
            file.write(text)
    assert box.inbox.look() == ["one.json"] and list(box.inbox.aside) == ["two.json"]
    with fsspec.open(f"{place}/one.json", "w") as file:
        file.write("b")
    assert box.inbox.look() == ["one.json"] and set(box.inbox.aside) == {"one.json", "two.json"}
    assert box.asked("one.json") == ["one.json/a"]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder; query files are looked for there"):
        Box(tmp_path, str(tmp_path / "nowhere"))
