"""One accelerator: its peak rates, its memory, and how much of both real kernels reach.

Profiles are files (``profiles/paraplan_profiles/devices/*.toml``, or the user's own in TOML or
JSON); ``docs/profiles.md`` describes every field. Pure data: no torch, no device is touched.
"""

from __future__ import annotations

import os
from functools import cached_property
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from paraplan.errors import InputError
from paraplan.plan_file import describe_validation_error
from paraplan.profile_types import (
    Figure,
    Fraction,
    Frozen,
    Positive,
    Whole,
    content_sha256,
    read_profile,
    shipped_names,
)

Dtype = Literal["bfloat16", "float16", "float32", "float8"]

ALIASES = {
    "a100": "a100-80gb-sxm",
    "a100-40gb": "a100-40gb-sxm",
    "a100-80gb": "a100-80gb-sxm",
    "h100": "h100-sxm",
    "h100-80gb": "h100-sxm",
    "h200-sxm": "h200",
    "mi250x": "mi250",
    "4090": "rtx-4090",
    "rtx4090": "rtx-4090",
}
"""Short names of shipped devices."""


class Gemm(Frozen):
    """How matrix products run: tiles worked off in waves by the multiprocessors.

    Attributes:
        efficiency: by dtype, share of the dense peak that a multiprocessor reaches inside a
            tile of long K.
        tile_rows, tile_columns: of the output tile one multiprocessor computes at a time.
        prologue_k: extra K elements that each tile costs (filling the pipeline, writing out).
    """

    efficiency: dict[Dtype, Fraction]
    tile_rows: Whole
    tile_columns: Whole
    prologue_k: Figure


class AttentionRate(Frozen):
    """Fused attention at one head size.

    Attributes:
        forward_efficiency, backward_efficiency: share of the dense peak for long sequences,
            without a mask.
    """

    head_size: Annotated[int, Field(ge=1, le=4096)]
    forward_efficiency: Fraction
    backward_efficiency: Fraction


class Attention(Frozen):
    """Fused (flash) attention.

    Attributes:
        implementation: what was timed, such as ``flash-attention 2``.
        tile_rows, tile_columns: queries and keys of one tile; a causal mask wastes half a tile
            of keys for each row of tiles.
        prologue_keys: extra keys that each row of tiles costs.
        rates: by head size; between two, the rate is interpolated.
    """

    implementation: Annotated[str, Field(min_length=1)]
    tile_rows: Whole
    tile_columns: Whole
    prologue_keys: Figure
    rates: Annotated[tuple[AttentionRate, ...], Field(min_length=1)]


class MeasuredOp(Frozen):
    """One op timed on the device.

    Attributes:
        kind, dims, causal, window: as in `graph.Op`, sizes as whole numbers.
        name: of a memory op; ``*`` stands for any.
        size_bytes: read and written by a memory op.
        seconds: median of one call.
        spread: (90th - 10th percentile) / median, where known.
    """

    kind: Literal["gemm", "grouped_gemm", "attention", "memory"]
    dtype: Dtype
    name: str = "*"
    phase: Literal["forward", "backward"] = "forward"
    dims: tuple[Annotated[int, Field(ge=1)], ...] = ()
    causal: bool = False
    window: Annotated[int, Field(ge=1)] | None = None
    size_bytes: Annotated[int, Field(ge=0)] = 0
    seconds: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
    spread: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


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
    memory_half_bytes: Figure
    kernel_floor_seconds: Figure
    host_launch_seconds: Figure
    multiprocessors: Whole
    peak_flops_per_second: Annotated[dict[Dtype, Positive], Field(min_length=1)]
    gemm: Gemm
    attention: Attention
    optimizer_efficiency: Fraction
    overlap_contention: Fraction
    framework_memory_bytes: Figure
    communicator_memory_bytes: Figure
    fragmentation_fraction: Figure
    power_watts: Positive | None = None
    ops: tuple[MeasuredOp, ...] = ()

    @cached_property
    def sha256(self) -> str:
        """Hash of the content."""
        return content_sha256(self)

    def with_memory(self, memory_capacity_bytes: Figure) -> Device:
        """A copy with another memory capacity."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return Device.model_construct(
            **(fields | {"memory_capacity_bytes": memory_capacity_bytes})
        )


def device_names() -> tuple[str, ...]:
    """Names of the devices that ship."""
    return shipped_names("devices")


def load_device(name_or_path: str | os.PathLike[str]) -> Device:
    """Read a shipped device by name or alias, or a profile file.

    Raises:
        InputError: unknown name, or a file that is not a device profile.
    """
    data, name = read_profile(name_or_path, "devices", ALIASES)
    try:
        return Device.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{name}: {describe_validation_error(error)}") from None
