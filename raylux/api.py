"""Runs from Python: ``run`` a config, ``open_run`` a folder, ``attribute`` with a model and lists in memory."""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from raylux import fingerprints, models
from raylux.capture import input_groups
from raylux.config import Config
from raylux.corpus import Sequences, load_corpus
from raylux.engine.context import Context
from raylux.engine.plan import Plan, make_plan
from raylux.engine.progress import Reporter
from raylux.engine.records import CANDIDATES, COVARIANCE, EIGEN, MOMENTS, QUERY, SCORE, TOKENS
from raylux.engine.stages import corpus as corpus_stage
from raylux.engine.stages import fit, prefilter, queries, query, score
from raylux.errors import MissingStageError, UserError
from raylux.layers import Coverage
from raylux.queries import load_queries
from raylux.results import Run, StageStatus
from raylux.store import CorpusReader, RunFolder

__all__ = ["STAGES", "Run", "StageStatus", "attribute", "open_run", "run", "run_stages"]

STAGES = ("corpus", "fit", "prefilter", "query", "score", "report")

# Keys that may differ from one command to the next on the same run folder: the rest is frozen.
FREE_KEYS = frozenset(
    {
        "run.folder",
        "model.device",
        "queries.path",
        "fit.snapshot",
        "prefilter.kind",
        "prefilter.top",
        "score.unit",
        "score.train_size",
        "score.layers",
        "score.token_top",
        "engine.backend",
        "engine.workers",
        "engine.shards",
        "engine.timeout",
    }
)

# A run that holds no more than its corpus keeps these and the section corpus; the rest may still change, so that
# too many threads, too large a model or broken weights can be put right in the same folder.
CORPUS_KEYS = frozenset({"model.path", "model.tokenizer"})
COMPUTED = (COVARIANCE, EIGEN, MOMENTS, CANDIDATES, QUERY, SCORE, TOKENS)


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


def run_stages(
    config: Config,
    stages: Sequence[str] | None = None,
    config_path: str | None = None,
    quiet: bool = False,
) -> Run:
    """Run some stages of a config; each does only what the run folder lacks.

    Args:
        config: what to run.
        stages: of ``STAGES``; default: all.
        config_path: what error messages and ``inspect`` call the config.
        quiet: no progress on the terminal.

    Raises:
        MissingStageError: an earlier stage is not done; the message holds the command to run.
    """
    wanted = STAGES if stages is None else tuple(stages)
    ctx = _prepare(config, config_path, quiet)
    try:
        for stage in STAGES:
            if stage in wanted:
                _check_before(ctx, stage, config_path)
                _RUN[stage](ctx)
    finally:
        ctx.close()
    return Run(config.run.folder)


def _report(ctx: Context) -> None:
    from raylux.report.html import write_html

    write_html(Run(ctx.folder.path), ctx.folder.files.where("report/index.html"))


_RUN: dict[str, Callable[[Context], None]] = {
    "corpus": lambda ctx: None,  # stored while preparing: every stage needs it
    "fit": fit.run,
    "prefilter": prefilter.run,
    "query": query.run,
    "score": score.run,
    "report": _report,
}


def _check_before(ctx: Context, stage: str, config_path: str | None) -> None:
    """Raise where what the stage reads is not there, with the command that makes it."""
    needs: list[tuple[str, Sequence[object], str]] = []
    if stage == "query":
        needs.append(("fit", fit.missing(ctx), "the factors are not fitted"))
    if stage == "score":
        unsolved = [item.id for item in ctx.queries if item.id not in query.solved_queries(ctx)]
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


