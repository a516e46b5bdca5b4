"""What is planned, and the cost of one layout of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from paraplan.block_cost import BlockCompute, Numerics, block_compute, block_cost
from paraplan.cluster import Cluster
from paraplan.device import Device
from paraplan.graph import ModelGraph
from paraplan.layouts import Constraints, Space
from paraplan.plan_file import Layout, Workload
from paraplan.stage_cost import ChainCost, ChainShape, chain_shape
from paraplan.workload import COMPUTE_BYTES, OPTIMIZER_STATE_BYTES


@dataclass(frozen=True)
class Problem:
    """What is planned: everything that the cost of a layout depends on.

    Attributes:
        capacity_bytes: what one device may use.
        computes: block costs shared by all layouts that compute alike (a memo, filled on use).
    """

    graph: ModelGraph
    cluster: Cluster
    device: Device
    workload: Workload
    capacity_bytes: float
    constraints: Constraints = field(default_factory=Constraints)
    computes: dict[object, tuple[BlockCompute, ...]] = field(default_factory=dict, compare=False)

    @cached_property
    def shape(self) -> ChainShape:
        """Index of the graph's chain."""
        return chain_shape(self.graph)

    @cached_property
    def space(self) -> Space:
        """Sizes that bound the layouts."""
        return Space(
            graph=self.graph,
            devices=self.cluster.devices,
            devices_per_node=self.cluster.devices_per_node,
            global_batch=self.workload.global_batch,
        )

    @cached_property
    def numerics(self) -> Numerics:
        """Bytes per parameter."""
        return Numerics(
            compute=COMPUTE_BYTES[self.workload.precision],
            optimizer_state=OPTIMIZER_STATE_BYTES[self.workload.optimizer],
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
            )
            for kind in problem.shape.kinds
        )
    return problem.computes[key]


def chain_cost(problem: Problem, layout: Layout) -> ChainCost:
    """Costs of one layout along the chain."""
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
    )
