"""The command `plan profile`: its options, its progress bar and what it prints."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from paraplan.errors import InputError
from paraplan.files import write_atomically
from paraplan.measure_start import start_imports
from paraplan.models import ModelSource, resolve_model
from paraplan.profiling import Done, Profile, measure_beside, profile_machine

if TYPE_CHECKING:
    from paraplan.measure_nodes import Meeting

UNSTABLE = 0.2
"""Median spread of the timings from which on something else must be using the device."""

LAGGING = 0.1
"""Share of the time that devices lose waiting for each other from which on it is said."""


def add_profile_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``plan profile``."""
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), help="default: cuda where there is a GPU")
    add(
        "--gpus",
        type=int,
        metavar="N",
        help="devices, or CPU processes, that compute at once, on all machines: as many as will "
        "train (default: all GPUs, or 2 processes on each machine)",
    )
    add("--nnodes", type=int, default=1, metavar="N", help="machines that measure together")
    add(
        "--endpoint",
        metavar="HOST:PORT",
        help="where they meet: one of them, which writes the profile, and a free port",
    )
    add("--quick", action="store_true", help="fewer sizes, for a first plan")
    add(
        "--model",
        action="append",
        default=[],
        metavar="NAME",
        help="measure this model's own ops as well; may be given several times",
    )
    add("--seq-len", type=int, default=1024, metavar="N", help="tokens of those models' sequences")
    add("-o", "--output", metavar="FILE.json", help="write the profile")
    add("--json", action="store_true", help="everything as JSON")


def run_profile(options: argparse.Namespace) -> int:
    """``plan profile``: measure, say how well layers are predicted, write the profile.

    Raises:
        InputError: a wrong option, or a device that cannot be measured.
    """
    if options.output is not None and not options.output.endswith(".json"):
        raise InputError(f"--output is {options.output!r}; a name that ends in .json is wanted")
    if options.gpus is not None and not 1 <= options.gpus <= 1024:
        raise InputError(f"--gpus is {options.gpus}; a number from 1 to 1024 is wanted")
    _check_machines(options)
    start_imports()  # beside those of this process
    kind, there = _devices(options.device)
    ranks = options.gpus or options.nnodes * (there if kind == "cuda" else 2)
    models = [(resolve_model(name), options.seq_len) for name in options.model]
    if options.nnodes == 1:
        return _make(options, kind, ranks, models, None)

    from paraplan.measure_nodes import meet

    print(f"meeting {options.nnodes - 1} more at {options.endpoint}", file=sys.stderr)
    meeting = meet(options.nnodes, options.endpoint)
    if meeting.node == 0:
        code = _make(options, kind, ranks, models, meeting)
        meeting.part()
        return code
    measure_beside(kind, ranks, meeting, quick=options.quick, models=models)
    meeting.part()
    print(f"measured as machine {meeting.node}; the first one has the profile")
    return 0


def _check_machines(options: argparse.Namespace) -> None:
    if options.nnodes < 1:
        raise InputError(f"--nnodes is {options.nnodes}; at least 1 is wanted")
    if options.nnodes > 1 and not options.endpoint:
        raise InputError(
            "machines that do not know each other cannot meet",
            hint="give all of them the same --endpoint HOST:PORT, one of them and a free port",
        )
    if options.gpus is not None and options.gpus % options.nnodes:
        raise InputError(
            f"--gpus is {options.gpus}, which {options.nnodes} machines cannot share equally"
        )


def _make(
    options: argparse.Namespace,
    kind: Literal["cuda", "cpu"],
    ranks: int,
    models: Sequence[tuple[ModelSource, int]],
    meeting: Meeting | None,
) -> int:
    """Measure, write, and say how well layers are predicted."""
    partial = Path(f"{options.output}.partial") if options.output else None
    with _progress(options.json) as done:
        made = profile_machine(
            kind,
            ranks,
            quick=options.quick,
            models=models,
            partial=partial,
            done=done,
            meeting=meeting,
        )
    if options.output:
        text = made.cluster.model_dump_json(indent=1, exclude_none=True)
        write_atomically(options.output, text + "\n")
    print(json.dumps(as_json(made), indent=1) if options.json else as_text(made))
    if options.output and not options.json:
        print(f"wrote {options.output}; plan with --cluster {options.output}")
    return 0


def _devices(wanted: str | None) -> tuple[Literal["cuda", "cpu"], int]:
    if wanted == "cpu":
        return "cpu", 0

    import torch

    there = torch.cuda.device_count()
    if wanted == "cuda" and not there:
        raise InputError("torch sees no GPU here", hint="--device cpu measures CPU processes")
    return ("cuda" if there else "cpu"), there


@contextmanager
def _progress(quiet: bool) -> Iterator[Done]:
    """A bar on a terminal, else nothing."""
    if quiet or not sys.stderr.isatty():
        yield lambda finished, of: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring")
        yield lambda finished, of: bar.update(task, completed=finished, total=of)


def as_json(made: Profile) -> dict[str, object]:
    """What ``--json`` writes."""
    return {
        "profile": made.cluster.model_dump(mode="json", exclude_none=True),
        "seconds": made.seconds,
        "timings": made.timings,
        "spread": made.spread,
        "test_error": made.test_error,
        "layers": [
            {
                **asdict(one.task),
                "predicted_seconds": one.predicted_seconds,
                "measured_seconds": one.measured_seconds,
            }
            for one in made.layers
        ],
    }


def as_text(made: Profile) -> str:
    """What the command prints."""
    scale = made.cluster.device.whole_layer_scale
    lines = [
        made.cluster.description,
        f"{made.timings} timings in {made.seconds:.1f} s, median spread {made.spread:.1%}",
    ]
    if made.spread > UNSTABLE:
        lines.append("warning: timings are unstable, something else seems to use the device")
    lag = made.cluster.device.rates.lag
    if lag > LAGGING:
        lines.append(
            f"warning: devices that wait for the slowest one lose {lag:.0%}; one may be "
            "slower than the others, or shared"
        )
    lines += ["", f"{'whole layer':34s} {'measured':>10s} {'predicted':>10s} {'error':>7s}"]
    for one in made.layers:
        config = json.loads(one.task.config)
        width = config.get("hidden_size") or config.get("n_embd")
        name = f"{config['model_type']} {width}, {one.task.sequences} x {one.task.sequence_length}"
        lines.append(
            f"{name:34s} {one.measured_seconds * 1e3:7.2f} ms {one.predicted_seconds * 1e3:7.2f} ms"
            f" {one.error:+7.1%}{'  fitted' if one.task.fitted else ''}"
        )
    if scale is not None:
        lines.append(f"whole layers take {scale.value:.3f} x their ops alone")
        if made.cluster.device.kind == "cpu":  # a GPU hides what it can
            launch = made.cluster.device.host_launch_seconds.value
            lines[-1] += f", and {launch * 1e6:.1f} us for each launch"
    lines.append(f"median error of layers that were not fitted: {made.test_error:.1%}")
    return "\n".join(lines)
