"""From a config to the numbers that the cost model wants: no weights, and no corpus where its size is given."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from raylux import models, optimizer
from raylux.batches import bucket
from raylux.config import Config
from raylux.corpus import load_corpus
from raylux.cost import calibrate, costs
from raylux.cost.costs import RunPlan
from raylux.cost.machine import Cluster
from raylux.cost.model import ModelShape
from raylux.cost.planner import plan_run
from raylux.cost.workload import ITEMSIZE, Workload
from raylux.curvature import KINDS, check_blocks, check_segment, check_words, joint, projected
from raylux.curvature.solvers import Rule
from raylux.engine.device import placement_of
from raylux.engine.kept import kept_bytes
from raylux.engine.plan import Plan, make_plan, probe_count
from raylux.engine.stages import two_stage
from raylux.groups import input_groups
from raylux.ledger import CONTRACTION
from raylux.placement import Placement, placed
from raylux.queries import load_queries
from raylux.store import CorpusReader, RunFolder

# Of the free disk, what workers keep captured tensors on (engine/kept.py).
_KEPT_SHARE = 0.25
# That a query is taken to have, for the word embedding.
_WORDS = 64
# Tokens of a query, where queries are only counted.
QUERY_TOKENS = 64


@dataclass(frozen=True)
class Sizes:
    """What is given instead of being read: sequences of the corpus, their mean tokens, queries, candidates."""

    sequences: int | None = None
    tokens: int | None = None
    queries: int | None = None
    candidates: int | None = None


Found = tuple[ModelShape, models.ModelFiles, int | None]


def find_shape(config: Config) -> Found:
    """Shapes of a config's model, its files, and its context; a folder that holds config.json alone will do.

    Raises:
        UserError: the model cannot be found or built.
    """
    setting = config.model
    files, weights = models.find_described(setting)
    structure = models.load_structure(files, setting.trust_remote_code, weights)
    covered = models.coverage(structure, setting.layers, setting.strict)
    kind = KINDS[config.curvature.kind]
    check_words(kind.name, covered.tracked)
    joint.check(kind.name, kind.joint, covered.tracked, setting.dtype)
    projected.check(kind.name, kind.projected, config.curvature.projection, covered.tracked)
    two_stage.check(kind, config.score, covered.tracked)
    optimizer.check(kind.name, kind.projected, config.curvature.optimizer)
    groups = kind.groups(input_groups(structure, covered.tracked))
    # Of the word embedding a gradient has a row for each word of a text, whatever the size of the vocabulary.
    held = tuple(replace(x, inputs=min(x.inputs, _WORDS)) if x.words else x for x in covered.tracked)
    covered = replace(covered, tracked=held)
    shape = replace(ModelShape.of(structure, covered, groups), checkpointing=setting.checkpointing)
    return shape, files, models.context_length(structure.config)


def plan_here(config: Config, sizes: Sizes, refresh: bool = False) -> tuple[RunPlan, Cluster]:
    """A plan of what the engine does today, on this machine, by the run's own frozen choices."""
    device = models.resolve_device(config.model.device)
    files, _ = models.find_described(config.model)
    placement = placement_of(config, files, device)
    work, plan = _workload(config, sizes, device, placement)
    workers = _workers(config, device, plan.threads)
    cluster = calibrate.here(plan.threads, workers, device, config.run.folder, refresh)
    if placement is not None and len(placement.computing) > 1:
        cluster = cluster.of_workers(placement.gpus)
    share = kept_bytes(config.engine.keep_captured, device)
    disk = cluster.disk_tb * 1e12 * _KEPT_SHARE / cluster.workers if share is None else float(share)
    everyone = config.prefilter.kind == "none" or config.prefilter.top >= work.corpus
    scored = everyone and config.fit.labels == "sampled" and disk > 0
    work = replace(work, keep_bytes=disk, scores_fit=scored, query_basis=plan.query_basis, tile=plan.tile)
    return plan_run(work, cluster, costs.ENGINE if cluster.device.gpu else costs.ENGINE_CPU), cluster


def plan_on(
    config: Config, sizes: Sizes, cluster: Cluster, can: frozenset[str] = costs.AHEAD, found: Found | None = None
) -> RunPlan:
    """A plan on a cluster that need not be here; it may count on what the engine does not do yet, and says so.

    ``found``: by ``find_shape`` of the same model and kind of curvature, where several plans share it; None: it is
    found, which of a model of 80 layers takes seconds.
    """
    device = "cuda" if cluster.device.gpu else "cpu"
    placement = _placement_on(config, cluster, device)
    if placement is not None and len(placement.computing) > 1:
        cluster = cluster.of_workers(placement.gpus)
    work, _ = _workload(config, sizes, device, placement, found)
    return plan_run(work, cluster, can)


def _placement_on(config: Config, cluster: Cluster, device: str) -> Placement | None:
    """``placement_of`` on devices of a cluster file."""
    setting, gpus = config.model, config.engine.gpus_per_worker
    if setting.device_map is None and gpus == 1:
        return None
    files, weights = models.find_described(setting)
    structure = models.load_structure(files, setting.trust_remote_code, weights)
    each = cluster.device.memory / 2 / ITEMSIZE[setting.dtype]
    room = {f"cuda:{number}": each for number in range(gpus)} if device == "cuda" else {"cpu": each}
    return placed(structure, setting, device, gpus, room)


