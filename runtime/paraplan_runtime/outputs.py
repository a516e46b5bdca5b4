"""What a call of the parallel model returns: the global loss now, the global logits on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from paraplan_runtime.batch import Split
from paraplan_runtime.mesh import Ranks


class ParallelOutput:
    """Stands for the model's own output object.

    ``loss``, ``logits``, ``[0]``, ``["loss"]`` and unpacking do what they do on one device.
    The logits of the global batch are gathered (a collective that every rank must reach) when
    they are first asked for.

    Args:
        loss: the global loss, or None when no labels were given.
        logits: computes or gathers the global logits.
    """

    def __init__(self, loss: torch.Tensor | None, logits: Callable[[], torch.Tensor]) -> None:
        self.loss = loss
        self._compute_logits = logits
        self._logits: torch.Tensor | None = None

    @property
    def logits(self) -> torch.Tensor:
        """Logits of the global batch, ``(rows, sequence, vocabulary)``."""
        if self._logits is None:
            self._logits = self._compute_logits()
        return self._logits

    def keys(self) -> tuple[str, ...]:
        """Names of what is there."""
        return ("logits",) if self.loss is None else ("loss", "logits")

    def __getitem__(self, key: int | str) -> Any:
        """By position or name."""
        names = self.keys()
        name = names[key] if isinstance(key, int) else key
        if name not in names:
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[Any]:
        """The values in order."""
        return (self[name] for name in self.keys())

    def __getattr__(self, name: str) -> Any:
        """Refuse what the model's own output might have had."""
        raise AttributeError(
            f"the parallel model's output has no {name!r}: it keeps {', '.join(self.keys())}"
        )


def gather_output(
    parts: list[torch.Tensor], split: Split, ranks: Ranks, *, spread: bool, last_stage: bool
) -> torch.Tensor:
    """The output of the global batch on every rank.

    Args:
        parts: this rank's outputs, one for each micro-batch (empty off the last stage).
        spread: whether the last dimension is split over the tensor ranks.
        last_stage: whether this rank holds the last stage.
    """
    full: torch.Tensor | None = None
    if last_stage:
        full = torch.cat([part.detach() for part in parts])
        if spread:
            full = _all_gather(full, ranks.group("tensor"), dimension=full.ndim - 1)
        full = _all_gather(full, ranks.data_group, dimension=0)[: split.rows]
    if ranks.layout.pipeline > 1:
        full = _broadcast_from_last_stage(full, ranks)
    if full is None:
        raise RuntimeError("no stage computed the outputs")
    return full


def _all_gather(tensor: torch.Tensor, group: dist.ProcessGroup, dimension: int) -> torch.Tensor:
    if group.size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts, dim=dimension)


def _broadcast_from_last_stage(full: torch.Tensor | None, ranks: Ranks) -> torch.Tensor:
    group = ranks.group("pipeline")
    source = dist.get_global_rank(group, group.size() - 1)
    described: list[Any] = [None if full is None else (tuple(full.shape), full.dtype)]
    dist.broadcast_object_list(described, src=source, group=group, device=ranks.device)
    shape, dtype = described[0]
    if full is None:
        full = torch.empty(shape, dtype=dtype, device=ranks.device)
    full = full.contiguous()
    dist.broadcast(full, src=source, group=group)
    return full


class _ReturnedOutput(torch.autograd.Function):
    """Outputs computed without a graph; their backward runs the step again with gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        value: torch.Tensor,
        anchor: torch.Tensor,
        backward: Callable[[torch.Tensor], None],
    ) -> torch.Tensor:
        ctx.run = backward
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None]:
        ctx.run(gradient)
        return None, None, None


def returned_output(value: torch.Tensor, backward: Callable[[torch.Tensor], None]) -> torch.Tensor:
    """Outputs from which a script may compute its own loss."""
    anchor = torch.zeros((), device=value.device, requires_grad=True)
    result: torch.Tensor = _ReturnedOutput.apply(value, anchor, backward)  # type: ignore[no-untyped-call]
    return result


def cotangent_rows(
    gradient: torch.Tensor, split: Split, ranks: Ranks, micro_batch: int, *, spread: bool
) -> torch.Tensor:
    """This rank's part of d loss / d output for one micro-batch; zero for filling rows."""
    indices = split.row_indices(ranks.data_index, micro_batch).to(gradient.device)
    rows = gradient[indices.clamp(max=split.rows - 1)]
    rows = rows * (indices < split.rows).view(-1, *[1] * (gradient.ndim - 1))
    if spread:
        rows = rows.chunk(ranks.layout.tensor, dim=-1)[ranks.place("tensor")]
    return rows
