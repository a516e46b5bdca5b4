"""What is planned, and the cost of one layout of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from math import gcd

from paraplan.block_compute import BlockCompute, block_compute
from paraplan.block_cost import BlockCost, block_cost
from paraplan.chain import ChainCost, ChainShape, chain_shape
from paraplan.cluster import Cluster
from paraplan.data_traffic import Numerics
from paraplan.device import Device
from paraplan.engine import RUNTIME, Engine
from paraplan.graph import ModelGraph
from paraplan.layout import Layout
from paraplan.layout_rules import Constraints, Space
from paraplan.pipeline import pass_share
from paraplan.plan_parts import Workload
from paraplan.workload import COMPUTE_BYTES, OPTIMIZER_STATE_BYTES, OPTIMIZER_WORK_BYTES

MEMORY_FRACTION = 0.94
"""Share of a device's memory that a plan may use when no limit is given; a chosen margin. The
profiles plan fragmentation at 7.24 % (reserved / allocated 1.072, median of 48 A100 runs); with
this margin a ratio of 1.141 still fits, which 87 % of the 248 ranks in Aceso's runs that Mist
published (A100, A10G, L4; mean 1.098) stay below."""


@dataclass(frozen=True)
class Problem:
    """What is planned: everything that the cost of a layout depends on.

    Attributes:
        capacity_bytes: what one device may use (of two kinds, the one with more).
        parts: where stages lie on two kinds of devices, the problem of each kind, in the order of
            the stages; ``cluster`` is then both together and ``device`` the first one's.
        engine: what runs the plan.
        computes: block costs shared by all layouts that compute alike (a memo, filled on use).
    """

    graph: ModelGraph
    cluster: Cluster
    device: Device
    workload: Workload
    capacity_bytes: float
    constraints: Constraints = field(default_factory=Constraints)
    parts: tuple[Problem, ...] = ()
    engine: Engine = RUNTIME
    computes: dict[object, tuple[BlockCompute, ...]] = field(default_factory=dict, compare=False)

    @cached_property
    def shape(self) -> ChainShape:
        """Index of the graph's chain."""
        return chain_shape(self.graph)

    @cached_property
    def space(self) -> Space:
        """Sizes that bound the layouts."""
        kinds = tuple(part.cluster.devices for part in self.parts)
        nodes = [part.cluster.devices_per_node for part in self.parts or (self,)]
        return Space(
            graph=self.graph,
            devices=self.cluster.devices,
            devices_per_node=gcd(*nodes),
            global_batch=self.workload.global_batch,
            kinds=kinds,
        )

    @cached_property
    def numerics(self) -> Numerics:
        """Bytes per parameter."""
        return Numerics(
            compute=COMPUTE_BYTES[self.workload.precision],
            optimizer_state=OPTIMIZER_STATE_BYTES[self.workload.optimizer],
            optimizer_work=OPTIMIZER_WORK_BYTES.get(self.workload.optimizer, 0.0),
        )


def computes_of(problem: Problem, layout: Layout) -> tuple[BlockCompute, ...]:
    """What each block kind computes under a layout, made once for all that compute alike."""
    key = (
        layout.tensor,
        layout.sequence_parallel,
        layout.context,
        layout.expert,
        layout.micro_batch_size,
    )
    if key not in problem.computes:
        problem.computes[key] = tuple(
            block_compute(
                problem.graph.blocks[kind],
                layout,
                device=problem.device,
                cluster=problem.cluster,
                engine=problem.engine,
            )
            for kind in problem.shape.kinds
        )
    return problem.computes[key]


def arrangements(problem: Problem) -> tuple[Problem, ...]:
    """Where stages can lie: on two kinds of devices, on both in either order, or on one alone."""
    if not problem.parts:
        return (problem,)
    first, second = problem.parts
    swapped = replace(
        problem,
        cluster=problem.cluster.reversed(),
        device=second.device,
        parts=(second, first),
        computes={},
    )
    return (problem, swapped, first, second)


def stages_of_kinds(problem: Problem, layout: Layout) -> list[int]:
    """How many of a layout's stages each kind of devices holds."""
    stage_size = layout.devices // layout.pipeline
    return [kind.cluster.devices // stage_size for kind in problem.parts or (problem,)]


def block_seconds(problem: Problem, layout: Layout) -> list[float]:
    """What each block kind takes at least in one micro-batch, on the one kind of devices."""
    rates = problem.device.rates
    share = pass_share(layout, rates.ranks_per_core, rates.unshared_speedup)
    return [share * (c.forward.total + c.backward.total) for c in computes_of(problem, layout)]


def chain_cost(problem: Problem, layout: Layout) -> ChainCost:
    """Costs of one layout along the chain."""
    if problem.parts:
        return _two_kinds(problem, layout)
    graph = problem.graph
    variants = [graph.blocks[kind].variants[layout.tensor] for kind in problem.shape.kinds]
    costs = tuple(
        block_cost(
            compute,
            variant.parameters,
            variant.expert_parameters,
            layout,
            numerics=problem.numerics,
            device=problem.device,
            cluster=problem.cluster,
            engine=problem.engine,
            trained_tensors=variant.trained_tensors,
            trainable=1 - variant.frozen_parameters / max(1, variant.parameters),
            expert_padding=_expert_padding(graph, layout),
        )
        for compute, variant in zip(computes_of(problem, layout), variants, strict=True)
    )
    return ChainCost(
        graph=graph,
        shape=problem.shape,
        layout=layout,
        costs=costs,
        cluster=problem.cluster,
        device=problem.device,
        numerics=problem.numerics,
        capacity_bytes=problem.capacity_bytes,
        modes=problem.constraints.recompute,
        engine=problem.engine,
    )


def _expert_padding(graph: ModelGraph, layout: Layout) -> float:
    """What experts take as shards of equal size: FSDP2 cuts between experts, never through one."""
    if not graph.experts or layout.expert > 1:
        return 1.0
    each = -(-graph.experts // layout.data_shard)
    return each * layout.data_shard / graph.experts


def _two_kinds(problem: Problem, layout: Layout) -> ChainCost:
    """Costs of a layout with its first stages on one kind of device, the others on another."""
    first, second = (chain_cost(part, layout) for part in problem.parts)
    second = replace(second, first_stage=stages_of_kinds(problem, layout)[0])
    return replace(
        first,
        cluster=problem.cluster,
        costs=tuple(_least(a, b) for a, b in zip(first.costs, second.costs, strict=True)),
        capacity_bytes=problem.capacity_bytes,
        parts=(first, second),
        memo={},
    )


def _least(one: BlockCost, other: BlockCost) -> BlockCost:
    """The smaller of every time that bounds are made from."""
    return replace(
        one,
        forward=min(one.forward, other.forward),
        backward={mode: min(one.backward[mode], other.backward[mode]) for mode in one.backward},
        per_step=min(one.per_step, other.per_step),
        optimizer=min(one.optimizer, other.optimizer),
    )
