"""What a job runs on: nodes of devices, the links inside and between them, and prices.

Profiles are files (``profiles/paraplan_profiles/clusters/*.toml``, or the user's own);
``docs/profiles.md`` describes every field.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError

from paraplan.device import Device, load_device
from paraplan.errors import InputError
from paraplan.files import describe_validation_error
from paraplan.link_table import LinkTable, MeasuredCollective, make_link_table
from paraplan.profile_types import (
    Figure,
    Fraction,
    Frozen,
    Positive,
    content_sha256,
    read_profile,
    shipped_names,
)


def _speedup(figure: Figure) -> Figure:
    if not 1 <= figure.value <= 2:
        # Reducing in the switches sends each byte once where a ring sends it twice.
        raise ValueError(f"value is {figure.value:g}; 1 to 2 is wanted")
    return figure


Count = Annotated[int, Field(ge=1, le=2**24, strict=True)]

Speedup = Annotated[Figure, AfterValidator(_speedup)]
ALIASES = {"p4d": "aws-p4d", "p4de": "aws-p4de", "p5": "aws-p5"}
"""Short names of shipped clusters."""


class Link(Frozen):
    """One device's share of a network, each direction.

    Attributes:
        kind: such as ``NVLink 4`` or ``InfiniBand NDR400``.
        bandwidth_bytes_per_second: peak, per device and direction (NICs that several devices
            share are divided by their number).
        efficiency: share of it that long ring collectives reach (nccl-tests' bus bandwidth).
        all_to_all_efficiency, transfer_efficiency: the same for a long all-to-all, and for a
            long message from one device to another.
        start_seconds: fixed time of one collective or message.
        latency_seconds: of each step from a device to the next.
        all_reduce_speedup: how much faster than a ring the switches' own reduction is (NVLink
            SHARP), where there is one.
        measured: collectives timed on it, which come before the figures.
    """

    kind: Annotated[str, Field(min_length=1)]
    bandwidth_bytes_per_second: Positive
    efficiency: Fraction
    all_to_all_efficiency: Fraction
    transfer_efficiency: Fraction
    start_seconds: Figure
    latency_seconds: Figure
    all_reduce_speedup: Speedup | None = None
    measured: tuple[MeasuredCollective, ...] = ()

    @cached_property
    def table(self) -> LinkTable | None:
        """The measured collectives, indexed; None where there are none."""
        return make_link_table(self.measured) if self.measured else None

    @cached_property
    def speeds(self) -> LinkSpeeds:
        """The figures as plain numbers."""
        peak = self.bandwidth_bytes_per_second.value
        speedup = self.all_reduce_speedup
        return LinkSpeeds(
            ring=peak * self.efficiency.value,
            all_to_all=peak * self.all_to_all_efficiency.value,
            transfer=peak * self.transfer_efficiency.value,
            start=self.start_seconds.value,
            latency=self.latency_seconds.value,
            all_reduce_speedup=1.0 if speedup is None else speedup.value,
        )

    def scaled(self, factor: float) -> Link:
        """The same link with ``factor`` times the bandwidth; what was measured is left behind."""
        bandwidth = self.bandwidth_bytes_per_second.scaled(factor, f"times {factor:g}")
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        update = {"bandwidth_bytes_per_second": bandwidth, "measured": ()}
        return Link.model_construct(**(fields | update))


@dataclass(frozen=True, slots=True)
class LinkSpeeds:
    """A link's figures as plain numbers, made once for `collectives`.

    Attributes:
        ring, all_to_all, transfer: bytes per second per device and direction of long messages.
        start, latency: seconds of a collective, and of each of its steps.
        all_reduce_speedup: 1 where switches do not reduce.
    """

    ring: float
    all_to_all: float
    transfer: float
    start: float
    latency: float
    all_reduce_speedup: float


class NodeGroup(Frozen):
    """Equal nodes: ``count`` of them with ``devices_per_node`` devices each."""

    count: Count
    devices_per_node: Count
    device: Device
    link_inside: Link


class Cluster(Frozen):
    """Groups of equal nodes and the network between them.

    Attributes:
        node_groups: one, or two of different devices.
        link_between: one device's share of the network between nodes.
        price_per_device_hour: in US dollars, instead of the device's.
    """

    format: Literal[1] = 1
    name: Annotated[str, Field(min_length=1, max_length=100)]
    description: str = ""
    node_groups: Annotated[tuple[NodeGroup, ...], Field(min_length=1)]
    link_between: Link
    price_per_device_hour: Figure | None = None

    @staticmethod
    def of(device: str | Device, devices: int, *, devices_per_node: int | None = None) -> Cluster:
        """``devices`` devices in their usual nodes, as in ``Cluster.of("h100", 16)``.

        Raises:
            InputError: unknown device, or nodes not filled (see `make_cluster`).
        """
        found = load_device(device) if isinstance(device, str) else device
        return make_cluster(found, devices, devices_per_node=devices_per_node)

    @staticmethod
    def load(name_or_path: str | os.PathLike[str], devices: int | None = None) -> Cluster:
        """A shipped cluster or a profile file, as in ``Cluster.load("aws-p5", 64)``.

        Raises:
            InputError: see `load_cluster`.
        """
        return load_cluster(name_or_path, devices)

    @property
    def nodes(self) -> int:
        """Nodes of all groups."""
        return sum(group.count for group in self.node_groups)

    @property
    def devices(self) -> int:
        """Devices of all nodes."""
        return sum(group.count * group.devices_per_node for group in self.node_groups)

    @cached_property
    def device(self) -> Device:
        """The one kind of device."""
        return self._only_group.device

    @cached_property
    def devices_per_node(self) -> int:
        """Devices of one node."""
        return self._only_group.devices_per_node

    @cached_property
    def link_inside(self) -> Link:
        """Links between the devices of a node."""
        return self._only_group.link_inside

    @property
    def _only_group(self) -> NodeGroup:
        if len(self.node_groups) > 1:
            raise InputError(
                f"{self.name} has {len(self.node_groups)} kinds of nodes, which have no size, "
                "memory or device in common to change",
                hint="change them in the cluster's file",
            )
        return self.node_groups[0]

    @cached_property
    def kinds(self) -> tuple[Cluster, ...]:
        """The nodes of each kind as a cluster of their own; this one if there is one kind."""
        if len(self.node_groups) == 1:
            return (self,)
        return tuple(
            self._copy({"node_groups": (group,), "name": f"{self.name}/{group.device.name}"})
            for group in self.node_groups
        )

    def reversed(self) -> Cluster:
        """The same with the kinds of nodes in the other order."""
        return self._copy({"node_groups": self.node_groups[::-1]})

    @cached_property
    def sha256(self) -> str:
        """Hash of the content."""
        return content_sha256(self)

    def resized(self, devices: int, devices_per_node: int | None = None) -> Cluster:
        """The same kind of nodes, as many as ``devices`` fill; fewer make one partial node.

        Raises:
            InputError: the last node would not be full.
        """
        per_node = devices_per_node or self.devices_per_node
        for what, value in (("devices", devices), ("devices per node", per_node)):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 2**24:
                raise InputError(f"{what} is {value!r}; a whole number from 1 to {2**24} is wanted")
        per_node = min(per_node, devices)
        if devices % per_node:
            raise InputError(
                f"{devices} devices do not fill nodes of {per_node}",
                hint=f"take a multiple of {per_node}, or say how many devices a node has",
            )
        update = {"count": devices // per_node, "devices_per_node": per_node}
        return self._with_group(self._only_group.model_copy(update=update))

    def with_link_between_scaled(self, factor: float) -> Cluster:
        """A copy whose network between nodes has ``factor`` times the bandwidth."""
        return self._copy({"link_between": self.link_between.scaled(factor)})

    def with_link_inside_scaled(self, factor: float) -> Cluster:
        """A copy whose links inside nodes have ``factor`` times the bandwidth."""
        link = self.link_inside.scaled(factor)
        return self._with_group(self._only_group.model_copy(update={"link_inside": link}))

    def scaled(self, what: str, factor: float) -> Cluster:
        """A copy with ``factor`` times the rate of ``what``, a name of `request.SCALABLE`."""
        if what == "link_between":
            return self.with_link_between_scaled(factor)
        if len(self.node_groups) > 1:
            groups = tuple(kind.scaled(what, factor).node_groups[0] for kind in self.kinds)
            return self._copy({"node_groups": groups})
        if what == "link_inside":
            return self.with_link_inside_scaled(factor)
        rates = {"compute": 1.0, "memory_bandwidth": 1.0, what: factor}
        device = self.device.with_rates_scaled(**rates)
        return self._with_group(self._only_group.model_copy(update={"device": device}))

    def with_memory(self, memory_bytes: float) -> Cluster:
        """A copy whose devices have ``memory_bytes`` of memory."""
        figure = Figure(value=float(memory_bytes), basis="modelled", source="set for a what-if")
        device = self.device.with_memory(figure)
        return self._with_group(self._only_group.model_copy(update={"device": device}))

    def _with_group(self, group: NodeGroup) -> Cluster:
        return self._copy({"node_groups": (group,)})

    def _copy(self, update: dict[str, Any]) -> Self:
        # Not model_copy: it would carry along cached properties of the old content.
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self).model_construct(**(fields | update))


def cluster_names() -> tuple[str, ...]:
    """Names of the clusters that ship."""
    return shipped_names("clusters")


def load_cluster(name_or_path: str | os.PathLike[str], devices: int | None = None) -> Cluster:
    """Read a shipped cluster or a profile file; with ``devices``, resized to as many.

    Raises:
        InputError: unknown name, a file that is not a cluster profile, nodes not filled.
    """
    shipped = ALIASES.get(str(name_or_path).lower(), str(name_or_path).lower())
    known = shipped in cluster_names()
    cluster = _shipped_cluster(shipped) if known else _read_cluster(name_or_path)
    return cluster if devices is None else cluster.resized(devices)


@cache
def _shipped_cluster(name: str) -> Cluster:
    return _read_cluster(name)


def _read_cluster(name_or_path: str | os.PathLike[str]) -> Cluster:
    data, name = read_profile(name_or_path, "clusters", ALIASES)
    try:
        return Cluster.model_validate(_with_devices(data, name))
    except ValidationError as error:
        raise InputError(f"{name}: {describe_validation_error(error)}") from None


def _with_devices(data: dict[str, Any], name: str) -> dict[str, Any]:
    """Replace device names by the devices they name."""
    groups = data.get("node_groups")
    if not isinstance(groups, list):
        return data
    loaded = []
    for index, group in enumerate(groups):
        if isinstance(group, dict) and isinstance(group.get("device"), str):
            try:
                group = group | {"device": load_device(group["device"])}
            except InputError as error:
                message = f"{name}: node_groups[{index}].device: {error}"
                raise InputError(message, hint=error.hint) from None
        loaded.append(group)
    return data | {"node_groups": loaded}


def make_cluster(device: Device, devices: int, *, devices_per_node: int | None = None) -> Cluster:
    """A cluster of the device's usual nodes (``Device.default_cluster``).

    Raises:
        InputError: the device names no usual cluster, or the nodes are not filled.
    """
    if device.default_cluster is None:
        raise InputError(
            f"device {device.name!r} does not say what nodes it comes in",
            hint="name a cluster, or set default_cluster in its profile",
        )
    usual = load_cluster(device.default_cluster)
    group = usual.node_groups[0].model_copy(update={"device": device})
    return usual._with_group(group).resized(devices, devices_per_node)
