"""Device time of one op: measured, interpolated between measured ones, or modelled.

The model is a roofline with the few effects that decide between layouts:

  any kernel        floor + max(work at the achieved rate, bytes / achieved bandwidth)
  matrix product    waves of tiles over the multiprocessors, each of (k + prologue_k) K elements;
                    the prologue takes as long in narrower dtypes as in 16 bits;
                    a partly filled last wave costs ``wave_loss`` of what it leaves idle; fewer
                    tiles than multiprocessors split K (`_gemm_seconds`)
  attention         FLOPs of whole tiles at the implementation's rate; at least the longest row
                    of tiles on one multiprocessor (`_attention_seconds`)

The parameters are in the device's profile; how they were fitted, and how well, is in
docs/profiles.md. All of it is never faster than the peak rates.
"""

from __future__ import annotations

from math import ceil, gcd
from typing import Literal, NamedTuple

from paraplan.device import Device, DtypeRates, Rates
from paraplan.errors import InputError
from paraplan.graph import Op, attention_flops, attention_pairs
from paraplan.op_table import ANY_NAME, MeasuredTable, key

ALIGNMENT = 8
"""Elements of 2 bytes that a load brings at once. Inner sizes that are no multiple of it are read
in narrower loads, of the largest power of two that divides them (bloom's heads of 150 and 225)."""

LEAST_SPLIT_K = 512  # K elements of one part of a split product (a few of the K loop's steps)
SPLIT_BYTES = 8  # each part writes its fp32 partial sum, the last pass reads it


class OpTime(NamedTuple):
    """Seconds of one call and what they rest on."""

    seconds: float
    basis: Literal["measured", "interpolated", "modelled"]


def op_seconds(op: Op, sequences: float, device: Device) -> OpTime:
    """Device time of one call of ``op`` for ``sequences`` sequences.

    Raises:
        InputError: the device does not compute in the op's dtype.
    """
    rates = device.rates
    read, write = op.read_bytes, op.write_bytes
    size = read[0] + write[0] + (read[1] + write[1]) * sequences
    if op.kind == "memory":
        if device.measured is not None:
            found = _measured_memory(op, size, device.measured, rates)
            if found is not None:
                return found
        return OpTime(rates.floor + size / rates.memory, "modelled")
    dims = [fixed + slope * sequences for fixed, slope in op.dims]
    dtype = rates.dtypes.get(op.dtype)
    if dtype is None:
        raise InputError(f"{device.name} has no figures for {op.dtype} ({op.name})")
    if device.measured is not None:
        found = _measured_compute(op, dims, device.measured, rates, size)
        if found is not None:
            return found
    if op.kind == "attention":
        work = _attention_seconds(op, dims, rates, dtype)
    elif op.kind == "grouped_gemm":
        work = _gemm_seconds(dims[0], dims[1] / dims[0], dims[2], dims[3], rates, dtype)
    else:
        work = _gemm_seconds(dims[0], dims[1], dims[2], dims[3], rates, dtype)
    return OpTime(rates.floor + max(work, size / rates.memory), "modelled")


def optimizer_seconds(bytes_moved: float, device: Device) -> float:
    """Device time of a fused optimizer update that reads and writes ``bytes_moved``."""
    return bytes_moved / device.rates.optimizer


def _gemm_seconds(
    batch: float, m: float, n: float, k: float, rates: Rates, dtype: DtypeRates
) -> float:
    """Products of (m, k) by (k, n) with the best tile.

    A product with fewer tiles than multiprocessors is split along K, at the price of writing
    and reading the partial sums, as cuBLAS and hipBLASLt do.
    """
    processors, prologue = rates.multiprocessors, dtype.prologue_k
    aligned = _alignment(n, k)
    best = float("inf")
    for rows, columns, seconds_per_k in dtype.tiles:
        tiles = batch * ceil(m / rows) * ceil(n / columns)
        if tiles <= processors:
            seconds = (k + prologue) * seconds_per_k
            parts = min(processors // tiles, k // LEAST_SPLIT_K)
            if parts > 1:
                sums = parts * batch * m * n * SPLIT_BYTES / rates.memory
                seconds = min(seconds, (k / parts + prologue) * seconds_per_k + sums)
        else:
            waves = tiles / processors
            waves += rates.wave_loss * (ceil(waves) - waves)
            seconds = waves * (k + prologue) * seconds_per_k
        if seconds < best:
            best = seconds
    return best / aligned


def _alignment(n: float, k: float) -> float:
    """Share of the full width at which operands of these inner sizes can be loaded."""
    if n % ALIGNMENT == 0 == k % ALIGNMENT:
        return 1.0
    return gcd(int(n), int(k), ALIGNMENT) / ALIGNMENT


def _attention_seconds(op: Op, dims: list[float], rates: Rates, dtype: DtypeRates) -> float:
    """Fused attention, forward or backward (2.5 times the forward's products, see graph.py).

    Rows of tiles are spread over the multiprocessors; with few of them (small batches, heads
    divided by tensor parallelism) the longest row decides.
    """
    batch, heads, _, query_length, key_length, head_dim, value_dim = dims
    kernel, processors = rates.attention, rates.multiprocessors
    tile = kernel.tile
    pairs = attention_pairs(query_length, key_length, causal=op.causal, window=op.window)
    # Each masked edge costs half a tile for every query; the last row of tiles is padded.
    edges = 0.5 * tile * (op.causal + (op.causal and op.window is not None))
    keys = pairs / query_length + edges + kernel.prologue
    blocks = batch * heads * ceil(query_length / tile)
    if op.causal:
        longest = min(key_length, op.window or key_length) + edges + kernel.prologue
        work = max(blocks * keys / processors, longest)
    else:
        work = ceil(blocks / processors) * keys
    share = kernel.efficiency(head_dim, op.phase) * (kernel.causal if op.causal else 1.0)
    flops_per_key = 2.0 * tile * (head_dim + value_dim) * (1.0 if op.phase == "forward" else 2.5)
    return work * flops_per_key * processors / (dtype.peak * share)


def _measured_memory(op: Op, size: float, table: MeasuredTable, rates: Rates) -> OpTime | None:
    for name in (op.name, ANY_NAME):
        seconds = table.exact.get(key("memory", name, op.phase, op.dtype, (size,), False, None))
        if seconds is not None:
            return OpTime(seconds, "measured")
        curve = table.memory.get((name, op.dtype))
        rate = curve.at(size) if curve is not None and size > 0 else None
        if rate is not None:
            return OpTime(max(size / rate, size / rates.peak_memory), "interpolated")
    return None


def _measured_compute(
    op: Op, dims: list[float], table: MeasuredTable, rates: Rates, size: float
) -> OpTime | None:
    seconds = table.exact.get(key(op.kind, op.name, op.phase, op.dtype, dims, op.causal, op.window))
    if seconds is not None:
        return OpTime(seconds, "measured")
    rate = None
    if op.kind == "gemm" and dims[0] == 1 and op.dtype in table.grids:
        flops = 2.0 * dims[1] * dims[2] * dims[3]
        rate = table.grids[op.dtype].rate(dims[1], dims[2], dims[3])
    elif op.kind == "attention" and op.window is None and dims[3] == dims[4]:
        rate = table.attention_rate(op.phase, op.dtype, op.causal, dims[5], dims[4])
        flops = attention_flops(dims, causal=op.causal, window=None, phase=op.phase)
    if rate is None:
        return None
    peak = rates.dtypes[op.dtype].peak
    return OpTime(max(flops / min(rate, peak), size / rates.peak_memory), "interpolated")
