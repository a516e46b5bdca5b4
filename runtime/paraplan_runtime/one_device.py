"""Makes a rank look, to the script it runs, like the only process with the only device.

What a script or a library reads to find out that it is one of several is taken away after the
rank has joined: transformers' Trainer and accelerate then do what they do on one device.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import MutableMapping
from typing import Any

import torch
import torch.distributed as dist

from paraplan_runtime.mesh import join

HIDDEN_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "PMI_RANK",
    "PMI_SIZE",
    "SLURM_PROCID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_LOCALID",
)


def join_as_one_device(kind: str, environment: MutableMapping[str, str]) -> torch.device:
    """Join the job, hide that it is one, and agree on the random numbers.

    Args:
        kind: ``cuda`` or ``cpu``.
    """
    device = join(kind)
    for name in HIDDEN_VARIABLES:
        environment.pop(name, None)
    agree_on_random_numbers()
    return device


def agree_on_random_numbers() -> None:
    """Give every rank rank 0's generators: they decide the order of the data."""
    numpy: Any = sys.modules.get("numpy")
    state: list[Any] = [
        torch.get_rng_state(),
        random.getstate(),
        None if numpy is None else numpy.random.get_state(),
        # A process that never asked for a seed has its own.
        torch.initial_seed(),
    ]
    dist.broadcast_object_list(state, src=0)
    torch.default_generator.manual_seed(state[3])
    torch.set_rng_state(state[0])
    random.setstate(state[1])
    if numpy is not None and state[2] is not None:
        numpy.random.set_state(state[2])
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(state[3])


def write_only_on_rank_0() -> None:
    """Make ``torch.save`` and safetensors' ``save_file`` do nothing on other ranks.

    Every rank runs the script's saving, because collecting the tensors takes them all; one
    writes.
    """
    if dist.get_rank() == 0:
        return
    import safetensors.torch

    torch.save = _write_nothing
    safetensors.torch.save_file = _write_nothing


def _write_nothing(*_: Any, **__: Any) -> None:
    pass


def be_quiet_off_rank_0() -> None:
    """Drop what ranks other than 0 print from now on: it is what rank 0 prints.

    For launchers that show the output of all ranks. Errors are still shown.
    """
    if dist.get_rank() != 0:
        sys.stdout.flush()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)
