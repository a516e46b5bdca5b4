"""The closed form of a pipeline's step time against an event by event replay."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable

import pytest

from paraplan.best_cuts import best_cuts
from paraplan.layout import Layout
from paraplan.partition import Column
from paraplan.pipeline import (
    critical_paths,
    interleaved_seconds,
    one_f_one_b_seconds,
    pass_share,
    waiting_share,
)
from paraplan.simulate import Pass, rank_passes
from paraplan.stage_cost import in_flight


def one_f_one_b_order(p: int, m: int, s: int) -> list[tuple[str, int]]:
    warm_up = min(m, p - s)
    order = [("F", k) for k in range(warm_up)]
    following = warm_up
    for k in range(m):
        order.append(("B", k))
        if following < m:
            order.append(("F", following))
            following += 1
    return order


def replay(forward: list[float], backward: list[float], link: list[float], m: int) -> float:
    """Run 1F1B event by event; transfers take time but keep nobody busy."""
    p = len(forward)
    done: dict[tuple[str, int, int], float] = {}
    orders = [one_f_one_b_order(p, m, s) for s in range(p)]
    place, clock = [0] * p, [0.0] * p
    while any(place[s] < len(orders[s]) for s in range(p)):
        for s in range(p):
            while place[s] < len(orders[s]):
                what, k = orders[s][place[s]]
                source, delay = (s - 1, link[s - 1]) if what == "F" else (s + 1, link[s])
                if what == "B" and s == p - 1:
                    ready: float | None = done[("F", k, s)]
                elif what == "F" and s == 0:
                    ready = 0.0
                else:
                    ready = done.get((what, k, source))
                    ready = None if ready is None else ready + delay
                if ready is None:
                    break
                clock[s] = max(clock[s], ready) + (forward[s] if what == "F" else backward[s])
                done[what, k, s] = clock[s]
                place[s] += 1
    return max(clock)


def draw(rng: random.Random, m: int, spread: float, transfer: float) -> tuple[float, float]:
    p = rng.choice([2, 3, 4, 6, 8, 12])
    forward = [1 + spread * rng.uniform(-1, 1) for _ in range(p)]
    backward = [2 * f * (1 + spread / 10 * rng.uniform(-1, 1)) for f in forward]
    link = [3 * transfer * rng.uniform(0.5, 1) for _ in range(p - 1)] + [0.0]
    return one_f_one_b_seconds(forward, backward, link, m), replay(forward, backward, link, m)


@pytest.mark.parametrize("p", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("m", [1, 2, 3, 7, 8, 33])
def test_equal_stages_without_transfers_are_exact(p: int, m: int) -> None:
    formula = one_f_one_b_seconds([1.0] * p, [2.0] * p, [0.0] * p, m)
    assert formula == pytest.approx(replay([1.0] * p, [2.0] * p, [0.0] * p, m), rel=1e-12)
    assert formula == pytest.approx(3.0 * (m + p - 1), rel=1e-12)


def test_uneven_stages_with_transfers() -> None:
    """The figures that the module's docstring states."""
    rng = random.Random(1)
    errors = []
    for _ in range(400):
        m = rng.randint(4, 64)
        formula, exact = draw(rng, m, rng.choice([0.0, 0.1, 0.3]), rng.choice([0.0, 0.02, 0.1]))
        errors.append(formula / exact - 1)
    assert abs(statistics.mean(errors)) < 0.002
    assert min(errors) > -0.015 and max(errors) < 0.05


def test_one_micro_batch_is_a_single_pass() -> None:
    rng = random.Random(2)
    for _ in range(50):
        formula, exact = draw(rng, 1, 0.3, 0.1)
        assert formula == pytest.approx(exact, rel=1e-12)


def test_paths_only_grow_with_work() -> None:
    """No coefficient is negative, which best_cuts and the bounds rely on."""
    for p in range(2, 9):
        for m in range(1, 20):
            for path in critical_paths(p, m):
                assert min(*path.forward, *path.backward, *path.transfer) >= -1e-12


def test_interleaving_of_equal_ranks() -> None:
    """M t + (p - 1) t / v without transfers (Narayanan et al. 2021)."""
    for p, m, v in [(2, 4, 2), (4, 8, 2), (4, 8, 4), (8, 16, 3)]:
        formula = interleaved_seconds([3.0] * p, 0.0, m, v, contention=0.1)
        assert formula == pytest.approx(3.0 * m + 3.0 * (p - 1) / v, rel=1e-12)


def shared_cores_seconds(p: int, m: int, rate_of: Callable[[int], float]) -> float:
    """1F1B of equal stages (1 and 2 s while all compute), by events; rate by stages busy."""
    orders = [rank_passes(rank, pipeline=p, micro_batches=m) for rank in range(p)]
    done: set[Pass] = set()
    left: dict[int, float] = {}
    now = 0.0

    def ready(work: Pass) -> bool:
        stage, micro_batch, backward = work
        if not backward:
            return stage == 0 or Pass(stage - 1, micro_batch, False) in done
        if stage == p - 1:
            return Pass(stage, micro_batch, False) in done
        return Pass(stage + 1, micro_batch, True) in done

    while any(orders):
        for rank, order in enumerate(orders):
            if rank not in left and order and ready(order[0]):
                left[rank] = 2.0 if order[0].backward else 1.0
        rate = rate_of(len(left))
        spent = min(left.values()) / rate
        now += spent
        for rank in list(left):
            left[rank] -= spent * rate
            if left[rank] < 1e-9:
                del left[rank]
                done.add(orders[rank].pop(0))
    return now


