"""Decides from what the ranks last said whether the job can go on, and who is to blame if not.

Pure: reports in, verdict out. ``watchdog.py`` says when each rule applies, in words for users.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

GONE_SECONDS = 5.0
"""How long a rank may wait, without any activity, for one that is no longer there. Also how long
an error that may be the echo of another rank's waits for that one."""

SLOWEST_STEPS = 3.0
"""A hang takes longer than this many of the slowest of the latest steps."""


@dataclass(frozen=True)
class Report:
    """What a rank says about itself, twice a second.

    Attributes:
        place: the stages it holds, as ``stage 1``; empty before the plan is applied.
        steps: training and evaluation steps it has begun.
        slowest_step_seconds: of the latest ones.
        idle_seconds: for how long its main thread has neither moved on in Python nor computed.
        waits: whether the main thread stands in an exchange with other ranks.
        where: file, line and function it stands in.
        raised: the exception its last step ended with, in one line; the script may have caught it.
        error: the exception that is ending it, in one line.
        echo: whether that exception may come from another rank's failure (a lost connection).
        ended: whether its script has ended.
        machine: identifies the machine and process namespace; with ``process`` to end it by.
        process: its process id.
    """

    place: str = ""
    steps: int = 0
    slowest_step_seconds: float = 0.0
    idle_seconds: float = 0.0
    waits: bool = False
    where: str = ""
    raised: str = ""
    error: str = ""
    echo: bool = False
    ended: bool = False
    machine: str = ""
    process: int = 0


@dataclass(frozen=True)
class Seen:
    """A rank's last report.

    Attributes:
        at: when it arrived, on this machine's clock.
        first_error: when its error was first reported.
        lost: whether its connection has closed.
    """

    report: Report
    at: float
    first_error: float | None = None
    lost: bool = False

    @property
    def gone(self) -> bool:
        """Whether it will take part in no further exchange."""
        return self.lost or self.report.ended

    def idle(self, now: float) -> float:
        """Seconds without activity; a rank that is silent has shown none since."""
        return self.report.idle_seconds + (now - self.at)


@dataclass(frozen=True)
class Verdict:
    """The job ends, and why.

    Attributes:
        rank: the rank to blame.
        text: its line.
        mute: whether that rank cannot print the line itself.
        machine: of that rank, if its process is still there and does not answer.
        process: likewise.
    """

    rank: int
    text: str
    mute: bool = False
    machine: str = ""
    process: int = 0


def judge(
    seen: Mapping[int, Seen], now: float, *, world: int, hang_seconds: float | None
) -> Verdict | None:
    """The verdict on a job, or None as long as it may go on.

    Args:
        seen: by rank; a rank that has not reported yet is missing.
        world: number of ranks.
        hang_seconds: least time without activity that counts as a hang; None: none does.
    """
    return (
        _raised(seen)
        or _gone(seen, now)
        or _echoed(seen, now)
        or _hung(seen, now, world, hang_seconds)
    )


def _line(rank: int, seen: Seen, text: str) -> str:
    place = f", {seen.report.place}" if seen.report.place else ""
    return f"rank {rank}{place}: {text}"


def _raised(seen: Mapping[int, Seen]) -> Verdict | None:
    failed = [
        (one.first_error or 0.0, rank)
        for rank, one in seen.items()
        if one.report.error and not one.report.echo
    ]
    if not failed:
        return None
    _, rank = min(failed)
    return Verdict(rank, _line(rank, seen[rank], seen[rank].report.error))


def _gone(seen: Mapping[int, Seen], now: float) -> Verdict | None:
    gone = sorted((not one.lost, rank) for rank, one in seen.items() if one.gone)
    here = {rank: one for rank, one in seen.items() if not one.gone}
    echoes = [rank for rank, one in here.items() if one.report.error]
    still = all(one.idle(now) >= GONE_SECONDS for one in here.values())
    waiting = [rank for rank, one in here.items() if one.report.waits and still]
    if not gone or not (echoes or waiting):
        return None
    _, rank = gone[0]
    report = seen[rank].report
    how = (
        "its script ended"
        if report.ended
        else "its process died (killed, or by a crash outside of Python)"
    )
    text = f"{report.raised}, then {how}" if report.raised else how
    # What a process that died did after its last report is not known.
    text += (
        f" in step {report.steps}" if report.ended else f", last heard of in step {report.steps}"
    )
    if waiting:
        text += f"; rank {waiting[0]} waits for it"
    else:
        text += f"; rank {echoes[0]} lost its connection"
    # Rank 0 stays until the others have ended.
    return Verdict(rank, _line(rank, seen[rank], text), mute=rank != 0 or seen[rank].lost)


def _echoed(seen: Mapping[int, Seen], now: float) -> Verdict | None:
    failed = [
        (one.first_error, rank)
        for rank, one in seen.items()
        if one.report.error and one.first_error is not None
    ]
    if not failed:
        return None
    first, rank = min(failed)
    if now - first < GONE_SECONDS:
        return None
    return Verdict(rank, _line(rank, seen[rank], seen[rank].report.error))


def _hung(
    seen: Mapping[int, Seen], now: float, world: int, hang_seconds: float | None
) -> Verdict | None:
    here = {rank: one for rank, one in seen.items() if not one.gone}
    waiting = sorted(rank for rank, one in here.items() if one.report.waits)
    if hang_seconds is None or len(here) < world or not waiting:
        return None
    slowest = max(one.report.slowest_step_seconds for one in here.values())
    patience = max(hang_seconds, SLOWEST_STEPS * slowest)
    idle = min(one.idle(now) for one in here.values())
    if idle < patience:
        return None
    # To blame is one that does not wait for others: the most silent, then the furthest behind.
    silent = {rank for rank, one in here.items() if now - one.at >= GONE_SECONDS}
    rank = min(
        here,
        key=lambda r: (
            not here[r].report.raised,
            r not in silent,
            here[r].report.waits,
            here[r].report.steps,
            r,
        ),
    )
    line = _line(rank, here[rank], _hang_text(here, rank, rank in silent, idle, waiting))
    if rank not in silent:
        return Verdict(rank, line)
    report = here[rank].report
    return Verdict(rank, line, mute=True, machine=report.machine, process=report.process)


def _hang_text(
    here: Mapping[int, Seen], rank: int, silent: bool, idle: float, waiting: list[int]
) -> str:
    report = here[rank].report
    if report.raised:
        text = f"{report.raised}, then it hangs at {report.where}"
    elif silent:
        text = f"hangs: no sign of life for {idle:.0f} s (stopped, or its machine is gone)"
    else:
        text = f"hangs: nothing moves for {idle:.0f} s in step {report.steps}, at {report.where}"
    others = [other for other in waiting if other != rank]
    if others:
        text += f"; rank {others[0]} waits in step {here[others[0]].report.steps}"
    return text
