import json
import random
from itertools import pairwise
from typing import Any

import pytest

from paraplan.device import Device, device_names, load_device
from paraplan.errors import InputError
from paraplan.graph import Amount, Op, op_flops
from paraplan.op_times import op_seconds, optimizer_seconds

DEVICES = {name: load_device(name) for name in device_names()}


def gemm(m: int, n: int, k: int, *, batch: int = 1, dtype: str = "bfloat16") -> Op:
    """A product whose rows grow with the sequences (m rows each)."""
    return Op(
        name="aten.mm",
        kind="gemm",
        phase="forward",
        dtype=dtype,
        dims=(Amount(batch), Amount(0, m), Amount(n), Amount(k)),
        read_bytes=Amount(2 * batch * k * n, 2 * batch * m * k),
        write_bytes=Amount(0, 2 * batch * m * n),
    )


def attention(length: int, heads: int, head: int, *, phase: Any = "forward", **mask: Any) -> Op:
    dims = (Amount(0, 1), Amount(heads), Amount(heads), Amount(length), Amount(length))
    return Op(
        name="attention",
        kind="attention",
        phase=phase,
        dtype="bfloat16",
        dims=(*dims, Amount(head), Amount(head)),
        read_bytes=Amount(0, 6 * length * heads * head),
        write_bytes=Amount(0, 2 * length * heads * head),
        **mask,
    )


