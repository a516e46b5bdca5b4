"""`plan` and `estimate`: from what the user asks for to a `Plan`.

`request.resolve` looks up what a `Request` names, `search` answers the question, `describe`
writes the answer down.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, TypedDict

from paraplan.cluster import make_cluster
from paraplan.describe import describe, no_proof, proof_of
from paraplan.errors import ImpossibleError, InfeasibleError, InputError, PlanError
from paraplan.fitting import anything_fits, least_needed_bytes
from paraplan.graph import ModelGraph
from paraplan.layout_rules import check_layout, pin_reason
from paraplan.layouts import enumerate_families, layout_from_fixed, tensor_degrees
from paraplan.plan_file import Plan
from paraplan.problem import MEMORY_FRACTION, Problem, arrangements
from paraplan.request import (
    GIB,
    Question,
    make_constraints,
    request_from_options,
    resolve,
)
from paraplan.request import Request as Request
from paraplan.search import Found, estimate_layout, search
from paraplan.trace_cache import model_graph
from paraplan.workload import default_global_batch

Reporter = Callable[[str], None]


class TraceSettings(TypedDict):
    """Arguments of `trace_cache.model_graph`."""

    sequence_length: int
    compute_dtype: Literal["bfloat16", "float32"]
    tensor_degrees: tuple[int, ...]


def _silent(_: str) -> None:
    pass


def plan(model: str, *, report: Reporter = _silent, **options: Any) -> Plan:
    """The fastest plan for a model on a cluster, with its proof.

    Args:
        model: see `Request`; all its other fields are options here.
        report: called with one line per phase.

    Raises:
        InputError: an option is wrong.
        InfeasibleError: nothing fits.
    """
    return plan_request(request_from_options(model, options), report=report)


def estimate(model: str, *, report: Reporter = _silent, **options: Any) -> Plan:
    """The prediction for the one layout that ``fix`` describes; nothing is searched.

    Degrees left out are 1; stage boundaries and recomputation are chosen best. The layout need
    not fit: ``prediction.fits`` says.

    Raises:
        InputError: an option is wrong, or the layout is impossible for this model.
    """
    return estimate_request(request_from_options(model, options), report=report)


def plan_request(request: Request, *, report: Reporter = _silent) -> Plan:
    """`plan` for a `Request`."""
    question = resolve(request)
    problem = problem_of(question, graph_of(question, report=report))
    return plan_problem(problem, question, report=report)


def plan_problem(problem: Problem, question: Question, *, report: Reporter = _silent) -> Plan:
    """`plan` for a question whose model is traced.

    On two kinds of devices the fastest of four: either kind alone, and both in either order.

    Raises:
        InputError: a pinned layout that cannot be.
        InfeasibleError: nothing fits.
    """
    request = question.request
    if isinstance(request.top, bool) or not isinstance(request.top, int) or request.top < 1:
        raise InputError(f"top is {request.top!r}; a whole number from 1 on is wanted")
    arranged = arrangements(problem)
    reasons = [pin_reason(one.space, one.constraints) for one in arranged]
    if all(reasons):
        raise ImpossibleError(
            f"no layout of {problem.graph.name} on {problem.cluster.devices} devices is possible: "
            f"{reasons[0]}",
            hint="leave out some of --fix, or change --gpus or --global-batch",
        )
    result = search(
        problem,
        runner_ups=request.top - 1,
        time_limit_seconds=request.time_limit_seconds,
        report=report,
    )
    if result is None:
        raise _infeasible(problem, request)
    best = next(one for one in arranged if one.cluster == result.best.chain.cluster)
    notes = [*question.notes, *_idle(problem, best)]
    return describe(best, result.best, proof_of(result), result.runner_ups, notes)


def _idle(problem: Problem, best: Problem) -> list[str]:
    """That the plan leaves a kind of nodes out, if it does."""
    if best.cluster.devices == problem.cluster.devices:
        return []
    return [
        f"{part.cluster.devices} x {part.device.name} idle: any plan with them is slower"
        for part in problem.parts
        if part.cluster != best.cluster
    ]


def estimate_request(request: Request, *, report: Reporter = _silent) -> Plan:
    """`estimate` for a `Request`."""
    began = time.perf_counter()
    fixed = make_constraints(request.fix, request.allow).fixed
    if request.gpus is None and request.cluster is None:
        degrees = ("data_replicate", "data_shard", "tensor", "context", "pipeline")
        request = replace(request, gpus=math.prod(fixed.get(name, 1) for name in degrees))
    problem, notes = make_problem(request, report=report)
    layout = layout_from_fixed(fixed, global_batch=problem.workload.global_batch)
    arranged = arrangements(problem)
    reasons = [check_layout(one.space, layout) for one in arranged]
    if all(reasons):
        raise ImpossibleError(f"impossible layout: {reasons[0]}")
    found = [
        (one, estimate_layout(one, layout))
        for one, reason in zip(arranged, reasons, strict=True)
        if reason is None
    ]
    best, estimated = min(found, key=lambda pair: _slowness(*pair))
    return describe(best, estimated, no_proof(time.perf_counter() - began), (), notes)


def _slowness(problem: Problem, found: Found) -> tuple[bool, float]:
    """Orders arrangements of one layout: what fits first, then the fastest."""
    grown = found.chain.capacity_bytes > problem.capacity_bytes
    return grown, found.staged.step_seconds


def make_problem(request: Request, *, report: Reporter = _silent) -> tuple[Problem, list[str]]:
    """Resolve everything that a request names; also what was assumed on the way."""
    question = resolve(request)
    return problem_of(question, graph_of(question, report=report)), list(question.notes)


def graph_of(question: Question, *, report: Reporter = _silent) -> ModelGraph:
    """The traced model of a question; read from the cache if it is there."""
    report(f"tracing {question.source.name}, or reading its cached trace")
    return model_graph(question.source, **trace_settings(question))


def trace_settings(question: Question) -> TraceSettings:
    """What, beside the model, a question's trace depends on."""
    return {
        "sequence_length": question.workload.sequence_length,
        "compute_dtype": "float32" if question.workload.precision == "fp32" else "bfloat16",
        "tensor_degrees": tuple(
            sorted(
                {
                    degree
                    for kind in question.cluster.kinds
                    for degree in tensor_degrees(kind.devices_per_node)
                }
            )
        ),
    }


