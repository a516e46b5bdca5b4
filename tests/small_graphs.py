"""Small model graphs made from sizes, for tests that need no tracing."""

from __future__ import annotations

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


def _gemm(phase: str, tokens: int, n: int, k: int, reruns: tuple[Recompute, ...]) -> Op:
    return Op(
        name="aten.mm",
        kind="gemm",
        phase=phase,  # type: ignore[arg-type]
        dtype="bfloat16",
        dims=(Amount(1), Amount(0, tokens), Amount(n), Amount(k)),
        read_bytes=Amount(2 * n * k, 2 * tokens * k),
        write_bytes=Amount(0, 2 * tokens * n),
        reruns=reruns if phase == "forward" else (),
    )


def _memory(phase: str, size: int, reruns: tuple[Recompute, ...]) -> Op:
    return Op(
        name="aten.mul",
        kind="memory",
        phase=phase,  # type: ignore[arg-type]
        dtype="bfloat16",
        read_bytes=Amount(0, size),
        write_bytes=Amount(0, size),
        replicated=True,
        reruns=reruns if phase == "forward" else (),
    )


def layer(tokens: int, hidden: int, ffn: int, *, tensor_degrees: tuple[int, ...]) -> Block:
    """A two-matrix layer with a norm: keeps 10 hidden-sized and 2 ffn-sized tensors."""
    variants = {}
    for t in tensor_degrees:
        up = (tokens, ffn // t, hidden)
        down = (tokens, hidden, ffn // t)
        ops = [
            _memory("forward", 4 * tokens * hidden, ("selective", "full")),
            _gemm("forward", *up, ("full",)),
            _gemm("forward", *down, ()),
            _memory("backward", 8 * tokens * hidden, ()),
            *(_gemm("backward", *shape, ()) for shape in (up, up, down, down)),
        ]
        whole, part = 2 * tokens * hidden, 2 * tokens * ffn // t
        message = Collective(phase="forward", message_bytes=Amount(0, whole))
        variants[t] = BlockVariant(
            ops=tuple(ops),
            parameters=2 * hidden * ffn // t + 2 * hidden,
            saved={
                "none": Saved(
                    sharded=Amount(0, 2 * part),
                    replicated=Amount(0, 9 * whole),
                    gathered=Amount(0, whole),
                ),
                "selective": Saved(sharded=Amount(0, part), replicated=Amount(0, 2 * whole)),
                "full": Saved(replicated=Amount(0, whole)),
            },
            peak_bytes=(Amount(0, 13 * whole + 4 * part),),
            collectives=(message, message.model_copy(update={"phase": "backward"}))
            if t > 1
            else (),
        )
    return Block(role="layer", variants=variants)


def _end(
    role: str, tokens: int, hidden: int, vocab: int, *, tensor_degrees: tuple[int, ...]
) -> Block:
    variants = {}
    for t in tensor_degrees:
        head = role == "head"
        shape = (tokens, vocab // t, hidden)
        ops = (
            [_gemm("forward", *shape, ()), *(_gemm("backward", *shape, ()) for _ in range(2))]
            if head
            else [_memory("forward", 2 * tokens * hidden, ())]
        )
        logits = 8 * tokens * vocab // t if head else 0
        variants[t] = BlockVariant(
            ops=tuple(ops),
            parameters=vocab * hidden // t,
            saved={
                mode: Saved(sharded=Amount(0, logits), replicated=Amount(0, 8 * tokens))
                for mode in ("none", "selective", "full")
            },
            peak_bytes=(Amount(0, 2 * logits + 16 * tokens),),
        )
    return Block(role=role, variants=variants)  # type: ignore[arg-type]


def small_graph(
    *,
    layers: tuple[int, ...] = (4,),
    tokens: int = 1024,
    hidden: int = 1024,
    ffn: tuple[int, ...] = (4096,),
    vocab: int = 8192,
    tied: bool = False,
    tensor_degrees: tuple[int, ...] = (1, 2),
) -> ModelGraph:
    """A chain of embedding, runs of layers (one kind each) and head."""
    blocks = {
        "embedding": _end("embedding", tokens, hidden, vocab, tensor_degrees=tensor_degrees),
        "head": _end("head", tokens, hidden, vocab, tensor_degrees=tensor_degrees),
    }
    chain = [ChainItem(block="embedding", modules=("embed",))]
    for kind, (count, width) in enumerate(zip(layers, ffn, strict=True)):
        blocks[f"layer{kind}"] = layer(tokens, hidden, width, tensor_degrees=tensor_degrees)
        for _ in range(count):
            path = f"layers.{len(chain) - 1}"
            chain.append(ChainItem(block=f"layer{kind}", modules=(path,)))
    chain.append(ChainItem(block="head", modules=("head",)))
    values = [
        Value(producer=i, last_consumer=i + 1, size_bytes=Amount(0, 2 * tokens * hidden))
        for i in range(len(chain) - 1)
    ]
    flops = sum(op_flops(op, 1) for c in chain for op in blocks[c.block].variants[1].ops)
    tied_parameters = vocab * hidden if tied else 0
    count = sum(blocks[c.block].variants[1].parameters for c in chain) - tied_parameters
    return ModelGraph(
        name="small",
        architecture="Small",
        config_sha256="0" * 64,
        sequence_length=tokens,
        compute_dtype="bfloat16",
        torch_version="0",
        transformers_version="0",
        parameter_count=count,
        trainable_parameter_count=count,
        tied_parameters=tied_parameters,
        hidden_size=hidden,
        vocab_size=vocab,
        blocks=blocks,
        chain=tuple(chain),
        values=tuple(values),
        tensor_limits={t: f"tensor {t} was not made" for t in (4, 8)},
        model_flops_per_sequence=flops,
    )
