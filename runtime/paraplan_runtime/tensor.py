"""Tensor and sequence parallelism: which parameters are split, and where ranks exchange.

The model's own ``base_model_tp_plan`` says which linear layers are column- or row-parallel;
GPT-2, which has none, has a rule here. A *region* is the module whose column-parallel layers
share one input (an attention or MLP module): its input enters once, its row-parallel layer's
output leaves once, so a layer costs two exchanges in each direction. Between regions every
rank holds the whole hidden state, or with ``sequence_parallel`` its part of the sequence, from
the entry of the first layer to the output of the module that follows the last one.

Embedding table and head are split over the vocabulary when it divides; the head's logits stay
split and the loss is computed on them so.

Parameters are DTensors over the tensor ranks; while a module's forward runs it sees their local
tensors. A fused weight of k parts is kept in the shape ``(.., k, n / k, ..)`` and split in the
second of these, so that a shard is a plain ``Shard`` that checkpointing understands.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from paraplan.errors import InputError
from paraplan.plan_file import Plan
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from paraplan_runtime import tensor_collectives as exchange
from paraplan_runtime.loss import TOKEN_LOSSES, loss_type_of
from paraplan_runtime.mesh import Ranks
from paraplan_runtime.stage import Identity, Placeholder, StagePaths

Style = Literal["column", "row", "experts", "replicated"]

_STYLES: Mapping[str, tuple[Style, int]] = {
    "colwise": ("column", 1),
    "colwise_rep": ("column", 1),
    "colwise_gather_output": ("column", 1),
    "packed_colwise": ("column", 2),
    "rowwise": ("row", 1),
    "rowwise_rep": ("row", 1),
    "moe_tp_experts": ("experts", 1),
    "replicated_with_grad_allreduce": ("replicated", 1),
}
"""Words of transformers' plans that are understood, with the number of fused parts."""

GPT2_STYLES: Mapping[str, tuple[Style, int]] = {
    "transformer.h.*.attn.c_attn": ("column", 3),
    "transformer.h.*.attn.c_proj": ("row", 1),
    "transformer.h.*.mlp.c_fc": ("column", 1),
    "transformer.h.*.mlp.c_proj": ("row", 1),
}
"""GPT-2: fused queries, keys and values; weights stored ``(in, out)``."""


@dataclass(frozen=True)
class ParameterSplit:
    """How one parameter is split.

    Attributes:
        dimension: the dimension that is split, counted in the model's own shape.
        parts: tensors fused along it; each is split by itself.
    """

    dimension: int
    parts: int = 1


@dataclass(frozen=True)
class TensorPlan:
    """What tensor parallelism does to a model; empty at tensor 1.

    Attributes:
        split: parameter path -> how it is split.
        partial: paths of whole parameters of which each rank computes a part of the gradient.
        regions: modules whose input enters a split region.
        rows: row-parallel modules.
        experts: modules that hold split experts.
        blocks: with sequence parallelism, modules that route to experts: whole inside.
        sliced: column-parallel modules whose fused bias is kept whole and sliced when used.
        embedding, head: split over the vocabulary, or None.
        entry, exit: where sequence shards begin and end.
        attributes: (module path, name) -> divided by the tensor degree.
    """

    split: Mapping[str, ParameterSplit] = field(default_factory=dict)
    partial: frozenset[str] = frozenset()
    regions: frozenset[str] = frozenset()
    rows: frozenset[str] = frozenset()
    experts: frozenset[str] = frozenset()
    blocks: frozenset[str] = frozenset()
    sliced: Mapping[str, int] = field(default_factory=dict)
    embedding: str | None = None
    head: str | None = None
    entry: str | None = None
    exit: str | None = None
    attributes: tuple[tuple[str, str], ...] = ()

    def is_partial(self, path: str) -> bool:
        """Whether each tensor rank computes a part of this parameter's gradient."""
        return path in self.partial

    def inside_block(self, path: str) -> bool:
        """Whether a module lies where sequence parallelism computes on the whole sequence."""
        return any(_is_under(path, block) for block in self.blocks)


def _is_under(path: str, parent: str) -> bool:
    return path == parent or path.startswith(f"{parent}.")


