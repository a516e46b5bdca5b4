"""Plan against model and machine, before anything is touched; each refusal in one line."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from paraplan.errors import InputError
from paraplan.layout import RUNTIME_CANNOT_SPLIT, unsupported_fields
from paraplan.plan_file import Plan, device_of
from paraplan_runtime.batch import schedule_accepts
from paraplan_runtime.rehearsal import is_rehearsal
from paraplan_runtime.stage import StagePaths


def check_plan(plan: Plan) -> None:
    """Refuse what the runtime cannot apply to any model.

    Raises:
        InputError: with the reason.
    """
    fields = unsupported_fields(plan.layout)
    if fields:
        raise InputError(f"the runtime cannot apply {' and '.join(fields)} parallelism yet")
    layout = plan.layout
    if not schedule_accepts(layout, layout.micro_batches):
        raise InputError(
            f"micro_batches({layout.micro_batches}) does not go with pipeline({layout.pipeline}) "
            f"and {layout.schedule}: torch's schedule wants "
            + (
                "at least as many as stages"
                if layout.micro_batches < layout.pipeline
                else "whole rounds of pipeline micro-batches"
            )
        )


def check_kinds(plan: Plan, device: torch.device) -> None:
    """Refuse a job whose nodes were started in another order than a plan over two kinds wants.

    All ranks compare all devices, so that all of them refuse.

    Raises:
        InputError: a rank's device is of the kind that the plan has for other ranks.
    """
    if not plan.cluster.kinds or is_rehearsal():
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    names: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(names, name)
    misplaced = misplaced_rank(plan, names)
    if misplaced is not None:
        wanted = device_of(plan, _pipeline_rank(plan, misplaced))
        raise InputError(
            f"rank {misplaced} runs on {names[misplaced]}, the plan has it on {wanted}",
            hint=f"start the nodes with {plan.cluster.kinds[0].device} first: theirs are ranks 0 "
            f"to {plan.cluster.kinds[0].devices - 1}",
        )


def misplaced_rank(plan: Plan, names: Sequence[str]) -> int | None:
    """The first rank whose device's name is that of the other kind; None if there is none.

    Names that are of neither kind say nothing: drivers and profiles name devices differently.
    """
    kinds = {kind.device for kind in plan.cluster.kinds}
    for rank, name in enumerate(names):
        wanted = device_of(plan, _pipeline_rank(plan, rank))
        if any(_named(name, kind) and not _named(name, wanted) for kind in kinds - {wanted}):
            return rank
    return None


def _named(name: str, kind: str) -> bool:
    """Whether ``NVIDIA H100 80GB HBM3`` is an ``h100-sxm``: the profile's first word is in it."""
    return kind.partition("-")[0].lower() in re.split(r"[^a-z0-9]+", name.lower())


def _pipeline_rank(plan: Plan, rank: int) -> int:
    return rank * plan.layout.pipeline // plan.layout.devices


def check_model(model: nn.Module, plan: Plan, stages: tuple[StagePaths, ...]) -> None:
    """Refuse a plan that does not fit the model.

    Raises:
        InputError: with the reason.
    """
    for check in (_splits, _adapters, _paths, _coverage, _layers, _dtype, _norms, _routing):
        check(model, plan, stages)


def _splits(model: nn.Module, plan: Plan, stages: tuple[StagePaths, ...]) -> None:
    for axis in RUNTIME_CANNOT_SPLIT.get(type(model).__name__, ()):
        if getattr(plan.layout, axis) > 1:
            raise InputError(
                f"the runtime cannot apply {axis} parallelism to {type(model).__name__} yet"
            )


def _adapters(model: nn.Module, plan: Plan, stages: tuple[StagePaths, ...]) -> None:
    """Adapters wrap the layers that a tensor-parallel plan names."""
    wrapped = next((path for path, m in model.named_modules() if hasattr(m, "base_layer")), None)
    if wrapped is not None and plan.layout.tensor > 1:
        raise InputError(
            f"{wrapped} has an adapter: the runtime cannot split it over tensor ranks yet",
            hint="plan with --fix tensor=1",
        )


def _paths(model: nn.Module, plan: Plan, stages: tuple[StagePaths, ...]) -> None:
    known = dict(model.named_modules(remove_duplicate=False))
    for stage in plan.stages:
        for path in stage.modules:
            if path not in known:
                raise InputError(
                    f"stage {stage.index} names {path!r}, which {type(model).__name__} does not "
                    "have",
                    hint="make the plan for this model",
                )


def _coverage(model: nn.Module, plan: Plan, stages: tuple[StagePaths, ...]) -> None:
    owned = tuple(f"{path}." for stage in plan.stages for path in stage.modules)
    held: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        held.setdefault(id(parameter), []).append(path)
    for paths in held.values():
        if not any(path.startswith(owned) for path in paths):
            raise InputError(f"parameter {paths[0]!r} is in no stage of the plan")


def _layers(model: nn.Module, plan: Plan, stages: tuple[StagePaths, ...]) -> None:
    for stage, paths in zip(plan.stages, stages, strict=True):
        if len(paths.layers) != stage.layers:
            raise InputError(
                f"stage {stage.index} has {stage.layers} layers, {len(paths.layers)} of its "
                "modules are layers"
            )
        if not paths.layers:
            raise InputError(f"stage {stage.index} has no layer: the runtime needs one in each")


def _dtype(model: nn.Module, plan: Plan, stages: tuple[StagePaths, ...]) -> None:
    found = {parameter.dtype for parameter in model.parameters()}
    if plan.workload.precision == "fp32" and found != {torch.float32}:
        names = ", ".join(sorted(str(dtype) for dtype in found))
        raise InputError(f"the plan is for fp32, the model's parameters are {names}")


def _norms(model: nn.Module, plan: Plan, stages: tuple[StagePaths, ...]) -> None:
    split = plan.layout.data_ranks * plan.layout.micro_batches > 1
    for path, module in model.named_modules():
        if split and isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise InputError(
                f"{path} is a batch norm: its statistics of a micro-batch are not those of the "
                "global batch"
            )


def _routing(model: nn.Module, plan: Plan, stages: tuple[StagePaths, ...]) -> None:
    config = getattr(model, "config", None)
    split = plan.layout.data_ranks * plan.layout.micro_batches > 1
    if split and getattr(config, "output_router_logits", False):
        raise InputError(
            "output_router_logits adds a load-balancing loss that is not a sum over rows, so "
            "micro-batches cannot compute it",
            hint="set output_router_logits=False",
        )


@torch.no_grad()
def check_ranks_built_the_same(model: nn.Module, device: torch.device, drawn: int) -> None:
    """Refuse ranks whose parameters differ: they would train a mixture of several models.

    Args:
        drawn: differs where parameters that are still on meta will be drawn differently.

    Raises:
        InputError: the parameters' sums differ between ranks, or what they will be drawn from.
    """
    if is_rehearsal():
        return
    sums = [float(p.double().sum()) for p in model.parameters() if not p.is_meta]
    mine = torch.tensor([len(sums), sum(sums), drawn], device=device, dtype=torch.float64)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    for rank, other in enumerate(everyone):
        if not torch.equal(other, everyone[0]):
            raise InputError(
                f"rank {rank} and rank 0 built different parameters",
                hint="call torch.manual_seed with the same seed before the model is built",
            )
