"""Building a model without its parameters' memory, so that each rank makes only its own shard.

``with parameters_on_meta(): model = ...`` takes any construction: a configuration's random
initialisation, ``from_pretrained``, a plain module. ``parallelize`` then gives every parameter the
values that it would have had: drawn again, or read from the safetensors files.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paraplan.errors import InputError
from paraplan_runtime.files import StoredTensor, stored_tensors
from paraplan_runtime.recorded import Disguise, Recorder
from paraplan_runtime.state import Source
from paraplan_runtime.writes import Operand, Write

_RECORDER = "_paraplan_recorder"
"""Attribute of a parameter on meta: the recorder that knows its value."""
_DEFERRED = "_paraplan_deferred"
"""Attribute of a real parameter: the one on meta that was registered in its place."""


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Build a model inside, any way you like; its parameters take no memory.

    ``parallelize`` makes them real, each rank its own shard, with the values that they would
    have had without this; random generators end where they would. Buffers are computed as usual.
    Whatever changes the parameters (``model.apply(init)``, ``model.to(dtype)``) belongs inside too.
    """
    recorder = Recorder()
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        original(module, name, None if parameter is None else _deferred(parameter, recorder))

    with ExitStack() as stack:
        stack.callback(recorder.end)
        stack.enter_context(_replaced(nn.Module, "register_parameter", register))
        stack.enter_context(_loading_deferred(recorder))
        stack.enter_context(recorder)
        stack.enter_context(Disguise(recorder))
        yield


def _deferred(parameter: nn.Parameter, recorder: Recorder) -> nn.Parameter:
    """The parameter to register in place of ``parameter``; the same one each time."""
    with torch._C.DisableTorchFunction():
        is_meta, kind = parameter.is_meta, parameter.device.type
    if is_meta:
        setattr(parameter, _RECORDER, recorder)
        return parameter
    if type(parameter) is not nn.Parameter or kind != "cpu":
        return parameter
    made: nn.Parameter | None = getattr(parameter, _DEFERRED, None)
    if made is None:
        made = recorder.defer_parameter(parameter)
        made.__dict__.update(parameter.__dict__)
        setattr(made, _RECORDER, recorder)
        setattr(parameter, _DEFERRED, made)
    return made


@contextmanager
def _loading_deferred(recorder: Recorder) -> Iterator[None]:
    """Let transformers load tensors that are read later; renaming and merging stay its own."""
    from transformers import modeling_utils

    load = modeling_utils.PreTrainedModel._load_pretrained_model

    def load_deferred(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kw: Any
    ) -> Any:
        if load_config.hf_quantizer is not None:
            raise InputError(
                f"{type(model).__name__}: quantized weights cannot be sharded",
                hint="load it without parameters_on_meta, or from an unquantized checkpoint",
            )
        if state_dict is None:
            state_dict = {
                stored.name: recorder.defer_call(stored, stored.shape, stored.dtype)
                for file in checkpoint_files or ()
                for stored in stored_tensors(Path(file))
            }
        with _in_one_thread():
            return load(model, state_dict, None, load_config, *args, **kw)

    def refuse_pickle(checkpoint_file: Any, *args: Any, **kwargs: Any) -> Any:
        if not str(checkpoint_file).endswith(".safetensors"):
            raise InputError(
                f"{checkpoint_file} is not a safetensors file: other files can run code",
                hint="convert it once with save_pretrained",
            )
        return read(checkpoint_file, *args, **kwargs)

    read = modeling_utils.load_state_dict
    owner = modeling_utils.PreTrainedModel
    with (
        _replaced(owner, "_load_pretrained_model", staticmethod(load_deferred)),
        _replaced(modeling_utils, "load_state_dict", refuse_pickle),
    ):
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def _in_one_thread() -> Iterator[None]:
    """Keep transformers from loading in threads of its own, where nothing is recorded."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def take_sources(model: nn.Module) -> dict[str, Source]:
    """Path -> where each parameter's value comes from, if any parameter is on meta.

    Parameters that are real go to meta too, so that all are made real alike; buffers that
    depend on parameters are made real here. Without parameters on meta there is nothing to do.

    Raises:
        InputError: a parameter was replaced after the model was built.
    """
    recorder = _recorder_of(model)
    if recorder is None:
        return {}
    sources: dict[str, Source] = {}
    moved: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            path = f"{prefix}.{name}" if prefix else name
            sources[path] = _source(path, parameter, recorder)
            if not parameter.is_meta:
                on_meta = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
                module._parameters[name] = moved.setdefault(id(parameter), on_meta)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta and recorder.knows(buffer):
                module._buffers[name] = recorder.value(buffer)
    return sources


def recorder_of(parameter: nn.Parameter) -> Recorder | None:
    """What knows the value of a parameter that was built on meta."""
    found: Recorder | None = getattr(parameter, _RECORDER, None)
    return found


def _recorder_of(model: nn.Module) -> Recorder | None:
    found = (recorder_of(parameter) for parameter in model.parameters())
    return next((recorder for recorder in found if recorder is not None), None)


def _source(path: str, parameter: nn.Parameter, recorder: Recorder) -> Source:
    if not parameter.is_meta:
        return Source(parameter.detach, parameter.dtype)
    if not recorder.knows(parameter):
        raise InputError(
            f"parameter {path!r} was replaced after parameters_on_meta had ended",
            hint="do all that changes parameters inside of it",
        )
    write = recorder.last_write(parameter)
    stored = _stored(write)
    if stored is not None and parameter.is_contiguous():
        return Source(stored.slices, parameter.dtype)
    return Source(partial(recorder.value, parameter.detach()), parameter.dtype)


def _stored(write: Write | None) -> StoredTensor | None:
    """The tensor of a file that a write copied as it is, but for its dtype; None if none."""
    if write is None or isinstance(write.run, StoredTensor):
        return None if write is None else write.run  # type: ignore[return-value]
    if write.run is not torch.ops.aten._to_copy.default or not isinstance(write.args[0], Operand):
        return None
    before = write.args[0].write
    whole = before is not None and before.output is not None
    if whole and before.output[1] == write.args[0].geometry:  # type: ignore[union-attr, index]
        return before.run if isinstance(before.run, StoredTensor) else None  # type: ignore[union-attr]
    return None


def random_fingerprint(model: nn.Module) -> int:
    """A number that differs between models whose parameters will be drawn differently."""
    recorder = _recorder_of(model)
    total = 0
    for parameter in model.parameters():
        write = None
        if recorder is not None and parameter.is_meta and recorder.knows(parameter):
            write = recorder.last_write(parameter)
        while write is not None:
            if write.state is not None:
                total = zlib.crc32(write.state.numpy().tobytes(), total)
            write = write.previous
    return total
