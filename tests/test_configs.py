"""The configs that ship with raylux are read without an error, and their queries are queries."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from raylux.config import Config

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
QUERIES = sorted((ROOT / "configs" / "queries").glob("*.yaml"))


def test_the_configs_that_are_promised_are_there() -> None:
    names = {path.stem for path in CONFIGS}
    assert {"quickstart", "smollm2-wiki", "gpt2", "pythia-70m", "llama-3-8b"} <= names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_loads_and_names_its_own_folder_and_a_query_file_that_is_there(path: Path) -> None:
    config = Config.load(path)
    assert config.run.folder == f"runs/{path.stem}"
    assert ROOT / config.queries.path in QUERIES
    assert not config.model.trust_remote_code


@pytest.mark.parametrize("path", QUERIES, ids=lambda path: path.stem)
def test_queries_have_ids_prompts_and_completions(path: Path) -> None:
    queries = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(queries, list)
    assert queries
    for query in queries:
        assert (
            {"id", "prompt", "completion"} <= query.keys() <= {"id", "prompt", "completion", "contrast", "measurement"}
        )
        # tok(prompt) + tok(completion) with no space added between them: the completion brings it.
        assert query["completion"].startswith(" "), query
        assert not query["prompt"].endswith(" "), query
    assert len({query["id"] for query in queries}) == len(queries)


def test_every_query_file_is_used() -> None:
    assert {ROOT / Config.load(path).queries.path for path in CONFIGS} == set(QUERIES)


def test_the_real_run_asks_eight_queries_of_enough_sequences() -> None:
    config = Config.load(ROOT / "configs" / "smollm2-wiki.yaml")
    queries = yaml.safe_load((ROOT / config.queries.path).read_text(encoding="utf-8"))
    assert len(queries) == 8
    assert config.fit.sequences >= 64
    assert config.prefilter.top * len(queries) >= 200
