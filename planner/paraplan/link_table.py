"""A link's measured collectives: interpolated between sizes, for the groups that were measured.

Groups are of one node, or of as many devices on each of several nodes; a link inside nodes holds
the former, one between nodes the latter.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import log
from typing import Annotated, Literal

from pydantic import Field

from paraplan.op_table import Curve
from paraplan.profile_types import Frozen

Shape = tuple[int, int | None]
"""Ranks of a group, and those of each node; None where one node has all."""

Exchange = tuple[str, int, int | None]
"""Kind of a collective, and the shape of its group."""

LinkKind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "transfer"]


class MeasuredCollective(Frozen):
    """One collective, timed in all groups of its shape at once.

    Attributes:
        message_bytes: as `collectives.collective_seconds` counts them.
        ranks: of the group; 2 for a transfer.
        per_node: those of them that each node has; left out where one node has all.
        seconds: of one call; the median on GPUs, the mean on CPUs.
        spread: (90th - 10th percentile) / median.
    """

    kind: LinkKind
    ranks: Annotated[int, Field(ge=2, le=2**20)]
    per_node: Annotated[int, Field(ge=1, le=2**20)] | None = None
    message_bytes: Annotated[int, Field(ge=1, le=2**50)]
    seconds: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
    spread: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


@dataclass(frozen=True, slots=True)
class LinkTable:
    """Curves of bytes per second over bytes, by kind and shape of the group."""

    rates: dict[Exchange, Curve]
    shortest: dict[Exchange, float]

    def seconds(
        self, kind: str, ranks: int, per_node: int | None, message_bytes: float
    ) -> float | None:
        """Interpolated seconds; None where no group of that shape was measured.

        Messages below the smallest measured one take as long as it does, for then nothing but
        the start counts; beyond the largest the rate stays.
        """
        shape = (kind, ranks, per_node)
        curve = self.rates.get(shape)
        if curve is None or message_bytes <= 0:
            return None
        rate = curve.at(message_bytes)
        return self.shortest[shape] if rate is None else message_bytes / rate

    def nearest(self, kind: str, ranks: int, per_node: int) -> int | None:
        """Ranks of the measured group with as many on each node whose number is nearest."""
        measured = (n for k, n, each in self.rates if (k, each) == (kind, per_node))
        return min(measured, key=lambda n: abs(log(n / ranks)), default=None)


def make_link_table(measured: Iterable[MeasuredCollective]) -> LinkTable:
    """Index measured collectives."""
    points: dict[Exchange, dict[int, float]] = {}
    for one in measured:
        shape = (one.kind, one.ranks, one.per_node)
        points.setdefault(shape, {})[one.message_bytes] = one.seconds
    rates: dict[Exchange, Curve] = {}
    shortest: dict[Exchange, float] = {}
    for name, known in points.items():
        sizes = sorted(known)
        values = tuple(log(size / known[size]) for size in sizes)
        rates[name] = Curve(tuple(log(size) for size in sizes), values)
        shortest[name] = known[sizes[0]]
    return LinkTable(rates, shortest)
