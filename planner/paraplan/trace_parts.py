"""What a pass over a model finds: its parts, and the order in which they run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from paraplan.trace_record import Log

Role = Literal["column", "row", "experts", "vocabulary_embedding", "vocabulary_head"]
"""What a module is under tensor parallelism; see `paraplan.trace_tensor`."""


@dataclass(frozen=True, slots=True)
class RoleCall:
    """One call of a module that tensor parallelism splits.

    ``input_number`` and ``output_number`` name storages; bytes are of the whole tensors.
    """

    role: Role
    input_number: int
    output_number: int
    input_bytes: int
    output_bytes: int


@dataclass(slots=True)
class Part:
    """A traced piece of the model: a kind of layer, or what lies between layers.

    Attributes:
        log: its kernels, forward and backward.
        inputs: storage -> bytes of the differentiable tensors that it is given.
        shared_inputs: those of ``inputs`` that other parts read too: their maker keeps them.
        outputs: storages of the differentiable tensors that it makes for other parts.
        kept_outputs: those of its results that several later parts read.
        used_inputs: for each of ``inputs``, whether a gradient comes back.
        parameters: name -> elements on this tensor rank.
        parameter_numbers: storages of the parameters.
        parameter_gradients: storages of the gradients of its parameters.
        frozen: names of the parameters without gradients.
        role_calls: what tensor parallelism exchanges.
        made: its result; a layer of the same kind makes the same again.
    """

    log: Log = field(default_factory=Log)
    inputs: dict[int, int] = field(default_factory=dict)
    shared_inputs: set[int] = field(default_factory=set)
    outputs: list[int] = field(default_factory=list)
    kept_outputs: set[int] = field(default_factory=set)
    used_inputs: list[bool] = field(default_factory=list)
    parameters: dict[str, int] = field(default_factory=dict)
    parameter_numbers: dict[int, str] = field(default_factory=dict)
    parameter_gradients: set[int] = field(default_factory=set)
    frozen: set[str] = field(default_factory=set)
    role_calls: list[RoleCall] = field(default_factory=list)
    made: Any = None


@dataclass(frozen=True, slots=True)
class Step:
    """One place in the order of execution.

    Attributes:
        path: of the layer, or None for what lies between layers.
        kind: number of the kind of layer, or None.
        given: storages of the differentiable tensors that come in.
        reads: those of them that it needs.
        makes: storages of those that go out.
        modules: paths of the modules with parameters that first run here.
    """

    path: str | None
    kind: int | None
    part: Part
    given: tuple[int, ...]
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    modules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PassTrace:
    """Everything that one pass found.

    Attributes:
        steps: in order of execution; stretches between layers that compute nothing that has a
            gradient belong to the next step.
        kinds: layer path -> kind.
        sizes: storage -> bytes of the tensors that steps hand on.
        without_gradient: trainable parameters that no backward reached.
    """

    steps: tuple[Step, ...]
    kinds: dict[str, int]
    sizes: dict[int, int]
    without_gradient: tuple[str, ...]


@dataclass(frozen=True)
class Subject:
    """What is traced.

    Attributes:
        model: on the meta device, in training mode.
        layers: repeated layers by path.
        structures: equal for layers that launch the same kernels.
        outside: modules outside of layers that hold parameters themselves, by path.
    """

    model: nn.Module
    layers: Mapping[str, nn.Module]
    structures: Mapping[str, Any]
    outside: Mapping[str, nn.Module]
