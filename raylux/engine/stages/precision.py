"""The precision of a run's products: chosen by the plan, held against a measured error before it is used."""

from __future__ import annotations

import numpy as np

from raylux.engine.context import Context
from raylux.engine.kept import kept_bytes
from raylux.engine.plan import choose_fit_rows
from raylux.engine.records import Contraction
from raylux.engine.work import Job, results
from raylux.errors import RayluxError
from raylux.ledger import CONTRACTION

# RMS error of dot products of gradients, relative to their RMS, up to which bf16 is taken. Preconditioning weighs up
# the small directions: at 1.5e-4 (GPT-2, 4 layers, d = 256) scores were off by 0.2 %, ten times as much.
LIMIT = 1e-3
# What may become of scores, relative to their RMS, before the run says so.
_WORTH_SAYING = 0.02
_PROBES, _TOKENS = 4, 64


def resolve(ctx: Context) -> Contraction:
    """How products are taken in this run; measured once, when it is first asked for, and then kept in the ledger."""
    dtype = ctx.plan.contraction
    if dtype == "bfloat16" and ctx.config.engine.contraction_dtype == "auto":
        known = ctx.folder.units(CONTRACTION).get("products")
        dtype = known.meta["dtype"] if known else _measure(ctx)
    return Contraction(dtype, _scores_the_fit(ctx))


def _measure(ctx: Context) -> str:
    rows = choose_fit_rows(ctx.ids, _PROBES, ctx.config.fit.seed)
    if len(rows) < 2:
        return "float32"
    found = list(results(ctx.backend, "contraction_error", [Job("products", (rows, _TOKENS), None)]))
    if found[0].failure is not None:
        raise RayluxError(
            f"the error of bf16 products could not be measured ({found[0].failure.reason}); "
            "set engine.contraction_dtype=float32, or give workers more memory"
        )
    error = float(found[0].value)
    dtype = "bfloat16" if error <= LIMIT else "float32"
    ctx.reporter.say(f"products: {dtype} (error of bf16 products {error:.1e}, limit {LIMIT:.0e})")
    ctx.folder.commit(CONTRACTION, "products", {}, dtype=dtype, error=error, numerics=[dict(found[0].numerics)])
    return dtype


def check(ctx: Context, pairs: np.ndarray) -> float:
    """RMS error of scores by rounded products, relative to their RMS, as seen on a block's own queries.

    Args:
        pairs: [2, n] exact scores, and the same by s_test and products as they will be.
    """
    exact, rounded = pairs
    error = float(np.linalg.norm(rounded - exact)) / max(float(np.linalg.norm(exact)), 1e-300)
    if error > _WORTH_SAYING:
        ctx.reporter.say(
            f"query: bf16 products change scores by {error:.1%} of their size, as seen between queries; "
            "where that is too much, run in a new folder with engine.contraction_dtype=float32"
        )
    return error


def _scores_the_fit(ctx: Context) -> bool:
    """Whether this command will score all sequences, those of the fit among them, and workers may keep them."""
    everyone = ctx.config.prefilter.kind == "none" or ctx.config.prefilter.top >= len(ctx.ids)
    keeps = kept_bytes(ctx.config.engine.keep_captured, ctx.plan.device) != 0
    return everyone and keeps and "score" in ctx.stages and ctx.config.fit.labels == "sampled"
