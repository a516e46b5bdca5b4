"""Several machines measure together: they meet, compare, and time groups that span them."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from paraplan.cluster import Cluster, load_cluster, make_cluster
from paraplan.collectives import Group, collective_seconds, transfer_seconds
from paraplan.device import load_device
from paraplan.errors import InputError
from paraplan.link_table import LinkKind
from paraplan.measure_nodes import Meeting, meet
from paraplan.profile_result import Measurements, Seconds, measured_cluster
from paraplan.profile_tasks import GemmTask, LinkTask, Scope, link_groups, make_tasks

KINDS: tuple[LinkKind, ...] = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")


def free_endpoint() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def on_each(machines: int, act: Callable[[Meeting], Any], *, part: bool = True) -> list[Any]:
    """What each of the machines that meet gives, or the error that it raises; the first first."""
    endpoint = free_endpoint()

    def one(_: int) -> tuple[int, Any]:
        meeting = meet(machines, endpoint)
        try:
            found = act(meeting)
        except InputError as error:
            found = error
        if part:
            meeting.part()
        return meeting.node, found

    with ThreadPoolExecutor(machines) as threads:
        return [found for _, found in sorted(threads.map(one, range(machines)), key=lambda f: f[0])]


def test_machines_meet_and_the_first_decides() -> None:
    def act(meeting: Meeting) -> tuple[int, str | None, str]:
        meeting.compare({"device": "the same"})
        return meeting.node, meeting.interface, meeting.told("tasks", f"of {meeting.node}")

    assert on_each(3, act) == [(node, "lo", "of 0") for node in range(3)]


def test_machines_that_differ_all_say_so() -> None:
    def act(meeting: Meeting) -> None:
        meeting.compare({"torch": "2.13", "device": "b" if meeting.node == 1 else "a"})

    for error in on_each(3, act):
        assert str(error) == "machine 1 has device 'b', the first 'a'"


def test_the_first_that_ends_early_is_missed() -> None:
    def act(meeting: Meeting) -> str:
        if meeting.node == 0:
            meeting.store.wait(["ready"])
            return "left"
        meeting.store.set("ready", "")
        return meeting.told("tasks", "")

    first, second = on_each(2, act, part=False)
    assert first == "left"
    assert str(second) == "the first machine, which the others meet at, is gone"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nnodes", "0"], "--nnodes is 0"),
        (["--nnodes", "2"], "cannot meet"),
        (["--nnodes", "2", "--gpus", "3", "--endpoint", "localhost:1"], "cannot share equally"),
        (["--nnodes", "2", "--endpoint", "localhost"], "HOST:PORT is wanted"),
        (["--nnodes", "2", "--endpoint", "no.such.host.invalid:29400"], "no host"),
    ],
)
def test_wrong_meeting_points_are_told_in_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from paraplan.cli import main

    assert main(["profile", "--device", "cpu", *arguments]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told


def test_ranks_of_two_machines_measure_together() -> None:
    from paraplan.measure_ranks import RankSettings, key_of, measure_on_ranks

    tasks: list[Any] = [GemmTask("float32", 64, 64, 64)]
    tasks += [LinkTask("all_reduce", size, 4096, each) for size, each in link_groups(4, 2)]
    tasks += [LinkTask("transfer", 2, 4096), LinkTask("transfer", 2, 4096, 1)]

    def act(meeting: Meeting) -> dict[str, Any]:
        known: dict[str, Any] = {}
        measure_on_ranks(
            tasks, RankSettings("cpu", 4, True, 1, nodes=2), known.__setitem__, meeting
        )
        return known

    first, second = on_each(2, act)
    assert set(first) == {key_of(task) for task in tasks}
    assert all(timing.seconds > 0 for timing in first.values())
    assert first == second  # a timing is of all ranks


def test_groups_are_those_of_layouts() -> None:
    assert link_groups(4, 1) == [(2, None), (4, None)]
    assert link_groups(2, 2) == [(2, 1)]
    assert link_groups(8, 2) == [(2, None), (4, None), (2, 1), (4, 2), (8, 4)]
    shapes = {(t.ranks, t.per_node) for t in made_tasks(16, 4) if t.kind == "all_gather"}
    assert shapes == {(2, None), (4, None)} | {(n * g, g) for n in (2, 4) for g in (1, 2, 4)}
    assert neighbours(Scope("cuda", 16, True, "bfloat16", 4)) == {(2, None), (2, 1)}
    assert neighbours(Scope("cuda", 3, True, "bfloat16")) == set()
    assert neighbours(Scope("cpu", 3, True, "float32")) == {(2, None)}  # in a ring
    assert neighbours(Scope("cpu", 2, True, "float32", 2)) == {(2, 1)}


def neighbours(scope: Scope) -> set[tuple[int, int | None]]:
    tasks = [task for task in make_tasks(scope) if isinstance(task, LinkTask)]
    return {(task.ranks, task.per_node) for task in tasks if task.kind == "transfer"}


def made_tasks(ranks: int, nodes: int) -> list[LinkTask]:
    scope = Scope("cuda", ranks, quick=False, dtype="bfloat16", nodes=nodes)
    return [task for task in make_tasks(scope) if isinstance(task, LinkTask)]


def as_measured(truth: Cluster, times: float, nodes: int) -> Cluster:
    """A profile of some nodes of a cluster whose every exchange takes ``times`` the formula."""

    def seconds(task: LinkTask) -> float:
        if task.kind == "transfer":
            between = task.per_node is not None
            return transfer_seconds(task.message_bytes, between_nodes=between, cluster=truth)
        group = Group(task.ranks, task.per_node or task.ranks)
        return collective_seconds(task.kind, task.message_bytes, group, truth)

    ranks = nodes * truth.devices_per_node
    made = Measurements(
        tasks={t: Seconds(times * seconds(t), 0.0) for t in made_tasks(ranks, nodes)},
        calls=(),
        where="made up",
        facts={},
        ranks=ranks,
        dtype="bfloat16",
        nodes=nodes,
    )
    return measured_cluster(truth.resized(ranks), made)


@pytest.mark.parametrize("name", ["aws-p5", "aws-p4d", "dgx-h100"])
@pytest.mark.parametrize("times", [1.0, 1.7])
def test_two_measured_nodes_tell_how_long_more_of_them_take(name: str, times: float) -> None:
    """What is measured holds for its groups; for more nodes the formula says how much more."""
    truth = load_cluster(name)
    measured = as_measured(truth, times, nodes=2)
    assert (measured.nodes, measured.devices_per_node) == (2, truth.devices_per_node)
    large = measured.resized(64 * truth.devices_per_node)
    for kind in KINDS:
        for nodes in (2, 4, 64):
            for each in (1, 4, 8):
                for size in (2**10, 2**20, 2**28):
                    group = Group(nodes * each, each)
                    found = collective_seconds(kind, size, group, large)
                    wanted = times * collective_seconds(kind, size, group, truth)
                    # The rate is that of 1 GiB as a whole, of which up to 5 % is not bytes.
                    tolerance = 1e-9 if nodes == 2 else 0.05
                    assert found == pytest.approx(wanted, rel=tolerance), (kind, group, size)
    between = transfer_seconds(2**20, between_nodes=True, cluster=large)
    assert between == pytest.approx(
        times * transfer_seconds(2**20, between_nodes=True, cluster=truth), rel=1e-9
    )


def test_a_measured_network_says_so() -> None:
    truth = load_cluster("aws-p5")
    link = as_measured(truth, 1.0, nodes=2).link_between
    assert link.efficiency.basis == link.start_seconds.basis == "measured"
    assert link.latency_seconds.basis == "modelled"
    for found, wanted in (
        (link.speeds.ring, truth.link_between.speeds.ring),
        (link.speeds.start, truth.link_between.speeds.start),
        (link.speeds.latency, truth.link_between.speeds.latency),
    ):
        assert found == pytest.approx(wanted, rel=0.05)
    # One node says nothing of the network.
    assert as_measured(truth, 1.0, nodes=1).link_between == truth.link_between


def test_one_process_of_a_node_has_no_link_inside() -> None:
    base = make_cluster(load_device("cpu"), 2, devices_per_node=1)
    tasks: Sequence[LinkTask] = [
        task
        for task in make_tasks(Scope("cpu", 2, quick=True, dtype="float32", nodes=2))
        if isinstance(task, LinkTask)
    ]
    made = Measurements(
        tasks={task: Seconds(task.message_bytes / 1e8, 0.0) for task in tasks},
        calls=(),
        where="made up",
        facts={},
        ranks=2,
        dtype="float32",
        nodes=2,
    )
    cluster = measured_cluster(base, made)
    assert cluster.link_inside == base.link_inside
    assert {one.per_node for one in cluster.link_between.measured} == {1}
    slower = replace(
        made, tasks={t: s._replace(seconds=2 * s.seconds) for t, s in made.of(LinkTask)}
    )
    ring = cluster.link_between.speeds.ring
    assert measured_cluster(base, slower).link_between.speeds.ring == pytest.approx(ring / 2)
