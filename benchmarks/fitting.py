"""Reading published measurements, fitting to them, and reporting how well."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from paraplan.graph import Amount, Op
from paraplan.profile_types import Figure, Frozen

MIB = 2**20
Row = dict[str, str]
Pairs = list[tuple[float, float]]
"""(predicted, measured) seconds."""
ProfilePart = TypeVar("ProfilePart", bound=Frozen)


def rows_of(folder: Path, name: str) -> list[Row]:
    """The rows of one file."""
    with open(folder / name, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def errors(pairs: Pairs) -> list[float]:
    """Sorted absolute relative errors."""
    return sorted(abs(predicted / measured - 1) for predicted, measured in pairs)


def mean_log_error(pairs: Pairs) -> float:
    """What the fits minimise: robust, and symmetric in too fast and too slow."""
    return sum(abs(math.log(p / m)) for p, m in pairs) / len(pairs)


def minimise(
    pairs_of: Callable[[dict[str, float]], Pairs],
    start: dict[str, float],
    upper: dict[str, float] | None = None,
) -> dict[str, float]:
    """The least mean log error, found by a pattern search along each parameter and each pair.

    Pairs matter where two parameters make up for each other (an efficiency and a fixed cost).
    Every parameter stays positive and at most at its ``upper`` limit.
    """
    limits = upper or {}
    moves = [{name: sign} for name in start for sign in (1, -1)]
    moves += [{a: i, b: j} for a, b in combinations(start, 2) for i in (1, -1) for j in (1, -1)]
    best, value, step = dict(start), mean_log_error(pairs_of(start)), 0.4
    while step > 0.002:
        improved = False
        for move in moves:
            trial = best | {
                name: min(best[name] * (1 + step) ** sign, limits.get(name, math.inf))
                for name, sign in move.items()
            }
            found = mean_log_error(pairs_of(trial))
            if found < value - 1e-9:
                best, value, improved = trial, found, True
        if not improved:
            step /= 2
    return best


def report(what: str, source: str, fitted: dict[str, float], pairs: Pairs) -> None:
    """One row of the table."""
    values = ", ".join(f"{name} {value:.3g}" for name, value in fitted.items())
    found = errors(pairs)
    middle, high = median(found), found[int(0.9 * (len(found) - 1))]
    print(f"| {what} | {source} | {len(pairs)} | {values} | {middle:.1%} | {high:.1%} |")


def figure(value: float) -> Figure:
    """A figure under trial."""
    return Figure(value=float(value), basis="modelled", source="trial")


def changed(model: ProfilePart, **update: Any) -> ProfilePart:
    """A copy of a profile object without its cached properties."""
    fields = {name: getattr(model, name) for name in type(model).model_fields}
    return type(model).model_construct(**(fields | update))


def memory_op(size_bytes: float) -> Op:
    """A memory-bound op that moves that many bytes."""
    return Op(
        name="memory",
        kind="memory",
        phase="forward",
        dtype="float16",
        read_bytes=Amount(int(size_bytes)),
    )


def gemm_op(m: int, n: int, k: int) -> Op:
    """A product of (m, k) by (k, n)."""
    return Op(
        name="aten.mm",
        kind="gemm",
        phase="forward",
        dtype="float16",
        dims=(Amount(1), Amount(m), Amount(n), Amount(k)),
        read_bytes=Amount(2 * (m * k + k * n)),
        write_bytes=Amount(2 * m * n),
    )
