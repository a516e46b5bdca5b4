"""What no predictor can reach on published runs, shown with their rows (used by accuracy.py).

Repeated runs of one layout differ; a predictor that knew every layout's mean would still rank
single runs wrong. And nanotron's pipelined runs fall into two modes that no column tells apart.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import fmean

from paraplan.validate_frameworks import framework_of
from paraplan.validate_layout import transfers_of
from paraplan.validate_predict import Prediction
from paraplan.validate_statistics import LEAST_SWEEP, Pair, rank_correlation, regret

DRAWS = 200
TRANSFER_WAIT_SECONDS = framework_of(("nanotron",), compiled=False).crowded_wait_seconds
"""What each transfer of a slow run takes beside its bytes: the step between the two modes."""
CANNOT_BE = "megatron_bridge-0146"
"""Needs 282 GB for parameters and gradients alone, of 279: accuracy_text.md."""

Sweeps = dict[tuple[str, ...], dict[tuple[str, ...], list[Prediction]]]


def sweeps_of(predictions: Sequence[Prediction]) -> Sweeps:
    """Sweeps with enough layouts, each layout's rows together."""
    found: Sweeps = defaultdict(lambda: defaultdict(list))
    for one in predictions:
        if one.measured_s:
            found[one.row.sweep][one.row.layout].append(one)
    return {sweep: rows for sweep, rows in found.items() if len(rows) >= LEAST_SWEEP}


def noise_table(predictions: Sequence[Prediction]) -> str:
    """The rank correlation of a perfect predictor, where layouts were run more than once."""
    lines = [
        "| source | rows of repeated layouts | spread | best rank correlation |",
        "|---|---|---|---|",
    ]
    best_of = {}
    for file in sorted({one.row.file for one in predictions}):
        swept = sweeps_of([one for one in predictions if one.row.file == file])
        if swept:
            best_of[file] = 1.0
        layouts = [rows for sweep in swept.values() for rows in sweep.values()]
        repeated = [[math.log(p.measured_s or 1) for p in rows] for rows in layouts if rows[1:]]
        freedom = sum(len(logs) - 1 for logs in repeated)
        if freedom < LEAST_SWEEP:
            continue
        spread = math.sqrt(sum((x - fmean(v)) ** 2 for v in repeated for x in v) / freedom)
        best = fmean(_noisy_rank(list(sweep.values()), spread) for sweep in swept.values())
        rows, best_of[file] = sum(len(logs) for logs in repeated), best
        lines.append(f"| {file} | {rows} | {100 * spread:.1f}% | {best:.3f} |")
    mean = fmean(best_of.values())
    lines.append(f"| all {len(best_of)}, the others ranked without a fault | | | {mean:.3f} |")
    return "\n".join(lines)


def _noisy_rank(layouts: Sequence[Sequence[Prediction]], spread: float) -> float:
    """Mean rank correlation of the measured means with the same means measured once more."""
    draw = random.Random(0)
    means = [(fmean(p.measured_s or 0.0 for p in rows), len(rows)) for rows in layouts]
    return fmean(
        rank_correlation(
            [(m, m * math.exp(draw.gauss(0, spread / math.sqrt(n)))) for m, n in means]
        )
        for _ in range(DRAWS)
    )


def wait_seconds(one: Prediction) -> float:
    """Seconds of each transfer that the prediction does not have."""
    return ((one.measured_s or 0.0) - one.predicted_s) / transfers_of(one.row)


def is_slow(one: Prediction) -> bool:
    """Whether the run is of the mode in which every transfer waits."""
    return transfers_of(one.row) > 0 and wait_seconds(one) > TRANSFER_WAIT_SECONDS / 2


def mode_tables(predictions: Sequence[Prediction]) -> str:
    """The two modes: how many runs wait how long, and what knowing the mode would do."""
    runs = [p for p in predictions if p.row.file == "hf_playbook_nanotron" and p.measured_s]
    piped = [p for p in runs if p.row.count("pp") > 1 and p.row.count("tp") <= 8]
    edges = (-math.inf, -0.1, 0.05, 0.2, 0.35, math.inf)
    lines = ["| wait of each transfer | runs |", "|---|---|"]
    for low, high in pairwise(edges):
        number = sum(low <= wait_seconds(p) < high for p in piped)
        lines.append(f"| {_range(low, high)} s | {number} |")
    lines += ["", "| rows | runs | slow | rank correlation | regret |", "|---|---|---|---|---|"]
    for title, headline in (("headline", True), ("others", False)):
        rows = [p for p in runs if p.row.headline == headline]
        slow = sum(map(is_slow, rows))
        lines.append(f"| {title} | {len(rows)} | {slow} | {_figures(rows, known=False)} |")
        known = _figures(rows, known=True)
        lines.append(f"| {title}, were the mode known | {len(rows)} | {slow} | {known} |")
    return "\n".join(lines)


def _share_of_slow(runs: Sequence[Prediction]) -> dict[str, float]:
    """For each run, how many of the others with as many GPUs, its model and ZeRO level are slow."""
    alike: dict[tuple[str, ...], list[Prediction]] = defaultdict(list)
    for one in runs:
        if transfers_of(one.row):
            alike[tuple(one.row.text(n) for n in ("n_gpus", "model", "zero_or_fsdp"))].append(one)
    shares = {}
    for group in alike.values():
        slow = sum(map(is_slow, group))
        for one in group:
            others = len(group) - 1
            shares[one.row.cells["id"]] = (slow - is_slow(one)) / others if others else 0.0
    return shares


