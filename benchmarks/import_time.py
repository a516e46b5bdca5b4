"""What the entry point costs ``import torch``: paired starts of Python, with it and without.

    python benchmarks/import_time.py [--pairs 20]

Prints the median of the paired ratios (target: at most 1.02). Processor time, because the wall
clock of a shared machine measures the others.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys

TARGET = 1.02


def import_seconds(autoload: str) -> float:
    """Processor time of a Python that imports torch."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-c", "import torch"],
        env=os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": autoload},
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20)
    pairs = parser.parse_args().pairs
    import_seconds("1")  # the first one reads the files from disk
    ratios, seconds = [], []
    for pair in range(pairs):
        # Which one goes first alternates.
        order = ("0", "1") if pair % 2 else ("1", "0")
        taken = {autoload: import_seconds(autoload) for autoload in order}
        ratios.append(taken["1"] / taken["0"])
        seconds.append(taken["0"])
    low, _, high = statistics.quantiles(ratios, n=4)
    print(
        f"import torch with the entry point: {statistics.median(ratios):.3f} x "
        f"(quartiles {low:.3f} to {high:.3f}, {pairs} pairs, target {TARGET}); "
        f"without it {statistics.median(seconds):.2f} s"
    )


if __name__ == "__main__":
    main()
