"""What published runs' frameworks do that their layouts do not say."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise
from random import Random

import pytest
from made_rows import row

from paraplan.block_compute import block_compute
from paraplan.collectives import Group, collective_seconds, transfer_seconds
from paraplan.data_traffic import tensor_group
from paraplan.device import load_device
from paraplan.graph import Amount, Op, op_flops
from paraplan.problem import Problem, chain_cost
from paraplan.validate_frameworks import framework_of
from paraplan.validate_graph import closed_form_graph, parameter_count
from paraplan.validate_layout import engine_of, layout_of, parameter_cuts, part_seconds
from paraplan.validate_machines import OMNIPATH_SHARE, Machines, node_bytes_per_second
from paraplan.validate_model import ASYNC_TENSOR, sizes_of
from paraplan.validate_ops import ModelSizes
from paraplan.validate_predict import predict
from paraplan.validate_rows import Unusable
from paraplan.workload import make_workload

GIGABITS = 1e9 / 8


def test_omnipath_moves_what_was_measured_on_it() -> None:
    """4 GB summed by 32 ranks in 1.531 s: 2 * 31 / 32 of it crossed one card of 100 Gb/s."""
    measured = 4e9 / 1.531 * 2 * 31 / 32
    assert pytest.approx(OMNIPATH_SHARE * 0.92, rel=0.01) == measured / (100 * GIGABITS)
    found = node_bytes_per_second("4xOmniPath100/node")
    assert found == pytest.approx(OMNIPATH_SHARE * 400 * GIGABITS)
    one = row(
        gpu="A100-80GB-SXM", network="4xOmniPath100/node", n_gpus="32", tp="4", dp="8", pp="1"
    )
    cluster, _ = Machines().of(one)  # two of each four data groups' ranks share a card and a ring
    seconds = collective_seconds("all_gather", 4e9, Group(8, 2), cluster)
    assert 4e9 * 7 / 8 / seconds == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("seed", range(40))
def test_parameter_cuts_are_the_best_of_all(seed: int) -> None:
    """No cut into as many runs of blocks has a largest stage with fewer parameters."""
    draw = Random(seed)
    layers, stages = draw.randint(1, 12), draw.randint(1, 6)
    vocab = draw.choice([1024, 32768, 262144])
    sizes = sizes_of(row(layers=str(layers), vocab=str(vocab), params_b=""))
    each = (parameter_count(sizes) - 2 * vocab * sizes.hidden) // layers
    blocks = [vocab * sizes.hidden, *(each,) * layers, vocab * sizes.hidden]

    def largest(cuts: tuple[int, ...]) -> int:
        return max(sum(blocks[a:b]) for a, b in pairwise(cuts))

    found = parameter_cuts(sizes, stages)
    assert found[0] == 0 and found[-1] == len(blocks)
    assert len(found) - 1 <= stages
    inner = combinations(range(1, len(blocks)), min(stages, len(blocks)) - 1)
    assert largest(found) == min(largest((0, *some, len(blocks))) for some in inner)


def test_aleph_alphas_stages() -> None:
    """65 B over 8: ten and eleven layers, the last stage five and the head."""
    sizes = sizes_of(
        row(
            source="Aleph Alpha",
            params_b="",
            layers="80",
            hidden="8192",
            ffn="22016",
            heads="64",
            kv_heads="64",
            vocab="128000",
        )
    )
    assert parameter_cuts(sizes, 8) == (0, 10, 21, 32, 43, 54, 65, 76, 82)


def _transfer(source: str, tensor: int, sequence_parallel: str = "0") -> float:
    cells = {"n_gpus": "64", "tp": str(tensor), "pp": "8", "dp": str(8 // tensor)}
    one = row(source=source, sequence_parallel=sequence_parallel, **cells)
    sizes = sizes_of(one)
    cluster, device = Machines().of(one)
    layout = layout_of(one, sizes)
    problem = Problem(
        graph=closed_form_graph(sizes, tensor),
        cluster=cluster,
        device=device,
        workload=make_workload(
            sequence_length=sizes.sequence_length,
            devices=cluster.devices,
            global_batch=16,
            precision="bf16",
        ),
        capacity_bytes=device.memory_capacity_bytes.value,
        engine=sizes.framework.engine,
    )
    return chain_cost(problem, layout).transfer_seconds(0, 3)


def test_slices_are_sent_and_gathered() -> None:
    """Megatron-LM's tensor ranks send a slice each; others, and sequence parallelism, do not."""
    one = row(n_gpus="64", tp="8", pp="8", dp="1")
    sizes = sizes_of(one)
    cluster, _ = Machines().of(one)
    whole = 2 * sizes.sequence_length * sizes.hidden
    sent = [transfer_seconds(whole / n, between_nodes=True, cluster=cluster) for n in (1, 8)]
    group = tensor_group(layout_of(one, sizes), cluster)
    gathered = collective_seconds("all_gather", whole, group, cluster)
    assert _transfer("Korthikanti", 8) == pytest.approx(sent[1] + gathered)
    assert _transfer("Korthikanti", 8, "1") == pytest.approx(sent[1])
    assert _transfer("Korthikanti", 1) == pytest.approx(sent[0])
    assert _transfer("Aleph Alpha", 8) == pytest.approx(sent[0])


