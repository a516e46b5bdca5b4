"""The model a script holds after ``parallelize``: one device's model, computed by all ranks."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paraplan.errors import InputError
from paraplan.plan_file import Plan
from paraplan_runtime.batch import (
    CHECKED_BATCHES,
    Split,
    bind_arguments,
    check_ranks_agree,
    count_rows,
    fill_sequences,
    split_rows,
    take_micro_batch,
)
from paraplan_runtime.export import adapter_names, save_adapters, save_whole
from paraplan_runtime.files import MAX_SHARD_BYTES, read_safetensors
from paraplan_runtime.gradients import GradientStash, Parameter, put_back, set_aside
from paraplan_runtime.loss import GlobalLoss, returned_loss, sum_over_ranks
from paraplan_runtime.mesh import Ranks
from paraplan_runtime.outputs import (
    ParallelOutput,
    cotangent_rows,
    gather_output,
    in_form,
    returned_output,
)
from paraplan_runtime.own_loss import Loss, LossReductions, ReturnForm, expected_targets
from paraplan_runtime.random_state import ModelRandomState
from paraplan_runtime.report import ParallelReport, StepClock, measured_lines
from paraplan_runtime.schedule import Runner, current_autocast
from paraplan_runtime.stage import Objective, Step
from paraplan_runtime.state import Entry, iterate_whole, load_whole
from paraplan_runtime.tensor import ParameterSplit
from paraplan_runtime.watchdog import Watchdog

FIRST_LOSS_SCALE = 65536.0
"""``torch.amp.GradScaler``'s own first scale; later ones are those it used last."""

_log = logging.getLogger("paraplan")


