"""`plan what-if` on the command line: runs the sweep, shows progress, prints the answer."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from paraplan.cpu_ranks import available_cores
from paraplan.errors import InfeasibleError, InputError
from paraplan.sweep import Done
from paraplan.tables import rows_to_csv
from paraplan.what_if_file import (
    WhatIf,
    save_what_if,
    what_if_to_json,
)
from paraplan.what_if_options import (
    add_axes,
    add_economics,
    add_fixed,
    axes_of,
    common_of,
    economics_of,
    limits_of,
)
from paraplan.what_if_report import nothing_meets, print_what_if
from paraplan.what_if_rows import Sweep, run_sweep


def add_what_if_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `plan what-if`."""
    add_axes(parser)
    add_fixed(parser)
    add_economics(parser)
    add = parser.add_argument
    add("--sensitivity", action="store_true", help="what the money is best spent on")
    add("--workers", type=int, metavar="N", help="processes that plan (default: one a CPU)")
    add("-o", "--output", metavar="FILE", help="write the sweep as JSON (for plan report)")
    add("--json", action="store_true", help="print the sweep as JSON, nothing else")
    add("--csv", action="store_true", help="print the points as CSV, nothing else")
    add("-q", "--quiet", action="store_true", help="no table")


def run_what_if(options: argparse.Namespace) -> int:
    """Run `plan what-if`; returns the exit code.

    Raises:
        InputError: bad input.
        InfeasibleError: no point meets the limits; the sweep is printed all the same.
    """
    if options.output == "" or (options.json and options.csv):
        raise InputError("give --output a file name, and --json or --csv, not both")
    workers = available_cores() if options.workers is None else options.workers
    if not 1 <= workers <= 1024:
        raise InputError(f"--workers is {workers}; a whole number from 1 to 1024 is wanted")
    sweep = Sweep(
        axes=axes_of(options),
        common=common_of(options),
        economics=economics_of(options),
        limits=limits_of(options),
        sensitivity=options.sensitivity,
        command=options.command_line,
    )
    with _progress(options) as done:
        result = run_sweep(sweep, workers=workers, done=done)
    _deliver(result, options)
    if not any(point.status == "planned" for point in result.points):
        raise InfeasibleError(f"no point of the sweep has a plan: {result.points[0].reason}")
    if result.answer is not None and result.answer.cheapest is None:
        raise nothing_meets(result)
    return 0


def _deliver(result: WhatIf, options: argparse.Namespace) -> None:
    if options.output and options.output != "-":
        save_what_if(result, options.output)
    if options.json or options.output == "-":
        sys.stdout.write(what_if_to_json(result))
    elif options.csv:
        sys.stdout.write(points_to_csv(result))
    elif not options.quiet:
        print_what_if(result)
        if options.output:
            print(f"wrote {options.output}")
    sys.stdout.flush()


def points_to_csv(result: WhatIf) -> str:
    """The points as CSV, one column a field of `WhatIfPoint`."""
    return rows_to_csv(point.model_dump(mode="json") for point in result.points)


@contextmanager
def _progress(options: argparse.Namespace) -> Iterator[Done]:
    """A bar on stderr while a terminal reads it; Ctrl-C says that what is planned is kept."""
    counts = [0, 0]

    def note(finished: int, of: int) -> None:
        counts[:] = finished, of

    try:
        if options.quiet or not sys.stderr.isatty():
            yield note
        else:
            with _bar(note) as done:
                yield done
    except KeyboardInterrupt:
        print(
            f"interrupted: {counts[0]} of {counts[1]} points are planned and kept; the same "
            "command goes on from there",
            file=sys.stderr,
        )
        raise


@contextmanager
def _bar(note: Done) -> Iterator[Done]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("planning", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("planning", total=None)

        def done(finished: int, of: int) -> None:
            note(finished, of)
            progress.update(task, completed=finished, total=of)

        yield done
