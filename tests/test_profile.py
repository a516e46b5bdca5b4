"""`plan profile`: what is measured becomes a profile, by real processes and with made timings."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from paraplan.cluster import Cluster, make_cluster
from paraplan.collectives import Group, collective_seconds, transfer_seconds
from paraplan.device import load_device
from paraplan.graph import Amount, Op
from paraplan.link_table import MeasuredCollective, make_link_table
from paraplan.op_times import op_seconds
from paraplan.profile_result import (
    HOST_FIGURES,
    LayerFit,
    Measurements,
    MemoryCall,
    Seconds,
    fit_layers,
    measured_cluster,
    with_layers,
)
from paraplan.profile_rounds import Kept, over_rounds, schedule_of, still_missing
from paraplan.profile_tasks import (
    AttentionTask,
    GemmTask,
    HostTask,
    LayerTask,
    LinkTask,
    RateTask,
    Scope,
    make_tasks,
)

GEMM_RATE, MEMORY_RATE, LINK_RATE, START = 4e10, 8e9, 1e9, 1e-4


def made_timing(task: Any) -> Seconds:
    """A machine of constant rates."""
    if isinstance(task, GemmTask):
        return Seconds(2.0 * task.batch * task.m * task.n * task.k / GEMM_RATE, 0.01)
    if isinstance(task, AttentionTask):
        batch, heads, _, queries, keys, size, value_size = task.dims
        pairs = queries * (queries + 1) / 2 if task.causal else queries * keys
        scale = 2.0 if task.phase == "forward" else 5.0
        return Seconds(scale * batch * heads * pairs * (size + value_size) / GEMM_RATE, 0.01)
    if isinstance(task, LinkTask):
        moved = 2.0 if task.kind == "all_reduce" else 1.0
        return Seconds(START + moved * task.message_bytes / LINK_RATE, 0.1)
    return Seconds(task.size_bytes / MEMORY_RATE, 0.01)


def made_cluster(ranks: int = 2) -> tuple[Cluster, Measurements]:
    scope = Scope("cpu", ranks, quick=False, dtype="float32")
    tasks = [t for t in make_tasks(scope) if isinstance(t, GemmTask | AttentionTask | LinkTask)]
    rates: list[Any] = [RateTask("floor", 4096), RateTask("optimizer", 28 * 10**6)]
    made = Measurements(
        tasks={task: made_timing(task) for task in [*tasks, *rates]},
        calls=[
            MemoryCall("aten.mul", "float32", size, 1, Seconds(size / MEMORY_RATE, 0.02))
            for size in (2**12, 2**20, 2**26)
        ],
        where="a machine of constant rates",
        facts={"memory_capacity_bytes": 8e9, "framework_memory_bytes": 3e8},
        ranks=ranks,
        dtype="float32",
    )
    base = make_cluster(load_device("cpu"), ranks, devices_per_node=ranks)
    return measured_cluster(base, made), made


def gemm(m: int, n: int, k: int) -> Op:
    dims = tuple(Amount(size) for size in (1, m, n, k))
    return Op(name="aten.mm", kind="gemm", phase="forward", dtype="float32", dims=dims)


def test_products_between_and_beyond_the_grid_take_the_measured_rate() -> None:
    device = made_cluster()[0].device
    for m, n, k, basis in [
        (512, 512, 512, "measured"),
        (300, 700, 90, "interpolated"),
        (4096, 4096, 4096, "interpolated"),
    ]:
        found = op_seconds(gemm(m, n, k), 1, device)
        assert found.basis == basis
        assert found.seconds == pytest.approx(2.0 * m * n * k / GEMM_RATE, rel=1e-9)


def test_attention_of_other_head_sizes_lies_between_those_measured() -> None:
    cluster, made = made_cluster()
    slow = {  # heads of 64 at half the rate
        task: timing._replace(seconds=2 * timing.seconds)
        for task, timing in made.of(AttentionTask)
        if task.dims[5] == 64
    }
    device = measured_cluster(cluster, replace(made, tasks={**made.tasks, **slow})).device

    def rate(size: int) -> tuple[float, str]:
        dims = tuple(Amount(n) for n in (1, 4, 4, 300, 300, size, size))
        op = Op(name="", kind="attention", phase="forward", dtype="float32", dims=dims, causal=True)
        found = op_seconds(op, 1, device)
        return 300 * 301 * 2 * 4 * size / found.seconds, found.basis

    assert rate(32) == (pytest.approx(GEMM_RATE), "interpolated")
    assert rate(64) == (pytest.approx(GEMM_RATE / 2), "interpolated")
    # Halfway between 32 and 64 in log space, halfway between the rates in log space.
    assert rate(45) == (pytest.approx(GEMM_RATE * 2 ** -math.log2(45 / 32)), "interpolated")
    assert rate(256)[1] == "modelled"


def test_a_quick_profile_takes_attention_s_rates_from_its_longest() -> None:
    scope = Scope("cpu", 2, quick=True, dtype="float32")
    cluster, made = made_cluster()
    tasks = {t: made_timing(t) for t in make_tasks(scope) if isinstance(t, AttentionTask)}
    shortest = min(t.dims[4] for t in tasks)
    slow = {t: s._replace(seconds=4 * s.seconds) for t, s in tasks.items() if t.dims[4] == shortest}
    others = {t: s for t, s in made.tasks.items() if not isinstance(t, AttentionTask)}
    device = measured_cluster(cluster, replace(made, tasks={**others, **tasks, **slow})).device
    for rate in device.attention[0].rates:
        assert rate.forward_efficiency.value == pytest.approx(1.0)


def test_what_was_not_measured_keeps_its_basis() -> None:
    cluster, _ = made_cluster()
    device = cluster.device
    assert device.memory_capacity_bytes.basis == "measured"
    assert device.memory_bandwidth_bytes_per_second.value == pytest.approx(MEMORY_RATE)
    assert device.gemm.efficiency["float32"].value == pytest.approx(1.0)
    assert device.gemm.efficiency["float32"].basis == "measured"
    assert device.gemm.prologue_k == load_device("cpu").gemm.prologue_k
    assert device.fragmentation_fraction.basis == "modelled"
    assert cluster.link_between == make_cluster(load_device("cpu"), 2).link_between
    assert [a.implementation for a in device.attention] == ["torch's pick", "flash", "math"]
    for rate in device.attention[0].rates:
        assert rate.forward_efficiency.value == pytest.approx(1.0)


def test_collectives_are_interpolated_for_measured_groups_only() -> None:
    cluster, _ = made_cluster(4)
    for size in (2**10, 2**20, 2**26):
        took = collective_seconds("all_reduce", size, Group(4, 4), cluster)
        assert took == pytest.approx(START + 2 * size / LINK_RATE)
        took = transfer_seconds(size, between_nodes=False, cluster=cluster)
        assert took == pytest.approx(START + size / LINK_RATE)
    # Below the smallest as long as it; beyond the largest at its rate; in between in between.
    smallest = collective_seconds("all_gather", 8, Group(2, 2), cluster)
    assert smallest == pytest.approx(START + 2**10 / LINK_RATE)
    between = collective_seconds("all_gather", 2**21, Group(2, 2), cluster)
    assert START + 2**20 / LINK_RATE < between < START + 2**22 / LINK_RATE
    # Three of four ranks were not measured: the link's figures say something.
    assert collective_seconds("all_gather", 2**20, Group(3, 3), cluster) > 0
    assert cluster.link_inside.table is not None
    assert cluster.link_inside.table.seconds("all_gather", 3, None, 2**20) is None


def test_a_scaled_link_leaves_what_was_measured_behind() -> None:
    cluster, _ = made_cluster()
    slower = cluster.with_link_inside_scaled(0.5)
    assert slower.link_inside.table is None
    group = Group(2, 2)
    fast = collective_seconds("all_gather", 2**26, group, cluster)
    assert collective_seconds("all_gather", 2**26, group, slower) > 1.5 * fast


def test_a_link_table_of_one_size_still_answers() -> None:
    table = make_link_table(
        [MeasuredCollective(kind="all_reduce", ranks=2, message_bytes=1000, seconds=0.5)]
    )
    assert table.seconds("all_reduce", 2, None, 10) == 0.5
    assert table.seconds("all_reduce", 2, None, 2000) == pytest.approx(1.0)


def test_the_scale_of_whole_layers_lengthens_blocks() -> None:
    from small_graphs import small_graph

    from paraplan.block_compute import block_compute
    from paraplan.layout import Layout

    cluster, made = made_cluster()
    graph = small_graph()
    block = next(block for block in graph.blocks.values() if block.role == "layer")
    seconds = []
    for one in (cluster, with_layers(cluster, LayerFit(1.25, None, 2), 0.0, made)):
        cost = block_compute(block, Layout(), device=one.device, cluster=one)
        seconds.append(cost.forward.kernels + cost.backward.kernels)
    assert seconds[1] == pytest.approx(1.25 * seconds[0])


def test_layers_tell_their_scale_and_what_each_op_takes_beside_it() -> None:
    ops, calls = [0.5e-3, 100e-3, 200e-3], [46.0, 46.0, 101.0]
    took = [1.25 * s + 20e-6 * n for s, n in zip(ops, calls, strict=True)]
    fit = fit_layers(ops, calls, took)
    assert fit == LayerFit(pytest.approx(1.25), pytest.approx(20e-6), 3)  # type: ignore[arg-type]
    # Noise can make small layers faster than their ops; a call that gives time back does not exist.
    fit = fit_layers(ops, calls, [0.3e-3, 110e-3, 220e-3])
    assert fit == LayerFit(pytest.approx(330.3 / 300.5), 0.0, 3)  # type: ignore[arg-type]
    fit = fit_layers([1.0, 2.0], [46.0, 101.0], [3.6e-3, 8.1e-3])  # launch 1e-4, but scale -1e-3
    assert fit == LayerFit(pytest.approx(11.7e-3 / 3), 0.0, 2)  # type: ignore[arg-type]
    # A small layer that is off by half moves the scale by next to nothing.
    fit = fit_layers([*ops, 0.5e-3], [*calls, 46.0], [*took, took[0] / 2])
    assert fit.scale == pytest.approx(1.25, rel=0.01)


def test_a_cpu_hides_no_launches() -> None:
    """It is host and device in one; a GPU works meanwhile, and what is left counts."""
    from small_graphs import small_graph

    from paraplan.block_compute import block_compute
    from paraplan.layout import Layout

    cluster, made = made_cluster()
    block = next(block for block in small_graph().blocks.values() if block.role == "layer")
    calls = sum(op.count for op in block.variants[1].ops if op.phase == "forward")
    launches = {}
    for seconds in (0.0, 1e-9):
        one = with_layers(cluster, LayerFit(1.0, seconds, 2), 0.0, made)
        for kind in ("cpu", "cuda"):
            device = one.device.model_copy(update={"kind": kind})
            cost = block_compute(block, Layout(), device=device, cluster=one)
            launches[kind, seconds] = cost.forward.launch
    assert launches == {
        ("cpu", 0.0): 0.0,
        ("cpu", 1e-9): pytest.approx(calls * 1e-9),
        ("cuda", 0.0): 0.0,
        ("cuda", 1e-9): 0.0,  # its kernels take longer
    }


def test_ranks_that_wait_for_each_other_lose_the_lag(tmp_path: Any) -> None:
    """All of it in a stage of several; of one, in the passes while other stages compute as well."""
    from paraplan import estimate

    cluster, made = made_cluster()
    forward = {}
    for lag in (0.0, 0.25):
        path = tmp_path / f"{lag}.json"
        profile = with_layers(cluster, LayerFit(1.0, None, 2), lag, made)
        path.write_text(profile.model_dump_json(exclude_none=True))
        for fix in ("data_replicate=2", "pipeline=2"):
            plan = estimate("gpt2", cluster=str(path), fix=fix, seq_len=128, global_batch=8)
            forward[fix, lag] = plan.stages[0].forward_seconds
        passes = plan.layout.micro_batches
    assert forward["data_replicate=2", 0.25] == pytest.approx(
        1.25 * forward["data_replicate=2", 0.0]
    )
    # Of N micro-batches on two stages, both compute in N - 1 of N + 1 times.
    assert forward["pipeline=2", 0.25] == pytest.approx(
        (1 + 0.25 * (passes - 1) / (passes + 1)) * forward["pipeline=2", 0.0]
    )


HOST_SECONDS = {
    "update": 1e-3,
    "sharded_update": 10e-3,
    "full_recompute": 0.1e-3,
    "selective_recompute": 0.3e-3,
    "local": 7e-3,
    "hooks": 4e-3,
    "reduce": 2e-3,
}


@pytest.mark.parametrize("layout", ["data", "zero3", "tensor", "pipeline", "full", "selective"])
def test_the_host_s_work_is_counted_by_parameter_group_and_op(layout: str) -> None:
    """Of one block, with a profile that says it over one that does not."""
    from small_graphs import small_graph

    from paraplan.block_compute import block_compute
    from paraplan.block_cost import block_cost
    from paraplan.data_traffic import Numerics
    from paraplan.layout import Layout

    layouts = {
        "data": Layout(data_replicate=2, micro_batches=4),
        "zero3": Layout(data_shard=2, zero_stage=3, micro_batches=4),
        "tensor": Layout(tensor=2),
        "pipeline": Layout(pipeline=2, micro_batches=4, schedule="1f1b"),
    }
    chosen = layouts.get(layout, layouts["pipeline"])
    block = next(block for block in small_graph().blocks.values() if block.role == "layer")
    calls = sum(op.count for op in block.variants[1].ops if op.phase == "forward")
    before, made = made_cluster()
    tasks: dict[Any, Seconds] = {
        HostTask(what): Seconds(HOST_SECONDS[what], 0.0) for what in HOST_FIGURES
    }
    after = measured_cluster(before, replace(made, tasks={**made.tasks, **tasks}))

    def cost(cluster: Cluster) -> Any:
        compute = block_compute(block, chosen, device=cluster.device, cluster=cluster)
        return block_cost(
            compute,
            1000.0,
            0.0,
            chosen,
            numerics=Numerics(4, 8.0),
            device=cluster.device,
            cluster=cluster,
            trained_tensors=9,
        )

    less, more = cost(before), cost(after)
    wrapped = layout in ("data", "zero3")
    update = HOST_SECONDS["sharded_update" if wrapped or layout == "tensor" else "update"]
    assert more.optimizer - less.optimizer == pytest.approx(9 * update)
    once = HOST_SECONDS["reduce"] if layout == "data" else 0.0
    assert more.per_step - less.per_step == pytest.approx(once, abs=1e-12)
    mode: Any = layout if layout in ("full", "selective") else "none"
    each = more.forward + more.backward[mode] - less.forward - less.backward[mode]
    expected = HOST_SECONDS["hooks"] if wrapped else 0.0
    expected += HOST_SECONDS["reduce"] if layout == "zero3" else 0.0
    expected += 9 * HOST_SECONDS["local"] if layout == "tensor" else 0.0
    expected += calls * HOST_SECONDS.get(f"{layout}_recompute", 0.0)
    assert each == pytest.approx(expected, abs=1e-12)


def test_the_interval_of_a_measured_device_is_its_own(tmp_path: Any) -> None:
    from paraplan import estimate

    cluster, made = made_cluster()
    intervals = []
    for number, profile in enumerate(
        (cluster, with_layers(cluster, LayerFit(1.0, None, 2), 0.0, made))
    ):
        path = tmp_path / f"{number}.json"
        path.write_text(profile.model_dump_json(exclude_none=True))
        plan = estimate("gpt2", cluster=str(path), fix="data_replicate=2", seq_len=128)
        intervals.append(plan.prediction.interval)
    unfitted, measured = intervals
    assert unfitted.kind == "a device that no whole run has corrected"
    assert measured.kind == "a device that plan profile has measured"
    assert measured.high_seconds - measured.low_seconds < unfitted.high_seconds - (
        unfitted.low_seconds
    )


def test_a_profile_survives_its_file(tmp_path: Any) -> None:
    from paraplan.cluster import load_cluster

    cluster, _ = made_cluster()
    path = tmp_path / "mine.json"
    path.write_text(cluster.model_dump_json(indent=1, exclude_none=True))
    again = load_cluster(path)
    assert again == cluster
    assert again.sha256 == cluster.sha256


def test_real_processes_measure_together() -> None:
    from paraplan.measure_ranks import RankSettings, key_of, measure_on_ranks

    tasks: list[Any] = [
        GemmTask("float32", 64, 64, 64),
        GemmTask("float32", 256, 256, 256),
        GemmTask("bfloat16", 64, 64, 64),
        GemmTask("float8", 64, 96, 128),
        AttentionTask("float32", (1, 2, 1, 32, 32, 16, 16), True, "backward"),
        LinkTask("reduce_scatter", 2, 4096),
        LinkTask("transfer", 2, 4096),
        RateTask("optimizer", 28 * 1000),
        *(HostTask(what) for what in HOST_FIGURES),
    ]
    known: dict[str, Any] = {}
    facts = measure_on_ranks(tasks, RankSettings("cpu", 2, True, 1), known.__setitem__)
    assert set(known) == {key_of(task) for task in tasks}
    assert all(timing.seconds > 0 for timing in known.values())
    # 64 times the arithmetic takes longer, whatever else the machine does.
    assert known[key_of(tasks[1])].seconds > known[key_of(tasks[0])].seconds
    # So does an update by way of DTensor, five times or more in every run here.
    updates = [known[key_of(HostTask(what))].seconds for what in ("update", "sharded_update")]
    assert updates[1] > updates[0]
    assert facts.capacity_bytes > facts.framework_bytes > 0


def test_products_are_measured_in_every_dtype_that_the_device_has() -> None:
    from paraplan.profiling import _other_dtypes

    for name, wanted in (
        ("h100-sxm", ("float16", "float32", "float8")),
        ("a100-80gb-sxm", ("float16", "float32")),
        ("cpu", ("bfloat16",)),
    ):
        device = load_device(name)
        assert _other_dtypes(device) == wanted
        for quick in (False, True):
            kind = "cpu" if name == "cpu" else "cuda"
            main = "float32" if kind == "cpu" else "bfloat16"
            tasks = make_tasks(Scope(kind, 1, quick, main, other_dtypes=wanted))
            sizes = Counter(task.dtype for task in tasks if isinstance(task, GemmTask))
            grid = 1 if quick else 27 if kind == "cpu" else 64
            assert sizes == {main: sizes[main], **dict.fromkeys(wanted, grid)}
            assert sizes[main] > grid


def test_layers_are_measured_while_ranks_wait_for_a_core() -> None:
    from paraplan.measure_ranks import RankSettings, key_of, measure_on_ranks
    from paraplan.profile_tasks import gpt2_config

    layer = LayerTask(gpt2_config(32, 2, vocabulary=64), "float32", 8, 1, True)
    tasks: list[Any] = [layer, replace(layer, alone=True), layer]
    tasks.append(LinkTask("transfer", 2, 4096))  # in a ring
    known: dict[str, Any] = {}
    measure_on_ranks(tasks, RankSettings("cpu", 3, True, 1), known.__setitem__)
    assert set(known) == {key_of(task) for task in tasks}
    assert all(timing.seconds > 0 for timing in known.values())


def test_a_timing_is_of_all_ranks() -> None:
    from paraplan.measure_clock import together

    timing = together([[1.0, 1.0], [1.0, 3.0]])
    assert timing.seconds == 1.5  # the mean of the ranks' medians
    assert timing.lag == pytest.approx(1 / 3)  # each batch's slowest: 1 and 3; the mean of all: 1.5


def test_a_rank_that_fails_is_told_in_one_error() -> None:
    from paraplan.errors import InputError
    from paraplan.measure_ranks import RankSettings, measure_on_ranks

    bad: list[Any] = [AttentionTask("float32", (1, 3, 2, 8, 8, 8, 8), True, "forward")]
    with pytest.raises(InputError, match="measuring failed"):
        measure_on_ranks(bad, RankSettings("cpu", 2, True, 1), lambda key, timing: None)


def test_recorded_calls_are_made_again_with_the_same_sizes() -> None:
    import json

    import torch

    from paraplan.measure_calls import record_calls, replay
    from paraplan.models import model_of_config
    from paraplan.profile_tasks import llama_config

    source = model_of_config(json.loads(llama_config(32, 2, vocabulary=64)))
    calls = record_calls(source, sequence_length=8, sequences=2, compute_dtype="float32")
    memory = [call for call in calls if call.kernel.kind == "memory"]
    assert {"aten.mul", "aten.silu", "aten._log_softmax"} <= {call.name for call in memory}
    for call in memory:
        made = replay(call, torch.device("cpu"))()
        tensors = made if isinstance(made, (tuple, list)) else [made]
        assert all(t.device.type == "cpu" for t in tensors if isinstance(t, torch.Tensor))


def test_an_interrupted_profile_goes_on(tmp_path: Any) -> None:
    path = tmp_path / "mine.json.partial"
    kept = Kept(path, "this machine")
    kept.add("a", (1.0, 0.1))
    kept.save()
    assert Kept(path, "this machine").known == {"a": [(1.0, 0.1)]}
    assert Kept(path, "another").known == {}
    path.write_text("{half")
    assert Kept(path, "this machine").known == {}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--output", "mine.toml"], "a name that ends in .json is wanted"),
        (["--gpus", "0"], "--gpus is 0"),
        (["--device", "tpu"], "invalid choice"),
        (["--device", "cpu", "--model", "no-such-model"], "unknown model"),
    ],
)
def test_wrong_options_are_told_in_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from paraplan.cli import main

    assert main(["profile", *arguments]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told


def test_layers_are_timed_over_the_whole_run_and_it_goes_on_where_it_stopped() -> None:
    layers = [LayerTask("{}", "float32", 8, n, n == 1) for n in (1, 2)]
    others = [RateTask("floor", n) for n in range(1, 8)]
    schedule = schedule_of([*layers, *others], 2, 3)
    assert Counter(schedule) == {
        **dict.fromkeys(layers, 2 * 3),
        **dict.fromkeys(others, 2),
    }
    places = [i for i, task in enumerate(schedule) if task == layers[0]]
    assert max(b - a for a, b in pairwise([0, *places])) <= len(others) // 3 + 2 * len(layers)
    firsts = [b for a, b in pairwise(schedule) if b in layers and a not in layers]
    assert Counter(firsts) == {layers[0]: 3, layers[1]: 3}  # none is always the first
    done = schedule[:11]
    left = still_missing(schedule, Counter(repr(task) for task in done), repr)
    assert left == schedule[11:]


def test_layers_lose_what_the_machine_is_slow_at_times() -> None:
    """A quarter of the time twice as slow: ops are what they are while it is not; layers know."""
    slow_once = [(1.0, 0.0, 0.0)] * 3 + [(2.0, 0.0, 0.4)]
    quiet = [(3.0, 0.0, 0.0)] * 4
    layers = [LayerTask("{}", "float32", 8, n, True) for n in (1, 2)]
    op, rate = GemmTask("float32", 8, 8, 8), RateTask("optimizer", 8)
    link = LinkTask("all_reduce", 2, 8)
    known = over_rounds(
        {layers[0]: slow_once, layers[1]: quiet, op: slow_once, rate: slow_once, link: slow_once}
    )
    # The means of both layers are 1.25 and 3, 1.0625 times their medians, which keep their ratio.
    assert known[layers[0]] == Seconds(1.0625, 1.0, 0.1)
    assert known[layers[1]] == Seconds(3 * 1.0625, 0.0, 0.0)
    assert known[op] == known[rate] == Seconds(1.0, 1.0, 0.0)
    assert known[link] == Seconds(1.25, 1.0, 0.1)
    assert over_rounds({op: [(2.0, 0.0, 0.0), (1.0, 0.0, 0.0)]})[op].seconds == 1.0
