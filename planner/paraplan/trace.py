"""Traces a model into a `ModelGraph`.

`trace_model` builds the model without data (`build_model`), finds its repeated layers
(`find_layers`), runs it twice per tensor degree, at micro-batch sizes 1 and 2 (`trace_pass`,
`sharded`), and turns what ran into blocks (`block_variant`), a chain and the values that cross
cuts (`chain_values`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from torch import Tensor

from paraplan.errors import InputError
from paraplan.graph import Block, BlockVariant, ChainItem, ModelGraph, op_flops
from paraplan.models import ModelSource
from paraplan.trace_chain import chain_values, names_of_blocks, owned_modules
from paraplan.trace_layers import find_layers, outside_modules, structure
from paraplan.trace_model import Built, build_model, quiet_transformers
from paraplan.trace_parts import Part, PassTrace, Role, Subject
from paraplan.trace_pass import trace_pass
from paraplan.trace_shard import sharded, tensor_split
from paraplan.trace_tensor import tensor_table
from paraplan.trace_variant import Traced, block_variant

Passes = dict[int, tuple[PassTrace, PassTrace]]
"""Tensor degree -> the passes at micro-batch 1 and 2."""

# Two products in the backward for each of the forward, two and a half for attention. Outside of
# this a part of the backward was lost. The first block is no measure: its input has no gradient.
_LEAST_RATIO, _GREATEST_RATIO = 1.9, 2.6


class TraceError(RuntimeError):
    """A trace contradicts itself: a bug of ours."""


def trace_model(
    source: ModelSource,
    *,
    sequence_length: int,
    compute_dtype: str,
    tensor_degrees: Sequence[int],
) -> ModelGraph:
    """Trace forward and backward of the model at every tensor degree that it allows.

    Raises:
        InputError: the model cannot be built or run without data.
    """
    with _without_garbage_collection(), quiet_transformers():
        built = build_model(source, sequence_length=sequence_length, compute_dtype=compute_dtype)
        return _trace_built(source, built, sequence_length, compute_dtype, tensor_degrees)


def one_pass(source: ModelSource, *, sequence_length: int, compute_dtype: str) -> dict[str, Part]:
    """The traced parts of a model at micro-batch 1, one for each kind of block, by its name."""
    with _without_garbage_collection(), quiet_transformers():
        built = build_model(source, sequence_length=sequence_length, compute_dtype=compute_dtype)
        subject = _subject(built)
        steps = trace_pass(subject, built.runner(1), roles={}, kinds=None).steps
        classes = {path: type(module).__name__ for path, module in subject.layers.items()}
        parts: dict[str, Part] = {}
        for step, name in zip(steps, names_of_blocks(steps, classes), strict=True):
            parts.setdefault(name, step.part)
        return parts


def _subject(built: Built) -> Subject:
    layers = find_layers(built.model)
    return Subject(
        model=built.model,
        layers=layers,
        structures={path: structure(module) for path, module in layers.items()},
        outside=outside_modules(built.model, layers),
    )


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """A trace makes many small objects and few cycles; collecting doubles its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _trace_built(
    source: ModelSource,
    built: Built,
    sequence_length: int,
    compute_dtype: str,
    tensor_degrees: Sequence[int],
) -> ModelGraph:
    subject = _subject(built)
    passes: Passes = {1: _both(subject, built, {}, None)}
    _check_passes(source, built, passes[1])
    limits = _split_passes(subject, built, tensor_degrees, passes)
    graph = _graph(source, built, passes, limits, sequence_length, compute_dtype)
    _check(graph, source)
    return graph


def _both(
    subject: Subject, built: Built, roles: dict[str, Role], first: PassTrace | None
) -> tuple[PassTrace, PassTrace]:
    """The passes at micro-batch 1 and 2."""

    def once(run: Callable[[], Tensor], known: PassTrace | None) -> PassTrace:
        return trace_pass(subject, run, roles=roles, kinds=known.kinds if known else None)

    one = once(built.runner(1), first)
    return one, once(built.runner(2), first or one)


def _split_passes(
    subject: Subject, built: Built, degrees: Sequence[int], passes: Passes
) -> dict[int, str]:
    """Add the passes of the tensor degrees that are possible; why the others are not."""
    wanted = [degree for degree in sorted(set(degrees)) if degree > 1]
    table = tensor_table(built.model_type, built.plan)
    if table is None or built.config is None:
        what = built.model_type or "a model that is not transformers'"
        return dict.fromkeys(wanted, f"no tensor-parallel rules for {what}")
    split = tensor_split(built.model, built.config, table)
    limits: dict[int, str] = {}
    for degree in wanted:
        reason = _head_limit(built.config, degree) or split.limit(degree)
        if reason is None:
            try:
                with sharded(built.model, built.config, split, degree) as roles:
                    passes[degree] = _both(subject, built, roles, passes[1][0])
            except (InputError, RuntimeError) as error:
                reason = f"its rules do not fit its forward pass: {str(error).splitlines()[0]}"
        if reason is not None:
            limits[degree] = reason
    return limits


def _head_limit(config: Any, degree: int) -> str | None:
    for count, what in ((_heads(config), "attention heads"), (_kv_heads(config), "kv heads")):
        if count % degree:
            return f"{count} {what} do not divide over tensor {degree}"
    return None


def _heads(config: Any) -> int:
    return int(getattr(config, "num_attention_heads", 0) or 0)


def _kv_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", 0) or 0) or _heads(config)


