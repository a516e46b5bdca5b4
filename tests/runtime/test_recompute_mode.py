"""What each recompute mode runs again, counted from the operators of one backward pass."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from parity_cases import build, make_batch
from torch.utils._python_dispatch import TorchDispatchMode

from paraplan.layout import Recompute
from paraplan_runtime.recompute import apply_recompute


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def backward_calls(mode: Recompute) -> tuple[Counter[str], list[torch.Tensor]]:
    model = build("llama").train()
    for layer in model.model.layers:  # type: ignore[union-attr]
        apply_recompute(layer, mode)
    loss = model(**make_batch(0), use_cache=False).loss
    with Count() as count:
        loss.backward()
    return count.calls, [p.grad for p in model.parameters() if p.grad is not None]


def test_modes_recompute_what_they_say() -> None:
    (none, want), (selective, second), (full, third) = (
        backward_calls(mode) for mode in ("none", "selective", "full")
    )
    # Seven products in each of four layers; the last one's output is needed by nobody.
    assert selective["aten.mm"] == none["aten.mm"]
    assert none["aten.mm"] + 4 * 6 <= full["aten.mm"] <= none["aten.mm"] + 4 * 7
    # Rotary embeddings and norms run again in both.
    assert selective["aten.rsqrt"] == full["aten.rsqrt"] == none["aten.rsqrt"] + 4 * 2
    for first, other in ((want, second), (want, third)):
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a, b)
