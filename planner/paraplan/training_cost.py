"""Time, money and energy of a whole training run, with checkpoints and failures.

Failures come at random, independently of each other, at a constant rate: each device's own plus
the spot market's for each node. A failure costs the work since the last checkpoint, and a
restart. With M the cluster's mean time between failures, R the restart, d the time to write a
checkpoint and tau the work between two of them, the expected time of a run that needs S seconds
of steps is (Daly 2006, "A higher order estimate of the optimum checkpoint interval for restart
dumps", equation 13; exact for such failures)::

    wall = M e^(R / M) (e^((tau + d) / M) - 1) S / tau

and the tau that makes it least is, to a fraction of a percent (equation 37; its first term is
Young's of 1974)::

    tau = sqrt(2 d M) (1 + sqrt(d / (2 M)) / 3 + d / (2 M) / 9) - d      if d < 2 M, else M

All nodes write a checkpoint at once, each its share, and nothing trains meanwhile: parameters in
fp32 and the optimizer's state (as FSDP's sharded checkpoints hold them).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from paraplan.what_if_file import Economics

HOUR = 3600.0
DAY = 24 * HOUR
WATT_HOURS_OF_A_KWH = 1000.0
HOPELESS = 100.0
"""Wall time over the time of the steps from which on a run counts as never done."""


@dataclass(frozen=True, slots=True)
class Run:
    """What a training run takes; None where a price or a power is missing.

    Attributes:
        share: of the wall time that goes into steps.
    """

    mtbf_seconds: float
    checkpoint_every_seconds: float
    share: float
    wall_seconds: float
    dollars: float | None
    kwh: float | None
    carbon_kg: float | None


def mtbf_seconds(
    devices: int, nodes: int, spot_interruptions: float, economics: Economics
) -> float:
    """Mean time between failures of a cluster.

    Args:
        spot_interruptions: of one node, a day.
    """
    rate = devices / (economics.device_mtbf_hours * HOUR) + nodes * spot_interruptions / DAY
    return 1 / rate


def best_interval_seconds(write_seconds: float, mtbf: float) -> float:
    """Work between two checkpoints that makes the wall time least (module's docstring)."""
    ratio = write_seconds / (2 * mtbf)
    if ratio >= 1:
        return mtbf
    series = 1 + math.sqrt(ratio) / 3 + ratio / 9
    return math.sqrt(2 * write_seconds * mtbf) * series - write_seconds


def wall_per_step_second(
    interval: float, write_seconds: float, restart_seconds: float, mtbf: float
) -> float:
    """Expected wall time over the time of the steps; infinite where floats end."""
    exponent = (interval + write_seconds) / mtbf
    if max(exponent, restart_seconds / mtbf) > 700:
        return math.inf
    return mtbf * math.exp(restart_seconds / mtbf) * math.expm1(exponent) / interval


def training_run(
    *,
    tokens_per_second: float,
    devices: int,
    nodes: int,
    checkpoint_bytes: float,
    spot_interruptions: float,
    price_per_device_hour: float | None,
    watts_per_device: float | None,
    economics: Economics,
) -> Run | None:
    """A run over ``economics.tokens``; None if failures let it hardly move on (`HOPELESS`)."""
    mtbf = mtbf_seconds(devices, nodes, spot_interruptions, economics)
    write = checkpoint_bytes / (nodes * economics.checkpoint_bytes_per_second)
    interval = best_interval_seconds(write, mtbf)
    factor = wall_per_step_second(interval, write, economics.restart_seconds, mtbf)
    if factor > HOPELESS:
        return None
    wall = economics.tokens / tokens_per_second * factor
    device_hours = devices * wall / HOUR
    kwh = None
    if watts_per_device is not None:
        kwh = device_hours * watts_per_device * economics.power_overhead / WATT_HOURS_OF_A_KWH
    return Run(
        mtbf_seconds=mtbf,
        checkpoint_every_seconds=interval,
        share=1 / factor,
        wall_seconds=wall,
        dollars=None if price_per_device_hour is None else device_hours * price_per_device_hour,
        kwh=kwh,
        carbon_kg=None if kwh is None else kwh * economics.carbon_kg_per_kwh,
    )
