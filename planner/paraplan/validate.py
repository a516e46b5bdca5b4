"""`plan validate`: the cost model against measured runs.

Each row's model, machine and layout go through the ordinary cost model, with the layout, stages and
recomputation that the row ran: nothing is searched and nothing is fitted. The statistics are
relative to the measured values; `Summary` says how each is taken.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from paraplan.errors import InputError, PlanError
from paraplan.layouts import Constraints
from paraplan.partition import staged
from paraplan.plan_file import Precision
from paraplan.problem import Problem, chain_cost
from paraplan.validate_graph import closed_form_graph
from paraplan.validate_rows import (
    Row,
    Unusable,
    cluster_of,
    comparable_gib,
    device_of,
    equal_cuts,
    layout_of,
    read_rows,
    recompute_of,
    sizes_of,
)
from paraplan.workload import make_workload

LEAST_SWEEP = 4
"""Layouts from which on rank correlation and regret of a sweep are worth a figure."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """One row and what the cost model says of it.

    Attributes:
        predicted_gib: what the published figure counts (see `comparable_gib`).
        fits: whether the fullest device's memory suffices.
    """

    row: Row
    predicted_s: float
    predicted_gib: float
    fits: bool

    @property
    def measured_s(self) -> float | None:
        """Published seconds of a step."""
        return self.row.seconds

    @property
    def measured_gib(self) -> float | None:
        """Published peak memory."""
        return self.row.number("peak_mem_gib")

    @property
    def time_error(self) -> float | None:
        """Relative error of the step time."""
        measured = self.measured_s
        return self.predicted_s / measured - 1 if measured else None

    @property
    def memory_error(self) -> float | None:
        """Relative error of the peak memory."""
        measured = self.measured_gib
        return self.predicted_gib / measured - 1 if measured else None


@dataclass(frozen=True, slots=True)
class Confusion:
    """Runs by whether they ran and whether they are predicted to fit."""

    ran: int
    ran_predicted_out: int
    out: int
    out_predicted_fit: int


@dataclass(frozen=True, slots=True)
class Summary:
    """Statistics over rows; None where no row tells.

    Attributes:
        rows: timed rows.
        bias: mean of the signed relative errors; ``mape`` of the absolute ones; ``p90``, 90th
            percentile of the absolute ones.
        spearman: mean over sweeps of the rank correlation.
        regret_mean, regret_p90: over sweeps, time of the layout predicted fastest over that of
            the fastest, less 1.
        memory_mape: mean absolute relative error of peak memory; ``memory_under``: share of
            rows whose memory is predicted too small.
    """

    rows: int
    bias: float | None
    median_abs_error: float | None
    mape: float | None
    p90: float | None
    spearman: float | None
    regret_mean: float | None
    regret_p90: float | None
    memory_mape: float | None
    memory_under: float | None
    oom: Confusion


@dataclass(frozen=True, slots=True)
class FileResult:
    """One file: what was predicted, and why the rest was not."""

    rows: int
    predictions: tuple[Prediction, ...]
    unused: Counter[str]


def predict(row: Row) -> Prediction:
    """The cost model's step time and memory for exactly what the row ran.

    Raises:
        Unusable: the row does not say enough, or says something that is not modelled.
        InputError: a cell is not a number.
    """
    sizes = sizes_of(row)
    cluster = cluster_of(row)
    device = device_of(cluster, row.text("attn_impl"))
    known = device.rates.dtypes
    if sizes.product_dtype not in known or sizes.dtype not in known:
        raise Unusable(f"{device.name} has no figures for {sizes.product_dtype}")
    layout = layout_of(row, sizes)
    graph = closed_form_graph(sizes, layout.tensor)
    precision: Precision = "fp16" if sizes.dtype == "float16" else "bf16"
    problem = Problem(
        graph=graph,
        cluster=cluster,
        device=device,
        workload=make_workload(
            sequence_length=sizes.sequence_length,
            devices=cluster.devices,
            global_batch=row.count("global_batch"),
            precision=precision,
        ),
        capacity_bytes=device.memory_capacity_bytes.value,
        constraints=Constraints(recompute=(recompute_of(row),)),
    )
    chain = chain_cost(problem, layout)
    cuts = equal_cuts(sizes.layers, layout.pipeline * layout.virtual_stages)
    found = staged(chain, cuts, forced=True)
    assert found is not None, "forced costs always exist"
    needed = max(stage.memory_bytes for stage in found.stages)
    return Prediction(
        row=row,
        predicted_s=found.step_seconds,
        predicted_gib=comparable_gib(row, chain, found),
        fits=needed <= problem.capacity_bytes,
    )


def validate_files(paths: Iterable[Path]) -> dict[str, FileResult]:
    """Predict every row of the files, by file name without its ending.

    Raises:
        InputError: a file cannot be read, or two files have the same name.
    """
    results: dict[str, FileResult] = {}
    for path in paths:
        rows = read_rows(path)
        if path.stem in results:
            raise InputError(f"two files are named {path.stem}")
        made: list[Prediction] = []
        unused: Counter[str] = Counter()
        for row in rows:
            try:
                if row.out_of_memory is None and not row.text("oom"):
                    raise Unusable("nothing measured")
                made.append(predict(row))
            except Unusable as reason:
                unused[str(reason)] += 1
        results[path.stem] = FileResult(len(rows), tuple(made), unused)
    return results


def summarise(predictions: Sequence[Prediction]) -> Summary:
    """Statistics over rows; every file weighs the same, whatever its number of rows."""
    timed = [p for p in predictions if p.time_error is not None]
    errors = [p.time_error or 0.0 for p in timed]
    weights = _equal_files(timed)
    sizes = [abs(error) for error in errors]
    with_memory = [p for p in predictions if p.memory_error is not None]
    memory = [p.memory_error or 0.0 for p in with_memory]
    shares = _equal_files(with_memory)
    swept = _sweeps(timed)
    correlations = [_spearman(rows) for rows in swept]
    regrets = [_regret(rows) for rows in swept]
    each = _equal_files([rows[0] for rows in swept])
    return Summary(
        rows=len(timed),
        bias=_mean(errors, weights),
        median_abs_error=_quantile(sizes, weights, 0.5),
        mape=_mean(sizes, weights),
        p90=_quantile(sizes, weights, 0.9),
        spearman=_mean(correlations, each),
        regret_mean=_mean(regrets, each),
        regret_p90=_quantile(regrets, each, 0.9),
        memory_mape=_mean([abs(error) for error in memory], shares),
        memory_under=_mean([float(error < 0) for error in memory], shares),
        oom=_confusion(predictions),
    )


def _equal_files(predictions: Sequence[Prediction]) -> list[float]:
    rows = Counter(p.row.file for p in predictions)
    return [1 / rows[p.row.file] / len(rows) for p in predictions]


def _mean(values: Sequence[float], weights: Sequence[float]) -> float | None:
    if not values:
        return None
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


def _quantile(values: Sequence[float], weights: Sequence[float], share: float) -> float | None:
    """The smallest value at or below which ``share`` of the weight lies."""
    if not values:
        return None
    reached, wanted = 0.0, share * sum(weights) * (1 - 1e-12)
    for value, weight in sorted(zip(values, weights, strict=True)):
        reached += weight
        if reached >= wanted:
            return value
    return max(values)


def _sweeps(timed: Iterable[Prediction]) -> list[list[Prediction]]:
    groups: dict[tuple[str, ...], list[Prediction]] = {}
    for prediction in timed:
        groups.setdefault(prediction.row.sweep, []).append(prediction)
    return [rows for rows in groups.values() if len(rows) >= LEAST_SWEEP]


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values share their mean rank."""
    order = sorted(values)
    first = {value: i for i, value in reversed(list(enumerate(order)))}
    count = Counter(order)
    return [first[value] + (count[value] + 1) / 2 for value in values]


