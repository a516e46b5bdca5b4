"""The model graph: what one training step computes, keeps and sends, as plain data.

`trace` writes it, the cost model reads it, and a cached copy of it is all that a second
`plan` needs. Nothing here imports torch.

Sizes depend on how many sequences a micro-batch has on the device that runs the block. They
are kept as an `Amount`, ``fixed + per_sequence * sequences``: a trace at two micro-batch sizes
gives both numbers, and every other micro-batch size, and a context-parallel share of a
sequence (``sequences = micro_batch_size / context``), follows without tracing again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

FORMAT = 6
"""Raised whenever the meaning of a field changes, so that older cached graphs are rebuilt."""

Recompute = Literal["none", "selective", "full"]
RECOMPUTE_MODES: tuple[Recompute, ...] = ("none", "selective", "full")


class Amount(NamedTuple):
    """A size that grows with the micro-batch: ``fixed + per_sequence * sequences``."""

    fixed: int = 0
    per_sequence: int = 0

    def at(self, sequences: float) -> float:
        """The size for ``sequences`` sequences on this device (may be a fraction)."""
        return self.fixed + self.per_sequence * sequences


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Op(_Frozen):
    """``count`` identical aten calls of one block.

    ``dims`` by ``kind``:
      gemm          (batch, m, n, k): batch products of (m, k) by (k, n)
      grouped_gemm  (groups, m, n, k): m rows in all, split evenly over the groups' (k, n) weights
      attention     (batch, heads, kv_heads, query_length, key_length, head_dim, value_dim)
      memory        (): bound by the bytes it moves

    Attributes:
        name: the aten overload packet, such as ``aten.mm``.
        phase: in which pass it runs.
        dtype: torch's name of the dtype that is computed in, such as ``bfloat16``.
        read_bytes, write_bytes: device memory touched by *one* call, every operand once.
        causal: attention only: query i sees keys up to i (aligned at the end).
        window: attention only: sliding window in tokens, if any.
        replicated: under tensor parallelism every tensor rank runs it whole; sequence
            parallelism divides it by the tensor degree.
        expert: works on expert weights (expert parallelism spreads its groups).
        reruns: the recompute modes under which it runs a second time in the backward pass.
    """

    name: str
    kind: Literal["gemm", "grouped_gemm", "attention", "memory"]
    phase: Literal["forward", "backward"]
    dtype: str
    count: int = 1
    dims: tuple[Amount, ...] = ()
    read_bytes: Amount = Amount()
    write_bytes: Amount = Amount()
    causal: bool = False
    window: int | None = None
    replicated: bool = False
    expert: bool = False
    reruns: tuple[Recompute, ...] = ()


class Saved(_Frozen):
    """Bytes that a block's forward keeps for its backward, per micro-batch and device.

    Attributes:
        sharded: already divided by the tensor degree.
        replicated: whole on every tensor rank; sequence parallelism divides it.
        gathered: whole on every tensor rank even under sequence parallelism (the gathered
            inputs of column-parallel matrix products, row-parallel ones not yet added up).
    """

    sharded: Amount = Amount()
    replicated: Amount = Amount()
    gathered: Amount = Amount()


class Collective(_Frozen):
    """A tensor-parallel exchange of one block's activations (whole message, all ranks).

    A reduction is, without sequence parallelism, one all-reduce of ``message_bytes``; with it, a
    reduce-scatter and an all-gather of the same message. A gather makes the message of its parts,
    which nothing is added to.
    """

    phase: Literal["forward", "backward"]
    message_bytes: Amount
    kind: Literal["reduction", "gather"] = "reduction"


class BlockVariant(_Frozen):
    """One block at one tensor-parallel degree; counts are those of one tensor rank.

    Attributes:
        ops: forward and backward calls, recompute not included.
        parameters: elements on this rank (a tied weight counts in the block that owns it).
        expert_parameters: those of ``parameters`` that expert parallelism divides.
        frozen_parameters: those without gradients.
        trained_tensors: tensors that those with gradients are in; 0: not known.
        saved: what the forward keeps, by recompute mode.
        peak_bytes: most bytes alive at once during this block's forward and backward without
            recompute: saved activations, temporaries and the gradients of parameters made so far
            (in the compute dtype), but not the parameters. Which moment is the peak depends on
            the micro-batch: the largest of these.
        collectives: tensor-parallel exchanges (empty at degree 1).
        expert_dispatch_bytes: bytes each device sends in one all-to-all of routed tokens
            (dispatch and combine, forward and backward: four such exchanges).
    """

    ops: tuple[Op, ...]
    parameters: int
    expert_parameters: int = 0
    frozen_parameters: int = 0
    trained_tensors: int = 0
    saved: dict[Recompute, Saved]
    peak_bytes: tuple[Amount, ...]
    collectives: tuple[Collective, ...] = ()
    expert_dispatch_bytes: Amount = Amount()


class Block(_Frozen):
    """What is computed by each chain item of one kind.

    Attributes:
        role: ``layer`` blocks repeat and may recompute; the others stand once each.
        variants: by tensor-parallel degree; degree 1 is always there. A degree that is missing
            cannot be run: ``ModelGraph.tensor_limits`` says why.
    """

    role: Literal["embedding", "layer", "bridge", "head"]
    variants: dict[int, BlockVariant]


class ChainItem(_Frozen):
    """One place in the chain that stages cut.

    Attributes:
        block: key into ``ModelGraph.blocks``.
        modules: paths of the modules it owns, such as ``model.layers.3``.
    """

    block: str
    modules: tuple[str, ...]


class Value(_Frozen):
    """A tensor that one chain item makes and later ones read (residual or cross attention).

    Attributes:
        producer, last_consumer: positions in the chain; it crosses every cut between them.
        size_bytes: in the compute dtype, for the micro-batch.
    """

    producer: int
    last_consumer: int
    size_bytes: Amount


class ModelGraph(_Frozen):
    """A traced model: the chain of its blocks, each kind traced once.

    Attributes:
        compute_dtype: ``bfloat16`` or ``float32``; the trace's activations are in it.
        parameter_count: exactly ``sum(p.numel())``, tied weights once.
        trainable_parameter_count: those with ``requires_grad``.
        tied_parameters: elements of the weight that first and last chain item share (0 if none).
            The first item owns it; on separate stages each holds a copy.
        heads, kv_heads, experts: 0 where the model has none.
        tensor_limits: tensor degree -> why it cannot be run, for degrees without a variant.
        pipeline_limit: why this model cannot be cut into stages, or None.
        model_flops_per_sequence: forward + backward FLOPs of one sequence, no recompute.
    """

    format: int = FORMAT
    name: str
    architecture: str
    config_sha256: str
    sequence_length: int
    compute_dtype: str
    torch_version: str
    transformers_version: str
    parameter_count: int
    trainable_parameter_count: int
    tied_parameters: int = 0
    hidden_size: int
    vocab_size: int = 0
    heads: int = 0
    kv_heads: int = 0
    experts: int = 0
    blocks: dict[str, Block]
    chain: tuple[ChainItem, ...]
    values: tuple[Value, ...]
    tensor_limits: dict[int, str] = {}
    pipeline_limit: str | None = None
    model_flops_per_sequence: float


def cut_amounts(graph: ModelGraph) -> tuple[Amount, ...]:
    """Bytes that cross the cut in front of each chain position, one direction.

    The first entry (before the chain) and the last (behind it) are zero.
    """
    amounts = [Amount()] * (len(graph.chain) + 1)
    for value in graph.values:
        for position in range(value.producer + 1, value.last_consumer + 1):
            here = amounts[position]
            amounts[position] = Amount(
                here.fixed + value.size_bytes.fixed,
                here.per_sequence + value.size_bytes.per_sequence,
            )
    return tuple(amounts)


def op_flops(op: Op, sequences: float) -> float:
    """Floating-point operations of one call of ``op`` (a multiply-add is two).

    Attention: `attention_flops`.
    """
    dims = [dim.at(sequences) for dim in op.dims]
    if op.kind == "gemm":
        batch, m, n, k = dims
        return 2.0 * batch * m * n * k
    if op.kind == "grouped_gemm":
        _, m, n, k = dims
        return 2.0 * m * n * k
    if op.kind == "attention":
        return attention_flops(dims, causal=op.causal, window=op.window, phase=op.phase)
    return 0.0


def attention_flops(
    dims: Sequence[float],
    *,
    causal: bool,
    window: int | None,
    phase: Literal["forward", "backward"],
) -> float:
    """Floating-point operations of fused attention; ``dims`` as in `Op`.

    Only the query-key pairs count that the mask lets through; a backward call does two and a half
    times the forward's products (five matrix products instead of two: Dao et al. 2022,
    FlashAttention, section 3, the score matrix being recomputed).
    """
    batch, heads, _, query_length, key_length, head_dim, value_dim = dims
    pairs = attention_pairs(query_length, key_length, causal=causal, window=window)
    forward = 2.0 * batch * heads * pairs * (head_dim + value_dim)
    return forward if phase == "forward" else 2.5 * forward


def attention_pairs(
    query_length: float, key_length: float, *, causal: bool, window: int | None
) -> float:
    """Query-key pairs that one head computes.

    Causal: query i (counted from the end) sees ``key_length - query_length + i + 1`` keys; a
    sliding window caps that at ``window``.
    """
    if not causal:
        return query_length * key_length
    reach = min(key_length, window or key_length)
    first = key_length - query_length + 1  # keys that the first query sees
    if first >= reach:
        return query_length * reach
    ramp = reach - first  # queries that see fewer than `reach` keys
    return ramp * (first + reach - 1) / 2 + (query_length - ramp) * reach
