"""From timings to a cluster profile: measured figures in place of a base profile's.

What could not be measured here keeps the base's figure, and says what that rests on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, NamedTuple

from paraplan.block_compute import block_compute
from paraplan.cluster import Cluster, Link, LinkSpeeds
from paraplan.collectives import Group, between_seconds, inside_seconds
from paraplan.device import Device
from paraplan.graph import Block, ModelGraph, attention_flops
from paraplan.layout import Layout
from paraplan.op_table import Dtype, MeasuredOp
from paraplan.profile_tasks import (
    AttentionTask,
    GemmTask,
    HostTask,
    LayerTask,
    LinkTask,
    RateTask,
)


class Seconds(NamedTuple):
    """Of one call, over all rounds; the fields of `measure_clock.Timing`."""

    seconds: float
    spread: float
    lag: float = 0.0


@dataclass(frozen=True, slots=True)
class MemoryCall:
    """A memory-bound call of a model, timed.

    Attributes:
        count: how often the model makes it.
    """

    name: str
    dtype: Dtype
    size_bytes: int
    count: int
    timing: Seconds


@dataclass(frozen=True, slots=True)
class Measurements:
    """Everything that was timed on one machine, and where.

    Attributes:
        tasks: timings of the tasks.
        where: one line for the figures' sources: device, software, date.
        facts: figures that are read, not timed, by the field of `Device`.
        ranks: that computed at once, on all ``nodes``.
    """

    tasks: Mapping[Any, Seconds]
    calls: Sequence[MemoryCall]
    where: str
    facts: Mapping[str, float]
    ranks: int
    dtype: Dtype
    nodes: int = 1

    def of(self, kind: type) -> list[tuple[Any, Seconds]]:
        """The tasks of one kind."""
        return [(task, timing) for task, timing in self.tasks.items() if isinstance(task, kind)]

    def rate(self, what: str) -> tuple[float, Seconds] | None:
        """Bytes and timing of a `RateTask`."""
        found = [(t.size_bytes, s) for t, s in self.of(RateTask) if t.what == what]
        return found[0] if found else None


def measured_ops(made: Measurements) -> tuple[MeasuredOp, ...]:
    """The timed ops as the profile keeps them.

    Calls of one name and size that differ in their strides are one op to the cost model: their
    mean, weighted by how often a model makes each.
    """
    ops = [
        MeasuredOp(
            kind="gemm",
            dtype=task.dtype,
            dims=(task.batch, task.m, task.n, task.k),
            seconds=timing.seconds,
            spread=timing.spread,
        )
        for task, timing in made.of(GemmTask)
    ]
    ops += [
        MeasuredOp(
            kind="attention",
            dtype=task.dtype,
            dims=task.dims,
            causal=task.causal,
            phase=task.phase,
            seconds=timing.seconds,
            spread=timing.spread,
        )
        for task, timing in made.of(AttentionTask)
        if task.implementation == "default"
    ]
    alike: dict[tuple[str, Dtype, int], list[MemoryCall]] = {}
    for call in made.calls:
        alike.setdefault((call.name, call.dtype, call.size_bytes), []).append(call)
    for (name, dtype, size), calls in sorted(alike.items()):
        count = sum(call.count for call in calls)
        ops.append(
            MeasuredOp(
                kind="memory",
                dtype=dtype,
                name=name,
                size_bytes=size,
                seconds=sum(c.count * c.timing.seconds for c in calls) / count,
                spread=max(call.timing.spread for call in calls),
            )
        )
    return tuple(ops)


def measured_cluster(base: Cluster, made: Measurements) -> Cluster:
    """The base profile with everything that was measured in it."""
    content = base.model_dump(mode="json", exclude_none=True)
    group = content["node_groups"][0]
    _device(group["device"], made)
    inside = [(task, timing) for task, timing in made.of(LinkTask) if task.per_node is None]
    between = [(task, timing) for task, timing in made.of(LinkTask) if task.per_node is not None]
    if inside:
        _link(group["link_inside"], inside, made)
    if between:
        _link(content["link_between"], between, made)
    group |= {"count": made.nodes, "devices_per_node": made.ranks // made.nodes}
    content["name"] = f"{base.name}-measured"
    content["description"] = made.where
    return Cluster.model_validate(content)


def _figure(value: float, made: Measurements, what: str) -> dict[str, Any]:
    return {"value": value, "basis": "measured", "source": f"{what}; {made.where}"}


def _device(device: dict[str, Any], made: Measurements) -> None:
    device["description"] = made.where
    for field, value in made.facts.items():
        device[field] = _figure(value, made, "read from the system")
    _rates_of_products(device, made)
    _rates_of_memory(device, made)
    _rates_of_attention(device, made)
    floor, launch = made.rate("floor"), made.rate("launch")
    if floor is not None:
        device["kernel_floor_seconds"] = _figure(floor[1].seconds, made, "adding 2 KiB")
    if launch is not None:
        what = "eager calls in a row, the device behind"
        device["host_launch_seconds"] = _figure(launch[1].seconds, made, what)
    for task, timing in made.of(HostTask):
        field, what = HOST_FIGURES[task.what]
        device[field] = _figure(timing.seconds, made, what)
    device["ops"] = [op.model_dump(mode="json", exclude_defaults=True) for op in measured_ops(made)]


HOST_FIGURES = {
    "update": ("host_update_seconds", "AdamW on parameters of 8 elements"),
    "full_recompute": ("host_full_recompute_seconds", "checkpointed ops on 4 x 8 elements"),
    "selective_recompute": (
        "host_selective_recompute_seconds",
        "ops on 4 x 8 elements, checkpointed but for the products",
    ),
    "sharded_update": ("host_sharded_update_seconds", "AdamW on DTensors of 8 elements"),
    "local": ("host_local_seconds", "DTensor.to_local() and its backward"),
    "hooks": ("host_hooks_seconds", "FSDP2 over plain modules, for a group of parameters"),
    "reduce": ("host_reduce_seconds", "FSDP2 with over without a reduction, on one rank"),
}
"""Field and source of what a `HostTask` gives."""


def _rates_of_products(device: dict[str, Any], made: Measurements) -> None:
    best: dict[str, float] = {}
    for task, timing in made.of(GemmTask):
        rate = 2.0 * task.batch * task.m * task.n * task.k / timing.seconds
        best[task.dtype] = max(rate, best.get(task.dtype, 0.0))
    for dtype, rate in best.items():
        peak = device["peak_flops_per_second"].get(dtype)
        if peak is None or device["kind"] == "cpu" or peak["value"] < rate:
            device["peak_flops_per_second"][dtype] = peak = _figure(rate, made, "fastest product")
        share = _figure(rate / peak["value"], made, "fastest product over the peak")
        device["gemm"]["efficiency"][dtype] = share
        device["gemm"].get("sustained", {}).pop(dtype, None)  # the scale of whole layers says it


def _rates_of_memory(device: dict[str, Any], made: Measurements) -> None:
    rates = sorted((call.size_bytes, call.size_bytes / call.timing.seconds) for call in made.calls)
    optimizer = made.rate("optimizer")
    if not rates or optimizer is None:
        return
    update = optimizer[0] / optimizer[1].seconds
    name = "memory_bandwidth_bytes_per_second"
    fastest = max(update, *(rate for _, rate in rates))
    if device["kind"] == "cpu" or fastest > device[name]["value"]:
        device[name] = _figure(fastest, made, "fastest memory-bound call, caches included")
    peak = device[name]["value"]
    large = [rate for size, rate in rates if size >= rates[-1][0] / 8]
    device["memory_efficiency"] = _figure(median(large) / peak, made, "median of large calls")
    device["optimizer_efficiency"] = _figure(update / peak, made, "AdamW")


def _rates_of_attention(device: dict[str, Any], made: Measurements) -> None:
    """Of each head size the rate at the longest length, without a mask if there is one."""
    longest: dict[tuple[str, int, str], tuple[tuple[bool, int], float]] = {}
    for task, timing in made.of(AttentionTask):
        keys, size = task.dims[4:6]
        flops = attention_flops(task.dims, causal=task.causal, window=None, phase=task.phase)
        rate = flops / timing.seconds
        name = (task.implementation, size, task.phase)
        if (not task.causal, keys) >= longest.get(name, ((False, 0), 0.0))[0]:
            longest[name] = ((not task.causal, keys), rate)
    peak = device["peak_flops_per_second"][made.dtype]["value"]
    kept = dict(device["attention"][0])
    found = []
    for kind in dict.fromkeys(name[0] for name in longest):
        sizes = sorted({size for k, size, _ in longest if k == kind})
        rates = [
            {
                "head_size": size,
                **{
                    f"{phase}_efficiency": _figure(
                        min(1.0, longest[kind, size, phase][1] / peak), made, "longest measured"
                    )
                    for phase in ("forward", "backward")
                },
            }
            for size in sizes
        ]
        label = "torch's pick" if kind == "default" else kind
        found.append(kept | {"implementation": label, "rates": rates})
    if found:
        device["attention"] = found


def _link(
    link: dict[str, Any], timed: Sequence[tuple[LinkTask, Seconds]], made: Measurements
) -> None:
    """The collectives themselves, and figures for groups that were not measured."""
    link["measured"] = [
        {
            "kind": task.kind,
            "ranks": task.ranks,
            "message_bytes": task.message_bytes,
            "seconds": timing.seconds,
            "spread": timing.spread,
        }
        | ({} if task.per_node is None else {"per_node": task.per_node})
        for task, timing in timed
    ]
    sizes = [task.message_bytes for task, _ in timed]
    ends = [min(task.ranks for task, _ in timed), max(task.ranks for task, _ in timed)]
    rates: dict[str, list[float]] = {}
    for task, timing in timed:
        if task.message_bytes == max(sizes) and task.ranks in ends:
            rates.setdefault(task.kind, []).append(_of_a_link(task) / timing.seconds)
    ring = [r for kind in ("all_reduce", "all_gather", "reduce_scatter") for r in rates[kind]]
    best = max(max(values) for values in rates.values())
    name = "bandwidth_bytes_per_second"
    if link[name]["basis"] != "datasheet" or best > link[name]["value"]:
        link[name] = _figure(best, made, "fastest long message")
    peak = link[name]["value"]
    link["efficiency"] = _figure(median(ring) / peak, made, "longest collectives")
    for kind, field in (
        ("all_to_all", "all_to_all_efficiency"),
        ("transfer", "transfer_efficiency"),
    ):
        if kind in rates:
            link[field] = _figure(median(rates[kind]) / peak, made, "longest messages")
    shortest = [(t, s) for t, s in timed if t.message_bytes == min(sizes) and t.ranks == 2]
    if shortest:
        _start(link, shortest, made)


def _start(
    link: dict[str, Any], shortest: Sequence[tuple[LinkTask, Seconds]], made: Measurements
) -> None:
    """Start and latency, which short messages between two ranks cannot tell apart.

    Both are as many times the base's as all that these messages take beside their bytes.
    """
    speeds = Link.model_validate(link | {"measured": ()}).speeds
    no_wait = replace(speeds, start=0.0, latency=0.0)
    times = []
    for task, timing in shortest:
        modelled, of_bytes = (_pair_seconds(task, one) for one in (speeds, no_wait))
        if modelled > of_bytes:
            times.append((timing.seconds - of_bytes) / (modelled - of_bytes))
    if times:
        factor = max(0.0, median(times))
        what = "shortest messages between two ranks beside their bytes"
        link["start_seconds"] = _figure(factor * speeds.start, made, what)
        what = f"as large a part of the measured start as here: {link['latency_seconds']['source']}"
        latency = {"value": factor * speeds.latency, "basis": "modelled", "source": what}
        link["latency_seconds"] = latency


def _pair_seconds(task: LinkTask, speeds: LinkSpeeds) -> float:
    """A task of two ranks by the formula."""
    if task.kind == "transfer":
        return speeds.start + speeds.latency + task.message_bytes / speeds.transfer
    if task.per_node is None:
        return inside_seconds(task.kind, task.message_bytes, 2, speeds)
    return between_seconds(task.kind, task.message_bytes, Group(2, 1), speeds, speeds)


def _of_a_link(task: LinkTask) -> float:
    """Bytes that a device's share of the busiest link moves (`collectives`)."""
    if task.kind == "transfer":
        return task.message_bytes
    kept = 1 if task.per_node is None else task.per_node
    if task.kind == "all_to_all":
        return task.message_bytes * (task.ranks - kept) / task.ranks
    passes = 2 if task.kind == "all_reduce" else 1
    return passes * task.message_bytes * (task.ranks - 1) / task.ranks / kept


