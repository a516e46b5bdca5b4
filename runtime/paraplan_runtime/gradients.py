"""Gradients between the step that computes them and the ``backward()`` that asks for them.

The whole step, backward included, runs inside the model's call; its gradients are kept aside
and added to ``.grad`` when the script calls ``loss.backward()``, scaled by what flows in. So
``(loss / k).backward()``, accumulation and loss scaling do what they do on one device.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

COPIES = "_paraplan_copies"
"""Attribute of a gradient: ranks on *other axes than its mesh's* that hold the same gradient."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of this rank.

    Attributes:
        name: its name in the whole model on one device.
        value: the sharded parameter that the optimizer updates.
        sum_over_tensor: whether each tensor rank computes a part of its gradient.
        stages: stages that hold a copy (2 for an embedding tied across the pipeline).
    """

    name: str
    value: nn.Parameter
    sum_over_tensor: bool = False
    stages: int = 1


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class GradientStash:
    """Gradients of one step, not yet handed out."""

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self._gradients: list[tuple[Parameter, torch.Tensor]] | None = []
        for parameter in parameters:
            if parameter.value.grad is not None:
                self._gradients.append((parameter, parameter.value.grad))
                parameter.value.grad = None

    def sum_parts(self, group: dist.ProcessGroup) -> None:
        """Add up, over the tensor ranks, the gradients they each computed a part of."""
        parts = [
            local(gradient)
            for parameter, gradient in self._gradients or ()
            if parameter.sum_over_tensor and local(gradient).numel()
        ]
        reduce_together(parts, group)

    def of(self, name: str) -> torch.Tensor | None:
        """This rank's shard of a gradient."""
        for parameter, gradient in self._gradients or ():
            if parameter.name == name:
                return local(gradient)
        return None

    @torch.no_grad()
    def install(self, scale: torch.Tensor) -> None:
        """Add ``scale`` times the gradients to ``.grad``.

        Raises:
            RuntimeError: called a second time, as autograd does without ``retain_graph``.
        """
        if self._gradients is None:
            raise RuntimeError("backward() was called twice on the loss of one forward")
        shards = [local(gradient) for _, gradient in self._gradients]
        if shards:
            torch._foreach_mul_(shards, scale.to(shards[0].device))
        for parameter, gradient in self._gradients:
            if parameter.value.grad is None:
                setattr(gradient, COPIES, parameter.stages)
                parameter.value.grad = gradient
            else:
                local(parameter.value.grad).add_(local(gradient))
        self._gradients = None


def set_aside(parameters: Sequence[Parameter]) -> list[torch.Tensor | None]:
    """Take every ``.grad`` away, so that a step starts from none; ``put_back`` undoes it."""
    taken = [parameter.value.grad for parameter in parameters]
    for parameter in parameters:
        parameter.value.grad = None
    return taken


def put_back(parameters: Sequence[Parameter], taken: Sequence[torch.Tensor | None]) -> None:
    """Restore what ``set_aside`` took."""
    for parameter, gradient in zip(parameters, taken, strict=True):
        parameter.value.grad = gradient


def reduce_together(tensors: Sequence[torch.Tensor], group: dist.ProcessGroup) -> None:
    """Sum tensors over ``group`` in place, one message for each dtype."""
    if group.size() == 1:
        return
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        dist.all_reduce(flat, group=group)
        sizes = [tensor.numel() for tensor in same]
        for tensor, total in zip(same, torch.split(flat, sizes), strict=True):
            tensor.copy_(total.view_as(tensor))


def _copies(gradient: torch.Tensor) -> int:
    count = int(getattr(gradient, COPIES, 1))
    if isinstance(gradient, DTensor):
        for axis, placement in enumerate(gradient.placements):
            if isinstance(placement, Replicate):
                count *= gradient.device_mesh.size(axis)
    return count


@torch.no_grad()
def total_norm(gradients: Sequence[torch.Tensor], norm_type: float = 2.0) -> torch.Tensor:
    """The p-norm of the whole model's gradient, on every rank; every rank must call it.

    Each rank adds the p-th powers of its shards, each divided by the number of ranks that hold
    the same shard, so that every element counts once.
    """
    shards = [(local(gradient), _copies(gradient)) for gradient in gradients]
    shards = [(shard, copies) for shard, copies in shards if shard.numel()]
    device = local(gradients[0]).device
    total = torch.zeros((), device=device)
    if norm_type == float("inf"):
        for shard, _ in shards:
            total = torch.maximum(total, shard.abs().max().float())
        dist.all_reduce(total, op=dist.ReduceOp.MAX)
        return total
    for copies in sorted({copies for _, copies in shards}):
        same = [shard for shard, number in shards if number == copies]
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(same, norm_type)])
        total += norms.pow(norm_type).sum() / copies
    dist.all_reduce(total)
    return total.pow(1.0 / norm_type)


def make_clipping_global() -> None:
    """Make ``torch.nn.utils.clip_grad_norm_`` see the whole model's gradient.

    torch's own norm of DTensors covers their mesh: without this, pipeline ranks would each clip
    by their stage's norm. The function that all of torch's clipping calls is replaced, so that
    a script that imported ``clip_grad_norm_`` before is served too; gradients that are not the
    runtime's go to torch's own.
    """
    from torch.nn.utils import clip_grad

    original: Any = clip_grad._get_total_norm
    if getattr(original, "_paraplan", False):
        return

    def get_total_norm(
        tensors: Any,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
    ) -> torch.Tensor:
        gradients = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        if not any(hasattr(gradient, COPIES) for gradient in gradients):
            return original(gradients, norm_type, error_if_nonfinite, foreach)  # type: ignore[no-any-return]
        norm = total_norm(gradients, float(norm_type))
        if error_if_nonfinite and not bool(norm.isfinite()):
            raise RuntimeError(
                f"The total norm of order {norm_type} for gradients from `parameters` is "
                "non-finite, so it cannot be clipped"
            )
        return norm

    get_total_norm._paraplan = True  # type: ignore[attr-defined]
    clip_grad._get_total_norm = get_total_norm


def make_scaling_global() -> None:
    """Make ``torch.amp.GradScaler`` skip a step on all ranks if one has found an infinity.

    torch's own looks at the gradients it is given: this rank's shards. Ranks run the same script,
    so all of them unscale when one does.
    """
    original: Any = torch.amp.GradScaler._unscale_grads_
    if getattr(original, "_paraplan", False):
        return

    @functools.wraps(original)
    def unscale_grads(
        self: Any, optimizer: Any, inv_scale: torch.Tensor, found_inf: torch.Tensor, *args: Any
    ) -> dict[torch.device, torch.Tensor]:
        found = original(self, optimizer, inv_scale, found_inf, *args)
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return found  # type: ignore[no-any-return]
        infinite = sum((value.to(found_inf.device) for value in found.values()), found_inf.clone())
        dist.all_reduce(infinite, op=dist.ReduceOp.MAX)
        # A rank that holds nothing of this optimizer's skips the step with the others.
        devices = found or {found_inf.device: found_inf}
        return {device: infinite.to(device) for device in devices}

    unscale_grads._paraplan = True  # type: ignore[attr-defined]
    torch.amp.GradScaler._unscale_grads_ = unscale_grads  # type: ignore[method-assign, assignment]
