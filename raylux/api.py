"""Runs from Python: ``run`` a config, ``open_run`` a folder, ``attribute`` with a model and lists in memory."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from raylux import examples, models, modules, prepare
from raylux.adapters import has_adapter
from raylux.combined import Combined
from raylux.config import Config
from raylux.engine.context import Context
from raylux.engine.progress import Reporter
from raylux.engine.stages import fit, prefilter, query, score
from raylux.errors import MissingStageError, UserError, shown
from raylux.modulecheck import features_read
from raylux.opening import combine, open_run
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
    train: Iterable[Any],
    queries: Iterable[Any],
    *,
    folder: str | Path | None = None,
    overrides: Sequence[str] = (),
    quiet: bool = True,
) -> Run:
    """Attribute with a model object and lists in memory: writes them down and runs the same stages.

    Args:
        model: a transformers causal LM, or a classifier of sequences; or, without a tokenizer, a torch module that maps
            features [B, *shape] to logits [B, classes], or to [B] or [B, 1], the logit of the second of two classes.
        tokenizer: its tokenizer; None for a module.
        train: texts, or records with ``text`` or ``input_ids`` (and ``labels``, ``id``); for a classifier pairs
            (text, class), or records with ``text`` or ``input_ids`` and ``label``; for a module a data set of pairs
            (features, class), or records with ``features`` and ``label`` (and ``id``, ``text``).
        queries: records as in a query file, or pairs (prompt, completion); for a classifier pairs (text, class), for a
            module pairs (features, class) or records with ``features`` and ``label`` (``contrast``, ``measurement``).
        folder: where to keep the run; default: a temporary folder that lives as long as the result.
        overrides: ``section.key=value``, as on the command line. Defaults here: no prefilter, in process.
        quiet: no progress on the terminal.

    Raises:
        UserError: as ``run``.
    """
    keep = tempfile.TemporaryDirectory(prefix="raylux-") if folder is None else None
    base = Path(keep.name if keep else str(folder))
    inputs = base.with_name(base.name + "-inputs") if keep is None else base / "inputs"
    inputs.mkdir(parents=True, exist_ok=True)
    written = _write_examples if tokenizer is None else _write_texts
    sections = written(inputs, model, tokenizer, train, queries)
    sections["run"] = {"folder": str(base / "run" if keep else base)}
    sections["queries"] = {"path": str(inputs / "queries.jsonl")}
    sections["prefilter"] = {"kind": "none"}
    sections["engine"] = {"backend": "local", **sections.get("engine", {})}
    config = Config.parse(sections, overrides, where="attribute")
    # The run needs the module for as long as it is asked.
    return Run(run_stages(config, quiet=quiet).folder, keep=(keep, model))


Sections = dict[str, dict[str, Any]]


def _write_texts(inputs: Path, model: Any, tokenizer: Any, train: Iterable[Any], queries: Iterable[Any]) -> Sections:
    """Model, tokenizer, texts and queries as files, and what a config says of them."""
    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"attribute: {type(model).__name__} is no model of transformers; a module that reads features goes without "
            "a tokenizer: raylux.attribute(module, None, examples, queries)"
        )
    if has_adapter(model):
        raise UserError(
            "attribute: the model carries an adapter; save both, and run a config that names them in model.path and "
            "model.adapter"
        )
    with models.quiet():
        model.save_pretrained(inputs / "model")
        # Not beside the model: transformers would pick a tokenizer class by the model's type.
        tokenizer.save_pretrained(inputs / "tokenizer")
    names = ("prompt", "completion") if models.classes_of(model) is None else ("text", "label")
    rows = [_record(row, ("text",) if isinstance(row, str) else names) for row in train]
    _write_lines(inputs / "train.jsonl", rows)
    _write_queries(inputs, [_record(row, names) for row in queries])
    sections: Sections = {
        "model": {
            "path": str(inputs / "model"),
            "tokenizer": str(inputs / "tokenizer"),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "corpus": {"path": str(inputs / "train.jsonl")},
    }
    context = models.context_length(model.config)
    if context is not None:
        sections["corpus"]["max_length"] = min(512, context)
    if rows and "id" in rows[0]:
        sections["corpus"]["id"] = "id"
    if names[1] == "label":
        sections["corpus"]["keep"] = ["label"]
    return sections


def _write_examples(inputs: Path, model: Any, _: None, train: Iterable[Any], queries: Iterable[Any]) -> Sections:
    """A module, examples and queries as files, and what a config says of them."""
    if isinstance(model, PreTrainedModel) or not isinstance(model, nn.Module):
        raise UserError(
            f"attribute: a {type(model).__name__} needs its tokenizer; only a torch module goes without one"
        )
    some = next(model.parameters(), None)
    dtype = "float32" if some is None else str(some.dtype).removeprefix("torch.")
    found = examples.collect(train, "float64" if dtype == "float64" else "float32")
    features = features_read(model, found.features)
    asked = [
        {"id": str(place), **examples.as_record(row, f"queries row {place}", examples.QUERY_KEYS)}
        for place, row in enumerate(queries)
    ]
    # Checked here before anything is written; read again like any other run's inputs.
    parsed = examples.parse_questions(asked, features, dtype)
    examples.class_numbers(found.labels, features)
    modules.hold(model, features, inputs / "model")
    examples.write(inputs / "train.safetensors", found)
    _write_queries(inputs, [query.record for query in parsed])
    return {
        "model": {"path": str(inputs / "model"), "dtype": dtype, "device": "cpu"},
        "corpus": {"path": str(inputs / "train.safetensors")},
        "score": {"token_top": 0},
    }


def _write_queries(inputs: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    _write_lines(inputs / "queries.jsonl", [{"id": str(place), **row} for place, row in enumerate(rows)])


def _record(row: Any, names: Sequence[str]) -> dict[str, Any]:
    """A row as a record: as it is, or text and what belongs to it by these names."""
    if isinstance(row, Mapping):
        return dict(row)
    values = (row,) if isinstance(row, str) else tuple(row)
    if len(values) != len(names):
        raise UserError(f"attribute: {shown(row)} is no record with {' and '.join(names)}, nor a tuple of them")
    return dict(zip(names, values, strict=True))


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    lines = []
    for place, row in enumerate(rows):
        try:
            lines.append(json.dumps(row) + "\n")
        except (TypeError, ValueError) as error:
            raise UserError(f"attribute: record {place} of {path.stem} is not plain data ({error})") from None
    path.write_text("".join(lines), encoding="utf-8")