def _flops(sizes: ModelSizes, phase: str) -> float:
    ops = closed_form_graph(sizes, 1).blocks["head"].variants[1].ops
    return sum(op_flops(op, 1) * op.count for op in ops if op.phase == phase)


def test_aleph_alphas_head_is_rerun_as_its_layers_are() -> None:
    none, full = (sizes_of(row(source="Aleph Alpha", recompute=r)) for r in ("none", "full"))
    logits = 2 * none.sequence_length * none.hidden * none.vocab
    assert _flops(full, "forward") == _flops(none, "forward") == logits
    assert _flops(full, "backward") == _flops(none, "backward") + logits
    exchanges = [
        closed_form_graph(sizes, 2).blocks["head"].variants[2].collectives for sizes in (none, full)
    ]
    assert len(exchanges[1]) == len(exchanges[0]) + 1
    others = sizes_of(row(source="Megatron", recompute="full"))
    assert _flops(others, "backward") == 2 * logits


def test_torchs_loss_needs_three_copies_in_fp32() -> None:
    """Logarithms of the softmax and two gradients; the logarithms are kept."""
    sizes = sizes_of(row(source="torchtitan"))
    head = closed_form_graph(sizes, 2).blocks["head"].variants[2]
    logits, input_bytes = sizes.sequence_length * sizes.vocab // 2, 2 * 2048 * 2048
    assert head.saved["none"].sharded.per_sequence == 4 * logits
    assert head.peak_bytes[0].per_sequence == 12 * logits + 3 * input_bytes


@pytest.mark.parametrize(
    ("source", "moved"), [("torchtitan", 2), ("Megatron", 2 + 2), ("Korthikanti", 4 + 4)]
)
def test_products_write_gradients_or_add_them(source: str, moved: int) -> None:
    """Bytes of each weight's gradient: written in bf16, or read and written where it is summed."""
    ops = closed_form_graph(sizes_of(row(source=source)), 1).blocks["head"].variants[1].ops
    weights = 2048 * 32768
    (gradient,) = [op for op in ops if op.kind == "gemm" and op.write_bytes.per_sequence == 0]
    assert gradient.write_bytes.fixed == moved * weights
    assert gradient.read_bytes.per_sequence == 2 * 2048 * (2048 + 32768)


def test_llm_foundrys_metrics_read_the_logits_again() -> None:
    """Two cross entropies in fp32, forward alone, beside a fused loss of 6 bytes a logit."""
    sizes = sizes_of(row(source="llm-foundry"))
    ops = closed_form_graph(sizes, 1).blocks["head"].variants[1].ops
    logits = sizes.sequence_length * sizes.vocab
    metrics = [op for op in ops if op.name == "aten.metric"]
    moved = [op.read_bytes.per_sequence + op.write_bytes.per_sequence for op in metrics]
    assert moved == [(2 + 4 + 4 + 4) * logits] * 2  # cast, and logarithms of the softmax
    assert {op.phase for op in metrics} == {"forward"}


