"""One global batch, seen by every rank: which rows this rank computes, in which micro-batches.

The script runs as on a single device, so every rank holds the whole batch. A rank takes its own
rows; when the rows do not divide, the last ones are filled up with copies of the last real row
whose labels are all ignored, so that every rank runs the same number of equal micro-batches
(collectives and pipeline transfers need that) and the sum over real targets is unchanged.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as functional

from paraplan.errors import InputError
from paraplan.layout import Layout
from paraplan_runtime.rehearsal import is_rehearsal

IGNORED_LABEL = -100
"""The label that torch's cross entropy and transformers' losses skip by default."""

CHECKED_BATCHES = 3
"""Batches whose checksums the ranks compare; a script that reads different data does so at once."""


@dataclass(frozen=True)
class Split:
    """How a global batch is cut.

    Attributes:
        rows: sequences of the global batch.
        micro_batch_size: rows of one micro-batch on one data rank.
        micro_batches: micro-batches of each data rank.
        data_ranks: ranks that take different rows.
    """

    rows: int
    micro_batch_size: int
    micro_batches: int
    data_ranks: int

    def row_indices(self, data_index: int, micro_batch: int) -> torch.Tensor:
        """Global rows of one micro-batch; indices of ``rows`` and above are filling."""
        return torch.arange(*self.row_range(data_index, micro_batch))

    def row_range(self, data_index: int, micro_batch: int) -> tuple[int, int]:
        """First of those rows, and the one behind the last."""
        first = (data_index * self.micro_batches + micro_batch) * self.micro_batch_size
        return first, first + self.micro_batch_size

    def real_rows(self, data_index: int, micro_batch: int) -> int:
        """Rows of one micro-batch that are not filling; they come first."""
        first = (data_index * self.micro_batches + micro_batch) * self.micro_batch_size
        return min(max(self.rows - first, 0), self.micro_batch_size)

    @property
    def padded_rows(self) -> int:
        """Rows with the filling."""
        return self.data_ranks * self.micro_batches * self.micro_batch_size


def split_rows(rows: int, layout: Layout) -> Split:
    """Cut ``rows`` sequences for ``layout``: as planned when they are as many as planned.

    Otherwise the micro-batches are no larger than planned (the memory was planned for that)
    and as many as the schedule wants.
    """
    share = -(-rows // layout.data_ranks)
    least = layout.pipeline if layout.pipeline > 1 else 1
    size = max(1, min(layout.micro_batch_size, share // least))
    count = max(least, -(-share // size))
    while not schedule_accepts(layout, count):
        count += 1
    return Split(rows, size, count, layout.data_ranks)


def schedule_accepts(layout: Layout, micro_batches: int) -> bool:
    """Whether torch's schedule runs with this many micro-batches.

    ``Schedule1F1B`` wants at least as many as stages; ``ScheduleInterleaved1F1B`` wants whole
    rounds of ``pipeline`` micro-batches or more (torch/distributed/pipelining/schedules.py).
    """
    if layout.pipeline == 1:
        return True
    if micro_batches < layout.pipeline:
        return False
    return layout.virtual_stages == 1 or micro_batches % (micro_batches // layout.pipeline) == 0


def bind_arguments(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call of the model by name.

    Raises:
        InputError: the model takes ``*args``, which have no names.
    """
    batch: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            batch.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            raise InputError("a model with *args cannot be called in parallel")
        else:
            batch[name] = value
    batch.pop("return_dict", None)
    if "use_cache" in signature.parameters:
        # A key-value cache would be filled twice by recomputation and serves no training.
        batch["use_cache"] = False
    return batch


def count_rows(batch: Mapping[str, Any]) -> int:
    """Rows of a batch: the first dimension of its first tensor.

    Raises:
        InputError: no tensor, or one without rows.
    """
    for value in batch.values():
        if isinstance(value, torch.Tensor) and value.ndim > 0:
            if value.shape[0] == 0:
                raise InputError("the batch has no rows")
            return int(value.shape[0])
    raise InputError("the model was called without a tensor that has rows")


