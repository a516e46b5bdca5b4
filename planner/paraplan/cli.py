"""The `plan` command: reads options, calls the planner, prints, sets the exit code."""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paraplan.argument_parsers import (
    Parser,
    calibrate_parser,
    check_parser,
    devices_parser,
    diff_parser,
    estimate_parser,
    explain_parser,
    export_parser,
    models_parser,
    plan_parser,
    profile_parser,
    report_parser,
    run_parser,
    schema_parser,
    timeline_parser,
    validate_parser,
    what_if_parser,
)
from paraplan.errors import InputError, PlanError
from paraplan.listings import list_devices, list_models, print_csv, print_schema

if TYPE_CHECKING:
    from rich.console import Console

    from paraplan.plan_file import Plan
    from paraplan.request import Request


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except PlanError as error:
        print(f"error: {error}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


Command = tuple[Callable[[], Parser], Callable[[argparse.Namespace], int]]


def _commands() -> dict[str, Command]:
    """Every command but `plan` itself: its options, and what runs it."""
    return {
        "estimate": (estimate_parser, _estimate),
        "explain": (explain_parser, _explain),
        "check": (check_parser, _check),
        "diff": (diff_parser, _diff),
        "models": (models_parser, list_models),
        "devices": (devices_parser, list_devices),
        "schema": (schema_parser, print_schema),
        "export": (export_parser, _export),
        "report": (report_parser, _report),
        "run": (run_parser, _run_script),
        "timeline": (timeline_parser, _timeline),
        "validate": (validate_parser, _validate),
        "what-if": (what_if_parser, _what_if),
        "calibrate": (calibrate_parser, _calibrate),
        "profile": (profile_parser, _profile),
    }


def _run(arguments: list[str]) -> int:
    commands = _commands()
    name: list[str] = []
    if arguments and not arguments[0].startswith("-"):
        name = [arguments.pop(0)]
        if name[0] not in commands:
            from difflib import get_close_matches

            close = get_close_matches(name[0], commands, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "see plan --help"
            raise InputError(f"unknown command {name[0]!r}", hint=hint)
        make_parser, run = commands[name[0]]
    else:
        make_parser, run = plan_parser, _plan
    if name != ["run"]:  # most of what follows it is the script's
        arguments = [_hyphens(argument) for argument in arguments]
    options = make_parser().parse_args(arguments)
    options.command_line = shlex.join(["plan", *name, *arguments])
    return run(options)


def _hyphens(argument: str) -> str:
    """``--global_batch`` is as good as ``--global-batch``."""
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else argument


def _request(options: argparse.Namespace) -> Request:
    from paraplan.request import Request, parse_fix, parse_scale

    if options.model is None:
        raise InputError(
            "which model? --model is missing", hint="for example --model mistral-7b --gpus 16"
        )
    return Request(
        model=options.model,
        gpus=options.gpus,
        device=options.device,
        gpus_per_node=options.gpus_per_node,
        cluster=options.cluster,
        global_batch=options.global_batch,
        seq_len=options.seq_len,
        precision=options.precision,
        optimizer=options.optimizer,
        memory_limit_gib=_gib(options.memory_limit, "--memory-limit"),
        memory_gib=_gib(options.memory, "--memory"),
        scale=parse_scale(options.scale),
        fix=parse_fix(",".join(options.fix)),
        allow=tuple(filter(None, getattr(options, "allow", "").split(","))),
        top=getattr(options, "top", 1),
        trust_remote_code=options.trust_remote_code,
    )


def _gib(text: str | None, option: str) -> float | None:
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GiB|GB|G)?\s*", text, re.IGNORECASE)
    if not match:
        raise InputError(f"{option} is {text!r}; a number of GiB is wanted, such as 40")
    return float(match[1]) * (1e9 / 2**30 if (match[2] or "").upper() == "GB" else 1.0)


def _plan(options: argparse.Namespace) -> int:
    if options.version:
        from paraplan.describe import tool_version

        print(f"paraplan {tool_version()}")
        return 0
    if options.print_completion:
        return _print_completion(options.print_completion)
    from paraplan.planning import plan_request

    request = _request(options)
    with _progress(options) as report:
        plan = plan_request(request, report=report)
    target = options.output
    if target is None and not options.json and not options.csv:
        target = default_file_name(request, plan)
    return _deliver(plan, target, options)


def _estimate(options: argparse.Namespace) -> int:
    from paraplan.planning import estimate_request

    request = _request(options)
    with _progress(options) as report:
        plan = estimate_request(request, report=report)
    return _deliver(plan, options.output, options)


def default_file_name(request: Request, plan: Plan) -> str:
    """``mistral-7b-16xh100.plan.json``."""
    from paraplan.request import DEFAULT_DEVICE

    device = request.device or (DEFAULT_DEVICE if request.cluster is None else None)
    if device is None or Path(device).suffix:
        device = plan.cluster.device
    stem = f"{plan.model.name}-{plan.cluster.devices}x{device}"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-") + ".plan.json"


def _deliver(plan: Plan, target: str | None, options: argparse.Namespace) -> int:
    from paraplan.plan_file import plan_to_json, save_plan

    note = None
    if target == "":
        raise InputError("--output is empty; a file name or - is wanted")
    if target not in (None, "-"):
        note = _replaced(plan, str(target))
        save_plan(plan, str(target))
    if options.csv:
        from paraplan.tables import plan_row

        return print_csv([plan_row(plan)])
    if options.json or target == "-":
        sys.stdout.write(plan_to_json(plan))
        sys.stdout.flush()
        return 0
    if not options.quiet:
        from paraplan.report import print_summary

        console = _console()
        print_summary(plan, console)
        if target:
            console.print(f"wrote {target}", highlight=False, soft_wrap=True, markup=False)
        if note:
            console.print(note, highlight=False, soft_wrap=True, markup=False)
    return 0


def _replaced(plan: Plan, target: str) -> str | None:
    """What changes against the plan that stood there, if one did."""
    from paraplan.plan_file import load_plan
    from paraplan.report import layout_words

    if not Path(target).is_file():
        return None
    try:
        before = load_plan(target)
    except InputError:
        return "it replaces a file that was not a plan of this version"
    if before.layout == plan.layout:
        return None
    return f"it replaces a plan with {layout_words(before.layout)}"


def _console() -> Console:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=80)  # piped output looks the same everywhere
    return console


