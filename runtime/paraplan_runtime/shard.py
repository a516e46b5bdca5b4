"""Data parallelism of one stage with FSDP2: which modules form a group, and when they gather.

What ``zero_stage`` means here, per optimizer step of M micro-batches:

- 0 (``data_shard`` 1): whole parameters; gradients are summed over the replicas once.
- 1: parameters are gathered once and stay; whole gradients accumulate and are reduced once.
- 2: parameters are gathered once and stay; gradients are reduce-scattered per micro-batch.
- 3: parameters are gathered for each layer's forward and again for its backward; gradients
  are reduce-scattered per micro-batch.

With hybrid sharding the sum over the replicas happens once, in the last micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from paraplan.layout import Precision
from paraplan_runtime.gradients import local
from paraplan_runtime.mesh import Ranks
from paraplan_runtime.rehearsal import real_tensors

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def mixed_precision(precision: Precision) -> MixedPrecisionPolicy:
    """Compute in the plan's dtype; master weights and the reduction of gradients in fp32."""
    if precision == "fp32":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=COMPUTE_DTYPES[precision], reduce_dtype=torch.float32)


def shard(
    model: nn.Module,
    groups: Iterable[nn.Module],
    ranks: Ranks,
    *,
    zero_stage: int,
    precision: Precision,
) -> None:
    """Shard ``model`` in place: each of ``groups`` gathers by itself, the rest with the root.

    Args:
        model: a stage; its parameters may be on the CPU, on the device or on meta.
        groups: modules gathered as one, in the order of the forward.
    """
    if ranks.layout.data_ranks == 1 and precision == "fp32":
        # Nothing to shard, reduce or cast: FSDP would only copy.
        _move(model, ranks.device)
        _allocate(model, ranks.device)
        return
    policy = mixed_precision(precision)
    mesh = ranks.fsdp_mesh
    for module in groups:
        _move(module, ranks.device)
        with real_tensors():  # FSDP makes meshes
            fully_shard(module, mesh=mesh, reshard_after_forward=zero_stage == 3, mp_policy=policy)
    _move(model, ranks.device)
    with real_tensors():
        fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
    _materialise(model, ranks.device)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is normalised by the global number of targets, so gradients are summed.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _move(module: nn.Module, device: torch.device) -> None:
    if not any(parameter.is_meta for parameter in module.parameters()):
        module.to(device)


def _allocate(model: nn.Module, device: torch.device) -> None:
    """``_materialise`` for a model without FSDP, where tied parameters have to stay one."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in made:
                empty = torch.empty_like(local(parameter), device=device)
                if isinstance(parameter, DTensor):
                    empty = DTensor.from_local(
                        empty, parameter.device_mesh, parameter.placements, run_check=False
                    )
                made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]


def _materialise(model: nn.Module, device: torch.device) -> None:
    """Allocate the shards of parameters that were built on meta; their values come later."""
    if not any(parameter.is_meta for parameter in model.parameters()):
        return
    buffers = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    model.to_empty(device=device)
    for module, name, buffer in buffers:
        module._buffers[name] = buffer.to(device)


def prepare_micro_batch(model: FSDPModule, zero_stage: int, *, last: bool) -> None:
    """Tell FSDP, ahead of one micro-batch's backward, what to reduce and what to free after it."""
    model.set_requires_gradient_sync(last or zero_stage >= 2)
    model.set_requires_all_reduce(last)
    model.set_reshard_after_backward(last or zero_stage == 3)
    model.set_is_last_backward(last)


def free_gathered(model: nn.Module) -> None:
    """Free the parameters that a forward without backward left gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
