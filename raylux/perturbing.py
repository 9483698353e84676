"""How a score would move if the inputs of a training sequence did: ``raylux.perturb``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from raylux import gpu, models, prepare, shares
from raylux.curvature.spectral import Spectral
from raylux.engine.context import Context
from raylux.engine.records import factor_files, query_files, read_basis, read_layer_queries
from raylux.errors import MissingStageError, UserError
from raylux.fused import fuse_activations
from raylux.influence.inputs import InputGradient, input_gradient
from raylux.results import Run


@dataclass(frozen=True)
class Perturbation:
    """What the inputs of one sequence do to its influence on one query.

    Attributes:
        query: its id.
        sequence: its id.
        influence: of the sequence, in the run's unit: as ``Run.scores`` has it.
        gradient: of that by the inputs (I_pert of Koh & Liang 2017): [*shape] by features, [T, D] by the word
            embeddings of its tokens. In the unit of ``influence`` per unit of input: to first order a change δ of the
            inputs of a sequence that was trained on moves the query's measurement by ⟨gradient, δ⟩.
        inputs: what stands there, of the same shape.
        table: of a text a row for each token: position, token_id, token, norm ‖gradient_t‖, and projection
            ⟨gradient_t, e_t⟩, what scaling up its embedding e_t does; otherwise one for each feature: position in the
            flat vector, value, gradient.
    """

    query: str
    sequence: str
    influence: float
    gradient: np.ndarray
    inputs: np.ndarray
    table: pd.DataFrame


def perturb(
    run: str | Run,
    query: str,
    sequences: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
    quiet: bool = True,
) -> list[Perturbation]:
    """The gradient of influence scores by the inputs of training sequences.

    Computed in this process, with the s_test that the run keeps of the query; nothing is written. A sequence takes a
    forward pass and two backward passes.

    Args:
        run: the run folder, or a run that was opened; the query must be solved.
        query: its id.
        sequences: ids of the run's corpus; None: the five with the largest influence.
        overrides: ``section.key=value`` over the run's own config, as ``model.device=cpu``.
        quiet: no progress on the terminal.

    Raises:
        UserError: there is no such query or sequence; scores are cosines, or of layers without a dense gradient (the
            word embedding, experts); the model's inputs are no real numbers.
        MissingStageError: the run keeps no s_test of the query.
    """
    opened = run if isinstance(run, Run) else Run(run)
    opened.known(query)
    with prepare.fitted(opened.folder, overrides, quiet) as (ctx, _):
        _check(ctx)
        names = list(sequences) if sequences is not None else opened.top(query, 5)["sequence"].tolist()
        rows = _rows(opened, names)
        solved = _solved(ctx, query)
        model = models.load_model(
            models.on_this_node(ctx.files), ctx.plan.dtype, ctx.plan.device, ctx.config.model.trust_remote_code
        )
        fuse_activations(model)
        found = []
        for name, row in zip(names, ctx.reader.rows(rows), strict=True):
            with gpu.pinned(ctx.plan.device):
                one = input_gradient(model, ctx.coverage.tracked, row, solved)
            found.append(_perturbation(opened, query, name, np.asarray(row.tokens), one))
    return found


def _check(ctx: Context) -> None:
    """Raises UserError where the run's scores have no gradient that is served."""
    kind, tracked = ctx.kind, ctx.coverage.tracked
    why = None
    if kind.normalised:
        why = f"scores of curvature.kind={kind.name} are divided by the sequence's own norm; take identity"
    elif words := [layer.name for layer in tracked if layer.words]:
        why = f"'{words[0]}' is the word embedding, of which gradients are kept by word; take a run of other layers"
    elif routed := [layer.name for layer in tracked if layer.routed]:
        why = f"'{routed[0]}' belongs to an expert, whose choice of tokens has no derivative; leave experts out"
    elif ctx.plan.dtype == "bfloat16":
        why = "second derivatives need full precision, and model.dtype is bfloat16"
    if why:
        raise UserError(f"perturb: {why}")


def _rows(run: Run, names: Sequence[str]) -> list[int]:
    place = {name: row for row, name in enumerate(run.sequences["sequence"])}
    unknown = [name for name in names if name not in place]
    if unknown:
        raise UserError(f"{run.folder}: no sequence '{unknown[0]}'")
    return [place[name] for name in names]


def _solved(ctx: Context, query: str) -> dict[str, Tensor]:
    """Layer -> s_test [P, M] of a query, dense and in the model's own basis."""
    folder, device = ctx.folder, ctx.plan.device
    dtype = torch.float64 if ctx.plan.dtype == "float64" else torch.float32
    files = [block for block in query_files(folder) if query in block.queries]
    if not files:
        raise MissingStageError(
            f"{folder.path}: the s_test of '{query}' is not kept there; run `raylux query` on its config, or ask it in "
            "queries.path"
        )
    eigen = ctx.plan.query_basis == "eigen"
    found = {}
    for layer in ctx.coverage.tracked:
        (own,) = read_layer_queries(folder, files, layer.name, [query], dtype, device)
        s = own if isinstance(own, Tensor) else own[0] @ own[1].T
        if eigen:
            s = Spectral(
                None, *read_basis(folder, factor_files(folder), layer.name, ctx.groups[layer.name], dtype, device)
            ).back(s)
        found[layer.name] = s
    return found


def _perturbation(run: Run, query: str, name: str, tokens: np.ndarray, found: InputGradient) -> Perturbation:
    gradient, inputs = (x.double().cpu().numpy() for x in (found.gradient * run.scale, found.inputs))
    if tokens.ndim == 1:
        table = pd.DataFrame(
            {
                "position": np.arange(len(tokens)),
                "token_id": tokens,
                "token": shares.decoded(run, tokens),
                "norm": np.linalg.norm(gradient, axis=1),
                "projection": (gradient * inputs).sum(1),
            }
        )
    else:
        table = pd.DataFrame(
            {"position": np.arange(gradient.size), "value": inputs.ravel(), "gradient": gradient.ravel()}
        )
    table.attrs.update(run.meaning())
    return Perturbation(query, name, found.score * run.scale, gradient, inputs, table)
