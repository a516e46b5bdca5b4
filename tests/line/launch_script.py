"""A script with the line and nothing else of weight; its argument says how it ends."""

import os
import signal
import sys
import time

import torch

torch.moreh.option.enable_advanced_parallelization()

import torch.distributed as dist  # noqa: E402


def main(how: str) -> None:
    rank = dist.get_rank() if dist.is_initialized() else -1
    hidden = "RANK" not in os.environ and "WORLD_SIZE" not in os.environ
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    print(f"{how} {sys.argv[2:]} {os.getcwd()} ranks={ranks} hidden={hidden}", flush=True)
    torch.moreh.option.enable_advanced_parallelization()  # a second call does nothing
    print("draws", torch.ones(2, device="cuda").sum().item(), torch.rand(1).item(), flush=True)
    if how == "exit":
        sys.exit(7)
    if how == "raise" or (how == "raise-on-1" and rank == 1):
        raise ValueError("wrong on purpose")
    if how == "kill" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if how in ("wait", "kill", "raise-on-1"):
        time.sleep(600)


if __name__ == "__main__":
    main(sys.argv[1])
