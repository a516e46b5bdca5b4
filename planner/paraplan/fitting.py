"""Whether layouts fit in memory, and what would make them fit."""

from __future__ import annotations

from paraplan.chain import ChainCost
from paraplan.layout import Layout
from paraplan.layouts import Family, enumerate_families
from paraplan.partition import feasible, fixed_cuts, staged
from paraplan.problem import Problem, chain_cost


def lean_layouts(family: Family) -> list[Layout]:
    """The members that need the least memory: of each ZeRO stage the one with most shards.

    Mostly that is ZeRO-3. In stages of few layers, what it gathers and reduces in each
    micro-batch can be more than what the others keep.
    """
    most = {
        stage: (replicate, shard, stage)
        for replicate, shard, stage in sorted(family.splits, key=lambda split: split[1])
    }
    return [family.layout(most[stage]) for stage in sorted(most, reverse=True)]


def any_fits(problem: Problem, family: Family) -> bool:
    """Whether a member of a family stays within the capacity."""
    return any(fits(chain_cost(problem, layout)) for layout in lean_layouts(family))


def fits(chain: ChainCost) -> bool:
    """Whether any cuts and recompute choices of a layout stay within the capacity."""
    cuts = fixed_cuts(chain)
    if cuts is not None:
        return staged(chain, cuts) is not None
    return feasible(chain)


def needed_capacity_bytes(chain: ChainCost) -> float:
    """The smallest capacity of a device at which a layout fits, to 1 MiB."""
    low, high = chain.capacity_bytes, chain.capacity_bytes
    while not fits(chain.with_capacity(high)):
        low, high = high, 2 * high
    while high - low > 2**20:
        middle = (low + high) / 2
        if fits(chain.with_capacity(middle)):
            high = middle
        else:
            low = middle
    return high


def least_needed_bytes(problem: Problem) -> float | None:
    """The smallest capacity at which anything fits; None if no layout is possible at all."""
    best: float | None = None
    chains = (
        chain_cost(problem, layout)
        for family in _lean_families(problem)
        for layout in lean_layouts(family)
    )
    for chain in chains:
        if best is None or fits(chain.with_capacity(best - 2**20)):
            best = needed_capacity_bytes(chain)
    return best


def anything_fits(problem: Problem) -> bool:
    """Whether some layout stays within the capacity."""
    return any(any_fits(problem, family) for family in _lean_families(problem))


def _lean_families(problem: Problem) -> list[Family]:
    """For each mesh and schedule the families that need the least memory.

    Activations in flight are ``min(M, p - s) * m = min(B, (p - s) m)`` for a rank's batch B:
    least with the smallest micro-batch. The largest one (M = 1) keeps no whole gradients under
    ZeRO-1.
    """
    families, _ = enumerate_families(problem.space, problem.constraints)
    ends: dict[object, list[Family]] = {}
    for family in families:
        layout = family.base
        mesh = (
            layout.tensor,
            layout.context,
            layout.expert,
            layout.pipeline,
            layout.sequence_parallel,
            layout.virtual_stages,
        )
        ends.setdefault(mesh, []).append(family)
    lean: list[Family] = []
    for members in ends.values():
        members.sort(key=lambda family: family.base.micro_batch_size)
        lean += members if len(members) < 2 else [members[0], members[-1]]
    return sorted(lean, key=lambda family: (family.base.micro_batch_size, -family.base.tensor))
