"""Times a training step through the runtime against the same layout written by hand.

    python benchmarks/runtime_overhead.py            # data, tensor and pipeline, about 3 minutes

Two processes on this machine (gloo on the CPU). Both sides run the same model, batch, micro-
batches, precision and optimizer, one thread each, without recomputation, and take turns step by
step, so that what else the machine does falls on both. The acceptance of the runtime is 1.03.

The ratio is that of the medians; ``quartiles`` are those of the ratios of neighbouring steps, which
say how far to trust it. Processor time (of both ranks, waiting left out) is the steadier measure on
a busy machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn

from paraplan.layout import Layout

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "runtime"))
from parity_cases import make_plan

RANKS = 2
LAYERS = 8
LENGTH = 128
MICRO_BATCH = 2
MICRO_BATCHES = 4
WARM_UP_STEPS = 4
LAYOUTS = {
    "data": Layout(
        data_shard=2, zero_stage=3, micro_batch_size=MICRO_BATCH, micro_batches=MICRO_BATCHES
    ),
    "tensor": Layout(tensor=2, micro_batch_size=MICRO_BATCH, micro_batches=MICRO_BATCHES),
    "pipeline": Layout(
        pipeline=2,
        schedule="interleaved-1f1b",
        virtual_stages=2,
        micro_batch_size=MICRO_BATCH,
        micro_batches=MICRO_BATCHES,
    ),
}
Step = Callable[[torch.Tensor], None]


def build_model() -> Any:
    """A Llama of 8 layers of width 320: about a second for a step of two processes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=320,
        intermediate_size=896,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def next_token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the next tokens."""
    flat = logits[:, :-1].float().reshape(-1, logits.shape[-1])
    return nn.functional.cross_entropy(flat, ids[:, 1:].reshape(-1))


def finish(optimizer: torch.optim.Optimizer) -> None:
    """What both sides do after the gradients."""
    optimizer.step()
    optimizer.zero_grad()


def data_by_hand() -> Step:
    """FSDP2 by layer, embedding and head apart; gradients reduced in each micro-batch."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    model = build_model()
    for module in (model.model.embed_tokens, *model.model.layers, model.lm_head):
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(ids: torch.Tensor) -> None:
        mine = ids.chunk(RANKS)[dist.get_rank()]
        for part in mine.chunk(MICRO_BATCHES):
            (next_token_loss(model(input_ids=part).logits, part) / MICRO_BATCHES).backward()
        finish(optimizer)

    return step


def tensor_by_hand() -> Step:
    """``parallelize_module`` with torch's styles, as in its tutorial."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        loss_parallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (RANKS,))
    model = build_model()
    for layer in model.model.layers:
        columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        styles: dict[str, Any] = {name: ColwiseParallel() for name in columns}
        styles |= {name: ColwiseParallel() for name in ("mlp.gate_proj", "mlp.up_proj")}
        styles |= {name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
        parallelize_module(layer, mesh, styles)
    head = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    parallelize_module(model, mesh, head)
    # One foreach over parameters on and off the mesh is refused by DTensor; two groups are not.
    split = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
    whole = [parameter for parameter in model.parameters() if not isinstance(parameter, DTensor)]
    optimizer = torch.optim.AdamW([{"params": split}, {"params": whole}], lr=1e-4)

    def step(ids: torch.Tensor) -> None:
        for part in ids.chunk(MICRO_BATCHES):
            with loss_parallel():  # type: ignore[no-untyped-call]
                (next_token_loss(model(input_ids=part).logits, part) / MICRO_BATCHES).backward()
        finish(optimizer)

    return step


class HandStage(nn.Module):
    """A quarter of the layers, with the embedding in front of the first, the head on the last."""

    def __init__(self, model: Any, index: int, count: int) -> None:
        super().__init__()
        each = LAYERS // count
        self.embed = model.model.embed_tokens if index == 0 else None
        self.rotary = model.model.rotary_emb
        self.layers = nn.ModuleList(model.model.layers[index * each : (index + 1) * each])
        last = index == count - 1
        self.norm, self.head = (model.model.norm, model.lm_head) if last else (None, None)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden state (or ids) to hidden state (or logits)."""
        if self.embed is not None:
            hidden = self.embed(hidden)
        positions = torch.arange(hidden.shape[1])[None]
        rotary = self.rotary(hidden, positions)
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=rotary, attention_mask=None)
        if self.norm is not None and self.head is not None:
            hidden = self.head(self.norm(hidden))
        return hidden


