"""torch's pipeline stage with receive buffers that live only while they are in use.

torch allocates, for each micro-batch of a step, a buffer for the hidden state and one for its
gradient, and keeps them all: with 64 micro-batches that is several GB which no micro-batch in
flight needs. Here a buffer is made when its receive is posted and let go when it has been read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage


class LeanPipelineStage(PipelineStage):
    """A ``PipelineStage`` that holds buffers for the micro-batches in flight only."""

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        super()._setup_forward_recv_info(num_microbatches, has_backward)
        for infos in self.args_recv_info.values():
            _drop(infos)

    def _setup_backward_recv_info(self, num_microbatches: int) -> None:
        super()._setup_backward_recv_info(num_microbatches)
        for infos in self.grad_recv_info.values():
            _drop(infos)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Receives of a micro-batch's hidden state."""
        _make(self.args_recv_info[fwd_chunk_id], self.device)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Receives of the gradient of a micro-batch's output."""
        if self.has_backward and not self.is_last:
            _make(self.grad_recv_info[bwd_chunk_id], self.device)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Forward of one micro-batch; autograd keeps what it needs of the hidden state."""
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        _drop(self.args_recv_info[fwd_chunk_id])
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        """Backward of one micro-batch."""
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        _drop(self.grad_recv_info.get(bwd_chunk_id, ()))  # none in evaluation


def _drop(infos: Iterable[Any]) -> None:
    for info in infos:
        if not info.is_root_arg:
            info.buffer = None


def _make(infos: Iterable[Any], device: torch.device) -> None:
    for info in infos:
        meta = info.tensor_meta
        if not info.is_root_arg and meta is not None:
            info.buffer = torch.empty_strided(
                meta.shape, meta.stride, dtype=meta.dtype, device=device
            )
