"""Attention as one op of the trace.

Written out, attention is two batched products and a softmax over a score matrix that no fused
kernel ever stores, and its causal mask halves nothing. The op defined here stands for the fused
kernel: it has shapes, a backward and saved tensors (query, key, value, output and the log-sum-exp
of each row, as in FlashAttention-2, Dao 2023, algorithm 1), but no implementation.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

IMPLEMENTATION = "paraplan"
"""Name under which transformers' attention interface knows it."""

_FORWARD = (
    "attention(Tensor q, Tensor k, Tensor v, bool causal, int window, Tensor? bias, Tensor? sinks)"
)
_BACKWARD = (
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, bool causal, int window,"
    " Tensor? bias, Tensor? sinks, Tensor out, Tensor logsumexp, bool bias_gradient)"
)


class AttentionOps(NamedTuple):
    """The two ops, and the library that keeps them registered."""

    forward: Any
    backward: Any
    library: torch.library.Library


@cache
def attention_ops() -> AttentionOps:
    """Define the ops, once per process."""
    library: Any = torch.library.Library("paraplan", "DEF")  # type: ignore[no-untyped-call]
    library.define(f"{_FORWARD} -> (Tensor, Tensor)")
    library.define(f"{_BACKWARD} -> (Tensor, Tensor, Tensor, Tensor?, Tensor?)")
    library.impl("attention", _meta_forward, "Meta")
    library.impl("attention_backward", _meta_backward, "Meta")
    ops = torch.ops.paraplan
    return AttentionOps(ops.attention.default, ops.attention_backward.default, library)


def _meta_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int,
    bias: Tensor | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = q.shape
    if heads % k.shape[1]:
        raise ValueError(f"{heads} attention heads do not divide over {k.shape[1]} kv heads")
    out = q.new_empty((batch, length, heads, v.shape[-1])).transpose(1, 2)
    return out, q.new_empty((batch, heads, length), dtype=torch.float32)


def _meta_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int,
    bias: Tensor | None,
    sinks: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    return (
        torch.empty_like(q),
        torch.empty_like(k),
        torch.empty_like(v),
        torch.empty_like(bias) if bias is not None and bias_gradient else None,
        None if sinks is None else torch.empty_like(sinks),
    )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool,
        window: int,
        bias: Tensor | None,
        sinks: Tensor | None,
    ) -> Tensor:
        out, logsumexp = attention_ops().forward(q, k, v, causal, window, bias, sinks)
        ctx.save_for_backward(q, k, v, bias, sinks, out, logsumexp)
        ctx.causal, ctx.window = causal, window
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *rest = ctx.saved_tensors
        dq, dk, dv, dbias, dsinks = attention_ops().backward(
            grads[0], q, k, v, ctx.causal, ctx.window, *rest, ctx.needs_input_grad[5]
        )
        return dq, dk, dv, None, None, dbias, dsinks


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend: (batch, heads, length, size) each, key and value with ``kv_heads`` heads.

    Args:
        bias: added to the scores, broadcast to (batch, heads, query length, key length).
        window: sliding window in tokens.
        sinks: one more score per head, of a key that has no value (gpt-oss).
    """
    apply: Any = _Attention.apply
    return apply(query, key, value, causal, window or 0, bias, sinks)  # type: ignore[no-any-return]


def attention_for_transformers(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The op behind the signature of transformers' ``AttentionInterface``.

    Dropout of attention weights and soft capping happen inside the kernel and cost no traffic.
    """
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    bias = attention_mask
    if position_bias is not None:
        bias = position_bias if bias is None else bias + position_bias
    causal = is_causal and query.shape[2] > 1 and attention_mask is None
    out = attention(query, key, value, causal=causal, window=sliding_window, bias=bias, sinks=s_aux)
    return out.transpose(1, 2), None


def register_with_transformers() -> None:
    """Make ``attn_implementation="paraplan"`` known.

    It is left out of the mask interface on purpose: transformers then builds no mask tensors,
    as it does for kernels that take ``causal`` and the window as arguments.
    """
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, attention_for_transformers)


class FusedAttention(torch.overrides.TorchFunctionMode):
    """Replaces ``scaled_dot_product_attention`` in models that call it themselves."""

    def __init__(self) -> None:
        super().__init__()
        attention_ops()  # selective recomputation asks torch for them by name

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Hand the call on, or make it the op."""
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return _from_functional(*args, **kwargs)


def _from_functional(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    lead = query.shape[:-3]
    if query.dim() != 4:
        query, key, value = (
            t.reshape(-1, *t.shape[-3:]) if t.dim() > 4 else t[(None,) * (4 - t.dim())]
            for t in (query, key, value)
        )
    out = attention(query, key, value, bias=attn_mask, causal=is_causal)
    return out.reshape(*lead, *out.shape[1:]) if len(lead) != 1 else out
