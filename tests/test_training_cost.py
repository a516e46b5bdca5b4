"""Checkpoints and failures: Daly's formula against simulated failures and a fine search."""

from __future__ import annotations

import math
import random

import pytest

from paraplan.training_cost import (
    best_interval_seconds,
    mtbf_seconds,
    training_run,
    wall_per_step_second,
)
from paraplan.what_if_file import Economics


def simulated_wall(
    intervals: int, interval: float, write: float, restart: float, mtbf: float, rng: random.Random
) -> float:
    """One run, failure by failure; a failure during a restart starts it again."""
    wall, done = 0.0, 0
    left = rng.expovariate(1 / mtbf)
    while done < intervals:
        need = interval + write
        if left >= need:
            wall, left, done = wall + need, left - need, done + 1
            continue
        wall += left
        left = rng.expovariate(1 / mtbf)
        while left < restart:
            wall += left
            left = rng.expovariate(1 / mtbf)
        wall, left = wall + restart, left - restart
    return wall


@pytest.mark.parametrize(("write", "restart", "mtbf"), [(20, 60, 3000), (100, 600, 5000)])
def test_wall_time_is_the_mean_of_simulated_runs(write: float, restart: float, mtbf: float) -> None:
    rng = random.Random(7)
    interval = best_interval_seconds(write, mtbf)
    runs = [simulated_wall(200, interval, write, restart, mtbf, rng) for _ in range(400)]
    mean = sum(runs) / len(runs)
    error = math.sqrt(sum((r - mean) ** 2 for r in runs) / len(runs) / (len(runs) - 1))
    exact = 200 * interval * wall_per_step_second(interval, write, restart, mtbf)
    assert abs(mean - exact) < 4 * error


@pytest.mark.parametrize("write", [0.1, 5, 60, 600])
@pytest.mark.parametrize("mtbf", [1800.0, 86400.0, 3e6])
def test_the_interval_is_the_best_one(write: float, mtbf: float) -> None:
    """Daly's series against a fine search: within 0.1 % of the least wall time."""
    here = wall_per_step_second(best_interval_seconds(write, mtbf), write, 0, mtbf)
    tried = [math.sqrt(2 * write * mtbf) * 1.01**i for i in range(-200, 201)]
    least = min(wall_per_step_second(interval, write, 0, mtbf) for interval in tried)
    assert here <= least * 1.001


def run(economics: Economics, spot: float = 0.0, devices: int = 64):  # type: ignore[no-untyped-def]
    return training_run(
        tokens_per_second=1e6,
        devices=devices,
        nodes=devices // 8,
        checkpoint_bytes=1e11,
        spot_interruptions=spot,
        price_per_device_hour=2.0,
        watts_per_device=700.0,
        economics=economics,
    )


def test_money_and_energy_follow_the_wall_time() -> None:
    economics = Economics(tokens=1e12)
    found = run(economics)
    hours = found.wall_seconds / 3600
    assert found.wall_seconds * found.share == pytest.approx(1e6)
    assert found.dollars == pytest.approx(64 * hours * 2.0)
    assert found.kwh == pytest.approx(64 * hours * 0.7 * economics.power_overhead)
    assert found.carbon_kg == pytest.approx(found.kwh * economics.carbon_kg_per_kwh)


def test_failures_cost_and_too_many_are_no_end() -> None:
    usual, spot = run(Economics()), run(Economics(), spot=2.0)
    assert spot.wall_seconds > usual.wall_seconds
    assert run(Economics(), spot=20_000.0) is None
    assert mtbf_seconds(64, 8, 0.0, Economics(device_mtbf_hours=64)) == pytest.approx(3600)
    assert mtbf_seconds(64, 8, 3.0, Economics(device_mtbf_hours=1e12)) == pytest.approx(3600)


def test_llama_3_trains_for_the_share_it_reports() -> None:
    """16,384 devices fail every 3 hours, as published; more than 90 % of the time trains."""
    economics = Economics()
    assert mtbf_seconds(16384, 2048, 0.0, economics) / 3600 == pytest.approx(3.09, abs=0.01)
    found = run(economics, devices=16384)
    assert found.share > 0.9
