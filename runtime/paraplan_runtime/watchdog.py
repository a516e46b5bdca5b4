"""Ends the whole job, with one message, when a rank can no longer take part in it.

A thread of each rank watches the main thread and reports to rank 0 (``watch_link``), which
decides (``watch_judge``):

- **raised**: an exception nobody caught ends a rank. Its traceback and its line are printed there,
  once; the other ranks end without waiting for their exchange to time out.
- **gone**: a process died or its script ended, and all others have stood still for 5 s, one of
  them in an exchange. Ranks that need nothing from each other may end when they like.
- **hung**: all ranks have stood still for ``PARAPLAN_HANG_SECONDS`` (20; 0 switches this rule
  off) and for three of the slowest of the latest steps, one of them in an exchange. A rank moves as
  long as its main thread executes Python or uses the processor. So long steps, evaluation,
  checkpoints, compilation or slow data do not count, on one rank or on all; one blocking call of
  that length on one rank (a worker that never answers, a dead file system) does, once others
  wait for it.

On a GPU the processor proves nothing while kernels are pending (waiting for them keeps it
busy), so only Python counts then, and before the first step is complete a hang takes two minutes.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from types import TracebackType

import torch
import torch.distributed as dist

from paraplan.errors import InputError, PlanError
from paraplan_runtime.activity import Activity, exchanges
from paraplan_runtime.watch_judge import GONE_SECONDS, Report, Verdict
from paraplan_runtime.watch_link import Hub, Spoke, machine_name

HANG_SECONDS = 20.0
END_SECONDS = 10
"""What the interpreter may take to end after an exception, before the kernel ends the process."""

_log = logging.getLogger("paraplan")


@dataclass(frozen=True)
class _Failure:
    text: str
    echo: bool


class Watchdog:
    """Watches this process, as a rank of a job; made by ``watch_over``.

    Args:
        device: where this rank computes.
        link: its connection to the other ranks, or None: then nothing is watched.
        rank: this rank.
    """

    def __init__(self, device: torch.device, link: Hub | Spoke | None, rank: int) -> None:
        self._activity = Activity(device)
        self._link = link
        self._rank = rank
        self._process = os.getpid()
        self._place = ""
        self._memory_hint: str | None = None
        self._raised: BaseException | None = None
        self._failure: _Failure | None = None
        self._ended = threading.Event()
        self._verdict: Verdict | None = None
        self._decided = threading.Event()
        self._machine = machine_name()
        if link is None:
            return
        self._previous_hook = sys.excepthook
        sys.excepthook = self._uncaught
        atexit.register(self._end)
        os.register_at_fork(after_in_child=link.close)
        self._thread = threading.Thread(target=self._watch, name="paraplan-watchdog", daemon=True)
        self._thread.start()

    def describe(self, place: str, memory_hint: str) -> None:
        """Say what this rank holds, for messages.

        Args:
            place: as ``stage 1``.
            memory_hint: what to do when its memory does not suffice.
        """
        self._place = place
        self._memory_hint = memory_hint
        if isinstance(self._link, Spoke):
            self._link.tell(self._report())

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around each step of the model."""
        self._raised = None
        self._activity.begin()
        try:
            yield
        except BaseException as error:
            self._raised = error
            raise
        finally:
            self._activity.end()

    def _report(self) -> Report:
        idle = self._activity.look()
        failure, raised = self._failure, self._raised
        return Report(
            place=self._place,
            steps=self._activity.steps,
            slowest_step_seconds=self._activity.slowest_step_seconds,
            idle_seconds=idle,
            waits=self._activity.waits and failure is None,
            where=self._activity.where,
            raised="" if raised is None else one_line(raised),
            error="" if failure is None else failure.text,
            echo=failure is not None and failure.echo,
            ended=self._ended.is_set(),
            machine=self._machine,
            process=self._process,
        )

    def _watch(self) -> None:
        link = self._link
        if link is None:
            return
        verdict = None
        while verdict is None:
            said_end = self._ended.is_set()
            verdict = link.turn(self._report)
            if said_end and verdict is None and not link.others_run:
                return
        self._verdict = verdict
        self._decided.set()
        if verdict.rank != self._rank or self._failure is None:
            self._end_because_of(verdict, link)
        # Else the main thread prints its traceback and ends.

    def _end_because_of(self, verdict: Verdict, link: Hub | Spoke) -> None:
        if verdict.process and verdict.machine == self._machine:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(verdict.process, signal.SIGKILL)
        if self._speaks_for(verdict):
            print(verdict.text, file=sys.stderr, flush=True)
            _tell_launcher(verdict.text)
        else:
            # A launcher stops all ranks once one has ended: the one that speaks goes first.
            speaker = 0 if self._rank else verdict.rank
            deadline = time.monotonic() + GONE_SECONDS
            while time.monotonic() < deadline and not link.seen[speaker].lost:
                link.turn(self._report)
        _flush_output()
        os._exit(1)

    def _speaks_for(self, verdict: Verdict) -> bool:
        if not verdict.mute:
            return verdict.rank == self._rank
        if verdict.rank:
            return self._rank == 0
        return self._rank == 1 or os.environ.get("LOCAL_RANK") == "0"

    def _uncaught(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        """Print an exception that ends the script, unless it only follows from another rank's."""
        if os.getpid() != self._process or not isinstance(error, Exception):
            self._previous_hook(kind, error, trace)
            return
        hint = self._hint(error)
        self._failure = _Failure(one_line(error), is_echo(error))
        self._decided.wait(3 * GONE_SECONDS)
        verdict = self._verdict
        if verdict is not None and verdict.rank != self._rank:
            time.sleep(3 * GONE_SECONDS)  # the watching thread ends the process
        self._previous_hook(kind, error, trace)
        place = f", {self._place}" if self._place else ""
        lines = [f"rank {self._rank}{place}: {self._failure.text}"]
        if hint is not None:
            lines.append(f"hint: {hint}")
        print("\n".join(lines), file=sys.stderr, flush=True)
        _tell_launcher("\n".join(lines))
        # Ending must not wait for ranks that are no longer there.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(END_SECONDS)

    def _hint(self, error: BaseException) -> str | None:
        cause = root_cause(error)
        if isinstance(cause, PlanError):
            return cause.hint
        return self._memory_hint if is_out_of_memory(cause) else None

    def _end(self) -> None:
        """Tell the others that the script has ended; rank 0 stays as long as others need it."""
        if os.getpid() == self._process and self._failure is None:
            self._ended.set()
            self._thread.join()


@cache
def watch_over(device: torch.device) -> Watchdog:
    """This process's watchdog; the first call starts it, on every rank of the job.

    Args:
        device: where this rank computes.

    Raises:
        InputError: ``PARAPLAN_HANG_SECONDS`` is not a number.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    link: Hub | Spoke | None = None
    if world > 1 and dist.get_backend() != "fake":
        seconds = hang_seconds()
        store = dist.distributed_c10d._get_default_store()
        try:
            if rank == 0:
                link = Hub(store, world=world, hang_seconds=seconds)
            else:
                link = Spoke(store, rank, hang_seconds=seconds)
        except OSError as error:
            _log.warning("rank %d cannot watch for failures of other ranks: %s", rank, error)
    return Watchdog(device, link, rank)


def hang_seconds() -> float | None:
    """``PARAPLAN_HANG_SECONDS``; None when hangs shall not end the job."""
    text = os.environ.get("PARAPLAN_HANG_SECONDS", "")
    try:
        seconds = float(text) if text else HANG_SECONDS
    except ValueError:
        raise InputError(
            f"PARAPLAN_HANG_SECONDS is {text!r}", hint="give seconds, or 0 to switch it off"
        ) from None
    return seconds if seconds > 0 else None


def root_cause(error: BaseException) -> BaseException:
    """The exception that started it: torch's schedules wrap it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def one_line(error: BaseException) -> str:
    """Type and first line of the exception that started it."""
    cause = root_cause(error)
    return f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[0]}"


def is_echo(error: BaseException) -> bool:
    """Whether it arose in an exchange, so that another rank's failure may be the reason."""
    cause = root_cause(error)
    frames = [frame for frame, _ in traceback.walk_tb(cause.__traceback__)]
    return isinstance(cause, dist.DistError) or bool(frames and exchanges(frames[-1]))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # The CPU's allocator raises a plain RuntimeError.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _flush_output() -> None:
    """Flush what the script has printed, unless its main thread holds the stream."""

    def flush() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()

    thread = threading.Thread(target=flush, daemon=True)
    thread.start()
    thread.join(1.0)


def _tell_launcher(message: str) -> None:
    """Write the file from which torch elastic's agent takes what it says of this rank."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and not os.path.exists(path):
        content = {"message": message, "timestamp": int(time.time())}
        with suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump(content, file)
