"""What the user asks: `Request`, and the `Question` it becomes once every name is looked up.

Nothing is traced and nothing is planned here; looking a question up takes milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from paraplan.cluster import Cluster, load_cluster, make_cluster
from paraplan.device import load_device
from paraplan.errors import InputError
from paraplan.graph import RECOMPUTE_MODES, Recompute
from paraplan.layout import RUNTIME_CANNOT_APPLY_YET, Schedule
from paraplan.layout_rules import FIXABLE, Constraints
from paraplan.models import ModelSource, resolve_model
from paraplan.plan_parts import Workload
from paraplan.problem import MEMORY_FRACTION
from paraplan.workload import make_workload

DEFAULT_DEVICE = "h100"
DEFAULT_SEQUENCE_LENGTH = 4096
GIB = 2**30
SCALABLE = ("compute", "memory_bandwidth", "link_inside", "link_between")
"""What ``--scale`` can make faster or slower: the devices' FLOP/s, the bandwidth of their memory,
of the links between the devices of a node, and of the network between nodes."""


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
        memory_gib: what each device has, instead of what its profile says.
        scale: factors on rates of the cluster's profile, keys of `SCALABLE`.
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
    memory_gib: float | None = None
    scale: Mapping[str, float] = field(default_factory=dict)
    fix: Mapping[str, Any] = field(default_factory=dict)
    allow: tuple[str, ...] = ()
    top: int = 4
    trust_remote_code: bool = False
    time_limit_seconds: float = 60.0


@dataclass(frozen=True)
class Question:
    """A request with every name looked up and every default filled in.

    Attributes:
        capacities_bytes: what a plan may use of one device, for each kind of them.
        notes: what was assumed on the way.
    """

    request: Request
    source: ModelSource
    cluster: Cluster
    workload: Workload
    capacities_bytes: tuple[float, ...]
    constraints: Constraints
    notes: tuple[str, ...]


def resolve(request: Request) -> Question:
    """Look up everything that a request names.

    Raises:
        InputError: an unknown name, or a value that is not possible.
    """
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
    capacities = tuple(_capacity(request, kind) for kind in cluster.kinds)
    return Question(request, source, cluster, workload, capacities, constraints, (*notes,))


def request_from_options(model: str, options: Mapping[str, Any]) -> Request:
    """The request that a call of the Python API makes; ``fix``, ``scale`` may be text.

    Raises:
        InputError: an unknown option, or a value of the wrong kind.
    """
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
    if isinstance(checked.get("scale"), str):
        checked["scale"] = parse_scale(checked["scale"])
    if isinstance(checked.get("allow"), str):
        checked["allow"] = tuple(filter(None, checked["allow"].split(",")))
    if not isinstance(checked.get("fix", {}), Mapping):
        raise InputError(f"fix is {checked['fix']!r}; a mapping or 'key=value,...' is wanted")
    if not isinstance(checked.get("scale", {}), Mapping):
        raise InputError(f"scale is {checked['scale']!r}; a mapping or 'key=factor,...' is wanted")
    for name, kinds in (("device", str), ("cluster", (str, Path, Cluster))):
        value = checked.get(name)
        if value is not None and not isinstance(value, kinds):
            raise InputError(f"{name} is {value!r}; a name or a path is wanted")
    limit = checked.get("time_limit_seconds", 1.0)
    if not isinstance(limit, int | float) or not 0 < limit < math.inf:
        raise InputError(f"time_limit_seconds is {limit!r}; a positive number is wanted")
    return Request(model=model, **checked)


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


def parse_scale(text: str) -> dict[str, float]:
    """``compute=1.1,link_between=x2`` as a dict; a factor may begin with a times sign."""
    factors: dict[str, float] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, value = part.partition("=")
        if not equals:
            raise InputError(f"--scale {part!r} is not of the form key=factor")
        factors[name.strip().replace("-", "_")] = parse_factor(value, "--scale")
    return factors


def parse_factor(text: str, option: str) -> float:
    """``2`` or ``x2`` (or with a real times sign) as a number; `resolve` checks its size."""
    try:
        return float(text.strip().lstrip("xX\u00d7"))
    except ValueError:
        message = f"{option} is {text.strip()!r}; a factor is wanted, such as x2 or 0.5"
        raise InputError(message) from None


def _cluster(request: Request) -> Cluster:
    cluster = _named_cluster(request)
    if request.memory_gib is not None:
        cluster = cluster.with_memory(_gib(request.memory_gib, "memory") * GIB)
    for name, factor in request.scale.items():
        if name not in SCALABLE:
            raise InputError(f"--scale knows no {name!r}", hint=f"one of {', '.join(SCALABLE)}")
        number = isinstance(factor, int | float) and not isinstance(factor, bool)
        if not number or not 1e-3 <= factor <= 1e3:
            raise InputError(
                f"scale of {name} is {factor!r}; a factor from 0.001 to 1000 is wanted"
            )
        if factor != 1:
            cluster = cluster.scaled(name, factor)
    return cluster


def _named_cluster(request: Request) -> Cluster:
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
    cluster = load_cluster(request.cluster)
    if len(cluster.node_groups) > 2:
        raise InputError(f"{cluster.name} has {len(cluster.node_groups)} kinds of nodes; 2 at most")
    return cluster if request.gpus is None else cluster.resized(request.gpus)


def _capacity(request: Request, cluster: Cluster) -> float:
    whole = cluster.device.memory_capacity_bytes.value
    limit = request.memory_limit_gib
    if limit is None:
        return MEMORY_FRACTION * whole
    return min(whole, _gib(limit, "memory limit") * GIB)


def _gib(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**20:
        raise InputError(f"{what} is {value!r} GiB; a positive number is wanted")
    return value