def test_async_tensor_exchanges_hide_in_part() -> None:
    cells = {"source": "torchtitan", "pp": "1", "dp": "1", "tp": "8", "zero_or_fsdp": "none"}
    plain, hidden = (row(notes=notes, **cells) for notes in ("", "async TP"))
    shares = [sizes_of(one).framework.engine.hidden_tensor for one in (plain, hidden)]
    assert shares == [0.0, ASYNC_TENSOR]
    assert predict(hidden).predicted_s < predict(plain).predicted_s


def test_bf16_sums_of_deepspeed_are_all_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice what a reduce-scatter of the same sums moves, so a longer step on a slow network."""
    cells = {"precision": "bf16 (fp32 grad accum)", "network": "1x100Gb/s", "n_gpus": "64"}
    cells |= {"tp": "8", "pp": "1", "dp": "8", "gpu": "A100-80GB-SXM"}
    scattered, summed = (
        sizes_of(row(source=source, **cells)).framework.engine.reduce_bytes
        for source in ("NeMo", "Megatron-DeepSpeed")
    )
    assert (scattered, summed) == (4, 8)
    moved = [
        sizes_of(row(source="Megatron-DeepSpeed", precision=text)).framework.gradient_bytes
        for text in ("fp16", "bf16 (fp32 grad accum)")
    ]
    assert moved == [2 + 2 + 2, 2 + 4 + 4]  # the gradient read, the sum read and written
    one = row(source="Megatron-DeepSpeed", **cells)
    sizes, seconds = sizes_of(one), predict(one).predicted_s
    engine = replace(sizes.framework.engine, reduce_bytes=scattered)
    rest = replace(sizes, framework=replace(sizes.framework, engine=engine))
    monkeypatch.setattr("paraplan.validate_predict.sizes_of", lambda _: rest)
    assert seconds > predict(one).predicted_s


def _layer_ops(tensor: int = 1, **cells: str) -> tuple[Op, ...]:
    sizes = sizes_of(row(task="lora", **cells))
    return closed_form_graph(sizes, tensor).blocks["layer"].variants[tensor].ops


def test_adapters_are_computed_beside_frozen_projections() -> None:
    """Rank 16 in front of queries, keys and values and behind attention: six products each."""
    rank, hidden, tokens = 16, 2048, 2048
    narrow = [op for op in _layer_ops() if op.kind == "gemm" and rank in [d.fixed for d in op.dims]]
    each = 2 * tokens * rank * (hidden + 3 * hidden) + 2 * tokens * rank * (hidden + hidden)
    assert sum(op_flops(op, 1) for op in narrow) == 3 * each
    assert sum("dropout" in op.name for op in _layer_ops()) == 4
    nemos = _layer_ops(source="NVIDIA NeMo")
    assert not any("dropout" in op.name for op in nemos)
    products = [op for op in nemos if op.kind == "gemm" and rank in [d.fixed for d in op.dims]]
    assert sum(op_flops(op, 1) for op in products) == 3 * 2 * tokens * rank * 4 * hidden


def test_adapters_gather_once_more_each() -> None:
    """Two reductions each way, and a gather each way for each adapter."""
    message = Amount(0, 2 * 2048 * 2048)
    for source, adapters in (("MLPerf", 2), ("NVIDIA NeMo", 1)):
        sizes = sizes_of(row(task="lora", source=source))
        exchanges = closed_form_graph(sizes, 2).blocks["layer"].variants[2].collectives
        assert {c.message_bytes for c in exchanges} == {message}
        for phase in ("forward", "backward"):
            kinds = sorted(c.kind for c in exchanges if c.phase == phase)
            assert kinds == ["gather"] * adapters + ["reduction"] * 2


def test_zero3_of_2021_exchanges_parts() -> None:
    """32 micro-batches gather and reduce 65 weights of 64 ranks: a view and a copy of each part."""
    count = 16 * 12 * 2048**2 + 32768 * 2048
    cells = {"n_gpus": "64", "tp": "1", "pp": "1", "dp": "64", "params_b": str(count / 1e9)}
    cells |= {"global_batch": "2048", "micro_batch": "1", "gpu": "A100-80GB-SXM"}
    old = row(source="SC'21", zero_or_fsdp="zero3", **cells)
    sizes, device = sizes_of(old), load_device("a100-80gb-sxm")
    assert sizes.tied and not sizes.gated
    layout = layout_of(old, sizes)
    assert (layout.micro_batches, layout.data_shard) == (32, 64)
    each = (16 * 4 + 1) * 64 * 2 * device.host_launch_seconds.value
    rate = device.memory_bandwidth_bytes_per_second.value * device.memory_efficiency.value
    copy = 2 * count / rate  # of 2 bytes each, once read or written
    two, three = (part_seconds(sizes, layout, again, device) for again in (False, True))
    assert two == pytest.approx(32 * (3 * each + (2 * 3 + 2) * copy))
    assert three == pytest.approx(32 * (4 * each + (3 * 3 + 2) * copy))
    replicated = layout_of(row(source="SC'21", zero_or_fsdp="none", **cells), sizes)
    assert part_seconds(sizes, replicated, True, device) == 0.0
    new = sizes_of(row(source="torchtitan", **cells))
    assert part_seconds(new, layout, True, device) == 0.0


@pytest.mark.parametrize(("sharding", "reduced", "summed"), [("zero3", 2, 0), ("none", 4, 10)])
def test_zero_3_of_2021_reduces_fp16_gradients(sharding: str, reduced: int, summed: int) -> None:
    """As DeepSpeed makes them; Megatron-LM adds them to a whole sum in fp32, and reduces that."""
    framework = sizes_of(row(source="SC'21", zero_or_fsdp=sharding)).framework
    assert (framework.engine.reduce_bytes, framework.gradient_bytes) == (reduced, summed)


@pytest.mark.parametrize(("stages", "longer"), [("1", 0.0), ("2", 0.03)])
def test_a_pipeline_costs_nanotrons_step_once(
    stages: str, longer: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = row(source="nanotron", tp="1", pp=stages, dp=str(8 // int(stages)))
    whole = predict(one).predicted_s
    sizes = sizes_of(one)
    rest = replace(sizes, framework=replace(sizes.framework, pipeline_seconds=0.0))
    monkeypatch.setattr("paraplan.validate_predict.sizes_of", lambda _: rest)
    assert whole - predict(one).predicted_s == pytest.approx(longer, abs=1e-9)


@pytest.mark.parametrize(
    ("devices", "stages", "waits"), [("16", "2", True), ("16", "1", False), ("8", "2", False)]
)
def test_nanotrons_exchanges_wait_in_pipelines_over_nodes(
    devices: str, stages: str, waits: bool
) -> None:
    """Each of a layer's exchanges waits for 2 tp - 1 steps; two forward, two backward."""
    tensor = 4
    data = int(devices) // int(stages) // tensor
    one = row(
        source="nanotron",
        n_gpus=devices,
        tp=str(tensor),
        pp=stages,
        dp=str(data),
        global_batch=str(8 * data),
    )
    sizes = sizes_of(one)
    cluster, device = Machines().of(one)
    layout = layout_of(one, sizes)
    engine = engine_of(sizes, layout, cluster)
    layer = closed_form_graph(sizes, tensor).blocks["layer"]
    made, free = (
        block_compute(layer, layout, device=device, cluster=cluster, engine=one)
        for one in (engine, replace(engine, exchange_wait_seconds=0.0))
    )
    assert free.forward.launch > 0 < free.backward.launch  # the host is what is waited for
    wanted = 2 * (2 * tensor - 1) * sizes.framework.wait_seconds if waits else 0.0
    assert made.forward.total - free.forward.total == pytest.approx(wanted, abs=1e-12)
    assert made.backward.total - free.backward.total == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(
    ("tensor", "recompute", "doublings"),
    [(1, "full", 0), (2, "full", 1), (8, "full", 3), (8, "none", 0)],
)
def test_aleph_alphas_tensor_ranks_wait_in_each_recomputed_micro_batch(
    tensor: int, recompute: str, doublings: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = 8 // tensor
    one = row(
        source="aleph alpha",
        tp=str(tensor),
        pp="1",
        dp=str(data),
        micro_batch="2",
        global_batch=str(16 * data),
        recompute=recompute,
    )
    whole, sizes = predict(one).predicted_s, sizes_of(one)
    rest = replace(sizes, framework=replace(sizes.framework, rerun_wait_seconds=0.0))
    monkeypatch.setattr("paraplan.validate_predict.sizes_of", lambda _: rest)
    waited = 8 * doublings * sizes.framework.rerun_wait_seconds
    assert sizes.framework.rerun_wait_seconds > 0
    assert whole - predict(one).predicted_s == pytest.approx(waited, abs=1e-9)


@pytest.mark.parametrize(("vocab", "forward", "backward"), [("32768", 18, 22), ("128000", 26, 26)])
def test_torchs_loss_reads_long_rows_again(vocab: str, forward: int, backward: int) -> None:
    """With Aleph Alpha's accuracy; three readings instead of one, and two, of 4 bytes a logit."""
    sizes = sizes_of(row(source="aleph alpha", vocab=vocab, params_b=""))
    ops = closed_form_graph(sizes, 1).blocks["head"].variants[1].ops
    moved = {op.phase: op.read_bytes.per_sequence for op in ops if "loss" in op.name}
    logits = sizes.sequence_length * int(vocab)
    assert moved == {"forward": forward * logits, "backward": backward * logits}


def test_what_tensor_ranks_gather_is_not_summed() -> None:
    """fp32 sums make reductions twice as long; gathers of logits stay as they are."""
    one = row(source="aleph alpha", tp="8", pp="1", dp="1", recompute="full", global_batch="8")
    sizes = sizes_of(one)
    cluster, device = Machines().of(one)
    layout, blocks = layout_of(one, sizes), closed_form_graph(sizes, 8).blocks
    narrow = replace(sizes.framework.engine, tensor_bytes=2)
    message = 2 * sizes.sequence_length * sizes.vocab * layout.micro_batch_size
    group = tensor_group(layout, cluster)
    for engine in (narrow, replace(narrow, tensor_bytes=4)):
        head = block_compute(blocks["head"], layout, device=device, cluster=cluster, engine=engine)
        gathered = collective_seconds("all_gather", message, group, cluster)
        assert head.forward.tensor == pytest.approx(gathered)


@pytest.mark.parametrize("sequence_parallel", ["0", "1"])
def test_adapters_leave_the_reduction_that_a_rerun_skips(sequence_parallel: str) -> None:
    one = row(task="lora", tp="8", pp="1", dp="1", sequence_parallel=sequence_parallel)
    sizes = sizes_of(one)
    cluster, device = Machines().of(one)
    layout = layout_of(one, sizes)
    engine = replace(sizes.framework.engine, hidden_tensor=0.0)
    layer = closed_form_graph(sizes, 8).blocks["layer"]
    made = block_compute(layer, layout, device=device, cluster=cluster, engine=engine)
    message = 2 * sizes.sequence_length * sizes.hidden * layout.micro_batch_size
    kind = "reduce_scatter" if layout.sequence_parallel else "all_reduce"
    skipped = collective_seconds(kind, message, tensor_group(layout, cluster), cluster)
    assert made.forward.tensor - made.rerun["full"].tensor == pytest.approx(skipped)


@pytest.mark.parametrize("source", ["nanotron", "aleph alpha"])
def test_virtual_stages_of_unequal_cuts_are_not_guessed(source: str) -> None:
    one = row(source=source, tp="1", pp="2", dp="4", vp="2")
    with pytest.raises(Unusable, match="virtual stages"):
        predict(one)


def test_reruns_are_no_flops_of_the_model() -> None:
    graphs = [
        closed_form_graph(sizes_of(row(source="aleph alpha", recompute=mode)), 1)
        for mode in ("none", "full")
    ]
    assert graphs[0].model_flops_per_sequence == graphs[1].model_flops_per_sequence


def test_first_match_is_the_more_special_framework() -> None:
    names = {
        text: framework_of((text,), compiled=False).name
        for text in ("nvidia nemo", "mlperf", "vtrain, megatron-deepspeed", "aleph alpha")
    }
    assert names == {
        "nvidia nemo": "NeMo",
        "mlperf": "Megatron Core and Transformer Engine",
        "vtrain, megatron-deepspeed": "Megatron-DeepSpeed",
        "aleph alpha": "Aleph Alpha scaling",
    }
