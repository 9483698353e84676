"""A and S in blocks along their diagonals (``curvature.blocks``): against brute force, and what they save."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import torch

from raylux.blocks import Blocks, block_entries, block_sizes
from raylux.cost import costs, sizes
from raylux.cost.passes import largest, moments_held, split, triangles_held
from raylux.cost.planner import plan_run
from raylux.curvature import Covariances, square_eigenbasis
from raylux.engine.shard import FactorShard
from raylux.engine.worker import GradientWorker
from raylux.errors import UserError
from raylux.ledger import COVARIANCE, EIGEN, MOMENTS
from raylux.planning import Sizes, _workload
from raylux.routed import Routed
from raylux.store import RunFolder
from tests.apart import processes
from tests.interrupts import Interrupt
from tests.reference import difference
from tests.small import Inputs, contents, differing, make_inputs
from tests.test_cost import _cluster, _said, _work
from tests.test_exact import QUESTIONS, TOLERANCE, attribute, check, gpt2

DENSE = "query.max_error=0"


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# -------------------------------------------------------------------------------------------------------- matrices


@pytest.mark.parametrize(
    ("width", "count", "sizes_"), [(9, 1, (9,)), (9, 2, (5, 4)), (7, 4, (2, 2, 2, 1)), (2, 4, (1, 1))]
)
def test_blocks_are_as_equal_as_can_be(width: int, count: int, sizes_: tuple[int, ...]) -> None:
    assert block_sizes(width, count) == sizes_
    assert block_entries(width, count) == sum(size * size for size in sizes_)


def test_products_are_those_of_the_whole_matrix() -> None:
    blocks = Blocks(tuple(_normal(size, size, seed=size) for size in (3, 2, 4)))
    whole, x = torch.block_diag(*blocks.parts), _normal(5, 9, 9, seed=9)
    for found, wanted in ((blocks, whole), (blocks.T, whole.T)):
        torch.testing.assert_close(x @ found, x @ wanted, rtol=0, atol=1e-14)
        torch.testing.assert_close(found @ x, wanted @ x, rtol=0, atol=1e-14)
    again = Blocks.of(blocks.flat(), blocks.sizes)
    assert all(torch.equal(mine, its) for mine, its in zip(again.parts, blocks.parts, strict=True))


@pytest.mark.parametrize("count", [2, 4])
def test_sums_are_the_blocks_of_the_whole_sums_and_their_bases_solve_each(count: int) -> None:
    a, mask = _normal(3, 8, 9), torch.ones(3, 8, dtype=torch.bool)
    routed = Routed(_normal(16, 7, seed=1), (8, 0, 8), torch.arange(16))
    whole, cut = Covariances(), Covariances(blocks=count)
    for sums in (whole, cut):
        for _ in range(2):
            sums.add({"x": a}, {"x": a, "expert": routed}, mask)
    assert cut.rows == whole.rows == {"x": 48, "expert": 32}
    for found, wanted in ((cut.inputs["x"], whole.inputs["x"]), (cut.grads["expert"], whole.grads["expert"])):
        blocks = Blocks.of(found, block_sizes(len(wanted), count))
        kept = torch.block_diag(*(torch.ones_like(part) for part in blocks.parts))
        torch.testing.assert_close(torch.block_diag(*blocks.parts), wanted * kept, rtol=1e-13, atol=1e-13)
        values, basis = square_eigenbasis(blocks, "A")
        assert isinstance(basis, Blocks)
        q = torch.block_diag(*basis.parts)
        torch.testing.assert_close(q * values @ q.T, wanted * kept, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------------ whole runs


@pytest.mark.parametrize(("kind", "blocks"), [("ekfac", 2), ("ekfac", 4), ("kfac", 4), ("tekfac", 2), ("shampoo", 4)])
def test_scores_are_those_of_dense_matrices(kind: str, blocks: int) -> None:
    """GPT-2's layers have biases, so the blocks of A are of unequal sizes."""
    run = attribute(
        gpt2(), f"curvature.kind={kind}", f"curvature.blocks={blocks}", "fit.labels=dataset", "score.layers=true"
    )
    check(gpt2(), run, QUESTIONS)


def test_so_they_are_with_sampled_labels_and_s_test_in_the_eigenbases() -> None:
    run = attribute(gpt2(), "curvature.blocks=2", "query.basis=eigen", "fit.seed=4")
    assert run.settings["plan"]["query_basis"] == "eigen"
    check(gpt2(), run, QUESTIONS)


def test_a_solver_ends_where_it_does_without_blocks() -> None:
    """They precondition; and the mean of Λ, so λ, is a trace that no orthonormal basis changes."""
    how = ("fit.sequences=4", "curvature.damping=3.0", "model.layers=[transformer.h.1.mlp.*]", "curvature.solver=pcg")
    ends = ("curvature.tolerance=1e-11", "curvature.iterations=150")
    whole, cut = (attribute(gpt2(), *how, *ends, f"curvature.blocks={blocks}").scores() for blocks in (1, 4))
    assert difference(cut.values, whole.values) <= TOLERANCE


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Inputs, Path]:
    base = tmp_path_factory.mktemp("blocks")
    inputs = make_inputs(base / "inputs", "gpt2")
    inputs.run(base / "usual", DENSE, "curvature.blocks=2", "score.token_top=0")
    return inputs, base


