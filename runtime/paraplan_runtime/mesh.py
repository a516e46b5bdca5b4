"""The ranks of a job arranged as the plan's mesh: where this rank stands, and its groups.

Axes, outermost first: pipeline, data_replicate, data_shard, tensor. (``context`` is always 1
here; ``check`` refuses other plans.)
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from paraplan.errors import InputError
from paraplan.layout import Layout
from paraplan_runtime.rehearsal import real_tensors

AXES = ("pipeline", "data_replicate", "data_shard", "tensor")


@dataclass(frozen=True)
class Ranks:
    """This rank's place in the layout.

    Attributes:
        layout: the degrees.
        device: the device this rank computes on.
        mesh: all ranks, with the axes of ``AXES``.
        data_group: the ranks that read different rows and agree in everything else.
    """

    layout: Layout
    device: torch.device
    mesh: DeviceMesh
    data_group: dist.ProcessGroup

    def place(self, axis: str) -> int:
        """This rank's coordinate on ``axis``."""
        return self.mesh.get_local_rank(axis)

    def group(self, axis: str) -> dist.ProcessGroup:
        """The ranks that differ from this one on ``axis`` only."""
        return self.mesh.get_group(axis)

    @property
    def data_index(self) -> int:
        """Which share of the rows this rank reads, 0 <= index < ``layout.data_ranks``."""
        return self.place("data_replicate") * self.layout.data_shard + self.place("data_shard")

    @property
    def fsdp_mesh(self) -> DeviceMesh:
        """The mesh for ``fully_shard``: 1-D, or 2-D (replicate, shard) for hybrid sharding."""
        if self.layout.data_replicate > 1:
            return self.mesh["data_replicate", "data_shard"]
        return self.mesh["data_shard"]

    @property
    def tensor_mesh(self) -> DeviceMesh:
        """The 1-D mesh of the tensor ranks."""
        return self.mesh["tensor"]

    @property
    def speaks(self) -> bool:
        """Whether this rank writes log lines for the job."""
        return dist.get_rank() == 0


def join(device_type: str | None = None) -> torch.device:
    """Join the process group that the launcher describes, if none exists, and pick the device.

    Reads ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT``, which
    torchrun, SLURM wrappers and Kubernetes operators set; without them the job is one process.

    Args:
        device_type: ``cuda`` or ``cpu``; by default ``cuda`` when a GPU is visible.
    """
    kind = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda":
        # Once joined, the device stays: the launcher's variables may be hidden by then.
        place = torch.cuda.current_device() if dist.is_initialized() else _local_rank()
        device = torch.device("cuda", place)
        torch.cuda.set_device(device)
    else:
        device = torch.device(kind)
    if not dist.is_initialized():
        backend = "nccl" if kind == "cuda" else "gloo"
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            store, rank, world = next(rendezvous("env://"))
            # torchrun may keep one store over restarts: addresses of dead ranks must not be found.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = torch._C._distributed_c10d.PrefixStore(f"attempt-{attempt}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world)
        else:
            dist.init_process_group(
                backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1
            )
    return device


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def build_ranks(layout: Layout, device: torch.device) -> Ranks:
    """Arrange the job's ranks as ``layout`` says.

    Raises:
        InputError: the number of ranks is not the number of devices of the plan.
    """
    world = dist.get_world_size()
    if world != layout.devices:
        raise InputError(
            f"the plan needs data_replicate({layout.data_replicate}) * data_shard"
            f"({layout.data_shard}) * tensor({layout.tensor}) * pipeline({layout.pipeline}) = "
            f"{layout.devices} ranks, this job has {world}",
            hint=f"start {layout.devices} processes, or plan for {world} devices",
        )
    sizes = (layout.pipeline, layout.data_replicate, layout.data_shard, layout.tensor)
    with real_tensors():
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=AXES)
        data = mesh["data_replicate", "data_shard"]._flatten("data")
    return Ranks(layout=layout, device=device, mesh=mesh, data_group=data.get_group())
