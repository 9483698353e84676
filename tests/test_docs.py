"""The documents name what is there: every key of a config, every command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from raylux.config import Config, Section

ROOT = Path(__file__).parent.parent
KEYS = [
    f"{name}.{key}"
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    for key in field.annotation.model_fields
]


@pytest.mark.parametrize("key", KEYS)
def test_every_key_of_a_config_is_documented(key: str) -> None:
    text = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert f"`{key}`" in text


def test_no_key_is_documented_that_does_not_exist() -> None:
    text = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `([a-z]+\.[a-z_]+)` \|", text, flags=re.MULTILINE))
    assert named == set(KEYS)


@pytest.mark.parametrize(
    "page",
    ["README.md", "CONTRIBUTING.md", "cluster/README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))],
)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    source = ROOT / page
    links = re.findall(r"\]\((?!https?:)([^)#]+)", source.read_text(encoding="utf-8"))
    missing = [link for link in links if not (source.parent / link).exists()]
    assert not missing
