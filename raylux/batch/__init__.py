"""Query files that keep arriving, each answered once from one fitted run."""

from raylux.batch.driver import Options, Outcome, answer_files

__all__ = ["Options", "Outcome", "answer_files"]
