"""``plan check``: a plan applied to the real model without data, its memory beside the prediction.

The runtime itself runs, in this process, for one rank of each pipeline stage, on torch's fake
process group and fake tensors (`paraplan_runtime.dry_run`). What such a run cannot see is left
out of the comparison: communicators, the device context, fragmentation.
"""

from __future__ import annotations

import json
import textwrap
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paraplan.errors import InputError, PlanError
from paraplan.explain import request_of
from paraplan.models import ModelSource, resolve_model
from paraplan.plan_file import Plan, capacity_of, load_plan
from paraplan.plan_parts import MemoryParts
from paraplan.report import GIB, layout_words
from paraplan.tables import rows_to_csv

if TYPE_CHECKING:
    from paraplan_runtime.dry_run import Rehearsed

COMPARED = (
    "parameters",
    "gradients",
    "optimizer",
    "activations",
    "working",
    "gathered_parameters",
)
"""Parts of `MemoryParts` that the dry run counts; the others no tensor holds."""

WIDTH = 80

TOLERANCE = 0.05
"""Largest relative difference of a stage's peak that still confirms the plan."""


@dataclass(frozen=True)
class CheckedStage:
    """One pipeline rank: what the plan predicts and what the dry run counted.

    Attributes:
        pipeline_rank: which.
        rank: the device that took part, the first of the stage.
        predicted: the plan's parts.
        counted: the same parts by the dry run, at its peak.
        micro_batches: that the dry run took.
    """

    pipeline_rank: int
    rank: int
    predicted: MemoryParts
    counted: Mapping[str, int]
    micro_batches: int

    @property
    def predicted_bytes(self) -> int:
        """What the dry run should count."""
        return sum(int(getattr(self.predicted, part)) for part in COMPARED)

    @property
    def counted_bytes(self) -> int:
        """What it did count."""
        return sum(self.counted.get(part, 0) for part in COMPARED)

    @property
    def unseen_bytes(self) -> int:
        """Predicted, and not to be seen without a device."""
        return self.predicted.total - self.predicted_bytes

    @property
    def difference(self) -> float:
        """(predicted - counted) / counted."""
        return self.predicted_bytes / self.counted_bytes - 1


def check_plan(
    plan: Plan,
    *,
    model: str | None = None,
    ranks: Sequence[int] | None = None,
    micro_batches: int | None = None,
) -> Iterator[CheckedStage]:
    """Run the plan without data, one pipeline rank after the other.

    Args:
        model: where to find the model, if the plan's name for it does not say.
        ranks: pipeline ranks to run (default: all).
        micro_batches: of a step (default: the fewest that show its peak).

    Raises:
        InputError: the plan does not apply to the model, with the reason.
        PlanError: a step of the dry run fails.
    """
    source = _source(plan, model)
    for rank in range(plan.layout.pipeline) if ranks is None else ranks:
        try:
            done = _rehearse(plan, source, rank, micro_batches)
        except PlanError:
            raise
        except Exception as error:
            raise PlanError(f"stage {rank}: the dry run fails: {_where(error)}") from error
        stage = next(s for s in plan.stages if s.pipeline_rank == rank)
        yield CheckedStage(rank, done.rank, stage.memory, done.parts, done.micro_batches)


