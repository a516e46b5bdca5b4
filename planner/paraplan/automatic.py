"""The plan of a script's own model, made when its first batch is there.

Rank 0 finds it in the cache or makes it; the others get it from rank 0. What the one line was
given are constraints for the planner.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from paraplan.cluster import load_cluster
from paraplan.device import load_device
from paraplan.errors import FrozenLayerError, InputError, PlanError
from paraplan.own_profile import kept_profile, measure_here
from paraplan.plan_file import Plan, load_plan, plan_from_json, plan_to_json, save_plan
from paraplan.planning import plan_request
from paraplan.request import GIB, Request
from paraplan.trace_cache import default_cache_dir

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from paraplan_runtime.deferred import FirstBatch


@dataclass(frozen=True)
class Wishes:
    """What the one line was given, as the planner understands it.

    Attributes:
        plan: ``auto``, or the path of a plan file.
        device: profile of this machine's devices; None to recognise it.
        cluster: profile of the cluster, in place of device and count.
        profile: ``auto`` takes this machine's own profile where one is kept, else the shipped
            one; ``measure`` measures one where none is kept; ``shipped``.
        fix: layout fields that are pinned.
        mixed_precision: compute in bf16 where the device is a GPU.
        memory_fraction: share of a device's memory to plan with.
    """

    plan: str = "auto"
    device: str | None = None
    cluster: str | None = None
    profile: str = "auto"
    fix: Mapping[str, Any] = field(default_factory=dict)
    mixed_precision: bool = True
    memory_fraction: float = 0.9


@dataclass(frozen=True)
class Machines:
    """What the job runs on: ``devices`` in all, ``per_node`` of them in a machine."""

    kind: str
    devices: int
    per_node: int


@dataclass(frozen=True)
class Planned:
    """A plan and how it came about: ``origin`` is for people."""

    plan: Plan
    origin: str


_PROFILES = (
    # words of the device's own name -> profile
    (("h200",), "h200"),
    (("b200",), "b200"),
    (("h100",), "h100"),
    (("a100", "40gb"), "a100-40gb"),
    (("a100",), "a100-80gb"),
    (("l40s",), "l40s"),
    (("4090",), "rtx-4090"),
    (("mi300x",), "mi300x"),
    (("mi250",), "mi250"),
)


def profile_of(device_name: str) -> str:
    """The profile for a GPU that calls itself ``device_name``.

    Raises:
        InputError: none ships.
    """
    lower = device_name.lower()
    for words, profile in _PROFILES:
        if all(word in lower for word in words):
            return profile
    raise InputError(
        f"no profile for {device_name!r}", hint="name one of `plan devices` as device=..."
    )


def plan_for(
    first: FirstBatch, wishes: Wishes, machines: Machines, tell: Callable[[str], None]
) -> Planned:
    """The plan for this job, equal on every rank; a collective.

    Args:
        tell: called on rank 0 with what the user waits for.

    Raises:
        InputError: rank 0 could not plan; on every rank.
    """
    import torch.distributed as dist

    told: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            planned = _plan_here(first, wishes, machines, tell)
            told = [(plan_to_json(planned.plan), planned.origin)]
        except PlanError as error:
            told = [error]
    dist.broadcast_object_list(told, src=0)
    if isinstance(told[0], PlanError):
        raise told[0]
    text, origin = told[0]
    return Planned(plan_from_json(text), origin)


def _plan_here(
    first: FirstBatch,
    wishes: Wishes,
    machines: Machines,
    tell: Callable[[str], None] = lambda text: None,
) -> Planned:
    if wishes.plan != "auto":
        return Planned(load_plan(wishes.plan), f"from {wishes.plan}")
    began = time.perf_counter()
    has_config = hasattr(getattr(first.model, "config", None), "to_dict")
    if any(hasattr(module, "base_layer") for module in first.model.modules()):
        # The runtime cannot split layers with adapters over tensor ranks.
        wishes = replace(wishes, fix={"tensor": 1, **wishes.fix})
    request = replace(
        _question(wishes, machines, tell),
        model=str(_write_config(first.model)) if has_config else _offer_module(first),
        precision=_precision(first.model, wishes, machines.kind),
        optimizer=optimizer_name(first.optimizers),
        **_sizes(first.arguments),
    )
    if not has_config:
        # Nothing here can tell when the module's code changes, so it is planned each time.
        return Planned(plan_request(request), f"planned in {time.perf_counter() - began:.2f} s")
    path = default_cache_dir() / "plans" / f"{_key(request, first.model)}.json"
    try:
        return Planned(load_plan(path), f"cached, {time.perf_counter() - began:.2f} s")
    except InputError:
        plan = _plan_as_trained(request, first)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_plan(plan, path)
    except (OSError, InputError):
        pass  # a cache that cannot be written makes the next start slower, nothing else
    return Planned(plan, f"planned in {time.perf_counter() - began:.2f} s")


def _plan_as_trained(request: Request, first: FirstBatch) -> Plan:
    """The plan for what the script trains; its config does not know adapters, nor what is frozen.

    A model in which whole layers are frozen cannot be traced as it is; it gets the plan for
    training all of it, which needs more memory.
    """
    if _frozen(first.model):
        with suppress(FrozenLayerError):
            return plan_request(replace(request, model=_offer_module(first)))
    return plan_request(request)


def _frozen(model: nn.Module) -> bool:
    return not all(parameter.requires_grad for parameter in model.parameters())


def _question(wishes: Wishes, machines: Machines, tell: Callable[[str], None]) -> Request:
    cluster, limit = wishes.cluster, None
    if cluster is None and wishes.device is None:
        own = _own_profile(wishes.profile, machines, tell)
        if own is not None:
            whole = load_cluster(own).device.memory_capacity_bytes.value
            cluster, limit = str(own), wishes.memory_fraction * whole / GIB
    if cluster is not None:
        return Request(
            model="",
            cluster=cluster,
            gpus=machines.devices,
            memory_limit_gib=limit,
            fix=wishes.fix,
        )
    device = wishes.device or ("cpu" if machines.kind == "cpu" else _this_gpu())
    whole = load_device(device).memory_capacity_bytes.value
    return Request(
        model="",
        gpus=machines.devices,
        gpus_per_node=machines.per_node if machines.per_node < machines.devices else None,
        device=device,
        memory_limit_gib=wishes.memory_fraction * whole / GIB,
        fix=wishes.fix,
    )


def _own_profile(wanted: str, machines: Machines, tell: Callable[[str], None]) -> Path | None:
    """The profile measured on this machine, if the user wants it or one is kept."""
    if wanted == "measure":
        return measure_here(machines.kind, machines.per_node, tell)
    kept = kept_profile(machines.kind, machines.per_node)
    return kept if wanted == "auto" and kept.is_file() else None


def _this_gpu() -> str:
    import torch

    return profile_of(torch.cuda.get_device_name())


def _sizes(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Sequences and tokens of the first batch."""
    import torch

    for name in ("input_ids", "inputs_embeds", "decoder_input_ids", "pixel_values"):
        value = arguments.get(name)
        if isinstance(value, torch.Tensor) and value.ndim > 1:
            sizes: dict[str, Any] = {"global_batch": int(value.shape[0])}
            return sizes if name == "pixel_values" else sizes | {"seq_len": int(value.shape[1])}
    for value in arguments.values():
        if isinstance(value, torch.Tensor) and value.ndim > 0:
            length = int(value.shape[1]) if value.ndim > 1 else 1
            return {"global_batch": int(value.shape[0]), "seq_len": length}
    raise InputError(
        "the model's first call has no tensor, so the size of the batch is not known",
        hint="give the line a plan file: plan=...",
    )


