"""What each rank does in the checkpoint tests."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from parity_cases import build, build_lora, compute_loss, make_batch, make_plan
from parity_work import LAYOUTS as PARITY_LAYOUTS

from paraplan.layout import Layout

LAYOUTS = PARITY_LAYOUTS | {
    "one": Layout(micro_batch_size=4, micro_batches=2),
    "data-shard-4": Layout(data_shard=4, zero_stage=3, micro_batch_size=1, micro_batches=2),
}
STEPS = 2
"""Of each part of a run."""


def make_optimizer(model: Any, kind: str) -> Any:
    decayed = [p for n, p in model.named_parameters() if "norm" not in n and "ln_" not in n]
    rest = [p for n, p in model.named_parameters() if "norm" in n or "ln_" in n]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=3e-3, eps=1e-5)
    return torch.optim.SGD(groups, lr=1e-2, momentum=0.9 if kind == "momentum" else 0.0)


def run(
    model: Any,
    folder: str | None,
    first: int,
    last: int,
    *,
    save: bool,
    kind: str = "adamw",
) -> list[float]:
    """Steps ``first`` to ``last``; loads before if there is something, saves after."""
    from paraplan_runtime.checkpoint import Checkpointer

    optimizer = make_optimizer(model, kind)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    keeper = None
    if folder is not None:
        keeper = Checkpointer(folder, model, optimizer, scheduler, scaler=scaler)
        restored = keeper.load()
        assert (restored is None) == (first == 0)
        if restored is not None:
            assert restored.step == first and restored.extra == {"row": first * 8}
            assert scaler.state_dict()["_growth_tracker"] == first % 3
    losses = []
    for step in range(first, last):
        loss = compute_loss(model, make_batch(step), plain=False)
        scaler.scale(loss).backward()
        losses.append(loss.item())
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()
    if keeper is not None and save:
        keeper.save(last, {"row": last * 8})
        keeper.wait()
    return losses


def resume(
    name: str, layouts: list[str], folder: str, part: int = 0, kind: str = "adamw"
) -> list[float]:
    """Train two steps under each layout in turn, each from the checkpoint of the one before.

    Args:
        part: how many such pairs of steps were trained before.
    """
    from paraplan_runtime import parallelize

    losses: list[float] = []
    for number, layout in enumerate(layouts, start=part):
        plan = make_plan(name, LAYOUTS[layout])
        source = build(name)
        if number:
            with torch.no_grad():
                for parameter in source.parameters():
                    parameter.zero_()
        model = parallelize(source, plan, device_type="cpu")
        first = STEPS * number
        losses += run(model, folder, first, first + STEPS, save=True, kind=kind)
    return losses


def resume_with_dropout(folder: str) -> tuple[list[float], list[float]]:
    """Four steps in one go, and in two parts of which the second resumes."""
    from paraplan_runtime import parallelize

    plan = make_plan("gpt2", LAYOUTS["data-shard-2"])

    def start() -> Any:
        return parallelize(build("gpt2-dropout"), plan, device_type="cpu").train()

    torch.manual_seed(5)
    straight = run(start(), None, 0, 4, save=False)
    torch.manual_seed(5)
    parts = run(start(), folder, 0, 2, save=True)
    torch.manual_seed(6)
    random.seed(7)
    parts += run(start(), folder, 2, 4, save=False)
    return straight, parts


def keep_two(folder: str) -> list[str]:
    """Save five times, twice at the same step; what is there afterwards."""
    from paraplan_runtime import Checkpointer, parallelize

    model = parallelize(build("llama"), make_plan("llama", LAYOUTS["one"]), device_type="cpu")
    keeper = Checkpointer(folder, model, make_optimizer(model, "sgd"), keep=2)
    for step in (1, 2, 3, 4, 4):
        keeper.save(step)
    keeper.wait()
    return sorted(path.name for path in Path(folder).iterdir())


def die(folder: str, moment: str) -> None:
    """Resume, train, and be killed while saving."""
    from paraplan_runtime import checkpoint, checkpoint_folder, parallelize

    def kill(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def half_written(writer: Any, *args: Any, **kwargs: Any) -> None:
        Path(writer.path, "shard-00002-model-00001-of-00001.safetensors").write_bytes(b"half")
        kill()

    if moment == "writing" and dist.get_rank() == 1:
        checkpoint.HuggingFaceStorageWriter.write_data = half_written  # type: ignore[assignment]
    if moment == "publishing" and dist.get_rank() == 0:
        checkpoint.publish = kill
    if moment == "renamed" and dist.get_rank() == 0:
        write = checkpoint_folder.write_atomically
        checkpoint_folder.write_atomically = lambda path, text: (
            kill() if path.name == "latest" else write(path, text)
        )
    plan = make_plan("llama", LAYOUTS["data-shard-2"])
    run(parallelize(build("llama"), plan, device_type="cpu"), folder, 2, 4, save=True)


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
    plan = make_plan(name, LAYOUTS[layout])
    with parameters_on_meta():
        source: Any = build(name)
    assert all(parameter.is_meta for parameter in source.parameters())
    if name == "mixtral":  # stored expert by expert
        with parameters_on_meta():
            source = type(source).from_pretrained(folder)
        model = parallelize(source, plan, device_type="cpu").train()
    else:
        model = parallelize(source, plan, device_type="cpu", weights=folder)
    return run(model, None, 0, 2, save=False)


def save_and_load(name: str, layouts: list[str], folder: str) -> dict[str, Any]:
    """Save under each layout and load under the next."""
    result: dict[str, Any] = {"files": [], "losses": []}
    for number, layout in enumerate(layouts):
        target = f"{folder}/{number}"
        result["files"].append(save_model(name, layout, target))
        result["losses"].append(load_model(name, layouts[number - 1], target))
    return result


def save_kinds(folder: str) -> None:
    """Save what is stored otherwise than it is computed: experts, half precision, adapters."""
    from paraplan_runtime import parallelize

    def save(model: Any, name: str, layout: str, precision: Any = "fp32") -> None:
        plan = make_plan(name, LAYOUTS[layout], precision=precision)
        parallelize(model, plan, device_type="cpu").save_pretrained(
            f"{folder}/{name}", max_shard_size="40KB"
        )

    save(build("mixtral"), "mixtral", "tensor-2")
    save(build("llama").to(torch.bfloat16), "llama", "data-shard-2", "bf16")
    save(build_lora(), "lora", "pipeline-2")
