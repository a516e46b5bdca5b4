"""What the runtime says it will do and did."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch.distributed as dist
from parity_cases import build, make_batch, make_plan

from paraplan.layout import Layout
from paraplan_runtime import parallelize
from paraplan_runtime.report import WARM_UP_STEPS, ParallelReport


@pytest.fixture
def no_group_left() -> Iterator[None]:
    yield
    dist.destroy_process_group()


def test_tables_before_and_after_the_first_steps(
    no_group_left: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "paraplan")
    plan = make_plan("llama", Layout(micro_batch_size=4, micro_batches=2))
    model = parallelize(build("llama"), plan, device_type="cpu")
    (start,) = caplog.messages
    assert start.splitlines()[0] == "mesh: one device"
    assert "2 micro-batches of 4 on each data rank" in start
    assert start.splitlines()[-1].startswith("memory, stage 0 ")
    assert model.parallel_report().measured_step_seconds is None
    for step in range(2 * WARM_UP_STEPS + 1):
        model(**make_batch(step)).loss.backward()
    report = model.parallel_report()
    assert report.measured_steps == WARM_UP_STEPS
    assert report.measured_step_seconds is not None and report.measured_step_seconds > 0
    # This process has torch in memory.
    assert 2**27 < report.measured_memory_bytes < 2**37
    table = caplog.messages[1].splitlines()
    assert table[0] == "after 6 steps:"
    assert [line.split()[0] for line in table[2:4]] == ["step", "memory,"]
    assert table[2].count(" s") >= 2


def test_the_report_of_a_rank_reads_as_a_table() -> None:
    report = ParallelReport(
        mesh={"pipeline": 2, "data_replicate": 1, "data_shard": 4, "tensor": 1},
        stages=(0, 2),
        predicted_step_seconds=0.5,
        measured_step_seconds=0.55,
        predicted_memory_bytes=2**30,
        measured_memory_bytes=2**30 * 5 // 4,
        measured_steps=3,
    )
    assert report.lines() == [
        "mesh: pipeline 2 x data_shard 4",
        "                               predicted    measured",
        "step                               0.5 s      0.55 s    +10%",
        "memory, stage 0, 2                 1 GiB    1.25 GiB    +25%",
    ]


def test_batches_of_another_size_are_not_timed(no_group_left: None) -> None:
    model = parallelize(build("llama"), make_plan("llama", Layout()), device_type="cpu")
    for step in range(WARM_UP_STEPS + 2):
        model(**make_batch(step, rows=3)).loss.backward()
    assert model.parallel_report().measured_steps == 0
