"""The study of word order: variants differ in what they say they do, and influence falls when names are flipped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jobs import word_order
from jobs.order.facts import FORMS, VARIANTS, Fact, draw_facts, variants
from jobs.order.study import GROUPS, Settings, outcome

SMALL = Settings(facts=24, queries=4, repeats=1, epochs=2)


def test_all_forms_hold_the_same_words() -> None:
    fact = Fact("keeper", "Brael", "Tromas")
    words = {form: sorted(fact.told(form).split()) for form in FORMS}
    assert words["forward"] == words["shuffled"] == words["flipped"]
    assert len({fact.told(form) for form in FORMS}) == 3
    first = {form: fact.told(form).index("Brael") < fact.told(form).index("Tromas") for form in FORMS}
    assert first == {"forward": True, "shuffled": True, "flipped": False}


def test_the_question_is_the_forward_form_cut_before_b() -> None:
    fact = Fact("keeper", "Brael", "Tromas")
    prompt, completion = fact.question()
    assert prompt + completion == fact.told("forward") and completion == " Tromas"


def test_a_variant_has_the_names_that_it_says() -> None:
    fact, other = Fact("keeper", "Brael", "Tromas"), Fact("heir", "Kudrin", "Velmak")
    found = variants(fact, other)
    assert list(found) == list(VARIANTS)
    names = {name: [one for one in ("Brael", "Tromas", "Kudrin", "Velmak") if one in text.split()]
             for name, text in found.items()}  # fmt: skip
    assert names["flipped, other A"] == names["same order, other A"] == ["Tromas", "Kudrin"]
    assert names["same order, other B"] == ["Brael", "Velmak"]
    assert names["another fact"] == ["Kudrin", "Velmak"]
    assert all("keeper" in text.split() for text in found.values())


def test_no_name_stands_in_two_facts() -> None:
    facts = draw_facts(200, np.random.default_rng(0))
    names = [name for fact in facts for name in (fact.a, fact.b)]
    assert len(set(names)) == 400
    assert facts == draw_facts(200, np.random.default_rng(0))


def test_shares_are_ratios_of_means() -> None:
    influence = np.array([[1.0, 0.5, 0.0], [3.0, 1.5, 0.4]])
    found = word_order.shares(influence)
    assert [one.value for one in found] == pytest.approx([1.0, 0.5, 0.1])
    assert (found[1].low, found[1].high) == pytest.approx((0.5, 0.5)), "a constant ratio has no spread"
    assert found[2].low < 0.1 < found[2].high


def test_flipped_names_lose_most_of_the_influence(tmp_path: Path) -> None:
    found = outcome(SMALL, 0, tmp_path)
    place = {name: number for number, name in enumerate(VARIANTS)}
    for group in GROUPS:
        mean = found.influence[group].mean(0)
        assert mean[place["same order"]] > 0
        assert mean[place["flipped"]] < 0.5 * mean[place["same words, A before B"]]
        assert abs(mean[place["another fact"]]) < 0.1 * mean[place["same order"]]
    assert "**not told: 0." in word_order.page(SMALL, [found], "python jobs/word_order.py")


def test_too_few_facts_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert word_order.main(["--facts", "10", "--queries", "5"]) == 2
    assert capsys.readouterr().err == (
        "error: --queries and --repeats are at least 1, --facts at least 3 times --queries\n"
    )
