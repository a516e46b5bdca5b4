"""Dropout under tensor parallelism: the same where ranks hold the same, apart where they do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity_cases import MODELS, make_plan, train
from parity_work import LAYOUTS
from rank_launch import run_ranks

from paraplan_runtime.random_state import SplitStream


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


@pytest.mark.parametrize(("layout", "same"), [("tensor-2", True), ("sequence-2", False)])
def test_residual_dropout_of_tensor_ranks(layout: str, same: bool) -> None:
    """Whole hidden states are dropped alike, shards of a sequence apart; recomputation repeats."""
    first, second = run_ranks(2, masks_and_losses, layout)
    assert first["mask"].any()
    assert torch.equal(first["mask"], second["mask"]) == same
    for losses in (*first["losses"], *second["losses"]):
        assert losses == pytest.approx(first["losses"][0], rel=1e-5)


def test_split_streams_differ_and_return_to_the_common_one() -> None:
    draws, after = [], []
    for place in (0, 1, 0):
        torch.manual_seed(5)
        stream = SplitStream(torch.device("cpu"), place)
        stream.enter()
        draws.append(torch.rand(4))
        torch.rand(place)  # ranks may draw differently often
        stream.leave()
        stream.leave()
        after.append(torch.rand(4))
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])
    assert torch.equal(after[0], after[1])
