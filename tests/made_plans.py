"""Plans made from small graphs, for tests of what is done with plans."""

from __future__ import annotations

from small_graphs import small_graph

from paraplan.cluster import make_cluster
from paraplan.describe import describe, proof_of
from paraplan.device import load_device
from paraplan.layout_rules import Constraints
from paraplan.plan_file import Plan
from paraplan.problem import Problem
from paraplan.search import search
from paraplan.workload import make_workload


def made_plan(**fixed: object) -> Plan:
    """The plan of a small model on four H100, with layout fields pinned."""
    graph = small_graph(layers=(6,), tokens=2048)
    device = load_device("h100")
    problem = Problem(
        graph=graph,
        cluster=make_cluster(device, 4),
        device=device,
        workload=make_workload(sequence_length=2048, devices=4, global_batch=16),
        capacity_bytes=device.memory_capacity_bytes.value,
        constraints=Constraints(fixed=fixed),
    )
    found = search(problem)
    assert found is not None
    return describe(problem, found.best, proof_of(found), found.runner_ups, ["made in a test"])