def problem_of(question: Question, graph: ModelGraph) -> Problem:
    """A question with its traced model."""
    kinds = tuple(
        Problem(
            graph=graph,
            cluster=kind,
            device=kind.device,
            workload=question.workload,
            capacity_bytes=capacity,
            constraints=question.constraints,
        )
        for kind, capacity in zip(question.cluster.kinds, question.capacities_bytes, strict=True)
    )
    if len(kinds) == 1:
        return kinds[0]
    capacity = max(question.capacities_bytes)
    return replace(kinds[0], cluster=question.cluster, capacity_bytes=capacity, parts=kinds)


def _infeasible(problem: Problem, request: Request) -> PlanError:
    """Says what is missing and what would help."""
    if problem.parts:
        return _infeasible_on_two_kinds(problem)
    devices, capacity = problem.cluster.devices, problem.capacity_bytes
    name = problem.graph.name
    families, excluded = enumerate_families(problem.space, problem.constraints)
    if not families:
        reasons = "; ".join(reason for reason, _ in excluded.most_common(2))
        message = f"no layout of {name} on {devices} devices is possible"
        return ImpossibleError(
            f"{message}: {reasons}" if reasons else message,
            hint="leave out some of --fix, or change --gpus or --global-batch",
        )
    needed = least_needed_bytes(problem)
    assert needed is not None, "families exist"
    missing = needed - capacity
    message = (
        f"no plan fits: {name} on {devices} x {problem.device.name} needs "
        f"{missing / GIB:.1f} GiB more per device "
        f"({needed / GIB:.1f} GiB, {capacity / GIB:.1f} GiB are there)"
    )
    more = _enough_devices(problem, request)
    helps = []
    if more:
        helps.append(f"from {more} devices on")
    usable = MEMORY_FRACTION if request.memory_limit_gib is None else 1.0
    helps.append(f"with devices of {math.ceil(needed / usable / GIB)} GiB")
    return InfeasibleError(message, hint="it fits " + ", or ".join(helps))


def _infeasible_on_two_kinds(problem: Problem) -> PlanError:
    needed = [least_needed_bytes(one) for one in arrangements(problem)]
    name, where = problem.graph.name, problem.cluster.name
    if not any(needed):
        return ImpossibleError(
            f"no layout of {name} on {where} is possible: stages hold a whole number of devices of "
            "one kind, and there are at least two",
            hint="leave out some of --fix, or change --global-batch",
        )
    least = min(one for one in needed if one)
    return InfeasibleError(
        f"no plan fits: {name} on {where}, on neither kind of devices nor on both",
        hint=f"it fits with devices of {math.ceil(least / GIB)} GiB, or on more of them",
    )


def _enough_devices(problem: Problem, request: Request) -> int | None:
    """The fewest devices, in whole nodes, from which on something fits; None up to 64 times."""
    here, node = problem.cluster.devices, problem.cluster.devices_per_node
    usual = make_cluster(problem.device, here).devices_per_node if request.cluster is None else node
    step = max(node, usual)
    too_few, enough = 0, None  # in steps beyond what is there
    ahead = 1
    while enough is None and ahead * step <= 64 * max(here, step):
        if anything_fits(_resized(problem, request, _steps_beyond(here, step, ahead))):
            enough = ahead
        else:
            too_few, ahead = ahead, 2 * ahead
    if enough is None:
        return None
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if anything_fits(_resized(problem, request, _steps_beyond(here, step, middle))):
            enough = middle
        else:
            too_few = middle
    return _steps_beyond(here, step, enough)


def _steps_beyond(here: int, step: int, count: int) -> int:
    return (here // step + count) * step


def _resized(problem: Problem, request: Request, devices: int) -> Problem:
    """The same question on more devices; a default batch follows them."""
    length = problem.workload.sequence_length
    batch = request.global_batch or default_global_batch(length, devices)
    return replace(
        problem,
        cluster=problem.cluster.resized(devices),
        workload=problem.workload.model_copy(update={"global_batch": batch}),
        computes={},
    )
