"""Chains of operations that were recorded instead of kept results, and how they are run again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from paraplan.errors import InputError

SMALL_BYTES = 1 << 20
"""Results up to this size are kept while a chain runs: others may need them many times."""


@dataclass(frozen=True, eq=False, repr=False)
class Write:
    """One operation that wrote into a storage.

    Attributes:
        previous: the write before, or None if nothing of it is left.
        run: the operation.
        args, kwargs: its arguments; tensors are replaced by ``Operand`` or ``Outside``.
        cell: the storage that was written.
        nbytes: its size.
        state: the generator's state before, for a random operation.
        output: which of the results the storage is (with its geometry); None: written in place.
    """

    previous: Write | None
    run: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    cell: Cell
    nbytes: int
    state: torch.Tensor | None = None
    output: tuple[int, Geometry] | None = None


@dataclass(eq=False, repr=False)
class Cell:
    """What is known of one storage.

    Attributes:
        last: its newest write.
        stand_in: the storage on meta in whose place this one was, once that is so.
    """

    last: Write | None = None
    stand_in: torch.UntypedStorage | None = None


@dataclass(frozen=True)
class Geometry:
    """How a tensor lies in its storage."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @staticmethod
    def of(tensor: torch.Tensor) -> Geometry:
        """The geometry of ``tensor``."""
        return Geometry(
            tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype
        )

    def view(self, storage: torch.UntypedStorage) -> torch.Tensor:
        """The tensor that lies so in ``storage``."""
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        return empty.set_(storage, self.offset, self.size, self.stride)


@dataclass(frozen=True, eq=False, repr=False)
class Operand:
    """A recorded tensor as it was when an operation read or wrote it."""

    cell: Cell
    write: Write | None
    geometry: Geometry


@dataclass(frozen=True, eq=False)
class Outside:
    """A tensor that was made before recording began; it must stay as it was."""

    tensor: torch.Tensor
    version: int

    def value(self) -> torch.Tensor:
        """The tensor.

        Raises:
            InputError: it was changed since.
        """
        if self.tensor._version != self.version:
            raise InputError(
                "a tensor that the model's initialisation used was changed afterwards, so the "
                "parameters cannot be made from it any more",
                hint="build the model without parameters_on_meta",
            )
        return self.tensor


def new_storage(nbytes: int, device: str = "cpu") -> torch.UntypedStorage:
    """An empty storage."""
    return torch.UntypedStorage(nbytes, device=device)  # type: ignore[no-untyped-call]


def copied(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """A copy of ``storage``."""
    return storage.clone()  # type: ignore[no-untyped-call, no-any-return]


@dataclass(frozen=True, eq=False)
class Call:
    """An operation with its arguments as they will be needed to run it again."""

    run: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    state: torch.Tensor | None

    def write(
        self,
        cell: Cell,
        tensor: torch.Tensor,
        *,
        previous: Write | None = None,
        output: int | None = None,
    ) -> Write:
        """This call as the write that it was to one storage."""
        return Write(
            previous=previous,
            run=self.run,
            args=self.args,
            kwargs=self.kwargs,
            cell=cell,
            nbytes=tensor.untyped_storage().nbytes(),
            state=self.state,
            output=None if output is None else (output, Geometry.of(tensor)),
        )


def replay(
    write: Write | None, nbytes: int, kept: dict[Write, torch.UntypedStorage]
) -> torch.UntypedStorage:
    """Run a chain of writes from its beginning.

    Args:
        write: the last one.
        nbytes: size of the storage if there is none.
        kept: small storages that were needed before; theirs are not to be written.
    """
    chain: list[Write] = []
    step = write
    while step is not None and step not in kept:
        chain.append(step)
        step = step.previous
    storage = new_storage(nbytes) if step is None else copied(kept[step])
    for step in reversed(chain):
        storage = _run(step, storage, kept)
        if nbytes <= SMALL_BYTES:
            kept[step] = copied(storage)
    return storage


def _run(
    write: Write, storage: torch.UntypedStorage, kept: dict[Write, torch.UntypedStorage]
) -> torch.UntypedStorage:
    """Run one write on the storage that the one before left."""
    others: dict[tuple[Cell, Write | None], torch.UntypedStorage] = {}

    def number(leaf: Any) -> Any:
        if isinstance(leaf, Outside):
            return leaf.value()
        if not isinstance(leaf, Operand):
            return leaf
        if leaf.cell is write.cell:
            return leaf.geometry.view(storage)
        key = (leaf.cell, leaf.write)
        if key not in others:
            size = 0 if leaf.write is None else leaf.write.nbytes
            others[key] = replay(leaf.write, size, kept)
        return leaf.geometry.view(others[key])

    args, kwargs = tree_map(number, (write.args, write.kwargs))
    with _generator_at(write.state, kwargs) as kwargs:
        result = write.run(*args, **kwargs)
    if write.output is None:
        return storage
    place, geometry = write.output
    made = tree_leaves(result)[place]
    if Geometry.of(made) == geometry and made.untyped_storage().nbytes() == write.nbytes:
        return made.untyped_storage()  # type: ignore[no-any-return]
    fresh = new_storage(write.nbytes)
    geometry.view(fresh).copy_(made)
    return fresh


@contextmanager
def _generator_at(state: torch.Tensor | None, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Let a random operation draw what it drew when it was recorded."""
    if state is None:
        yield kwargs
    elif kwargs.get("generator") is not None:
        yield kwargs | {"generator": torch.Generator().set_state(state)}
    else:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            yield kwargs
