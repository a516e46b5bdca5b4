"""The parameters a script holds before, and after, its model is spread over the ranks.

A script takes ``model.parameters()`` before the first batch says what to plan for. What it gets
are handles: parameters with the right shapes and no memory. Before the plan, what is done to a
handle is recorded (`recorded`), reading one computes or reads its values. Afterwards a handle
stands for this rank's shard: its ``grad`` is the shard's, and reading it gathers the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from paraplan.errors import InputError
from paraplan_runtime.recorded import Recorder

_WITHOUT_VALUES = {
    "__bool__", "__delete__", "__hash__", "__len__", "__reduce_ex__", "__set__", "_is_view",
    "data_ptr", "dim", "element_size", "get_device", "is_complex", "is_contiguous",
    "is_floating_point", "ndimension", "nelement", "numel", "register_hook",
    "register_post_accumulate_grad_hook", "requires_grad_", "size", "storage_offset", "stride",
    "type", "_is_zerotensor", "is_conj", "is_neg", "is_inference", "untyped_storage",
}  # fmt: skip
"""Functions of a tensor that its shape and type answer."""


@dataclass(frozen=True)
class Before:
    """Where a handle's values come from until the plan is applied."""

    recorder: Recorder
    device: torch.device


@dataclass(frozen=True)
class Applied:
    """What a handle stands for once the plan is applied.

    Attributes:
        read: gathers the whole tensor; a collective.
        shards: this rank's; none if the parameter lies on other ranks only.
    """

    read: Callable[[], torch.Tensor]
    shards: Sequence[nn.Parameter]
    device: torch.device


class Handle(nn.Parameter):
    """A parameter of the whole model, as the script sees it; see the module's docstring."""

    stands_for: Before | Applied

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """This rank's device, wherever the values are."""
        return self.stands_for.device

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        """False: what is done with tensors on meta must not be done with this one."""
        return False

    @property
    def grad(self) -> torch.Tensor | None:
        """The gradient of this rank's shard; None on ranks that hold none of it."""
        return self.shards[0].grad if self.shards else None

    @grad.setter
    def grad(self, value: torch.Tensor | None) -> None:
        for shard in self.shards:
            shard.grad = value

    @property
    def shards(self) -> Sequence[nn.Parameter]:
        """This rank's shards; none before the plan."""
        return self.stands_for.shards if isinstance(self.stands_for, Applied) else ()

    def read(self) -> torch.Tensor:
        """The whole tensor, without the handle."""
        stands_for = self.stands_for
        if isinstance(stands_for, Applied):
            return stands_for.read()
        return stands_for.recorder.value(raw(self)).to(stands_for.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """A copy of the whole parameter, for an average of the weights for instance."""
        copy = nn.Parameter(self.read().clone(), requires_grad=self.requires_grad)
        memo[id(self)] = copy
        return copy

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Without values: they would have to be gathered."""
        return f"Parameter of shape {tuple(self.shape)}, spread over the ranks"

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Answer from the shape where that is enough, record changes, else read the values."""
        name = getattr(function, "__name__", "")
        is_data = getattr(function, "__self__", None) is _DATA
        with torch._C.DisableTorchFunctionSubclass():
            if not is_data and (name in _WITHOUT_VALUES or name == "__get__"):
                return function(*args, **(kwargs or {}))
            given = (*args, *(kwargs or {}).values())
            handle = next((arg for arg in given if isinstance(arg, Handle)), None)
            if handle is not None and isinstance(handle.stands_for, Before):
                if is_data and name == "__set__":
                    return function(args[0], _deferred(args[1], handle.stands_for))
                if is_data or name == "detach":
                    return make_handle(nn.Parameter(raw(handle), False), handle.stands_for)
                if _changes(name):
                    with handle.stands_for.recorder:
                        function(*args, **(kwargs or {}))
                    return handle
            elif _changes(name) and handle is not None and given[0] is handle:
                raise InputError(
                    f"a parameter of a planned model was changed in place ({name})",
                    hint="let an optimizer of torch.optim update it, or change it before the "
                    "first batch",
                )
            whole = tree_map_only(Handle, Handle.read, (args, kwargs or {}))
            return function(*whole[0], **whole[1])


_DATA = cast(Any, torch.Tensor.data).__get__.__self__


def _changes(name: str) -> bool:
    """Whether a function of this name works in place."""
    return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"


def raw(parameter: torch.Tensor) -> torch.Tensor:
    """The tensor on meta itself, which has a handle's shape and storage."""
    with torch._C.DisableTorchFunctionSubclass():
        return parameter.detach()


def _deferred(value: torch.Tensor, before: Before) -> torch.Tensor:
    """``value`` as a tensor on meta that the recorder knows."""
    if isinstance(value, Handle):
        return raw(value)
    return raw(before.recorder.defer_parameter(nn.Parameter(value, requires_grad=False)))


def make_handle(parameter: nn.Parameter, stands_for: Before | Applied) -> Handle:
    """Turn ``parameter`` itself into a handle, so that who holds it holds the handle."""
    parameter.__class__ = Handle
    vars(parameter)["stands_for"] = stands_for
    return cast(Handle, parameter)


def change_type(handle: Handle, dtype: torch.dtype) -> None:
    """Convert the parameter, as ``model.to(dtype)`` does.

    Raises:
        InputError: the plan is applied already.
    """
    if not isinstance(handle.stands_for, Before):
        raise InputError(
            "the model's type was changed after its first batch",
            hint="convert it before the first call",
        )
    with torch._C.DisableTorchFunctionSubclass(), handle.stands_for.recorder:
        handle.data = raw(handle).to(dtype)
