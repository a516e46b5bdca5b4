"""Seconds of collectives and transfers, from the steps that NCCL takes."""

from __future__ import annotations

from math import ceil, log2
from typing import Literal, NamedTuple

from paraplan.cluster import Cluster

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]

BASE_SECONDS = 10e-6  # launch and synchronisation of a collective kernel


class Group(NamedTuple):
    """Ranks of a collective: ``size`` of them, ``per_node`` on each node they touch."""

    size: int
    per_node: int


def collective_seconds(kind: Kind, message_bytes: float, group: Group, cluster: Cluster) -> float:
    """Seconds of one collective.

    Args:
        message_bytes: all_gather: the gathered output; reduce_scatter: the input; all_reduce:
            the buffer; all_to_all: what each rank holds before the exchange.
    """
    size, per_node = group
    if size == 1:
        return 0.0
    nodes = size // per_node
    inside, between = cluster.link_inside, cluster.link_between
    bandwidth = inside.bandwidth_bytes_per_second.value * inside.efficiency.value
    if nodes > 1:
        network = between.bandwidth_bytes_per_second.value * between.efficiency.value
        bandwidth = min(bandwidth, per_node * network) if per_node > 1 else network
    hop = inside.latency_seconds.value
    far = between.latency_seconds.value
    if kind == "all_to_all":
        out = 0.0
        if nodes > 1:
            network = between.bandwidth_bytes_per_second.value * between.transfer_efficiency.value
            out = message_bytes * (size - per_node) / size / network
        near = message_bytes * (per_node - 1) / size
        near /= inside.bandwidth_bytes_per_second.value * inside.transfer_efficiency.value
        return BASE_SECONDS + max(out, near) + (far if nodes > 1 else hop)
    ring = (size - nodes) * hop + (nodes * far if nodes > 1 else 0.0)
    moved = message_bytes * (size - 1) / size / bandwidth
    if kind == "all_reduce":
        depth = ceil(log2(nodes)) if nodes > 1 else 0
        tree = 2 * (depth * far + (per_node - 1) * hop)
        return BASE_SECONDS + 2 * moved + min(2 * ring, tree)
    return BASE_SECONDS + moved + ring


def transfer_seconds(message_bytes: float, *, between_nodes: bool, cluster: Cluster) -> float:
    """Seconds of one point-to-point message between neighbours of a pipeline."""
    link = cluster.link_between if between_nodes else cluster.link_inside
    rate = link.bandwidth_bytes_per_second.value * link.transfer_efficiency.value
    return BASE_SECONDS + link.latency_seconds.value + message_bytes / rate
