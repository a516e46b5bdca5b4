"""Pieces of an HTML page: escaping, tables, bars, and the page around them.

Whatever stands in a plan (names, assumptions) passes through `text` or `attribute`; only functions
here and in the other `page_` modules write tags.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import NamedTuple

GIB = 2**30

TIME_COLOURS = {
    "forward": "c1",
    "backward": "c2",
    "recompute": "c3",
    "launch": "c8",
    "tensor_communication": "c4",
    "context_communication": "c4",
    "expert_communication": "c4",
    "data_communication": "c5",
    "pipeline_communication": "c6",
    "pipeline_bubble": "c0",
    "optimizer": "c7",
}
"""Colour classes of the stylesheet for the parts of a step; one colour means one thing."""

MEMORY_COLOURS = {
    "parameters": "c1",
    "gradients": "c2",
    "optimizer": "c7",
    "activations": "c5",
    "working": "c3",
    "gathered_parameters": "c4",
    "communication": "c6",
    "framework": "c8",
    "fragmentation": "c0",
}


def text(value: object) -> str:
    """A value as text of the page, quotes included."""
    return html.escape(str(value), quote=True)


def data_block(identifier: str, value: object) -> str:
    """JSON for scripts to read; no string in it can end the block."""
    raw = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        raw = raw.replace(sign, f"\\u{ord(sign):04x}")
    return f'<script type="application/json" id="{text(identifier)}">{raw}</script>'


class Cell(NamedTuple):
    """A cell of a table.

    Attributes:
        shown: its HTML.
        key: what it sorts by; None for the shown text.
    """

    shown: str
    key: float | str | None = None


def number(value: float | None, form: str, *, scale: float = 1.0) -> Cell:
    """A figure as ``form`` writes it, sorted by its value."""
    if value is None:
        return Cell("-", "")
    return Cell(text(format(value * scale, form)), value)


def table(
    caption: str,
    heads: Sequence[str],
    rows: Iterable[Sequence[Cell]],
    *,
    filtered: bool = False,
    identifiers: Sequence[str] = (),
) -> str:
    """A table whose heads sort it.

    Args:
        filtered: with a field that filters its rows.
        identifiers: of the rows, for links to them.
    """
    rows = list(rows)
    figures = [bool(rows) and _is_figure(rows[-1][column]) for column in range(len(heads))]
    head = "".join(
        f'<th scope="col"{NUMERIC if figure else ""}>'
        f'<button type="button" class="sort">{text(name)}</button></th>'
        for name, figure in zip(heads, figures, strict=True)
    )
    named = [f' id="{text(identifier)}"' for identifier in identifiers] or [""] * len(rows)
    body = "\n".join(
        f"<tr{name}>{''.join(map(_cell, row))}</tr>" for name, row in zip(named, rows, strict=True)
    )
    field = (
        f'<label class="filter">Filter <input type="search" aria-label="Filter {text(caption)}">'
        "<output></output></label>"
        if filtered
        else ""
    )
    return (
        f'<div class="tablebox">{field}<div class="scroll" tabindex="0" role="region" '
        f'aria-label="{text(caption)}"><table class="sortable"><caption>{text(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div></div>"
    )


NUMERIC = ' class="n"'


def _is_figure(cell: Cell) -> bool:
    return isinstance(cell.key, int | float) or cell.key == ""


def _cell(cell: Cell) -> str:
    if cell.key is None:
        return f"<td>{cell.shown}</td>"
    kind = NUMERIC if _is_figure(cell) else ""
    return f'<td{kind} data-key="{text(cell.key)}">{cell.shown}</td>'


class Part(NamedTuple):
    """A part of a stacked bar."""

    name: str
    colour: str
    share: float
    shown: str


def bar(parts: Iterable[Part]) -> str:
    """A stacked bar; shares are of its whole width."""
    pieces = "".join(
        f'<span class="{part.colour}" style="width:{part.share * 100:.3f}%" '
        f'title="{text(part.name)}: {text(part.shown)}"></span>'
        for part in parts
        if part.share > 0
    )
    return f'<div class="bar">{pieces}</div>'


def legend(names: Iterable[tuple[str, str]]) -> str:
    """Colour classes and what they mean."""
    items = "".join(f'<li><i class="{colour}"></i>{text(name)}</li>' for name, colour in names)
    return f'<ul class="legend">{items}</ul>'


def section(identifier: str, title: str, body: str) -> str:
    """A section that the page's index links to."""
    return f'<section id="{text(identifier)}"><h2>{text(title)}</h2>\n{body}\n</section>'


def definition_list(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and values; the values are HTML."""
    rows = "".join(f"<div><dt>{text(name)}</dt><dd>{value}</dd></div>" for name, value in pairs)
    return f'<dl class="facts">{rows}</dl>'


def command(line: str) -> str:
    """A command with a button that copies it."""
    return (
        f'<div class="command"><code>{text(line)}</code>'
        '<button type="button" class="copy">Copy</button></div>'
    )


def folded(summary: str, body: str) -> str:
    """HTML that a click or Enter unfolds."""
    return f"<details><summary>{text(summary)}</summary>{body}</details>"


def page(title: str, intro: str, sections: Sequence[tuple[str, str, str]], data: str) -> str:
    """The whole file.

    Args:
        intro: HTML under the title.
        sections: identifier, title, HTML of each.
        data: blocks from `data_block`.
    """
    assets = files("paraplan") / "assets"
    style = (assets / "page.css").read_text(encoding="utf-8")
    script = (assets / "page.js").read_text(encoding="utf-8")
    links = "".join(f'<a href="#{text(i)}">{text(name)}</a>' for i, name, _ in sections)
    body = "\n".join(section(*one) for one in sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" \
content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{text(title)}</title>
<style>
{style}</style>
</head>
<body>
<a class="skip" href="#main">To the content</a>
<header><h1>{text(title)}</h1>
<button type="button" id="theme" hidden>Theme: as the system</button></header>
<nav aria-label="Sections">{links}</nav>
<main id="main">
{intro}
{body}
</main>
<footer>Written by paraplan; this file needs no network.</footer>
{data}
<script>
{script}</script>
</body>
</html>
"""
