"""What an evaluation works on: everything that a config names is read and checked before anything is computed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from raylux import fingerprints, models, prefilter
from raylux.config import Config, EvaluateSection, ModelSection
from raylux.corpus import Sequences, load_corpus
from raylux.curvature import KINDS, check_end
from raylux.errors import UserError, shown
from raylux.evaluate import Recipe
from raylux.evaluate.proximal import check_layers
from raylux.queries import Query, load_queries
from raylux.store import RunFolder

# Estimators that need no model, by the word that stands for them.
WORDS = (*prefilter.KINDS, "random")
# What an estimator may not change: all are held against the same truth.
_SHARED = ("run", "corpus", "queries", "prefilter", "evaluate")
_RETRAINS = ("lds", "removal", "loo")


@dataclass(frozen=True)
class Estimator:
    """What is compared with others.

    Attributes:
        name: in tables.
        word: one of ``WORDS``; empty for one that is a run of its own.
        overrides: ``section.key=value`` over the evaluation's config.
    """

    name: str
    word: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Inputs:
    """What a config names, read and found to be well.

    Attributes:
        config: the evaluation's.
        folder: where results go.
        files: of the model; without weights where those that are scored are trained here.
        start: of the weights that training starts from; None: random ones.
        sequences: [N] of the corpus.
        queries: [Q].
        vocabulary: of the model.
        estimators: in the order of the config.
        marks: [N] what ``evaluate.marks`` says of each sequence; None where it is not set.
    """

    config: Config
    folder: RunFolder
    files: models.ModelFiles
    start: models.ModelFiles | None
    sequences: Sequences
    queries: list[Query]
    vocabulary: int
    estimators: tuple[Estimator, ...]
    marks: np.ndarray | None

    @property
    def chosen(self) -> EvaluateSection:
        return self.config.evaluate

    @property
    def against(self) -> str:
        """The estimator that differences are taken from."""
        return self.chosen.against or self.estimators[0].name

    @property
    def recipe(self) -> Recipe:
        chosen = self.chosen
        return Recipe(chosen.epochs, chosen.batch_tokens, chosen.rate, chosen.weight_decay)

    @property
    def warm_recipe(self) -> Recipe:
        """Of going on from the scored model."""
        epochs = self.chosen.warm_epochs
        return Recipe(
            **{**asdict(self.recipe), "epochs": max(1, self.recipe.epochs // 2) if epochs == "auto" else epochs}
        )

    @cached_property
    def print(self) -> str:
        """Tells texts and questions from any others."""
        folded = hashlib.blake2b(digest_size=8)
        corpus = self.sequences
        for array in (corpus.tokens, corpus.offsets, corpus.labels, corpus.classes):
            folded.update(b"none" if array is None else np.ascontiguousarray(array).tobytes())
        for query in self.queries:
            folded.update(f"{query.id} {fingerprints.of_query(query)}".encode())
        return folded.hexdigest()


def read(config: Config) -> Inputs:
    """Check everything that a config names.

    Raises:
        UserError: an estimator, a test or an input cannot be served; nothing was written.
    """
    chosen = config.evaluate
    estimators = tuple(_estimator(config, *item) for item in chosen.estimators.items())
    _check_choice(chosen, estimators)
    if chosen.marks is not None and chosen.marks not in config.corpus.keep:
        keep = (*config.corpus.keep, chosen.marks)
        config = config.model_copy(update={"corpus": config.corpus.model_copy(update={"keep": keep})})
    trusted = config.model.trust_remote_code
    files, weights = models.find_described(config.model)
    if chosen.scored == "given" and not weights:
        raise UserError(
            f"{config.model.path}: holds no weights; evaluate.scored=trained makes some by the recipe, from its "
            "config.json and tokenizer"
        )
    if files.task == "module":
        raise UserError(f"{config.model.path}: a torch module has no evaluation; a language model or classifier has")
    trains = retrains(chosen) or chosen.scored == "trained"
    if trains:
        _check_trainable(config)
    if "pbrf" in chosen.tests:
        _check_optimum(config, files, weights, {one.name: one for one in estimators})
    start = _start(config, files, weights) if trains and chosen.start is not None else None
    described, tokenizer = models.load_config(files, trusted), models.load_tokenizer(files, trusted)
    vocabulary, context = models.vocabulary_size(described), models.context_length(described)
    classes = models.classes_at(files, trusted)
    queries = load_queries(config.queries.path, tokenizer, vocabulary, context, classes)
    sequences = load_corpus(config.corpus, tokenizer, vocabulary, context, classes)
    _check_sizes(chosen, len(sequences))
    place = chosen.folder or config.run.folder.rstrip("/") + "-evaluate"
    marks = None if chosen.marks is None else _marks(config, sequences, queries)
    folder = RunFolder(place)
    if folder.exists:
        raise UserError(f"{place}: holds a run; choose another evaluate.folder")
    return Inputs(config, folder, files, start, sequences, queries, vocabulary, estimators, marks)


def retrains(chosen: EvaluateSection) -> bool:
    """Whether a test wants models that are trained without some sequences."""
    return any(test in _RETRAINS for test in chosen.tests)


def relevant(inputs: Inputs) -> np.ndarray:
    """[Q, N] bool: the sequences whose mark is the query's id."""
    assert inputs.marks is not None
    return np.array([[str(mark) == query.id for mark in inputs.marks.tolist()] for query in inputs.queries])


