"""What training does on the host beside its kernels, timed on CPU processes.

The optimizer updates one parameter after the other, through DTensor where they are sharded;
checkpointing packs and unpacks whatever its ops save, or looks at every one of them; tensor ranks
take their part out of each DTensor and make a DTensor of its gradient; and FSDP2's hooks gather,
free and reduce each group of parameters. On a GPU the host does it ahead of the device; a CPU is
both, so that it is part of the step. Parameters here are of a few elements and each rank shards
them over itself alone: what is timed is neither bytes nor exchanges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from paraplan.measure_clock import Clock, Timing
from paraplan.profile_tasks import HostTask

GROUPS, TENSORS = 6, 9
"""Groups of a model, and parameters of each: a Llama's layer has nine, a GPT-2's twelve. A group's
hooks took 1.2, 1.4 and 1.6 ms with one, four and nine (tried once, not in the repository)."""

ROUNDS, OPS = 8, 4
"""Of the checkpointed module, and ops of each; one of these is a product."""

LEAST_SECONDS = 1e-9
"""Of what is a difference of two timings."""


class _Group(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tensors = nn.ParameterList([nn.Parameter(torch.randn(8)) for _ in range(TENSORS)])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for tensor in self.tensors:
            hidden = hidden * tensor
        return hidden


class _Rounds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(8, 8)) for _ in range(ROUNDS)])
        self.scales = nn.ParameterList([nn.Parameter(torch.randn(8)) for _ in range(ROUNDS)])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for weight, scale in zip(self.weights, self.scales, strict=True):
            hidden = nn.functional.silu(nn.functional.linear(hidden, weight)) * scale + hidden
        return hidden


def measure_host(task: HostTask, clock: Clock) -> Timing:
    """Seconds for each parameter, op or group; a collective of all ranks."""
    if task.what == "update":
        return _per(GROUPS * TENSORS, clock.time([_update(_plain())]))
    if task.what == "sharded_update":
        return _per(GROUPS * TENSORS, clock.time([_update(_wrapped())]))
    if task.what in ("full_recompute", "selective_recompute"):
        return _recompute(clock, selective=task.what == "selective_recompute")
    if task.what == "local":
        return _local(clock)
    kept = _wrapped()
    kept.set_requires_gradient_sync(False)
    kept.set_reshard_after_backward(False)
    if task.what == "hooks":
        return _per(GROUPS, _beyond(clock.time([_step(kept)]), clock.time([_step(_plain())])))
    return _per(GROUPS, _beyond(clock.time([_step(_wrapped())]), clock.time([_step(kept)])))


def _recompute(clock: Clock, *, selective: bool) -> Timing:
    model, hidden = _Rounds(), torch.randn(4, 8).requires_grad_()
    options: dict[str, Any] = {"use_reentrant": False}
    if selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)

    def step() -> None:
        model(hidden).sum().backward()

    def checkpointed() -> None:
        checkpoint(model, hidden, **options).sum().backward()

    again = clock.time([lambda: model(hidden)]).seconds * (1 - 1 / OPS if selective else 1.0)
    whole = _beyond(clock.time([checkpointed]), clock.time([step]))
    return _per(ROUNDS * OPS, whole._replace(seconds=whole.seconds - again))


def _keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operator is torch.ops.aten.mm.default:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _local(clock: Clock) -> Timing:
    from torch.distributed.tensor import DTensor, Replicate

    plain = [torch.randn(8).requires_grad_() for _ in range(GROUPS * TENSORS)]
    mesh = _mesh()
    shared: list[Any] = [
        DTensor.from_local(one.detach(), mesh, [Replicate()], run_check=False).requires_grad_()
        for one in plain
    ]

    def over(tensors: Sequence[torch.Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.backward([t.sum() for t in tensors])

    def locals_of() -> Any:
        return over([tensor.to_local() for tensor in shared])()

    return _per(len(plain), _beyond(clock.time([locals_of]), clock.time([over(plain)])))


def _mesh() -> Any:
    """Of this rank alone."""
    from torch.distributed.device_mesh import init_device_mesh

    shape, names = (dist.get_world_size(), 1), ("replicate", "shard")
    return init_device_mesh("cpu", shape, mesh_dim_names=names)["shard"]


def _plain() -> nn.Module:
    return nn.Sequential(*(_Group() for _ in range(GROUPS)))


def _wrapped() -> Any:
    """The model as the runtime shards it, on a mesh of this rank alone."""
    from torch.distributed.fsdp import fully_shard

    mesh = _mesh()
    model: Any = _plain()
    for group in model:
        fully_shard(group, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    return model


def _step(model: nn.Module) -> Callable[[], None]:
    hidden = torch.randn(4, 8)

    def step() -> None:
        model(hidden).sum().backward()

    return step


def _update(model: nn.Module) -> Callable[[], Any]:
    _step(model)()
    return torch.optim.AdamW(model.parameters(), lr=1e-4).step


def _per(parts: int, timing: Timing) -> Timing:
    return timing._replace(seconds=max(LEAST_SECONDS, timing.seconds / parts))


def _beyond(whole: Timing, less: Timing) -> Timing:
    return whole._replace(seconds=whole.seconds - less.seconds)
