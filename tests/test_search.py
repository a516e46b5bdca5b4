"""The planner's optimum against brute force, and laws that every optimum obeys."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from oracle import all_layouts, layout_best, optimum
from small_graphs import small_graph

from paraplan.cluster import make_cluster
from paraplan.device import load_device
from paraplan.fitting import least_needed_bytes
from paraplan.layout import Layout
from paraplan.layout_rules import Constraints
from paraplan.layouts import enumerate_families
from paraplan.plan_parts import Workload
from paraplan.problem import Problem
from paraplan.search import estimate_layout, search

GIB = 2**30


def random_problem(seed: int) -> Problem:
    """A small random model, cluster, batch and memory limit; half of the limits are tight."""
    rng = random.Random(seed)
    kinds = rng.choice([1, 1, 2])
    layers = tuple(rng.randint(1, 4 if kinds == 1 else 2) for _ in range(kinds))
    graph = small_graph(
        layers=layers,
        tokens=rng.choice([512, 2048, 8192]),
        hidden=rng.choice([512, 2048]),
        ffn=tuple(rng.choice([2048, 8192, 16384]) for _ in range(kinds)),
        vocab=rng.choice([1024, 32768]),
        tied=rng.random() < 0.3,
    )
    device = load_device("h100")
    devices = rng.choice([2, 4, 4])
    cluster = make_cluster(device, devices, devices_per_node=rng.choice([1, 2, devices]))
    cluster = cluster.with_link_between_scaled(rng.choice([1.0, 0.1]))
    workload = Workload(
        global_batch=rng.choice([4, 6, 8]),
        sequence_length=graph.sequence_length,
        precision=rng.choice(["bf16", "bf16", "fp32"]),
        optimizer=rng.choice(["adamw", "sgd"]),
    )
    problem = Problem(graph, cluster, device, workload, 80 * GIB)
    if rng.random() < 0.7:
        needed = least_needed_bytes(problem_with(problem, 1.0))
        share = rng.choice([0.98, 1.02, 1.1, 1.3, 2.0])
        if needed is not None:  # some batches divide over no layout at all
            problem = problem_with(problem, needed * share)
    return problem


def problem_with(problem: Problem, capacity_bytes: float) -> Problem:
    return replace(problem, capacity_bytes=capacity_bytes)


@pytest.mark.parametrize("block", range(10))
def test_plan_is_the_brute_force_optimum(block: int) -> None:
    """220 random cases: equal within 1e-6, infeasible exactly when brute force finds nothing."""
    feasible = 0
    for seed in range(block * 22, block * 22 + 22):
        problem = random_problem(seed)
        exact = optimum(problem)
        found = search(problem, runner_ups=1)
        if found is None:
            assert exact == math.inf, f"seed {seed}: brute force finds {exact}"
            continue
        feasible += 1
        assert found.best.staged.step_seconds == pytest.approx(exact, rel=1e-6), f"seed {seed}"
        assert found.optimal
        assert found.bound_seconds <= found.best.staged.step_seconds * (1 + 1e-12)
        assert found.bound_seconds >= exact * (1 - 1e-5)
        assert found.considered == found.bounded + found.infeasible + found.solved
        assert found.bounded >= 0
    assert feasible >= 11, "most cases should have a plan, or the test shows little"


@pytest.mark.parametrize("seed", range(300, 312))
def test_no_estimate_is_faster(seed: int) -> None:
    """Every layout, costed alone, equals its brute force optimum and never beats the plan."""
    problem = random_problem(seed)
    found = search(problem, runner_ups=0)
    for layout in all_layouts(problem):
        alone = estimate_layout(problem, layout)
        exact = layout_best(problem, layout)
        fits = all(s.memory_bytes <= problem.capacity_bytes for s in alone.staged.stages)
        assert fits == (exact < math.inf)
        if fits:
            assert alone.staged.step_seconds == pytest.approx(exact, rel=1e-6)
            assert found is not None
            assert found.best.staged.step_seconds <= alone.staged.step_seconds * (1 + 1e-6)


def listed(problem: Problem, constraints: Constraints) -> list[Layout]:
    families, _ = enumerate_families(problem.space, constraints)
    return [family.layout(split) for family in families for split in family.splits]


def test_enumeration_is_complete() -> None:
    """Families hold exactly the layouts that nested loops find."""
    for seed in range(400, 430):
        problem = random_problem(seed)
        layouts = listed(problem, Constraints())
        assert len(set(layouts)) == len(layouts)
        assert set(layouts) == set(all_layouts(problem))


def test_constraints_only_remove_layouts() -> None:
    problem = random_problem(3)
    everything = set(listed(problem, Constraints()))
    some = set(listed(problem, Constraints(fixed={"tensor": 2, "zero_stage": 3})))
    assert some == {la for la in everything if la.tensor == 2 and la.zero_stage == 3}
    assert some


def _optima(problem: Problem, variants: list[Problem]) -> Iterator[tuple[float, float]]:
    base = search(problem, runner_ups=0)
    for variant in variants:
        other = search(variant, runner_ups=0)
        yield (
            base.best.staged.step_seconds if base else math.inf,
            other.best.staged.step_seconds if other else math.inf,
        )


@pytest.mark.parametrize("seed", range(500, 530))
def test_more_of_anything_is_never_slower(seed: int) -> None:
    """More memory, and faster links of either kind."""
    problem = random_problem(seed)
    cluster = problem.cluster
    variants = [
        problem_with(problem, problem.capacity_bytes * 1.5),
        replace(problem, cluster=cluster.with_link_between_scaled(2), computes={}),
        replace(problem, cluster=cluster.with_link_inside_scaled(2), computes={}),
    ]
    for before, after in _optima(problem, variants):
        assert after <= before * (1 + 1e-6)


@pytest.mark.parametrize("seed", range(540, 560))
def test_faster_links_with_pinned_sharding(seed: int) -> None:
    """Where latency and contention weigh most: ZeRO-3 across many small nodes."""
    problem = problem_with(random_problem(seed), 80 * GIB)
    shards = problem.cluster.devices
    if problem.workload.global_batch % shards:
        return
    one_each = make_cluster(problem.device, shards, devices_per_node=1)
    pinned = Constraints(fixed={"data_shard": shards, "zero_stage": 3})
    problem = replace(problem, cluster=one_each, constraints=pinned, computes={})
    last = math.inf
    for factor in (0.01, 0.1, 1, 2, 4, 8, 100):
        cluster = one_each.with_link_between_scaled(factor)
        found = search(replace(problem, cluster=cluster, computes={}), runner_ups=0)
        assert found is not None
        assert found.best.staged.step_seconds <= last * (1 + 1e-9)
        last = found.best.staged.step_seconds


@pytest.mark.parametrize("seed", range(600, 620))
def test_twice_the_devices_with_twice_the_batch(seed: int) -> None:
    """Never worse than half the throughput per device, on links of the same kind.

    With room in memory: a limit met to the byte leaves none for another communicator.
    """
    problem = problem_with(random_problem(seed), 80 * GIB)
    devices = problem.cluster.devices
    one_node = make_cluster(problem.device, devices, devices_per_node=devices)
    problem = replace(problem, cluster=one_node, computes={})
    cluster = make_cluster(problem.device, 2 * devices, devices_per_node=2 * devices)
    workload = problem.workload.model_copy(
        update={"global_batch": problem.workload.global_batch * 2}
    )
    larger = replace(problem, cluster=cluster, workload=workload, computes={})
    for before, after in _optima(problem, [larger]):
        assert after <= 2 * before * (1 + 1e-6)


@pytest.mark.parametrize("seed", range(700, 730))
def test_step_is_never_below_the_compute_roofline(seed: int) -> None:
    problem = random_problem(seed)
    found = search(problem, runner_ups=0)
    if found is None:
        return
    dtype = {"bf16": "bfloat16", "fp32": "bfloat16"}[problem.workload.precision]
    peak = problem.device.peak_flops_per_second[dtype].value * problem.cluster.devices  # type: ignore[index]
    flops = problem.graph.model_flops_per_sequence * problem.workload.global_batch
    assert found.best.staged.step_seconds >= flops / peak
