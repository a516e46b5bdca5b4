"""What one aten call does on a device: its kind, its sizes and the memory that it touches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["gemm", "grouped_gemm", "attention", "memory"]

# Calls that only make room: no kernel runs.
_ALLOCATIONS = frozenset({"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"})
# Calls that only write: the operand tells shape and dtype and is not read.
_FILLS = frozenset(
    [
        "zeros",
        "ones",
        "full",
        "arange",
        "zeros_like",
        "ones_like",
        "full_like",
        "new_zeros",
        "new_ones",
        "new_full",
        "zero_",
        "fill_",
        "scalar_tensor",
    ]
)
# Calls that read as many elements of their first operand as they return, not all of it.
_LOOKUPS = frozenset({"index", "gather", "index_select", "embedding"})
# Calls that write as many elements of their first operand as the last operand has.
_SCATTERS = frozenset(
    ["index_put_", "_index_put_impl_", "scatter_", "scatter_add_", "index_add_", "index_copy_"]
)


class Kernel(NamedTuple):
    """One kernel launch.

    ``dims`` as `paraplan.graph.Op` lists them, in numbers; bytes of device memory.
    """

    kind: Kind
    dtype: str
    dims: tuple[int, ...]
    read_bytes: int
    write_bytes: int
    causal: bool = False
    window: int | None = None


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Tensors among arguments, those inside lists, tuples and dictionaries included."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)
        elif isinstance(value, dict):
            yield from tensors_in(value.values())


def touched_bytes(tensor: Tensor) -> int:
    """Memory behind ``tensor``; an expanded dimension is stored once."""
    if tensor.is_contiguous():
        return tensor.numel() * tensor.element_size()
    sizes = (n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(sizes) * tensor.element_size()


def kernels_of(
    name: str, args: tuple[Any, ...], reads: list[Tensor], writes: list[Tensor]
) -> list[Kernel]:
    """The kernels behind the aten call ``name``, usually one.

    Args:
        name: without namespace and overload, such as ``mm``.
        args: positional arguments.
        reads: tensor operands.
        writes: tensor results, and operands that are changed in place.
    """
    if name in _ALLOCATIONS or not writes or not any(t.numel() for t in writes):
        return []
    if name == "convolution_backward":
        return _convolution_backward(args)
    read, write = _traffic(name, args, reads, writes)
    dims = _PRODUCTS[name](args, writes[0]) if name in _PRODUCTS else None
    if dims is not None:
        dtype = _dtype(next(t for t in reads if t.is_floating_point()))
        kind: Kind = "grouped_gemm" if name in _GROUPED else "gemm"
        return [Kernel(kind, dtype, dims, read, write)]
    if name in ("attention", "attention_backward"):
        return [_attention(name, args, read, write)]
    return [Kernel("memory", _dtype(writes[0]), (), read, write)]


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _traffic(
    name: str, args: tuple[Any, ...], reads: list[Tensor], writes: list[Tensor]
) -> tuple[int, int]:
    written = sum(touched_bytes(t) for t in writes)
    if name in _FILLS:
        return 0, written
    if name in _SCATTERS:
        values = touched_bytes(reads[-1])
        return values + sum(touched_bytes(t) for t in reads[1:]), values
    sizes = [touched_bytes(t) for t in {id(t): t for t in reads}.values()]
    if name == "copy_":
        return sum(sizes[1:]), written
    if name in _LOOKUPS:
        return touched_bytes(writes[0]) + sum(sizes[1:]), written
    if name == "nll_loss_forward":
        target = args[1]
        return target.numel() * (args[0].element_size() + target.element_size()), written
    if name == "nll_loss_backward":  # the log-probabilities are there for their shape
        return sum(sizes) - touched_bytes(args[1]), written
    return sum(sizes), written


def _mm(args: tuple[Any, ...], out: Tensor) -> tuple[int, ...]:
    a, b = args[0], args[1]
    return 1, a.shape[0], b.shape[1], a.shape[1]


def _addmm(args: tuple[Any, ...], out: Tensor) -> tuple[int, ...]:
    return _mm(args[1:], out)


def _bmm(args: tuple[Any, ...], out: Tensor) -> tuple[int, ...]:
    a, b = args[0], args[1]
    return a.shape[0], a.shape[1], b.shape[2], a.shape[2]


def _baddbmm(args: tuple[Any, ...], out: Tensor) -> tuple[int, ...]:
    return _bmm(args[1:], out)


def _linear(args: tuple[Any, ...], out: Tensor) -> tuple[int, ...]:
    a, b = args[0], args[1]
    return 1, a.numel() // a.shape[-1], b.shape[0], b.shape[1]


def _mv(args: tuple[Any, ...], out: Tensor) -> tuple[int, ...]:
    a = args[0]
    return 1, a.numel() // a.shape[-1], 1, a.shape[-1]


def _convolution(args: tuple[Any, ...], out: Tensor) -> tuple[int, ...]:
    weight = args[1]
    pixels = out.numel() // out.shape[1]
    groups = args[8]
    return groups, pixels, weight.shape[0] // groups, weight[0].numel()


def _grouped_mm(args: tuple[Any, ...], out: Tensor) -> tuple[int, ...]:
    """Rows of all groups together; a weight gradient sums over the same rows."""
    a, b = args[0], args[1]
    if out.dim() == 3:  # (k, rows) by (rows, n): one (k, n) gradient per group
        return out.shape[0], a.shape[1], b.shape[1], a.shape[0]
    return b.shape[0], a.shape[0], b.shape[2], a.shape[1]


_PRODUCTS = {
    "mm": _mm,
    "addmm": _addmm,
    "bmm": _bmm,
    "baddbmm": _baddbmm,
    "linear": _linear,
    "mv": _mv,
    "dot": _mv,
    "convolution": _convolution,
    "_grouped_mm": _grouped_mm,
}
_GROUPED = frozenset({"_grouped_mm"})


def _attention(name: str, args: tuple[Any, ...], read: int, write: int) -> Kernel:
    backward = name == "attention_backward"
    q, k, v = args[1:4] if backward else args[:3]
    causal, window = args[4:6] if backward else args[3:5]
    batch, heads, length, size = q.shape
    dims = (batch, heads, k.shape[1], length, k.shape[2], size, v.shape[3])
    return Kernel("attention", _dtype(q), dims, read, write, causal, window or None)


def _convolution_backward(args: tuple[Any, ...]) -> list[Kernel]:
    """Gradients of input and weight, each a product of the forward's size; bias: a sum."""
    grad, source, weight = args[0], args[1], args[2]
    groups, mask = args[9], args[10]
    pixels = grad.numel() // grad.shape[1]
    rows, columns = weight.shape[0] // groups, weight[0].numel()
    sizes = [touched_bytes(t) for t in (grad, source, weight)]
    made = []
    if mask[0]:
        dims = (groups, pixels, columns, rows)
        made.append(Kernel("gemm", _dtype(grad), dims, sizes[0] + sizes[2], sizes[1]))
    if mask[1]:
        dims = (groups, rows, columns, pixels)
        made.append(Kernel("gemm", _dtype(grad), dims, sizes[0] + sizes[1], sizes[2]))
    if mask[2]:
        bias = weight.shape[0] * weight.element_size()
        made.append(Kernel("memory", _dtype(grad), (), sizes[0], bias))
    return made


def mutates(function: torch._ops.OpOverload) -> tuple[bool, ...]:
    """For each argument of the schema: whether the call writes into it."""
    return tuple(bool(a.alias_info and a.alias_info.is_write) for a in function._schema.arguments)
