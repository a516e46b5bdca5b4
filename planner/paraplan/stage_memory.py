"""Memory of a stage at each moment of a step that may be its peak.

Not everything is alive at once. These moments bound the rest:

*full*      every micro-batch that will be in flight is, and a backward begins: all saved
            activations, beside what the head or the last layer needs while it works. The
            gradients are there if a backward has ended before, which needs more micro-batches
            than are in flight. One layer later, that layer's activations are gone, and its
            gradients are being reduced.
*draining*  a micro-batch's backward ends: its activations are gone but for one layer's, and the
            gradients are there; here the embedding's are made and reduced. In the step's last
            micro-batch FSDP frees each block's parameters behind its backward.
*optimizer* no activations and no gathered parameters; the optimizer's temporaries.

What FSDP2 holds beside the shards (torch 2.13, ``_fsdp_param_group.py``): the block at work
unsharded and, under ZeRO-3, the next one gathered ahead; the gradients of the block at work in
the compute dtype; and the fp32 input of the last reduction, kept until the next begins.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from paraplan.block_cost import BlockCost
from paraplan.chain import ChainCost, Runs
from paraplan.engine import REDUCE_BYTES
from paraplan.graph import RECOMPUTE_MODES
from paraplan.recompute import Choice, LayerKind, Room


@dataclass(frozen=True, slots=True)
class Work:
    """What one block needs while it works, beside what waits.

    Attributes:
        saved: activations that live only while it works.
        working: temporaries, what its recomputation rebuilds, gradients of its parameters.
        gathered: its parameters unsharded, gradients being reduced.
    """

    saved: float = 0.0
    working: float = 0.0
    gathered: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.saved + self.working + self.gathered


@dataclass(frozen=True, slots=True)
class Moment:
    """A moment of the step.

    Attributes:
        held: bytes whatever the layers' recompute modes, by part.
        share: of the stage's saved activations that are alive.
        works: what blocks other than layers need at this moment; one at a time.
        reducing: gradients being reduced while a layer works; None if no layer works then.
    """

    held: dict[str, float]
    share: float
    works: tuple[Work, ...] = ()
    reducing: float | None = None

    @property
    def floor(self) -> float:
        """The most that one of the other blocks needs."""
        return max((work.total for work in self.works), default=0.0)


@dataclass(frozen=True, slots=True)
class StageMemory:
    """The moments of a stage, and what each kind of layer needs at work, by recompute mode."""

    moments: tuple[Moment, ...]
    layers: tuple[LayerKind, ...]
    layer_works: tuple[tuple[Work, Work, Work], ...]

    def rooms(self, budget_bytes: float) -> tuple[Room, ...]:
        """What each moment leaves of the budget."""
        return tuple(
            Room(
                budget_bytes - sum(moment.held.values()),
                moment.share,
                moment.floor,
                moment.reducing,
            )
            for moment in self.moments
        )

    def parts(self, choice: Choice) -> dict[str, float]:
        """Memory by part at the moment that needs most."""
        return max((self._at(moment, choice) for moment in self.moments), key=_total)

    def _at(self, moment: Moment, choice: Choice) -> dict[str, float]:
        works = list(moment.works)
        if moment.reducing is not None:
            for each, counts in zip(self.layer_works, choice.counts, strict=True):
                works += [
                    replace(work, gathered=work.gathered + moment.reducing)
                    for work, count in zip(each, counts, strict=True)
                    if count
                ]
        most = max(works, key=lambda work: work.total, default=Work())
        parts = dict(moment.held)
        parts["activations"] += moment.share * choice.saved_bytes + most.saved
        parts["working"] += most.working
        parts["gathered_parameters"] += most.gathered
        return parts


def _total(parts: dict[str, float]) -> float:
    return sum(parts.values())


def stage_memory(chain: ChainCost, depth: float, runs: Runs, counts: Sequence[int]) -> StageMemory:
    """Everything about a stage's memory but the choice of recompute modes.

    Args:
        depth: micro-batches in flight at its peak.
        counts: blocks of each kind.
    """
    by_role: dict[str, list[tuple[int, BlockCost]]] = defaultdict(list)
    for role, number, cost in zip(chain.shape.roles, counts, chain.costs, strict=True):
        if number:
            by_role[role].append((number, cost))
    kinds = [k for k, n in enumerate(counts) if n and chain.shape.roles[k] == "layer"]
    number = sum(n for n, _ in by_role["layer"])
    works = tuple(_layer_works(chain, cost, number) for _, cost in by_role["layer"])
    layers = tuple(
        _layer_kind(chain, k, counts[k], depth, each) for k, each in zip(kinds, works, strict=True)
    )
    held = _held(chain, depth, runs, counts)
    opening = chain.costs[chain.shape.kind_at[runs[0][0]]]
    moments = _moments(chain, depth, held, by_role, opening, _copied(chain, runs))
    return StageMemory(moments, layers, works)


def _moments(
    chain: ChainCost,
    depth: float,
    held: dict[str, float],
    by_role: Mapping[str, list[tuple[int, BlockCost]]],
    opening: BlockCost,
    copy: float,
) -> tuple[Moment, ...]:
    layout = chain.layout
    number = sum(n for n, _ in by_role["layer"])
    early = depth >= layout.micro_batches  # full before any backward has ended
    first = dict(held, gradients=_standing(chain, held["gradients"])) if early else held
    heads = [cost for _, cost in by_role["head"]]
    others = [cost for role in ("embedding", "bridge") for _, cost in by_role[role]]
    # Whole gradients that accumulate are freed as they are copied to be reduced, which adds their
    # shards only; the last micro-batch does it, beside no other's activations.
    deferred = layout.zero_stage <= 1 and layout.micro_batches > 1
    reduced = 1.0
    if deferred:
        reduced = 1 / layout.data_shard if depth <= 1 else 0.0
    layer = reduced * max((cost.reduce_bytes for _, cost in by_role["layer"]), default=0.0)
    carried = 0.0  # what the micro-batch before reduced last; with a head that is a norm
    if not early and not deferred and (others or copy or not heads):
        carried = reduced * (REDUCE_BYTES * copy or opening.reduce_bytes)
    before = max((reduced * cost.reduce_bytes for cost in heads), default=carried)
    if chain.graph.tied_parameters:  # such a head's norm is reduced with the embedding, at the end
        before = max(before, carried)
    one_layer = 1 / (max(1, number) * depth)  # of all saved activations
    chunk = 1 / (depth * layout.virtual_stages)  # of them, those of one micro-batch in a stage
    head_works = tuple(work for cost in heads for work in _head_works(chain, cost, carried))
    moments = [Moment(first, 1.0, head_works, before)]
    if number > 1:
        moments.append(Moment(first, 1 - one_layer, (), layer))
    left = min(1.0, max(0.0, 1 - chunk + one_layer))
    reducing = layer if number > 1 else 0.0
    moments.append(Moment(held, left, tuple(_reduction(chain, c) for c in others), reducing))
    if layout.micro_batches == 1 and chain.engine.gradient_bytes is None:
        moments = _freeing(moments, by_role)
    pairs = [pair for each in by_role.values() for pair in each]
    return (*moments, _optimizer_moment(held, pairs))


def _standing(chain: ChainCost, gradient_bytes: float) -> float:
    """What of the kept gradients is there before any backward has ended."""
    whole = chain.engine.gradient_bytes
    if not whole or chain.layout.zero_stage >= 2:
        return 0.0
    return gradient_bytes * chain.engine.standing_gradient_bytes / whole


def _freeing(
    moments: Sequence[Moment], by_role: Mapping[str, list[tuple[int, BlockCost]]]
) -> list[Moment]:
    """The moments in the step's last micro-batch, where FSDP frees what its backward is done with.

    That is the head behind the first layer's, and at last all layers but the one at work.
    """
    head = sum(n * cost.resident_bytes for n, cost in by_role["head"])
    layers = sum(n * cost.resident_bytes for n, cost in by_role["layer"])
    layer = max((cost.resident_bytes for _, cost in by_role["layer"]), default=0.0)
    full, *later, draining = moments
    works = tuple(replace(work, gathered=work.gathered + head) for work in full.works)
    freed = [_without(replace(full, works=works), head)]
    freed += [_without(moment, head + layer) for moment in later]
    return [*freed, _without(draining, head + layers - layer)]


def _without(moment: Moment, freed_bytes: float) -> Moment:
    gathered = moment.held["gathered_parameters"] - freed_bytes
    return replace(moment, held=dict(moment.held, gathered_parameters=gathered))


def _held(chain: ChainCost, depth: float, runs: Runs, counts: Sequence[int]) -> dict[str, float]:
    """What waits through a step, by part (see `MemoryParts`)."""
    layout, costs = chain.layout, chain.costs
    pairs = list(zip(counts, costs, strict=True))
    copy = _copied(chain, runs) / layout.data_shard
    saved = sum(
        depth * n * cost.compute.saved_bytes["none"]
        for k, (n, cost) in enumerate(pairs)
        if n and chain.shape.roles[k] in ("embedding", "bridge")
    )
    axes = (
        layout.tensor,
        layout.data_shard,
        layout.data_replicate,
        layout.context,
        layout.pipeline,
    )
    communicators = sum(size > 1 for size in axes)
    return {
        "parameters": sum(n * cost.parameter_bytes for n, cost in pairs) + 4 * copy,
        "gradients": sum(n * cost.gradient_bytes for n, cost in pairs) + 4 * copy,
        "optimizer": sum(n * cost.optimizer_bytes for n, cost in pairs)
        + chain.numerics.optimizer_state * copy,
        "activations": saved + _waiting_outputs(chain, depth),
        "working": 0.0,
        "gathered_parameters": sum(n * cost.resident_bytes for n, cost in pairs)
        + max(cost.buffer_bytes for n, cost in pairs)
        + _tied_resident(chain, runs),
        "communication": communicators * chain.device.communicator_memory_bytes.value,
    }


def _waiting_outputs(chain: ChainCost, depth: float) -> float:
    """Hidden states that torch's stages keep beside what autograd saves.

    A stage's output is kept with the micro-batch until its backward; the last stage has none. The
    widest cut stands for all, so that a stage never needs less for holding more blocks.
    """
    layout = chain.layout
    if not chain.engine.keeps_outputs:
        return 0.0
    if layout.pipeline == 1 or (layout.virtual_stages == 1 and depth <= 1):
        return 0.0
    return depth * layout.virtual_stages * max(chain.cut_bytes)


def _copied(chain: ChainCost, runs: Runs) -> float:
    """Parameters of the stage's second copy of the tied embedding, if it holds one."""
    last = len(chain.shape.kind_at)
    if runs[-1][1] != last or runs[0][0] == 0:
        return 0.0
    return _tied(chain)


