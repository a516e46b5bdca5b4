from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from paraplan.cluster import Cluster, cluster_names, load_cluster, make_cluster
from paraplan.device import device_names, load_device
from paraplan.errors import InputError


def text_of(name: str) -> str:
    return resources.files("paraplan_profiles").joinpath("clusters", f"{name}.toml").read_text()


@pytest.mark.parametrize("name", cluster_names())
def test_shipped_clusters_are_whole(name: str) -> None:
    cluster = load_cluster(name)
    assert cluster.name == name
    assert cluster.device.name in device_names()
    # A device's share of the network never exceeds its links inside the node.
    assert cluster.link_between.speeds.ring < cluster.link_inside.speeds.ring
    assert cluster.link_between.latency_seconds.value > 0


@pytest.mark.parametrize("name", device_names())
def test_every_device_has_usual_nodes(name: str) -> None:
    device = load_device(name)
    per_node = load_cluster(device.default_cluster or "").devices_per_node
    cluster = make_cluster(device, 2 * per_node)
    assert (cluster.nodes, cluster.devices_per_node) == (2, per_node)
    assert cluster.device is device


def test_sixteen_h100_are_two_nodes_with_nvlink_and_eight_ports() -> None:
    cluster = make_cluster(load_device("h100"), 16)
    assert (cluster.name, cluster.nodes, cluster.devices) == ("dgx-h100", 2, 16)
    assert cluster.link_inside.bandwidth_bytes_per_second.value == 450e9
    assert cluster.link_between.bandwidth_bytes_per_second.value == 50e9


def test_constructors_of_the_public_api() -> None:
    assert Cluster.of("h100", 16) == make_cluster(load_device("h100"), 16)
    assert Cluster.of(load_device("h100"), 16, devices_per_node=4).nodes == 4
    assert Cluster.load("aws-p5", 64) == load_cluster("aws-p5", 64)


def test_few_devices_make_one_partial_node() -> None:
    cluster = make_cluster(load_device("h100"), 3)
    assert (cluster.nodes, cluster.devices_per_node) == (1, 3)


def test_devices_per_node_can_be_chosen() -> None:
    cluster = make_cluster(load_device("h100"), 16, devices_per_node=4)
    assert (cluster.nodes, cluster.devices_per_node) == (4, 4)


@pytest.mark.parametrize(
    ("devices", "message"), [(12, "12 devices do not fill nodes of 8"), (0, "devices is 0")]
)
def test_nodes_must_be_filled(devices: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_cluster(load_device("h100"), devices)


def test_load_with_devices_resizes() -> None:
    assert load_cluster("aws-p5", 64).nodes == 8
    assert load_cluster("p5").name == "aws-p5"


def test_unknown_cluster() -> None:
    with pytest.raises(InputError, match="unknown cluster 'dgx-h10'") as caught:
        load_cluster("dgx-h10")
    assert caught.value.hint == "did you mean 'dgx-h100'?"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("count = 1", "count = 0", "node_groups[0].count"),
        ("count = 1", "count = 1.5", "node_groups[0].count"),
        ('device = "h100-sxm"', 'device = "h10"', "node_groups[0].device: unknown device 'h10'"),
        ('device = "h100-sxm"', "device = 3", "node_groups[0].device"),
        ("[link_between]", "[link_elsewhere]", "link_"),
        ("all_reduce_speedup = { value = 1.3", "all_reduce_speedup = { value = 9", "speedup"),
        ("efficiency = { value = 0.95", "efficiency = { value = 1.2", "link_between.efficiency"),
        ("[[node_groups]]", "[node_groups]", "node_groups"),
    ],
)
def test_bad_file_is_one_line_naming_file_and_field(
    tmp_path: Any, old: str, new: str, message: str
) -> None:
    text = text_of("dgx-h100")
    assert old in text
    text = text.replace(old, new, 1)
    if new == "[node_groups]":  # a table of tables is wanted
        text = text.replace("[node_groups.link_inside]", "[node_groups.link_inside]")
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_cluster(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_kinds_of_nodes_have_no_one_device(tmp_path: Any) -> None:
    first, second = text_of("dgx-h100"), text_of("dgx-a100-80gb")
    group = second[second.index("[[node_groups]]") : second.index("[link_between]")]
    path = tmp_path / "mixed.toml"
    path.write_text(first.replace("[link_between]", f"{group}[link_between]"))
    cluster = load_cluster(path)
    assert (len(cluster.node_groups), cluster.nodes, cluster.devices) == (2, 2, 16)
    for read in (lambda: cluster.device, lambda: cluster.devices_per_node):
        with pytest.raises(InputError, match="2 kinds of nodes"):
            read()


def test_scaled_copies_change_only_what_they_say() -> None:
    cluster = make_cluster(load_device("h100"), 16)
    key = cluster.sha256, cluster.link_inside.speeds, cluster.link_between.speeds
    between = cluster.with_link_between_scaled(0.5)
    assert between.link_between.speeds.ring == cluster.link_between.speeds.ring / 2
    assert between.link_inside == cluster.link_inside
    inside = cluster.with_link_inside_scaled(2)
    assert inside.link_inside.speeds.transfer == 2 * cluster.link_inside.speeds.transfer
    assert inside.link_between == cluster.link_between
    small = cluster.with_memory(40e9)
    assert small.device.memory_capacity_bytes.value == 40e9
    assert small.device.gemm == cluster.device.gemm
    assert len({c.sha256 for c in (cluster, between, inside, small)}) == 4
    assert (cluster.sha256, cluster.link_inside.speeds, cluster.link_between.speeds) == key
    assert between.link_between.bandwidth_bytes_per_second.basis == "modelled"


def test_round_trip_with_an_inline_device() -> None:
    cluster = make_cluster(load_device("mi300x"), 32)
    again = Cluster.model_validate_json(cluster.model_dump_json())
    assert again == cluster
    assert again.sha256 == cluster.sha256


def test_the_examples_of_the_docs_load(tmp_path: Any) -> None:
    text = (Path(__file__).parents[1] / "docs" / "profiles.md").read_text()
    examples = [part.split("```")[0] for part in text.split("```toml\n")[1:]]
    whole = [example for example in examples if example.startswith("format = 1")]
    assert len(whole) == 2
    for example in whole:
        path = tmp_path / "example.toml"
        path.write_text(example)
        if "[[node_groups]]" in example:
            assert load_cluster(path).devices == 8
        else:
            assert make_cluster(load_device(path), 16).nodes == 2
