"""The integer program: one layout, its stages and their recomputation, at the least step time.

In words: pick exactly one layout c and, for each of its pipeline ranks s, exactly one column (a
stage s of c that holds chain positions i..j-1 at its cheapest fitting recomputation), such that
each stage begins where the one before ended.

Sets and data::

    c in C            layouts left after the bounds of `search`
    q in Q[c, s]      columns: first i_q, end j_q, forward f_q, backward b_q, transfer l_q, tail g_q
    r in R[c]         paths of `pipeline.critical_paths`, coefficients F, B, L for each stage

Variables::

    y[c]  binary      layout c is chosen
    z[q]  binary      column q is chosen
    T[c]  >= 0        seconds of the pipeline of c;  G[c] >= 0  seconds behind it

Program::

    minimise  sum_c T[c] + G[c]                  (layouts without a choice: their constant * y[c])
    s.t.      sum_c y[c] = 1                                           one layout
              sum_{q in Q[c,s]} z[q] = y[c]                            every stage once
              sum_{q in Q[c,s], j_q = k} z[q] = sum_{q in Q[c,s+1], i_q = k} z[q]    no gap
              T[c] >= sum_s F[r,s] f[c,s] + B[r,s] b[c,s] + L[r,s] l[c,s]   for every path r
              G[c] >= sum_{q in Q[c,s]} g_q z[q]                       slowest tail
              T[c] + G[c] >= bound[c] y[c]                             valid cut, tightens

with f[c,s] = sum_{q in Q[c,s]} f_q z[q], and so for b and l. Columns that break a stage's memory
do not exist. Paths are written over running sums of f, b and l, which keeps the rows short.
Solved by HiGHS through OR-tools MathOpt; times are scaled to the incumbent so that
the solver's tolerances are relative ones.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from paraplan.partition import Column
from paraplan.pipeline import Path, critical_paths

if TYPE_CHECKING:
    from ortools.math_opt.python import mathopt

SOLVER = "HiGHS (OR-tools MathOpt)"
RELATIVE_GAP = 1e-7


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layout handed to the program.

    Attributes:
        stages: pipeline ranks.
        micro_batches: M.
        bound_seconds: a valid lower bound on its step time.
        constant_seconds: its step time if it leaves no choice, else None.
        columns: its columns otherwise.
    """

    stages: int
    micro_batches: int
    bound_seconds: float
    constant_seconds: float | None
    columns: tuple[Column, ...] = ()


@dataclass(frozen=True, slots=True)
class Solution:
    """What the solver found.

    Attributes:
        candidate: index of the chosen one; None if the time limit came first.
        columns: chosen ones in the order of the ranks (empty for a constant candidate).
        bound_seconds: the solver's own bound.
        optimal: whether it proved optimality.
    """

    candidate: int | None
    columns: tuple[Column, ...]
    bound_seconds: float
    optimal: bool


def solve_mip(
    candidates: Sequence[Candidate], *, scale_seconds: float, time_limit_seconds: float
) -> Solution:
    """Solve the program of the module's docstring.

    Args:
        candidates: at least one.
        scale_seconds: about the size of the optimum.
        time_limit_seconds: HiGHS stops soon after it.
    """
    from ortools.math_opt.python import mathopt

    model = mathopt.Model()
    chosen = [model.add_binary_variable() for _ in candidates]
    model.add_linear_constraint(mathopt.fast_sum(chosen) == 1)
    objective: list[Any] = []
    picked: list[list[tuple[Column, mathopt.Variable]]] = []
    for candidate, y in zip(candidates, chosen, strict=True):
        if candidate.constant_seconds is not None:
            objective.append(candidate.constant_seconds / scale_seconds * y)
            picked.append([])
            continue
        pairs, seconds = _add_layout(model, candidate, y, scale_seconds)
        bound = candidate.bound_seconds / scale_seconds
        model.add_linear_constraint(seconds >= bound * y)
        picked.append(pairs)
        objective.append(seconds)
    model.minimize(mathopt.fast_sum(objective))
    parameters = mathopt.SolveParameters(
        time_limit=timedelta(seconds=time_limit_seconds),
        relative_gap_tolerance=RELATIVE_GAP,
    )
    with _quiet_stdout():
        result = mathopt.solve(model, mathopt.SolverType.HIGHS, params=parameters)
    optimal = result.termination.reason == mathopt.TerminationReason.OPTIMAL
    bound_seconds = result.termination.objective_bounds.dual_bound * scale_seconds
    if not result.has_primal_feasible_solution():
        return Solution(None, (), bound_seconds, False)
    values = result.variable_values()
    index = max(range(len(chosen)), key=lambda c: values[chosen[c]])
    columns = sorted(
        (column for column, z in picked[index] if values[z] > 0.5), key=lambda q: q.rank
    )
    return Solution(index, tuple(columns), bound_seconds, optimal)