def mislabelled(inputs: Inputs) -> np.ndarray:
    """[N] bool: the sequences that are marked as wrong."""
    assert inputs.marks is not None
    return np.array([mark is not None and bool(mark) for mark in inputs.marks.tolist()])


def overridden(
    config: Config, folder: str, overrides: tuple[str, ...], model: Mapping[str, Any] | None = None
) -> Config:
    """An estimator's own config: every sequence scored, s_test dense, nothing by token, unless it says otherwise."""
    sections = config.dump()
    del sections["evaluate"]
    sections["run"]["folder"] = folder
    sections["model"] |= dict(model or {})
    sections["prefilter"]["kind"] = "none"
    sections["query"]["max_error"] = 0.0
    sections["score"] |= {"token_top": 0, "layers": False}
    return Config.parse(sections, overrides, where="evaluate.estimators")


def _estimator(config: Config, name: str, said: tuple[str, ...]) -> Estimator:
    where = f"evaluate.estimators '{name}'"
    if len(said) == 1 and "=" not in said[0]:
        if said[0] not in WORDS:
            raise UserError(f"{where}: {shown(said[0])} is neither section.key=value nor one of {', '.join(WORDS)}")
        return Estimator(name, said[0], ())
    for text in said:
        key = text.partition("=")[0].strip()
        if key.partition(".")[0] in _SHARED or key in ("model.tokenizer", "model.adapter"):
            raise UserError(f"{where}: {key} is the same for all; set it in the config itself")
    try:
        own = overridden(config, "evaluate", said)
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('evaluate.estimators: ')}") from None
    if own.query.later:
        raise UserError(
            f"{where}: with query.carried_from a run predicts what its sequences do through a later training, which is "
            "not measured here; leave query.carried_from out"
        )
    return Estimator(name, "", said)


def _check_choice(chosen: EvaluateSection, estimators: tuple[Estimator, ...]) -> None:
    names = [estimator.name for estimator in estimators]
    if not names:
        raise UserError(
            "evaluate.estimators: none is named; name at least one, as in {ekfac: curvature.kind=ekfac, bm25: bm25}"
        )
    if chosen.against is not None and chosen.against not in names:
        raise UserError(f"evaluate.against = {shown(chosen.against)}: no such estimator; one of {', '.join(names)}")
    marked = [test for test in chosen.tests if test in ("planted", "mislabelled")]
    if marked and chosen.marks is None:
        raise UserError(f"evaluate.tests: {marked[0]} needs evaluate.marks, the corpus's field that marks sequences")


def _check_trainable(config: Config) -> None:
    model = config.model
    if model.adapter is not None:
        raise UserError("evaluate: a model with an adapter cannot be trained by the recipe; use tests that train none")
    if model.dtype == "bfloat16":
        raise UserError("evaluate: weights in bfloat16 are too coarse to be trained; set model.dtype=float32")