def model_styles(model: nn.Module) -> dict[str, tuple[Style, int]]:
    """Module or parameter path -> how it is split, from the model's own plan.

    Raises:
        InputError: the model has no plan, or one with a word that is not understood.
    """
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) == "gpt2":
        return _resolve(model, dict(GPT2_STYLES))
    prefix = getattr(model, "base_model_prefix", "")
    base = getattr(config, "base_model_tp_plan", None) or {}
    dotted = f"{prefix}." if prefix and hasattr(model, prefix) else ""
    words = {f"{dotted}{path}": word for path, word in base.items()}
    words |= getattr(model, "base_model_tp_plan", None) or {}
    if not words:
        raise InputError(
            f"tensor parallelism: {type(model).__name__} has no base_model_tp_plan",
            hint="plan with --tensor 1",
        )
    unknown = sorted({word for word in words.values() if word not in _STYLES})
    if unknown:
        raise InputError(
            f"tensor parallelism: {type(model).__name__} asks for {', '.join(unknown)!s}, which "
            "the runtime does not apply"
        )
    return _resolve(model, {path: _STYLES[word] for path, word in words.items()})


def _resolve(
    model: nn.Module, patterns: dict[str, tuple[Style, int]]
) -> dict[str, tuple[Style, int]]:
    """Replace the ``*`` of each pattern by the layer numbers that exist."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    names += [name for name, _ in model.named_parameters(remove_duplicate=False)]
    resolved = {}
    for pattern, style in patterns.items():
        expression = re.compile(re.escape(pattern).replace(r"\*", r"\d+") + r"\Z")
        resolved |= {name: style for name in names if expression.match(name)}
    return resolved


def tensor_plan(model: nn.Module, plan: Plan, stages: tuple[StagePaths, ...]) -> TensorPlan:
    """Work out the whole of ``TensorPlan`` from the model and the layout.

    Raises:
        InputError: the model cannot be split this way, with the reason.
    """
    layout = plan.layout
    if layout.tensor == 1:
        return TensorPlan()
    styles = model_styles(model)
    layers = {path for stage in stages for path in stage.layers}
    kinds: dict[Style, set[str]] = {"column": set(), "row": set(), "experts": set()}
    split: dict[str, ParameterSplit] = {}
    sliced: dict[str, int] = {}
    for path, (style, parts) in styles.items():
        if style == "replicated":
            continue
        kinds[style].add(path)
        if style != "experts":
            split |= _split_parameters(model, path, style, parts, sliced)
    regions = _regions(model, kinds["column"], layers)
    embedding, head = _vocabulary(model, layout.tensor)
    if embedding:
        split[f"{embedding}.weight"] = ParameterSplit(0)
    if head:
        split |= {
            f"{head}.{name}": ParameterSplit(0)
            for name, _ in model.get_submodule(head).named_parameters()
        }
    _check_divides(model, split, layout.tensor)
    sequence = layout.sequence_parallel
    blocks = {path.rpartition(".")[0] for path in kinds["experts"]} if sequence else set()
    result = TensorPlan(
        split=split,
        regions=frozenset(regions),
        rows=frozenset(path for path in kinds["row"] if path not in split),
        experts=frozenset(kinds["experts"]),
        blocks=frozenset(blocks),
        sliced=sliced,
        embedding=embedding,
        head=head,
        entry=stages[0].layers[0] if sequence else None,
        exit=_sequence_exit(model, stages) if sequence else None,
        attributes=_local_attributes(model, kinds["column"]),
    )
    return _with_partial(model, result, layers)


def _split_parameters(
    model: nn.Module, path: str, style: Style, parts: int, sliced: dict[str, int]
) -> dict[str, ParameterSplit]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if path in parameters:  # a table of experts: (experts, out, in)
        last = parameters[path].ndim - 1
        return {path: ParameterSplit(last - 1 if style == "column" else last, parts)}
    module = model.get_submodule(path)
    transposed = type(module).__name__ == "Conv1D"
    dimension = 0 if (style == "column") != transposed else 1
    result = {f"{path}.weight": ParameterSplit(dimension, parts)}
    if style == "column" and getattr(module, "bias", None) is not None:
        if parts == 1:
            result[f"{path}.bias"] = ParameterSplit(0)
        else:
            # One-dimensional and fused: FSDP would shard across the parts, so it stays whole.
            sliced[path] = parts
    return result


def _regions(model: nn.Module, columns: set[str], layers: set[str]) -> set[str]:
    modules = dict(model.named_modules(remove_duplicate=False))
    regions = set()
    for path in columns:
        if path in modules:
            parent = path.rpartition(".")[0]
            regions.add(path if parent in layers or not parent else parent)
    return regions


def _vocabulary(model: nn.Module, degree: int) -> tuple[str | None, str | None]:
    """Paths of the embedding and the head that are split over the vocabulary, or None."""
    if loss_type_of(model) not in TOKEN_LOSSES:
        return None, None
    paths = {id(module): path for path, module in model.named_modules()}
    table = model.get_input_embeddings()  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    splits_table = isinstance(table, nn.Embedding) and table.num_embeddings % degree == 0
    splits_head = isinstance(head, nn.Linear) and head.out_features % degree == 0
    if splits_table and splits_head and table.max_norm is None:
        return paths[id(table)], paths[id(head)]
    return None, None


def _sequence_exit(model: nn.Module, stages: tuple[StagePaths, ...]) -> str:
    """The norm that follows the last layer, or that layer."""
    last = stages[-1]
    if last.after:
        follower = model.get_submodule(last.after[0])
        if all(parameter.ndim == 1 for parameter in follower.parameters()):
            return last.after[0]
    return last.layers[-1]


def _check_divides(model: nn.Module, split: Mapping[str, ParameterSplit], degree: int) -> None:
    config = getattr(model, "config", None)
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % degree:
            raise InputError(f"tensor({degree}) does not divide {name}({heads})")
    for path, how in split.items():
        size = model.get_parameter(path).shape[how.dimension]
        if size % (how.parts * degree):
            raise InputError(
                f"tensor({degree}) does not divide {path}: {how.parts} parts of "
                f"{size // how.parts}"
            )


def _local_attributes(model: nn.Module, columns: set[str]) -> tuple[tuple[str, str], ...]:
    """Sizes that GPT-2's modules keep as attributes and compute with."""
    found = []
    for path in columns:
        if type(dict(model.named_modules()).get(path)).__name__ == "Conv1D":
            found.append((path, "nf"))
            parent = path.rpartition(".")[0]
            if path.endswith("c_attn"):
                found += [(parent, "split_size"), (parent, "num_heads")]
    return tuple(found)


