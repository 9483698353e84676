"""docs/scaling.md holds what the cost model says today, and the plan that has a bound keeps it."""

from __future__ import annotations

from jobs import scaling


def test_the_page_is_what_the_job_writes() -> None:
    text = scaling.PAGE.read_text(encoding="utf-8")
    assert text == scaling.page(text), "run python jobs/scaling.py --write"


def test_llama_3_8b_on_eight_devices_keeps_within_its_floor() -> None:
    found = scaling.plan("llama-3-8b", 8)
    assert found.device_hours <= scaling.FLOOR
    # Running the model over the candidates is a bound from below at any utilisation.
    shape, _, _ = scaling.found("llama-3-8b")
    bare = 512e6 * (shape.forward_flops(512) + shape.backward_flops(512))
    assert found.stage("score").device_hours > bare / 989e12 / 3600


def test_what_the_engine_does_with_llama_3_70b_fits_every_device() -> None:
    """Each device of a worker by itself; more of them make fewer passes, and none computes any faster."""
    few, many = (scaling.turns(gpus) for gpus in scaling.GPUS)
    for found in (few, many):
        stages = [found.stage(name) for name in ("covariance", "lambda")]
        assert all(0 < stage.device_bytes <= 80e9 * 0.9 for stage in stages)
        assert all(choice.in_engine for choice in found.choices)
    assert few.stage("covariance").tasks > many.stage("covariance").tasks
    assert few.stage("covariance").works[3].seconds == many.stage("covariance").works[3].seconds


def test_more_devices_take_less_time_and_no_fewer_device_hours() -> None:
    for model in scaling.SPLIT:
        plans = [scaling.plan(model, devices) for devices in scaling.DEVICES]
        assert [plan.seconds for plan in plans] == sorted((plan.seconds for plan in plans), reverse=True)
        assert [plan.device_hours for plan in plans] == sorted(plan.device_hours for plan in plans)
