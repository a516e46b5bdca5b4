"""What each rank does in the test of plans over two kinds of nodes."""

from __future__ import annotations

from parity_cases import build, make_plan

from paraplan.errors import InputError
from paraplan.layout import Layout
from paraplan.plan_file import Plan
from paraplan.plan_parts import NodeKind
from paraplan_runtime import parallelize

LAYOUT = Layout(pipeline=2, schedule="1f1b", micro_batches=2)


def plan_on(*devices: str) -> Plan:
    """A plan of two stages, each on one device of its kind."""
    plan = make_plan("llama", LAYOUT)
    kinds = tuple(
        NodeKind(device=name, devices=1, devices_per_node=1, capacity_bytes=2**30)
        for name in devices
    )
    changed = {"kinds": kinds, "device": " + ".join(devices), "nodes": 2, "devices_per_node": 1}
    cluster = plan.cluster.model_copy(update=changed)
    return Plan.model_validate(plan.model_copy(update={"cluster": cluster}).model_dump())


def applied_to_kinds(devices: tuple[str, str]) -> str:
    """Why a plan over these kinds is refused on two CPU ranks; empty if it is applied."""
    try:
        parallelize(build("llama"), plan_on(*devices), device_type="cpu")
    except InputError as error:
        return f"{error}; {error.hint}"
    return ""
