"""Time from ``python train_mistral.py`` to its first loss, beyond what the plain script takes.

    python benchmarks/startup_time.py [--processes 2]

Planning is timed alone too, with an empty cache and with a full one.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def first_loss(folder: str, script: str, **variables: str) -> tuple[float, str]:
    """Seconds until the first loss is printed, and what was written to stderr."""
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, script],
            cwd=folder,
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        assert process.stdout is not None
        seconds = None
        for line in process.stdout:
            if "loss" in line and seconds is None:
                seconds = time.perf_counter() - began
        process.wait()
        errors.seek(0)
        text = errors.read()
    if seconds is None:
        raise RuntimeError(text)
    return seconds, text


def planning_seconds(text: str) -> float:
    found = re.search(r"(?:planned in|cached,) ([\d.]+) s", text)
    return float(found[1]) if found else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    count = parser.parse_args().processes
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, EXAMPLES / "make_inputs.py"], cwd=folder, check=True)
        script = str(EXAMPLES / "train_mistral.py")
        common = {"PARAPLAN_CACHE": f"{folder}/cache", "OMP_NUM_THREADS": "1"}
        plain, _ = first_loss(folder, script, PARAPLAN_DEVICES="cpu:1", **common)
        cold, cold_text = first_loss(folder, script, PARAPLAN_DEVICES=f"cpu:{count}", **common)
        warm, warm_text = first_loss(folder, script, PARAPLAN_DEVICES=f"cpu:{count}", **common)
    print(f"first loss of the plain script      {plain:6.2f} s")
    print(
        f"on {count} CPU processes, empty cache    {cold:6.2f} s ({cold - plain:+.2f} s), "
        f"planning {planning_seconds(cold_text):.2f} s (target 2)"
    )
    print(
        f"on {count} CPU processes, cached plan    {warm:6.2f} s ({warm - plain:+.2f} s), "
        f"planning {planning_seconds(warm_text):.2f} s (target 0.2)"
    )


if __name__ == "__main__":
    main()
