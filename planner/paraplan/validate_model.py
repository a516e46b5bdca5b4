"""The model and the framework of a measured run."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from paraplan.validate_frameworks import Framework, framework_of
from paraplan.validate_graph import parameter_count
from paraplan.validate_ops import ModelSizes
from paraplan.validate_recompute import recomputes_all
from paraplan.validate_rows import Row, Unusable

LORA_RANK = 16
"""Of the adapters of a run of task ``lora`` (MLPerf's llama2-70b benchmark)."""
HEAD_SIZES = (64, 128)
"""Of attention where it is not the hidden size divided among the heads (models with experts)."""
LARGEST_GAP = 0.02
"""Of the parameters that the columns tell of from the published ones, in models with experts;
beyond it some layers are dense, or have experts that every token goes to."""
ASYNC_TENSOR = 0.3
"""Of the predicted time of torch's tensor exchanges, what async TP hides: 0.35, 0.29, 0.24 and 0.26
in torchtitan's four pairs of runs with and without it (8B in bf16, float8 and float8 by row, 405B
in float8)."""
FP8 = ("fp8", "float8", "mxfp8")
FP4 = "nvfp4"


def precision_of(row: Row) -> tuple[str, str]:
    """Compute dtype, and dtype of the layers' matrix products.

    Raises:
        Unusable: neither fp16, bf16, fp8 nor nvfp4.
    """
    text = row.text("precision")
    if text.startswith(FP4):
        return "bfloat16", "float4"
    if text.startswith(FP8):
        return "bfloat16", "float8"
    if text.startswith("fp16"):
        return "float16", "float16"
    if text.startswith("bf16"):
        return "bfloat16", "bfloat16"
    raise Unusable(f"precision {text or 'not published'}")


def sizes_of(row: Row) -> ModelSizes:
    """The model; gating and tying are those whose parameter count is nearest to the published.

    Raises:
        Unusable: something that matters is not published or not modelled.
    """
    dtype, product_dtype = precision_of(row)
    hidden, heads = row.count("hidden"), row.count("heads")
    if hidden % heads:
        raise Unusable("heads do not divide hidden")
    attention = row.text("attn_impl")
    flash = any(word in attention for word in ("flash", "cudnn", "te"))
    framework = run_framework(row)
    experts = row.count("n_experts", 1)
    ffn = row.count("ffn", 4 * hidden) if experts == 1 else row.count("moe_ffn")
    base = ModelSizes(
        layers=row.count("layers"),
        hidden=hidden,
        ffn=ffn,
        heads=heads,
        kv_heads=row.count("kv_heads", heads),
        vocab=row.count("vocab"),
        sequence_length=row.count("seq_len"),
        gated=ffn != 4 * hidden,
        tied=False,
        flash=flash,
        dropout=not flash,
        dtype=dtype,
        product_dtype=product_dtype,
        fused_norm=framework.kernels != "eager"
        or framework.fused_norm
        or "rms kernel" in attention,
        fused_softmax=_fused_softmax(row, framework),
        selective=_selective(row),
        framework=framework,
        head_twice=framework.reruns_head and recomputes_all(row),
        adapter=LORA_RANK if row.text("task") == "lora" else 0,
        experts=experts if experts > 1 else 0,
        chosen=row.count("top_k") if experts > 1 else 0,
    )
    published = row.number("params_b")
    if published is None:
        return base
    gated = (False, True) if framework.gated is None else (framework.gated,)
    tied = (False, True) if framework.tied is None else (framework.tied,)
    heads_of = (0, *HEAD_SIZES) if base.experts else (0,)
    options = [
        replace(base, gated=g, tied=t, head_size=d) for g in gated for t in tied for d in heads_of
    ]
    nearest = min(options, key=lambda sizes: abs(parameter_count(sizes) / 1e9 - published))
    if base.experts and abs(parameter_count(nearest) / 1e9 / published - 1) > LARGEST_GAP:
        raise Unusable("experts of several kinds")
    return nearest


def run_framework(row: Row) -> Framework:
    """What trained the run."""
    texts = tuple(row.text(n) for n in ("framework", "source", "zero_or_fsdp", "attn_impl"))
    notes = row.text("notes")
    found = framework_of(texts, compiled="compile" in notes)
    engine = found.engine
    if "cuda_launch_blocking=1" in notes:
        engine = replace(engine, blocking=True)
    if "fp32 grad accum" in row.text("precision") and found.engine.gradient_bytes == 2:
        if found.gradient_bytes:  # the bf16 gradient is read, the fp32 sum read and written
            found = replace(found, gradient_bytes=2 + 4 + 4)
        reduced = found.sum_reduce_bytes
        engine = replace(engine, gradient_bytes=6, standing_gradient_bytes=4, reduce_bytes=reduced)
    if found.deepspeed_zero3 and row.text("zero_or_fsdp").startswith("zero3"):
        engine, found = replace(engine, reduce_bytes=2), replace(found, gradient_bytes=0)
    if "pure" in row.text("precision"):
        engine = replace(engine, reduce_bytes=2)
    if "async tp" in notes or "asynctp" in notes:
        engine = replace(engine, hidden_tensor=ASYNC_TENSOR)
    return found if engine is found.engine else replace(found, engine=engine)


def _selective(row: Row) -> Literal["core", "pointwise", "half"]:
    """What selective recompute reruns."""
    if row.text("recompute") == "selective(op)":
        return "half"
    return "pointwise" if row.text("zero_or_fsdp").startswith(("fsdp", "hsdp")) else "core"


def _fused_softmax(row: Row, framework: Framework) -> bool:
    """Whether Megatron-LM's fused kernel takes this score matrix (its `is_kernel_available`)."""
    heads = row.count("heads") // row.count("tp", 1) * row.count("micro_batch", 1)
    small = 16 < row.count("seq_len") <= 2048 and row.count("seq_len") % 4 == 0
    asked = framework.kernels == "fused" or "fused" in row.text("attn_impl")
    return asked and small and heads % 4 == 0


def tensor_reason(sizes: ModelSizes, tensor: int) -> str | None:
    """Why the model cannot be divided over ``tensor`` ranks; None when it can."""
    if sizes.heads % tensor or sizes.ffn % tensor:
        return f"{sizes.heads} heads and ffn {sizes.ffn} do not divide over tensor({tensor})"
    return None
