"""The picture of the mesh: which stage and which groups lie on which device of which node.

One square a device, in rank order along the nodes. Nodes that hold the same pipeline ranks are
drawn once with how many there are, as soon as there are too many to draw them all. The script
colours the squares anew by tensor or data group, and says what a chosen one holds.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import NamedTuple

from paraplan.page_parts import data_block, text
from paraplan.plan_file import Plan

MOST_NODES = 64
"""Nodes drawn one by one."""

MOST_DEVICES = 1024
"""Devices drawn one by one."""

SIZE, GAP = 26, 4  # of a square, in pixels of the picture

AXIS_NAMES = {
    "pipeline": "pipeline rank",
    "data_replicate": "data replica",
    "data_shard": "data shard",
    "context": "context rank",
    "tensor": "tensor rank",
}


class DrawnNode(NamedTuple):
    """A node of the picture, for ``alike`` of them from ``first`` on."""

    first: int
    alike: int
    ranks: tuple[int, ...]


def coordinates(rank: int, plan: Plan) -> dict[str, int]:
    """Where a rank stands on each axis of the mesh."""
    place = {}
    for axis, size in reversed(plan.mesh):
        rank, place[axis] = divmod(rank, size)
    return place


def drawn_nodes(plan: Plan) -> list[DrawnNode]:
    """The nodes to draw."""
    nodes, per_node = plan.cluster.nodes, plan.cluster.devices_per_node
    if nodes <= MOST_NODES and plan.cluster.devices <= MOST_DEVICES:
        return [
            DrawnNode(n, 1, tuple(range(n * per_node, (n + 1) * per_node))) for n in range(nodes)
        ]
    size = plan.layout.devices // plan.layout.pipeline
    drawn: list[DrawnNode] = []

    def pipeline_ranks(node: int) -> list[int]:
        return [(node * per_node + i) // size for i in range(per_node)]

    for _, run in groupby(range(nodes), key=pipeline_ranks):
        alike = list(run)
        first = alike[0]
        ranks = tuple(range(first * per_node, (first + 1) * per_node))
        drawn.append(DrawnNode(first, len(alike), ranks))
    return drawn


def mesh_picture(plan: Plan) -> str:
    """The picture with its controls, and what the script needs."""
    nodes = drawn_nodes(plan)
    pictures = "\n".join(_node(node, plan) for node in nodes)
    axes = [axis for axis, size in plan.mesh if size > 1] or ["data_shard"]
    choices = "".join(
        f'<label><input type="radio" name="colour-by" value="{axis}"'
        f"{' checked' if axis == axes[0] else ''}> {AXIS_NAMES[axis]}</label>"
        for axis in axes
    )
    sizes = " x ".join(f"{AXIS_NAMES[axis]}s {size}" for axis, size in plan.mesh if size > 1)
    whole = sum(node.alike for node in nodes) == len(nodes)
    note = "" if whole else " Nodes that hold the same pipeline ranks are drawn once."
    stages = [
        {
            "rank": stage.pipeline_rank,
            "layers": stage.layers,
            "first": stage.modules[0] if stage.modules else "",
            "last": stage.modules[-1] if stage.modules else "",
        }
        for stage in plan.stages
    ]
    facts = {"mesh": plan.mesh, "perNode": plan.cluster.devices_per_node, "stages": stages}
    return (
        f"<p>The mesh, outermost axis first: {text(sizes or 'one device')}. The number in a square "
        f"is the device's place on the chosen axis.{note}</p>"
        f'<fieldset id="mesh-by" class="choices"><legend>Colour and number by</legend>{choices}'
        f'</fieldset><div id="mesh" class="nodes">{pictures}</div>'
        '<p id="mesh-says" class="says" aria-live="polite">Choose a device, by pointing or with '
        "the arrow keys, to see what it holds and whom it exchanges with.</p>"
        + data_block("mesh-data", facts)
    )


def _node(node: DrawnNode, plan: Plan) -> str:
    columns = min(len(node.ranks), 8)
    rows = -(-len(node.ranks) // columns)
    step = SIZE + GAP
    width, height = columns * step + GAP, rows * step + GAP
    last = node.first + node.alike - 1
    name = f"node {node.first}" if node.alike == 1 else f"nodes {node.first} to {last}"
    title = name if node.alike == 1 else f"{name}: {node.alike} alike"
    squares = "".join(
        _square(rank, (GAP + i % columns * step, GAP + i // columns * step), plan)
        for i, rank in enumerate(node.ranks)
    )
    return (
        f'<figure class="node"><svg viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="group" aria-label="{text(title)}">{squares}</svg>'
        f"<figcaption>{text(title)}</figcaption></figure>"
    )


def _square(rank: int, at: tuple[int, int], plan: Plan) -> str:
    place = coordinates(rank, plan)
    axis = next((axis for axis, size in plan.mesh if size > 1), "data_shard")
    x, y = at
    return (
        f'<g class="device m{place[axis] % 8}" data-rank="{rank}" role="img" '
        f'aria-label="device {rank}: {text(spoken(place, plan))}" tabindex="-1">'
        f'<rect x="{x}" y="{y}" width="{SIZE}" height="{SIZE}" rx="4"/>'
        f'<text x="{x + SIZE // 2}" y="{y + SIZE // 2 + 4}">{place[axis]}</text></g>'
    )


def spoken(place: dict[str, int], plan: Plan) -> str:
    """A device's place in words, axes of one rank left out."""
    said: Iterable[str] = (
        f"{AXIS_NAMES[axis]} {place[axis]}" for axis, size in plan.mesh if size > 1
    )
    return ", ".join(said) or "the only one"
