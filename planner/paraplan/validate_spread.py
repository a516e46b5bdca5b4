"""Spreads of measured over predicted times by kind of run, and whether they hold elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from paraplan.uncertainty import Spread, shipped_spreads

LEAST_RUNS = 12
"""Runs of one kind from which on its own spread is taken, else that of all kinds."""


TAIL = 0.08
"""Of the runs seen that the interval leaves out at each end. A little less than half of what is not
covered, because models that were not seen spread wider (`coverage` says by how much)."""


class Timed(Protocol):
    """A prediction with what was measured."""

    @property
    def kind(self) -> str:
        """Of run (see `uncertainty.kind_of`)."""

    @property
    def device(self) -> str:
        """Name of the device's profile."""

    @property
    def ratio(self) -> float:
        """Measured over predicted seconds."""

    @property
    def group(self) -> tuple[str, str]:
        """File and model."""


def spreads_of(runs: Sequence[Timed]) -> dict[str, Spread]:
    """The spread of each kind; models weigh the same, whatever their number of runs."""
    made = {"": _spread(runs)} if runs else {}
    for kind in sorted({run.kind for run in runs}):
        own = [run for run in runs if run.kind == kind]
        made[kind] = _spread(own) if len(own) >= LEAST_RUNS else made[""]
    return made


def _spread(runs: Sequence[Timed]) -> Spread:
    models = Counter(run.group for run in runs)
    ordered = sorted((run.ratio, 1 / models[run.group] / len(models)) for run in runs)
    tail = TAIL
    return Spread(_quantile(ordered, tail), _quantile(ordered, 1 - tail), len(runs))


def _quantile(ordered: Sequence[tuple[float, float]], share: float) -> float:
    reached = 0.0
    for value, weight in ordered:
        reached += weight
        if reached >= share - 1e-12:
            return value
    return ordered[-1][0]


def coverage(runs: Sequence[Timed]) -> float | None:
    """Share of the runs within the interval that the *other* models give; files weigh the same."""
    files = Counter(run.group[0] for run in runs)
    inside = 0.0
    for group in sorted({run.group for run in runs}):
        spreads = spreads_of([run for run in runs if run.group != group])
        if not spreads:
            return None
        for run in (run for run in runs if run.group == group):
            spread = spreads.get(run.kind, spreads[""])
            if spread.low <= run.ratio <= spread.high:
                inside += 1 / files[group[0]] / len(files)
    return inside if runs else None


def as_toml(runs: Sequence[Timed], source: str) -> str:
    """The table as `uncertainty.shipped_spreads` reads it; what no run tells stays as shipped."""
    spreads = spreads_of(runs)
    spreads.pop("", None)
    kept, _ = shipped_spreads()
    devices = sorted({run.device for run in runs})
    lines = [
        "# Measured over predicted step time: four of five runs of each kind lie between low and",
        f"# high, models that were not seen among them. {source}",
        f"devices = [{', '.join(repr(name) for name in devices)}]".replace("'", '"'),
    ]
    for kind, spread in (kept | spreads).items():
        lines += [
            "",
            "[[kinds]]",
            f'kind = "{kind}"',
            f"low = {spread.low:.4f}",
            f"high = {spread.high:.4f}",
            f"runs = {spread.runs}",
        ]
    return "\n".join(lines) + "\n"
