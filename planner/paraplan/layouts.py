"""Enumerates the layouts worth costing, in families; `layout_rules` says why others are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import ValidationError

from paraplan.errors import InputError
from paraplan.files import describe_validation_error
from paraplan.layout import Layout, Schedule, too_few_micro_batches
from paraplan.layout_rules import (
    Constraints,
    Space,
    data_reason,
    interleaving_reason,
    kinds_reason,
    mesh_reason,
)


@cache
def divisors(number: int) -> tuple[int, ...]:
    """All divisors, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return tuple(sorted({*small, *(number // d for d in small)}))


def tensor_degrees(devices_per_node: int) -> tuple[int, ...]:
    """Tensor degrees to trace: those whose groups tile a node, up to 16.

    1, 2, 4 and 8 always are, so that clusters of usual nodes share one cached trace.
    """
    return tuple(sorted({1, 2, 4, 8, *(d for d in divisors(devices_per_node) if d <= 16)}))


@dataclass(frozen=True)
class Family:
    """Layouts that differ only in how the data ranks replicate and shard the model state.

    They compute and keep the same activations, so one bound on time and memory serves all.

    Attributes:
        base: the layout with all data ranks replicated.
        splits: (data_replicate, data_shard, zero_stage) of each member.
    """

    base: Layout
    splits: tuple[tuple[int, int, int], ...]

    def layout(self, split: tuple[int, int, int]) -> Layout:
        """The member with this split of the data ranks."""
        replicate, shard, zero_stage = split
        return self.base.model_copy(
            update={"data_replicate": replicate, "data_shard": shard, "zero_stage": zero_stage}
        )


def enumerate_families(space: Space, constraints: Constraints) -> tuple[list[Family], Counter[str]]:
    """All possible layouts in families, and the impossible combinations by reason."""
    excluded: Counter[str] = Counter()
    families = [
        family
        for mesh in _meshes(space, constraints, excluded)
        for family in _fill_mesh(space, constraints, mesh, excluded)
    ]
    return families, excluded


@dataclass(frozen=True)
class _Mesh:
    tensor: int
    context: int
    expert: int
    pipeline: int
    data_ranks: int


def _meshes(space: Space, constraints: Constraints, excluded: Counter[str]) -> Iterator[_Mesh]:
    def degrees(name: str, limit: int, searched: bool = True) -> list[int]:
        if name in constraints.fixed:
            return [constraints.fixed[name]] if limit % constraints.fixed[name] == 0 else []
        return list(divisors(limit)) if searched else [1]

    for pipeline in degrees("pipeline", space.devices):
        for tensor in degrees("tensor", space.devices // pipeline):
            rest = space.devices // pipeline // tensor
            for context in degrees("context", rest, "context" in constraints.allow):
                data_ranks = rest // context
                for expert in degrees("expert", rest, "expert" in constraints.allow):
                    reason = (
                        mesh_reason(space, tensor, context, expert, pipeline)
                        or kinds_reason(space, pipeline)
                        or data_reason(space, data_ranks)
                    )
                    if reason:
                        excluded[reason] += 1
                    else:
                        yield _Mesh(tensor, context, expert, pipeline, data_ranks)


def _fill_mesh(
    space: Space, constraints: Constraints, mesh: _Mesh, excluded: Counter[str]
) -> Iterator[Family]:
    permits = constraints.permits
    splits = tuple(
        (mesh.data_ranks // shard, shard, zero_stage)
        for shard in divisors(mesh.data_ranks)
        if permits("data_shard", shard) and permits("data_replicate", mesh.data_ranks // shard)
        for zero_stage in ((1, 2, 3) if shard > 1 else (0,))
        if permits("zero_stage", zero_stage)
    )
    if not splits:
        return
    per_rank = space.global_batch // mesh.data_ranks
    for size, count, schedule, virtual in _schedules(space, mesh, per_rank, permits, excluded):
        for sequence_parallel in (False, True) if mesh.tensor > 1 else (False,):
            if permits("sequence_parallel", sequence_parallel):
                base = Layout.model_construct(
                    data_replicate=mesh.data_ranks,
                    data_shard=1,
                    tensor=mesh.tensor,
                    context=mesh.context,
                    expert=mesh.expert,
                    pipeline=mesh.pipeline,
                    virtual_stages=virtual,
                    micro_batch_size=size,
                    micro_batches=count,
                    schedule=schedule,
                    sequence_parallel=sequence_parallel,
                    zero_stage=0,
                )
                yield Family(base, splits)


def _schedules(
    space: Space,
    mesh: _Mesh,
    per_rank: int,
    permits: Callable[[str, object], bool],
    excluded: Counter[str],
) -> Iterator[tuple[int, int, Schedule, int]]:
    """Micro-batch size and number, schedule and virtual stages that go with a mesh."""
    virtuals = _virtual_stage_counts(space.blocks, space.layers, space.plain, mesh.pipeline)
    if space.kinds:
        virtuals = ()
    for size in divisors(per_rank):
        count = per_rank // size
        if not (permits("micro_batch_size", size) and permits("micro_batches", count)):
            continue
        if mesh.pipeline == 1:
            if permits("schedule", "none") and permits("virtual_stages", 1):
                yield size, count, "none", 1
            continue
        if count < mesh.pipeline:
            excluded[too_few_micro_batches(mesh.pipeline)] += 1
            continue
        if permits("schedule", "1f1b") and permits("virtual_stages", 1):
            yield size, count, "1f1b", 1
        if not permits("schedule", "interleaved-1f1b"):
            continue
        for virtual in virtuals:
            if not permits("virtual_stages", virtual):
                continue
            if count % mesh.pipeline:
                excluded[interleaving_reason(mesh.pipeline)] += 1
            else:
                yield size, count, "interleaved-1f1b", virtual


@cache
def _virtual_stage_counts(blocks: int, layers: int, plain: bool, pipeline: int) -> tuple[int, ...]:
    """The virtual-stage counts whose chunks are equal (the rule of `interleaved_chunks`)."""
    counts = range(2, layers // pipeline + 1)
    return tuple(
        v
        for v in counts
        if (plain and blocks % (pipeline * v) == 0 and blocks > pipeline * v)
        or layers % (pipeline * v) == 0
    )


def layout_from_fixed(fixed: Mapping[str, Any], *, global_batch: int) -> Layout:
    """The layout that ``plan estimate`` is asked about; what is left out follows or is 1.

    ``data_shard`` above 1 means ``zero_stage`` 3, ``pipeline`` above 1 means ``1f1b``, or
    interleaved with ``virtual_stages``; ``micro_batches`` follows from the global batch.

    Raises:
        InputError: the fields contradict each other.
    """
    values = dict(fixed)
    data_ranks = values.get("data_replicate", 1) * values.get("data_shard", 1)
    if values.get("data_shard", 1) > 1:
        values.setdefault("zero_stage", 3)
    if values.get("pipeline", 1) > 1:
        interleaved = values.get("virtual_stages", 1) > 1
        values.setdefault("schedule", "interleaved-1f1b" if interleaved else "1f1b")
    if "micro_batches" not in values:
        size = values.get("micro_batch_size", 1)
        values["micro_batches"] = max(1, global_batch // (data_ranks * size))
    elif "micro_batch_size" not in values:
        count = values["micro_batches"]
        values["micro_batch_size"] = max(1, global_batch // (data_ranks * count))
    try:
        return Layout.model_validate(values)
    except ValidationError as error:
        raise InputError(f"--fix {describe_validation_error(error)}") from None
