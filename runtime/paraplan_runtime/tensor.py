"""What tensor and sequence parallelism do to a model: what is split, where ranks exchange.

The model's own ``base_model_tp_plan`` says which linear layers are column- or row-parallel;
GPT-2, which has none, has a rule here. A *region* is the module whose column-parallel layers
share one input (an attention or MLP module): its input enters once, its row-parallel layer's
output leaves once, so a layer costs two exchanges in each direction. Between regions every
rank holds the whole hidden state, or with ``sequence_parallel`` its part of the sequence, from
the entry of the first layer to the output of the module that follows the last one.

Embedding table and head are split over the vocabulary when it divides; the head's logits stay
split and the loss is computed on them so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import nn

from paraplan.errors import InputError
from paraplan.plan_file import Plan
from paraplan_runtime.loss import causal_loss_owner
from paraplan_runtime.stage import StagePaths

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

LATENT_ATTENTION_STYLES: Mapping[str, tuple[Style, int]] = {
    "model.layers.*.self_attn.q_proj": ("column", 1),
    "model.layers.*.self_attn.q_b_proj": ("column", 1),
    "model.layers.*.self_attn.kv_b_proj": ("column", 1),
    "model.layers.*.self_attn.o_proj": ("row", 1),
}
"""DeepSeek: its plan leaves attention whole, though its heads split; the planner splits them."""


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
    own = LATENT_ATTENTION_STYLES if getattr(config, "model_type", None) == "deepseek_v3" else {}
    if not words:
        raise InputError(
            f"tensor parallelism: {type(model).__name__} has no base_model_tp_plan",
            hint="plan with --fix tensor=1",
        )
    unknown = sorted({word for word in words.values() if word not in _STYLES})
    if unknown:
        raise InputError(
            f"tensor parallelism: {type(model).__name__} asks for {', '.join(unknown)!s}, which "
            "the runtime does not apply"
        )
    return _resolve(model, {path: _STYLES[word] for path, word in words.items()} | dict(own))


def _resolve(
    model: nn.Module, patterns: dict[str, tuple[Style, int]]
) -> dict[str, tuple[Style, int]]:
    """Replace the ``*`` of each pattern by the layer numbers that exist."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    names += [name for name, _ in model.named_parameters(remove_duplicate=False)]
    resolved: dict[str, tuple[Style, int]] = {}
    for pattern, style in patterns.items():
        expression = re.compile(re.escape(pattern).replace(r"\*", r"\d+") + r"\Z")
        resolved |= {name: style for name in names if expression.match(name)}
    if not resolved:
        raise InputError(
            f"tensor parallelism: no module of {type(model).__name__} bears a name of its plan"
        )
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
    if sequence:
        _check_tokens_stay_apart(model, layers, regions | blocks)
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


def fused_parameters(model: nn.Module) -> dict[str, ParameterSplit]:
    """Parameters of several parts, whatever the tensor degree: checkpoints store them apart."""
    try:
        styles = model_styles(model)
    except InputError:
        return {}
    result: dict[str, ParameterSplit] = {}
    for path, (style, parts) in styles.items():
        if style == "column" and parts > 1:
            result |= _split_parameters(model, path, style, parts, {})
    return result


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
    if causal_loss_owner(model) is None:
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
        if how.parts > 1 and how.dimension == 0:
            raise InputError(
                f"tensor parallelism: {path} holds {how.parts} parts in its first dimension, "
                "across which FSDP shards",
                hint="plan with --fix tensor=1",
            )
        if size % (how.parts * degree):
            raise InputError(
                f"tensor({degree}) does not divide {path}: {how.parts} parts of {size // how.parts}"
            )


def _check_tokens_stay_apart(model: nn.Module, layers: set[str], whole: set[str]) -> None:
    """Refuse modules that may mix tokens where each rank holds a part of the sequence.

    Args:
        whole: modules inside of which every rank has the whole sequence.

    Raises:
        InputError: a layer holds one that is neither a norm, a linear layer nor a container.
    """
    for path, module in model.named_modules():
        inside = any(_is_under(path, layer) for layer in layers) and path not in layers
        if not inside or any(_is_under(path, w) or _is_under(w, path) for w in whole):
            continue
        kind = type(module).__name__
        apart = isinstance(module, nn.Linear) or "Norm" in kind or kind == "Conv1D"
        if next(module.parameters(), None) is not None and not apart:
            raise InputError(
                f"sequence parallelism: {path} ({kind}) may mix tokens, and the model's "
                "tensor-parallel plan does not split it",
                hint="plan with --fix sequence_parallel=false",
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
        on_shards = (
            plan.entry is not None
            and not plan.inside_block(owner)
            and (
                any(_is_under(owner, layer) for layer in layers)
                or (plan.exit is not None and _is_under(owner, plan.exit))
            )
        )
        if in_region or on_shards:
            found.add(path)
    return replace(plan, partial=frozenset(found))


def local_part(
    full: torch.Tensor, how: ParameterSplit | None, degree: int, place: int
) -> torch.Tensor:
    """The tensor rank's part of a parameter, fused parts in a dimension of their own."""
    if how is None:
        return full
    dimension = how.dimension
    if how.parts > 1:
        full = full.unflatten(dimension, (how.parts, -1))  # type: ignore[no-untyped-call]
        dimension += 1
    return full.chunk(degree, dim=dimension)[place]
