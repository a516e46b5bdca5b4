"""What of the training state are tensors, under which names and in which shapes they are stored.

Names and shapes are those of the whole model on one device, whatever the plan; each rank stores
its shards. A fused weight, whose parts the tensor ranks split one by one, is stored as its parts
(``name#0``, ``name#1``, ..), so that other degrees can read it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from paraplan.errors import InputError
from paraplan_runtime.model import ParallelModel
from paraplan_runtime.tensor import ParameterSplit

FILE_BYTES = 10**9
"""A rank writes files of about this size: one of them is in memory twice while it is written."""


def model_tensors(model: ParallelModel) -> dict[str, torch.Tensor]:
    """This rank's parameters and persistent buffers as they are stored."""
    result: dict[str, torch.Tensor] = {}
    for parameter in model.own:
        split = model.fused.get(parameter.name)
        result |= _stored(f"model.{parameter.name}", parameter.value, split, model)
    for entry in model.entries:
        if not isinstance(entry.value, nn.Parameter):
            result |= _stored(f"model.{entry.path}", entry.value, None, model)
    return result


def optimizer_tensors(model: ParallelModel, optimizer: Any) -> dict[str, torch.Tensor]:
    """This rank's optimizer state as it is stored.

    Raises:
        InputError: a state is neither a scalar nor of its parameter's shape.
    """
    result: dict[str, torch.Tensor] = {}
    for parameter in model.own:
        split = model.fused.get(parameter.name)
        for key, value in optimizer.state.get(parameter.value, {}).items():
            if not isinstance(value, torch.Tensor):
                continue
            if value.ndim and value.shape != parameter.value.shape:
                raise InputError(
                    f"{type(optimizer).__name__} keeps {key!r} of {parameter.name!r} in the shape "
                    f"{tuple(value.shape)}: only states of the parameter's own shape can be moved "
                    "between plans"
                )
            name = f"optimizer.{parameter.name}.{key}"
            result |= _stored(name, value, split, model)
    return result


def make_optimizer_state(
    model: ParallelModel, optimizer: Any, names: list[str], scalars: set[str]
) -> dict[str, torch.Tensor]:
    """Give the optimizer the states that a checkpoint holds, and return where to read them to.

    Args:
        names: of all tensors of the checkpoint.
        scalars: those among them of one element.
    """
    own = {parameter.name: parameter.value for parameter in model.own}
    on_device = {
        id(value)
        for group in optimizer.param_groups
        for value in group["params"]
        if group.get("fused") or group.get("capturable")
    }
    for full in names:
        prefix, _, rest = full.partition(".")
        name, _, key = rest.partition("#")[0].rpartition(".")
        if prefix != "optimizer" or name not in own or key in optimizer.state[own[name]]:
            continue
        if full in scalars and (own[name].numel() != 1 or key == "step"):
            device = own[name].device if id(own[name]) in on_device else "cpu"
            value = torch.zeros((), dtype=torch.float32, device=device)
        else:
            value = torch.zeros_like(own[name], requires_grad=False)
        optimizer.state[own[name]][key] = value
    return optimizer_tensors(model, optimizer)


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory that training does not change."""
    if isinstance(tensor, DTensor):
        copy = tensor.to_local().to("cpu", copy=True).contiguous()
        return DTensor(copy, tensor._spec, requires_grad=False)  # type: ignore[no-untyped-call]
    return tensor.detach().to("cpu", copy=True)


def file_numbers(tensors: dict[str, torch.Tensor], group: dist.ProcessGroup) -> dict[str, int]:
    """Name -> number of the file that it goes to on each rank; collective."""
    mine = {
        name: (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes
        for name, tensor in tensors.items()
    }
    everyone: list[dict[str, int]] = [{} for _ in range(group.size())]
    dist.all_gather_object(everyone, mine, group=group)
    sizes: dict[str, int] = {}
    for rank in everyone:
        for name, size in rank.items():
            sizes[name] = max(size, sizes.get(name, 0))
    numbers, number, filled = {}, 1, 0
    for name, size in sizes.items():
        if filled and filled + size > FILE_BYTES:
            number, filled = number + 1, 0
        numbers[name] = number
        filled += size
    return numbers


def _stored(
    name: str, value: torch.Tensor, split: ParameterSplit | None, model: ParallelModel
) -> dict[str, torch.Tensor]:
    """A tensor under its name, or the parts of a fused one; they share its memory."""
    value = value.detach()
    if value.ndim == 0:  # AdamW's step count
        return {name: value.view(1)}
    if split is None:
        return {name: value}
    if not isinstance(value, DTensor):
        parts = value.chunk(split.parts, dim=split.dimension)
        return {f"{name}#{number}": part for number, part in enumerate(parts)}
    local, dimension = value.to_local(), split.dimension
    shape, placements = list(value.shape), list(value.placements)
    if model.plan.layout.tensor > 1:
        views = [local.select(dimension, part) for part in range(split.parts)]
        placements[-1] = Shard(dimension)
        del shape[dimension]
    else:
        shape[dimension] //= split.parts
        views = list(torch.split(local, shape[dimension], dim=dimension))
    stride = torch.empty(shape, device="meta").stride()
    return {
        f"{name}#{part}": DTensor.from_local(
            view,
            value.device_mesh,
            placements,
            run_check=False,
            shape=torch.Size(shape),
            stride=stride,
        )
        for part, view in enumerate(views)
    }
