"""A model that is spread over the ranks at its first batch, because that says what to plan for.

Until then the script holds its own model object, whose parameters are handles without memory.
It stays the object the script holds: at the first call a copy of it is parallelised, its forward
is handed to the copy, and the optimizers made in between get this rank's shards.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.optim import Optimizer

from paraplan.errors import InputError
from paraplan.plan_file import Plan
from paraplan_runtime.apply import parallelize
from paraplan_runtime.construction import recorder_of
from paraplan_runtime.handles import Applied, Before, Handle, change_type, make_handle, raw
from paraplan_runtime.model import ParallelModel
from paraplan_runtime.optimizers import give_shards
from paraplan_runtime.report import ParallelReport
from paraplan_runtime.state import iterate_whole


@dataclass(frozen=True)
class FirstBatch:
    """What is known when the plan is made.

    Attributes:
        model: the whole model.
        arguments: the first call's, by name.
        optimizers: made since the one line was called.
    """

    model: nn.Module
    arguments: Mapping[str, Any]
    optimizers: tuple[Optimizer, ...]


MakePlan = Callable[[FirstBatch], Plan]
Tell = Callable[[ParallelReport], None]


class Deferred:
    """Takes over ``model``; see the module's docstring.

    Args:
        model: the whole model; its parameters may be real, or on meta by ``parameters_on_meta``.
        make_plan: called once on every rank, with the first batch.
        tell: called once on every rank, when some steps have been measured.
        device: this rank's.
        optimizers: those that may hold its parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        make_plan: MakePlan,
        tell: Tell,
        device: torch.device,
        optimizers: WeakSet[Optimizer],
    ) -> None:
        self._model = model
        self._make_plan = make_plan
        self._tell: Tell | None = tell
        self._device = device
        self._optimizers = optimizers
        self._parallel: ParallelModel | None = None
        for parameter in model.parameters():
            recorder = recorder_of(parameter)
            if recorder is not None:
                make_handle(parameter, Before(recorder, device))
        self._replaced = self._replacements()
        vars(model).update(self._replaced)

    def _replacements(self) -> dict[str, Any]:
        """What the script's own object does otherwise from now on."""
        forward = self._model.forward

        @functools.wraps(forward)  # transformers' Trainer looks at the signature
        def run(*args: Any, **kwargs: Any) -> Any:
            return self._run(args, kwargs)

        replaced = {
            "forward": run,
            "_apply": self._convert,
            "state_dict": self._state_dict,
            "load_state_dict": self._load_state_dict,
            "parallel_report": lambda: self._applied().parallel_report(),
        }
        if hasattr(self._model, "save_pretrained"):
            replaced["save_pretrained"] = self._save_pretrained
        return replaced

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._parallel is None:
            self._apply_plan(args, kwargs)
        parallel = self._applied()
        if parallel.training != self._model.training:
            parallel.train(self._model.training)
        output = parallel(*args, **kwargs)
        if self._tell is not None:
            report = parallel.parallel_report()
            if report.measured_steps:
                self._tell(report)
                self._tell = None
        return output

    def _apply_plan(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        whole = self._copy()
        named = dict(self._model.named_parameters())
        bound = inspect.signature(whole.forward).bind_partial(*args, **kwargs).arguments
        arguments = {**bound, **bound.get("kwargs", {})}
        plan = self._make_plan(FirstBatch(whole, arguments, tuple(self._optimizers)))
        if any(getattr(module, "gradient_checkpointing", False) for module in whole.modules()):
            # The plan says which layers recompute; twice would be slower and save nothing.
            whole.gradient_checkpointing_disable()  # type: ignore[operator]
        self._parallel = parallelize(whole, plan, device_type=self._device.type)
        self._hand_over(named, self._parallel)

    def _copy(self) -> nn.Module:
        """The model with parameters of its own, which share the memory of the script's."""
        memo: dict[int, Any] = {}
        for parameter in self._model.parameters():
            made = nn.Parameter(raw(parameter), requires_grad=parameter.requires_grad)
            vars(made).update(vars(parameter))
            vars(made).pop("stands_for", None)
            memo[id(parameter)] = made
        vars_of_model = vars(self._model)
        kept = {name: vars_of_model.pop(name) for name in self._replaced if name in vars_of_model}
        try:
            return copy.deepcopy(self._model, memo)
        finally:
            vars_of_model.update(kept)

    def _hand_over(self, named: Mapping[str, nn.Parameter], parallel: ParallelModel) -> None:
        """Point the script's parameters, and the optimizers, at this rank's shards."""
        shards: dict[str, list[nn.Parameter]] = {}
        for own in parallel.own:
            shards.setdefault(own.name, []).append(own.value)
        held: dict[int, list[nn.Parameter]] = {}
        for name, parameter in named.items():
            held[id(parameter)] = shards.get(name, [])
            if not isinstance(parameter, Handle):
                # One element that stands for all: the values are in the shards now.
                parameter.data = parameter.data.new_empty(1).expand(parameter.shape)
            read = functools.partial(self._gathered, name)
            make_handle(parameter, Applied(read, held[id(parameter)], self._device))
        for optimizer in self._optimizers:
            give_shards(optimizer, held, parallel)

    def _applied(self) -> ParallelModel:
        if self._parallel is None:
            raise InputError("the model is planned at its first batch, which has not come yet")
        return self._parallel

    def _gathered(self, name: str) -> torch.Tensor:
        parallel = self._applied()
        return dict(iterate_whole(parallel.entries, [name], parallel.ranks))[name]

    def _convert(
        self, convert: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> nn.Module:
        """``model.to`` and its kin: the device is decided already, the type may change."""
        for parameter in self._model.parameters():
            kind = convert(torch.empty(0, dtype=parameter.dtype)).dtype
            if kind == parameter.dtype:
                continue
            if isinstance(parameter, Handle):
                change_type(parameter, kind)
            else:
                parameter.data = parameter.data.to(kind)
        for module in self._model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = convert(buffer)
        return self._model

    def _state_dict(
        self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> Any:
        found = {} if destination is None else destination
        if self._parallel is not None:
            whole: Mapping[str, torch.Tensor] = self._parallel.state_dict()
        else:
            whole = type(self._model).state_dict(self._model, keep_vars=True)
        for name, tensor in whole.items():
            found[prefix + name] = tensor.read() if isinstance(tensor, Handle) else tensor
        return found

    def _load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self._parallel is not None:
            return self._parallel.load_state_dict(state_dict)
        return type(self._model).load_state_dict(self._model, state_dict, *args, **kwargs)

    def _save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        self._applied().save_pretrained(save_directory)
