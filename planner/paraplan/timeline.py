"""`plan timeline`: the replayed step as Chrome trace events, for Perfetto or chrome://tracing.

One process for each pipeline rank (its data, tensor and context peers do the same at the same
time). Thread 0 is what the rank computes: forward and backward passes, recomputation within the
backward, the optimizer. Thread 1 is its communication: collectives that it waits for, those that
run beside the computation, transfers that it sends; what overlaps there moves on to thread 2.
Collectives of a pass are spread over its layers in truth, and shown together: what is hidden from
its begin on, what is waited for at its end.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import NamedTuple

from paraplan.files import write_atomically
from paraplan.plan_file import Plan, load_plan
from paraplan.plan_parts import Stage
from paraplan.report import order_by_replay, ranking_lines, replay_lines
from paraplan.simulate import Played, Replay, StageSeconds, replay
from paraplan.tables import rows_to_csv

MOST_PASSES = 400_000
"""Passes replayed for a picture; longer steps are cut to the micro-batches that stay below it."""

COMPUTE, COMMUNICATION = 0, 1


class Slice(NamedTuple):
    """Something that a pipeline rank does.

    Attributes:
        kind: ``forward``, ``backward``, ``recompute``, ``collectives`` (waited for),
            ``overlapped`` (collectives beside the computation), ``transfer``, ``exchange`` or
            ``optimizer``.
        stage, micro_batch: -1 for what is done once a step.
        start, seconds: since the step began.
    """

    rank: int
    kind: str
    stage: int
    micro_batch: int
    start: float
    seconds: float


class Simulated(NamedTuple):
    """A plan's replayed step.

    Attributes:
        micro_batches: that were replayed; fewer than the plan's if those were too many.
    """

    replay: Replay
    micro_batches: int


def simulate_plan(plan: Plan, *, most_passes: int = MOST_PASSES) -> Simulated:
    """Replay a plan's step; of a very long one the first whole rounds only."""
    layout = plan.layout
    pipeline, count = layout.pipeline, layout.micro_batches
    if 2 * count * len(plan.stages) > most_passes:
        rounds = most_passes // (2 * len(plan.stages) * pipeline)
        count = min(count, max(1, rounds) * pipeline)
    done = replay(
        [
            StageSeconds(s.forward_seconds, s.backward_seconds, s.transfer_seconds)
            for s in plan.stages
        ],
        pipeline=pipeline,
        micro_batches=count,
        tails=[s.step_exchange_seconds + s.optimizer_seconds for s in plan.stages[:pipeline]],
    )
    return Simulated(done, count)


def slices(plan: Plan, done: Replay) -> Iterator[Slice]:
    """Everything that the ranks did, rank by rank."""
    for rank, passes in enumerate(done.ranks):
        last = max(played.work.micro_batch for played in passes)
        for played in passes:
            yield from _pass_slices(rank, played, plan.stages)
            yield _overlapped_slice(rank, played, plan.stages[played.work.stage], last)
        stage, end = plan.stages[rank], passes[-1].end
        exchange = stage.step_exchange_seconds
        yield Slice(rank, "exchange", -1, -1, end, exchange)
        yield Slice(rank, "optimizer", -1, -1, end + exchange, stage.optimizer_seconds)


def _pass_slices(rank: int, played: Played, stages: tuple[Stage, ...]) -> Iterator[Slice]:
    (index, micro_batch, backward), start, end, sent = played
    stage = stages[index]
    exchange = stage.backward_exchange_seconds if backward else stage.forward_exchange_seconds
    computed = end - start - exchange
    kind = "backward" if backward else "forward"
    yield Slice(rank, kind, index, micro_batch, start, computed)
    if backward:
        yield Slice(rank, "recompute", index, micro_batch, start, stage.recompute_seconds)
    yield Slice(rank, "collectives", index, micro_batch, start + computed, exchange)
    if sent is not None:
        seconds = stages[index - 1 if backward else index].transfer_seconds
        yield Slice(rank, "transfer", index, micro_batch, sent, seconds)


def _overlapped_slice(rank: int, played: Played, stage: Stage, last: int) -> Slice:
    """The data ranks' collectives beside a pass, those of once a step included where they fall."""
    _, micro_batch, backward = played.work
    if backward:
        once = stage.last_overlapped_seconds if micro_batch == last else 0.0
        seconds = stage.backward_overlapped_seconds + once
    else:
        once = stage.first_overlapped_seconds if micro_batch == 0 else 0.0
        seconds = stage.forward_overlapped_seconds + once
    return Slice(rank, "overlapped", stage.index, micro_batch, played.start, seconds)


TITLES = {
    "forward": "forward {micro_batch}",
    "backward": "backward {micro_batch}",
    "recompute": "recompute {micro_batch}",
    "collectives": "collectives of {micro_batch}",
    "overlapped": "collectives beside {micro_batch}",
    "transfer": "send {micro_batch}",
    "exchange": "gradient exchange",
    "optimizer": "optimizer",
}
COMPUTES = ("forward", "backward", "recompute", "optimizer")


