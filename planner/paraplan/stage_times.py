"""Seconds of each (virtual) stage of what the search found, and the replay of its step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from paraplan.block_compute import Pass
from paraplan.block_cost import Beside
from paraplan.chain import ChainCost
from paraplan.graph import RECOMPUTE_MODES, Recompute
from paraplan.search import Found
from paraplan.simulate import StageSeconds, simulated_seconds


class StageTimes(NamedTuple):
    """Seconds of one (virtual) stage and micro-batch; `plan_parts.Stage` says what each is."""

    forward: float
    backward: float
    recompute: float
    forward_exchange: float
    backward_exchange: float
    transfer: float
    overlapped: Beside


def stage_times(found: Found) -> list[StageTimes]:
    """The times of each (virtual) stage, in pipeline order."""
    chain, cuts, p = found.chain, found.staged.cuts, found.layout.pipeline
    modes = layer_modes(found)
    last = len(cuts) - 2
    times = []
    for index in range(last + 1):
        run = range(cuts[index], cuts[index + 1])
        here = chain.of_rank(index % p)
        forward, backward = _run_seconds(here, run, modes, index < p, index > last - p)
        transfer = 0.0 if index == last else chain.transfer_seconds(index % p, run.stop)
        blocks = [(here.costs[chain.shape.kind_at[i]], modes.get(i, "none")) for i in run]
        again = sum(_device_seconds(cost.compute.rerun[mode]) for cost, mode in blocks)
        exchanges = (
            _waited(forward, [c.compute.forward for c, _ in blocks]),
            _waited(backward, [c.compute.backward for c, _ in blocks], again),
        )
        slowed = _slowed(chain, transfer, found.staged.stages[index % p].seconds)
        times.append(
            StageTimes(
                forward=forward + slowed,
                backward=backward + slowed,
                recompute=again,
                forward_exchange=exchanges[0],
                backward_exchange=exchanges[1],
                transfer=transfer,
                overlapped=_overlapped(
                    [cost.beside for cost, _ in blocks],
                    forward - exchanges[0],
                    backward - exchanges[1],
                ),
            )
        )
    return times


def _slowed(chain: ChainCost, transfer: float, rank_seconds: float) -> float:
    """What an interleaved pass takes longer because transfers run beside it.

    As `pipeline.interleaved_seconds` has it; plain 1F1B waits for what it sends.
    """
    virtual = chain.layout.virtual_stages
    if virtual == 1:
        return 0.0
    return chain.transfer_contention * min(transfer, rank_seconds / (2 * virtual))


def _overlapped(blocks: Sequence[Beside], forward: float, backward: float) -> Beside:
    """What of the data ranks' collectives lies beside so much computation."""
    whole = Beside(*(sum(parts) for parts in zip(*blocks, strict=True)))
    each_forward = min(whole.forward, forward)
    each_backward = min(whole.backward, backward)
    return Beside(
        forward=each_forward,
        backward=each_backward,
        first_forward=min(whole.first_forward, forward - each_forward),
        last_backward=min(whole.last_backward, backward - each_backward),
    )


def _device_seconds(one: Pass) -> float:
    return one.kernels + one.launch


def _waited(whole: float, passes: Sequence[Pass], again: float = 0.0) -> float:
    """What of ``whole`` is not computation: collectives that are waited for."""
    rest = whole - sum(_device_seconds(one) for one in passes) - again
    return (
        rest if rest > 1e-9 * whole else 0.0
    )  # sums that are equal may differ in their last digits


def _run_seconds(
    chain: ChainCost, run: range, modes: dict[int, Recompute], opens: bool, closes: bool
) -> tuple[float, float]:
    costs = [chain.costs[chain.shape.kind_at[i]] for i in run]
    forward = sum(cost.forward for cost in costs)
    backward = sum(cost.backward[modes.get(i, "none")] for i, cost in zip(run, costs, strict=True))
    forward += costs[0].first_gather if opens else 0.0
    backward += costs[-1].last_gather if closes else 0.0
    return forward, backward


def layer_modes(found: Found) -> dict[int, Recompute]:
    """Chain position -> mode. Within a rank the earliest layers of a kind recompute most."""
    chain, layout = found.chain, found.layout
    cuts, p = found.staged.cuts, layout.pipeline
    modes: dict[int, Recompute] = {}
    for rank in range(p):
        places = defaultdict(list)
        for index in range(rank, len(cuts) - 1, p):
            for i in range(cuts[index], cuts[index + 1]):
                places[chain.shape.kind_at[i]].append(i)
        stage = found.staged.stages[rank]
        for kind, counts in zip(stage.layer_kinds, stage.choice.counts, strict=True):
            queue: list[Recompute] = []
            for mode, count in reversed(list(zip(RECOMPUTE_MODES, counts, strict=True))):
                queue += [mode] * count
            modes.update(zip(places[kind], queue, strict=True))
    return modes


def simulated_step(found: Found) -> float:
    """Seconds of a step, replayed event by event."""
    return simulated_seconds(
        [StageSeconds(s.forward, s.backward, s.transfer) for s in stage_times(found)],
        pipeline=found.layout.pipeline,
        micro_batches=found.layout.micro_batches,
        tails=[stage.tail_seconds for stage in found.staged.stages],
    )
