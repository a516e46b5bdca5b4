"""What a sweep varies: reads ranges such as ``8,16,32..512`` and makes the grid of requests."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from paraplan.cluster import load_cluster
from paraplan.device import load_device
from paraplan.errors import InputError
from paraplan.models import resolve_model
from paraplan.request import Request, parse_factor
from paraplan.workload import make_workload

AXIS_NAMES = (
    "device",
    "cluster",
    "precision",
    "seq_len",
    "global_batch",
    "memory_gib",
    "link_bandwidth",
    "spot_interruptions",
)
"""Fields of `Axes` beside the model and the number of devices."""
MOST_POINTS = 100_000
_RANGE = re.compile(r"(\d+)\.\.(\d+)(?:\+(\d+))?")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Axes:
    """What is varied; every combination is a point, the first field slowest.

    Attributes:
        model, device, cluster: names or files; devices and clusters are alternatives.
        gpus: numbers of devices.
        global_batch, seq_len: None is `plan`'s own default.
        memory_gib: of a device; None is what it has.
        link_bandwidth: factors on the network between nodes.
        spot_interruptions: of one node, a day.
    """

    model: tuple[str, ...]
    device: tuple[str | None, ...] = (None,)
    cluster: tuple[str | None, ...] = (None,)
    precision: tuple[str, ...] = ("bf16",)
    seq_len: tuple[int | None, ...] = (None,)
    global_batch: tuple[int | None, ...] = (None,)
    memory_gib: tuple[float | None, ...] = (None,)
    link_bandwidth: tuple[float, ...] = (1.0,)
    spot_interruptions: tuple[float, ...] = (0.0,)
    gpus: tuple[int | None, ...] = (None,)


@dataclass(frozen=True)
class GridPoint:
    """One combination: what to plan, and how often its nodes are taken away.

    Attributes:
        series: what all points have in common that differ only in the number of devices.
    """

    request: Request
    spot_interruptions: float
    series: tuple[object, ...] = field(default=())


def grid(axes: Axes, common: Request) -> list[GridPoint]:
    """Every combination of the axes, put into the ``common`` request.

    Raises:
        InputError: a name that does not exist, or too many points.
    """
    _check_names(axes, common)
    if axes.device != (None,) and axes.cluster != (None,):
        raise InputError("--device and --cluster are alternatives: a cluster names its device")
    columns: list[tuple[Any, ...]] = list(vars(axes).values())
    count = 1
    for column in columns:
        count *= len(column)
    if count > MOST_POINTS:
        raise InputError(f"the sweep has {count:,} points; at most {MOST_POINTS:,} are planned")
    points = []
    for (
        model,
        device,
        cluster,
        precision,
        seq_len,
        batch,
        memory,
        link,
        spot,
        gpus,
    ) in itertools.product(*columns):
        request = replace(
            common,
            model=model,
            device=device,
            cluster=cluster,
            precision=precision,
            seq_len=seq_len,
            global_batch=batch,
            memory_gib=memory,
            scale=_scale(common.scale, link),
            gpus=gpus,
        )
        series = (model, device, cluster, precision, seq_len, batch, memory, link, spot)
        points.append(GridPoint(request, spot, series))
    return points


def _scale(common: Mapping[str, float], link: float) -> dict[str, float]:
    if link == 1:
        return dict(common)
    return {**common, "link_between": common.get("link_between", 1.0) * link}


def _check_names(axes: Axes, common: Request) -> None:
    """A name that does not exist is an error of the whole sweep, not a point without a plan."""
    for model in axes.model:
        resolve_model(model, trust_remote_code=common.trust_remote_code)
    for device in filter(None, axes.device):
        load_device(device)
    for cluster in filter(None, axes.cluster):
        load_cluster(cluster)
    for precision in axes.precision:
        make_workload(sequence_length=1, devices=1, precision=precision, optimizer=common.optimizer)


def command_of(request: Request) -> str:
    """The `plan` command that answers a request."""
    words = ["plan", "--model", request.model]
    options: dict[str, object] = {
        "--gpus": request.gpus,
        "--device": request.device,
        "--gpus-per-node": request.gpus_per_node,
        "--cluster": request.cluster,
        "--global-batch": request.global_batch,
        "--seq-len": request.seq_len,
        "--precision": None if request.precision == "bf16" else request.precision,
        "--optimizer": None if request.optimizer == "adamw" else request.optimizer,
        "--memory": _number(request.memory_gib),
        "--memory-limit": _number(request.memory_limit_gib),
        "--scale": ",".join(f"{k}={_number(v)}" for k, v in request.scale.items()) or None,
        "--fix": ",".join(f"{k}={v}" for k, v in request.fix.items()) or None,
        "--allow": ",".join(request.allow) or None,
    }
    for name, value in options.items():
        if value is not None:
            words += [name, str(value)]
    if request.trust_remote_code:
        words.append("--trust-remote-code")
    return shlex.join(words)


def _number(value: float | None) -> str | None:
    """Without a needless ``.0``, and exact: it is read again."""
    return None if value is None else repr(value).removesuffix(".0")


def axes_from_values(values: Mapping[str, Any]) -> Axes:
    """Axes from Python values: one, several in a list, or text as on the command line.

    Raises:
        InputError: nothing to vary over, or text that cannot be read.
    """
    readers = {"gpus": parse_numbers, "global_batch": parse_numbers, "seq_len": parse_numbers}
    columns: dict[str, Any] = {}
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, str):
            columns[name] = readers.get(name, parse_names)(value, name)
        elif isinstance(value, Sequence):
            columns[name] = tuple(value)
        else:
            columns[name] = (value,)
        if not columns[name]:
            raise InputError(f"{name} is empty; the sweep would have no points")
    return Axes(**columns)


def parse_numbers(text: str, option: str) -> tuple[int, ...]:
    """``8,16,32..512`` or ``8..64+8``: a range doubles, or goes up by what stands behind ``+``.

    Raises:
        InputError: empty, not of that form, or the end below the start.
    """
    return _parse_list(text, option, lambda part: _numbers(part, option))


def _numbers(part: str, option: str) -> Iterator[int]:
    if part.isdecimal():
        yield int(part)
        return
    match = _RANGE.fullmatch(part)
    if not match:
        raise InputError(
            f"{option} has {part!r}; whole numbers and ranges are wanted",
            hint=f"such as {option} 8,16,32..512, which doubles, or {option} 8..64+8",
        )
    low, high = int(match[1]), int(match[2])
    step = int(match[3]) if match[3] else 0
    if not 0 < low <= high or (match[3] and step < 1):
        raise InputError(f"{option} has the empty range {part!r}")
    if step and (high - low) // step > MOST_POINTS:
        raise InputError(f"{option} has {part!r}, more than {MOST_POINTS:,} numbers")
    while low <= high:
        yield low
        low = low + step if step else 2 * low


def parse_factors(text: str, option: str) -> tuple[float, ...]:
    """``x0.5,x1,x2`` as numbers."""
    return _parse_list(text, option, lambda part: [parse_factor(part, option)])


def parse_reals(text: str, option: str) -> tuple[float, ...]:
    """``80,141`` as numbers that are not negative."""

    def real(part: str) -> list[float]:
        if not re.fullmatch(r"\d+(\.\d+)?|\.\d+", part):
            raise InputError(f"{option} has {part!r}; a number is wanted")
        return [float(part)]

    return _parse_list(text, option, real)


def parse_names(text: str, option: str) -> tuple[str, ...]:
    """``h100,a100`` as names."""
    return _parse_list(text, option, lambda part: [part])


def _parse_list(
    text: str, option: str, read: Callable[[str], Sequence[T] | Iterator[T]]
) -> tuple[T, ...]:
    parts = [part.strip() for part in text.split(",")]
    found = [value for part in parts if part for value in read(part)]
    if not found:
        raise InputError(f"{option} is empty; the sweep would have no points")
    return tuple(dict.fromkeys(found))
