import random
from itertools import pairwise
from typing import get_args

import pytest

from paraplan.cluster import Cluster, cluster_names, load_cluster
from paraplan.collectives import (
    Group,
    Kind,
    collective_seconds,
    overlap_contention,
    transfer_seconds,
)

KINDS: tuple[Kind, ...] = get_args(Kind)
CLUSTERS = {name: load_cluster(name) for name in cluster_names()}


def random_group(rng: random.Random, cluster: Cluster) -> Group:
    per_node = rng.choice([n for n in (1, 2, 4, 8) if n <= cluster.devices_per_node])
    return Group(per_node * rng.choice([1, 1, 2, 3, 8, 64]), per_node)


def random_case(rng: random.Random, cluster: Cluster) -> tuple[Kind, float, Group]:
    return rng.choice(KINDS), 2 ** rng.uniform(0, 34), random_group(rng, cluster)


@pytest.mark.parametrize("name", CLUSTERS)
def test_monotone_in_bytes_and_positive(name: str) -> None:
    cluster, rng = CLUSTERS[name], random.Random(1)
    for _ in range(100):
        kind, size, group = random_case(rng, cluster)
        less, more = (collective_seconds(kind, s, group, cluster) for s in (size, 1.5 * size))
        assert 0 <= less <= more
        assert (less == 0) == (group.size == 1)


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_faster_link_is_never_slower(name: str) -> None:
    cluster, rng = CLUSTERS[name], random.Random(2)
    for _ in range(60):
        kind, size, group = random_case(rng, cluster)
        factor = rng.uniform(1, 20)
        before = collective_seconds(kind, size, group, cluster)
        for faster in (
            cluster.with_link_inside_scaled(factor),
            cluster.with_link_between_scaled(factor),
        ):
            assert collective_seconds(kind, size, group, faster) <= before * (1 + 1e-12)


def without_latency(cluster: Cluster) -> Cluster:
    data = cluster.model_dump()
    for link in (data["link_between"], data["node_groups"][0]["link_inside"]):
        link["latency_seconds"]["value"] = 0.0
    return Cluster.model_validate(data)


@pytest.mark.parametrize("name", CLUSTERS)
def test_an_all_reduce_takes_at_least_a_reduce_scatter(name: str) -> None:
    # Between many nodes a tree's few steps can beat a ring's many; in bytes it never does.
    cluster, rng = CLUSTERS[name], random.Random(3)
    quick = without_latency(cluster)
    for _ in range(100):
        _, size, group = random_case(rng, cluster)
        for where in (cluster, quick):
            reduce, scatter, gather = (
                collective_seconds(kind, size, group, where)
                for kind in ("all_reduce", "reduce_scatter", "all_gather")
            )
            assert gather == scatter
            assert reduce <= scatter + gather
            if where is quick or group.per_node == group.size:
                assert scatter <= reduce * (1 + 1e-12)


def test_never_beats_the_wire() -> None:
    rng = random.Random(4)
    for cluster in CLUSTERS.values():
        peak = cluster.link_inside.bandwidth_bytes_per_second.value
        for _ in range(50):
            size, n = 2 ** rng.uniform(10, 34), rng.randint(2, 8)
            gather = collective_seconds("all_gather", size, Group(n, n), cluster)
            # Every rank receives all but its own share.
            assert gather >= size * (n - 1) / n / peak


@pytest.mark.parametrize("kind", KINDS)
def test_more_ranks_take_longer(kind: Kind) -> None:
    cluster = CLUSTERS["dgx-h100"]
    for groups in (
        [Group(n, n) for n in (1, 2, 4, 8)],
        [Group(8 * nodes, 8) for nodes in (1, 2, 4, 8, 64)],
        [Group(nodes, 1) for nodes in (2, 4, 8, 64)],
    ):
        for size in (2**16, 2**24, 2**30):
            times = [collective_seconds(kind, size, group, cluster) for group in groups]
            assert all(first <= second for first, second in pairwise(times)), (groups, size)


def test_more_members_on_a_node_use_more_ports() -> None:
    cluster = CLUSTERS["dgx-a100-80gb"]
    alone = collective_seconds("all_gather", 2**30, Group(4, 1), cluster)
    together = collective_seconds("all_gather", 2**30, Group(16, 4), cluster)
    # Four ports instead of one; 15/16 of the message instead of 3/4 crosses each link.
    assert together / alone == pytest.approx(15 / 16 / (3 / 4) / 4, rel=0.02)


def test_nodes_slower_than_links_inside() -> None:
    for cluster in CLUSTERS.values():
        inside = collective_seconds("all_gather", 2**28, Group(2, 2), cluster)
        assert inside < collective_seconds("all_gather", 2**28, Group(2, 1), cluster)
        near, far = (
            transfer_seconds(2**24, between_nodes=between, cluster=cluster)
            for between in (False, True)
        )
        assert near < far


@pytest.mark.parametrize(
    ("size", "ranks", "microseconds"),
    [(2**24, 8, 232), (2**27, 8, 1162), (2**30, 8, 8193), (2**27, 4, 999), (2**30, 2, 5443)],
)
def test_published_all_reduces_on_a100(size: int, ranks: int, microseconds: float) -> None:
    """nccl-tests on one node of A100-SXM4-80GB, published with vTrain; within 15 %."""
    cluster = CLUSTERS["dgx-a100-80gb"]
    seconds = collective_seconds("all_reduce", size, Group(ranks, ranks), cluster)
    assert seconds == pytest.approx(microseconds * 1e-6, rel=0.15)


@pytest.mark.parametrize(("nodes", "share"), [(2, 0.85), (8, 0.69), (32, 0.387), (64, 0.209)])
def test_published_rings_between_nodes(nodes: int, share: float) -> None:
    """256 MiB on nodes with 8 x 400 Gb/s: SimAI's shares of line rate, within 25 %."""
    n, size = 8 * nodes, 2**28
    seconds = collective_seconds("all_gather", size, Group(n, 8), CLUSTERS["dgx-h100"])
    assert size * (n - 1) / n / seconds == pytest.approx(share * 400e9, rel=0.25)


def test_transfer_is_monotone_and_has_a_start() -> None:
    cluster = CLUSTERS["dgx-h100"]
    times = [transfer_seconds(s, between_nodes=True, cluster=cluster) for s in (0, 2**20, 2**24)]
    assert times[0] > 0
    assert times == sorted(set(times))


def test_contention_grows_with_the_rate_of_the_group() -> None:
    cluster = CLUSTERS["dgx-a100-80gb"]
    device = cluster.device
    shares = [overlap_contention(g, cluster) for g in (Group(2, 1), Group(8, 4), Group(16, 8))]
    assert shares == sorted(shares)
    assert shares[0] > device.overlap_contention_floor.value
    full = device.overlap_contention.value
    assert shares[-1] < full == overlap_contention(Group(8, 8), cluster)
    assert overlap_contention(Group(1, 1), cluster) == 0
