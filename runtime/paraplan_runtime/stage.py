"""One stage as a module that a schedule can call: the model itself, with the rest cut out.

The model's own forward runs on every stage, so masks and rotary embeddings are computed as the
model computes them. Modules that live on other stages are replaced: embeddings by a placeholder
of the right shape, layers and head by identities that keep the indices. The hidden state that a
stage receives enters at its first layer, whatever the model did to the placeholder before; what
its last layer returns leaves, whatever the model does afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from paraplan.errors import InputError
from paraplan.plan_file import Plan
from paraplan_runtime.loss import causal_loss_owner
from paraplan_runtime.own_loss import LossReductions, ReturnForm, WithoutLosses, find_loss

Objective = Literal["loss", "cotangent", "output"]


class Identity(nn.Module):
    """Stands for a layer or head of another stage: returns its first argument."""

    def forward(self, value: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The first argument, or ``hidden_states``."""
        return kwargs["hidden_states"] if value is None else value


class Detached(Identity):
    """Stands for what follows the layers, on a stage without it: nothing there needs gradients."""

    def forward(self, value: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The first argument, cut off from the graph."""
        return super().forward(value, *args, **kwargs).detach()


class Placeholder(nn.Module):
    """Stands for an embedding of another stage: zeros of its output's shape, without storage.

    Args:
        width: size of the last dimension of the embedding's output.
        dtype: its dtype.
        extends: whether the output has one dimension more than the input (a table look-up).
    """

    def __init__(self, width: int, dtype: torch.dtype, *, extends: bool) -> None:
        super().__init__()
        self.width = width
        self.dtype = dtype
        self.extends = extends

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """Zeros of shape ``(*value.shape, width)``, or with the last dimension replaced."""
        shape = value.shape if self.extends else value.shape[:-1]
        zero = torch.zeros((), dtype=self.dtype, device=value.device)
        return zero.expand(*shape, self.width)


@dataclass(frozen=True)
class StagePaths:
    """Module paths of one stage.

    Attributes:
        index: of the stage, 0 <= index < ``count``.
        before: modules in front of its layers (embeddings, on the first stage).
        layers: its repeated layers, in order.
        after: modules behind them (norm and head, on the last stage).
        between: modules between two runs of layers (the norm of an encoder).
    """

    index: int
    count: int
    before: tuple[str, ...]
    layers: tuple[str, ...]
    after: tuple[str, ...]
    between: tuple[str, ...] = ()

    @property
    def modules(self) -> tuple[str, ...]:
        """All of them."""
        return self.before + self.layers + self.between + self.after

    @property
    def is_first(self) -> bool:
        """Whether it reads the batch."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether it computes the loss."""
        return self.index == self.count - 1


def stage_paths(plan: Plan, model: nn.Module) -> tuple[StagePaths, ...]:
    """The plan's stages with their layers told apart from their other modules."""
    lists = {
        path
        for path, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
    }
    result = []
    for stage in plan.stages:
        marks = [path.rpartition(".")[0] in lists for path in stage.modules]
        first = marks.index(True) if True in marks else len(marks)
        last = len(marks) - marks[::-1].index(True) if True in marks else len(marks)
        inner = list(zip(stage.modules[first:last], marks[first:last], strict=True))
        result.append(
            StagePaths(
                index=stage.index,
                count=len(plan.stages),
                before=stage.modules[:first],
                layers=tuple(path for path, is_layer in inner if is_layer),
                after=stage.modules[last:],
                between=tuple(path for path, is_layer in inner if not is_layer),
            )
        )
    return tuple(result)


def cut(model: nn.Module, stages: tuple[StagePaths, ...], index: int) -> nn.Module:
    """A copy of ``model`` that holds stage ``index`` only; it shares that stage's modules.

    Args:
        model: the whole model (on any device, meta included); it is not changed.
    """
    replacements: dict[str, nn.Module] = {}
    causal = causal_loss_owner(model) is not None
    for stage in stages:
        if stage.index == index:
            continue
        for path in stage.modules:
            module = model.get_submodule(path)
            if next(module.parameters(), None) is not None:
                replacements[path] = _stand_in(module, path, stage, causal=causal)
    return replace_modules(model, replacements)


def _stand_in(module: nn.Module, path: str, stage: StagePaths, *, causal: bool) -> nn.Module:
    if path in stage.layers:
        return Identity()
    dtype = next(module.parameters()).dtype
    if path in stage.after:
        if isinstance(module, nn.Linear) and not causal:
            # What follows may compute a loss, which wants outputs of the right shape.
            return Placeholder(module.out_features, dtype, extends=False)
        return Detached()
    if isinstance(module, nn.Embedding):
        return Placeholder(module.embedding_dim, dtype, extends=True)
    if isinstance(module, nn.Linear):
        return Placeholder(module.out_features, dtype, extends=False)
    return Identity()


def replace_modules(model: nn.Module, replacements: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of ``model`` with other modules at the given paths; all else is shared."""
    if "" in replacements:
        return replacements[""]
    if not replacements:
        return _shallow_copy(model)
    below: dict[str, dict[str, nn.Module]] = {}
    for path, module in replacements.items():
        name, _, rest = path.partition(".")
        below.setdefault(name, {})[rest] = module
    copy = _shallow_copy(model)
    for name, inner in below.items():
        child = model._modules[name]
        if child is None:
            raise AttributeError(f"no module {name!r} in {type(model).__name__}")
        copy._modules[name] = replace_modules(child, inner)
    return copy


def _shallow_copy(module: nn.Module) -> nn.Module:
    copy = type(module).__new__(type(module))
    copy.__dict__ = {
        name: value.copy() if isinstance(value, dict) else value
        for name, value in module.__dict__.items()
    }
    return copy


@dataclass
class Step:
    """One pass of a global batch through the stages of this rank.

    Attributes:
        micro_batch: the inputs of micro-batch ``i``, on the device.
        micro_batches: how many there are.
        objective: what the last stage returns: the loss, the product of outputs and given
            cotangents, or the outputs.
        cotangent: for that objective, d loss / d output of micro-batch ``i``.
        backward: whether gradients are computed.
        autocast: enters the caller's autocast state.
        scale: multiplies the objective, so that fp16 gradients do not vanish.
        reductions: for a model that may compute its loss itself, what is active while the last
            stage runs micro-batch ``i``; None for one that uses ``loss_function``.
        results: what the last stage computed, by micro-batch.
        counts: targets of each micro-batch's own loss.
        form: what the model returned, as far as ``reductions`` could tell.
    """

    micro_batch: Callable[[int], dict[str, Any]]
    micro_batches: int
    objective: Objective
    backward: bool
    autocast: Callable[[], AbstractContextManager[Any]]
    cotangent: Callable[[int], torch.Tensor] | None = None
    scale: torch.Tensor | None = None
    reductions: Callable[[int], LossReductions] | None = None
    results: dict[int, torch.Tensor] = field(default_factory=dict)
    counts: dict[int, torch.Tensor] = field(default_factory=dict)
    form: ReturnForm = field(default_factory=ReturnForm)


class StageModule(nn.Module):
    """What the schedule calls: ``forward(hidden, index=i)`` for micro-batch ``i``.

    Args:
        model: the cut model.
        paths: what it holds.
        backward_begins: called when the backward of a micro-batch starts, with the number of
            backward passes of this step that have started, that one included.
    """

    def __init__(
        self, model: nn.Module, paths: StagePaths, backward_begins: Callable[[int], None]
    ) -> None:
        super().__init__()
        self.model = model
        self.paths = paths
        self._backward_begins = backward_begins
        self._backwards: set[int] = set()
        self._step: Step | None = None
        self._entering: torch.Tensor | None = None
        self._leaving: torch.Tensor | None = None
        # In front of FSDP's own hooks, so that these see the hidden state that really enters.
        if not paths.is_first:
            first = model.get_submodule(paths.layers[0])
            first.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True)
        if not paths.is_last:
            model.get_submodule(paths.layers[-1]).register_forward_hook(self._leave)

    def begin(self, step: Step) -> None:
        """Run the micro-batches of ``step`` from now on."""
        self._step = step
        self._backwards = set()

    def end(self) -> None:
        """Let go of the step's tensors."""
        self._step = self._entering = self._leaving = None

    def forward(
        self, hidden: torch.Tensor | None = None, *, index: torch.Tensor | int = 0
    ) -> torch.Tensor:
        """Compute one micro-batch.

        Args:
            hidden: the previous stage's hidden state; None on the first stage.
            index: which micro-batch.

        Returns:
            The hidden state, or the objective on the last stage.
        """
        step = self._step
        if step is None:
            raise RuntimeError("begin() must be called before a stage runs")
        # The schedule hands out views of arange(micro_batches): where one begins is its number,
        # which a dry run's tensors without data know too.
        number = index if isinstance(index, int) else int(index.storage_offset())
        self._entering = hidden
        inputs = step.micro_batch(number)
        if not self.paths.is_last:
            inputs.pop("labels", None)  # it would compute a loss from the identities
        with step.autocast():
            if step.reductions is None:
                result = self._objective(step, number, self.model(**inputs))
            elif self.paths.is_last:
                result = self._listen(step, number, inputs)
            else:
                with WithoutLosses():
                    result = self._objective(step, number, self.model(**inputs))
        self._entering = None
        if step.backward and result.requires_grad:
            result.register_hook(  # type: ignore[no-untyped-call]
                partial(self._count_backward, number)
            )
        return result

    def _listen(self, step: Step, number: int, inputs: dict[str, Any]) -> torch.Tensor:
        """Run a model that may compute its loss itself."""
        if step.reductions is None:
            raise RuntimeError("this step does not listen to loss functions")
        with step.reductions(number) as reductions:
            output = self.model(**inputs)
        reduction, step.form = find_loss(output, reductions.found)
        if step.objective != "loss":
            return self._objective(step, number, output)
        if reduction is None:
            raise InputError("the model returned a loss for a batch like this one before, now none")
        step.counts[number] = reduction.count.detach()
        return self._objective(step, number, {"loss": reduction.value, "output": output})

    def _objective(self, step: Step, number: int, output: Any) -> torch.Tensor:
        if not self.paths.is_last:
            hidden, self._leaving = self._leaving, None
            if hidden is None:
                raise RuntimeError(f"layer {self.paths.layers[-1]} did not run")
            return hidden
        if step.objective == "loss":
            loss = output["loss"]
            step.results[number] = loss.detach()
            if not step.backward:
                whole = output.get("output", output)
                step.results[number + step.micro_batches] = main_output(whole)
            return loss if step.scale is None else loss * step.scale  # type: ignore[no-any-return]
        values = main_output(output)
        if step.objective == "output":
            step.results[number] = values
            return values
        if step.cotangent is None:
            raise RuntimeError("this objective needs a cotangent")
        product = (values.float() * step.cotangent(number).float()).sum()
        step.results[number] = product.detach()
        return product

    def _count_backward(self, number: int, gradient: torch.Tensor) -> None:
        # A set: PipelineStage runs micro-batch 0 once more where it has to infer shapes.
        self._backwards.add(number)
        self._backward_begins(len(self._backwards))

    def _enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (self._entering, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self._entering}

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._leaving = output[0] if isinstance(output, tuple) else output


def main_output(output: Any) -> torch.Tensor:
    """The tensor a user computes a loss from: logits, or the only or first output.

    Raises:
        TypeError: there is none.
    """
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, Mapping):
        for name, value in output.items():
            if name != "loss" and isinstance(value, torch.Tensor):
                return value
    if isinstance(output, (tuple, list)):
        for value in output:
            if isinstance(value, torch.Tensor) and value.ndim > 0:
                return value
    raise TypeError(f"the model returned {type(output).__name__} without a tensor of outputs")
