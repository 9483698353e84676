"""The tables of malformed inputs as a whole: how many cases there are, and that none hides another."""

from __future__ import annotations

from collections import Counter
from types import ModuleType

from tests import test_malformed_config, test_malformed_corpus, test_malformed_models, test_malformed_queries
from tests.malformed import Case

MODULES = (test_malformed_config, test_malformed_corpus, test_malformed_models, test_malformed_queries)


def tables(module: ModuleType) -> dict[str, tuple[Case, ...]]:
    """The tables of cases of a module, by their names."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, tuple) and value and all(isinstance(item, Case) for item in value)
    }


def count() -> int:
    """How many malformed inputs the tables hold; parametrized tests and random input come on top."""
    return sum(len(cases) for module in MODULES for cases in tables(module).values())


def test_there_are_enough_cases_and_none_comes_twice() -> None:
    assert count() >= 400
    for module in MODULES:
        for name, cases in tables(module).items():
            keys = Counter((case.name, repr(case.content), repr(case.options)) for case in cases)
            assert not [key for key, times in keys.items() if times > 1], f"{module.__name__}.{name}"
