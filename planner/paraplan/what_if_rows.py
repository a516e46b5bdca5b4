"""`plan what-if`: from axes to planned points, what training on each takes, and the answer.

``what_if("mistral-7b", gpus="8..512", device="h100,a100")`` returns a `WhatIf`, whose ``points``
are tidy rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from paraplan.describe import rounded, tool_version
from paraplan.errors import InputError
from paraplan.report import layout_words
from paraplan.request import GIB, Question, Request, request_from_options, resolve
from paraplan.sensitivity import ranked, richer_questions
from paraplan.sizing import answer, pareto_front
from paraplan.sweep import Done, Outcome, plan_questions
from paraplan.training_cost import DAY, HOUR, Run, training_run
from paraplan.what_if_axes import (
    AXIS_NAMES,
    Axes,
    GridPoint,
    axes_from_values,
    command_of,
    grid,
)
from paraplan.what_if_file import Answer, Economics, Limits, Sensitivity, WhatIf, WhatIfPoint
from paraplan.workload import OPTIMIZER_STATE_BYTES

MASTER_BYTES = 4  # of a parameter in a checkpoint


def _silent(finished: int, of: int) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The whole question of a what-if.

    Attributes:
        common: what is the same for all points.
        sensitivity: whether to plan the best point again with more of each resource.
        command: how to ask it again.
    """

    axes: Axes
    common: Request
    economics: Economics = field(default_factory=Economics)
    limits: Limits = field(default_factory=Limits)
    sensitivity: bool = False
    command: str = ""


def what_if(
    model: str | Sequence[str],
    *,
    gpus: int | str | Sequence[int] | None = None,
    economics: Economics | None = None,
    limits: Limits | None = None,
    sensitivity: bool = False,
    workers: int = 1,
    **options: Any,
) -> WhatIf:
    """Plan every combination of the values given; ``points`` of the result are tidy rows.

    Args:
        model: see `Request`.
        gpus: numbers, or a range such as ``"8..512"``.
        options: other fields of `what_if_axes.Axes`, one value or several each; and of
            `Request`, which hold for all points.
        workers: processes; more than one only from a script that guards its start with
            ``if __name__ == "__main__":``.

    Raises:
        InputError: an option is wrong.
    """
    varied: dict[str, Any] = {"model": model, "gpus": gpus}
    varied |= {name: options.pop(name) for name in AXIS_NAMES if name in options}
    sweep = Sweep(
        axes=axes_from_values(varied),
        common=request_from_options("", options | {"top": 1}),
        economics=economics or Economics(),
        limits=limits or Limits(),
        sensitivity=sensitivity,
        command=f"what_if({model!r}, gpus={gpus!r}, ...)",
    )
    return run_sweep(sweep, workers=workers)


def run_sweep(sweep: Sweep, *, workers: int = 1, done: Done = _silent) -> WhatIf:
    """Plan every point and answer the question.

    Raises:
        InputError: bad input, or no point that can be planned for.
    """
    points = grid(sweep.axes, sweep.common)
    plain = [resolve(point.request) for point in points]
    headroom = sweep.limits.min_headroom
    questions = [with_headroom(question, headroom) for question in plain]
    asked = questions + plain if headroom else questions
    outcomes = plan_questions(asked, workers=workers, done=done)
    rows = _rows(points, questions, outcomes[: len(points)], sweep.economics)
    # Whether the headroom binds, only the same points planned without it can tell.
    roomy = _rows(points, plain, outcomes[-len(points) :], sweep.economics) if headroom else None
    front = pareto_front(rows)
    rows = [row.model_copy(update={"pareto": row.id in front}) for row in rows]
    found = answer(rows, sweep.limits, roomy) if sweep.limits != Limits() else None
    return WhatIf(
        tool_version=tool_version(),
        command=sweep.command,
        economics=sweep.economics,
        limits=sweep.limits,
        points=tuple(rows),
        pareto=front,
        answer=found,
        sensitivity=_sensitivity(rows, questions, found, sweep, workers),
        assumptions=_assumptions(rows, sweep.economics),
    )


def _rows(
    points: Sequence[GridPoint],
    questions: Sequence[Question],
    outcomes: Sequence[Outcome],
    economics: Economics,
) -> list[WhatIfPoint]:
    rows = [
        point_row(i, question, point.spot_interruptions, outcome, economics)
        for i, (point, question, outcome) in enumerate(
            zip(points, questions, outcomes, strict=True)
        )
    ]
    return _with_fewer_devices(_with_scaling_efficiency(rows, points), points)


