"""A folder (or prefix) in which query files arrive: what is new, what changed, what is no query file.

A file is *taken* in one commit with a copy of its bytes; from then on the copy is what is asked, whatever becomes of
the file. What cannot be taken is *put aside*: it stays where it is, the ledger has the reason, and it is looked at
again when its bytes change.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from raylux.engine.progress import Reporter
from raylux.engine.stages import queries as own_queries
from raylux.engine.stages.answers import AskedFile, full_id
from raylux.errors import UserError
from raylux.ledger import ASIDE, TAKEN
from raylux.queries import Query
from raylux.readers import check_name
from raylux.sources import decode_utf8
from raylux.store import Files, RunFolder

SUFFIXES = (".yaml", ".yml", ".json", ".jsonl", ".ndjson")
# A query file is some kilobytes: anything larger is another file.
_LARGEST = 64 << 20

Parse = Callable[[str, str], list[Query]]
"""Text and name of a query file -> its queries; raises UserError."""


class Inbox:
    """Looks into the folder, again and again.

    Args:
        place: local path or fsspec URL; files right under it count, hidden ones do not.
        folder: the run, whose lease the caller holds.
        parse: of a file's text.
        reporter: told what is put aside.

    Raises:
        UserError: there is no such folder, or it cannot be listed.
    """

    def __init__(self, place: str, folder: RunFolder, parse: Parse, reporter: Reporter) -> None:
        self._files, self._folder, self._parse, self._reporter = Files(place), folder, parse, reporter
        if not self._files.remote and not os.path.isdir(self._files.place):
            raise UserError(f"{place}: no such folder; query files are looked for there")
        self._own = {entry["id"] for entry in own_queries.records(folder)}
        self._taken = {name: manifest.meta["digest"] for name, manifest in folder.units(TAKEN).items()}
        self.aside: dict[str, str] = {name: manifest.meta["reason"] for name, manifest in folder.units(ASIDE).items()}
        self._refused = {name: manifest.meta["digest"] for name, manifest in folder.units(ASIDE).items()}
        # What was seen of each file, and of those that may still be written: their bytes.
        self._stamps: dict[str, str] = {}
        self._growing: dict[str, bytes] = {}
        self._left_alone: set[str] = set()

    @property
    def growing(self) -> list[str]:
        """Files that may still be written: one is taken when a second look finds the same bytes."""
        return sorted(self._growing)

    def look(self) -> list[str]:
        """Take what is new and whole; names of what was taken by now, sorted."""
        stamps = self._files.stamps("")
        for name in sorted(stamps):
            if name.startswith("."):
                continue
            if PurePosixPath(name).suffix.lower() not in SUFFIXES:
                self._leave_alone(name)
            elif self._stamps.get(name) != stamps[name] or name in self._growing:
                self._seen(name, stamps[name])
        for name in set(self.aside) - set(stamps):
            self._settled(name)
        self._stamps = {name: stamp for name, stamp in self._stamps.items() if name in stamps}
        self._growing = {name: data for name, data in self._growing.items() if name in stamps}
        return sorted(self._taken)

    def taken(self, name: str) -> AskedFile:
        """A file as it was when it was taken. Raises DamagedError where its copy is not what was written."""
        manifest = self._folder.manifest(TAKEN, name)
        data = self._folder.read(manifest, manifest.meta["key"])
        return AskedFile(name, manifest.meta["digest"], tuple(self._asked(name, data)))

    def put_aside(self, name: str, digest: str, reason: str, **facts: Any) -> None:
        """Name a file that is not answered, with the reason, and leave it where it is."""
        if self._refused.get(name) == digest and self.aside.get(name) == reason:
            return
        self.aside[name], self._refused[name] = reason, digest
        self._folder.commit(ASIDE, name, digest=digest, reason=reason, **facts)
        self._reporter.say(f"put aside: {name}: {reason}")
        self._reporter.event("batch", state="aside", file=name, reason=reason)

    def _seen(self, name: str, stamp: str) -> None:
        try:
            data = self._read(name)
        except FileNotFoundError:  # it went while we looked
            return
        except UserError as error:
            self._stamps[name] = stamp
            self.put_aside(name, "", str(error))
            return
        digest = hashlib.blake2b(data, digest_size=16).hexdigest()
        if name in self._taken:
            self._compare(name, digest)
        elif self._refused.get(name) == digest:
            pass
        elif not self._files.remote and self._growing.get(name) != data:
            # An object of a store is whole when it is there; a file may be half written.
            self._growing[name] = data
            return
        else:
            self._take(name, digest, data)
        self._growing.pop(name, None)
        self._stamps[name] = stamp

    def _read(self, name: str) -> bytes:
        size = self._files.size(name) or 0
        if size > _LARGEST:
            raise UserError(f"{size:,} bytes are too many for a query file; is it another file?")
        return self._files.get(name)

    def _take(self, name: str, digest: str, data: bytes) -> None:
        try:
            asked = self._asked(name, data)
            both = [query.id for query in asked if query.id in self._own]
            if both:
                raise UserError(f"the run has a query '{both[0]}' of its own; give the file another name")
        except UserError as error:
            self.put_aside(name, digest, str(error))
            return
        key, objects = self._folder.put("batch/queries", PurePosixPath(name).suffix.lower(), data)
        self._folder.commit(TAKEN, name, objects, key=key, digest=digest)
        self._taken[name] = digest
        self._settled(name)
        self._reporter.event("batch", state="taken", file=name, queries=len(asked))

    def _compare(self, name: str, digest: str) -> None:
        if digest == self._taken[name]:
            self._settled(name)
        else:
            reason = "changed after it was taken; what it asked then is answered: give what it asks now another name"
            self.put_aside(name, digest, reason)

    def _settled(self, name: str) -> None:
        """Nothing is wrong with a file any more: it was corrected, put back or removed."""
        if self.aside.pop(name, None) is not None:
            del self._refused[name]
            self._folder.forget(ASIDE, name)

    def _leave_alone(self, name: str) -> None:
        if name not in self._left_alone:
            self._left_alone.add(name)
            self._reporter.say(f"{name}: left alone, a query file ends in {', '.join(SUFFIXES)}")

    def _asked(self, name: str, data: bytes) -> list[Query]:
        check_name(name, "the file's name")
        asked = self._parse(decode_utf8(data, name), name)
        return [replace(query, id=full_id(name, query.id)) for query in asked]
