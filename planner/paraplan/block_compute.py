"""Seconds and bytes of one block and one micro-batch, without the data-parallel ranks.

What it computes, and what it exchanges with its tensor, context and expert peers; shared by every
layout of a family.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from paraplan.cluster import Cluster
from paraplan.collectives import collective_seconds, transfer_seconds
from paraplan.data_traffic import (
    peers,
    tensor_group,
)
from paraplan.device import Device
from paraplan.engine import RUNTIME, Engine
from paraplan.graph import RECOMPUTE_MODES, Amount, Block, BlockVariant, Op, Recompute
from paraplan.layout import Layout
from paraplan.op_times import op_seconds


@dataclass(frozen=True, slots=True)
class Pass:
    """Seconds of one pass of one micro-batch through a block, by what takes them.

    Attributes:
        kernels: device time of the ops.
        launch: host time of launching them that the device time does not cover; on a CPU what
            modules and autograd take around them.
        tensor, context, expert: exposed communication with the peers of that axis.
    """

    kernels: float = 0.0
    launch: float = 0.0
    tensor: float = 0.0
    context: float = 0.0
    expert: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of the whole pass."""
        return self.kernels + self.launch + self.tensor + self.context + self.expert


@dataclass(frozen=True, slots=True)
class BlockCompute:
    """One block, one micro-batch, without data-parallel traffic.

    Attributes:
        forward, backward: the passes without recomputation.
        rerun: the forward run again in the backward pass, by recompute mode.
        saved_bytes: kept from forward to backward, by recompute mode.
        working_bytes: alive beside the saved ones while the block is computed, by mode.
        peak_bytes: saved and working together, without recomputation.
        measured, interpolated, modelled: kernel seconds by what they rest on.
    """

    forward: Pass
    backward: Pass
    rerun: dict[Recompute, Pass]
    saved_bytes: dict[Recompute, float]
    working_bytes: dict[Recompute, float]
    peak_bytes: float
    measured: float
    interpolated: float
    modelled: float


def block_compute(
    block: Block, layout: Layout, *, device: Device, cluster: Cluster, engine: Engine = RUNTIME
) -> BlockCompute:
    """Cost of one micro-batch of ``layout.micro_batch_size / layout.context`` sequences."""
    variant = block.variants[layout.tensor]
    sequences = layout.micro_batch_size / layout.context
    split = layout.tensor if layout.sequence_parallel else 1
    timed = [_timed(op, sequences, split, layout.expert, device) for op in variant.ops]
    forward = [(op, s) for op, s, _ in timed if op.phase == "forward"]
    backward = [(op, s) for op, s, _ in timed if op.phase == "backward"]
    tensor = _tensor_seconds(variant, layout, sequences, cluster, engine)
    exchange = _expert_seconds(variant, layout, sequences, cluster)
    ring = _ring_seconds(variant, layout, sequences, cluster)
    # A reduction and a gather of as many steps as there are other ranks, and the start.
    steps = 2 * layout.tensor - 1 if layout.tensor > 1 else 0
    waits = {
        phase: steps
        * engine.exchange_wait_seconds
        * sum(c.phase == phase for c in variant.collectives)
        for phase in ("forward", "backward")
    }
    calls = sum(op.count for op, _ in forward)
    checkpointed = {
        "selective": calls * device.rates.selective_recompute,
        "full": calls * device.rates.full_recompute,
    }
    reruns: dict[Recompute, Pass] = {"none": Pass()}
    for mode in RECOMPUTE_MODES[1:]:
        again = [(op, s) for op, s in forward if mode in op.reruns]
        if not again:  # nor are there exchanges to do again
            reruns[mode] = Pass()
            continue
        full = mode == "full"
        rerun = _run(
            again,
            device,
            engine,
            waits=waits["forward"] if full else 0.0,
            tensor=tensor["rerun"],
            ring=ring if full else 0.0,
            expert=exchange if full else 0.0,
        )
        reruns[mode] = replace(rerun, launch=rerun.launch + checkpointed[mode])
    saved = {m: _saved_bytes(variant, m, sequences, split) for m in RECOMPUTE_MODES}
    # Under sequence parallelism temporaries shrink with the activations they are made from; the
    # gradients of parameters, which do not depend on the tokens, stay.
    whole = _saved_bytes(variant, "none", sequences, 1)
    shrunk = saved["none"] / whole if whole else 1.0
    peaks = [each.fixed + shrunk * each.per_sequence * sequences for each in variant.peak_bytes]
    peak = max(*peaks, saved["none"])
    return BlockCompute(
        forward=_run(
            forward,
            device,
            engine,
            waits=waits["forward"],
            tensor=tensor["forward"],
            ring=ring,
            expert=exchange,
        ),
        backward=_run(
            backward,
            device,
            engine,
            waits=waits["backward"],
            tensor=tensor["backward"],
            ring=2 * ring,
            expert=exchange,
        ),
        rerun=reruns,
        saved_bytes=saved,
        working_bytes={m: peak - min(saved[m], peak) for m in RECOMPUTE_MODES},
        peak_bytes=peak,
        measured=sum(s for _, s, basis in timed if basis == "measured"),
        interpolated=sum(s for _, s, basis in timed if basis == "interpolated"),
        modelled=sum(s for _, s, basis in timed if basis == "modelled"),
    )


