"""Statistics of predictions against measured runs.

Every file weighs the same, whatever its number of rows. A sweep is a set of rows that differ only
in their layout; rows of one layout, such as repeated runs, count once, with their mean.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from paraplan.validate_predict import Prediction
from paraplan.validate_spread import coverage

LEAST_SWEEP = 4
"""Layouts from which on rank correlation and regret of a sweep are worth a figure."""

Pair = tuple[float, float]
"""Predicted and measured seconds."""


@dataclass(frozen=True, slots=True)
class Confusion:
    """Runs by whether they ran and whether they are predicted to fit."""

    ran: int
    ran_predicted_out: int
    out: int
    out_predicted_fit: int


@dataclass(frozen=True, slots=True)
class Summary:
    """Statistics over rows; None where no row tells.

    Attributes:
        rows: timed rows.
        bias: mean of the signed relative errors; ``mape`` of the absolute ones; ``p90``, 90th
            percentile of the absolute ones.
        spearman: mean over sweeps of the rank correlation.
        regret_mean, regret_p90: over sweeps, time of the layout predicted fastest over that of
            the fastest, less 1.
        memory_mape: mean absolute relative error of peak memory; ``memory_under``: share of
            rows whose memory is predicted too small.
        interval_coverage: share of rows inside the interval of 80 % that the other models give.
    """

    rows: int
    bias: float | None
    median_abs_error: float | None
    mape: float | None
    p90: float | None
    spearman: float | None
    regret_mean: float | None
    regret_p90: float | None
    memory_mape: float | None
    memory_under: float | None
    interval_coverage: float | None
    oom: Confusion


def summarise(predictions: Sequence[Prediction]) -> Summary:
    """Statistics over rows; every file weighs the same, whatever its number of rows."""
    timed = [p for p in predictions if p.time_error is not None]
    errors = [p.time_error or 0.0 for p in timed]
    weights = _equal_weights([p.row.file for p in timed])
    sizes = [abs(error) for error in errors]
    with_memory = [p for p in predictions if p.memory_error is not None]
    memory = [p.memory_error or 0.0 for p in with_memory]
    shares = _equal_weights([p.row.file for p in with_memory])
    swept = _sweeps(timed)
    correlations = [rank_correlation(pairs) for _, pairs in swept]
    regrets = [regret(pairs) for _, pairs in swept]
    each = _equal_weights([file for file, _ in swept])
    return Summary(
        rows=len(timed),
        bias=_mean(errors, weights),
        median_abs_error=_quantile(sizes, weights, 0.5),
        mape=_mean(sizes, weights),
        p90=_quantile(sizes, weights, 0.9),
        spearman=_mean(correlations, each),
        regret_mean=_mean(regrets, each),
        regret_p90=_quantile(regrets, each, 0.9),
        memory_mape=_mean([abs(error) for error in memory], shares),
        memory_under=_mean([float(error < 0) for error in memory], shares),
        interval_coverage=coverage(timed),
        oom=_confusion(predictions),
    )


def _equal_weights(files: Sequence[str]) -> list[float]:
    rows = Counter(files)
    return [1 / rows[file] / len(rows) for file in files]


def _mean(values: Sequence[float], weights: Sequence[float]) -> float | None:
    if not values:
        return None
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


def _quantile(values: Sequence[float], weights: Sequence[float], share: float) -> float | None:
    """The smallest value at or below which ``share`` of the weight lies."""
    if not values:
        return None
    reached, wanted = 0.0, share * sum(weights) * (1 - 1e-12)
    for value, weight in sorted(zip(values, weights, strict=True)):
        reached += weight
        if reached >= wanted:
            return value
    return max(values)


def _sweeps(timed: Iterable[Prediction]) -> list[tuple[str, list[Pair]]]:
    """Each sweep's file, and its layouts' mean predicted and measured seconds."""
    groups: dict[tuple[str, ...], dict[tuple[str, ...], list[Prediction]]] = {}
    for one in timed:
        groups.setdefault(one.row.sweep, {}).setdefault(one.row.layout, []).append(one)
    return [
        (key[0], [_means(rows) for rows in layouts.values()])
        for key, layouts in groups.items()
        if len(layouts) >= LEAST_SWEEP
    ]


def _means(rows: Sequence[Prediction]) -> Pair:
    return fmean(p.predicted_s for p in rows), fmean(p.measured_s or 0.0 for p in rows)


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values share their mean rank."""
    order = sorted(values)
    first = {value: i for i, value in reversed(list(enumerate(order)))}
    count = Counter(order)
    return [first[value] + (count[value] + 1) / 2 for value in values]


def rank_correlation(pairs: Sequence[Pair]) -> float:
    """Rank correlation of predicted and measured time; 0 where one of them is constant."""
    a, b = _ranks([p for p, _ in pairs]), _ranks([m for _, m in pairs])
    middle = (len(pairs) + 1) / 2
    products = sum((x - middle) * (y - middle) for x, y in zip(a, b, strict=True))
    spread = sum((x - middle) ** 2 for x in a) * sum((y - middle) ** 2 for y in b)
    return products / math.sqrt(spread) if spread else 0.0


def regret(pairs: Sequence[Pair]) -> float:
    """Time of the layout predicted fastest over that of the fastest, less 1."""
    _, chosen = min(pairs)
    return chosen / min(measured for _, measured in pairs) - 1


def _confusion(predictions: Iterable[Prediction]) -> Confusion:
    known = Counter((p.row.out_of_memory, p.fits) for p in predictions)
    return Confusion(
        ran=known[False, True] + known[False, False],
        ran_predicted_out=known[False, False],
        out=known[True, True] + known[True, False],
        out_predicted_fit=known[True, True],
    )
