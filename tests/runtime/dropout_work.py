"""What ranks do for ``test_random_state``."""

from __future__ import annotations

from typing import Any

import torch
from parity_cases import MODELS, make_plan, train
from parity_work import LAYOUTS


def masks_and_losses(layout: str) -> dict[str, Any]:
    """Where this rank's residual dropout drops, and the losses without and with recomputation."""
    from paraplan_runtime import parallelize

    result: dict[str, Any] = {"losses": []}
    for mode in ("none", "selective", "full"):
        torch.manual_seed(3)
        plan = make_plan("gpt2", LAYOUTS[layout], recompute=mode)  # type: ignore[arg-type]
        model = parallelize(MODELS["gpt2-dropout"](), plan, device_type="cpu")
        seen: list[torch.Tensor] = []
        module = model.stages[0].model.transformer.h[0].attn.resid_dropout  # type: ignore[union-attr,index]
        hook = module.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out == 0))  # type: ignore[union-attr]
        result["losses"].append(train(model, steps=2)["losses"])
        hook.remove()  # type: ignore[operator]
        result["mask"] = seen[0]
    return result
