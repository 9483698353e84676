"""Names in the ledger of a run folder: its stages, and those of their units that readers look for.

They stand apart from the modules that compute, so that whoever only reads a run does not wait for torch.
"""

from __future__ import annotations

COVARIANCE, EIGEN, MOMENTS = "fit.covariance", "fit.eigen", "fit.moments"
PROJECTED = "fit.projected"
LABELS, SNAPSHOT, QUARANTINE, PROBE = "fit.labels", "fit.snapshot", "quarantine", "query.probe"
QUERIES, QUERY, SCORE, TOKENS, CANDIDATES = "queries", "query", "score", "tokens", "prefilter"
# Of two-stage scoring: which units make a wave, what each wave leaves out, and what became of it.
WAVES = "score.waves"
# How long the gradients of scored sequences are.
SQUARES = "score.squares"
CONTRACTION = "fit.contraction"
# A batch's query files: taken, put aside, answered.
TAKEN, ASIDE, ANSWER = "batch.taken", "batch.aside", "batch.answer"
SOLVE, PRODUCT = "query.solve", "query.product"
# By how much a run's scores are too large, and what some of its sequences do in truth.
CALIBRATION, FREEDOM, VERIFIED, LEVERAGE = "calibration", "calibration.freedom", "verify", "verify.leverage"

# The one unit of FREEDOM, which says that a calibration is whole; that of VERIFIED with what was asked for last.
WHOLE, ASKED = "run", "asked"


def sequence_unit(name: str, row: int) -> str:
    """The unit of one sequence, a row of the corpus, in LEVERAGE and in VERIFIED; ``name``: what it rests on."""
    return f"{name}-{int(row):08d}"
