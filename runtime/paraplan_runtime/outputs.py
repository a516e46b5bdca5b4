"""What a call of the parallel model returns: the global loss now, the global logits on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

from paraplan_runtime.batch import Split
from paraplan_runtime.mesh import Ranks
from paraplan_runtime.own_loss import Kind, ReturnForm


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

    def to_tuple(self) -> tuple[Any, ...]:
        """What is there, in order; the logits are gathered when they are used."""
        logits = DeferredTensor(lambda: self.logits)
        return (logits,) if self.loss is None else (self.loss, logits)

    def __getitem__(self, key: int | slice | str) -> Any:
        """By position or name."""
        if isinstance(key, slice):
            return self.to_tuple()[key]
        names = self.keys()
        name = names[key] if isinstance(key, int) else key
        if name not in names:
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[Any]:
        """The values in order."""
        return iter(self.to_tuple())

    def __getattr__(self, name: str) -> Any:
        """Refuse what the model's own output might have had."""
        raise AttributeError(
            f"the parallel model's output has no {name!r}: it keeps {', '.join(self.keys())}"
        )


class DeferredTensor:
    """Stands for the outputs in a returned tuple, which few scripts read: gathered when used.

    Anything done with it is done with the gathered tensor (a collective, see above).
    """

    def __init__(self, compute: Callable[[], torch.Tensor]) -> None:
        self._compute = compute
        self._value: torch.Tensor | None = None

    def gathered(self) -> torch.Tensor:
        """The tensor itself."""
        if self._value is None:
            self._value = self._compute()
        return self._value

    def __getattr__(self, name: str) -> Any:
        """Attributes and methods of the tensor."""
        return getattr(self.gathered(), name)

    def __getitem__(self, index: Any) -> torch.Tensor:
        """A part of the tensor."""
        return self.gathered()[index]

    def __len__(self) -> int:
        """Rows."""
        return len(self.gathered())

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Functions of torch get the tensor."""
        args, kwargs = tree_map_only(cls, cls.gathered, (args, kwargs or {}))
        return func(*args, **kwargs)


def in_form(
    form: ReturnForm, loss: torch.Tensor | None, compute: Callable[[], torch.Tensor]
) -> Any:
    """What the model would have returned on one device, of which loss and outputs are kept.

    Args:
        loss: the global loss, if the model computed one.
        compute: gives the global outputs.
    """
    if form.kind is Kind.TENSOR:
        return compute() if loss is None else loss
    if form.kind is Kind.MAPPING:
        return ParallelOutput(loss, compute)
    values: list[Any] = [None] * form.length
    if form.main_index >= 0:
        values[form.main_index] = DeferredTensor(compute)
    if loss is not None:
        values[form.loss_index] = loss
    return tuple(values)


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
