"""Answers to a config's queries from a fitted run, as a Ray job: ``python jobs/score.py CONFIG [section.key=value …]``.

Chooses the candidates, preconditions the queries, scores and reports, and does only what is missing: more queries on
the same run folder cost only themselves. Never begins a fit: without one it says so (exit code 2).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from raylux.cli import main
from raylux.cli.codes import EXIT_DONE, EXIT_QUARANTINED

STAGES = ("prefilter", "query", "score", "report")


def answer(arguments: Sequence[str]) -> int:
    """Run the stages one after the other; the exit code of the last one, or of the first that fails."""
    code = EXIT_DONE
    for stage in STAGES:
        code = main([stage, *arguments])
        if code not in (EXIT_DONE, EXIT_QUARANTINED):
            break
    return code


if __name__ == "__main__":
    sys.exit(answer(sys.argv[1:]))
