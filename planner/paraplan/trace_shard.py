"""Cuts a meta model down to what one tensor-parallel rank holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from paraplan.trace_parts import Role
from paraplan.trace_tensor import TensorTable, matching


@dataclass(frozen=True, slots=True)
class Cut:
    """One parameter and the dimension that is divided."""

    parameter: nn.Parameter
    dim: int


@dataclass(frozen=True, slots=True)
class TensorSplit:
    """A model's tensor-parallel rules, found in its modules.

    Attributes:
        cuts: by what the module is called in an explanation.
        roles: module path -> role, vocabulary left out.
        numbers: (module, attribute) to divide.
        vocabulary: cuts along the vocabulary, done where it divides.
        vocabulary_roles: the same as ``roles`` for the vocabulary.
        holders: id of parameter -> where it hangs.
    """

    cuts: tuple[tuple[str, Cut], ...]
    roles: dict[str, Role]
    numbers: tuple[tuple[Any, str], ...]
    vocabulary: tuple[Cut, ...]
    vocabulary_roles: dict[str, Role]
    holders: dict[int, list[tuple[nn.Module, str]]]

    def limit(self, degree: int) -> str | None:
        """Why the model cannot be split ``degree`` ways, or None."""
        for path, cut in self.cuts:
            size = cut.parameter.shape[cut.dim]
            if size % degree:
                return f"{path} has size {size}, which does not divide over tensor {degree}"
        return None


def tensor_split(model: nn.Module, config: Any, table: TensorTable) -> TensorSplit:
    """Find the modules that the rules of ``table`` mean."""
    modules = dict(model.named_modules())
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in modules.values():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((module, name))
    cuts: list[tuple[str, Cut]] = []
    roles: dict[str, Role] = {}
    numbers: list[tuple[Any, str]] = [(config, name) for name in table.divided_config]
    for rule in table.rules:
        for path in matching(rule.path, modules):
            module = modules[path]
            cuts.extend((path, cut) for cut in _CUTTERS[rule.style](module))
            if rule.style != "heads":
                roles[path] = rule.style
            if hasattr(module, "nf") and rule.style == "column":
                numbers.append((module, "nf"))
    for pattern, attribute in table.divided:
        numbers.extend((modules[path], attribute) for path in matching(pattern, modules))
    vocabulary, vocabulary_roles = _vocabulary(model, modules)
    return TensorSplit(tuple(cuts), roles, tuple(numbers), vocabulary, vocabulary_roles, holders)


def _feature_dims(module: nn.Module) -> tuple[int, int]:
    """Dimensions of the weight: output features, input features."""
    return (1, 0) if hasattr(module, "nf") else (0, 1)  # transformers' Conv1D has `nf`


def _column(module: nn.Module) -> Iterator[Cut]:
    yield Cut(module.weight, _feature_dims(module)[0])  # type: ignore[arg-type]
    if module._parameters.get("bias") is not None:
        yield Cut(module.bias, 0)  # type: ignore[arg-type]


def _row(module: nn.Module) -> Iterator[Cut]:
    yield Cut(module.weight, _feature_dims(module)[1])  # type: ignore[arg-type]


def _heads(module: nn.Module) -> Iterator[Cut]:
    yield Cut(module.weight, 1)  # type: ignore[arg-type]


def _experts(module: nn.Module) -> Iterator[Cut]:
    """Weights are (experts, out, in), or (experts, in, out) where ``is_transposed``."""
    out, inner = (2, 1) if getattr(module, "is_transposed", False) else (1, 2)
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        if parameter.dim() == 3:
            yield Cut(parameter, inner if name.startswith("down") else out)
        elif parameter.dim() == 2 and not name.startswith("down"):
            yield Cut(parameter, 1)


_CUTTERS: dict[str, Callable[[nn.Module], Iterator[Cut]]] = {
    "column": _column,
    "row": _row,
    "experts": _experts,
    "heads": _heads,
}


def _vocabulary(
    model: nn.Module, modules: dict[str, nn.Module]
) -> tuple[tuple[Cut, ...], dict[str, Role]]:
    """The token embedding, modules tied to it, and the projection to logits."""
    find_embedding = getattr(model, "get_input_embeddings", None)
    embedding = find_embedding() if find_embedding else None
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head else None
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        return (), {}
    rows = Cut(embedding._parameters["weight"], 0)  # type: ignore[arg-type]
    cuts = {id(c.parameter): c for c in (rows, *_column(head))}
    roles: dict[str, Role] = {}
    for path, module in modules.items():
        if module is head:
            roles[path] = "vocabulary_head"
        elif isinstance(module, nn.Embedding) and module.weight is embedding.weight:
            roles[path] = "vocabulary_embedding"
    return tuple(cuts.values()), roles


@contextmanager
def sharded(
    model: nn.Module, config: Any, split: TensorSplit, degree: int
) -> Iterator[dict[str, Role]]:
    """While it lasts, ``model`` is what one of ``degree`` tensor ranks holds; yields the roles."""
    cuts = [cut for _, cut in split.cuts]
    numbers = list(split.numbers)
    roles = dict(split.roles)
    vocabulary = all(c.parameter.shape[c.dim] % degree == 0 for c in split.vocabulary)
    if vocabulary and split.vocabulary:
        cuts.extend(split.vocabulary)
        roles.update(split.vocabulary_roles)
        numbers.extend((owner, "vocab_size") for owner in (config, model))
    with ExitStack() as stack:
        for cut in cuts:
            smaller = _slice(cut, degree)
            for module, name in split.holders[id(cut.parameter)]:
                module._parameters[name] = smaller
                stack.callback(module._parameters.__setitem__, name, cut.parameter)
                if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                    stack.callback(setattr, module, "padding_idx", module.padding_idx)
                    module.padding_idx = None  # may lie on another rank
        for owner, name in numbers:
            value = getattr(owner, name, None)
            if isinstance(value, int):
                stack.callback(setattr, owner, name, value)
                setattr(owner, name, value // degree)
        yield roles


def _slice(cut: Cut, degree: int) -> nn.Parameter:
    shape = list(cut.parameter.shape)
    shape[cut.dim] //= degree
    made = torch.empty(shape, dtype=cut.parameter.dtype, device="meta")
    return nn.Parameter(made, requires_grad=cut.parameter.requires_grad)
