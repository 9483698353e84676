"""Before any work: everything that can be checked is checked, then the run folder is opened or made."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from torch import nn

from raylux import examples, fingerprints, models, optimizer
from raylux.config import Config, CorpusSection
from raylux.corpus import Sequences, load_corpus
from raylux.curvature import KINDS, check_blocks, check_segment, check_words, joint, projected, solvers
from raylux.engine import choices
from raylux.engine.context import Context
from raylux.engine.device import placement_of
from raylux.engine.plan import Plan, make_plan
from raylux.engine.progress import Reporter
from raylux.engine.stages import carrying, fit, queries, two_stage
from raylux.engine.stages import corpus as corpus_stage
from raylux.errors import MissingStageError, UserError
from raylux.frozen import Frozen, check_stage_name, drop, falls, holds
from raylux.groups import input_groups
from raylux.layers import Coverage, TrackedLayer, matrices
from raylux.ledger import MOMENTS
from raylux.modulecheck import check_module
from raylux.modules import Features, features_of
from raylux.placement import Placement
from raylux.queries import Query, load_queries, parse_queries
from raylux.shown import redacted_values
from raylux.store import CorpusReader, Lease, RunFolder


@dataclass(frozen=True)
class Model:
    """A model as it is before its weights are loaded."""

    files: models.ModelFiles
    coverage: Coverage
    groups: dict[str, str]
    vocabulary: int
    context: int | None
    tokenizer: Any
    prints: fingerprints.ModelPrint
    classes: tuple[str, ...] | None = None
    features: Features | None = None
    dtype: str = "float32"

    @classmethod
    def find(cls, config: Config) -> Model:
        trusted = config.model.trust_remote_code
        files = models.find_model(config.model)
        structure = models.load_structure(files, trusted)
        coverage = models.coverage(structure, config.model.layers, config.model.strict)
        vocabulary, context = models.reads(structure)
        features = features_of(structure)
        if features is not None:
            examples.check_config(config)
        prints = fingerprints.of_model(files)
        return cls(
            files,
            coverage,
            KINDS[config.curvature.kind].groups(_groups(files, structure, coverage.tracked, prints)),
            vocabulary,
            context,
            None if features is not None else models.load_tokenizer(files, trusted),
            prints,
            models.classes_of(structure),
            features,
            config.model.dtype,
        )

    def questions(self, path: str) -> list[Query]:
        """Queries of a file, for a model of this kind."""
        if self.features is not None:
            return examples.load_questions(path, self.features, self.dtype)
        return load_queries(path, self.tokenizer, self.vocabulary, self.context, self.classes)

    def parsed(self, records: Sequence[Mapping[str, Any]], where: str = "queries") -> list[Query]:
        """The same from records; ``where`` is what messages call them."""
        if self.features is not None:
            return examples.parse_questions(records, self.features, self.dtype, where)
        return parse_queries(records, self.tokenizer, self.vocabulary, self.context, where, self.classes)

    def corpus(self, section: CorpusSection) -> Sequences:
        """The corpus that a config names."""
        if self.features is not None:
            found = examples.load(section.path, self.features)
            check_module(models.load_structure(self.files), self.coverage.tracked, found.tokens)
            return found
        return load_corpus(section, self.tokenizer, self.vocabulary, self.context, self.classes)

    def record(self) -> dict[str, Any]:
        """What run.yaml keeps of it."""
        return {
            "folder": self.files.folder,
            "tokenizer_folder": self.files.tokenizer,
            **self.prints.dump(),
            "parameters": self.coverage.parameters,
            "share": self.coverage.share,
            "layers": [layer.name for layer in self.coverage.tracked],
            "groups": self.groups,
        }


# (class, hash of config.json, hashes of the code, layers) -> ``input_groups``, which takes a forward pass of fakes: one
# process may work on many runs of the same model.
_FOUND: dict[tuple[object, ...], dict[str, str]] = {}


def _groups(
    files: models.ModelFiles, structure: nn.Module, layers: Sequence[TrackedLayer], prints: fingerprints.ModelPrint
) -> dict[str, str]:
    """``input_groups``, found once of a model of which config and code say how it runs; a module says it itself."""
    if files.task == "module":
        return input_groups(structure, layers)
    key = (type(structure), prints.config, tuple(sorted(prints.code.items())), tuple(layers))
    if key not in _FOUND:
        _FOUND[key] = input_groups(structure, layers)
    return dict(_FOUND[key])


@dataclass(frozen=True)
class Inputs:
    """What a config names, read and found to be well: nothing was written yet.

    Attributes:
        config: the run's.
        model: without its weights.
        queries: asked for.
        source: what tells one state of the corpus's files from another.
        sequences: the corpus; None where the run folder has it.
        placement: of the model's parts, where they do not all lie on the one device of a worker.
    """

    config: Config
    model: Model
    queries: list[Query]
    source: dict[str, Any]
    sequences: Sequences | None
    placement: Placement | None = None

    def lengths(self, folder: RunFolder) -> np.ndarray:
        """[n] tokens of each sequence of the corpus."""
        return CorpusReader(folder).lengths if self.sequences is None else self.sequences.lengths()


def read(config: Config, folder: RunFolder, restart: str | None, asked: Sequence[Query] | None = None) -> Inputs:
    """Check everything that a config names, and that the run folder allows it.

    Args:
        config: of the run.
        folder: of the run; may not be there yet.
        restart: the stage that is to be computed again, if one is.
        asked: the queries; default: those of the config's file.

    Raises:
        UserError: an input cannot be served, or it changed and the folder does not allow it.
    """
    check_stage_name(restart)
    check_blocks(config.curvature.kind, config.curvature.blocks)
    check_segment(config.curvature.kind, config.curvature.segment, config.curvature.solver, bool(config.query.later))
    solvers.check(config.curvature.kind, config.curvature, config.fit.labels, config.model.dtype)
    known = _known(folder)
    if known:
        Frozen(folder, known, restart).check_config(config)
    model = Model.find(config)
    placement = placement_of(config, model.files, models.resolve_device(config.model.device))
    solvers.check_layers(config.curvature.solver, model.coverage.tracked)
    kind = KINDS[config.curvature.kind]
    check_words(kind.name, model.coverage.tracked)
    joint.check(kind.name, kind.joint, model.coverage.tracked, config.model.dtype)
    projected.check(kind.name, kind.projected, config.curvature.projection, model.coverage.tracked)
    two_stage.check(kind, config.score, model.coverage.tracked)
    _check_optimizer(config, model, folder, restart)
    if asked is None:
        asked = model.questions(config.queries.path)
    carrying.find(config, model.coverage.tracked, asked)
    source = redacted_values(fingerprints.of_source(config.corpus.path))
    sequences = None
    if not _stored(folder, restart):
        sequences = model.corpus(config.corpus)
    inputs = Inputs(config, model, list(asked), source, sequences, placement)
    _check(inputs, folder, known, restart)
    return inputs


def begin(
    inputs: Inputs, folder: RunFolder, reporter: Reporter, config_path: str | None, restart: str | None
) -> Context:
    """Drop what is to be computed again and store what is new; the caller holds the run folder's lease.

    Raises:
        UserError: the folder was changed by somebody else since ``read``, and does not allow the inputs now.
    """
    known = _known(folder)
    _check(inputs, folder, known, restart)
    if inputs.sequences is None and not _stored(folder, restart):
        raise UserError(f"{folder.path}: its corpus was removed meanwhile; run the same command again")
    model, plan = _plan(inputs, folder, known, restart)
    if restart and known:
        drop(folder, restart)
    config = inputs.config
    folder.write_settings(_settings(config, config_path, known, plan, model))
    corpus_stage.run(folder, inputs.sequences, inputs.source)
    queries.register(folder, inputs.queries)
    return Context(
        config, folder, model.files, model.coverage, model.groups, model.vocabulary, plan, reporter, inputs.queries,
        placement=inputs.placement,
    )  # fmt: skip


def reopen(inputs: Inputs, folder: RunFolder, reporter: Reporter) -> Context:
    """A run as it stands, to work with its factors; the caller holds its lease. Writes nothing.

    Raises:
        UserError: as ``begin``; the folder holds no corpus.
    """
    known = _known(folder)
    if not _stored(folder, None):
        raise MissingStageError(f"{folder.path}: nothing is fitted there; run `raylux fit CONFIG` first")
    _check(inputs, folder, known, None)
    plan, model = Plan(**known["plan"]), inputs.model
    Frozen(folder, known, None).check_device(plan.device, models.resolve_device(inputs.config.model.device))
    return Context(
        inputs.config, folder, model.files, model.coverage, known["model"]["groups"], model.vocabulary, plan, reporter,
        placement=inputs.placement,
    )  # fmt: skip


@contextmanager
def fitted(run: str, overrides: Sequence[str], quiet: bool) -> Iterator[tuple[Context, Model]]:
    """A fitted run to work on, its lease held meanwhile: the context, and the model without its weights.

    Args:
        run: the run folder.
        overrides: ``section.key=value`` over the run's own config.
        quiet: no progress on the terminal.

    Raises:
        MissingStageError: the run is not fitted.
        UserError: another command works on the run; an input of the run changed.
    """
    folder = RunFolder(run)
    # The config that the run was made by, on the folder as it is called here.
    sections = {**folder.settings()["config"], "run": {"folder": folder.path}}
    config = Config.parse(sections, overrides, where=f"{folder.path}/run.yaml")
    inputs = read(config, folder, None, asked=()) if folder.committed("corpus") else None
    if inputs is None:
        raise MissingStageError(f"{folder.path}: nothing is fitted there; run `raylux fit CONFIG` first")
    reporter = Reporter(folder, quiet)
    with Lease.take(folder.files, say=reporter.say) as lease:
        folder.guard = lease.check
        ctx = reopen(inputs, folder, reporter)
        missing = fit.missing(ctx)
        if missing:
            raise MissingStageError(
                f"{folder.path}: the fit lacks {', '.join(missing)}; run `raylux fit CONFIG` on it first"
            )
        if lease.inherited:
            tidy(folder, reporter)
        yield ctx, inputs.model


def planned(ctx: Context, queries: int) -> Plan:
    """The plan that a run of its own would have for so many queries: how they meet sequences goes by their number."""
    lengths = ctx.reader.lengths
    chosen = choices.products(
        ctx.config, ctx.plan.device, matrices(ctx.coverage.tracked), ctx.groups, ctx.plan.typical_tokens, queries,
        len(lengths),
    )  # fmt: skip
    return replace(ctx.plan, **vars(chosen))


def tidy(folder: RunFolder, reporter: Reporter) -> None:
    """Remove what a killed command or a restart left behind: objects that no manifest names."""
    count, size = folder.sweep()
    if count:
        reporter.say(f"{folder.path}: {count:,} objects ({size / 1e6:,.1f} MB) that belong to nothing were removed")


def _check_optimizer(config: Config, model: Model, folder: RunFolder, restart: str | None) -> None:
    """Raises UserError where the fit is to read an optimizer's second moments, and cannot."""
    path = config.curvature.optimizer
    optimizer.check(config.curvature.kind, KINDS[config.curvature.kind].projected, path)
    names = {layer.name for layer in model.coverage.tracked}
    if path is not None and ("fit" in falls(restart) or names - folder.committed(MOMENTS)):
        structure = models.load_structure(model.files, config.model.trust_remote_code, weights=False)
        optimizer.OptimizerMoments(path, structure, model.coverage.tracked)


