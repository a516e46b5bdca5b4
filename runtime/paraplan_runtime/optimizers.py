"""Optimizers made before the plan: they are found again, and given this rank's shards."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.optim import Optimizer

from paraplan_runtime.handles import Applied, Handle
from paraplan_runtime.model import ParallelModel
from paraplan_runtime.state import Entry, regions


def watch_optimizers() -> WeakSet[Optimizer]:
    """From now on, every optimizer that is made; those made after the plan get shards at once."""
    made: WeakSet[Optimizer] = WeakSet()
    original = Optimizer.add_param_group

    @functools.wraps(original)
    def add_param_group(self: Optimizer, param_group: dict[str, Any]) -> None:
        original(self, param_group)
        made.add(self)
        group = self.param_groups[-1]
        group["params"] = [shard for value in group["params"] for shard in _shards_of(value)]

    Optimizer.add_param_group = add_param_group  # type: ignore[method-assign]
    return made


def _shards_of(parameter: nn.Parameter) -> Sequence[nn.Parameter]:
    if isinstance(parameter, Handle) and isinstance(parameter.stands_for, Applied):
        return parameter.shards
    return [parameter]


def give_shards(
    optimizer: Optimizer, held: Mapping[int, Sequence[nn.Parameter]], parallel: ParallelModel
) -> None:
    """Put this rank's shards in the place of the whole model's parameters, state included.

    Args:
        held: id of a whole parameter -> its shards on this rank.
    """
    entries = {id(entry.value): entry for entry in parallel.entries}
    for group in optimizer.param_groups:
        shards: list[nn.Parameter] = []
        for parameter in group["params"]:
            mine = held.get(id(parameter), [parameter])
            state = optimizer.state.pop(parameter, None) if id(parameter) in held else None
            for shard in mine if state else ():
                optimizer.state[shard] = {
                    name: _cut(value, entries[id(shard)], tuple(parameter.shape), parallel)
                    for name, value in state.items()  # type: ignore[union-attr]
                }
            shards += mine
        group["params"] = shards


@torch.no_grad()
def _cut(value: Any, entry: Entry, whole: tuple[int, ...], parallel: ParallelModel) -> Any:
    """This rank's part of a loaded optimizer state; what is not of the parameter's shape stays."""
    if not isinstance(value, torch.Tensor) or tuple(value.shape) != whole or not whole:
        return value
    part = Entry(entry.path, torch.zeros_like(entry.value, dtype=value.dtype), entry.split)
    for index, view in regions(part, parallel.ranks):
        view.copy_(value[index])
    return part.value
