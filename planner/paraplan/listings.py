"""The commands that only list: models, devices and clusters, the schema of the plan file."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paraplan.device import Device


def print_csv(rows: list[dict[str, Any]]) -> int:
    """Rows of the same keys on standard output; returns exit code 0."""
    from paraplan.tables import rows_to_csv

    sys.stdout.write(rows_to_csv(rows))
    sys.stdout.flush()
    return 0


def list_models(options: argparse.Namespace) -> int:
    """`plan models`."""
    from paraplan.models import preset_names

    names = preset_names()
    if options.csv:
        return print_csv([{"model": name} for name in names])
    print(json.dumps({"models": list(names)}) if options.json else "\n".join(names))
    return 0


def list_devices(options: argparse.Namespace) -> int:
    """`plan devices`."""
    from paraplan.cluster import cluster_names, load_cluster
    from paraplan.device import device_names, load_device

    devices = [load_device(name) for name in device_names()]
    clusters = [load_cluster(name) for name in cluster_names()]
    if options.json:
        print(
            json.dumps(
                {
                    "devices": [device.model_dump(mode="json") for device in devices],
                    "clusters": [cluster.model_dump(mode="json") for cluster in clusters],
                }
            )
        )
        return 0
    if options.csv:
        return print_csv([_device_row(device) for device in devices])
    for device in devices:
        gib = device.memory_capacity_bytes.value / 2**30
        print(f"{device.name:18s} {gib:6.1f} GiB  {device.description}")
    print()
    for cluster in clusters:
        print(f"{cluster.name:18s} {cluster.devices_per_node} per node  {cluster.description}")
    return 0


def _device_row(device: Device) -> dict[str, Any]:
    figures = ("memory_capacity_bytes", "memory_bandwidth_bytes_per_second", "power_watts")
    row: dict[str, Any] = {"device": device.name, "cluster": device.default_cluster}
    for name in (*figures, "price_per_device_hour"):
        figure = getattr(device, name)
        row[name] = None if figure is None else figure.value
    for dtype in ("bfloat16", "float16", "float32"):
        peak = device.peak_flops_per_second.get(dtype)
        row[f"{dtype}_flops_per_second"] = None if peak is None else peak.value
    return row


def print_schema(options: argparse.Namespace) -> int:
    """`plan schema`."""
    from paraplan.plan_file import plan_schema

    print(json.dumps(plan_schema(), indent=2))
    return 0
