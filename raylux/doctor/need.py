"""How many bytes a run will write, from the engine's own figures and the first rows of its corpus."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from raylux import sources
from raylux.cost.sizes import factor_bytes, layer_bytes, triangle_bytes
from raylux.curvature import KINDS
from raylux.doctor.case import Case
from raylux.errors import UserError

# Token id and position in memory: int32 ids and labels, int64 keys and offsets.
_TOKEN, _SEQUENCE = 8, 16
# A compressed text file unpacks to about this many times its size.
_PACKED = 4
_PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".lzma", ".parquet")


@dataclass(frozen=True)
class Need:
    """Bytes by part of the run folder; ``documents`` is None where the corpus cannot be counted beforehand."""

    documents: int | None
    corpus: int
    factors: int
    queries: int
    scores: int

    @property
    def total(self) -> int:
        return self.corpus + self.factors + self.queries + self.scores


def need(case: Case) -> Need:
    """An upper bound for the queries, an estimate from the first rows for corpus and scores, exact for the factors."""
    sample = case.sample
    documents = sample.documents if sample.whole else _documents(case)
    share = (documents or sample.documents) / sample.documents
    sequences = ceil(len(sample.sequences) * share)
    tokens = ceil(int(sample.sequences.lengths().sum()) * share)
    texts = ceil(int(sample.sequences.table["text"].str.len().sum()) * share)
    corpus = tokens * _TOKEN + sequences * _SEQUENCE + texts
    return Need(documents, corpus, _factors(case), _queries(case), _scores(case, sequences, tokens / sequences))


def _factors(case: Case) -> int:
    model, kind = case.model, KINDS[case.config.curvature.kind]
    layers, setting = model.coverage.tracked, case.config.curvature
    blocks = setting.blocks
    found = factor_bytes(layers, model.groups, case.itemsize, kind.basis, kind.moments, blocks, setting.projected)
    if kind.basis:  # beside them, while the fit runs, its running sums in float64
        found += triangle_bytes(layers, model.groups, 8, blocks)
    return found


def _queries(case: Case) -> int:
    # Dense, which low rank undercuts.
    return len(case.queries) * layer_bytes(case.model.coverage.tracked, case.itemsize)


def _scores(case: Case, sequences: int, typical: float) -> int:
    config, queries = case.config, len(case.queries)
    rows = sequences if config.prefilter.kind == "none" else min(sequences, queries * config.prefilter.top)
    layers = len(case.model.coverage.tracked) if config.score.layers else 0
    shares = ceil(config.score.token_top * typical) * (4 + case.itemsize)
    return queries * (rows * case.itemsize * (1 + layers) + shares)


def _documents(case: Case) -> int | None:
    """How many documents the corpus has, by the size of its files and of the first documents; None: not known."""
    setting, sample = case.config.corpus, case.sample
    try:
        files = sources.find_files(sources.resolve(setting.path))
    except UserError:
        files = []
    total = sum(_size(file.path) for file in files)
    table = sample.sequences.table
    known = sum(len(text.encode("utf-8", "replace")) for text in table["text"])
    if not total or not known:
        return setting.limit
    documents = ceil(total / known * sample.documents)
    return min(documents, setting.limit) if setting.limit else documents


def _size(path: str) -> int:
    import fsspec

    system, root = fsspec.core.url_to_fs(path)
    size = int(system.size(root) or 0)
    return size * _PACKED if path.lower().endswith(_PACKED_SUFFIXES) else size
