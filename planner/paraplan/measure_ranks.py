"""Starts one process for each device and lets them measure tasks together."""

from __future__ import annotations

import os
import platform
import signal
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.distributed import FileStore, PrefixStore, Store  # type: ignore[attr-defined]

from paraplan.cpu_ranks import available_cores, keep_freed_memory
from paraplan.errors import InputError
from paraplan.link_table import Shape
from paraplan.measure_calls import RecordedCall
from paraplan.measure_clock import Clock, Timing
from paraplan.measure_nodes import Meeting, connect
from paraplan.measure_ops import Bench, RandomPool, measure
from paraplan.measure_start import start_imports
from paraplan.profile_tasks import Task, link_groups

BATCH_SECONDS, CORE_SHARE_SECONDS = 0.004, 0.03
"""Shortest batches; where processes share cores they span many of the scheduler's turns of 3 to
4 ms, for which ``quick`` has no time."""

_END_SECONDS = 20.0


class Facts(NamedTuple):
    """What is known of a device without timing anything.

    Attributes:
        capacity_bytes, free_bytes: of one rank's memory.
        framework_bytes: held by a process that has done nothing yet but start the device.
    """

    device_name: str
    driver: str
    clocks: str
    capacity_bytes: int
    free_bytes: int
    framework_bytes: int
    multiprocessors: int


@dataclass(frozen=True, slots=True)
class RankSettings:
    """How the ranks measure."""

    kind: str
    ranks: int
    quick: bool
    threads: int
    nodes: int = 1

    @property
    def per_node(self) -> int:
        """Ranks of each machine."""
        return self.ranks // self.nodes


def shared(settings: RankSettings) -> bool:
    """Whether ranks share cores."""
    return settings.kind == "cpu" and settings.per_node * settings.threads > available_cores()


class _Place(NamedTuple):
    """Where a rank is, and where it meets the others.

    Attributes:
        local: its number on its machine.
        folder: for the ranks of one machine; with several there is an ``endpoint``.
    """

    local: int
    folder: str
    node: int = 0
    endpoint: tuple[str, int] | None = None
    interface: str | None = "lo"


Report = Callable[[str, Timing], None]
"""Called with a task's key and its timing as soon as there is one, each time it is measured."""

ROUNDS, QUICK_ROUNDS = 4, 2
"""All tasks are measured so often, one after the other, so that what disturbs the machine for some
seconds disturbs one of a task's timings, and not a whole corner of the grid. Quick ranks that
share cores have time for one round."""

BATCHES = 3
"""Of each round; 2 with ``quick``."""


def measure_on_ranks(
    tasks: Sequence[Task | RecordedCall],
    settings: RankSettings,
    report: Report,
    meeting: Meeting | None = None,
) -> Facts:
    """Measure the tasks on all devices at once, in their order; one may come several times.

    Args:
        meeting: with the other machines, which call this for the same tasks.

    Raises:
        InputError: a rank failed; with its own message.
    """
    # Ranks are forked from a process that has done the imports and nothing else.
    context = multiprocessing.get_context("forkserver")
    start_imports()
    here, there = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="paraplan-") as folder:
        places = [_Place(local, folder) for local in range(settings.per_node)]
        if meeting is not None:
            places = [
                place._replace(
                    node=meeting.node, endpoint=meeting.endpoint, interface=meeting.interface
                )
                for place in places
            ]
        processes = [
            context.Process(target=_rank, args=(place, settings, tuple(tasks), there), daemon=True)
            for place in places
        ]
        for process in processes:
            process.start()
        there.close()
        patience = 0.0  # after an error the ranks wait for each other: nothing is worth waiting for
        try:
            facts = _listen(here, report)
            patience = _END_SECONDS
        finally:
            for process in processes:
                process.join(patience)
                if process.is_alive():
                    process.kill()
                    process.join()
        return facts


def _listen(here: Connection, report: Report) -> Facts:
    facts: Facts | None = None
    while True:
        try:
            message = here.recv()
        except EOFError:
            raise InputError("a process that measures ended without saying why") from None
        if message == "done":
            assert facts is not None
            return facts
        if isinstance(message, Facts):
            facts = message
        elif isinstance(message, str):
            raise InputError(f"measuring failed: {message}")
        else:
            report(*message)


