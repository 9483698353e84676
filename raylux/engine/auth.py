"""Ray's token authentication: what the environment says of it, and switching it on for what raylux starts.

Ray's processes listen on every interface, and whoever may talk to them may run code there; the token is what keeps
others out. This module does not import ray, which reads these variables when it is imported.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from raylux.errors import UserError
from raylux.sources import one_line

MODE, TOKEN, TOKEN_PATH, ADDRESS = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"


@dataclass(frozen=True)
class Auth:
    """What the environment says.

    Attributes:
        mode: "token", "disabled", what else RAY_AUTH_MODE holds, or "" where it is not set.
        joins: a cluster of RAY_ADDRESS is joined; otherwise one is started here.
        in_environment: the token itself is in RAY_AUTH_TOKEN.
        file: where Ray looks for the token otherwise.
        filled: that file can be read and is not empty.
        private: nobody but its owner can read or write it, by its own mode or because a folder above keeps others out.
    """

    mode: str
    joins: bool
    in_environment: bool
    file: Path
    filled: bool
    private: bool


def look() -> Auth:
    """Read the environment and the token file; changes nothing."""
    file = token_file()
    try:
        filled = bool(file.read_text(encoding="utf-8").strip())
        private = not _open_to_others(file)
    except (OSError, UnicodeDecodeError):
        filled, private = False, False
    return Auth(
        os.environ.get(MODE, "").strip().lower(),
        bool(os.environ.get(ADDRESS)),
        bool(os.environ.get(TOKEN)),
        file,
        filled,
        private,
    )


def token_file() -> Path:
    """RAY_AUTH_TOKEN_PATH, or Ray's own place in the home folder."""
    named = os.environ.get(TOKEN_PATH)
    return Path(named).expanduser() if named else Path.home() / ".ray" / "auth_token"


def _open_to_others(file: Path) -> bool:
    folders = file.resolve().parents
    return bool(file.stat().st_mode & 0o077) and all(folder.stat().st_mode & 0o011 for folder in folders)


def switch_on() -> None:
    """Have a cluster that is started here ask for a token. Call it before ray is imported.

    Where a mode is set, or a cluster of RAY_ADDRESS is joined, the environment decides and nothing is done. A token
    that is missing is made, in a file that its owner alone may read (Ray's own is as open as the umask leaves it).
    """
    found = look()
    if found.mode or found.joins:
        return
    os.environ[MODE] = "token"
    if not found.in_environment and not found.filled:
        _make(found.file)


def _make(file: Path) -> None:
    # Where it cannot be written Ray says so itself when it starts.
    with contextlib.suppress(OSError):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if not file.stat().st_size:
                file.unlink()
        # Exclusive: of two processes that start at once one makes the token, both use it.
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="ascii") as target:
            target.write(secrets.token_hex(32))


HOW = f"set {MODE}=token and {TOKEN_PATH}=FILE (or {TOKEN}=…) as they are on the cluster's head"


def bearer() -> tuple[str, str]:
    """The token that the environment names for a cluster elsewhere, and where it came from; "" and "" where none is.

    The file in the home folder counts only in mode "token": it belongs to clusters started here, and is not handed
    to whoever answers at an address.

    Raises:
        UserError: the file that is named cannot be read, holds nothing, or holds what is no token.
    """
    if token := os.environ.get(TOKEN, "").strip():
        return _sound(token, TOKEN), TOKEN
    named = os.environ.get(TOKEN_PATH)
    if not named and look().mode != "token":
        return "", ""
    file = token_file()
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        if not named:
            return "", ""
        raise UserError(f"{TOKEN_PATH}={file}: no token can be read there ({one_line(error)}); {HOW}") from None
    if not token:
        raise UserError(f"{file}: holds no token; {HOW}")
    return _sound(token, str(file)), str(file)


def _sound(token: str, where: str) -> str:
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise UserError(f"{where}: what is there is no token (a token is one word of plain characters); {HOW}")
    return token
