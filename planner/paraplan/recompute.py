"""Which layers of a stage recompute: the cheapest choice that fits, found exactly.

Layers of one kind are interchangeable, so a choice is how many of each kind run in each mode.
With the recompute modes none, selective and full (0, 1, 2), for each kind k of n_k layers::

    minimise    sum_k sum_r extra[k, r] * n[k, r]
    subject to  share_m * sum_k sum_r saved[k, r] * n[k, r] + max working[k, r] <= budget_m
                for each moment m of the step (the maximum over the modes in use)
                sum_r n[k, r] = n_k

The maximum is handled by trying each of its few possible values as a threshold that forbids the
modes above it. For a fixed threshold one kind is solved by running through its number of fully
recomputed layers, which fixes the least number of selective ones; further kinds enter through
the Pareto front of what they save and cost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Counts = tuple[int, int, int]
"""Layers in mode none, selective, full."""

_NONE, _SELECTIVE, _FULL = 0, 1, 2


@dataclass(frozen=True, slots=True)
class LayerKind:
    """The layers of one kind in a stage; tuples are by mode.

    Attributes:
        count: number of layers.
        saved: bytes kept for the backward pass, all micro-batches in flight.
        extra: backward seconds beyond those of mode none.
        working: bytes alive beside the saved ones while one such layer is computed.
        allowed: modes that may be used.
    """

    count: int
    saved: tuple[float, float, float]
    extra: tuple[float, float, float]
    working: tuple[float, float, float]
    allowed: tuple[bool, bool, bool] = (True, True, True)


@dataclass(frozen=True, slots=True)
class Room:
    """What one moment of a step leaves for the layers.

    Attributes:
        budget_bytes: for saved activations and work together.
        share: of the saved activations that are alive.
        floor_bytes: work that is done then whatever the layers do; one thing at a time.
        beside_layer_bytes: beside a layer at work; None if none works then.
    """

    budget_bytes: float
    share: float = 1.0
    floor_bytes: float = 0.0
    beside_layer_bytes: float | None = 0.0

    def lacks(self, saved_bytes: float, working_bytes: float) -> float:
        """Bytes over the budget; below zero where some are left."""
        work = self.floor_bytes
        if self.beside_layer_bytes is not None:
            work = max(work, working_bytes + self.beside_layer_bytes)
        return self.share * saved_bytes + work - self.budget_bytes

    def most_saved(self, working_bytes: float) -> float:
        """Saved bytes that fit beside layers that need ``working_bytes``."""
        left = -self.lacks(0.0, working_bytes)
        if self.share == 0.0:
            return math.inf if left >= 0 else -math.inf
        return left / self.share


@dataclass(frozen=True, slots=True)
class Choice:
    """A choice of modes; ``counts`` in the order of the kinds.

    Attributes:
        extra_seconds: of recomputation, one micro-batch.
        saved_bytes: kept by all layers.
        working_bytes: the most that one layer needs in a mode in use.
    """

    counts: tuple[Counts, ...]
    extra_seconds: float
    saved_bytes: float
    working_bytes: float


def lacking(choice: Choice, rooms: Sequence[Room]) -> float:
    """Bytes by which a choice misses the tightest room; below zero where it fits."""
    return max(room.lacks(choice.saved_bytes, choice.working_bytes) for room in rooms)


def cheapest_choice(kinds: Sequence[LayerKind], rooms: Sequence[Room]) -> Choice | None:
    """The choice with the least extra time that fits at every moment, or None."""
    if all(kind.allowed[_NONE] for kind in kinds):
        untouched = choice_of(kinds, tuple((kind.count, 0, 0) for kind in kinds))
        if lacking(untouched, rooms) <= 0:
            return untouched
    if lacking(least_memory_choice(kinds, rooms), rooms) > 0:
        return None
    best: Choice | None = None
    for threshold in _thresholds(kinds):
        if best is not None and best.extra_seconds == 0:
            break
        room = min(room.most_saved(threshold) for room in rooms)
        found = _cheapest_below(kinds, room, threshold)
        if found and (best is None or found[0] < best.extra_seconds):
            best = choice_of(kinds, found[1])
    return best


def least_memory_choice(kinds: Sequence[LayerKind], rooms: Sequence[Room]) -> Choice:
    """The choice that needs the least memory, fit or not."""
    best: Choice | None = None
    for threshold in _thresholds(kinds):
        counts = []
        for kind in kinds:
            modes = [r for r in range(3) if kind.allowed[r] and kind.working[r] <= threshold]
            if not modes:
                break
            mode = min(modes, key=lambda r: (kind.saved[r], r))
            counts.append(_uniform(kind.count, mode))
        else:
            choice = choice_of(kinds, tuple(counts))
            if best is None or lacking(choice, rooms) < lacking(best, rooms):
                best = choice
    assert best is not None, "the largest threshold allows every mode"
    return best


def choice_of(kinds: Sequence[LayerKind], counts: tuple[Counts, ...]) -> Choice:
    """Time and memory of given counts."""
    pairs = list(zip(kinds, counts, strict=True))
    working = [k.working[r] for k, n in pairs for r in range(3) if n[r]]
    return Choice(
        counts=counts,
        extra_seconds=math.fsum(k.extra[r] * n[r] for k, n in pairs for r in range(3)),
        saved_bytes=math.fsum(k.saved[r] * n[r] for k, n in pairs for r in range(3)),
        working_bytes=max(working, default=0.0),
    )


def _thresholds(kinds: Sequence[LayerKind]) -> list[float]:
    """Values that the largest working memory may have."""
    return sorted({0.0} | {k.working[r] for k in kinds for r in range(3) if k.allowed[r]})


def _uniform(count: int, mode: int) -> Counts:
    return (
        count if mode == _NONE else 0,
        count if mode == _SELECTIVE else 0,
        count if mode == _FULL else 0,
    )


def _cheapest_below(
    kinds: Sequence[LayerKind], budget: float, threshold: float
) -> tuple[float, tuple[Counts, ...]] | None:
    if not kinds:
        return (0.0, ()) if budget >= 0 else None
    order = sorted(range(len(kinds)), key=lambda i: kinds[i].count)
    front: list[tuple[float, float, tuple[Counts, ...]]] = [(0.0, 0.0, ())]
    for i in order[:-1]:
        front = _pareto(
            (saved + more_saved, extra + more_extra, (*chosen, counts))
            for saved, extra, chosen in front
            for more_saved, more_extra, counts in _all_counts(kinds[i], threshold)
        )
    best: tuple[float, tuple[Counts, ...]] | None = None
    for saved, extra, chosen in front:
        if best is not None and extra >= best[0]:
            continue
        last = _one_kind(kinds[order[-1]], budget - saved, threshold)
        if last and (best is None or extra + last[0] < best[0]):
            in_order = dict(zip(order, (*chosen, last[1]), strict=True))
            best = (extra + last[0], tuple(in_order[i] for i in range(len(kinds))))
    return best


def _one_kind(kind: LayerKind, budget: float, threshold: float) -> tuple[float, Counts] | None:
    """The cheapest counts of one kind whose saved bytes stay within ``budget``."""
    allowed = [kind.allowed[r] and kind.working[r] <= threshold for r in range(3)]
    best: tuple[float, Counts] | None = None
    for full in range(kind.count + 1 if allowed[_FULL] else 1):
        rest = kind.count - full
        selective = _least_selective(kind, budget - full * kind.saved[_FULL], rest, allowed)
        if selective is None:
            continue
        extra = full * kind.extra[_FULL] + selective * kind.extra[_SELECTIVE]
        if best is None or extra < best[0]:
            best = (extra, (rest - selective, selective, full))
        if selective == 0 or not allowed[_NONE]:
            break  # more full layers only cost more
    return best


def _least_selective(kind: LayerKind, budget: float, count: int, allowed: list[bool]) -> int | None:
    """Fewest selective layers among ``count`` so that the others can run without recompute."""
    none, selective = kind.saved[_NONE], kind.saved[_SELECTIVE]
    if count == 0:
        return 0 if budget >= 0 else None
    if not allowed[_NONE]:
        return count if allowed[_SELECTIVE] and count * selective <= budget else None
    if count * none <= budget:
        return 0
    if not allowed[_SELECTIVE] or count * selective > budget:
        return None
    needed = min(count, max(0, math.ceil((count * none - budget) / (none - selective))))
    while (count - needed) * none + needed * selective > budget:
        needed += 1  # the division rounded; at needed == count it fits, as tested above
    return needed


def _all_counts(
    kind: LayerKind, threshold: float
) -> list[tuple[float, float, tuple[int, int, int]]]:
    """Saved bytes and extra seconds of every way to run the layers of one kind."""
    allowed = [kind.allowed[r] and kind.working[r] <= threshold for r in range(3)]
    ways = []
    for full in range(kind.count + 1 if allowed[_FULL] else 1):
        for selective in range(kind.count - full + 1 if allowed[_SELECTIVE] else 1):
            none = kind.count - full - selective
            if none and not allowed[_NONE]:
                continue
            counts = (none, selective, full)
            saved = sum(n * s for n, s in zip(counts, kind.saved, strict=True))
            extra = sum(n * e for n, e in zip(counts, kind.extra, strict=True))
            ways.append((saved, extra, counts))
    return ways


def _pareto(
    ways: Iterable[tuple[float, float, tuple[Counts, ...]]],
) -> list[tuple[float, float, tuple[Counts, ...]]]:
    """The ways that no other beats in both saved bytes and extra seconds."""
    kept: list[tuple[float, float, tuple[Counts, ...]]] = []
    for way in sorted(ways):
        if not kept or way[1] < kept[-1][1]:
            kept.append(way)
    return kept