def _workload(
    config: Config, sizes: Sizes, device: str, placement: Placement | None = None, found: Found | None = None
) -> tuple[Workload, Plan]:
    check_blocks(config.curvature.kind, config.curvature.blocks)
    check_segment(config.curvature.kind, config.curvature.segment, config.curvature.solver, bool(config.query.later))
    shape, files, context = found or find_shape(config)
    shape = shape.run_by(config.model.checkpointing, placement)
    lengths, query_lengths = _lengths(config, sizes, files, context)
    plan = make_plan(
        config, device, shape.tracked, dict(shape.groups), shape.parameters, lengths, context, len(query_lengths)
    )
    corpus, queries = len(lengths), len(query_lengths)
    tokens = float(lengths.mean())
    padded = np.array([bucket(int(length), plan.longest) for length in np.unique(lengths)])
    counts = np.unique(lengths, return_counts=True)[1]
    candidates = corpus if config.prefilter.kind == "none" else min(corpus, queries * config.prefilter.top)
    if sizes.candidates is not None:
        candidates = min(corpus, sizes.candidates)
    kind = KINDS[config.curvature.kind]
    dtype = config.model.dtype
    products, over = _solving(config, corpus)
    work = Workload(
        model=shape,
        dtype=dtype,
        contraction=_settled(config, plan.contraction) if device == "cpu" else _contraction(config, device),
        basis=kind.basis,
        # An optimizer's are read, not summed.
        moments=kind.moments and config.curvature.optimizer is None,
        projection=config.curvature.projected,
        blocks=config.curvature.blocks,
        sequence_products=kind.statistics == "sequences",
        fit_sequences=min(config.fit.sequences, corpus),
        covariance_sequences=config.fit.covariance_sequences,
        corpus=corpus,
        candidates=candidates,
        tokens=tokens,
        queries=queries,
        query_tokens=float(query_lengths.mean()),
        # On a GPU the planner weighs batches against passes.
        batch_tokens=None if device == "cuda" and config.engine.batch_tokens == "auto" else plan.batch_tokens,
        unit_tokens=plan.fit_unit_tokens,
        score_unit=plan.score_unit_size,
        padding=float((padded * counts).sum() / lengths.sum()),
        prefilter=config.prefilter.kind != "none",
        # On a GPU of a file the planner weighs dense against low rank by what fits.
        max_error=config.query.max_error if plan.low_rank or device == "cuda" else 0.0,
        max_rank=config.query.max_rank,
        rank=min(64, config.query.max_rank),
        probes=probe_count(config.query.probes, shape.parameters),
        tile=plan.tile,
        rows=plan.rows,
        eigh=config.fit.eigh,
        self_influence=config.score.self_influence,
        best=config.score.best,
        joint=kind.joint,
        solver_products=products,
        solver_sequences=over,
        passes=None if config.fit.passes == "auto" else config.fit.passes,
    )
    return work, plan


def _solving(config: Config, corpus: int) -> tuple[int, int]:
    """Products of an iterative solver, at most, and the sequences that each goes over."""
    setting = config.curvature
    if setting.solver == "direct":
        return 0, 0
    rule = Rule.of(setting, 1.0)
    fitted = min(config.fit.sequences, corpus)
    return rule.iterations, fitted if rule.solver.krylov else min(fitted, setting.batch)


def _settled(config: Config, chosen: str) -> str:
    """The precision of contractions that a run in the folder has found good enough, if it has; otherwise ``chosen``."""
    folder = RunFolder(config.run.folder)
    if chosen != "bfloat16" or config.engine.contraction_dtype != "auto" or not folder.exists:
        return chosen
    known = folder.units(CONTRACTION).get("products")
    return str(known.meta["dtype"]) if known else chosen


def _contraction(config: Config, device: str) -> str:
    """Precision of contractions: float64 for a float64 model, bfloat16 on a GPU unless the config says otherwise."""
    if config.model.dtype == "float64":
        return "float64"
    setting = str(getattr(config.engine, "contraction_dtype", "auto"))
    return setting if setting != "auto" else ("bfloat16" if device == "cuda" else "float32")


def _workers(config: Config, device: str, threads: int) -> int:
    import psutil
    import torch

    if config.engine.backend == "local":
        return 1
    if isinstance(config.engine.workers, int):
        return config.engine.workers
    return torch.cuda.device_count() if device == "cuda" else max(1, (psutil.cpu_count() or 1) // threads)


def _lengths(
    config: Config, sizes: Sizes, files: models.ModelFiles, context: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each sequence and of each query: given, stored in the run folder, or read."""
    trusted = config.model.trust_remote_code
    classes, vocabulary = models.classes_at(files, trusted), models.vocabulary_size(models.load_config(files, trusted))
    if sizes.queries is None:
        tokenizer = models.load_tokenizer(files, trusted)
        asked = load_queries(config.queries.path, tokenizer, vocabulary, context, classes)
        query_lengths = np.array([sum(len(part.tokens) for part in query.parts) for query in asked])
    else:
        query_lengths = np.full(sizes.queries, QUERY_TOKENS)
    if sizes.sequences is not None:
        return np.full(sizes.sequences, sizes.tokens or config.corpus.max_length), query_lengths
    folder = RunFolder(config.run.folder)
    if folder.exists and folder.committed("corpus"):
        lengths = CorpusReader(folder).lengths
    else:
        tokenizer = models.load_tokenizer(files, trusted)
        lengths = load_corpus(config.corpus, tokenizer, vocabulary, context, classes).lengths()
    if sizes.tokens is not None:
        lengths = np.full(len(lengths), sizes.tokens)
    return np.asarray(lengths), query_lengths
