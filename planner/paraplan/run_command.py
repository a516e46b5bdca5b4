"""`plan run`: train a script on all devices, even one without the line."""

from __future__ import annotations

import argparse
import os

from paraplan.errors import InputError
from paraplan.launch import Nodes, start_ranks
from paraplan.surroundings import Devices, find_devices, parse_devices

EXAMPLES = """\
examples:
  plan run train.py --batch_size 64
  plan run --devices cpu:4 train.py
  plan run -m my_package.train --lr 1e-4
  plan run --nnodes 2 --endpoint node0:29400 --job a1 train.py     # the same on each node"""


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `plan run`."""
    add = parser.add_argument
    add("--nnodes", type=int, default=1, metavar="N", help="machines of the job (default 1)")
    add("--nproc", type=int, metavar="N", help="processes on this machine (default: its GPUs)")
    add("--devices", metavar="KIND:N", help="such as cpu:4, in place of --nproc")
    add("--endpoint", metavar="HOST:PORT", help="where the machines meet: one of them, a free port")
    add("--job", metavar="NAME", help="the same word on all machines of a job")
    add("--plan", metavar="FILE", help="a plan file (default: planned at the first batch)")
    add("-m", dest="module", action="store_true", help="the script is a module's name")
    add("script", metavar="SCRIPT", help="what `python` would be given")
    add("arguments", nargs=argparse.REMAINDER, metavar="...", help="the script's own arguments")


def run_script(options: argparse.Namespace) -> int:
    """Start the ranks and wait; the script's exit code."""
    if options.nnodes < 1:
        raise InputError(f"--nnodes is {options.nnodes}; at least 1 is wanted")
    if options.nnodes > 1 and not (options.endpoint and options.job):
        raise InputError(
            "machines that do not know each other cannot meet",
            hint="give all of them the same --endpoint HOST:PORT and --job NAME",
        )
    if not options.module and not os.path.isfile(options.script):
        raise InputError(f"{options.script}: no such script", hint="-m runs a module")
    if options.plan is not None:
        os.environ["PARAPLAN_PLAN"] = options.plan
    nodes = Nodes()
    if options.nnodes > 1:
        nodes = Nodes(options.nnodes, options.endpoint, options.job)
    module = ["-m"] if options.module else []
    return start_ranks(
        ["-m", "paraplan.run_script", *module, options.script, *options.arguments],
        _devices(options),
        nodes,
    )


def _devices(options: argparse.Namespace) -> Devices:
    if options.devices is None:
        return find_devices(options.nproc)
    devices = parse_devices(options.devices)
    return devices if devices.count else find_devices(options.nproc, {"PARAPLAN_DEVICES": "cuda"})
