"""Plans over two kinds of nodes: against brute force, and against what one would do without."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from oracle import two_kinds_optimum
from small_graphs import small_graph

from paraplan.cluster import Cluster, make_cluster
from paraplan.device import load_device
from paraplan.layout_rules import Constraints
from paraplan.partition import smallest_bottleneck, staged, time_bound
from paraplan.pipeline import balanced_seconds
from paraplan.plan_parts import Workload
from paraplan.problem import Problem, chain_cost
from paraplan.search import search

GIB = 2**30


def problem_on(cluster: Cluster, graph_seed: int, capacities: list[float]) -> Problem:
    """A small random model on a cluster of one or two kinds."""
    rng = random.Random(graph_seed)
    graph = small_graph(
        layers=(rng.randint(2, 5),),
        tokens=2048,
        hidden=rng.choice([1024, 2048]),
        ffn=(rng.choice([2048, 8192]),),
        vocab=rng.choice([1024, 32768]),
        tied=rng.random() < 0.3,
    )
    workload = Workload(
        global_batch=rng.choice([6, 8, 16]),
        sequence_length=graph.sequence_length,
        precision="bf16",
        optimizer=rng.choice(["adamw", "sgd"]),
    )
    kinds = tuple(
        Problem(graph, kind, kind.device, workload, capacity)
        for kind, capacity in zip(cluster.kinds, capacities, strict=True)
    )
    if len(kinds) == 1:
        return kinds[0]
    return replace(kinds[0], cluster=cluster, capacity_bytes=max(capacities), parts=kinds)


def two_kinds(first: str, count: int, second: str, other: int, link: float = 1.0) -> Cluster:
    """``count`` devices of one kind in a node, ``other`` of another in a second node."""
    one = make_cluster(load_device(first), count, devices_per_node=count)
    two = make_cluster(load_device(second), other, devices_per_node=other)
    groups = {"node_groups": (*one.node_groups, *two.node_groups), "name": "two"}
    return one._copy(groups).with_link_between_scaled(link)


def random_two_kinds(seed: int) -> Problem:
    rng = random.Random(seed)
    first, second = rng.choice([("h100", "a100"), ("a100", "h100"), ("h100", "l40s")])
    count, other = rng.choice([(1, 1), (2, 2), (2, 1), (1, 3), (2, 4)])
    cluster = two_kinds(first, count, second, other, rng.choice([1.0, 0.1]))
    tight = rng.choice([[70.0, 70.0], [4.0, 2.0], [1.5, 3.0], [2.0, 2.0]])
    return problem_on(cluster, seed, [size * GIB for size in tight])


@pytest.mark.parametrize("block", range(4))
def test_plan_is_the_brute_force_optimum(block: int) -> None:
    """48 random cases; the oracle tries every layout, order of kinds, cut and recomputation."""
    feasible = mixed = 0
    for seed in range(block * 12, block * 12 + 12):
        problem = random_two_kinds(seed)
        exact = two_kinds_optimum(problem)
        found = search(problem, runner_ups=1)
        if found is None:
            assert exact == math.inf, f"seed {seed}: brute force finds {exact}"
            continue
        feasible += 1
        mixed += bool(found.best.chain.parts)
        assert found.best.staged.step_seconds == pytest.approx(exact, rel=1e-6), f"seed {seed}"
        assert found.optimal and found.bound_seconds >= exact * (1 - 1e-5)
        assert found.considered == found.bounded + found.infeasible + found.solved
    assert feasible >= 6 and mixed >= 1, "or the test shows little"


def steps(problem: Problem) -> float:
    found = search(problem, runner_ups=0)
    return found.best.staged.step_seconds if found else math.inf


@pytest.mark.parametrize("seed", range(100, 110))
def test_never_slower_than_either_half_nor_than_all_as_the_slower_kind(seed: int) -> None:
    """H100 and A100: the mixed plan beats each half, and the same nodes taken as all A100."""
    cluster = two_kinds("h100", 2, "a100", 2)
    problem = problem_on(cluster, seed, [70 * GIB, 70 * GIB])
    halves = [steps(part) for part in problem.parts]
    best = steps(problem)
    assert best <= min(halves) * (1 + 1e-9)
    slower = two_kinds("a100", 2, "a100", 2)
    group = slower.node_groups[0].model_copy(update={"count": 2})
    all_a100 = slower._copy({"node_groups": (group,)})
    assert best <= steps(problem_on(all_a100, seed, [70 * GIB])) * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(200, 210))
def test_bounds_are_bounds(seed: int) -> None:
    """Before the search: no plan of a mixed layout is faster than its bounds say."""
    problem = random_two_kinds(seed)
    found = search(replace(problem, constraints=Constraints(fixed={"schedule": "1f1b"})))
    if found is None or not found.best.chain.parts:
        return
    chain = chain_cost(problem, found.best.layout)
    assert time_bound(chain) <= found.best.staged.step_seconds * (1 + 1e-9)
    bottleneck = smallest_bottleneck(chain)
    assert bottleneck is not None
    core = [stage.core_seconds for stage in staged(chain, bottleneck[1]).stages]  # type: ignore[union-attr]
    assert bottleneck[0] <= max(core) * (1 + 1e-9)


def test_balanced_seconds_against_fine_steps() -> None:
    """The fractional bottleneck against trying shares of two sorts of blocks in small steps."""
    rng = random.Random(1)
    for _ in range(20):
        counts = [rng.randint(1, 5), rng.randint(1, 5)]
        seconds = [[rng.uniform(1, 3) for _ in counts] for _ in range(2)]
        stages = [rng.randint(1, 4), rng.randint(1, 4)]
        shares = [i / 60 for i in range(61)]
        tried = min(
            max(
                (x * counts[0] * seconds[0][0] + y * counts[1] * seconds[0][1]) / stages[0],
                ((1 - x) * counts[0] * seconds[1][0] + (1 - y) * counts[1] * seconds[1][1])
                / stages[1],
            )
            for x in shares
            for y in shares
        )
        exact = balanced_seconds(counts, seconds, stages)
        assert exact <= tried * (1 + 1e-12)
        assert tried <= exact * 1.05
