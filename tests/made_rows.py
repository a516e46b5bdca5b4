"""Rows of measured runs, made up: what the tests of `plan validate` change cells of."""

from __future__ import annotations

import csv
from pathlib import Path

from paraplan.validate_rows import Row

# A made-up model of 1.21 B parameters: 16 layers of 2048, SwiGLU, untied.
BASE = {
    "id": "made-0",
    "source": "made up",
    "task": "pretrain",
    "model": "llama-like",
    "params_b": "1.21",
    "layers": "16",
    "hidden": "2048",
    "ffn": "8192",
    "heads": "16",
    "kv_heads": "16",
    "vocab": "32768",
    "seq_len": "2048",
    "gpu": "H100-80GB-SXM",
    "n_gpus": "8",
    "gpus_per_node": "8",
    "network": "8x400Gb/s IB",
    "precision": "bf16",
    "tp": "2",
    "pp": "2",
    "dp": "2",
    "zero_or_fsdp": "zero1",
    "sequence_parallel": "1",
    "recompute": "none",
    "attn_impl": "flash(TE)",
    "micro_batch": "1",
    "global_batch": "16",
    "measured_iter_time_s": "",
    "peak_mem_gib": "",
    "oom": "",
    "mfu": "",
    "quality": "A",
    "notes": "",
}

# The same with 8 experts of 4096, of which each token goes to 2; heads of 128 = 2048 / 16.
EXPERTS = {"n_experts": "8", "top_k": "2", "moe_ffn": "4096", "params_b": "3.624"}


def row(**cells: str) -> Row:
    """The made-up row with some cells changed."""
    return Row("made", BASE | cells)


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(BASE))
        writer.writeheader()
        writer.writerows(BASE | cells for cells in rows)
    return path