def _timed(
    op: Op, sequences: float, split: int, expert: int, device: Device
) -> tuple[Op, float, str]:
    if op.replicated:
        sequences /= split
    if op.expert and expert > 1 and op.kind == "grouped_gemm":
        groups = Amount(op.dims[0].fixed // expert, op.dims[0].per_sequence)
        held = {  # of the weights; what depends on the tokens stays
            name: Amount(amount.fixed // expert, amount.per_sequence)
            for name, amount in (("read_bytes", op.read_bytes), ("write_bytes", op.write_bytes))
        }
        op = op.model_copy(update={"dims": (groups, *op.dims[1:]), **held})
    seconds, basis = op_seconds(op, sequences, device)
    seconds *= device.rates.whole_layer
    if op.kind in ("gemm", "grouped_gemm"):
        seconds /= device.rates.dtypes[op.dtype].sustained
    return op, seconds * op.count, basis


def _run(
    ops: list[tuple[Op, float]],
    device: Device,
    engine: Engine,
    *,
    waits: float,
    tensor: float,
    ring: float,
    expert: float,
) -> Pass:
    """One pass: the host launches ops one by one while the device works them off.

    Exchanges are launched, not waited for, so that the host catches up while they run. A CPU is
    host and device in one: what a call costs beside its op is never hidden.
    """
    kernels = sum(seconds for _, seconds in ops)
    calls = sum(op.count for op, _ in ops) * (2 if engine.blocking else 1)
    host = waits + calls * device.host_launch_seconds.value
    hidden = not engine.blocking and device.kind != "cpu"
    busy = kernels + tensor + expert if hidden else 0.0
    attention = sum(seconds for op, seconds in ops if op.kind == "attention")
    return Pass(
        kernels=kernels,
        launch=max(0.0, host - busy),
        tensor=tensor,
        context=max(0.0, ring - attention),
        expert=expert,
    )


def _saved_bytes(variant: BlockVariant, mode: Recompute, sequences: float, split: int) -> float:
    saved = variant.saved[mode]
    return (
        saved.sharded.at(sequences)
        + saved.replicated.at(sequences) / split
        + saved.gathered.at(sequences)
    )


def _tensor_seconds(
    variant: BlockVariant, layout: Layout, sequences: float, cluster: Cluster, engine: Engine
) -> dict[str, float]:
    """Exposed tensor-parallel exchanges of forward, backward and a rerun of the forward.

    A rerun stops once the last saved activation is rebuilt, which the last row-parallel
    output is not: its reduction is left out.
    """
    seconds = {"forward": 0.0, "backward": 0.0, "rerun": 0.0}
    if layout.tensor == 1:
        return seconds
    group = tensor_group(layout, cluster)
    last_reduction = 0.0
    for exchange in variant.collectives:
        size = exchange.message_bytes.at(sequences)
        summed = size * engine.tensor_bytes / 2
        if exchange.kind == "gather":
            gathered = collective_seconds("all_gather", size, group, cluster)
            seconds[exchange.phase] += gathered * (1 - engine.hidden_tensor)
            continue
        if layout.sequence_parallel:
            reduction = collective_seconds("reduce_scatter", summed, group, cluster)
            total = reduction + collective_seconds("all_gather", size, group, cluster)
        else:
            total = reduction = collective_seconds("all_reduce", summed, group, cluster)
        total, reduction = (s * (1 - engine.hidden_tensor) for s in (total, reduction))
        seconds[exchange.phase] += total
        if exchange.phase == "forward":
            last_reduction = reduction
    skipped = 0.0 if engine.reruns_whole else last_reduction
    seconds["rerun"] = max(0.0, seconds["forward"] - skipped)
    return seconds


def _expert_seconds(
    variant: BlockVariant, layout: Layout, sequences: float, cluster: Cluster
) -> float:
    """Dispatch and combine of routed tokens in one pass."""
    size = variant.expert_dispatch_bytes.at(sequences)
    if layout.expert == 1 or not size:
        return 0.0
    group = peers(layout.expert, layout.tensor, cluster.devices_per_node)
    return 2 * collective_seconds("all_to_all", size, group, cluster)


def _ring_seconds(
    variant: BlockVariant, layout: Layout, sequences: float, cluster: Cluster
) -> float:
    """Keys and values passed round the context ranks in one forward pass (Liu et al. 2023)."""
    if layout.context == 1:
        return 0.0
    group = peers(layout.context, layout.tensor, cluster.devices_per_node)
    crosses = group.per_node < group.size
    total = 0.0
    for op in variant.ops:
        if op.kind == "attention" and op.phase == "forward":
            dims = [dim.at(sequences) for dim in op.dims]
            batch, _, kv_heads, _, key_length, head_dim, value_dim = dims
            size = batch * kv_heads * key_length * (head_dim + value_dim) * 2
            step = transfer_seconds(size, between_nodes=crosses, cluster=cluster)
            total += op.count * (layout.context - 1) * step
    return total
