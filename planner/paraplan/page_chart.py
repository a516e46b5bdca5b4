"""Charts as SVG: lines and points over logarithmic or linear axes, readable without a script.

Series are told apart by colour and by the shape of their points, so that colour vision is not
needed. A point says what it is in its title, and leads to its row of a table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from paraplan.page_parts import text

WIDTH, HEIGHT = 720, 340
LEFT, RIGHT, TOP, BOTTOM = 66, 16, 14, 52  # margins
MOST_TICKS = 7
SIZE = 6.0  # half a point's width


class Point(NamedTuple):
    """A point of a chart.

    Attributes:
        row: identifier of the table row that it stands for.
        said: its title.
        marked: drawn bolder, and reached with Tab.
    """

    x: float
    y: float
    row: str
    said: str
    marked: bool = False


class Series(NamedTuple):
    """Points of one kind.

    Attributes:
        look: 0, 1, ...: its colour and shape.
    """

    name: str
    look: int
    points: tuple[Point, ...]


class Axis(NamedTuple):
    """One axis.

    Attributes:
        title: shown under the x axis; the y axis is named by the title of the chart.
        begin, end: the range that it shows.
    """

    title: str
    begin: float
    end: float
    logarithmic: bool

    def at(self, value: float) -> float:
        """Where a value lies, from 0 to 1."""
        if self.logarithmic:
            return math.log(value / self.begin) / math.log(self.end / self.begin)
        return (value - self.begin) / (self.end - self.begin)


def axis_of(title: str, values: Iterable[float], *, logarithmic: bool) -> Axis:
    """An axis with room for all values; linear ones begin at 0."""
    known = list(values)
    low, high = min(known), max(known)
    if logarithmic:
        return Axis(title, low / 1.15, high * 1.15, True)
    return Axis(title, 0.0, high * 1.08 or 1.0, False)


def ticks(axis: Axis) -> list[float]:
    """Round values within an axis, at most `MOST_TICKS`."""
    if axis.logarithmic:
        low, high = math.floor(math.log10(axis.begin)), math.ceil(math.log10(axis.end))
        for steps in (
            (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9),
            (1, 2, 3, 5, 7),
            (1, 2, 5),
            (1, 3),
            (1,),
        ):
            every = [m * 10.0**k for k in range(low, high + 1) for m in steps]
            found = [value for value in every if axis.begin <= value <= axis.end]
            if len(found) <= MOST_TICKS:
                return found
        return found[:: -(-len(found) // MOST_TICKS)]
    rough = axis.end / (MOST_TICKS - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    return [i * step for i in range(int(axis.end / step) + 1)]


def short(value: float) -> str:
    """A figure for an axis: 1200000 as 1.2M."""
    for size, sign in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{sign}"
    return f"{value:.3g}"


def chart(
    title: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    lines: bool,
    front: Sequence[tuple[float, float]] = (),
    x_ticks: Sequence[float] = (),
) -> str:
    """A figure; its title says what goes up.

    Args:
        lines: join the points of a series.
        front: points of a dashed line.
        x_ticks: values to write at the x axis (default: round ones).
    """
    shown = [value for value in x_ticks if x.begin <= value <= x.end] or ticks(x)
    shown = shown[:: -(-len(shown) // MOST_TICKS)]
    body = _grid(x, y, shown)
    if front:
        body += f'<polyline class="front" points="{_joined(front, x, y)}"/>'
    for one in series:
        if lines and len(one.points) > 1:
            path = _joined([(p.x, p.y) for p in one.points], x, y)
            body += f'<polyline class="curve m{one.look % 8}" points="{path}"/>'
    for one in series:
        body += "".join(_drawn(point, one, x, y) for point in one.points)
    return (
        f'<figure class="chart"><figcaption>{text(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="group" aria-label="{text(title)}">{body}</svg>'
        "</figure>"
    )


def series_legend(series: Iterable[Series]) -> str:
    """What each colour and shape stands for."""
    keys = []
    for one in series:
        shape = _shape(one.look, 0, 0, f'class="point m{one.look % 8}"')
        picture = (
            f'<svg width="16" height="16" viewBox="-9 -9 18 18" aria-hidden="true">{shape}</svg>'
        )
        keys.append(f"<li>{picture} {text(one.name)}</li>")
    return f'<ul class="legend chart-legend">{"".join(keys)}</ul>'


def _place(px: float, py: float, x: Axis, y: Axis) -> tuple[float, float]:
    across = LEFT + x.at(px) * (WIDTH - LEFT - RIGHT)
    return round(across, 1), round(HEIGHT - BOTTOM - y.at(py) * (HEIGHT - TOP - BOTTOM), 1)


def _joined(points: Iterable[tuple[float, float]], x: Axis, y: Axis) -> str:
    return " ".join("{},{}".format(*_place(px, py, x, y)) for px, py in points)


def _grid(x: Axis, y: Axis, x_ticks: Sequence[float]) -> str:
    floor, wall = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for value in x_ticks:
        at = round(LEFT + x.at(value) * (wall - LEFT), 1)
        parts.append(f'<path class="grid" d="M{at} {TOP}V{floor}"/>')
        parts.append(f'<text x="{at}" y="{floor + 20}" text-anchor="middle">{short(value)}</text>')
    for value in ticks(y):
        at = round(floor - y.at(value) * (floor - TOP), 1)
        parts.append(f'<path class="grid" d="M{LEFT} {at}H{wall}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{at + 4}" text-anchor="end">{short(value)}</text>')
    middle = (LEFT + wall) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{text(x.title)}</text>')
    return "".join(parts)


def _drawn(point: Point, series: Series, x: Axis, y: Axis) -> str:
    at_x, at_y = _place(point.x, point.y, x, y)
    best = " best" if point.marked else ""
    stop = ' tabindex="0" role="link"' if point.marked else ""
    attributes = f'class="point m{series.look % 8}{best}" data-row="{text(point.row)}"{stop}'
    return _shape(series.look, at_x, at_y, attributes, f"<title>{text(point.said)}</title>")


def _shape(look: int, x: float, y: float, attributes: str, inside: str = "") -> str:
    """Circle, square, diamond or triangle: 32 looks before one comes again."""
    s = SIZE
    form = (look + look // 8) % 4
    if form == 0:
        return f'<circle cx="{x}" cy="{y}" r="{s}" {attributes}>{inside}</circle>'
    corners = {
        1: f"M{x - s} {y - s}h{2 * s}v{2 * s}h{-2 * s}z",
        2: f"M{x} {y - s - 1}l{s + 1} {s + 1}l{-s - 1} {s + 1}l{-s - 1} {-s - 1}z",
        3: f"M{x} {y - s}l{s} {2 * s}h{-2 * s}z",
    }[form]
    return f'<path d="{corners}" {attributes}>{inside}</path>'
