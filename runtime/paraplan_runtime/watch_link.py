"""Carries the reports of all ranks to rank 0 and its verdict back, over sockets of their own.

Not through the process groups, whose calls block, nor the store, which does not notice that a
process died: the kernel closes a dead process's sockets at once, whoever launched it. Messages
are JSON lines; the first one of a connection carries a token from the job's store.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from torch.distributed.distributed_c10d import Store

from paraplan_runtime.watch_judge import GONE_SECONDS, Report, Seen, Verdict, judge

PERIOD_SECONDS = 0.5
"""Between two reports of a rank."""

CONNECT_SECONDS = 10.0
LARGEST_MESSAGE_BYTES = 1 << 16
_KEY = "paraplan/watchdog"


def machine_name() -> str:
    """Equal on two processes that can end each other by process id; empty where unknown."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


class _Connection:
    """A socket that carries JSON lines; ``rank`` is who is at the other end, once known."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.rank: int | None = None
        self._buffer = b""
        self._unsent = b""
        self._sending = threading.Lock()
        connection.setblocking(False)

    def send(self, message: dict[str, Any]) -> None:
        """Send a message, unless the one before is still under way; never waits."""
        with self._sending:
            if not self._unsent:
                self._unsent = json.dumps(message).encode() + b"\n"
            try:
                self._unsent = self._unsent[self.socket.send(self._unsent) :]
            except OSError:
                return  # full: later; broken: receive() will say so

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have arrived; None when the other side has closed or talks nonsense."""
        try:
            data = self.socket.recv(LARGEST_MESSAGE_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            return None
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if not data or len(self._buffer) > LARGEST_MESSAGE_BYTES:
            return None
        try:
            return [dict(json.loads(line)) for line in lines]
        except (ValueError, TypeError):
            return None


class Hub:
    """Rank 0's end: hears all ranks, judges, and tells them.

    Args:
        store: of the job; the other ranks find address and token in it.
        world: number of ranks.
        hang_seconds: see ``judge``.

    Raises:
        OSError: no port can be opened.
    """

    def __init__(self, store: Store, *, world: int, hang_seconds: float | None) -> None:
        self._world = world
        self._hang_seconds = hang_seconds
        self._token = secrets.token_hex(16)
        one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(world)
        try:
            address = "127.0.0.1" if one_machine else ""
            self._server = socket.create_server((address, 0), backlog=world)
        except OSError:
            store.set(_KEY, "null")
            raise
        self._server.setblocking(False)
        host = os.environ.get("MASTER_ADDR") or socket.gethostname()
        port = self._server.getsockname()[1]
        store.set(_KEY, json.dumps([host, port, self._token, machine_name()]))
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        self._connections: list[_Connection] = []
        self.seen: dict[int, Seen] = {}

    @property
    def others_run(self) -> bool:
        """Whether others need this rank's judgement: while one is connected."""
        return any(connection.rank is not None for connection in self._connections)

    def turn(self, report: Callable[[], Report]) -> Verdict | None:
        """Listen for one period, then judge and tell."""
        end = time.monotonic() + PERIOD_SECONDS
        while (left := end - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                if key.fileobj is self._server:
                    self._accept()
                else:
                    self._hear(key.data)
        now, own = time.monotonic(), report()
        _note(self.seen, 0, own, now)
        verdict = judge(self.seen, now, world=self._world, hang_seconds=self._hang_seconds)
        message = {"report": asdict(own), "verdict": None if verdict is None else asdict(verdict)}
        for connection in self._connections:
            connection.send(message)
        return verdict

    def close(self) -> None:
        """Close the sockets; a forked child must not keep them open."""
        for connection in self._connections:
            connection.socket.close()
        self._server.close()

    def _accept(self) -> None:
        connection = _Connection(self._server.accept()[0])
        self._connections.append(connection)
        self._selector.register(connection.socket, selectors.EVENT_READ, connection)

    def _hear(self, connection: _Connection) -> None:
        messages = connection.receive()
        for message in messages or ():
            if connection.rank is None:
                if not secrets.compare_digest(str(message.get("token")), self._token):
                    messages = None
                    break
                connection.rank = int(message["rank"])
                _note(self.seen, connection.rank, Report(), time.monotonic())
            else:
                _note(self.seen, connection.rank, Report(**message), time.monotonic())
        if messages is None:
            self._selector.unregister(connection.socket)
            connection.socket.close()
            self._connections.remove(connection)
            if connection.rank in self.seen:
                self.seen[connection.rank] = replace(self.seen[connection.rank], lost=True)


class Spoke:
    """Every other rank's end.

    Args:
        store: of the job.
        rank: this rank.
        hang_seconds: see ``judge``.

    Raises:
        OSError: rank 0 cannot be reached.
    """

    def __init__(self, store: Store, rank: int, *, hang_seconds: float | None) -> None:
        address = json.loads(store.get(_KEY))
        if address is None:
            raise OSError("rank 0 cannot listen")
        host, port, token, machine = address
        if machine and machine == machine_name():
            host = "127.0.0.1"
        self._rank = rank
        self._hang_seconds = hang_seconds
        self._hub = _Connection(socket.create_connection((host, port), CONNECT_SECONDS))
        self._hub.send({"token": token, "rank": rank})
        self.seen: dict[int, Seen] = {0: Seen(Report(), time.monotonic())}

    @property
    def others_run(self) -> bool:
        """Whether others need this rank's judgement: only rank 0's."""
        return False

    def turn(self, report: Callable[[], Report]) -> Verdict | None:
        """Report, then listen for one period; judge alone if rank 0 does not answer."""
        now, own = time.monotonic(), report()
        _note(self.seen, self._rank, own, now)
        if not self.seen[0].lost:
            self._hub.send(asdict(own))
        if own.ended:
            return None
        end = now + PERIOD_SECONDS
        while (left := end - time.monotonic()) > 0:
            verdict = self._listen(left)
            if verdict is not None:
                return verdict
        hub = self.seen[0]
        if hub.lost or time.monotonic() - hub.at >= GONE_SECONDS:
            return judge(self.seen, now, world=2, hang_seconds=self._hang_seconds)
        return None

    def tell(self, report: Report) -> None:
        """Send a report at once, from any thread; a rank may not live until its next turn."""
        if not self.seen[0].lost:
            self._hub.send(asdict(report))

    def close(self) -> None:
        """Close the socket; a forked child must not keep it open."""
        self._hub.socket.close()

    def _listen(self, seconds: float) -> Verdict | None:
        if self.seen[0].lost:
            time.sleep(seconds)
            return None
        with selectors.DefaultSelector() as selector:
            selector.register(self._hub.socket, selectors.EVENT_READ)
            if not selector.select(seconds):
                return None
        messages = self._hub.receive()
        if messages is None:
            self.seen[0] = replace(self.seen[0], lost=True)
        for message in messages or ():
            _note(self.seen, 0, Report(**message["report"]), time.monotonic())
            if message["verdict"] is not None:
                return Verdict(**message["verdict"])
        return None


def _note(seen: dict[int, Seen], rank: int, report: Report, now: float) -> None:
    before = seen.get(rank)
    first_error = before.first_error if before is not None else None
    if report.error and first_error is None:
        first_error = now
    seen[rank] = Seen(report, now, first_error)
