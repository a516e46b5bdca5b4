"""The exchanges of tensor and sequence parallelism, each with its transpose as backward.

Shapes: hidden states are ``(rows, sequence, hidden)``; the sequence is dimension 1.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

SEQUENCE = 1
"""The dimension of a hidden state that sequence parallelism splits."""

# torch 2.13 renames them and warns about the old names.
_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum over ``group``, in a new tensor."""
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def all_gather(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The ranks' parts joined along the sequence."""
    size = group.size()
    parts = tensor.new_empty((size * tensor.shape[0], *tensor.shape[1:]))
    _GATHER(parts, tensor.contiguous(), group=group)
    apart = parts.view(size, *tensor.shape)
    return apart.movedim(0, SEQUENCE).flatten(SEQUENCE, SEQUENCE + 1)


def reduce_scatter(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's part of the sequence, summed over ``group``."""
    size = group.size()
    rows, length, *rest = tensor.shape
    apart = tensor.reshape(rows, size, length // size, *rest)
    parts = apart.movedim(SEQUENCE, 0).flatten(0, 1)
    total = tensor.new_empty((rows, length // size, *rest))
    _REDUCE_SCATTER(total, parts.contiguous(), group=group)
    return total


def part_of(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's part of the sequence."""
    return tensor.chunk(group.size(), dim=SEQUENCE)[group.rank()].contiguous()


class _Exchange(torch.autograd.Function):
    """Applies ``forward_of`` and, in the backward pass, ``backward_of``."""

    @staticmethod
    def forward(
        ctx: Any, tensor: torch.Tensor, forward_of: Any, backward_of: Any, group: Any
    ) -> torch.Tensor:
        ctx.backward_of = backward_of
        ctx.group = group
        result: torch.Tensor = forward_of(tensor, group)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return ctx.backward_of(gradient, ctx.group), None, None, None


def _same(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return tensor.view_as(tensor)


def enter(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Into a split region: every rank takes all; gradients, of which each has a part, add up."""
    return _apply(tensor, _same, all_reduce, group)


def leave(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Out of a split region: the ranks' partial results add up."""
    return _apply(tensor, all_reduce, _same, group)


def enter_from_sequence(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Into a split region from sequence shards."""
    return _apply(tensor, all_gather, reduce_scatter, group)


def leave_to_sequence(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Out of a split region to sequence shards."""
    return _apply(tensor, reduce_scatter, all_gather, group)


def scatter(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """From a tensor that every rank has whole to sequence shards."""
    return _apply(tensor, part_of, all_gather, group)


def gather(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """From sequence shards to a tensor that every rank has and computes on whole."""
    return _apply(tensor, all_gather, part_of, group)


def _apply(tensor: torch.Tensor, forward_of: Any, backward_of: Any, group: Any) -> torch.Tensor:
    result: torch.Tensor = _Exchange.apply(tensor, forward_of, backward_of, group)  # type: ignore[no-untyped-call]
    return result
