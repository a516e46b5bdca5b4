"""One pass over a model at one micro-batch size and one tensor degree.

The model's own forward runs once, on shapes. Its repeated layers are replaced by stand-ins: the
first of each kind is traced where it is called, forward and backward, on inputs cut off from
what came before; the others only make the outputs that it made. What the model does between
layers is traced as it happens and makes the other *parts*: embedding, bridges, head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from paraplan.errors import FrozenLayerError, InputError
from paraplan.trace_kernels import tensors_in, touched_bytes
from paraplan.trace_parts import Part, PassTrace, Role, RoleCall, Step, Subject
from paraplan.trace_record import Recorder

_View = tuple[int, int, tuple[int, ...], tuple[int, ...]]
"""Storage, offset, shape and stride."""


def trace_pass(
    subject: Subject,
    run: Callable[[], Tensor],
    *,
    roles: Mapping[str, Role],
    kinds: Mapping[str, int] | None = None,
) -> PassTrace:
    """Run ``run`` once and trace every part of the model.

    Args:
        run: calls the model on example inputs and returns the loss.
        roles: module path -> what tensor parallelism made of it.
        kinds: layer path -> kind as an earlier pass numbered them.
    """
    return _Pass(subject, roles, kinds).trace(run)


class _Pass:
    """The state of one pass."""

    def __init__(
        self, subject: Subject, roles: Mapping[str, Role], kinds: Mapping[str, int] | None
    ) -> None:
        self.subject = subject
        self.roles = roles
        self.known_kinds = kinds
        self.recorder = Recorder()
        self.part = self.section = Part()
        self.steps: list[Step] = []
        self.kinds: dict[str, int] = {}
        self.kind_of_key: dict[Any, int] = {}
        self.parts: dict[int, Part] = {}
        self.leaves: dict[int, Tensor] = {}
        self.section_outputs: dict[int, dict[int, Tensor]] = {}  # id of log -> tensors
        self.crossing: dict[int, list[int]] = {}  # id of log -> storages that later ones read
        self.sizes: dict[int, int] = {}
        self.tainted: set[int] = set()
        self.held: list[Tensor] = []
        self.called: dict[str, int] = {}  # outer module -> id of log of its first section
        self.names: dict[int, str] = {}
        self.parameters: dict[int, nn.Parameter] = {}
        self.trainable: dict[int, Tensor] = {}
        self.without_gradient: list[str] = []

    def trace(self, run: Callable[[], Tensor]) -> PassTrace:
        self._open_section()
        for path, module in self.subject.outside.items():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    self._know(f"{path}.{name}".lstrip("."), parameter)
        with self.recorder, self._stand_ins(), ExitStack() as stack:
            for path, module in self.subject.outside.items():
                hook = partial(self._called, path)
                stack.callback(module.register_forward_pre_hook(hook).remove)
                self._watch(stack, path, module)
            self._forward_and_backward(run)
        return PassTrace(
            steps=tuple(self.steps),
            kinds=self.kinds,
            sizes=self.sizes,
            without_gradient=tuple(self.without_gradient),
        )

    def _know(self, name: str, parameter: nn.Parameter) -> int:
        """Number a parameter; a tied one goes by its first name."""
        with self.recorder.paused():
            number = self.recorder.number(parameter)
        self.names.setdefault(number, name)
        self.parameters[number] = parameter
        if parameter.requires_grad:
            self.trainable[number] = parameter
            self.tainted.add(number)
        return number

    def _forward_and_backward(self, run: Callable[[], Tensor]) -> None:
        loss = run()
        head = self.section
        self.section_outputs[id(head.log)][self.recorder.number(loss)] = loss
        self._close_section(last=True)
        uncalled = self.subject.layers.keys() - self.kinds.keys()
        if uncalled:
            raise InputError(f"layer {min(uncalled)} does not run in the model's forward pass")
        sections = [step.part for step in self.steps if step.kind is None]
        for section in sections:
            section.log.end_forward()
        self.held.clear()
        for section in reversed(sections):
            outputs = list(self.section_outputs[id(section.log)].values())
            inputs = [self.leaves[n] for n in section.inputs if n in self.leaves]
            self._backward(section, outputs, inputs)
        self._mark_kept()

    # Sections: what lies between layers.

    def _open_section(self) -> None:
        self.section = self.part = Part()
        self.recorder.log = self.section.log
        self.section_outputs[id(self.section.log)] = {}

    def _close_section(self, *, last: bool = False) -> None:
        """End the stretch between two layers, if anything in it has a gradient."""
        section, substantial = self.section, last
        read: dict[int, None] = {}
        for call in section.log.calls:
            read.update((n, None) for n in call.reads if n in self.names)
            if not self.tainted.isdisjoint(call.reads):
                substantial = True
                self.tainted.update(call.writes)
                read.update(dict.fromkeys(call.reads))
        if not substantial:
            return
        section.parameter_numbers = {n: self.names[n] for n in read if n in self.names}
        section.parameters = {
            name: self.parameters[n].numel() for n, name in section.parameter_numbers.items()
        }
        section.inputs = {n: self.sizes[n] for n in read if n in self.leaves}
        crossing = [n for n in read if n in self.tainted and self._foreign(n)]
        modules = tuple(m for m, log in self.called.items() if log == id(section.log))
        section.inputs.update((n, self.recorder.owner[n].births[n]) for n in crossing)
        reads = tuple(section.inputs)
        for number in crossing:
            owner = self.recorder.owner[number]
            self.sizes[number] = owner.births[number]
            self.crossing.setdefault(id(owner), []).append(number)
        makes = self.section_outputs[id(section.log)]
        self.steps.append(Step(None, None, section, reads, reads, tuple(makes), modules))
        if not last:
            self._open_section()

    def _foreign(self, number: int) -> bool:
        """A section before this one made it."""
        owner = self.recorder.owner.get(number)
        return owner is not None and owner is not self.section.log

    # Layers.

    @contextmanager
    def _stand_ins(self) -> Iterator[None]:
        """While it lasts, calling a layer calls `_layer`."""
        layers = self.subject.layers
        with ExitStack() as stack:
            for path, module in layers.items():
                original = module.forward
                if "forward" in module.__dict__:
                    stack.callback(setattr, module, "forward", original)
                else:
                    stack.callback(module.__dict__.pop, "forward")
                module.__dict__["forward"] = partial(self._layer, path, module, original)
            yield

    def _layer(
        self, path: str, module: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        if path in self.kinds:
            raise InputError(f"layer {path} runs more than once in one forward pass")
        given = list(tensors_in((args, kwargs)))
        differentiable = {self._view(t): t for t in given if t.requires_grad}
        for (number, *_), tensor in differentiable.items():
            owner = self.recorder.owner.get(number)
            if owner is not None and id(owner) in self.section_outputs:
                self.section_outputs[id(owner)].setdefault(number, tensor)
                self.sizes[number] = touched_bytes(tensor)
        self._close_section()
        self.held.extend(t for t in given if not t.requires_grad)
        kind = self._kind(path, given)
        part = self.parts.get(kind)
        if part is None:
            part = self.parts[kind] = self._trace_layer(path, module, original, args, kwargs)
        numbers = dict.fromkeys(view[0] for view in differentiable)
        used = {v[0] for v, used in zip(differentiable, part.used_inputs, strict=True) if used}
        reads = [number for number in numbers if number in used]
        makes: list[int] = []
        result = self._imitate(part.made, given, makes)
        self.steps.append(Step(path, kind, part, tuple(numbers), tuple(reads), tuple(makes)))
        return result

    def _kind(self, path: str, given: list[Tensor]) -> int:
        if self.known_kinds is not None:
            kind = self.known_kinds[path]
        else:
            shapes = tuple((tuple(t.shape), t.dtype, t.requires_grad) for t in given)
            key = (self.subject.structures[path], shapes)
            kind = self.kind_of_key.setdefault(key, len(self.kind_of_key))
        self.kinds[path] = kind
        return kind

    def _trace_layer(
        self,
        path: str,
        module: nn.Module,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Part:
        part = Part()
        cuts: dict[_View, Tensor] = {}
        recorder = self.recorder
        for name, parameter in module.named_parameters():
            full = f"{path}.{name}"
            part.parameter_numbers[self._know(full, parameter)] = full
            part.parameters[full] = parameter.numel()
        with recorder.into(part.log), ExitStack() as stack:
            for name, submodule in module.named_modules():
                self._watch(stack, f"{path}.{name}", submodule)
            self.part = part
            cut_args, cut_kwargs = self._cut(args, cuts), self._cut(kwargs, cuts)
            result = original(*cut_args, **cut_kwargs)
            self.part = self.section
        part.log.end_forward()
        part.inputs = {view[0]: touched_bytes(t) for view, t in cuts.items()}
        results = {recorder.number(t): t for t in tensors_in((result,))}
        outputs = {n: t for n, t in results.items() if t.requires_grad and n not in part.inputs}
        if not outputs:
            raise FrozenLayerError(
                f"layer {path} has nothing to train: frozen layers are not supported"
            )
        part.kept_outputs = {  # constants that it makes for the layers behind it
            n for n, t in results.items() if not t.requires_grad and n in part.log.births
        }
        part.outputs = list(outputs)
        part.used_inputs = self._backward(part, list(outputs.values()), list(cuts.values()))
        indices = {id(cut): index for index, cut in self._indexed(args, kwargs, cuts)}
        part.made = _describe(result, indices, list(cuts.values()))
        return part

    def _indexed(
        self, args: Any, kwargs: Any, cuts: dict[_View, Tensor]
    ) -> Iterator[tuple[int, Tensor]]:
        """Each cut tensor with its place among the tensors that the layer is given."""
        for index, tensor in enumerate(tensors_in((args, kwargs))):
            cut = cuts.get(self._view(tensor)) if tensor.requires_grad else None
            if cut is not None:
                yield index, cut

    def _view(self, tensor: Tensor) -> _View:
        """Equal for tensors that are the same part of the same storage."""
        number = self.recorder.number(tensor)
        return number, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride()

    def _cut(self, value: Any, cuts: dict[_View, Tensor]) -> Any:
        """The same arguments with every differentiable tensor made a leaf of its own graph."""
        if isinstance(value, Tensor):
            if not value.requires_grad:
                return value
            view = self._view(value)
            if view not in cuts:
                cuts[view] = value.detach().requires_grad_()
            return cuts[view]
        if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
            return type(value)(self._cut(v, cuts) for v in value)
        if type(value) is dict:
            return {k: self._cut(v, cuts) for k, v in value.items()}
        return value

    def _imitate(self, made: Any, given: list[Tensor], makes: list[int]) -> Any:
        """A result like ``made``: fresh tensors, with what was passed through passed through."""
        if isinstance(made, _Passed):
            return given[made.index]
        if isinstance(made, Tensor):
            if not made.requires_grad:
                return made
            with self.recorder.paused():
                leaf = torch.empty_like(made).detach().requires_grad_()
                number = self.recorder.number(leaf)
            self.leaves[number] = leaf
            self.sizes[number] = touched_bytes(leaf)
            self.tainted.add(number)
            makes.append(number)
            return leaf
        if isinstance(made, dict):
            return type(made)(**{k: self._imitate(v, given, makes) for k, v in made.items()})
        if type(made) in (list, tuple):
            return type(made)(self._imitate(v, given, makes) for v in made)
        return made

    # Backward, and what follows from the whole.

    def _backward(self, part: Part, outputs: list[Tensor], inputs: list[Tensor]) -> list[bool]:
        """Record the gradients of a part; says which inputs have one."""
        numbers = [n for n in part.parameter_numbers if n in self.trainable]
        part.frozen = {name for n, name in part.parameter_numbers.items() if n not in numbers}
        wanted = [self.trainable[n] for n in numbers]
        with self.recorder.into(part.log, "backward"):
            seeds = [None if t.dim() == 0 else torch.empty_like(t) for t in outputs]
            gradients = torch.autograd.grad(outputs, [*wanted, *inputs], seeds, allow_unused=True)
        for number, gradient in zip(numbers, gradients, strict=False):
            if gradient is None:
                self.without_gradient.append(part.parameter_numbers[number])
            else:
                part.parameter_gradients.add(self.recorder.number(gradient))
        return [g is not None for g in gradients[len(wanted) :]]

    def _mark_kept(self) -> None:
        """Outputs that several later steps read are kept once, by the step that makes them."""
        for position, step in enumerate(self.steps):
            if step.kind is None:
                more = self.crossing.get(id(step.part.log), [])
                makes = tuple(dict.fromkeys((*step.makes, *more)))
                self.steps[position] = replace(step, makes=makes)
        readers: dict[int, int] = {}
        for step in self.steps:
            for number in step.reads:
                readers[number] = readers.get(number, 0) + 1
        shared = {number for number, count in readers.items() if count > 1}
        private: dict[int, set[int]] = {}  # id of part -> inputs that only one step reads
        for step in self.steps:
            part = step.part
            if step.kind is None:
                part.outputs = list(step.makes)
            made = zip(step.makes, part.outputs, strict=True)
            given = zip(step.given, part.inputs, strict=True)
            part.kept_outputs |= {own for number, own in made if number in shared}
            mine = private.setdefault(id(part), set())
            mine |= {own for number, own in given if number not in shared}
            part.shared_inputs = part.inputs.keys() - mine

    def _watch(self, stack: ExitStack, path: str, module: nn.Module) -> None:
        """Note calls of ``module`` if tensor parallelism splits it."""
        role = self.roles.get(path)
        if role is None:
            return
        if role == "experts":
            stack.callback(module.register_forward_pre_hook(self._enter_experts).remove)
        hook = partial(self._role_called, role)
        stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)

    def _enter_experts(self, *_: Any) -> None:
        self.recorder.start_marking()

    def _called(self, path: str, *_: Any) -> None:
        self.called.setdefault(path, id(self.section.log))

    def _role_called(self, role: Role, _: Any, args: Any, kwargs: Any, output: Any) -> None:
        self.recorder.stop_marking()
        source = next(tensors_in((args, kwargs)))
        result = next(tensors_in((output,)))
        self.part.role_calls.append(
            RoleCall(
                role,
                self.recorder.number(source),
                self.recorder.number(result),
                touched_bytes(source),
                touched_bytes(result),
            )
        )


@dataclass(frozen=True, slots=True)
class _Passed:
    """Stands for a tensor that a layer returns as it was given."""

    index: int


def _describe(value: Any, indices: dict[int, int], cuts: list[Tensor]) -> Any:
    """A layer's result with what it only passed on marked as such."""
    if isinstance(value, Tensor):
        for cut in cuts:
            if value is cut:
                return _Passed(indices[id(cut)])
        return value
    if isinstance(value, dict):
        return type(value)(**{k: _describe(v, indices, cuts) for k, v in value.items()})
    if type(value) in (list, tuple):
        return type(value)(_describe(v, indices, cuts) for v in value)
    return value
