"""What each rank does in the test of adapters."""

from __future__ import annotations

from typing import Any

import torch
from parity_cases import STEPS, build_lora, compute_loss, make_batch, make_plan
from parity_work import LAYOUTS
from torch import nn


def train_adapters(model: nn.Module) -> dict[str, Any]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses, norms = [], []
    for step in range(STEPS):
        loss = compute_loss(model, make_batch(step), plain=False)
        loss.backward()
        losses.append(loss.item())
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.01).item())
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "norms": norms, "weights": model.state_dict()}


def train_adapters_under(layouts: list[str]) -> list[dict[str, Any]]:
    from paraplan_runtime import parallelize

    return [
        train_adapters(
            parallelize(build_lora(), make_plan("lora", LAYOUTS[layout]), device_type="cpu")
        )
        for layout in layouts
    ]