def _check_optimum(
    config: Config, files: models.ModelFiles, weights: bool, estimators: Mapping[str, Estimator]
) -> None:
    """Raises UserError where there is no proximal optimum that the estimator others are compared with is about."""
    named = config.evaluate.against or next(iter(estimators))
    one = estimators[named]
    where = f"evaluate.tests: pbrf takes λ and the tracked layers of '{named}' (evaluate.against, or the first)"
    own = overridden(config, "evaluate", one.overrides)
    if one.word or not KINDS[own.curvature.kind].predicts:
        what = f"'{one.word}' has neither" if one.word else f"curvature.kind={own.curvature.kind} has no λ"
        raise UserError(f"{where}, and {what}; set evaluate.against to one with a fitted kind, as ekfac")
    check_end(own.curvature.segment, bool(own.query.later), where)
    if own.model.device_map is not None:
        raise UserError(f"{where}: it takes the whole model in float64 on one device; set model.device_map=null")
    structure = models.load_structure(files, own.model.trust_remote_code, weights)
    check_layers(where, models.coverage(structure, own.model.layers, own.model.strict).tracked)


def _check_sizes(chosen: EvaluateSection, count: int) -> None:
    limits = {"remove": (2 * chosen.remove, ["removal"]), "sequences": (chosen.sequences, ["loo", "pbrf"])}
    for key, (needed, tests) in limits.items():
        if needed > count and any(test in chosen.tests for test in tests):
            raise UserError(
                f"evaluate.{key} = {getattr(chosen, key)}: the corpus has {count:,} sequences, {needed:,} are needed"
            )
    if "lds" in chosen.tests and not 0 < round(chosen.share * count) < count:
        raise UserError(f"evaluate.share = {chosen.share}: of {count:,} sequences that is none, or all")


def _start(config: Config, files: models.ModelFiles, weights: bool) -> models.ModelFiles:
    """Raises UserError where the weights are not for the model that is evaluated."""
    place, trusted = str(config.evaluate.start), config.model.trust_remote_code
    found = models.find_model(ModelSection(path=place, trust_remote_code=trusted))
    structure, there = models.load_structure(files, trusted, weights), models.load_structure(found, trusted)
    wanted, given = _shapes(structure), _shapes(there)
    odd = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
    if odd:
        one, other = (shapes.get(odd[0], "not there") for shapes in (given, wanted))
        raise UserError(
            f"evaluate.start = {place}: weights of another architecture than model.path's ('{odd[0]}' is {one} there "
            f"and {other} here); name a checkpoint of the same model, or leave it out for random weights"
        )
    if config.evaluate.scored == "trained" and any(layer.pool for layer in models.coverage(structure, None).tracked):
        raise UserError(
            f"evaluate.start = {place}: a mixture of experts is scored as it is given (evaluate.scored=given) where "
            "training starts from weights"
        )
    return found


def _shapes(model: Any) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def _marks(config: Config, sequences: Sequences, queries: list[Query]) -> np.ndarray:
    chosen = config.evaluate
    values = sequences.table[chosen.marks].to_numpy(object)
    values = np.array([None if value is None or value != value else value for value in values], object)
    where = f"evaluate.marks = {chosen.marks}"
    if all(value is None for value in values):
        raise UserError(f"{where}: no record of {config.corpus.path} has such a field")
    if "planted" in chosen.tests and not {query.id for query in queries} & {str(value) for value in values}:
        raise UserError(f"{where}: no query's id is the mark of any sequence, so planted has nothing to look for")
    if "mislabelled" in chosen.tests:
        odd = [value for value in values if value is not None and not isinstance(value, bool) and value not in (0, 1)]
        if odd:
            raise UserError(f"{where}: mislabelled wants true and false there, not {shown(odd[0])}")
        if len({bool(value) for value in values}) < 2:
            raise UserError(f"{where}: every sequence is marked alike, so mislabelled has nothing to find")
    return values
