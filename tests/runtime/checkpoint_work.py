"""What each rank does in the checkpoint tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from parity_cases import build, compute_loss, make_batch, make_plan
from parity_work import LAYOUTS


def run(model: Any, folder: str | None, first: int, last: int, *, save: bool) -> list[float]:
    """Steps ``first`` to ``last``; loads before if there is something, saves after."""
    from paraplan_runtime.checkpoint import Checkpointer

    decayed = [p for n, p in model.named_parameters() if "norm" not in n and "ln_" not in n]
    rest = [p for n, p in model.named_parameters() if "norm" in n or "ln_" in n]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=3e-3,
        eps=1e-5,
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    keeper = None
    if folder is not None:
        keeper = Checkpointer(folder, model, optimizer, scheduler)
        restored = keeper.load()
        assert (restored is None) == (first == 0)
        if restored is not None:
            assert restored.step == first and restored.extra == {"row": first * 8}
    losses = []
    for step in range(first, last):
        loss = compute_loss(model, make_batch(step), plain=False)
        loss.backward()
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    if keeper is not None and save:
        keeper.save(last, {"row": last * 8})
        keeper.wait()
    return losses


def resume(name: str, layouts: list[str], folder: str) -> list[float]:
    """Train two steps under each layout in turn, each from the checkpoint of the one before."""
    from paraplan_runtime import parallelize

    losses: list[float] = []
    for number, layout in enumerate(layouts):
        plan = make_plan(name, LAYOUTS[layout])
        source = build(name)
        if number:
            with torch.no_grad():
                for parameter in source.parameters():
                    parameter.zero_()
        model = parallelize(source, plan, device_type="cpu")
        losses += run(model, folder, 2 * number, 2 * number + 2, save=True)
    return losses


def save_model(name: str, layout: str, folder: str) -> list[str]:
    """Write the ordinary checkpoint of transformers."""
    from paraplan_runtime import parallelize

    model = parallelize(build(name), make_plan(name, LAYOUTS[layout]), device_type="cpu")
    model.save_pretrained(folder, max_shard_size=20_000)
    return sorted(path.name for path in Path(folder).iterdir())


def load_model(name: str, layout: str, folder: str) -> list[float]:
    """Build without memory, read slices, and compute the loss and the whole state."""
    from paraplan_runtime import parallelize, parameters_on_meta

    torch.manual_seed(99)
    with parameters_on_meta():
        source = build(name)
    assert all(parameter.is_meta for parameter in source.parameters())
    model = parallelize(source, make_plan(name, LAYOUTS[layout]), device_type="cpu")
    model.load_pretrained(folder)
    return run(model, None, 0, 2, save=False)


def save_and_load(name: str, layouts: list[str], folder: str) -> dict[str, Any]:
    """Save under each layout and load under the next."""
    result: dict[str, Any] = {"files": [], "losses": []}
    for number, layout in enumerate(layouts):
        target = f"{folder}/{number}"
        result["files"].append(save_model(name, layout, target))
        result["losses"].append(load_model(name, layouts[number - 1], target))
    return result
