"""What FSDP2 copies around its collectives, beside the computation that needs them.

A gathered block is one long message that is copied out into its parameters, and gradients are
copied into one before they are reduced; both in the computation's own stream. Gradients that wait
for the last micro-batch are added up in fp32 (torch 2.13, `_fsdp_collectives.py`:
`foreach_all_gather_copy_out`, `foreach_reduce`; `_fsdp_param.py`:
`accumulate_unsharded_grad_if_needed`). Where the compute dtype is fp32 nothing is cast.
"""

from __future__ import annotations

from typing import NamedTuple

from paraplan.engine import REDUCE_BYTES
from paraplan.layout import Layout


class Copies(NamedTuple):
    """Bytes read and written for each parameter of a block.

    Attributes:
        forward, backward: in each micro-batch.
        first_forward, last_backward: once a step, beside those.
    """

    forward: float
    backward: float
    first_forward: float
    last_backward: float


def data_copies(layout: Layout, compute_bytes: int, trainable: float, *, wrapped: bool) -> Copies:
    """Bytes that FSDP2 copies.

    Args:
        compute_bytes: of a parameter in the compute dtype.
        trainable: share of the parameters that have gradients.
        wrapped: False where the runtime leaves FSDP out; then gradients are added up alone.
    """
    stage, shards = layout.zero_stage, layout.data_shard
    later = (layout.micro_batches - 1) / layout.micro_batches
    add = REDUCE_BYTES + compute_bytes + REDUCE_BYTES  # sum read, gradient read, sum written
    if not wrapped:
        return Copies(0.0, trainable * later * add, 0.0, 0.0)
    gather = _gathered(compute_bytes, shards)
    copy_in = compute_bytes + REDUCE_BYTES
    if stage >= 2:
        reduced = copy_in + later * 3 * REDUCE_BYTES / shards
        again = gather if stage == 3 else 0.0
        first = 0.0 if stage == 3 else gather
        return Copies(again, again + trainable * reduced, first, 0.0)
    cast = compute_bytes + REDUCE_BYTES if compute_bytes != REDUCE_BYTES else 0
    summed = later * add + (1 - later) * cast if layout.micro_batches > 1 else 0.0
    last = copy_in if layout.micro_batches == 1 else 2 * REDUCE_BYTES
    if shards == 1:
        # Replicas alone: the reduction's input is divided into a new tensor, and that is copied.
        last += 4 * REDUCE_BYTES
    return Copies(0.0, trainable * summed, gather, trainable * last)


def _gathered(compute_bytes: int, shards: int) -> float:
    """The shard is cast into the message, the message copied out."""
    cast = REDUCE_BYTES + compute_bytes
    if shards == 1:
        return cast if compute_bytes != REDUCE_BYTES else 0.0
    return cast / shards + 2 * compute_bytes
