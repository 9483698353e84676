"""Names of jobs: a submission id says which run it works on and the how manieth attempt it is.

    raylux-quickstart-3f2a9c1b04-2
           │          │          └ attempt, from 1
           │          └ hash of run.folder
           └ last part of run.folder, for people

So one run folder has one row of jobs, whoever submits, and an id that is used twice is an error of the server.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

_LONGEST = 40


def run_name(folder: str) -> str:
    """The part of a submission id that stands for a run folder.

    Args:
        folder: absolute path or URL; a last slash makes no difference.
    """
    place = folder.rstrip("/") or "/"
    slug = re.sub(r"[^a-z0-9]+", "-", place.rpartition("/")[2].lower()).strip("-")[:_LONGEST].strip("-")
    return f"raylux-{slug or 'run'}-{hashlib.sha256(place.encode()).hexdigest()[:10]}"


def submission_id(folder: str, attempt: int) -> str:
    """The id of an attempt (from 1) at a run folder."""
    return f"{run_name(folder)}-{attempt}"


def attempt_of(name: str, folder: str) -> int:
    """Which attempt at a run folder a submission id is; 0: none."""
    found = re.fullmatch(re.escape(run_name(folder)) + r"-([1-9][0-9]{0,8})", name)
    return int(found[1]) if found else 0


def next_attempt(names: Iterable[str], folder: str) -> int:
    """One more than the highest attempt at a run folder among submission ids."""
    return 1 + max((attempt_of(name, folder) for name in names), default=0)
