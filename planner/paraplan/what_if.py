"""`plan what-if`: from axes to planned points, what training on each takes, and the answer.

``what_if("mistral-7b", gpus="8..512", device="h100,a100")`` returns a `WhatIf`, whose ``points``
are tidy rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from paraplan.describe import rounded, tool_version
from paraplan.report import layout_words
from paraplan.request import GIB, Question, Request, resolve
from paraplan.sizing import answer, pareto_front
from paraplan.sweep import Done, Outcome, plan_questions
from paraplan.training_cost import DAY, HOUR, Run, training_run
from paraplan.what_if_axes import Axes, GridPoint, command_of, grid
from paraplan.what_if_file import Economics, Limits, WhatIf, WhatIfPoint
from paraplan.workload import OPTIMIZER_STATE_BYTES

MASTER_BYTES = 4  # of a parameter in a checkpoint


def _silent(finished: int, of: int) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The whole question of a what-if.

    Attributes:
        common: what is the same for all points.
        command: how to ask it again.
    """

    axes: Axes
    common: Request
    economics: Economics = field(default_factory=Economics)
    limits: Limits = field(default_factory=Limits)
    command: str = ""


def run_sweep(sweep: Sweep, *, workers: int = 1, done: Done = _silent) -> WhatIf:
    """Plan every point and answer the question.

    Raises:
        InputError: bad input, or no point that can be planned for.
    """
    points = grid(sweep.axes, sweep.common)
    questions = [
        with_headroom(resolve(point.request), sweep.limits.min_headroom) for point in points
    ]
    outcomes = plan_questions(questions, workers=workers, done=done)
    rows = [
        point_row(i, question, point.spot_interruptions, outcome, sweep.economics)
        for i, (point, question, outcome) in enumerate(
            zip(points, questions, outcomes, strict=True)
        )
    ]
    rows = _with_scaling_efficiency(rows, points)
    front = pareto_front(rows)
    rows = [row.model_copy(update={"pareto": row.id in front}) for row in rows]
    return WhatIf(
        tool_version=tool_version(),
        command=sweep.command,
        economics=sweep.economics,
        limits=sweep.limits,
        points=tuple(rows),
        pareto=front,
        answer=answer(rows, sweep.limits) if sweep.limits != Limits() else None,
        assumptions=_assumptions(rows, sweep.economics),
    )


def with_headroom(question: Question, min_headroom: float | None) -> Question:
    """The question with that share of each device's memory left free, at least."""
    if min_headroom is None:
        return question
    whole = question.cluster.device.memory_capacity_bytes.value
    capacity = (1 - min_headroom) * whole
    if capacity >= question.capacity_bytes:
        return question
    request = replace(question.request, memory_limit_gib=capacity / GIB)
    return replace(question, request=request, capacity_bytes=capacity)


def point_row(
    index: int,
    question: Question,
    spot_interruptions: float,
    outcome: Outcome,
    economics: Economics,
) -> WhatIfPoint:
    """A planned question as a tidy row, with what training there takes."""
    cluster, work = question.cluster, question.workload
    memory = cluster.device.memory_capacity_bytes.value
    row = WhatIfPoint(
        id=index,
        model=question.source.name,
        cluster=cluster.name,
        device=cluster.device.name,
        gpus=cluster.devices,
        nodes=cluster.nodes,
        global_batch=work.global_batch,
        seq_len=work.sequence_length,
        precision=work.precision,
        memory_gib=rounded(memory / GIB),
        link_bandwidth=question.request.scale.get("link_between", 1.0),
        spot_interruptions=spot_interruptions,
        status=outcome.status,
        reason=outcome.reason,
        command=command_of(question.request),
    )
    if outcome.layout is None:
        return row
    layout = outcome.layout
    degrees = layout.model_dump(exclude={"schedule", "sequence_parallel"})
    planned = {
        "layout": layout_words(layout),
        **degrees,
        "step_seconds": outcome.step_seconds,
        "tokens_per_second": outcome.tokens_per_second,
        "mfu": outcome.mfu,
        "peak_memory_bytes": outcome.peak_memory_bytes,
        "headroom": rounded(1 - outcome.peak_memory_bytes / memory),
        "gap": outcome.gap,
    }
    training = _training(question, spot_interruptions, outcome, economics)
    return row.model_copy(update=planned | training)


