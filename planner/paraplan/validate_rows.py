"""Measured runs: reads their rows, and finds model, machine and layout that each describes.

The columns are described in docs/accuracy.md. A row that cannot be predicted is not dropped
silently: `Unusable` says why.
"""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from paraplan.cluster import Cluster, load_cluster
from paraplan.device import Device
from paraplan.errors import InputError
from paraplan.graph import Recompute
from paraplan.partition import Cuts, Staged
from paraplan.plan_file import Layout, Schedule
from paraplan.stage_cost import ChainCost
from paraplan.validate_graph import ModelSizes, parameter_count

GIB = 2**30
NEEDED = ("id", "gpu", "n_gpus", "layers", "hidden", "heads", "seq_len", "global_batch")
HEADLINE_MFU = 10.0
"""Percent; below it a run is pathological (thousands of tiny messages over a slow fabric)."""

# GPU as written (lower case, first match) -> cluster profile. Longer names stand first.
CLUSTERS: tuple[tuple[str, str], ...] = (
    ("a100-40gb", "dgx-a100-40gb"),
    ("a100", "dgx-a100-80gb"),
    ("gh200", ""),
    ("h200", "dgx-h200"),
    ("h100", "dgx-h100"),
    ("gb200", ""),
    ("b200", "dgx-b200"),
    ("mi300x", "mi300x-8"),
)
FUSED = ("fused-softmax", "(te)", "cudnn", "distributed-optimizer", "megatron")
"""Words for Megatron-LM's or Transformer Engine's kernels. A run with none of them, and without
``compile`` in its notes, is taken to be eager torch."""
FP8 = ("fp8", "float8", "mxfp8")


class Unusable(Exception):
    """Why a row is not predicted, in a few words that many rows share."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measured run; fields as in the file's columns, blanks empty.

    Attributes:
        file: name of the file without its ending.
        cells: column -> text.
    """

    file: str
    cells: dict[str, str]

    def text(self, name: str) -> str:
        """A column's text, lower case, empty where it is not published."""
        return (self.cells.get(name) or "").strip().lower()

    def number(self, name: str) -> float | None:
        """A column as a finite number; None where it is not published.

        Raises:
            InputError: the text is no number.
        """
        text = self.text(name)
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise InputError(f"{self.file}: {name} of {self.cells.get('id')} is {text!r}")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        """A column as a whole number of at least 1.

        Raises:
            Unusable: not published and no default, or not a positive whole number.
        """
        value = self.number(name)
        if value is None:
            if default is None:
                raise Unusable(f"{name} not published")
            return default
        if value != int(value) or value < 1:
            raise Unusable(f"{name} is not a positive whole number")
        return int(value)

    @property
    def seconds(self) -> float | None:
        """Measured seconds of a step."""
        return self.number("measured_iter_time_s")

    @property
    def out_of_memory(self) -> bool | None:
        """Whether the run surely did not fit (True), ran (False), or nobody knows (None)."""
        if self.text("oom") in ("1", "1.0", "true", "yes"):
            return True
        ran = self.seconds is not None or self.number("peak_mem_gib") is not None
        return False if ran else None

    @property
    def headline(self) -> bool:
        """Whether the row counts in the headline figures."""
        mfu = self.number("mfu")
        return self.text("quality") in ("", "a", "b") and (mfu is None or mfu >= HEADLINE_MFU)

    @property
    def sweep(self) -> tuple[str, ...]:
        """Rows with the same sweep differ only in their layout."""
        names = ("source", "model", "seq_len", "gpu", "n_gpus", "global_batch")
        return (self.file, *(self.text(name) for name in names))


