"""The profile of this machine's own devices, measured once at a training start and kept.

Measuring needs processes of its own, so it is the command ``plan profile --quick`` that measures:
a script may have done anything to this process, and must not be imported a second time.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from paraplan.errors import InputError
from paraplan.trace_cache import default_cache_dir, source_digest

MOST_SECONDS = 300.0
"""Measuring takes 15 to 20 s; a machine that is this much slower is not worth waiting for."""

_OF_A_RANK = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_")
"""Variables that say which rank this process is; the measuring processes are none of the job's."""


def kept_profile(kind: str, devices: int) -> Path:
    """Where the profile of so many devices of this machine is kept."""
    import torch

    device = torch.cuda.get_device_name() if kind == "cuda" else platform.processor()
    parts = [
        platform.node(),
        device,
        kind,
        devices,
        torch.__version__,
        os.environ.get("OMP_NUM_THREADS", ""),
        source_digest("measure*.py"),
        source_digest("profil*.py"),
    ]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    return default_cache_dir() / "profiles" / f"{kind}-{devices}-{digest}.json"


def measure_here(kind: str, devices: int, tell: Callable[[str], None]) -> Path:
    """The kept profile; measured now if there is none.

    Args:
        tell: called with a line for the user before it measures.

    Raises:
        InputError: the devices cannot be measured, or the cache cannot be written.
    """
    path = kept_profile(kind, devices)
    if path.is_file():
        return path
    tell(f"measuring {devices} {kind} devices, once (about 20 s; kept in {path.parent})")
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "paraplan.cli", "profile", "--quick", "--device", kind]
    command += ["--gpus", str(devices), "-o", str(path)]
    try:
        ended = subprocess.run(
            command,
            env=_without_rank(os.environ),
            capture_output=True,
            text=True,
            timeout=MOST_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise InputError(
            f"measuring took more than {MOST_SECONDS:.0f} s", hint="profile='shipped' leaves it out"
        ) from None
    if ended.returncode or not path.is_file():
        lines = ended.stderr.strip().splitlines() or ["no reason given"]
        reason = lines[0].removeprefix("error: ")
        raise InputError(f"this machine cannot be measured: {reason}")
    return path


def _without_rank(environment: Mapping[str, str]) -> dict[str, str]:
    return {k: v for k, v in environment.items() if not k.startswith(_OF_A_RANK)}
