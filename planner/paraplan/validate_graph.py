"""The model graph of a published run, in closed form.

A row names sizes, not a model that could be traced: its blocks are written down here, one op list
(`validate_ops`) and one set of saved bytes per block (Korthikanti et al. 2022, section 4).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Literal

from paraplan.graph import (
    Amount,
    Block,
    BlockVariant,
    ChainItem,
    Collective,
    ModelGraph,
    Recompute,
    Saved,
    Value,
    op_flops,
)
from paraplan.validate_loss import loss_bytes, loss_ops
from paraplan.validate_ops import (
    ALL,
    CORE,
    ModelSizes,
    adapter_ops,
    attention_ops,
    element_bytes,
    expert_ops,
    memory_op,
    norm_ops,
    per_sequence,
    pointwise_ops,
    product,
    small_calls,
)


def parameter_count(sizes: ModelSizes) -> int:
    """Elements of the model, biases and norms left out (below 0.1 %)."""
    embeddings = sizes.vocab * sizes.hidden * (1 if sizes.tied else 2)
    return sizes.layers * _layer_parameters(sizes, 1) + embeddings


def _layer_parameters(sizes: ModelSizes, tensor: int) -> int:
    width = (2 * sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim
    if sizes.experts:
        router = sizes.hidden * sizes.experts
        return sizes.hidden * width // tensor + router + _expert_parameters(sizes, tensor)
    return sizes.hidden * (width + (3 if sizes.gated else 2) * sizes.ffn) // tensor


def _expert_parameters(sizes: ModelSizes, tensor: int) -> int:
    each = (3 if sizes.gated else 2) * sizes.hidden * sizes.ffn
    return sizes.experts * each // tensor


@cache
def closed_form_graph(
    sizes: ModelSizes, tensor: int, kept: frozenset[int] = frozenset()
) -> ModelGraph:
    """The graph with variants for degree 1 and ``tensor``.

    Args:
        kept: layers, from 0, that recompute nothing whatever the others do.
    """
    degrees = sorted({1, tensor})
    blocks = {
        "embedding": Block(role="embedding", variants={t: _embedding(sizes, t) for t in degrees}),
        "layer": Block(role="layer", variants={t: _layer(sizes, t) for t in degrees}),
        "kept layer": Block(
            role="layer", variants={t: _keeping(_layer(sizes, t)) for t in degrees}
        ),
        "head": Block(role="head", variants={t: _head(sizes, t) for t in degrees}),
    }
    layers = ["kept layer" if i in kept else "layer" for i in range(sizes.layers)]
    names = ("embedding", *layers, "head")
    blocks = {name: block for name, block in blocks.items() if name in names}
    modules = ("embedding", *(f"layers.{i}" for i in range(sizes.layers)), "head")
    residual = per_sequence(2 * sizes.sequence_length * sizes.hidden)
    count = parameter_count(sizes)
    once = {
        **blocks,
        "head": Block(role="head", variants={1: _head(replace(sizes, head_twice=False), 1)}),
    }
    flops = sum(
        op_flops(op, 1) * op.count * names.count(name)
        for name, block in once.items()
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
        experts=sizes.experts,
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


def _layer(sizes: ModelSizes, tensor: int) -> BlockVariant:
    s, h, dtype = sizes.sequence_length, sizes.hidden, sizes.product_dtype
    d, ffn = sizes.head_dim, sizes.ffn // tensor
    width = (sizes.heads + 2 * max(sizes.kv_heads, tensor)) * d // tensor
    up = 2 * ffn if sizes.gated else ffn
    pointwise = ALL if sizes.selective == "core" else CORE
    ops = [*norm_ops(sizes, pointwise), *product(sizes, width, h, dtype)]
    ops += attention_ops(sizes, tensor)
    ops += product(sizes, h, sizes.heads * d // tensor, dtype)
    if sizes.adapter:
        ops += adapter_ops(sizes, tensor, width)
    ops += norm_ops(sizes, pointwise)
    if sizes.experts:
        ops += expert_ops(sizes, ffn)
    else:
        ops += [*product(sizes, up, h, dtype), *product(sizes, h, ffn, dtype)]
    ops += pointwise_ops(sizes, ffn, width, pointwise)
    ops += small_calls(_layer_calls(sizes, tensor))
    saved = _saved(sizes, tensor, up, ffn, width)
    parameters = _layer_parameters(sizes, tensor)
    if sizes.adapter:
        saved = _with_frozen(saved, element_bytes(dtype) * parameters)
        parameters = sizes.adapter * (h + width)
        if sizes.framework.adapters == "attention":
            parameters += sizes.adapter * (sizes.heads * d // tensor + h // tensor)
    message = per_sequence(2 * s * h)
    none = saved["none"]
    kept_bytes = sum(a.per_sequence for a in (none.sharded, none.replicated, none.gathered))
    peak = kept_bytes + 2 * s * (up + ffn) + 4 * s * h + _score_temporaries(sizes, tensor)
    return BlockVariant(
        ops=tuple(ops),
        parameters=parameters,
        expert_parameters=_expert_parameters(sizes, tensor),
        saved=saved,
        peak_bytes=(per_sequence(peak),),
        collectives=_layer_exchanges(sizes, message) if tensor > 1 else (),
        # Each tensor rank sends the tokens of its part of the sequence.
        expert_dispatch_bytes=per_sequence(2 * s * h * sizes.chosen // tensor),
    )


def _layer_calls(sizes: ModelSizes, tensor: int) -> int:
    framework = sizes.framework
    return framework.calls + (2 * framework.exchange_calls if tensor > 1 else 0)


def _keeping(layer: BlockVariant) -> BlockVariant:
    """The layer without anything to recompute."""
    return layer.model_copy(
        update={
            "ops": tuple(op.model_copy(update={"reruns": ()}) for op in layer.ops),
            "saved": dict.fromkeys(layer.saved, layer.saved["none"]),
        }
    )


def _exchanges(
    message: Amount,
    forward: int,
    backward: int,
    kind: Literal["reduction", "gather"] = "reduction",
) -> tuple[Collective, ...]:
    one = Collective(phase="forward", message_bytes=message, kind=kind)
    return (one,) * forward + (one.model_copy(update={"phase": "backward"}),) * backward


def _layer_exchanges(sizes: ModelSizes, message: Amount) -> tuple[Collective, ...]:
    """Of the tensor ranks. An adapter in front of a projection gathers its input once more, one
    behind it its output."""
    adapters = 0 if not sizes.adapter else 2 if sizes.framework.adapters == "attention" else 1
    return _exchanges(message, 2, 2) + _exchanges(message, adapters, adapters, "gather")


def _saved(sizes: ModelSizes, tensor: int, up: int, ffn: int, width: int) -> dict[Recompute, Saved]:
    """Bytes kept (Korthikanti et al. 2022, section 4.1; the products' inputs are kept once)."""
    s, h = sizes.sequence_length, sizes.hidden
    kept_size = element_bytes(sizes.product_dtype)  # a product keeps its input as it computes
    x, out = 2 * s * h, round(kept_size * s * sizes.heads * sizes.head_dim) // tensor
    qkv, mlp = 2 * s * width, 2 * s * up + round(kept_size * s * ffn)
    if sizes.eager and sizes.gated:  # the activation beside the product, rotated queries and keys
        mlp += 2 * s * ffn
        qkv += 2 * s * width * 2 // 3
    if sizes.experts:  # of each chosen one, beside the moved tokens and what comes back
        mlp = 2 * s * sizes.chosen * (up + ffn + 2 * h)
    core = 4 * s * sizes.heads // tensor  # log-sum-exp
    if not sizes.flash:
        core = (5 if sizes.dropout else 2) * s * s * sizes.heads // tensor
    replicated = (2 + round(kept_size)) * x + (x if sizes.dropout else 0)
    if not sizes.fused_norm:
        replicated += 8 * x  # of each norm: its input and output in fp32
    sharded = qkv + out + mlp
    # Megatron-LM gathers the inputs of column-parallel products again in the backward; others
    # keep them gathered.
    keeps = sizes.eager and not sizes.framework.gathers_again
    gathered = per_sequence(2 * x if keeps else 0)
    replicated -= gathered.per_sequence
    if sizes.framework.keeps_scattered and tensor > 1:
        replicated += 2 * x
    none = Saved(
        sharded=per_sequence(sharded + core),
        replicated=per_sequence(replicated),
        gathered=gathered,
    )
    if sizes.selective == "half":  # every second product of seven: queries, values, w1 and w2
        kept = out + (qkv - out) // 2 + out + core + 2 * s * ffn
        selective = Saved(sharded=per_sequence(kept), replicated=per_sequence(2 * x))
    elif sizes.selective == "pointwise":
        kept = qkv + out + core + 2 * s * up
        selective = Saved(sharded=per_sequence(kept), replicated=per_sequence(2 * x))
    else:
        selective = none.model_copy(update={"sharded": per_sequence(sharded)})
    if sizes.adapter:
        # Frozen products need no inputs. The adapters' own (2 + 1 bytes where they are dropped)
        # are left out: with them MLPerf's runs would not fit without a recomputation that their
        # times deny (their mean error would be 0.6 % larger).
        none = Saved(
            sharded=per_sequence(qkv + out + core + element_bytes(sizes.product_dtype) * s * up),
            replicated=per_sequence(3 * x),
        )
    full = Saved(replicated=per_sequence(x))
    return {"none": none, "selective": selective, "full": full}


def _with_frozen(saved: dict[Recompute, Saved], size: float) -> dict[Recompute, Saved]:
    """Frozen weights stay on the device, with neither gradients nor optimizer state."""
    return {
        mode: kept.model_copy(update={"sharded": Amount(round(size), kept.sharded.per_sequence)})
        for mode, kept in saved.items()
    }


def _embedding(sizes: ModelSizes, tensor: int) -> BlockVariant:
    x = 2 * sizes.sequence_length * sizes.hidden
    saved = Saved(replicated=per_sequence(8 * sizes.sequence_length))
    return BlockVariant(
        ops=(
            memory_op("embedding", "forward", x, x),
            memory_op("embedding_backward", "backward", 2 * x, x),
        ),
        parameters=0 if sizes.adapter else sizes.vocab * sizes.hidden // tensor,
        saved=dict.fromkeys(("none", "selective", "full"), saved),
        peak_bytes=(per_sequence(x),),
        collectives=_exchanges(per_sequence(x), 1, 0) if tensor > 1 else (),
    )


def _score_temporaries(sizes: ModelSizes, tensor: int) -> int:
    """Score matrices that live only while a layer without flash attention works.

    Gradients of the weights and of the softmax, and of the mask where that is a kernel of its own.
    """
    if sizes.flash:
        return 0
    copies = 2 if sizes.fused_softmax else 3
    return copies * 2 * sizes.sequence_length**2 * sizes.heads // tensor


def _head(sizes: ModelSizes, tensor: int) -> BlockVariant:
    """Norm, logits and loss in fp32 (cast, largest, exponential and sum, gradient in place)."""
    s, h, columns = sizes.sequence_length, sizes.hidden, sizes.vocab // tensor
    x, whole = 2 * s * h, sizes.framework.whole_logits
    logits = product(sizes, columns, h, sizes.dtype)
    again = [logits[0].model_copy(update={"phase": "backward", "reruns": ()})]
    ops = [
        *norm_ops(sizes, ALL),
        *logits,
        *(again if sizes.head_twice else ()),
        *loss_ops(sizes, sizes.vocab if whole else columns),
    ]
    saved, peak = loss_bytes(sizes, tensor)
    exchanges = _exchanges(per_sequence(x), 0, 1)
    if whole:
        logits_bytes = per_sequence(2 * s * sizes.vocab)
        exchanges += _exchanges(logits_bytes, 1, int(sizes.head_twice), "gather")
    kept = Saved(sharded=per_sequence(saved), replicated=per_sequence(2 * x))
    return BlockVariant(
        ops=tuple(ops),
        parameters=0 if sizes.tied or sizes.adapter else sizes.vocab * h // tensor,
        saved=dict.fromkeys(("none", "selective", "full"), kept),
        peak_bytes=(per_sequence(peak + 3 * x),),
        collectives=exchanges if tensor > 1 else (),
    )
