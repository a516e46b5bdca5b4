"""How long one call takes on a device: medians of batches of calls, on every rank at once.

A batch is many calls in a row, timed together: on a GPU between two events on the device, behind
a pause that lets the host launch ahead; on a CPU by the wall clock. All ranks run the same batches
at the same time, because ranks that compute together share power, caches and memory bandwidth.
Where there are more processes than cores, only as many time single calls as have a core each: of
ranks that take turns on a core nothing short can be timed, and what the turns cost is in the scale
that whole layers on all ranks give. The time of a call is the median of its batches, the mean over
the ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

Call = Callable[[], Any]

PAUSE_CYCLES = 2_000_000  # about a millisecond of a GPU's clock, to launch 100 calls meanwhile
MOST_CALLS = 100  # of a batch on a GPU: more would fill the launch queue during the pause
CACHES = 2.5
"""Inputs are rotated over so many times the last-level cache, so that none is found in it."""

WORK_SECONDS = 0.01
"""Of computation before each call in which ranks wait for each other: about what a layer computes
between its collectives. Two processes exchanged 0.75 MiB in 1.9 to 2.7 ms back to back, in 2.5 to
3.9 ms after 5 to 20 ms of computation, and in 5 ms after 70 ms of it (CPU, a kernel of 250 Hz;
tried once, not in the repository)."""

CALLS_OF_A_BATCH, CALLS_SECONDS = 3, 0.1
"""So many such calls stand for a batch; of long ones, what fits into so many seconds."""


class Timing(NamedTuple):
    """Of one call.

    Attributes:
        seconds: the mean over the ranks of their medians.
        spread: (90th - 10th percentile) / median of the batches.
        lag: what ranks lose that wait for each other after every batch: by what share the mean of
            each batch's slowest rank exceeds the mean of all.
    """

    seconds: float
    spread: float
    lag: float = 0.0


@dataclass(frozen=True)
class Clock:
    """Times calls on this rank's device, together with all other ranks.

    Attributes:
        device: that the calls run on.
        batch_seconds: shortest batch.
        batches: timed after the calls that warm up.
        group: gloo group over which ranks agree; None for a single rank.
        alone: ranks that compute while the others wait, so that none of them shares a core;
            None: all.
        shared_batch_seconds: shortest batch where all ranks compute though they share cores; it
            has to span many of the scheduler's turns.
    """

    device: torch.device
    batch_seconds: float
    batches: int
    group: dist.ProcessGroup | None = None
    alone: tuple[int, ...] | None = None
    shared_batch_seconds: float = 0.0

    def time(self, calls: Sequence[Call], *, collective: bool = False) -> Timing:
        """Time calls that do the same with different inputs, in turn, on all ranks.

        Args:
            collective: all ranks must make them equally often. Otherwise they need not agree on
                it, which where they share cores takes longer than most calls.
        """
        agreed = self._slowest if collective else float
        shortest = self.batch_seconds if self.alone is None else self.shared_batch_seconds
        return together(self._of_all(self._batches(calls, shortest, agreed)))

    def time_alone(self, calls: Sequence[Call]) -> Timing:
        """Time calls while no more ranks make them than have a core each; the others wait."""
        seconds = []
        if self.alone is None or self.group is None or dist.get_rank(self.group) in self.alone:
            seconds = self._batches(calls, self.batch_seconds, float)
        else:
            self.wait_for_all()
        return together(self._of_all(seconds, self.alone))

    def time_waiting(self, call: Call, work: Call) -> Timing:
        """Time a call in which CPU ranks wait for each other, each time after computing ``work``.

        Back to back, every rank is there, the threads that move the bytes are awake and a core is
        free for them; in training none of it holds. What waiting costs comes in rare, long pieces
        (a thread that wakes up behind one that computes), so that the mean counts.
        """
        repeats = max(1, math.ceil(WORK_SECONDS / self._slowest(self._elapsed([work], 1))))
        once = max(self._slowest(self._elapsed([call], 1)), 1e-7)
        of_a_batch = min(CALLS_OF_A_BATCH, max(1, math.ceil(CALLS_SECONDS / once)))
        self.wait_for_all()
        seconds = []
        for _ in range(self.batches * of_a_batch):
            self._elapsed([work], repeats)
            seconds.append(self._elapsed([call], 1))
        of_all = self._of_all(seconds)
        return together(of_all)._replace(seconds=fmean(map(fmean, of_all)))

    def synchronize(self) -> None:
        """Wait until the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def wait_for_all(self) -> None:
        """Wait for the other ranks."""
        if self.group is not None:
            dist.barrier(self.group)

    def _batches(
        self, calls: Sequence[Call], shortest: float, agreed: Callable[[float], float]
    ) -> list[float]:
        """Seconds of a call in each batch; all ranks begin together."""
        self.synchronize()
        once = agreed(self._elapsed(calls, 1))
        short = once < shortest
        if short:
            once = agreed(self._elapsed(calls, 1))
        count = max(1, math.ceil(shortest / max(once, 1e-7)))
        if self.device.type == "cuda":
            count = min(count, MOST_CALLS)
        batches = self.batches if once < 10 * shortest else max(1, self.batches - 1)
        if short:  # a long call has warmed up by now
            self._elapsed(calls, min(count, len(calls) + 1))
        self.wait_for_all()
        return [self._elapsed(calls, count) / count for _ in range(batches)]

    def _elapsed(self, calls: Sequence[Call], count: int) -> float:
        if self.device.type != "cuda":
            began = time.perf_counter()
            for i in range(count):
                calls[i % len(calls)]()
            return time.perf_counter() - began
        cuda: Any = torch.cuda  # its events and its pause carry no types
        began_event, ended = (cuda.Event(enable_timing=True) for _ in range(2))
        cuda._sleep(PAUSE_CYCLES)
        began_event.record()
        for i in range(count):
            calls[i % len(calls)]()
        ended.record()
        ended.synchronize()
        return float(began_event.elapsed_time(ended)) / 1e3

    def _slowest(self, *seconds: float) -> float:
        """The mean of each one's largest value on any rank."""
        values = torch.tensor(seconds, dtype=torch.float64)
        if self.group is not None:
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return float(values.mean())

    def _of_all(
        self, seconds: Sequence[float], ranks: Sequence[int] | None = None
    ) -> list[list[float]]:
        """Batches of all (of these) ranks; as many as the rank has that made fewest."""
        if self.group is None:
            return [list(seconds)]
        own = torch.full((self.batches * CALLS_OF_A_BATCH,), math.nan, dtype=torch.float64)
        own[: len(seconds)] = torch.tensor(seconds, dtype=torch.float64)
        found = torch.empty(dist.get_world_size(self.group), own.numel(), dtype=torch.float64)
        dist.all_gather(list(found), own, group=self.group)
        chosen = found if ranks is None else found[list(ranks)]
        least = int((~chosen.isnan()).sum(1).min())
        return [one[:least] for one in chosen.tolist()]


