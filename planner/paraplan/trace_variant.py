"""From traced parts to block variants: amounts, saved activations, recomputation, exchanges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from paraplan.graph import (
    RECOMPUTE_MODES,
    Amount,
    BlockVariant,
    Collective,
    Op,
    Recompute,
    Saved,
)
from paraplan.trace_kernels import Kernel
from paraplan.trace_parts import Part, RoleCall
from paraplan.trace_record import Call, Phase

Place = tuple[str, int, int]
"""Where a storage comes from: ("call", which call first wrote it, which result) or an input."""


@dataclass(frozen=True)
class Traced:
    """One part at one tensor degree, and at degree 1 for comparison.

    Attributes:
        one, two: at micro-batch 1 and 2.
        whole: at degree 1 and micro-batch 2.
    """

    one: Part
    two: Part
    whole: Part


def amount(one: int, two: int) -> Amount:
    """The size whose values are ``one`` for one sequence and ``two`` for two.

    Where there is no such size (less than twice as much would leave a negative fixed part) it is
    proportional and no smaller than either.
    """
    slope = two - one
    if slope < 0:
        return Amount(one, 0)
    if slope > one:
        return Amount(0, max(one, -(-two // 2)))
    return Amount(one - slope, slope)


def aligned(calls: list[Call], base: list[Call]) -> list[int | None]:
    """For each of ``calls``, its place in ``base``: the same kernels but for a few copies."""
    names = [(c.name, c.phase) for c in calls]
    wanted = [(c.name, c.phase) for c in base]
    if names == wanted:
        return list(range(len(names)))
    places: list[int | None] = [None] * len(names)
    matcher = SequenceMatcher(None, names, wanted, autojunk=False)
    for start, there, length in matcher.get_matching_blocks():
        for k in range(length):
            places[start + k] = there + k
    return places


def places_of(part: Part, order: list[int | None]) -> dict[int, Place]:
    """Storage -> where it comes from, calls counted by their place in ``order``."""
    places: dict[int, Place] = {n: ("input", i, 0) for i, n in enumerate(part.inputs)}
    for call, at in zip(part.log.calls, order, strict=True):
        if at is not None:
            for index, number in enumerate(call.writes):
                if number in part.log.births:
                    places.setdefault(number, ("call", at, index))
    return places


def sizes_by_place(part: Part, order: list[int | None]) -> dict[Place, int]:
    """Bytes of each storage that calls of ``part`` read or write, by where it comes from."""
    sizes = part.log.births | part.inputs
    return {place: sizes[number] for number, place in places_of(part, order).items()}


def saved_storages(part: Part) -> set[int]:
    """What autograd keeps from forward to backward, each storage once.

    That is what is still alive when the forward has ended, without results that only later
    parts read; and of the inputs what the backward reads (solver notes, section 3.1: equal to
    ``saved_tensors_hooks``).
    """
    read = part.log.read_by("backward")
    alive = set(part.log.alive_after_forward())
    dropped = {n for n in part.outputs if n not in read}
    inputs = {n for n in part.inputs if n in read and n not in part.shared_inputs}
    return (alive - dropped) | part.kept_outputs | inputs


def rebuilding(
    part: Part, wanted: Collection[int], *, keep_products: bool
) -> tuple[set[int], set[int]]:
    """What must run again to have the storages ``wanted`` back.

    Args:
        keep_products: results of matrix products and attention are kept, not rebuilt.

    Returns:
        Indices of the forward calls that run again, and the storages kept for it.
    """
    writers: dict[int, list[int]] = {}
    calls = part.log.calls
    for index, call in enumerate(calls):
        if call.phase == "forward":
            for number in call.writes:
                writers.setdefault(number, []).append(index)
    rerun: set[int] = set()
    kept: set[int] = set()
    seen: set[int] = set()
    stack = [n for n in wanted if n in writers]
    while stack:
        number = stack.pop()
        if number in seen:
            continue
        seen.add(number)
        if keep_products and any(calls[i].kernel.kind != "memory" for i in writers[number]):
            kept.add(number)
            continue
        for index in writers[number]:
            rerun.add(index)
            stack.extend(n for n in calls[index].reads if n in writers)
    return rerun, kept


def _partial_sums(part: Part) -> set[int]:
    """Products that tensor ranks have yet to add up: whole on each, whatever becomes of the sum."""
    return {call.output_number for call in part.role_calls if call.role == "row"} & _products(part)


def _products(part: Part) -> set[int]:
    """Results of matrix products and attention in the forward."""
    return {
        number
        for call in part.log.calls
        if call.phase == "forward" and call.kernel.kind != "memory"
        for number in call.writes
        if number in part.log.births
    }


def peak_amounts(traced: Traced) -> tuple[Amount, ...]:
    """Bytes alive at each moment that is the peak at some micro-batch size, parameters left out."""
    one, two = list(live_bytes(traced.one)), list(live_bytes(traced.two))
    if len(one) != len(two):
        return (amount(max(one), max(two)),)
    moments = {amount(*pair) for pair in zip(one, two, strict=True)}
    kept: list[Amount] = []
    for moment in sorted(moments, key=lambda m: (m.per_sequence, m.fixed), reverse=True):
        if not kept or moment.fixed > kept[-1].fixed:
            kept.append(moment)
    return tuple(kept)


def live_bytes(part: Part) -> Iterator[int]:
    """Bytes alive after each allocation and release, parameters left out."""
    log = part.log
    saved = saved_storages(part)
    ignored: set[int] = set()
    live = sum(size for n, size in part.inputs.items() if n in saved)
    yield live
    for index, (number, change) in enumerate(log.events):
        if index == log.forward_events:  # results now belong to the parts that read them
            gone = {n for n in part.outputs if n in log.births} - saved
            live -= sum(log.births[n] for n in gone)
            ignored |= gone
        if number not in ignored:
            live += change
            yield live


def block_variant(
    traced: Traced, *, layer: bool, degree: int, owned: Collection[str]
) -> BlockVariant:
    """The block at one tensor degree.

    Args:
        layer: layers may be recomputed; the other parts keep the same in every mode.
        owned: names of the part's parameters that no earlier part owns.
    """
    two = traced.two
    saved = saved_storages(two)
    modes: dict[Recompute, set[int]] = {mode: saved for mode in RECOMPUTE_MODES}
    reruns: dict[Recompute, set[int]] = {mode: set() for mode in RECOMPUTE_MODES}
    if layer:
        bounds = {n for n in two.inputs if n not in two.shared_inputs} | two.kept_outputs
        inner = saved - bounds
        reruns["full"], _ = rebuilding(two, inner, keep_products=False)
        reruns["selective"], kept = rebuilding(two, inner, keep_products=True)
        # torch keeps every product's result, whether or not it is wanted again.
        modes["selective"], modes["full"] = kept | _products(two) | bounds, bounds
    expert = {
        two.parameter_numbers[n]
        for call in two.log.calls
        if call.kernel.kind == "grouped_gemm"
        for n in call.reads
        if n in two.parameter_numbers
    }
    return BlockVariant(
        ops=_ops(traced, reruns, degree),
        parameters=sum(two.parameters[name] for name in owned),
        frozen_parameters=sum(two.parameters[name] for name in owned if name in two.frozen),
        trained_tensors=sum(name not in two.frozen for name in owned),
        expert_parameters=sum(two.parameters[name] for name in owned if name in expert),
        saved={
            mode: _saved(traced, numbers, _partial_sums(two) if mode == "selective" else set())
            for mode, numbers in modes.items()
        },
        peak_bytes=peak_amounts(traced),
        collectives=_collectives(traced) if degree > 1 else (),
        expert_dispatch_bytes=_dispatch(traced),
    )


def _ops(traced: Traced, reruns: dict[Recompute, set[int]], degree: int) -> tuple[Op, ...]:
    """Calls with their sizes as amounts; equal ones are counted."""
    base = traced.two.log.calls
    single = _by_place(traced.one.log.calls, base)
    whole = _by_place(traced.whole.log.calls, base)
    counted: Counter[Any] = Counter()
    for index, call in enumerate(base):
        one = single[index].kernel if index in single else None
        counted[
            call.name,
            call.phase,
            call.kernel,
            one,
            _replicated(call, whole.get(index)) if degree > 1 else False,
            tuple(mode for mode in RECOMPUTE_MODES if index in reruns[mode]),
        ] += 1
    return tuple(_op(*key, count=count) for key, count in counted.items())


def _oriented(dims: tuple[int, ...], two: Kernel) -> tuple[int, ...]:
    """``dims`` of a product, transposed if that is how they grow into those of ``two``.

    torch may compute (B^T A^T)^T for A B, whichever suits the memory layout, which for one
    sequence can be another than for two.
    """
    if two.kind != "gemm":
        return dims
    batch, m, n, k = dims
    turned = (batch, n, m, k)
    grows = [all(b in (a, 2 * a) for a, b in zip(d, two.dims, strict=True)) for d in (dims, turned)]
    return turned if grows == [False, True] else dims


def _replicated(call: Call, whole: Call | None) -> bool:
    """The same work as without tensor parallelism, on tokens that sequence parallelism splits.

    Experts work on gathered tokens: what each rank does whole there stays whole.
    """
    return whole is not None and whole.kernel == call.kernel and not call.marked


def _op(
    name: str,
    phase: Phase,
    two: Kernel,
    one: Kernel | None,
    replicated: bool,
    reruns: tuple[Recompute, ...],
    *,
    count: int,
) -> Op:
    """An op from its kernels at micro-batch 1 and 2.

    A kernel that only runs from 2 on (a copy that one sequence does not need) is taken as
    proportional.
    """
    at_two = (*two.dims, two.read_bytes, two.write_bytes)
    at_one = (
        [-(-n // 2) for n in at_two]
        if one is None
        else (*_oriented(one.dims, two), one.read_bytes, one.write_bytes)
    )
    *dims, read, write = (amount(n, m) for n, m in zip(at_one, at_two, strict=True))
    return Op(
        name=name,
        kind=two.kind,
        phase=phase,
        dtype=two.dtype,
        count=count,
        dims=tuple(dims),
        read_bytes=read,
        write_bytes=write,
        causal=two.causal,
        window=two.window,
        replicated=replicated,
        expert=two.kind == "grouped_gemm",
        reruns=reruns,
    )


def _by_place(calls: list[Call], base: list[Call]) -> dict[int, Call]:
    """The call of ``calls`` that stands for each place in ``base``."""
    order = aligned(calls, base)
    return {at: call for at, call in zip(order, calls, strict=True) if at is not None}


def _saved(traced: Traced, numbers: set[int], partial_sums: set[int]) -> Saved:
    two = traced.two
    base = two.log.calls
    own = list(range(len(base)))
    single = sizes_by_place(traced.one, aligned(traced.one.log.calls, base))
    whole = sizes_by_place(traced.whole, aligned(traced.whole.log.calls, base))
    places = places_of(two, list(own))
    sizes = two.log.births | two.inputs
    gathered = partial_sums | {c.input_number for c in two.role_calls if c.role in _COLUMNS}
    gathered |= {n for call in base if call.marked for n in call.writes}
    sums = {"sharded": [0, 0], "replicated": [0, 0], "gathered": [0, 0]}
    for number in numbers:
        size = sizes[number]
        place = places.get(number)
        if place is None or whole.get(place, 0) != size:
            part = "sharded"
        else:
            part = "gathered" if number in gathered else "replicated"
        sums[part][0] += single.get(place, -(-size // 2)) if place else -(-size // 2)
        sums[part][1] += size
    return Saved(**{name: amount(one, two_) for name, (one, two_) in sums.items()})


_COLUMNS = ("column", "experts", "vocabulary_head")
_ROWS = ("row", "experts", "vocabulary_embedding")


def _collectives(traced: Traced) -> tuple[Collective, ...]:
    """Sums of row outputs going forward, of column inputs' gradients going back."""
    made: list[Collective] = []
    seen: set[int] = set()
    for one, two in zip(traced.one.role_calls, traced.two.role_calls, strict=True):
        if two.role in _ROWS:
            made.append(_collective("output", one, two))
        if two.role in _COLUMNS and two.input_number not in seen:
            seen.add(two.input_number)
            made.append(_collective("input", one, two))
    return tuple(made)


def _collective(side: str, one: RoleCall, two: RoleCall) -> Collective:
    if side == "output":
        message = amount(one.output_bytes, two.output_bytes)
        return Collective(phase="forward", message_bytes=message)
    return Collective(phase="backward", message_bytes=amount(one.input_bytes, two.input_bytes))


def _dispatch(traced: Traced) -> Amount:
    """Bytes of the rows that the experts' first product takes."""
    sizes = []
    for part in (traced.one, traced.two):
        first = next((c.kernel for c in part.log.calls if c.kernel.kind == "grouped_gemm"), None)
        if first is None:
            return Amount()
        _, rows, _, inner = first.dims
        sizes.append(rows * inner * _ITEM_BYTES[first.dtype])
    return amount(sizes[0], sizes[1])


_ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
