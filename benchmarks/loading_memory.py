"""Shows that no rank holds the whole model while it is loaded, initialised or saved.

    python benchmarks/loading_memory.py              # 2 ranks, a model of about 2 GB
    python benchmarks/loading_memory.py --layers 60  # larger

Each rank builds a Llama without memory, applies a plan and gets its shard: read from a checkpoint
made on the spot, or drawn as the usual construction would; then the ranks save the whole model.
Anonymous memory (``RssAnon``; pages of the mapped file are the kernel's to drop) is sampled
meanwhile and shown against the rank's shard plus the largest tensor; when saving, what comes on
top of the shard is a file on rank 0 and copies of the largest tensor.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from runtime_overhead import make_plan

from paraplan.layout import Layout

RANKS = 2
SAMPLE_SECONDS = 0.002
FILE_BYTES = 250_000_000
"""Of one file when saving: rank 0 holds one at a time."""
LAYOUTS = {
    "data_shard 2": Layout(data_shard=2, zero_stage=3),
    "tensor 2": Layout(tensor=2),
    "pipeline 2": Layout(pipeline=2, schedule="1f1b", micro_batches=2),
}


def config_of(layers: int) -> Any:
    """About 50 MB a layer and two tables of 131 MB, in fp32."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
    )


def anonymous_bytes() -> int:
    """Memory of this process that no file backs (proc(5), ``RssAnon`` in kB)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel does not report RssAnon")


class Peak:
    """Samples the memory of this process from a thread, above what it was at first."""

    def __init__(self) -> None:
        self._start = anonymous_bytes()
        self.highest = 0
        self._running = True
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while self._running:
            self.highest = max(self.highest, anonymous_bytes() - self._start)
            time.sleep(SAMPLE_SECONDS)

    def stop(self) -> int:
        """The highest sample, in bytes."""
        self._running = False
        self._thread.join()
        return self.highest


def work(rank: int, folder: str, name: str, layers: int, mode: str) -> None:
    """Run on one rank; each rank writes what it measured.

    Each mode has processes of its own: memory that malloc kept from one would hide the next.
    """
    from transformers import LlamaForCausalLM

    from paraplan_runtime import parallelize, parameters_on_meta

    torch.set_num_threads(1)
    store = f"file://{folder}/store-{name.replace(' ', '-')}-{mode}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    plan = make_plan("llama", LAYOUTS[name], layers=layers)
    measured: dict[str, int] = {}
    torch.manual_seed(0)
    peak = Peak()
    with parameters_on_meta():
        if mode == "initialise":
            source = LlamaForCausalLM(config_of(layers))
        else:
            source = LlamaForCausalLM.from_pretrained(f"{folder}/whole")
    model = parallelize(source, plan, device_type="cpu")
    del source
    measured[mode] = peak.stop()
    if mode == "load":
        peak = Peak()
        model.save_pretrained(f"{folder}/saved", max_shard_size=FILE_BYTES)
        measured["save"] = peak.stop()
    held = sum(
        entry.value.to_local().nbytes if hasattr(entry.value, "to_local") else entry.value.nbytes
        for entry in model.entries
    )
    Path(folder, f"{mode}-{rank}").write_text(json.dumps({"shard": held} | measured))
    dist.barrier()
    dist.destroy_process_group()


def gigabytes(number: float) -> str:
    return f"{number / 1e9:>7.2f} GB"


def main() -> None:
    """Write the checkpoint, work under each layout and print a table."""
    from transformers import LlamaForCausalLM

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--skip-initialise", action="store_true", help="it draws for minutes")
    options = parser.parse_args()
    layers = options.layers
    modes = ("load",) if options.skip_initialise else ("initialise", "load")
    with tempfile.TemporaryDirectory() as folder:
        whole = LlamaForCausalLM(config_of(layers))
        size = sum(parameter.nbytes for parameter in whole.parameters())
        largest = max(parameter.nbytes for parameter in whole.parameters())
        whole.save_pretrained(f"{folder}/whole", max_shard_size="500MB")
        del whole
        print(f"model {size / 1e9:.2f} GB, largest tensor {largest / 1e9:.2f} GB")
        columns = ("shard", "+ largest", *modes, "save, extra")
        print(f"{'':14}{'rank':>5}" + "".join(f"{column:>12}" for column in columns))
        for name in LAYOUTS:
            for mode in modes:
                arguments = (folder, name, layers, mode)
                multiprocessing.spawn(work, args=arguments, nprocs=RANKS, join=True)
            for rank in range(RANKS):
                found: dict[str, int] = {}
                for mode in modes:
                    found |= json.loads(Path(folder, f"{mode}-{rank}").read_text())
                numbers = [found["shard"], found["shard"] + largest]
                numbers += [found[mode] for mode in (*modes, "save")]
                cells = "".join(f"{gigabytes(number):>12}" for number in numbers)
                print(f"{name:14}{rank:>5}{cells}", flush=True)


if __name__ == "__main__":
    main()
