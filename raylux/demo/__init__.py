"""The demo: a small GPT learns real text and invented facts, and raylux says where it has them from."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from rich.text import Text

from raylux.demo import compare
from raylux.demo.corpus import CorpusSettings, DemoCorpus, Question, build_corpus
from raylux.demo.training import TrainingSettings, train_cached
from raylux.report.tables import comparison_table, plain, top_table

if TYPE_CHECKING:
    import pandas as pd

    from raylux.api import Run

METHODS = {"ekfac": "EK-FAC", "identity": "gradient dot product", "cosine": "gradient cosine"}


READING = (
    "Read the order more than the size: EK-FAC overstates large changes. And finding statements is not the aim: "
    "influence asks what would change the model, and a decoy that ties the same names together may do just that."
)
_PIPE_WIDTH = 100


@dataclass(frozen=True)
class DemoSettings:
    """Everything that decides the demo's numbers.

    Attributes:
        corpus, training: of the corpus and of the model.
        candidates: ``prefilter.top``.
    """

    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    candidates: int = 200


def main(
    folder: str | None = None,
    backend: str = "ray",
    settings: DemoSettings | None = None,
    console: Console | None = None,
) -> int:
    """Run the demo and print what it finds.

    Writes corpus.jsonl, queries.yaml, demo.yaml, comparison.json and one run folder per method into
    ``folder``; the trained model rests in the cache. What a former call left there is not computed again.

    Args:
        folder: where to write; default ``runs/demo``.
        backend: of the EK-FAC run, ``ray`` or ``local``; the simpler methods run in process.
        settings: sizes; default: some hundreds of leads and 16 facts.
        console: where to print; default: stdout.

    Returns:
        0, or 1 when EK-FAC does not find the planted statements as it should.
    """
    settings = settings or DemoSettings()
    out = console or _console()
    place = Path(folder or "runs/demo").absolute()

    _step(out, 1, "corpus: Wikipedia leads with invented facts planted among them")
    corpus = build_corpus(settings.corpus)
    corpus.write(place)
    _describe(out, corpus)

    _step(out, 2, "model: a small GPT trained on that corpus")
    model = _train(out, corpus, settings.training)

    runs = {}
    for number, (kind, name) in enumerate(METHODS.items(), start=3):
        # The simpler methods have nothing to fit; in process they take less time than workers need to start.
        where = backend if kind == "ekfac" else "local"
        _step(out, number, f"{name}: {'fit, ' if kind == 'ekfac' else ''}prefilter, query, score ({where})")
        runs[kind] = _run(place, model, kind, where, settings)
    frames = {kind: _frames(run) for kind, run in runs.items()}
    logprobs = {str(name): float(value) for name, value in runs["ekfac"].measurements["measurement"].items()}

    _print_queries(out, corpus, frames["ekfac"], logprobs, runs["ekfac"].unit)
    results = _judge(corpus, frames)
    out.print(comparison_table([result.row() for result in results.values()], "what each method puts first"))
    out.print(compare.LEGEND, style="dim")
    out.print(READING, style="dim")
    held, line = compare.check(results["ekfac"], results["identity"])
    record = _record(settings, corpus, frames, results, logprobs, runs["ekfac"].unit, held)
    (place / "comparison.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    out.print(line, markup=False, soft_wrap=True, style="green" if held else "red")
    out.print(f"numbers: {place / 'comparison.json'}", markup=False, soft_wrap=True)
    out.print(f"page:    {place / 'ekfac' / 'report' / 'index.html'}", markup=False, soft_wrap=True)
    return 0 if held else 1


def _console() -> Console:
    """Stdout, as wide as the terminal or, into a pipe, as wide as a page."""
    wide = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, width=None if wide else _PIPE_WIDTH)


def config_data(folder: Path, model: Path, kind: str, backend: str, settings: DemoSettings) -> dict[str, Any]:
    """The config of one of the demo's runs, as a YAML file would hold it."""
    return {
        "run": {"folder": str(folder / kind)},
        "model": {"path": str(model)},
        "corpus": {
            "path": str(folder / "corpus.jsonl"),
            "id": "id",
            "keep": ["kind", "fact"],
            "max_length": settings.training.context,
        },
        "queries": {"path": str(folder / "queries.yaml")},
        "curvature": {"kind": kind},
        "prefilter": {"kind": "idf", "top": settings.candidates},
        "score": {"token_top": compare.TOP if kind == "ekfac" else 0},
        "engine": {"backend": backend},
    }