@pytest.mark.parametrize("p", [2, 3, 4, 8])
@pytest.mark.parametrize("m", [1, 2, 5, 8, 32])
def test_stages_that_share_cores_compute_faster_while_others_wait(p: int, m: int) -> None:
    layout = Layout(pipeline=p, micro_batches=m, schedule="1f1b")
    alone = one_f_one_b_seconds([1.0] * p, [2.0] * p, [0.0] * p, m)
    for shared in (1.0, 1.5, 2.0):
        # Cores whose speed is divided among those that compute.
        expected = shared_cores_seconds(p, m, lambda busy: min(shared, p / busy))  # noqa: B023
        assert pass_share(layout, shared, shared) * alone == pytest.approx(expected)
    # Sharing costs something: two cores' worth of p ranks, alone three times as fast.
    share = pass_share(layout, p / 2, 3.0)
    expected = shared_cores_seconds(
        p, m, lambda k: 3.0 if k <= 2 else 1 / (1 / 3 + 2 / 3 * (k - 2) / (p - 2))
    )
    if p > 2:
        assert share * alone == pytest.approx(expected)
    assert pass_share(layout, p, p) * alone == pytest.approx(3.0 * m)  # one core is never idle
    busy = [min(i, m, p, m + p - i) for i in range(1, m + p)]
    waiting = sum((k - 1) / (p - 1) for k in busy) / len(busy)
    assert waiting_share(layout) == pytest.approx(waiting)


def test_in_flight_counts_match_the_schedule() -> None:
    for p in range(1, 7):
        for m in range(1, 12):
            layout = Layout(pipeline=p, micro_batches=m, schedule="1f1b" if p > 1 else "none")
            for s in range(p):
                alive = most = 0
                for what, _ in one_f_one_b_order(p, m, s):
                    alive += 1 if what == "F" else -1
                    most = max(most, alive)
                assert in_flight(layout, s) == most


def interleaved_peak(p: int, m: int, v: int, s: int) -> int:
    """Chunks in flight of Megatron's interleaved order: warm-up, then one in, one out."""
    warm_up = min(m * v, 2 * (p - s - 1) + (v - 1) * p)
    return min(m * v, warm_up + 1)


def test_interleaved_in_flight() -> None:
    for p, m, v in [(2, 4, 2), (4, 8, 2), (4, 4, 3)]:
        layout = Layout(pipeline=p, micro_batches=m, virtual_stages=v, schedule="interleaved-1f1b")
        for s in range(p):
            assert in_flight(layout, s) * v == interleaved_peak(p, m, v, s)


class _Cost:
    """The part of a stage's cost that best_cuts reads."""

    def __init__(self, forward: float, backward: float, tail: float) -> None:
        self.forward_seconds, self.backward_seconds = forward, backward
        self.seconds, self.tail_seconds = forward + backward, tail


def test_best_cuts_against_all_cuts() -> None:
    """Random block times, missing columns, transfers and tails; 300 cases."""
    from itertools import combinations

    rng = random.Random(3)
    for _ in range(300):
        length, p, m = rng.randint(3, 9), rng.randint(2, 4), rng.randint(1, 9)
        p = min(p, length)
        times = [rng.choice([1.0, 1.0, rng.uniform(0.2, 3)]) for _ in range(length)]
        columns = {}
        for rank in range(p):
            for first in range(length):
                for end in range(first + 1, length + 1):
                    work = sum(times[first:end]) * rng.choice([1.0, 1.0, 1.3])
                    cost = _Cost(work / 3, work * 2 / 3, rng.uniform(0, 2))
                    link = 0.0 if rank == p - 1 else rng.choice([0.0, 0.05, 0.3])
                    if rng.random() < 0.9:
                        columns[rank, first, end] = Column(rank, first, end, cost, link)  # type: ignore[arg-type]
        best = float("inf")
        for inner in combinations(range(1, length), p - 1):
            cuts = (0, *inner, length)
            chosen = [columns.get((s, cuts[s], cuts[s + 1])) for s in range(p)]
            if all(chosen):
                best = min(best, _seconds([q for q in chosen if q], m))
        found = best_cuts(
            list(columns.values()), stages=p, micro_batches=m, length=length, limit_seconds=1e9
        )
        if best == float("inf"):
            assert found == []
            continue
        chosen = [columns[s, found[0][s], found[0][s + 1]] for s in range(p)]
        assert _seconds([q for q in chosen if q], m) == pytest.approx(best, rel=1e-9)


def _seconds(chosen: list[Column], m: int) -> float:
    work = one_f_one_b_seconds(
        [q.cost.forward_seconds for q in chosen],
        [q.cost.backward_seconds for q in chosen],
        [q.transfer_seconds for q in chosen],
        m,
    )
    return work + max(q.cost.tail_seconds for q in chosen)