def test_interrupted_it_ends_with_the_same_bits(small: tuple[Inputs, Path]) -> None:
    inputs, base = small
    how = DENSE, "curvature.blocks=2", "score.token_top=0", "fit.snapshot=0", "engine.keep_captured=never"
    for owner, method in ((FactorShard, "add"), (FactorShard, "decompose"), (GradientWorker, "moment_unit")):
        with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
            Interrupt(patch, owner, method, 3, True)
            inputs.run(base / "killed", *how)
    inputs.run(base / "killed", *how)
    assert differing(contents(base / "killed"), contents(base / "usual")) == []


def test_workers_and_shards_do_not_change_bits(small: tuple[Inputs, Path]) -> None:
    inputs, base = small
    how = DENSE, "curvature.blocks=2", "score.token_top=0", "engine.backend=ray", "engine.workers=2", "engine.shards=3"
    with processes():
        inputs.run(base / "processes", *how)
    assert differing(contents(base / "processes"), contents(base / "usual")) == []


def test_another_number_of_blocks_is_another_fit(small: tuple[Inputs, Path]) -> None:
    inputs, base = small
    with pytest.raises(UserError, match=r"curvature\.blocks is 2 there and 4 here.*--restart fit"):
        inputs.run(base / "usual", DENSE, "curvature.blocks=4", "score.token_top=0")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["curvature.blocks=2", "curvature.kind=diagonal"], "kind=diagonal has no A and S.*ekfac, kfac"),
        (["curvature.blocks=2", "curvature.kind=cosine"], "kind=cosine has no A and S"),
        (["curvature.blocks=3"], "'curvature.blocks' = 3: Input should be 1, 2 or 4"),
    ],
)
def test_what_cannot_be_cut_is_refused(tmp_path: Path, overrides: list[str], said: str) -> None:
    inputs = make_inputs(tmp_path / "inputs", "gpt2")
    with pytest.raises(UserError, match=said):
        inputs.run(tmp_path / "run", *overrides)
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------------- costs


def test_bytes_are_those_of_the_run(small: tuple[Inputs, Path]) -> None:
    inputs, base = small
    work, _ = _workload(inputs.config(base / "usual", DENSE, "curvature.blocks=2"), Sizes(), "cpu")
    plan, store = plan_run(work, _cluster()), RunFolder(str(base / "usual"))
    for stage, ledger, name in (
        ("covariance", COVARIANCE, "matrix"),
        ("eigenbases", EIGEN, "vectors"),
        ("lambda", MOMENTS, "matrix"),
    ):
        units = store.units(ledger).values()
        assert plan.stage(stage).disk_bytes == sum(store.group(m.meta["key"]).read(name).nbytes for m in units)
    assert "2 of inputs and outputs" in [choice.value for choice in plan.choices if choice.name == "blocks"]


def test_flops_and_memory_fall_with_the_blocks_and_a_refusal_names_them() -> None:
    """Eigendecompositions go by n³, so O blocks take 1/O² of them; covariances and rotations 1/O."""
    cluster = _cluster(device={"memory_gb": 400.0})
    plans = {count: plan_run(_work(blocks=count), cluster, costs.AHEAD) for count in (1, 2, 4)}

    def flops(count: int, stage: str, kind: str) -> float:
        return next(work.flops for work in plans[count].stage(stage).works if work.kind == kind)

    for count in (2, 4):
        for stage, kind, power in (
            ("covariance", "covariance products", 1),
            ("eigenbases", "eigendecomposition", 2),
            ("lambda", "rotation", 1),
        ):
            assert flops(count, stage, kind) == pytest.approx(flops(1, stage, kind) / count**power)
        assert plans[count].stage("eigenbases").disk_bytes * count == plans[1].stage("eigenbases").disk_bytes
    model = plans and _work().model
    sums = {count: sizes.covariance_bytes(model.tracked, model.groups, 8, count) for count in (1, 2, 4)}
    assert sums[1] == 2 * sums[2] == 4 * sums[4]
    # Half of a node's memory is the shards', who hold the sums of one layer pass at a time.
    layers = split(model.tracked, model.groups, len(model.groups))
    least = max(largest(layers, triangles_held(model.groups, 8, 2)), largest(layers, moments_held(model.groups, 0, 8)))
    tight = _cluster(device={"memory_gb": 400.0}, host_memory_gb=3.0 * least / 1e9)
    line = _said(_work(), tight, costs.ENGINE_CPU)
    assert "set curvature.blocks=2, or take" in line
    plan_run(_work(blocks=2), tight, costs.ENGINE_CPU)
    # Λ is not cut: where it does not fit, blocks are of no use.
    assert "curvature.blocks" not in _said(_work(), _cluster(host_memory_gb=1.0), costs.ENGINE_CPU)