def memory(size_bytes: int) -> Op:
    return Op(
        name="aten.add",
        kind="memory",
        phase="forward",
        dtype="bfloat16",
        read_bytes=Amount(0, size_bytes // 2),
        write_bytes=Amount(0, size_bytes // 2),
    )


def random_op(rng: random.Random) -> Op:
    kind = rng.choice(["gemm", "batched", "grouped", "attention", "window", "memory"])
    m, n, k = (int(2 ** rng.uniform(4, 14)) for _ in range(3))
    if kind == "gemm":
        return gemm(m, n, k)
    if kind == "batched":
        return gemm(m, n, k, batch=rng.randint(2, 64))
    if kind == "grouped":
        op = gemm(m, n, k)
        dims = (Amount(rng.choice([4, 8, 64])), *op.dims[1:])
        return op.model_copy(update={"kind": "grouped_gemm", "dims": dims})
    if kind == "memory":
        return memory(int(2 ** rng.uniform(4, 34)))
    window = {"window": rng.choice([128, 1024, 100_000])} if kind == "window" else {}
    phase = rng.choice(["forward", "backward"])
    causal = kind == "window" or rng.random() < 0.5
    head = rng.choice([32, 64, 80, 128, 256])
    return attention(m, rng.randint(1, 64), head, phase=phase, causal=causal, **window)


@pytest.mark.parametrize("name", DEVICES)
def test_never_faster_than_the_peak_rates(name: str) -> None:
    device, rng = DEVICES[name], random.Random(1)
    bandwidth = device.memory_bandwidth_bytes_per_second.value
    for _ in range(300):
        op = random_op(rng)
        sequences = rng.choice([0.25, 0.5, 1, 2, 3, 7, 16])
        seconds, basis = op_seconds(op, sequences, device)
        size = op.read_bytes.at(sequences) + op.write_bytes.at(sequences)
        peak = device.peak_flops_per_second["bfloat16"].value
        # One part in 1e9 for the different order of the same products.
        assert seconds * (1 + 1e-9) >= op_flops(op, sequences) / peak
        assert seconds * (1 + 1e-9) >= size / bandwidth
        assert basis == "modelled"


@pytest.mark.parametrize("name", DEVICES)
def test_more_sequences_never_take_less_time(name: str) -> None:
    device, rng = DEVICES[name], random.Random(2)
    for _ in range(100):
        op = random_op(rng)
        times = [op_seconds(op, n, device).seconds for n in (0.5, 1, 2, 3, 4, 8, 16)]
        # One part in 1e9: the parts of a split K are added up in another order.
        assert all(second >= first * (1 - 1e-9) for first, second in pairwise(times)), op


@pytest.mark.parametrize("name", [name for name in DEVICES if name != "cpu"])
def test_large_products_reach_the_efficiency_of_the_profile(name: str) -> None:
    device = DEVICES[name]
    op = gemm(65536, 65536, 65536)
    peak = device.peak_flops_per_second["bfloat16"].value
    reached = op_flops(op, 1) / op_seconds(op, 1, device).seconds / peak
    # 65536 K elements beside the prologue of a few hundred, and a part of one wave in hundreds.
    assert reached == pytest.approx(device.gemm.efficiency["bfloat16"].value, rel=0.01)


@pytest.mark.parametrize(
    ("name", "dtype"), [("h100-sxm", "float8"), ("b200", "float8"), ("gb300", "float4")]
)
def test_a_tiles_prologue_takes_as_long_in_narrow_dtypes(name: str, dtype: str) -> None:
    """What is left at k = 0 of the line through two products of whole waves."""
    device = DEVICES[name]

    def at_no_k(dtype: str) -> float:
        short, long = (
            op_seconds(gemm(65536, 65536, k, dtype=dtype), 1, device).seconds for k in (8192, 16384)
        )
        efficiency = device.gemm.efficiency[dtype].value
        return (2 * short - long - device.kernel_floor_seconds.value) * efficiency

    assert at_no_k(dtype) == pytest.approx(at_no_k("bfloat16"), rel=0.01)


def test_published_products_on_h200() -> None:
    """788 TFLOP/s at 8192 x 8192 x 8192 in bf16 on random data, measured by others."""
    seconds = op_seconds(gemm(8192, 8192, 8192), 1, load_device("h200")).seconds
    assert 2 * 8192**3 / seconds == pytest.approx(788e12, rel=0.01)


@pytest.mark.parametrize(
    ("shape", "microseconds"),
    [((4096, 2560, 5120), 402), ((4096, 4096, 4096), 511), ((8192, 8192, 8192), 3910)],
)
def test_published_products_on_a100(shape: tuple[int, int, int], microseconds: float) -> None:
    """Row-parallel gradients timed by the Mist authors (A100-SXM4-40GB, fp16), within 8 %."""
    op = gemm(*shape, dtype="float16")
    seconds = op_seconds(op, 1, load_device("a100-40gb")).seconds
    assert seconds == pytest.approx(microseconds * 1e-6, rel=0.08)


@pytest.mark.parametrize(
    ("length", "head", "causal", "teraflops"),
    [
        (512, 128, False, 309),
        (4096, 128, True, 319),
        (16384, 64, True, 299),
        (2048, 64, False, 318),
    ],
)
def test_published_attention_on_h100(
    length: int, head: int, causal: bool, teraflops: float
) -> None:
    """Flash-attention 2 forward (its README's figures, 16k tokens, hidden 2048), within 10 %."""
    device = load_device("h100").with_attention("flash-attention-2")
    op = attention(length, 2048 // head, head, causal=causal)
    batch = 16384 // length
    flops = 4 * length**2 * 2048 * batch / (2 if causal else 1)
    seconds = op_seconds(op, batch, device).seconds
    assert flops / seconds == pytest.approx(teraflops * 1e12, rel=0.10)


def test_a_wave_that_is_barely_begun_costs_more_per_row() -> None:
    device = load_device("h100")  # 132 multiprocessors
    full = op_seconds(gemm(128 * 11, 256 * 12, 4096), 1, device).seconds
    begun = op_seconds(gemm(128 * 12, 256 * 12, 4096), 1, device).seconds
    assert begun / full > 1.15 > 12 / 11


def test_few_tiles_split_the_k_loop() -> None:
    device = load_device("h100")
    whole = op_seconds(gemm(128, 128, 512), 1, device).seconds
    long = op_seconds(gemm(128, 128, 65536), 1, device).seconds
    # 128 times the work on one multiprocessor without splitting.
    assert long < 20 * whole


def test_small_batches_leave_attention_to_the_longest_row() -> None:
    device = load_device("h100")
    one = op_seconds(attention(8192, 1, 128, causal=True), 1, device).seconds
    two = op_seconds(attention(8192, 2, 128, causal=True), 1, device).seconds
    many = op_seconds(attention(8192, 64, 128, causal=True), 1, device).seconds
    assert two < 1.05 * one
    assert many > 15 * two


def test_a_window_is_cheaper_than_the_whole_length() -> None:
    device = load_device("h100")
    whole = op_seconds(attention(16384, 32, 128, causal=True), 1, device).seconds
    window = op_seconds(attention(16384, 32, 128, causal=True, window=1024), 1, device).seconds
    assert window < whole / 4


def test_unknown_dtype_is_an_error_of_the_input() -> None:
    with pytest.raises(InputError, match="mi250 has no figures for float8"):
        op_seconds(gemm(128, 128, 128, dtype="float8"), 1, load_device("mi250"))


def test_optimizer_moves_bytes_at_its_share_of_the_bandwidth() -> None:
    device = load_device("h100")
    assert optimizer_seconds(3.35e12 * 0.8, device) == pytest.approx(1.0)


# --- measured ops ------------------------------------------------------------------------------


def measured(ops: list[dict[str, Any]]) -> Device:
    data = load_device("h100").model_dump(mode="json")
    return Device.model_validate_json(json.dumps(data | {"ops": ops}))


def gemm_row(m: int, n: int, k: int, seconds: float) -> dict[str, Any]:
    return {"kind": "gemm", "dtype": "bfloat16", "dims": [1, m, n, k], "seconds": seconds}


def test_measured_op_is_taken_as_it_is() -> None:
    device = measured([gemm_row(4096, 4096, 4096, 123e-6)])
    assert op_seconds(gemm(4096, 4096, 4096), 1, device) == (123e-6, "measured")
    # Half the rows for twice the sequences is the same op.
    assert op_seconds(gemm(2048, 4096, 4096), 2, device) == (123e-6, "measured")
    assert op_seconds(gemm(4096, 4096, 4097), 1, device).basis == "modelled"


def grid(rate: float) -> list[dict[str, Any]]:
    sizes = (512, 2048, 8192)
    return [gemm_row(m, n, k, 2 * m * n * k / rate) for m in sizes for n in sizes for k in sizes]


def test_interpolation_keeps_a_constant_rate() -> None:
    device = measured(grid(5e14))
    rng = random.Random(3)
    for _ in range(50):
        m, n, k = (rng.randint(513, 8191) for _ in range(3))
        seconds, basis = op_seconds(gemm(m, n, k), 1, device)
        assert basis == "interpolated"
        assert 2 * m * n * k / seconds == pytest.approx(5e14, rel=1e-9)


def test_interpolation_in_log_space() -> None:
    rows = grid(4e14)
    for row in rows:
        if row["dims"][3] == 2048:
            row["seconds"] /= 2
    device = measured(rows)
    # Half way between 512 and 2048 in log space, the geometric mean of the rates.
    assert 2 * 2048**2 * 1024 / op_seconds(gemm(2048, 2048, 1024), 1, device).seconds == (
        pytest.approx((4e14 * 8e14) ** 0.5)
    )


def test_beyond_the_grid() -> None:
    device = measured(grid(5e14))
    longer = op_seconds(gemm(65536, 2048, 2048), 1, device)
    assert longer.basis == "interpolated"  # rates have settled at the grid's upper end
    assert longer.seconds == pytest.approx(2 * 65536 * 2048**2 / 5e14)
    assert op_seconds(gemm(256, 2048, 2048), 1, device).basis == "modelled"
    assert op_seconds(gemm(1024, 1024, 1024, batch=2), 1, device).basis == "modelled"


def test_interpolated_is_not_faster_than_the_peak() -> None:
    device = measured(grid(5e15))  # five times what the device can do
    seconds, basis = op_seconds(gemm(1000, 1000, 1000), 1, device)
    assert basis == "interpolated"
    assert seconds >= 2e9 / 989.4e12


def test_memory_ops_by_name_then_by_any() -> None:
    def row(name: str, size: int, rate: float) -> dict[str, Any]:
        seconds = size / rate
        return {"kind": "memory", "name": name, "dtype": "bfloat16", "size_bytes": size} | {
            "seconds": seconds
        }

    device = measured(
        [
            row("aten.add", 2**20, 1e12),
            row("aten.add", 2**24, 2e12),
            row("*", 2**20, 3e12),
            row("*", 2**21, 3e12),
        ]
    )
    assert op_seconds(memory(2**20), 1, device) == (2**20 / 1e12, "measured")
    between = op_seconds(memory(2**22), 1, device)
    assert between.basis == "interpolated"
    assert between.seconds == pytest.approx(2**22 / 2**0.5 / 1e12)
    other = memory(2**22).model_copy(update={"name": "aten.mul"})
    assert op_seconds(other, 1, device) == (pytest.approx(2**22 / 3e12), "interpolated")
    assert op_seconds(memory(2**10), 1, device).basis == "modelled"


def test_attention_between_measured_lengths() -> None:
    def row(length: int, rate: float) -> dict[str, Any]:
        flops = op_flops(attention(length, 8, 128, causal=True), 2)
        dims = [2, 8, 8, length, length, 128, 128]
        return {"kind": "attention", "dtype": "bfloat16", "dims": dims, "causal": True} | {
            "seconds": flops / rate
        }

    device = measured([row(1024, 2e14), row(4096, 4e14)])
    assert op_seconds(attention(1024, 8, 128, causal=True), 2, device).basis == "measured"
    op = attention(2048, 32, 128, causal=True)
    seconds, basis = op_seconds(op, 1, device)
    assert basis == "interpolated"
    assert op_flops(op, 1) / seconds == pytest.approx(8**0.5 * 1e14)
    assert op_seconds(attention(2048, 8, 128), 1, device).basis == "modelled"
    backward = attention(2048, 8, 128, causal=True, phase="backward")
    assert op_seconds(backward, 1, device).basis == "modelled"