def but_for_modes_table(predictions: Sequence[Prediction]) -> str:
    """What a predictor reaches that knows every measured time but for the mode of the run.

    It takes each run for one as predicted, or adds the wait times the share of slow runs among
    those alike.
    """
    runs = [p for p in predictions if p.row.file == "hf_playbook_nanotron" and p.measured_s]
    shares = _share_of_slow(runs)
    lines = [
        "| rows | said of slow runs | rank correlation | regret |",
        "|---|---|---|---|",
    ]
    for title, headline in (("headline", True), ("others", False)):
        swept = sweeps_of([p for p in runs if p.row.headline == headline])
        for told, known in (("nothing", {}), ("their share is added", shares)):
            pairs = [
                [_but_for_mode(rows, known) for rows in sweep.values()] for sweep in swept.values()
            ]
            ranks, regrets = fmean(map(rank_correlation, pairs)), fmean(map(regret, pairs))
            lines.append(f"| {title} | {told} | {ranks:.3f} | {100 * regrets:.1f}% |")
    return "\n".join(lines)


def _but_for_mode(layout: Sequence[Prediction], shares: dict[str, float]) -> Pair:
    predicted = [
        (p.measured_s or 0.0)
        + (shares.get(p.row.cells["id"], 0.0) - is_slow(p))
        * TRANSFER_WAIT_SECONDS
        * transfers_of(p.row)
        for p in layout
    ]
    return fmean(predicted), fmean(p.measured_s or 0.0 for p in layout)


def _is_told_apart(one: Prediction) -> bool:
    """Aleph Alpha's runs that accuracy_text.md shows: labels, and 13B's pipelines with flash 2."""
    row = one.row
    piped = row.count("pp") > 1 and "flash_attention2" in row.text("attn_impl")
    return row.cells["id"][-4:] in ("0966", "0967") or (piped and row.count("layers") == 40)


def told_apart_table(predictions: Sequence[Prediction]) -> str:
    """Aleph Alpha's sweeps, with and without the runs that are shown one by one."""
    lines = [
        "| sweep | layouts | rank correlation | layouts without them | rank correlation |",
        "|---|---|---|---|---|",
    ]
    swept = sweeps_of([p for p in predictions if p.row.file == "aleph_alpha_layouts"])
    for rows in swept.values():
        runs = [one for layout in rows.values() for one in layout]
        rest = sweeps_of([one for one in runs if not _is_told_apart(one)])
        figures = [
            f"{len(layouts)} | {rank_correlation([_pair(one, False) for one in layouts]):.3f}"
            for layouts in (list(rows.values()), *(list(kept.values()) for kept in rest.values()))
        ]
        name = f"{runs[0].row.text('model')}, {runs[0].row.count('n_gpus')} GPUs"
        lines.append(f"| {name} | {' | '.join(figures)} |")
    return "\n".join(lines)


def picks_table(predictions: Sequence[Prediction]) -> str:
    """By source: regret of the layout predicted fastest, and of the fastest predicted to fit."""
    lines = ["| source | sweeps | regret | of those predicted to fit |", "|---|---|---|---|"]
    found = _regrets_of(predictions)
    for file, regrets in found.items():
        lines.append(f"| {file} | {len(regrets)} | {_mean_regrets([regrets])} |")
    lines.append(f"| all {len(found)} | | {_mean_regrets(found.values())} |")
    rest = _regrets_of([p for p in predictions if p.row.cells["id"] != CANNOT_BE])
    lines.append(f"| all {len(rest)} without {CANNOT_BE} | | {_mean_regrets(rest.values())} |")
    return "\n".join(lines)


def _regrets_of(predictions: Sequence[Prediction]) -> dict[str, list[tuple[float, float]]]:
    """By file, for each sweep: the regret, and that of the fastest predicted to fit."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for sweep, layouts in sorted(sweeps_of(predictions).items()):
        pairs = [(_pair(rows, False), all(p.fits for p in rows)) for rows in layouts.values()]
        fastest = min(measured for (_, measured), _ in pairs)
        _, picked = min((pair for pair, fits in pairs if fits), default=(0.0, math.inf))
        found[sweep[0]].append((regret([pair for pair, _ in pairs]), picked / fastest - 1))
    return found


def _mean_regrets(files: Iterable[Sequence[tuple[float, float]]]) -> str:
    """Means over sweeps and then files, as two cells."""
    means = [tuple(map(fmean, zip(*regrets, strict=True))) for regrets in files]
    return " | ".join(f"{100 * fmean(column):.2f}%" for column in zip(*means, strict=True))


def _range(low: float, high: float) -> str:
    if math.isinf(low):
        return f"below {high:.2f}"
    return f"above {low:.2f}" if math.isinf(high) else f"{low:.2f} to {high:.2f}"


def _figures(rows: Sequence[Prediction], *, known: bool) -> str:
    pairs = [
        [_pair(layout, known) for layout in sweep.values()] for sweep in sweeps_of(rows).values()
    ]
    ranks, regrets = fmean(map(rank_correlation, pairs)), fmean(map(regret, pairs))
    return f"{ranks:.3f} | {100 * regrets:.1f}%"


def _pair(layout: Sequence[Prediction], known: bool) -> Pair:
    predicted = [
        p.predicted_s + known * is_slow(p) * TRANSFER_WAIT_SECONDS * transfers_of(p.row)
        for p in layout
    ]
    return fmean(predicted), fmean(p.measured_s or 0.0 for p in layout)
