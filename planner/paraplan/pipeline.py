"""The time of one step of a pipeline, in closed form.

1F1B. The step ends when the longest path through its forwards, backwards and transfers does.
For stages s = 0..p-1 with forward f_s, backward b_s, t_s = f_s + b_s, one-way transfer l_s behind
stage s, and M micro-batches, `critical_paths` lists the paths that can be longest:

  stage s is the bottleneck: work before it, M times its own, and up to two waits for the first
  micro-batch (before stage s has more forwards to do) or for the last one to come back::

      sum_{j<s} (t_j + 2 l_j) + M t_s + a (R_s - w_s f_s) + b (R_s - w_s b_s),   a, b in {0, 1}
      R_s = sum_{j>s} t_j + 2 sum_{j>=s} l_j,  w_s = min(M, p - s) - 1
      (a = b = 1 only if M > p - s: with fewer micro-batches both waits are the same one)

  stages i..j exchange micro-batches in lock step: a cycle through n = j - i + 1 of them moves n
  micro-batches on, so transfers are exposed although they are asynchronous::

      sum_{k<i} (t_k + 2 l_k) + C (1 + (M - 1) / n) + {0, 2 R_j - (p - j - 1) C / n}
      C = sum_{k=i..j} t_k + 2 sum_{i<=k<j} l_k          (n in {2, 3, 4, p})

Every path is linear in f, b and l, so the integer program takes them as rows. Against an event by
event replay of the schedule, over random stages (spread up to 30 %), transfers (up to 10 % of a
stage) and M from 1 to 64, the mean error is below 0.2 % for M >= 4, and it is exact for equal
stages without transfers (``pytest tests/test_pipeline.py``).

Interleaved 1F1B of v virtual stages per rank with equal chunks (Narayanan et al. 2021,
section 2.2; exact for equal ranks)::

      sum_s t_s / v + (M - 1 / v) max_s t_s + 2 (p v - 1) l + 2 M v e

The last term is what each of the 2 M v transfers of a rank costs although its neighbours keep
busy: e = max(0, l - c) + contention * min(l, c), c being the mean time of a rank's pass over one
chunk (a transfer hides behind one, and slows it down a little).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise

from paraplan.layout import Layout


@dataclass(frozen=True, slots=True)
class Path:
    """Coefficients of one path, one entry per stage (``transfer``: behind each stage)."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    transfer: tuple[float, ...]

    def seconds(
        self, forward: Sequence[float], backward: Sequence[float], transfer: Sequence[float]
    ) -> float:
        """Length of the path."""
        total = 0.0
        for coefficients, values in (
            (self.forward, forward),
            (self.backward, backward),
            (self.transfer, transfer),
        ):
            for coefficient, value in zip(coefficients, values, strict=True):
                total += coefficient * value
        return total


@cache
def critical_paths(stages: int, micro_batches: int) -> tuple[Path, ...]:
    """The paths of the module's docstring; ``transfer[-1]`` is always 0."""
    return (
        *_bottleneck_paths(stages, micro_batches),
        *_lock_step_paths(stages, micro_batches),
    )


@cache
def _stepped_paths(stages: int, micro_batches: int) -> tuple[tuple[tuple[int, float], ...], ...]:
    """The same paths over running sums of f, b and l (one after the other).

    A path's coefficients change at a few stages only, so that
    ``sum_s c_s x_s = sum_s (c_s - c_{s+1}) X_s`` with ``X_s = x_0 + .. + x_s`` has few terms.
    """
    stepped = []
    for path in critical_paths(stages, micro_batches):
        terms = []
        for block, weights in enumerate((path.forward, path.backward, path.transfer)):
            for s, (weight, following) in enumerate(pairwise((*weights, 0.0))):
                if weight != following:
                    terms.append((block * stages + s, weight - following))
        stepped.append(tuple(terms))
    return tuple(stepped)


def _bottleneck_paths(p: int, m: int) -> Iterator[Path]:
    for s in range(p):
        warm_up = min(m, p - s) - 1
        later = p - s - 1
        for first_wait, last_wait in ((0, 0), (1, 0), (0, 1), (1, 1)):
            waits = first_wait + last_wait
            if waits == 2 and m <= p - s:
                continue
            yield Path(
                forward=(1.0,) * s + (m - first_wait * warm_up,) + (float(waits),) * later,
                backward=(1.0,) * s + (m - last_wait * warm_up,) + (float(waits),) * later,
                transfer=(2.0,) * s + (2.0 * waits,) * later + (0.0,),
            )


def _lock_step_paths(p: int, m: int) -> Iterator[Path]:
    for n in sorted({2, 3, 4, p}):
        if not 2 <= n <= p or (m < n and n != p):
            continue
        for i in range(p - n + 1):
            later = p - i - n
            for waits in (0, 2):
                if waits and m <= p - i:
                    continue
                cycles = 1 + (m - 1) / n - (later / n if waits else 0)
                work = (1.0,) * i + (cycles,) * n + (float(waits),) * later
                transfer = (2.0,) * i + (2 * cycles,) * (n - 1) + (2.0 * waits,) * later + (0.0,)
                yield Path(forward=work, backward=work, transfer=transfer)


