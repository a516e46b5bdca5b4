"""One layout: degrees and schedule, the mesh that follows, and what the runtime makes of it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Recompute = Literal["none", "selective", "full"]
Schedule = Literal["none", "1f1b", "interleaved-1f1b"]
Precision = Literal["bf16", "fp16", "fp32"]
Degree = Annotated[int, Field(ge=1, le=2**24)]


class Frozen(BaseModel):
    """Data that does not change, without fields that nobody knows."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Layout(Frozen):
    """The degrees and the schedule; every device group follows from them.

    The mesh, outermost first: pipeline, data_replicate, data_shard, context, tensor.
    ``data_replicate * data_shard * context * tensor * pipeline`` = number of devices.

    Attributes:
        expert: divides ``data_replicate * data_shard * context``; experts spread over it.
        micro_batch_size: sequences of one micro-batch on one data-parallel rank.
        micro_batches: micro-batches of one step on one data-parallel rank.
        schedule: ``none`` without pipeline; gradients accumulate over the micro-batches.
        virtual_stages: contiguous chunks each pipeline rank holds (1 unless interleaved).
        sequence_parallel: norms and residuals split along the sequence over the tensor ranks.
        zero_stage: what ``data_shard`` splits. 1: optimizer state; 2: gradients too, reduced
            after each micro-batch; 3: parameters too, gathered for each forward and backward.
            0 exactly when ``data_shard`` is 1.
    """

    data_replicate: Degree = 1
    data_shard: Degree = 1
    tensor: Degree = 1
    context: Degree = 1
    expert: Degree = 1
    pipeline: Degree = 1
    virtual_stages: Degree = 1
    micro_batch_size: Degree = 1
    micro_batches: Degree = 1
    schedule: Schedule = "none"
    sequence_parallel: bool = False
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0

    @property
    def devices(self) -> int:
        """Number of devices the layout needs."""
        return self.data_ranks * self.context * self.tensor * self.pipeline

    @property
    def data_ranks(self) -> int:
        """Ranks that read different sequences."""
        return self.data_replicate * self.data_shard

    @property
    def global_batch(self) -> int:
        """Sequences of one optimizer step."""
        return self.data_ranks * self.micro_batch_size * self.micro_batches

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        ranks = self.data_ranks * self.context
        if ranks % self.expert:
            raise ValueError(
                f"expert({self.expert}) does not divide data * context ranks ({ranks})"
            )
        if (self.data_shard > 1) != (self.zero_stage > 0):
            raise ValueError(
                f"zero_stage({self.zero_stage}) does not go with data_shard({self.data_shard}): "
                "it is 0 exactly when data_shard is 1"
            )
        if (self.pipeline > 1) != (self.schedule != "none"):
            raise ValueError(
                f"schedule {self.schedule!r} does not go with pipeline({self.pipeline})"
            )
        if (self.virtual_stages > 1) != (self.schedule == "interleaved-1f1b"):
            raise ValueError(
                f"schedule {self.schedule!r} does not go with virtual_stages({self.virtual_stages})"
            )
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError("sequence_parallel needs tensor above 1")
        return self


def mesh_axes(layout: Layout) -> tuple[tuple[str, int], ...]:
    """The device mesh of a layout, outermost axis first; the last axis's ranks are neighbours."""
    return (
        ("pipeline", layout.pipeline),
        ("data_replicate", layout.data_replicate),
        ("data_shard", layout.data_shard),
        ("context", layout.context),
        ("tensor", layout.tensor),
    )


# What the runtime cannot apply yet: the one list that planner and runtime both read. Everything
# else in `Layout` is applied.
RUNTIME_CANNOT_APPLY_YET = ("context", "expert")
"""Layout fields that the runtime refuses above 1; the planner searches them only on request."""

RUNTIME_CANNOT_SPLIT: dict[str, tuple[str, ...]] = {
    "BertForMaskedLM": ("tensor", "pipeline"),
    "ViTForImageClassification": ("tensor", "pipeline"),
    "T5ForConditionalGeneration": ("tensor", "pipeline"),
    "Phi3ForCausalLM": ("tensor",),
}
"""Architecture -> axes along which the runtime does not split it: it has no tensor-parallel plan
that the runtime reads, or its stages were not shown to train like the whole model."""


def too_few_micro_batches(pipeline: int) -> str:
    """Why torch's 1F1B schedules refuse fewer micro-batches than stages."""
    return f"1F1B wants at least as many micro_batches as stages, pipeline({pipeline})"


def unsupported_fields(layout: Layout) -> tuple[str, ...]:
    """The fields of a layout that the runtime cannot apply yet."""
    return tuple(name for name in RUNTIME_CANNOT_APPLY_YET if getattr(layout, name) > 1)
