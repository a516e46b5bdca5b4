"""`plan validate` on a small made-up file: rows, models, layouts, statistics, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from made_rows import EXPERTS, row, write

from paraplan.cluster import load_cluster
from paraplan.device import load_device
from paraplan.errors import InputError
from paraplan.graph import op_flops
from paraplan.problem import MEMORY_FRACTION
from paraplan.validate import as_json, validate_files, validate_main
from paraplan.validate_graph import closed_form_graph, parameter_count
from paraplan.validate_layout import (
    cost_cuts,
    crowded_seconds,
    engine_of,
    equal_cuts,
    layout_of,
)
from paraplan.validate_machines import node_bytes_per_second
from paraplan.validate_model import sizes_of
from paraplan.validate_predict import predict
from paraplan.validate_recompute import kept_layers
from paraplan.validate_rows import Unusable
from paraplan.validate_statistics import summarise


def test_parameter_count_decides_what_the_columns_leave_open() -> None:
    # 16 layers of 4 h^2 + 2 or 3 h ffn, and one or two embeddings of 67.1 M
    attention, mlp, embedding = 16 * 4 * 2048**2, 16 * 2048 * 8192, 32768 * 2048
    for gated in (False, True):
        for tied in (False, True):
            count = attention + (3 if gated else 2) * mlp + (1 if tied else 2) * embedding
            sizes = sizes_of(row(params_b=f"{count / 1e9:.3f}"))
            assert (sizes.gated, sizes.tied) == (gated, tied)
            assert parameter_count(sizes) == count


@pytest.mark.parametrize("tensor", [1, 2, 8])
@pytest.mark.parametrize("attention", ["flash", "unfused"])
def test_tensor_ranks_share_the_work_of_products(tensor: int, attention: str) -> None:
    sizes = sizes_of(row(attn_impl=attention))
    graph = closed_form_graph(sizes, tensor)
    for block in graph.blocks.values():
        whole, part = block.variants[1], block.variants[tensor]
        assert part.parameters == whole.parameters // tensor
        for one, other in zip(whole.ops, part.ops, strict=True):
            assert (one.name, one.phase, one.kind) == (other.name, other.phase, other.kind)
    assert sum(
        block.variants[1].parameters * (sizes.layers if name == "layer" else 1)
        for name, block in graph.blocks.items()
    ) == parameter_count(sizes)


def test_experts_are_those_of_the_columns() -> None:
    """Parameters decide the head size; a token's FLOPs are those of its two experts."""
    sizes = sizes_of(row(**EXPERTS))
    attention, experts, router = 4 * 2048**2, 8 * 3 * 2048 * 4096, 8 * 2048
    embeddings = 2 * 32768 * 2048
    assert parameter_count(sizes) == 16 * (attention + experts + router) + embeddings
    assert sizes.head_dim == 128
    narrow = 16 * (attention // 2 + experts + router) + embeddings
    assert sizes_of(row(**EXPERTS | {"params_b": f"{narrow / 1e9:.3f}"})).head_dim == 64
    layer = closed_form_graph(sizes, 1).blocks["layer"].variants[1]
    assert layer.expert_parameters == experts
    products = sum(op_flops(op, 1) for op in layer.ops if op.expert)
    assert products == 6 * sizes.sequence_length * experts / 4


def test_expert_parallelism_divides_the_experts_weights() -> None:
    alone, spread = (
        predict(row(**EXPERTS, tp="1", pp="1", ep=str(n), zero_or_fsdp="none")) for n in (1, 8)
    )
    parameters = 16 * 8 * 3 * 2048 * 4096
    # bf16 parameters and gradients, and 12 bytes of fp32 parameter and Adam's state
    assert alone.predicted_gib - spread.predicted_gib > 16 * parameters * 7 / 8 / 2**30


def test_tensor_exchanges_cost_the_host_launches_of_their_own() -> None:
    """nanotron: two exchanges in a layer's forward; a backward launches twice as much."""
    sizes = sizes_of(row(source="nanotron"))
    alone, divided = (
        sum(op.count for op in closed_form_graph(sizes, 2).blocks["layer"].variants[tensor].ops)
        for tensor in (1, 2)
    )
    assert divided - alone == 3 * 2 * sizes.framework.exchange_calls > 0


def test_model_flops_are_those_of_the_closed_form() -> None:
    # 6 FLOPs per weight of a product and token, and 3.5 times the causal attention's forward.
    sizes = sizes_of(row())
    products = parameter_count(sizes) - sizes.vocab * sizes.hidden
    s = sizes.sequence_length
    attention = 3.5 * 4 * sizes.layers * sizes.hidden * s * (s + 1) / 2
    flops = closed_form_graph(sizes, 1).model_flops_per_sequence
    assert flops == pytest.approx(6 * products * s + attention, rel=1e-12)


def test_saved_activations_are_korthikantis() -> None:
    # sbh (10 + 24 / t + 5 a s / (h t)) for a GPT without flash attention (equation 2).
    cells = {"ffn": "8192", "params_b": "0.872", "attn_impl": "unfused+fused-softmax"}
    sizes = sizes_of(row(**cells))
    assert not sizes.gated
    s, h = sizes.sequence_length, sizes.hidden
    for t in (1, 2, 4):
        saved = closed_form_graph(sizes, t).blocks["layer"].variants[t].saved["none"]
        whole = saved.sharded.per_sequence + saved.replicated.per_sequence
        expected = s * h * (10 + 24 / t + 5 * sizes.heads * s / (h * t))
        assert whole == pytest.approx(expected, rel=1e-12)


def test_narrow_products_keep_narrow_inputs() -> None:
    """Both norms' outputs, attention's and the activation's; 8 bits take half of 16."""
    wide, narrow = (
        closed_form_graph(sizes_of(row(precision=p)), 1).blocks["layer"].variants[1].saved["none"]
        for p in ("bf16", "fp8")
    )
    s, h, ffn = 2048, 2048, 8192
    assert wide.replicated.per_sequence - narrow.replicated.per_sequence == 2 * s * h
    assert wide.sharded.per_sequence - narrow.sharded.per_sequence == s * (h + ffn)


def test_nanotron_keeps_tensor_parallel_activations_in_shards() -> None:
    """Two norms' inputs and outputs, and the outputs of two row-parallel products: 12 s b h / t."""
    sizes = sizes_of(row(source="nanotron"))
    one, two = (
        closed_form_graph(sizes, 2).blocks["layer"].variants[t].saved["none"] for t in (1, 2)
    )
    s, h = sizes.sequence_length, sizes.hidden
    assert one.replicated.per_sequence == 8 * s * h
    assert two.replicated.per_sequence == 12 * s * h  # divided by sequence parallelism
    assert one.gathered.per_sequence == two.gathered.per_sequence == 0


def test_sums_of_gradients_stand_before_a_backward_has_made_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """4 of the 4 bytes a parameter of a run on one rank, and what fragments with them."""
    cells = {"source": "nanotron", "dp": "1", "tp": "1", "pp": "1", "n_gpus": "1"}
    made = row(**cells, micro_batch="4", global_batch="4")
    standing = predict(made).predicted_gib
    monkeypatch.setattr(
        "paraplan.validate_predict.engine_of",
        lambda *known: replace(engine_of(*known), standing_gradient_bytes=0),
    )
    graph = closed_form_graph(sizes_of(made), 1)
    parameters = sum(graph.blocks[item.block].variants[1].parameters for item in graph.chain)
    fragments = 1 + load_device("h100").fragmentation_fraction.value
    missing = (standing - predict(made).predicted_gib) * 2**30
    assert missing == pytest.approx(4 * parameters * fragments)


def test_a_crowded_device_waits_at_every_transfer() -> None:
    cells = {"source": "nanotron", "pp": "4", "dp": "1", "micro_batch": "2"}
    waits = 0.265 * (4 * 8 + 2 * 2)
    for nodes, needed, wanted in ((63, 80e9, 0.0), (1, 81e9, waits), (64, 1e9, waits)):
        made = row(**cells)
        framework = sizes_of(made).framework
        assert crowded_seconds(made, framework, nodes, needed, 80e9) == pytest.approx(wanted)
    assert crowded_seconds(row(), sizes_of(row()).framework, 64, 81e9, 80e9) == 0.0
    heavy = cells | {"seq_len": "8192", "micro_batch": "16", "global_batch": "256"}
    found = predict(row(**heavy))
    assert not found.fits and found.predicted_s > 0.265 * (4 * 16 + 2 * 2)


@pytest.mark.parametrize(
    ("text", "data", "wanted"),
    [
        ("none", 8, (1, 0)),
        ("zero1(distributed-optimizer)", 8, (8, 1)),
        ("fsdp-shard_grad_op", 8, (8, 2)),
        ("fsdp-full_shard", 8, (8, 3)),
        ("hsdp(shard 4 x replicate)", 8, (4, 3)),
        ("zero1", 1, (1, 0)),
    ],
)
def test_sharding(text: str, data: int, wanted: tuple[int, int]) -> None:
    one = row(tp="1", pp="1", n_gpus=str(data), zero_or_fsdp=text, sequence_parallel="0")
    layout = layout_of(one, sizes_of(one))
    assert (layout.data_shard, layout.zero_stage) == wanted
    assert layout.devices == data
    assert layout.global_batch == 16


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"gpu": "TPU v9"}, "no profile for tpu v9"),
        ({"precision": "int8"}, "precision int8"),
        ({"precision": "nvfp4"}, "h100-sxm has no figures for float4"),
        ({"recompute": "5 of 16"}, "recompute 5 of 16"),
        ({"n_experts": "8"}, "moe_ffn not published"),
        (EXPERTS | {"ep": "8"}, "ep does not divide dp * cp"),  # two data ranks, two tensor ranks
        (EXPERTS | {"params_b": "6"}, "experts of several kinds"),
        ({"recompute": "see recipe"}, "recompute see recipe"),
        ({"micro_batch": ""}, "micro_batch not published"),
        ({"global_batch": "15"}, "global batch does not divide over dp * micro_batch"),
        ({"n_gpus": "6"}, "tp * pp * cp does not divide n_gpus"),
    ],
)
def test_rows_that_cannot_be_used_say_why(cells: dict[str, str], reason: str) -> None:
    with pytest.raises(Unusable) as caught:
        predict(row(**cells))
    assert str(caught.value) == reason