def _experts(config: Any) -> int:
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if isinstance(getattr(config, name, None), int):
            return int(getattr(config, name))
    return 0


def _graph(
    source: ModelSource,
    built: Built,
    passes: Passes,
    limits: dict[int, str],
    sequence_length: int,
    compute_dtype: str,
) -> ModelGraph:
    model, config = built.model, built.config
    steps = passes[1][1].steps
    parameters = dict(model.named_parameters())
    classes = {p: type(m).__name__ for p, m in find_layers(model).items()}
    modules = owned_modules(model, classes, steps)
    names, blocks = _blocks(passes, names_of_blocks(steps, classes))
    first, last = steps[0].part.parameters, steps[-1].part.parameters
    tied = sum(first[n] for n in first if n in last) if len(steps) > 1 else 0
    graph = ModelGraph(
        name=source.name,
        architecture=type(model).__name__,
        config_sha256=source.config_sha256,
        sequence_length=sequence_length,
        compute_dtype=compute_dtype,
        torch_version=version("torch"),
        transformers_version=version("transformers"),
        parameter_count=sum(p.numel() for p in parameters.values()),
        trainable_parameter_count=sum(p.numel() for p in parameters.values() if p.requires_grad),
        tied_parameters=tied,
        hidden_size=int(getattr(config, "hidden_size", 0) or 0),
        vocab_size=int(getattr(config, "vocab_size", 0) or 0),
        heads=_heads(config),
        kv_heads=_kv_heads(config),
        experts=_experts(config),
        blocks=blocks,
        chain=tuple(
            ChainItem(block=name, modules=paths) for name, paths in zip(names, modules, strict=True)
        ),
        values=chain_values(*passes[1]),
        tensor_limits=limits,
        model_flops_per_sequence=sum(
            op_flops(op, 1) * op.count for name in names for op in blocks[name].variants[1].ops
        ),
    )
    return graph


def _blocks(passes: Passes, names: list[str]) -> tuple[list[str], dict[str, Block]]:
    """The distinct blocks, and for each step the name of its own."""
    steps = passes[1][1].steps
    owned = _owned(passes[1][1])
    blocks: dict[str, Block] = {}
    final: list[str] = []
    for position, (step, name) in enumerate(zip(steps, names, strict=True)):
        if name in blocks:
            final.append(name)
            continue
        role = "layer" if step.kind is not None else name.partition(".")[0]
        variants = {
            degree: block_variant(
                Traced(
                    one=one.steps[position].part,
                    two=two.steps[position].part,
                    whole=step.part,
                ),
                layer=step.kind is not None,
                degree=degree,
                owned=owned[position],
            )
            for degree, (one, two) in passes.items()
        }
        block = Block(role=role, variants=variants)  # type: ignore[arg-type]
        same = next((n for n, b in blocks.items() if role == "bridge" and b == block), name)
        blocks.setdefault(same, block)
        final.append(same)
    return final, blocks


def _owned(trace: PassTrace) -> list[list[str]]:
    """For each step the parameters that no earlier step reads."""
    seen: set[str] = set()
    owned = []
    for step in trace.steps:
        owned.append([name for name in step.part.parameters if name not in seen])
        seen.update(step.part.parameters)
    return owned


def _check_passes(source: ModelSource, built: Built, passes: tuple[PassTrace, PassTrace]) -> None:
    """Every parameter is used, has a gradient if trainable, and both passes ran the same blocks.

    Raises:
        InputError, TraceError: they do not.
    """
    for found in passes:
        if found.without_gradient:
            raise InputError(
                f"{source.origin}: parameter {found.without_gradient[0]} has no gradient"
            )
    layers = tuple(f"{path}." for path in passes[1].kinds) or ("\n",)
    used = {name for step in passes[1].steps for name in step.part.parameters}
    for name, _ in built.model.named_parameters():
        if name not in used and not name.startswith(layers):
            raise InputError(f"{source.origin}: parameter {name} takes no part in the loss")
    one, two = ([step.path for step in found.steps] for found in passes)
    if one != two:
        raise TraceError(f"{source.name}: micro-batches of 1 and 2 ran different blocks")


def _check(graph: ModelGraph, source: ModelSource) -> None:
    """Nothing may be lost between the model and its graph.

    Raises:
        InputError: a parameter takes no part in the loss, or layers share one.
        TraceError: forward and backward do not belong together.
    """
    held = sum(graph.blocks[item.block].variants[1].parameters for item in graph.chain)
    if held != graph.parameter_count:
        raise InputError(
            f"{source.origin}: blocks hold {held} parameters, the model {graph.parameter_count}:"
            " layers that share parameters are not supported"
        )
    if graph.trainable_parameter_count < graph.parameter_count:
        return
    for name in {item.block for item in graph.chain[1:]}:
        ratio = backward_ratio(graph.blocks[name].variants[1])
        if ratio is not None and not _LEAST_RATIO <= ratio <= _GREATEST_RATIO:
            raise TraceError(f"{graph.name}: {name} has {ratio:.3f} times the FLOPs going back")


def backward_ratio(variant: BlockVariant) -> float | None:
    """FLOPs of the backward pass over those of the forward pass; None if it computes nothing."""
    flops = {"forward": 0.0, "backward": 0.0}
    for op in variant.ops:
        flops[op.phase] += op_flops(op, 1) * op.count
    return flops["backward"] / flops["forward"] if flops["forward"] else None
