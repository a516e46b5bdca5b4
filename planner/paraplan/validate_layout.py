"""The layout of a measured run, its stages, how it exchanged, and what its memory counts."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, combinations
from math import log2

from paraplan.chain import ChainCost
from paraplan.cluster import Cluster
from paraplan.device import Device
from paraplan.engine import Engine
from paraplan.layout import Layout, Schedule
from paraplan.partition import Cuts, Staged
from paraplan.validate_frameworks import Framework
from paraplan.validate_graph import parameter_count
from paraplan.validate_model import tensor_reason
from paraplan.validate_ops import ModelSizes
from paraplan.validate_rows import Row, Unusable

GIB = 2**30
DDP_BUCKET = 100 * 2**20  # of gradients that DistributedDataParallel sends at once
ZERO_BUCKET = 2**29  # of what ZeRO-1 sends at once; nanotron's runs say so
PART_CALLS = 2
"""Of the host, for each rank's part of a weight: a view (DeepSpeed's `_allgather_param`), and a
copy in torch's all-gather of lists."""
ANALYTIC = ("parameters", "gradients", "optimizer", "activations", "gathered_parameters")
"""Parts of the memory that a published closed form counts."""


def layout_of(row: Row, sizes: ModelSizes) -> Layout:
    """The layout that the row ran.

    Raises:
        Unusable: its degrees contradict each other, or it is not modelled.
    """
    tensor, pipeline, context = row.count("tp"), row.count("pp"), row.count("cp", 1)
    devices, size = row.count("n_gpus"), row.count("micro_batch")
    data = devices // (tensor * pipeline * context)
    if data * tensor * pipeline * context != devices:
        raise Unusable("tp * pp * cp does not divide n_gpus")
    batch = row.count("global_batch")
    if batch % (data * size):
        raise Unusable("global batch does not divide over dp * micro_batch")
    if tensor_reason(sizes, tensor):
        raise Unusable("heads or ffn do not divide over tp")
    if pipeline > sizes.layers and sizes.framework.cuts == "layers":
        raise Unusable("more stages than layers")
    virtual = row.count("vp", 1) if pipeline > 1 else 1
    if virtual > 1 and sizes.framework.cuts != "layers":
        raise Unusable(f"virtual stages of {sizes.framework.name}")
    schedule: Schedule = "none" if pipeline == 1 else "1f1b"
    if virtual > 1:
        schedule = "interleaved-1f1b"
        if sizes.layers % (pipeline * virtual):
            virtual, schedule = _equal_chunks(sizes, pipeline, virtual)
    expert = _expert_degree(row, tensor, data * context) if sizes.experts else 1
    shard, zero_stage = _sharding(row, data)
    return Layout(
        data_replicate=data // shard,
        data_shard=shard,
        tensor=tensor,
        context=context,
        expert=expert,
        pipeline=pipeline,
        virtual_stages=virtual,
        micro_batch_size=size,
        micro_batches=batch // (data * size),
        schedule=schedule,
        sequence_parallel=tensor > 1 and row.text("sequence_parallel") in ("1", "1.0"),
        zero_stage=zero_stage,
    )


def _equal_chunks(sizes: ModelSizes, pipeline: int, virtual: int) -> tuple[int, Schedule]:
    """Interleaving where embedding and head count as layers (Llama 3), else none modelled."""
    if (sizes.layers + 2) % (pipeline * virtual) == 0:
        return virtual, "interleaved-1f1b"
    raise Unusable("layers do not divide over pp * vp")


def _expert_degree(row: Row, tensor: int, ranks: int) -> int:
    """Ranks over which the experts spread, beside the tensor ranks that divide each of them.

    Megatron's spread over tensor ranks too and stay whole: as many weights and products a device.
    """
    expert = row.count("ep", 1)
    if ranks % expert and expert % tensor == 0:
        expert //= tensor
    if ranks % expert:
        raise Unusable("ep does not divide dp * cp")
    return expert


