"""Applies a `TensorPlan` to one stage: splits its parameters, installs the exchanges.

Parameters are DTensors over the tensor ranks; while a module's forward runs it sees their local
tensors. A fused weight of k parts is kept in the shape ``(.., k, n / k, ..)`` and split in the
second of these, so that a shard is a plain ``Shard`` that checkpointing understands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from paraplan_runtime import tensor_collectives as exchange
from paraplan_runtime.mesh import Ranks
from paraplan_runtime.random_state import SplitStream
from paraplan_runtime.stage import Identity, Placeholder, StagePaths
from paraplan_runtime.tensor import ParameterSplit, TensorPlan, local_part


def apply_tensor_parallel(
    part: nn.Module,
    paths: StagePaths,
    plan: TensorPlan,
    ranks: Ranks,
    stream: SplitStream | None = None,
) -> None:
    """Split the parameters of one stage in place and install its exchanges.

    Args:
        stream: what dropout draws from where ranks compute different parts; None for a model
            that draws nothing.
    """
    group = ranks.group("tensor")
    sequence = plan.entry is not None
    for path, name in plan.attributes:
        module = _present(part, path)
        if module is not None:
            setattr(module, name, getattr(module, name) // ranks.layout.tensor)
    shapes = _distribute(part, plan, ranks)
    for path, module in list(part.named_modules()):
        if any(True for _ in module.parameters(recurse=False)):
            whole = sequence and not plan.inside_block(path)
            _use_local_parameters(module, path, plan, ranks, shapes, whole)
    for path in plan.regions:
        module = _present(part, path)
        if module is not None:
            shards = sequence and not plan.inside_block(path)
            into = exchange.enter_from_sequence if shards else exchange.enter
            _before(module, partial(into, group=group))
    for path in plan.experts:
        module = _present(part, path)
        if module is not None:
            _exchange_experts(module, group)
    for path in plan.blocks:
        module = _present(part, path)
        if module is not None:
            _before(module, partial(exchange.gather, group=group))
            _after(module, partial(exchange.scatter, group=group))
    if plan.head is not None and not sequence:
        head = _present(part, plan.head)
        if head is not None:
            _before(head, partial(exchange.enter, group=group))
    if sequence:
        _mark_sequence(part, paths, plan, group)
    if stream is not None:
        _draw_apart(part, paths, plan, stream)


def _draw_apart(part: nn.Module, paths: StagePaths, plan: TensorPlan, stream: SplitStream) -> None:
    """Switch to the ranks' own random numbers where they compute different parts.

    That is inside of each region, up to its row-parallel output, or with sequence parallelism
    from the first layer to the last.
    """

    def enter(module: nn.Module, *_: Any) -> None:
        if module.training:
            stream.enter()

    def leave(module: nn.Module, *_: Any) -> None:
        stream.leave()

    if plan.entry is not None:
        part.get_submodule(paths.layers[0]).register_forward_pre_hook(enter)
        part.get_submodule(paths.layers[-1]).register_forward_hook(leave)
    for path in plan.blocks:  # whole inside, so that all ranks draw the same
        module = _present(part, path)
        if module is not None:
            module.register_forward_pre_hook(leave)
            module.register_forward_hook(enter)
    for path in plan.regions if plan.entry is None else ():
        module = _present(part, path)
        if module is not None:
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)
    for path in plan.rows if plan.entry is None else ():
        module = _present(part, path)
        if module is not None:
            module.register_forward_hook(leave)


def _mark_sequence(part: nn.Module, paths: StagePaths, plan: TensorPlan, group: Any) -> None:
    if paths.is_first and plan.entry is not None:
        _before(part.get_submodule(plan.entry), partial(exchange.scatter, group=group))
    if paths.is_last and plan.exit is not None:
        # A split head computes a part of the gradient on each rank, a whole head all of it.
        out = exchange.gather if plan.head is None else exchange.enter_from_sequence
        _after(part.get_submodule(plan.exit), partial(out, group=group))


def _present(part: nn.Module, path: str) -> nn.Module | None:
    """The module at ``path`` unless another stage holds it."""
    try:
        module = part.get_submodule(path)
    except AttributeError:
        return None
    return None if isinstance(module, (Identity, Placeholder)) else module


def _distribute(
    part: nn.Module, plan: TensorPlan, ranks: Ranks
) -> dict[str, ParameterSplit | None]:
    """Replace each parameter by a DTensor over the tensor ranks; tied ones stay one."""
    degree, place, mesh = ranks.layout.tensor, ranks.place("tensor"), ranks.tensor_mesh
    made: dict[int, nn.Parameter] = {}
    shapes: dict[str, ParameterSplit | None] = {}
    for path, parameter in list(part.named_parameters(remove_duplicate=False)):
        how = plan.split.get(path)
        shapes[path] = how
        if id(parameter) not in made:
            shard = local_part(parameter.detach(), how, degree, place)
            placement = Replicate() if how is None else Shard(how.dimension + (how.parts > 1))
            spread = DTensor.from_local(
                shard.contiguous().clone(), mesh, [placement], run_check=False
            )
            made[id(parameter)] = nn.Parameter(spread, requires_grad=parameter.requires_grad)
        owner, _, name = path.rpartition(".")
        part.get_submodule(owner)._parameters[name] = made[id(parameter)]
    return shapes


def _use_local_parameters(
    module: nn.Module,
    path: str,
    plan: TensorPlan,
    ranks: Ranks,
    shapes: Mapping[str, ParameterSplit | None],
    shards: bool,
) -> None:
    """Let ``module`` compute on local tensors, and exchange what its kind exchanges."""
    group = ranks.group("tensor")
    inner = module.forward
    flat = {
        name: how.dimension
        for name in module._parameters
        if (how := shapes.get(f"{path}.{name}" if path else name)) is not None and how.parts > 1
    }
    parts = plan.sliced.get(path)
    is_row = path in plan.rows
    leave = exchange.leave_to_sequence if shards else exchange.leave

    def forward(*args: Any, **kwargs: Any) -> Any:
        spread: dict[str, Any] = {
            k: p for k, p in module._parameters.items() if isinstance(p, DTensor)
        }
        local = {k: _flat(p.to_local(), flat.get(k)) for k, p in spread.items()}
        bias = local.get("bias")
        if bias is not None and parts is not None:
            local["bias"] = local_part(
                bias, ParameterSplit(0, parts), ranks.layout.tensor, ranks.place("tensor")
            ).flatten()
        if bias is not None and is_row:
            local["bias"] = torch.zeros_like(bias)
        module._parameters.update(local)  # type: ignore[arg-type]
        try:
            result = inner(*args, **kwargs)
        finally:
            module._parameters.update(spread)
        if is_row:
            result = leave(result, group)
            return result if bias is None else result + bias
        return result

    module.forward = forward
    if path == plan.embedding and isinstance(module, nn.Embedding):
        _split_vocabulary(module, ranks)


def _flat(tensor: torch.Tensor, dimension: int | None) -> torch.Tensor:
    return tensor if dimension is None else tensor.flatten(dimension, dimension + 1)


def _split_vocabulary(module: nn.Embedding, ranks: Ranks) -> None:
    """Look up the ids of this rank's slice of the table; the others' rows come as zeros."""
    group, inner = ranks.group("tensor"), module.forward
    degree, place = ranks.layout.tensor, ranks.place("tensor")
    rows = module.num_embeddings // degree
    first = rows * place
    padding = module.padding_idx
    if isinstance(padding, int):
        module.padding_idx = padding - first if first <= padding < first + rows else None

    def forward(input: torch.Tensor) -> torch.Tensor:
        local = input - first
        outside = (local < 0) | (local >= rows)
        values = inner(local.masked_fill(outside, 0))
        return exchange.leave(values.masked_fill(outside.unsqueeze(-1), 0), group)

    module.forward = forward  # type: ignore[method-assign]


def _exchange_experts(module: nn.Module, group: Any) -> None:
    inner = module.forward

    def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        entered = [
            exchange.enter(value, group)
            if isinstance(value, torch.Tensor) and value.is_floating_point()
            else value
            for value in (hidden, *args)
        ]
        return exchange.leave(inner(*entered, **kwargs), group)

    module.forward = forward


def _before(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change the hidden state that enters ``module``."""

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

    module.register_forward_pre_hook(hook, with_kwargs=True)


def _after(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change the hidden state that leaves ``module``."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    module.register_forward_hook(hook)
