"""Calls that a model makes, recorded without data and made again with data.

A model runs on meta tensors under a `Recorder`, the one that traces it, so that a call's name and
bytes are those that the cost model will ask for. Of each different call its function and the
shapes and strides of its operands are kept; `replay` makes it again on a device with random data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from paraplan.models import ModelSource
from paraplan.trace_kernels import Kernel
from paraplan.trace_model import build_model, quiet_transformers
from paraplan.trace_record import Call, Recorder


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Of the memory behind it."""
        last = sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize if all(self.shape) else 0


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """One aten call of a model and how often the model makes it.

    Attributes:
        name: as in `graph.Op`.
        function: as torch.ops knows it: namespace, name, overload.
        args, kwargs: with every tensor replaced by its `TensorSpec`.
    """

    name: str
    kernel: Kernel
    function: tuple[str, str, str]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    count: int = 1

    @property
    def size_bytes(self) -> int:
        """Read and written."""
        return self.kernel.read_bytes + self.kernel.write_bytes

    @property
    def operand_bytes(self) -> int:
        """Of all its tensor operands."""
        return sum(spec.nbytes for spec in _specs((*self.args, *dict(self.kwargs).values())))


class CallRecorder(Recorder):  # type: ignore[no-untyped-call]
    """A `Recorder` that keeps each different call, so that it can be made again."""

    def __init__(self) -> None:
        """Start with no calls."""
        super().__init__()
        self.made: dict[Any, RecordedCall] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the call and keep it."""
        before = len(self.log.calls)
        specs = _without_values(args), _without_values(kwargs or {})
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for call in self.log.calls[before:]:
            self._keep(call, func, *specs)
        return result

    def _keep(self, call: Call, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        space, _, name = func._schema.name.partition("::")
        overload = func._schema.overload_name or "default"
        made = RecordedCall(
            call.name, call.kernel, (space, name, overload), args, tuple(kwargs.items())
        )
        key = repr(made)
        known = self.made.get(key)
        self.made[key] = made if known is None else replace(known, count=known.count + 1)


def record_calls(
    source: ModelSource, *, sequence_length: int, sequences: int, compute_dtype: str
) -> list[RecordedCall]:
    """The different calls of one forward and backward of a model."""
    with quiet_transformers():
        built = build_model(source, sequence_length=sequence_length, compute_dtype=compute_dtype)
        run = built.runner(sequences)
        with CallRecorder() as recorder:
            loss = run()
            parameters = [p for p in built.model.parameters() if p.requires_grad]
            torch.autograd.grad(loss, parameters, allow_unused=True)
    return list(recorder.made.values())


Draw = Callable[[int, torch.dtype], Tensor]
"""So many random numbers of a type, which the caller only reads."""


def replay(call: RecordedCall, device: torch.device, draw: Draw | None = None) -> Callable[[], Any]:
    """The call with random operands on ``device``, ready to be made any number of times.

    Args:
        draw: where operands come from; a call that writes to its own gets fresh ones.
    """
    space, name, overload = call.function
    function: Any = getattr(getattr(getattr(torch.ops, space), name), overload)
    bound = _smallest_size(call)
    if draw is None or function._schema.is_mutable:
        draw = partial(_fresh, device)
    args = _with_values(call.args, device, bound, draw)
    kwargs = {k: _with_values(v, device, bound, draw) for k, v in call.kwargs}
    if "device" in kwargs:
        kwargs["device"] = device

    def make() -> Any:
        return function(*args, **kwargs)

    return make


def _without_values(value: Any) -> Any:
    if isinstance(value, Tensor):
        return TensorSpec(tuple(value.shape), tuple(value.stride()), value.dtype)
    if isinstance(value, (list, tuple)):
        return tuple(_without_values(v) for v in value)
    if isinstance(value, dict):
        return {k: _without_values(v) for k, v in value.items()}
    return value


def _fresh(device: torch.device, elements: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(elements, device=device, dtype=torch.float32).to(dtype)


def _with_values(value: Any, device: torch.device, bound: int, draw: Draw) -> Any:
    if isinstance(value, TensorSpec):
        return _random(value, device, bound, draw)
    if isinstance(value, tuple):
        return [_with_values(v, device, bound, draw) for v in value]
    return value


def _random(spec: TensorSpec, device: torch.device, bound: int, draw: Draw) -> Tensor:
    elements = spec.nbytes // spec.dtype.itemsize
    if spec.dtype.is_floating_point:
        flat = draw(elements, spec.dtype)
    elif spec.dtype == torch.bool:
        flat = torch.rand(elements, device=device) < 0.5
    else:
        flat = torch.randint(bound, (elements,), device=device, dtype=spec.dtype)
    return flat.as_strided(spec.shape, spec.stride, flat.storage_offset())


def _smallest_size(call: RecordedCall) -> int:
    """Indices below it are valid in every dimension of every operand that is looked up in."""
    found = [n for spec in _specs(call.args) if spec.dtype.is_floating_point for n in spec.shape]
    return max(1, min((n for n in found if n > 1), default=2))


def _specs(values: Iterable[Any]) -> Iterable[TensorSpec]:
    for value in values:
        if isinstance(value, TensorSpec):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _specs(value)
