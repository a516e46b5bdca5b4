"""The profiler's clock on several ranks."""

from __future__ import annotations

import pytest
from clock_work import timed
from rank_launch import run_ranks


def test_waiting_for_the_slowest_rank_is_known() -> None:
    first, second = run_ranks(2, timed)
    assert first == second
    assert first.seconds == pytest.approx(2e-3)
    assert first.lag == pytest.approx(0.5)
