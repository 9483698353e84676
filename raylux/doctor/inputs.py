"""What the user brings, read as a run would read it."""

from __future__ import annotations

from raylux.doctor.case import Case
from raylux.doctor.finding import OK, WARN, Finding


def model(case: Case) -> Finding:
    """Config, tokenizer, tracked layers and device of the model; the weights' numbers are not read."""
    found, covered = case.model, case.model.coverage
    context = f", context {found.context}" if found.context else ""
    detail = (
        f"{case.config.model.path}: {covered.parameters:,} parameters, {len(covered.tracked)} tracked layers "
        f"({covered.share:.0%}){context}, {case.config.model.dtype} on {case.device}"
    )
    if case.config.model.trust_remote_code:
        advice = "leave model.trust_remote_code out unless you have read that code"
        return Finding("model", WARN, f"{detail}; code that ships with the model may run", advice)
    return Finding("model", OK, detail)


def queries(case: Case) -> Finding:
    """Each query as tokens."""
    asked = case.queries
    longest = max(len(part.tokens) for query in asked for part in query.parts)
    count = f"{len(asked)} quer{'y' if len(asked) == 1 else 'ies'}"
    return Finding("queries", OK, f"{case.config.queries.path}: {count}, the longest of {longest} tokens")


def corpus(case: Case) -> Finding:
    """The first rows, tokenized and cut."""
    sample = case.sample
    lengths = sample.sequences.lengths()
    what = "all" if sample.whole else "the first"
    dropped = ", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in sample.sequences.dropped.items())
    detail = (
        f"{case.config.corpus.path}: {what} {sample.documents} documents give {len(lengths)} sequences of "
        f"{lengths.mean():.0f} tokens on average{f' (dropped: {dropped})' if dropped else ''}"
    )
    return Finding("corpus", OK, detail)
