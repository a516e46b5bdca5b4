"""The machine of a measured run: a shipped profile, its network as the row states it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache

from paraplan.cluster import Cluster, load_cluster
from paraplan.device import Device
from paraplan.errors import InputError
from paraplan.validate_model import run_framework
from paraplan.validate_rows import Row, Unusable

# GPU as written (lower case, first match) -> cluster profile. Longer names stand first.
CLUSTERS: tuple[tuple[str, str], ...] = (
    ("h100-96gb", "grand-teton-h100"),
    ("(gb200)", "gb200-nvl72"),
    ("gb300", "gb300-nvl72"),
    ("b300", "dgx-b300"),
    ("a100-40gb", "dgx-a100-40gb"),
    ("a100", "dgx-a100-80gb"),
    ("gh200", ""),
    ("h200", "dgx-h200"),
    ("h100", "dgx-h100"),
    ("gb200", "gb200-nvl72"),
    ("b200", "dgx-b200"),
    ("mi300x", "mi300x-8"),
    ("mi325x", "mi325x-8"),
    ("mi355x", "mi355x-8"),
)

OMNIPATH_SHARE = 0.405 / 0.92
"""Of an InfiniBand card of the same rate: NCCL moves 40.5 of a card's 100 Gb/s, both channels of
the ring on one card (4 GB all-reduced by 32 A100 of 4 nodes in 1.531 s, 4 nodes of 4 in 1.505 s:
bigscience-workshop/bigscience, experiments/bandwidth/*a100*.txt); 0.92 is what the profiles say of
InfiniBand. So it holds for groups that share their node's cards evenly, which tensor ranks of 4
and 8 leave (all of BLOOM's runs but six); of fewer, NCCL would leave cards idle that the model
uses."""


def node_bytes_per_second(network: str) -> float | None:
    """Bandwidth of a node, each direction, from text such as ``8x400Gb/s`` or ``4xHDR200``.

    It is what InfiniBand would need to be as fast, for that is the profiles' network.
    """
    text = network.lower().split("compute:")[-1].split("management:")[0]
    text = re.sub(r"\(.*?\)", "", text)
    cards = r"(?:connectx-\d\s+|bf3\s+|mt\w+\s+|bluefield-3\s+|ib\s+)*(?:hdr|ndr|xdr|omnipath)?"
    found = re.search(rf"(\d+)\s*x\s*{cards}\s*(\d{{3}})(?!\d|gbase)", text)
    if found:
        share = OMNIPATH_SHARE if "omnipath" in found[0] else 1.0
        return share * int(found[1]) * int(found[2]) * 1e9 / 8
    found = re.search(r"([\d.]+)\s*(g|t)b/s[^,;]*(?:/|per )node", text)
    if found:
        return float(found[1]) * (1e9 if found[2] == "g" else 1e12) / 8
    return None


def cluster_name(row: Row) -> str:
    """The shipped profile of the machine.

    Raises:
        Unusable: no profile for the GPU.
    """
    if "aws p5" in row.text("network"):
        return "aws-p5"
    gpu = row.text("gpu")
    name = next((profile for key, profile in CLUSTERS if key in gpu), "")
    if not name:
        raise Unusable(f"no profile for {gpu}")
    return name


@dataclass(frozen=True)
class Machines:
    """The machines of the rows: shipped profiles, or one other profile for all of them.

    Attributes:
        only: machine of every row whose GPU is not known to be another.
        made, devices: built so far (filled on use).
    """

    only: Cluster | None = None
    made: dict[object, tuple[Cluster, Device]] = field(default_factory=dict, compare=False)
    devices: dict[object, Device] = field(default_factory=dict, compare=False)

    def of(self, row: Row) -> tuple[Cluster, Device]:
        """The row's cluster, and its device with the attention that the run used.

        The network is scaled to the bandwidth that the row states.

        Raises:
            Unusable: no profile for the GPU, or its nodes are not filled.
        """
        name = cluster_name(row) if self.only is None else self._own(row)
        node = None if name == "aws-p5" else node_bytes_per_second(row.text("network"))
        share = None if node is None else node / row.count("gpus_per_node", 8)
        key = (name, row.count("n_gpus"), share, attention_of(row))
        if key not in self.made:
            self.made[key] = self._make(*key)
        return self.made[key]

    def _own(self, row: Row) -> str:
        """The profile's name, unless the row's GPU is known to be another."""
        assert self.only is not None
        try:
            usual = _shipped(cluster_name(row)).device.name
        except Unusable:
            return self.only.name
        if usual != self.only.device.name:
            raise Unusable(f"its GPU is {usual}, not {self.only.device.name}")
        return self.only.name

    def _make(
        self, name: str, devices: int, bandwidth: float | None, attention: str
    ) -> tuple[Cluster, Device]:
        usual = self.only or _shipped(name)
        try:
            cluster = usual.resized(devices, _filled(devices, usual.devices_per_node))
        except InputError:
            raise Unusable("n_gpus does not fill the nodes") from None
        if bandwidth is not None:
            usually = usual.link_between.bandwidth_bytes_per_second.value
            cluster = cluster.with_link_between_scaled(bandwidth / usually)
        device = self._device(usual.device, attention)
        return cluster, device

    def _device(self, device: Device, attention: str) -> Device:
        """One object for each kind, because its figures as plain numbers are made once."""
        key = (device.name, attention)
        if key not in self.devices:
            names = [kernel.implementation for kernel in device.attention]
            chosen = device.with_attention(attention) if attention in names else device
            self.devices[key] = chosen
        return self.devices[key]


def _filled(devices: int, most: int) -> int:
    """Devices of a node, so that all nodes are alike: racks of 72 are rarely used whole."""
    if most <= 8:
        return most
    return max(n for n in range(1, most + 1) if devices % n == 0)


@cache
def _shipped(name: str) -> Cluster:
    return load_cluster(name)


def attention_of(row: Row) -> str:
    """Name of the attention implementation that the run used."""
    text = row.text("attn_impl")
    named = re.search(r"flash_?attention ?v?(\d)|flash(\d)", text)
    if named:
        return f"flash-attention-{named[1] or named[2]}"
    return "cudnn" if "cudnn" in text else run_framework(row).attention
