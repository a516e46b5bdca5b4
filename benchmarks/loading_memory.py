"""Shows that no rank holds the whole model while a checkpoint is loaded.

    python benchmarks/loading_memory.py              # 2 ranks, a checkpoint of about 2 GB
    python benchmarks/loading_memory.py --layers 60  # larger

Writes a checkpoint of a Llama with random weights, then each rank builds the model without
memory, applies a plan and reads its slices. Anonymous memory (``RssAnon``; pages of the mapped
file are the kernel's to drop) is sampled meanwhile and shown against the rank's shard plus the
largest tensor.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from runtime_overhead import make_plan

from paraplan.plan_file import Layout

RANKS = 2
SAMPLE_SECONDS = 0.002
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


def load(rank: int, folder: str, name: str, layers: int) -> None:
    """Load on one rank; each rank writes what it measured."""
    from transformers import LlamaForCausalLM

    from paraplan_runtime import parallelize, parameters_on_meta

    torch.set_num_threads(1)
    store = f"file://{folder}/store-{name.replace(' ', '-')}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    config = config_of(layers)
    peak = Peak()
    with parameters_on_meta():
        source = LlamaForCausalLM(config)
    model = parallelize(source, make_plan("llama", LAYOUTS[name], layers=layers), device_type="cpu")
    model.load_pretrained(folder)
    highest = peak.stop()
    held = sum(
        entry.value.to_local().nbytes if hasattr(entry.value, "to_local") else entry.value.nbytes
        for entry in model.entries
    )
    Path(folder, f"measured-{rank}").write_text(f"{highest} {held}")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Write the checkpoint, load it under each layout and print a table."""
    from transformers import LlamaForCausalLM

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=36)
    layers = parser.parse_args().layers
    with tempfile.TemporaryDirectory() as folder:
        whole = LlamaForCausalLM(config_of(layers))
        size = sum(parameter.nbytes for parameter in whole.parameters())
        largest = max(parameter.nbytes for parameter in whole.parameters())
        whole.save_pretrained(folder, max_shard_size="500MB")
        del whole
        print(f"model {size / 1e9:.2f} GB, largest tensor {largest / 1e9:.2f} GB")
        print(f"{'':14}{'rank':>5}{'shard':>10}{'+ largest':>11}{'peak':>10}")
        for name in LAYOUTS:
            multiprocessing.spawn(load, args=(folder, name, layers), nprocs=RANKS, join=True)
            for rank in range(RANKS):
                text = Path(folder, f"measured-{rank}").read_text()
                highest, held = (int(number) for number in text.split())
                print(
                    f"{name:14}{rank:>5}{held / 1e9:>7.2f} GB{(held + largest) / 1e9:>8.2f} GB"
                    f"{highest / 1e9:>7.2f} GB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
