"""Runs that the tests of this folder look at: one of everything, one behind a prefilter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import raylux
from tests.small import Inputs, make_inputs

IDF = ("prefilter.kind=idf", "prefilter.top=9")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"), "gpt2", n_layer=1)


@pytest.fixture(autouse=True)
def _all_queries(inputs: Inputs) -> Iterator[None]:
    yield
    inputs.ask()


@pytest.fixture(scope="module")
def usual(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> raylux.Run:
    """Dense, every sequence scored."""
    return inputs.run(tmp_path_factory.mktemp("usual") / "run", "query.max_error=0")


@pytest.fixture(scope="module")
def filtered(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> raylux.Run:
    """With a prefilter: not every pair has a score, and not every scored pair a prefilter score."""
    return inputs.run(tmp_path_factory.mktemp("filtered") / "run", "query.max_error=0", *IDF)
