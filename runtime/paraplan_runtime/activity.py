"""What the main thread of this rank is doing, as another thread can see it."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from pathlib import Path
from types import FrameType

import torch

LATEST_STEPS = 8
"""Steps of which the slowest is reported."""

FIRST_STEP_SECONDS = 40.0
"""Taken for the slowest step on a GPU until one is complete: kernels are loaded and tuned."""

BUSY_SHARE = 0.02
"""Share of the time on a processor that counts as computing: a wait uses none."""

EXCHANGES = (
    os.path.join("torch", "distributed", ""),
    os.path.join("paraplan_runtime", "tied.py"),
)
"""Code in which a thread that stands still waits for other ranks."""

FILES = os.path.join("torch", "distributed", "checkpoint", "")
"""Among them, code that reads and writes files."""

DEBUGGERS = {"bdb.py", "cmd.py", "pdb.py", "pydevd.py"}


class Activity:
    """Follows the main thread; ``begin`` and ``end`` are called by it, ``look`` by the watcher.

    Args:
        device: where steps run; on a GPU they run on after ``end``.
    """

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._main = threading.main_thread().ident or 0
        self.steps = 0
        self._inside = False
        self._begun = 0.0
        self._durations: deque[float] = deque(maxlen=LATEST_STEPS)
        self._pending: torch.cuda.Event | None = None
        self._moved = time.monotonic()
        self._stack: tuple[tuple[int, int], ...] = ()
        self._used = 0.0
        self._looked = self._moved
        self.where = ""
        self.waits = False

    def begin(self) -> None:
        """A step begins."""
        self.steps += 1
        self._inside = True
        self._begun = time.monotonic()
        self._pending = None

    def end(self) -> None:
        """The host has done its part of the step."""
        self._inside = False
        if self._gpu:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._pending = event
        else:
            self._durations.append(time.monotonic() - self._begun)

    @property
    def slowest_step_seconds(self) -> float:
        """Of the latest steps."""
        return max(self._durations, default=FIRST_STEP_SECONDS if self._gpu else 0.0)

    def look(self) -> float:
        """Seconds since the main thread last moved; also brings the attributes up to date."""
        now = time.monotonic()
        event = self._pending
        if event is not None and event.query():  # type: ignore[no-untyped-call]
            self._pending = None
            self._durations.append(now - self._begun)
        frame = sys._current_frames().get(self._main)
        stack = _positions(frame)
        used = _processor_seconds(self._main)
        busy = used - self._used > BUSY_SHARE * (now - self._looked)
        exchanging = exchanges(frame)
        kernels = self._gpu and (self._inside or self._pending is not None or exchanging)
        self.waits = exchanging or (self._gpu and self._pending is not None)
        if stack != self._stack or (busy and not kernels) or _debugged(frame):
            self._moved = now
        self._stack, self._used, self._looked = stack, used, now
        self.where = _where(frame)
        return now - self._moved


def _positions(frame: FrameType | None) -> tuple[tuple[int, int], ...]:
    """Code and line of every frame, which tell whether the thread has moved."""
    positions = []
    while frame is not None:
        positions.append((id(frame.f_code), frame.f_lineno))
        frame = frame.f_back
    return tuple(positions)


def _processor_seconds(thread: int) -> float:
    if hasattr(time, "pthread_getcpuclockid"):
        return time.clock_gettime(time.pthread_getcpuclockid(thread))
    return time.process_time()  # macOS: of all threads


def exchanges(frame: FrameType | None) -> bool:
    """Whether a thread whose innermost frame this is takes part in an exchange with ranks."""
    name = "" if frame is None else frame.f_code.co_filename
    return any(part in name for part in EXCHANGES) and FILES not in name


def _debugged(frame: FrameType | None) -> bool:
    while frame is not None:
        if Path(frame.f_code.co_filename).name in DEBUGGERS:
            return True
        frame = frame.f_back
    return False


def _where(frame: FrameType | None) -> str:
    """Where the thread stands: in the innermost code that is not of an installed package."""
    own = frame
    while own is not None and _is_library(own.f_code.co_filename):
        own = own.f_back
    shown = own or frame
    if shown is None:
        return ""
    return f"{shown.f_code.co_filename}:{shown.f_lineno} in {shown.f_code.co_name}"


def _is_library(file: str) -> bool:
    return (
        "site-packages" in file
        or file.startswith((sys.prefix, sys.base_prefix, "<"))
        or os.path.dirname(os.path.abspath(__file__)) in file
    )