def one_f_one_b_seconds(
    forward: Sequence[float],
    backward: Sequence[float],
    transfer: Sequence[float],
    micro_batches: int,
) -> float:
    """Step time of 1F1B; the longest of `critical_paths`.

    Args:
        forward, backward: seconds of one micro-batch on each stage.
        transfer: one-way seconds behind each stage; the last entry is 0.
    """
    stages = len(forward)
    if stages == 1:
        return micro_batches * (forward[0] + backward[0])
    running = [*accumulate(forward), *accumulate(backward), *accumulate(transfer)]
    return max(
        sum([weight * running[i] for i, weight in steps])
        for steps in _stepped_paths(stages, micro_batches)
    )


def interleaved_seconds(
    seconds: Sequence[float],
    transfer: float,
    micro_batches: int,
    virtual_stages: int,
    *,
    contention: float,
) -> float:
    """Step time of interleaved 1F1B.

    Args:
        seconds: forward and backward of one micro-batch through all chunks of each rank.
        transfer: one-way seconds of the slowest boundary.
        contention: share of a hidden transfer that slows the computation it hides behind.
    """
    p, v = len(seconds), virtual_stages
    compute = sum(seconds) / v + (micro_batches - 1 / v) * max(seconds)
    chunk = max(seconds) / (2 * v)
    exposed = max(0.0, transfer - chunk) + contention * min(transfer, chunk)
    return compute + 2 * (p * v - 1) * transfer + 2 * micro_batches * v * exposed


def pass_share(layout: Layout, ranks_per_core: float, unshared_speedup: float) -> float:
    """What a pass takes, in the mean over a step, of one while all ranks compute; at most 1.

    Where processes share cores (more ranks than cores; CPUs only), those that compute run faster
    while others wait. With k of p stages busy a pass takes t(k): ``1 / unshared_speedup`` up to
    ``k = p / ranks_per_core``, where each has a core, from there on linear to ``t(p) = 1``. Work of
    N = M v passes takes N + p - 1 of their times, in the i-th of which
    k_i = min(i, N, p, N + p - i) stages are busy, so that it takes::

        sum_i t(k_i) / (N + p - 1)

    of what it would (exact for equal stages; ``pytest tests/test_pipeline.py``).
    """
    p, passes = layout.pipeline, layout.micro_batches * layout.virtual_stages
    if ranks_per_core <= 1 or unshared_speedup <= 1 or p == 1:
        return 1.0
    alone, room = 1 / unshared_speedup, p / ranks_per_core

    def seconds(busy: int) -> float:
        return alone + (1 - alone) * max(0.0, (busy - room) / (p - room))

    times = passes + p - 1
    return sum(seconds(min(i, passes, p, times + 1 - i)) for i in range(1, times + 1)) / times


def waiting_share(layout: Layout) -> float:
    """What of ``lag_fraction`` the passes of a pipeline lose, whose stages move on in lock step.

    The slowest of the k_i stages that compute at once (as in `pass_share`) decides when the next
    passes begin; alone a stage waits for none, and in between it is taken as linear. As the k_i
    add up to N p::

        mean_i (k_i - 1) / (p - 1) = (N - 1) / (N + p - 1)
    """
    passes = layout.micro_batches * layout.virtual_stages
    return (passes - 1) / (passes + layout.pipeline - 1) if layout.pipeline > 1 else 0.0


def least_seconds(
    work: float, stages: int, micro_batches: int, virtual_stages: int, largest: float = 0.0
) -> float:
    """A lower bound on either form when the stages' times add up to ``work``.

    1F1B: the lock-step path over all stages, and the bottleneck path of a stage of at least
    ``largest`` seconds. Interleaved: no rank is shorter than the mean or than its largest block.
    """
    top = max(work / stages, largest)
    if virtual_stages > 1:
        return work / virtual_stages + (micro_batches - 1 / virtual_stages) * top
    if stages == 1:
        return micro_batches * work
    return max(work * (1 + (micro_batches - 1) / stages), micro_batches * top)


def balanced_seconds(
    counts: Sequence[int], seconds: Sequence[Sequence[float]], stages: Sequence[int]
) -> float:
    """The least possible time of the slowest stage, were blocks divisible and in any order.

    On one kind of devices the mean. On two, the blocks that gain most from the first kind go
    there until both kinds take as long.

    Args:
        counts: blocks of each sort.
        seconds: for each kind of devices, of one block of each sort.
        stages: that each kind holds.
    """
    if len(stages) == 1:
        work = sum(n * t for n, t in zip(counts, seconds[0], strict=True))
        return work / stages[0]
    sorts = [
        (n * first, n * second)
        for n, first, second in zip(counts, *seconds, strict=True)
        if n and (first or second)
    ]
    sorts.sort(key=lambda times: times[0] / times[1] if times[1] else float("inf"))
    here, there = 0.0, sum(second for _, second in sorts)
    for first, second in sorts:
        after, left = here + first, there - second
        if after / stages[0] >= left / stages[1]:
            # With a share of this sort on the first kind, both kinds take equally long.
            gap = there / stages[1] - here / stages[0]
            share = gap / (first / stages[0] + second / stages[1])
            return float(here + share * first) / stages[0]
        here, there = after, left
    return here / stages[0]
