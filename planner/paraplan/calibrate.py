"""`plan calibrate`: fits a machine's figures to measured runs.

The figures that decide step times (`PARAMETERS`) are fitted together, by robust least squares with
what the profile already says as prior knowledge (`calibrate_fit`). With fewer than `LEAST_ROWS`
timed rows one factor on all of them is fitted. Leaving whole models out says how well the result
carries over to models that were not measured.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from paraplan.calibrate_fit import Fit, Parameter, fit, with_factors
from paraplan.cluster import Cluster, load_cluster, make_cluster
from paraplan.device import load_device
from paraplan.errors import InputError
from paraplan.files import write_atomically
from paraplan.tables import rows_to_csv
from paraplan.validate_machines import Machines, attention_of
from paraplan.validate_model import sizes_of
from paraplan.validate_predict import predict
from paraplan.validate_rows import Row, Unusable, read_rows

LEAST_ROWS = 4
MOST_ROWS = 120  # a fit predicts every row about a hundred times
MOST_FOLDS = 5
ROUNDS = 3  # Gauss-Newton from figures that are nearly right
KNOWN = 0.7
"""A parameter is determined when its spread is below this share of what it was before."""

DEVICE = "node_groups.*.device."
NEAR, FAR = "node_groups.*.link_inside.", "link_between."

PARAMETERS: tuple[Parameter, ...] = (
    Parameter(
        "matrix products, 16 bit",
        rates=(DEVICE + "gemm.sustained.bfloat16", DEVICE + "gemm.sustained.float16"),
        spread=0.15,
    ),
    Parameter("matrix products, 8 bit", rates=(DEVICE + "gemm.sustained.float8",), spread=0.2),
    Parameter("matrix products, 4 bit", rates=(DEVICE + "gemm.sustained.float4",), spread=0.2),
    Parameter("memory-bound kernels", rates=(DEVICE + "memory_efficiency",), spread=0.2),
    Parameter("host's launches", seconds=(DEVICE + "host_launch_seconds",), spread=0.7),
    Parameter("links inside a node", rates=(NEAR + "efficiency",), spread=0.2),
    Parameter("start of an exchange", seconds=(NEAR + "start_seconds",), spread=0.4),
    Parameter("network", rates=(FAR + "efficiency", FAR + "transfer_efficiency"), spread=0.3),
    Parameter("network's latency", seconds=(FAR + "latency_seconds",), spread=0.7),
)
EVERYTHING = Parameter(
    "everything",
    rates=(
        *(rate for parameter in PARAMETERS for rate in parameter.rates),
        DEVICE + "attention.*.rates.*.forward_efficiency",
        DEVICE + "attention.*.rates.*.backward_efficiency",
    ),
    seconds=tuple(one for parameter in PARAMETERS for one in parameter.seconds),
    spread=0.5,
)


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a calibration found.

    Attributes:
        cluster: the profile with its figures changed.
        parameters, found: what was fitted, and how.
        rows: timed rows used; ``unused`` says why others were not.
        before, after: mean absolute error of the rows, unfitted and fitted.
        left_out: the same of rows whose model was left out of the fit; None with one model.
        memory_rows: rows that the allocator's overhead was fitted to.
    """

    cluster: Cluster
    parameters: tuple[Parameter, ...]
    found: Fit
    rows: int
    unused: Counter[str]
    before: float
    after: float
    left_out: float | None
    memory_rows: int


def calibrate(base: Cluster, paths: Sequence[Path]) -> Calibration:
    """Fit a cluster's figures to the runs in the files.

    Raises:
        InputError: a file is not in the form that docs/accuracy.md describes, or no row of them
            ran on this device with its time measured.
    """
    rows, unused = _usable_rows(base, paths)
    if not rows:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in unused.most_common(3))
        raise InputError(f"no row of the files can be used: {reasons or 'they are empty'}")
    parameters = parameters_for(rows)
    content = _with_sustained(base.model_dump(mode="json"))
    found = _fit_rows(content, parameters, rows)
    before = _mean_error(_errors(content, parameters, rows, [0.0] * len(parameters)))
    changed = with_factors(content, parameters, found.logs)
    memory_rows = _fit_allocator(changed, rows)
    names = ", ".join(path.name for path in paths)
    _say_source(content, changed, f"calibrated to {len(rows)} measured runs ({names})")
    changed["name"] = f"{base.name}-calibrated"
    return Calibration(
        cluster=Cluster.model_validate(changed),
        parameters=parameters,
        found=found,
        rows=len(rows),
        unused=unused,
        before=before,
        after=_mean_error(found.errors),
        left_out=_left_out(content, parameters, rows),
        memory_rows=memory_rows,
    )


