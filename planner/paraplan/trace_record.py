"""Runs a model without data and writes down every kernel that it would launch.

The model's tensors lie on the meta device: they have shapes and no contents. A `Recorder` sees
each aten call below autograd, of the forward and of the backward pass alike, and keeps a `Log`
per part of the model: the calls, which memory each reads and makes, and when that memory is
freed. It sees what eager execution launches, in order, and costs a few microseconds a call.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from paraplan.trace_kernels import Kernel, kernels_of, mutates, tensors_in

Phase = Literal["forward", "backward"]


@dataclass(frozen=True, slots=True)
class Call:
    """One kernel launch.

    Attributes:
        reads, writes: numbers of storages.
        marked: it ran between `Recorder.start_marking` and `stop_marking`, or
            to the backward of one.
    """

    name: str
    phase: Phase
    kernel: Kernel
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    marked: bool = False


@dataclass(slots=True)
class Log:
    """What one part of the model does.

    Attributes:
        calls: kernel launches in order.
        births: storage number -> bytes, in order of creation.
        events: (storage number, bytes gained or lost), in order.
        forward_births, forward_events: how many of each belong to the forward pass.
    """

    calls: list[Call] = field(default_factory=list)
    births: dict[int, int] = field(default_factory=dict)
    events: list[tuple[int, int]] = field(default_factory=list)
    forward_births: int = 0
    forward_events: int = 0

    def end_forward(self) -> None:
        """What follows belongs to the backward pass."""
        self.forward_births = len(self.births)
        self.forward_events = len(self.events)

    def alive_after_forward(self) -> list[int]:
        """Storages made in the forward pass and not freed when it ended."""
        made = list(self.births)[: self.forward_births]
        freed = {number for number, size in self.events[: self.forward_events] if size < 0}
        return [number for number in made if number not in freed]

    def read_by(self, phase: Phase) -> set[int]:
        """Storages that this part's kernels read in one phase."""
        return {n for call in self.calls if call.phase == phase for n in call.reads}


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes every kernel launch into ``log``; ``phase`` says under which heading."""

    def __init__(self) -> None:
        """Start with an empty log."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.log = Log()
        self.phase: Phase = "forward"
        self.recording = True
        self.owner: dict[int, Log] = {}
        self._numbers: dict[int, int] = {}
        self._references: dict[int, Any] = {}
        self._count = 0
        self._mutated: dict[Any, tuple[bool, ...]] = {}
        self._marked: list[tuple[int, int]] = []
        self._marking: int | None = None

    def number(self, tensor: Tensor, *, log: Log | None = None) -> int:
        """The number of the tensor's storage; one not seen before gets the next.

        Args:
            log: part of the model that made the tensor just now.
        """
        storage = tensor.untyped_storage()
        known = self._numbers.get(storage._cdata)
        return self._register(storage, log) if known is None else known

    def _register(self, storage: torch.UntypedStorage, log: Log | None) -> int:
        address = storage._cdata
        self._count += 1
        number = self._numbers[address] = self._count
        if log is not None:
            log.births[number] = storage.nbytes()
            log.events.append((number, storage.nbytes()))
            self.owner[number] = log
        freed = partial(self._freed, address, number, storage.nbytes(), log)
        self._references[number] = weakref.ref(storage, freed)
        return number

    def _freed(self, address: int, number: int, size: int, log: Log | None, _: Any) -> None:
        del self._numbers[address], self._references[number]
        if log is not None:
            log.events.append((number, -size))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing: what is made here comes from outside the model part."""
        before, self.recording = self.recording, False
        try:
            yield
        finally:
            self.recording = before

    @contextmanager
    def into(self, log: Log, phase: Phase = "forward") -> Iterator[Log]:
        """Record into ``log`` for a while."""
        before = self.log, self.phase
        self.log, self.phase = log, phase
        try:
            yield log
        finally:
            self.log, self.phase = before

    def start_marking(self) -> None:
        """Mark the calls that follow, and those of their backward."""
        self._marking = torch._C._autograd._get_sequence_nr()

    def stop_marking(self) -> None:
        """End what `start_marking` began."""
        if self._marking is not None:
            self._marked.append((self._marking, torch._C._autograd._get_sequence_nr()))
        self._marking = None

    def _is_marked(self) -> bool:
        """Autograd numbers its nodes in the order of the forward; the backward runs them."""
        if self.phase == "forward":
            return self._marking is not None
        node = torch._C._current_autograd_node() if self._marked else None
        number = node._sequence_nr() if node is not None else -1
        return any(first <= number < last for first, last in self._marked)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the call and write it down."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self.recording:
            return result
        reads = list(tensors_in((*args, *kwargs.values())))
        read_numbers = [self.number(t) for t in reads]
        results = list(tensors_in((result,)))
        seen = set(read_numbers)
        result_numbers = [self.number(t, log=self.log) for t in results]
        fresh = [t for t, n in zip(results, result_numbers, strict=True) if n not in seen]
        changed = self._changed(func, args, kwargs)
        if not fresh and not changed:
            return result  # a view
        writes = [*fresh, *changed]
        written = tuple(dict.fromkeys(self.number(t) for t in writes))
        marked = self._is_marked()
        name = func._schema.name.partition("::")[2]
        for kernel in kernels_of(name, args, reads, writes):
            self.log.calls.append(
                Call(
                    str(func.overloadpacket),
                    self.phase,
                    kernel,
                    tuple(dict.fromkeys(read_numbers)),
                    written,
                    marked,
                )
            )
        return result

    def _changed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Operands that the call writes into."""
        if not func._schema.is_mutable:
            return []
        flags = self._mutated.get(func)
        if flags is None:
            flags = self._mutated[func] = mutates(func)
        names = [a.name for a in func._schema.arguments]
        operands = [*args, *(kwargs.get(name) for name in names[len(args) :])]
        return list(tensors_in(o for o, flag in zip(operands, flags, strict=True) if flag))
