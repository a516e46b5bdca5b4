"""How long `plan` takes, as ratios to importing torch and transformers in the same run.

    python benchmarks/plan_time.py            # about two minutes on two cores

Prints the median wall time of each command over that of ``import torch, transformers``, the
commands interleaved so that a busy machine touches all alike, and the CPU seconds of the two
largest cases. Targets: 1.3 with a cached trace, 3 with a cold cache, 10 CPU seconds.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS = 5
IMPORTS = [sys.executable, "-c", "import torch, transformers"]
PLAN = [sys.executable, "-m", "paraplan.cli", "--model"]
LARGE = [("llama-3-405b", "16384"), ("deepseek-v3", "2048")]


def seconds(command: list[str], cache: Path, folder: Path) -> tuple[float, float]:
    """Wall and CPU seconds of a command that must succeed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    subprocess.run(
        command,
        env=os.environ | {"PARAPLAN_CACHE": str(cache)},
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        warm = folder / "warm"
        mistral = [*PLAN, "mistral-7b", "--gpus", "16"]
        seconds(mistral, warm, folder)
        times: dict[str, list[float]] = {"import": [], "cached": [], "cold": []}
        for round_ in range(ROUNDS):
            times["import"].append(seconds(IMPORTS, warm, folder)[0])
            times["cached"].append(seconds(mistral, warm, folder)[0])
            times["cold"].append(seconds(mistral, folder / f"cold{round_}", folder)[0])
        base = statistics.median(times["import"])
        print(f"import torch, transformers          1.00 x   {base:.2f} s")
        for name, target in (("cached", 1.3), ("cold", 3.0)):
            median = statistics.median(times[name])
            spread = (max(times[name]) - min(times[name])) / median
            print(
                f"plan mistral-7b on 16, {name:6s} trace  {median / base:.2f} x   {median:.2f} s"
                f"   (target {target}, spread {spread * 100:.0f} %)"
            )
        for model, gpus in LARGE:
            command = [*PLAN, model, "--gpus", gpus]
            cold = seconds(command, warm, folder)[1]
            cached = seconds(command, warm, folder)[1]
            print(f"plan {model} on {gpus}: {cached:.1f} CPU s, {cold:.1f} with its trace")


if __name__ == "__main__":
    main()
