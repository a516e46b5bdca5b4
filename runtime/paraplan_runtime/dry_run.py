"""A plan applied to the real model on one process, for one rank of each stage, without data.

The whole runtime runs as in training, on tensors that have shapes and no contents, in a process
group of which this rank alone exists: module paths resolve, shapes divide, the schedule
completes, the optimizer steps. torch's ``MemTracker`` counts every storage. The optimizer has
its state from the start, as it has in every step but the first. A second, equal step stops where
the first had its peak and looks who holds what there.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from paraplan.errors import InputError
from paraplan.plan_file import Plan
from paraplan_runtime.apply import parallelize
from paraplan_runtime.gradients import local
from paraplan_runtime.memory_tracker import Peak, PeakTracker
from paraplan_runtime.model import ParallelModel
from paraplan_runtime.rehearsal import imagined_pipeline

OPTIMIZERS: Mapping[str, Callable[[Any], torch.optim.Optimizer]] = {
    # On a GPU torch's optimizers work on all parameters at once by default; on a CPU one by one.
    "adamw": lambda parameters: torch.optim.AdamW(parameters, foreach=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, foreach=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, foreach=True),
    "sgd-momentum": lambda parameters: torch.optim.SGD(
        parameters, lr=0.1, momentum=0.9, foreach=True
    ),
}


@dataclass(frozen=True)
class Rehearsed:
    """What one rank did.

    Attributes:
        rank: its number in the job.
        micro_batches: of the steps that ran.
        peak_bytes: most memory alive at once in a step.
        parts: the same by what holds it (fields of ``plan_parts.MemoryParts``).
        optimizer_peak_bytes: most memory alive in the optimizer's step.
    """

    rank: int
    micro_batches: int
    peak_bytes: int
    parts: Mapping[str, int]
    optimizer_peak_bytes: int


def enough_micro_batches(plan: Plan) -> int:
    """The fewest micro-batches that show a step's peak.

    A pipeline rank keeps at most ``pipeline`` micro-batches in flight (1F1B), so one more than
    that has a first backward behind it at full flight; interleaved schedules run whole rounds.
    """
    layout = plan.layout
    if layout.pipeline == 1:
        return min(layout.micro_batches, 2)
    if layout.virtual_stages == 1:
        return min(layout.micro_batches, layout.pipeline + 1)
    wanted = 3 * layout.pipeline
    return layout.micro_batches if layout.micro_batches <= wanted else wanted


def with_micro_batches(plan: Plan, micro_batches: int) -> Plan:
    """The plan for a smaller batch of as many micro-batches."""
    layout = plan.layout.model_copy(update={"micro_batches": micro_batches})
    workload = plan.workload.model_copy(update={"global_batch": layout.global_batch})
    return plan.model_copy(update={"layout": layout, "workload": workload})


def rehearse(
    plan: Plan,
    pipeline_rank: int,
    model: nn.Module,
    inputs: Callable[[int], Mapping[str, torch.Tensor]],
    *,
    micro_batches: int | None = None,
) -> Rehearsed:
    """Run one rank of a plan without data.

    Args:
        pipeline_rank: whose stages; its first rank is taken, all others do the same.
        model: on the meta device; it is taken apart.
        inputs: rows -> the arguments of the model's forward, labels included, on meta.
        micro_batches: of a step (default: `enough_micro_batches`).

    Raises:
        InputError: the plan cannot be applied, with the reason.
    """
    make = OPTIMIZERS.get(plan.workload.optimizer)
    if make is None:
        raise InputError(
            f"the dry run knows no optimizer {plan.workload.optimizer!r}",
            hint=f"one of {', '.join(OPTIMIZERS)}",
        )
    short = with_micro_batches(plan, micro_batches or enough_micro_batches(plan))
    layout = short.layout
    rank = pipeline_rank * (layout.devices // layout.pipeline)
    batch = inputs(layout.global_batch)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with _imagined_job(rank, layout.devices), imagined_pipeline(), fake, _without_torchs_log():
        parallel = parallelize(model, short, device_type="cpu")
        shards = _Shards(parallel)
        optimizer = make(shards.plain)
        rows = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in batch.items()}
        _make_state(shards, optimizer)
        tracker = PeakTracker(parallel, optimizer)
        with tracker:
            peak = _find_peak(lambda: _step(parallel, shards, optimizer, rows), tracker)
    return Rehearsed(
        rank=rank,
        micro_batches=layout.micro_batches,
        peak_bytes=peak.peak_bytes,
        parts=tracker.parts,
        optimizer_peak_bytes=peak.optimizer_peak_bytes,
    )


@contextmanager
def _without_torchs_log() -> Iterator[None]:
    """A step that fails raises what is wrong; torch would print its traceback as well.

    And it would warn of views that a model might overwrite: nothing here depends on gradients.
    """
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*returned a view tensor")
            yield
    finally:
        log.setLevel(level)


def _find_peak(step: Callable[[], None], tracker: PeakTracker) -> Peak:
    """Run a whole step, and another to where the one before had its peak."""
    peak = tracker.peak_of(step)
    while (lower := tracker.parts_at(step, peak)) is not None:
        peak = lower
    return peak


class _Shards:
    """This rank's trainable shards, as the optimizer gets them: plain tensors.

    It changes them element by element, which needs no word of how they lie on other ranks. DTensor
    would work that out for each call's list of shards, in some seconds for each dozen layers.
    """

    def __init__(self, model: ParallelModel) -> None:
        self.trained = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            self.plain = [nn.Parameter(local(p)) for p in self.trained]

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """Update with the gradients that there are, and forget them."""
        for plain, parameter in zip(self.plain, self.trained, strict=True):
            plain.grad = None if parameter.grad is None else local(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
        for parameter in self.trained:
            parameter.grad = None


def _make_state(shards: _Shards, optimizer: torch.optim.Optimizer) -> None:
    """Update once with gradients of zero: from the second step on the state exists.

    They are clipped too: DTensor makes tensors of full size to see what that does, once.
    """
    for parameter in shards.trained:
        parameter.grad = torch.zeros_like(parameter)
    torch.nn.utils.clip_grads_with_norm_(shards.trained, 1.0, torch.ones(()))
    shards.update(optimizer)


def _step(
    model: ParallelModel,
    shards: _Shards,
    optimizer: torch.optim.Optimizer,
    rows: Mapping[str, torch.Tensor],
) -> None:
    output = model(**rows)
    loss = output if isinstance(output, torch.Tensor) else output.loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    shards.update(optimizer)


@contextmanager
def _imagined_job(rank: int, world_size: int) -> Iterator[None]:
    """A process group in which the other ranks are only imagined."""
    if dist.is_initialized():
        raise InputError("a dry run needs a process of its own: a process group exists already")
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
