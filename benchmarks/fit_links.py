"""Figures of links, fitted to published collectives (called by fit_profiles.py)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fitting import Pairs, changed, figure, minimise, report, rows_of

from paraplan.cluster import Cluster, Link, load_cluster
from paraplan.collectives import Group, Kind, collective_seconds, transfer_seconds

Cases = list[tuple[float, Group, float]]
"""(message bytes, group, measured seconds)."""

NVLINK_STEP = {"latency_seconds": 3.4e-6}
"""NCCL's own figure for a step of an NVLink ring (its tuning table); the messages measured are
too long to tell it apart from the start of a collective."""

NETWORK_SHARE = {"efficiency": 0.95}
"""SimAI's share of line rate for long messages between NICs alone ("Multi (NIC)")."""


def with_links(base: Cluster, inside: dict[str, float], between: dict[str, float]) -> Cluster:
    """A cluster with trial figures of its links."""

    def link_of(link: Link, update: dict[str, float]) -> Link:
        trial = {name: figure(value) for name, value in update.items()}
        return changed(link, **trial)

    group = changed(base.node_groups[0], link_inside=link_of(base.link_inside, inside))
    return changed(
        base,
        node_groups=(group,),
        link_between=link_of(base.link_between, between),
    )


def fit_nvlink3(folder: Path) -> None:
    """NVLink 3 inside a node: all-reduces, an all-to-all, and messages between two devices."""
    base = load_cluster("dgx-a100-80gb")
    cases: dict[tuple[str, str], Cases] = {}
    for row in rows_of(folder, "microbench_collectives.csv"):
        size, source = float(row["size_bytes"]), row["source"].split()[0]
        # Aceso's other collectives include copies into and out of lists of tensors.
        wanted = ("all_reduce", "p2p") if source == "Aceso" else ("all_reduce", "all_to_all")
        if "A100" not in row["gpu"] or row["n_nodes"] != "1.0" or row["op"] not in wanted:
            continue
        rate = float(row["busbw_gbs"] or 0) * 1e9
        seconds = size / rate if row["op"] == "p2p" else float(row["time_us"] or 0) * 1e-6
        if size and 0 < seconds < 1:
            n = int(row["n_gpus"])
            cases.setdefault((row["op"], source), []).append((size, Group(n, n), seconds))

    def pairs_of(p: dict[str, float], of: tuple[str, str]) -> Pairs:
        cluster = with_links(base, NVLINK_STEP | p, {})
        thinned = cases[of][:: max(1, len(cases[of]) // 150)]
        if of[0] == "p2p":
            return [
                (transfer_seconds(size, between_nodes=False, cluster=cluster), seconds)
                for size, _, seconds in thinned
            ]
        kind: Kind = "all_reduce" if of[0] == "all_reduce" else "all_to_all"
        return [
            (collective_seconds(kind, size, group, cluster), seconds)
            for size, group, seconds in thinned
        ]

    def all_pairs(p: dict[str, float]) -> Pairs:
        return [pair for of in cases for pair in pairs_of(p, of)]

    start = {"efficiency": 0.75, "all_to_all_efficiency": 0.6, "transfer_efficiency": 0.75}
    fitted = minimise(all_pairs, start | {"start_seconds": 4e-5})
    for of in cases:
        report(f"{of[0]}, NVLink 3, 2 to 8", of[1], fitted, pairs_of(fitted, of))


def fit_nvlink4(folder: Path) -> None:
    """NVLink 4 and 8 x 400 Gb/s between nodes, from SimAI's ratios of line rate."""
    base = load_cluster("dgx-h100")
    inside: Cases = []
    between: Cases = []
    exchanges: Cases = []
    for row in rows_of(folder, "microbench_collectives.csv"):
        exchange = row["op"] == "all_to_all"
        if not row["source"].startswith("SimAI") or not (exchange or "_ag_" in row["op"]):
            continue
        ratio = re.search(r"= ([\d.]+)", row["notes"])
        size, n = float(row["size_bytes"]), int(row["n_gpus"])
        if ratio is None or not n or size > 4 * 2**30:  # longer messages than training sends
            continue
        line = 450e9 if n == 8 else 400e9
        seconds = size * (n - 1) / n / (float(ratio[1]) * line)
        if not exchange:
            (inside if n == 8 else between).append((size, Group(n, 8), seconds))
        elif n == 8:
            exchanges.append((size, Group(n, 8), seconds))

    def pairs_of(
        near: dict[str, float], far: dict[str, float], cases: Any, kind: Kind = "all_gather"
    ) -> Pairs:
        cluster = with_links(base, near, far)
        return [
            (collective_seconds(kind, size, group, cluster), seconds)
            for size, group, seconds in cases
        ]

    def inside_pairs(p: dict[str, float]) -> Pairs:
        return pairs_of(NVLINK_STEP | p, {}, inside)

    near = minimise(inside_pairs, {"efficiency": 0.8, "start_seconds": 2e-5})
    report("ring, NVLink 4, 8", "SimAI", NVLINK_STEP | near, inside_pairs(near))

    def exchange_pairs(p: dict[str, float]) -> Pairs:
        return pairs_of(NVLINK_STEP | near | p, {}, exchanges, "all_to_all")

    found = minimise(exchange_pairs, {"all_to_all_efficiency": 0.7})
    report("all-to-all, NVLink 4, 8", "SimAI", found, exchange_pairs(found))
    # One more hop does not change what starting the collective takes.
    fixed = NETWORK_SHARE | {"start_seconds": near["start_seconds"]}

    def between_pairs(p: dict[str, float]) -> Pairs:
        return pairs_of(NVLINK_STEP | near, fixed | p, between)

    far = minimise(between_pairs, {"latency_seconds": 1.4e-5})
    report("ring, 8 x 400 Gb/s, 16 to 1,024", "SimAI", fixed | far, between_pairs(far))


def fit_efa(folder: Path) -> None:
    """32 x 100 Gb/s EFA between nodes, from the playbook's means over a shared cluster."""
    base = load_cluster("aws-p5")
    kinds: dict[str, Kind] = {
        "all_reduce": "all_reduce",
        "all_gather": "all_gather",
        "reduce_scatter": "reduce_scatter",
    }
    cases = []
    for row in rows_of(folder, "microbench_collectives.csv"):
        n = int(row["n_gpus"])
        if row["source"].startswith("HF Ultra") and n > 8:
            size = float(row["size_bytes"])
            factor = (n - 1) / n * (2 if row["op"] == "all_reduce" else 1)
            cases.append(
                (kinds[row["op"]], size, Group(n, 8), size * factor / float(row["busbw_gbs"]) / 1e9)
            )

    def pairs_of(p: dict[str, float]) -> Pairs:
        cluster = with_links(base, {}, p)
        return [
            (collective_seconds(op, size, group, cluster), seconds)
            for op, size, group, seconds in cases
        ]

    fitted = minimise(
        pairs_of,
        {"efficiency": 0.6, "latency_seconds": 1e-4},
        {"efficiency": 1.0},
    )
    report("all, 32 x 100 Gb/s EFA, 16 to 512", "HF playbook, 256 MiB", fitted, pairs_of(fitted))


def fit_infinity_fabric(folder: Path) -> None:
    """Infinity Fabric of an MI250 node, from all-reduces of 4 and 8 dies."""
    base = load_cluster("mi250-8")
    cases = [
        (float(r["size_bytes"]), int(r["n_gpus"]), float(r["time_us"]) * 1e-6)
        for r in rows_of(folder, "microbench_collectives.csv")
        if r["source"].startswith("nnScaler") and r["op"] == "all_reduce" and r["n_gpus"] == "8"
    ]

    def pairs_of(p: dict[str, float]) -> Pairs:
        cluster = with_links(base, p, {})
        return [
            (collective_seconds("all_reduce", size, Group(n, n), cluster), seconds)
            for size, n, seconds in cases
        ]

    fitted = minimise(
        pairs_of,
        {"efficiency": 0.7, "start_seconds": 5e-5, "latency_seconds": 5e-6},
    )
    report("all-reduce, Infinity Fabric, 8", "nnScaler", fitted, pairs_of(fitted))
