"""Cutting one layout's chain into stages: bounds, a first solution, and the columns that matter.

A column is one stage of one 1F1B layout: pipeline rank s holds chain positions first..end-1 at
the cheapest recomputation that fits. The integer program in `solver` picks columns; here those
are made that could be part of a plan faster than one already known, and nothing else is dropped.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from paraplan.chain import ChainCost, Runs
from paraplan.layout_rules import interleaved_chunks
from paraplan.pipeline import (
    balanced_seconds,
    interleaved_seconds,
    least_seconds,
    one_f_one_b_seconds,
)
from paraplan.stage_cost import StageCost, stage_cost

BOTTLENECK_TOLERANCE = 1e-4  # a looser bound is still a bound; best_cuts decides exactly

Cuts = tuple[int, ...]
"""Where each stage begins, and the chain's length at the end."""


@dataclass(frozen=True, slots=True)
class Staged:
    """A layout with its stages chosen.

    Attributes:
        cuts: one entry more than (virtual) stages.
        stages: by pipeline rank.
        transfers: one-way seconds behind each rank's stage.
        step_seconds: predicted time of a step.
    """

    cuts: Cuts
    stages: tuple[StageCost, ...]
    transfers: tuple[float, ...]
    step_seconds: float


@dataclass(frozen=True, slots=True)
class Column:
    """A stage that the integer program may pick; ``transfer_seconds`` is behind it, one way."""

    rank: int
    first: int
    end: int
    cost: StageCost
    transfer_seconds: float


def staged(chain: ChainCost, cuts: Cuts, *, forced: bool = False) -> Staged | None:
    """Cost of a layout under given cuts; None if a stage does not fit (unless ``forced``)."""
    layout = chain.layout
    p, v = layout.pipeline, layout.virtual_stages
    stages = []
    for rank in range(p):
        runs: Runs = tuple((cuts[c * p + rank], cuts[c * p + rank + 1]) for c in range(v))
        cost = stage_cost(chain, rank, runs, forced=forced)
        if cost is None:
            return None
        stages.append(cost)
    transfers = [chain.transfer_seconds(stage % p, cuts[stage + 1]) for stage in range(p * v - 1)]
    tail = max(stage.tail_seconds for stage in stages)
    if v > 1:
        slowest = max(transfers)
        work = interleaved_seconds(
            [s.seconds for s in stages],
            slowest,
            layout.micro_batches,
            v,
            contention=chain.transfer_contention,
        )
        shown = (slowest,) * (p - 1) + (0.0,)
    else:
        shown = (*transfers, 0.0)
        work = one_f_one_b_seconds(
            [s.forward_seconds for s in stages],
            [s.backward_seconds for s in stages],
            shown,
            layout.micro_batches,
        )
    return Staged(tuple(cuts), tuple(stages), shown, work + tail)


def fixed_cuts(chain: ChainCost) -> Cuts | None:
    """The cuts of a layout that leaves no choice: one stage, or equal interleaved chunks."""
    layout = chain.layout
    length = len(chain.shape.kind_at)
    if layout.pipeline == 1:
        return (0, length)
    if layout.virtual_stages == 1:
        return None
    begins = interleaved_chunks(chain.graph, layout.pipeline * layout.virtual_stages)
    assert begins is not None, "enumerate_families and check_layout leave no others"
    return (*begins, length)


def tail_bound(chain: ChainCost) -> float:
    """No plan of this layout spends less after the last backward: the mean over its stages."""
    counts = [before[-1] for before in chain.shape.counts_before]
    total = sum(
        n * (cost.optimizer + cost.per_step) for n, cost in zip(counts, chain.costs, strict=True)
    )
    return total / chain.layout.pipeline


def time_bound(chain: ChainCost) -> float:
    """A lower bound on the step time of a layout, whatever its memory."""
    layout = chain.layout
    work = chain.plain_seconds[-1]
    largest = max(cost.forward + cost.backward["none"] for cost in chain.costs)
    return tail_bound(chain) + least_seconds(
        work,
        layout.pipeline,
        layout.micro_batches,
        layout.virtual_stages,
        max(largest, _balanced(chain)),
    )


def _balanced(chain: ChainCost) -> float:
    """No bottleneck is shorter: work spread evenly, and on two kinds each block where it suits."""
    counts = [before[-1] for before in chain.shape.counts_before]
    kinds = chain.parts or (chain,)
    each = [[cost.forward + cost.backward["none"] for cost in kind.costs] for kind in kinds]
    ends = [*(kind.first_stage for kind in kinds[1:]), chain.layout.pipeline]
    stages = [end - kind.first_stage for kind, end in zip(kinds, ends, strict=True)]
    return balanced_seconds(counts, each, stages)


def feasible(chain: ChainCost) -> bool:
    """Whether any cuts of a 1F1B layout fit in memory."""
    return _reach(chain, math.inf) is not None


def smallest_bottleneck(
    chain: ChainCost, *, hopeless_seconds: float = math.inf
) -> tuple[float, Cuts] | None:
    """A lower bound on the slowest stage's time, and cuts close to it; None if nothing fits.

    The bound is as tight as bisection makes it, or ``hopeless_seconds`` if it exceeds that.

    Bisection over `StageCost.core_seconds`; for each value every stage reaches as far as it can.
    That time and a stage's memory never shrink when it holds more layers, so reaching far is
    never a mistake, and the bound and the verdict are exact. (They may with the head, so for the
    last stage nothing less than all that is left is tried.)
    """
    high_cuts = _reach(chain, math.inf)
    if high_cuts is None:
        return None
    low = _balanced(chain)
    best = high_cuts
    high = _bottleneck(chain, best)
    if hopeless_seconds < high and _reach(chain, hopeless_seconds) is None:
        return hopeless_seconds, best
    while high - low > BOTTLENECK_TOLERANCE * high:
        middle = (low + high) / 2
        cuts = _reach(chain, middle)
        if cuts is None:
            low = middle
        else:
            best, high = cuts, _bottleneck(chain, cuts)
    return low, best


