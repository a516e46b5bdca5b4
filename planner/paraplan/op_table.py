"""A device's measured ops: looked up exactly, or interpolated between neighbours.

The table is part of the device's profile; `plan profile` writes it. Rates are interpolated, not
seconds, and in log space: over a grid of (m, n, k) they change slowly where seconds do not.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import exp, log
from typing import Annotated, Literal

from pydantic import Field

from paraplan.profile_types import Frozen

Dtype = Literal["bfloat16", "float16", "float32", "float8", "float4"]
OpKind = Literal["gemm", "grouped_gemm", "attention", "memory"]

ANY_NAME = "*"
"""Name of a memory op that stands for all memory ops without a curve of their own."""


class MeasuredOp(Frozen):
    """One op timed on the device.

    Attributes:
        kind, dims, causal, window: as in `graph.Op`, sizes as whole numbers.
        name: of a memory op; ``*`` stands for any.
        phase: of an attention op.
        size_bytes: read and written by a memory op.
        seconds: median of one call.
        spread: (90th - 10th percentile) / median, where known.
    """

    kind: OpKind
    dtype: Dtype
    name: str = ANY_NAME
    phase: Literal["forward", "backward"] = "forward"
    dims: tuple[Annotated[int, Field(ge=1, le=2**40)], ...] = ()
    causal: bool = False
    window: Annotated[int, Field(ge=1)] | None = None
    size_bytes: Annotated[int, Field(ge=0, le=2**50)] = 0
    seconds: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
    spread: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


Key = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Curve:
    """A quantity over a size, both as logarithms, sizes rising."""

    sizes: tuple[float, ...]
    values: tuple[float, ...]

    def at(self, size: float) -> float | None:
        """The value at ``size``; beyond the last point its value, before the first None."""
        place = log(size)
        if place < self.sizes[0]:
            return None
        right = bisect_right(self.sizes, place)
        if right == len(self.sizes):
            return exp(self.values[-1])
        low, high = self.sizes[right - 1], self.sizes[right]
        share = (place - low) / (high - low)
        return exp(self.values[right - 1] * (1 - share) + self.values[right] * share)


@dataclass(frozen=True, slots=True)
class Grid:
    """Log of achieved FLOP/s of products (m, k) by (k, n) over the logs of m, n and k."""

    axes: tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]
    rates: dict[tuple[int, int, int], float]

    def rate(self, m: float, n: float, k: float) -> float | None:
        """Interpolated FLOP/s; None below the grid or where a corner was not measured."""
        places = [
            _bracket(axis, log(size)) for axis, size in zip(self.axes, (m, n, k), strict=True)
        ]
        total = 0.0
        for corner in product((0, 1), repeat=3):
            weight, index = 1.0, []
            for side, place in zip(corner, places, strict=True):
                if place is None:
                    return None
                left, share = place
                weight *= share if side else 1 - share
                index.append(left + side)
            if weight:
                known = self.rates.get((index[0], index[1], index[2]))
                if known is None:
                    return None
                total += weight * known
        return exp(total)


def _bracket(axis: Sequence[float], place: float) -> tuple[int, float] | None:
    """The interval of ``axis`` that holds ``place`` and how far in; beyond the end, the end."""
    if place < axis[0]:
        return None
    right = bisect_right(axis, place)
    if right == len(axis):
        return right - 1, 0.0
    return right - 1, (place - axis[right - 1]) / (axis[right] - axis[right - 1])


@dataclass(frozen=True, slots=True)
class MeasuredTable:
    """The measured ops of one device, indexed.

    Attributes:
        exact: seconds by `key`.
        grids: single matrix products by dtype.
        attention: FLOP/s over the length, by (phase, dtype, causal) and head size.
        memory: bytes per second over bytes, by (name, dtype).
    """

    exact: dict[Key, float] = field(default_factory=dict)
    grids: dict[str, Grid] = field(default_factory=dict)
    attention: dict[Key, dict[int, Curve]] = field(default_factory=dict)
    memory: dict[Key, Curve] = field(default_factory=dict)

    def attention_rate(
        self, phase: str, dtype: str, causal: bool, head_size: float, length: float
    ) -> float | None:
        """Interpolated FLOP/s; None for shorter lengths or other head sizes than were measured."""
        curves = self.attention.get((phase, dtype, causal), {})
        rates = {size: rate for size, c in curves.items() if (rate := c.at(length)) is not None}
        if not rates or not min(rates) <= head_size <= max(rates):
            return None
        return _curve(rates).at(head_size)


def make_table(ops: Iterable[MeasuredOp], attention_flops: dict[int, float]) -> MeasuredTable:
    """Index measured ops; a single size makes no curve and no grid.

    Args:
        ops: in the order of the profile; of two with one key the later one counts.
        attention_flops: FLOPs of the attention ops, by position in ``ops``.
    """
    table = MeasuredTable()
    products: dict[str, dict[tuple[int, int, int], float]] = {}
    attention: dict[tuple[str, str, int, bool], dict[int, tuple[float, float]]] = {}
    memory: dict[Key, dict[int, float]] = {}
    for position, op in enumerate(ops):
        sizes = (op.size_bytes,) if op.kind == "memory" else op.dims
        table.exact[key(op.kind, op.name, op.phase, op.dtype, sizes, op.causal, op.window)] = (
            op.seconds
        )
        if op.kind == "gemm" and len(op.dims) == 4 and op.dims[0] == 1:
            _, m, n, k = op.dims
            products.setdefault(op.dtype, {})[m, n, k] = 2.0 * m * n * k / op.seconds
        elif op.kind == "attention" and position in attention_flops and op.window is None:
            flops = attention_flops[position]
            lengths = attention.setdefault((op.phase, op.dtype, op.dims[5], op.causal), {})
            # Of several batch sizes at one length the largest says most about the rate.
            if flops > lengths.get(op.dims[4], (0.0, 0.0))[0]:
                lengths[op.dims[4]] = (flops, flops / op.seconds)
        elif op.kind == "memory" and op.size_bytes:
            rate = op.size_bytes / op.seconds
            memory.setdefault((op.name, op.dtype), {})[op.size_bytes] = rate
    table.grids.update(
        {
            dtype: _grid(rates)
            for dtype, rates in products.items()
            if all(len({shape[i] for shape in rates}) > 1 for i in range(3))
        }
    )
    for (phase, dtype, size, causal), points in attention.items():
        if len(points) > 1:
            curve = _curve({length: rate for length, (_, rate) in points.items()})
            table.attention.setdefault((phase, dtype, causal), {})[size] = curve
    table.memory.update({k: _curve(points) for k, points in memory.items() if len(points) > 1})
    return table


def key(
    kind: str,
    name: str,
    phase: str,
    dtype: str,
    sizes: Sequence[float],
    causal: bool,
    window: int | None,
) -> Key:
    """What makes two ops the same: the name matters for memory ops, the phase for attention."""
    if kind == "memory":
        return kind, name, dtype, tuple(sizes)
    if kind == "attention":
        return kind, phase, dtype, tuple(sizes), causal, window
    return kind, dtype, tuple(sizes)


def _curve(points: Mapping[int, float]) -> Curve:
    sizes = sorted(points)
    return Curve(tuple(log(s) for s in sizes), tuple(log(points[s]) for s in sizes))


def _grid(rates: dict[tuple[int, int, int], float]) -> Grid:
    axes = [sorted({shape[i] for shape in rates}) for i in range(3)]
    index = [{size: i for i, size in enumerate(axis)} for axis in axes]
    logs = [tuple(log(size) for size in axis) for axis in axes]
    return Grid(
        axes=(logs[0], logs[1], logs[2]),
        rates={
            (index[0][m], index[1][n], index[2][k]): log(rate) for (m, n, k), rate in rates.items()
        },
    )
