"""Runs the micro-batches of one step: in a loop, or through torch's pipeline schedules.

Without a pipeline each micro-batch's backward follows its forward, so that no more than one
micro-batch's activations are alive. With one, ``torch.distributed.pipelining`` runs 1F1B or
interleaved 1F1B; only micro-batch numbers go through its interface, each stage takes its rows
from the step.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from paraplan_runtime.mesh import Ranks
from paraplan_runtime.pipeline_stage import LeanPipelineStage
from paraplan_runtime.shard import free_gathered, prepare_micro_batch
from paraplan_runtime.stage import StageModule, StagePaths, Step

KEPT_SCHEDULES = 8
"""Schedules kept with their receive buffers; more shapes than that drop the oldest."""

HiddenShape = tuple[int, ...]


class Runner:
    """Runs steps on this rank's stages.

    Args:
        ranks: this rank's place.
        models: this rank's sharded stages with what each holds, in stage order.
        hidden_dtype: dtype of the hidden state between stages.
    """

    def __init__(
        self,
        ranks: Ranks,
        models: list[tuple[torch.nn.Module, StagePaths]],
        hidden_dtype: torch.dtype,
    ) -> None:
        self.ranks = ranks
        self._hidden_dtype = hidden_dtype
        self._micro_batches = 1
        self.stages = [
            StageModule(model, paths, self._before_backward(model)) for model, paths in models
        ]
        self._schedules: dict[tuple[Any, ...], Schedule1F1B | ScheduleInterleaved1F1B] = {}

    @property
    def holds_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.stages[-1].paths.is_last

    def _before_backward(self, model: torch.nn.Module) -> Any:
        zero_stage = self.ranks.layout.zero_stage
        told: bool | None = None

        def begins(started: int) -> None:
            nonlocal told
            last = started == self._micro_batches
            # FSDP's settings walk over all modules: only where they change.
            if isinstance(model, FSDPModule) and last != told:
                prepare_micro_batch(model, zero_stage, last=last)
                told = last

        return begins

    def run(self, step: Step, hidden_shape: HiddenShape | None) -> None:
        """Run ``step``; gradients are left in ``.grad`` and results in ``step.results``.

        Args:
            hidden_shape: shape of the hidden state between stages, or None to let torch infer
                it by running each stage once more.
        """
        self._micro_batches = step.micro_batches
        for stage in self.stages:
            stage.begin(step)
        try:
            with torch.set_grad_enabled(step.backward):
                if self.ranks.layout.pipeline == 1:
                    self._loop(step)
                else:
                    self._pipeline(step, hidden_shape)
        finally:
            for stage in self.stages:
                stage.end()
        if not step.backward:
            for stage in self.stages:
                free_gathered(stage.model)

    def _loop(self, step: Step) -> None:
        (stage,) = self.stages
        for index in range(step.micro_batches):
            result = stage(index=index)
            if step.backward:
                result.backward()

    def _pipeline(self, step: Step, hidden_shape: HiddenShape | None) -> None:
        key = (step.micro_batches, hidden_shape, step.backward)
        schedule = self._schedules.pop(key, None)
        if schedule is None or hidden_shape is None:
            schedule = self._build(step, hidden_shape)
        self._schedules[key] = schedule
        while len(self._schedules) > KEPT_SCHEDULES:
            del self._schedules[next(iter(self._schedules))]
        numbers = torch.arange(step.micro_batches)
        schedule.step(
            index=numbers,
            target=numbers if step.backward else None,
            return_outputs=False,
        )

    def _build(
        self, step: Step, hidden_shape: HiddenShape | None
    ) -> Schedule1F1B | ScheduleInterleaved1F1B:
        stages = [self._torch_stage(stage, hidden_shape, step.backward) for stage in self.stages]
        options: dict[str, Any] = {
            "n_microbatches": step.micro_batches,
            "loss_fn": _last_output if step.backward else None,
            # The loss is already normalised over the global batch.
            "scale_grads": False,
        }
        if len(stages) == 1:
            return Schedule1F1B(stages[0], **options)
        return ScheduleInterleaved1F1B(list(stages), **options)

    def _torch_stage(
        self, stage: StageModule, hidden_shape: HiddenShape | None, backward: bool
    ) -> PipelineStage:
        paths, device = stage.paths, self.ranks.device
        shapes: dict[str, Any] = {}
        if hidden_shape is not None:
            hidden = torch.empty(hidden_shape, dtype=self._hidden_dtype, device="meta")
            hidden.requires_grad_(backward)
            scalar = torch.empty((), device="meta").requires_grad_(backward)
            shapes["input_args"] = () if paths.is_first else (hidden,)
            shapes["output_args"] = (scalar,) if paths.is_last else (hidden,)
        return LeanPipelineStage(
            stage, paths.index, paths.count, device, group=self.ranks.group("pipeline"), **shapes
        )


def _last_output(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return output


def current_autocast(device_type: str) -> Callable[[], AbstractContextManager[Any]]:
    """Enters the autocast state that holds now."""
    enabled = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type)
    # No cache: it would keep casts of parameters that FSDP frees between micro-batches.
    return lambda: torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False)