def _bottleneck(chain: ChainCost, cuts: Cuts) -> float:
    stages = [stage_cost(chain, s, ((cuts[s], cuts[s + 1]),)) for s in range(len(cuts) - 1)]
    return max(stage.core_seconds for stage in stages if stage)


def _reach(chain: ChainCost, bottleneck: float) -> Cuts | None:
    """Cuts with every stage within ``bottleneck`` seconds and its memory, or None."""
    p, places = chain.layout.pipeline, chain.shape.places
    at = [0]
    for rank in range(p):
        most = len(places) - 1 - (p - rank - 1)  # leave a place for each later rank
        end = _furthest(chain, rank, at[-1], most, bottleneck)
        if end is None:
            return None
        at.append(end)
    return tuple(places[i] for i in at) if at[-1] == len(places) - 1 else None


def _furthest(chain: ChainCost, rank: int, first: int, most: int, bottleneck: float) -> int | None:
    """The last place that a stage from place ``first`` on reaches (indices into the places)."""
    places = chain.shape.places
    low = first if rank < chain.layout.pipeline - 1 else max(first, most - 1)
    high = most
    while low < high:
        middle = (low + high + 1) // 2
        cost = stage_cost(chain, rank, ((places[first], places[middle]),))
        if cost is not None and cost.core_seconds <= bottleneck:
            low = middle
        else:
            high = middle - 1
    return low if low > first else None


def improve(chain: ChainCost, start: Cuts) -> Staged | None:
    """Move single cuts while that makes the step faster."""
    best = staged(chain, start)
    places = chain.shape.places
    improved = best is not None
    while improved and best is not None:
        improved = False
        for cut in range(1, len(best.cuts) - 1):
            for step in (-1, 1):
                moved = [*best.cuts]
                moved[cut] = places[places.index(moved[cut]) + step]
                if not moved[cut - 1] < moved[cut] < moved[cut + 1]:
                    continue
                found = staged(chain, tuple(moved))
                if found and found.step_seconds < best.step_seconds * (1 - 1e-12):
                    best, improved = found, True
    return best


def columns_of(chain: ChainCost, plan: Staged) -> list[Column]:
    """The columns of a 1F1B layout's known plan."""
    return [
        Column(rank, first, end, cost, transfer)
        for rank, ((first, end), cost, transfer) in enumerate(
            zip(pairwise(plan.cuts), plan.stages, plan.transfers, strict=True)
        )
    ]


def columns(chain: ChainCost, limit_seconds: float) -> list[Column]:
    """Every stage that can be part of a plan of this layout faster than ``limit_seconds``."""
    p, m = chain.layout.pipeline, chain.layout.micro_batches
    length = len(chain.shape.kind_at)
    plain = chain.plain_seconds
    budget = limit_seconds - tail_bound(chain)
    longest = budget / m  # M t_s alone must stay below the limit
    found: list[list[Column]] = []
    reachable = [0]
    for rank in range(p):
        # Later ranks, too, must finish within `longest` each.
        least_end = bisect_left(plain, plain[length] - (p - rank - 1) * longest)
        here = [
            column
            for first in reachable
            for column in _columns_from(chain, rank, first, least_end, longest)
        ]
        found.append(here)
        reachable = sorted({column.end for column in here if column.end < length})
    return _within(found, p, m, length, budget)


def _columns_from(
    chain: ChainCost, rank: int, first: int, least_end: int, longest: float
) -> Iterator[Column]:
    plain, places = chain.plain_seconds, chain.shape.places
    p, length = chain.layout.pipeline, len(plain) - 1
    last_rank = rank == p - 1
    least_end = length if last_rank else max(first + 1, least_end)
    most = len(places) - (p - rank - 1)  # leave a place for each later rank
    for end in places[bisect_left(places, least_end) : most]:
        if plain[end] - plain[first] > longest:
            return
        cost = stage_cost(chain, rank, ((first, end),))
        if cost is None:
            return  # longer stages need no less memory
        if cost.seconds <= longest:
            behind = 0.0 if last_rank else chain.transfer_seconds(rank, end)
            yield Column(rank, first, end, cost, behind)


def _within(found: list[list[Column]], p: int, m: int, length: int, budget: float) -> list[Column]:
    """Drop columns whose cheapest completion exceeds the lock-step path's budget."""
    factor = 1 + (m - 1) / p
    before: list[dict[int, float]] = [{0: 0.0}]
    for here in found:
        best: dict[int, float] = {}
        for column in here:
            base = before[-1].get(column.first)
            if base is not None:
                total = base + column.cost.seconds + 2 * column.transfer_seconds
                best[column.end] = min(total, best.get(column.end, math.inf))
        before.append(best)
    after: dict[int, float] = {length: 0.0}
    kept: list[Column] = []
    for rank in reversed(range(p)):
        best = {}
        for column in found[rank]:
            rest, base = after.get(column.end), before[rank].get(column.first)
            if rest is None or base is None:
                continue
            own = column.cost.seconds + 2 * column.transfer_seconds
            best[column.first] = min(own + rest, best.get(column.first, math.inf))
            if (base + own + rest) * factor <= budget:
                kept.append(column)
        after = best
    return kept