def _run(folder: Path, model: Path, kind: str, backend: str, settings: DemoSettings) -> Run:
    from raylux import api
    from raylux.config import Config

    data = config_data(folder, model, kind, backend, settings)
    if kind == "ekfac":
        (folder / "demo.yaml").write_text(yaml.safe_dump(data, allow_unicode=True, sort_keys=False), encoding="utf-8")
    return api.run(Config.parse(data, where="demo"))


def _train(out: Console, corpus: DemoCorpus, settings: TrainingSettings) -> Path:
    from raylux.demo.progress import TrainingProgress

    with TrainingProgress(out) as progress:
        folder, cached = train_cached([document.text for document in corpus.documents], settings, progress.update)
    out.print(f"  {'found in the cache' if cached else 'trained and cached'}: {folder}", markup=False, soft_wrap=True)
    return folder


def _frames(run: Run) -> dict[str, pd.DataFrame]:
    """All candidates of every query, best first, with the document that each sequence comes from."""
    documents = run.sequences.set_index("sequence")["document"]
    frames = {name: run.top(name, len(documents)) for name in run.queries}
    return {name: frame.assign(document=frame["sequence"].map(documents)) for name, frame in frames.items()}


def _judge(corpus: DemoCorpus, frames: Mapping[str, Mapping[str, pd.DataFrame]]) -> dict[str, compare.MethodResult]:
    rankings = {kind: (METHODS[kind], compare.by_influence(of_kind)) for kind, of_kind in frames.items()}
    rankings["prefilter"] = ("prefilter alone", compare.by_prefilter(frames["ekfac"], corpus.documents))
    return {
        kind: compare.judge(name, ranking, corpus.documents, corpus.questions)
        for kind, (name, ranking) in rankings.items()
    }


def _step(out: Console, number: int, text: str) -> None:
    out.print(Text(f"{number}/{2 + len(METHODS)} {text}", style="bold"))


def _describe(out: Console, corpus: DemoCorpus) -> None:
    kinds = [document.kind for document in corpus.documents]
    facts = [q for q in corpus.questions if q.fact]
    out.print(
        f"  {kinds.count('wiki')} leads, {kinds.count('fact')} statements of {len(facts)} facts, "
        f"{kinds.count('decoy')} decoys for {sum(q.decoys for q in facts)} of them; "
        f"{len(corpus.questions)} questions",
        markup=False,
    )


def _print_queries(
    out: Console,
    corpus: DemoCorpus,
    frames: Mapping[str, pd.DataFrame],
    logprobs: Mapping[str, float],
    unit: str,
) -> None:
    for question in corpus.questions:
        frame = frames[question.id].head(compare.TOP)[["rank", "influence", "kind", "text"]]
        asked = f"{question.id}{' (has decoys)' if question.decoys else ''}: {question.prompt} →{question.completion}"
        out.print(top_table(frame, f"{plain(asked)}  [log p {logprobs[question.id]:.2f}]", unit))


def _record(
    settings: DemoSettings,
    corpus: DemoCorpus,
    frames: Mapping[str, Mapping[str, pd.DataFrame]],
    results: Mapping[str, compare.MethodResult],
    logprobs: Mapping[str, float],
    unit: str,
    held: bool,
) -> dict[str, Any]:
    """What comparison.json holds."""
    return {
        "settings": asdict(settings),
        "unit": unit,
        "check": {"held": held, "needed": compare.NEEDED, "top": compare.TOP},
        "methods": {kind: result.as_json() for kind, result in results.items()},
        "queries": [_query_record(question, frames, logprobs[question.id]) for question in corpus.questions],
    }


def _query_record(
    question: Question, frames: Mapping[str, Mapping[str, pd.DataFrame]], logprob: float
) -> dict[str, Any]:
    columns = ["rank", "document", "influence", "kind", "fact"]
    top = {
        kind: json.loads(of_kind[question.id].head(compare.TOP)[columns].to_json(orient="records"))
        for kind, of_kind in frames.items()
    }
    return {**asdict(question), "logprob": logprob, "top": top}
