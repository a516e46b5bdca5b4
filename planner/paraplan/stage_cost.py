"""Time and memory of a stage: a run of the chain on one pipeline rank.

`stage_cost` adds up the blocks' costs and lets `recompute` find the cheapest recomputation that
fits at every moment of `stage_memory`. A pipeline rank that holds several virtual stages is
costed as one stage of several runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from paraplan.chain import ChainCost, Runs
from paraplan.collectives import collective_seconds
from paraplan.data_traffic import peers
from paraplan.layout import Layout
from paraplan.recompute import Choice, cheapest_choice, least_memory_choice
from paraplan.stage_memory import StageMemory, stage_memory


@dataclass(frozen=True, slots=True)
class StageCost:
    """One pipeline rank's stage.

    Attributes:
        forward_seconds, backward_seconds: one micro-batch; backward with recomputation.
        core_seconds: forward and backward without what depends on the neighbours (the exposed
            gathers at the stage's ends); never less for a stage that holds more blocks.
        tail_seconds: once a step, after the last backward and the first gathers.
        optimizer_seconds: part of ``tail_seconds``.
        choice: layers by recompute mode; its ``counts`` follow ``layer_kinds``.
        layer_kinds: kinds (indices) that ``choice.counts`` speaks of.
        memory_bytes: peak of one device.
        parts: where it goes.
    """

    forward_seconds: float
    backward_seconds: float
    core_seconds: float
    tail_seconds: float
    optimizer_seconds: float
    choice: Choice
    layer_kinds: tuple[int, ...]
    memory_bytes: float
    parts: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """Forward and backward of one micro-batch."""
        return self.forward_seconds + self.backward_seconds


def in_flight(layout: Layout, rank: int) -> float:
    """Micro-batches whose activations a pipeline rank keeps at its peak.

    1F1B: ``min(M, p - rank)``. Interleaved: ``min(M v, 2 (p - rank - 1) + (v - 1) p + 1)``
    chunks, here as a multiple of the rank's whole share (both confirmed by replaying the
    schedules event by event, see tests/test_pipeline.py).
    """
    p, m, v = layout.pipeline, layout.micro_batches, layout.virtual_stages
    if v == 1:
        return min(m, p - rank)
    return min(m * v, 2 * (p - rank - 1) + (v - 1) * p + 1) / v


def stage_cost(
    chain: ChainCost, rank: int, runs: Runs, *, forced: bool = False
) -> StageCost | None:
    """Cost of a pipeline rank that holds ``runs``; None if no recompute choice fits.

    Args:
        forced: return the choice with the least memory when none fits.
    """
    chain = chain.of_rank(rank)
    depth = in_flight(chain.layout, rank)
    key = (depth, _signature(chain, runs), forced)
    if key not in chain.memo:
        chain.memo[key] = _stage_cost(chain, depth, runs, forced)
    return chain.memo[key]


def _signature(chain: ChainCost, runs: Runs) -> object:
    """Stages with the same signature cost the same: what blocks they hold, and what at the ends.

    Runs of one kind are told apart by their length alone, so that the many positions at which
    a stage of equal layers can stand share one evaluation.
    """
    kind_at = chain.shape.kind_at
    parts = []
    for first, end in runs:
        counts = tuple(before[end] - before[first] for before in chain.shape.counts_before)
        parts.append((counts, kind_at[first], kind_at[end - 1]))
    return tuple(parts)


def _stage_cost(chain: ChainCost, depth: float, runs: Runs, forced: bool) -> StageCost | None:
    shape = chain.shape
    counts = [
        sum(before[end] - before[first] for first, end in runs) for before in shape.counts_before
    ]
    memory = stage_memory(chain, depth, runs, counts)
    rooms = memory.rooms(chain.budget_bytes)
    choice = cheapest_choice(memory.layers, rooms)
    if choice is None:
        if not forced:
            return None
        choice = least_memory_choice(memory.layers, rooms)
    return _assemble(chain, runs, counts, choice, memory)


def _assemble(
    chain: ChainCost,
    runs: Runs,
    counts: Sequence[int],
    choice: Choice,
    memory: StageMemory,
) -> StageCost:
    costs, device = chain.costs, chain.device
    kind_at, roles = chain.shape.kind_at, chain.shape.roles
    layer_kinds = tuple(k for k, n in enumerate(counts) if n and roles[k] == "layer")
    parts = memory.parts(choice)
    framework = device.framework_memory_bytes.value
    parts["fragmentation"] = device.fragmentation_fraction.value * sum(parts.values())
    parts["framework"] = framework
    forward = sum(n * cost.forward for n, cost in zip(counts, costs, strict=True))
    backward = sum(n * cost.backward["none"] for n, cost in zip(counts, costs, strict=True))
    opening, closing = costs[kind_at[runs[0][0]]], costs[kind_at[runs[-1][1] - 1]]
    optimizer = sum(n * cost.optimizer for n, cost in zip(counts, costs, strict=True))
    tail = optimizer + sum(n * cost.per_step for n, cost in zip(counts, costs, strict=True))
    tail += opening.last_reduction + _tied_exchange_seconds(chain, runs)
    return StageCost(
        forward_seconds=forward + opening.first_gather,
        backward_seconds=backward + closing.last_gather + choice.extra_seconds,
        core_seconds=forward + backward + choice.extra_seconds,
        tail_seconds=tail,
        optimizer_seconds=optimizer,
        choice=choice,
        layer_kinds=layer_kinds,
        memory_bytes=sum(parts.values()),
        parts=parts,
    )


def _tied_exchange_seconds(chain: ChainCost, runs: Runs) -> float:
    """First and last stage add up the gradients of the weight they share, once a step."""
    layout, graph = chain.layout, chain.graph
    last = len(chain.shape.kind_at)
    at_end = runs[0][0] == 0 or runs[-1][1] == last
    if not graph.tied_parameters or layout.pipeline == 1 or not at_end:
        return 0.0
    stride = layout.devices // layout.pipeline * (layout.pipeline - 1)
    group = peers(2, stride, chain.cluster.devices_per_node)
    size = 4 * graph.tied_parameters / layout.tensor / layout.data_shard
    return collective_seconds("all_reduce", size, group, chain.cluster)