def pipeline_by_hand() -> Step:
    """``ScheduleInterleaved1F1B`` on two stages a rank."""
    from torch.distributed.pipelining import PipelineStage, ScheduleInterleaved1F1B

    model = build_model()
    count = 2 * RANKS
    modules = [HandStage(model, index, count) for index in range(dist.get_rank(), count, RANKS)]
    stages = [
        PipelineStage(module, index, count, torch.device("cpu"))
        for module, index in zip(modules, range(dist.get_rank(), count, RANKS), strict=True)
    ]
    schedule = ScheduleInterleaved1F1B(list(stages), MICRO_BATCHES, next_token_loss)
    parameters = [parameter for module in modules for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step(ids: torch.Tensor) -> None:
        inputs = (ids,) if dist.get_rank() == 0 else ()
        schedule.step(*inputs, target=ids, losses=[], return_outputs=False)
        finish(optimizer)

    return step


BY_HAND = {"data": data_by_hand, "tensor": tensor_by_hand, "pipeline": pipeline_by_hand}


def through_the_runtime(technique: str) -> Step:
    """An ordinary loop's step."""

    from paraplan_runtime import parallelize

    plan = make_plan("llama", LAYOUTS[technique], layers=LAYERS)
    model = parallelize(build_model(), plan, device_type="cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(ids: torch.Tensor) -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        finish(optimizer)

    return step


def measure(rank: int, folder: str, technique: str, steps: int) -> None:
    """Time both sides in turn; rank 0 writes wall and processor seconds of every step."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    rows = LAYOUTS[technique].global_batch
    sides = [BY_HAND[technique](), through_the_runtime(technique)]
    seconds = torch.zeros(2, 2, steps)  # (wall, processor) x side x step
    for number in range(-WARM_UP_STEPS, steps):
        generator = torch.Generator().manual_seed(number + WARM_UP_STEPS)
        ids = torch.randint(4096, (rows, LENGTH), generator=generator)
        # Which side goes first alternates.
        for side in (0, 1) if number % 2 else (1, 0):
            dist.barrier()
            wall, processor = time.perf_counter(), time.process_time()
            sides[side](ids)
            used = torch.tensor(time.process_time() - processor)
            dist.barrier()
            elapsed = time.perf_counter() - wall
            dist.all_reduce(used)
            if number >= 0:
                seconds[0, side, number], seconds[1, side, number] = elapsed, used
    if rank == 0:
        torch.save(seconds, Path(folder, "seconds"))
    dist.barrier()
    dist.destroy_process_group()


def print_row(name: str, by_hand: torch.Tensor, runtime: torch.Tensor) -> None:
    """Medians, their ratio, and quartiles of the ratios of neighbouring steps."""
    ratio = float(runtime.median() / by_hand.median())
    lower, upper = (runtime / by_hand).quantile(torch.tensor([0.25, 0.75])).tolist()
    print(
        f"{name:20}{by_hand.median():>9.3f} s{runtime.median():>9.3f} s"
        f"{ratio:>8.3f}   {lower:.3f} to {upper:.3f}",
        flush=True,
    )


def main() -> None:
    """Measure the techniques asked for and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("techniques", nargs="*", default=list(BY_HAND))
    parser.add_argument("--steps", type=int, default=21)
    arguments = parser.parse_args()
    print(f"{'':20}{'by hand':>11}{'runtime':>11}{'ratio':>8}   quartiles")
    for technique in arguments.techniques:
        with tempfile.TemporaryDirectory() as folder:
            multiprocessing.spawn(
                measure, args=(folder, technique, arguments.steps), nprocs=RANKS, join=True
            )
            wall, processor = torch.load(Path(folder, "seconds"))
        print_row(technique, *wall)
        print_row(f"{technique}, processor", *processor)


if __name__ == "__main__":
    main()
