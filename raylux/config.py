"""What a config file may say: one pydantic model per section, unknown keys are errors.

``Config.load`` reads YAML, applies ``section.key=value`` overrides as the command line does and
reports every mistake in one line. Relative paths are taken from the working directory.
"""

from __future__ import annotations

import difflib
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from raylux.errors import UserError, shown
from raylux.markup import odd_character, parse_yaml

_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")
_CONFIG_LIMIT = 1 << 20  # bytes: a config is some kilobytes, anything larger is another file


class Section(BaseModel):
    """Base of all sections: immutable, a key it does not know is an error, and nothing is taken for something else.

    Strict: ``true`` is no number and text is neither. NaN and infinity are no values.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, strict=True, allow_inf_nan=False)


def _name(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    odd = odd_character(text)
    if odd is not None:
        raise ValueError(f"must not hold the character {odd}")
    return text


def _exponent(value: Any) -> Any:
    """``1e-3`` is a number to everybody but YAML 1.1."""
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def _listed(value: Any) -> Any:
    """One text or a list of them, as the tuple that a section keeps."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


Auto = Literal["auto"]
Test = Literal["lds", "removal", "loo", "pbrf", "planted", "mislabelled", "prefilter"]
Name = Annotated[str, AfterValidator(_name)]  # of a file, a folder, a field
Names = Annotated[tuple[Name, ...], BeforeValidator(_listed)]
Count = Annotated[int, Field(ge=1, le=10**15)]
Actors = Annotated[int, Field(ge=1, le=100_000)]
# Ray's labels of a node, as it takes them; a value that it would read as a condition is none.
Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._/-]{0,250}[A-Za-z0-9])?$")]
# Names a folder, too.
EstimatorName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ,._+-]{0,59}$")]
LabelValue = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$")]
Labels = dict[Label, LabelValue]
Real = Annotated[float, BeforeValidator(_exponent)]
NotNegative = Annotated[Real, Field(ge=0)]
Positive = Annotated[Real, Field(gt=0)]


class RunSection(Section):
    folder: Name = Field(description="run folder: everything a run computes; local path or fsspec URL")


class ModelSection(Section):
    path: Name = Field(description="local folder, GGUF file, hub name, fsspec URL or package://MODULE/FILE")
    tokenizer: Name | None = Field(None, description="where the tokenizer is, if not with the model")
    adapter: Name | None = Field(None, description="a LoRA adapter, as PEFT keeps it: its own matrices are tracked")
    task: Literal["auto", "causal-lm", "classification"] = Field(
        "auto", description="what the model is for; auto: by the architecture that its config.json names"
    )
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    device_map: Literal["auto", "balanced"] | dict[str, int | Name] | None = Field(
        None,
        description="a model over several devices: balanced over a worker's GPUs; auto: what they lack room for is "
        "read from disk; or module -> GPU number, cpu or disk",
    )
    checkpointing: bool = Field(
        False, description="keep a block's input alone and compute its activations again in the backward pass"
    )
    layers: Names | None = Field(
        None, min_length=1, description="glob patterns of module names to track; default: every MLP linear"
    )
    strict: bool = Field(False, description="a layer of an MLP that cannot be tracked is an error, not a line")
    trust_remote_code: bool = Field(False, description="run code that ships with the model")


class CorpusSection(Section):
    path: Name = Field(description="file, folder, glob, hub name, fsspec URL or package://MODULE/FILE")
    format: Literal["auto", "jsonl", "json", "parquet", "text", "hub"] = "auto"
    split: Name = Field("train", description="split of a hub data set")
    text: Name = Field("text", description="field that holds the text")
    id: Name | None = Field(None, description="field that holds the document's id; default: its number")
    label: Name | None = Field(None, description="field that holds a text's class, for a classifier; default: label")
    keep: Names = Field((), description="fields to keep beside each sequence")
    max_length: int = Field(512, ge=2, le=10**9, description="tokens per sequence, at most")
    pack: bool = Field(False, description="join documents into sequences of max_length tokens; the last may be shorter")
    limit: Count | None = Field(None, description="read this many documents, then stop")