def take_micro_batch(
    batch: Mapping[str, Any], split: Split, data_index: int, micro_batch: int, device: torch.device
) -> dict[str, Any]:
    """The rows of one micro-batch, on ``device``.

    Tensors whose first dimension is the batch are cut; everything else (a scalar, position ids
    of one row for all) goes to every micro-batch whole.
    """
    indices = split.row_indices(data_index, micro_batch)
    first, end = split.row_range(data_index, micro_batch)
    taken: dict[str, Any] = {}
    for name, value in batch.items():
        if not isinstance(value, torch.Tensor):
            taken[name] = value
        elif value.ndim == 0 or value.shape[0] != split.rows:
            taken[name] = value.to(device, non_blocking=True)
        elif end > split.rows:
            rows = value[indices.clamp(max=split.rows - 1).to(value.device)].to(device)
            if name == "labels":
                rows[(indices >= split.rows).to(device)] = IGNORED_LABEL
            taken[name] = rows
        else:
            taken[name] = value[first:end].to(device, non_blocking=True)
    return taken


_FILLING = {
    "input_ids": 0,
    "attention_mask": 0,
    "labels": IGNORED_LABEL,
    "shift_labels": IGNORED_LABEL,
    "position_ids": 0,
    "token_type_ids": 0,
}
"""What a causal model's inputs are filled with behind their end, where no token sees it."""


def fill_sequences(batch: Mapping[str, Any], multiple: int) -> tuple[dict[str, Any], int | None]:
    """Lengthen the sequences of a causal model's batch to a multiple of ``multiple``.

    Sequence parallelism splits them evenly. Tokens behind the end change nothing before it.

    Returns:
        The batch, and the length it had if it was lengthened.

    Raises:
        InputError: an input whose filling is not known.
    """
    ids = batch.get("input_ids")
    length = int(ids.shape[1]) if isinstance(ids, torch.Tensor) and ids.ndim == 2 else None
    if length is None or length % multiple == 0:
        return dict(batch), None
    filled = dict(batch)
    for name, value in batch.items():
        if not isinstance(value, torch.Tensor) or value.ndim < 2 or length not in value.shape[1:]:
            continue
        if name not in _FILLING or value.ndim > 2:
            raise InputError(
                f"sequences of {length} tokens do not divide by the {multiple} ranks of sequence "
                f"parallelism, and the runtime cannot lengthen {name!r}",
                hint=f"pad the batch to a multiple of {multiple} tokens",
            )
        filled[name] = functional.pad(value, (0, -length % multiple), value=_FILLING[name])
    return filled, length


def checksum(batch: Mapping[str, Any]) -> torch.Tensor:
    """A 64-bit fingerprint of every tensor's shape and content, shape ``(1 + tensors,)``.

    The first number covers names and shapes; the others weigh each element's bits by its
    position, so that permuted rows differ too.
    """
    names = []
    sums = []
    for name, value in sorted(batch.items()):
        if not isinstance(value, torch.Tensor):
            continue
        names.append(f"{name}{tuple(value.shape)}{value.dtype}")
        flat = value.detach().reshape(-1)
        if flat.is_floating_point():
            flat = flat.double().view(torch.int64)
        weights = torch.arange(flat.numel(), device=flat.device) * 2654435761 + 1
        sums.append((flat.long() * weights).sum().cpu())
    # Not hash(): Python salts it per process.
    text = sum(byte * 31**position % 2**61 for position, byte in enumerate("".join(names).encode()))
    return torch.stack([torch.tensor(text % 2**61), *sums])


def check_ranks_agree(batch: Mapping[str, Any], device: torch.device) -> None:
    """Compare the batch of all ranks.

    Raises:
        InputError: two ranks hold different batches, on every rank.
    """
    if is_rehearsal():
        return
    mine = checksum(batch)
    total = torch.tensor([len(mine), int(mine[0]), int(mine.sum())], device=device)
    everyone = [torch.empty_like(total) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, total)
    rows = [[int(number) for number in row] for row in everyone]
    for rank, row in enumerate(rows):
        if row != rows[0]:
            what = "shapes or names" if row[:2] != rows[0][:2] else "values"
            raise InputError(
                f"ranks read different batches: rank {rank} and rank 0 differ in {what}",
                hint="every rank must read the same global batch: seed the sampler alike and use "
                "no DistributedSampler",
            )