def _tied(chain: ChainCost) -> float:
    """Tied parameters on one tensor rank: split with the first block's, or whole as they are."""
    graph = chain.graph
    if not graph.tied_parameters:
        return 0.0
    variants = graph.blocks[graph.chain[0].block].variants
    elsewhere = variants[1].parameters - variants[chain.layout.tensor].parameters
    return float(graph.tied_parameters - elsewhere)


def _tied_resident(chain: ChainCost, runs: Runs) -> float:
    """Tied parameters unsharded, beside what their own block holds of them.

    FSDP gathers them with the root, which keeps them from forward to backward in any ZeRO stage.
    """
    layout, item_bytes = chain.layout, chain.numerics.compute
    if item_bytes == REDUCE_BYTES and layout.data_ranks * layout.context == 1:
        return 0.0  # FSDP is left out
    if runs[0][0] == 0 and layout.zero_stage == 3:
        return item_bytes * _tied(chain)
    return item_bytes * _copied(chain, runs)


def _head_works(chain: ChainCost, cost: BlockCost, carried: float) -> tuple[Work, Work]:
    """The head computing logits and loss, and then reducing its gradient.

    Its forward and backward follow each other at once, so that what it saves lives only while
    it works and never waits in flight.
    """
    gathered = carried + (cost.unsharded_bytes if chain.layout.zero_stage == 3 else 0.0)
    saved = cost.compute.saved_bytes["none"]
    computing = Work(saved, cost.compute.peak_bytes - saved, gathered)
    return computing, _reduction(chain, cost)


