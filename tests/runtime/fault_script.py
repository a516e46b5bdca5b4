"""A training script whose rank 1 fails once; restarted, it resumes from its checkpoint.

Arguments: folder, how rank 1 fails in the first attempt: a function of ``FAILURES``, or ``never``.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist
from parity_cases import build, compute_loss, make_batch, make_plan
from parity_work import LAYOUTS

STEPS = 6
FAILS_AT = 3


class Calls(torch.nn.Module):
    """Calls a function of its input."""

    def __init__(self, function: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.forward = function


def run_in_forward(model: Any, function: Callable[[torch.Tensor], Any]) -> None:
    """Call ``function`` in the middle of this rank's forward."""
    model.stages[0].model.model.layers[-1].mlp.act_fn = Calls(function)


def exit_at_once(model: Any) -> None:
    os._exit(9)


def be_killed(model: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def be_stopped(model: Any) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def raise_in_forward(model: Any) -> None:
    def fail(value: torch.Tensor) -> torch.Tensor:
        raise TypeError("no activation")

    run_in_forward(model, fail)


def raise_between_steps(model: Any) -> None:
    raise KeyError("no such column")


def hang_in_forward(model: Any) -> None:
    run_in_forward(model, lambda value: time.sleep(10_000))


def hang_between_steps(model: Any) -> None:
    time.sleep(10_000)


def hang_in_exchange(model: Any) -> None:
    dist.barrier()


def exhaust_gpu(model: Any) -> None:
    def fail(value: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    run_in_forward(model, fail)


def exhaust_host(model: Any) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 28), resource.RLIM_INFINITY))
    run_in_forward(model, lambda value: value.new_zeros(1 << 30))


def leave(model: Any) -> None:
    sys.exit(0)


FAILURES: dict[str, Callable[[Any], None]] = {
    function.__name__: function
    for function in (
        exit_at_once,
        be_killed,
        be_stopped,
        raise_in_forward,
        raise_between_steps,
        hang_in_forward,
        hang_between_steps,
        hang_in_exchange,
        exhaust_gpu,
        exhaust_host,
        leave,
    )
}


def main(folder: str, failure: str) -> None:
    from paraplan_runtime import Checkpointer, parallelize

    logging.basicConfig()
    torch.set_num_threads(1)
    model = parallelize(
        build("llama"), make_plan("llama", LAYOUTS["pipeline-2"]), device_type="cpu"
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-5)
    keeper = Checkpointer(folder, model, optimizer)
    restored = keeper.load()
    first = 0 if restored is None else restored.step
    losses = [] if restored is None else restored.extra["losses"]
    for step in range(first, STEPS):
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        if step == FAILS_AT and attempt == 0 and dist.get_rank() == 1 and failure in FAILURES:
            Path(folder, "failed").touch()
            FAILURES[failure](model)
        loss = compute_loss(model, make_batch(step), plain=False)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        keeper.save(step + 1, {"losses": losses}, wait=True)
    if dist.get_rank() == 0:
        Path(folder, "losses.json").write_text(json.dumps({"first": first, "losses": losses}))
    if failure == f"rank_{dist.get_rank()}_last":
        time.sleep(8)  # longer than a rank waits for one that is gone
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
