"""Runs the scripts of examples/ as a user does, bounds their time, and reads their losses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
LIMIT_SECONDS = 300.0
"""For one start of four processes that import transformers on two busy cores."""

BATCH, LENGTH, RANKS = 8, 32, 4


def run_python(
    folder: Path, *arguments: str, limit_seconds: float = LIMIT_SECONDS, **variables: str
) -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS`` in ``folder``; the caller judges how it ended."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=limit_seconds,
        env=environment(folder) | variables,
        check=False,
    )


def environment(folder: Path) -> dict[str, str]:
    """This process's, without what would make a start differ from a user's."""
    left_out = ("PARAPLAN_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
    return kept | {
        "PARAPLAN_CACHE": str(folder / "cache"),
        "PARAPLAN_LOG_DIR": str(folder / "logs"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def losses(done: subprocess.CompletedProcess[str]) -> list[float]:
    """The losses that a script printed, after checking that it ended well."""
    assert done.returncode == 0, done.stderr[-3000:]
    return [float(text) for text in re.findall(r"loss (\S+)", done.stdout)]


def without_line(folder: Path, script: str) -> Path:
    """The example without its line, and without ``.cuda()``, which a CPU does not know."""
    text = (EXAMPLES / script).read_text()
    lines = [line for line in text.splitlines() if "enable_advanced_parallelization()" not in line]
    plain = folder / f"plain_{script}"
    plain.write_text("\n".join(lines).replace(".cuda()", ""))
    return plain


def make_plan(folder: Path, model: str, fix: str) -> Path:
    """A plan file for four CPU processes, by the command."""
    from paraplan.cli import main

    file = folder / f"{Path(model).name}-{re.sub('[=,]', '-', fix)}.plan.json"
    question = ["--model", str(folder / model), "--device", "cpu", "--gpus", str(RANKS)]
    question += ["--seq-len", str(LENGTH), "--global-batch", str(BATCH), "--precision", "fp32"]
    assert main([*question, "--fix", fix, "-q", "-o", str(file)]) == 0
    return file


def processes_with(word: str) -> list[int]:
    """Ids of running processes whose command line holds ``word``."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if word.encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue  # it ended while we looked
    return [pid for pid in found if pid != os.getpid()]


def wait_until_gone(word: str, seconds: float) -> Sequence[int]:
    """The processes that are still there after ``seconds``."""
    deadline = time.monotonic() + seconds
    while processes_with(word) and time.monotonic() < deadline:
        time.sleep(0.1)
    return processes_with(word)
