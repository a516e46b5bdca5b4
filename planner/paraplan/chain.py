"""The blocks of a model along its chain, with their costs under one layout."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

from paraplan.block_cost import BlockCost
from paraplan.cluster import Cluster
from paraplan.collectives import collective_seconds, transfer_seconds
from paraplan.data_traffic import Numerics, tensor_group
from paraplan.device import Device
from paraplan.engine import RUNTIME, Engine
from paraplan.graph import Amount, ModelGraph, Recompute, cut_amounts
from paraplan.layout import Layout

if TYPE_CHECKING:
    from paraplan.stage_cost import StageCost

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
        engine: what runs the plan.
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
    engine: Engine = RUNTIME
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
        size_bytes, gathers = self.cut_bytes[position], 0.0
        layout = self.layout
        sliced = self.engine.slices_transfers and not layout.sequence_parallel
        if sliced and crosses and layout.tensor > 1:
            group = tensor_group(layout, self.cluster)
            gathers = collective_seconds("all_gather", size_bytes, group, self.cluster)
            size_bytes /= layout.tensor
        sent = transfer_seconds(size_bytes, between_nodes=crosses, cluster=self.cluster)
        return sent + gathers
