"""Seconds of collectives and transfers, from the steps that NCCL and its like take.

A ring over all ranks moves ``(n - 1) / n`` of the message through every link, in ``n - 1`` steps
(Patarasuk & Yuan 2009); an all-reduce does so twice. Rings of several channels enter and leave a
node through all the NICs of the group's members there, so that a group with g members on a node
has g NICs' bandwidth (NCCL's rings; nccl-tests' bus bandwidth is the rate of such a ring). An
all-reduce may go up and down a tree instead, in as many steps as the tree is deep: over hundreds
of ranks it can take less time than a gather of the same message (as measured, see the docs).
Switches that reduce (NVLink SHARP) shorten it inside nodes, and leave one node-wide message
between them.

  seconds = start + steps * latency + bytes on the busiest link / its bandwidth

The figures are in the cluster's profile; docs/profiles.md says how they were fitted and how well.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from paraplan.cluster import Cluster, LinkSpeeds

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]


class Group(NamedTuple):
    """Ranks of a collective: ``size`` of them, ``per_node`` on each node they touch."""

    size: int
    per_node: int


def collective_seconds(kind: Kind, message_bytes: float, group: Group, cluster: Cluster) -> float:
    """Seconds of one collective; other groups of the same shape run theirs at the same time.

    Args:
        message_bytes: all_gather: the gathered output; reduce_scatter: the input; all_reduce:
            the buffer; all_to_all: what each rank holds before the exchange.
    """
    size, per_node = group
    if size <= 1:
        return 0.0
    near = cluster.link_inside.speeds
    if per_node >= size:
        table = cluster.link_inside.table
        measured = None if table is None else table.seconds(kind, size, None, message_bytes)
        if measured is not None:
            return measured
        return inside_seconds(kind, message_bytes, size, near)
    far = cluster.link_between.speeds
    modelled = between_seconds(kind, message_bytes, group, near, far)
    table = cluster.link_between.table
    nearest = None if table is None else table.nearest(kind, size, per_node)
    if table is None or nearest is None:
        return modelled
    measured = table.seconds(kind, nearest, per_node, message_bytes)
    if measured is None:
        return modelled
    # Of other numbers of nodes than the measured one the formula says how much more they take.
    alike = Group(nearest, per_node)
    return measured * (modelled / between_seconds(kind, message_bytes, alike, near, far))


def between_seconds(
    kind: Kind, message_bytes: float, group: Group, near: LinkSpeeds, far: LinkSpeeds
) -> float:
    """A group of several nodes, by the formula."""
    size, per_node = group
    if kind == "all_to_all":
        return _exchange_seconds(message_bytes, size, per_node, near, far)
    nodes = size // per_node
    bandwidth = min(near.ring, per_node * far.ring) if per_node > 1 else far.ring
    moved = message_bytes * (size - 1) / size / bandwidth
    ring = (size - nodes) * near.latency + nodes * far.latency
    if kind == "all_reduce":
        return far.start + _all_reduce_seconds(message_bytes, moved, ring, group, near, far)
    return far.start + moved + ring


def inside_seconds(kind: Kind, message_bytes: float, size: int, link: LinkSpeeds) -> float:
    """A group within one node, by the formula."""
    moved = message_bytes * (size - 1) / size
    steps = (size - 1) * link.latency
    if kind == "all_to_all":
        return link.start + steps + moved / link.all_to_all
    if kind == "all_reduce":
        rate = link.ring * link.all_reduce_speedup
        return link.start + 2 * steps / link.all_reduce_speedup + 2 * moved / rate
    return link.start + steps + moved / link.ring


def _all_reduce_seconds(
    message_bytes: float,
    moved: float,
    ring: float,
    group: Group,
    near: LinkSpeeds,
    far: LinkSpeeds,
) -> float:
    """All-reduce across nodes: the better of two rings, a tree, and reducing switches."""
    size, per_node = group
    nodes = size // per_node
    depth = 2 * ((nodes - 1).bit_length() * far.latency + (per_node - 1) * near.latency)
    seconds = 2 * moved + min(2 * ring, depth)
    if near.all_reduce_speedup > 1 and per_node > 1:
        # Reduced in each node first, so that only one copy of the buffer leaves it.
        between = 2 * message_bytes * (nodes - 1) / nodes / (per_node * far.ring)
        rate = near.ring * near.all_reduce_speedup
        inside = 2 * message_bytes * (per_node - 1) / per_node / rate
        seconds = min(seconds, max(between, inside) + depth)
    # Never faster than the reduce-scatter that it contains.
    return max(seconds, moved + min(ring, depth))


def _exchange_seconds(
    message_bytes: float, size: int, per_node: int, near: LinkSpeeds, far: LinkSpeeds
) -> float:
    """All-to-all across nodes: each rank sends a part to every other, on both networks at once."""
    between = message_bytes * (size - per_node) / size / far.all_to_all
    inside = message_bytes * (per_node - 1) / size / near.all_to_all
    # Messages to the members of another node are on their way at the same time.
    steps = (size // per_node - 1) * far.latency + (per_node - 1) * near.latency
    return far.start + steps + max(between, inside)


def transfer_seconds(message_bytes: float, *, between_nodes: bool, cluster: Cluster) -> float:
    """Seconds of one message from a device to its neighbour in a pipeline."""
    chosen = cluster.link_between if between_nodes else cluster.link_inside
    if chosen.table is not None:
        per_node = 1 if between_nodes else None
        measured = chosen.table.seconds("transfer", 2, per_node, message_bytes)
        if measured is not None:
            return measured
    link = chosen.speeds
    return link.start + link.latency + message_bytes / link.transfer


def overlap_contention(group: Group, cluster: Cluster) -> float:
    """Share of the computation that a collective of ``group`` takes away while it runs.

    Computation that takes ``a`` seconds alone beside a collective of ``b`` seconds takes
    ``max(b, a + share * b)``. The share has a part for the multiprocessors that any collective
    holds and a part that grows with the bytes it moves per second; the device's two figures are
    its ends (fitted to Mist's interference benchmark, docs/profiles.md).
    """
    size, per_node = group
    if size <= 1:
        return 0.0
    device = cluster.device
    full = device.overlap_contention.value
    if per_node >= size:
        return full
    floor = min(full, device.overlap_contention_floor.value)
    rate = per_node * cluster.link_between.speeds.ring / cluster.link_inside.speeds.ring
    return floor + (full - floor) * min(1.0, rate)


def contention_seconds(
    kind: Kind, message_bytes: float, group: Group, cluster: Cluster, seconds: float
) -> float:
    """Seconds by which a collective lengthens the computation that runs beside it.

    `overlap_contention` times the collective's ``seconds``; across nodes its part that grows with
    the rate counts only while bytes move, so that a faster network, which moves them in less time
    at a higher rate, takes no more away in all.
    """
    size, per_node = group
    if size <= 1:
        return 0.0
    device = cluster.device
    full = device.overlap_contention.value
    if per_node >= size:
        return full * seconds
    floor = min(full, device.overlap_contention_floor.value)
    passes = 2 if kind == "all_reduce" else 1
    moved = passes * message_bytes * (size - 1) / size
    return floor * seconds + (full - floor) * moved / cluster.link_inside.speeds.ring
