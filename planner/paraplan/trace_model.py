"""Builds what a `ModelSource` describes on the meta device, with inputs that give a loss."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paraplan.errors import InputError, PlanError
from paraplan.models import ModelSource
from paraplan.trace_attention import IMPLEMENTATION, FusedAttention, register_with_transformers

_TEXT = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration")
_IMAGE = ("ForImageClassification",)
# Where transformers says which class of an architecture has a loss. Encoders may be listed under
# causal models too, for those who turn them into decoders.
_SEQ2SEQ = "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"
_MAPPINGS = (
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
)


@dataclass(frozen=True)
class Built:
    """A model without data.

    Attributes:
        model: on the meta device, in training mode.
        config: of its language part; None for a model that is not transformers'.
        model_type: transformers' name of the architecture, or empty.
        plan: the model's own tensor-parallel plan.
        runner: micro-batch size -> a call that returns the loss.
        inputs: micro-batch size -> what it calls the model with.
    """

    model: nn.Module
    config: Any
    model_type: str
    plan: Mapping[str, str]
    runner: Callable[[int], Callable[[], Tensor]]
    inputs: Callable[[int], Any]


def build_model(source: ModelSource, *, sequence_length: int, compute_dtype: str) -> Built:
    """Build the model with parameters in ``compute_dtype``.

    Raises:
        InputError: the config does not describe a model that transformers can build.
    """
    dtype = getattr(torch, compute_dtype)
    if source.kind == "callable":
        return _from_callable(source, dtype)
    cls, config = class_and_config(source)
    _check_length(source, config, sequence_length)
    register_with_transformers()
    try:
        model = _instantiate(cls, config, dtype)
    except Exception as error:
        raise InputError(
            f"{source.origin}: transformers cannot build {_name_of(cls)}: {_line(error)}"
        ) from error
    text = config.get_text_config()
    make = _text_inputs if _is_text(type(model).__name__) else _image_inputs
    inputs = partial(make, model.config, sequence_length, dtype)

    def runner(sequences: int) -> Callable[[], Tensor]:
        arguments = inputs(sequences)

        def call() -> Any:
            with FusedAttention():
                return model(**arguments)

        return lambda: _loss(call, source.origin)

    plan = getattr(model, "_tp_plan", None) or {}
    return Built(model, text, config.model_type, plan, runner, inputs)


def named_inputs(built: Built, sequences: int) -> dict[str, Any]:
    """What the model is called with, by the names of its forward's parameters."""
    inputs = built.inputs(sequences)
    if isinstance(inputs, dict):
        return inputs
    return dict(inspect.signature(built.model.forward).bind(*inputs).arguments)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' remarks about what is unusual in a config."""
    from transformers.utils import logging

    silent: Any = logging.set_verbosity_error
    before = logging.get_verbosity()
    silent()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:200]}" if lines else type(error).__name__


def _name_of(cls: Any) -> str:
    return getattr(cls, "__name__", "the model")


def _is_text(class_name: str) -> bool:
    return not class_name.endswith(_IMAGE)


def class_and_config(source: ModelSource) -> tuple[Any, Any]:
    """The model class with a loss, and the config as an instance of its class."""
    if source.trust_remote_code:
        return _remote(source)
    import transformers
    from transformers.models.auto.auto_mappings import CONFIG_MAPPING_NAMES

    model_type = source.config["model_type"]
    if model_type not in CONFIG_MAPPING_NAMES:
        near = difflib.get_close_matches(model_type, CONFIG_MAPPING_NAMES, n=1)
        raise InputError(
            f"{source.origin}: model_type {model_type!r} is unknown to transformers"
            f" {transformers.__version__}",
            hint=f"did you mean {near[0]}?" if near else "a newer transformers may know it",
        )
    settings = {k: v for k, v in source.config.items() if k != "quantization_config"}
    try:
        config_class = getattr(transformers, CONFIG_MAPPING_NAMES[model_type])
        config = config_class.from_dict(settings)
    except Exception as error:
        raise InputError(f"{source.origin}: bad {model_type} config: {_line(error)}") from error
    return _model_class(source, config), config


