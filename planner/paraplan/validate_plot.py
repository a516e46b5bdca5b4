"""Predicted against measured step times as an SVG picture, without any plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

COLOURS = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f"),
    *("#bcbd22", "#17becf", "#393b79", "#b5761a", "#637939", "#843c39", "#7b4173", "#3182bd"),
)
SIZE, LEFT, TOP, LEGEND = 640, 70, 40, 230

Point = tuple[str, float, float]
"""Source, measured and predicted seconds."""


def scatter_svg(points: Sequence[Point]) -> str:
    """A picture on logarithmic axes; the diagonal is a perfect prediction, grey lines +-20 %."""
    values = [value for _, *pair in points for value in pair] or [1.0]
    low = math.floor(math.log10(min(values)) * 2) / 2
    high = max(low + 0.5, math.ceil(math.log10(max(values)) * 2) / 2)

    def place(value: float) -> float:
        return (math.log10(value) - low) / (high - low) * SIZE

    width, height = LEFT + SIZE + LEGEND, TOP + SIZE + 50
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="16">Predicted against measured seconds of a step, '
        f"{len(points)} runs</text>",
        f'<rect x="{LEFT}" y="{TOP}" width="{SIZE}" height="{SIZE}" fill="none" stroke="black"/>',
        *_axes(low, high),
        *(_diagonal(factor, low, high) for factor in (1.0, 0.8, 1.25)),
    ]
    names = sorted({name for name, _, _ in points})
    for index, name in enumerate(names):
        colour = COLOURS[index % len(COLOURS)]
        dots = "".join(
            f'<circle cx="{LEFT + place(measured):.1f}" '
            f'cy="{TOP + SIZE - place(predicted):.1f}" r="2.5"/>'
            for source, measured, predicted in points
            if source == name
        )
        lines.append(f'<g fill="{colour}" fill-opacity="0.6">{dots}</g>')
        x, y = LEFT + SIZE + 20, TOP + 14 + 20 * index
        lines.append(f'<circle cx="{x}" cy="{y - 4}" r="5" fill="{colour}"/>')
        lines.append(f'<text x="{x + 12}" y="{y}">{escape(name)}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def _axes(low: float, high: float) -> list[str]:
    """Ticks at whole powers of ten, and the axes' names."""
    made = []
    for power in range(math.ceil(low), math.floor(high) + 1):
        at = (power - low) * SIZE / (high - low)
        x, y = LEFT + at, TOP + SIZE - at
        label = f"{10.0**power:g}"
        made += [
            f'<path d="M{x:.1f} {TOP}v{SIZE}M{LEFT} {y:.1f}h{SIZE}" stroke="#ddd"/>',
            f'<text x="{x:.1f}" y="{TOP + SIZE + 18}" text-anchor="middle">{label}</text>',
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>',
        ]
    middle = TOP + SIZE / 2
    made.append(
        f'<text x="{LEFT + SIZE / 2}" y="{TOP + SIZE + 40}" text-anchor="middle">'
        "measured, seconds</text>"
    )
    made.append(
        f'<text transform="translate(20 {middle}) rotate(-90)" text-anchor="middle">'
        "predicted, seconds</text>"
    )
    return made


def _diagonal(factor: float, low: float, high: float) -> str:
    """The line on which predicted is ``factor`` times measured, clipped to the frame."""
    shift = math.log10(factor) * SIZE / (high - low)
    start, end = max(0.0, -shift), min(SIZE, SIZE - shift)
    colour = "black" if factor == 1 else "#aaa"
    return (
        f'<path d="M{LEFT + start:.1f} {TOP + SIZE - start - shift:.1f}'
        f'L{LEFT + end:.1f} {TOP + SIZE - end - shift:.1f}" stroke="{colour}"/>'
    )
