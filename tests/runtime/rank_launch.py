"""Starts real processes with gloo on loopback, bounds their time, and leaves none running."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

TIMEOUT_SECONDS = 240.0
"""For one start of processes that train a dozen small cases on two busy cores."""

PRELOADED = [
    "paraplan_runtime",
    "torch._dynamo",  # what torch's checkpointing and pipelining import when they first run
    "torch.distributed._functional_collectives",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "transformers.models.gemma2.modeling_gemma2",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mistral.modeling_mistral",
    "transformers.models.mixtral.modeling_mixtral",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3.modeling_qwen3",
]
"""Modules that the ranks of the tests use."""


def run_ranks(
    world: int, work: Callable[..., Any], *args: Any, limit_seconds: float = TIMEOUT_SECONDS
) -> list[Any]:
    """What ``work(*args)`` returned on each of ``world`` ranks.

    Raises:
        AssertionError: a rank failed or the time ran out; with the ranks' tracebacks.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = _fork_server()
        processes = [
            context.Process(target=_rank, args=(rank, world, folder, work, args))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + limit_seconds
        failed = False
        for process in processes:
            # A rank that failed leaves the others waiting in a collective.
            while process.is_alive() and time.monotonic() < deadline and not failed:
                process.join(0.2)
                failed = any(p.exitcode not in (None, 0) for p in processes)
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
        errors = [path.read_text() for path in sorted(Path(folder).glob("error*"))]
        if errors:
            raise AssertionError("\n".join(errors[:1]))
        if any(process.exitcode for process in processes):
            codes = [process.exitcode for process in processes]
            raise AssertionError(f"ranks ended with {codes}; the time limit is {limit_seconds} s")
        return [
            torch.load(Path(folder, f"result{rank}"), weights_only=False) for rank in range(world)
        ]


def _fork_server() -> Any:
    """Processes forked from one that has done the imports, which take 10 CPU seconds each time.

    The server builds no model and runs no kernel, so that no thread of torch's is lost by forking.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _rank(
    rank: int, world: int, folder: str, work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    try:
        torch.save(work(*args), Path(folder, f"result{rank}"))
    except BaseException:
        Path(folder, f"error{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)
    dist.barrier()
    dist.destroy_process_group()
