"""The replayed step: its orders are torch's, its times those of an independent replay."""

from __future__ import annotations

import random
from itertools import pairwise
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from made_plans import made_plan
from test_pipeline import replay as oracle_seconds

from paraplan.pipeline import interleaved_seconds, one_f_one_b_seconds
from paraplan.simulate import Pass, StageSeconds, rank_passes, replay, simulated_seconds


def torch_one_f_one_b(pipeline: int, micro_batches: int) -> list[list[Pass]]:
    """What `Schedule1F1B` runs, rank by rank, on stages that only note what they are asked.

    (Its `_get_pipeline_order` is for display, and numbers the last rank's forwards from 1.)
    """
    from torch.distributed.pipelining import Schedule1F1B

    orders = []
    for rank in range(pipeline):
        stage = Mock(stage_index=rank)
        for message in ("fwd_recv", "fwd_send", "bwd_recv", "bwd_send"):
            getattr(stage, f"get_{message}_ops").return_value = []
        schedule = Mock(_num_stages=pipeline, _n_microbatches=micro_batches, _stage=stage)
        schedule._check_inputs.return_value = ([()] * micro_batches, [{}] * micro_batches)
        Schedule1F1B._step_microbatches(schedule)
        names = {"forward_one_chunk": False, "backward_one_chunk": True}
        orders.append(
            [
                Pass(rank, arguments[0], names[name])
                for name, arguments, _ in stage.mock_calls
                if name in names
            ]
        )
    return orders


def torch_interleaved(pipeline: int, micro_batches: int, virtual: int) -> list[list[Pass]]:
    """The lists that `ScheduleInterleaved1F1B` makes for itself when it is built."""
    from torch.distributed.pipelining import ScheduleInterleaved1F1B

    schedule = SimpleNamespace(
        n_local_stages=virtual,
        pp_group_size=pipeline,
        microbatches_per_round=micro_batches // max(1, micro_batches // pipeline),
        _n_microbatches=micro_batches,
    )
    kinds = {"FORWARD": False, "FULL_BACKWARD": True}
    return [
        [
            Pass(action.stage_index, action.microbatch_index, kinds[action.computation_type.name])
            for action in ScheduleInterleaved1F1B._calculate_single_rank_operations(
                schedule,  # type: ignore[arg-type]
                rank,
            )
            if action is not None
        ]
        for rank in range(pipeline)
    ]


@pytest.mark.parametrize("virtual", [1, 2, 3, 4])
@pytest.mark.parametrize("pipeline", [2, 3, 4, 8])
def test_orders_are_those_of_torch(pipeline: int, virtual: int) -> None:
    rounds = [1, 2, 3, 4, 7]
    counts = [pipeline * n for n in rounds] + [pipeline * n + n for n in rounds if n < pipeline]
    for micro_batches in counts:
        ours = [
            rank_passes(
                rank, pipeline=pipeline, micro_batches=micro_batches, virtual_stages=virtual
            )
            for rank in range(pipeline)
        ]
        if virtual == 1:
            assert ours == torch_one_f_one_b(pipeline, micro_batches)
        else:
            assert ours == torch_interleaved(pipeline, micro_batches, virtual)


def test_one_rank_does_each_backward_after_its_forward() -> None:
    order = rank_passes(0, pipeline=1, micro_batches=3)
    assert order == [Pass(0, k, backward) for k in range(3) for backward in (False, True)]


def test_against_the_oracle() -> None:
    """Random stages and transfers shorter than a pass: the same seconds to rounding."""
    rng = random.Random(4)
    for _ in range(300):
        p, m = rng.randint(1, 12), rng.randint(1, 40)
        stages = [
            StageSeconds(rng.uniform(0.5, 2), rng.uniform(1, 4), rng.uniform(0, 0.5))
            for _ in range(p)
        ]
        forward, backward, link = (list(values) for values in zip(*stages, strict=True))
        wanted = oracle_seconds(forward, backward, link, m)
        assert replay(stages, pipeline=p, micro_batches=m).step_seconds == pytest.approx(wanted)


@pytest.mark.parametrize(("p", "v", "m"), [(1, 1, 7), (2, 1, 2), (8, 1, 64), (4, 2, 8), (8, 4, 32)])
def test_closed_form_of_even_stages(p: int, v: int, m: int) -> None:
    """Even stages without transfers: within 1 % is wanted, they are equal."""
    done = replay([StageSeconds(1 / v, 2 / v, 0.0)] * (p * v), pipeline=p, micro_batches=m)
    closed = (
        one_f_one_b_seconds([1.0] * p, [2.0] * p, [0.0] * p, m)
        if v == 1
        else interleaved_seconds([3.0] * p, 0.0, m, v, contention=0.0)
    )
    assert done.step_seconds == pytest.approx(closed, rel=1e-9)


