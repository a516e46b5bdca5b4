"""The report of a what-if: the answer, the Pareto front, curves over devices, and every point."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from paraplan.page_chart import Point, Series, axis_of, chart, series_legend, short
from paraplan.page_parts import (
    Cell,
    Part,
    bar,
    command,
    data_block,
    definition_list,
    folded,
    number,
    page,
    table,
    text,
)
from paraplan.what_if_file import Choice, WhatIf, WhatIfPoint, what_if_to_json

MOST_SERIES = 16
"""Curves of a chart; more are left out, and the page says so."""

AXES = {
    "model": "model",
    "cluster": "cluster",
    "device": "device",
    "memory_gib": "GiB",
    "global_batch": "batch",
    "seq_len": "tokens",
    "precision": "precision",
    "link_bandwidth": "links x",
    "spot_interruptions": "interruptions a day",
}
"""What a sweep varies beside the number of devices, as the page calls it."""

CURVES: tuple[tuple[str, str, float], ...] = (
    ("tokens_per_second", "tokens a second", 1.0),
    ("mfu", "MFU, %", 100.0),
    ("scaling_efficiency", "scaling efficiency, %", 100.0),
    ("dollars_per_million_tokens", "dollars per million tokens", 1.0),
)


def sweep_page(result: WhatIf) -> str:
    """The report of a sweep."""
    sections = [
        ("front", "Time against money", _front(result)),
        ("curves", "By number of devices", _curves(result)),
        ("points", "All points", _points(result)),
    ]
    if result.sensitivity:
        sections.append(("sensitivity", "What the money is best spent on", _sensitivity(result)))
    sections.append(("inputs", "Assumptions", _inputs(result)))
    models = ", ".join(dict.fromkeys(point.model for point in result.points))
    title = f"What if: {models}"
    return page(title, _answer(result), sections, data_block("sweep", what_if_to_json(result)))


def _varied(result: WhatIf, *, settled_by: Sequence[str]) -> list[str]:
    """The axes on which points differ, without those that one of ``settled_by`` decides.

    A device decides its memory and its usual cluster, the number of devices the default batch.
    """

    def kinds(*axes: str) -> int:
        return len({tuple(getattr(point, axis) for axis in axes) for point in result.points})

    return [
        axis
        for axis in AXES
        if kinds(axis) > 1
        and not any(by != axis and kinds(by, axis) == kinds(by) for by in settled_by)
    ]


def _named(point: WhatIfPoint, varied: Sequence[str]) -> str:
    """A point without its number of devices."""
    words = []
    for axis in varied or ("device",):
        value = getattr(point, axis)
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        words.append(shown if isinstance(value, str) else f"{AXES[axis]} {shown}")
    return ", ".join(words)


def _said(point: WhatIfPoint, varied: Sequence[str]) -> str:
    days = f", {point.training_days:.1f} days" if point.training_days is not None else ""
    money = f", ${point.training_dollars:,.0f}" if point.training_dollars is not None else ""
    return f"{point.gpus} x {_named(point, varied)}{days}{money}: {point.layout}"


def _answer(result: WhatIf) -> str:
    planned = [point for point in result.points if point.status == "planned"]
    limits, answer = result.limits, result.answer
    wanted = []
    if limits.deadline_days is not None:
        wanted.append(f"within {limits.deadline_days:g} days")
    if limits.budget_dollars is not None:
        wanted.append(f"for at most ${limits.budget_dollars:,.0f}")
    if limits.min_headroom is not None:
        wanted.append(f"with {limits.min_headroom * 100:g} % of the memory free")
    facts = [("Points", f"{len(planned):,} planned of {len(result.points):,}")]
    by_id = {point.id: point for point in result.points}
    if answer is not None:
        facts += [
            (name, _choice(choice, by_id))
            for name, choice in (("Cheapest", answer.cheapest), ("Fastest", answer.fastest))
            if choice is not None
        ]
        if answer.nearest is not None:
            facts.append(("Nothing meets the limits; nearest", _linked(by_id[answer.nearest])))
    tokens = short(result.economics.tokens)
    asked = f", {' and '.join(wanted)}" if wanted else ""
    return f'<p class="answer">To train on {tokens} tokens{text(asked)}.</p>' + definition_list(
        facts
    )


def _choice(choice: Choice, points: dict[int, WhatIfPoint]) -> str:
    names = {"deadline": "deadline", "budget": "budget", "min_headroom": "headroom"}
    bound = ", ".join(names[limit] for limit in choice.binding)
    return _linked(points[choice.point]) + (f"<br>limited by the {bound}" if bound else "")


def _linked(point: WhatIfPoint) -> str:
    figures = []
    if point.training_days is not None:
        figures.append(f"{point.training_days:.1f} days")
    if point.training_dollars is not None:
        figures.append(f"${point.training_dollars:,.0f}")
    said = f"{point.gpus} x {point.device}"
    return f'<a href="#p{point.id}">{text(said)}</a><br>{text(", ".join(figures))}'


def _series(
    result: WhatIf,
    x: Callable[[WhatIfPoint], float | None],
    y: Callable[[WhatIfPoint], float | None],
) -> list[Series]:
    """Points with both figures, by everything that is varied but the number of devices."""
    varied = _varied(result, settled_by=("device", "gpus"))
    groups: dict[str, list[Point]] = {}
    for point in result.points:
        across, up = x(point), y(point)
        name = _named(point, varied)
        here = groups.setdefault(name, [])  # a colour stays the same in all charts
        if across and up and up > 0:
            mark = point.id in result.pareto
            here.append(Point(across, up, f"p{point.id}", _said(point, varied), mark))
    return [
        Series(name, look, tuple(sorted(points)))
        for look, (name, points) in enumerate(groups.items())
        if points
    ]


def _front(result: WhatIf) -> str:
    series = _series(result, lambda p: p.training_days, lambda p: p.training_dollars)
    if not series:
        return "<p>No point has both a training time and a price.</p>"
    every = [point for one in series for point in one.points]
    x = axis_of("days of training", (p.x for p in every), logarithmic=True)
    y = axis_of("dollars", (p.y for p in every), logarithmic=True)
    front = sorted((p.x, p.y) for p in every if p.marked)
    return (
        "<p>Each point is a cluster; lower and further left is better. On the dashed Pareto front "
        "nothing is both faster and cheaper. Choose a point to see its row.</p>"
        + chart("Dollars", series, x, y, lines=False, front=front)
        + series_legend(series)
    )


def _curves(result: WhatIf) -> str:
    drawn = []
    left_out = 0
    seen: dict[str, Series] = {}
    for field, title, scale in CURVES:

        def figure(point: WhatIfPoint, field: str = field, scale: float = scale) -> float | None:
            value = getattr(point, field)
            return None if value is None else value * scale

        series = _series(result, lambda p: float(p.gpus), figure)
        left_out = max(left_out, len(series) - MOST_SERIES)
        series = series[:MOST_SERIES]
        seen |= {one.name: one for one in series}
        every = [point for one in series for point in one.points]
        if not every:
            continue
        x = axis_of("devices", (p.x for p in every), logarithmic=True)
        y = axis_of(title, (p.y for p in every), logarithmic=field == "tokens_per_second")
        sizes = sorted({p.x for p in every})
        drawn.append(chart(title[:1].upper() + title[1:], series, x, y, lines=True, x_ticks=sizes))
    note = f"<p>The first {MOST_SERIES} curves of each; {left_out} more are in the table.</p>"
    if not drawn:
        return "<p>Nothing could be planned.</p>"
    charts = f'{series_legend(seen.values())}<div class="charts">{"".join(drawn)}</div>'
    return (note if left_out > 0 else "") + charts


def _points(result: WhatIf) -> str:
    shown = [axis for axis in _varied(result, settled_by=("device",)) if axis != "device"]
    heads = [
        "point",
        "devices",
        "device",
        *(AXES[axis] for axis in shown),
        "layout",
        "step, s",
        "tokens/s",
        "MFU, %",
        "memory free, %",
        "efficiency, %",
        "$/M tokens",
        "days",
        "$",
        "MWh",
        "t CO2",
        "front",
    ]
    rows = [_row(point, shown) for point in result.points]
    identifiers = [f"p{point.id}" for point in result.points]
    return table("All points", heads, rows, filtered=True, identifiers=identifiers)


def _row(point: WhatIfPoint, shown: Iterable[str]) -> tuple[Cell, ...]:
    axes = [getattr(point, axis) for axis in shown]
    what = point.layout if point.status == "planned" else f"{point.status}: {point.reason}"
    again = folded("command", command(point.command)) if point.command else ""
    return (
        Cell(str(point.id), point.id),
        Cell(f"{point.gpus:,}", point.gpus),
        Cell(text(point.device)),
        *(Cell(text(v)) if isinstance(v, str) else number(v, "g") for v in axes),
        Cell(f'<div class="words">{text(what)}</div>{again}', what or ""),
        number(point.step_seconds, ".4g"),
        number(point.tokens_per_second, ",.0f"),
        number(point.mfu, ".1f", scale=100),
        number(point.headroom, ".1f", scale=100),
        number(point.scaling_efficiency, ".1f", scale=100),
        number(point.dollars_per_million_tokens, ".4g"),
        number(point.training_days, ".1f"),
        number(point.training_dollars, ",.0f"),
        number(point.energy_kwh, ",.1f", scale=1e-3),
        number(point.carbon_kg, ",.1f", scale=1e-3),
        Cell("Pareto" if point.pareto else "", "Pareto" if point.pareto else "~"),
    )


def _sensitivity(result: WhatIf) -> str:
    by_id = {point.id: point for point in result.points}
    most = max(abs(one.dollars_change) for one in result.sensitivity) or 1.0
    rows = []
    for one in result.sensitivity:
        point = by_id[one.point]
        gain = max(0.0, -one.dollars_change)
        picture = bar([Part(one.resource, "c5", gain / most, f"{gain * 100:.1f} %")])
        rows.append(
            (
                Cell(text(f"{point.gpus} x {point.device}")),
                Cell(text(one.resource.replace("_", " "))),
                number(one.factor, ".4g"),
                number(one.step_change, "+.2f", scale=100),
                number(one.dollars_change, "+.2f", scale=100),
                Cell(picture),
            )
        )
    heads = ("cluster", "resource", "times", "step, %", "dollars, %", "saved")
    said = (
        "<p>Each resource made better by its factor and the plan made again; at the same price per "
        "device, dollars change as shown, so that the resource may cost up to that much more.</p>"
    )
    return said + table("Sensitivity", heads, rows)


def _inputs(result: WhatIf) -> str:
    rest = result.economics
    facts = [
        ("Tokens", short(rest.tokens)),
        ("A device fails every", text(_hours_and_years(rest.device_mtbf_hours))),
        ("Checkpoints, each node", f"{rest.checkpoint_bytes_per_second / 1e9:.3g} GB/s"),
        ("From a failure to training", f"{rest.restart_seconds:g} s"),
        ("Power of the data centre over the devices'", f"{rest.power_overhead:g}"),
        ("CO2 of a kWh", f"{rest.carbon_kg_per_kwh:g} kg"),
        ("paraplan", text(result.tool_version)),
    ]
    assumed = "".join(f"<li>{text(line)}</li>" for line in result.assumptions)
    return (
        definition_list(facts)
        + (f"<p>Assumed:</p><ul>{assumed}</ul>" if assumed else "")
        + "<p>Ask again:</p>"
        + command(result.command)
        + '<p><button type="button" id="save" hidden>Save the sweep</button></p>'
    )


def _hours_and_years(hours: float) -> str:
    """A time between failures in hours and years."""
    return f"{hours:,.0f} h ({hours / 24 / 365.25:.1f} years)"
