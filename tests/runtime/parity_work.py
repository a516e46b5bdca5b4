"""What each rank does in the parity tests, and what it is compared with."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from parity_cases import build, make_plan, train

from paraplan.layout import Layout, Recompute

LAYOUTS = {
    "data-shard-2": Layout(data_shard=2, zero_stage=3, micro_batch_size=2, micro_batches=2),
    "data-shard-2-zero-1": Layout(data_shard=2, zero_stage=1, micro_batch_size=2, micro_batches=2),
    "data-shard-2-zero-2": Layout(data_shard=2, zero_stage=2, micro_batch_size=2, micro_batches=2),
    "data-replicate-2": Layout(data_replicate=2, micro_batch_size=2, micro_batches=2),
    "tensor-2": Layout(tensor=2, micro_batch_size=4, micro_batches=2),
    "sequence-2": Layout(tensor=2, sequence_parallel=True, micro_batch_size=4, micro_batches=2),
    "pipeline-2": Layout(pipeline=2, schedule="1f1b", micro_batch_size=2, micro_batches=4),
    "interleaved-2": Layout(
        pipeline=2,
        schedule="interleaved-1f1b",
        virtual_stages=2,
        micro_batch_size=2,
        micro_batches=4,
    ),
    "hybrid-2x2": Layout(
        data_replicate=2, data_shard=2, zero_stage=3, micro_batch_size=1, micro_batches=2
    ),
    "tensor-2-pipeline-2": Layout(
        tensor=2, pipeline=2, schedule="1f1b", micro_batch_size=2, micro_batches=4
    ),
    "data-shard-2-pipeline-2": Layout(
        data_shard=2,
        zero_stage=3,
        pipeline=2,
        schedule="1f1b",
        micro_batch_size=2,
        micro_batches=2,
    ),
    "data-shard-2-tensor-2": Layout(
        data_shard=2, zero_stage=3, tensor=2, micro_batch_size=2, micro_batches=2
    ),
    "data-2-sequence-2-pipeline-2": Layout(
        data_shard=2,
        zero_stage=2,
        tensor=2,
        sequence_parallel=True,
        pipeline=2,
        schedule="1f1b",
        micro_batch_size=2,
        micro_batches=2,
    ),
}
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
LOSS_TOLERANCE = 1e-5
NORM_TOLERANCE = 1e-4
WEIGHT_TOLERANCE = 1e-5


class Case(NamedTuple):
    """One model under one layout with one recompute mode for all layers."""

    model: str
    layout: str
    recompute: Recompute


def train_cases(cases: list[Case]) -> list[dict[str, Any]]:
    """Train each case on this rank; the losses, norms and whole final weights."""
    from paraplan_runtime import parallelize

    results = []
    for case in cases:
        layout = LAYOUTS[case.layout]
        # Uneven stages wherever there are two.
        cuts = (1,) if layout.schedule == "1f1b" else ()
        plan = make_plan(case.model, layout, recompute=case.recompute, cuts=cuts)
        model = parallelize(build(case.model), plan, device_type="cpu")
        result: dict[str, Any] = train(model, plain=case.model == "plain")
        result["weights"] = model.state_dict()
        results.append(result)
    return results


@cache
def reference(name: str) -> dict[str, Any]:
    """The same training in one process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = build(name)
    result: dict[str, Any] = train(model, plain=name == "plain")
    result["weights"] = model.state_dict()
    torch.set_num_threads(threads)
    return result


def compare(case: Case, result: dict[str, Any]) -> None:
    """Raise AssertionError unless one rank's result is that of one process."""
    wanted = reference(case.model)
    # Clipping must be at work, or a wrong norm would change nothing.
    assert min(wanted["norms"]) > 0.5
    for name, tolerance in (("losses", LOSS_TOLERANCE), ("norms", NORM_TOLERANCE)):
        for step, (got, want) in enumerate(zip(result[name], wanted[name], strict=True)):
            assert abs(got - want) <= tolerance * abs(want), (case, name, step, got, want)
    assert list(result["weights"]) == list(wanted["weights"])
    for name, want in wanted["weights"].items():
        error = float((result["weights"][name] - want).abs().max())
        assert error <= WEIGHT_TOLERANCE, (case, name, error)
