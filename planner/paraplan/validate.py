"""`plan validate`: the cost model against measured runs.

Each row's model, machine and layout go through the ordinary cost model, with the layout, stages and
recomputation that the row ran: nothing is searched and nothing is fitted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from paraplan.cluster import load_cluster
from paraplan.errors import InputError, PlanError
from paraplan.files import write_atomically
from paraplan.tables import rows_to_csv
from paraplan.validate_machines import Machines
from paraplan.validate_plot import scatter_svg
from paraplan.validate_predict import Prediction, predict
from paraplan.validate_rows import Unusable, read_rows
from paraplan.validate_spread import as_toml
from paraplan.validate_statistics import Summary, summarise


@dataclass(frozen=True, slots=True)
class FileResult:
    """One file: what was predicted, and why the rest was not."""

    rows: int
    predictions: tuple[Prediction, ...]
    unused: Counter[str]


def validate_files(
    paths: Iterable[Path], machines: Machines | None = None
) -> dict[str, FileResult]:
    """Predict every row of the files, by file name without its ending.

    Raises:
        InputError: a file cannot be read, or two files have the same name.
    """
    results: dict[str, FileResult] = {}
    machines = machines or Machines()
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
                made.append(predict(row, machines))
            except Unusable as reason:
                unused[str(reason)] += 1
        results[path.stem] = FileResult(len(rows), tuple(made), unused)
    return results


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
    "| in 80 % | ran, predicted out | out, predicted to fit |\n" + "|---" * 14 + "|"
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
        percent(summary.interval_coverage),
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
    add = parser.add_argument
    add("--cluster", metavar="NAME", help="a profile for all rows of its device, such as yours")
    add("--plot", metavar="FILE.svg", help="draw predicted against measured, by source")
    add("--uncertainty", metavar="FILE", help="write the spreads of measured over predicted")
    add("--json", action="store_true", help="every row and figure as JSON")
    add("--csv", action="store_true", help="every row as CSV")


def run_validate(options: argparse.Namespace) -> int:
    """``plan validate``: print the tables or the JSON.

    Raises:
        InputError: a file that is not in the form that docs/accuracy.md describes.
    """
    machines = Machines(only=load_cluster(options.cluster) if options.cluster else None)
    results = validate_files(options.runs, machines)
    headline = [
        p
        for result in results.values()
        for p in result.predictions
        if p.row.headline and p.measured_s is not None
    ]
    if options.plot:
        points = [(p.row.file, p.measured_s or 0.0, p.predicted_s) for p in headline]
        write_atomically(options.plot, scatter_svg(points))
    if options.uncertainty:
        source = f"Written by plan validate from {len(headline)} runs."
        write_atomically(options.uncertainty, as_toml(headline, source))
    if options.csv:
        rows = cast("list[dict[str, Any]]", as_json(results)["rows"])
        sys.stdout.write(rows_to_csv(rows))
        return 0
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
