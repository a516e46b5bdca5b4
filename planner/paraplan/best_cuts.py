"""The best cuts of one 1F1B layout, found exactly by dynamic programming over its columns.

Stages are put in front of one another, last stage first. What matters about the stages s..p-1
already placed for those still to come is a label:

    work       W_s = sum_{j>=s} t_j + 2 l_j
    longest    the longest of `pipeline.critical_paths` that begins at a stage >= s, without the
               stages before s
    heads      D_k = seconds of the first k = 1, 2, 3 of them in lock step (transfers between
               them included), for the lock-step paths that begin further forward
    tail       the largest tail

All of them only grow as stages are added, and the step time only grows with each of them, so a
label that another one matches or beats in every entry can go (Pareto dominance), as can one
whose step time cannot stay below the limit with the least possible work in front of it. This
keeps a handful of labels for each place, and what remains at the front is the optimum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from paraplan.partition import Column, Cuts


class _Label(NamedTuple):
    """See the module's docstring; ``cuts`` begin at this label's first stage."""

    longest: float
    work: float
    tail: float
    heads: tuple[float, ...]
    cuts: Cuts


def best_cuts(
    columns: Sequence[Column], *, stages: int, micro_batches: int, length: int, limit_seconds: float
) -> list[Cuts]:
    """The cuts with the least step time first, then undominated others below the limit.

    Empty if none stays below it; an empty answer is a proof.

    Args:
        columns: every column that a plan below the limit can use.
        stages: at least 2.
        length: of the chain.
        limit_seconds: step time, tail included, to beat.
    """
    by_rank: list[list[Column]] = [[] for _ in range(stages)]
    for column in columns:
        by_rank[column.rank].append(column)
    before = _least_work_before(by_rank)
    lock_step = 1 + (micro_batches - 1) / stages
    places: dict[int, list[_Label]] = {length: [_Label(0.0, 0.0, 0.0, (), (length,))]}
    for rank in reversed(range(stages)):
        grown: dict[int, list[_Label]] = {}
        for column in by_rank[rank]:
            base = before[rank].get(column.first)
            if base is None:
                continue
            for label in places.get(column.end, ()):
                new = _prepend(column, label, stages, micro_batches)
                floor = max(base + new.longest, (base + new.work) * lock_step) + new.tail
                if floor < limit_seconds:
                    grown.setdefault(column.first, []).append(new)
        places = {first: _undominated(labels) for first, labels in grown.items()}
    done = places.get(0, [])
    done.sort(key=lambda n: (max(n.longest, n.work * lock_step) + n.tail, n.cuts))
    return [label.cuts for label in done]


def _least_work_before(by_rank: list[list[Column]]) -> list[dict[int, float]]:
    """For each rank, the least work (transfers included) of the stages before each place."""
    before: list[dict[int, float]] = [{0: 0.0}]
    for here in by_rank:
        least: dict[int, float] = {}
        for q in here:
            work = before[-1].get(q.first, math.inf) + q.cost.seconds + 2 * q.transfer_seconds
            if work < least.get(q.end, math.inf):
                least[q.end] = work
        before.append(least)
    return before


def _prepend(column: Column, label: _Label, p: int, m: int) -> _Label:
    """The label with one more stage in front; mirrors `pipeline.critical_paths`."""
    s = column.rank
    forward, backward = column.cost.forward_seconds, column.cost.backward_seconds
    own = forward + backward
    link = 2 * column.transfer_seconds
    round_trip = link + label.work  # R_s
    warm_up = min(m, p - s) - 1
    first_wait = max(0.0, round_trip - warm_up * forward)
    last_wait = max(0.0, round_trip - warm_up * backward)
    waits = first_wait + last_wait if m > p - s else max(first_wait, last_wait)
    longest = max(m * own + waits, own + link + label.longest)
    work = own + link + label.work
    heads = (own, *(own + link + head for head in label.heads[:3]))
    for n, head in enumerate(heads[1:], start=2):
        if m < n and n != p:
            continue
        cycles = 1 + (m - 1) / n
        longest = max(longest, cycles * head)
        if m > p - s:
            later = p - s - n
            longest = max(longest, (cycles - later / n) * head + 2 * (work - head))
    return _Label(
        longest=longest,
        work=work,
        tail=max(label.tail, column.cost.tail_seconds),
        heads=heads[:4],
        cuts=(column.first, *label.cuts),
    )


def _undominated(labels: list[_Label]) -> list[_Label]:
    labels.sort()
    kept: list[_Label] = []
    for label in labels:
        if not any(_matches(other, label) for other in kept):
            kept.append(label)
    return kept


def _matches(one: _Label, other: _Label) -> bool:
    """Whether ``one`` is no worse than ``other`` in every entry (``longest`` is sorted)."""
    return (
        one.work <= other.work
        and one.tail <= other.tail
        and all(a <= b for a, b in zip(one.heads[:3], other.heads[:3], strict=True))
    )
