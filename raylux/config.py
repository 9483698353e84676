"""What a config file may say: one pydantic model per section, unknown keys are errors.

``Config.load`` reads YAML, applies ``section.key=value`` overrides as the command line does and
reports every mistake in one line. Relative paths are taken from the working directory.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from raylux.errors import UserError

Auto = Literal["auto"]


class Section(BaseModel):
    """Base of all sections: immutable, and a key it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class RunSection(Section):
    folder: str = Field(description="run folder: everything a run computes; local path or fsspec URL")


class ModelSection(Section):
    path: str = Field(description="local folder, GGUF file, hub name, fsspec URL or package://MODULE/FILE")
    tokenizer: str | None = Field(None, description="where the tokenizer is, if not with the model")
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    layers: tuple[str, ...] | None = Field(
        None, description="glob patterns of module names to track; default: every MLP linear"
    )
    trust_remote_code: bool = Field(False, description="run code that ships with the model")

    @field_validator("layers", mode="before")
    @classmethod
    def _one_pattern(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class CorpusSection(Section):
    path: str = Field(description="file, folder, glob, hub name, fsspec URL or package://MODULE/FILE")
    format: Literal["auto", "jsonl", "json", "parquet", "text", "hub"] = "auto"
    split: str = Field("train", description="split of a hub data set")
    text: str = Field("text", description="field that holds the text")
    id: str | None = Field(None, description="field that holds the document's id; default: its number")
    keep: tuple[str, ...] = Field((), description="fields to keep beside each sequence")
    max_length: int = Field(512, ge=2, description="tokens per sequence, at most")
    pack: bool = Field(False, description="join documents into sequences of max_length tokens; the last may be shorter")
    limit: int | None = Field(None, ge=1, description="read this many documents, then stop")

    @field_validator("keep", mode="before")
    @classmethod
    def _one_field(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class QueriesSection(Section):
    path: str = Field(description="YAML or jsonl file of queries")


class FitSection(Section):
    sequences: int = Field(4096, ge=1, description="sequences to fit the curvature on, at most")
    labels: Literal["sampled", "dataset"] = Field(
        "sampled", description="sampled: from the model (true Fisher); dataset: empirical Fisher"
    )
    seed: int = 0
    unit_tokens: int | Auto = Field("auto", description="tokens in a fit unit")
    snapshot: float | Auto = Field(
        "auto", description="seconds between snapshots of the sums; 0: after every unit; auto: by their cost"
    )

    @field_validator("snapshot")
    @classmethod
    def _not_negative(cls, value: float | str) -> float | str:
        if not isinstance(value, str) and not 0.0 <= value < float("inf"):
            raise ValueError("snapshot is a finite number of seconds ≥ 0, or auto")
        return value


class CurvatureSection(Section):
    kind: Literal["ekfac", "kfac", "diagonal", "identity", "cosine"] = "ekfac"
    damping: float | Auto = Field("auto", description="λ; auto: 0.1 × mean(Λ) of each layer")

    @field_validator("damping")
    @classmethod
    def _positive(cls, value: float | str) -> float | str:
        if not isinstance(value, str) and not 0.0 <= value < float("inf"):
            raise ValueError("damping is a finite number ≥ 0, or auto")
        return value


class PrefilterSection(Section):
    kind: Literal["idf", "tfidf", "bm25", "none"] = Field(
        "idf", description="idf: sum of IDF over shared tokens (Grosse et al. 2023); none: all sequences"
    )
    top: int = Field(10_000, ge=1, description="candidates per query")


class QuerySection(Section):
    max_error: float = Field(
        0.01, ge=0.0, lt=1.0, description="allowed RMS error of a query's scores by low rank; 0: dense"
    )
    max_rank: int = Field(256, ge=1, description="above this rank a layer's s_test is kept dense")
    probes: int | Auto = Field("auto", description="sequences on which the error is measured; auto: 32 to 128")

    @field_validator("probes")
    @classmethod
    def _some(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("probes is a whole number of at least 1, or auto")
        return value


class ScoreSection(Section):
    unit: Literal["nats", "raw"] = "nats"
    train_size: int | None = Field(
        None, ge=1, description="N, the sequences the model was trained on; default: the corpus's size"
    )
    layers: bool = Field(False, description="keep the scores of each layer too")
    token_top: int = Field(10, ge=0, description="per-token scores for this many best sequences of a query")
    unit_size: int | Auto = Field("auto", description="corpus sequences in a score unit")


class EngineSection(Section):
    backend: Literal["ray", "local"] = "ray"
    workers: int | Auto = Field("auto", description="gradient workers; auto: as many as fit")
    shards: int | Auto = Field("auto", description="factor shards; auto: as many as workers")
    threads: int = Field(1, ge=1, description="CPU threads of a worker (changes bits)")
    batch_tokens: int | Auto = Field("auto", description="tokens in a batch, at most (changes bits)")
    timeout: float = Field(600.0, gt=0, description="seconds without any unit done before giving up")


class Config(Section):
    """A whole config. ``Config.load(path, overrides)`` reads one; ``config.dump()`` is what run.yaml keeps."""

    run: RunSection
    model: ModelSection
    corpus: CorpusSection
    queries: QueriesSection
    fit: FitSection = FitSection()
    curvature: CurvatureSection = CurvatureSection()
    prefilter: PrefilterSection = PrefilterSection()
    query: QuerySection = QuerySection()
    score: ScoreSection = ScoreSection()
    engine: EngineSection = EngineSection()

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Config:
        """Read a YAML config and apply overrides.

        Args:
            path: the YAML file.
            overrides: strings ``section.key=value``; the value is read as YAML.

        Raises:
            UserError: the file is missing or no YAML, a key is unknown, a value does not fit.
        """
        return cls.parse(_read_yaml(Path(path)), overrides, where=str(path))

    @classmethod
    def parse(cls, data: Mapping[str, Any], overrides: Iterable[str] = (), where: str = "config") -> Config:
        """As ``load``, from a mapping of sections that is already in memory."""
        merged = {name: dict(section) if isinstance(section, Mapping) else section for name, section in data.items()}
        for text in overrides:
            section, key, value = _split_override(text)
            target = merged.setdefault(section, {})
            if not isinstance(target, dict):
                raise UserError(f"{where}: section '{section}' must be a mapping of keys")
            target[key] = value
        try:
            return cls.model_validate(merged)
        except ValidationError as error:
            raise UserError(f"{where}: {_first_problem(error)}") from None

    def dump(self) -> dict[str, Any]:
        """The config as plain lists, numbers and strings, defaults included."""
        return self.model_dump(mode="json")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise UserError(
            f"{path}: not valid YAML{line}: {getattr(error, 'problem', None) or 'cannot be parsed'}"
        ) from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: a config is a mapping of sections (run, model, corpus, queries, …)")
    return data


def _split_override(text: str) -> tuple[str, str, Any]:
    name, equals, value = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        raise UserError(f"override '{text}': write section.key=value, as in prefilter.top=500")
    try:
        return section, key, yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"override '{text}': the value is not valid YAML") from None


def _first_problem(error: ValidationError) -> str:
    """The first problem of a pydantic error as one line, with the nearest known key for an unknown one."""
    problem = error.errors()[0]
    # A union's location ends in the name of the branch that was tried: a config's key has two parts.
    place = [str(part) for part in problem["loc"]][:2]
    name = ".".join(place)
    problems = {error_["loc"][:2] for error_ in error.errors()}
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if problem["type"] == "extra_forbidden":
        known = _keys_at(place[:-1])
        near = difflib.get_close_matches(place[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
        kind = "section" if len(place) == 1 else "key"
        return f"unknown {kind} '{name}'; {hint}{more}"
    if problem["type"] == "missing":
        return f"'{name}' is required{more}"
    value = problem.get("input")
    return f"'{name}' = {value!r}: {problem['msg'].removeprefix('Value error, ')}{more}"


def _keys_at(place: list[str]) -> list[str]:
    if not place:
        return list(Config.model_fields)
    section = Config.model_fields[place[0]].annotation
    return list(section.model_fields) if isinstance(section, type) and issubclass(section, Section) else []
