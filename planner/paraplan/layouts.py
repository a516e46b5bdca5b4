"""Enumerates the layouts worth costing, and says why the others are impossible.

A combination is impossible when a rule below gives a reason for it; it is then counted under
that reason and never costed. Everything else is the search space that the proof speaks of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from math import prod
from typing import Any

from pydantic import ValidationError

from paraplan.errors import InputError
from paraplan.graph import RECOMPUTE_MODES, ModelGraph, Recompute
from paraplan.plan_file import (
    RUNTIME_CANNOT_SPLIT,
    Layout,
    Schedule,
    describe_validation_error,
    too_few_micro_batches,
)

FIXABLE = (*Layout.model_fields, "recompute")
"""The keys that ``--fix`` takes."""


@dataclass(frozen=True)
class Constraints:
    """What the user pinned, and what beyond the runtime's abilities may be searched.

    Attributes:
        fixed: layout field -> value.
        recompute: the recompute modes that layers may use.
        allow: fields of ``RUNTIME_CANNOT_APPLY_YET`` to search as well.
    """

    fixed: Mapping[str, Any] = field(default_factory=dict)
    recompute: tuple[Recompute, ...] = RECOMPUTE_MODES
    allow: tuple[str, ...] = ()

    def permits(self, name: str, value: object) -> bool:
        """Whether a layout field may take this value."""
        return name not in self.fixed or self.fixed[name] == value


@dataclass(frozen=True)
class Space:
    """The size of what is to be laid out.

    Attributes:
        devices, devices_per_node: of the cluster.
        global_batch: sequences of one step.
        kinds: devices of each kind, where there are two: stages lie on one kind or the other.
    """

    graph: ModelGraph
    devices: int
    devices_per_node: int
    global_batch: int
    kinds: tuple[int, ...] = ()

    @cached_property
    def blocks(self) -> int:
        """Chain items."""
        return len(self.graph.chain)

    @cached_property
    def plain(self) -> bool:
        """Whether one run of layers stands between embedding and head."""
        return all(block.role != "bridge" for block in self.graph.blocks.values())

    @cached_property
    def layers(self) -> int:
        """Repeated layers among them, the most stages that a pipeline can have."""
        graph = self.graph
        return sum(graph.blocks[item.block].role == "layer" for item in graph.chain)


@cache
def divisors(number: int) -> tuple[int, ...]:
    """All divisors, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return tuple(sorted({*small, *(number // d for d in small)}))


def tensor_degrees(devices_per_node: int) -> tuple[int, ...]:
    """Tensor degrees to trace: those whose groups tile a node, up to 16.

    1, 2, 4 and 8 always are, so that clusters of usual nodes share one cached trace.
    """
    return tuple(sorted({1, 2, 4, 8, *(d for d in divisors(devices_per_node) if d <= 16)}))


@dataclass(frozen=True)
class Family:
    """Layouts that differ only in how the data ranks replicate and shard the model state.

    They compute and keep the same activations, so one bound on time and memory serves all.

    Attributes:
        base: the layout with all data ranks replicated.
        splits: (data_replicate, data_shard, zero_stage) of each member.
    """

    base: Layout
    splits: tuple[tuple[int, int, int], ...]

    def layout(self, split: tuple[int, int, int]) -> Layout:
        """The member with this split of the data ranks."""
        replicate, shard, zero_stage = split
        return self.base.model_copy(
            update={"data_replicate": replicate, "data_shard": shard, "zero_stage": zero_stage}
        )


def enumerate_families(space: Space, constraints: Constraints) -> tuple[list[Family], Counter[str]]:
    """All possible layouts in families, and the impossible combinations by reason."""
    excluded: Counter[str] = Counter()
    families = [
        family
        for mesh in _meshes(space, constraints, excluded)
        for family in _fill_mesh(space, constraints, mesh, excluded)
    ]
    return families, excluded


def check_layout(space: Space, layout: Layout) -> str | None:
    """Why a layout is impossible for this model, batch and cluster; None when it is possible."""
    if layout.devices != space.devices:
        return (
            f"data_replicate({layout.data_replicate}) * data_shard({layout.data_shard}) * "
            f"tensor({layout.tensor}) * context({layout.context}) * pipeline({layout.pipeline}) "
            f"= {layout.devices}, not {space.devices} devices"
        )
    if layout.global_batch != space.global_batch:
        return (
            f"data ranks({layout.data_ranks}) * micro_batch_size({layout.micro_batch_size}) * "
            f"micro_batches({layout.micro_batches}) = {layout.global_batch}, not the global batch "
            f"of {space.global_batch}"
        )
    return (
        _mesh_reason(space, layout.tensor, layout.context, layout.expert, layout.pipeline)
        or _kinds_reason(space, layout.pipeline)
        or _data_reason(space, layout.data_ranks)
        or _schedule_reason(space, layout.pipeline, layout.virtual_stages, layout.micro_batches)
    )


def pin_reason(space: Space, constraints: Constraints) -> str | None:
    """Why what the user pinned cannot be, whatever else is chosen; None if no rule says so."""
    fixed = constraints.fixed
    axes = ("data_replicate", "data_shard", "context", "tensor", "pipeline")
    pinned = {name: fixed[name] for name in axes if name in fixed}
    words = " * ".join(f"{name}({value})" for name, value in pinned.items())
    product = prod(pinned.values())
    if space.devices % product or (len(pinned) == len(axes) and product != space.devices):
        return f"{words} = {product} does not go into {space.devices} devices"
    tensor, pipeline = fixed.get("tensor", 1), fixed.get("pipeline", 1)
    reason = _mesh_reason(space, tensor, fixed.get("context", 1), fixed.get("expert", 1), pipeline)
    if reason is None and "pipeline" in fixed:
        reason = _kinds_reason(space, pipeline)
    if reason:
        return reason
    sharing = ("data_replicate", "data_shard", "micro_batch_size", "micro_batches")
    batch = {name: fixed[name] for name in sharing if name in fixed}
    if space.global_batch % prod(batch.values()):
        words = " * ".join(f"{name}({value})" for name, value in batch.items())
        return f"global batch {space.global_batch} is not a multiple of {words}"
    return _pinned_choices_reason(space, fixed)


def _pinned_choices_reason(space: Space, fixed: Mapping[str, Any]) -> str | None:
    if "zero_stage" in fixed and "data_shard" in fixed:
        zero, shard = fixed["zero_stage"], fixed["data_shard"]
        if (shard > 1) != (zero > 0):
            return f"zero_stage({zero}) does not go with data_shard({shard}): 0 exactly for 1"
    schedule, pipeline = fixed.get("schedule"), fixed.get("pipeline")
    if schedule and pipeline and (schedule == "none") != (pipeline == 1):
        return f"schedule {schedule} does not go with pipeline({pipeline})"
    virtual = fixed.get("virtual_stages", 1)
    if virtual > 1 and pipeline and interleaved_chunks(space.graph, pipeline * virtual) is None:
        return _schedule_reason(space, pipeline, virtual, pipeline)
    if virtual > 1 and 2 * virtual > space.layers:
        return f"virtual_stages({virtual}) exceeds the layers of two stages ({space.layers})"
    if fixed.get("sequence_parallel") and fixed.get("tensor") == 1:
        return "sequence_parallel needs tensor above 1"
    return None


def _mesh_reason(space: Space, tensor: int, context: int, expert: int, pipeline: int) -> str | None:
    graph = space.graph
    if tensor > 1 and space.devices_per_node % tensor:
        return f"tensor({tensor}) groups do not tile nodes of {space.devices_per_node} devices"
    if tensor in graph.tensor_limits:
        return graph.tensor_limits[tensor]
    split = (("tensor", tensor), ("pipeline", pipeline))
    for name in (name for name, degree in split if degree > 1):
        if name in RUNTIME_CANNOT_SPLIT.get(graph.architecture, ()):
            return f"the runtime cannot apply {name} parallelism to {graph.architecture} yet"
    if tensor > 1 and any(tensor not in block.variants for block in graph.blocks.values()):
        return f"tensor({tensor}) was not traced for {graph.name}"
    if space.graph.sequence_length % (2 * context) and context > 1:
        return f"sequence length {graph.sequence_length} does not divide over context({context})"
    if expert > 1 and (not graph.experts or graph.experts % expert):
        return f"{graph.experts} experts do not divide over expert({expert})"
    if pipeline > 1 and graph.pipeline_limit:
        return graph.pipeline_limit
    if pipeline > max(1, space.layers):
        return f"pipeline({pipeline}) has more stages than the model has layers ({space.layers})"
    return None


def _kinds_reason(space: Space, pipeline: int) -> str | None:
    if any(devices % (space.devices // pipeline) for devices in space.kinds):
        kinds = " and ".join(map(str, space.kinds))
        return f"pipeline({pipeline}) has a stage on both kinds of devices ({kinds}) at once"
    return None


def _data_reason(space: Space, data_ranks: int) -> str | None:
    if space.global_batch % data_ranks:
        return f"global batch {space.global_batch} does not divide over {data_ranks} data ranks"
    return None


def _schedule_reason(
    space: Space, pipeline: int, virtual_stages: int, micro_batches: int
) -> str | None:
    if pipeline > 1 and micro_batches < pipeline:
        return too_few_micro_batches(pipeline)
    if virtual_stages == 1:
        return None
    if space.kinds:
        return "interleaved chunks are of equal size, which suits no two kinds of devices"
    if interleaved_chunks(space.graph, pipeline * virtual_stages) is None:
        return (
            f"interleaved chunks are of equal size: {space.layers} layers do not divide over "
            f"pipeline({pipeline}) * virtual_stages({virtual_stages})"
        )
    return _interleaving_reason(pipeline) if micro_batches % pipeline else None


def _interleaving_reason(pipeline: int) -> str:
    return f"interleaving wants micro_batches in multiples of pipeline({pipeline})"


def interleaved_chunks(graph: ModelGraph, chunks: int) -> tuple[int, ...] | None:
    """Where equal chunks of the chain begin, or None if it does not divide.

    Either every block of the chain counts (as Llama 3 counted embedding and head as a layer
    each), or the repeated layers alone do, embedding and head joining the end chunks. Every
    chunk holds a layer.
    """
    roles = [graph.blocks[item.block].role for item in graph.chain]
    layers = [i for i, role in enumerate(roles) if role == "layer"]
    size = len(roles) // chunks
    if len(roles) % chunks == 0 and size > 1 and "bridge" not in roles:
        return tuple(range(0, len(roles), size))
    if not layers or len(layers) % chunks:
        return None
    begins = layers[:: len(layers) // chunks][1:]
    return (0, *(i - 1 if roles[i - 1] == "bridge" else i for i in begins))


@dataclass(frozen=True)
class _Mesh:
    tensor: int
    context: int
    expert: int
    pipeline: int
    data_ranks: int


def _meshes(space: Space, constraints: Constraints, excluded: Counter[str]) -> Iterator[_Mesh]:
    def degrees(name: str, limit: int, searched: bool = True) -> list[int]:
        if name in constraints.fixed:
            return [constraints.fixed[name]] if limit % constraints.fixed[name] == 0 else []
        return list(divisors(limit)) if searched else [1]

    for pipeline in degrees("pipeline", space.devices):
        for tensor in degrees("tensor", space.devices // pipeline):
            rest = space.devices // pipeline // tensor
            for context in degrees("context", rest, "context" in constraints.allow):
                data_ranks = rest // context
                for expert in degrees("expert", rest, "expert" in constraints.allow):
                    reason = (
                        _mesh_reason(space, tensor, context, expert, pipeline)
                        or _kinds_reason(space, pipeline)
                        or _data_reason(space, data_ranks)
                    )
                    if reason:
                        excluded[reason] += 1
                    else:
                        yield _Mesh(tensor, context, expert, pipeline, data_ranks)


def _fill_mesh(
    space: Space, constraints: Constraints, mesh: _Mesh, excluded: Counter[str]
) -> Iterator[Family]:
    permits = constraints.permits
    splits = tuple(
        (mesh.data_ranks // shard, shard, zero_stage)
        for shard in divisors(mesh.data_ranks)
        if permits("data_shard", shard) and permits("data_replicate", mesh.data_ranks // shard)
        for zero_stage in ((1, 2, 3) if shard > 1 else (0,))
        if permits("zero_stage", zero_stage)
    )
    if not splits:
        return
    per_rank = space.global_batch // mesh.data_ranks
    for size, count, schedule, virtual in _schedules(space, mesh, per_rank, permits, excluded):
        for sequence_parallel in (False, True) if mesh.tensor > 1 else (False,):
            if permits("sequence_parallel", sequence_parallel):
                base = Layout.model_construct(
                    data_replicate=mesh.data_ranks,
                    data_shard=1,
                    tensor=mesh.tensor,
                    context=mesh.context,
                    expert=mesh.expert,
                    pipeline=mesh.pipeline,
                    virtual_stages=virtual,
                    micro_batch_size=size,
                    micro_batches=count,
                    schedule=schedule,
                    sequence_parallel=sequence_parallel,
                    zero_stage=0,
                )
                yield Family(base, splits)


def _schedules(
    space: Space,
    mesh: _Mesh,
    per_rank: int,
    permits: Callable[[str, object], bool],
    excluded: Counter[str],
) -> Iterator[tuple[int, int, Schedule, int]]:
    """Micro-batch size and number, schedule and virtual stages that go with a mesh."""
    virtuals = _virtual_stage_counts(space.blocks, space.layers, space.plain, mesh.pipeline)
    if space.kinds:
        virtuals = ()
    for size in divisors(per_rank):
        count = per_rank // size
        if not (permits("micro_batch_size", size) and permits("micro_batches", count)):
            continue
        if mesh.pipeline == 1:
            if permits("schedule", "none") and permits("virtual_stages", 1):
                yield size, count, "none", 1
            continue
        if count < mesh.pipeline:
            excluded[too_few_micro_batches(mesh.pipeline)] += 1
            continue
        if permits("schedule", "1f1b") and permits("virtual_stages", 1):
            yield size, count, "1f1b", 1
        if not permits("schedule", "interleaved-1f1b"):
            continue
        for virtual in virtuals:
            if not permits("virtual_stages", virtual):
                continue
            if count % mesh.pipeline:
                excluded[_interleaving_reason(mesh.pipeline)] += 1
            else:
                yield size, count, "interleaved-1f1b", virtual


@cache
def _virtual_stage_counts(blocks: int, layers: int, plain: bool, pipeline: int) -> tuple[int, ...]:
    """The virtual-stage counts whose chunks are equal (the rule of `interleaved_chunks`)."""
    counts = range(2, layers // pipeline + 1)
    return tuple(
        v
        for v in counts
        if (plain and blocks % (pipeline * v) == 0 and blocks > pipeline * v)
        or layers % (pipeline * v) == 0
    )


def layout_from_fixed(fixed: Mapping[str, Any], *, global_batch: int) -> Layout:
    """The layout that ``plan estimate`` is asked about; what is left out follows or is 1.

    ``data_shard`` above 1 means ``zero_stage`` 3, ``pipeline`` above 1 means ``1f1b``, or
    interleaved with ``virtual_stages``; ``micro_batches`` follows from the global batch.

    Raises:
        InputError: the fields contradict each other.
    """
    values = dict(fixed)
    data_ranks = values.get("data_replicate", 1) * values.get("data_shard", 1)
    if values.get("data_shard", 1) > 1:
        values.setdefault("zero_stage", 3)
    if values.get("pipeline", 1) > 1:
        interleaved = values.get("virtual_stages", 1) > 1
        values.setdefault("schedule", "interleaved-1f1b" if interleaved else "1f1b")
    if "micro_batches" not in values:
        size = values.get("micro_batch_size", 1)
        values["micro_batches"] = max(1, global_batch // (data_ranks * size))
    elif "micro_batch_size" not in values:
        count = values["micro_batches"]
        values["micro_batch_size"] = max(1, global_batch // (data_ranks * count))
    try:
        return Layout.model_validate(values)
    except ValidationError as error:
        raise InputError(f"--fix {describe_validation_error(error)}") from None
