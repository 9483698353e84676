"""``raylux doctor``: what a run needs, checked before it begins. Each check is a function that returns a finding.

The order is that of what rests on what; a check that breaks becomes a finding, and the others still run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from raylux.doctor.finding import FAIL, OK, WARN, Finding, guarded

if TYPE_CHECKING:
    from raylux.doctor.case import Case

__all__ = ["FAIL", "OK", "WARN", "Finding", "examine"]


def examine(config_path: str | None = None, overrides: Sequence[str] = ()) -> Iterator[Finding]:
    """Check this machine and, with a config, what its run needs; yields each finding as it is made.

    Args:
        config_path: of the YAML file; None: versions, Ray and the known answer alone.
        overrides: ``section.key=value``.
    """
    from raylux.doctor import answer, cluster, versions
    from raylux.doctor.case import Case

    case = None
    if config_path is not None:
        case = Case(config_path, overrides)
        for finding in guarded("config", case.check):
            yield finding
            if finding.state != OK:  # nothing else can be asked of it
                case = None
    yield from guarded("versions", partial(versions.check, case))
    yield from guarded("auth", cluster.auth)
    yield from guarded("ray", partial(cluster.address, case))
    if case is not None:
        yield from _of_case(case)
    yield from guarded("answer", answer.check)


def _of_case(case: Case) -> Iterator[Finding]:
    from raylux.doctor import cluster, inputs, storage

    checks = {
        "model": inputs.model,
        "queries": inputs.queries,
        "corpus": inputs.corpus,
        "resources": cluster.resources,
        "disk": storage.disk,
        "store": storage.store,
    }
    for name, check in checks.items():
        yield from guarded(name, partial(check, case))
