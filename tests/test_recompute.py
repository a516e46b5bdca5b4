"""The cheapest recompute choice against trying every count."""

from __future__ import annotations

import itertools
import random

import pytest

from paraplan.recompute import Choice, LayerKind, cheapest_choice, choice_of, least_memory_choice


def random_kind(rng: random.Random) -> LayerKind:
    saved = sorted((rng.uniform(0, 10) for _ in range(3)), reverse=True)
    extra = sorted(rng.choice([0.0, rng.uniform(0, 3)]) for _ in range(2))
    allowed = rng.choice([(True, True, True)] * 3 + [(True, False, True), (False, False, True)])
    return LayerKind(
        count=rng.randint(1, 6),
        saved=(saved[0], saved[1], saved[2]),
        extra=(0.0, extra[0], extra[1]),
        working=(rng.uniform(0, 4), rng.uniform(0, 6), rng.uniform(0, 8)),
        allowed=allowed,
    )


def every_choice(kinds: list[LayerKind], floor: float) -> list[Choice]:
    ways = []
    for kind in kinds:
        counts = [
            (a, b, kind.count - a - b)
            for a in range(kind.count + 1)
            for b in range(kind.count + 1 - a)
        ]
        ways.append([c for c in counts if all(kind.allowed[r] or not c[r] for r in range(3))])
    return [choice_of(kinds, chosen, floor) for chosen in itertools.product(*ways)]


@pytest.mark.parametrize("kinds", [1, 2, 3])
def test_cheapest_choice_is_the_brute_force_one(kinds: int) -> None:
    rng = random.Random(kinds)
    tight = 0
    for _ in range(150):
        layers = [random_kind(rng) for _ in range(kinds)]
        floor, budget = rng.uniform(0, 5), rng.uniform(0, 45)
        fitting = [
            c for c in every_choice(layers, floor) if c.saved_bytes + c.working_bytes <= budget
        ]
        found = cheapest_choice(layers, budget, floor)
        if not fitting:
            assert found is None
            continue
        assert found is not None
        assert found.saved_bytes + found.working_bytes <= budget
        assert found.extra_seconds == pytest.approx(min(c.extra_seconds for c in fitting), abs=1e-9)
        tight += found.extra_seconds > 0
    assert tight > 10, "cases without recomputation show little"


@pytest.mark.parametrize("kinds", [1, 2])
def test_least_memory(kinds: int) -> None:
    rng = random.Random(10 + kinds)
    for _ in range(150):
        layers = [random_kind(rng) for _ in range(kinds)]
        floor = rng.uniform(0, 5)
        least = min(c.saved_bytes + c.working_bytes for c in every_choice(layers, floor))
        found = least_memory_choice(layers, floor)
        assert found.saved_bytes + found.working_bytes == pytest.approx(least, abs=1e-9)


def test_more_budget_never_costs_more() -> None:
    rng = random.Random(5)
    layers = [random_kind(rng), random_kind(rng)]
    last = float("inf")
    for budget in range(0, 80):
        found = cheapest_choice(layers, float(budget), 1.0)
        if found is not None:
            assert found.extra_seconds <= last + 1e-12
            last = found.extra_seconds
    assert last == 0.0 or not any(layer.allowed[0] for layer in layers)
