"""The one line: ``paraplan.enable_advanced_parallelization()`` in a script for one device.

Started by plain ``python``, it starts the script on every device and ends (`launch`). In each of
these processes, and in those that another launcher started, it joins them, and arranges that the
next model is planned (`automatic`) and spread over them (`paraplan_runtime.deferred`).
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from paraplan.errors import InputError
from paraplan.launch import LAUNCHER, run_again_and_exit
from paraplan.surroundings import (
    find_devices,
    find_place,
    is_worker_process,
    standard_variables,
    why_one_process,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from paraplan.automatic import Wishes
    from paraplan_runtime.report import ParallelReport


PROFILES = ("auto", "measure", "shipped")


class _Session:
    """What the line set up in this process; there is one at most."""

    active: _Session | None = None

    def __init__(self, wishes: Wishes, device: torch.device, per_node: int) -> None:
        from paraplan_runtime.optimizers import watch_optimizers

        self.wishes = wishes
        self.device = device
        self._per_node = per_node
        self.optimizers = watch_optimizers()

    def adopt(self, model: nn.Module) -> None:
        """Plan ``model`` at its first batch."""
        from paraplan_runtime.deferred import Deferred

        Deferred(model, self._plan, self._tell, self.device, self.optimizers)

    def _tell(self, report: ParallelReport) -> None:
        import torch.distributed as dist

        if dist.get_rank() == 0:
            say(
                f"a step takes {report.measured_step_seconds:.3g} s, "
                f"{report.predicted_step_seconds:.3g} s were predicted"
            )

    def _plan(self, first: Any) -> Any:
        import torch.distributed as dist

        from paraplan.automatic import Machines, plan_for
        from paraplan.report import layout_words

        machines = Machines(self.device.type, dist.get_world_size(), self._per_node)
        planned = plan_for(first, self.wishes, machines, say)
        if dist.get_rank() == 0:
            say(
                f"{layout_words(planned.plan.layout)} on {planned.plan.cluster.devices} x "
                f"{planned.plan.cluster.device}: {planned.plan.prediction.step_seconds:.3g} s a "
                f"step predicted ({planned.origin})"
            )
        return planned.plan


def enable_advanced_parallelization(
    plan: str | os.PathLike[str] = "auto",
    *,
    gpus: int | None = None,
    num_stages: int | str = "auto",
    num_micro_batches: int | str = "auto",
    activation_recomputation: bool | str = "auto",
    distribute_parameter: bool | str = "auto",
    pipeline_parallel: bool = True,
    mixed_precision: bool = True,
    memory_fraction: float = 0.9,
    device: str | None = None,
    cluster: str | None = None,
    profile: str = "auto",
    fix: str = "",
) -> None:
    """Train the models that this script makes on all devices there are, under the best plan.

    Call it once, before the model is made. A second call does nothing.

    Args:
        plan: ``auto``, or a plan file; PARAPLAN_PLAN takes precedence.
        gpus: number of devices of this machine; by default all GPUs. Without a GPU, so many
            CPU processes.
        num_stages: pipeline stages.
        num_micro_batches: micro-batches of each data rank.
        activation_recomputation: True (all), False, ``none``, ``selective``, ``full``.
        distribute_parameter: True keeps parameters sharded over the data ranks at all times
            (ZeRO-3), False keeps a copy on each (ZeRO-1).
        pipeline_parallel: False forbids pipeline stages.
        mixed_precision: on GPUs, compute in bf16 with fp32 master weights.
        memory_fraction: share of each device's memory to plan with.
        device: device profile (`plan devices`); by default recognised.
        cluster: cluster profile, in place of device.
        profile: ``measure`` measures this machine's devices at the first start (about 20 s) and
            keeps what it finds; ``auto`` takes what is kept, else the shipped profile;
            ``shipped`` takes that.
        fix: more layout fields to pin, as in ``plan --fix``.

    Raises:
        InputError: an argument, or a variable of the environment, is wrong.
    """
    if os.environ.get("PARAPLAN_DISABLE") == "1" or _Session.active or is_worker_process():
        return
    wishes = _wishes(
        os.environ.get("PARAPLAN_PLAN") or os.fspath(plan),
        num_stages=num_stages,
        num_micro_batches=num_micro_batches,
        activation_recomputation=activation_recomputation,
        distribute_parameter=distribute_parameter,
        pipeline_parallel=pipeline_parallel,
        mixed_precision=mixed_precision,
        memory_fraction=memory_fraction,
        device=device,
        cluster=cluster,
        profile=profile,
        fix=fix,
    )
    place = find_place(os.environ)
    devices = find_devices(gpus if place is None else None)
    if place is None and devices.count > 1:
        reason = why_one_process()
        if reason is None:
            run_again_and_exit(devices)
        say(f"{reason}: one process trains on one device")
    if place is None or place.ranks == 1:
        _serve_cuda_calls(devices.kind)
        return
    os.environ.update(standard_variables(place, os.environ))
    _join(wishes, devices.kind)


def _join(wishes: Wishes, kind: str) -> None:
    from paraplan.rank_errors import report_errors
    from paraplan_runtime.caught_models import catch_models
    from paraplan_runtime.one_device import (
        be_quiet_off_rank_0,
        join_as_one_device,
        write_only_on_rank_0,
    )

    launched = LAUNCHER in os.environ
    per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    device = join_as_one_device(kind, os.environ)
    report_errors(launched=launched)
    if not launched:
        be_quiet_off_rank_0()
    write_only_on_rank_0()
    _serve_cuda_calls(kind)
    _Session.active = _Session(wishes, device, per_node)
    catch_models(_Session.active.adopt)


def parallelize(model: nn.Module) -> nn.Module:
    """Plan ``model`` at its first batch: for models that are not made by transformers.

    Returns the same object. Without `enable_advanced_parallelization` before it, or on one
    device, nothing happens.
    """
    if _Session.active is not None:
        _Session.active.adopt(model)
    return model


def say(text: str) -> None:
    """One line for the user, unless PARAPLAN_LOG is ``off``."""
    if os.environ.get("PARAPLAN_LOG", "") != "off":
        print(f"paraplan: {text}", file=sys.stderr, flush=True)


def _serve_cuda_calls(kind: str) -> None:
    if kind == "cpu":
        from paraplan_runtime.cpu_device import cuda_means_cpu

        cuda_means_cpu()


def _wishes(
    plan: str,
    *,
    num_stages: int | str,
    num_micro_batches: int | str,
    activation_recomputation: bool | str,
    distribute_parameter: bool | str,
    pipeline_parallel: bool,
    mixed_precision: bool,
    memory_fraction: float,
    device: str | None,
    cluster: str | None,
    profile: str,
    fix: str,
) -> Wishes:
    from paraplan.automatic import Wishes
    from paraplan.request import parse_fix

    fixed = parse_fix(fix)
    if not pipeline_parallel:
        fixed["pipeline"] = 1
    if num_stages != "auto":
        fixed["pipeline"] = num_stages
    if num_micro_batches != "auto":
        fixed["micro_batches"] = num_micro_batches
    if activation_recomputation != "auto":
        modes: dict[bool | str, str] = {True: "full", False: "none"}
        fixed["recompute"] = modes.get(activation_recomputation, str(activation_recomputation))
    if distribute_parameter != "auto":
        fixed["zero_stage"] = 3 if distribute_parameter else 1
    if not 0 < memory_fraction <= 1:
        raise InputError(f"memory_fraction is {memory_fraction!r}; more than 0, at most 1")
    if profile not in PROFILES:
        raise InputError(f"profile is {profile!r}; one of {', '.join(PROFILES)}")
    return Wishes(
        plan=plan,
        device=device,
        cluster=cluster,
        profile=profile,
        fix=fixed,
        mixed_precision=mixed_precision,
        memory_fraction=memory_fraction,
    )
