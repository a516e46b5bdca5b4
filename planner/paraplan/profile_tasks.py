"""What `plan profile` measures, as plain data: each task is one figure.

The grids are chosen for interpolation in log space: rates of matrix products change slowly
between sizes a factor of four apart (`op_table`), and neither grid holds a size that the layers of
the profiler's own test use.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from paraplan.link_table import LinkKind, Shape
from paraplan.op_table import Dtype


@dataclass(frozen=True, slots=True)
class GemmTask:
    """Products of (m, k) by (k, n) as a forward and both gradients lay their operands out."""

    dtype: Dtype
    m: int
    n: int
    k: int
    batch: int = 1


@dataclass(frozen=True, slots=True)
class AttentionTask:
    """Fused attention; ``implementation`` is what computes it, ``default`` what torch picks."""

    dtype: Dtype
    dims: tuple[int, int, int, int, int, int, int]
    causal: bool
    phase: Literal["forward", "backward"]
    implementation: Literal["default", "flash", "math"] = "default"


@dataclass(frozen=True, slots=True)
class LinkTask:
    """A collective of groups of ``ranks``, all groups at once, or a transfer between neighbours.

    Neighbours are the two of a group, or where those of a node are an odd number, all in a ring.

    Attributes:
        per_node: ranks of a group that each node has; None where one node has all.
    """

    kind: LinkKind
    ranks: int
    message_bytes: int
    per_node: int | None = None


@dataclass(frozen=True, slots=True)
class LayerTask:
    """Forward and backward of one layer of a small model, as training runs it.

    Attributes:
        config: the model's config as JSON.
        fitted: the scale is fitted to it; otherwise it tests the profile.
        alone: measured while only as many ranks compute as there are cores, the others waiting.
    """

    config: str
    dtype: Dtype
    sequence_length: int
    sequences: int
    fitted: bool
    alone: bool = False


@dataclass(frozen=True, slots=True)
class RateTask:
    """One figure of the device: bytes per second, or seconds of one call."""

    what: Literal["optimizer", "launch", "floor", "host_to_device", "device_to_host"]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class HostTask:
    """What training does on a CPU beside its kernels (`measure_host`).

    Attributes:
        what: the optimizer's update of one parameter, whole or sharded; what checkpointing adds to
            each op of the forward, beside running it again; the way of one sharded parameter to the
            tensor that a rank computes with, and back; FSDP2's hooks around one group of
            parameters in one micro-batch, and what they take besides where its gradients are
            reduced.
    """

    what: Literal[
        "update",
        "full_recompute",
        "selective_recompute",
        "sharded_update",
        "local",
        "hooks",
        "reduce",
    ]


Task = GemmTask | AttentionTask | LinkTask | LayerTask | RateTask | HostTask


@dataclass(frozen=True, slots=True)
class Scope:
    """How much is measured.

    Attributes:
        kind: of the devices.
        ranks: that compute at once, on all nodes.
        dtype: the one that training computes in.
        other_dtypes: those that products are measured in as well, on fewer sizes.
    """

    kind: Literal["cuda", "cpu"]
    ranks: int
    quick: bool
    dtype: Dtype
    nodes: int = 1
    other_dtypes: tuple[Dtype, ...] = ()


CPU_AXIS, CPU_QUICK = (32, 128, 512, 2048), (64, 256, 1024)
GPU_AXIS, GPU_QUICK = (64, 256, 1024, 2048, 4096, 8192, 16384), (128, 1024, 4096, 16384)


def make_tasks(scope: Scope) -> list[Task]:
    """Everything to measure but the recorded calls.

    One of many comes first: what still starts beside it may lengthen it, and a quick profile of
    ranks that share cores has no second round.
    """
    axis = _axis(scope)
    tasks: list[Task] = [GemmTask(scope.dtype, m, n, k) for m, n, k in product(axis, repeat=3)]
    few: tuple[int, ...] = GPU_QUICK if scope.kind == "cuda" else CPU_QUICK
    few = few[-2:-1] if scope.quick else few
    for other in scope.other_dtypes:
        tasks += [GemmTask(other, m, n, k) for m, n, k in product(few, repeat=3)]
    tasks += _attention_tasks(scope)
    tasks += [RateTask("floor", 4096), RateTask("optimizer", _optimizer_bytes(scope))]
    if scope.kind == "cuda":
        tasks += [RateTask("launch", 4096)]
        tasks += [RateTask("host_to_device", 2**28), RateTask("device_to_host", 2**28)]
    else:
        tasks.append(HostTask("update"))
        tasks += [HostTask("full_recompute"), HostTask("selective_recompute")]
        if scope.ranks > 1:
            tasks += [HostTask("sharded_update"), HostTask("local")]
            tasks += [HostTask("hooks"), HostTask("reduce")]
    tasks += _link_tasks(scope)
    tasks += _layer_tasks(scope)
    return tasks


def _axis(scope: Scope) -> tuple[int, ...]:
    if scope.kind == "cuda":
        return GPU_QUICK if scope.quick else GPU_AXIS
    return CPU_QUICK if scope.quick else CPU_AXIS


def _optimizer_bytes(scope: Scope) -> int:
    return 28 * (10**8 if scope.kind == "cuda" else 4 * 10**6)


def _attention_tasks(scope: Scope) -> list[Task]:
    lengths: tuple[int, ...] = (64, 256, 1024)
    sizes: tuple[int, ...] = (32, 64, 128)
    heads = 4
    if scope.kind == "cuda":
        heads, lengths, sizes = 16, (512, 2048, 8192), (64, 128, 256)
    causals: tuple[bool, ...] = (True, False)
    kinds: tuple[Literal["default", "flash", "math"], ...] = ("default", "flash", "math")
    if scope.quick:
        lengths, sizes, causals, kinds = lengths[:2], sizes[:2], (True,), kinds[:1]
    tasks: list[Task] = []
    for size, length, causal, kind in product(sizes, lengths, causals, kinds):
        if kind != "default" and (length != lengths[-1] or causal):
            continue  # the other kinds need one rate each
        batch = max(1, 2048 // length) if scope.kind == "cuda" else 1
        dims = (batch, heads, heads, length, length, size, size)
        tasks.append(AttentionTask(scope.dtype, dims, causal, "forward", kind))
        tasks.append(AttentionTask(scope.dtype, dims, causal, "backward", kind))
    return tasks


def link_groups(ranks: int, nodes: int) -> list[Shape]:
    """(ranks, per node) of the groups that layouts use: inside a node, then between nodes."""
    per_node = ranks // nodes
    inside: list[Shape] = [(n, None) for n in _divisors(per_node) if n > 1]
    between = product((n for n in _divisors(nodes) if n > 1), _divisors(per_node))
    return inside + [(n * each, each) for n, each in between]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _link_tasks(scope: Scope) -> list[Task]:
    sizes = [2**10, 2**14, 2**18, 2**20, 2**22, 2**24, 2**26]
    if scope.kind == "cuda":
        sizes += [2**28, 2**30]
    if scope.quick:
        # On a CPU shorter ones take as long as the shortest.
        sizes = [2**18, 2**21, 2**24] if scope.kind == "cpu" else [2**12, 2**18, 2**22, 2**25]
    kinds: list[LinkKind] = ["all_reduce", "all_gather", "reduce_scatter"]
    if not scope.quick:
        kinds.append("all_to_all")
    groups = link_groups(scope.ranks, scope.nodes)
    tasks: list[Task] = [LinkTask(k, n, s, g) for k, (n, g), s in product(kinds, groups, sizes)]
    pairs = [g for n, g in groups if n == 2 and g in (None, 1)]  # of neighbours, all at once
    if scope.kind == "cpu" and scope.ranks // scope.nodes % 2 and scope.ranks > scope.nodes:
        pairs.append(None)
    return tasks + [LinkTask("transfer", 2, s, g) for g, s in product(pairs, sizes)]


def llama_config(
    hidden: int, heads: int, kv_heads: int | None = None, vocabulary: int = 512
) -> str:
    """A Llama of one layer as JSON."""
    return _json(
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        hidden_size=hidden,
        intermediate_size=(8 * hidden // 3 + 63) // 64 * 64,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        vocab_size=vocabulary,
        max_position_embeddings=16384,
        tie_word_embeddings=False,
    )


def gpt2_config(hidden: int, heads: int, vocabulary: int = 512) -> str:
    """A GPT-2 of one layer, without dropout, as JSON."""
    return _json(
        model_type="gpt2",
        architectures=["GPT2LMHeadModel"],
        n_embd=hidden,
        n_head=heads,
        n_layer=1,
        n_positions=16384,
        vocab_size=vocabulary,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )


def _json(**settings: Any) -> str:
    return json.dumps(settings, sort_keys=True)


def _layer_tasks(scope: Scope) -> list[Task]:
    """(config, length, sequences): first those that the scale is fitted to, then the test's."""
    if scope.kind == "cuda":
        fit = [(llama_config(2048, 16), 2048, 4), (gpt2_config(1600, 25), 1024, 8)]
        test = [
            (llama_config(4096, 32, 8), 4096, 1),
            (llama_config(3072, 24), 2048, 2),
            (llama_config(5120, 40), 2048, 1),
            (gpt2_config(1280, 20), 1024, 4),
        ]
    else:
        fit = [(llama_config(384, 6), 128, 4), (gpt2_config(320, 5), 96, 4)]
        fit += [(llama_config(64, 2), 16, 1), (gpt2_config(64, 2), 16, 1)]  # the launches
        if not scope.quick:
            fit += [(llama_config(512, 8, 2), 224, 2), (gpt2_config(448, 7), 192, 2)]
        test = [
            (llama_config(448, 7), 192, 2),
            (llama_config(640, 10, 5), 128, 2),
            (gpt2_config(192, 6), 64, 8),
            (gpt2_config(576, 9), 160, 2),
            (llama_config(256, 8), 320, 2),
        ]
    chosen = [(*one, True) for one in fit] + [(*one, False) for one in test]
    if scope.quick:
        chosen = chosen[: len(fit) + 2]
    return [LayerTask(config, scope.dtype, s, b, fitted) for config, s, b, fitted in chosen]


def example_models(scope: Scope) -> list[tuple[str, int, int]]:
    """(config, length, sequences) of models whose memory-bound calls are measured."""
    if scope.kind == "cuda":
        sizes = [(1024, 8, 512, 2), (2048, 16, 2048, 2), (4096, 32, 4096, 2)]
        vocabulary = 32000
    else:
        sizes = [(128, 4, 32, 2), (256, 4, 128, 2), (512, 8, 256, 4)]
        vocabulary = 4096
    if scope.quick:
        sizes = [sizes[0], sizes[2]]
    return [
        (make(hidden, heads, vocabulary=vocabulary), length, sequences)
        for hidden, heads, length, sequences in sizes
        for make in (llama_config, gpt2_config)
    ]