def _spearman(rows: Sequence[Prediction]) -> float:
    """Rank correlation of predicted and measured time; 0 where one of them is constant."""
    a = _ranks([p.predicted_s for p in rows])
    b = _ranks([p.measured_s or 0.0 for p in rows])
    middle = (len(rows) + 1) / 2
    products = sum((x - middle) * (y - middle) for x, y in zip(a, b, strict=True))
    spread = sum((x - middle) ** 2 for x in a) * sum((y - middle) ** 2 for y in b)
    return products / math.sqrt(spread) if spread else 0.0


def _regret(rows: Sequence[Prediction]) -> float:
    chosen = min(rows, key=lambda p: p.predicted_s)
    return (chosen.measured_s or 0.0) / min(p.measured_s or math.inf for p in rows) - 1


def _confusion(predictions: Iterable[Prediction]) -> Confusion:
    known = Counter((p.row.out_of_memory, p.fits) for p in predictions)
    return Confusion(
        ran=known[False, True] + known[False, False],
        ran_predicted_out=known[False, False],
        out=known[True, True] + known[True, False],
        out_predicted_fit=known[True, True],
    )


def as_json(results: dict[str, FileResult]) -> dict[str, object]:
    """What ``--json`` writes; ``overall`` and each file's figures are of the headline rows."""
    every = [p for result in results.values() for p in result.predictions]
    files = {
        name: asdict(summarise([p for p in result.predictions if p.row.headline]))
        | {"read": result.rows, "unused": dict(result.unused)}
        for name, result in results.items()
    }
    rows = [
        {
            "id": p.row.cells["id"],
            "predicted_s": p.predicted_s,
            "measured_s": p.measured_s,
            "predicted_gib": p.predicted_gib,
            "measured_gib": p.measured_gib,
            "fits": p.fits,
            "oom": p.row.out_of_memory,
        }
        for p in every
    ]
    overall = asdict(summarise([p for p in every if p.row.headline]))
    return {"files": files, "overall": overall, "rows": rows}


