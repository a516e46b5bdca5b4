"""Fit the figures that whole training runs decide, and say how well they carry over.

    python benchmarks/fit_runs.py FOLDER [CLUSTER...]      (some minutes a cluster on one core)

FOLDER holds the published runs (columns: docs/accuracy.md). For each shipped cluster it calibrates
the shipped profile as ``plan calibrate`` does, and prints by what factor each figure would change
(1.00 where the shipped figure is the fitted one) and the error of models left out of the fit.
The files themselves are not part of the project; only figures derived from them are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from paraplan.calibrate import as_text, calibrate
from paraplan.cluster import load_cluster
from paraplan.errors import InputError

CLUSTERS = (
    *("dgx-a100-80gb", "dgx-a100-40gb", "dgx-h100", "dgx-h200", "dgx-b200", "gb200-nvl72"),
    "gb300-nvl72",
    "grand-teton-h100",
)


def main(arguments: Sequence[str]) -> int:
    """Run all fits."""
    if not arguments:
        print(__doc__)
        return 2
    paths = sorted(Path(arguments[0]).glob("*.csv"))
    for name in arguments[1:] or CLUSTERS:
        print(f"{name}:", flush=True)
        try:
            print(as_text(calibrate(load_cluster(name), paths)), "\n")
        except InputError as error:
            print(error, "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