def _model_class(source: ModelSource, config: Any) -> Any:
    """The class that ``architectures`` names, if it has a loss, else the usual one."""
    import transformers

    model_type = config.model_type

    names = source.config.get("architectures")
    for name in names if isinstance(names, list) else []:
        if isinstance(name, str) and name.endswith((*_TEXT, *_IMAGE)):
            cls = getattr(transformers, name, None)
            if getattr(cls, "config_class", None) is type(config):
                return cls
    from transformers.models.auto import modeling_auto

    encoder_decoder = getattr(config, "is_encoder_decoder", False)
    for mapping in (_SEQ2SEQ,) if encoder_decoder else _MAPPINGS:
        name = getattr(modeling_auto, mapping).get(model_type)
        if isinstance(name, str):
            return getattr(transformers, name)
    raise InputError(
        f"{source.origin}: transformers has no {model_type} model with a loss that is traced here",
        hint="write a function that returns the model and example inputs: module:callable",
    )


def _remote(source: ModelSource) -> tuple[Any, Any]:
    """With --trust-remote-code: the classes in the config's own Python files."""
    from pathlib import Path

    import transformers

    auto_config: Any = transformers.AutoConfig
    auto_model: Any = transformers.AutoModelForCausalLM
    folder = Path(source.origin).parent
    try:
        config = auto_config.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    except Exception as error:
        raise InputError(f"{source.origin}: its own code fails: {_line(error)}") from error

    def build(config: Any, **kwargs: Any) -> Any:
        return auto_model.from_config(config, trust_remote_code=True, **kwargs)

    return build, config


def _instantiate(cls: Any, config: Any, dtype: torch.dtype) -> nn.Module:
    config.use_cache = False
    if getattr(config, "is_encoder_decoder", False):
        start = getattr(config, "decoder_start_token_id", None)
        config.decoder_start_token_id = start or 0  # any token has the same shape
    make = getattr(cls, "_from_config", cls)
    with torch.device("meta"):
        try:
            model = make(config, dtype=dtype, attn_implementation=IMPLEMENTATION)
        except KeyError as error:
            if error.args != (IMPLEMENTATION,):
                raise
            # A class with its own table of attention modules; `FusedAttention` catches its call.
            model = make(config, dtype=dtype, attn_implementation="sdpa")
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "grouped_mm"  # the only one without data-dependent shapes
    return model.train()  # type: ignore[no-any-return]


def _check_length(source: ModelSource, config: Any, sequence_length: int) -> None:
    if source.fixed_sequence_length not in (None, sequence_length):
        raise InputError(
            f"{source.name} has a fixed sequence length of {source.fixed_sequence_length},"
            f" not {sequence_length}"
        )
    relative = hasattr(config, "rope_parameters") or hasattr(
        config, "relative_attention_num_buckets"
    )
    limit = source.max_sequence_length
    if limit is not None and sequence_length > limit and not relative:
        raise InputError(
            f"{source.name} has {limit} learned positions, fewer than sequence length"
            f" {sequence_length}"
        )


def _text_inputs(config: Any, length: int, dtype: torch.dtype, sequences: int) -> dict[str, Tensor]:
    ids = torch.empty((sequences, length), dtype=torch.long, device="meta")
    return {"input_ids": ids, "labels": torch.empty_like(ids)}


def _image_inputs(
    config: Any, length: int, dtype: torch.dtype, sequences: int
) -> dict[str, Tensor]:
    if not isinstance(getattr(config, "image_size", None), (int, list, tuple)):
        raise InputError(f"images of a {config.model_type} model have no known size")
    size = config.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    shape = (sequences, config.num_channels, height, width)
    return {
        "pixel_values": torch.empty(shape, dtype=dtype, device="meta"),
        "labels": torch.empty(sequences, dtype=torch.long, device="meta"),
    }


