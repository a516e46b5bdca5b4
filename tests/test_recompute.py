"""The cheapest recompute choice against trying every count."""

from __future__ import annotations

import itertools
import random

import pytest

from paraplan.recompute import (
    Choice,
    LayerKind,
    Room,
    cheapest_choice,
    choice_of,
    lacking,
    least_memory_choice,
)


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


def random_rooms(rng: random.Random) -> list[Room]:
    """What a step's moments leave: all of what is saved, some of it, none."""
    return [
        Room(rng.uniform(0, 45), 1.0, rng.uniform(0, 5), rng.uniform(0, 3)),
        Room(rng.uniform(5, 45), rng.uniform(0.2, 1), rng.uniform(0, 5), rng.uniform(0, 9)),
        Room(rng.uniform(5, 45), 0.0, rng.uniform(0, 6), None),
    ]


def misses(choice: Choice, rooms: list[Room]) -> float:
    """`lacking`, written out."""
    missing = []
    for room in rooms:
        work = [room.floor_bytes]
        if room.beside_layer_bytes is not None:
            work.append(choice.working_bytes + room.beside_layer_bytes)
        missing.append(room.share * choice.saved_bytes + max(work) - room.budget_bytes)
    return max(missing)


def every_choice(kinds: list[LayerKind]) -> list[Choice]:
    ways = []
    for kind in kinds:
        counts = [
            (a, b, kind.count - a - b)
            for a in range(kind.count + 1)
            for b in range(kind.count + 1 - a)
        ]
        ways.append([c for c in counts if all(kind.allowed[r] or not c[r] for r in range(3))])
    return [choice_of(kinds, chosen) for chosen in itertools.product(*ways)]


@pytest.mark.parametrize("kinds", [1, 2, 3])
def test_cheapest_choice_is_the_brute_force_one(kinds: int) -> None:
    rng = random.Random(kinds)
    tight = 0
    for _ in range(150):
        layers = [random_kind(rng) for _ in range(kinds)]
        rooms = random_rooms(rng)
        fitting = [c for c in every_choice(layers) if misses(c, rooms) <= 0]
        found = cheapest_choice(layers, rooms)
        if not fitting:
            assert found is None
            continue
        assert found is not None
        assert misses(found, rooms) <= 0
        assert found.extra_seconds == pytest.approx(min(c.extra_seconds for c in fitting), abs=1e-9)
        tight += found.extra_seconds > 0
    assert tight > 10, "cases without recomputation show little"


@pytest.mark.parametrize("kinds", [1, 2])
def test_least_memory(kinds: int) -> None:
    rng = random.Random(10 + kinds)
    for _ in range(150):
        layers = [random_kind(rng) for _ in range(kinds)]
        rooms = random_rooms(rng)
        least = min(misses(c, rooms) for c in every_choice(layers))
        found = least_memory_choice(layers, rooms)
        assert lacking(found, rooms) == pytest.approx(least, abs=1e-9)


def test_more_budget_never_costs_more() -> None:
    rng = random.Random(5)
    layers = [random_kind(rng), random_kind(rng)]
    last = float("inf")
    for budget in range(0, 80):
        found = cheapest_choice(layers, [Room(float(budget), floor_bytes=1.0)])
        if found is not None:
            assert found.extra_seconds <= last + 1e-12
            last = found.extra_seconds
    assert last == 0.0 or not any(layer.allowed[0] for layer in layers)
