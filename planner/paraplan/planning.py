"""`plan` and `estimate`: from what the user asks for to a `Plan`.

`Request` holds the question, `make_problem` resolves model, cluster and workload, `search`
answers it, `describe` writes the answer down.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from paraplan.cluster import Cluster, load_cluster, make_cluster
from paraplan.describe import describe, no_proof, proof_of
from paraplan.device import load_device
from paraplan.errors import ImpossibleError, InfeasibleError, InputError, PlanError
from paraplan.fitting import anything_fits, least_needed_bytes
from paraplan.graph import RECOMPUTE_MODES, Recompute
from paraplan.layouts import (
    FIXABLE,
    Constraints,
    check_layout,
    enumerate_families,
    layout_from_fixed,
    pin_reason,
    tensor_degrees,
)
from paraplan.models import resolve_model
from paraplan.plan_file import RUNTIME_CANNOT_APPLY_YET, Plan, Schedule
from paraplan.problem import Problem
from paraplan.search import estimate_layout, search
from paraplan.trace_cache import model_graph
from paraplan.workload import default_global_batch, make_workload

DEFAULT_DEVICE = "h100"
DEFAULT_SEQUENCE_LENGTH = 4096
MEMORY_FRACTION = 0.94
"""Share of a device's memory that a plan may use when no limit is given; a chosen margin. The
profiles plan fragmentation at 7.24 % (reserved / allocated 1.072, median of 48 A100 runs); with
this margin a ratio of 1.141 still fits, which 87 % of the 248 ranks in Aceso's runs that Mist
published (A100, A10G, L4; mean 1.098) stay below."""
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Request:
    """The question; None means a default that fits the rest.

    Attributes:
        model: a preset, a directory with config.json, a cached Hugging Face id, or
            ``module:callable``.
        gpus: number of devices; ``gpus_per_node`` of them in a node.
        device: name or file of a device profile.
        cluster: name or file of a cluster profile, or a `Cluster`.
        global_batch: sequences of one optimizer step.
        seq_len: tokens of a sequence.
        memory_limit_gib: of one device; never more than it has (default: `MEMORY_FRACTION`).
        fix: layout fields, or ``recompute``, that are pinned.
        allow: fields to search although the runtime cannot apply them yet.
        top: how many of the best layouts to list, the plan itself included.
    """

    model: str
    gpus: int | None = None
    device: str | None = None
    gpus_per_node: int | None = None
    cluster: str | Cluster | None = None
    global_batch: int | None = None
    seq_len: int | None = None
    precision: str = "bf16"
    optimizer: str = "adamw"
    memory_limit_gib: float | None = None
    fix: Mapping[str, Any] = field(default_factory=dict)
    allow: tuple[str, ...] = ()
    top: int = 4
    trust_remote_code: bool = False
    time_limit_seconds: float = 60.0


Reporter = Callable[[str], None]


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
    return plan_request(_request(model, options), report=report)


def estimate(model: str, *, report: Reporter = _silent, **options: Any) -> Plan:
    """The prediction for the one layout that ``fix`` describes; nothing is searched.

    Degrees left out are 1; stage boundaries and recomputation are chosen best. The layout need
    not fit: ``prediction.fits`` says.

    Raises:
        InputError: an option is wrong, or the layout is impossible for this model.
    """
    return estimate_request(_request(model, options), report=report)


def _request(model: str, options: Mapping[str, Any]) -> Request:
    known = [f.name for f in fields(Request)]
    for name in options:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"one of {', '.join(known)}"
            raise InputError(f"unknown option {name!r}", hint=hint)
    if not isinstance(model, str):
        raise InputError(f"model is {model!r}; a name or a path is wanted")
    checked = dict(options)
    if isinstance(checked.get("fix"), str):
        checked["fix"] = parse_fix(checked["fix"])
    if isinstance(checked.get("allow"), str):
        checked["allow"] = tuple(filter(None, checked["allow"].split(",")))
    if not isinstance(checked.get("fix", {}), Mapping):
        raise InputError(f"fix is {checked['fix']!r}; a mapping or 'key=value,...' is wanted")
    for name, kinds in (("device", str), ("cluster", (str, Path, Cluster))):
        value = checked.get(name)
        if value is not None and not isinstance(value, kinds):
            raise InputError(f"{name} is {value!r}; a name or a path is wanted")
    limit = checked.get("time_limit_seconds", 1.0)
    if not isinstance(limit, int | float) or not 0 < limit < math.inf:
        raise InputError(f"time_limit_seconds is {limit!r}; a positive number is wanted")
    return Request(model=model, **checked)


def plan_request(request: Request, *, report: Reporter = _silent) -> Plan:
    """`plan` for a `Request`."""
    if isinstance(request.top, bool) or not isinstance(request.top, int) or request.top < 1:
        raise InputError(f"top is {request.top!r}; a whole number from 1 on is wanted")
    problem, notes = make_problem(request, report=report)
    reason = pin_reason(problem.space, problem.constraints)
    if reason:
        raise ImpossibleError(
            f"no layout of {problem.graph.name} on {problem.cluster.devices} devices is possible: "
            f"{reason}",
            hint="leave out some of --fix, or change --gpus or --global-batch",
        )
    found = search(
        problem,
        runner_ups=request.top - 1,
        time_limit_seconds=request.time_limit_seconds,
        report=report,
    )
    if found is None:
        raise _infeasible(problem, request)
    return describe(problem, found.best, proof_of(found), found.runner_ups, notes)


def estimate_request(request: Request, *, report: Reporter = _silent) -> Plan:
    """`estimate` for a `Request`."""
    began = time.perf_counter()
    fixed = make_constraints(request.fix, request.allow).fixed
    if request.gpus is None and request.cluster is None:
        degrees = ("data_replicate", "data_shard", "tensor", "context", "pipeline")
        request = replace(request, gpus=math.prod(fixed.get(name, 1) for name in degrees))
    problem, notes = make_problem(request, report=report)
    layout = layout_from_fixed(fixed, global_batch=problem.workload.global_batch)
    reason = check_layout(problem.space, layout)
    if reason:
        raise ImpossibleError(f"impossible layout: {reason}")
    found = estimate_layout(problem, layout)
    return describe(problem, found, no_proof(time.perf_counter() - began), (), notes)


def make_problem(request: Request, *, report: Reporter = _silent) -> tuple[Problem, list[str]]:
    """Resolve everything that a request names; also what was assumed on the way."""
    constraints = make_constraints(request.fix, request.allow)
    cluster = _cluster(request)
    source = resolve_model(request.model, trust_remote_code=request.trust_remote_code)
    notes = []
    length = request.seq_len
    if length is None:
        length = source.fixed_sequence_length or min(
            source.max_sequence_length or DEFAULT_SEQUENCE_LENGTH, DEFAULT_SEQUENCE_LENGTH
        )
        notes.append(f"sequence length {length} (not given)")
    workload = make_workload(
        sequence_length=length,
        devices=cluster.devices,
        global_batch=request.global_batch,
        precision=request.precision,
        optimizer=request.optimizer,
    )
    if request.global_batch is None:
        notes.append(f"global batch {workload.global_batch} (not given)")
    if source.max_sequence_length and length > source.max_sequence_length:
        notes.append(f"sequences longer than the config's {source.max_sequence_length} positions")
    report(f"tracing {source.name}, or reading its cached trace")
    graph = model_graph(
        source,
        sequence_length=length,
        compute_dtype="float32" if request.precision == "fp32" else "bfloat16",
        tensor_degrees=tensor_degrees(cluster.devices_per_node),
    )
    problem = Problem(
        graph=graph,
        cluster=cluster,
        device=cluster.device,
        workload=workload,
        capacity_bytes=_capacity(request, cluster),
        constraints=constraints,
    )
    return problem, notes


def make_constraints(fix: Mapping[str, Any], allow: tuple[str, ...]) -> Constraints:
    """Check what the user pinned and allowed.

    Raises:
        InputError: an unknown field or an impossible value.
    """
    for name in allow:
        if name not in RUNTIME_CANNOT_APPLY_YET:
            raise InputError(
                f"--allow knows no {name!r}", hint=f"one of {', '.join(RUNTIME_CANNOT_APPLY_YET)}"
            )
    modes: tuple[Recompute, ...] = RECOMPUTE_MODES
    fixed = {}
    for name, value in fix.items():
        if name not in FIXABLE:
            close = get_close_matches(str(name), FIXABLE, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"one of {', '.join(FIXABLE)}"
            raise InputError(f"--fix knows no {name!r}", hint=hint)
        checked = _fixed_value(name, value)
        if name == "recompute":
            modes = (checked,)
        else:
            fixed[name] = checked
    return Constraints(fixed=fixed, recompute=modes, allow=allow)


def parse_fix(text: str) -> dict[str, Any]:
    """``tensor=2,recompute=full`` as a dict; values checked by `make_constraints`."""
    fixed: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, value = part.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise InputError(f"--fix {part!r} is not of the form key=value")
        if name in fixed:
            raise InputError(f"--fix names {name!r} twice")
        fixed[name] = value.strip()
    return fixed


def _fixed_value(name: str, value: Any) -> Any:
    choices: tuple[Any, ...] = ()
    if name == "recompute":
        choices = RECOMPUTE_MODES
    elif name == "schedule":
        choices = get_args(Schedule)
    if choices:
        if value not in choices:
            raise InputError(f"{name} is {value!r}; one of {', '.join(choices)} is wanted")
        return value
    if name == "sequence_parallel":
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        found = words.get(str(value).lower())
        if found is None:
            raise InputError(f"sequence_parallel is {value!r}; true or false is wanted")
        return found
    low, high = (0, 3) if name == "zero_stage" else (1, 2**24)
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:
        number = None
    if isinstance(number, bool) or not isinstance(number, int) or not low <= number <= high:
        raise InputError(f"{name} is {value!r}; a whole number from {low} to {high} is wanted")
    return number


def _cluster(request: Request) -> Cluster:
    for name, value in (("gpus", request.gpus), ("gpus-per-node", request.gpus_per_node)):
        wrong = isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 2**20
        if value is not None and wrong:
            raise InputError(f"--{name} is {value!r}; a whole number from 1 to {2**20} is wanted")
    if request.cluster is None:
        if request.gpus is None:
            raise InputError("how many devices? --gpus is missing", hint="for example --gpus 16")
        device = load_device(request.device or DEFAULT_DEVICE)
        return make_cluster(device, request.gpus, devices_per_node=request.gpus_per_node)
    if request.device is not None or request.gpus_per_node is not None:
        raise InputError("--cluster already names the device and its nodes; leave out the others")
    if isinstance(request.cluster, Cluster):
        return request.cluster if request.gpus is None else request.cluster.resized(request.gpus)
    return load_cluster(request.cluster, devices=request.gpus)


def _capacity(request: Request, cluster: Cluster) -> float:
    whole = cluster.device.memory_capacity_bytes.value
    limit = request.memory_limit_gib
    if limit is None:
        return MEMORY_FRACTION * whole
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < 2**20:
        raise InputError(f"memory limit is {limit!r} GiB; a positive number is wanted")
    return min(whole, limit * GIB)


def _infeasible(problem: Problem, request: Request) -> PlanError:
    """Says what is missing and what would help."""
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