def parameters_for(rows: Sequence[Row]) -> tuple[Parameter, ...]:
    """What so many rows can tell: one factor, or every parameter and the attention that ran."""
    if len(rows) < LEAST_ROWS:
        return (EVERYTHING,)
    used = sorted({attention_of(row) for row in rows if sizes_of(row).flash})
    kernels = (
        Parameter(
            f"attention, {name}",
            rates=(
                f"{DEVICE}attention.@{name}.rates.*.forward_efficiency",
                f"{DEVICE}attention.@{name}.rates.*.backward_efficiency",
            ),
            spread=0.2,
        )
        for name in used
    )
    return (*PARAMETERS, *kernels)


def _with_sustained(content: dict[str, Any]) -> dict[str, Any]:
    """Name the share of their rate that products sustain, where the profile leaves it out."""
    for group in content["node_groups"]:
        gemm = group["device"]["gemm"]
        for dtype in gemm["efficiency"]:
            whole = {"value": 1.0, "basis": "modelled", "source": "not fitted to whole steps"}
            gemm["sustained"].setdefault(dtype, whole)
    return content


def _usable_rows(base: Cluster, paths: Sequence[Path]) -> tuple[list[Row], Counter[str]]:
    machines = Machines(only=base)
    rows: list[Row] = []
    unused: Counter[str] = Counter()
    for path in paths:
        for row in read_rows(path):
            try:
                if row.seconds is None or not row.headline:
                    raise Unusable("no time, or not of the headline set")
                predict(row, machines)
                rows.append(row)
            except Unusable as reason:
                unused[str(reason)] += 1
    step = max(1, math.ceil(len(rows) / MOST_ROWS))
    return rows[::step], unused


def _errors(
    content: dict[str, Any],
    parameters: Sequence[Parameter],
    rows: Sequence[Row],
    logs: Sequence[float],
) -> list[float]:
    """Log of predicted over measured seconds of each row."""
    cluster = Cluster.model_validate(with_factors(content, parameters, logs))
    machines = Machines(only=cluster)
    return [math.log(predict(row, machines).predicted_s / (row.seconds or 1.0)) for row in rows]


def _fit_rows(content: dict[str, Any], parameters: Sequence[Parameter], rows: Sequence[Row]) -> Fit:
    """Fit with each file, and each model of it, of moderate weight."""
    per_group = Counter((row.file, row.text("model")) for row in rows)
    weights = [1 / (5 + per_group[row.file, row.text("model")]) for row in rows]
    return fit(
        lambda logs: _errors(content, parameters, rows, logs),
        weights,
        [parameter.spread for parameter in parameters],
        rounds=ROUNDS,
    )


def _left_out(
    content: dict[str, Any], parameters: Sequence[Parameter], rows: Sequence[Row]
) -> float | None:
    """Mean absolute error of rows whose model the fit has not seen."""
    models = sorted({row.text("model") for row in rows})
    folds = min(MOST_FOLDS, len(models))
    if folds < 2:
        return None
    errors: list[float] = []
    for fold in range(folds):
        held = set(models[fold::folds])
        seen = [row for row in rows if row.text("model") not in held]
        unseen = [row for row in rows if row.text("model") in held]
        found = _fit_rows(content, parameters, seen)
        errors += _errors(content, parameters, unseen, found.logs)
    return _mean_error(errors)


def _mean_error(errors: Sequence[float]) -> float:
    return sum(abs(math.expm1(error)) for error in errors) / len(errors)


def _fit_allocator(content: dict[str, Any], rows: Sequence[Row]) -> int:
    """Fit what the allocator reserves beyond what is used, in place; rows it rests on."""
    with_memory = [row for row in rows if row.number("peak_mem_gib")]
    if len(with_memory) < LEAST_ROWS:
        return 0
    machines = Machines(only=Cluster.model_validate(content))
    ratio = median(
        (row.number("peak_mem_gib") or 0.0) / predict(row, machines).predicted_gib
        for row in with_memory
    )
    for group in content["node_groups"]:
        figure = group["device"]["fragmentation_fraction"]
        figure["value"] = min(1.0, max(0.0, (1 + figure["value"]) * ratio - 1))
    return len(with_memory)


