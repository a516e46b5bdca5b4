"""The ops of a transformer layer as training frameworks run them, in closed form.

Bytes are per sequence, 2 an element unless said otherwise. ``x`` stands for one activation of
``sequence_length * hidden`` elements. Kernels are those of Megatron-LM and Transformer Engine
(`fused`), of eager torch, or what torch.compile and XLA make of eager code (`compiled`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from paraplan.graph import Amount, Op, Recompute
from paraplan.validate_frameworks import PLAIN, Framework

ALL: tuple[Recompute, ...] = ("full",)
CORE: tuple[Recompute, ...] = ("selective", "full")
Phase = Literal["forward", "backward"]
NARROW = {"float8": 1.0, "float4": 0.5 + 1 / 16}
"""Bytes of an element of a narrow dtype; sixteen of 4 bits share a scale of one byte."""


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What a graph is made from.

    Attributes:
        gated: the MLP multiplies two projections (SwiGLU).
        tied: embedding and head share their weight.
        framework: whose kernels compute it.
        fused_norm: norms are one kernel.
        flash: attention is one fused kernel.
        fused_softmax: scale, mask and softmax are one kernel, where attention is not.
        dropout: after softmax and in front of both residual additions.
        product_dtype: of the layers' matrix products; everything else is in ``dtype``.
        adapter: rank of the low-rank adapters beside attention's projections, all else frozen; 0
            where everything is trained.
        selective: what selective recompute reruns: attention's core (Megatron-LM), or every op
            but matrix products and attention (torch's selective checkpointing), or every second
            product too (torchtitan's ``selective(op)``).
        head_size: elements of one attention head; 0: the hidden size divided among the heads.
        head_twice: the backward reruns the head's product and the gathering of its logits.
        experts, chosen: of each layer, and those that a token goes to; 0 without experts.
            ``ffn`` is then the inner size of one.
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
    flash: bool
    dropout: bool
    dtype: str
    product_dtype: str
    fused_norm: bool = False
    fused_softmax: bool = False
    adapter: int = 0
    selective: Literal["core", "pointwise", "half"] = "core"
    framework: Framework = PLAIN
    head_size: int = 0
    head_twice: bool = False
    experts: int = 0
    chosen: int = 0

    @property
    def head_dim(self) -> int:
        """Elements of one attention head."""
        return self.head_size or self.hidden // self.heads

    @property
    def biased(self) -> bool:
        """Whether products have a bias, as Megatron-LM's GPT has."""
        return self.framework.kernels == "fused" and not self.gated

    @property
    def eager(self) -> bool:
        """Whether every elementary op is a kernel of its own."""
        return self.framework.kernels == "eager"


def element_bytes(dtype: str) -> float:
    """Bytes of one element of a product's operand."""
    return NARROW.get(dtype, 2.0)


def per_sequence(number: float) -> Amount:
    """An amount that grows with the micro-batch alone."""
    return Amount(0, round(number))


def memory_op(
    name: str,
    phase: Phase,
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
        read_bytes=per_sequence(read),
        write_bytes=per_sequence(write),
        replicated=replicated,
        reruns=reruns if phase == "forward" else (),
    )


def both_ways(
    name: str, forward: float, backward: float, *, reruns: tuple[Recompute, ...] = ALL
) -> list[Op]:
    """A memory-bound op and its gradient, by the bytes that each moves."""
    return [
        memory_op(name, "forward", forward, 0, reruns=reruns),
        memory_op(f"{name}_backward", "backward", backward, 0),
    ]


def product(
    sizes: ModelSizes,
    n: int,
    k: int,
    dtype: str,
    reruns: tuple[Recompute, ...] = ALL,
    *,
    frozen: bool | None = None,
) -> list[Op]:
    """A linear layer of ``tokens`` rows per sequence: forward, and its two gradients.

    A frozen weight has no gradient; a trained one adds it to the sum over micro-batches.

    Args:
        frozen: None: beside adapters.
    """
    tokens, gradient_bytes = sizes.sequence_length, sizes.framework.gradient_bytes
    frozen = bool(sizes.adapter) if frozen is None else frozen
    rows, size = per_sequence(tokens), element_bytes(dtype)
    inputs, weights = per_sequence(size * tokens * k), Amount(round(size * n * k))
    outputs = per_sequence(2 * tokens * n)
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
    weight = forward.model_copy(
        update={
            **fields,
            "dims": (one, columns, inner, rows),
            "read_bytes": Amount(0, inputs.per_sequence + outputs.per_sequence),
            "write_bytes": Amount(_gradient_bytes(sizes.framework) * n * k),
        }
    )
    made = [forward, data] if frozen else [forward, data, weight]
    if gradient_bytes and not frozen:
        moved = Amount(gradient_bytes * n * k)
        made.append(
            memory_op("add_gradient", "backward", 0, 0).model_copy(update={"read_bytes": moved})
        )
    return made + (_casts(tokens, n, k, 1 if frozen else 2) if dtype in NARROW else [])


