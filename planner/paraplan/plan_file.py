"""The plan file: what was decided, what it is predicted to do, and why. Reads and writes it.

The runtime and other tools read plans through this module only. A plan is data: JSON with one
record a line, stable key order, no paths and no timestamps, so that two plans diff well. A file
that is broken, of a newer format or inconsistent in itself is refused in one line.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from paraplan.errors import InputError

FORMAT = 1
SCHEMA_ID = "urn:paraplan:plan:1"
MAX_FILE_BYTES = 64 * 2**20

Recompute = Literal["none", "selective", "full"]
Schedule = Literal["none", "1f1b", "interleaved-1f1b"]
Precision = Literal["bf16", "fp16", "fp32"]
Degree = Annotated[int, Field(ge=1, le=2**24)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
Bytes = Annotated[int, Field(ge=0, strict=True)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, strict=True)]
Count = Annotated[int, Field(ge=0, strict=True)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Layout(_Frozen):
    """The degrees and the schedule; every device group follows from them.

    The mesh, outermost first: pipeline, data_replicate, data_shard, context, tensor.
    ``data_replicate * data_shard * context * tensor * pipeline`` = number of devices.

    Attributes:
        expert: divides ``data_replicate * data_shard * context``; experts spread over it.
        micro_batch_size: sequences of one micro-batch on one data-parallel rank.
        micro_batches: micro-batches of one step on one data-parallel rank.
        schedule: ``none`` without pipeline; gradients accumulate over the micro-batches.
        virtual_stages: contiguous chunks each pipeline rank holds (1 unless interleaved).
        sequence_parallel: norms and residuals split along the sequence over the tensor ranks.
        zero_stage: what ``data_shard`` splits. 1: optimizer state; 2: gradients too, reduced
            after each micro-batch; 3: parameters too, gathered for each forward and backward.
            0 exactly when ``data_shard`` is 1.
    """

    data_replicate: Degree = 1
    data_shard: Degree = 1
    tensor: Degree = 1
    context: Degree = 1
    expert: Degree = 1
    pipeline: Degree = 1
    virtual_stages: Degree = 1
    micro_batch_size: Degree = 1
    micro_batches: Degree = 1
    schedule: Schedule = "none"
    sequence_parallel: bool = False
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0

    @property
    def devices(self) -> int:
        """Number of devices the layout needs."""
        return self.data_ranks * self.context * self.tensor * self.pipeline

    @property
    def data_ranks(self) -> int:
        """Ranks that read different sequences."""
        return self.data_replicate * self.data_shard

    @property
    def global_batch(self) -> int:
        """Sequences of one optimizer step."""
        return self.data_ranks * self.micro_batch_size * self.micro_batches

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        ranks = self.data_ranks * self.context
        if ranks % self.expert:
            raise ValueError(
                f"expert({self.expert}) does not divide data * context ranks ({ranks})"
            )
        if (self.data_shard > 1) != (self.zero_stage > 0):
            raise ValueError(
                f"zero_stage({self.zero_stage}) does not go with data_shard({self.data_shard}): "
                "it is 0 exactly when data_shard is 1"
            )
        if (self.pipeline > 1) != (self.schedule != "none"):
            raise ValueError(
                f"schedule {self.schedule!r} does not go with pipeline({self.pipeline})"
            )
        if (self.virtual_stages > 1) != (self.schedule == "interleaved-1f1b"):
            raise ValueError(
                f"schedule {self.schedule!r} does not go with virtual_stages({self.virtual_stages})"
            )
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError("sequence_parallel needs tensor above 1")
        return self


class MemoryParts(_Frozen):
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


class Stage(_Frozen):
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


class Breakdown(_Frozen):
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


class TimeBasis(_Frozen):
    """Shares of the predicted computation time by what they rest on; they add up to 1.

    Attributes:
        measured: found in the profile's table of measured ops.
        interpolated: between measured ops.
        modelled: roofline with the profile's efficiencies.
    """

    measured: Share
    interpolated: Share
    modelled: Share


class Interval(_Frozen):
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


class Prediction(_Frozen):
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


class Proof(_Frozen):
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


class Workload(_Frozen):
    """What is trained: sequences and tokens of one step, numerics, optimizer.

    ``precision`` bf16 and fp16 compute in that dtype with fp32 master weights and gradients
    reduced in fp32; ``optimizer`` names a row of ``workload.OPTIMIZER_STATE_BYTES``.
    """

    global_batch: Degree
    sequence_length: Degree
    precision: Precision
    optimizer: str


class ModelInfo(_Frozen):
    """Which model the plan was made for."""

    name: str
    architecture: str
    config_sha256: str
    parameter_count: int
    trainable_parameter_count: int


class NodeKind(_Frozen):
    """Equal nodes of a cluster that has two kinds of them."""

    device: str
    devices: Degree
    devices_per_node: Degree
    capacity_bytes: Bytes


class ClusterInfo(_Frozen):
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


class RunnerUp(_Frozen):
    """A layout that was costed and not chosen; its stages and recompute at their best."""

    layout: Layout
    step_seconds: Seconds
    simulated_seconds: Seconds | None = None
    peak_memory_bytes: Bytes


class Plan(_Frozen):
    """A plan; see the module's docstring and ``docs/plan-file.md``."""

    format: Literal[1] = 1
    tool_version: str
    model: ModelInfo
    workload: Workload
    cluster: ClusterInfo
    layout: Layout
    mesh: tuple[tuple[str, int], ...]
    needs_unsupported: tuple[str, ...] = ()
    stages: tuple[Stage, ...]
    prediction: Prediction
    proof: Proof
    runner_ups: tuple[RunnerUp, ...] = ()
    assumptions: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        layout, cluster, workload = self.layout, self.cluster, self.workload
        if layout.devices != cluster.devices:
            raise ValueError(
                f"data_replicate({layout.data_replicate}) * data_shard({layout.data_shard}) * "
                f"tensor({layout.tensor}) * context({layout.context}) * "
                f"pipeline({layout.pipeline}) != devices({cluster.devices})"
            )
        if cluster.kinds and sum(kind.devices for kind in cluster.kinds) != cluster.devices:
            raise ValueError("devices of the cluster's kinds do not add up to its devices")
        if any(kind.devices % (layout.devices // layout.pipeline) for kind in cluster.kinds):
            raise ValueError("a stage lies on both kinds of devices")
        if layout.global_batch != workload.global_batch:
            raise ValueError(
                f"data ranks({layout.data_ranks}) * micro_batch_size({layout.micro_batch_size}) * "
                f"micro_batches({layout.micro_batches}) != global_batch({workload.global_batch})"
            )
        wanted = layout.pipeline * layout.virtual_stages
        if len(self.stages) != wanted:
            raise ValueError(f"{len(self.stages)} stages, the layout wants {wanted}")
        for index, stage in enumerate(self.stages):
            if stage.index != index or stage.pipeline_rank != index % layout.pipeline:
                raise ValueError(f"stage {index} has the wrong index or pipeline_rank")
        paths = [path for stage in self.stages for path in stage.modules]
        if len(set(paths)) != len(paths):
            raise ValueError("a module path stands in two stages")
        fullest = max(stage.memory_bytes for stage in self.stages)
        if fullest != self.prediction.peak_memory_bytes:
            raise ValueError(
                f"peak_memory_bytes is {self.prediction.peak_memory_bytes}, the fullest stage "
                f"has {fullest}"
            )
        if tuple(self.mesh) != mesh_axes(layout):
            raise ValueError("mesh does not follow from layout")
        return self


def kind_of(plan: Plan, pipeline_rank: int) -> NodeKind | None:
    """The kind of nodes that holds a pipeline rank; None where there is only one."""
    end = 0
    for kind in plan.cluster.kinds:
        end += kind.devices * plan.layout.pipeline // plan.layout.devices
        if pipeline_rank < end:
            return kind
    return None


def capacity_of(plan: Plan, pipeline_rank: int) -> int:
    """Bytes that a plan may use of a device that holds a pipeline rank."""
    kind = kind_of(plan, pipeline_rank)
    return plan.prediction.capacity_bytes if kind is None else kind.capacity_bytes


def device_of(plan: Plan, pipeline_rank: int) -> str:
    """Name of the devices that hold a pipeline rank."""
    kind = kind_of(plan, pipeline_rank)
    return plan.cluster.device if kind is None else kind.device


# What the runtime cannot apply yet: the one list that planner and runtime both read. Everything
# else in `Layout` is applied.
RUNTIME_CANNOT_APPLY_YET = ("context", "expert")
"""Layout fields that the runtime refuses above 1; the planner searches them only on request."""

RUNTIME_CANNOT_SPLIT: dict[str, tuple[str, ...]] = {
    "BertForMaskedLM": ("tensor", "pipeline"),
    "ViTForImageClassification": ("tensor", "pipeline"),
    "T5ForConditionalGeneration": ("tensor", "pipeline"),
    "Phi3ForCausalLM": ("tensor",),
}
"""Architecture -> axes along which the runtime does not split it: it has no tensor-parallel plan
that the runtime reads, or its stages were not shown to train like the whole model."""


def too_few_micro_batches(pipeline: int) -> str:
    """Why torch's 1F1B schedules refuse fewer micro-batches than stages."""
    return f"1F1B wants at least as many micro_batches as stages, pipeline({pipeline})"


def unsupported_fields(layout: Layout) -> tuple[str, ...]:
    """The fields of a layout that the runtime cannot apply yet."""
    return tuple(name for name in RUNTIME_CANNOT_APPLY_YET if getattr(layout, name) > 1)


def mesh_axes(layout: Layout) -> tuple[tuple[str, int], ...]:
    """The device mesh of a layout, outermost axis first; the last axis's ranks are neighbours."""
    return (
        ("pipeline", layout.pipeline),
        ("data_replicate", layout.data_replicate),
        ("data_shard", layout.data_shard),
        ("context", layout.context),
        ("tensor", layout.tensor),
    )


def plan_to_json(plan: Plan) -> str:
    """The plan as JSON text, one record a line, key order as declared."""
    data = {"$schema": SCHEMA_ID} | plan.model_dump(mode="json")
    lines = []
    for key, value in data.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            rows = ",\n".join(f"    {json.dumps(row)}" for row in value)
            lines.append(f"  {json.dumps(key)}: [\n{rows}\n  ]")
        elif isinstance(value, dict):
            rows = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            lines.append(f"  {json.dumps(key)}: {{\n{rows}\n  }}")
        else:
            lines.append(f"  {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def plan_from_json(text: str | bytes, *, name: str = "plan") -> Plan:
    """Parse and check a plan.

    Raises:
        InputError: the text is not a plan of this format, in one line that starts with ``name``.
    """
    try:
        data: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{name}: not a plan: a JSON object is expected")
    if not isinstance(data.pop("$schema", SCHEMA_ID), str):
        raise InputError(f"{name}: $schema is not a string")
    layout = data.get("layout")
    if isinstance(layout, dict):
        for field in Layout.model_fields:
            if field not in layout:
                raise InputError(f"{name}: layout.{field} is missing")
    version = data.get("format")
    if version != FORMAT or isinstance(version, bool):
        raise InputError(
            f"{name}: format is {_short(version)}, this version of paraplan reads {FORMAT}",
            hint="make the plan again with `plan`, or install the version that wrote it",
        )
    try:
        return Plan.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{name}: {describe_validation_error(error)}") from None


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan file.

    Raises:
        InputError: it cannot be read or is not a consistent plan.
    """
    return plan_from_json(read_small_file(path, "plan"), name=str(path))


def read_small_file(path: str | os.PathLike[str], what: str) -> bytes:
    """The bytes of a regular file of at most ``MAX_FILE_BYTES``.

    Raises:
        InputError: missing, unreadable, not a file, or too large.
    """
    file = Path(path)
    try:
        size = file.stat().st_size
        if not file.is_file():
            raise InputError(f"{path}: not a regular {what} file")
        if size > MAX_FILE_BYTES:
            raise InputError(f"{path}: {size} bytes is too large for a {what} file")
        return file.read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: cannot read the {what} file: {reason}") from None


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write a file whole or not at all: a temporary file beside it, then a rename.

    Raises:
        InputError: the place cannot be written.
    """
    target = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise InputError(f"{path}: cannot write: {error.strerror}") from None


def save_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write a plan file; the old one stays if that fails."""
    write_atomically(path, plan_to_json(plan))


def plan_schema() -> dict[str, Any]:
    """JSON Schema of the plan file (``docs/plan.schema.json`` is this)."""
    schema = Plan.model_json_schema()
    schema["properties"] = {"$schema": {"type": "string"}} | schema["properties"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA_ID,
    } | schema


def describe_validation_error(error: ValidationError) -> str:
    """The first problem in one line: where it is, what stands there, what is wanted."""
    first = error.errors(include_url=False)[0]
    place = "".join(
        f"[{part}]" if isinstance(part, int) else f".{_cut(part)}" for part in first["loc"]
    ).lstrip(".")
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if first["type"] == "missing":
        return f"{place} is missing"
    if first["type"] == "extra_forbidden":
        return f"{place} is not a known field"
    if first["type"] == "value_error":
        return f"{place}: {message}" if place else message
    return f"{place} is {_short(first['input'])}: {message}"


def _short(value: Any) -> str:
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