class QueriesSection(Section):
    path: Name = Field(description="YAML or jsonl file of queries")


class FitSection(Section):
    sequences: Count = Field(4096, description="sequences to fit the curvature on, at most")
    covariance_sequences: Count | None = Field(
        None, description="of them, those that A and S are summed over: the first drawn, in whole units; none: all"
    )
    labels: Literal["sampled", "dataset"] = Field(
        "sampled", description="sampled: from the model (true Fisher); dataset: empirical Fisher"
    )
    seed: int = Field(0, ge=0, lt=2**63)
    unit_tokens: Count | Auto = Field("auto", description="tokens in a fit unit")
    passes: Annotated[int, Field(ge=1, le=64)] | Auto = Field(
        "auto", description="layer passes of each stage that sums; auto: as few as the workers' memory allows"
    )
    eigh: Literal["auto", "float32", "float64"] = Field(
        "auto",
        description="of eigendecompositions; float32: but for leading vectors, and checked; auto: that on a CPU",
    )
    snapshot: NotNegative | Auto = Field(
        "auto", description="seconds between snapshots of the sums; 0: after every unit; auto: by their cost"
    )


class CurvatureSection(Section):
    kind: Literal[
        "ekfac",
        "kfac",
        "tekfac",
        "tkfac",
        "eshampoo",
        "shampoo",
        "diagonal",
        "gauss_newton",
        "hessian",
        "trackstar",
        "identity",
        "cosine",
    ] = "ekfac"
    blocks: Literal[1, 2, 4] = Field(
        1, description="A and S of a layer are kept within so many blocks of its inputs, and of its outputs"
    )
    damping: NotNegative | Auto = Field("auto", description="λ; auto: 0.1 × mean(Λ) of each layer")
    projection: Annotated[int, Field(ge=1, le=64)] = Field(
        16, description="K of trackstar: gradients of a layer are projected to K by K"
    )
    optimizer: Name | None = Field(
        None,
        description="of trackstar: a file with the second moments of the optimizer that trained the model, "
        "optimizer.pt of transformers' Trainer or safetensors; none: the mean squares of the fitted gradients",
    )
    segment: Positive | None = Field(
        None,
        description="the run stands for a segment of training (SOURCE): learning rates summed over its steps, per "
        "summed loss of a sequence",
    )
    solver: Literal["direct", "pcg", "astra", "cg", "lissa"] = Field(
        "direct",
        description="how a query is solved: direct by the kind's own inverse; the others by products with the exact "
        "Gauss-Newton matrix of the fitted sequences, pcg and astra from the direct solution on",
    )
    iterations: Count | Auto = Field(
        "auto", description="of a solver, at most; auto: pcg 30, cg 50, astra 200, lissa 1000"
    )
    tolerance: NotNegative = Field(1e-3, description="a query is solved where its relative residual is no larger")
    scale: Positive | Auto = Field(
        "auto", description="of lissa, more than half the largest eigenvalue of G + λ; auto: its trace"
    )
    step: Positive = Field(0.01, description="of astra")
    batch: Count = Field(32, description="fitted sequences drawn for an iteration of astra and lissa")

    @property
    def projected(self) -> int:
        """K of a kind that projects gradients; 0: it does not."""
        return self.projection if self.kind == "trackstar" else 0


class PrefilterSection(Section):
    kind: Literal["idf", "tfidf", "bm25", "none"] = Field(
        "idf", description="idf: sum of IDF over shared tokens (Grosse et al. 2023); none: all sequences"
    )
    top: Count = Field(10_000, description="candidates per query")


