"""A what-if sweep as text for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from paraplan.errors import InfeasibleError
from paraplan.what_if_file import Choice, WhatIf, WhatIfPoint

GIB = 2**30
MOST_ROWS = 60
MOST_IDLE = 4
_AXES: tuple[tuple[str, str, Callable[[WhatIfPoint], object]], ...] = (
    ("model", "model", lambda p: p.model),
    ("device", "device", lambda p: p.device),
    ("precision", "prec.", lambda p: p.precision),
    ("seq_len", "seq", lambda p: p.seq_len),
    ("memory_gib", "GiB", lambda p: f"{p.memory_gib:.0f}"),
    ("link_bandwidth", "links", lambda p: f"x{p.link_bandwidth:g}"),
    ("spot_interruptions", "spot", lambda p: f"{p.spot_interruptions:g}"),
    ("gpus", "gpus", lambda p: p.gpus),
    ("global_batch", "batch", lambda p: p.global_batch),
)


def print_what_if(result: WhatIf, console: Console | None = None) -> None:
    """The points, the Pareto front marked, and the answer to the limits."""
    if console is None:
        console = Console()
        if not console.is_terminal:
            console = Console(width=80)  # piped output looks the same everywhere
    _print_head(result, console)
    _print_points(result, console)
    _print_reasons(result, console)
    _print_idle(result, console)
    if result.answer is not None and result.answer.cheapest and result.answer.fastest:
        _print_choice("cheapest", result.answer.cheapest, result, console)
        _print_choice("fastest", result.answer.fastest, result, console)
        console.print()
    if result.sensitivity:
        _print_sensitivity(result, console)
    for line in result.assumptions:
        console.print(line, style="dim", highlight=False)


def _print_head(result: WhatIf, console: Console) -> None:
    first = result.points[0]
    same = [
        name if label == "model" else f"{label} {name}"
        for field, label, show in _AXES
        if field not in _varied(result)
        for name in [str(show(first))]
        if label in ("model", "device", "seq")
    ]
    console.print(
        f"[bold]{escape(', '.join(same))}[/]; {_count(result.economics.tokens)} tokens",
        highlight=False,
    )
    console.print()


def _varied(result: WhatIf) -> set[str]:
    varied = {
        field
        for field, _, _ in _AXES
        if len({getattr(point, field) for point in result.points}) > 1
    }
    of_devices = {(point.device, point.memory_gib) for point in result.points}
    if len(of_devices) == len({point.device for point in result.points}):
        varied.discard("memory_gib")  # it is what each device has
    return varied | {"gpus"}


def _print_points(result: WhatIf, console: Console) -> None:
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    varied = _varied(result)
    axes = [axis for axis in _AXES if axis[0] in varied]
    table.add_column("", justify="right")
    for _, title, _ in axes:
        table.add_column(title, justify="left" if title in ("model", "device") else "right")
    for title in ("step s", "MFU", "free", "scales", "$/Mtok", "days", "cost"):
        table.add_column(title, justify="right", no_wrap=True)
    for point in result.points[:MOST_ROWS]:
        mark = "*" if point.pareto else ""
        table.add_row(
            f"{point.id}{mark}", *(str(show(point)) for _, _, show in axes), *_cells(point)
        )
    console.print(table, highlight=False)
    if len(result.points) > MOST_ROWS:
        console.print(f"and {len(result.points) - MOST_ROWS} more (--csv shows all)")
    console.print("* nothing else is both faster and cheaper", style="dim")
    console.print()


def _cells(point: WhatIfPoint) -> list[str]:
    if point.step_seconds is None:
        return ["no plan"]
    return [
        f"{point.step_seconds:.3g}",
        _percent(point.mfu),
        _percent(point.headroom),
        _percent(point.scaling_efficiency),
        "-"
        if point.dollars_per_million_tokens is None
        else f"{point.dollars_per_million_tokens:.3f}",
        "never" if point.training_days is None else _days(point.training_days),
        "-" if point.training_dollars is None else _count(point.training_dollars),
    ]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value * 100:.0f} %"


def _days(days: float) -> str:
    return f"{days:.3g}" if days < 1000 else f"{days:,.0f}"


def _count(value: float) -> str:
    """``1.4 M``: three digits and a power of a thousand."""
    for power, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= power:
            return f"{value / power:.3g} {letter}"
    return f"{value:.3g}"


def _print_reasons(result: WhatIf, console: Console) -> None:
    """Why points have no plan, each reason once."""
    reasons: dict[str, list[int]] = {}
    for point in result.points:
        if point.status != "planned":
            reasons.setdefault(point.reason, []).append(point.id)
    for reason, ids in list(reasons.items())[:4]:
        more = "" if len(ids) == 1 else f" and {len(ids) - 1} more"
        console.print(f"{ids[0]}{more}: {reason}", highlight=False, markup=False)
    if reasons:
        console.print()


def _print_idle(result: WhatIf, console: Console) -> None:
    """Points that fewer devices match: a plan uses all that it is given."""
    matched = [point for point in result.points if point.idle_is_better is not None]
    for point in matched[:MOST_IDLE]:
        console.print(
            f"{point.id}: {point.idle_is_better} of its {point.gpus} devices take the step no "
            "slower; a plan uses all, so leave the others out",
            highlight=False,
        )
    if len(matched) > MOST_IDLE:
        console.print(f"and {len(matched) - MOST_IDLE} more such points (--csv shows all)")
    if matched:
        console.print()


def _print_choice(word: str, choice: Choice, result: WhatIf, console: Console) -> None:
    point = result.points[choice.point]
    names = {"deadline": "the deadline", "budget": "the budget", "min_headroom": "the headroom"}
    binds = " and ".join(names[name] for name in choice.binding)
    console.print(
        f"[bold]{word}[/]: {point_words(point)}" + (f"; {binds} binds" if binds else ""),
        highlight=False,
    )


def point_words(point: WhatIfPoint) -> str:
    """``64 x h100-sxm, 12.3 days for $1.2 M``."""
    days = "no end" if point.training_days is None else f"{_days(point.training_days)} days"
    cost = "" if point.training_dollars is None else f" for ${_count(point.training_dollars)}"
    return f"{point.gpus} x {escape(point.device)} (point {point.id}), {days}{cost}"


def _print_sensitivity(result: WhatIf, console: Console) -> None:
    point = result.points[result.sensitivity[0].point]
    console.print(f"of {point_words(point)}, planned again with more of one thing:")
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    for title in ("", "", "step", "cost of the run"):
        table.add_column(title, justify="right" if title else "left")
    for row in result.sensitivity:
        table.add_row(
            row.resource.replace("_", " "),
            f"x{row.factor:g}",
            f"{row.step_change * 100:+.2f} %",
            f"{row.dollars_change * 100:+.2f} %",
        )
    console.print(table, highlight=False)
    console.print()


def nothing_meets(result: WhatIf) -> InfeasibleError:
    """That no point meets the limits, and the nearest that can be had."""
    limits, words = result.limits, []
    if limits.deadline_days:
        words.append(f"{limits.deadline_days:g} days")
    if limits.budget_dollars:
        words.append(f"${_count(limits.budget_dollars)}")
    if limits.min_headroom:
        words.append(f"{limits.min_headroom * 100:g} % of memory free")
    message = f"none of the {len(result.points)} points meets {' and '.join(words)}"
    nearest = result.answer.nearest if result.answer else None
    if nearest is None:
        return InfeasibleError(message, hint="no point has a plan, a price and an end")
    return InfeasibleError(message, hint=f"nearest: {point_words(result.points[nearest])}")