@pytest.mark.parametrize(
    ("text", "gigabits"),
    [
        ("8xNDR400 IB/node", 3200),
        ("4xHDR200 IB/node (400Gb/s? see paper)", 800),
        ("1600Gb/s RoCE/node", 1600),
        ("Storage: 2x ConnectX-7 IB NDR 400Gb/s, Compute: 8x ConnectX-7 IB NDR 400Gb/s", 3200),
        ("NVLink only", None),
        ("Ethernet", None),
        ("Management: 1x Ethernet 10GB/Sec", None),
    ],
)
def test_network_text(text: str, gigabits: int | None) -> None:
    found = node_bytes_per_second(text)
    assert found == (None if gigabits is None else gigabits * 1e9 / 8)


def test_equal_cuts() -> None:
    assert equal_cuts(8, 1) == (0, 10)
    assert equal_cuts(8, 4) == (0, 3, 5, 7, 10)
    assert equal_cuts(126, 16) == tuple(range(0, 129, 8))  # embedding and head count as layers
    assert equal_cuts(5, 2) in ((0, 3, 7), (0, 4, 7))


def test_cost_cuts_leave_no_stage_empty() -> None:
    """The head weighs four layers here; a stage ends where the sum reaches its share."""
    sizes = sizes_of(row(vocab="131072"))
    layer = 4 * sizes.hidden**2 + 3 * sizes.ffn * sizes.hidden
    assert sizes.vocab * sizes.hidden == 4 * layer
    assert cost_cuts(sizes, 2) == (0, 11, 18)
    assert cost_cuts(sizes, 8) == (0, 4, 6, 9, 11, 14, 16, 17, 18)


