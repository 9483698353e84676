"""Runs from Python: ``run`` a config, ``open_run`` a folder, ``attribute`` with a model and lists in memory."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from raylux import models, prepare
from raylux.adapters import has_adapter
from raylux.combined import Combined
from raylux.config import Config
from raylux.engine.context import Context
from raylux.engine.progress import Reporter
from raylux.engine.stages import fit, prefilter, query, score
from raylux.errors import MissingStageError, UserError
from raylux.results import Run, StageStatus
from raylux.store import Lease, RunFolder

__all__ = ["STAGES", "Combined", "Run", "StageStatus", "attribute", "combine", "open_run", "run", "run_stages"]

# Fewer queries are looked at one by one.
ACROSS_FROM = 3
STAGES = ("corpus", "fit", "prefilter", "query", "score", "report")


def run(config: Config) -> Run:
    """Run every stage of a config, or what is still missing of it, and open the result.

    Raises:
        UserError: the input cannot be served; nothing was half-written.
        NumericsError: NaN or infinity where none may be.
    """
    return run_stages(config)


def open_run(path: str | Path) -> Run:
    """Open a run folder to look at. Raises UserError where there is none."""
    return Run(str(path))


def combine(runs: Sequence[str | Path | Run], weights: Sequence[float] | None = None) -> Combined:
    """Read several runs over the same corpus and queries as one: Σ_k w_k · influence_k, by default the mean.

    Args:
        runs: folders, or runs that are open: models of several checkpoints, seeds or stages of a training.
        weights: one for each; learning rates with kind ``identity`` are TracIn's.

    Raises:
        UserError: they cannot be added up, or there is no run at one of them.
    """
    return Combined([one if isinstance(one, Run) else open_run(one) for one in runs], weights)


def run_stages(
    config: Config,
    stages: Sequence[str] | None = None,
    config_path: str | None = None,
    quiet: bool = False,
    restart: str | None = None,
) -> Run:
    """Run some stages of a config; each does only what the run folder lacks.

    Args:
        config: what to run.
        stages: of ``STAGES``; default: all.
        config_path: what error messages and ``inspect`` call the config.
        quiet: no progress on the terminal.
        restart: forget what this stage made, and what rests on it, and compute it again.

    Raises:
        MissingStageError: an earlier stage is not done; the message holds the command to run.
        UserError: another command works on the run folder; an input changed, or what is stored is damaged, and
            ``restart`` does not allow for it.
    """
    wanted = STAGES if stages is None else tuple(stages)
    folder = RunFolder(config.run.folder)
    inputs = prepare.read(config, folder, restart)
    reporter = Reporter(folder, quiet)
    with Lease.take(folder.files, say=reporter.say) as lease:
        folder.guard = lease.check
        ctx = prepare.begin(inputs, folder, reporter, config_path, restart)
        if restart or lease.inherited:
            prepare.tidy(folder, reporter)
        ctx.stages = wanted
        try:
            for stage in STAGES:
                if stage in wanted:
                    _check_before(ctx, stage, config_path)
                    _RUN[stage](ctx)
        finally:
            ctx.close()
    return Run(config.run.folder)


def write_page(run: Run) -> None:
    """Write the HTML page of a run whose scores are there, into its folder."""
    from raylux.report.html import write_html

    across = run.across() if len(run.queries) >= ACROSS_FROM else None
    write_html(run, run.store.files.where("report/index.html"), across=across)


_RUN: dict[str, Callable[[Context], None]] = {
    "corpus": lambda ctx: None,  # stored while preparing: every stage needs it
    "fit": fit.run,
    "prefilter": prefilter.run,
    "query": query.run,
    "score": score.run,
    "report": lambda ctx: write_page(Run(ctx.folder.path)),
}


def _check_before(ctx: Context, stage: str, config_path: str | None) -> None:
    """Raise where what the stage reads is not there, with the command that makes it."""
    needs: list[tuple[str, Sequence[object], str]] = []
    if stage == "query":
        needs.append(("fit", fit.missing(ctx), "the factors are not fitted"))
    if stage == "score":
        solved = query.solved_queries(ctx)
        unsolved = [item.id for item in query.answerable(ctx) if item.id not in solved]
        needs.append(("prefilter", prefilter.missing(ctx), "queries without candidates"))
        needs.append(("query", unsolved, "queries that are not preconditioned"))
    if stage == "report":
        unscored = [] if not prefilter.missing(ctx) and not score.missing(ctx) else ["scores"]
        needs.append(("score", unscored, "scores are missing"))
    for name, missing, what in needs:
        if missing:
            raise MissingStageError(
                f"{ctx.folder.path}: {what}; run `raylux {name} {config_path or 'CONFIG'}` before {stage}"
            )


def attribute(
    model: Any,
    tokenizer: Any,
    train: Iterable[str | Mapping[str, Any]],
    queries: Iterable[Mapping[str, Any] | tuple[str, str]],
    *,
    folder: str | Path | None = None,
    overrides: Sequence[str] = (),
    quiet: bool = True,
) -> Run:
    """Attribute with a model object and lists in memory: writes them down and runs the same stages.

    Args:
        model: a transformers causal LM.
        tokenizer: its tokenizer.
        train: texts, or records with ``text`` or ``input_ids`` (and ``labels``, ``id``).
        queries: records as in a query file, or pairs (prompt, completion).
        folder: where to keep the run; default: a temporary folder that lives as long as the result.
        overrides: ``section.key=value``, as on the command line. Defaults here: no prefilter, in process.
        quiet: no progress on the terminal.

    Raises:
        UserError: as ``run``.
    """
    if has_adapter(model):
        raise UserError(
            "attribute: the model carries an adapter; save both, and run a config that names them in model.path and "
            "model.adapter"
        )
    keep = tempfile.TemporaryDirectory(prefix="raylux-") if folder is None else None
    base = Path(keep.name if keep else str(folder))
    inputs = base.with_name(base.name + "-inputs") if keep is None else base / "inputs"
    inputs.mkdir(parents=True, exist_ok=True)
    with models.quiet():
        model.save_pretrained(inputs / "model")
        # Not beside the model: transformers would pick a tokenizer class by the model's type.
        tokenizer.save_pretrained(inputs / "tokenizer")
    rows = [{"text": row} if isinstance(row, str) else dict(row) for row in train]
    asked = [row if isinstance(row, Mapping) else {"prompt": row[0], "completion": row[1]} for row in queries]
    _write_lines(inputs / "train.jsonl", rows)
    _write_lines(inputs / "queries.jsonl", [{"id": str(place), **row} for place, row in enumerate(asked)])
    sections: dict[str, dict[str, Any]] = {
        "run": {"folder": str(base / "run" if keep else base)},
        "model": {
            "path": str(inputs / "model"),
            "tokenizer": str(inputs / "tokenizer"),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "corpus": {"path": str(inputs / "train.jsonl")},
        "queries": {"path": str(inputs / "queries.jsonl")},
        "prefilter": {"kind": "none"},
        "engine": {"backend": "local"},
    }
    context = models.context_length(model.config)
    if context is not None:
        sections["corpus"]["max_length"] = min(512, context)
    if rows and "id" in rows[0]:
        sections["corpus"]["id"] = "id"
    config = Config.parse(sections, overrides, where="attribute")
    return Run(run_stages(config, quiet=quiet).folder, keep=keep)


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    lines = []
    for place, row in enumerate(rows):
        try:
            lines.append(json.dumps(row) + "\n")
        except (TypeError, ValueError) as error:
            raise UserError(f"attribute: record {place} of {path.stem} is not plain data ({error})") from None
    path.write_text("".join(lines), encoding="utf-8")
