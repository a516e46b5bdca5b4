"""The cost model's prediction of one measured run, exactly as it ran."""

from __future__ import annotations

from dataclasses import dataclass

from paraplan.layout import Precision
from paraplan.layout_rules import Constraints
from paraplan.partition import staged
from paraplan.problem import MEMORY_FRACTION, Problem, chain_cost
from paraplan.uncertainty import computing_share, kind_of
from paraplan.validate_graph import closed_form_graph
from paraplan.validate_layout import (
    comparable_gib,
    crowded_seconds,
    cuts_of,
    engine_of,
    layout_of,
    part_seconds,
    rerun_wait_seconds,
)
from paraplan.validate_machines import Machines
from paraplan.validate_model import sizes_of
from paraplan.validate_recompute import kept_layers, modes_of, recomputes_all
from paraplan.validate_rows import Row, Unusable
from paraplan.workload import make_workload


@dataclass(frozen=True, slots=True)
class Prediction:
    """One row and what the cost model says of it.

    Attributes:
        predicted_gib: what the published figure counts (see `comparable_gib`).
        fits: whether the planner would take it: the fullest device needs no more than a plan may
            use (`MEMORY_FRACTION` of what it has).
        device: name of the profile's device.
        kind: of run, by where the predicted time goes (see `uncertainty`).
    """

    row: Row
    predicted_s: float
    predicted_gib: float
    fits: bool
    device: str
    kind: str

    @property
    def ratio(self) -> float:
        """Measured over predicted seconds."""
        return (self.row.seconds or 0.0) / self.predicted_s

    @property
    def group(self) -> tuple[str, str]:
        """File and model."""
        return self.row.file, self.row.text("model")

    @property
    def measured_s(self) -> float | None:
        """Published seconds of a step."""
        return self.row.seconds

    @property
    def measured_gib(self) -> float | None:
        """Published peak memory."""
        return self.row.number("peak_mem_gib")

    @property
    def time_error(self) -> float | None:
        """Relative error of the step time."""
        measured = self.measured_s
        return self.predicted_s / measured - 1 if measured else None

    @property
    def memory_error(self) -> float | None:
        """Relative error of the peak memory."""
        measured = self.measured_gib
        return self.predicted_gib / measured - 1 if measured else None


def predict(row: Row, machines: Machines | None = None) -> Prediction:
    """The cost model's step time and memory for exactly what the row ran.

    Raises:
        Unusable: the row does not say enough, or says something that is not modelled.
        InputError: a cell is not a number.
    """
    sizes = sizes_of(row)
    cluster, device = (machines or Machines()).of(row)
    known = device.rates.dtypes
    if sizes.product_dtype not in known or sizes.dtype not in known:
        raise Unusable(f"{device.name} has no figures for {sizes.product_dtype}")
    layout = layout_of(row, sizes)
    cuts = cuts_of(sizes, layout)
    layout = layout.model_copy(update={"pipeline": (len(cuts) - 1) // layout.virtual_stages})
    precision: Precision = "fp16" if sizes.dtype == "float16" else "bf16"
    problem = Problem(
        graph=closed_form_graph(sizes, layout.tensor, kept_layers(row, sizes, cuts)),
        cluster=cluster,
        device=device,
        workload=make_workload(
            sequence_length=sizes.sequence_length,
            devices=cluster.devices,
            global_batch=row.count("global_batch"),
            precision=precision,
        ),
        capacity_bytes=MEMORY_FRACTION * device.memory_capacity_bytes.value,
        constraints=Constraints(recompute=modes_of(row)),
        engine=engine_of(sizes, layout, cluster),
    )
    chain = chain_cost(problem, layout)
    found = staged(chain, cuts, forced=True)
    assert found is not None, "forced costs always exist"
    needed = max(stage.memory_bytes for stage in found.stages)
    capacity = device.memory_capacity_bytes.value
    waits = crowded_seconds(row, sizes.framework, cluster.nodes, needed, capacity)
    again = recomputes_all(row)
    waits += part_seconds(sizes, layout, again, device)
    waits += sizes.framework.pipeline_seconds if layout.pipeline > 1 else 0.0
    waits += again * rerun_wait_seconds(sizes.framework, layout)
    layers = range(1, sizes.layers + 1)
    computing = computing_share(chain, dict.fromkeys(layers, modes_of(row)[0]), found.step_seconds)
    return Prediction(
        row=row,
        predicted_s=found.step_seconds + waits,
        predicted_gib=comparable_gib(row, chain, found),
        fits=needed <= problem.capacity_bytes,
        device=device.name,
        kind=kind_of(cluster.nodes, computing),
    )