def trace_events(plan: Plan, done: Replay) -> list[dict[str, object]]:
    """The events of the Chrome trace format: ``X`` (complete) and ``M`` (names), microseconds."""
    events: list[dict[str, object]] = []
    lanes: dict[int, list[float]] = {rank: [] for rank in range(plan.layout.pipeline)}
    made = (one for one in slices(plan, done) if one.seconds > 0)
    # By start, the longer first, so that recomputation nests within its backward pass.
    for one in sorted(made, key=lambda s: (s.rank, s.start, -s.seconds)):
        thread = COMPUTE
        if one.kind not in COMPUTES:
            thread = COMMUNICATION + _free_lane(lanes[one.rank], one)
        event: dict[str, object] = {
            "name": TITLES[one.kind].format(micro_batch=one.micro_batch),
            "cat": one.kind,
            "ph": "X",
            "pid": one.rank,
            "tid": thread,
            "ts": _microseconds(one.start),
            "dur": round(_microseconds(one.start + one.seconds) - _microseconds(one.start), 3),
        }
        if one.micro_batch >= 0:
            event["args"] = {"stage": one.stage, "micro_batch": one.micro_batch}
        events.append(event)
    return [*_names(plan, lanes), *events]


def _microseconds(seconds: float) -> float:
    """To a nanosecond; ends are rounded like starts, so that slices still touch."""
    return round(seconds * 1e6, 3)


def _free_lane(ends: list[float], one: Slice) -> int:
    """The first lane on which nothing is going on; events of one thread must not overlap."""
    slack = 1e-12
    for lane, end in enumerate(ends):
        if end <= one.start + slack:
            ends[lane] = one.start + one.seconds
            return lane
    ends.append(one.start + one.seconds)
    return len(ends) - 1


def _names(plan: Plan, lanes: dict[int, list[float]]) -> Iterator[dict[str, object]]:
    per_rank = plan.layout.devices // plan.layout.pipeline
    for rank in range(plan.layout.pipeline):
        held = [s for s in plan.stages if s.pipeline_rank == rank]
        first = rank * per_rank
        devices = f"device {first}" if per_rank == 1 else f"devices {first}-{first + per_rank - 1}"
        layers = sum(stage.layers for stage in held)
        title = f"pipeline rank {rank}: {layers} layers, {devices}"
        yield _name("process_name", rank, 0, title)
        yield _name("thread_name", rank, COMPUTE, "compute")
        for lane in range(max(1, len(lanes[rank]))):
            title = "communication" if lane == 0 else f"communication ({lane + 1})"
            yield _name("thread_name", rank, COMMUNICATION + lane, title)


def _name(what: str, pid: int, tid: int, name: str) -> dict[str, object]:
    return {"name": what, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}


def trace_json(plan: Plan, simulated: Simulated) -> str:
    """The trace file: one event a line."""
    events = trace_events(plan, simulated.replay)
    rows = ",\n".join(json.dumps(event) for event in events)
    about = {
        "model": plan.model.name,
        "devices": plan.cluster.devices,
        "device": plan.cluster.device,
        "micro_batches": simulated.micro_batches,
        "of_micro_batches": plan.layout.micro_batches,
        "simulated_seconds": simulated.replay.step_seconds,
        "closed_form_seconds": plan.prediction.step_seconds,
    }
    head = f'"displayTimeUnit": "ms",\n"otherData": {json.dumps(about)}'
    return f'{{{head},\n"traceEvents": [\n{rows}\n]}}\n'


def comparison(plan: Plan) -> dict[str, object]:
    """The replay against the closed form, for the plan and the layouts next to it.

    ``order`` lists them by replayed time: 0 is the plan, 1 the first runner-up.
    """
    seen = plan.prediction
    pairs = [(plan.layout, seen.step_seconds, seen.simulated_seconds)]
    pairs += [(o.layout, o.step_seconds, o.simulated_seconds) for o in plan.runner_ups]
    rows = [
        {
            "layout": layout.model_dump(),
            "closed_form_seconds": closed,
            "simulated_seconds": simulated,
            "difference": None if simulated is None else simulated / closed - 1,
        }
        for layout, closed, simulated in pairs
    ]
    return {"layouts": rows, "order": order_by_replay(plan)}


def comparison_lines(plan: Plan) -> list[str]:
    """`comparison` for people: the best few as the replay ranks them."""
    return [*ranking_lines(plan), *replay_lines(plan)]


def add_timeline_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``plan timeline``."""
    parser.add_argument("plan", metavar="PLAN", help="a plan file")
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="where to write the trace (- for stdout)"
    )
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON")
    parser.add_argument("--csv", action="store_true", help="print what each rank does as CSV")


def run_timeline(options: argparse.Namespace) -> int:
    """``plan timeline``: write the trace, print how replay and closed form compare.

    Raises:
        InputError: the plan cannot be read, or the trace not written.
    """
    plan = load_plan(options.plan)
    simulated = simulate_plan(plan)
    if simulated.micro_batches < plan.layout.micro_batches:
        print(
            f"note: the trace shows the first {simulated.micro_batches:,} of "
            f"{plan.layout.micro_batches:,} micro-batches",
            file=sys.stderr,
        )
    if options.output == "-":
        sys.stdout.write(trace_json(plan, simulated))
        return 0
    if options.output is not None:
        write_atomically(options.output, trace_json(plan, simulated))
    if options.csv:
        rows = (one._asdict() for one in slices(plan, simulated.replay) if one.seconds > 0)
        sys.stdout.write(rows_to_csv(rows))
        return 0
    if options.json:
        print(json.dumps(comparison(plan)))
        return 0
    print("\n".join(comparison_lines(plan)))
    if options.output is not None:
        print(f"wrote {options.output} (open it at https://ui.perfetto.dev or chrome://tracing)")
    return 0