def read_rows(path: Path) -> list[Row]:
    """The rows of one file.

    Raises:
        InputError: no readable CSV file, or columns that are needed are missing.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in NEEDED if name not in (reader.fieldnames or ())]
            if missing:
                raise InputError(
                    f"{path} lacks the columns {', '.join(missing)}",
                    hint="docs/accuracy.md describes them",
                )
            return [Row(path.stem, {k: v or "" for k, v in row.items() if k}) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read {path}: {error}") from None


def precision_of(row: Row) -> tuple[str, str]:
    """Compute dtype, and dtype of the layers' matrix products.

    Raises:
        Unusable: neither fp16, bf16 nor fp8.
    """
    text = row.text("precision")
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
    if (row.number("n_experts") or 0) > 1:
        raise Unusable("experts")
    if row.text("task") == "lora":
        raise Unusable("LoRA")
    dtype, product_dtype = precision_of(row)
    hidden, heads = row.count("hidden"), row.count("heads")
    if hidden % heads:
        raise Unusable("heads do not divide hidden")
    attention = row.text("attn_impl")
    flash = any(word in attention for word in ("flash", "cudnn", "te"))
    fsdp = row.text("zero_or_fsdp").startswith(("fsdp", "hsdp"))
    kernels = f"{attention} {row.text('zero_or_fsdp')}"
    fused = "compile" in row.text("notes") or any(word in kernels for word in FUSED)
    base = ModelSizes(
        layers=row.count("layers"),
        hidden=hidden,
        ffn=row.count("ffn", 4 * hidden),
        heads=heads,
        kv_heads=row.count("kv_heads", heads),
        vocab=row.count("vocab"),
        sequence_length=row.count("seq_len"),
        gated=row.count("ffn", 4 * hidden) != 4 * hidden,
        tied=False,
        fused=fused,
        fused_norm=fused or "rms kernel" in attention,
        flash=flash,
        dropout=not flash,
        dtype=dtype,
        product_dtype=product_dtype,
        selective="pointwise" if fsdp else "core",
    )
    published = row.number("params_b")
    if published is None:
        return base
    options = [replace(base, gated=g, tied=t) for g in (False, True) for t in (False, True)]
    return min(options, key=lambda sizes: abs(parameter_count(sizes) / 1e9 - published))


def tensor_reason(sizes: ModelSizes, tensor: int) -> str | None:
    """Why the model cannot be divided over ``tensor`` ranks; None when it can."""
    if sizes.heads % tensor or sizes.ffn % tensor:
        return f"{sizes.heads} heads and ffn {sizes.ffn} do not divide over tensor({tensor})"
    return None


def recompute_of(row: Row) -> Recompute:
    """The recompute mode of all layers.

    Raises:
        Unusable: unknown, or of some layers only.
    """
    text = row.text("recompute")
    known: dict[str, Recompute] = {
        "": "none",
        "none": "none",
        "none/unknown": "none",
        "selective": "selective",
        "selective(op)": "selective",
        "full": "full",
        "full(remat)": "full",
    }
    if text not in known:
        raise Unusable(f"recompute {text}")
    return known[text]


def layout_of(row: Row, sizes: ModelSizes) -> Layout:
    """The layout that the row ran.

    Raises:
        Unusable: its degrees contradict each other, or it is not modelled.
    """
    tensor, pipeline, context = row.count("tp"), row.count("pp"), row.count("cp", 1)
    devices, size = row.count("n_gpus"), row.count("micro_batch")
    data = devices // (tensor * pipeline * context)
    if data * tensor * pipeline * context != devices:
        raise Unusable("tp * pp * cp does not divide n_gpus")
    batch = row.count("global_batch")
    if batch % (data * size):
        raise Unusable("global batch does not divide over dp * micro_batch")
    if tensor_reason(sizes, tensor):
        raise Unusable("heads or ffn do not divide over tp")
    if pipeline > sizes.layers:
        raise Unusable("more stages than layers")
    virtual = row.count("vp", 1) if pipeline > 1 else 1
    schedule: Schedule = "none" if pipeline == 1 else "1f1b"
    if virtual > 1:
        schedule = "interleaved-1f1b"
        if sizes.layers % (pipeline * virtual):
            virtual, schedule = _equal_chunks(sizes, pipeline, virtual)
    shard, zero_stage = _sharding(row, data)
    return Layout(
        data_replicate=data // shard,
        data_shard=shard,
        tensor=tensor,
        context=context,
        pipeline=pipeline,
        virtual_stages=virtual,
        micro_batch_size=size,
        micro_batches=batch // (data * size),
        schedule=schedule,
        sequence_parallel=tensor > 1 and row.text("sequence_parallel") in ("1", "1.0"),
        zero_stage=zero_stage,
    )


def _equal_chunks(sizes: ModelSizes, pipeline: int, virtual: int) -> tuple[int, Schedule]:
    """Interleaving where embedding and head count as layers (Llama 3), else none modelled."""
    if (sizes.layers + 2) % (pipeline * virtual) == 0:
        return virtual, "interleaved-1f1b"
    raise Unusable("layers do not divide over pp * vp")


def _sharding(row: Row, data: int) -> tuple[int, int]:
    """Ranks that shard, and the ZeRO stage."""
    text = row.text("zero_or_fsdp")
    if data == 1 or text in ("", "none"):
        return 1, 0
    named = re.search(r"shard[ =](\d+)", text)
    shard = min(data, int(named[1])) if named else data
    if data % shard or shard == 1:
        return 1, 0
    if text.startswith("zero1"):
        return shard, 1
    if "shard_grad_op" in text or text.startswith("zero2"):
        return shard, 2
    if "zero3" in text or text.startswith(("fsdp", "hsdp", "maxtext fsdp")):
        return shard, 3
    raise Unusable(f"sharding {text}")


def node_bytes_per_second(network: str) -> float | None:
    """Bandwidth of a node, each direction, from text such as ``8x400Gb/s`` or ``4xHDR200``."""
    text = network.lower().split("compute:")[-1].split("management:")[0]
    text = re.sub(r"\(.*?\)", "", text)
    cards = r"(?:connectx-\d\s+|bf3\s+|mt\w+\s+|bluefield-3\s+|ib\s+)*(?:hdr|ndr|xdr|omnipath)?"
    found = re.search(rf"(\d+)\s*x\s*{cards}\s*(\d{{3}})(?!\d|gbase)", text)
    if found:
        return int(found[1]) * int(found[2]) * 1e9 / 8
    found = re.search(r"([\d.]+)\s*(g|t)b/s[^,;]*(?:/|per )node", text)
    if found:
        return float(found[1]) * (1e9 if found[2] == "g" else 1e12) / 8
    return None


def cluster_of(row: Row) -> Cluster:
    """The machine: a shipped profile, its network scaled to the published bandwidth.

    Raises:
        Unusable: no profile for the GPU.
    """
    gpu = row.text("gpu")
    name = next((profile for key, profile in CLUSTERS if key in gpu), "")
    if not name:
        raise Unusable(f"no profile for {gpu}")
    network = row.text("network")
    if "aws p5" in network:
        return _cluster("aws-p5", row.count("n_gpus"), None)
    return _cluster(name, row.count("n_gpus"), node_bytes_per_second(network))


@cache
def _cluster(name: str, devices: int, node_bandwidth: float | None) -> Cluster:
    try:
        cluster = load_cluster(name, devices=devices)
    except InputError:
        raise Unusable("n_gpus does not fill the nodes") from None
    if node_bandwidth is None:
        return cluster
    usual = load_cluster(name)
    whole = usual.link_between.bandwidth_bytes_per_second.value * usual.devices_per_node
    return cluster.with_link_between_scaled(node_bandwidth / whole)


def device_of(cluster: Cluster, attention: str) -> Device:
    """The device with the attention that the run used, where its profile has it."""
    device = cluster.device
    names = [kernel.implementation for kernel in device.attention]
    older = "flash" in attention and not ("te" in attention.split("(")[-1] or "cudnn" in attention)
    if older and "flash-attention-2" in names:
        return device.with_attention("flash-attention-2")
    return device


def equal_cuts(layers: int, chunks: int) -> Cuts:
    """Equal runs of layers, embedding and head joining the end ones (Megatron-LM).

    Where layers do not divide, embedding and head count as layers if that does (Llama 3), and
    otherwise the runs differ by one layer at most.
    """
    if layers % chunks and (layers + 2) % chunks == 0:
        return tuple(range(0, layers + 3, (layers + 2) // chunks))
    inner = (1 + round(layers * chunk / chunks) for chunk in range(1, chunks))
    return (0, *inner, layers + 2)


def comparable_gib(row: Row, chain: ChainCost, found: Staged) -> float:
    """What the published figure counts, as far as its notes say.

    ``rank 0``: the first pipeline stage, else the fullest. ``torch max`` or ``reserved``: torch's
    allocator, which sees neither the context nor NCCL's buffers.
    """
    notes = row.text("notes")
    stages = found.stages[:1] if "rank 0" in notes else found.stages
    needed = max(stage.memory_bytes for stage in stages)
    if "torch max" in notes or "reserved" in notes:
        layout, device = chain.layout, chain.device
        axes = (layout.tensor, layout.data_ranks, layout.context, layout.pipeline)
        communicators = sum(size > 1 for size in axes)
        needed -= device.framework_memory_bytes.value
        needed -= communicators * device.communicator_memory_bytes.value
    return needed / GIB