class ParallelModel(nn.Module):
    """Behaves as the whole model on one device; made by ``parallelize``.

    Call it with the global batch on every rank. With labels it returns the global loss; the
    step's forward and backward have then already run, and ``loss.backward()`` hands out the
    gradients. Without labels, or for a plain module, a loss computed from the outputs works
    too, at the cost of a second forward.

    Args:
        plan: what was applied.
        ranks: this rank's place.
        runner: this rank's stages.
        parameters: this rank's parameters under the whole model's names.
        loss: the loss of the model, if it computes one itself.
        signature: the whole model's forward.
        spread_output: whether the outputs' last dimension is split over the tensor ranks.
        entries: this rank's entries of the state dict.
        state_dtypes: key -> dtype of the whole model's state dict, as it was built.
        fused: parameters of several parts that tensor ranks would split one by one.
        aliases: keys of tied tensors -> the first key of each.
        finish_gradients: adds up what several ranks computed parts or copies of.
        hidden_width: last dimension of the hidden state between stages, if known.
        watchdog: is told when steps begin and end.
    """

    def __init__(
        self,
        plan: Plan,
        ranks: Ranks,
        runner: Runner,
        parameters: tuple[Parameter, ...],
        *,
        loss: GlobalLoss | None,
        signature: inspect.Signature,
        spread_output: bool,
        entries: Sequence[Entry],
        state_dtypes: Mapping[str, torch.dtype],
        fused: Mapping[str, ParameterSplit],
        aliases: Mapping[str, str],
        finish_gradients: Callable[[GradientStash], None],
        hidden_width: int | None,
        watchdog: Watchdog,
    ) -> None:
        super().__init__()
        self.plan = plan
        self.ranks = ranks
        self.stages = nn.ModuleList(runner.stages)
        self._runner = runner
        self.own = parameters
        self._loss = loss
        self._signature = signature
        self._spread_output = spread_output
        self.entries = entries
        self.fused = fused
        self.aliases = aliases
        self._state_dtypes = state_dtypes
        self._finish_gradients = finish_gradients
        self._hidden_width = hidden_width
        self._watchdog = watchdog
        self.random_state = ModelRandomState(ranks)
        self._scales = plan.workload.precision == "fp16"
        self._loss_scale = torch.tensor(FIRST_LOSS_SCALE, device=ranks.device)
        self._clock = StepClock()
        self._checked = 0
        self._noted_size = False
        self._forms: dict[frozenset[str], ReturnForm] = {}

    def __getattr__(self, name: str) -> Any:
        """What the runtime does not define comes from the model: ``config``, for instance."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.stages[0].model, name)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters under the names they have in the whole model.

        Each is a DTensor with this rank's shard; other stages' parameters are not there.
        """
        for parameter in self.own:
            yield (f"{prefix}.{parameter.name}" if prefix else parameter.name), parameter.value

    @property
    def loss_scale(self) -> float:
        """What fp16's step is multiplied by: the factor that ``GradScaler`` used last."""
        return float(self._loss_scale)

    @loss_scale.setter
    def loss_scale(self, value: float) -> None:
        self._loss_scale.fill_(value)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:  # type: ignore[override]
        """The whole model's state dict on the CPU, on every rank; every rank must call it."""
        return {
            name: tensor.cpu().clone()
            for name, tensor in iterate_whole(self.entries, list(self._state_dtypes), self.ranks)
        }

    def save_pretrained(
        self, save_directory: str | Path, *, max_shard_size: int | str = MAX_SHARD_BYTES
    ) -> None:
        """Write what the whole model's own ``save_pretrained`` would; every rank must call it.

        Tensors have the dtype that the model was built in; of a model with adapters, the
        adapters are written.

        Args:
            max_shard_size: of one file at most: bytes, or a text such as ``"5GB"``.
        """
        model, folder = self.stages[0].model, Path(save_directory)
        adapted = hasattr(model, "peft_config")
        wanted = adapter_names(model, self._state_dtypes) if adapted else self._state_dtypes
        order = [name for name in wanted if name not in self.aliases]
        tensors = (
            (name, tensor.to(self._state_dtypes[name]))
            for name, tensor in iterate_whole(self.entries, order, self.ranks)
        )
        if adapted:
            save_adapters(model, tensors, folder)
        else:
            save_whole(model, tensors, folder, max_shard_size)

    def load_pretrained(self, folder: str | Path) -> None:
        """Read this rank's shards from an ordinary checkpoint, and nothing else of it."""
        read_safetensors(Path(folder), self.entries, self.aliases, self.ranks)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Take this rank's shards from the whole model's state dict."""
        load_whole(self.entries, state_dict, self.ranks)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the global batch; arguments are those of the model itself."""
        batch = bind_arguments(self._signature, args, kwargs)
        rows = count_rows(batch)
        self._check(batch, rows)
        split = split_rows(rows, self.ranks.layout)
        if self._loss is None:
            return self._in_its_own_form(batch, split)
        multiple = self.ranks.layout.tensor if self.ranks.layout.sequence_parallel else 1
        batch, length = fill_sequences(batch, multiple)
        if batch.get("labels") is not None:
            loss, outputs = self._with_loss(batch, split)
        else:
            loss, outputs = None, self._outputs(batch, split)[1]
        return ParallelOutput(loss, outputs if length is None else lambda: outputs()[:, :length])

    def _in_its_own_form(self, batch: dict[str, Any], split: Split) -> Any:
        """A model that computes its loss itself, or none; the first call finds out which."""
        arguments = frozenset(name for name, value in batch.items() if value is not None)
        form = self._forms.get(arguments)
        before = self.random_state.state
        if form is None or form.loss is Loss.NONE:
            step, outputs = self._outputs(batch, split)
            if form is None:
                known = self._runner.holds_last_stage
                form = self._forms[arguments] = step.form.agreed(self.ranks.device, known=known)
            if form.loss is Loss.NONE:
                return in_form(form, None, outputs)
            self.random_state.state = before
        return in_form(form, *self._with_loss(batch, split))

    def parallel_report(self) -> ParallelReport:
        """Predicted and measured step time and memory of this rank."""
        return self._clock.report(self.plan, self.ranks)

    def _check(self, batch: dict[str, Any], rows: int) -> None:
        if self._checked < CHECKED_BATCHES:
            self._checked += 1
            check_ranks_agree(batch, self.ranks.device)
        planned = self.plan.workload.global_batch
        trains = self.training and torch.is_grad_enabled()
        if trains and self._clock.tick(planned=rows == planned):
            lines = measured_lines(self.parallel_report(), self.plan, self.ranks)
            if self.ranks.speaks:
                _log.info("\n".join(lines))
        if rows != planned and self.training and not self._noted_size:
            self._noted_size = True
            if self.ranks.speaks:
                _log.warning(
                    "the batch has %d sequences, the plan was made for %d: it trains exactly, "
                    "but the plan's prediction no longer applies",
                    rows,
                    planned,
                )

    def _with_loss(
        self, batch: dict[str, Any], split: Split
    ) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
        """The global loss, and what computes the global outputs."""
        if self._loss is not None:
            self._loss.targets = self._loss.count_targets(batch)
        before = self.random_state.state
        training = torch.is_grad_enabled()
        step, stash = self._run(batch, split, "loss", backward=training)
        value, correction = self._global_loss(step, batch, split)
        if not training:
            last = self._runner.holds_last_stage
            parts = [
                step.results[split.micro_batches + i] for i in range(split.micro_batches) if last
            ]
            return value, partial(self._gather, parts, split)
        again = partial(self._logits_again, batch, split, before, self._versions())
        return returned_loss(value, partial(self._install, stash, correction)), again

    def _global_loss(
        self, step: Step, batch: dict[str, Any], split: Split
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The loss of all ranks, and what its gradients are still to be multiplied by."""
        last = self._runner.holds_last_stage
        sums = torch.zeros(2, device=self.ranks.device)
        if last:
            numbers = range(split.micro_batches)
            sums[0] = torch.stack([step.results[i].float() for i in numbers]).sum()
            if step.counts:
                sums[1] = torch.stack([step.counts[i] for i in numbers]).sum()
        value, count = sum_over_ranks(
            sums, contributes=last and self.ranks.place("tensor") == 0
        ).unbind()
        if self._loss is not None:
            return value, None
        correction = expected_targets(batch, split.padded_rows) / count
        return value * correction, correction

    def _install(
        self, stash: GradientStash, correction: torch.Tensor | None, incoming: torch.Tensor
    ) -> None:
        """Hand out the gradients; fp16's carry the scale that was expected to flow in."""
        scale = incoming.detach()
        if self._scales:
            used, self._loss_scale = self._loss_scale, scale.float().clone()
            scale = self._loss_scale / used
        if correction is not None:
            scale = scale * correction
        stash.install(scale)

    def _run(
        self,
        batch: dict[str, Any],
        split: Split,
        objective: Objective,
        *,
        backward: bool,
        cotangent: Callable[[int], torch.Tensor] | None = None,
    ) -> tuple[Step, GradientStash]:
        inputs = dict(batch)
        if objective != "loss" and self._loss is not None:
            inputs.pop("labels", None)
        device = self.ranks.device
        step = Step(
            micro_batch=lambda i: take_micro_batch(inputs, split, self.ranks.data_index, i, device),
            micro_batches=split.micro_batches,
            objective=objective,
            backward=backward,
            autocast=current_autocast(device.type),
            cotangent=cotangent,
            scale=self._loss_scale if self._scales and objective == "loss" and backward else None,
            reductions=partial(self._reductions, batch, split) if self._loss is None else None,
        )
        taken = set_aside(self.own)
        try:
            # Backward passes must not run under autocast; each stage's forward enters it again.
            with (
                self._watchdog.step(),
                self.random_state.active(),
                torch.autocast(device.type, enabled=False),
            ):
                self._runner.run(step, self._hidden_shape(batch, split))
                stash = GradientStash(self.own)
                if backward:
                    self._finish_gradients(stash)
        finally:
            put_back(self.own, taken)
        return step, stash

    def _reductions(self, batch: dict[str, Any], split: Split, micro_batch: int) -> LossReductions:
        return LossReductions(
            rows=split.micro_batch_size,
            real_rows=split.real_rows(self.ranks.data_index, micro_batch),
            expected=expected_targets(batch, split.padded_rows),
        )

    def _hidden_shape(self, batch: dict[str, Any], split: Split) -> tuple[int, ...] | None:
        ids = batch.get("input_ids")
        if self._hidden_width is None or ids is None or ids.ndim != 2:
            return None
        length = int(ids.shape[1])
        if self.ranks.layout.sequence_parallel:
            length //= self.ranks.layout.tensor
        return (split.micro_batch_size, length, self._hidden_width)

    def _gather(self, parts: list[torch.Tensor], split: Split) -> torch.Tensor:
        return gather_output(
            parts,
            split,
            self.ranks,
            spread=self._spread_output,
            last_stage=self._runner.holds_last_stage,
        )

    def _outputs(
        self, batch: dict[str, Any], split: Split
    ) -> tuple[Step, Callable[[], torch.Tensor]]:
        """A forward without gradients, and what gathers the global outputs of it."""
        before = self.random_state.state
        step, _ = self._run(batch, split, "output", backward=False)
        parts = [step.results[i] for i in sorted(step.results)]
        if not torch.is_grad_enabled():
            return step, partial(self._gather, parts, split)
        backward = partial(self._backward_from_outputs, batch, split, before)
        return step, lambda: returned_output(self._gather(parts, split), backward)

    def _backward_from_outputs(
        self, batch: dict[str, Any], split: Split, before: Any, gradient: torch.Tensor
    ) -> None:
        """Run the step with gradients, given d loss / d outputs of the global batch."""
        after, self.random_state.state = self.random_state.state, before

        def cotangent(micro_batch: int) -> torch.Tensor:
            return cotangent_rows(
                gradient, split, self.ranks, micro_batch, spread=self._spread_output
            )

        with torch.enable_grad():
            _, stash = self._run(batch, split, "cotangent", backward=True, cotangent=cotangent)
        self.random_state.state = after
        stash.install(torch.ones((), device=self.ranks.device))

    def _logits_again(
        self, batch: dict[str, Any], split: Split, before: Any, versions: tuple[int, ...]
    ) -> torch.Tensor:
        """Logits of a training step, computed when asked for: keeping them would cost memory."""
        if self._versions() != versions:
            raise InputError(
                "outputs.logits was read after the optimizer changed the parameters",
                hint="read outputs.logits before optimizer.step()",
            )
        after, self.random_state.state = self.random_state.state, before
        step, _ = self._run(batch, split, "output", backward=False)
        self.random_state.state = after
        return self._gather([step.results[i] for i in sorted(step.results)], split)

    def _versions(self) -> tuple[int, ...]:
        return tuple(parameter.value._version for parameter in self.own)
