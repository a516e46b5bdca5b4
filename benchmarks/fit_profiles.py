"""Fit the figures of the shipped profiles to published micro-benchmarks.

    python benchmarks/fit_profiles.py FOLDER          (under a minute on one core)

FOLDER holds ``microbench_layer_ops.csv``, ``microbench_flash_attention.csv``,
``microbench_collectives.csv``, ``microbench_overlap_contention.csv``, ``microbench_gemm.csv`` and
``aceso_runtime_memory.csv`` (columns as docs/profiles.md names them). Prints each fitted figure
and how far the model with it is from the measurements: the tables of docs/profiles.md.
The files themselves are not part of the project; only figures derived from them are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from fit_links import fit_efa, fit_infinity_fabric, fit_nvlink3, fit_nvlink4
from fitting import (
    MIB,
    Pairs,
    changed,
    figure,
    gemm_op,
    memory_op,
    minimise,
    report,
    rows_of,
)

from paraplan.device import Attention, AttentionRate, Device, Gemm, Tile, load_device
from paraplan.graph import Amount, Op
from paraplan.op_times import op_seconds


def main(arguments: Sequence[str]) -> int:
    """Run all fits."""
    if len(arguments) != 1:
        print(__doc__)
        return 2
    folder = Path(arguments[0])
    print("| what | source | rows | fitted | median error | p90 error |")
    print("|---|---|---|---|---|---|")
    device = fit_memory_ops(folder)
    fit_gemm(folder, device)
    fit_best_gemm(folder)
    ratio = fit_attention(folder, "H100-80GB-SXM", "FA2", "h100-sxm", None)
    fit_attention(folder, "H100-80GB-SXM", "cudnn", "h100-sxm", ratio)
    fit_attention(folder, "H100-80GB-SXM", "FA3", "h100-sxm", ratio)
    fit_attention(folder, "A100-80GB-SXM", "FA2", "a100-80gb-sxm", ratio)
    fit_nvlink3(folder)
    fit_nvlink4(folder)
    fit_efa(folder)
    fit_infinity_fabric(folder)
    fit_contention(folder)
    fit_fragmentation(folder)
    return 0


# --- single ops --------------------------------------------------------------------------------


def fit_memory_ops(folder: Path) -> Device:
    """Achieved bandwidth and kernel floor, from element-wise ops (A100 40 GB).

    Bytes moved follow from what an op saves for backward: GELU, softmax and layer norm save what
    they read or write, and move it twice; dropout saves its output and a mask of half its size.
    Softmax and layer norm there are that framework's own kernels: reported, not fitted.
    """
    moved = {"enc-MLP-gelu": 2.0, "enc-attention-dropout": 5 / 3}
    others = {"enc-1st-layernorm": 2.0, "enc-attention-softmax": 2.0}
    cases: list[tuple[Op, float]] = []
    unfitted: list[tuple[Op, float]] = []
    for row in rows_of(folder, "microbench_layer_ops.csv"):
        name = row["op"]
        if not row["gpu"].startswith("A100") or row["algo"] != "0" or name not in moved | others:
            continue
        saved = float(row["activations_mb"]) * MIB
        if name == "enc-attention-softmax" and saved > float(row["output_mb"]) * MIB:
            continue  # several kernels where the framework's own does not apply
        op = memory_op(saved * (moved | others)[name])
        times = [row["fwd_us"], row["bwd_us"]] if "dropout" in name else [row["fwd_us"]]
        for seconds in (float(time) * 1e-6 for time in times):
            if seconds > 60e-6:  # shorter ones wait for the host
                (cases if name in moved else unfitted).append((op, seconds))
    base = load_device("a100-40gb-sxm")

    def device_of(p: dict[str, float]) -> Device:
        update = {name: figure(value) for name, value in p.items()}
        return changed(base, **update)

    def pairs_of(p: dict[str, float], of: list[tuple[Op, float]]) -> Pairs:
        device = device_of(p)
        return [(op_seconds(op, 1, device).seconds, seconds) for op, seconds in of]

    fitted = minimise(
        lambda p: pairs_of(p, cases),
        {"memory_efficiency": 0.8, "kernel_floor_seconds": 3e-6},
        {"memory_efficiency": 1.0, "kernel_floor_seconds": 3e-6},
    )
    source = "Aceso op profiles (Mist)"
    report("element-wise ops, A100", source, fitted, pairs_of(fitted, cases))
    report("softmax, layer norm, same figures", source, {}, pairs_of(fitted, unfitted))
    return device_of(fitted)


def fit_gemm(folder: Path, base: Device) -> None:
    """Efficiency, prologue, wave loss and tile rates from linear layers (A100).

    Fitted to the gradients of row-parallel layers, which are one product and nothing else (and
    no communication); the forward passes of column-parallel layers, a product and a bias added
    in a kernel of its own, are the check.
    """
    backward: dict[tuple[int, int, int], float] = {}
    forward: dict[tuple[int, int, int], float] = {}
    for row in rows_of(folder, "microbench_layer_ops.csv"):
        # The times of the attention's first layer include transposes.
        if not row["gemm_m"] or row["op"] == "enc-attention-qkv" or row["gpu"][:4] != "A100":
            continue
        m, n, k = (int(float(row[c])) for c in ("gemm_m", "gemm_n", "gemm_k"))
        column = row["op"] == "enc-MLP-GEMM-1"
        first, second = float(row["fwd_us"]) * 1e-6, float(row["bwd_us"]) * 1e-6
        if row["tp"] == "1" or (column and row["algo"] == "0"):
            forward[m, n, k] = min(first, forward.get((m, n, k), first))
        # Below 150 us the backward waits for the host: one shape takes 76 or 110 us.
        if not column and (row["tp"] == "1" or row["algo"] == "0") and second > 150e-6:
            backward[m, k, n] = min(second, backward.get((m, k, n), second))
    products = [(gemm_op(*shape), seconds) for shape, seconds in backward.items()]
    biased = [
        (gemm_op(m, n, k), memory_op(4 * m * n), seconds) for (m, n, k), seconds in forward.items()
    ]

    def device_of(p: dict[str, float]) -> Device:
        rates = [
            figure(p["half_tile_rate"]) if t.rows * t.columns == 128 * 128 else t.relative_rate
            for t in base.gemm.tiles
        ]
        gemm = Gemm(
            efficiency={"float16": figure(p["efficiency"])},
            prologue_k=figure(p["prologue_k"]),
            wave_loss=figure(p["wave_loss"]),
            tiles=tuple(
                Tile(rows=t.rows, columns=t.columns, relative_rate=rate)
                for t, rate in zip(base.gemm.tiles, rates, strict=True)
            ),
        )
        return changed(base, gemm=gemm)

    def pairs_of(p: dict[str, float]) -> Pairs:
        device = device_of(p)
        return [(op_seconds(op, 1, device).seconds, seconds) for op, seconds in products]

    limits = dict.fromkeys(("efficiency", "half_tile_rate", "wave_loss"), 1.0)
    start = {"efficiency": 0.93, "prologue_k": 200.0, "half_tile_rate": 0.95, "wave_loss": 0.6}
    fitted = minimise(pairs_of, start, limits)
    source = "Aceso op profiles (Mist)"
    report("matrix products, A100", source, fitted, pairs_of(fitted))
    device = device_of(fitted)
    check = [
        (op_seconds(op, 1, device).seconds + op_seconds(bias, 1, device).seconds, seconds)
        for op, bias, seconds in biased
    ]
    report("matrix products with bias, same figures", source, {}, check)


def fit_best_gemm(folder: Path) -> None:
    """Efficiencies with which the model meets the best rate that others found for a device."""
    names = {
        "NVIDIA A100 SXM": "a100-80gb-sxm",
        "NVIDIA H100 SXM": "h100-sxm",
        "NVIDIA H200 SXM": "h200",
        "NVIDIA B200 SXM": "b200",
        "AMD MI300X": "mi300x",
    }
    dtypes = {"bf16": "bfloat16", "fp16": "float16", "fp8": "float8"}
    cases = [("h200", "bfloat16", 8192, 8192, 8192, 788.0, "one H200, random data")]
    for row in rows_of(folder, "microbench_gemm.csv"):
        if row["gpu"] in names and row["tflops"]:
            m, n, k = (int(float(row[c])) for c in "mnk")
            source = row["source"].split("(")[0].strip()
            dtype = dtypes[row["dtype"]]
            cases.append((names[row["gpu"]], dtype, m, n, k, float(row["tflops"]), source))
    for name, dtype, m, n, k, rate, source in cases:
        op = gemm_op(m, n, k).model_copy(update={"dtype": dtype})
        seconds = 2 * m * n * k / rate / 1e12
        device = load_device(name)

        def pairs_of(
            p: dict[str, float], op: Op = op, device: Device = device, seconds: float = seconds
        ) -> Pairs:
            efficiency = device.gemm.efficiency | {op.dtype: figure(p["efficiency"])}
            trial = changed(device, gemm=changed(device.gemm, efficiency=efficiency))
            return [(op_seconds(op, 1, trial).seconds, seconds)]

        fitted = minimise(pairs_of, {"efficiency": 0.8})
        report(f"{m}x{n}x{k} {dtype}, {name}", source, fitted, pairs_of(fitted))


def fit_attention(
    folder: Path, gpu: str, implementation: str, device_name: str, ratio: float | None
) -> float:
    """Efficiencies by head size, prologue and causal loss; returns backward over forward.

    With ``ratio`` the backward efficiency is that share of the forward's (sources that publish
    one pass, or only both together); without it both are fitted.
    """
    cases = []
    for row in rows_of(folder, "microbench_flash_attention.csv"):
        if row["gpu"] != gpu or row["impl"] != implementation:
            continue
        head, length, causal = int(row["head_dim"]), int(row["seq_len"]), row["causal"] == "1"
        heads, batch = 2048 // head, 16384 // length
        flops = 4.0 * length**2 * head * heads * batch / (2 if causal else 1)
        both = row["pass"] == "fwd+bwd"
        seconds = flops * (3.5 if both else 1) / float(row["tflops"]) / 1e12
        dims = tuple(Amount(d) for d in (batch, heads, heads, length, length, head, head))
        ops = [
            Op(
                name="attention",
                kind="attention",
                phase=phase,
                dtype="float16",
                dims=dims,
                causal=causal,
            )
            for phase in (("forward", "backward") if both else ("forward",))
        ]
        cases.append((ops, seconds))
    heads_seen = sorted({int(ops[0].dims[5].fixed) for ops, _ in cases})
    base = load_device(device_name)

    def pairs_of(p: dict[str, float]) -> Pairs:
        back = ratio if ratio is not None else p["backward_over_forward"]
        rates = tuple(
            AttentionRate(
                head_size=h,
                forward_efficiency=figure(p[f"forward_{h}"]),
                backward_efficiency=figure(back * p[f"forward_{h}"]),
            )
            for h in heads_seen
        )
        kernel = Attention(
            implementation="trial",
            tile_rows=128,
            rates=rates,
            prologue_keys=figure(p["prologue_keys"]),
            causal_efficiency=figure(p["causal_efficiency"]),
        )
        device = changed(base, attention=(kernel,))
        return [
            (sum(op_seconds(op, 1, device).seconds for op in ops), seconds)
            for ops, seconds in cases
        ]

    start = {f"forward_{h}": 0.4 for h in heads_seen}
    start |= {"prologue_keys": 80.0, "causal_efficiency": 0.9}
    if ratio is None:
        start["backward_over_forward"] = 0.9
    fitted = minimise(
        pairs_of,
        start,
        {name: 1.0 for name in start if name != "prologue_keys"},
    )
    report(
        f"attention, {gpu}, {implementation}", "flash-attention README", fitted, pairs_of(fitted)
    )
    return ratio if ratio is not None else fitted["backward_over_forward"]


# --- other figures -----------------------------------------------------------------------------


def fit_contention(folder: Path) -> None:
    """Share of the computation that a collective beside it takes (A100, NVLink and across)."""
    groups: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows_of(folder, "microbench_overlap_contention.csv"):
        alone = [float(row[f"{part}_alone_ms"] or 0) for part in ("compute", "g2g", "c2g", "g2c")]
        if alone[0] and alone[1] and not alone[2] and not alone[3]:
            name = "inside a node" if row["inter"] == "1" else "between nodes"
            groups.setdefault(name, []).append((alone[0], alone[1], float(row["latency_ms"])))
    for name, cases in groups.items():

        def pairs_of(p: dict[str, float], cases: Any = cases) -> Pairs:
            share = p["contention"]
            return [(max(moves, works + share * moves), both) for works, moves, both in cases]

        fitted = minimise(pairs_of, {"contention": 0.3})
        report(
            f"computation beside a collective {name}, A100",
            "Mist interference",
            fitted,
            pairs_of(fitted),
        )


def fit_fragmentation(folder: Path) -> None:
    """Memory reserved beyond what is allocated."""
    for gpu in ("A100", ""):
        shares = sorted(
            float(r["reserved_over_allocated"]) - 1
            for r in rows_of(folder, "aceso_runtime_memory.csv")
            if r["gpu"].startswith(gpu) and r["reserved_over_allocated"]
        )
        pairs = [(1 + median(shares), 1 + share) for share in shares]
        report(
            f"reserved over allocated, {gpu or 'A100, A10G and L4'}",
            "Aceso runs (Mist)",
            {"fragmentation": median(shares)},
            pairs,
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
