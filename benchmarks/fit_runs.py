"""Fit the figures that whole training runs decide, and say how well they carry over.

    python benchmarks/fit_runs.py FOLDER [CLUSTER...]      (some minutes a cluster on one core)

FOLDER holds the published runs (columns: docs/accuracy.md). For each shipped cluster it calibrates
the shipped profile to its runs as ``plan calibrate`` does, and prints by what factor each figure
would change (1.00 where the shipped figure is the fitted one) and the error of models left out of
the fit.
The files themselves are not part of the project; only figures derived from them are.
"""

from __future__ import annotations

import csv
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from paraplan.calibrate import Calibration, as_text, calibrate
from paraplan.cluster import load_cluster
from paraplan.errors import InputError
from paraplan.validate_machines import cluster_name
from paraplan.validate_rows import Row, Unusable, read_rows

CLUSTERS = (
    *("dgx-a100-80gb", "dgx-a100-40gb", "dgx-h100", "aws-p5", "grand-teton-h100", "dgx-h200"),
    *("dgx-b200", "gb200-nvl72", "gb300-nvl72"),
)


def main(arguments: Sequence[str]) -> int:
    """Run all fits."""
    if not arguments:
        print(__doc__)
        return 2
    paths = sorted(Path(arguments[0]).glob("*.csv"))
    made = []
    for name in arguments[1:] or CLUSTERS:
        print(f"{name}:", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            own = runs_on(name, paths, Path(folder))
            try:
                made.append(calibrate(load_cluster(name), own))
                print(as_text(made[-1]), "\n")
            except InputError as error:
                print(error, "\n")
    print(over_all(made))
    return 0


def over_all(made: Sequence[Calibration]) -> str:
    """The errors of all clusters' runs together."""
    several = [one for one in made if one.left_out is not None]
    if not several:
        return "nothing says how well it carries over"
    rows = sum(one.rows for one in several)
    after = sum(one.rows * one.after for one in several) / rows
    left_out = sum(one.rows * (one.left_out or 0.0) for one in several) / rows
    return (
        f"all {rows} runs: mean error {after:.1%} fitted, {left_out:.1%} "
        f"({left_out / after:.2f} x) for models left out of the fit"
    )


def runs_on(name: str, paths: Sequence[Path], folder: Path) -> list[Path]:
    """Files of those rows that ran on the cluster, under their names in ``folder``."""
    made = []
    for path in paths:
        rows = [row.cells for row in read_rows(path) if _is_on(row, name)]
        if rows:
            made.append(folder / path.name)
            with made[-1].open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
    return made


def _is_on(row: Row, name: str) -> bool:
    try:
        return cluster_name(row) == name
    except Unusable:
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
