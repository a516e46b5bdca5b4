"""A model graph in closed form, from the sizes of a GPT- or Llama-like model; no torch.

Published runs name sizes, not code. Matrix products follow from the sizes alone; what else is run
and saved follows the frameworks that the runs used: fused kernels and Megatron-LM's saved
activations (Korthikanti et al. 2022, section 4), or eager torch. Attention is one fused kernel
or, as in 2021, a score matrix with softmax and dropout, which the forward saves.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

from paraplan.graph import (
    Amount,
    Block,
    BlockVariant,
    ChainItem,
    Collective,
    ModelGraph,
    Op,
    Recompute,
    Saved,
    Value,
    op_flops,
)

ALL: tuple[Recompute, ...] = ("full",)
CORE: tuple[Recompute, ...] = ("selective", "full")


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What a graph is made from.

    Attributes:
        gated: the MLP multiplies two projections (SwiGLU).
        tied: embedding and head share their weight.
        fused: fused kernels (Megatron-LM, Transformer Engine, torch.compile), else eager torch.
        fused_norm: norms are one kernel.
        flash: attention is one fused kernel.
        dropout: after softmax and in front of both residual additions.
        product_dtype: of the layers' matrix products; everything else is in ``dtype``.
        selective: what selective recompute reruns: attention's core (Megatron-LM), or every op
            but matrix products and attention (torch's selective checkpointing).
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    sequence_length: int
    gated: bool
    tied: bool
    fused: bool
    fused_norm: bool
    flash: bool
    dropout: bool
    dtype: str
    product_dtype: str
    selective: Literal["core", "pointwise"] = "core"

    @property
    def head_dim(self) -> int:
        """Elements of one attention head."""
        return self.hidden // self.heads


def parameter_count(sizes: ModelSizes) -> int:
    """Elements of the model, biases and norms left out (below 0.1 %)."""
    embeddings = sizes.vocab * sizes.hidden * (1 if sizes.tied else 2)
    return sizes.layers * _layer_parameters(sizes, 1) + embeddings


def _layer_parameters(sizes: ModelSizes, tensor: int) -> int:
    width = (2 * sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim
    return sizes.hidden * (width + (3 if sizes.gated else 2) * sizes.ffn) // tensor


def _per_sequence(number: float) -> Amount:
    return Amount(0, round(number))


@cache
def closed_form_graph(sizes: ModelSizes, tensor: int) -> ModelGraph:
    """The graph with variants for degree 1 and ``tensor``."""
    degrees = sorted({1, tensor})
    blocks = {
        "embedding": Block(role="embedding", variants={t: _embedding(sizes, t) for t in degrees}),
        "layer": Block(role="layer", variants={t: _layer(sizes, t) for t in degrees}),
        "head": Block(role="head", variants={t: _head(sizes, t) for t in degrees}),
    }
    names = ("embedding", *("layer",) * sizes.layers, "head")
    modules = ("embedding", *(f"layers.{i}" for i in range(sizes.layers)), "head")
    residual = _per_sequence(2 * sizes.sequence_length * sizes.hidden)
    count = parameter_count(sizes)
    flops = sum(
        op_flops(op, 1) * op.count * (sizes.layers if name == "layer" else 1)
        for name, block in blocks.items()
        for op in block.variants[1].ops
    )
    return ModelGraph(
        name=f"{sizes.layers}x{sizes.hidden}",
        architecture="closed form",
        config_sha256="",
        sequence_length=sizes.sequence_length,
        compute_dtype=sizes.dtype,
        torch_version="",
        transformers_version="",
        parameter_count=count,
        trainable_parameter_count=count,
        tied_parameters=sizes.vocab * sizes.hidden if sizes.tied else 0,
        hidden_size=sizes.hidden,
        vocab_size=sizes.vocab,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        blocks=blocks,
        chain=tuple(
            ChainItem(block=name, modules=(module,))
            for name, module in zip(names, modules, strict=True)
        ),
        values=tuple(
            Value(producer=i, last_consumer=i + 1, size_bytes=residual)
            for i in range(len(names) - 1)
        ),
        model_flops_per_sequence=flops,
    )


def _product(
    tokens: int, n: int, k: int, dtype: str, reruns: tuple[Recompute, ...] = ALL
) -> list[Op]:
    """A linear layer of ``tokens`` rows per sequence: forward, and its two gradients."""
    rows, size = _per_sequence(tokens), 1 if dtype == "float8" else 2
    inputs, weights = _per_sequence(size * tokens * k), Amount(size * n * k)
    outputs = _per_sequence(2 * tokens * n)
    one, columns, inner = Amount(1), Amount(n), Amount(k)
    forward = Op(
        name="aten.mm",
        kind="gemm",
        phase="forward",
        dtype=dtype,
        dims=(one, rows, columns, inner),
        read_bytes=Amount(weights.fixed, inputs.per_sequence),
        write_bytes=outputs,
        reruns=reruns,
    )
    fields = {"phase": "backward", "reruns": ()}
    data = forward.model_copy(update={**fields, "dims": (one, rows, inner, columns)})
    weight = forward.model_copy(update={**fields, "dims": (one, columns, inner, rows)})
    return [forward, data, weight] + (_casts(tokens, n, k) if dtype == "float8" else [])


def _casts(tokens: int, n: int, k: int) -> list[Op]:
    """Inputs and output gradients of an fp8 product are cast once, with their transpose.

    Weights are cast once a step, by the optimizer (Transformer Engine's default with
    accumulation): left out.
    """
    return [
        _memory("cast", "forward", 2 * tokens * k, 2 * tokens * k),
        _memory("cast", "backward", 2 * tokens * n, 2 * tokens * n),
    ]


def _memory(
    name: str,
    phase: Literal["forward", "backward"],
    read: float,
    write: float,
    *,
    replicated: bool = False,
    reruns: tuple[Recompute, ...] = ALL,
    count: int = 1,
) -> Op:
    """A memory-bound op that reads and writes so many bytes per sequence."""
    return Op(
        name=f"aten.{name}",
        kind="memory",
        phase=phase,
        dtype="bfloat16",
        count=count,
        read_bytes=_per_sequence(read),
        write_bytes=_per_sequence(write),
        replicated=replicated,
        reruns=reruns if phase == "forward" else (),
    )


def _norm(sizes: ModelSizes, pointwise: tuple[Recompute, ...]) -> list[Op]:
    """A norm: fused, one pass over its tensors; eager, through fp32 (cast, square, mean, scale)."""
    x = 2 * sizes.sequence_length * sizes.hidden
    made = [
        _memory("norm", "forward", x, x, replicated=True, reruns=pointwise),
        _memory("norm", "backward", 2 * x, x, replicated=True),
    ]
    if not sizes.fused_norm:
        made += [
            _memory("norm", "forward", 2 * x, 2 * x, replicated=True, reruns=pointwise),
            _memory("norm", "backward", 3 * x, 2 * x, replicated=True),
        ]
    return made


def _attention(sizes: ModelSizes, tensor: int) -> list[Op]:
    s, d = sizes.sequence_length, sizes.head_dim
    heads, kv = sizes.heads // tensor, max(1, sizes.kv_heads // tensor)
    q, keys = 2 * s * heads * d, 2 * 2 * s * kv * d
    core = CORE if sizes.selective == "core" else ALL
    if sizes.flash:
        numbers = (Amount(heads), Amount(kv), Amount(s), Amount(s), Amount(d), Amount(d))
        forward = Op(
            name="aten.attention",
            kind="attention",
            phase="forward",
            dtype=sizes.dtype,
            dims=(_per_sequence(1), *numbers),
            read_bytes=_per_sequence(q + keys),
            write_bytes=_per_sequence(q),
            causal=True,
            reruns=core,
        )
        backward = forward.model_copy(update={"phase": "backward", "reruns": ()})
        return [forward, backward]
    scores = 2 * heads * s * s
    products = [
        _scores_product(sizes, heads, phase, q + keys, reruns=core)
        for phase in ("forward", "backward", "backward")
    ]
    made = [op for pair in products for op in pair]
    made += [
        _memory("softmax", "forward", scores, scores, reruns=core),
        _memory("softmax_backward", "backward", 2 * scores, scores),
    ]
    if not sizes.fused:  # scale, mask, and a cast to fp32 and back around the softmax
        made += [
            _memory("softmax", "forward", 6 * scores, 6 * scores, reruns=core),
            _memory("softmax_backward", "backward", 5 * scores, 5 * scores),
        ]
    if sizes.dropout:
        made += [
            _memory("dropout", "forward", scores, 1.5 * scores, reruns=core),
            _memory("dropout_backward", "backward", 1.5 * scores, scores),
        ]
    return made


def _scores_product(
    sizes: ModelSizes,
    heads: int,
    phase: Literal["forward", "backward"],
    moved: float,
    *,
    reruns: tuple[Recompute, ...],
) -> list[Op]:
    """The two batched products of attention: queries by keys, weights by values."""
    s, d = sizes.sequence_length, sizes.head_dim
    size = _per_sequence(moved / 2 + 2 * heads * s * s)
    return [
        Op(
            name="aten.bmm",
            kind="gemm",
            phase=phase,
            dtype=sizes.dtype,
            dims=(_per_sequence(heads), Amount(s), Amount(n), Amount(k)),
            read_bytes=size,
            reruns=reruns if phase == "forward" else (),
        )
        for n, k in ((s, d), (d, s))
    ]


def _layer(sizes: ModelSizes, tensor: int) -> BlockVariant:
    s, h, dtype = sizes.sequence_length, sizes.hidden, sizes.product_dtype
    d, ffn = sizes.head_dim, sizes.ffn // tensor
    width = (sizes.heads + 2 * max(sizes.kv_heads, tensor)) * d // tensor
    up = 2 * ffn if sizes.gated else ffn
    pointwise = CORE if sizes.selective == "pointwise" else ALL
    ops = [*_norm(sizes, pointwise), *_product(s, width, h, dtype)]
    ops += _attention(sizes, tensor)
    ops += _product(s, h, sizes.heads * d // tensor, dtype)
    ops += [*_norm(sizes, pointwise), *_product(s, up, h, dtype)]
    ops += _product(s, h, ffn, dtype)
    ops += _pointwise(sizes, up, ffn, width, pointwise)
    saved = _saved(sizes, tensor, up, ffn, width)
    message = _per_sequence(2 * s * h)
    none = saved["none"]
    kept_bytes = sum(a.per_sequence for a in (none.sharded, none.replicated, none.gathered))
    peak = kept_bytes + 2 * s * (up + ffn) + 4 * s * h
    return BlockVariant(
        ops=tuple(ops),
        parameters=_layer_parameters(sizes, tensor),
        saved=saved,
        peak_bytes=_per_sequence(peak),
        collectives=_exchanges(message, 2, 2) if tensor > 1 else (),
    )


def _exchanges(message: Amount, forward: int, backward: int) -> tuple[Collective, ...]:
    return (Collective(phase="forward", message_bytes=message),) * forward + (
        Collective(phase="backward", message_bytes=message),
    ) * backward


def _pointwise(
    sizes: ModelSizes, up: int, ffn: int, width: int, reruns: tuple[Recompute, ...]
) -> list[Op]:
    """Activation, rotary embedding (gated models have one) and the residual additions."""
    s = sizes.sequence_length
    x = 2 * s * sizes.hidden
    mask = x / 2 if sizes.dropout else 0
    wide, narrow = 2 * s * up, 2 * s * ffn
    made = [
        _memory("activation", "forward", wide, narrow, reruns=reruns),
        _memory("activation_backward", "backward", wide + narrow, wide),
        _memory("add", "forward", 2 * x, x + mask, replicated=True, count=2, reruns=reruns),
        _memory("add", "backward", x + mask + x, x, replicated=True, count=2),
    ]
    if sizes.gated:
        rotated = 2 * s * width * 2 / 3
        made += [
            _memory("rotary", "forward", rotated, rotated, reruns=reruns),
            _memory("rotary", "backward", rotated, rotated),
        ]
    if not sizes.fused:  # bias, gate product and casts are kernels of their own
        made += [
            _memory("activation", "forward", wide, wide, reruns=reruns),
            _memory("activation", "backward", wide, wide),
        ]
    return made


def _saved(sizes: ModelSizes, tensor: int, up: int, ffn: int, width: int) -> dict[Recompute, Saved]:
    """Bytes kept (Korthikanti et al. 2022, section 4.1; the products' inputs are kept once)."""
    s, h = sizes.sequence_length, sizes.hidden
    x, out = 2 * s * h, 2 * s * sizes.heads * sizes.head_dim // tensor
    qkv, mlp = 2 * s * width, 2 * s * (up + ffn)
    core = 4 * s * sizes.heads // tensor  # log-sum-exp
    if not sizes.flash:
        core = (5 if sizes.dropout else 2) * s * s * sizes.heads // tensor
    replicated = 4 * x + (x if sizes.dropout else 0)
    if not sizes.fused_norm:
        replicated += 4 * x  # fp32 copies of the norms' inputs
    sharded = qkv + out + mlp
    # Megatron-LM gathers the inputs of column-parallel products again in the backward; others
    # keep them gathered.
    gathered = _per_sequence(0 if sizes.fused else 2 * x)
    replicated -= gathered.per_sequence
    none = Saved(
        sharded=_per_sequence(sharded + core),
        replicated=_per_sequence(replicated),
        gathered=gathered,
    )
    if sizes.selective == "pointwise":
        kept = qkv + out + core + 2 * s * up
        selective = Saved(sharded=_per_sequence(kept), replicated=_per_sequence(2 * x))
    else:
        selective = none.model_copy(update={"sharded": _per_sequence(sharded)})
    full = Saved(replicated=_per_sequence(x))
    return {"none": none, "selective": selective, "full": full}


def _embedding(sizes: ModelSizes, tensor: int) -> BlockVariant:
    x = 2 * sizes.sequence_length * sizes.hidden
    saved = Saved(replicated=_per_sequence(8 * sizes.sequence_length))
    return BlockVariant(
        ops=(
            _memory("embedding", "forward", x, x),
            _memory("embedding_backward", "backward", 2 * x, x),
        ),
        parameters=sizes.vocab * sizes.hidden // tensor,
        saved=dict.fromkeys(("none", "selective", "full"), saved),
        peak_bytes=_per_sequence(x),
        collectives=_exchanges(_per_sequence(x), 1, 0) if tensor > 1 else (),
    )


def _head(sizes: ModelSizes, tensor: int) -> BlockVariant:
    """Norm, logits and loss in fp32 (cast, largest, exponential and sum, gradient in place)."""
    s, h, columns = sizes.sequence_length, sizes.hidden, sizes.vocab // tensor
    x, logits = 2 * s * h, 2 * s * columns
    ops = [*_norm(sizes, ALL), *_product(s, columns, h, sizes.dtype)]
    ops += [
        _memory("cast", "forward", logits, 2 * logits),
        _memory("max", "forward", 2 * logits, 0),
        _memory("exp", "forward", 2 * logits, 2 * logits),
        _memory("div", "forward", 2 * logits, 2 * logits),
        _memory("loss_backward", "backward", 2 * logits, logits),
    ]
    saved = Saved(sharded=_per_sequence(2 * logits), replicated=_per_sequence(2 * x))
    return BlockVariant(
        ops=tuple(ops),
        parameters=0 if sizes.tied else sizes.vocab * h // tensor,
        saved=dict.fromkeys(("none", "selective", "full"), saved),
        peak_bytes=_per_sequence(5 * logits + 3 * x),
        collectives=_exchanges(_per_sequence(x), 0, 1) if tensor > 1 else (),
    )
