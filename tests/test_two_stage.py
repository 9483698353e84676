from __future__ import annotations

import numpy as np
import pytest
import torch

from jobs.two_stage import passes, study
from jobs.twostage import captured, curve, page
from jobs.twostage.cases import prepare
from jobs.twostage.gathered import slowness
from jobs.twostage.passes import LayerStudy, sides_of
from jobs.twostage.sketch import CountSketch, Deflated, balance, narrowed
from raylux.layers import TrackedLayer


def bases(outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return tuple(torch.linalg.qr(torch.randn(n, n))[0] for n in (inputs, outputs))


def test_balancing_keeps_scores_and_makes_the_product_of_norms_small() -> None:
    q_a, q_s = bases(6, 5)
    strong = torch.ones(6, 5)
    strong[-2:] *= 30
    strong[:, -1] *= 10
    v, a, g = torch.randn(4, 6, 5) / strong, torch.randn(3, 7, 5), torch.randn(3, 7, 6)
    a[..., -1] *= 10
    g[..., -2:] *= 30
    gradients = torch.bmm(g.mT, a)
    weights = balance(v.square().mean(0), gradients.square().mean(0), (2, 1))
    back_v = q_s @ v @ q_a.T
    balanced = q_s @ weights.queries(v) @ q_a.T
    turned = weights.tokens(a @ q_a.T, g @ q_s.T, q_a, q_s)
    formed = torch.bmm(turned[1].mT, turned[0])
    exact = torch.einsum("qpm,npm->nq", back_v, q_s @ gradients @ q_a.T)
    torch.testing.assert_close(torch.einsum("qpm,npm->nq", balanced, formed), exact, rtol=1e-4, atol=1e-3)
    assert balanced.norm() * formed.norm() < 0.2 * back_v.norm() * gradients.norm()
    assert weights.multiplications(7) == 2 * 7 * (2 * 6 + 1 * 5)


def test_a_sketch_errs_as_much_as_its_norms_promise() -> None:
    torch.manual_seed(1)
    v, g = torch.randn(40, 16, 32), torch.randn(50, 16, 32)
    drawn = CountSketch.draw(v.square().mean(0), g.square().mean(0), 64, seed=3)
    exact = (g.flatten(1) @ v.flatten(1).T).numpy()
    sketches = drawn.gradients(g).numpy(), drawn.queries(v).numpy()
    for pair in (sketches, tuple(narrowed(x, 16, 5) for x in sketches)):
        split = Deflated.split(exact, *pair, exact.std(0), 0, 20)
        off = split.estimate() - exact
        assert abs(off.mean()) < 0.1 * off.std()
        assert off.std() == pytest.approx(float(np.sqrt(split.variance().mean())), rel=0.15)


def test_pivots_as_many_as_queries_leave_nothing_to_sketch() -> None:
    torch.manual_seed(2)
    v, g = torch.randn(5, 8, 8), torch.randn(30, 8, 8)
    exact = (g.flatten(1) @ v.flatten(1).T).double().numpy()
    drawn = CountSketch.draw(v.square().mean(0), g.square().mean(0), 32, seed=3)
    split = Deflated.split(
        exact, drawn.gradients(g).double().numpy(), drawn.queries(v).double().numpy(), exact.std(0), 5, 30
    )
    np.testing.assert_allclose(split.estimate(), exact, rtol=1e-6, atol=1e-9)


def test_what_must_be_rescored_follows_from_the_error() -> None:
    draw = np.random.default_rng(0)
    exact = draw.normal(size=(400, 20))
    perfect = curve.Estimate(exact, np.full(exact.shape, 1e-12), {"x": (exact, np.full(exact.shape, 1e-12))})
    assert curve.rescored(exact, perfect, 20).pairs == pytest.approx(0.05, abs=0.003)
    noisy = exact + 0.3 * draw.normal(size=exact.shape)
    blurred = curve.Estimate(noisy, np.full(exact.shape, 0.09), {"x": (noisy, np.full(exact.shape, 0.09))})
    result = curve.rescored(exact, blurred, 20)
    assert result.pairs > 0.08
    assert result.error == pytest.approx(0.3, rel=0.1)
    kept = {"x": curve.Kept(exact, exact[:, :4], exact[:20, :4])}
    assert curve.eliminated(kept, blurred, {"x": 1.0}, 100.0, 20) == (1.0, 1.0)
    share, recall = curve.eliminated(kept, blurred, {"x": 1.0}, 2.0, 20)
    assert share < 0.4 and recall > 0.9
    assert curve.least_eliminated(kept, blurred, {"x": 1.0}, 20) == pytest.approx(result.adaptive, rel=0.2)


def test_the_exact_contraction_costs_one_and_nothing_first_costs_its_pairs() -> None:
    layer = TrackedLayer("x", 10, 20, False, False)
    none = curve.FirstPass({"x": 0}, 0)
    spent = curve.cost([layer], curve.Shape(50, 100, 10**9), none, {"x": (0, 0)}, 1.0)
    assert spent.form + spent.rescore == pytest.approx(1.0)
    assert spent.total == pytest.approx(1.0 + spent.sketch)


def test_the_passes_of_the_tiny_case_agree_with_one_another(tmp_path) -> None:
    case = prepare("tiny", 24, 6, 12)
    layers = captured.layers(case)
    captured.keep(case, tmp_path)
    with torch.no_grad():
        kept, total = passes(layers, 6, 1 << 20, tmp_path)
        first = LayerStudy(tmp_path, layers[0], 6)
        v = torch.cat([x for _, x in first.preconditioned()])
        turned = torch.cat([first.curvature.into(torch.bmm(g.mT, a)) for _, a, g in first.candidates.blocks(24)])
    # The same numbers in the eigenbasis; and a sketch with a bucket for each entry is the product itself.
    expected = torch.einsum("npm,qpm->nq", turned, v).numpy()
    np.testing.assert_allclose(kept[layers[0].name].exact, expected, rtol=1e-3, atol=1e-3 * expected.std())
    for layer in kept.values():
        off = layer.gradients @ layer.queries.T - layer.exact
        assert off.std() < 1e-3 * layer.exact.std()
    assert total.shape == (24, 6)
    assert captured.mean_tokens(tmp_path, "cand") == 24
    assert sides_of(layers[0], 16, 4) == (16, 4)


def test_the_page_says_what_the_study_found(tmp_path) -> None:
    found = study("tiny", 120, 8, 24, 64, tmp_path)
    assert all(row["eliminated"] <= row["adaptive"] + 0.05 for row in found["rows"])
    assert found["rows"][0]["error"] > found["rows"][3]["error"]
    text = page.text(
        {"tiny": {**found, "gathered": {"0.05": 40.0}, "energies": {"0.5": 0.9}, "command": "python jobs/two_stage.py"}}
    )
    assert "| 5.0% | 40 × | 200% |" in text
    assert f"{sum(found['rows'][1]['cost'].values()):.1%}" in text


def test_a_gathered_pair_takes_time() -> None:
    assert slowness(0.002) > 0


def test_scores_of_few_directions_need_few_pivots() -> None:
    draw = np.random.default_rng(0)
    exact = draw.normal(size=(200, 4)) @ draw.normal(size=(4, 40))
    found = curve.energies(exact)
    assert found["0.1"] == pytest.approx(1.0)
    assert found["0.05"] < 0.9
