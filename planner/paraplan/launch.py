"""Starts the script again, one process for each device, through torch elastic, and waits.

Rank 0 writes to this process's own output. The other ranks write to files, which are shown only
when such a rank is what ended the job.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from paraplan.cpu_ranks import available_cores
from paraplan.surroundings import Devices

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

LAUNCHER = "PARAPLAN_LAUNCHER"
"""Set in ranks that this module started: the launcher's process id."""

_STOP_SECONDS = 5
"""Time that ranks get between the polite signal and the hard one."""

_SHOWN_LOG_LINES = 30


@dataclass(frozen=True)
class Nodes:
    """The machines of a job and where they meet; one machine needs no meeting point."""

    count: int = 1
    endpoint: str = "localhost:0"
    job: str = ""


def run_again_and_exit(devices: Devices) -> NoReturn:
    """Start this very script on each device, and end this process with its exit code.

    Nothing of the script after the calling line runs in this process: no ``finally``, no
    ``atexit``; both run in the ranks.
    """
    code = start_ranks(sys.orig_argv[1:], devices, Nodes())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def start_ranks(arguments: Sequence[str], devices: Devices, nodes: Nodes) -> int:
    """Run ``python ARGUMENTS`` on each device of this node until all end; the exit code."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.update(_environment_of_ranks(devices, os.environ))
    logs = log_folder()
    config = LaunchConfig(
        min_nodes=nodes.count,
        max_nodes=nodes.count,
        nproc_per_node=devices.count,
        run_id=nodes.job or uuid.uuid4().hex[:12],
        rdzv_backend="c10d",
        rdzv_endpoint=nodes.endpoint,
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=_logs(logs, devices.count),
        shutdown_timeout=_STOP_SECONDS,
    )
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        return _report(error.failures, logs)
    except SignalException as error:
        return 128 + error.sigval
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def log_folder() -> Path:
    """``$PARAPLAN_LOG_DIR``, else a new folder among the temporary files."""
    named = os.environ.get("PARAPLAN_LOG_DIR")
    if named:
        Path(named).mkdir(parents=True, exist_ok=True)
        return Path(named)
    return Path(tempfile.mkdtemp(prefix="paraplan-"))


def _environment_of_ranks(devices: Devices, environment: Mapping[str, str]) -> dict[str, str]:
    threads = max(1, available_cores() // devices.count)
    added = {LAUNCHER: str(os.getpid()), "PARAPLAN_DEVICES": f"{devices.kind}:{devices.count}"}
    if "OMP_NUM_THREADS" not in environment:
        added["OMP_NUM_THREADS"] = str(threads)
    return added


def _logs(folder: Path, count: int) -> DefaultLogsSpecs:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std

    others = dict.fromkeys(range(1, count), Std.ALL)
    return DefaultLogsSpecs(log_dir=str(folder), redirects=others | {0: Std.NONE})


def _report(failures: Mapping[int, ProcessFailure], logs: Path) -> int:
    """Say once what ended the job; the exit code is the script's.

    A rank that is killed makes the others fail in their exchanges, and so does one that raises,
    a moment later: signals come first, then the earliest exception. Ranks that ended by SIGTERM
    were told to, because of another.
    """

    def order(rank: int) -> tuple[bool, bool, bool, float]:
        failure = failures[rank]
        told = failure.exitcode == -signal.SIGTERM
        return told, failure.exitcode >= 0, not _traceback_of(failure), _failed_at(failure)

    rank = min(failures, key=order)
    failure = failures[rank]
    raised = _traceback_of(failure)
    if raised:
        print(raised, file=sys.stderr, end="")
    elif failure.exitcode < 0:
        print(f"error: rank {rank} was killed by {failure.signal_name()}", file=sys.stderr)
        _show_log(rank, failure, logs)
    elif rank != 0:
        _show_log(rank, failure, logs)
    return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode


def _details(failure: ProcessFailure) -> Mapping[str, object]:
    message = failure.error_file_data.get("message")
    details = message.get("extraInfo", {}) if isinstance(message, dict) else {}
    return details if isinstance(details, dict) else {}


def _failed_at(failure: ProcessFailure) -> float:
    return float(str(_details(failure).get("failed_at", failure.timestamp)))


def _traceback_of(failure: ProcessFailure) -> str:
    return str(_details(failure).get("py_callstack", ""))


def _show_log(rank: int, failure: ProcessFailure, logs: Path) -> None:
    """The last lines of what a rank other than 0 wrote to its standard error."""
    found = sorted(logs.glob(f"*/attempt_*/{failure.local_rank}/stderr.log"))
    if not found:
        return
    log = found[-1]
    lines = log.read_text(errors="replace").splitlines()[-_SHOWN_LOG_LINES:]
    print(f"the last lines of rank {rank} ({log}):", *lines, sep="\n", file=sys.stderr)


def write_error_file(text: str, failed_at: float) -> bool:
    """Leave a rank's traceback for the launcher that started it; False without such a launcher."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if LAUNCHER not in os.environ or not file:
        return False
    details = {"py_callstack": text, "timestamp": str(int(failed_at)), "failed_at": failed_at}
    message = {"message": text.strip().splitlines()[-1], "extraInfo": details}
    Path(file).write_text(json.dumps({"message": message}))
    return True