def _add_layout(
    model: mathopt.Model, candidate: Candidate, y: mathopt.Variable, scale: float
) -> tuple[list[tuple[Column, mathopt.Variable]], Any]:
    """A layout's columns with their variables, and T + G."""
    from ortools.math_opt.python import mathopt

    pairs = [(column, model.add_binary_variable()) for column in candidate.columns]
    by_rank: list[list[tuple[Column, mathopt.Variable]]] = [[] for _ in range(candidate.stages)]
    for column, z in pairs:
        by_rank[column.rank].append((column, z))
    for here in by_rank:
        model.add_linear_constraint(mathopt.fast_sum(z for _, z in here) == y)
    for here, following in pairwise(by_rank):
        for cut in {q.end for q, _ in here} | {q.first for q, _ in following}:
            model.add_linear_constraint(
                mathopt.fast_sum(z for q, z in here if q.end == cut)
                == mathopt.fast_sum(z for q, z in following if q.first == cut)
            )
    running = [
        _running_sums(model, [[(_timings(q)[what] / scale, z) for q, z in r] for r in by_rank])
        for what in range(3)
    ]
    pipeline, tail = model.add_variable(lb=0.0), model.add_variable(lb=0.0)
    for path in critical_paths(candidate.stages, candidate.micro_batches):
        terms = [
            term
            for weights, sums in zip(_weights(path), running, strict=True)
            for term in _weighted(weights, sums)
        ]
        model.add_linear_constraint(pipeline - mathopt.fast_sum(terms) >= 0.0)
    for here in by_rank:
        tails = [q.cost.tail_seconds / scale * z for q, z in here]
        model.add_linear_constraint(tail - mathopt.fast_sum(tails) >= 0.0)
    return pairs, pipeline + tail


def _running_sums(
    model: mathopt.Model, by_rank: list[list[tuple[float, mathopt.Variable]]]
) -> list[mathopt.Variable]:
    """Variables for the sums over the first 1, 2, .. stages."""
    from ortools.math_opt.python import mathopt

    sums: list[mathopt.Variable] = []
    for here in by_rank:
        total = model.add_variable(lb=0.0)
        terms = [number * z for number, z in here] + sums[-1:]
        model.add_linear_constraint(total == mathopt.fast_sum(terms))
        sums.append(total)
    return sums


def _weighted(weights: Sequence[float], sums: list[mathopt.Variable]) -> list[Any]:
    """``sum_s weights[s] * value[s]`` by running sums: a path's weights have few steps."""
    steps = [w - following for w, following in zip(weights, (*weights[1:], 0.0), strict=True)]
    return [step * total for step, total in zip(steps, sums, strict=True) if step]


def _timings(column: Column) -> tuple[float, float, float]:
    return column.cost.forward_seconds, column.cost.backward_seconds, column.transfer_seconds


def _weights(path: Path) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    return path.forward, path.backward, path.transfer


@contextmanager
def _quiet_stdout() -> Iterator[None]:
    """HiGHS writes notes of its own to file descriptor 1, where ``--json`` output belongs."""
    sys.stdout.flush()
    saved, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)
