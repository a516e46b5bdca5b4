"""Seconds and bytes of one block under one layout.

Adds to `block_compute` what the data-parallel ranks do: they gather and reduce the block's
parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from paraplan.block_compute import BlockCompute, Pass
from paraplan.cluster import Cluster
from paraplan.data_copies import data_copies
from paraplan.data_traffic import (
    NONE,
    Numerics,
    Traffic,
    after,
    data_traffic,
    exposed,
    overlapped,
)
from paraplan.device import Device
from paraplan.engine import REDUCE_BYTES, RUNTIME, Engine
from paraplan.graph import Recompute
from paraplan.layout import Layout
from paraplan.op_times import optimizer_seconds
from paraplan.pipeline import pass_share, waiting_share


class Beside(NamedTuple):
    """Seconds of the data ranks' collectives that run beside the computation.

    How long they are on their way; what of them is waited for is in the passes' times.

    Attributes:
        forward, backward: of each micro-batch.
        first_forward, last_backward: of the first and the last one besides.
    """

    forward: float
    backward: float
    first_forward: float
    last_backward: float


@dataclass(frozen=True, slots=True)
class BlockCost:
    """One block under one layout, data-parallel traffic included; seconds per micro-batch.

    Attributes:
        forward: forward pass; ``backward``: backward pass with recomputation, by mode.
        first_gather: extra when the block opens a stage: no earlier block hides its gather.
        last_gather: the same for the block whose backward comes first.
        per_step: extra seconds once a step: gathers and reductions of ZeRO-1, ZeRO-2 and
            replicas in the first forward and the last backward, and their copies.
        last_reduction: exposed once a step when the block's backward comes last.
        optimizer: update of this rank's share, once a step.
        parameter_bytes, optimizer_bytes: held all the time.
        gradient_bytes: held between backward passes; whole ones where they are reduced once.
        owned_gradient_bytes: what the optimizer reads.
        resident_bytes: unsharded parameters held through the step (ZeRO-1, ZeRO-2, replicas).
        unsharded_bytes: parameters in the compute dtype, whole.
        made_bytes: whole gradients in the compute dtype, as the backward makes them.
        reduce_bytes: whole gradients in fp32, as they are reduced.
        buffer_bytes: of an engine that exchanges in pieces; one for all blocks.
        optimizer_work_bytes: temporaries of the update.
        beside: the data ranks' collectives that overlap with the passes.
    """

    compute: BlockCompute
    forward: float
    backward: dict[Recompute, float]
    first_gather: float
    last_gather: float
    per_step: float
    last_reduction: float
    optimizer: float
    parameter_bytes: float
    gradient_bytes: float
    owned_gradient_bytes: float
    optimizer_bytes: float
    resident_bytes: float
    unsharded_bytes: float
    made_bytes: float
    reduce_bytes: float
    buffer_bytes: float
    optimizer_work_bytes: float
    beside: Beside


def block_cost(
    compute: BlockCompute,
    parameters: float,
    expert_parameters: float,
    layout: Layout,
    *,
    numerics: Numerics,
    device: Device,
    cluster: Cluster,
    engine: Engine = RUNTIME,
    trained_tensors: int = 0,
    trainable: float = 1.0,
    expert_padding: float = 1.0,
) -> BlockCost:
    """Add the data-parallel ranks' part to a block.

    Args:
        trained_tensors: that the parameters with gradients are in.
        trainable: share of the parameters that have gradients.
        expert_padding: what the experts take sharded, relative to what they are.
        parameters: elements on one tensor rank, experts included and not yet divided.
        expert_parameters: those of them that ``layout.expert`` divides.
    """
    local = parameters - expert_parameters + expert_parameters / layout.expert
    # Alone and in fp32 there is nothing to cast, gather or reduce: the runtime leaves FSDP out.
    wrapped = numerics.compute != REDUCE_BYTES or layout.data_ranks * layout.context > 1
    rates = device.rates
    copied = 0.0
    if engine.copies:
        copies = data_copies(layout, numerics.compute, trainable, wrapped=wrapped)
        per_byte = local / rates.memory * rates.whole_layer
        compute = _with_copies(compute, copies.forward * per_byte, copies.backward * per_byte)
        copied = (copies.first_forward + copies.last_backward) * per_byte
    if layout.tensor > 1:
        shared = trained_tensors * rates.local
        compute = _with_hooks(compute, shared / 2, shared / 2)
    if wrapped and parameters and engine.copies:  # FSDP2, as the runtime has it
        reduced = rates.reduce if trained_tensors else 0.0
        often = reduced if layout.zero_stage >= 2 else 0.0
        compute = _with_hooks(compute, rates.hooks / 2, rates.hooks / 2 + often)
        copied += reduced - often
    # A stage's ranks wait for each other at every exchange, stages at every pass.
    alike = layout.devices > layout.pipeline
    late = 1 + rates.lag * (1.0 if alike else waiting_share(layout))
    times = late * pass_share(layout, rates.ranks_per_core, rates.unshared_speedup)
    if times != 1:
        compute = _taking(compute, times)
    updates = trained_tensors * (
        rates.sharded_update if wrapped or layout.tensor > 1 else rates.update
    )
    data = _data_times(
        compute,
        _data_traffic(
            parameters, expert_parameters, layout, numerics, cluster, engine, expert_padding
        ),
        layout,
        engine,
    )
    padding = (expert_padding - 1) * expert_parameters
    owned = _owned(parameters + padding, expert_parameters + padding, layout, engine)
    padded = local + padding / layout.expert
    trained = owned * trainable
    whole = padded if wrapped else 0.0
    made = local * trainable
    gradient_bytes = 4 * (made if layout.zero_stage <= 1 and layout.micro_batches > 1 else trained)
    if engine.gradient_bytes is not None and layout.zero_stage < 2:
        gradient_bytes, made = engine.gradient_bytes * made, 0.0
    return BlockCost(
        compute=compute,
        forward=data.forward,
        backward=data.backward,
        first_gather=data.first_gather,
        last_gather=data.last_gather,
        per_step=data.per_step + copied * late,
        last_reduction=data.last_reduction,
        optimizer=late
        * (updates + optimizer_seconds(trained * (12 + 2 * numerics.optimizer_state), device)),
        parameter_bytes=4 * owned,
        gradient_bytes=gradient_bytes,
        owned_gradient_bytes=4 * trained,
        optimizer_bytes=numerics.optimizer_state * trained,
        resident_bytes=numerics.compute * whole if layout.zero_stage != 3 else 0.0,
        unsharded_bytes=numerics.compute * whole,
        made_bytes=numerics.compute * made,
        reduce_bytes=REDUCE_BYTES * padded * trainable if wrapped else 0.0,
        buffer_bytes=engine.buffer_bytes,
        optimizer_work_bytes=numerics.optimizer_work * trained,
        beside=data.beside,
    )


class _DataTimes(NamedTuple):
    """The passes with the data ranks' collectives; the fields of `BlockCost`."""

    forward: float
    backward: dict[Recompute, float]
    first_gather: float
    last_gather: float
    per_step: float
    last_reduction: float
    beside: Beside


