"""What the system tells of the processor."""

from __future__ import annotations

import builtins
import io
import platform
from collections.abc import Iterator
from typing import Any

import pytest

from raylux import processor

_ONE = "processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: Some CPU @ 3 GHz\n\n"
LINUX = _ONE + "processor\t: 1\nvendor_id\t: Another\n"


@pytest.fixture(autouse=True)
def _unread() -> Iterator[None]:
    processor._facts.cache_clear()
    yield
    processor._facts.cache_clear()


def _tells(monkeypatch: pytest.MonkeyPatch, text: str | None, processor_of: str = "") -> None:
    def read(path: str, *args: Any, **options: Any) -> io.StringIO:
        assert path == "/proc/cpuinfo"
        if text is None:
            raise FileNotFoundError(path)
        return io.StringIO(text)

    monkeypatch.setattr(builtins, "open", read)
    monkeypatch.setattr(platform, "processor", lambda: processor_of)


@pytest.mark.parametrize("vendor", ["GenuineIntel", "AuthenticAMD"])
def test_linux_tells_name_and_maker_of_the_first_processor(monkeypatch: pytest.MonkeyPatch, vendor: str) -> None:
    _tells(monkeypatch, LINUX.format(vendor=vendor))
    assert processor.name() == "Some CPU @ 3 GHz" and processor.is_intel() == (vendor == "GenuineIntel")


def test_elsewhere_python_tells_them(monkeypatch: pytest.MonkeyPatch) -> None:
    _tells(monkeypatch, None, "Intel64 Family 6 Model 85 Stepping 7, GenuineIntel")
    assert processor.name().startswith("Intel64") and processor.is_intel()
    _tells(monkeypatch, None, "")
    assert processor.name() == platform.machine() and not processor.is_intel()