def _known(folder: RunFolder) -> dict[str, Any]:
    if folder.exists:
        return folder.settings()
    if not folder.files.empty():
        raise UserError(f"{folder.path}: the folder is not empty and holds no run; choose another run.folder")
    return {}


def _stored(folder: RunFolder, restart: str | None) -> bool:
    return bool(folder.committed("corpus")) and "corpus" not in falls(restart)


def _check(inputs: Inputs, folder: RunFolder, known: Mapping[str, Any], restart: str | None) -> None:
    if not known:
        return
    frozen = Frozen(folder, known, restart)
    frozen.check_config(inputs.config)
    frozen.check_model(inputs.model.prints)
    frozen.check_queries(queries.changed(folder, inputs.queries))
    if _stored(folder, restart):
        frozen.check_source(folder.manifest("corpus", "corpus").meta["source"], inputs.source)


def _plan(inputs: Inputs, folder: RunFolder, known: Mapping[str, Any], restart: str | None) -> tuple[Model, Plan]:
    """The plan that the folder's numbers were made by, as far as it holds any, otherwise a new one."""
    model = inputs.model
    device = models.resolve_device(inputs.config.model.device)

    def new(groups: dict[str, str]) -> Plan:
        covered = model.coverage
        lengths = inputs.lengths(folder)
        # Of a classifier or a module of features each query runs by itself.
        plain = model.features is None and model.classes is None
        asked = [[len(part.tokens) for part in query.parts] for query in inputs.queries if plain]
        return make_plan(inputs.config, device, covered.tracked, groups, covered.parameters, lengths, model.context,
            len(inputs.queries), asked,
        )  # fmt: skip

    if not known or "fit" in falls(restart) or not holds(folder, "fit"):
        return model, new(model.groups)
    plan, groups = Plan(**known["plan"]), known["model"]["groups"]
    Frozen(folder, known, restart).check_device(plan.device, device)
    fresh = new(groups)
    if "score" in falls(restart):
        plan = replace(plan, score_unit_size=fresh.score_unit_size)
    if "query" in falls(restart) or not holds(folder, "query"):
        names = ("rows", "tile", "query_basis", "low_rank", "query_tokens")
        plan = replace(plan, **{name: getattr(fresh, name) for name in names})
    return replace(model, groups=groups), plan


def _settings(
    config: Config, config_path: str | None, known: Mapping[str, Any], plan: Plan, model: Model
) -> dict[str, Any]:
    return {
        "config": redacted_values(config.dump()),
        "config_path": config_path or known.get("config_path"),
        "plan": plan.dump(),
        "model": model.record(),
        "versions": known.get("versions") or _versions(),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("raylux", "torch", "ray", "transformers", "zarr"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