class QuerySection(Section):
    max_error: Real = Field(
        0.01, ge=0.0, lt=1.0, description="allowed RMS error of a query's scores by low rank; 0: dense"
    )
    low_rank: Literal["auto", "always"] = Field(
        "auto", description="auto: compress s_test where all queries together are too large to be kept dense"
    )
    basis: Literal["auto", "standard", "eigen"] = Field(
        "auto", description="eigen: leave s_test in the eigenbases and rotate the candidates; auto: the cheaper way"
    )
    max_rank: Count = Field(256, description="above this rank a layer's s_test is kept dense")
    carried_from: Name | Annotated[Names, Field(min_length=1)] | None = Field(
        None,
        union_mode="left_to_right",
        description="run folder of the segment, or stage, of training after this one, whose queries are carried back "
        "to it; several: of its checkpoints",
    )
    probes: Count | Auto = Field("auto", description="sequences on which the error is measured; auto: 32 to 128")

    @property
    def later(self) -> tuple[str, ...]:
        """The run folders that ``carried_from`` names."""
        named = self.carried_from
        return (named,) if isinstance(named, str) else named or ()


class ScoreSection(Section):
    unit: Literal["nats", "raw"] = "nats"
    train_size: Count | None = Field(
        None, description="N, the sequences the model was trained on; default: the corpus's size"
    )
    layers: bool = Field(False, description="keep the scores of each layer too")
    self_influence: bool = Field(
        False, description="measure the gradient of each scored sequence, its self-influence among it"
    )
    best: Count | None = Field(
        None,
        description="only so many best sequences of each query are wanted: all pairs are estimated first, and those "
        "that may be among them are scored exactly; none: all pairs are",
    )
    recall: Real = Field(
        0.99, ge=0.5, lt=1, description="with best: the share of the best that is to be found, as the run estimates it"
    )
    token_top: int = Field(10, ge=0, le=10**9, description="per-token scores for this many best sequences of a query")
    unit_size: Count | Auto = Field("auto", description="corpus sequences in a score unit")


class EngineSection(Section):
    backend: Literal["ray", "local"] = "ray"
    workers: Actors | Auto = Field("auto", description="gradient workers; auto: as many as fit")
    shards: Actors | Auto = Field("auto", description="factor shards; auto: as many as workers")
    worker_labels: Labels = Field({}, description="gradient workers run on nodes with these labels alone")
    shard_labels: Labels = Field({}, description="factor shards are spread over nodes with these labels alone")
    gpus_per_worker: int = Field(1, ge=1, le=1024, description="GPUs of a worker, over which model.device_map goes")
    threads: int = Field(1, ge=1, le=4096, description="CPU threads of a worker (changes bits)")
    batch_tokens: Count | Auto = Field("auto", description="tokens in a batch, at most (changes bits)")
    contraction_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="precision of products of captured tensors; auto: bfloat16 where it pays and holds"
    )
    keep_captured: int | Literal["auto", "never"] = Field(
        "auto", description="bytes of captured sequences that a worker keeps on its disk; auto: a quarter of it"
    )
    timeout: Real = Field(600.0, gt=0, le=10**9, description="seconds without any unit done before giving up")


