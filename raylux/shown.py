"""What may be shown: text that cannot steer a terminal, and places without the secrets that open them.

Two questions, two functions. ``plain`` is for foreign text (a corpus, a model, a query, a run folder) on its way
to a terminal. ``redacted`` is for places and messages of ours on their way to a file, a page or a line: a URL may
carry a password, and another library's error may carry the environment's tokens.
"""

from __future__ import annotations

import os
import re
from functools import lru_cache
from typing import Any

HIDDEN = "***"
# USER:PASSWORD@ after a scheme. A password may hold a slash; HOST:8080/some/path@1 is no password.
_PASSWORD = re.compile(r"(?P<head>[a-z][a-z0-9+.-]*://)[^\s/@:'\"]*:(?!\d+/)[^\s@'\"]*@", re.IGNORECASE)
# TOKEN@, but not CONTAINER@ACCOUNT of Azure, nor git@HOST.
_USER = re.compile(
    r"(?P<head>(?<![a-z0-9])(?!abfss?:|wasbs?:)[a-z][a-z0-9+.-]*://)(?!git@)[^\s/@:'\"]+@", re.IGNORECASE
)
_PARAMETER = re.compile(
    r"(?P<head>[?&;](?:x-amz-(?:signature|credential|security-token)|x-goog-(?:signature|credential)|awsaccesskeyid|"
    r"sig|signature|(?:access_|auth_|id_)?token|api_?key|key|password|secret)=)[^&\s'\"]+",
    re.IGNORECASE,
)
_BEARER = re.compile(r"(?P<head>\bbearer\s+)[^\s'\",;]+", re.IGNORECASE)
_PATTERNS = (_PASSWORD, _USER, _PARAMETER, _BEARER)
_SECRET_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|KEY|KEY_ID|CREDENTIALS?|CONNECTION_STRING)$", re.IGNORECASE)
# Shorter values ("true", "none") are no secrets, and would be found in any text.
_SECRET_LENGTH = 8


def plain(text: object, width: int | None = None) -> str:
    """The text on one line, safe for a terminal.

    White space is collapsed; characters that could steer a terminal or reorder a line (escape sequences, control
    and format characters, lone surrogates) are written as ``\\x1b`` or ``\\u202e``; what is longer than ``width``
    characters is cut and ends in ``…``.
    """
    shown = visible(re.sub(r"\s+", " ", str(text)).strip())
    if width is not None and len(shown) > width:
        shown = shown[: max(0, width - 1)].rstrip() + "…"
    return shown


def visible(text: str, kept: str = "") -> str:
    """The text with every character that could steer a terminal escaped, except those of ``kept``; blanks stay.

    What Python does not call printable: control and format characters (bidirectional marks are among them), lone
    surrogates, characters without a meaning of their own, and every separator but the blank.
    """
    return "".join(c if c in kept or c.isprintable() else _escape(c) for c in text)


def redacted(text: object) -> str:
    """The text without secrets.

    Left out are credentials in URLs (``s3://KEY:SECRET@host``, ``https://TOKEN@host``, signatures and tokens of a
    query string), bearer tokens, and the value of every environment variable whose name says that it is secret
    (``HF_TOKEN``, ``AWS_SECRET_ACCESS_KEY``, ``RAY_AUTH_TOKEN``).
    """
    return _without(str(text), _secrets())


def _without(shown: str, secrets: list[str]) -> str:
    for secret in secrets:
        shown = shown.replace(secret, HIDDEN)
    for pattern in _PATTERNS:
        shown = pattern.sub(lambda found: f"{found['head']}{HIDDEN}{'@' if found[0].endswith('@') else ''}", shown)
    return shown


def redacted_values(data: Any) -> Any:
    """Mappings and lists as they are, each text in them ``redacted``: what a config looks like in a file."""
    return _values_without(data, _secrets())


def _values_without(data: Any, secrets: list[str]) -> Any:
    if isinstance(data, str):
        return _without(data, secrets)
    if isinstance(data, dict):
        return {key: _values_without(value, secrets) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return type(data)(_values_without(value, secrets) for value in data)
    return data


def _secrets() -> list[str]:
    """Values of the environment that are not to be seen, longest first; paths of files are no secrets."""
    values = {os.environ.get(name, "") for name in os.environ if _is_secret(name)}
    found = {value for value in values if len(value) >= _SECRET_LENGTH and not os.path.exists(value)}
    return sorted(found, key=len, reverse=True)


@lru_cache(maxsize=1024)
def _is_secret(name: str) -> bool:
    """Whether a variable's name says so; asked for every line of a run's log, of the same names."""
    return _SECRET_NAME.search(name) is not None


def _escape(character: str) -> str:
    code = ord(character)
    named = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
    if character in named:
        return named[character]
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