def _sensitivity(
    rows: Sequence[WhatIfPoint],
    questions: Sequence[Question],
    found: Answer | None,
    sweep: Sweep,
    workers: int,
) -> tuple[Sensitivity, ...]:
    """Of the cheapest point that meets the limits; without one, of the cheapest to train on."""
    planned = [row for row in rows if row.status == "planned"]
    if not sweep.sensitivity or not planned:
        return ()
    if found is not None and found.cheapest is not None:
        point = rows[found.cheapest.point]
    else:
        point = min(planned, key=lambda row: (row.training_dollars or math.inf, row.id))
    richer = richer_questions(questions[point.id])
    outcomes = plan_questions(list(richer.values()), workers=workers)
    again = {
        resource: point_row(point.id, question, point.spot_interruptions, outcome, sweep.economics)
        for (resource, question), outcome in zip(richer.items(), outcomes, strict=True)
    }
    return ranked(point, again)


def with_headroom(question: Question, min_headroom: float | None) -> Question:
    """The question with that share of each device's memory left free, at least."""
    if min_headroom is None:
        return question
    whole = [kind.device.memory_capacity_bytes.value for kind in question.cluster.kinds]
    capacities = tuple(
        min((1 - min_headroom) * memory, capacity)
        for memory, capacity in zip(whole, question.capacities_bytes, strict=True)
    )
    if capacities == question.capacities_bytes:
        return question
    if len(set(capacities)) > 1:
        raise InputError(
            "--min-headroom leaves two kinds of devices with unequal memory, which no single "
            "--memory-limit says",
            hint="give --memory-limit instead",
        )
    request = replace(question.request, memory_limit_gib=capacities[0] / GIB)
    return replace(question, request=request, capacities_bytes=capacities)


def point_row(
    index: int,
    question: Question,
    spot_interruptions: float,
    outcome: Outcome,
    economics: Economics,
) -> WhatIfPoint:
    """A planned question as a tidy row, with what training there takes."""
    cluster, work = question.cluster, question.workload
    memory = min(kind.device.memory_capacity_bytes.value for kind in cluster.kinds)
    row = WhatIfPoint(
        id=index,
        model=question.source.name,
        cluster=cluster.name,
        device=" + ".join(kind.device.name for kind in cluster.kinds),
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
        "headroom": outcome.headroom,
        "gap": outcome.gap,
    }
    training = _training(question, spot_interruptions, outcome, economics)
    return row.model_copy(update=planned | training)


def _training(
    question: Question, spot_interruptions: float, outcome: Outcome, economics: Economics
) -> dict[str, object]:
    """Fields of a row that say what the whole run takes."""
    kinds = question.cluster.kinds
    price, assumed = price_of(question, economics)
    watts = _mean(
        question,
        [kind.device.power_watts.value if kind.device.power_watts else None for kind in kinds],
    )
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
        watts_per_device=watts,
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
    """US dollars of a device-hour (the mean of two kinds), and whether one of them is assumed."""
    prices, assumed = [], False
    for kind in question.cluster.kinds:
        given = economics.prices.get(kind.device.name, economics.price_per_device_hour)
        figure = kind.price_per_device_hour or kind.device.price_per_device_hour
        assumed |= given is None
        prices.append(figure.value if given is None and figure else given)
    return _mean(question, prices), assumed


def _mean(question: Question, values: Sequence[float | None]) -> float | None:
    """Of one value for each kind of devices, over the devices; None if one is not known."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    counts = [kind.devices for kind in question.cluster.kinds]
    total = sum(value * count for value, count in zip(known, counts, strict=True))
    return total / question.cluster.devices


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


def _with_fewer_devices(
    rows: Sequence[WhatIfPoint], points: Sequence[GridPoint]
) -> list[WhatIfPoint]:
    """Fill in `idle_is_better`: the fastest smaller cluster, where a larger one is no faster."""
    alike: dict[tuple[object, ...], list[WhatIfPoint]] = {}
    for row, point in zip(rows, points, strict=True):
        alike.setdefault((*point.series, row.global_batch), []).append(row)
    better: dict[int, int] = {}
    for same in alike.values():
        best: WhatIfPoint | None = None
        for row in sorted(same, key=lambda row: row.gpus):
            step = row.step_seconds or math.inf
            if best is not None and best.step_seconds is not None and best.step_seconds <= step:
                better[row.id] = best.gpus
            elif row.step_seconds is not None:
                best = row
    return [row.model_copy(update={"idle_is_better": better.get(row.id)}) for row in rows]


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