class EvaluateSection(Section):
    folder: Name | None = Field(None, description="where results go; default: run.folder with -evaluate behind it")
    estimators: dict[EstimatorName, Names] = Field(
        {}, description="what is compared: a name for each, and its overrides (or bm25, idf, tfidf, random)"
    )
    tests: Annotated[tuple[Test, ...], BeforeValidator(_listed)] = Field(
        ("lds",), min_length=1, description="what they are held against"
    )
    against: Name | None = Field(None, description="the estimator that differences are taken from; default: the first")
    scored: Literal["given", "trained"] = Field(
        "given", description="given: model.path as it is; trained: what the recipe makes of the whole corpus"
    )
    start: Name | None = Field(None, description="weights that training starts from; default: random ones by the seed")
    epochs: Count = Field(12, description="of training, over the whole corpus")
    warm_epochs: Count | Auto = Field("auto", description="of going on from the scored model; auto: half of epochs")
    batch_tokens: Count = Field(1024, description="tokens of a training batch with its padding, at most")
    rate: Positive = Field(2e-3, description="largest learning rate, of AdamW")
    weight_decay: NotNegative = 0.01
    seeds: int = Field(2, ge=1, le=1000, description="models trained for each set; what they say is averaged")
    seed: int = Field(0, ge=0, lt=2**31, description="the first of them, and of everything that is drawn")
    subsets: int = Field(64, ge=4, le=10**6, description="random subsets of lds")
    share: Real = Field(0.5, gt=0, lt=1, description="of the corpus in a subset")
    remove: Count = Field(10, description="sequences with the largest (and least) scores that removal leaves out")
    queries: Count | None = Field(None, description="queries of removal, the first so many; default: all")
    sequences: int = Field(8, ge=3, le=10**6, description="sequences that loo and pbrf leave out one by one")
    marks: Name | None = Field(None, description="field of the corpus that marks planted or mislabelled sequences")
    top: Count = Field(10, description="best sequences that count in planted and prefilter")
    draws: int = Field(2000, ge=100, le=10**6, description="of the bootstrap that intervals come from")


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
    evaluate: EvaluateSection = EvaluateSection()

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
            if isinstance(target, dict):  # else the section is reported below
                target[key] = value
        for name, keys in merged.items():
            if not isinstance(name, str):
                raise UserError(f"{where}: unknown section {shown(name)}; known: {', '.join(cls.model_fields)}")
            if name in cls.model_fields and not isinstance(keys, (dict, Section)):
                what = "is empty; give it keys or remove it" if keys is None else f"is {shown(keys)}"
                raise UserError(f"{where}: the section '{name}' must be a mapping of keys, but {what}")
        try:
            return cls.model_validate(merged)
        except ValidationError as error:
            raise UserError(f"{where}: {_first_problem(error)}") from None

    def dump(self) -> dict[str, Any]:
        """The config as plain lists, numbers and strings, defaults included."""
        return self.model_dump(mode="json")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            # A pipe or a device may keep a reader waiting for ever.
            kind = "a folder" if stat.S_ISDIR(facts.st_mode) else "no regular file"
            raise UserError(f"{path}: is {kind}; a config is a YAML file")
        if facts.st_size > _CONFIG_LIMIT:
            raise UserError(f"{path}: {facts.st_size:,} bytes are too many for a config; is it another file?")
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # a NUL in the name
        raise UserError(f"{path}: cannot be read ({error})") from None
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise UserError(f"{path}: a config is a mapping of sections (run, model, corpus, queries, …)")
    return data


def _split_override(text: str) -> tuple[str, str, Any]:
    name, equals, value = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        raise UserError(f"override {shown(text)}: write section.key=value, as in prefilter.top=500")
    return section, key, parse_yaml(value, f"override {shown(text)}")


def _first_problem(error: ValidationError) -> str:
    """The first key that is wrong as one line, with the nearest known key for an unknown one."""
    problems: dict[tuple[int | str, ...], list[Any]] = {}
    for problem in error.errors(include_url=False):
        # A union's location ends in the name of the branch that was tried: a config's key has two parts.
        problems.setdefault(problem["loc"][:2], []).append(problem)
    place, found = next(iter(problems.items()))
    parts = [str(part) for part in place]
    name = ".".join(parts)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    kind = found[0]["type"]
    if kind in ("extra_forbidden", "invalid_key"):
        known = _keys_at(parts[:-1])
        near = difflib.get_close_matches(parts[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
        return f"unknown {'section' if len(parts) == 1 else 'key'} {shown(name)}; {hint}{more}"
    if kind == "missing":
        return f"'{name}' is required{more}"
    said = " or ".join(dict.fromkeys(problem["msg"].removeprefix("Value error, ") for problem in found))
    return f"'{name}' = {shown(found[0].get('input'))}: {said}{more}"


def _keys_at(place: list[str]) -> list[str]:
    if not place:
        return list(Config.model_fields)
    section = Config.model_fields[place[0]].annotation
    return list(section.model_fields) if isinstance(section, type) and issubclass(section, Section) else []
