"""The records of a plan file: stages, prediction, proof, and what the plan was made for."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from paraplan.layout import Degree, Frozen, Layout, Precision, Recompute

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
Bytes = Annotated[int, Field(ge=0, strict=True)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, strict=True)]
Count = Annotated[int, Field(ge=0, strict=True)]


class MemoryParts(Frozen):
    """Bytes of one device at its peak, by what they hold; they add up to the stage's memory.

    Attributes:
        parameters: what the optimizer updates, fp32, this rank's shard (FSDP's sharded
            parameters; in bf16 and fp16 training these are the master weights).
        gradients: fp32, sharded or whole as ``zero_stage`` says.
        optimizer: the optimizer's state, this rank's shard.
        activations: what forward passes keep for backward, all micro-batches in flight.
        working: temporaries of the block being computed: recomputed activations, backward
            buffers, logits and loss.
        gathered_parameters: unsharded parameters in the compute dtype, and the buffers in which
            gradients are reduced, of the blocks that hold them at once.
        communication: buffers of communicators and of sends and receives.
        framework: device context, libraries' workspaces.
        fragmentation: reserved by the allocator and not usable.
    """

    parameters: Bytes
    gradients: Bytes
    optimizer: Bytes
    activations: Bytes
    working: Bytes
    gathered_parameters: Bytes
    communication: Bytes
    framework: Bytes
    fragmentation: Bytes

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(int(value) for value in self.__dict__.values())


class Stage(Frozen):
    """A contiguous run of the chain on one pipeline rank.

    Attributes:
        index: position in the pipeline; with virtual stages ``index = chunk * pipeline + rank``.
        pipeline_rank: the pipeline rank that holds it.
        modules: paths of the modules it owns, in order (embedding and head included).
        layers: number of repeated layers among them.
        recompute: the choice of each of those layers, in order.
        forward_seconds, backward_seconds: of one micro-batch; backward includes recomputation.
        recompute_seconds: of ``backward_seconds``, the forward run again.
        forward_exchange_seconds, backward_exchange_seconds: of each of them, collectives that the
            rank waits for (tensor, context, expert and data ranks).
        forward_overlapped_seconds, backward_overlapped_seconds: beside the computation of each of
            them, collectives of the data ranks that nobody waits for.
        first_overlapped_seconds, last_overlapped_seconds: once a step besides, in the first
            forward and the last backward.
        transfer_seconds: of one micro-batch to the next stage, one way; 0 behind the last.
        step_exchange_seconds, optimizer_seconds: once a step, of the whole pipeline rank (the
            same in each of its virtual stages): exposed gathers and reductions, the update.
        memory_bytes: predicted peak of one device of its pipeline rank. A rank that holds
            several virtual stages shows its whole peak in each of them.
        memory: the parts of ``memory_bytes``.
    """

    index: Annotated[int, Field(ge=0)]
    pipeline_rank: Annotated[int, Field(ge=0)]
    modules: tuple[str, ...]
    layers: Annotated[int, Field(ge=0)]
    recompute: tuple[Recompute, ...]
    forward_seconds: Seconds
    backward_seconds: Seconds
    recompute_seconds: Seconds = 0.0
    forward_exchange_seconds: Seconds = 0.0
    backward_exchange_seconds: Seconds = 0.0
    forward_overlapped_seconds: Seconds = 0.0
    backward_overlapped_seconds: Seconds = 0.0
    first_overlapped_seconds: Seconds = 0.0
    last_overlapped_seconds: Seconds = 0.0
    transfer_seconds: Seconds = 0.0
    step_exchange_seconds: Seconds = 0.0
    optimizer_seconds: Seconds = 0.0
    memory_bytes: Bytes
    memory: MemoryParts

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.recompute) != self.layers:
            raise ValueError(
                f"recompute names {len(self.recompute)} layers, the stage has {self.layers}"
            )
        if self.memory.total != self.memory_bytes:
            raise ValueError(
                f"memory parts add up to {self.memory.total}, memory_bytes is {self.memory_bytes}"
            )
        return self


class Breakdown(Frozen):
    """Where the step time goes, on the pipeline rank that decides it; adds up to the step.

    Attributes:
        forward, backward: computation; ``recompute``: the forward run again.
        launch: host time of small kernels that the device cannot hide.
        tensor_communication, context_communication, expert_communication: exposed.
        data_communication: exposed gathers and reductions over the data ranks.
        pipeline_communication: exposed transfers between stages.
        pipeline_bubble: idle while the pipeline fills, drains or waits for a slower stage.
        optimizer: the optimizer's update.
    """

    forward: Seconds
    backward: Seconds
    recompute: Seconds
    launch: Seconds
    tensor_communication: Seconds
    context_communication: Seconds
    expert_communication: Seconds
    data_communication: Seconds
    pipeline_communication: Seconds
    pipeline_bubble: Seconds
    optimizer: Seconds

    @property
    def total(self) -> float:
        """The sum of all parts, in seconds."""
        return math.fsum(self.__dict__.values())


class TimeBasis(Frozen):
    """Shares of the predicted computation time by what they rest on; they add up to 1.

    Attributes:
        measured: found in the profile's table of measured ops.
        interpolated: between measured ops.
        modelled: roofline with the profile's efficiencies.
    """

    measured: Share
    interpolated: Share
    modelled: Share


class Interval(Frozen):
    """Where the step time lies in most runs of this kind.

    Attributes:
        coverage: share of such runs whose measured time lay inside.
        low_seconds, high_seconds: the ends.
        kind: of run, by where the time goes.
        runs: measured runs that it rests on.
    """

    coverage: Annotated[float, Field(gt=0, lt=1)]
    low_seconds: Seconds
    high_seconds: Seconds
    kind: Annotated[str, Field(min_length=1)]
    runs: Annotated[int, Field(ge=0)]


class Prediction(Frozen):
    """What the layout is predicted to do.

    Attributes:
        step_seconds: one optimizer step over the global batch, by the closed form that the
            search minimises.
        simulated_seconds: the same step replayed event by event (`simulate`); None in plans that
            were written without it.
        tokens_per_second: of all devices together.
        mfu: model FLOPs (no recompute) over step time and the devices' dense peak rate.
        peak_memory_bytes: of the fullest device; ``capacity_bytes`` is what it may use.
        fits: whether every stage stays within the capacity.
    """

    step_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    simulated_seconds: Seconds | None = None
    tokens_per_second: Seconds
    mfu: Seconds
    peak_memory_bytes: Bytes
    capacity_bytes: Bytes
    fits: bool
    breakdown: Breakdown
    basis: TimeBasis
    interval: Interval | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        # Floats are written with nine digits, so sums of a dozen agree to about 1e-8.
        if abs(self.breakdown.total - self.step_seconds) > 1e-6 * self.step_seconds:
            raise ValueError(
                f"breakdown adds up to {self.breakdown.total:.9g}, step_seconds is "
                f"{self.step_seconds:.9g}"
            )
        if self.fits != (self.peak_memory_bytes <= self.capacity_bytes):
            raise ValueError("fits contradicts peak_memory_bytes and capacity_bytes")
        return self


class Proof(Frozen):
    """What is known about optimality, for the cost model.

    Attributes:
        status: ``optimal`` when nothing in the search space is faster by more than ``gap``;
            ``feasible`` when a limit stopped the solver; ``estimated`` when nothing was searched.
        bound_seconds: no layout in the search space can be faster: the smaller of the solver's
            own bound and the bounds of the layouts discarded before it.
        gap: (step - bound) / step.
        layouts_considered: layouts of the search space after divisibility rules;
            = bounded + infeasible + solved.
        layouts_bounded: discarded because a valid lower bound exceeds a feasible plan.
        layouts_infeasible: proven not to fit in memory.
        layouts_solved: handed to the integer program.
        excluded: impossible combinations by reason.
        solver: name of the integer-programming solver.
        seconds: spent on search and proof.
    """

    status: Literal["optimal", "feasible", "estimated"]
    bound_seconds: Seconds
    gap: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    layouts_considered: Count
    layouts_bounded: Count
    layouts_infeasible: Count
    layouts_solved: Count
    excluded: dict[str, Count]
    solver: str
    seconds: Seconds


class Workload(Frozen):
    """What is trained: sequences and tokens of one step, numerics, optimizer.

    ``precision`` bf16 and fp16 compute in that dtype with fp32 master weights and gradients
    reduced in fp32; ``optimizer`` names a row of ``workload.OPTIMIZER_STATE_BYTES``.
    """

    global_batch: Degree
    sequence_length: Degree
    precision: Precision
    optimizer: str


class ModelInfo(Frozen):
    """Which model the plan was made for."""

    name: str
    architecture: str
    config_sha256: str
    parameter_count: int
    trainable_parameter_count: int


class NodeKind(Frozen):
    """Equal nodes of a cluster that has two kinds of them."""

    device: str
    devices: Degree
    devices_per_node: Degree
    capacity_bytes: Bytes


class ClusterInfo(Frozen):
    """Which devices the plan was made for; the hashes are of the profile files' content.

    Attributes:
        kinds: where stages lie on two kinds of nodes, both, in the order of the ranks: ranks 0 to
            ``devices - 1`` of the first kind hold the first stages. Empty for one kind;
            ``device`` names both, ``devices_per_node`` is the smaller one.
    """

    name: str
    device: str
    devices: Degree
    devices_per_node: Degree
    nodes: Degree
    cluster_sha256: str
    device_sha256: str
    kinds: tuple[NodeKind, ...] = ()


class RunnerUp(Frozen):
    """A layout that was costed and not chosen; its stages and recompute at their best."""

    layout: Layout
    step_seconds: Seconds
    simulated_seconds: Seconds | None = None
    peak_memory_bytes: Bytes