@contextmanager
def _progress(options: argparse.Namespace) -> Iterator[Callable[[str], None]]:
    """Phases on stderr: lines with --verbose, a spinner on a terminal, else nothing."""
    if options.verbose and not options.json:
        yield lambda line: print(line, file=sys.stderr)
    elif options.json or options.csv or options.quiet or not sys.stderr.isatty():
        yield lambda line: None
    else:
        from rich.console import Console

        with Console(stderr=True).status("starting") as status:
            yield status.update


def _explain(options: argparse.Namespace) -> int:
    from paraplan.explain import print_explanation, request_of, why_not
    from paraplan.plan_file import load_plan
    from paraplan.request import parse_fix
    from paraplan.tables import stage_row

    plan = load_plan(options.plan)
    if options.why_not is None:
        if options.csv:
            return print_csv([stage_row(stage) for stage in plan.stages])
        if options.json:
            print(json.dumps(plan.model_dump(mode="json")))
        else:
            print_explanation(plan, _console())
        return 0
    fix = parse_fix(options.why_not)
    if not fix:
        raise InputError("--why-not names no layout", hint="for example --why-not tensor=8")
    request = request_of(plan, model=options.model, cluster=options.cluster)
    lines = why_not(plan, request, fix)
    print(json.dumps({"why_not": fix, "answer": lines}) if options.json else "\n".join(lines))
    return 0


def _diff(options: argparse.Namespace) -> int:
    from paraplan.explain import differences
    from paraplan.plan_file import load_plan

    one, other = (load_plan(path) for path in options.plans)
    found = differences(one, other)
    rows: list[dict[str, Any]] = [{"field": name, "before": a, "after": b} for name, a, b in found]
    if options.json:
        print(json.dumps({"differences": rows}))
    elif options.csv:
        print_csv(rows)
    else:
        for name, before, after in found:
            print(f"{name}: {before} -> {after}")
        if not found:
            print("the plans are the same")
    return 1 if found else 0


def _export(options: argparse.Namespace) -> int:
    from paraplan.export import run_export

    return run_export(options)


def _report(options: argparse.Namespace) -> int:
    from paraplan.page import run_report

    return run_report(options)


def _timeline(options: argparse.Namespace) -> int:
    from paraplan.timeline import run_timeline

    return run_timeline(options)


def _run_script(options: argparse.Namespace) -> int:
    from paraplan.run_command import run_script

    return run_script(options)


def _check(options: argparse.Namespace) -> int:
    from paraplan.check import run_check

    return run_check(options)


def _validate(options: argparse.Namespace) -> int:
    from paraplan.validate import run_validate

    return run_validate(options)


def _what_if(options: argparse.Namespace) -> int:
    from paraplan.what_if_command import run_what_if

    return run_what_if(options)


def _calibrate(options: argparse.Namespace) -> int:
    from paraplan.calibrate import run_calibrate

    return run_calibrate(options)


def _profile(options: argparse.Namespace) -> int:
    from paraplan.profile_command import run_profile

    return run_profile(options)


def _print_completion(shell: str) -> int:
    import shtab

    parser = plan_parser()
    commands = parser.add_subparsers()
    for name, (make, _) in _commands().items():
        made = make()
        commands.add_parser(name, parents=[made], add_help=False, help=made.description)
    print(shtab.complete(parser, shell=shell))
    return 0


def command() -> int:
    """`main` as a process of its own, which ends as soon as it is done.

    Where torch and transformers were imported, Python's last collection took 1.5 s (`plan profile`
    on two virtual cores); it leaves out what is frozen.
    """
    code = main()
    gc.freeze()
    return code


if __name__ == "__main__":
    sys.exit(command())
