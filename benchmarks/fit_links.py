"""Figures of links, fitted to published collectives (called by fit_profiles.py)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fitting import Pairs, changed, figure, mean_log_error, minimise, report, rows_of

from paraplan.cluster import Cluster, Link, load_cluster
from paraplan.collectives import Group, collective_seconds, transfer_seconds

NVLINK_STEP = {"latency_seconds": 3.4e-6}
"""NCCL's own figure for a step of an NVLink ring (its tuning table); the messages measured are
too long to tell it apart from the start of a collective."""

NETWORK_SHARE = {"efficiency": 0.95}
"""SimAI's share of line rate for long messages between NICs alone ("Multi (NIC)")."""


def with_links(base: Cluster, inside: dict[str, float], between: dict[str, float]) -> Cluster:
    """A cluster with trial figures of its links."""

    def link_of(link: Link, update: dict[str, float]) -> Link:
        trial = {name: figure(value) for name, value in update.items()}
        return changed(link, **trial)  # type: ignore[no-any-return]

    group = changed(base.node_groups[0], link_inside=link_of(base.link_inside, inside))
    return changed(
        base,
        node_groups=(group,),  # type: ignore[no-any-return]
        link_between=link_of(base.link_between, between),
    )


def fit_nvlink3(folder: Path) -> None:
    """NVLink 3 inside a node, from all-reduces, an all-to-all and messages between two."""
    base = load_cluster("dgx-a100-80gb")
    table = [r for r in rows_of(folder, "microbench_collectives.csv") if "A100" in r["gpu"]]
    reductions: dict[str, list[tuple[float, Group, float]]] = {}
    for row in table:
        seconds = float(row["time_us"] or 0) * 1e-6
        size = float(row["size_bytes"])
        if row["op"] == "all_reduce" and row["n_nodes"] == "1.0" and 0 < seconds < 1 and size:
            n = int(row["n_gpus"])
            reductions.setdefault(row["source"].split()[0], []).append((size, Group(n, n), seconds))

    def reduction_pairs(p: dict[str, float], source: str) -> Pairs:
        cluster = with_links(base, p, {})
        cases = reductions[source]
        thinned = cases[:: max(1, len(cases) // 150)]
        return [
            (collective_seconds("all_reduce", size, group, cluster), seconds)
            for size, group, seconds in thinned
        ]

    def total(p: dict[str, float]) -> float:  # every source weighs the same
        return sum(mean_log_error(reduction_pairs(p, source)) for source in reductions)

    fitted = NVLINK_STEP | minimise(
        lambda p: total(NVLINK_STEP | p), {"efficiency": 0.75, "start_seconds": 3e-5}
    )
    for source in reductions:
        report("all-reduce, NVLink 3, 2 to 8", source, fitted, reduction_pairs(fitted, source))
    fixed = {name: fitted[name] for name in ("start_seconds", "latency_seconds")}
    fit_one(
        base,
        fixed,
        "all_to_all",
        "all_to_all_efficiency",
        [
            (
                float(r["size_bytes"]),
                Group(int(r["n_gpus"]), int(r["n_gpus"])),
                float(r["time_us"]) * 1e-6,
            )
            for r in table
            if r["op"] == "all_to_all" and r["source"].startswith("Galvatron")
        ],
        "Galvatron",
    )
    fit_one(
        base,
        fixed,
        "transfer",
        "transfer_efficiency",
        [
            (
                float(r["size_bytes"]),
                Group(2, 2),
                float(r["size_bytes"]) / float(r["busbw_gbs"]) / 1e9,
            )
            for r in table
            if r["op"] == "p2p" and r["n_nodes"] == "1.0" and r["source"].startswith("Aceso")
        ],
        "Aceso p2p (Mist)",
    )


def fit_one(
    base: Cluster,
    fixed: dict[str, float],
    kind: str,
    name: str,
    cases: list[tuple[float, Group, float]],
    source: str,
) -> None:
    """One efficiency of the links inside a node, start and latency given."""

    def pairs_of(p: dict[str, float]) -> Pairs:
        cluster = with_links(base, fixed | p, {})
        if kind == "transfer":
            return [
                (transfer_seconds(size, between_nodes=False, cluster=cluster), seconds)
                for size, _, seconds in cases
            ]
        return [
            (collective_seconds(kind, size, group, cluster), seconds)  # type: ignore[arg-type]
            for size, group, seconds in cases
        ]

    fitted = minimise(lambda p: mean_log_error(pairs_of(p)), {name: 0.7}, {name: 1.0})
    report(f"{kind}, NVLink 3", source, fitted, pairs_of(fitted))


def fit_nvlink4(folder: Path) -> None:
    """NVLink 4 and 8 x 400 Gb/s between nodes, from SimAI's ratios of line rate."""
    base = load_cluster("dgx-h100")
    inside, between = [], []
    for row in rows_of(folder, "microbench_collectives.csv"):
        if not row["source"].startswith("SimAI") or not row["op"].startswith("all_reduce_or"):
            continue
        ratio = re.search(r"= ([\d.]+)", row["notes"])
        size, n = float(row["size_bytes"]), int(row["n_gpus"])
        if ratio is None or not n or size > 4 * 2**30:  # longer messages than training sends
            continue
        line = 450e9 if n == 8 else 400e9
        seconds = size * (n - 1) / n / (float(ratio[1]) * line)
        (inside if n == 8 else between).append((size, Group(n, 8), seconds))

    def pairs_of(near: dict[str, float], far: dict[str, float], cases: Any) -> Pairs:
        cluster = with_links(base, near, far)
        return [
            (collective_seconds("all_gather", size, group, cluster), seconds)
            for size, group, seconds in cases
        ]

    def inside_pairs(p: dict[str, float]) -> Pairs:
        return pairs_of(NVLINK_STEP | p, {}, inside)

    near = minimise(
        lambda p: mean_log_error(inside_pairs(p)), {"efficiency": 0.8, "start_seconds": 2e-5}
    )
    report("ring, NVLink 4, 8", "SimAI", NVLINK_STEP | near, inside_pairs(near))
    # One more hop does not change what starting the collective takes.
    fixed = NETWORK_SHARE | {"start_seconds": near["start_seconds"]}

    def between_pairs(p: dict[str, float]) -> Pairs:
        return pairs_of(NVLINK_STEP | near, fixed | p, between)

    far = minimise(lambda p: mean_log_error(between_pairs(p)), {"latency_seconds": 1.4e-5})
    report("ring, 8 x 400 Gb/s, 16 to 1,024", "SimAI", fixed | far, between_pairs(far))


def fit_efa(folder: Path) -> None:
    """32 x 100 Gb/s EFA between nodes, from the playbook's means over a shared cluster."""
    base = load_cluster("aws-p5")
    cases = []
    for row in rows_of(folder, "microbench_collectives.csv"):
        n = int(row["n_gpus"])
        if row["source"].startswith("HF Ultra") and n > 8:
            size = float(row["size_bytes"])
            factor = (n - 1) / n * (2 if row["op"] == "all_reduce" else 1)
            cases.append(
                (row["op"], size, Group(n, 8), size * factor / float(row["busbw_gbs"]) / 1e9)
            )

    def pairs_of(p: dict[str, float]) -> Pairs:
        cluster = with_links(base, {}, p)
        return [
            (collective_seconds(op, size, group, cluster), seconds)
            for op, size, group, seconds in cases
        ]

    fitted = minimise(
        lambda p: mean_log_error(pairs_of(p)),
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
        lambda p: mean_log_error(pairs_of(p)),
        {"efficiency": 0.7, "start_seconds": 5e-5, "latency_seconds": 5e-6},
    )
    report("all-reduce, Infinity Fabric, 8", "nnScaler", fitted, pairs_of(fitted))
