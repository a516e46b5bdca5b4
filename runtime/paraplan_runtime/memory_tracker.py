"""torch's ``MemTracker``, asked when the peak of a step is and who holds what at that moment."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_collectives
from torch.distributed.tensor import DTensor

from paraplan_runtime.gradients import local
from paraplan_runtime.model import ParallelModel

_MADE = {_MemRefType.ACT: "activations", _MemRefType.OTH: "gathered_parameters"}
"""What storages hold that nothing holds by name; FSDP's buffers are marked as ``OTH``."""


@dataclass(frozen=True)
class Peak:
    """The most memory of a step, and of the optimizer's part of it."""

    peak_bytes: int
    optimizer_peak_bytes: int


class PeakReached(BaseException):
    """The step has come to where it needs most memory, and need not go on.

    No ``Exception``: nothing on the way out of the step may take it for an error of the model.
    """


class _NoModules:
    """In place of torch's ``ModTracker``, which allows one call of a module before its backward."""

    @property
    def is_bw(self) -> bool:
        return bool(torch._C._current_graph_task_id() != -1)

    def register_user_hooks(self, *hooks: Any) -> None:
        pass

    def clear_user_hooks(self) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *args: Any) -> None:
        pass


class PeakTracker(MemTracker):
    """Counts storages as ``MemTracker`` does, over as many steps and micro-batches as wanted.

    Its statistics by module are left out: they are kept for one call of the model only.
    """

    def __init__(self, model: ParallelModel, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self._mod_tracker = _NoModules()  # type: ignore[assignment]
        self._model = model
        self._optimizer = optimizer
        self.parts: dict[str, int] = {}
        self._wanted_bytes: int | None = None
        self._peak_bytes = self._optimizer_peak = 0
        self.track_external(*model.stages, optimizer)

    def peak_of(self, step: Callable[[], None]) -> Peak:
        """Run a step and say what it needed at most."""
        self._peak_bytes = self._optimizer_peak = 0
        step()
        return Peak(self._peak_bytes, self._optimizer_peak)

    def parts_at(self, step: Callable[[], None], peak: Peak) -> Peak | None:
        """Run a step until it needs as much as the one before, and fill ``parts``.

        Returns:
            None if it came to that; then the step was left in its middle and no other can follow.
            Else what it needed at most.
        """
        self._wanted_bytes = peak.peak_bytes
        try:
            return self.peak_of(step)
        except PeakReached:
            return None
        finally:
            self._wanted_bytes = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the call and count what it made."""
        result = super().__torch_dispatch__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        if func.namespace == "fsdp":
            for tensor in _tensors((args, kwargs, result)):
                self._update_and_maybe_create_winfos(tensor, _MemRefType.OTH)
        return result

    def _update_peak_stats(self, peak_state: Any) -> None:
        total = sum(snapshot["Total"] for snapshot in self._curr_mem_snap.values())
        if self._in_opt:
            self._optimizer_peak = max(self._optimizer_peak, total)
        self._peak_bytes = max(self._peak_bytes, total)
        if self._wanted_bytes is not None and total >= self._wanted_bytes:
            self.parts = self._held()
            self._wanted_bytes = None  # on the way out of the step other calls come by
            raise PeakReached

    def _held(self) -> dict[str, int]:
        owners = dict(self._owners())
        alive = list(self._WINFO.items())  # type: ignore[no-untyped-call]
        if _fsdp_exchanges():  # what it has just made is not marked yet
            owners.setdefault(alive[-1][0]._cdata, "gathered_parameters")
        parts: dict[str, int] = {}
        for storage, (info, _) in alive:
            part = owners.get(storage._cdata)
            if part is None:
                part = _MADE.get(info.reftype, "working")
            parts[part] = parts.get(part, 0) + info.mem_consumed
        return parts

    def _owners(self) -> Iterator[tuple[int, str]]:
        """Storage -> part, for what is held by name."""
        for tensor, part in self._named():
            if tensor is not None:
                yield local(tensor).untyped_storage()._cdata, part

    def _named(self) -> Iterator[tuple[torch.Tensor | None, str]]:
        for group in _parameter_groups(self._model):
            yield group._partial_reduce_output, "gradients"  # until the replicas add theirs
            for held in group.fsdp_params:
                for output in held.all_gather_outputs:
                    yield output, "gathered_parameters"
                unsharded = getattr(held, "_unsharded_param", None)
                if unsharded is not None:
                    yield unsharded, "gathered_parameters"
                    yield unsharded.grad, "gathered_parameters"
                yield held.unsharded_accumulated_grad, "gradients"
                yield held.sharded_param.grad, "gradients"
        for parameter in self._model.own:
            yield parameter.value, "parameters"
            yield parameter.value.grad, "gradients"
        for state in self._optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    yield value, "optimizer"


def _fsdp_exchanges() -> bool:
    """Whether the caller is called from within FSDP's gathering or reducing."""
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == _fsdp_collectives.__name__:
            return True
        frame = frame.f_back
    return False


def _parameter_groups(model: ParallelModel) -> Iterator[Any]:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            yield from module._get_fsdp_state()._fsdp_param_groups


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value.to_local() if isinstance(value, DTensor) else value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
