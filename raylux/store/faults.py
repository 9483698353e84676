"""What went wrong with the storage, told in one line: where, why, and what to do."""

from __future__ import annotations

import errno

from raylux.errors import UserError

_AGAIN = "run the same command again"
_REASONS = {
    errno.ENOSPC: ("the disk is full", f"free some space and {_AGAIN}"),
    errno.EDQUOT: ("the disk quota is used up", f"free some space and {_AGAIN}"),
    errno.EFBIG: ("the file is larger than the file system or `ulimit -f` allows", f"raise the limit and {_AGAIN}"),
    errno.EROFS: ("the file system is read-only", f"mount it writable and {_AGAIN}, or choose another run.folder"),
    errno.EACCES: ("no permission", f"allow it and {_AGAIN}, or choose another run.folder"),
    errno.EPERM: ("no permission", f"allow it and {_AGAIN}, or choose another run.folder"),
    errno.ENOTDIR: ("a file is in the way", "move it away, or choose another run.folder"),
    errno.EEXIST: ("something else is in the way", "move it away, or choose another run.folder"),
    errno.EISDIR: ("a folder is in the way", "move it away, or choose another run.folder"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a run.folder with a shorter path"),
    errno.EMFILE: ("too many files are open", f"raise `ulimit -n` and {_AGAIN}"),
}


class GivenUpError(OSError):
    """A call to an object store that failed each time it was tried; the message says how often and why."""


def told(place: str, verb: str, error: BaseException) -> UserError:
    """The error that a user sees.

    Args:
        place: the path or URL.
        verb: "written", "read", "listed", "deleted".
        error: what the storage raised.
    """
    code = getattr(error, "errno", None)
    if code is None and isinstance(error, PermissionError):
        code = errno.EACCES
    reason, todo = _REASONS.get(code, ("", "")) if code is not None else ("", "")
    if not reason:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        todo = f"see to the storage and {_AGAIN}"
    return UserError(f"{place}: cannot be {verb}, {reason}: {todo}")
