"""`plan timeline`: the trace is what the replay did, in a form that Perfetto reads."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from made_plans import made_plan

from paraplan.cli import main
from paraplan.plan_file import Plan, save_plan
from paraplan.report import replay_lines
from paraplan.request import make_constraints, parse_fix
from paraplan.timeline import comparison, simulate_plan, trace_json

KINDS: list[dict[str, object]] = [
    {},
    {"pipeline": 4, "virtual_stages": 1},
    {"pipeline": 2, "virtual_stages": 3},
    {"tensor": 2, "pipeline": 2},
]


def plan_of(fixed: dict[str, object]) -> Plan:
    """A plan with layout fields pinned; part of each backward is recomputation, and part of each
    pass has collectives of the data ranks beside it."""
    plan = made_plan(**fixed)
    stages = tuple(
        stage.model_copy(
            update={
                "recompute_seconds": stage.backward_seconds / 4,
                "forward_overlapped_seconds": stage.forward_seconds / 8,
                "backward_overlapped_seconds": stage.backward_seconds / 8,
                "first_overlapped_seconds": stage.forward_seconds / 3,
                "last_overlapped_seconds": stage.backward_seconds / 5,
            }
        )
        for stage in plan.stages
    )
    return plan.model_copy(update={"stages": stages})


def trace_of(plan: Plan) -> dict[str, Any]:
    trace: dict[str, Any] = json.loads(trace_json(plan, simulate_plan(plan)))
    return trace


@pytest.mark.parametrize("fixed", KINDS)
def test_events_do_not_overlap(fixed: dict[str, object]) -> None:
    """On one thread a slice begins after the one before it ends, or lies wholly within it."""
    lanes = defaultdict(list)
    for event in trace_of(plan_of(fixed))["traceEvents"]:
        assert event["ph"] in ("X", "M")
        if event["ph"] == "X":
            assert event["dur"] >= 0 and event["ts"] >= 0
            lanes[event["pid"], event["tid"]].append(event)
    assert {tid for _, tid in lanes} <= {0, 1, 2}
    for events in lanes.values():
        open_until: list[float] = []
        for before, event in pairwise([None, *events]):
            begin, end = event["ts"], event["ts"] + event["dur"]
            assert before is None or before["ts"] <= begin
            while open_until and open_until[-1] <= begin + 2e-3:  # rounded to nanoseconds
                open_until.pop()
            assert not open_until or end <= open_until[-1] + 2e-3
            open_until.append(end)


@pytest.mark.parametrize("fixed", KINDS)
def test_events_add_up(fixed: dict[str, object]) -> None:
    """Every pass of every stage and micro-batch is there, as long as the plan says."""
    plan = plan_of(fixed)
    trace = trace_of(plan)
    count = plan.layout.micro_batches
    seconds: dict[tuple[str, int], float] = defaultdict(float)
    numbers: dict[tuple[str, int], set[int]] = defaultdict(set)
    for event in trace["traceEvents"]:
        if event["ph"] == "X" and "args" in event:
            key = event["cat"], event["args"]["stage"]
            seconds[key] += event["dur"] / 1e6
            numbers[key].add(event["args"]["micro_batch"])
    for stage in plan.stages:
        i = stage.index
        assert numbers["forward", i] == numbers["backward", i] == set(range(count))
        parts = {
            "forward": stage.forward_seconds - stage.forward_exchange_seconds,
            "backward": stage.backward_seconds - stage.backward_exchange_seconds,
            "recompute": stage.recompute_seconds,
            "collectives": stage.forward_exchange_seconds + stage.backward_exchange_seconds,
        }
        for kind, each in parts.items():
            assert seconds[kind, i] == pytest.approx(count * each, rel=1e-4, abs=1e-8)
        each = stage.forward_overlapped_seconds + stage.backward_overlapped_seconds
        once = stage.first_overlapped_seconds + stage.last_overlapped_seconds
        assert seconds["overlapped", i] == pytest.approx(count * each + once, rel=1e-4)
    last = max(e["ts"] + e["dur"] for e in trace["traceEvents"] if e["ph"] == "X")
    assert last / 1e6 == pytest.approx(plan.prediction.simulated_seconds, rel=1e-6)
    assert trace["otherData"]["micro_batches"] == count


def test_threads_have_names() -> None:
    trace = trace_of(made_plan(pipeline=4, virtual_stages=1))
    names = [e for e in trace["traceEvents"] if e["ph"] == "M"]
    used = {(e["pid"], e["tid"]) for e in trace["traceEvents"] if e["ph"] == "X"}
    named = {(e["pid"], e["tid"]) for e in names if e["name"] == "thread_name"}
    assert used <= named
    titles = [e["args"]["name"] for e in names if e["name"] == "process_name"]
    assert len(titles) == 4 and titles[1].endswith("device 1")


def test_long_steps_are_cut_and_said_to_be() -> None:
    plan = made_plan(pipeline=2, virtual_stages=1, micro_batch_size=1)
    assert plan.layout.micro_batches > 4
    done = simulate_plan(plan, most_passes=20)
    assert done.micro_batches == 4
    assert json.loads(trace_json(plan, done))["otherData"]["micro_batches"] == 4


def test_the_order_by_replay_is_reported(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plan = made_plan(pipeline=2)
    assert len(plan.runner_ups) > 1
    first, *others = plan.runner_ups
    assert plan.prediction.simulated_seconds is not None
    faster = first.model_copy(update={"simulated_seconds": plan.prediction.simulated_seconds * 0.9})
    plan = plan.model_copy(update={"runner_ups": (faster, *others)})
    order = comparison(plan)["order"]
    assert order[0] == 1 and sorted(order) == list(range(1 + len(plan.runner_ups)))
    save_plan(plan, tmp_path / "p.json")
    assert main(["timeline", str(tmp_path / "p.json")]) == 0
    out = capsys.readouterr().out
    ranked = [line for line in out.splitlines() if line[:1].isdigit()]
    assert len(ranked) == 1 + len(plan.runner_ups)
    assert "the plan: " in ranked[1] and "the plan: " not in ranked[0]
    fix = out.partition("; to take it, add\n--fix ")[2]
    assert make_constraints(parse_fix(fix), ()).fixed.items() <= faster.layout.model_dump().items()


def test_a_lead_smaller_than_the_closed_forms_error_is_a_tie() -> None:
    plan = made_plan(pipeline=4, virtual_stages=1)
    seconds = plan.prediction.simulated_seconds
    assert seconds is not None
    first, *others = plan.runner_ups
    for lead, words in ((0.001, "no more than the closed form is off"), (0.003, "--fix")):
        near = first.model_copy(update={"simulated_seconds": seconds * (1 - lead)})
        lines = replay_lines(plan.model_copy(update={"runner_ups": (near, *others)}))
        assert words in " ".join(lines[1:])


def test_collectives_beside_a_pass_are_drawn() -> None:
    """A plan that shards parameters gathers them in each pass; the trace shows it."""
    plan = made_plan(data_shard=4, zero_stage=3)
    (stage,) = plan.stages
    assert stage.forward_overlapped_seconds > 0 and stage.backward_overlapped_seconds > 0
    assert stage.forward_overlapped_seconds <= stage.forward_seconds
    beside = [e for e in trace_of(plan)["traceEvents"] if e.get("cat") == "overlapped"]
    assert len(beside) == 2 * plan.layout.micro_batches
    assert {event["tid"] for event in beside} == {1}


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, target = str(tmp_path / "p.json"), tmp_path / "t.json"
    save_plan(made_plan(pipeline=4, virtual_stages=1), file)
    assert main(["timeline", file, "-o", str(target)]) == 0
    assert "wrote" in capsys.readouterr().out
    assert json.loads(target.read_text())["displayTimeUnit"] == "ms"
    assert main(["timeline", file, "-o", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["traceEvents"]
    assert main(["timeline", file, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["layouts"]
    assert abs(rows[0]["difference"]) < 0.05
    assert main(["timeline", str(tmp_path / "none.json"), "-o", "x"]) == 2
    assert main(["timeline", file, "-o", str(tmp_path / "no" / "t.json")]) == 2
    assert "cannot write" in capsys.readouterr().err