def test_closed_form_of_interleaved_transfers() -> None:
    """As long as a transfer hides behind a chunk, all that it costs is filling and draining."""
    for p, m, v in [(2, 4, 2), (4, 8, 4), (8, 16, 3), (4, 64, 4)]:
        for transfer in (0.01, 0.1, 0.9 / v):
            stages = [StageSeconds(1 / v, 2 / v, transfer)] * (p * v)
            seconds = replay(stages, pipeline=p, micro_batches=m).step_seconds
            closed = interleaved_seconds([3.0] * p, transfer, m, v, contention=0.0)
            assert seconds >= closed * (1 - 1e-9)
            assert seconds == pytest.approx(closed, rel=1e-9 if transfer * v < 0.4 else 0.1)


def test_a_link_carries_one_message_at_a_time() -> None:
    """A transfer longer than a stage's whole work sets the pace."""
    one = replay([StageSeconds(1.0, 1.0, 10.0)] * 2, pipeline=2, micro_batches=20).step_seconds
    more = replay([StageSeconds(1.0, 1.0, 10.0)] * 2, pipeline=2, micro_batches=40).step_seconds
    assert more - one >= 20 * 10.0


def test_laws_of_a_replay() -> None:
    rng = random.Random(5)
    for _ in range(60):
        p, v = rng.randint(2, 5), rng.randint(1, 3)
        m = p * rng.randint(1, 4)
        stages = [
            StageSeconds(rng.uniform(0.2, 2), rng.uniform(0.2, 4), rng.uniform(0, 0.6))
            for _ in range(p * v)
        ]
        tails = [rng.uniform(0, 1) for _ in range(p)]
        done = replay(stages, pipeline=p, micro_batches=m, tails=tails)
        ends = {played.work: played.end for rank in done.ranks for played in rank}
        assert len(ends) == 2 * p * v * m, "every pass is done once"
        for rank, passes in enumerate(done.ranks):
            for before, after in pairwise(passes):
                assert before.end <= after.start, "a rank does one thing at a time"
            assert passes[-1].end + tails[rank] <= done.step_seconds
            for work, start, _, _ in passes:
                for source in needs(work, p * v):
                    assert ends[source] <= start
        longer = [*stages]
        at = rng.randrange(p * v)
        longer[at] = longer[at]._replace(forward=longer[at].forward + 0.5)
        again = replay(longer, pipeline=p, micro_batches=m, tails=tails)
        assert again.step_seconds >= done.step_seconds - 1e-9


def needs(work: Pass, stages: int) -> list[Pass]:
    stage, micro_batch, backward = work
    if not backward:
        return [Pass(stage - 1, micro_batch, False)] if stage else []
    later = [Pass(stage + 1, micro_batch, True)] if stage + 1 < stages else []
    return [Pass(stage, micro_batch, False), *later]


def test_long_steps_are_continued() -> None:
    """Two short replays and the period between them, against the whole replay."""
    rng = random.Random(6)
    for _ in range(25):
        p, v = rng.randint(2, 6), rng.randint(1, 2)
        m = p * rng.randint(66, 90)
        stages = [
            StageSeconds(rng.uniform(0.7, 1.3), rng.uniform(1.4, 2.6), rng.uniform(0, 0.2))
            for _ in range(p * v)
        ]
        whole = replay(stages, pipeline=p, micro_batches=m).step_seconds
        short = simulated_seconds(stages, pipeline=p, micro_batches=m)
        assert short == pytest.approx(whole, rel=1e-3)


def test_512_ranks_of_64_micro_batches() -> None:
    """Each rank with its own passes; `benchmarks/replay_time.py` says how long it takes."""
    stages = [StageSeconds(1.0 + i % 3 / 10, 2.0, 0.05) for i in range(512)]
    done = replay(stages, pipeline=512, micro_batches=64)
    assert sum(map(len, done.ranks)) == 2 * 512 * 64
    forward, backward, link = (list(values) for values in zip(*stages, strict=True))
    assert done.step_seconds == pytest.approx(oracle_seconds(forward, backward, link, 64))


@pytest.mark.parametrize("fixed", [{}, {"pipeline": 4, "virtual_stages": 1}, {"tensor": 2}])
def test_plans_carry_their_replay(fixed: dict[str, object]) -> None:
    """The plan's stages are all that a replay needs: it gives the plan's figure again."""
    plan = made_plan(**fixed)
    stages = [
        StageSeconds(s.forward_seconds, s.backward_seconds, s.transfer_seconds) for s in plan.stages
    ]
    once = [s.step_exchange_seconds + s.optimizer_seconds for s in plan.stages]
    seconds = replay(
        stages,
        pipeline=plan.layout.pipeline,
        micro_batches=plan.layout.micro_batches,
        tails=once[: plan.layout.pipeline],
    ).step_seconds
    assert plan.prediction.simulated_seconds == pytest.approx(seconds, rel=1e-6)
    if plan.layout.pipeline == 1:
        assert plan.prediction.step_seconds == pytest.approx(seconds, rel=1e-6)
    for stage in plan.stages:
        assert stage.recompute_seconds + stage.backward_exchange_seconds <= stage.backward_seconds
        assert stage.forward_exchange_seconds <= stage.forward_seconds
