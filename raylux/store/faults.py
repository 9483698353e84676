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


# What a store's client library raises before it asks: there is nothing that asking again would change.
_UNASKABLE = {
    "DefaultCredentialsError",
    "InvalidRegionError",
    "NoCredentialsError",
    "ParamValidationError",
    "PartialCredentialsError",
    "ProfileNotFound",
}
_UNASKABLE_CODES = {"InvalidBucketName", "PreconditionFailed", "PermanentRedirect", "AuthorizationHeaderMalformed"}


def code_of(error: BaseException) -> str:
    """What an S3 server calls its refusal (``AccessDenied``, ``NoSuchBucket``); empty where it did not say.

    s3fs turns it into a Python exception and keeps botocore's own as the cause.
    """
    for found in (error, error.__cause__):
        answer = getattr(found, "response", None)
        if isinstance(answer, dict):
            return str(answer.get("Error", {}).get("Code", ""))
    return ""


def unaskable(error: BaseException) -> bool:
    """Whether asking an object store once more would change nothing, whatever Python exception this came as."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & _UNASKABLE) or code_of(error) in _UNASKABLE_CODES


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
    if code is None or code_of(error) or unaskable(error):
        return _told_of_store(place, verb, error)
    reason, todo = _REASONS.get(code, ("", "")) if code is not None else ("", "")
    if not reason:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        todo = f"see to the storage and {_AGAIN}"
    return UserError(f"{place}: cannot be {verb}, {reason}: {todo}")


def _told_of_store(place: str, verb: str, error: BaseException) -> UserError:
    code, said = code_of(error), getattr(error, "strerror", None) or " ".join(str(error).split())
    named = f" ({code})" if code else ""
    if isinstance(error, PermissionError):
        reason = f"no permission{named}"
        todo = f"check the credentials in the environment and what they may do there, and {_AGAIN}"
    elif isinstance(error, FileNotFoundError):
        reason, todo = f"there is no such bucket{named}", "make it, or choose another run.folder"
    else:
        # Some servers send a code without a message, which arrives as the word None.
        reason = code if code and said.endswith("None") else f"{said or type(error).__name__}{named}"
        todo = f"see to the storage and {_AGAIN}"
    return UserError(f"{place}: cannot be {verb}, {reason[:300]}: {todo}")
