"""How far off a prediction may be: the spread of measured over predicted times of its kind.

The table ships with the profiles (``uncertainty.toml``); ``plan validate --uncertainty FILE``
writes it from measured runs. A kind is where a step's time goes: how much of it the devices
compute, and whether they sit in one node. Devices whose figures no whole run has corrected are a
kind of their own, and so are those that `plan profile` has measured, whole layers included; that
one's spread is of the layouts that ``benchmarks/profile_loop.py`` trained.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

from paraplan.chain import ChainCost
from paraplan.device import Device
from paraplan.graph import Recompute
from paraplan.plan_parts import Interval

COVERAGE = 0.8
BUSY = (0.85, 0.65)
"""Shares of the step that the devices compute, at which one kind ends and the next begins."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Measured over predicted seconds of one kind of run.

    Attributes:
        low, high: four of five runs of models not seen lie between them.
        runs: how many it rests on.
    """

    low: float
    high: float
    runs: int


def kind_of(nodes: int, computing: float) -> str:
    """The kind of a run, in words."""
    where = "one node" if nodes == 1 else "several nodes"
    if computing >= BUSY[0]:
        return f"{where}, mostly computing"
    return f"{where}, some waiting" if computing >= BUSY[1] else f"{where}, much waiting"


def computing_share(chain: ChainCost, modes: Mapping[int, Recompute], step_seconds: float) -> float:
    """Share of a step in which kernels run, in the mean over the pipeline's ranks.

    Args:
        modes: recompute mode by chain position, where it is not none.
    """
    kernels = 0.0
    for position, kind in enumerate(chain.shape.kind_at):
        compute = chain.costs[kind].compute
        again = compute.rerun[modes.get(position, "none")]
        kernels += compute.forward.kernels + compute.backward.kernels + again.kernels
    layout = chain.layout
    return layout.micro_batches * kernels / layout.pipeline / step_seconds


@cache
def shipped_spreads() -> tuple[dict[str, Spread], frozenset[str]]:
    """The shipped table by kind, and the devices that it speaks of."""
    text = resources.files("paraplan_profiles").joinpath("uncertainty.toml").read_text("utf-8")
    data = tomllib.loads(text)
    spreads = {one["kind"]: Spread(one["low"], one["high"], one["runs"]) for one in data["kinds"]}
    return spreads, frozenset(data["devices"])


UNFITTED = "a device that no whole run has corrected"
PROFILED = "a device that plan profile has measured"


def interval_of(device: Device, nodes: int, computing: float, step_seconds: float) -> Interval:
    """Where the step time lies in four of five runs of this kind."""
    spreads, devices = shipped_spreads()
    if device.name in devices:
        kind = kind_of(nodes, computing)
    else:
        kind = UNFITTED if device.whole_layer_scale is None else PROFILED
    spread = spreads[kind]
    return Interval(
        coverage=COVERAGE,
        low_seconds=float(f"{step_seconds * spread.low:.4g}"),
        high_seconds=float(f"{step_seconds * spread.high:.4g}"),
        kind=kind,
        runs=spread.runs,
    )