def predicted_layer_seconds(graph: ModelGraph, task: LayerTask, cluster: Cluster) -> float:
    """Forward and backward of the model's one layer."""
    layout = Layout(micro_batch_size=task.sequences)
    device: Device = cluster.device
    cost = block_compute(_layer(graph), layout, device=device, cluster=cluster)
    return cost.forward.total + cost.backward.total


def layer_calls(graph: ModelGraph) -> float:
    """Ops of a forward and a backward of the model's one layer."""
    return sum(op.count for op in _layer(graph).variants[1].ops)


def _layer(graph: ModelGraph) -> Block:
    return next(block for block in graph.blocks.values() if block.role == "layer")


class LayerFit(NamedTuple):
    """What whole layers take: ``scale * seconds of their ops alone + calls * launch_seconds``.

    Attributes:
        launch_seconds: what modules and autograd take for each op, on a CPU; None on a GPU, where
            the device hides it or `RateTask` measured it.
    """

    scale: float
    launch_seconds: float | None
    layers: int


def fit_layers(
    ops_seconds: Sequence[float], calls: Sequence[float], measured_seconds: Sequence[float]
) -> LayerFit:
    """The scale and the launch that make the sum of squared errors over the time least.

    Layers of a few tokens, whose ops take next to nothing, tell the launch. Their errors are of
    some per cent like all others', so that squares over the time leave the scale to the large ones.
    """
    import torch

    took = torch.tensor(measured_seconds, dtype=torch.float64)
    parts = torch.tensor([list(ops_seconds), list(calls)], dtype=torch.float64)
    weights = took.rsqrt()
    found = torch.linalg.lstsq((parts * weights).T, (took * weights)[:, None]).solution
    scale, launch = found[:, 0].tolist()
    if scale <= 0 or launch < 0:  # noise: there is no such thing
        scale, launch = sum(measured_seconds) / sum(ops_seconds), 0.0
    return LayerFit(scale, launch, len(took))


def with_layers(cluster: Cluster, fit: LayerFit, lag: float, made: Measurements) -> Cluster:
    """The cluster with what whole layers tell: their scale, launches, and the ranks' lag."""
    content = cluster.model_dump(mode="json", exclude_none=True)
    device = content["node_groups"][0]["device"]
    what = f"{fit.layers} whole layers over their ops alone"
    device["whole_layer_scale"] = _figure(fit.scale, made, what)
    if fit.launch_seconds is not None:
        what = f"what {fit.layers} whole layers take beside that, for each op"
        device["host_launch_seconds"] = _figure(fit.launch_seconds, made, what)
    if made.ranks > 1:
        what = "slowest rank of each batch of whole layers over the mean of all"
        device["lag_fraction"] = _figure(lag, made, what)
    return Cluster.model_validate(content)


def with_speedup(cluster: Cluster, times: float, made: Measurements) -> Cluster:
    """The cluster with how much faster ranks are that share their core with none."""
    content = cluster.model_dump(mode="json", exclude_none=True)
    what = "whole layers on all ranks over the same while only as many compute as there are cores"
    content["node_groups"][0]["device"]["unshared_speedup"] = _figure(times, made, what)
    return Cluster.model_validate(content)