HEADER = (
    "| source | rows | bias | median | mean | p90 | spearman | regret | p90 | memory | under "
    "| ran, predicted out | out, predicted to fit |\n" + "|---" * 13 + "|"
)


def _line(name: str, summary: Summary) -> str:
    def percent(value: float | None, sign: str = "") -> str:
        return "" if value is None else f"{100 * value:{sign}.1f}%"

    rank = "" if summary.spearman is None else f"{summary.spearman:.3f}"
    oom = summary.oom
    cells = (
        name,
        str(summary.rows),
        percent(summary.bias, "+"),
        percent(summary.median_abs_error),
        percent(summary.mape),
        percent(summary.p90),
        rank,
        percent(summary.regret_mean),
        percent(summary.regret_p90),
        percent(summary.memory_mape),
        percent(summary.memory_under),
        f"{oom.ran_predicted_out} of {oom.ran}",
        f"{oom.out_predicted_fit} of {oom.out}",
    )
    return f"| {' | '.join(cells)} |"


def as_text(results: dict[str, FileResult]) -> str:
    """Tables in Markdown: the headline rows, the others, and why rows were not used."""
    every = [p for result in results.values() for p in result.predictions]
    lines = []
    for title, wanted in (("Headline rows", True), ("Other rows", False)):
        lines += [f"{title}:", "", HEADER]
        for name, result in results.items():
            chosen = [p for p in result.predictions if p.row.headline == wanted]
            if chosen:
                lines.append(_line(name, summarise(chosen)))
        together = summarise([p for p in every if p.row.headline == wanted])
        lines += [_line("all, each source the same weight", together), ""]
    lines += [
        "Rows that are not predicted:",
        "",
        "| source | rows | of | why |",
        "|---|---|---|---|",
    ]
    for name, result in results.items():
        for reason, count in result.unused.most_common():
            lines.append(f"| {name} | {count} | {result.rows} | {reason} |")
    return "\n".join(lines)


def add_validate_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``plan validate``."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS.csv", help="measured runs")
    parser.add_argument("--json", action="store_true", help="every row and figure as JSON")


def run_validate(options: argparse.Namespace) -> int:
    """``plan validate``: print the tables or the JSON.

    Raises:
        InputError: a file that is not in the form that docs/accuracy.md describes.
    """
    results = validate_files(options.runs)
    print(json.dumps(as_json(results), indent=1) if options.json else as_text(results))
    return 0


def validate_main(argv: Sequence[str]) -> int:
    """`run_validate` on its own; the exit code."""
    parser = argparse.ArgumentParser(prog="plan validate", description=__doc__)
    add_validate_arguments(parser)
    try:
        return run_validate(parser.parse_args(argv))
    except PlanError as error:
        print(f"error: {error}" + (f" ({error.hint})" if error.hint else ""), file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(validate_main(sys.argv[1:]))
