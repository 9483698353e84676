"""What is installed against what raylux's own package asks for."""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, requires, version

from raylux.doctor.case import Case
from raylux.doctor.finding import FAIL, OK, Finding

_SHOWN = ("raylux", "torch", "ray", "transformers", "zarr")
# As "ray[default]>=2.44" or 'gguf>=0.10; extra == "gguf"'.
_REQUIREMENT = re.compile(
    r"(?P<name>[A-Za-z0-9._-]+)(\[[^]]*\])?\s*(>=\s*(?P<floor>[0-9.]+))?\s*(;.*extra == ['\"](?P<extra>\w+)['\"])?$"
)


def check(case: Case | None) -> Finding:
    """Python and packages; of the extras those that the config needs."""
    extras = _extras(case) if case is not None else set()
    bad: list[str] = []
    install: list[str] = []
    count = 0
    for text in requires("raylux") or ():
        found = _REQUIREMENT.match(text)
        if found is None or (found["extra"] and found["extra"] not in extras):
            continue
        count += 1
        if problem := _problem(found["name"], found["floor"] or "0"):
            bad.append(problem)
            install.append(f"raylux[{found['extra']}]" if found["extra"] else text.partition(";")[0].strip())
    shown = ", ".join(f"{name} {_version(name)}" for name in _SHOWN)
    detail = f"python {platform.python_version()}, {shown}; {count} packages as raylux asks"
    if not bad:
        return Finding("versions", OK, detail)
    asked = " ".join(f"'{name}'" for name in dict.fromkeys(install))
    return Finding("versions", FAIL, "; ".join(bad), f"pip install --upgrade {asked}")


def older(found: str, floor: str) -> bool:
    """Whether a version comes before a floor, by its numbers: 2.6 is older than 2.13, 2.13.0+cpu is not."""
    return _numbers(found) < _numbers(floor)


def _numbers(text: str) -> tuple[int, ...]:
    release = re.match(r"\d+(\.\d+)*", text)
    numbers = [int(part) for part in release[0].split(".")] if release else [0]
    while len(numbers) > 1 and not numbers[-1]:  # 3 and 3.0 are the same
        numbers.pop()
    return tuple(numbers)


def _problem(name: str, floor: str) -> str:
    have = _version(name)
    if have == "missing":
        return f"{name} is not installed"
    return f"{name} {have} is older than {floor}" if older(have, floor) else ""


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _extras(case: Case) -> set[str]:
    config = case.config
    places = (config.run.folder, config.model.path, config.model.adapter or "", config.corpus.path, config.queries.path)
    extras = {"gguf"} if config.model.path.lower().endswith(".gguf") else set()
    extras |= {"lora"} if config.model.adapter else set()
    return extras | ({"s3"} if any(place.startswith("s3://") for place in places) else set())