def _gradient_bytes(framework: Framework) -> int:
    """What a product moves for each element of a weight's gradient: written as the inputs are, or
    added to the sum, which is read and written."""
    return 2 * framework.engine.standing_gradient_bytes if framework.sums_in_product else 2


def _casts(tokens: int, n: int, k: int, copies: int) -> list[Op]:
    """Inputs and output gradients of an fp8 product are cast once.

    Weights are cast once a step, by the optimizer (Transformer Engine's default with
    accumulation): left out.

    Args:
        copies: 2 with the transpose, which the weight's gradient needs.
    """
    return [
        memory_op("cast", "forward", 2 * tokens * k, copies * tokens * k),
        memory_op("cast", "backward", 2 * tokens * n, copies * tokens * n),
    ]


def adapter_ops(sizes: ModelSizes, tensor: int, width: int) -> list[Op]:
    """Low-rank adapters of attention's projections, as NeMo computes them beside those.

    Dropout of the input (2 + 2 + 1 bytes an element, 1 + 2 + 2 backward), a product into the rank
    and one out of it, the output scaled (2 + 2, 2 + 2) and added (2 + 2 + 2), the input's
    gradient added (2 + 2 + 2).

    Args:
        width: of queries, keys and values of one tensor rank.
    """
    s, h, rank = sizes.sequence_length, sizes.hidden, sizes.adapter
    joined = sizes.heads * sizes.head_dim // tensor
    # Elements in and out, and what each product sees of them; what enters or leaves the tensor
    # ranks is divided along the sequence.
    places = [(s * h, s * width, h, width, True)]
    if sizes.framework.adapters == "attention":
        places.append((s * joined, s * h, joined, h // tensor, False))
    made: list[Op] = []
    for read, added, inputs, outputs, enters in places:
        if sizes.framework.adapter_dropout:
            made += [
                memory_op("dropout", "forward", 2 * read, 3 * read, replicated=enters),
                memory_op("dropout_backward", "backward", 3 * read, 2 * read, replicated=enters),
            ]
        made += [
            *product(sizes, rank, inputs, sizes.dtype, frozen=False),
            *product(sizes, outputs, rank, sizes.dtype, frozen=False),
            memory_op("scale", "forward", 2 * added, 2 * added, replicated=not enters),
            memory_op("add", "forward", 4 * added, 2 * added, replicated=not enters),
            memory_op("scale_backward", "backward", 2 * added, 2 * added, replicated=not enters),
            memory_op("add_backward", "backward", 4 * read, 2 * read, replicated=enters),
        ]
    return made


def expert_ops(sizes: ModelSizes, ffn: int) -> list[Op]:
    """Router, grouped products and activation of the chosen experts; tokens moved to and fro.

    Every expert gets as many tokens as the others.

    Args:
        ffn: of one tensor rank.
    """
    s, h, up = sizes.sequence_length, sizes.hidden, (2 if sizes.gated else 1) * ffn
    rows = s * sizes.chosen
    moved = 2 * rows * h
    made = product(sizes, sizes.experts, h, sizes.dtype)
    made += both_ways("permute", 2 * moved, 2 * moved)  # read here, written there
    made += _grouped_products(sizes, rows, up, h)
    made += both_ways("activation", 2 * rows * (up + ffn), 2 * rows * (2 * up + ffn))
    made += _grouped_products(sizes, rows, h, ffn)
    return made + both_ways("unpermute", moved + 2 * s * h, 2 * moved + 2 * s * h)


def _grouped_products(sizes: ModelSizes, rows: int, n: int, k: int) -> list[Op]:
    """The experts' products of ``rows`` rows in all: forward, and both gradients."""
    dtype = sizes.product_dtype
    size = element_bytes(dtype)
    weights = round(size * sizes.experts * n * k)
    total = per_sequence(rows)
    forward = Op(
        name="aten.grouped",
        kind="grouped_gemm",
        phase="forward",
        dtype=dtype,
        dims=(Amount(sizes.experts), total, Amount(n), Amount(k)),
        read_bytes=Amount(weights, round(size * rows * k)),
        write_bytes=per_sequence(2 * rows * n),
        expert=True,
        reruns=ALL,
    )
    fields = {"phase": "backward", "reruns": ()}
    data = forward.model_copy(
        update={**fields, "dims": (Amount(sizes.experts), total, Amount(k), Amount(n))}
    )
    weight = forward.model_copy(update={**fields, "read_bytes": per_sequence(2 * rows * (n + k))})
    moved = _gradient_bytes(sizes.framework) * sizes.experts * n * k
    return [
        forward,
        data,
        weight.model_copy(update={"write_bytes": Amount(moved)}),
    ]


def norm_ops(sizes: ModelSizes, pointwise: tuple[Recompute, ...]) -> list[Op]:
    """A norm: one kernel, or eager through fp32.

    Eager RMS norm: cast (2 + 4 bytes an element), square (4 + 4), mean (4), scale (4 + 4), cast
    and weight (4 + 2, 2 + 2): 32; its gradients about twice that.
    """
    x = 2 * sizes.sequence_length * sizes.hidden
    forward, backward = (2 * x, 3 * x) if sizes.fused_norm else (16 * x, 30 * x)
    calls = 1 if sizes.fused_norm else 6
    return [
        memory_op(
            "norm",
            "forward",
            forward / calls,
            0,
            replicated=True,
            reruns=pointwise,
            count=calls,
        ),
        memory_op("norm_backward", "backward", backward / calls, 0, replicated=True, count=calls),
    ]


def attention_ops(sizes: ModelSizes, tensor: int) -> list[Op]:
    """Attention between the projections: one fused kernel, or a score matrix as in 2021."""
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
            dims=(per_sequence(1), *numbers),
            read_bytes=per_sequence(q + keys),
            write_bytes=per_sequence(q),
            causal=True,
            reruns=core,
        )
        backward = forward.model_copy(update={"phase": "backward", "reruns": ()})
        return [forward, backward]
    return _score_ops(sizes, heads, q + keys, core)


def _score_ops(
    sizes: ModelSizes, heads: int, moved: float, core: tuple[Recompute, ...]
) -> list[Op]:
    s = sizes.sequence_length
    scores = 2 * heads * s * s
    products = [
        _scores_product(sizes, heads, phase, moved, reruns=core)
        for phase in ("forward", "backward", "backward")
    ]
    made = [op for pair in products for op in pair]
    made += [
        memory_op("softmax", "forward", scores, scores, reruns=core),
        memory_op("softmax_backward", "backward", 2 * scores, scores),
    ]
    if not sizes.fused_softmax:  # scale, mask, and a cast to fp32 and back around the softmax
        made += [
            memory_op("softmax", "forward", 1.5 * scores, 1.5 * scores, reruns=core, count=4),
            memory_op("softmax_backward", "backward", 1.25 * scores, 1.25 * scores, count=4),
            *small_calls(20, core),
        ]
    if sizes.dropout:
        made += [
            memory_op("dropout", "forward", scores, 1.5 * scores, reruns=core),
            memory_op("dropout_backward", "backward", 1.5 * scores, scores),
        ]
    return made


def _scores_product(
    sizes: ModelSizes,
    heads: int,
    phase: Phase,
    moved: float,
    *,
    reruns: tuple[Recompute, ...],
) -> list[Op]:
    """The two batched products of attention: queries by keys, weights by values."""
    s, d = sizes.sequence_length, sizes.head_dim
    size = per_sequence(moved / 2 + 2 * heads * s * s)
    return [
        Op(
            name="aten.bmm",
            kind="gemm",
            phase=phase,
            dtype=sizes.dtype,
            dims=(per_sequence(heads), Amount(s), Amount(n), Amount(k)),
            read_bytes=size,
            reruns=reruns if phase == "forward" else (),
        )
        for n, k in ((s, d), (d, s))
    ]


def pointwise_ops(
    sizes: ModelSizes, ffn: int, width: int, reruns: tuple[Recompute, ...]
) -> list[Op]:
    """Activation, rotary embedding (gated models have one) and the residual additions.

    Args:
        ffn, width: of one tensor rank: the MLP's inner size, and queries, keys and values together.
    """
    s = sizes.sequence_length
    x, wide = 2 * s * sizes.hidden, 2 * s * ffn
    mask = x / 2 if sizes.dropout else 0
    made = [
        memory_op("add", "forward", 2 * x, x + mask, replicated=True, count=2, reruns=reruns),
        memory_op("add", "backward", x + mask + x, x, replicated=True, count=2),
    ]
    if sizes.gated:
        # One kernel, or the activation and the product of the two halves one after the other.
        if not sizes.experts:
            made += both_ways(
                "activation",
                *((5 * wide, 12 * wide) if sizes.eager else (3 * wide, 5 * wide)),
                reruns=reruns,
            )
        rotated = 2 * s * width * 2 / 3
        passes = 6 if sizes.eager else 2  # halves swapped, two products, a sum, in fp32
        made += both_ways("rotary", passes * rotated, passes * rotated, reruns=reruns)
    else:
        made += both_ways("activation", 2 * wide, 3 * wide, reruns=reruns)
        if sizes.biased:  # of the four products: each gradient is read once more
            outputs = 2 * s * (width + ffn) + 2 * x
            made.append(memory_op("sum", "backward", outputs, 0, count=1))
    if sizes.eager or not sizes.flash:  # heads are split and joined by copies
        made += both_ways("copy", 2 * 2 * s * width, 2 * 2 * s * width, reruns=reruns)
    return made


def small_calls(calls: int, reruns: tuple[Recompute, ...] = ALL) -> list[Op]:
    """Launches that move next to nothing but take the host's time; twice as many backward."""
    if not calls:
        return []
    return [
        memory_op("small", "forward", 0, 0, reruns=reruns, count=calls),
        memory_op("small", "backward", 0, 0, count=2 * calls),
    ]
