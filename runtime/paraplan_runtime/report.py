"""What was predicted beside what is measured, for this rank, without any exchange."""

from __future__ import annotations

import statistics
import time
from collections import deque
from dataclasses import dataclass

import torch

from paraplan.plan_file import Plan
from paraplan_runtime.mesh import AXES, Ranks

WARM_UP_STEPS = 3
"""First steps left out: they allocate memory and set up communicators."""

KEPT_STEPS = 100


@dataclass(frozen=True)
class ParallelReport:
    """Prediction and measurement of one rank.

    Attributes:
        mesh: axis -> number of ranks on it.
        stages: indices of the stages this rank holds.
        predicted_step_seconds: of the plan.
        measured_step_seconds: median time from one training call of the model to the next (an
            optimizer step, unless the script accumulates gradients over several calls); None
            before ``WARM_UP_STEPS`` calls with the planned batch.
        predicted_memory_bytes: of this rank's device.
        measured_memory_bytes: peak of tensors on this rank's GPU; None on the CPU.
        measured_steps: how many the median is of.
    """

    mesh: dict[str, int]
    stages: tuple[int, ...]
    predicted_step_seconds: float
    measured_step_seconds: float | None
    predicted_memory_bytes: int
    measured_memory_bytes: int | None
    measured_steps: int

    def lines(self) -> list[str]:
        """The report as text."""
        mesh = " x ".join(f"{axis} {size}" for axis, size in self.mesh.items() if size > 1)
        measured = self.measured_step_seconds
        memory = self.measured_memory_bytes
        return [
            f"mesh: {mesh or 'one device'}; this rank holds stage "
            + ", ".join(str(stage) for stage in self.stages),
            f"step: predicted {self.predicted_step_seconds:.4g} s, "
            + ("not measured yet" if measured is None else f"measured {measured:.4g} s"),
            f"memory: predicted {self.predicted_memory_bytes / 2**30:.3g} GiB, "
            + ("not measured" if memory is None else f"measured {memory / 2**30:.3g} GiB"),
        ]


class StepClock:
    """Times the calls that train with the planned batch."""

    def __init__(self) -> None:
        self._last: float | None = None
        self._seen = 0
        self._intervals: deque[float] = deque(maxlen=KEPT_STEPS)

    def tick(self, *, planned: bool) -> bool:
        """Note the start of a training call; True when the report has just become full.

        Args:
            planned: whether the batch is the plan's; others interrupt the measurement.
        """
        now = time.perf_counter()
        if planned and self._last is not None:
            self._seen += 1
            if self._seen > WARM_UP_STEPS:
                self._intervals.append(now - self._last)
        self._last = now if planned else None
        return self._seen == 2 * WARM_UP_STEPS and planned

    def report(self, plan: Plan, ranks: Ranks) -> ParallelReport:
        """What is known by now."""
        sizes = (ranks.mesh.size(axis) for axis in range(len(AXES)))
        first = ranks.place("pipeline")
        held = plan.stages[first :: plan.layout.pipeline]
        memory = None
        if ranks.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(ranks.device)
        return ParallelReport(
            mesh=dict(zip(AXES, sizes, strict=True)),
            stages=tuple(stage.index for stage in held),
            predicted_step_seconds=plan.prediction.step_seconds,
            measured_step_seconds=statistics.median(self._intervals) if self._intervals else None,
            # Every virtual stage of a rank carries the rank's whole peak.
            predicted_memory_bytes=max(stage.memory_bytes for stage in held),
            measured_memory_bytes=memory,
            measured_steps=len(self._intervals),
        )