@dataclass(frozen=True)
class _Model:
    """A model as it is before its weights are loaded."""

    files: models.ModelFiles
    coverage: Coverage
    groups: dict[str, str]
    vocabulary: int
    context: int | None
    tokenizer: Any
    prints: fingerprints.ModelPrint

    @classmethod
    def find(cls, config: Config) -> _Model:
        trusted = config.model.trust_remote_code
        files = models.find_model(config.model)
        structure = models.load_structure(files, trusted)
        coverage = models.coverage(structure, config.model.layers)
        return cls(
            files,
            coverage,
            input_groups(structure, coverage.tracked),
            models.vocabulary_size(structure.config),
            models.context_length(structure.config),
            models.load_tokenizer(files, trusted),
            fingerprints.of_model(files),
        )

    def record(self) -> dict[str, Any]:
        """What run.yaml keeps of it."""
        return {
            "folder": self.files.folder,
            "tokenizer_folder": self.files.tokenizer,
            **self.prints.dump(),
            "parameters": self.coverage.parameters,
            "share": self.coverage.share,
            "layers": [layer.name for layer in self.coverage.tracked],
            "groups": self.groups,
        }


def _prepare(config: Config, config_path: str | None, quiet: bool) -> Context:
    """Check everything that can be checked before work begins, then open or make the run folder."""
    folder = RunFolder(config.run.folder)
    known = folder.settings() if folder.exists else {}
    computed = any(folder.committed(stage) for stage in COMPUTED)
    if known:
        _check_same(config, known, folder.path, FREE_KEYS if computed else None)
    elif not folder.files.empty():
        raise UserError(f"{folder.path}: the folder is not empty and holds no run; choose another run.folder")
    model = _Model.find(config)
    asked = load_queries(config.queries.path, model.tokenizer, model.vocabulary, model.context)
    queries.check(folder, asked)
    source = fingerprints.of_source(config.corpus.path)
    device = models.resolve_device(config.model.device)

    def load() -> Sequences:
        return load_corpus(config.corpus, model.tokenizer, model.vocabulary, model.context)

    if computed:
        plan = Plan(**known["plan"])
        model = replace(model, groups=known["model"]["groups"])
        _check_model(model.prints, known["model"], folder.path)
        _check_device(plan.device, device, folder.path)
    else:
        if folder.committed("corpus"):
            lengths = CorpusReader(folder).lengths
        else:
            # Read whole before anything is written: a bad row leaves no run folder behind.
            sequences = load()
            load, lengths = lambda: sequences, sequences.lengths()
        covered = model.coverage
        plan = make_plan(config, device, covered.tracked, model.groups, covered.parameters, lengths, model.context)
    folder.write_settings(
        {
            "config": config.dump(),
            "config_path": config_path or known.get("config_path"),
            "plan": plan.dump(),
            "model": model.record(),
            "versions": known.get("versions") or _versions(),
        }
    )
    corpus_stage.run(folder, load, source)
    queries.register(folder, asked)
    reporter = Reporter(folder, quiet)
    return Context(config, folder, model.files, model.coverage, model.groups, model.vocabulary, plan, reporter, asked)


def _check_device(before: str, now: str, path: str) -> None:
    if before != now:
        raise UserError(
            f"{path}: made on {before}, model.device is now {now}; set model.device={before} or use another run.folder"
        )


def _check_same(config: Config, known: Mapping[str, Any], path: str, free: Collection[str] | None) -> None:
    """Raise where a key differs from the run folder's that is not ``free`` (None: one that the corpus rests on)."""
    before = known["config"]
    for section, keys in config.dump().items():
        for key, value in keys.items():
            name = f"{section}.{key}"
            frozen = name in CORPUS_KEYS or section == "corpus" if free is None else name not in free
            if frozen and before.get(section, {}).get(key) != value:
                raise UserError(
                    f"{path} holds a run of another config: {name} is {before.get(section, {}).get(key)!r} there and "
                    f"{value!r} here; choose another run.folder, or set it back"
                )


def _check_model(now: fingerprints.ModelPrint, known: Mapping[str, Any], path: str) -> None:
    before = fingerprints.ModelPrint.load(known)
    changes = (before.weights_changed, before.config_changed, before.code_changed, before.tokenizer_changed)
    for changed in (change(now) for change in changes):
        if changed:
            raise UserError(f"{path}: {changed}; choose another run.folder")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("raylux", "torch", "ray", "transformers", "zarr"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


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
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
