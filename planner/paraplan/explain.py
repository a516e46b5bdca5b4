"""Why a plan is as it is: `explain`, ``--why-not``, and what differs between two plans."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console

from paraplan.errors import ImpossibleError, InfeasibleError, InputError
from paraplan.models import resolve_model
from paraplan.plan_file import Plan
from paraplan.planning import plan_request
from paraplan.report import (
    GIB,
    TIME_NAMES,
    closing_lines,
    layout_words,
    print_memory,
    print_runner_ups,
    print_times,
    seconds_words,
)
from paraplan.request import Request, make_constraints


def print_explanation(plan: Plan, console: Console) -> None:
    """Breakdown, memory by stage and part, runner-ups, exclusions, proof."""
    step = seconds_words(plan.prediction.step_seconds)
    console.print(f"[bold]{layout_words(plan.layout)}[/]: {step}", highlight=False)
    console.print()
    print_times(plan.prediction.breakdown, plan.prediction.step_seconds, console)
    print_memory(plan, console)
    if plan.runner_ups:
        print_runner_ups(plan, console)
    if plan.proof.excluded:
        console.print("impossible combinations")
        ordered = sorted(plan.proof.excluded.items(), key=lambda item: -item[1])
        for reason, count in ordered[:12]:
            console.print(f"  {count:5d}  {reason}", highlight=False, soft_wrap=True)
        if len(ordered) > 12:
            console.print(f"         and {len(ordered) - 12} more reasons", highlight=False)
        console.print()
    for line in closing_lines(plan):
        console.print(line, style="dim", highlight=False)


def request_of(plan: Plan, *, model: str | None = None, cluster: str | None = None) -> Request:
    """The question that a plan answers, from its own record.

    Args:
        model, cluster: where to find them, if the recorded name does not say it.
    """
    from paraplan.cluster import Cluster, cluster_names, load_cluster

    named: str | Cluster | None = cluster
    if cluster is None and plan.cluster.name in cluster_names():
        usual = load_cluster(plan.cluster.name)
        if usual.device.name == plan.cluster.device:
            named = usual.resized(plan.cluster.devices, plan.cluster.devices_per_node)
    return Request(
        model=model or plan.model.name,
        gpus=plan.cluster.devices if named is None or cluster else None,
        device=plan.cluster.device if named is None else None,
        gpus_per_node=plan.cluster.devices_per_node if named is None else None,
        cluster=named,
        global_batch=plan.workload.global_batch,
        seq_len=plan.workload.sequence_length,
        precision=plan.workload.precision,
        optimizer=plan.workload.optimizer,
        memory_limit_gib=plan.prediction.capacity_bytes / GIB,
        allow=plan.needs_unsupported,
        top=1,
    )


def why_not(plan: Plan, request: Request, fix: Mapping[str, Any]) -> list[str]:
    """What the best layout with ``fix`` would cost, and what defeats it, in a few lines.

    Raises:
        InputError: ``fix`` is not possible to read, or the model is not the plan's.
    """
    constraints = make_constraints(fix, ())
    fixed = constraints.fixed
    wanted = ", ".join(f"{k} {v}" for k, v in fix.items())
    if all(getattr(plan.layout, name) == value for name, value in fixed.items()) and (
        "recompute" not in fix or _all_recompute(plan, constraints.recompute[0])
    ):
        return [f"{wanted}: that is the plan"]
    try:
        resolve_model(request.model)
    except InputError:
        raise InputError(
            f"the plan was made for {request.model!r}, which is no model that can be named",
            hint="say where it is with --model",
        ) from None
    try:
        other = plan_request(_with_fix(request, fix))
    except ImpossibleError as error:
        return [f"{wanted}: {error}"]
    except InfeasibleError as error:
        lines = [f"{wanted}: {error}"]
        return [*lines, f"limit: {error.hint}"] if error.hint else lines
    _check_same(plan, other)
    return _compare(plan, other, wanted)


def _all_recompute(plan: Plan, mode: str) -> bool:
    return all(one == mode for stage in plan.stages for one in stage.recompute)


def _with_fix(request: Request, fix: Mapping[str, Any]) -> Request:
    from dataclasses import replace

    allow = tuple(name for name in ("context", "expert") if name in fix)
    return replace(request, fix=fix, allow=(*request.allow, *allow))


def _check_same(plan: Plan, other: Plan) -> None:
    if plan.model.config_sha256 != other.model.config_sha256:
        raise InputError(
            f"the plan was made for another {plan.model.name!r} than the one found here",
            hint="name the model's directory with --model",
        )
    for what, before, after in (
        (plan.cluster.device, plan.cluster.device_sha256, other.cluster.device_sha256),
        (plan.cluster.name, plan.cluster.cluster_sha256, other.cluster.cluster_sha256),
    ):
        if before != after:
            raise InputError(
                f"the profile of {what!r} is not the one that the plan was made with",
                hint="name its file with --cluster, or make the plan again",
            )


def _compare(plan: Plan, other: Plan, wanted: str) -> list[str]:
    here, there = plan.prediction, other.prediction
    slower = there.step_seconds / here.step_seconds - 1
    lines = [
        f"{wanted}: at best {seconds_words(there.step_seconds)} with "
        f"{layout_words(other.layout)}, {slower * 100:+.1f} % against the plan's "
        f"{seconds_words(here.step_seconds)}",
    ]
    before, after = here.breakdown.model_dump(), there.breakdown.model_dump()
    changes = {name: after[name] - before[name] for name in before}
    worst = max(changes, key=lambda name: changes[name])
    if changes[worst] > 0:
        lines.append(
            f"what costs most: {TIME_NAMES[worst]}, {seconds_words(after[worst])} instead of "
            f"{seconds_words(before[worst])}"
        )
    room = (there.capacity_bytes - there.peak_memory_bytes) / GIB
    lines.append(
        f"memory: {there.peak_memory_bytes / GIB:.1f} GiB of "
        f"{there.capacity_bytes / GIB:.1f} GiB ({room:.1f} GiB left)"
    )
    return lines


def differences(one: Plan, other: Plan) -> list[tuple[str, str, str]]:
    """What differs between two plans: field, value in one, value in the other.

    The time that planning took is not compared.
    """
    before, after = dict(_flat(one.model_dump())), dict(_flat(other.model_dump()))
    names = list(dict.fromkeys([*before, *after]))
    ignored = {"proof.seconds"}
    return [
        (name, before.get(name, "-"), after.get(name, "-"))
        for name in names
        if name not in ignored and before.get(name) != after.get(name)
    ]


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _flat(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple) and value and isinstance(value[0], dict):
        for index, part in enumerate(value):
            yield from _flat(part, f"{name}[{index}]")
    elif isinstance(value, list | tuple) and name.endswith("recompute"):
        yield name, _runs(value)
    else:
        yield name, str(value)


def _runs(modes: list[str] | tuple[str, ...]) -> str:
    from itertools import groupby

    return ", ".join(f"{len(list(group))} {mode}" for mode, group in groupby(modes)) or "-"