def _loss(call: Callable[[], Any], origin: str) -> Tensor:
    """Call the model; the loss in what it returns, or one of its outputs.

    Raises:
        InputError: its forward fails on tensors without data, or nothing depends on a parameter.
    """
    try:
        output = call()
    except PlanError:
        raise
    except Exception as error:
        raise InputError(
            f"{origin}: its forward pass cannot be traced without data: {_line(error)}"
        ) from error
    values = list(output.values()) if isinstance(output, Mapping) else output
    values = list(values) if isinstance(values, (list, tuple)) else [values]
    tensors = [v for v in values if isinstance(v, Tensor) and v.requires_grad]
    if not tensors:
        raise InputError(
            f"{origin}: the model returns nothing to train on",
            hint="it must return a differentiable loss or outputs",
        )
    scalars = [tensor for tensor in tensors if tensor.dim() == 0]
    return scalars[0] if scalars else _loss_of(tensors[0])


def _loss_of(outputs: Tensor) -> Tensor:
    """For a model that returns no loss: the cross entropy a script most likely computes of it."""
    logits = outputs.float().flatten(0, -2)
    targets = torch.zeros(logits.shape[0], dtype=torch.long, device=logits.device)
    return nn.functional.cross_entropy(logits, targets)


def _from_callable(source: ModelSource, dtype: torch.dtype) -> Built:
    """Run the user's ``module:callable``: it returns the model and example inputs.

    The model may lie on any device; its parameters are replaced by meta tensors of
    ``dtype``. The inputs are for one sequence, in a tuple or a dictionary.
    """
    module_name, _, attribute = source.spec.partition(":")
    try:
        # What user code prints must not end up in front of a plan on standard output.
        with redirect_stdout(sys.stderr), _current_folder_importable():
            factory: Any = importlib.import_module(module_name)
            for name in attribute.split("."):
                factory = getattr(factory, name)
            made = factory()
    except SystemExit as error:
        raise InputError(f"{source.spec}: it ended the process (exit {error.code})") from None
    except Exception as error:
        raise InputError(f"{source.spec}: {_line(error)}") from error
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise InputError(f"{source.spec}: must return (model, example inputs)")
    model, example = made
    if not isinstance(example, tuple | list | dict):
        raise InputError(
            f"{source.spec}: example inputs are {type(example).__name__}; a tuple or a dict of "
            "tensors is wanted"
        )
    config = getattr(model, "config", None)
    is_transformers = hasattr(model, "set_attn_implementation")
    if is_transformers:
        register_with_transformers()
        model.set_attn_implementation(IMPLEMENTATION)
    _to_meta(model, dtype)
    model.train()

    def repeated(sequences: int) -> Any:
        return _repeated(example, sequences, dtype)

    def runner(sequences: int) -> Callable[[], Tensor]:
        inputs = repeated(sequences)

        def call() -> Any:
            with FusedAttention(), torch.device("meta"):
                return model(**inputs) if isinstance(inputs, dict) else model(*inputs)

        return lambda: _loss(call, source.spec)

    plan = getattr(model, "_tp_plan", None) or {}
    text = config.get_text_config() if is_transformers and config is not None else None
    return Built(model, text, getattr(config, "model_type", "") or "", plan, runner, repeated)


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    """As ``python -m`` has it: a console script does not look where the user stands."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _to_meta(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace all tensors of the model by meta tensors; what was shared stays shared."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    target = dtype if tensor.is_floating_point() else tensor.dtype
                    empty = torch.empty_like(tensor, device="meta", dtype=target)
                    made[id(tensor)] = (
                        nn.Parameter(empty, requires_grad=tensor.requires_grad)
                        if isinstance(tensor, nn.Parameter)
                        else empty
                    )
                held[name] = made[id(tensor)]


def _repeated(example: Any, sequences: int, dtype: torch.dtype) -> Any:
    """The example inputs for ``sequences`` sequences, on the meta device."""
    if isinstance(example, Tensor):
        shape = example.shape
        if shape and shape[0] == 1:
            shape = torch.Size((sequences, *shape[1:]))
        target = dtype if example.is_floating_point() else example.dtype
        return torch.empty(shape, dtype=target, device="meta")
    if isinstance(example, dict):
        return {k: _repeated(v, sequences, dtype) for k, v in example.items()}
    if isinstance(example, (list, tuple)):
        return tuple(_repeated(v, sequences, dtype) for v in example)
    return example
