"""The rules of layouts: whether one is possible for a model, batch and cluster, and why not.

What a rule gives a reason for is counted under that reason and never costed. Everything else is
the search space that the proof speaks of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

from paraplan.graph import RECOMPUTE_MODES, ModelGraph, Recompute
from paraplan.layout import RUNTIME_CANNOT_SPLIT, Layout, too_few_micro_batches

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
        mesh_reason(space, layout.tensor, layout.context, layout.expert, layout.pipeline)
        or kinds_reason(space, layout.pipeline)
        or data_reason(space, layout.data_ranks)
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
    reason = mesh_reason(space, tensor, fixed.get("context", 1), fixed.get("expert", 1), pipeline)
    if reason is None and "pipeline" in fixed:
        reason = kinds_reason(space, pipeline)
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


def mesh_reason(space: Space, tensor: int, context: int, expert: int, pipeline: int) -> str | None:
    """Why these degrees cannot be, whatever the batch."""
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


def kinds_reason(space: Space, pipeline: int) -> str | None:
    """Why stages of this size do not lie on one kind of devices each."""
    if any(devices % (space.devices // pipeline) for devices in space.kinds):
        kinds = " and ".join(map(str, space.kinds))
        return f"pipeline({pipeline}) has a stage on both kinds of devices ({kinds}) at once"
    return None


def data_reason(space: Space, data_ranks: int) -> str | None:
    """Why the batch does not divide over so many data ranks."""
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
    return interleaving_reason(pipeline) if micro_batches % pipeline else None


def interleaving_reason(pipeline: int) -> str:
    """Why interleaved schedules refuse other numbers of micro-batches."""
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