def _where(error: Exception) -> str:
    """An exception in one line, with the place that raised it."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    words = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {words[:200]} ({Path(place.filename).name}:{place.lineno})"


def _source(plan: Plan, model: str | None) -> ModelSource:
    request = request_of(plan, model=model)
    source = resolve_model(request.model)
    if source.config_sha256 != plan.model.config_sha256:
        raise InputError(
            f"the plan was made for another {plan.model.name} than {request.model} is",
            hint="name the model that it was made for with --model",
        )
    return source


def _rehearse(plan: Plan, source: ModelSource, rank: int, micro_batches: int | None) -> Rehearsed:
    # The one place where the planner's side calls the runtime: nothing is planned here.
    from paraplan.trace_attention import FusedAttention
    from paraplan.trace_model import build_model, named_inputs, quiet_transformers
    from paraplan_runtime.dry_run import rehearse

    length = plan.workload.sequence_length
    with quiet_transformers(), FusedAttention():
        built = build_model(source, sequence_length=length, compute_dtype="float32")
        return rehearse(
            plan,
            rank,
            built.model,
            lambda rows: named_inputs(built, rows),
            micro_batches=micro_batches,
        )


def add_check_arguments(parser: ArgumentParser) -> None:
    """The arguments of ``plan check``."""
    parser.add_argument("plan", type=Path, metavar="PLAN", help="a plan file")
    parser.add_argument("--model", metavar="NAME", help="where the plan's model is, as in `plan`")
    parser.add_argument("--stage", type=int, metavar="N", help="this pipeline rank only")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.add_argument("--csv", action="store_true", help="print the parts as CSV, nothing else")


def run_check(options: Namespace) -> int:
    """``plan check``: 0 if the dry run confirms the plan, 1 if it contradicts it."""
    plan = load_plan(options.plan)
    depth = plan.layout.pipeline
    if options.stage is not None and not 0 <= options.stage < depth:
        raise InputError(f"--stage is {options.stage}; the plan has stages 0 to {depth - 1}")
    ranks = None if options.stage is None else [options.stage]
    silent = options.json or options.csv
    if not silent:
        words = f"{plan.model.name}, {plan.cluster.devices} devices: {layout_words(plan.layout)}"
        print(textwrap.fill(words, WIDTH, subsequent_indent="  "))
    checked = []
    for stage in check_plan(plan, model=options.model, ranks=ranks):
        checked.append(stage)
        if not silent:
            print("\n".join(["", *stage_lines(stage, plan)]), flush=True)
    problems = [line for stage in checked for line in contradictions(stage, plan)]
    if options.csv:
        print(rows_to_csv(row for stage in checked for row in part_rows(stage)), end="")
    elif options.json:
        print(json.dumps(as_json(checked, problems)))
    else:
        print("\n".join(["", *_closing(checked, problems)]))
    return 1 if problems else 0


def stage_lines(stage: CheckedStage, plan: Plan) -> list[str]:
    """The table of one pipeline rank."""
    name = f"stage {stage.pipeline_rank}, rank {stage.rank}"
    lines = [f"{name + ', GiB':24s} {'plan':>9s} {'dry run':>9s} {'plan is':>9s}"]
    for part in COMPARED:
        predicted, counted = int(getattr(stage.predicted, part)), stage.counted.get(part, 0)
        lines.append(_row(part.replace("_", " "), predicted, counted))
    lines.append(_row("together", stage.predicted_bytes, stage.counted_bytes))
    return lines


def _row(name: str, predicted: int, counted: int) -> str:
    off = f"{100 * (predicted / counted - 1):+8.1f} %" if counted >= GIB / 100 else ""
    return f"{name:24s} {predicted / GIB:9.2f} {counted / GIB:9.2f} {off}".rstrip()


def contradictions(stage: CheckedStage, plan: Plan) -> list[str]:
    """Where the dry run says something else than the plan, in a line each."""
    found = []
    if abs(stage.difference) > TOLERANCE:
        found.append(
            f"stage {stage.pipeline_rank}: the plan is {100 * stage.difference:+.1f} % off the "
            f"dry run's {stage.counted_bytes / GIB:.1f} GiB"
        )
    needed = stage.counted_bytes + stage.unseen_bytes
    capacity = capacity_of(plan, stage.pipeline_rank)
    if needed > capacity:
        found.append(
            f"stage {stage.pipeline_rank}: does not fit: {needed / GIB:.1f} GiB of "
            f"{capacity / GIB:.1f} GiB"
        )
    return found


def _closing(checked: Sequence[CheckedStage], problems: Sequence[str]) -> list[str]:
    unseen = max(stage.unseen_bytes for stage in checked) / GIB
    ran = max(stage.micro_batches for stage in checked)
    lines = [
        f"at the peak of a step of {ran} micro-batches; more hold no more",
        f"not in a dry run: {unseen:.1f} GiB for communicators, device context, fragmentation",
    ]
    return lines + (list(problems) or ["every module resolves, every step completes, it fits"])


def part_rows(stage: CheckedStage) -> Iterator[dict[str, Any]]:
    """One row for each part of a pipeline rank's memory."""
    for part in COMPARED:
        yield {
            "pipeline_rank": stage.pipeline_rank,
            "part": part,
            "predicted_bytes": int(getattr(stage.predicted, part)),
            "counted_bytes": stage.counted.get(part, 0),
        }


def as_json(checked: Sequence[CheckedStage], problems: Sequence[str]) -> dict[str, Any]:
    """What ``--json`` prints."""
    return {
        "stages": [
            {
                "pipeline_rank": stage.pipeline_rank,
                "rank": stage.rank,
                "micro_batches": stage.micro_batches,
                "predicted": {part: getattr(stage.predicted, part) for part in COMPARED},
                "counted": {part: stage.counted.get(part, 0) for part in COMPARED},
                "predicted_bytes": stage.predicted_bytes,
                "counted_bytes": stage.counted_bytes,
                "unseen_bytes": stage.unseen_bytes,
                "difference": stage.difference,
            }
            for stage in checked
        ],
        "problems": list(problems),
    }
