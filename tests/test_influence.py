"""Influence: contractions agree, scores do not depend on company, low rank keeps its bound."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raylux.influence import LayerQueries, choose_ranks, component_scores, factorise, sequence_gradients
from raylux.influence.dots import TILE, Held, squared_norms, tokens_pay
from raylux.scratch import Scratch
from tests import reference

Stored = Tensor | tuple[Tensor, Tensor]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def brute(queries: Sequence[Tensor], a: Tensor, g: Tensor) -> np.ndarray:
    """[N, Q]: Σ_t g_tᵀ s_test a_t, one query, sequence and token at a time."""
    found = [
        [sum(float(g_t @ q @ a_t) for a_t, g_t in zip(x, y, strict=True)) for q in queries]
        for x, y in zip(a, g, strict=True)
    ]
    return np.array(found)


class TestContractions:
    @pytest.mark.parametrize("shape", [(5, 7), (7, 5), (1, 6), (6, 1)])
    @pytest.mark.parametrize("count", [1, TILE, TILE + 3])
    def test_dense_low_rank_and_tokens_agree(self, shape: tuple[int, int], count: int) -> None:
        outputs, inputs = shape
        a, g = normal(4, 3, inputs, seed=1), normal(4, 3, outputs, seed=2)
        queries = [normal(outputs, inputs, seed=10 + place) for place in range(count)]
        factors: list[Stored] = [factorise(query, min(shape)) for query in queries]
        expected = brute(queries, a, g)
        ways = {
            "dense": LayerQueries.build(shape, queries, tokens=3),
            "against tokens": LayerQueries.build(shape, factors, tokens=1e-9),
            "expanded": LayerQueries.build(shape, factors, tokens=1e9),
        }
        assert (len(ways["dense"].factors), len(ways["dense"].tiles)) == (0, -(-count // TILE))
        assert (len(ways["against tokens"].factors), len(ways["against tokens"].tiles)) == (count, 0)
        assert (len(ways["expanded"].factors), len(ways["expanded"].tiles)) == (0, -(-count // TILE))
        for way in ways.values():
            assert reference.difference(way.scores([(a, g)]), expected) <= 1e-12

    def test_all_kinds_in_one_layer(self) -> None:
        """Dense, low rank against tokens, low rank expanded, and nothing kept (rank 0), beside each other."""
        shape = (12, 10)
        a, g = normal(3, 5, 10, seed=1), normal(3, 5, 12, seed=2)
        queries: list[Stored] = []
        for place in range(19):
            left, right = normal(12, place % 5, seed=place), normal(10, place % 5, seed=50 + place)
            queries.append(left @ right.T if place % 3 == 0 else (left, right))
        tokens = 10.0
        built = LayerQueries.build(shape, queries, tokens)
        low = {place for place, query in enumerate(queries) if not isinstance(query, Tensor)}
        assert set(built.factors) == {place for place in low if tokens_pay(place % 5, 12, 10, tokens)}
        assert set() < set(built.factors) < low
        dense = [query if isinstance(query, Tensor) else query[0] @ query[1].T for query in queries]
        assert reference.difference(built.scores([(a, g)]), brute(dense, a, g)) <= 1e-12
        for place in range(len(queries)):
            tokens_sum = built.token_scores(place, a, g).sum(1)
            torch.testing.assert_close(tokens_sum, built.scores([(a, g)])[:, place], rtol=1e-12, atol=1e-12)

    def test_gradients_and_norms(self) -> None:
        a, g = normal(4, 3, 7, seed=1), normal(4, 3, 5, seed=2)
        other = normal(4, 3, 2, seed=3)
        gradient = sequence_gradients(a, g)
        for n in range(4):
            expected = sum(torch.outer(g[n, t], a[n, t]) for t in range(3))
            assert reference.difference(gradient[n], expected) <= 1e-14
        norms = squared_norms({"one": a}, {"one": g, "two": other}, {"one": "one", "two": "one"})
        both = torch.cat([gradient, sequence_gradients(a, other)], 1).flatten(1)
        assert reference.difference(norms, both.norm(dim=1) ** 2) <= 1e-14

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
    def test_tokens_sum_to_the_sequence(self, dtype: torch.dtype, tolerance: float) -> None:
        shape = (24, 17)
        a, g = normal(6, 30, 17, seed=1, dtype=dtype), normal(6, 30, 24, seed=2, dtype=dtype)
        queries: list[Stored] = [normal(*shape, seed=3, dtype=dtype), factorise(normal(*shape, seed=4, dtype=dtype), 2)]
        built = LayerQueries.build(shape, queries, tokens=10)
        assert list(built.factors) == [1]
        for place in range(2):
            shares = built.token_scores(place, a, g)
            assert shares.shape == (6, 30)
            assert reference.difference(shares.sum(1), built.scores([(a, g)])[:, place]) <= tolerance


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class TestBf16:
    """Products in bf16: near the exact scores, and nearer the larger the layer."""

    @pytest.mark.parametrize("shape", [(64, 65), (300, 129)])
    @pytest.mark.parametrize("tile", [8, 64])
    def test_near_the_exact_scores(self, shape: tuple[int, int], tile: int) -> None:
        outputs, inputs = shape
        a, g = normal(12, 40, inputs, seed=1), normal(12, 40, outputs, seed=2)
        queries = [normal(outputs, inputs, seed=10 + place) for place in range(9)]
        exact = LayerQueries.build(shape, queries, tokens=40).scores([(a, g)])
        rounded = [query.bfloat16() for query in queries]
        built = LayerQueries.build(shape, rounded, tokens=40, tile=tile)
        found = built.scores([(a.bfloat16(), g.bfloat16())], 16)
        assert found.dtype == torch.float32
        assert float((found - exact).norm() / exact.norm()) < 0.01

    @pytest.mark.parametrize("once", [True, False])
    def test_memory_that_was_used_gives_the_same_bits(self, once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of several tiles and slices, and one that is not full; ``once``: each is laid out when it is asked for."""
        monkeypatch.setattr("raylux.influence.dots.SLICE", 28)
        scratch = Scratch()
        held: list[Tensor] = []

        def hold(x: Tensor) -> Held:
            own = x.clone()
            held.append(x)
            return lambda: own

        for shape in ((30, 7), (9, 11)):
            a, g = normal(5, 6, shape[1], seed=1).float(), normal(5, 6, shape[0], seed=2).float()
            queries = [normal(*shape, seed=place).float() for place in range(2 * TILE + 3)]
            alone = LayerQueries.build(shape, queries, tokens=6).scores([(a, g)])
            ready = LayerQueries.build(shape, queries, 6, hold=hold, scratch=scratch, once=once)
            assert torch.equal(ready.scores([(a, g)], scratch=scratch), alone)
            assert len({x.data_ptr() for x in held}) == (0 if once else 1), "each leaves its memory to the next"
            held.clear()
            for memory in scratch._held.values():
                memory.fill_(torch.nan)

    def test_slices_of_a_layer_add_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In float64: a layer that is worked on in many slices gives what it gives in one."""
        a, g = normal(5, 6, 7, seed=1), normal(5, 6, 30, seed=2)
        queries = [normal(30, 7, seed=place) for place in range(11)]
        whole = LayerQueries.build((30, 7), queries, tokens=6)
        monkeypatch.setattr("raylux.influence.dots.SLICE", 28)
        parts = LayerQueries.build((30, 7), queries, tokens=6)
        assert (len(whole.tiles[0]), len(parts.tiles[0])) == (1, 8)
        torch.testing.assert_close(parts.scores([(a, g)]), whole.scores([(a, g)]), rtol=1e-12, atol=1e-12)
        for place in (0, 10):
            torch.testing.assert_close(
                parts.token_scores(place, a, g).sum(1), whole.scores([(a, g)])[:, place], rtol=1e-12, atol=1e-12
            )


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.mark.usefixtures("threads")
class TestEqualBits:
    """Scores bit by bit. A GEMM that took another path by company would show here."""

    SHAPES = ((24, 17), (96, 257), (7, 300), (128, 385))

    @staticmethod
    def queries_of(shape: tuple[int, int], count: int, dtype: torch.dtype) -> list[Stored]:
        """Every third one of low rank: some against tokens, some expanded."""
        queries: list[Stored] = []
        for place in range(count):
            query = normal(*shape, seed=place, dtype=dtype)
            left, right = factorise(query.float(), 1 + place % 5)
            queries.append(query if place % 3 else (left.to(dtype), right.to(dtype)))
        return queries

    @pytest.mark.parametrize("rows", [1, 5])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_whichever_other_queries_stand_beside(self, shape: tuple[int, int], rows: int, dtype: torch.dtype) -> None:
        a = normal(rows, 12, shape[1], seed=1, dtype=dtype)
        g = normal(rows, 12, shape[0], seed=2, dtype=dtype)
        queries = self.queries_of(shape, 21, dtype)
        together = LayerQueries.build(shape, queries, tokens=12).scores([(a, g)])
        random = np.random.default_rng(0)
        companies = [[place] for place in range(0, 21, 4)]
        companies += [random.permutation(21)[:size].tolist() for size in (2, 3, 8, 9, 17, 21)]
        for company in companies:
            found = LayerQueries.build(shape, [queries[place] for place in company], tokens=12).scores([(a, g)])
            assert torch.equal(found, together[:, company]), company

    @pytest.mark.parametrize(("rows", "tokens"), [(1, 12), (2, 13), (5, 12), (5, 13), (16, 12)])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_whichever_rows_share_the_batch(
        self, shape: tuple[int, int], rows: int, tokens: int, dtype: torch.dtype
    ) -> None:
        many = 24
        a = normal(many, tokens, shape[1], seed=1, dtype=dtype)
        g = normal(many, tokens, shape[0], seed=2, dtype=dtype)
        built = LayerQueries.build(shape, self.queries_of(shape, 11, dtype), tokens=12)
        random = np.random.default_rng(rows)
        found: dict[int, Tensor] = {}
        for _ in range(5):
            chosen = random.permutation(many)[:rows]
            scores = built.scores([(a[chosen], g[chosen])], 16)
            for place, row in enumerate(chosen.tolist()):
                assert torch.equal(found.setdefault(row, scores[place]), scores[place])
        # Filler repeats a row: so it must have that row's bits.
        repeated = built.scores([(a[:1].expand(rows, -1, -1), g[:1].expand(rows, -1, -1))], 16)
        assert all(torch.equal(repeated[0], row) for row in repeated)

    @pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
    def test_tokens_whichever_other_queries_stand_beside(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        a = normal(4, 12, shape[1], seed=1, dtype=dtype)
        g = normal(4, 12, shape[0], seed=2, dtype=dtype)
        queries = self.queries_of(shape, 10, dtype)
        together = LayerQueries.build(shape, queries, tokens=12)
        for place, query in enumerate(queries):
            alone = LayerQueries.build(shape, [query], tokens=12)
            assert torch.equal(alone.token_scores(0, a, g), together.token_scores(place, a, g))


class TestFactorise:
    @pytest.mark.parametrize("shape", [(5, 7), (7, 5), (6, 6), (1, 9), (9, 1)])
    def test_exact_at_full_rank(self, shape: tuple[int, int]) -> None:
        s_test = normal(*shape, seed=1)
        left, right = factorise(s_test, 99)
        assert left.shape == (shape[0], min(shape))
        assert right.shape == (shape[1], min(shape))
        assert reference.difference(left @ right.T, s_test) <= 1e-12

    @pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
    def test_the_best_of_each_rank(self, shape: tuple[int, int]) -> None:
        """Every prefix of the factors is as near as the truncated SVD."""
        s_test = normal(*shape, seed=1)
        values = torch.linalg.svdvals(s_test)
        left, right = factorise(s_test, 8)
        assert reference.difference(right.T @ right, torch.eye(8)) <= 1e-10
        for rank in range(9):
            rest = s_test - left[:, :rank] @ right[:, :rank].T
            assert float(rest.norm()) == pytest.approx(float(values[rank:].norm()), rel=1e-9)

    @pytest.mark.parametrize("shape", [(6, 11), (11, 6)])
    def test_fewer_directions_than_the_rank(self, shape: tuple[int, int]) -> None:
        """A query of two tokens, or one that a layer has no part in: nothing but zeros beyond, and no NaN."""
        two = normal(shape[0], 2, seed=1) @ normal(2, shape[1], seed=2)
        for s_test in (two, torch.zeros(shape, dtype=torch.float64), two.float()):
            left, right = factorise(s_test, 5)
            assert torch.isfinite(left).all()
            assert torch.isfinite(right).all()
            tolerance = 1e-5 if s_test.dtype == torch.float32 else 1e-10
            torch.testing.assert_close(left @ right.T, s_test, rtol=0, atol=tolerance)

    def test_components_sum_to_the_score(self) -> None:
        s_test, a, g = normal(6, 9, seed=1), normal(4, 5, 9, seed=2), normal(4, 5, 6, seed=3)
        parts = component_scores(*factorise(s_test, 6), a, g)
        assert parts.shape == (4, 6)
        assert reference.difference(parts.sum(1), brute([s_test], a, g)[:, 0]) <= 1e-12


def measured(
    components: dict[str, np.ndarray], dense: dict[str, np.ndarray], ranks: dict[str, int]
) -> tuple[float, np.ndarray]:
    """RMS(score − dense score) / RMS(dense score) at given ranks, spelled out, and the scores."""
    whole = np.sum(list(dense.values()), axis=0)
    kept = np.zeros_like(whole)
    for name, scores in dense.items():
        rank = ranks.get(name, -1)
        kept = kept + (scores if rank < 0 else components[name][:, :rank].sum(1))
    return float(np.sqrt(((kept - whole) ** 2).mean()) / np.sqrt((whole**2).mean())), kept


def layers_of(
    seed: int, probes: int, layers: int, most: int, decay: float
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Component scores with a decaying spectrum; what the components leave out; a layer that stays dense."""
    random = np.random.default_rng(seed)
    components, dense = {}, {"always dense": random.normal(size=probes)}
    for place in range(layers):
        rank = int(random.integers(1, most + 1))
        values = random.normal(size=(probes, rank)) * decay ** np.arange(rank) * 10 ** random.uniform(-2, 1)
        components[f"layer{place}"] = values
        rest = random.normal(size=probes) * decay**rank * random.integers(0, 2)
        dense[f"layer{place}"] = values.sum(1) + rest
    return components, dense


