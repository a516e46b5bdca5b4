"""The options of the `plan` command and its subcommands."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from paraplan.errors import InputError

EXAMPLES = """\
examples:
  plan --model mistral-7b --gpus 16
  plan --model llama-3-70b --gpus 64 --device h200 --seq-len 8192 --global-batch 512
  plan --model ./my-model --cluster my-cluster.toml --fix tensor=2,pipeline=4
  plan estimate --model mistral-7b --gpus 8 --fix data_shard=8,recompute=full
  plan explain mistral-7b-16xh100.plan.json --why-not tensor=8

other commands (each has its own --help):
  estimate   predict one given layout; nothing is searched
  explain    why a plan is as it is, and why not another layout
  check      apply a plan without data: paths, shapes, schedule, memory
  diff       what differs between two plans
  models     the models that have a name
  devices    the devices and clusters that have a profile
  schema     JSON Schema of the plan file
  export     a plan as configuration of torchtitan, accelerate, megatron, ...
  report     a plan or a what-if as one HTML page
  run        train a script on all devices, with or without the line in it
  timeline   the simulated step as a trace for Perfetto
  validate   how far predictions are from measured runs
  what-if    plan many clusters: which is cheapest, which fastest
  calibrate  fit a machine's figures to measured runs
  profile    measure this machine, and plan with what was measured

exit codes: 0 done, 1 a comparison found a difference, 2 bad input, 3 nothing fits
"""


class Parser(argparse.ArgumentParser):
    """argparse with its mistakes in one line, like all other errors."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing usage and exiting."""
        raise InputError(message, hint=f"see {self.prog} --help")


def _parser(name: str, description: str, **settings: Any) -> Parser:
    prog = f"plan {name}".strip()
    return Parser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **settings,
    )


def _add_question(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model",
        metavar="NAME",
        help="a name from `plan models`, a directory with config.json, a Hugging Face id in the "
        "local cache, or module:callable (which runs that code)",
    )
    add("--gpus", type=int, metavar="N", help="number of devices")
    add("--device", metavar="NAME", help="from `plan devices`, or a profile file (default h100)")
    add("--gpus-per-node", type=int, metavar="N", help="devices of a node (default: usual nodes)")
    add("--cluster", metavar="NAME", help="from `plan devices`, or a TOML file of your own")
    add(
        "--global-batch",
        type=int,
        metavar="N",
        help="sequences of an optimizer step (default: about a million tokens)",
    )
    add(
        "--seq-len",
        type=int,
        metavar="N",
        help="tokens of a sequence (default: what the model takes, at most 4096)",
    )
    add("--precision", default="bf16", metavar="P", help="bf16 (default), fp16 or fp32")
    add(
        "--optimizer",
        default="adamw",
        metavar="NAME",
        help="adamw (default), adam, adamw-8bit, lion, sgd-momentum or sgd",
    )
    add(
        "--memory-limit",
        metavar="GIB",
        help="memory of a device to use at most, in GiB (default: 94 %% of what it has)",
    )
    add("--memory", metavar="GIB", help="memory that each device has, not its profile's")
    add(
        "--scale",
        default="",
        metavar="KEY=FACTOR,...",
        help="what if compute, memory_bandwidth, link_inside or link_between were faster",
    )
    add(
        "--fix",
        action="append",
        default=[],
        metavar="KEY=VALUE,...",
        help="pin layout fields, such as tensor=2,pipeline=4, or recompute=none|selective|full",
    )
    add("--trust-remote-code", action="store_true", help="let a model's own code run")


