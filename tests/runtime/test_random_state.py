"""Dropout under tensor parallelism: the same where ranks hold the same, apart where they do not."""

from __future__ import annotations

import pytest
import torch
from dropout_work import masks_and_losses
from rank_launch import run_ranks

from paraplan_runtime.random_state import SplitStream


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
