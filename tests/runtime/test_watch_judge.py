"""When a job is ended, for whose sake, and when it must not be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paraplan_runtime.watch_judge import (
    GONE_SECONDS,
    SLOWEST_STEPS,
    Report,
    Seen,
    Verdict,
    judge,
)

NOW = 1000.0
HANG = 20.0


def seen(**values: object) -> Seen:
    """A rank that has just reported."""
    return Seen(replace(Report(place="stage 1", steps=7), **values), NOW)  # type: ignore[arg-type]


def verdict(*ranks: Seen, hang_seconds: float | None = HANG) -> Verdict | None:
    return judge(dict(enumerate(ranks)), NOW, world=len(ranks), hang_seconds=hang_seconds)


def waiting(seconds: float, **values: object) -> Seen:
    return seen(waits=True, idle_seconds=seconds, **values)


@pytest.mark.parametrize(
    "ranks",
    [
        (seen(), seen()),
        # Another rank computes for an hour: an evaluation, a file, a slow loader.
        (waiting(3600.0), seen(idle_seconds=0.5)),
        # All stand still, none in an exchange: slow data on all alike.
        (seen(idle_seconds=3600.0), seen(idle_seconds=3600.0)),
        # A rank has ended, another goes on alone.
        (seen(ended=True), seen(idle_seconds=3600.0)),
        (seen(), replace(seen(ended=True), lost=True)),
        # One died, and nobody needs it yet; or two still finish an exchange without it.
        (seen(idle_seconds=3600.0), replace(seen(), lost=True)),
        (waiting(GONE_SECONDS), seen(), replace(seen(ended=True), lost=True)),
        # A slow machine: the slowest of the latest steps took half as long.
        (waiting(HANG * 2, slowest_step_seconds=HANG), waiting(HANG * 2)),
        # An error that may only be an echo waits for its cause.
        (seen(error="RuntimeError: closed", echo=True), seen()),
        # Caught by the script, on all ranks alike.
        (seen(raised="ValueError: bad batch"), seen(raised="ValueError: bad batch")),
    ],
)
def test_the_job_goes_on(ranks: tuple[Seen, ...]) -> None:
    assert verdict(*ranks) is None


def test_the_first_error_is_the_cause() -> None:
    first = replace(seen(error="KeyError: 'text'"), first_error=NOW - 1)
    second = replace(seen(error="ValueError: late"), first_error=NOW)
    echo = replace(seen(error="RuntimeError: closed", echo=True), first_error=NOW - 3)
    assert verdict(echo, second, first) == Verdict(2, "rank 2, stage 1: KeyError: 'text'")


def test_an_echo_without_a_cause_is_told_after_a_while() -> None:
    echo = replace(seen(error="RuntimeError: closed", echo=True), first_error=NOW - GONE_SECONDS)
    assert verdict(seen(), echo) == Verdict(1, "rank 1, stage 1: RuntimeError: closed")


def test_a_dead_rank_is_the_cause_of_what_its_peers_raise() -> None:
    echo = seen(error="RuntimeError: Connection reset by peer", echo=True)
    got = verdict(echo, replace(seen(), lost=True))
    assert got is not None and got.rank == 1 and got.mute
    assert got.text.startswith("rank 1, stage 1: its process died")


@pytest.mark.parametrize("gone", [replace(seen(), lost=True), seen(ended=True)])
def test_ranks_that_wait_for_one_that_is_gone_end(gone: Seen) -> None:
    assert verdict(waiting(GONE_SECONDS - 1), gone) is None
    got = verdict(waiting(GONE_SECONDS), gone)
    assert got is not None and got.rank == 1 and got.mute
    assert got.text.endswith("in step 7; rank 0 waits for it")


def test_an_exception_of_the_step_explains_an_early_end() -> None:
    got = verdict(waiting(GONE_SECONDS), seen(ended=True, raised="TypeError: no"))
    assert got is not None
    assert got.text.startswith("rank 1, stage 1: TypeError: no, then its script ended")


def test_a_hang_is_blamed_on_the_rank_that_does_not_wait() -> None:
    stuck = seen(idle_seconds=HANG, where="train.py:31 in forward")
    got = verdict(waiting(HANG), stuck, waiting(HANG))
    assert got == Verdict(
        1,
        "rank 1, stage 1: hangs: nothing moves for 20 s in step 7, at train.py:31 in forward; "
        "rank 0 waits in step 7",
    )
    assert verdict(waiting(HANG), stuck, hang_seconds=None) is None
    assert verdict(waiting(HANG), seen(idle_seconds=HANG - 1)) is None


def test_exchanges_that_do_not_match_are_a_hang_of_the_rank_that_is_behind() -> None:
    got = verdict(waiting(HANG), waiting(HANG, steps=6))
    assert got is not None and got.rank == 1


def test_a_slow_job_is_given_longer() -> None:
    slow = {"slowest_step_seconds": 30.0}
    assert verdict(waiting(SLOWEST_STEPS * 30 - 1, **slow), waiting(SLOWEST_STEPS * 30)) is None
    assert verdict(waiting(SLOWEST_STEPS * 30, **slow), waiting(SLOWEST_STEPS * 30)) is not None


def test_a_stopped_process_is_named_and_can_be_ended() -> None:
    silent = replace(seen(machine="here", process=42), at=NOW - HANG)
    got = verdict(waiting(HANG), silent)
    assert got is not None and got.mute and (got.machine, got.process) == ("here", 42)
    assert "no sign of life for 20 s" in got.text


def test_a_rank_that_never_connected_is_not_taken_for_a_hang() -> None:
    assert judge({0: waiting(HANG)}, NOW, world=2, hang_seconds=HANG) is None
