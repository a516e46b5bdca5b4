"""Points per second of `plan what-if`, on an empty cache of points; CPU seconds of all processes.

python benchmarks/what_if.py              # 28 points: 8 to 512 GPUs, four devices
python benchmarks/what_if.py --thousand   # and 1,008: with batches, memories and networks
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from paraplan.cpu_ranks import available_cores
from paraplan.request import Request
from paraplan.what_if_axes import Axes
from paraplan.what_if_file import WhatIf
from paraplan.what_if_rows import Sweep, run_sweep

SMALL = Axes(
    model=("mistral-7b",),
    device=("h100", "h200", "mi300x", "a100"),
    gpus=(8, 16, 32, 64, 128, 256, 512),
)
THOUSAND = replace(
    SMALL, global_batch=(512, 1024, 2048), memory_gib=(40, 80, 141, 192), link_bandwidth=(0.5, 1, 2)
)


def cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(name: str, axes: Axes, workers: int) -> WhatIf:
    began, cpu = time.perf_counter(), cpu_seconds()
    result = run_sweep(Sweep(axes=axes, common=Request(model="", top=1)), workers=workers)
    seconds, cpu = time.perf_counter() - began, cpu_seconds() - cpu
    count = len(result.points)
    planned = sum(point.status == "planned" for point in result.points)
    print(
        f"{name}: {count} points ({planned} with a plan) on {workers} workers: {seconds:.1f} s, "
        f"{count / seconds:.1f} points/s; {cpu:.1f} CPU s, {cpu / count:.2f} a point",
        flush=True,
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--thousand", action="store_true")
    parser.add_argument("--workers", type=int, default=available_cores())
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        traces = Path(os.environ.get("PARAPLAN_CACHE", Path.home() / ".cache" / "paraplan"))
        (Path(folder) / "graphs").symlink_to(traces / "graphs")
        os.environ["PARAPLAN_CACHE"] = folder
        measure("first", SMALL, options.workers)
        measure("again", SMALL, options.workers)
        if options.thousand:
            measure("thousand", THOUSAND, options.workers)


if __name__ == "__main__":
    main()