def _add_output(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "-o", "--output", metavar="FILE", help=f"where to write the plan ({default}; - for stdout)"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON, nothing else")
    parser.add_argument("--csv", action="store_true", help="print one row of CSV, nothing else")
    parser.add_argument("-q", "--quiet", action="store_true", help="no summary")
    parser.add_argument("-v", "--verbose", action="store_true", help="say what is being done")


def plan_parser() -> Parser:
    """Options of `plan`."""
    parser = _parser(
        "",
        "Finds the fastest layout of a training job on a cluster, proves it and writes a plan.",
        epilog=EXAMPLES,
    )
    _add_question(parser)
    parser.add_argument(
        "--allow",
        default="",
        metavar="AXES",
        help="search context and expert parallelism too, which the runtime cannot apply yet",
    )
    parser.add_argument(
        "--top", type=int, default=4, metavar="K", help="list the K best layouts (default 4)"
    )
    _add_output(parser, "default MODEL-NxDEVICE.plan.json")
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.add_argument(
        "--print-completion", choices=("bash", "zsh", "tcsh"), help="print a completion script"
    )
    return parser


def estimate_parser() -> Parser:
    """Options of `plan estimate`."""
    parser = _parser(
        "estimate",
        "Predicts the layout that --fix describes; what is left out is 1, stage boundaries and\n"
        "recomputation are chosen best. Exit code 0 whether it fits or not: see `fits`.",
        epilog="example:\n  plan estimate --model llama-2-7b --gpus 8 --fix tensor=2,data_shard=4",
    )
    _add_question(parser)
    _add_output(parser, "not written by default")
    return parser


def explain_parser() -> Parser:
    """Options of `plan explain`."""
    parser = _parser("explain", "Says why a plan is as it is.")
    parser.add_argument("plan", metavar="PLAN", help="a plan file")
    parser.add_argument(
        "--why-not", metavar="KEY=VALUE,...", help="what such a layout would cost instead"
    )
    parser.add_argument("--model", metavar="NAME", help="where the model is, if its name moved")
    parser.add_argument("--cluster", metavar="FILE", help="the cluster file the plan was made for")
    parser.add_argument("--json", action="store_true", help="print JSON, nothing else")
    parser.add_argument("--csv", action="store_true", help="print one row of CSV for each stage")
    return parser


def diff_parser() -> Parser:
    """Options of `plan diff`."""
    parser = _parser("diff", "Lists what differs between two plans; exit code 1 if anything does.")
    parser.add_argument("plans", nargs=2, metavar="PLAN", help="a plan file")
    parser.add_argument("--json", action="store_true", help="print JSON, nothing else")
    parser.add_argument("--csv", action="store_true", help="print CSV, nothing else")
    return parser


def models_parser() -> Parser:
    """Options of `plan models`."""
    parser = _parser("models", "Lists the models that can be named.")
    parser.add_argument("--json", action="store_true", help="print JSON, nothing else")
    parser.add_argument("--csv", action="store_true", help="print CSV, nothing else")
    return parser


def devices_parser() -> Parser:
    """Options of `plan devices`."""
    parser = _parser("devices", "Lists the devices and clusters that have a profile.")
    parser.add_argument("--json", action="store_true", help="print JSON, nothing else")
    parser.add_argument("--csv", action="store_true", help="print CSV, nothing else")
    return parser


def schema_parser() -> Parser:
    """Options of `plan schema`."""
    return _parser("schema", "Prints the JSON Schema of the plan file.")


def validate_parser() -> Parser:
    """Options of `plan validate`."""
    from paraplan.validate import add_validate_arguments

    parser = _parser(
        "validate",
        "Compares predictions with measured runs, one CSV row each (columns: docs/accuracy.md).",
    )
    add_validate_arguments(parser)
    return parser


def check_parser() -> Parser:
    """Options of `plan check`."""
    from paraplan.check import add_check_arguments

    parser = _parser(
        "check",
        "Applies a plan to the real model without data, in this process, for one rank of each\n"
        "pipeline stage: paths resolve, shapes divide, the schedule and the optimizer complete.\n"
        "What torch's memory tracker counts stands beside the plan's prediction. Exits with 1\n"
        "if they differ by more than 5 % or a stage does not fit.",
        epilog="example:\n  plan check mistral-7b-16xh100.plan.json --stage 0",
    )
    add_check_arguments(parser)
    return parser


def calibrate_parser() -> Parser:
    """Options of `plan calibrate`."""
    from paraplan.calibrate import add_calibrate_arguments

    parser = _parser(
        "calibrate",
        "Fits a machine's figures to measured runs, one CSV row each (columns:\n"
        "docs/accuracy.md), and says how well they are known then.",
        epilog="example:\n  plan calibrate runs.csv --device h100 -o ours.json\n"
        "  plan --model mistral-7b --gpus 16 --cluster ours.json",
    )
    add_calibrate_arguments(parser)
    return parser


def profile_parser() -> Parser:
    """Options of `plan profile`."""
    from paraplan.profile_command import add_profile_arguments

    parser = _parser(
        "profile",
        "Measures the devices of this machine, computing at once as in training, and\n"
        "writes a cluster profile. Ends with a test: whole layers that nothing was fitted\n"
        "to, predicted against measured. With --nnodes the same command runs on several\n"
        "machines and measures the network between them, too.",
        epilog="examples:\n  plan profile --device cpu --gpus 2 --quick -o mine.json\n"
        "  plan --model ./my-model --cluster mine.json\n"
        "  plan profile --nnodes 2 --endpoint node0:29400 -o mine.json  # the same on each",
    )
    add_profile_arguments(parser)
    return parser


def timeline_parser() -> Parser:
    """Options of `plan timeline`."""
    from paraplan.timeline import add_timeline_arguments

    parser = _parser(
        "timeline",
        "Replays a plan's step event by event and writes what each pipeline rank does\n"
        "as a Chrome trace (for https://ui.perfetto.dev); says how far the replay is\n"
        "from the closed form.",
        epilog="example:\n  plan timeline mistral-7b-16xh100.plan.json -o trace.json",
    )
    add_timeline_arguments(parser)
    return parser


def run_parser() -> Parser:
    """Options of `plan run`."""
    from paraplan.run_command import EXAMPLES as RUN_EXAMPLES
    from paraplan.run_command import add_run_arguments

    parser = _parser(
        "run",
        "Trains a script on all devices, with or without the line in it.",
        epilog=RUN_EXAMPLES,
    )
    add_run_arguments(parser)
    return parser


def what_if_parser() -> Parser:
    """Options of `plan what-if`."""
    from paraplan.what_if_command import add_what_if_arguments
    from paraplan.what_if_options import EXAMPLES as WHAT_IF_EXAMPLES

    parser = _parser(
        "what-if",
        "Plans many clusters, and says what training on each takes and which is best.",
        epilog=WHAT_IF_EXAMPLES,
    )
    add_what_if_arguments(parser)
    return parser


def report_parser() -> Parser:
    """Options of `plan report`."""
    from paraplan.page import add_report_arguments

    parser = _parser(
        "report",
        "Writes one HTML file that needs no network: the mesh, the timeline of a step,\n"
        "where time and memory go, what came close, and the proof. Of a what-if: the\n"
        "answer, the Pareto front, curves, and every point with its command.",
        epilog="examples:\n  plan report mistral-7b-16xh100.plan.json -o report.html\n"
        "  plan report sweep.json -o sweep.html",
    )
    add_report_arguments(parser)
    return parser


def export_parser() -> Parser:
    """Options of `plan export`."""
    from paraplan.export import add_export_arguments

    parser = _parser(
        "export",
        "Writes a plan as the launch configuration of another tool. What the tool\n"
        "cannot express is noted on stderr and in the file.",
        epilog="example:\n  plan export mistral-7b-16xh100.plan.json --to megatron -o my.args",
    )
    add_export_arguments(parser)
    return parser
