"""The traced blocks as `torch.fx` graphs, forward and backward in one, to look at or to analyse.

    python -m paraplan.trace_graph mistral-7b

prints them. A node is one kernel launch; its arguments are the nodes that last wrote the memory
it reads, so that the edges are the real data flow, through views and in-place calls alike.
"""

from __future__ import annotations

import sys
from functools import reduce
from typing import Any

import torch
from torch import fx

from paraplan.models import ModelSource, resolve_model
from paraplan.trace import one_pass
from paraplan.trace_parts import Part
from paraplan.trace_record import Call


def block_graphs(
    source: ModelSource, *, sequence_length: int, compute_dtype: str = "bfloat16"
) -> dict[str, fx.Graph]:
    """One graph for each kind of block, named as in ``ModelGraph.blocks``, at micro-batch 1.

    ``node.meta`` holds ``phase``, ``kernel`` (kind, dims, dtype, bytes read and written) and for
    placeholders ``parameter``, the name of the parameter, or None for an activation.
    """
    named = one_pass(source, sequence_length=sequence_length, compute_dtype=compute_dtype)
    return {name: joint_graph(part) for name, part in named.items()}


def joint_graph(part: Part) -> fx.Graph:
    """Forward and backward of one traced part as a graph."""
    graph = fx.Graph()
    made: dict[int, fx.Node] = {}
    calls = part.log.calls
    written = {number for call in calls for number in call.writes}
    for number in dict.fromkeys(n for call in calls for n in call.reads):
        if number in part.parameter_numbers or number not in part.log.births:
            made[number] = _placeholder(graph, part, number)
    for call in calls:
        operands = tuple(made[n] for n in call.reads if n in made)
        node = graph.call_function(_operator(call), operands)
        node.meta |= {"phase": call.phase, "kernel": call.kernel}
        made |= dict.fromkeys(call.writes, node)
    results = [*part.outputs, *sorted(part.parameter_gradients)]
    graph.output(tuple(made[n] for n in results if n in written))
    return graph


def _placeholder(graph: fx.Graph, part: Part, number: int) -> fx.Node:
    parameter = part.parameter_numbers.get(number)
    name = parameter.replace(".", "_") if parameter else f"input_{number}"
    node = graph.placeholder(name)
    node.meta["parameter"] = parameter
    return node


def _operator(call: Call) -> Any:
    """The aten (or our attention) operator that a call names, such as ``aten.mm``."""
    return reduce(getattr, call.name.split("."), torch.ops)


def main(arguments: list[str]) -> None:
    """Print the graphs of a model."""
    source = resolve_model(arguments[0] if arguments else "mistral-7b")
    length = source.fixed_sequence_length or min(source.max_sequence_length or 4096, 4096)
    for name, graph in block_graphs(source, sequence_length=length).items():
        print(f"== {name}")
        for node in graph.nodes:
            kernel = node.meta.get("kernel")
            what = f"  {node.meta['phase']:8s} {kernel.kind:12s} {kernel.dims}" if kernel else ""
            print(f"  {node.format_node()}{what}")


if __name__ == "__main__":
    main(sys.argv[1:])
