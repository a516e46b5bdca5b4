"""A training script under torchrun: rank 1 fails once, and the job resumes from its checkpoint.

Arguments: folder, how rank 1 fails in the first attempt (``exit``, ``raise`` or ``never``).
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist
from parity_cases import build, compute_loss, make_batch, make_plan
from parity_work import LAYOUTS

STEPS = 6
FAILS_AT = 3


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
        attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        if step == FAILS_AT and attempt == 0 and dist.get_rank() == 1:
            if failure == "exit":
                os._exit(9)
            if failure == "raise":
                model.stages[0].model.model.layers[-1].mlp.act_fn = None  # type: ignore[index]
        loss = compute_loss(model, make_batch(step), plain=False)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        keeper.save(step + 1, {"losses": losses}, wait=True)
    if dist.get_rank() == 0:
        Path(folder, "losses.json").write_text(json.dumps({"first": first, "losses": losses}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