def test_slower_choices_are_predicted_slower() -> None:
    base = predict(row())
    assert predict(row(recompute="full")).predicted_s > base.predicted_s
    assert predict(row(recompute="full")).predicted_gib < base.predicted_gib
    assert predict(row(attn_impl="unfused(te)")).predicted_s > 0
    assert predict(row(gpu="A100-80GB-SXM")).predicted_s > base.predicted_s
    assert predict(row(global_batch="32")).predicted_s > 1.5 * base.predicted_s


@pytest.mark.parametrize(
    ("cells", "kept"),
    [
        ({"recompute": "full"}, []),
        ({"recompute": "full-block(6 of 16 layers)"}, [6, 7, 14, 15]),  # of each of two stages
        ({"recompute": "selective(layer, every 4th)"}, [i for i in range(16) if i % 4 != 3]),
        # 49 / 38 - 1 is 0.29 of three passes: 87 % of the forward ran twice
        (
            {"recompute": "selective(AC every k-th block)", "notes": "HFU 49", "mfu": "38"},
            [0, 7, 15],
        ),
    ],
)
def test_layers_that_recompute_nothing(cells: dict[str, str], kept: list[int]) -> None:
    sizes = sizes_of(row(**cells))
    assert sorted(kept_layers(row(**cells), sizes, equal_cuts(16, 2))) == kept