def _sharding(row: Row, data: int) -> tuple[int, int]:
    """Ranks that shard, and the ZeRO stage."""
    text = row.text("zero_or_fsdp")
    if data == 1 or text in ("", "none"):
        return 1, 0
    named = re.search(r"shard[ =](\d+)", text)
    shard = min(data, int(named[1])) if named else data
    if data % shard or shard == 1:
        return 1, 0
    if text == "lora":
        return 1, 0
    if text.startswith("zero1"):
        return shard, 1
    if "shard_grad_op" in text or text.startswith("zero2"):
        return shard, 2
    if "zero3" in text or text.startswith(("fsdp", "hsdp", "maxtext fsdp")):
        return shard, 3
    raise Unusable(f"sharding {text}")


def equal_cuts(layers: int, chunks: int) -> Cuts:
    """Equal runs of layers, embedding and head joining the end ones (Megatron-LM).

    Where layers do not divide, embedding and head count as layers if that does (Llama 3), and
    otherwise the runs differ by one layer at most.
    """
    if layers % chunks and (layers + 2) % chunks == 0:
        return tuple(range(0, layers + 3, (layers + 2) // chunks))
    inner = (1 + round(layers * chunk / chunks) for chunk in range(1, chunks))
    return (0, *inner, layers + 2)


def cost_cuts(sizes: ModelSizes, stages: int) -> Cuts:
    """Stages of about equal matrix products, as nanotron's `build_model` cuts them.

    A stage ends with the block that brings the running sum of parameters to its share. The head
    has a stage of its own where the last one would stay empty, for nanotron refuses a rank
    without parameters.
    """
    layer = 4 * sizes.hidden**2 + 3 * sizes.ffn * sizes.hidden
    blocks = [0, *(layer,) * sizes.layers, sizes.vocab * sizes.hidden]
    total, running, cuts = sum(blocks), 0, [0]
    for position, cost in enumerate(blocks[:-1]):
        running += cost
        if running >= total * len(cuts) / stages:
            cuts.append(position + 1)
    if len(cuts) < stages and cuts[-1] < len(blocks) - 1:
        cuts.append(len(blocks) - 1)
    return (*cuts, len(blocks))


def parameter_cuts(sizes: ModelSizes, stages: int) -> Cuts:
    """The least parameters in the largest stage, each stage filled from the front (Aleph Alpha)."""
    layer = (parameter_count(sizes) - 2 * sizes.vocab * sizes.hidden) // sizes.layers
    ends = sizes.vocab * sizes.hidden
    before = tuple(accumulate([ends, *(layer,) * sizes.layers, ends], initial=0))
    sums = sorted({b - a for a, b in combinations(before, 2)})
    room = sums[bisect_left(sums, True, key=lambda room: len(_filled(before, room)) <= stages + 1)]
    return _filled(before, room)


def _filled(before: Sequence[int], room: int) -> Cuts:
    """Cuts into as few stages as hold no more than ``room`` each; one block at the least.

    Args:
        before: sums of the blocks in front of each position, and of all.
    """
    cuts = [0]
    while cuts[-1] < len(before) - 1:
        end = bisect_right(before, before[cuts[-1]] + room) - 1
        cuts.append(max(end, cuts[-1] + 1))
    return tuple(cuts)


def cuts_of(sizes: ModelSizes, layout: Layout) -> Cuts:
    """Where the run's stages began."""
    counted = sizes.framework.cuts
    if counted == "cost" and layout.pipeline > 1:
        return cost_cuts(sizes, layout.pipeline)
    if counted == "parameters":
        return parameter_cuts(sizes, layout.pipeline)
    return equal_cuts(sizes.layers, layout.pipeline * layout.virtual_stages)


def engine_of(sizes: ModelSizes, layout: Layout, cluster: Cluster) -> Engine:
    """How the run exchanged."""
    engine = sizes.framework.engine
    if not sizes.framework.engine_by_layout:
        return engine
    waits = cluster.nodes > 1 and layout.pipeline > 1
    tokens = layout.micro_batch_size * sizes.sequence_length
    pending = sizes.framework.pending_bytes[layout.pipeline > 1] if layout.tensor > 1 else 0
    return replace(
        engine,
        buffer_bytes=float(pending * tokens * sizes.hidden),
        # DDP's buckets keep the bf16 gradients beside their fp32 sum; alone there are none.
        gradient_bytes=6 if layout.data_ranks > 1 else 4,
        standing_gradient_bytes=4,
        bucket_bytes=ZERO_BUCKET if layout.zero_stage else DDP_BUCKET,
        overlaps_data=layout.pipeline == 1 and layout.zero_stage == 0,
        exchange_wait_seconds=sizes.framework.wait_seconds if waits else 0.0,
    )


def transfers_of(row: Row) -> int:
    """Transfers on the longest way through a pipelined step, each direction on its own."""
    stages = row.count("pp")
    if stages == 1:
        return 0
    micro_batches = row.count("global_batch") // (row.count("dp") * row.count("micro_batch"))
    return min(2 * (stages - 1), 4) * micro_batches + 2 * (stages - 2)


def crowded_seconds(
    row: Row, framework: Framework, nodes: int, needed_bytes: float, capacity_bytes: float
) -> float:
    """What a step takes longer where the fullest device or the network is crowded."""
    if needed_bytes <= capacity_bytes and nodes < framework.crowded_nodes:
        return 0.0
    return framework.crowded_wait_seconds * transfers_of(row)


def part_seconds(sizes: ModelSizes, layout: Layout, again: bool, device: Device) -> float:
    """What ZeRO-3's gathers and reductions of lists of parts cost beside the exchange.

    The host's calls for each part, and the memory's work: a gather zeroes its result, and copies
    it out of what was received; a reduction copies what it sends.

    Args:
        again: the backward gathers for the recomputation and for itself.
    """
    if layout.zero_stage < 3 or not sizes.framework.deepspeed_zero3:
        return 0.0
    gathers = 3 if again else 2
    weights = sizes.layers * (5 if sizes.gated else 4) + (1 if sizes.tied else 2)
    parts = (gathers + 1) * weights * layout.data_shard
    calls = parts * PART_CALLS * device.host_launch_seconds.value
    copied = (gathers * (1 + 2) + 2) * 2 * parameter_count(sizes) / layout.tensor
    return layout.micro_batches * (calls + copied / device.rates.memory) / layout.pipeline


def rerun_wait_seconds(framework: Framework, layout: Layout) -> float:
    """What a step waits beside its work where every layer is recomputed on tensor ranks."""
    return framework.rerun_wait_seconds * log2(layout.tensor) * layout.micro_batches


def comparable_gib(row: Row, chain: ChainCost, found: Staged) -> float:
    """What the published figure counts, as far as its notes say.

    ``rank 0``: the first pipeline stage, else the fullest. ``torch max`` or ``reserved``: torch's
    allocator, which sees neither the context nor NCCL's buffers.
    """
    notes = row.text("notes")
    stages = found.stages[:1] if "rank 0" in notes else found.stages
    needed = max(stage.memory_bytes for stage in stages)
    if "analytic" in notes:  # of parameters, optimizer and activations
        parts = stages[0].parts
        return sum(v for k, v in parts.items() if k in ANALYTIC) / GIB
    unit = 1e9 if "gb)" in notes else GIB
    if "torch max" in notes or "reserved" in notes:
        layout, device = chain.layout, chain.device
        axes = (layout.tensor, layout.data_ranks, layout.context, layout.pipeline)
        communicators = sum(size > 1 for size in axes)
        needed -= device.framework_memory_bytes.value
        needed -= communicators * device.communicator_memory_bytes.value
    return needed / unit
