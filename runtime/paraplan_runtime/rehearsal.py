"""What a dry run needs of the runtime: a job of which one rank exists, on tensors without data.

``plan check`` runs the runtime in one process, under torch's fake process group and fake
tensors. Almost all of it takes no notice. Two things it cannot do: read the value of a fake
tensor, and compare itself with ranks that are not there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch.distributed as dist
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.pipelining._utils import InferenceMode
from torch.distributed.pipelining.schedules import _PipelineSchedule


def is_rehearsal() -> bool:
    """Whether the other ranks are only imagined: there is nobody to compare with."""
    return bool(dist.get_backend() == "fake")


def real_tensors() -> AbstractContextManager[object]:
    """Inside, new tensors have values even in a dry run: for meshes and random states."""
    return unset_fake_temporarily()


@contextmanager
def imagined_pipeline() -> Iterator[None]:
    """Inside, torch's pipeline ranks do not ask each other whether shapes are known: they are."""

    def agree(schedule: Any, stages: Any, has_backward: bool, p2p_done: bool) -> None:
        for stage in stages:
            stage._inference_mode = InferenceMode.STATIC

    original = _PipelineSchedule._warmup_p2p
    _PipelineSchedule._warmup_p2p = agree  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        _PipelineSchedule._warmup_p2p = original  # type: ignore[method-assign]
