"""Where the script runs: which launcher started it, as which rank, or whether a person sits there.

Only the environment and ``sys`` are read; nothing is changed here.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from paraplan.errors import InputError

_LAUNCHERS = (
    # rank, number of ranks, rank on this node, ranks on this node
    # torchrun, accelerate launch, Kubernetes operators
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    # srun; a batch script has no step
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    (  # mpirun
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
)
FIRST_SLURM_PORT, SLURM_PORTS = 15000, 15000
"""SLURM names no port: each job takes its own by its number."""


@dataclass(frozen=True)
class Place:
    """What a launcher says of this process; ``local`` is on this node."""

    rank: int
    ranks: int
    local_rank: int
    local_ranks: int


@dataclass(frozen=True)
class Devices:
    """The devices of this machine to use: ``kind`` is cuda or cpu."""

    kind: str
    count: int


def find_place(environment: Mapping[str, str]) -> Place | None:
    """This process's place in a job of several processes; None when no launcher says so.

    Raises:
        InputError: the launcher's variables are no numbers.
    """
    for names in _LAUNCHERS:
        if names[0] not in environment or names[1] not in environment:
            continue
        # A launcher that does not say where on the node a process is starts one on each.
        alone = ("0", "0", "0", environment[names[1]] if names[2] in environment else "1")
        texts = [environment.get(name, text) for name, text in zip(names, alone, strict=True)]
        try:
            # SLURM writes 8(x2),4 for nodes of 8, 8 and 4 tasks.
            *numbers, local_ranks = (int(re.sub(r"[(,].*", "", text)) for text in texts)
        except ValueError:
            shown = ", ".join(f"{n}={t}" for n, t in zip(names, texts, strict=True))
            raise InputError(f"the launcher's variables are not whole numbers: {shown}") from None
        rank, ranks, local_rank = numbers
        if ranks > 1 or names[0] == "RANK":
            return Place(rank, ranks, local_rank, local_ranks)
    return None


def standard_variables(place: Place, environment: Mapping[str, str]) -> dict[str, str]:
    """What torch's ``env://`` rendezvous reads, for launchers that set other names.

    Raises:
        InputError: nothing says where rank 0 is.
    """
    variables = {
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.ranks),
        "LOCAL_RANK": str(place.local_rank),
        "LOCAL_WORLD_SIZE": str(place.local_ranks),
    }
    address = environment.get("MASTER_ADDR")
    if address is None and place.local_ranks == place.ranks:
        address = "127.0.0.1"
    if address is None:
        nodes = environment.get("SLURM_STEP_NODELIST")
        if nodes is None:
            raise InputError(
                "the launcher names no MASTER_ADDR", hint="export the host name of rank 0's node"
            )
        address = first_host(nodes)
    variables["MASTER_ADDR"] = address
    job = int(environment.get("SLURM_JOB_ID", "0"))
    port = environment.get("MASTER_PORT", str(FIRST_SLURM_PORT + job % SLURM_PORTS))
    return variables | {"MASTER_PORT": port}


def first_host(nodes: str) -> str:
    """The first name of a SLURM host list: ``gpu[03-05,9],cpu1`` begins with ``gpu03``."""
    head, bracket, rest = nodes.partition("[")
    if not bracket or "," in head:
        return nodes.partition(",")[0]
    return head + rest.partition("]")[0].partition(",")[0].partition("-")[0]


def why_one_process() -> str | None:
    """Why this process cannot be started again on other devices; None if it can."""
    main = sys.modules.get("__main__")
    if hasattr(sys, "ps1") or sys.flags.interactive or "ipykernel" in sys.modules:
        return "this is an interactive session"
    if "debugpy" in sys.modules or "pydevd" in sys.modules or _traced_by_pdb():
        return "a debugger is attached"
    # A script read from a pipe says that its file is ``<stdin>``.
    if "-c" not in sys.orig_argv and not os.path.isfile(getattr(main, "__file__", None) or ""):
        return "there is no script file to start again"
    return None


def _traced_by_pdb() -> bool:
    tracer = sys.gettrace()
    return tracer is not None and "bdb" in getattr(tracer, "__module__", "")


def is_worker_process() -> bool:
    """Whether multiprocessing started this process, for data loading for instance."""
    return multiprocessing.parent_process() is not None


def parse_devices(text: str) -> Devices:
    """``cpu:4``, ``cuda:8`` or ``cuda``.

    Raises:
        InputError: the text is not of that form.
    """
    kind, colon, number = text.strip().lower().partition(":")
    count = int(number) if number.isdecimal() else 0
    if kind not in ("cpu", "cuda") or (colon and count < 1):
        raise InputError(
            f"PARAPLAN_DEVICES is {text!r}", hint="cpu:4, cuda:8 or cuda (all there are) is wanted"
        )
    return Devices(kind, count)


def find_devices(gpus: int | None, environment: Mapping[str, str] = os.environ) -> Devices:
    """The devices to use: ``gpus`` and PARAPLAN_DEVICES first, else all GPUs, else one CPU.

    Raises:
        InputError: more GPUs are asked for than there are.
    """
    import torch

    there = torch.cuda.device_count()
    text = environment.get("PARAPLAN_DEVICES")
    asked = parse_devices(text) if text else Devices("cuda" if there else "cpu", 0)
    count = asked.count or gpus or (there if asked.kind == "cuda" else 1)
    if asked.kind == "cuda" and count > there:
        raise InputError(f"{count} GPUs are asked for, this machine has {there}")
    return Devices(asked.kind, count)