class TestChooseRanks:
    @settings(max_examples=150, deadline=None)
    @given(
        st.integers(0, 10**6),
        st.integers(1, 20),
        st.integers(1, 5),
        st.integers(1, 12),
        st.floats(0.1, 1.0),
        st.sampled_from([0.0, 1e-6, 0.01, 0.1, 0.5]),
    )
    def test_keeps_its_bound(
        self, seed: int, probes: int, layers: int, most: int, decay: float, max_error: float
    ) -> None:
        components, dense = layers_of(seed, probes, layers, most, decay)
        ranks, error = choose_ranks(components, dense, max_error)
        assert set(ranks) == set(components)
        assert all(-1 <= rank <= components[name].shape[1] for name, rank in ranks.items())
        found, _ = measured(components, dense, ranks)
        assert found == pytest.approx(error, rel=1e-9, abs=1e-12)
        assert found <= max_error + 1e-12

    def test_a_looser_bound_takes_less(self) -> None:
        components, dense = layers_of(3, 20, 4, 12, 0.5)
        sizes = []
        for max_error in (1e-4, 1e-2, 0.1, 0.6):
            ranks, error = choose_ranks(components, dense, max_error)
            sizes.append(sum(components[name].shape[1] + 1 if rank < 0 else rank for name, rank in ranks.items()))
            assert error > 0
        assert sizes == sorted(sizes, reverse=True)
        assert len(set(sizes)) == 4

    def test_stays_dense_when_it_must(self) -> None:
        random = np.random.default_rng(0)
        components = {"low": random.normal(size=(9, 3)), "high": random.normal(size=(9, 3))}
        dense = {"low": components["low"].sum(1), "high": components["high"].sum(1) + random.normal(size=9)}
        ranks, error = choose_ranks(components, dense, 0.01)
        assert ranks == {"low": 3, "high": -1}
        assert error <= 1e-12

    def test_a_layer_of_no_weight_is_left_out(self) -> None:
        random = np.random.default_rng(0)
        components = {"large": random.normal(size=(9, 3)), "small": 1e-6 * random.normal(size=(9, 3))}
        dense = {name: values.sum(1) for name, values in components.items()}
        ranks, _ = choose_ranks(components, dense, 0.01)
        assert ranks == {"large": 3, "small": 0}

    def test_scores_of_zero_need_nothing(self) -> None:
        ranks, error = choose_ranks({"layer": np.zeros((4, 2))}, {"layer": np.zeros(4)}, 0.01)
        assert (ranks, error) == ({"layer": 0}, 0.0)