def _reduction(chain: ChainCost, cost: BlockCost) -> Work:
    """A block's gradients, made and reduced; their shard is added to the micro-batches' before."""
    layout = chain.layout
    accumulates = layout.zero_stage >= 2 and layout.micro_batches > 1
    shard = cost.reduce_bytes / layout.data_shard if accumulates else 0.0
    return Work(0.0, 0.0, cost.made_bytes + cost.reduce_bytes + shard)


def _layer_works(chain: ChainCost, cost: BlockCost, number: int) -> tuple[Work, Work, Work]:
    """A layer's backward by recompute mode; under ZeRO-3 the next one is gathered ahead."""
    gathered = cost.unsharded_bytes * min(2, number) if chain.layout.zero_stage == 3 else 0.0
    none, selective, full = (
        Work(0.0, cost.compute.working_bytes[mode], gathered) for mode in RECOMPUTE_MODES
    )
    return none, selective, full


def _optimizer_moment(held: dict[str, float], pairs: Sequence[tuple[int, BlockCost]]) -> Moment:
    alive = {
        part: size if part in ("parameters", "optimizer", "communication") else 0.0
        for part, size in held.items()
    }
    alive["gradients"] = sum(n * cost.owned_gradient_bytes for n, cost in pairs)
    temporaries = sum(n * cost.optimizer_work_bytes for n, cost in pairs)
    return Moment(alive, 0.0, (Work(working=temporaries),))


def _layer_kind(
    chain: ChainCost, kind: int, count: int, depth: float, works: tuple[Work, Work, Work]
) -> LayerKind:
    cost = chain.costs[kind]
    saved = [depth * cost.compute.saved_bytes[mode] for mode in RECOMPUTE_MODES]
    extra = [cost.backward[mode] - cost.backward["none"] for mode in RECOMPUTE_MODES]
    allowed = [mode in chain.modes for mode in RECOMPUTE_MODES]
    return LayerKind(
        count=count,
        saved=(saved[0], saved[1], saved[2]),
        extra=(extra[0], extra[1], extra[2]),
        working=(works[0].total, works[1].total, works[2].total),
        allowed=(allowed[0], allowed[1], allowed[2]),
    )
