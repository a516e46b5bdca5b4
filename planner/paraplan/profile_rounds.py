"""The rounds of measuring: in which order, what is kept when interrupted, what they tell together.

Tasks are measured again and again, so that what disturbs the machine for some seconds disturbs one
of a task's timings.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from statistics import fmean, median
from typing import Any

from paraplan.files import write_atomically
from paraplan.profile_result import Seconds
from paraplan.profile_tasks import HostTask, LayerTask, LinkTask, RateTask

SAVE_SECONDS = 2.0


def schedule_of(tasks: Sequence[Any], rounds: int, often: int) -> list[Any]:
    """The order of all timings: in each round every task once, and whole layers ``often``.

    What layers lose to a machine that is slow at times is part of every step, so that they are
    spread over the whole time; and each time another comes first, so that none always finds the
    caches as single calls have left them.
    """
    layers = [task for task in tasks if isinstance(task, LayerTask)]
    others = [task for task in tasks if not isinstance(task, LayerTask)]
    part = -(-len(others) // often)
    parts = [others[i * part : (i + 1) * part] for i in range(often)]
    turns = [layers[i:] + layers[:i] for i in range(len(layers))] or [[]]
    slots = zip(rounds * parts, cycle(turns))
    return [task for each, turn in slots for task in (*each, *turn)]


def still_missing(
    schedule: Sequence[Any], known: Counter[str], key_of: Callable[[Any], str]
) -> list[Any]:
    """What of the schedule is still to do."""
    left = []
    for task in schedule:
        key = key_of(task)
        if known[key]:
            known[key] -= 1
        else:
            left.append(task)
    return left


def over_rounds(timings: Mapping[Any, Sequence[Sequence[float]]]) -> dict[Any, Seconds]:
    """What each task takes, and the larger of its spread between rounds and inside them.

    What else the machine does makes now this, now that timing longer, and of all steps of a
    training the mean. So of an op the fastest round counts; of whole layers, which set the level
    for all ops, the medians, longer by what all their means exceed them; of exchanges the mean;
    of rates and of the host's work, which nothing sets the level of, the median.
    """
    known = {}
    for task, rounds in timings.items():
        seconds, spreads, lags = zip(*rounds, strict=True)
        kind = type(task)
        middle: Callable[[Sequence[float]], float] = min
        if kind in (LayerTask, RateTask, HostTask):
            middle = median
        elif kind is LinkTask:
            middle = fmean
        found = Seconds(
            middle(seconds),
            max(median(spreads), (max(seconds) - min(seconds)) / median(seconds)),
            fmean(lags) if kind in (LayerTask, LinkTask) else median(lags),
        )
        known[task] = found
    for alone in (False, True):
        layers = [t for t in timings if isinstance(t, LayerTask) and t.alone == alone]
        if layers:
            means = sum(fmean(s for s, *_ in timings[t]) for t in layers)
            level = means / sum(known[t].seconds for t in layers)
            known |= {t: known[t]._replace(seconds=level * known[t].seconds) for t in layers}
    return known


class Kept:
    """What is measured so far, in a file that an interrupted run leaves behind."""

    def __init__(self, path: Path | None, fingerprint: str) -> None:
        self._path, self._fingerprint = path, fingerprint
        self._saved = time.monotonic()
        self.known: dict[str, list[tuple[float, ...]]] = {}
        if path is not None and path.is_file():
            with suppress(ValueError, OSError, AttributeError):
                content = json.loads(path.read_text())
                if content.get("fingerprint") == fingerprint:
                    self.known = {
                        key: [tuple(map(float, timing)) for timing in timings]
                        for key, timings in content["known"].items()
                    }

    def add(self, key: str, timing: tuple[float, ...]) -> None:
        """Keep one more timing of a task; write all every few seconds."""
        self.known.setdefault(key, []).append(tuple(timing))
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Write what is known."""
        self._saved = time.monotonic()
        if self._path is not None and self.known:
            content = {"fingerprint": self._fingerprint, "known": self.known}
            write_atomically(self._path, json.dumps(content))

    def forget(self) -> None:
        """All is measured: the file is no longer needed."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
