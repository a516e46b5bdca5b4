"""Dropout's random numbers, apart from those that decide the data order.

Ranks that compute different rows must drop different elements, ranks of one tensor group the
same ones, and none of it may move the host's generator: the script's shuffling, which must be
equal on every rank, draws from that one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from paraplan_runtime.mesh import Ranks


class ModelRandomState:
    """The generator state that the model's forward and backward draw from on this rank.

    Args:
        ranks: data and pipeline coordinates choose the stream; tensor coordinates do not.
    """

    def __init__(self, ranks: Ranks) -> None:
        base = torch.tensor([torch.initial_seed() % 2**62], device=ranks.device)
        dist.broadcast(base, src=0)
        layout = ranks.layout
        stream = ranks.data_index * layout.pipeline + ranks.place("pipeline")
        self._device = ranks.device
        with _forked(self._device):
            # A prime step keeps the streams of neighbouring seeds apart.
            torch.manual_seed(int(base) + 1_000_003 * (stream + 1))
            self.state = _read(self._device)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Draw from this state inside, leave the host's generators as they were."""
        with _forked(self._device):
            _write(self._device, self.state)
            try:
                yield
            finally:
                self.state = _read(self._device)


@contextmanager
def _forked(device: torch.device) -> Iterator[None]:
    saved = _read(device)
    try:
        yield
    finally:
        _write(device, saved)


def _read(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), cuda


def _write(device: torch.device, state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    host, cuda = state
    torch.set_rng_state(host)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda, device)