def test_recomputing_some_layers_costs_a_share_of_recomputing_all() -> None:
    none, half, full = (
        predict(row(recompute=text, pp="1"))
        for text in ("none", "selective(layer, every 2nd)", "full")
    )
    assert half.predicted_s == pytest.approx((none.predicted_s + full.predicted_s) / 2, rel=1e-9)
    assert full.predicted_gib < half.predicted_gib < none.predicted_gib


def test_gathered_logits_cost_every_tensor_rank_the_whole_vocabulary() -> None:
    """Aleph Alpha's head: 16 bytes for each logit of the whole vocabulary, and its own shard."""
    sizes = sizes_of(row(source="Aleph Alpha"))
    logits = sizes.sequence_length * sizes.vocab
    norm = 3 * 2 * sizes.sequence_length * sizes.hidden
    head = closed_form_graph(sizes, 2).blocks["head"].variants
    assert head[1].peak_bytes[0].per_sequence - norm == 16 * logits
    assert head[2].peak_bytes[0].per_sequence - norm == 17 * logits
    assert sum(c.phase == "forward" for c in head[2].collectives) == 1


def test_fits_is_the_planners_own_verdict() -> None:
    """A run that needs more than a plan may use is predicted not to fit."""
    capacity = load_cluster("dgx-h100").device.memory_capacity_bytes.value / 2**30
    for size in ("1", "8", "16", "32", "64"):
        made = predict(row(micro_batch=size, global_batch="256", pp="1"))
        assert made.fits == (made.predicted_gib <= MEMORY_FRACTION * capacity)
    assert not made.fits


def measured(**cells: str) -> dict[str, str]:
    """Cells with a measured time of the predicted one times ``factor``."""
    factor = float(cells.pop("factor"))
    prediction = predict(row(**cells))
    times = f"{prediction.predicted_s * factor!r}"
    return cells | {"measured_iter_time_s": times}


