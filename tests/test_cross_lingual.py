"""The cross-lingual study: subjects are where they should be, and what is said of scores is what was put into them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from jobs import cross_lingual, pages
from jobs.lingual import study as lingual
from jobs.lingual.measures import TOP, Scored, above, mean, ratio
from jobs.lingual.study import Size
from jobs.lingual.subjects import LANGUAGES, PROBES, Drawn, Lead, draw
from raylux.errors import UserError

HELD, APART = 2, 3


@pytest.fixture(scope="module")
def drawn() -> Drawn:
    return draw(60, HELD, APART, 160, 0)


def scored(drawn: Drawn, of: object) -> Scored:
    """Scores that a function (query, sequence) of two leads gives."""
    sequences = [*drawn.train, *drawn.probes]
    return Scored(drawn, np.array([[of(query, one) for one in sequences] for query in drawn.queries], float))  # type: ignore[operator]


def test_queries_are_not_trained_on_and_their_twins_are(drawn: Drawn) -> None:
    trained = {(lead.language, lead.title) for lead in drawn.train}
    assert len(trained) == len(drawn.train) == 60 * len(LANGUAGES)
    assert [lead.language for lead in drawn.held] == [language for language in LANGUAGES for _ in range(HELD)]
    for query in drawn.held:
        assert {language for language in LANGUAGES if (language, query.title) in trained} == {*LANGUAGES} - {
            query.language
        }
    for subject in drawn.apart:
        assert len({lead.title for lead in subject.values()}) == 1
        assert not trained & {(language, lead.title) for language, lead in subject.items()}
    assert drawn == draw(60, HELD, APART, 160, 0) != draw(60, HELD, APART, 160, 1)


def test_probes_differ_in_text_or_name_as_they_say(drawn: Drawn) -> None:
    probes = np.array(drawn.probes, dtype=object).reshape(APART, len(LANGUAGES), len(PROBES))
    for place, own in enumerate(drawn.apart):
        other = drawn.apart[(place + 1) % APART]
        for language, (twin, renamed, lent, stranger) in zip(LANGUAGES, probes[place], strict=True):
            assert twin is own[language] and stranger is other[language]
            name, strange = twin.title, stranger.title
            assert strange in renamed.text and renamed.text.replace(strange, name) == twin.text
            assert name in lent.text and lent.text.replace(name, strange) == stranger.text


def test_a_lead_has_another_name_wherever_its_own_stood() -> None:
    lead = Lead("en", "Rome", "Geography", "Rome is the capital. Rome was founded")
    assert lead.called("Oslo") == Lead("en", "Oslo", "Geography", "Oslo is the capital. Oslo was founded")


def test_above_is_the_area_under_the_curve() -> None:
    random = np.random.default_rng(0)
    one, others = random.integers(0, 6, 9).astype(float), random.integers(0, 6, 14).astype(float)
    labels = np.repeat([1, 0], [len(one), len(others)])
    assert above(one, others) == pytest.approx(roc_auc_score(labels, np.concatenate([one, others])))
    assert np.isnan(above(one, one[:0]))


def test_an_interval_is_of_rows_drawn_together() -> None:
    one = np.array([1.0, 3.0, 2.0])
    found = ratio(one, 2 * one)
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5)), "a constant ratio has no spread"
    found = mean(np.array([0.0, 1.0, np.nan]))
    assert found.low == 0.0 and found.value == 0.5 and found.high == 1.0


def test_scores_by_subject_find_the_twins(drawn: Drawn) -> None:
    made = scored(drawn, lambda query, one: query.title == one.title)
    assert (made.twins() == 1).all() and (made.names() == [[1, 0.5, 1]] * APART).all()
    assert made.probes().tolist() == [[1, 0, 1, 0]] * APART
    assert np.nanmax(np.abs(made.sizes() - [1, 0, 0])) == 0
    # It says nothing of anything but the title.
    for abroad in (False, True):
        areas = made.topics(abroad)
        assert (areas[~np.isnan(areas)] == 0.5).all()


def test_scores_by_text_leave_the_name_out(drawn: Drawn) -> None:
    texts = {lead.text.replace(lead.title, ""): lead.title for subject in drawn.apart for lead in subject.values()}
    made = scored(drawn, lambda query, one: texts.get(one.text.replace(one.title, "")) == query.title)
    assert (made.names() == [[1, 1, 0.5]] * APART).all()


def test_scores_by_language_stay_in_it(drawn: Drawn) -> None:
    made = scored(drawn, lambda query, one: 1.0 if query.language == one.language else -1.0)
    for place, shares in enumerate(made.languages().values()):
        assert shares.shape == (HELD + APART, len(LANGUAGES)) and (shares == np.eye(len(LANGUAGES))[place]).all()
    # In another language nothing is left of the best sequences but its sign; another subject's query has it all.
    assert made.left() == pytest.approx(np.tile([1, -1, -1, 1], (APART, 1)))
    assert (made.twins() == 0.5).all()
    homes = made.twins_at_home()
    assert (homes[~np.isnan(homes)] == 0).all()


def test_scores_by_topic_are_known_in_both_languages(drawn: Drawn) -> None:
    topics = {(lead.language, lead.title): lead.topic for lead in drawn.train}

    def of(query: Lead, one: Lead) -> float:
        own = query.topic if one.language == query.language else topics.get((one.language, query.title))
        return float(one.topic == own)

    made = scored(drawn, of)
    for abroad in (False, True):
        areas = made.topics(abroad)
        assert (areas[~np.isnan(areas)] == 1).all() and not np.isnan(areas).all()


def test_what_is_left_is_of_the_best_of_the_query_s_own_language(drawn: Drawn) -> None:
    """Against sums over one subject and pair of languages at a time."""
    random = np.random.default_rng(1)
    made = Scored(drawn, random.normal(size=(len(drawn.queries), len(drawn.train) + len(drawn.probes))))
    place = {(lead.title, lead.language): at for at, lead in enumerate(drawn.queries)}
    own, other = drawn.apart[1], drawn.apart[2]
    found = []
    for home, query in own.items():
        row = {
            at: made.scores[place[query.title, home], at]
            for at, lead in enumerate(drawn.train)
            if lead.language == home
        }
        best = sorted(row, key=lambda at: -row[at])[:TOP]
        for abroad in set(LANGUAGES) - {home}:
            asked = (query, own[abroad], other[abroad], other[home])
            found.append([made.scores[place[one.title, one.language], best].mean() for one in asked])
    assert made.left()[1] == pytest.approx(np.mean(found, 0))


SMALL = ["--each=40", "--held=2", "--apart=2", "--epochs=1", "--vocabulary=400", "--characters=60"]


def test_the_page_and_the_plot_come_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    monkeypatch.setattr(lingual, "SIZES", (Size(16, 2),))
    given, drawn = [*SMALL, "--folder", str(tmp_path / "kept"), "--write"], find_spec("matplotlib") is not None
    assert cross_lingual.main(given) == (0 if drawn else 2)
    text = (tmp_path / "cross-lingual.md").read_text(encoding="utf-8")
    assert "| EK-FAC | 16 × 2 |" in text and "| BM25 | |" in text and str(tmp_path) not in text
    assert "nan" not in text
    if drawn:
        assert (tmp_path / "cross-lingual.png").stat().st_size > 10_000

    def never(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(lingual, "train_model", never)
    assert cross_lingual.main(given) == (0 if drawn else 2)
    assert (tmp_path / "cross-lingual.md").read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--apart", "1"], "--apart at least 2"), (["--held", "20", "--each", "40"], "--each is 40"),
     (["--each", "9000"], "lower --each")],
)  # fmt: skip
def test_bad_sizes_are_one_line(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cross_lingual.main([*options, "--folder", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and said in line


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raylux.demo.corpus.WIKI_MODULE", "no_such_module_here")
    with pytest.raises(UserError, match="pip install"):
        draw(60, HELD, APART, 77, 0)