def key_of(task: Task | RecordedCall) -> str:
    """Names a task's result."""
    return repr(task)


def _rank(
    place: _Place,
    settings: RankSettings,
    tasks: tuple[Task | RecordedCall, ...],
    there: Connection,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the command, which ends the ranks
    try:
        bench = _join(place, settings)
        if place.local == 0:
            there.send(_facts(bench.device, settings.per_node))
        for task in tasks:
            timing = measure(task, bench)
            if place.local == 0:
                there.send((key_of(task), timing))
        bench.clock.wait_for_all()
        if place.local == 0:
            there.send("done")
    except Exception as error:
        there.send(f"{type(error).__name__}: {error}; {traceback.format_exc()[-600:]}")
        os._exit(1)  # the others wait in a collective: whoever reads the message ends them


def _join(place: _Place, settings: RankSettings) -> Bench:
    torch.set_num_threads(settings.threads)
    rank = place.node * settings.per_node + place.local
    torch.manual_seed(rank)
    device = torch.device("cuda", place.local) if settings.kind == "cuda" else torch.device("cpu")
    if settings.kind == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    agree = None
    links: dict[Shape, dist.ProcessGroup] = {}
    if settings.ranks > 1:
        if place.interface is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", place.interface)
        dist.init_process_group(
            "nccl" if settings.kind == "cuda" else "gloo",
            store=_store(place),
            rank=rank,
            world_size=settings.ranks,
            timeout=timedelta(seconds=120),
        )
        agree = dist.new_group(backend="gloo")
        shapes = link_groups(settings.ranks, settings.nodes)
        links = {shape: _group(rank, shape, settings) for shape in shapes}
    batches = BATCHES - settings.quick
    clock = Clock(device, BATCH_SECONDS, batches, agree)
    if shared(settings):
        cores = max(1, available_cores() // settings.threads)
        first = tuple(i for i in range(settings.ranks) if i % settings.per_node < cores)
        shortest = BATCH_SECONDS if settings.quick else CORE_SHARE_SECONDS
        clock = replace(clock, alone=first, shared_batch_seconds=shortest)
    return Bench(clock, RandomPool(device), links)


def _store(place: _Place) -> Store:
    if place.endpoint is None:
        return FileStore(f"{place.folder}/store")
    return PrefixStore("ranks", connect(place.endpoint))


def _group(rank: int, shape: Shape, settings: RankSettings) -> Any:
    """The group of that shape that this rank is in; all ranks make all groups."""
    size, each = shape
    per_node = settings.per_node
    nodes, each = (1, size) if each is None else (size // each, each)
    mine = None
    for node in range(0, settings.nodes, nodes):
        for first in range(0, per_node, each):
            members = [
                other * per_node + local
                for other in range(node, node + nodes)
                for local in range(first, first + each)
            ]
            group = dist.new_group(members)
            mine = group if rank in members else mine
    return mine


def _facts(device: torch.device, ranks: int) -> Facts:
    if device.type == "cuda":
        return _gpu_facts(device)
    held = _status_bytes("/proc/self/status", "VmRSS")
    free = _status_bytes("/proc/meminfo", "MemAvailable")
    return Facts(
        device_name=_processor(),
        driver="none",
        clocks="not fixed",
        capacity_bytes=free // ranks + held,
        free_bytes=free // ranks,
        framework_bytes=held,
        multiprocessors=torch.get_num_threads(),
    )


def _gpu_facts(device: torch.device) -> Facts:
    torch.ones(1024, 1024, device=device).mm(torch.ones(1024, 1024, device=device))
    torch.cuda.synchronize(device)
    free, whole = torch.cuda.mem_get_info(device)
    properties: Any = torch.cuda.get_device_properties(device)
    try:
        clocks = f"{torch.cuda.clock_rate(device)} MHz while measured"
    except Exception as error:  # needs pynvml or amdsmi
        clocks = f"unknown ({type(error).__name__})"
    return Facts(
        device_name=properties.name,
        driver=f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}",
        clocks=clocks,
        capacity_bytes=whole,
        free_bytes=free,
        framework_bytes=whole - free - torch.cuda.memory_reserved(device),
        multiprocessors=properties.multi_processor_count,
    )


def _status_bytes(path: str, name: str) -> int:
    """A line ``Name:  123 kB`` of a file of /proc; 0 where there is none."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
