"""Machines that measure together: how they meet, and what the first tells the others.

The first is the one that the meeting point names: it keeps torch's store there, decides what is
measured and writes the profile. The same command on every machine is all that a user starts.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import (  # type: ignore[attr-defined]
    DistError,
    PrefixStore,
    Store,
    TCPStore,
)

from paraplan.errors import InputError

WAIT_SECONDS = 600.0
"""For machines that start later: a cluster's start them within minutes."""
_LAST_SECONDS = 60.0
_TRY_SECONDS, _POLL_SECONDS = 5.0, 0.05
"""Python hears a Ctrl-C between such waits; torch's own go on."""
_SIOCGIFADDR = 0x8915  # of linux/sockios.h


@dataclass(frozen=True)
class Meeting:
    """The machines that measure together, as one of them sees it.

    Attributes:
        endpoint: host and port of the store.
        node: this machine's number; 0 is the one that writes the profile.
        interface: the network interface that leads to the others, where it is known. gloo asks
            for it by name; of itself it takes the address of the host's name, which on many
            machines is a loopback's.
    """

    endpoint: tuple[str, int]
    node: int
    nodes: int
    store: Store
    interface: str | None = None

    def told(self, name: str, value: str) -> str:
        """What the first machine says; each call needs a name of its own."""
        if self.node == 0:
            self.store.set(name, value)
        return self._get(name)

    def compare(self, facts: Mapping[str, str]) -> None:
        """Compare what must be the same on all machines; they all do it.

        Raises:
            InputError: another machine differs from the first.
        """
        self.store.set(f"facts/{self.node}", json.dumps(dict(facts)))
        told = [json.loads(self._get(f"facts/{node}")) for node in range(self.nodes)]
        for node, other in enumerate(told):
            for what, wanted in told[0].items():
                if other.get(what) != wanted:
                    raise InputError(
                        f"machine {node} has {what} {other.get(what)!r}, the first {wanted!r}",
                        hint="start the same command, with the same versions, on equal machines",
                    )

    def part(self) -> None:
        """Done: the first, which keeps the store, waits until the others need it no longer."""
        self.store.set(f"done/{self.node}", "")
        if self.node == 0:
            for node in range(self.nodes):
                self._get(f"done/{node}", _LAST_SECONDS)

    def _get(self, name: str, seconds: float = WAIT_SECONDS) -> str:
        if not _wait(self.store, [name], seconds):
            raise InputError(f"another machine did not answer within {seconds:.0f} s")
        return self.store.get(name).decode()


def meet(nodes: int, endpoint: str) -> Meeting:
    """Meet the other machines at ``HOST:PORT``; the one whose address it is comes first.

    Raises:
        InputError: not an endpoint, or not all of them come.
    """
    host, _, port_text = endpoint.rpartition(":")
    host = host.strip("[]")
    if not host or not port_text.isdecimal() or not 1 <= int(port_text) <= 65535:
        raise InputError(f"--endpoint is {endpoint!r}; HOST:PORT is wanted, such as node0:29400")
    port = int(port_text)
    store, first = _open((host, port))
    node = 0 if first else store.add("others", 1)
    if node >= nodes:
        raise InputError(f"machine {node + 1} came to {endpoint}, and --nnodes is {nodes}")
    # Towards its own name the first machine may see a loopback's address, others never do.
    store.set(f"came/{node}", _address_towards(host))
    names = [f"came/{other}" for other in range(nodes)]
    if not _wait(store, names, WAIT_SECONDS):
        came = sum(store.check([name]) for name in names)
        raise InputError(f"{came} of {nodes} machines came to {endpoint} in {WAIT_SECONDS:.0f} s")
    towards = host if node else store.get("came/1").decode()
    return Meeting((host, port), node, nodes, store, _interface_of(_address_towards(towards)))


def connect(
    endpoint: tuple[str, int], *, first: bool = False, seconds: float = WAIT_SECONDS
) -> Store:
    """The store of a meeting; ``first`` makes it."""
    made = TCPStore(
        *endpoint,
        is_master=first,
        wait_for_workers=False,
        timeout=timedelta(seconds=seconds),
    )
    return PrefixStore("profile", made)


def _open(endpoint: tuple[str, int]) -> tuple[Store, bool]:
    """The store, and whether it is this machine that keeps it."""
    if _is_own(endpoint[0]):
        try:
            return connect(endpoint, first=True), True
        except DistError:
            pass  # taken, by the first one where several "machines" are one, as in tests
    where = ":".join(map(str, endpoint))
    until = time.monotonic() + WAIT_SECONDS
    while not _answers(endpoint):  # torch's own attempts log a traceback each
        if time.monotonic() > until:
            raise InputError(f"nothing answers at {where}: does that machine measure?")
        time.sleep(_POLL_SECONDS)
    try:
        return connect(endpoint, seconds=_TRY_SECONDS), False
    except DistError:
        raise InputError(f"what answers at {where} is no machine that measures") from None


def _answers(endpoint: tuple[str, int]) -> bool:
    try:
        socket.create_connection(endpoint, _TRY_SECONDS).close()
    except OSError:
        return False
    return True


def _wait(store: Store, names: list[str], seconds: float) -> bool:
    """Whether all are set within that time; asks again and again, so that Ctrl-C ends it."""
    until = time.monotonic() + seconds
    try:
        while not store.check(names):
            if time.monotonic() > until:
                return False
            time.sleep(_POLL_SECONDS)
    except DistError:
        raise InputError("the first machine, which the others meet at, is gone") from None
    return True


def _address_towards(host: str) -> str:
    """This machine's address on the way to a host."""
    family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing
        return str(probe.getsockname()[0])


def _interface_of(own_address: str) -> str | None:
    """Name of the network interface with this address (IPv4)."""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            asked = struct.pack("256s", name.encode()[:15])
            try:
                found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, asked)
            except OSError:  # it has none
                continue
            if socket.inet_ntoa(found[20:24]) == own_address:
                return name
    return None


def _is_own(host: str) -> bool:
    """Whether a host's address is one of this machine's: then a socket can be bound to it."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError as error:
        raise InputError(f"no host {host!r} is known here: {error.strerror}") from None
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind(address)
            except OSError:
                continue
            return True
    return False
