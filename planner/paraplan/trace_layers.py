"""Which modules of a model repeat, and which of them do the same work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

# Attributes that number a layer and change nothing that it computes.
_POSITIONS = frozenset({"layer_idx", "layer_id", "layer_index", "layer_number", "block_idx", "idx"})
# Less of the parameters than this share is no stack of layers (notes of the prototype: 5 %).
_LEAST_SHARE = 0.05


def find_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated layers by module path: children of the outermost big containers.

    Big is a twentieth of the parameters, or as many as any container has.
    """
    containers = dict(_containers(model, ""))
    sizes = {path: sum(p.numel() for p in c.parameters()) for path, c in containers.items()}
    total = sum(p.numel() for p in model.parameters())
    least = min(_LEAST_SHARE * total, max(sizes.values(), default=0))
    found: dict[str, nn.Module] = {}
    for path, container in containers.items():
        if sizes[path] >= least:
            found.update({f"{path}.{n}": c for n, c in container.named_children()})
    return found


def _containers(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        below = f"{path}.{name}".lstrip(".")
        if _is_stack(child):
            yield below, child
        else:
            yield from _containers(child, below)


def outside_modules(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Modules outside of the layers that hold parameters themselves, by path."""
    found: dict[str, nn.Module] = {}

    def visit(module: nn.Module, path: str) -> None:
        if any(p is not None for p in module._parameters.values()):
            found[path] = module
        for name, child in module.named_children():
            below = f"{path}.{name}".lstrip(".")
            if below not in layers:
                visit(child, below)

    visit(model, "")
    return found


def _is_stack(module: nn.Module) -> bool:
    """A list of blocks, each made of other modules; a ``Sequential`` only if some are alike."""
    if not isinstance(module, (nn.ModuleList, nn.Sequential)) or not len(module):
        return False
    if not all(any(True for _ in child.children()) for child in module):
        return False
    alike = len({type(child) for child in module}) < len(module)
    return alike or isinstance(module, nn.ModuleList)


def structure(module: nn.Module) -> tuple[Any, ...]:
    """Equal for two modules that launch the same kernels on equal inputs.

    Classes, parameter shapes, and attributes that can steer the computation. A float counts
    only as zero or not: a scale or a dropout rate changes no shape.
    """
    parts: list[Any] = []
    for path, sub in module.named_modules():
        attributes = tuple(
            (name, _essence(value))
            for name, value in sorted(vars(sub).items())
            if not name.startswith("_") and name not in _POSITIONS and _steers(value)
        )
        tensors = tuple(
            (name, tuple(t.shape), str(t.dtype), t.requires_grad)
            for name, t in [*sub._parameters.items(), *sub._buffers.items()]
            if t is not None
        )
        parts.append((path, type(sub), attributes, tensors))
    return tuple(parts)


def _steers(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, tuple))


def _essence(value: Any) -> Any:
    if isinstance(value, float):
        return value != 0.0
    if isinstance(value, tuple):
        return str(value)
    return value
