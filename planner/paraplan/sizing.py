"""The sizing question: which cluster, within a deadline and a budget; and what can be had at all.

Everything here looks rows of a sweep over; nothing is planned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from paraplan.what_if_file import Answer, Choice, Limits, WhatIfPoint

Limit = Literal["deadline", "budget", "min_headroom"]


@dataclass(frozen=True, slots=True)
class _Run:
    """A point that trains to the end, for a known price."""

    id: int
    days: float
    dollars: float


Rank = Callable[[_Run], tuple[float, float, int]]


def _cheapest(run: _Run) -> tuple[float, float, int]:
    return run.dollars, run.days, run.id


def _fastest(run: _Run) -> tuple[float, float, int]:
    return run.days, run.dollars, run.id


def _runs(rows: Sequence[WhatIfPoint]) -> list[_Run]:
    return [
        _Run(row.id, row.training_days, row.training_dollars)
        for row in rows
        if row.training_days is not None and row.training_dollars is not None
    ]


def pareto_front(rows: Sequence[WhatIfPoint]) -> tuple[int, ...]:
    """Ids of the points that no other beats in both time and money, fastest first.

    Points of different models or sequence lengths do different work and are not compared.
    """
    work: dict[tuple[str, int], list[WhatIfPoint]] = {}
    for row in rows:
        work.setdefault((row.model, row.seq_len), []).append(row)
    front: list[int] = []
    for same in work.values():
        least = float("inf")
        for run in sorted(_runs(same), key=_fastest):
            if run.dollars < least:
                front.append(run.id)
                least = run.dollars
    return tuple(front)


def answer(
    rows: Sequence[WhatIfPoint], limits: Limits, roomy: Sequence[WhatIfPoint] | None = None
) -> Answer:
    """The cheapest and the fastest point that meet the limits, and which limits bind.

    Args:
        rows: planned with the headroom, if there is one.
        roomy: then the same points planned without it.
    """
    runs, free = _runs(rows), None if roomy is None else _runs(roomy)
    cheapest = _choice(runs, limits, _cheapest, free)
    if cheapest is None:
        nearest = min(runs, key=lambda run: (_excess(run, limits), run.id), default=None)
        return Answer(nearest=nearest.id if nearest else None)
    return Answer(cheapest=cheapest, fastest=_choice(runs, limits, _fastest, free))


def _choice(
    runs: Sequence[_Run], limits: Limits, rank: Rank, free: Sequence[_Run] | None
) -> Choice | None:
    best = _best(runs, limits, rank)
    if best is None:
        return None
    without: dict[Limit, Limits] = {
        "deadline": limits.model_copy(update={"deadline_days": None}),
        "budget": limits.model_copy(update={"budget_dollars": None}),
    }
    binding: tuple[Limit, ...] = tuple(
        name for name, fewer in without.items() if _best(runs, fewer, rank) != best
    )
    if free is not None and _best(free, limits, rank) != best:
        binding = (*binding, "min_headroom")
    return Choice(point=best.id, binding=binding)


def _best(runs: Sequence[_Run], limits: Limits, rank: Rank) -> _Run | None:
    return min((run for run in runs if _excess(run, limits) <= 1), key=rank, default=None)


def _excess(run: _Run, limits: Limits) -> float:
    """The largest of days / deadline and dollars / budget; at most 1 where both are met."""
    days = run.days / limits.deadline_days if limits.deadline_days else 0.0
    dollars = run.dollars / limits.budget_dollars if limits.budget_dollars else 0.0
    return max(days, dollars)
