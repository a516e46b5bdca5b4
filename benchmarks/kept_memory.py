"""Shows what a CPU rank gains by keeping the memory that it frees.

    python benchmarks/kept_memory.py            # 2 ranks, about a minute and a half

A small Llama trains under several layouts, with and without `paraplan.cpu_ranks.keep_freed_memory`,
in processes of their own that take turns. Printed for each layout: page faults of a step on rank 0,
the ratio of the steps' times (kept over given back), and what is held at most.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist
from profile_loop import LENGTH, LLAMA, rows

from paraplan.layout import Layout

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "runtime"))
from parity_cases import make_plan
from rank_launch import run_ranks

ROWS = rows(2)
WARM_UP_STEPS, STEPS = 4, 8
LAYOUTS = {
    "data-replicate 2": Layout(data_replicate=2, micro_batch_size=ROWS // 2),
    "data-shard 2 (ZeRO-3)": Layout(data_shard=2, zero_stage=3, micro_batch_size=ROWS // 2),
    "tensor 2": Layout(tensor=2, micro_batch_size=ROWS),
    "pipeline 2": Layout(pipeline=2, schedule="1f1b", micro_batch_size=2, micro_batches=ROWS // 2),
}


class Measured(NamedTuple):
    """Of one rank in one run."""

    seconds: float
    faults: float
    held_bytes: int


def train(layout: Layout, keep: bool) -> Measured:
    """Medians of the steps of one run."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from paraplan_runtime import parallelize

    if not keep:
        os.environ["MALLOC_TRIM_THRESHOLD_"] = "set by the user"  # the runtime leaves it alone
    torch.manual_seed(0)
    config = LlamaConfig(**{name: LLAMA[name] for name in LLAMA if name != "model_type"})
    config.use_cache = False
    plan = make_plan("llama", layout, layers=config.num_hidden_layers)
    model = parallelize(LlamaForCausalLM(config).train(), plan, device_type="cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    seconds, faults = [], []
    for _ in range(WARM_UP_STEPS + STEPS):
        ids = torch.randint(config.vocab_size, (ROWS, LENGTH))
        dist.barrier()
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.barrier()
        seconds.append(time.perf_counter() - began)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Measured(median(seconds[WARM_UP_STEPS:]), median(faults[WARM_UP_STEPS:]), held)


def main() -> None:
    """Train, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    arguments = parser.parse_args()
    for name in arguments.layouts:
        layout = LAYOUTS[name]
        runs: dict[bool, list[Measured]] = {True: [], False: []}
        for _ in range(arguments.turns):
            for keep, done in runs.items():
                done.append(run_ranks(2, train, layout, keep, limit_seconds=120)[0])
        seconds, faults, held = (
            {keep: median(one[i] for one in done) for keep, done in runs.items()} for i in range(3)
        )
        print(
            f"{name:22s} faults {faults[False]:6.0f} -> {faults[True]:4.0f} a step, "
            f"time x {seconds[True] / seconds[False]:.3f}, held x {held[True] / held[False]:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
