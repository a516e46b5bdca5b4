"""A rank that fails ends the job with a message; torch elastic restarts it where it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fault_script import FAILS_AT, STEPS
from parity_cases import build, compute_loss, make_batch

SCRIPT = Path(__file__).with_name("fault_script.py")
TIME_LIMIT_SECONDS = 120


def torchrun(folder: Path, failure: str, restarts: int) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        f"--max-restarts={restarts}",
        "--monitor-interval=0.2",
        str(SCRIPT),
        str(folder),
        failure,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=TIME_LIMIT_SECONDS, env=environment
    )


def uninterrupted() -> list[float]:
    model = build("llama").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-5)
    losses = []
    for step in range(STEPS):
        loss = compute_loss(model, make_batch(step), plain=False)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.matrix
def test_a_restarted_job_continues_where_it_was(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "exit", restarts=1)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "losses.json").read_text())
    assert result["first"] == FAILS_AT
    for got, want in zip(result["losses"], uninterrupted(), strict=True):
        assert abs(got - want) <= 1e-5 * abs(want)


@pytest.mark.matrix
def test_a_rank_that_raises_is_named_and_ends_the_job(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "raise", restarts=0)
    assert done.returncode != 0
    assert "rank 1, stage 1: TypeError: 'NoneType' object is not callable" in done.stderr
    assert not (tmp_path / "losses.json").exists()
