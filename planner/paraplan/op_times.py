"""Device time of one op: measured, interpolated between measured ones, or modelled.

The model is a roofline with the few effects that decide between layouts: output tiles are
worked off in whole waves, each tile has a fixed cost beside its K loop, and every kernel has a
floor. Its parameters are in the device's profile; how they were fitted is in docs/profiles.md.
"""

from __future__ import annotations

from math import ceil
from typing import Literal, NamedTuple

from paraplan.device import Device
from paraplan.graph import Op, attention_pairs


class OpTime(NamedTuple):
    """Seconds of one call and what they rest on."""

    seconds: float
    basis: Literal["measured", "interpolated", "modelled"]


def op_seconds(op: Op, sequences: float, device: Device) -> OpTime:
    """Device time of one call of ``op`` for ``sequences`` sequences."""
    size_bytes = op.read_bytes.at(sequences) + op.write_bytes.at(sequences)
    memory = _memory_seconds(size_bytes, device)
    if op.kind == "memory":
        return OpTime(memory, "modelled")
    dims = [dim.at(sequences) for dim in op.dims]
    if op.kind == "attention":
        return OpTime(max(memory, _attention_seconds(op, dims, device)), "modelled")
    count, m, n, k = dims
    if op.kind == "grouped_gemm":
        m /= count
    return OpTime(max(memory, _gemm_seconds(count, m, n, k, op.dtype, device)), "modelled")


def _memory_seconds(size_bytes: float, device: Device) -> float:
    rate = device.memory_bandwidth_bytes_per_second.value * device.memory_efficiency.value
    return max(
        device.kernel_floor_seconds.value,
        (size_bytes + device.memory_half_bytes.value) / rate,
    )


def _gemm_seconds(
    batch: float, m: float, n: float, k: float, dtype: str, device: Device
) -> float:
    gemm = device.gemm
    peak = device.peak_flops_per_second[dtype].value * gemm.efficiency[dtype].value
    rows, columns = gemm.tile_rows.value, gemm.tile_columns.value
    tiles = batch * ceil(m / rows) * ceil(n / columns)
    waves = ceil(tiles / device.multiprocessors.value)
    flops = 2 * rows * columns * (k + gemm.prologue_k.value)
    return waves * device.multiprocessors.value * flops / peak


def _attention_seconds(op: Op, dims: list[float], device: Device) -> float:
    batch, heads, _, query_length, key_length, head_dim, value_dim = dims
    pairs = attention_pairs(query_length, key_length, causal=op.causal, window=op.window)
    flops = 2.0 * batch * heads * pairs * (head_dim + value_dim)
    rate = device.attention.rates[0]
    peak = device.peak_flops_per_second[op.dtype].value
    if op.phase == "backward":
        return 2.5 * flops / (peak * rate.backward_efficiency.value)
    return flops / (peak * rate.forward_efficiency.value)


def optimizer_seconds(bytes_moved: float, device: Device) -> float:
    """Device time of an optimizer step that reads and writes ``bytes_moved``."""
    rate = device.memory_bandwidth_bytes_per_second.value * device.optimizer_efficiency.value
    return bytes_moved / rate