def _say_source(before: Any, after: Any, source: str) -> None:
    """Say of every figure that changed what it now rests on, in place."""
    if isinstance(after, dict):
        if "value" in after and "basis" in after:
            if after["value"] != before["value"]:
                after["basis"], after["source"] = "measured", source
            return
        for name in after:
            _say_source(before[name], after[name], source)
    elif isinstance(after, list):
        for one, other in zip(before, after, strict=True):
            _say_source(one, other, source)


def parameter_rows(made: Calibration) -> list[dict[str, Any]]:
    """One row for each fitted figure."""
    return [
        {
            "name": parameter.name,
            "factor": math.exp(log),
            "spread": spread,
            "determined": spread < KNOWN * parameter.spread,
        }
        for parameter, log, spread in zip(
            made.parameters, made.found.logs, made.found.spreads, strict=True
        )
    ]


def as_json(made: Calibration) -> dict[str, object]:
    """What ``--json`` writes."""
    return {
        "profile": made.cluster.model_dump(mode="json", exclude_none=True),
        "rows": made.rows,
        "unused": dict(made.unused),
        "parameters": parameter_rows(made),
        "error_before": made.before,
        "error_after": made.after,
        "error_model_left_out": made.left_out,
        "memory_rows": made.memory_rows,
    }


def as_text(made: Calibration) -> str:
    """The table that the command prints."""
    lines = [f"{made.rows} measured runs, {sum(made.unused.values())} rows not used", ""]
    lines.append(f"{'figure':34s} {'speed':>7s}   {'known to':>8s}")
    for parameter, log, spread in zip(
        made.parameters, made.found.logs, made.found.spreads, strict=True
    ):
        told = "" if spread < KNOWN * parameter.spread else "   the runs hardly tell"
        lines.append(f"{parameter.name:34s} x {math.exp(log):5.2f}   {spread:8.0%}{told}")
    lines += ["", f"mean error {made.before:.1%} before, {made.after:.1%} after"]
    if made.left_out is None:
        lines[-1] += "; one model only, so nothing says how well it carries over"
    else:
        ratio = made.left_out / made.after if made.after else math.inf
        lines[-1] += f"; {made.left_out:.1%} ({ratio:.2f} x) for models left out of the fit"
    if made.memory_rows:
        lines.append(f"the allocator's overhead rests on {made.memory_rows} runs")
    return "\n".join(lines)


def add_calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``plan calibrate``."""
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUNS.csv", help="measured runs")
    add("--device", metavar="NAME", help="what they ran on, from `plan devices` or a file")
    add("--cluster", metavar="NAME", help="the same with its network")
    add("-o", "--output", metavar="FILE.json", help="write the fitted cluster profile")
    add("--json", action="store_true", help="everything as JSON")
    add("--csv", action="store_true", help="the fitted figures as CSV, nothing else")


def run_calibrate(options: argparse.Namespace) -> int:
    """``plan calibrate``: fit, say how well, write the profile.

    Raises:
        InputError: no machine named, or files that cannot be used.
    """
    if (options.device is None) == (options.cluster is None):
        raise InputError(
            "which machine did they run on?", hint="either --device or --cluster, see plan devices"
        )
    if options.output is not None and not options.output.endswith(".json"):
        raise InputError(f"--output is {options.output!r}; a name that ends in .json is wanted")
    if options.cluster is not None:
        base = load_cluster(options.cluster)
    else:
        device = load_device(options.device)
        usual = load_cluster(device.default_cluster) if device.default_cluster else None
        per_node = usual.devices_per_node if usual else 1
        base = make_cluster(device, per_node)
    made = calibrate(base, options.runs)
    if options.output:
        text = made.cluster.model_dump_json(indent=1, exclude_none=True)
        write_atomically(options.output, text + "\n")
    if options.csv:
        print(rows_to_csv(parameter_rows(made)), end="")
        return 0
    print(json.dumps(as_json(made), indent=1) if options.json else as_text(made))
    if options.output and not options.json:
        print(f"wrote {options.output}; plan with --cluster {options.output}")
    return 0