def together(of_all: Sequence[Sequence[float]]) -> Timing:
    """The timing that every rank's batches make."""
    alone = [summary(seconds) for seconds in of_all]
    slowest = [max(batch) for batch in zip(*of_all, strict=True)]
    return Timing(
        seconds=fmean(one.seconds for one in alone),
        spread=fmean(one.spread for one in alone),
        lag=fmean(slowest) / fmean(map(fmean, of_all)) - 1,
    )


def summary(seconds: Sequence[float]) -> Timing:
    """Median and spread."""
    values = torch.tensor(list(seconds), dtype=torch.float64)
    tenth, half, ninetieth = values.quantile(
        torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    ).tolist()
    return Timing(half, (ninetieth - tenth) / half)


def copies_beyond_cache(device: torch.device, bytes_of_one: int, most: int) -> int:
    """How many inputs of that size do not fit the last-level cache together; at most ``most``."""
    return max(1, min(most, math.ceil(CACHES * cache_bytes(device) / max(bytes_of_one, 1))))


def cache_bytes(device: torch.device) -> int:
    """The last cache in front of the device's memory."""
    if device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)
        return int(getattr(properties, "L2_cache_size", 0)) or 64 * 2**20
    return _host_cache_bytes()


def _host_cache_bytes() -> int:
    """Of the first core; 32 MiB where the system does not say."""
    from pathlib import Path

    sizes = [32 * 2**20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 2**10, "M": 2**20}.get(text[-1:])
        if unit and text[:-1].isdecimal():
            sizes.append(int(text[:-1]) * unit)
    return max(sizes[1:], default=sizes[0])
