"""Tensor operations recorded now and run later, so that a model can be built without its memory.

A *deferred* tensor lies on meta and behaves as a tensor on the CPU would: what is done to it is
kept as a chain of ``Write``s, and ``Recorder.value`` runs that chain to get the numbers. Random
draws really happen when they are recorded, into a tensor that is dropped at once: so the host's
generator ends where it would, and the chain draws the same numbers again from the state kept.

What only looks at a deferred tensor's data (``.item()``, a comparison) runs its chain then. All
of it lies below autograd, at torch's own operators, so it does not matter who calls them:
``nn.init``, ``reset_parameters``, ``parameter.data.normal_()``, transformers' initialisation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from paraplan.errors import InputError
from paraplan_runtime.writes import (
    Call,
    Cell,
    Geometry,
    Operand,
    Outside,
    Write,
    copied,
    new_storage,
    replay,
)

_OVERWRITES = frozenset(
    ("normal_", "uniform_", "zero_", "fill_", "copy_", "random_", "exponential_", "log_normal_")
)
"""In-place operations after which nothing of the old values is left."""


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records what is done to tensors while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cells: dict[StorageWeakRef, Cell] = {}
        # Freshly allocated for each draw, these would leave holes that malloc cannot fill again,
        # in the end as large as the model.
        self._scratch = new_storage(0)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run ``func`` really, or on meta where it touches a deferred tensor."""
        with torch._C.DisableTorchFunction():
            return self._dispatch(func, args, kwargs or {})

    def _dispatch(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if func is torch.ops.aten.scalar_tensor.default:
            # ``deferred[index] = 0.5`` makes it where the deferred tensor is.
            kwargs = {**kwargs, "device": torch.device("cpu")}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        written = _written(func, args, kwargs)
        is_random = torch.Tag.nondeterministic_seeded in func.tags
        state = _generator(kwargs).get_state() if is_random else None
        kept = [not _overwrites(func, tensor, inputs) for tensor in written]
        for tensor, keeps in zip(written, kept, strict=True):
            self._adopt(tensor, keeps=keeps)
        defers = any(self.is_deferred(tensor) for tensor in inputs)
        if defers and any(t.is_meta and not self.knows(t) for t in inputs):
            raise InputError(
                f"the model's initialisation ({func}) used a tensor on meta, which has no value",
                hint="build the model without parameters_on_meta",
            )
        recorded_args, recorded_kwargs = tree_map(self._describe, (tuple(args), dict(kwargs)))
        call = Call(func, recorded_args, recorded_kwargs, state)
        if defers and torch.Tag.inplace_view not in func.tags:
            result = self._defer(func, args, kwargs, written, is_random)
        else:
            result = func(*args, **kwargs)
        for tensor, keeps in zip(written, kept, strict=True):
            if not self.knows(tensor):
                continue  # on meta by the caller's own wish: it has no numbers
            cell = self._cells[_key(tensor)]
            cell.last = call.write(cell, tensor, previous=cell.last if keeps else None)
        self._record_results(call, result, inputs)
        return result

    def defer_parameter(self, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        """A deferred parameter of the same values; the given one shares its future."""
        return torch.nn.Parameter(self._stand_in(parameter), requires_grad=parameter.requires_grad)

    def defer_call(
        self, run: Callable[[], torch.Tensor], size: Sequence[int], dtype: torch.dtype
    ) -> torch.Tensor:
        """A deferred tensor whose value ``run`` returns."""
        with _disable_current_modes():
            tensor = torch.empty(tuple(size), dtype=dtype, device="meta")
        cell = Cell(stand_in=tensor.untyped_storage())
        cell.last = Call(run, (), {}, None).write(cell, tensor, output=0)
        self._cells[_key(tensor)] = cell
        return tensor

    def end(self) -> None:
        """Let go of what only recording needs."""
        self._scratch = new_storage(0)

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether the value of ``tensor`` can be had from here."""
        return _key(tensor) in self._cells

    def last_write(self, tensor: torch.Tensor) -> Write | None:
        """The newest write into the tensor's storage."""
        return self._cells[_key(tensor)].last

    def value(self, tensor: torch.Tensor) -> torch.Tensor:
        """The numbers that ``tensor`` stands for; the tensor itself if it is not deferred."""
        if not self.is_deferred(tensor):
            return tensor
        write = self._cells[_key(tensor)].last
        with _disable_current_modes(), torch.no_grad():
            return Geometry.of(tensor).view(replay(write, tensor.untyped_storage().nbytes(), {}))

    def is_deferred(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` has its numbers later only."""
        cell = self._cells.get(_key(tensor))
        return cell is not None and cell.stand_in is not None

    def _adopt(self, tensor: torch.Tensor, *, keeps: bool) -> None:
        """Begin to record a tensor from outside, ahead of the first write into it."""
        if self.knows(tensor) or tensor.is_meta:
            return
        cell = Cell()
        if keeps:
            copy = Geometry.of(tensor).view(copied(tensor.untyped_storage()))
            cell.last = Call(Outside(copy, copy._version).value, (), {}, None).write(
                cell, tensor, output=0
            )
        self._cells[_key(tensor)] = cell

    def _describe(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        cell = self._cells.get(_key(leaf))
        if cell is None:
            return Outside(leaf.detach(), leaf._version)
        return Operand(cell, cell.last, Geometry.of(leaf))

    def _stand_in(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on meta that stands for ``tensor`` from now on."""
        with _disable_current_modes():
            if tensor.is_meta:
                return tensor.detach()
            self._adopt(tensor, keeps=True)
            cell = self._cells[_key(tensor)]
            if cell.stand_in is None:
                cell.stand_in = new_storage(tensor.untyped_storage().nbytes(), "meta")
                self._cells[_weak(cell.stand_in)] = cell
            return Geometry.of(tensor).view(cell.stand_in)

    def _defer(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        written: Sequence[torch.Tensor],
        is_random: bool,
    ) -> Any:
        """What ``func`` returns when it touches deferred tensors, without their numbers."""
        if is_random:
            result = self._run_really(func, args, kwargs, written)
        if written:
            results = len(func._schema.returns)
            return None if results == 0 else written[0] if results == 1 else tuple(written)
        if is_random:
            return tree_map(partial(_like, device="meta"), result)
        try:
            meta_args, meta_kwargs = tree_map(self._on_meta, (tuple(args), dict(kwargs)))
            result = func(*meta_args, **meta_kwargs)
        except (NotImplementedError, RuntimeError):
            # No kernel for shapes alone, or a shape that depends on the numbers. A call that is
            # wrong in itself raises again here.
            return self._run_really(func, args, kwargs, written)
        if not all(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(result)):
            return self._run_really(func, args, kwargs, written)
        return result

    def _run_really(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        written: Sequence[torch.Tensor],
    ) -> Any:
        """Run on the numbers; what is written goes to tensors that are dropped."""
        dropped = {id(tensor) for tensor in written}

        def number(leaf: Any) -> Any:
            if id(leaf) in dropped:
                return self._scratch_like(leaf)
            return self.value(leaf) if isinstance(leaf, torch.Tensor) else leaf

        real_args, real_kwargs = tree_map(number, (tuple(args), dict(kwargs)))
        return func(*real_args, **real_kwargs)

    def _scratch_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the same geometry for what is dropped at once."""
        geometry = replace(Geometry.of(tensor), offset=0)
        last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        needed = (last + 1) * tensor.element_size() if tensor.numel() else 0
        if self._scratch.nbytes() < needed:
            self._scratch = new_storage(needed)
        return geometry.view(self._scratch)

    def _on_meta(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.device):
            return torch.device("meta")
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if leaf.is_meta:
            return leaf
        if self.is_deferred(leaf):
            return self._stand_in(leaf)
        return _like(leaf, "meta")

    def _record_results(self, call: Call, result: Any, inputs: Sequence[torch.Tensor]) -> None:
        """Begin the chains of the storages that an operation made."""
        seen = {_key(tensor) for tensor in inputs}
        deferred = any(self.is_deferred(tensor) for tensor in inputs)
        for number, leaf in enumerate(tree_leaves(result)):
            if not isinstance(leaf, torch.Tensor) or leaf.layout != torch.strided:
                continue
            key = _key(leaf)
            if key in seen or key in self._cells or (leaf.is_meta and not deferred):
                continue
            cell = Cell(stand_in=leaf.untyped_storage() if leaf.is_meta else None)
            cell.last = call.write(cell, leaf, output=number)
            self._cells[key] = cell


class Disguise(TorchFunctionMode):
    """Lets deferred tensors say that they are on the CPU: ``nn.init`` leaves out those on meta."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer ``tensor.is_meta`` and ``tensor.device``."""
        if func == _IS_META and self._recorder.is_deferred(args[0]):
            return False
        if func == _DEVICE and self._recorder.is_deferred(args[0]):
            return torch.device("cpu")
        return func(*args, **(kwargs or {}))


_IS_META: Any = torch.Tensor.is_meta.__get__  # type: ignore[attr-defined]
_DEVICE: Any = torch.Tensor.device.__get__


def _like(leaf: Any, device: str) -> Any:
    """An empty tensor of the same geometry; what is no tensor as it is."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=device)


def _key(tensor: torch.Tensor) -> StorageWeakRef:
    return _weak(tensor.untyped_storage())


def _weak(storage: torch.UntypedStorage) -> StorageWeakRef:
    # The weak reference keeps the address from being given to another storage.
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]


def _generator(kwargs: Mapping[str, Any]) -> torch.Generator:
    return kwargs.get("generator") or torch.default_generator


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors that ``func`` writes in place, by its schema."""
    if not func._schema.is_mutable or torch.Tag.inplace_view in func.tags:
        return []  # a view in place (``t_``) changes the tensor, not what its storage holds
    found: list[torch.Tensor] = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return found


def _overwrites(func: Any, tensor: torch.Tensor, inputs: Sequence[torch.Tensor]) -> bool:
    """Whether nothing of what the tensor's storage held is left, nor read, by ``func``."""
    if func.overloadpacket.__name__ not in _OVERWRITES or not tensor.is_contiguous():
        return False
    storage = tensor.untyped_storage()
    same = [other for other in inputs if other.untyped_storage()._cdata == storage._cdata]
    return tensor.nbytes == storage.nbytes() and len(same) == 1
