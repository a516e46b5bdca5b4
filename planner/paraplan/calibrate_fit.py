"""Figures of profiles as parameters of a fit, and robust least squares over them.

A parameter is a factor on one or several figures of a device or a cluster. The fit minimises

    sum_i w_i huber(log(predicted_i / measured_i)) + sum_k (log factor_k / spread_k)^2

by Gauss-Newton with finite differences: the first term is robust, so that a few rows that ran
something else do not decide; the second is what is known without the rows, so that a handful of
rows moves only what they tell about. The inverse of the normal matrix says how well each factor
is determined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vector = NDArray[np.float64]

HUBER = 0.05
"""Log error up to which a row counts by its square, and by its size beyond."""

STEP = 0.02
"""Finite difference of a log factor."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A factor on figures of one profile.

    Attributes:
        name: for people; a factor above 1 is faster.
        rates: figures that it multiplies, dotted paths into the cluster; ``*`` stands for every
            entry, ``@name`` for the entry of that implementation.
        seconds: figures that it divides.
        spread: standard deviation of the log factor before any row is seen.
    """

    name: str
    rates: tuple[str, ...] = ()
    seconds: tuple[str, ...] = ()
    spread: float = 0.3


@dataclass(frozen=True, slots=True)
class Fit:
    """What a fit found.

    Attributes:
        logs: log factors, in the order of the parameters.
        spreads: their standard deviations, rows and prior knowledge together.
        errors: log of predicted over measured for each row.
    """

    logs: tuple[float, ...]
    spreads: tuple[float, ...]
    errors: tuple[float, ...]


MOST_EFFICIENCY = 1.0


def with_factors(
    content: dict[str, Any], parameters: Sequence[Parameter], logs: Sequence[float]
) -> dict[str, Any]:
    """A copy of a cluster's content with its figures multiplied."""
    import copy
    import math

    changed = copy.deepcopy(content)
    for parameter, log in zip(parameters, logs, strict=True):
        for figure in _figures(changed, parameter.rates):
            figure["value"] = min(figure["value"] * math.exp(log), MOST_EFFICIENCY)
        for figure in _figures(changed, parameter.seconds):
            figure["value"] *= math.exp(-log)
    return changed


def _figures(content: Any, paths: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The figures (``{"value": ...}``) at the paths of a profile's content."""
    for path in paths:
        yield from _at(content, path)


def _at(entry: Any, path: str) -> Iterator[dict[str, Any]]:
    head, _, rest = path.partition(".")
    if not head:
        if isinstance(entry, dict) and "value" in entry:
            yield entry
    elif head == "*":
        for one in entry.values() if isinstance(entry, dict) else entry:
            yield from _at(one, rest)
    elif head.startswith("@"):
        for one in entry:
            if one["implementation"] == head[1:]:
                yield from _at(one, rest)
    elif isinstance(entry, dict) and entry.get(head) is not None:
        yield from _at(entry[head], rest)


def fit(
    errors_of: Callable[[Sequence[float]], Sequence[float]],
    weights: Sequence[float],
    spreads: Sequence[float],
    *,
    rounds: int = 6,
    report: Callable[[str], None] = lambda line: None,
) -> Fit:
    """Find the log factors (see the module's docstring).

    Args:
        errors_of: log of predicted over measured of each row, under given log factors.
        weights: of the rows.
        spreads: of the log factors before any row is seen.
    """
    import numpy as np

    def errors_at(logs: Vector) -> Vector:
        return np.array(errors_of([float(log) for log in logs]), dtype=float)

    here = np.zeros(len(spreads))
    scale = np.asarray(weights, dtype=float)
    scale = scale / scale.sum() * len(scale)
    prior = 1 / np.asarray(spreads, dtype=float) ** 2
    errors = errors_at(here)
    best = _loss(errors, scale, here, prior)
    for turn in range(rounds):
        columns = []
        for k in range(len(here)):
            moved = here.copy()
            moved[k] += STEP
            columns.append((errors_at(moved) - errors) / STEP)
        slopes = np.stack(columns, axis=1)
        robust = scale / np.maximum(np.abs(errors), HUBER) * HUBER
        normal = (slopes.T * robust) @ slopes / HUBER**2 + np.diag(prior)
        pull = slopes.T @ (robust * errors) / HUBER**2 + prior * here
        move = -np.linalg.solve(normal, pull)
        share = 1.0
        while share > 0.05:
            trial = here + share * move
            found = errors_at(trial)
            loss = _loss(found, scale, trial, prior)
            if loss < best:
                break
            share /= 2
        else:
            break
        gained = best - loss
        here, errors, best = trial, found, loss
        report(f"round {turn + 1}: loss {best:.2f}")
        if gained < 1e-3 * best:
            break
    spreads_now = np.sqrt(np.diag(np.linalg.inv(normal)))
    return Fit(tuple(map(float, here)), tuple(map(float, spreads_now)), tuple(map(float, errors)))


def _loss(errors: Vector, scale: Vector, here: Vector, prior: Vector) -> float:
    import numpy as np

    size = np.abs(errors)
    huber = np.where(size < HUBER, size**2 / 2, HUBER * (size - HUBER / 2))
    return float((scale * huber).sum() / HUBER**2 + (prior * here**2).sum() / 2)