def test_statistics_are_those_of_the_errors(tmp_path: Path) -> None:
    layouts = [{"tp": "1", "pp": "1"}, {"tp": "2", "pp": "1"}, {"tp": "4", "pp": "1"}, {}]
    slower = ["1.0", "1.25", "2.0", "4.0"]
    rows = [
        measured(id=f"made-{i}", factor=factor, **cells)
        for i, (cells, factor) in enumerate(zip(layouts, slower, strict=True))
    ]
    rows[1]["peak_mem_gib"] = repr(2 * predict(row(**layouts[1])).predicted_gib)
    rows.append({"id": "made-4", "oom": "1"})
    rows.append({"id": "made-5", "gpu": "unheard of", "oom": "1"})
    rows.append(measured(id="made-6", factor="9", mfu="3"))
    result = validate_files([write(tmp_path / "made.csv", rows)])["made"]
    assert result.unused == {"no profile for unheard of": 1}
    headline = summarise([p for p in result.predictions if p.row.headline])
    assert headline.rows == 4
    errors = [1 / float(factor) - 1 for factor in slower]
    assert headline.bias == pytest.approx(sum(errors) / 4, rel=1e-12)
    assert headline.mape == pytest.approx(-sum(errors) / 4, rel=1e-12)
    assert headline.median_abs_error == pytest.approx(0.2, rel=1e-12)
    assert headline.p90 == pytest.approx(0.75, rel=1e-12)
    assert headline.memory_mape == pytest.approx(0.5, rel=1e-12)
    assert headline.memory_under == 1
    assert (headline.oom.ran, headline.oom.out, headline.oom.out_predicted_fit) == (4, 1, 1)


def test_regret_and_rank_of_a_reversed_sweep(tmp_path: Path) -> None:
    layouts = [{"tp": "1", "pp": "1"}, {"tp": "2", "pp": "1"}, {"tp": "4", "pp": "1"}, {}]
    predicted = sorted((predict(row(**cells)).predicted_s, i) for i, cells in enumerate(layouts))
    assert len({seconds for seconds, _ in predicted}) == 4
    rows = [
        layouts[i] | {"id": f"made-{i}", "measured_iter_time_s": str(4 - place)}
        for place, (_, i) in enumerate(predicted)
    ]
    result = validate_files([write(tmp_path / "made.csv", rows)])["made"]
    summary = summarise(result.predictions)
    assert summary.spearman == pytest.approx(-1)
    assert summary.regret_mean == summary.regret_p90 == pytest.approx(3)


def test_files_weigh_the_same(tmp_path: Path) -> None:
    right = measured(id="made-0", factor="1")
    wrong = measured(id="made-1", factor="2")
    results = validate_files(
        [write(tmp_path / "a.csv", [right] * 9), write(tmp_path / "b.csv", [wrong])]
    )
    overall = as_json(results)["overall"]
    assert isinstance(overall, dict)
    assert overall["mape"] == pytest.approx(0.25)
    assert set(overall) == {
        *("rows", "bias", "median_abs_error", "mape", "p90", "spearman"),
        *("regret_mean", "regret_p90", "memory_mape", "memory_under", "interval_coverage", "oom"),
    }


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "made.csv", [measured(id="made-0", factor="1"), {"gpu": "none"}])
    assert validate_main([str(path), "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert [set(one) for one in written["rows"]] == [
        {"id", "predicted_s", "measured_s", "predicted_gib", "measured_gib", "fits", "oom"}
    ]
    assert written["files"]["made"]["unused"] == {"nothing measured": 1}
    assert validate_main([str(path)]) == 0
    assert "| made | 1 | +0.0% |" in capsys.readouterr().out


def test_wrong_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.csv"
    path.write_text("id,seconds\n1,2\n")
    assert validate_main([str(path)]) == 2
    assert "lacks the columns gpu" in capsys.readouterr().err
    assert validate_main([str(tmp_path / "missing.csv")]) == 2
    with pytest.raises(InputError, match="seq_len of made-0 is 'many'"):
        predict(row(seq_len="many"))
