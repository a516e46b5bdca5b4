"""This file applies a plan to a model. The order: check, cut into stages, tensor, recompute, shard.

Cutting comes first, so that no rank moves or splits what it does not hold. Tensor parallelism
splits parameters before FSDP shards them. Recomputation wraps the layers' forward, inside of
FSDP's hooks. The stage's own hooks come last, in front of FSDP's.
"""

from __future__ import annotations

import inspect
import logging
from pathlib import Path

import torch
from torch import nn

from paraplan.cpu_ranks import keep_freed_memory
from paraplan.plan_file import Plan
from paraplan_runtime.check import (
    check_kinds,
    check_model,
    check_plan,
    check_ranks_built_the_same,
)
from paraplan_runtime.construction import random_fingerprint, take_sources
from paraplan_runtime.gradients import (
    GradientStash,
    Parameter,
    make_clipping_global,
    make_scaling_global,
)
from paraplan_runtime.loss import GlobalLoss, causal_loss_owner
from paraplan_runtime.mesh import Ranks, build_ranks, join
from paraplan_runtime.model import ParallelModel
from paraplan_runtime.random_state import SplitStream, draws_randomly
from paraplan_runtime.recompute import apply_recompute
from paraplan_runtime.report import start_lines
from paraplan_runtime.schedule import Runner
from paraplan_runtime.shard import COMPUTE_DTYPES, shard
from paraplan_runtime.stage import StagePaths, cut, stage_paths
from paraplan_runtime.state import fill, stage_entries
from paraplan_runtime.tensor import TensorPlan, fused_parameters, tensor_plan
from paraplan_runtime.tensor_apply import apply_tensor_parallel
from paraplan_runtime.tied import TiedWeights, find_tied
from paraplan_runtime.watchdog import watch_over

_log = logging.getLogger("paraplan")


def parallelize(
    model: nn.Module,
    plan: Plan,
    *,
    device_type: str | None = None,
    weights: str | Path | None = None,
) -> ParallelModel:
    """Apply ``plan`` to ``model`` on every rank of the job.

    Every rank calls this with the same model, equally initialised, and uses what it returns in
    its place; the optimizer takes the returned model's ``parameters()``. A model that was built
    inside ``parameters_on_meta`` gets its values here, each rank those of its own shard.

    Args:
        model: the whole model.
        plan: made for it.
        device_type: ``cuda`` or ``cpu``; by default ``cuda`` when a GPU is visible.
        weights: folder of an ordinary checkpoint to read the parameters from; each rank reads its
            own slices.

    Raises:
        InputError: the plan cannot be applied to this model or job, with the reason.
    """
    check_plan(plan)
    device = join(device_type)
    watchdog = watch_over(device)
    ranks = build_ranks(plan.layout, device)
    check_kinds(plan, device)
    watchdog.describe(*_place_and_memory(plan, ranks))
    stages = stage_paths(plan, model)
    check_model(model, plan, stages)
    check_ranks_built_the_same(model, device, random_fingerprint(model))
    sources = {} if weights is not None else take_sources(model)
    splits = tensor_plan(model, plan, stages)
    tied = find_tied(model, stages)
    loss = _take_over_loss(model, ranks, splits)
    fused = fused_parameters(model)
    state_dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    signature = inspect.signature(model.forward)
    models = [
        (_prepare_stage(model, stages, index, plan, ranks, splits, tied), stages[index])
        for index in range(ranks.place("pipeline"), len(stages), plan.layout.pipeline)
    ]
    runner = Runner(ranks, models, COMPUTE_DTYPES[plan.workload.precision])
    parameters = _own_parameters(models, splits, tied)
    make_clipping_global()
    make_scaling_global()

    def finish(stash: GradientStash) -> None:
        if plan.layout.tensor > 1:
            stash.sum_parts(ranks.group("tensor"))
        tied.exchange(stash, ranks)

    parallel = ParallelModel(
        plan,
        ranks,
        runner,
        parameters,
        loss=loss,
        signature=signature,
        spread_output=splits.head is not None,
        entries=[entry for part, _ in models for entry in stage_entries(part, splits.split)],
        state_dtypes=state_dtypes,
        fused=fused,
        aliases=tied.names,
        finish_gradients=finish,
        hidden_width=_hidden_width(model),
        watchdog=watchdog,
    )
    if weights is not None:
        parallel.load_pretrained(weights)
    else:
        fill(parallel.entries, sources, ranks)
    if device.type == "cpu":
        keep_freed_memory()  # what building the shard took has gone back to the system
    if ranks.speaks:
        _log.info("\n".join(start_lines(plan, ranks)))
    return parallel.train(model.training)


def _prepare_stage(
    model: nn.Module,
    stages: tuple[StagePaths, ...],
    index: int,
    plan: Plan,
    ranks: Ranks,
    splits: TensorPlan,
    tied: TiedWeights,
) -> nn.Module:
    paths = stages[index]
    part = cut(model, stages, index)
    if any(parameter.dtype != torch.float32 for parameter in part.parameters()):
        part.float()  # master weights
    if plan.layout.tensor > 1:
        stream = SplitStream(ranks.device, ranks.place("tensor")) if draws_randomly(model) else None
        apply_tensor_parallel(part, paths, splits, ranks, stream)
    for path, mode in zip(paths.layers, plan.stages[index].recompute, strict=True):
        apply_recompute(part.get_submodule(path), mode)
    groups = [part.get_submodule(path) for path in paths.modules]
    alone = [module for module in groups if not tied.holds(module) and _is_large(module)]
    shard(
        part,
        alone,
        ranks,
        zero_stage=plan.layout.zero_stage,
        precision=plan.workload.precision,
    )
    return part


def _place_and_memory(plan: Plan, ranks: Ranks) -> tuple[str, str]:
    """What this rank holds, and what to do when its memory does not suffice."""
    held = plan.stages[ranks.place("pipeline") :: plan.layout.pipeline]
    names = ", ".join(str(stage.index) for stage in held)
    needed, capacity = held[0].memory_bytes, plan.prediction.capacity_bytes
    return f"stage {names}", (
        f"the plan predicts {needed / 2**30:.3g} of {capacity / 2**30:.3g} GiB for this stage; "
        "plan with a smaller micro-batch (--fix micro_batch_size=1), more recomputation "
        "(--fix recompute=full) or a lower --memory-limit"
    )


def _is_large(module: nn.Module) -> bool:
    """Whether gathering it apart is worth a message: not for a norm's one vector."""
    return any(parameter.ndim > 1 for parameter in module.parameters())


def _take_over_loss(model: nn.Module, ranks: Ranks, splits: TensorPlan) -> GlobalLoss | None:
    """Put the global loss in the model's ``loss_function``; None if it computes none by that."""
    owner = causal_loss_owner(model)
    if owner is None:
        return None
    group = ranks.group("tensor") if splits.head is not None else None
    loss = GlobalLoss(group)
    owner.loss_function = loss  # type: ignore[assignment]
    return loss


def _own_parameters(
    models: list[tuple[nn.Module, StagePaths]], splits: TensorPlan, tied: TiedWeights
) -> tuple[Parameter, ...]:
    result: list[Parameter] = []
    for model, _ in models:
        for path, value in model.named_parameters():
            name = tied.name_of(path)
            result.append(
                Parameter(
                    name=name,
                    value=value,
                    sum_over_tensor=splits.is_partial(path),
                    stages=tied.stages_of(name),
                )
            )
    return tuple(result)


def _hidden_width(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    width = getattr(config, "hidden_size", None)
    return width if isinstance(width, int) else None