def _training(
    question: Question, spot_interruptions: float, outcome: Outcome, economics: Economics
) -> dict[str, object]:
    """Fields of a row that say what the whole run takes."""
    price, assumed = price_of(question, economics)
    power = question.cluster.device.power_watts
    state = MASTER_BYTES * outcome.parameter_count + (
        OPTIMIZER_STATE_BYTES[question.workload.optimizer] * outcome.trainable_parameter_count
    )
    run = training_run(
        tokens_per_second=outcome.tokens_per_second,
        devices=question.cluster.devices,
        nodes=question.cluster.nodes,
        checkpoint_bytes=state,
        spot_interruptions=spot_interruptions,
        price_per_device_hour=price,
        watts_per_device=power.value if power else None,
        economics=economics,
    )
    fields: dict[str, object] = {"price_per_device_hour": price, "price_is_assumed": assumed}
    if price is not None:
        hourly = question.cluster.devices * price
        each = hourly / (outcome.tokens_per_second * HOUR)
        fields["dollars_per_million_tokens"] = rounded(each * 1e6)
    return fields | (_run_fields(run) if run else {})


def _run_fields(run: Run) -> dict[str, object]:
    values = {
        "mtbf_hours": run.mtbf_seconds / HOUR,
        "checkpoint_every_seconds": run.checkpoint_every_seconds,
        "training_share": run.share,
        "training_days": run.wall_seconds / DAY,
        "training_dollars": run.dollars,
        "energy_kwh": run.kwh,
        "carbon_kg": run.carbon_kg,
    }
    return {name: None if v is None else rounded(v) for name, v in values.items()}


def price_of(question: Question, economics: Economics) -> tuple[float | None, bool]:
    """US dollars of a device-hour, and whether that is the profile's assumption."""
    device = question.cluster.device
    given = economics.prices.get(device.name, economics.price_per_device_hour)
    if given is not None:
        return given, False
    figure = question.cluster.price_per_device_hour or device.price_per_device_hour
    return (figure.value if figure else None), True


def _with_scaling_efficiency(
    rows: Sequence[WhatIfPoint], points: Sequence[GridPoint]
) -> list[WhatIfPoint]:
    """Fill in `scaling_efficiency`, relative to the smallest planned cluster of each series."""
    smallest: dict[tuple[object, ...], WhatIfPoint] = {}
    for row, point in zip(rows, points, strict=True):
        before = smallest.get(point.series)
        if row.tokens_per_second and (before is None or row.gpus < before.gpus):
            smallest[point.series] = row
    filled = []
    for row, point in zip(rows, points, strict=True):
        base = smallest.get(point.series)
        if row.tokens_per_second and base and base.tokens_per_second:
            here = row.tokens_per_second / row.gpus
            share = rounded(here / (base.tokens_per_second / base.gpus))
            row = row.model_copy(update={"scaling_efficiency": share})
        filled.append(row)
    return filled


def _assumptions(rows: Sequence[WhatIfPoint], economics: Economics) -> tuple[str, ...]:
    """What the figures rest on beside the plans, one a line."""
    prices = {
        row.device: row.price_per_device_hour
        for row in rows
        if row.price_is_assumed and row.price_per_device_hour is not None
    }
    lines = []
    if prices:
        words = ", ".join(f"{device} {price:g}" for device, price in prices.items())
        lines.append(f"assumed prices in dollars per device-hour, yours with --price: {words}")
    lines.append(
        f"a failure every {economics.device_mtbf_hours:,.0f} hours of each device, "
        f"{economics.restart_seconds / 60:g} min to restart; each node writes checkpoints at "
        f"{economics.checkpoint_bytes_per_second / 1e9:.3g} GB/s, as often as loses least (Daly)"
    )
    lines.append(
        f"energy: maximum power of the devices times {economics.power_overhead:g}; "
        f"{economics.carbon_kg_per_kwh:g} kg of CO2 per kWh"
    )
    return tuple(lines)
