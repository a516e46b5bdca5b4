"""Everything that one GPU can show, in one command and under eight minutes, as one JSON.

    python benchmarks/gpu_report.py -o report.json                    # on a GPU
    python benchmarks/gpu_report.py --device cpu --tiny -o report.json    # tries the script itself

1. Profiles the device (`plan profile`), whole layers that were not fitted included.
2. Times matrix products and attention at sizes that are not on the grid, against predictions.
3. Trains models of GPT-2-XL's, 1B, 3B and 7B size with random weights through the runtime, with
   and without recomputation and ``torch.compile``: step time and ``max_memory_allocated`` against
   predictions. A model that does not fit, or fails, is reported with the reason. After
   ``--limit`` seconds no further one is begun.

The profile is part of the JSON, so that its figures can go into ``profiles/``.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

from paraplan import estimate
from paraplan.cluster import Cluster
from paraplan.errors import PlanError
from paraplan.graph import Amount, Op
from paraplan.models import resolve_model
from paraplan.op_times import op_seconds
from paraplan.plan_file import Plan
from paraplan.profile_tasks import AttentionTask, GemmTask, gpt2_config, llama_config
from paraplan.profiling import Profile, profile_machine
from paraplan.trace_model import class_and_config, quiet_transformers

Kind = Literal["cuda", "cpu"]
WARM_UP_STEPS, STEPS = 2, 5
# (name, config or preset, sequence length, sequences, optimizer); 7B states fit without Adam only
MODELS = [
    ("gpt2-xl size", gpt2_config(1600, 25, vocabulary=50257), 48, 1024, 8, "adamw"),
    ("1B size", llama_config(2048, 32, 8, vocabulary=128256), 16, 2048, 4, "adamw"),
    ("3B size", llama_config(3072, 24, 8, vocabulary=128256), 28, 2048, 2, "adamw"),
    ("7B size", llama_config(4096, 32, 8, vocabulary=32000), 32, 2048, 1, "sgd"),
]
TINY = [("tiny", llama_config(64, 4, vocabulary=256), 2, 32, 2, "adamw")]
OPTIMIZERS: dict[str, Any] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


def off_grid(kind: Kind) -> list[GemmTask | AttentionTask]:
    """Sizes between those of the grid."""
    if kind == "cpu":
        return [GemmTask("float32", 96, 160, 224), GemmTask("float32", 300, 200, 400)]
    products = [(4096, 4096, 11008), (3072, 12288, 3072), (6144, 1536, 1536), (1536, 32000, 2560)]
    attention: list[GemmTask | AttentionTask] = [
        AttentionTask("bfloat16", (2, 32, 32, length, length, size, size), True, phase)
        for length, size in ((1024, 64), (4096, 128))
        for phase in ("forward", "backward")
    ]
    return [*(GemmTask("bfloat16", *sizes) for sizes in products), *attention]


def predicted_seconds(task: GemmTask | AttentionTask, cluster: Cluster) -> float:
    """Of one op by the profile."""
    sizes = (1, task.m, task.n, task.k) if isinstance(task, GemmTask) else task.dims
    dims = tuple(Amount(size) for size in sizes)
    op = Op(
        name="op",
        kind="gemm" if isinstance(task, GemmTask) else "attention",
        phase="forward" if isinstance(task, GemmTask) else task.phase,
        dtype=task.dtype,
        dims=dims,
        causal=isinstance(task, AttentionTask) and task.causal,
    )
    return op_seconds(op, 1, cluster.device).seconds


def check_ops(kind: Kind, made: Profile) -> list[dict[str, Any]]:
    """Ops off the grid, measured and predicted."""
    from paraplan.measure_ranks import RankSettings, key_of, measure_on_ranks

    tasks, known = off_grid(kind), dict[str, Any]()
    measure_on_ranks(tasks, RankSettings(kind, 1, False, 1), known.__setitem__)
    return [
        {
            "op": key_of(task),
            "measured_seconds": known[key_of(task)].seconds,
            "predicted_seconds": predicted_seconds(task, made.cluster),
            "error": predicted_seconds(task, made.cluster) / known[key_of(task)].seconds - 1,
        }
        for task in tasks
    ]


def variants(tiny: bool) -> Iterator[tuple[Any, str, bool]]:
    """Each model with each recomputation, compiled or not."""
    for model in TINY if tiny else MODELS:
        for recompute in ("none", "full"):
            for compiled in (False,) if tiny else (False, True):
                yield model, recompute, compiled


def train(plan: Plan, folder: str, kind: Kind, optimizer: str, compiled: bool) -> dict[str, Any]:
    """A few steps of the plan on this device."""
    from paraplan_runtime import parallelize

    with quiet_transformers():
        cls, config = class_and_config(resolve_model(folder))
        config.use_cache = False
        whole = cls._from_config(config, attn_implementation="sdpa").train()
    model = parallelize(whole, plan, device_type=kind)
    if compiled:
        for module in model.modules():
            if type(module).__name__.endswith(("DecoderLayer", "Block")):
                module.compile()
    rule = OPTIMIZERS[optimizer](
        model.parameters(), lr=1e-4, fused=True if kind == "cuda" else None
    )
    rows, length = plan.workload.global_batch, plan.workload.sequence_length
    seconds = []
    for number in range(WARM_UP_STEPS + STEPS):
        ids = torch.randint(config.vocab_size, (rows, length))
        if number == WARM_UP_STEPS and kind == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        rule.step()
        rule.zero_grad()
        if kind == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() if kind == "cuda" else None
    return {"measured_seconds": median(seconds[WARM_UP_STEPS:]), "measured_bytes": peak}


def check_model(
    variant: tuple[Any, str, bool], cluster: Path, folder: Path, kind: Kind
) -> dict[str, Any]:
    """One model in one variant: predicted and measured, or why not."""
    (name, config, layers, length, rows, optimizer), recompute, compiled = variant
    settings = json.loads(config)
    settings["n_layer" if "n_layer" in settings else "num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(settings))
    told: dict[str, Any] = {"model": name, "recompute": recompute, "compiled": compiled}
    try:
        plan = estimate(
            str(folder),
            cluster=str(cluster),
            gpus=1,
            seq_len=length,
            global_batch=rows,
            precision="bf16" if kind == "cuda" else "fp32",
            optimizer=optimizer,
            fix={"recompute": recompute, "micro_batch_size": rows},
        )
        memory = plan.stages[0].memory
        # The allocator's own count: no context, no fragments between blocks.
        unseen = memory.framework + memory.fragmentation + memory.communication
        told["predicted_seconds"] = plan.prediction.step_seconds
        told["predicted_bytes"] = memory.total - unseen
        if not plan.prediction.fits:
            return told | {"failed": "predicted not to fit"}
        return told | train(plan, str(folder), kind, optimizer, compiled)
    except (PlanError, RuntimeError) as error:  # out of memory is a RuntimeError
        return told | {"failed": f"{type(error).__name__}: {str(error)[:300]}"}


def main() -> None:
    """Profile, check ops, train, write."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and a quick profile")
    parser.add_argument("--limit", type=float, default=400.0, help="seconds to begin models in")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    made = profile_machine(arguments.device, 1, quick=arguments.tiny)
    report: dict[str, Any] = {
        "profile": made.cluster.model_dump(mode="json", exclude_none=True),
        "profile_seconds": made.seconds,
        "spread": made.spread,
        "layers": [{"fitted": one.task.fitted, "error": one.error} for one in made.layers],
        "ops": check_ops(arguments.device, made),
        "models": [],
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        cluster = folder / "cluster.json"
        cluster.write_text(made.cluster.model_dump_json(exclude_none=True))
        for variant in variants(arguments.tiny):
            if time.monotonic() - began > arguments.limit:
                report["models"].append({"model": variant[0][0], "failed": "no time left"})
                continue
            report["models"].append(check_model(variant, cluster, folder, arguments.device))
            print(report["models"][-1], flush=True)
            gc.collect()
            if arguments.device == "cuda":
                torch.cuda.empty_cache()
            arguments.output.write_text(json.dumps(report, indent=1))
    report["seconds"] = time.monotonic() - began
    arguments.output.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