def _with_partial(model: nn.Module, plan: TensorPlan, layers: set[str]) -> TensorPlan:
    """Find the whole parameters whose gradients each rank computes in part.

    Inside a region everything flows through this rank's part of the result, so gradients of
    whole parameters there are parts. With sequence parallelism so are those of what works on
    sequence shards; where experts are routed to, and outside of the shards, ranks compute the
    same.
    """
    found = set()
    for path, _ in model.named_parameters(remove_duplicate=False):
        owner = path.rpartition(".")[0]
        if path in plan.split:
            continue
        in_region = owner not in plan.rows and any(_is_under(owner, r) for r in plan.regions)
        on_shards = plan.entry is not None and not plan.inside_block(owner) and (
            any(_is_under(owner, layer) for layer in layers)
            or (plan.exit is not None and _is_under(owner, plan.exit))
        )
        if in_region or on_shards:
            found.add(path)
    return TensorPlan(**{**plan.__dict__, "partial": frozenset(found)})


# --- applying -----------------------------------------------------------------------------


def apply_tensor_parallel(
    part: nn.Module, paths: StagePaths, plan: TensorPlan, ranks: Ranks
) -> None:
    """Split the parameters of one stage in place and install its exchanges."""
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


def local_part(
    full: torch.Tensor, how: ParameterSplit | None, degree: int, place: int
) -> torch.Tensor:
    """The tensor rank's part of a parameter, fused parts in a dimension of their own."""
    if how is None:
        return full
    dimension = how.dimension
    if how.parts > 1:
        full = full.unflatten(dimension, (how.parts, -1))
        dimension += 1
    return full.chunk(degree, dim=dimension)[place]


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
    is_row = path in plan.rows or _is_row_split(path, plan)
    leave = exchange.leave_to_sequence if shards else exchange.leave

    def forward(*args: Any, **kwargs: Any) -> Any:
        spread = {k: p for k, p in module._parameters.items() if isinstance(p, DTensor)}
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

    module.forward = forward  # type: ignore[method-assign]
    if path == plan.embedding:
        _split_vocabulary(module, ranks)


def _is_row_split(path: str, plan: TensorPlan) -> bool:
    return path in plan.rows


def _flat(tensor: torch.Tensor, dimension: int | None) -> torch.Tensor:
    return tensor if dimension is None else tensor.flatten(dimension, dimension + 1)


def _split_vocabulary(module: nn.Module, ranks: Ranks) -> None:
    """Look up the ids of this rank's slice of the table; the others' rows come as zeros."""
    group, inner = ranks.group("tensor"), module.forward
    degree, place = ranks.layout.tensor, ranks.place("tensor")
    rows = int(module.num_embeddings) // degree  # type: ignore[call-overload]
    first = rows * place
    padding = module.padding_idx
    if isinstance(padding, int):
        module.padding_idx = padding - first if first <= padding < first + rows else None  # type: ignore[assignment]

    def forward(ids: torch.Tensor) -> torch.Tensor:
        local = ids - first
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

    module.forward = forward  # type: ignore[method-assign]


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
