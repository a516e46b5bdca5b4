"""An exact search that shares no algorithm with the planner: brute force over everything.

It takes the costs of single blocks from `chain_cost` and then tries every layout, every way to
cut the chain, and every number of layers in every recompute mode. No bounds, no dynamic
programming, no integer program.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from paraplan.chain import ChainCost
from paraplan.collectives import transfer_seconds
from paraplan.layout import Layout
from paraplan.pipeline import critical_paths, interleaved_seconds
from paraplan.problem import Problem, chain_cost
from paraplan.recompute import choice_of
from paraplan.stage_cost import _tied_exchange_seconds
from paraplan.stage_memory import stage_memory

MODES = ("none", "selective", "full")


def all_layouts(problem: Problem) -> Iterator[Layout]:
    """Every layout of the search space, by plain nested loops."""
    graph, n = problem.graph, problem.cluster.devices
    batch = problem.workload.global_batch
    node = math.gcd(*(kind.cluster.devices_per_node for kind in problem.parts or (problem,)))
    numbers = [d for d in range(1, n + 1) if n % d == 0]
    layers = sum(graph.blocks[item.block].role == "layer" for item in graph.chain)
    blocks = len(graph.chain)
    for tensor, pipeline, shard in itertools.product(numbers, numbers, numbers):
        if n % (tensor * pipeline * shard) or node % tensor or pipeline > layers:
            continue
        if any(tensor not in block.variants for block in graph.blocks.values()):
            continue
        replicate = n // (tensor * pipeline * shard)
        if batch % (replicate * shard):
            continue
        each = batch // (replicate * shard)
        for size in range(1, each + 1):
            if each % size:
                continue
            for virtual in range(1, blocks + 1):
                chunks = pipeline * virtual
                equal = (blocks % chunks == 0 and blocks > chunks) or layers % chunks == 0
                if pipeline > 1 and each // size < pipeline:
                    continue
                if virtual > 1 and (pipeline == 1 or not equal or (each // size) % pipeline):
                    continue
                for zero in (1, 2, 3) if shard > 1 else (0,):
                    for sequence in (False, True) if tensor > 1 else (False,):
                        yield Layout(
                            data_replicate=replicate,
                            data_shard=shard,
                            tensor=tensor,
                            pipeline=pipeline,
                            virtual_stages=virtual,
                            micro_batch_size=size,
                            micro_batches=each // size,
                            schedule="none"
                            if pipeline == 1
                            else ("1f1b" if virtual == 1 else "interleaved-1f1b"),
                            sequence_parallel=sequence,
                            zero_stage=zero,
                        )


def stage_best(
    chain: ChainCost, depth: float, runs: tuple[tuple[int, int], ...]
) -> tuple[float, float, float] | None:
    """Forward, backward and tail seconds at the cheapest choice that fits, by trying all."""
    kind_at, roles, costs = chain.shape.kind_at, chain.shape.roles, chain.costs
    held = [kind_at[i] for first, end in runs for i in range(first, end)]
    layers = sorted({k for k in held if roles[k] == "layer"})
    counts = [held.count(k) for k in range(len(costs))]
    memory = stage_memory(chain, depth, runs, counts)
    cheapest = math.inf
    ways = [
        [(counts[k] - a - b, a, b) for a in range(counts[k] + 1) for b in range(counts[k] + 1 - a)]
        for k in layers
    ]
    for chosen in itertools.product(*ways):
        used = {mode for each in chosen for mode, number in zip(MODES, each, strict=True) if number}
        choice = choice_of(memory.layers, chosen)
        device = chain.device
        total = sum(memory.parts(choice).values()) * (1 + device.fragmentation_fraction.value)
        fits = total + device.framework_memory_bytes.value <= chain.capacity_bytes
        if fits and used <= set(chain.modes):
            cheapest = min(cheapest, choice.extra_seconds)
    if cheapest == math.inf:
        return None
    opening, closing = costs[held[0]], costs[held[-1]]
    forward = sum(costs[k].forward for k in held) + opening.first_gather
    backward = sum(costs[k].backward["none"] for k in held) + closing.last_gather + cheapest
    tail = sum(costs[k].per_step + costs[k].optimizer for k in held) + opening.last_reduction
    return forward, backward, tail + _tied_exchange_seconds(chain, runs)


def layout_best(problem: Problem, layout: Layout, kinds: Sequence[Problem] = ()) -> float:
    """Least step time of a layout over all cuts and recompute choices; inf if none fits.

    Args:
        kinds: for each pipeline rank, the problem on its kind of devices, where there are two;
            each kind is one node.
    """
    chains = [chain_cost(kind, layout) for kind in kinds or [problem] * layout.pipeline]
    chain = chains[0]
    length, p, v = len(chain.shape.kind_at), layout.pipeline, layout.virtual_stages
    m = layout.micro_batches
    if v > 1:
        layers = [i for i, k in enumerate(chain.shape.kind_at) if chain.shape.roles[k] == "layer"]
        if length % (p * v) == 0 and length > p * v:
            inner = list(range(0, length, length // (p * v)))[1:]
        else:
            inner = layers[:: len(layers) // (p * v)][1:]
        cuts_to_try = [tuple(inner)]
    else:
        cuts_to_try = list(itertools.combinations(range(1, length), p - 1))
        if p > 1:  # every stage holds a layer: embedding and head do not stand alone
            cuts_to_try = [c for c in cuts_to_try if c[0] > 1 and c[-1] < length - 1]
    memo: dict[object, tuple[float, float, float] | None] = {}
    best = math.inf
    for inner_cuts in cuts_to_try:
        cuts = (0, *inner_cuts, length)
        stages = []
        for rank in range(p):
            runs = tuple((cuts[c * p + rank], cuts[c * p + rank + 1]) for c in range(v))
            depth = (
                min(m, p - rank) if v == 1 else min(m * v, 2 * (p - rank - 1) + (v - 1) * p + 1) / v
            )
            key = (depth, runs, chains[rank].device.name)
            if key not in memo:
                memo[key] = stage_best(chains[rank], depth, runs)
            stages.append(memo[key])
        if any(stage is None for stage in stages):
            continue
        links = [chain.transfer_seconds(i % p, cuts[i + 1]) for i in range(p * v - 1)]
        if kinds:
            links = [
                transfer_seconds(
                    chain.cut_bytes[cuts[i + 1]],
                    between_nodes=kinds[i] is not kinds[i + 1],
                    cluster=kinds[i].cluster,
                )
                for i in range(p - 1)
            ]
        forward = [s[0] for s in stages if s]
        backward = [s[1] for s in stages if s]
        tail = max(s[2] for s in stages if s)
        if p == 1:
            work = m * (forward[0] + backward[0])
        elif v > 1:
            work = interleaved_seconds(
                [f + b for f, b in zip(forward, backward, strict=True)],
                max(links),
                m,
                v,
                contention=chain.transfer_contention,
            )
        else:
            work = max(
                path.seconds(forward, backward, [*links, 0.0]) for path in critical_paths(p, m)
            )
        best = min(best, work + tail)
    return best


def two_kinds_optimum(problem: Problem) -> float:
    """Least step time over either kind alone, and over both in either order."""
    best = min(optimum(part) for part in problem.parts)
    for first, second in (problem.parts, problem.parts[::-1]):
        for layout in all_layouts(problem):
            size = layout.devices // layout.pipeline
            if first.cluster.devices % size or second.cluster.devices % size:
                continue
            if layout.virtual_stages == 1:
                here = [first] * (first.cluster.devices // size)
                there = [second] * (second.cluster.devices // size)
                best = min(best, layout_best(problem, layout, [*here, *there]))
    return best


def optimum(problem: Problem) -> float:
    """Least step time over everything; inf if nothing fits."""
    return min((layout_best(problem, layout) for layout in all_layouts(problem)), default=math.inf)