def _data_traffic(
    parameters: float,
    expert_parameters: float,
    layout: Layout,
    numerics: Numerics,
    cluster: Cluster,
    engine: Engine,
    expert_padding: float,
) -> tuple[Traffic, Traffic, Traffic]:
    """Gather, reduce-scatter and all-reduce of a block, its experts' among their own ranks."""
    gather, scatter, reduce = data_traffic(
        parameters - expert_parameters, layout, 1, numerics, cluster, engine
    )
    if expert_parameters:
        share = expert_padding * expert_parameters / layout.expert
        extra = data_traffic(share, layout, layout.expert, numerics, cluster, engine)
        gather, scatter, reduce = (
            one.plus(other) for one, other in zip((gather, scatter, reduce), extra, strict=True)
        )
    return gather, scatter, reduce


def _data_times(
    compute: BlockCompute,
    traffic: tuple[Traffic, Traffic, Traffic],
    layout: Layout,
    engine: Engine,
) -> _DataTimes:
    gather, scatter, reduce = traffic
    stage = layout.zero_stage
    each_forward = gather if stage == 3 else NONE
    each_backward = {3: gather.plus(scatter), 2: scatter}.get(stage, NONE)
    once_forward = gather if stage in (1, 2) else NONE
    once_backward = reduce.plus(scatter) if stage == 1 else reduce
    if layout.micro_batches == 1 and engine.overlaps_data:
        each_forward, once_forward = each_forward.plus(once_forward), NONE
        each_backward, once_backward = each_backward.plus(once_backward), NONE
    plain_forward, plain_backward = compute.forward.total, compute.backward.total
    beside = overlapped if engine.overlaps_data else after
    forward = beside(plain_forward, each_forward)
    backward: dict[Recompute, float] = {
        mode: beside(plain_backward + again.total, each_backward)
        for mode, again in compute.rerun.items()
    }
    once = once_forward.seconds + once_backward.seconds
    last = scatter if stage else reduce
    if engine.overlaps_data:
        once = (
            overlapped(plain_forward, each_forward.plus(once_forward))
            - forward
            + overlapped(plain_backward, each_backward.plus(once_backward))
            - backward["none"]
        )
    else:
        last = NONE
    return _DataTimes(
        forward=forward,
        backward=backward,
        first_gather=exposed(plain_forward, each_forward if engine.overlaps_data else NONE),
        last_gather=exposed(plain_backward, gather) if stage == 3 and engine.overlaps_data else 0.0,
        per_step=once,
        last_reduction=exposed(plain_backward, last),
        beside=_beside(engine, each_forward, each_backward, once_forward, once_backward),
    )


def _with_copies(compute: BlockCompute, forward: float, backward: float) -> BlockCompute:
    """The block with what is copied in each micro-batch among its kernels."""
    return replace(
        compute,
        forward=replace(compute.forward, kernels=compute.forward.kernels + forward),
        backward=replace(compute.backward, kernels=compute.backward.kernels + backward),
    )


def _with_hooks(compute: BlockCompute, forward: float, backward: float) -> BlockCompute:
    """The block with what DTensor and FSDP2's hooks take on the host, which nothing hides.

    Only the sum of forward and backward was measured.
    """
    return replace(
        compute,
        forward=replace(compute.forward, launch=compute.forward.launch + forward),
        backward=replace(compute.backward, launch=compute.backward.launch + backward),
    )


def _taking(compute: BlockCompute, times: float) -> BlockCompute:
    """The block with kernels, and their launches, that take so many times as long."""

    def taking(one: Pass) -> Pass:
        return replace(one, kernels=one.kernels * times, launch=one.launch * times)

    return replace(
        compute,
        forward=taking(compute.forward),
        backward=taking(compute.backward),
        rerun={mode: taking(one) for mode, one in compute.rerun.items()},
    )


def _beside(engine: Engine, *traffic: Traffic) -> Beside:
    seconds = [one.seconds if engine.overlaps_data else 0.0 for one in traffic]
    return Beside(*seconds)


def _owned(parameters: float, expert_parameters: float, layout: Layout, engine: Engine) -> float:
    """Elements whose update this rank does."""
    shards = layout.data_shard * (layout.context if engine.shards_context else 1)
    expert_shard = max(1.0, shards / layout.expert)
    return (parameters - expert_parameters) / shards + expert_parameters / (
        layout.expert * expert_shard
    )
