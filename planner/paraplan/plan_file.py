"""The plan file: what was decided, what it is predicted to do, and why. Reads and writes it.

A plan is data: JSON with one record a line, stable key order, no paths and no timestamps, so that
two plans diff well. A file that is broken, of a newer format or inconsistent in itself is refused
in one line. `plan_parts` says what its records hold, `layout` what a layout is.
"""

from __future__ import annotations

import json
import os
from typing import Any, Literal, Self

from pydantic import ValidationError, model_validator

from paraplan.errors import InputError
from paraplan.files import describe_validation_error, read_small_file, shortened, write_atomically
from paraplan.layout import Frozen, Layout, mesh_axes
from paraplan.plan_parts import (
    ClusterInfo,
    ModelInfo,
    NodeKind,
    Prediction,
    Proof,
    RunnerUp,
    Stage,
    Workload,
)

FORMAT = 1
SCHEMA_ID = "urn:paraplan:plan:1"


class Plan(Frozen):
    """A plan; see the module's docstring and ``docs/plan-file.md``."""

    format: Literal[1] = 1
    tool_version: str
    model: ModelInfo
    workload: Workload
    cluster: ClusterInfo
    layout: Layout
    mesh: tuple[tuple[str, int], ...]
    needs_unsupported: tuple[str, ...] = ()
    stages: tuple[Stage, ...]
    prediction: Prediction
    proof: Proof
    runner_ups: tuple[RunnerUp, ...] = ()
    assumptions: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        layout, cluster, workload = self.layout, self.cluster, self.workload
        if layout.devices != cluster.devices:
            raise ValueError(
                f"data_replicate({layout.data_replicate}) * data_shard({layout.data_shard}) * "
                f"tensor({layout.tensor}) * context({layout.context}) * "
                f"pipeline({layout.pipeline}) != devices({cluster.devices})"
            )
        if cluster.kinds and sum(kind.devices for kind in cluster.kinds) != cluster.devices:
            raise ValueError("devices of the cluster's kinds do not add up to its devices")
        if any(kind.devices % (layout.devices // layout.pipeline) for kind in cluster.kinds):
            raise ValueError("a stage lies on both kinds of devices")
        if layout.global_batch != workload.global_batch:
            raise ValueError(
                f"data ranks({layout.data_ranks}) * micro_batch_size({layout.micro_batch_size}) * "
                f"micro_batches({layout.micro_batches}) != global_batch({workload.global_batch})"
            )
        wanted = layout.pipeline * layout.virtual_stages
        if len(self.stages) != wanted:
            raise ValueError(f"{len(self.stages)} stages, the layout wants {wanted}")
        for index, stage in enumerate(self.stages):
            if stage.index != index or stage.pipeline_rank != index % layout.pipeline:
                raise ValueError(f"stage {index} has the wrong index or pipeline_rank")
        paths = [path for stage in self.stages for path in stage.modules]
        if len(set(paths)) != len(paths):
            raise ValueError("a module path stands in two stages")
        fullest = max(stage.memory_bytes for stage in self.stages)
        if fullest != self.prediction.peak_memory_bytes:
            raise ValueError(
                f"peak_memory_bytes is {self.prediction.peak_memory_bytes}, the fullest stage "
                f"has {fullest}"
            )
        if tuple(self.mesh) != mesh_axes(layout):
            raise ValueError("mesh does not follow from layout")
        return self


def kind_of(plan: Plan, pipeline_rank: int) -> NodeKind | None:
    """The kind of nodes that holds a pipeline rank; None where there is only one."""
    end = 0
    for kind in plan.cluster.kinds:
        end += kind.devices * plan.layout.pipeline // plan.layout.devices
        if pipeline_rank < end:
            return kind
    return None


def capacity_of(plan: Plan, pipeline_rank: int) -> int:
    """Bytes that a plan may use of a device that holds a pipeline rank."""
    kind = kind_of(plan, pipeline_rank)
    return plan.prediction.capacity_bytes if kind is None else kind.capacity_bytes


def device_of(plan: Plan, pipeline_rank: int) -> str:
    """Name of the devices that hold a pipeline rank."""
    kind = kind_of(plan, pipeline_rank)
    return plan.cluster.device if kind is None else kind.device


def plan_to_json(plan: Plan) -> str:
    """The plan as JSON text, one record a line, key order as declared."""
    data = {"$schema": SCHEMA_ID} | plan.model_dump(mode="json")
    lines = []
    for key, value in data.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            rows = ",\n".join(f"    {json.dumps(row)}" for row in value)
            lines.append(f"  {json.dumps(key)}: [\n{rows}\n  ]")
        elif isinstance(value, dict):
            rows = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            lines.append(f"  {json.dumps(key)}: {{\n{rows}\n  }}")
        else:
            lines.append(f"  {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def plan_from_json(text: str | bytes, *, name: str = "plan") -> Plan:
    """Parse and check a plan.

    Raises:
        InputError: the text is not a plan of this format, in one line that starts with ``name``.
    """
    try:
        data: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{name}: not a plan: a JSON object is expected")
    if not isinstance(data.pop("$schema", SCHEMA_ID), str):
        raise InputError(f"{name}: $schema is not a string")
    layout = data.get("layout")
    if isinstance(layout, dict):
        for field in Layout.model_fields:
            if field not in layout:
                raise InputError(f"{name}: layout.{field} is missing")
    version = data.get("format")
    if version != FORMAT or isinstance(version, bool):
        raise InputError(
            f"{name}: format is {shortened(version)}, this version of paraplan reads {FORMAT}",
            hint="make the plan again with `plan`, or install the version that wrote it",
        )
    try:
        return Plan.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{name}: {describe_validation_error(error)}") from None


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan file.

    Raises:
        InputError: it cannot be read or is not a consistent plan.
    """
    return plan_from_json(read_small_file(path, "plan"), name=str(path))


def save_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write a plan file; the old one stays if that fails."""
    write_atomically(path, plan_to_json(plan))


def plan_schema() -> dict[str, Any]:
    """JSON Schema of the plan file (``docs/plan.schema.json`` is this)."""
    schema = Plan.model_json_schema()
    schema["properties"] = {"$schema": {"type": "string"}} | schema["properties"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA_ID,
    } | schema
