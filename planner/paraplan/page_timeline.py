"""The picture of a step: what each pipeline rank does from its first forward to the optimizer.

Drawn from the same replay as `plan timeline`. One SVG path for each rank and kind, so that a
picture of ten thousand passes stays small; the script zooms by changing the view box.
"""

from __future__ import annotations

from collections import defaultdict

from paraplan.page_parts import legend, text
from paraplan.plan_file import Plan
from paraplan.report import seconds_words
from paraplan.timeline import simulate_plan, slices

MOST_PASSES = 6_000
"""Passes drawn; of longer steps the first micro-batches are shown, and the page says so."""

WIDTH = 100_000  # units of the picture's width: a step
ROW, BAR = 20, 16  # units of height

KINDS = {
    "forward": ("forward", "c1"),
    "backward": ("backward", "c2"),
    "recompute": ("recomputation", "c3"),
    "collectives": ("collectives waited for", "c4"),
    "exchange": ("gradient exchange", "c5"),
    "optimizer": ("optimizer", "c7"),
}
"""Kinds of slices that keep a rank busy; what runs beside them is in the trace only."""


def timeline_picture(plan: Plan) -> str:
    """The step as bars, with buttons to look closer."""
    simulated = simulate_plan(plan, most_passes=MOST_PASSES)
    whole = simulated.replay.step_seconds
    drawn: dict[tuple[int, str], list[str]] = defaultdict(list)
    busy: dict[tuple[int, str], float] = defaultdict(float)
    for one in slices(plan, simulated.replay):
        if one.kind in KINDS and one.seconds > 0:
            left = round(one.start / whole * WIDTH)
            right = max(left + 1, round((one.start + one.seconds) / whole * WIDTH))
            top = one.rank * ROW + (ROW - BAR) // 2
            drawn[one.rank, one.kind].append(f"M{left} {top}h{right - left}v{BAR}H{left}z")
            busy[one.rank, one.kind] += one.seconds
    # Recomputation lies within its backward pass, so it is drawn after it.
    paths = "".join(
        f'<path class="{KINDS[kind][1]}" d="{"".join(drawn[rank, kind])}"><title>'
        f"rank {rank}, {KINDS[kind][0]}: {seconds_words(busy[rank, kind])} in all</title></path>"
        for rank in range(plan.layout.pipeline)
        for kind in KINDS
        if (rank, kind) in drawn
    )
    rows = plan.layout.pipeline
    labels = "".join(f"<span>{rank}</span>" for rank in range(rows))
    shown = [KINDS[kind] for kind in KINDS if any(kind == k for _, k in drawn)]
    buttons = "".join(
        f'<button type="button" data-zoom="{name}">{title}</button>'
        for name, title in (
            ("whole", "Whole step"),
            ("begin", "Begin"),
            ("end", "End"),
            ("in", "Closer"),
            ("out", "Farther"),
            ("left", "Earlier"),
            ("right", "Later"),
        )
    )
    return (
        f"<p>{_caption(plan, simulated.micro_batches, whole)}</p>{legend(shown)}"
        f'<div class="choices zoom" role="group" aria-label="View of the timeline">{buttons}</div>'
        f'<div class="timeline" id="timeline" tabindex="0" role="group" data-seconds="{whole:.9g}" '
        f'aria-label="Timeline of {rows} pipeline ranks; plus and minus zoom, arrows move">'
        f'<div class="ranks" aria-hidden="true">{labels}</div>'
        f'<svg viewBox="0 0 {WIDTH} {rows * ROW}" preserveAspectRatio="none" '
        f'style="height:{max(60, min(rows * ROW, 640))}px" role="img" '
        f'aria-label="{text(_spoken(plan, whole))}">{paths}</svg>'
        f'<div class="axis"><span>0 s</span><span></span><span>{seconds_words(whole)}</span></div>'
        "</div>"
    )


def _caption(plan: Plan, count: int, whole: float) -> str:
    layout = plan.layout
    said = (
        f"One row for each pipeline rank. Empty space is waiting. Replayed: {seconds_words(whole)}"
    )
    closed = seconds_words(plan.prediction.step_seconds)
    if count < layout.micro_batches:
        return text(
            f"{said} for the first {count:,} of {layout.micro_batches:,} micro-batches, as if the "
            f"step ended there; the whole step takes {closed}."
        )
    return text(f"{said}; the closed form says {closed}.")


def _spoken(plan: Plan, whole: float) -> str:
    rows = plan.layout.pipeline
    ranks = "one rank" if rows == 1 else f"{rows} pipeline ranks"
    return f"Bars of forward and backward passes of {ranks} over {seconds_words(whole)}"
