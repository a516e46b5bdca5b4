"""Time and memory of a stage: a run of the chain on one pipeline rank.

`ChainCost` holds the costs of one layout's blocks along the chain; `stage_cost` adds them up
for a stage and lets `recompute` find the cheapest recomputation that fits. A pipeline rank that
holds several virtual stages is costed as one stage of several runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate

from paraplan.block_cost import BlockCost
from paraplan.cluster import Cluster
from paraplan.collectives import collective_seconds, transfer_seconds
from paraplan.data_traffic import Numerics, peers
from paraplan.device import Device
from paraplan.graph import RECOMPUTE_MODES, Amount, ModelGraph, Recompute, cut_amounts
from paraplan.layout import Layout
from paraplan.plan_parts import MemoryParts
from paraplan.recompute import (
    Choice,
    LayerKind,
    cheapest_choice,
    least_memory_choice,
)

Runs = tuple[tuple[int, int], ...]
"""Half-open ranges of chain positions, one for each virtual stage of a rank."""


@dataclass(frozen=True, slots=True)
class ChainShape:
    """What about a graph's chain does not depend on the layout.

    Attributes:
        kinds: the block kinds, in order of first appearance.
        kind_at: index into ``kinds`` of each chain position.
        roles: role of each kind.
        counts_before: for each kind, how many stand before each position.
        cuts: bytes that cross the cut in front of each position.
        places: positions at which stages may begin or end: every stage holds a layer, which the
            runtime asks for, and a bridge stays with what follows it.
    """

    kinds: tuple[str, ...]
    kind_at: tuple[int, ...]
    roles: tuple[str, ...]
    counts_before: tuple[tuple[int, ...], ...]
    cuts: tuple[Amount, ...]
    places: tuple[int, ...]


def chain_shape(graph: ModelGraph) -> ChainShape:
    """Index the chain of a graph."""
    kinds = tuple(dict.fromkeys(item.block for item in graph.chain))
    index = {kind: i for i, kind in enumerate(kinds)}
    kind_at = tuple(index[item.block] for item in graph.chain)
    counts = []
    for kind in range(len(kinds)):
        running = [0]
        for here in kind_at:
            running.append(running[-1] + (here == kind))
        counts.append(tuple(running))
    roles = tuple(graph.blocks[kind].role for kind in kinds)
    layers = [i for i, kind in enumerate(kind_at) if roles[kind] == "layer"]
    inner = (
        i
        for i in range(1, len(kind_at))
        if layers and layers[0] < i <= layers[-1] and roles[kind_at[i - 1]] != "bridge"
    )
    places = (0, *inner, len(kind_at))
    return ChainShape(kinds, kind_at, roles, tuple(counts), cut_amounts(graph), places)


@dataclass(frozen=True)
class ChainCost:
    """The blocks' costs under one layout, along the chain.

    Attributes:
        costs: by kind, in the order of ``shape.kinds``.
        modes: recompute modes that layers may use.
        first_stage: of the pipeline's stages, the first that these devices hold.
        parts: where stages lie on two kinds of devices, the costs on each kind, in the order of
            the stages; ``costs`` are then the smaller of both, good for bounds only.
        memo: stage costs found so far (filled on use).
    """

    graph: ModelGraph
    shape: ChainShape
    layout: Layout
    costs: tuple[BlockCost, ...]
    cluster: Cluster
    device: Device
    numerics: Numerics
    capacity_bytes: float
    modes: tuple[Recompute, ...]
    first_stage: int = 0
    parts: tuple[ChainCost, ...] = ()
    memo: dict[object, StageCost | None] = field(default_factory=dict, compare=False)

    def of_rank(self, rank: int) -> ChainCost:
        """The costs on the kind of device that holds a pipeline rank."""
        held = (part for part in reversed(self.parts) if part.first_stage <= rank)
        return next(held, self)

    def with_capacity(self, capacity_bytes: float) -> ChainCost:
        """The same on devices with room for so much (of two kinds, the larger one)."""
        share = capacity_bytes / self.capacity_bytes
        parts = tuple(part.with_capacity(share * part.capacity_bytes) for part in self.parts)
        return replace(self, capacity_bytes=capacity_bytes, parts=parts, memo={})

    @cached_property
    def cut_bytes(self) -> tuple[float, ...]:
        """What crosses the cut in front of each chain position, one micro-batch."""
        layout = self.layout
        sequences = layout.micro_batch_size / layout.context
        split = layout.tensor if layout.sequence_parallel else 1
        return tuple(amount.at(sequences) / split for amount in self.shape.cuts)

    @cached_property
    def plain_seconds(self) -> tuple[float, ...]:
        """Prefix sums along the chain of forward and backward time without recomputation."""
        each = [cost.forward + cost.backward["none"] for cost in self.costs]
        return tuple(accumulate((each[kind] for kind in self.shape.kind_at), initial=0.0))

    @cached_property
    def budget_bytes(self) -> float:
        """Bytes that parts other than framework and fragmentation may add up to."""
        usable = self.capacity_bytes - self.device.framework_memory_bytes.value
        return usable / (1 + self.device.fragmentation_fraction.value)

    @cached_property
    def transfer_contention(self) -> float:
        """Share of a hidden transfer that slows the computation (between nodes: the floor)."""
        figure = self.device.overlap_contention
        if self.layout.devices // self.layout.pipeline >= self.cluster.devices_per_node:
            figure = self.device.overlap_contention_floor
        return figure.value

    def transfer_seconds(self, stage: int, position: int) -> float:
        """One direction of the transfer between ``stage`` and the next, cut at ``position``."""
        if self.parts:
            return self.of_rank(stage).transfer_seconds(stage, position)
        size = self.layout.devices // self.layout.pipeline
        per_node = self.cluster.devices_per_node
        done = stage + 1 - self.first_stage  # the last stage of a kind ends its last node
        crosses = size >= per_node or bool(per_node % size) or (done * size) % per_node == 0
        size_bytes = self.cut_bytes[position]
        return transfer_seconds(size_bytes, between_nodes=crosses, cluster=self.cluster)


@dataclass(frozen=True, slots=True)
class StageCost:
    """One pipeline rank's stage.

    Attributes:
        forward_seconds, backward_seconds: one micro-batch; backward with recomputation.
        core_seconds: forward and backward without what depends on the neighbours (the exposed
            gathers at the stage's ends); never less for a stage that holds more blocks.
        tail_seconds: once a step, after the last backward and the first gathers.
        optimizer_seconds: part of ``tail_seconds``.
        choice: layers by recompute mode; its ``counts`` follow ``layer_kinds``.
        layer_kinds: kinds (indices) that ``choice.counts`` speaks of.
        memory_bytes: peak of one device.
        parts: where it goes.
    """

    forward_seconds: float
    backward_seconds: float
    core_seconds: float
    tail_seconds: float
    optimizer_seconds: float
    choice: Choice
    layer_kinds: tuple[int, ...]
    memory_bytes: float
    parts: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """Forward and backward of one micro-batch."""
        return self.forward_seconds + self.backward_seconds


def in_flight(layout: Layout, rank: int) -> float:
    """Micro-batches whose activations a pipeline rank keeps at its peak.

    1F1B: ``min(M, p - rank)``. Interleaved: ``min(M v, 2 (p - rank - 1) + (v - 1) p + 1)``
    chunks, here as a multiple of the rank's whole share (both confirmed by replaying the
    schedules event by event, see tests/test_pipeline.py).
    """
    p, m, v = layout.pipeline, layout.micro_batches, layout.virtual_stages
    if v == 1:
        return min(m, p - rank)
    return min(m * v, 2 * (p - rank - 1) + (v - 1) * p + 1) / v


def stage_cost(
    chain: ChainCost, rank: int, runs: Runs, *, forced: bool = False
) -> StageCost | None:
    """Cost of a pipeline rank that holds ``runs``; None if no recompute choice fits.

    Args:
        forced: return the choice with the least memory when none fits.
    """
    chain = chain.of_rank(rank)
    depth = in_flight(chain.layout, rank)
    key = (depth, _signature(chain, runs), forced)
    if key not in chain.memo:
        chain.memo[key] = _stage_cost(chain, depth, runs, forced)
    return chain.memo[key]


def _signature(chain: ChainCost, runs: Runs) -> object:
    """Stages with the same signature cost the same: what blocks they hold, and what at the ends.

    Runs of one kind are told apart by their length alone, so that the many positions at which
    a stage of equal layers can stand share one evaluation.
    """
    kind_at = chain.shape.kind_at
    parts = []
    for first, end in runs:
        counts = tuple(before[end] - before[first] for before in chain.shape.counts_before)
        parts.append((counts, kind_at[first], kind_at[end - 1]))
    return tuple(parts)


def _stage_cost(chain: ChainCost, depth: float, runs: Runs, forced: bool) -> StageCost | None:
    shape, costs = chain.shape, chain.costs
    counts = [
        sum(before[end] - before[first] for first, end in runs) for before in shape.counts_before
    ]
    present = [k for k, n in enumerate(counts) if n]
    layer_kinds = tuple(k for k in present if shape.roles[k] == "layer")
    parts = _fixed_parts(chain, depth, runs, counts)
    layers = [_layer_kind(chain, k, counts[k], depth) for k in layer_kinds]
    others = [k for k in present if k not in layer_kinds]
    floor = max((_working_floor(costs[k], shape.roles[k]) for k in others), default=0.0)
    budget = chain.budget_bytes - sum(parts.values())
    choice = cheapest_choice(layers, budget, floor)
    if choice is None:
        if not forced:
            return None
        choice = least_memory_choice(layers, floor)
    return _assemble(chain, runs, counts, choice, layer_kinds, parts)


def _assemble(
    chain: ChainCost,
    runs: Runs,
    counts: Sequence[int],
    choice: Choice,
    layer_kinds: tuple[int, ...],
    parts: dict[str, float],
) -> StageCost:
    costs, device = chain.costs, chain.device
    kind_at = chain.shape.kind_at
    parts = dict(parts)
    parts["activations"] += choice.saved_bytes
    parts["working"] = choice.working_bytes
    framework = device.framework_memory_bytes.value
    parts["fragmentation"] = device.fragmentation_fraction.value * sum(parts.values())
    parts["framework"] = framework
    forward = sum(n * cost.forward for n, cost in zip(counts, costs, strict=True))
    backward = sum(n * cost.backward["none"] for n, cost in zip(counts, costs, strict=True))
    opening, closing = costs[kind_at[runs[0][0]]], costs[kind_at[runs[-1][1] - 1]]
    optimizer = sum(n * cost.optimizer for n, cost in zip(counts, costs, strict=True))
    tail = optimizer + sum(n * cost.per_step for n, cost in zip(counts, costs, strict=True))
    tail += opening.last_reduction + _tied_exchange_seconds(chain, runs)
    return StageCost(
        forward_seconds=forward + opening.first_gather,
        backward_seconds=backward + closing.last_gather + choice.extra_seconds,
        core_seconds=forward + backward + choice.extra_seconds,
        tail_seconds=tail,
        optimizer_seconds=optimizer,
        choice=choice,
        layer_kinds=layer_kinds,
        memory_bytes=sum(parts.values()),
        parts=parts,
    )


def _working_floor(cost: BlockCost, role: str) -> float:
    """Working memory of a block that never recomputes.

    The head's forward and backward follow each other at once, so that what it saves lives only
    while it works and never waits in flight.
    """
    compute = cost.compute
    return compute.peak_bytes if role == "head" else compute.working_bytes["none"]


def _layer_kind(chain: ChainCost, kind: int, count: int, depth: float) -> LayerKind:
    cost = chain.costs[kind]
    saved = [depth * cost.compute.saved_bytes[mode] for mode in RECOMPUTE_MODES]
    extra = [cost.backward[mode] - cost.backward["none"] for mode in RECOMPUTE_MODES]
    working = [cost.compute.working_bytes[mode] for mode in RECOMPUTE_MODES]
    allowed = [mode in chain.modes for mode in RECOMPUTE_MODES]
    return LayerKind(
        count=count,
        saved=(saved[0], saved[1], saved[2]),
        extra=(extra[0], extra[1], extra[2]),
        working=(working[0], working[1], working[2]),
        allowed=(allowed[0], allowed[1], allowed[2]),
    )


def _fixed_parts(
    chain: ChainCost, depth: float, runs: Runs, counts: Sequence[int]
) -> dict[str, float]:
    """Memory that does not depend on the recompute choice (see `MemoryParts`)."""
    costs, shape = chain.costs, chain.shape
    pairs = list(zip(counts, costs, strict=True))
    tied = chain.graph.tied_parameters / chain.layout.tensor if _holds_copy(chain, runs) else 0.0
    copy = tied / chain.layout.data_shard
    others = (
        depth * n * cost.compute.saved_bytes["none"]
        for k, (n, cost) in enumerate(pairs)
        if n and shape.roles[k] in ("embedding", "bridge")
    )
    # A send and a receive buffer towards each neighbour; the widest cut, so that a stage never
    # needs less memory for holding more blocks.
    buffers = 4 * max(chain.cut_bytes) if chain.layout.pipeline > 1 else 0.0
    axes = (
        chain.layout.tensor,
        chain.layout.data_shard,
        chain.layout.data_replicate,
        chain.layout.context,
        chain.layout.pipeline,
    )
    communicators = sum(size > 1 for size in axes)
    return {
        "parameters": sum(n * cost.parameter_bytes for n, cost in pairs) + 4 * copy,
        "gradients": sum(n * cost.gradient_bytes for n, cost in pairs) + 4 * copy,
        "optimizer": sum(n * cost.optimizer_bytes for n, cost in pairs)
        + chain.numerics.optimizer_state * copy,
        "activations": sum(others),
        "gathered_parameters": sum(n * cost.resident_bytes for n, cost in pairs)
        + _gather_peak(chain, runs)
        + max((cost.reduce_bytes for n, cost in pairs if n), default=0.0),
        "communication": buffers + communicators * chain.device.communicator_memory_bytes.value,
    }


def _holds_copy(chain: ChainCost, runs: Runs) -> bool:
    """Whether the stage holds a second copy of the tied embedding."""
    last = len(chain.shape.kind_at)
    return bool(chain.graph.tied_parameters) and runs[-1][1] == last and runs[0][0] != 0


def _gather_peak(chain: ChainCost, runs: Runs) -> float:
    """Unsharded parameters at once: a block at work and the one gathered ahead of it."""
    if chain.layout.zero_stage != 3:
        return 0.0
    sizes = [cost.gather_bytes for cost in chain.costs]
    kind_at = chain.shape.kind_at
    return max(
        sizes[kind_at[i]] + (sizes[kind_at[i + 1]] if i + 1 < end else 0.0)
        for first, end in runs
        for i in range(first, end)
    )


def _tied_exchange_seconds(chain: ChainCost, runs: Runs) -> float:
    """First and last stage add up the gradients of the weight they share, once a step."""
    layout, graph = chain.layout, chain.graph
    last = len(chain.shape.kind_at)
    at_end = runs[0][0] == 0 or runs[-1][1] == last
    if not graph.tied_parameters or layout.pipeline == 1 or not at_end:
        return 0.0
    stride = layout.devices // layout.pipeline * (layout.pipeline - 1)
    group = peers(2, stride, chain.cluster.devices_per_node)
    size = 4 * graph.tied_parameters / layout.tensor / layout.data_shard
    return collective_seconds("all_reduce", size, group, chain.cluster)


def memory_parts(stage: StageCost) -> MemoryParts:
    """A stage's memory in whole bytes."""
    return MemoryParts(**{name: round(value) for name, value in stage.parts.items()})
