"""The order in which blocks run, what flows between them, and which modules belong to each."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import networkx
from torch import nn

from paraplan.graph import Value
from paraplan.trace_parts import PassTrace, Step
from paraplan.trace_variant import amount


def block_graph(trace: PassTrace) -> networkx.DiGraph:
    """Chain positions as nodes; an edge where one makes a tensor that another reads.

    Only tensors with a gradient make edges: masks, positions and rotary tables are made from
    nothing but shapes, so that each stage makes its own. Edges carry ``sizes``, tensor -> bytes.
    """
    graph = networkx.DiGraph()
    graph.add_nodes_from(range(len(trace.steps)))
    maker: dict[int, int] = {}
    for position, step in enumerate(trace.steps):
        for number in step.reads:
            if number in maker:
                graph.add_edge(maker[number], position)
                edge = graph.edges[maker[number], position]
                edge.setdefault("sizes", {})[number] = trace.sizes[number]
        maker.update(dict.fromkeys(step.makes, position))
    return graph


def chain_values(one: PassTrace, two: PassTrace) -> tuple[Value, ...]:
    """What crosses cuts, from the edges of the block graph at micro-batch 1 and 2.

    Raises:
        ValueError: the order of execution is no topological order of the graph.
    """
    graphs = [block_graph(one), block_graph(two)]
    for graph in graphs:
        if list(networkx.lexicographical_topological_sort(graph)) != list(graph):
            raise ValueError("the blocks' order of execution contradicts their data flow")
    crossings = [_crossings(graph) for graph in graphs]
    return tuple(
        Value(producer=producer, last_consumer=last, size_bytes=amount(small, large))
        for (producer, last, small), (_, _, large) in zip(*crossings, strict=True)
    )


def _crossings(graph: networkx.DiGraph) -> list[tuple[int, int, int]]:
    """(producer, last consumer, bytes) of each tensor, by producer."""
    last: dict[tuple[int, int], int] = {}
    sizes: dict[tuple[int, int], int] = {}
    for producer, consumer, held in graph.edges(data="sizes"):
        for number, size in held.items():
            key = (producer, number)
            last[key] = max(last.get(key, 0), consumer)
            sizes[key] = size
    return [(key[0], last[key], sizes[key]) for key in sorted(last)]


def owned_modules(
    model: nn.Module, layers: Collection[str], steps: Sequence[Step]
) -> list[tuple[str, ...]]:
    """For each step the modules whose parameters it reads first, as few paths as say it."""
    step_of = {path: i for i, step in enumerate(steps) for path in step.modules}
    found: list[list[str]] = [[] for _ in steps]
    for path, position in _topmost(model, "", layers, step_of):
        found[position].append(path)
    for position, step in enumerate(steps):
        if step.path is not None:
            found[position] = [step.path]
    return [tuple(paths) for paths in found]


def _topmost(
    module: nn.Module, path: str, layers: Collection[str], step_of: Mapping[str, int]
) -> Iterator[tuple[str, int]]:
    below = f"{path}." if path else ""
    steps = {i for p, i in step_of.items() if p == path or p.startswith(below)}
    if not steps:
        return
    if path and len(steps) == 1 and not any(layer.startswith(below) for layer in layers):
        yield path, steps.pop()
        return
    for name, child in module.named_children():
        yield from _topmost(child, f"{below}{name}", layers, step_of)


def names_of_blocks(steps: Sequence[Step], classes: Mapping[str, str]) -> list[str]:
    """A name for the block of each step; layers of one kind have the same.

    Args:
        classes: layer path -> name of its class.
    """
    kinds: dict[str, list[int]] = {}
    for step in steps:
        if step.path is not None and step.kind is not None:
            seen = kinds.setdefault(classes[step.path], [])
            if step.kind not in seen:
                seen.append(step.kind)
    names = []
    bridges = 0
    for position, step in enumerate(steps):
        if step.path is not None and step.kind is not None:
            name = classes[step.path]
            several = len(kinds[name]) > 1
            names.append(f"{name}.{kinds[name].index(step.kind) + 1}" if several else name)
        elif position == len(steps) - 1:
            names.append("head")
        else:
            bridges += position > 0
            names.append("embedding" if position == 0 else f"bridge.{bridges}")
    return names
