"""One pass over a model at one micro-batch size and one tensor degree.

The model's own forward runs once, on shapes. Its repeated layers are replaced by stand-ins: the
first of each kind is traced where it is called, forward and backward, on inputs cut off from
what came before; the others only make the outputs that it made. What the model does between
layers is traced as it happens and makes the other *parts*: embedding, bridges, head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from paraplan.errors import InputError
from paraplan.trace_record import Log, Recorder
from paraplan.trace_tensor import Exchange


class TraceError(RuntimeError):
    """A trace is not what it must be: a bug of ours, or a model that we do not understand."""


@dataclass(slots=True)
class Part:
    """A traced piece of the model: a kind of layer, or what lies between layers.

    Attributes:
        log: its kernels, forward and backward.
        inputs: storages of the differentiable tensors it is given.
        outputs: storages of the differentiable tensors it makes for others.
        kept_outputs: those of ``outputs`` that several later parts read, and so keep.
        used_inputs: for each differentiable tensor it is given, whether a gradient comes back.
        parameters: storage -> elements of the parameters it reads, on this tensor rank.
        exchanges: tensor-parallel communication.
        made: tensors of its result; a layer of the same kind makes the same again.
        input_bytes: storage -> bytes, for ``inputs``.
    """

    log: Log
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    kept_outputs: set[int] = field(default_factory=set)
    used_inputs: list[bool] = field(default_factory=list)
    parameters: dict[int, int] = field(default_factory=dict)
    exchanges: list[Exchange] = field(default_factory=list)
    made: Any = None
    input_bytes: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Step:
    """One place in the order of execution: a layer's path, or None between layers."""

    path: str | None
    part: Part
    reads: tuple[int, ...]
    makes: tuple[int, ...]


@dataclass(slots=True)
class PassTrace:
    """Everything one pass found.

    Attributes:
        steps: in order of execution; parts between layers that compute nothing are left out.
        kinds: layer path -> number of its kind.
        layer_parts: kind -> its traced part.
        storage_bytes: sizes of the tensors that steps hand on.
        parameter_names: storage -> name of the parameter in it.
        without_gradient: trainable parameters that no backward reached.
    """

    steps: list[Step]
    kinds: dict[str, int]
    layer_parts: dict[int, Part]
    storage_bytes: dict[int, int]
    parameter_names: dict[int, str]
    without_gradient: list[str]
    modules: dict[str, int]


def trace_pass(
    model: nn.Module,
    run: Callable[[], Tensor],
    layers: Mapping[str, nn.Module],
    *,
    structures: Mapping[str, Any],
    kinds: Mapping[str, int] | None,
    exchanges: Mapping[str, Callable[[Any, Any, Any], Sequence[tuple[str, Tensor]]]] ,
) -> PassTrace:
    ...
