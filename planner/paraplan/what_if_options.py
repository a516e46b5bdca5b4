"""The options of `plan what-if`, and the quantities in them (``30d``, ``2M``, ``1T``)."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any

from paraplan.device import load_device
from paraplan.errors import InputError
from paraplan.request import Request, parse_fix, parse_scale
from paraplan.what_if_axes import Axes, parse_factors, parse_names, parse_numbers, parse_reals
from paraplan.what_if_file import Economics, Limits

_POWERS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
_DAYS = {"H": 1 / 24, "D": 1.0, "W": 7.0, "Y": 365.0}
_NUMBER = r"(\d+(?:\.\d+)?(?:e\d+)?)"

AXES = """\
Each of these takes a list, and every combination is planned:
  --gpus 8,16,32..512 doubles from 32 on; 8..64+8 goes up by 8"""

EXAMPLES = """\
examples:
  plan what-if --model mistral-7b --gpus 8..512 --device h100,a100 -o sweep.json
  plan what-if --model llama-3-70b --gpus 64..1024 --deadline 30d --budget 2M
  plan what-if --model llama-3-8b --gpus 64 --link-bandwidth x0.5,x1,x2 --csv

An interrupted sweep goes on where it stopped when it is started again."""


def add_axes(parser: argparse.ArgumentParser) -> None:
    """Options that take lists."""
    group = parser.add_argument_group("what is varied", AXES)
    for name, metavar, help_text in (
        ("model", "NAMES", "as in plan --model"),
        ("gpus", "NUMBERS", "numbers of devices"),
        ("device", "NAMES", "from `plan devices`, or profile files (default h100)"),
        ("cluster", "NAMES", "from `plan devices`, or files of your own, instead of --device"),
        ("global-batch", "NUMBERS", "sequences of a step (default: as plan, by devices)"),
        ("seq-len", "NUMBERS", "tokens of a sequence"),
        ("precision", "NAMES", "bf16 (default), fp16, fp32"),
        ("memory", "GIB", "memory of each device, instead of the profile's"),
        ("link-bandwidth", "FACTORS", "x0.5,x1,x2: of the network between nodes"),
        ("spot-interruptions", "RATES", "how often a node is taken away, times a day"),
    ):
        group.add_argument(f"--{name}", metavar=metavar, help=help_text)


def add_fixed(parser: argparse.ArgumentParser) -> None:
    """Options that hold for all points."""
    add = parser.add_argument_group("the same for all points").add_argument
    add("--optimizer", default="adamw", metavar="NAME", help="as in plan (default adamw)")
    add("--gpus-per-node", type=int, metavar="N", help="devices of a node")
    add("--memory-limit", type=float, metavar="GIB", help="memory of a device to use at most")
    add("--scale", default="", metavar="KEY=FACTOR,...", help="as in plan")
    add("--fix", action="append", default=[], metavar="KEY=VALUE,...", help="as in plan")
    add("--allow", default="", metavar="AXES", help="as in plan")
    add("--trust-remote-code", action="store_true", help="let a model's own code run")


def add_economics(parser: argparse.ArgumentParser) -> None:
    """Options about the whole training run, and the limits on it."""
    usual = Economics()
    add = parser.add_argument_group("the training run").add_argument
    add("--tokens", default="1T", metavar="N", help="to train on, such as 300B (default 1T)")
    add(
        "--price",
        metavar="DOLLARS",
        help="of a device-hour, for all or by name: h100=2.5,a100=1.2 (default: assumed)",
    )
    add(
        "--device-mtbf",
        metavar="TIME",
        help="mean time between failures of a device (default "
        f"{usual.device_mtbf_hours:,.0f}h: Llama 3's)",
    )
    add(
        "--checkpoint-rate",
        type=float,
        metavar="GB/S",
        help="that each node writes checkpoints at "
        f"(default {usual.checkpoint_bytes_per_second / 1e9:.2g})",
    )
    add("--restart", metavar="TIME", help="from a failure to training again (default 10min)")
    add(
        "--power-overhead",
        type=float,
        metavar="X",
        help=f"power of the data centre over the devices' (default {usual.power_overhead:g})",
    )
    add(
        "--carbon",
        type=float,
        metavar="KG",
        help=f"CO2 of a kWh (default {usual.carbon_kg_per_kwh:g})",
    )
    add = parser.add_argument_group(
        "limits", "which cluster is cheapest, which fastest"
    ).add_argument
    add("--deadline", metavar="TIME", help="such as 30d, 12h or 6w")
    add("--budget", metavar="DOLLARS", help="such as 2M or 500k")
    add("--min-headroom", metavar="SHARE", help="of each device's memory to leave free: 10%%")


def axes_of(options: argparse.Namespace) -> Axes:
    """The axes that were given.

    Raises:
        InputError: an empty list, or one that cannot be read.
    """
    if options.model is None:
        raise InputError(
            "which model? --model is missing", hint="for example --model mistral-7b --gpus 8..512"
        )
    if options.gpus is None and options.cluster is None:
        raise InputError("how many devices? --gpus is missing", hint="for example --gpus 8..512")
    readers: dict[str, Callable[[str, str], tuple[Any, ...]]] = {
        "model": parse_names,
        "device": parse_names,
        "cluster": parse_names,
        "precision": parse_names,
        "seq_len": parse_numbers,
        "global_batch": parse_numbers,
        "memory": parse_reals,
        "link_bandwidth": parse_factors,
        "spot_interruptions": parse_reals,
        "gpus": parse_numbers,
    }
    given: dict[str, tuple[Any, ...]] = {}
    for name, read in readers.items():
        text = getattr(options, name)
        if text is not None:
            field = "memory_gib" if name == "memory" else name
            given[field] = read(text, f"--{name.replace('_', '-')}")
    return Axes(**given)


def common_of(options: argparse.Namespace) -> Request:
    """What is the same for all points."""
    return Request(
        model="",
        gpus_per_node=options.gpus_per_node,
        optimizer=options.optimizer,
        memory_limit_gib=options.memory_limit,
        scale=parse_scale(options.scale),
        fix=parse_fix(",".join(options.fix)),
        allow=tuple(filter(None, options.allow.split(","))),
        top=1,
        trust_remote_code=options.trust_remote_code,
    )


def economics_of(options: argparse.Namespace) -> Economics:
    """What the run costs and how it fails, as far as given."""
    given: dict[str, Any] = {"tokens": parse_amount(options.tokens, "--tokens")}
    if options.price is not None:
        given |= _prices(options.price)
    if options.device_mtbf is not None:
        given["device_mtbf_hours"] = 24 * parse_days(options.device_mtbf, "--device-mtbf")
    if options.restart is not None:
        given["restart_seconds"] = 86400 * parse_days(options.restart, "--restart")
    for name, field, unit, least in (
        ("checkpoint_rate", "checkpoint_bytes_per_second", 1e9, 1e-6),
        ("power_overhead", "power_overhead", 1.0, 1.0),
        ("carbon", "carbon_kg_per_kwh", 1.0, 0.0),
    ):
        value = getattr(options, name)
        if value is not None:
            if not least <= value <= 1e6:
                option = name.replace("_", "-")
                raise InputError(f"--{option} is {value:g}; a number from {least:g} on is wanted")
            given[field] = value * unit
    return Economics(**given)


def _prices(text: str) -> dict[str, Any]:
    if "=" not in text:
        return {"price_per_device_hour": parse_amount(text, "--price")}
    prices = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals:
            raise InputError(f"--price has {part!r}; device=dollars is wanted")
        prices[load_device(name.strip()).name] = parse_amount(value, "--price")
    return {"prices": prices}


def limits_of(options: argparse.Namespace) -> Limits:
    """The limits that were given."""
    given: dict[str, Any] = {}
    if options.deadline is not None:
        given["deadline_days"] = parse_days(options.deadline, "--deadline")
    if options.budget is not None:
        given["budget_dollars"] = parse_amount(options.budget, "--budget")
    if options.min_headroom is not None:
        given["min_headroom"] = parse_share(options.min_headroom, "--min-headroom")
    return Limits(**given)


def parse_amount(text: str, option: str) -> float:
    """``2M``, ``$500k``, ``1.4T`` or ``1e12`` as a number above zero."""
    match = re.fullmatch(rf"\$?\s*{_NUMBER}\s*([kKmMbBgGtT]?)", text.strip())
    value = float(match[1]) * _POWERS[match[2].upper()] if match else 0.0
    if not 0 < value < 1e18:
        raise InputError(f"{option} is {text!r}; a number above 0 is wanted, such as 500k or 2M")
    return value


def parse_days(text: str, option: str) -> float:
    """``30d``, ``12h``, ``6w``, ``1y`` or ``10min`` as days above zero; a bare number is days."""
    match = re.fullmatch(rf"{_NUMBER}\s*(min|[hHdDwWyY]?)", text.strip())
    unit = match[2].upper() if match else ""
    factor = 1 / 1440 if unit == "MIN" else _DAYS[unit or "D"]
    value = float(match[1]) * factor if match else 0.0
    if not 0 < value < 1e6:
        raise InputError(f"{option} is {text!r}; a time above 0 is wanted, such as 30d or 12h")
    return value


def parse_share(text: str, option: str) -> float:
    """``10%`` or ``0.1`` as a share below 1."""
    match = re.fullmatch(rf"{_NUMBER}\s*(%?)", text.strip())
    value = float(match[1]) / (100 if match[2] else 1) if match else 1.0
    if not value < 1:
        raise InputError(f"{option} is {text!r}; a share below 100% is wanted, such as 10%")
    return value
