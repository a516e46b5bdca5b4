"""What was predicted beside what is measured."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

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
        measured_memory_bytes: peak use of this rank's GPU, context and communication included;
            on the CPU, the peak resident memory of the process, Python and torch included.
        measured_steps: how many the median is of.
    """

    mesh: dict[str, int]
    stages: tuple[int, ...]
    predicted_step_seconds: float
    measured_step_seconds: float | None
    predicted_memory_bytes: int
    measured_memory_bytes: int
    measured_steps: int

    def lines(self) -> list[str]:
        """The report as text."""
        measured = self.measured_step_seconds
        return [
            _mesh_line(self.mesh),
            HEADER,
            _row("step", "s", self.predicted_step_seconds, measured),
            _memory_row(self.stages, self.predicted_memory_bytes, self.measured_memory_bytes),
        ]


def start_lines(plan: Plan, ranks: Ranks) -> list[str]:
    """Mesh, plan and prediction of the whole job, before the first step."""
    layout = plan.layout
    batch = f"{layout.micro_batches} micro-batches of {layout.micro_batch_size} on each data rank"
    modes = sorted({mode for stage in plan.stages for mode in stage.recompute})
    return [
        _mesh_line(_mesh(ranks)),
        f"plan: {batch}; schedule {layout.schedule}, ZeRO stage {layout.zero_stage}, "
        f"{plan.workload.precision}, recompute {', '.join(modes) or 'none'}",
        HEADER,
        _row("step", "s", plan.prediction.step_seconds, None),
        *(_memory_row(*held, None) for held in _memory_by_rank(plan)),
    ]


def measured_lines(report: ParallelReport, plan: Plan, ranks: Ranks) -> list[str]:
    """Prediction and measurement of the whole job; every rank must call it."""
    mine = torch.zeros(plan.layout.pipeline, dtype=torch.int64, device=ranks.device)
    mine[ranks.place("pipeline")] = report.measured_memory_bytes
    dist.all_reduce(mine, op=dist.ReduceOp.MAX)
    rows = zip(_memory_by_rank(plan), mine.tolist(), strict=True)
    lines = [
        f"after {report.measured_steps + WARM_UP_STEPS} steps:",
        HEADER,
        _row("step", "s", report.predicted_step_seconds, report.measured_step_seconds),
        *(_memory_row(*held, measured) for held, measured in rows),
    ]
    if ranks.device.type == "cpu":
        lines.append("memory measured on the CPU is that of the whole process, torch included")
    return lines


HEADER = f"{'':28}{'predicted':>12}{'measured':>12}"


def _row(name: str, unit: str, predicted: float, measured: float | None) -> str:
    line = f"{name:28}{predicted:>{11 - len(unit)}.4g} {unit}"
    if measured is None:
        return line
    change = f"{measured / predicted - 1:>+8.0%}" if 0 < measured < 10 * predicted else ""
    return f"{line}{measured:>{11 - len(unit)}.4g} {unit}{change}"


def _memory_row(stages: Sequence[int], predicted: int, measured: int | None) -> str:
    name = "memory, stage " + ", ".join(str(stage) for stage in stages)
    if len(name) > 27:
        name = f"memory, stages {stages[0]} to {stages[-1]}"
    return _row(name, "GiB", predicted / 2**30, None if measured is None else measured / 2**30)


def _memory_by_rank(plan: Plan) -> list[tuple[tuple[int, ...], int]]:
    """Stages and predicted memory of each pipeline rank."""
    pipeline = plan.layout.pipeline
    held = [plan.stages[rank::pipeline] for rank in range(pipeline)]
    # Every virtual stage of a rank carries the rank's whole peak.
    return [(tuple(s.index for s in stages), stages[0].memory_bytes) for stages in held]


def _mesh(ranks: Ranks) -> dict[str, int]:
    return dict(zip(AXES, (ranks.mesh.size(axis) for axis in range(len(AXES))), strict=True))


def _mesh_line(mesh: dict[str, int]) -> str:
    text = " x ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1)
    return f"mesh: {text or 'one device'}"


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # Beside torch's allocator: the context, communication buffers.
        beside = total - free - torch.cuda.memory_reserved(device)
        return torch.cuda.max_memory_reserved(device) + beside
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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
        stages, predicted = _memory_by_rank(plan)[ranks.place("pipeline")]
        return ParallelReport(
            mesh=_mesh(ranks),
            stages=stages,
            predicted_step_seconds=plan.prediction.step_seconds,
            measured_step_seconds=statistics.median(self._intervals) if self._intervals else None,
            predicted_memory_bytes=predicted,
            measured_memory_bytes=_peak_memory_bytes(ranks.device),
            measured_steps=len(self._intervals),
        )