def _precision(model: nn.Module, wishes: Wishes, kind: str) -> str:
    import torch

    dtypes = {parameter.dtype for parameter in model.parameters()}
    if torch.float16 in dtypes:
        return "fp16"
    if torch.bfloat16 in dtypes or (wishes.mixed_precision and kind == "cuda"):
        return "bf16"
    return "fp32"


def optimizer_name(optimizers: Sequence[Optimizer]) -> str:
    """The planner's name for the script's optimizer; adamw, the most demanding, if in doubt."""
    names = {"Adam": "adam", "Lion": "lion", "AdamW8bit": "adamw-8bit"}
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        if kind == "SGD":
            momentum = any(group.get("momentum") for group in optimizer.param_groups)
            return "sgd-momentum" if momentum else "sgd"
        if kind in names:
            return names[kind]
    return "adamw"


def _write_config(model: nn.Module) -> Path:
    """The model's config as a folder that the planner reads; named by its content."""
    config: Any = model.config
    settings = config.to_dict() | {"architectures": [type(model).__name__]}
    name = Path(str(settings.pop("_name_or_path", "") or type(model).__name__)).name
    text = json.dumps(settings, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    folder = default_cache_dir() / "models" / digest / (name or "model")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(text)
    return folder


def _offer_module(first: FirstBatch) -> str:
    """A module that is not transformers', where the planner takes modules from by name."""
    import torch
    from torch import nn

    rows = _sizes(first.arguments)["global_batch"]
    example = {
        name: value[:1] if isinstance(value, torch.Tensor) and value.shape[:1] == (rows,) else value
        for name, value in first.arguments.items()
    }

    def without_values() -> tuple[nn.Module, Mapping[str, Any]]:
        memo: dict[int, Any] = {
            id(parameter): nn.Parameter(
                torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad
            )
            for parameter in first.model.parameters()
        }
        return copy.deepcopy(first.model, memo), example

    name = f"paraplan_model_of_script.{type(first.model).__name__}"
    offered = ModuleType(name)
    offered.__dict__[type(first.model).__name__] = without_values
    sys.modules[name] = offered
    return f"{name}:{type(first.model).__name__}"


def _key(request: Request, model: nn.Module) -> str:
    """Changes with everything that the plan depends on."""
    parts = {**asdict(request), "model": Path(request.model).parent.name}
    if _frozen(model):
        parts["parameters"] = [
            (name, list(parameter.shape), parameter.requires_grad)
            for name, parameter in model.named_parameters()
        ]
    if isinstance(request.cluster, str):  # a file may have been written anew
        parts["cluster"] = load_cluster(request.cluster).sha256
    parts["planner"] = _planner_digest()
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _planner_digest() -> str:
    """Of the planner's own files and the profiles' data."""
    from importlib import resources

    digest = hashlib.sha256()
    profiles = Path(str(resources.files("paraplan_profiles")))
    files = [*Path(__file__).parent.glob("*.py"), *profiles.rglob("*.toml")]
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()
