"""What the data ranks gather and reduce of a block, and how it overlaps with computation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from paraplan.cluster import Cluster
from paraplan.collectives import Group, Kind, collective_seconds, contention_seconds
from paraplan.engine import Engine
from paraplan.layout import Layout


def peers(size: int, stride: int, devices_per_node: int) -> Group:
    """The group of ``size`` ranks that lie ``stride`` ranks apart."""
    room = max(1, devices_per_node // stride)
    per_node = next(n for n in range(min(size, room), 0, -1) if size % n == 0)
    return Group(size, per_node)


def tensor_group(layout: Layout, cluster: Cluster) -> Group:
    """The tensor ranks: neighbours."""
    return peers(layout.tensor, 1, cluster.devices_per_node)


def shard_group(layout: Layout, cluster: Cluster) -> Group:
    """The ranks over which FSDP shards."""
    stride = layout.tensor * layout.context
    return peers(layout.data_shard, stride, cluster.devices_per_node)


def replicate_group(layout: Layout, cluster: Cluster) -> Group:
    """The ranks that hold the same shard: data replicas, and context ranks."""
    stride = layout.tensor * (layout.data_shard if layout.data_replicate > 1 else 1)
    size = layout.data_replicate * layout.context
    return peers(size, stride, cluster.devices_per_node)


@dataclass(frozen=True, slots=True)
class Numerics:
    """Bytes per parameter that follow from precision and optimizer.

    Attributes:
        compute: of a parameter in the compute dtype.
        optimizer_state: beside the fp32 parameter and gradient.
        optimizer_work: while it updates.
    """

    compute: int
    optimizer_state: float
    optimizer_work: float = 0.0


class Traffic(NamedTuple):
    """Collectives that overlap with computation.

    Attributes:
        seconds: they take.
        taken: seconds by which they lengthen the computation beside them (they hold
            multiprocessors and memory bandwidth: `collectives.contention_seconds`).
    """

    seconds: float = 0.0
    taken: float = 0.0

    def plus(self, other: Traffic) -> Traffic:
        """Both, one after the other."""
        return Traffic(self.seconds + other.seconds, self.taken + other.taken)


NONE = Traffic()


def overlapped(computation: float, traffic: Traffic) -> float:
    """Seconds until both are done (form and figures: Mist's benchmark, docs/profiles.md)."""
    return max(traffic.seconds, computation + traffic.taken)


def after(computation: float, traffic: Traffic) -> float:
    """Seconds until both are done, one after the other."""
    return computation + traffic.seconds


def exposed(computation: float, traffic: Traffic) -> float:
    """What is added when there is nothing yet, or nothing any more, to overlap with."""
    return computation + traffic.seconds - overlapped(computation, traffic)


def data_traffic(
    parameters: float,
    layout: Layout,
    spread: int,
    numerics: Numerics,
    cluster: Cluster,
    engine: Engine,
) -> tuple[Traffic, Traffic, Traffic]:
    """Gather, reduce-scatter and all-reduce of parameters held by 1/``spread`` of the ranks."""
    if not parameters:
        return NONE, NONE, NONE
    shard = shard_group(layout, cluster)
    replicate = replicate_group(layout, cluster)
    if spread > 1:
        stride = layout.tensor * spread
        shard = peers(max(1, layout.data_shard // spread), stride, cluster.devices_per_node)
        copies = layout.data_ranks * layout.context // spread // shard.size
        replicate = peers(max(1, copies), stride * shard.size, cluster.devices_per_node)
    return (
        _traffic("all_gather", numerics.compute * parameters, shard, cluster, engine),
        _traffic("reduce_scatter", engine.reduce_bytes * parameters, shard, cluster, engine),
        _traffic(
            "all_reduce", engine.reduce_bytes * parameters / shard.size, replicate, cluster, engine
        ),
    )


def _traffic(
    kind: Kind, message_bytes: float, group: Group, cluster: Cluster, engine: Engine
) -> Traffic:
    piece = engine.bucket_bytes or message_bytes
    seconds = collective_seconds(kind, piece, group, cluster)
    taken = contention_seconds(kind, piece, group, cluster, seconds)
    return Traffic(seconds * message_bytes / piece, taken * message_bytes / piece)
