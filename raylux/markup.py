"""YAML and JSON of a user's file as plain data: mappings, lists, text, numbers, true, false and null.

What the formats allow beyond that is where files surprise: a key given twice of which one is lost, ``010`` that is
eight, ``12:30`` that is 750, dates, tags that make objects, aliases that unfold to gigabytes. All of it is either
text as it stands or an error with its line.
"""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

import yaml

from raylux.errors import UserError, shown

_MERGE = "<<"


class _Loader(yaml.SafeLoader):
    """YAML without tags, without aliases of collections and without keys that come twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if getattr(event, "tag", None) not in (None, "!"):
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            raise _problem(f"the tag {tag} is not read; write the value without it", event)
        node = super().compose_node(parent, index)
        if isinstance(event, yaml.AliasEvent) and not isinstance(node, yaml.ScalarNode):
            raise _problem(f"*{event.anchor} stands for a list or mapping; write it out", event)
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        data: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _problem("a key must be text", key_node)
            key = self.construct_object(key_node)
            if key in data:
                raise _problem(f"the key {shown(key)} comes twice", key_node)
            if key == _MERGE:
                raise _problem("merge keys (<<) are not read; write the keys out", key_node)
            data[key] = self.construct_object(value_node, deep=deep)
        return data

    def construct_plain_map(self, node: Any) -> Any:
        data: dict[Any, Any] = {}
        yield data
        data.update(self.construct_mapping(node))

    def construct_int(self, node: Any) -> int:
        text = node.value.replace("_", "")
        return int(text, 16 if "x" in text else 10)

    def construct_float(self, node: Any) -> float:
        return float(node.value.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))


_Loader.yaml_implicit_resolvers = {}
# As YAML 1.1 has them, but for numbers: none of base 8, 2 or 60. So whatever PyYAML writes as text is read as text.
for _tag, _pattern, _first in (
    ("bool", r"^(?:yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF)$", "yYnNtTfFoO"),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("int", r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$", "-+0123456789"),
    (
        "float",
        r"^(?:[-+]?(?:(?:(?:0|[1-9][0-9_]*)\.[0-9_]*|\.[0-9]+)(?:[eE][-+][0-9]+)?|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN))$",
        "-+0123456789.",
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_plain_map)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_float)


def parse_yaml(text: str, where: str) -> Any:
    """One YAML document as plain data.

    Raises:
        UserError: no YAML, or YAML that is not read here; the line begins with ``where`` and has the line's number.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # derives from the safe loader
    except yaml.reader.ReaderError as error:
        number = text.count("\n", 0, int(error.position)) + 1
        character = f"U+{_point(error):04X}"
        raise UserError(f"{where}: not valid YAML at line {number}: holds the character {character}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise UserError(f"{where}: not valid YAML{line}: {problem}") from None
    except RecursionError:
        raise UserError(f"{where}: YAML nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{where}: not valid YAML: {error}") from None


def parse_json(text: str, where: str) -> Any:
    """JSON text as plain data.

    Raises:
        UserError: no JSON, or a key comes twice in an object; the line begins with ``where``.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        lines = error.msg == "Extra data" and error.lineno > 1
        hint = "; one object per line? then its format is jsonl" if lines else ""
        raise UserError(f"{where}: not valid JSON at {place}: {error.msg}{hint}") from None
    except RecursionError:
        raise UserError(f"{where}: JSON nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits, a key that comes twice
        raise UserError(f"{where}: not valid JSON: {error}") from None


def odd_character(text: str) -> str | None:
    """The first character that no name may hold, as ``U+000A``: a control character or half a surrogate pair."""
    odd = next((c for c in text if unicodedata.category(c) in ("Cc", "Cs")), None)
    return None if odd is None else f"U+{ord(odd):04X}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} comes twice")
    return data


def _point(error: yaml.reader.ReaderError) -> int:
    character: Any = error.character
    return character if isinstance(character, int) else ord(character)


def _problem(text: str, place: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=place.start_mark)
