"""The whole model's tensors from the ranks' shards, one at a time, and back.

Every function here is a collective: all ranks call it together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from paraplan.errors import InputError
from paraplan_runtime.gradients import local
from paraplan_runtime.mesh import Ranks
from paraplan_runtime.tensor import ParameterSplit


@dataclass(frozen=True)
class Entry:
    """One entry of the state dict on this rank.

    Attributes:
        path: its key.
        value: the sharded parameter, or a whole buffer.
        split: how the tensor ranks share it, or None.
    """

    path: str
    value: torch.Tensor
    split: ParameterSplit | None = None


@dataclass(frozen=True)
class Source:
    """Where the value of a tensor comes from.

    Attributes:
        open: makes something that can be indexed by slices: a tensor, or what a file holds.
        dtype: the dtype that the whole model has it in.
    """

    open: Callable[[], Any]
    dtype: torch.dtype


def stage_entries(model: nn.Module, splits: Mapping[str, ParameterSplit]) -> list[Entry]:
    """Parameters and persistent buffers of a stage; tied parameters at each of their paths."""
    entries = [
        Entry(path, value, splits.get(path))
        for path, value in model.named_parameters(remove_duplicate=False)
    ]
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                entries.append(Entry(f"{prefix}.{name}" if prefix else name, buffer))
    return entries


def whole(entry: Entry, ranks: Ranks) -> torch.Tensor:
    """The tensor in the model's own shape, on each rank that holds a part of it."""
    full = local(entry.value.detach())
    if not isinstance(entry.value, DTensor):
        return full
    layout, split = ranks.layout, entry.split
    if layout.data_shard > 1:
        rows = entry.value.shape[0] // (layout.tensor if _tensor_dimension(split) == 0 else 1)
        full = _gather_rows(full, rows, ranks.group("data_shard"))
    if split is not None:
        parts = [torch.empty_like(full) for _ in range(layout.tensor)]
        dist.all_gather(parts, full.contiguous(), group=ranks.group("tensor"))
        full = torch.cat(parts, dim=split.dimension + (split.parts > 1))
        if split.parts > 1:
            full = full.flatten(split.dimension, split.dimension + 1)
    return full


def _tensor_dimension(split: ParameterSplit | None) -> int | None:
    """The dimension that the tensor ranks split, in the shape the parameter is kept in."""
    return None if split is None else split.dimension + (split.parts > 1)


def _gather_rows(shard: torch.Tensor, rows: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Join FSDP's shards of dimension 0, of which the last ones may be short or empty."""
    longest = -(-rows // group.size())
    padded = shard.new_zeros((longest, *shard.shape[1:]))
    padded[: shard.shape[0]] = shard
    parts = [torch.empty_like(padded) for _ in range(group.size())]
    dist.all_gather(parts, padded, group=group)
    return torch.cat(parts)[:rows]


def iterate_whole(
    entries: Sequence[Entry], order: Sequence[str], ranks: Ranks
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the whole model in ``order``, on every rank; one is alive at a time."""
    group = ranks.group("pipeline")
    mine = {entry.path: entry for entry in entries}
    held: list[list[tuple[str, tuple[int, ...], torch.dtype]]] = [[] for _ in range(group.size())]
    described = [(e.path, _whole_shape(e), e.value.dtype) for e in entries]
    dist.all_gather_object(held, described, group=group)
    holder: dict[str, tuple[int, tuple[int, ...], torch.dtype]] = {}
    for place, names in enumerate(held):
        for path, shape, dtype in names:
            holder.setdefault(path, (place, shape, dtype))
    for path in order:
        if path not in holder:
            continue
        place, shape, dtype = holder[path]
        if place == group.rank():
            tensor = whole(mine[path], ranks).contiguous()
        else:
            tensor = torch.empty(shape, dtype=dtype, device=ranks.device)
        if group.size() > 1:
            dist.broadcast(tensor, src=dist.get_global_rank(group, place), group=group)
        yield path, tensor


def _whole_shape(entry: Entry) -> tuple[int, ...]:
    shape = list(entry.value.shape)
    if entry.split is not None and entry.split.parts > 1:
        at = entry.split.dimension
        shape[at : at + 2] = [shape[at] * shape[at + 1]]
    return tuple(shape)


@torch.no_grad()
def load_whole(entries: Sequence[Entry], state: Mapping[str, torch.Tensor], ranks: Ranks) -> None:
    """Copy this rank's shards out of a whole state dict.

    Raises:
        InputError: a tensor is missing or has another shape.
    """
    for entry in entries:
        if entry.path not in state:
            raise InputError(f"the state dict has no {entry.path!r}")
        full = state[entry.path]
        check_shape(entry, tuple(full.shape))
        copy_shard(entry, full, full.dtype, ranks)


@torch.no_grad()
def fill(entries: Sequence[Entry], sources: Mapping[str, Source], ranks: Ranks) -> None:
    """Give this rank's shards their values; one whole tensor is alive at a time."""
    done = set()
    for entry in entries:
        if entry.path in sources and id(entry.value) not in done:
            done.add(id(entry.value))
            source = sources[entry.path]
            copy_shard(entry, source.open(), source.dtype, ranks)


def copy_shard(entry: Entry, values: Any, dtype: torch.dtype, ranks: Ranks) -> None:
    """Copy this rank's part of ``values``, by way of the dtype that the whole model has."""
    for index, view in regions(entry, ranks):
        if view.numel():
            view.copy_(values[index].to(dtype))


def check_shape(entry: Entry, shape: tuple[int, ...]) -> None:
    """Raise InputError unless the whole tensor has ``shape``."""
    if shape != _whole_shape(entry):
        raise InputError(
            f"{entry.path!r} has shape {shape} in the file, {_whole_shape(entry)} in the model"
        )


def regions(entry: Entry, ranks: Ranks) -> Iterator[tuple[tuple[slice, ...], torch.Tensor]]:
    """Where this rank's shard lies in the whole tensor: slices of it, each with the local view.

    The tensor ranks' split comes first, then FSDP's, which cuts dimension 0 as torch.chunk does
    (the last ranks may hold fewer rows, or none).
    """
    shard = local(entry.value.detach())
    shape, split = _whole_shape(entry), entry.split
    index = [slice(0, size) for size in shape]
    if not isinstance(entry.value, DTensor):
        yield tuple(index), shard
        return
    degree, place = ranks.layout.tensor, ranks.place("tensor")
    width = shape[split.dimension] // (split.parts * degree) if split else 0
    if split is not None:
        index[split.dimension] = slice(width * place, width * (place + 1))
    if shape:
        held = index[0].stop - index[0].start
        longest = -(-held // ranks.layout.data_shard)
        first = index[0].start + min(longest * ranks.place("data_shard"), held)
        index[0] = slice(first, first + shard.shape[0])
    if split is None or split.parts == 1:
        yield tuple(index), shard
        return
    for part in range(split.parts):
        start = width * (part * degree + place)
        index[split.dimension] = slice(start, start + width)
        yield tuple(index), shard.select(split.dimension, part)
