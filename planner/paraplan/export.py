"""`plan export`: a plan as the launch configuration of what people already run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

from paraplan.export_megatron import to_megatron, to_nemo
from paraplan.export_torch import Exported, to_accelerate, to_deepspeed, to_torchtitan
from paraplan.files import write_atomically
from paraplan.plan_file import Plan, load_plan
from paraplan.tables import rows_to_csv

TARGETS: dict[str, Callable[[Plan], Exported]] = {
    "torchtitan": to_torchtitan,
    "accelerate": to_accelerate,
    "megatron": to_megatron,
    "deepspeed": to_deepspeed,
    "nemo": to_nemo,
}
"""What `plan export --to` knows."""


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``plan export``."""
    parser.add_argument("plan", metavar="PLAN", help="a plan file")
    parser.add_argument(
        "--to", required=True, choices=tuple(TARGETS), help="whose configuration is written"
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", default="-", help="where to write it (default: stdout)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print file name, text, command and notes as JSON"
    )
    parser.add_argument(
        "--csv", action="store_true", help="print what the target cannot express as CSV"
    )


def run_export(options: argparse.Namespace) -> int:
    """``plan export``: the configuration on stdout or in a file, notes on stderr.

    Raises:
        InputError: the plan cannot be read, or the file not written.
    """
    made = TARGETS[options.to](load_plan(options.plan))
    if options.output != "-":
        write_atomically(options.output, made.text)
    if options.json:
        print(json.dumps({"target": options.to} | made._asdict()))
        return 0
    if options.csv:
        rows = [{"target": options.to, "note": note} for note in made.notes]
        print(rows_to_csv(rows), end="")
        return 0
    if options.output == "-":
        print(made.text, end="")
    else:
        print(f"wrote {options.output}; start with\n  {made.launch}")
    for note in made.notes:
        print(f"note: {note}", file=sys.stderr)
    return 0
