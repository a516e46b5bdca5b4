"""Dropout's random numbers, apart from those that decide the data order.

Ranks that compute different rows must drop different elements, ranks of one tensor group the
same ones, and none of it may move the host's generator: the script's shuffling, which must be
equal on every rank, draws from that one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from paraplan_runtime.mesh import Ranks
from paraplan_runtime.rehearsal import real_tensors

_STRIDE = 1_000_003
"""Between the seeds of streams: a prime, which keeps those of neighbouring seeds apart."""


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
            torch.manual_seed(int(base) + _STRIDE * (stream + 1))
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


class SplitStream:
    """Random numbers for what the tensor ranks of a group compute different parts of.

    Heads, features and sequence shards of different ranks must drop different elements. Between
    ``enter`` and ``leave`` each rank draws from a stream of its own, derived from the common
    one, which all of them find unchanged but for the same advance: so recomputation, which
    restores the common stream at a layer's start, draws the same numbers again.

    Args:
        device: where the model computes.
        place: this rank's coordinate in the tensor group.
    """

    def __init__(self, device: torch.device, place: int) -> None:
        self._device = device
        self._place = place
        self._common: torch.Tensor | int | None = None

    def enter(self) -> None:
        """Draw from this rank's own stream from now on."""
        if self._device.type == "cuda":
            # Seed and offset of a CUDA generator live on the host: nothing waits for the GPU.
            generator = torch.cuda.default_generators[self._device.index]
            self._common, offset = generator.initial_seed(), generator.get_offset()
            generator.manual_seed((self._common + _STRIDE * (self._place + 1)) % 2**63)
            generator.set_offset(offset)
            return
        with real_tensors():
            seed = int(torch.randint(2**62, ()))
            self._common = torch.get_rng_state()
        torch.default_generator.manual_seed(seed + _STRIDE * self._place)

    def leave(self) -> None:
        """Return to the common stream; nothing happens if it was not left."""
        common, self._common = self._common, None
        if isinstance(common, torch.Tensor):
            torch.set_rng_state(common)
        elif common is not None:
            generator = torch.cuda.default_generators[self._device.index]
            offset = generator.get_offset()
            generator.manual_seed(common)
            generator.set_offset(offset)


def draws_randomly(model: nn.Module) -> bool:
    """Whether a forward in training draws random numbers: some dropout is not zero."""
    config: Any = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    rates = [value for name, value in settings.items() if "drop" in name]
    rates += [m.p for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


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
