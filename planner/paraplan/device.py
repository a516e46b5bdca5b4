"""One accelerator: its peak rates, its memory, and how much of both real kernels reach.

Profiles are files (``profiles/paraplan_profiles/devices/*.toml``, or the user's own in TOML or
JSON); ``docs/profiles.md`` describes every field. Pure data: no torch, no device is touched.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from paraplan.errors import InputError
from paraplan.files import describe_validation_error
from paraplan.graph import attention_flops
from paraplan.op_table import Dtype, MeasuredOp, MeasuredTable, make_table
from paraplan.profile_types import (
    Figure,
    Fraction,
    Frozen,
    Positive,
    Share,
    Whole,
    content_sha256,
    read_profile,
    shipped_names,
)

ALIASES = {
    "a100": "a100-80gb-sxm",
    "a100-40gb": "a100-40gb-sxm",
    "a100-80gb": "a100-80gb-sxm",
    "a100-sxm": "a100-80gb-sxm",
    "h100": "h100-sxm",
    "h100-80gb": "h100-sxm",
    "h200-sxm": "h200",
    "b200-sxm": "b200",
    "mi250x": "mi250",
    "4090": "rtx-4090",
    "rtx4090": "rtx-4090",
}
"""Short names of shipped devices."""

Size = Annotated[int, Field(ge=1, le=65536, strict=True)]


class Tile(Frozen):
    """An output tile that one multiprocessor computes at a time.

    Attributes:
        rows, columns: of the product's output.
        relative_rate: share of the best tile's rate that a long K loop reaches in this one.
    """

    rows: Size
    columns: Size
    relative_rate: Fraction


class Gemm(Frozen):
    """How matrix products run: tiles worked off in waves by the multiprocessors.

    Attributes:
        efficiency: by dtype, share of the dense peak that the best tile reaches for long K.
        sustained: by dtype, share of the rate alone that products keep in whole training steps,
            where power, clocks and caches are shared; 1 where it is missing.
        prologue_k: extra K elements each tile costs in 16 bits (filling the pipeline, writing
            out). It takes as long in narrower dtypes, in which it is as many elements more as
            their peak is higher.
        wave_loss: share of a partly filled last wave of tiles that is lost; less than 1 because
            libraries have more tile shapes than are listed, and split the last wave's work.
        tiles: the kernels' choices; the fastest is taken.
    """

    efficiency: Annotated[dict[Dtype, Fraction], Field(min_length=1)]
    sustained: dict[Dtype, Fraction] = Field(default_factory=dict)
    prologue_k: Figure
    wave_loss: Share
    tiles: Annotated[tuple[Tile, ...], Field(min_length=1, max_length=8)]


class AttentionRate(Frozen):
    """Fused attention at one head size.

    Attributes:
        forward_efficiency, backward_efficiency: share of the dense peak for long sequences
            without a mask.
    """

    head_size: Size
    forward_efficiency: Fraction
    backward_efficiency: Fraction


class Attention(Frozen):
    """One implementation of fused attention.

    Attributes:
        implementation: such as ``flash-attention-2``.
        tile_rows: queries of one tile; a mask's edge wastes half a tile of keys.
        prologue_keys: extra keys that each row of tiles costs.
        causal_efficiency: share of the unmasked rate that a causal mask leaves, beyond the
            half tiles: uneven rows and the masking itself.
        rates: by rising head size; between two, efficiencies are interpolated.
    """

    implementation: Annotated[str, Field(min_length=1)]
    tile_rows: Size
    prologue_keys: Figure
    causal_efficiency: Fraction
    rates: Annotated[tuple[AttentionRate, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _rising(self) -> Self:
        sizes = [rate.head_size for rate in self.rates]
        if sizes != sorted(set(sizes)):
            raise ValueError("rates must have rising head_size")
        return self


@dataclass(frozen=True, slots=True)
class DtypeRates:
    """One dtype's figures as plain numbers, made once for `op_times`.

    Attributes:
        peak: dense FLOP/s.
        sustained: share of the rate alone that products keep in whole steps.
        prologue_k: extra K elements of each tile.
        tiles: (rows, columns, seconds of one K element of that tile on one multiprocessor).
    """

    peak: float
    sustained: float
    prologue_k: float
    tiles: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True, slots=True)
class AttentionRates:
    """The first attention implementation's figures as plain numbers.

    Attributes:
        forward, backward: (head size, efficiency) by rising head size.
    """

    tile: float
    prologue: float
    causal: float
    forward: tuple[tuple[float, float], ...]
    backward: tuple[tuple[float, float], ...]

    def efficiency(self, head_size: float, phase: str) -> float:
        """Share of the dense peak at ``head_size``; beyond the ends that of the nearest."""
        points = self.forward if phase == "forward" else self.backward
        low, first = points[0]
        if head_size <= low:
            return first
        for high, second in points:
            if head_size == high:
                return second
            if head_size < high:
                return first + (second - first) * (head_size - low) / (high - low)
            low, first = high, second
        return first


@dataclass(frozen=True, slots=True)
class Rates:
    """A device's figures as plain numbers, made once for `op_times`.

    Attributes:
        floor: seconds that any kernel takes beside its work.
        memory, peak_memory: bytes per second, achieved and peak.
        optimizer: bytes per second of the optimizer's update.
        whole_layer: seconds of whole layers over those of their ops alone.
        lag: by what share kernels take longer where ranks wait for the slowest.
        ranks_per_core: processes that share one; 1 where each has its own.
        unshared_speedup: how much faster a rank computes while those it shares with wait.
        update, sharded_update: the host's seconds for each parameter the optimizer updates.
        full_recompute, selective_recompute: its seconds for each op of the forward of a layer that
            recomputes, beside running it again.
        local: its seconds for each parameter that tensor ranks share, in each micro-batch.
        hooks, reduce: its seconds for each group of FSDP2's, in each micro-batch, and in each
            whose gradients are reduced.
    """

    floor: float
    memory: float
    peak_memory: float
    optimizer: float
    multiprocessors: float
    wave_loss: float
    attention: AttentionRates
    dtypes: dict[str, DtypeRates]
    whole_layer: float
    lag: float
    ranks_per_core: float
    unshared_speedup: float
    update: float
    sharded_update: float
    full_recompute: float
    selective_recompute: float
    local: float
    hooks: float
    reduce: float


def _value(figure: Figure | None, default: float) -> float:
    return default if figure is None else figure.value


class Device(Frozen):
    """One accelerator; see ``docs/profiles.md`` for each field's meaning and unit."""

    format: Literal[1] = 1
    name: Annotated[str, Field(min_length=1, max_length=100)]
    description: str
    kind: Literal["cuda", "rocm", "cpu"]
    default_cluster: str | None = None
    memory_capacity_bytes: Positive
    memory_bandwidth_bytes_per_second: Positive
    memory_efficiency: Fraction
    kernel_floor_seconds: Figure
    host_launch_seconds: Figure
    multiprocessors: Whole
    peak_flops_per_second: Annotated[dict[Dtype, Positive], Field(min_length=1)]
    gemm: Gemm
    attention: Annotated[tuple[Attention, ...], Field(min_length=1)]
    optimizer_efficiency: Fraction
    overlap_contention: Share
    overlap_contention_floor: Share
    framework_memory_bytes: Figure
    communicator_memory_bytes: Figure
    fragmentation_fraction: Figure
    power_watts: Positive | None = None
    price_per_device_hour: Figure | None = None
    whole_layer_scale: Positive | None = None
    lag_fraction: Figure | None = None
    ranks_per_core: Positive | None = None
    unshared_speedup: Positive | None = None
    host_update_seconds: Figure | None = None
    host_sharded_update_seconds: Figure | None = None
    host_full_recompute_seconds: Figure | None = None
    host_selective_recompute_seconds: Figure | None = None
    host_local_seconds: Figure | None = None
    host_hooks_seconds: Figure | None = None
    host_reduce_seconds: Figure | None = None
    ops: tuple[MeasuredOp, ...] = ()

    @model_validator(mode="after")
    def _same_dtypes(self) -> Self:
        odd = set(self.peak_flops_per_second) ^ set(self.gemm.efficiency)
        if odd:
            raise ValueError(
                "peak_flops_per_second and gemm.efficiency must name the same dtypes, "
                f"{', '.join(sorted(odd))} stands in one of them"
            )
        return self

    @cached_property
    def sha256(self) -> str:
        """Hash of the content."""
        return content_sha256(self)

    @cached_property
    def rates(self) -> Rates:
        """The figures as plain numbers."""
        memory = self.memory_bandwidth_bytes_per_second.value
        shared = _value(self.ranks_per_core, 1.0)
        update = _value(self.host_update_seconds, 0.0)
        return Rates(
            floor=self.kernel_floor_seconds.value,
            memory=memory * self.memory_efficiency.value,
            peak_memory=memory,
            optimizer=memory * self.optimizer_efficiency.value,
            multiprocessors=self.multiprocessors.value,
            wave_loss=self.gemm.wave_loss.value,
            attention=self._attention_rates(),
            dtypes={dtype: self._dtype_rates(dtype) for dtype in self.gemm.efficiency},
            whole_layer=_value(self.whole_layer_scale, 1.0),
            lag=_value(self.lag_fraction, 0.0),
            ranks_per_core=shared,
            unshared_speedup=_value(self.unshared_speedup, shared),
            update=update,
            sharded_update=_value(self.host_sharded_update_seconds, update),
            full_recompute=_value(self.host_full_recompute_seconds, 0.0),
            selective_recompute=_value(self.host_selective_recompute_seconds, 0.0),
            local=_value(self.host_local_seconds, 0.0),
            hooks=_value(self.host_hooks_seconds, 0.0),
            reduce=_value(self.host_reduce_seconds, 0.0),
        )

    def _attention_rates(self) -> AttentionRates:
        kernel = self.attention[0]
        return AttentionRates(
            tile=float(kernel.tile_rows),
            prologue=kernel.prologue_keys.value,
            causal=kernel.causal_efficiency.value,
            forward=tuple((float(r.head_size), r.forward_efficiency.value) for r in kernel.rates),
            backward=tuple((float(r.head_size), r.backward_efficiency.value) for r in kernel.rates),
        )

    def _dtype_rates(self, dtype: Dtype) -> DtypeRates:
        peak = self.peak_flops_per_second[dtype].value
        share = peak * self.gemm.efficiency[dtype].value / self.multiprocessors.value
        tiles = tuple(
            (
                float(tile.rows),
                float(tile.columns),
                2.0 * tile.rows * tile.columns / (share * tile.relative_rate.value),
            )
            for tile in self.gemm.tiles
        )
        kept = self.gemm.sustained.get(dtype)
        wide = self.peak_flops_per_second.get("bfloat16")
        faster = 1.0 if wide is None else max(1.0, peak / wide.value)
        prologue_k = faster * self.gemm.prologue_k.value
        return DtypeRates(peak, 1.0 if kept is None else kept.value, prologue_k, tiles)

    @cached_property
    def measured(self) -> MeasuredTable | None:
        """The measured ops, indexed; None where there are none."""
        flops = {}
        for position, op in enumerate(self.ops):
            if op.kind == "attention" and len(op.dims) == 7:
                flops[position] = attention_flops(
                    op.dims, causal=op.causal, window=op.window, phase=op.phase
                )
        return make_table(self.ops, flops) if self.ops else None

    def with_memory(self, memory_capacity_bytes: Figure) -> Device:
        """A copy with another memory capacity."""
        return self._copy({"memory_capacity_bytes": memory_capacity_bytes})

    def with_rates_scaled(self, *, compute: float, memory_bandwidth: float) -> Device:
        """A copy whose FLOP/s and memory bandwidth, and measured ops with them, are scaled."""
        peaks = {
            dtype: peak.scaled(compute, f"times {compute:g}")
            for dtype, peak in self.peak_flops_per_second.items()
        }
        bandwidth = self.memory_bandwidth_bytes_per_second
        ops = tuple(
            op.model_copy(
                update={
                    "seconds": op.seconds / (memory_bandwidth if op.kind == "memory" else compute)
                }
            )
            for op in self.ops
        )
        return self._copy(
            {
                "peak_flops_per_second": peaks,
                "memory_bandwidth_bytes_per_second": bandwidth.scaled(
                    memory_bandwidth, f"times {memory_bandwidth:g}"
                ),
                "ops": ops,
            }
        )

    def with_attention(self, implementation: str) -> Device:
        """A copy that uses another of its attention implementations.

        Raises:
            InputError: the profile has no such implementation.
        """
        chosen = [a for a in self.attention if a.implementation == implementation]
        if not chosen:
            known = ", ".join(a.implementation for a in self.attention)
            raise InputError(
                f"{self.name}: no attention implementation {implementation!r}",
                hint=f"one of {known}",
            )
        others = [a for a in self.attention if a.implementation != implementation]
        return self._copy({"attention": (*chosen, *others)})

    def _copy(self, update: dict[str, Any]) -> Device:
        # Not model_copy: it would carry along cached properties of the old content.
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return Device.model_construct(**(fields | update))


def device_names() -> tuple[str, ...]:
    """Names of the devices that ship."""
    return shipped_names("devices")


def load_device(name_or_path: str | os.PathLike[str]) -> Device:
    """Read a shipped device by name or alias, or a profile file.

    Raises:
        InputError: unknown name, or a file that is not a device profile.
    """
    shipped = ALIASES.get(str(name_or_path).lower(), str(name_or_path).lower())
    if shipped in device_names():
        return _shipped_device(shipped)
    return _read_device(name_or_path)


@cache
def _shipped_device(name: str) -> Device:
    return _read_device(name)


def _read_device(name_or_path: str | os.PathLike[str]) -> Device:
    data, name = read_profile(name_or_path, "devices", ALIASES)
    try:
        return Device.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{name}: {describe_validation_error(error)}") from None
