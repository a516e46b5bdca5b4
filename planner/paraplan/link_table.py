"""A link's measured collectives: interpolated between sizes, for the groups that were measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import log
from typing import Annotated, Literal

from pydantic import Field

from paraplan.op_table import Curve
from paraplan.profile_types import Frozen

LinkKind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "transfer"]


class MeasuredCollective(Frozen):
    """One collective timed between devices of a node, all groups of its size at once.

    Attributes:
        message_bytes: as `collectives.collective_seconds` counts them.
        ranks: of the group; 2 for a transfer.
        seconds: of one call; the median on GPUs, the mean on CPUs.
        spread: (90th - 10th percentile) / median.
    """

    kind: LinkKind
    ranks: Annotated[int, Field(ge=2, le=2**20)]
    message_bytes: Annotated[int, Field(ge=1, le=2**50)]
    seconds: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
    spread: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


@dataclass(frozen=True, slots=True)
class LinkTable:
    """Curves of bytes per second over bytes, by kind and group size."""

    rates: dict[tuple[str, int], Curve]
    shortest: dict[tuple[str, int], float]

    def seconds(self, kind: str, ranks: int, message_bytes: float) -> float | None:
        """Interpolated seconds; None where the group's size was not measured.

        Messages below the smallest measured one take as long as it does, for then nothing but
        the start counts; beyond the largest the rate stays.
        """
        curve = self.rates.get((kind, ranks))
        if curve is None or message_bytes <= 0:
            return None
        rate = curve.at(message_bytes)
        return self.shortest[kind, ranks] if rate is None else message_bytes / rate


def make_link_table(measured: Iterable[MeasuredCollective]) -> LinkTable:
    """Index measured collectives."""
    points: dict[tuple[str, int], dict[int, float]] = {}
    for one in measured:
        points.setdefault((one.kind, one.ranks), {})[one.message_bytes] = one.seconds
    rates: dict[tuple[str, int], Curve] = {}
    shortest: dict[tuple[str, int], float] = {}
    for name, known in points.items():
        sizes = sorted(known)
        values = tuple(log(size / known[size]) for size in sizes)
        rates[name] = Curve(tuple(log(size) for size in sizes), values)
        shortest[name] = known[sizes[0]]
    return LinkTable(rates, shortest)
