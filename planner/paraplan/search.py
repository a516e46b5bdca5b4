"""Over all layouts: discards by valid bounds, hands the rest to the integer program.

Best first: families of layouts wait in a queue ordered by a lower bound on their step time. The
first one is taken out and refined: a family into its layouts, a layout into its best stages (or,
for 1F1B with several stages, into a tighter bound and a good first solution). When the next bound
is no better than the plans already in hand, everything still waiting is discarded at once; what
remains undecided goes to `solver.solve_mip`, which picks the optimum and proves it.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from paraplan.best_cuts import best_cuts
from paraplan.chain import ChainCost
from paraplan.fitting import any_fits, needed_capacity_bytes
from paraplan.layout import Layout
from paraplan.layouts import Family, enumerate_families
from paraplan.partition import (
    Staged,
    columns,
    columns_of,
    fixed_cuts,
    improve,
    smallest_bottleneck,
    staged,
    tail_bound,
    time_bound,
)
from paraplan.pipeline import balanced_seconds, least_seconds
from paraplan.problem import (
    Problem,
    arrangements,
    block_seconds,
    chain_cost,
    stages_of_kinds,
)
from paraplan.solver import SOLVER, Candidate, Solution, solve_mip

SAME = 1 + 1e-9  # relative slack under which two step times count as equal
NEAR = 1.005  # layouts whose best stages come this close to the best enter the program
MOST_NEAR = 4  # plans of a layout whose columns it may combine


@dataclass(frozen=True)
class Found:
    """A layout with its best stages."""

    layout: Layout
    chain: ChainCost
    staged: Staged


@dataclass(frozen=True)
class SearchResult:
    """The best plan, the next best layouts, and what is known about optimality."""

    best: Found
    runner_ups: tuple[Found, ...]
    optimal: bool
    bound_seconds: float
    considered: int
    bounded: int
    infeasible: int
    solved: int
    excluded: Counter[str]
    seconds: float
    solver: str = SOLVER


def _family_bound(problem: Problem, family: Family) -> float:
    """A lower bound on the step time of every member: its computation alone."""
    layout = family.base
    each = [block_seconds(kind, layout) for kind in problem.parts or (problem,)]
    stages = stages_of_kinds(problem, layout)
    counts = [before[-1] for before in problem.shape.counts_before]
    least = [min(times) for times in zip(*each, strict=True)]
    return least_seconds(
        sum(n * t for n, t in zip(counts, least, strict=True)),
        layout.pipeline,
        layout.micro_batches,
        layout.virtual_stages,
        max(*least, balanced_seconds(counts, each, stages)),
    )


@dataclass
class _Progress:
    """What the search knows so far."""

    wanted: int
    upper: list[float] = field(default_factory=list)  # best step times, ascending
    open: list[tuple[float, ChainCost, Staged]] = field(default_factory=list)
    closed: list[Found] = field(default_factory=list)
    infeasible: int = 0

    @property
    def threshold(self) -> float:
        """Bounds at or above this are hopeless for the best and all wanted runner-ups."""
        return self.upper[self.wanted] if len(self.upper) > self.wanted else float("inf")

    def record(self, seconds: float) -> None:
        """Note a feasible plan of another layout."""
        self.upper = sorted([*self.upper, seconds])[: self.wanted + 1]


def search(
    problem: Problem,
    *,
    runner_ups: int = 3,
    time_limit_seconds: float = 60.0,
    report: Callable[[str], None] = lambda _: None,
) -> SearchResult | None:
    """The fastest plan and its proof; None when nothing fits.

    On two kinds of devices over either kind alone and both in either order; the cluster of the
    best one's chain says which it was.

    Args:
        runner_ups: how many of the next best layouts to find as well.
        time_limit_seconds: for the integer program.
        report: called with one line per phase.
    """
    began = time.perf_counter()
    excluded: Counter[str] = Counter()
    families: list[tuple[Problem, Family]] = []
    for arranged in arrangements(problem):
        possible, impossible = enumerate_families(arranged.space, arranged.constraints)
        families += [(arranged, family) for family in possible]
        excluded += impossible
    considered = sum(len(family.splits) for _, family in families)
    report(f"{considered} layouts in {len(families)} families")
    progress = _Progress(runner_ups)
    _explore(families, progress)
    if not progress.upper:
        return None
    report(
        f"{len(progress.open) + len(progress.closed)} costed in full, {progress.infeasible} do not "
        f"fit, the rest excluded by a bound; best so far {progress.upper[0]:.4g} s"
    )
    best, others, bound, optimal, solved = _decide(progress, time_limit_seconds)
    return SearchResult(
        best=best,
        runner_ups=tuple(others),
        optimal=optimal,
        bound_seconds=bound,
        considered=considered,
        bounded=considered - progress.infeasible - solved,
        infeasible=progress.infeasible,
        solved=solved,
        excluded=excluded,
        seconds=time.perf_counter() - began,
    )


def _explore(families: Sequence[tuple[Problem, Family]], progress: _Progress) -> None:
    queue: list[tuple[float, int, tuple[Problem, Family] | ChainCost]] = [
        (_family_bound(*family), i, family) for i, family in enumerate(families)
    ]
    heapq.heapify(queue)
    serial = len(queue)
    while queue:
        bound, _, item = heapq.heappop(queue)
        if bound >= progress.threshold:
            return
        if isinstance(item, ChainCost):
            _examine(item, bound, progress)
            continue
        problem, family = item
        if not any_fits(problem, family):
            progress.infeasible += len(family.splits)
        else:
            for split in family.splits:
                chain = chain_cost(problem, family.layout(split))
                serial += 1
                heapq.heappush(queue, (max(bound, time_bound(chain)), serial, chain))


def _examine(chain: ChainCost, bound: float, progress: _Progress) -> None:
    cuts = fixed_cuts(chain)
    if cuts is not None:
        found = staged(chain, cuts)
        if found is None:
            progress.infeasible += 1
        else:
            progress.record(found.step_seconds)
            progress.closed.append(Found(chain.layout, chain, found))
        return
    micro_batches, tail = chain.layout.micro_batches, tail_bound(chain)
    hopeless = (progress.threshold - tail) / micro_batches * SAME
    bottleneck = smallest_bottleneck(chain, hopeless_seconds=hopeless)
    if bottleneck is None:
        progress.infeasible += 1
        return
    bound = max(bound, micro_batches * bottleneck[0] + tail)
    if bound >= progress.threshold:
        return
    first = improve(chain, bottleneck[1])
    assert first is not None, "smallest_bottleneck returned cuts that fit"
    progress.record(first.step_seconds)
    progress.open.append((bound, chain, first))


def _decide(
    progress: _Progress, time_limit_seconds: float
) -> tuple[Found, list[Found], float, bool, int]:
    """The integer program over what is undecided, then the runner-ups.

    Every undecided layout is first brought to its exact best stages (`best_cuts`). Those close to
    the best enter the program, with the columns of their best few plans and that exact optimum
    as the valid bound; layouts without a choice enter as constants.
    """
    top = progress.upper[0]
    known = [f for f in progress.closed if f.staged.step_seconds <= top * NEAR]
    candidates = [
        Candidate(f.layout.pipeline, f.layout.micro_batches, 0.0, f.staged.step_seconds)
        for f in known
    ]
    for bound, chain, first in sorted(progress.open, key=lambda entry: entry[0]):
        if bound >= top * SAME:
            break
        near = near_best_stages(chain, first, top * NEAR)
        first = near[0]
        top = min(top, first.step_seconds)
        if first.step_seconds <= top * NEAR:
            known.append(Found(chain.layout, chain, first))
            candidates.append(_candidate(chain, near))
    solution = solve_mip(candidates, scale_seconds=top, time_limit_seconds=time_limit_seconds)
    best = _chosen(known, solution)
    bound = min(solution.bound_seconds, best.staged.step_seconds)
    others = _runner_ups(progress, best)
    return best, others, bound, solution.optimal, len(candidates)


def _candidate(chain: ChainCost, near: list[Staged]) -> Candidate:
    """A 1F1B layout for the program, with the columns of its best few plans to combine."""
    layout = chain.layout
    pool = {(q.rank, q.end, q.first): q for plan in near for q in columns_of(chain, plan)}
    bound = near[0].step_seconds / SAME
    return Candidate(layout.pipeline, layout.micro_batches, bound, None, tuple(pool.values()))


def _chosen(known: list[Found], solution: Solution) -> Found:
    """What the program picked; the best known plan if its time was up before it had one."""
    if solution.candidate is None:
        return min(known, key=lambda f: f.staged.step_seconds)
    found = known[solution.candidate]
    if not solution.columns:
        return found
    solved = staged(found.chain, (0, *(q.end for q in solution.columns)))
    assert solved is not None, "columns that break memory do not exist"
    return replace(found, staged=solved)


def _runner_ups(progress: _Progress, best: Found) -> list[Found]:
    """The next best layouts found on the same devices, each with its best stages, in order."""
    others = [*progress.closed, *(Found(c.layout, c, f) for _, c, f in progress.open)]
    cluster = best.chain.cluster
    others = [f for f in others if f.layout != best.layout and f.chain.cluster is cluster]
    others.sort(key=lambda f: f.staged.step_seconds)
    nearest = [
        f if fixed_cuts(f.chain) else best_stages(f.chain, f.staged)
        for f in others[: progress.wanted]
    ]
    return sorted(nearest, key=lambda f: f.staged.step_seconds)


def near_best_stages(chain: ChainCost, first: Staged, limit_seconds: float) -> list[Staged]:
    """The best stages of one 1F1B layout, then other good ones, none slower than the limit.

    Args:
        first: stages that fit; returned alone if nothing below the limit is better.
    """
    layout = chain.layout
    limit = min(limit_seconds, first.step_seconds * NEAR)
    found = best_cuts(
        columns(chain, limit),
        stages=layout.pipeline,
        micro_batches=layout.micro_batches,
        length=len(chain.shape.kind_at),
        limit_seconds=limit,
    )
    good = [s for s in (staged(chain, cuts) for cuts in found[:MOST_NEAR]) if s]
    return good if good and good[0].step_seconds <= first.step_seconds else [first]


def best_stages(chain: ChainCost, first: Staged) -> Found:
    """The best stages of one 1F1B layout, given some that fit."""
    best = near_best_stages(chain, first, first.step_seconds * SAME)[0]
    return Found(chain.layout, chain, best)


def estimate_layout(problem: Problem, layout: Layout) -> Found:
    """One layout with its best stages and recomputation, whether it fits or not.

    A layout that does not fit is shown at the smallest capacity at which it would.
    """
    chain = chain_cost(problem, layout)
    cuts = fixed_cuts(chain)
    if cuts is not None:
        found = staged(chain, cuts) or staged(chain, cuts, forced=True)
        assert found is not None, "forced costs always exist"
        return Found(layout, chain, found)
    bottleneck = smallest_bottleneck(chain)
    if bottleneck is None:
        chain = chain.with_capacity(needed_capacity_bytes(chain))
        bottleneck = smallest_bottleneck(chain)
        assert bottleneck is not None, "the needed capacity suffices"
    first = improve(chain, bottleneck[1])
    assert first is not None, "smallest_bottleneck returned cuts that fit"
    return best_stages(chain, first)
