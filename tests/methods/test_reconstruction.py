"""The schedule of a reconstruction: even, or shortened once the loss has stopped falling."""

from __future__ import annotations

import math

import pytest

from ptq4sam.methods.schedule import Schedule
from ptq4sam.quantization.recon import Reconstruction


def run(schedule: Schedule, losses: list[float]) -> int:
    """Steps until the end, with a loss told every 10 steps."""
    steps = 0
    while not schedule.ended:
        schedule.advance()
        steps += 1
        if steps % 10 == 0:
            schedule.hear(losses[min(steps // 10, len(losses)) - 1], 10)
    return steps


def test_without_patience_all_steps_are_made() -> None:
    assert run(Schedule(Reconstruction(iters=333)), [1.0]) == 333


def test_a_plateau_shortens_the_rest() -> None:
    settings = Reconstruction(iters=1000, patience=50)
    falling = [1.0 - 0.02 * index for index in range(20)]
    # 200 steps fall, 50 do not, the rest of the schedule takes 50.
    assert run(Schedule(settings), falling) == pytest.approx(300, abs=11)
    always = [math.exp(-index / 10) for index in range(100)]
    assert run(Schedule(settings), always) == 1000


def test_temperature_and_rate_reach_their_ends_either_way() -> None:
    for patience in (0, 20):
        settings = Reconstruction(iters=200, patience=patience, warm_up=0.2, b_range=(20, 2))
        schedule = Schedule(settings)
        assert schedule.temperature() is None
        assert schedule.scale_rate() == settings.scale_lr
        seen = []
        for _ in range(run(schedule, [1.0])):
            seen.append(schedule.temperature())
        assert schedule.temperature() == pytest.approx(2)
        assert schedule.scale_rate() == pytest.approx(0, abs=1e-9)


def test_temperature_falls_from_the_end_of_the_warm_up() -> None:
    schedule = Schedule(Reconstruction(iters=10, warm_up=0.2, b_range=(20, 2)))
    found = []
    for _ in range(10):
        found.append(schedule.temperature())
        schedule.advance()
    assert found[:2] == [None, None]
    assert found[2] == pytest.approx(20)
    assert found[6] == pytest.approx(11)
