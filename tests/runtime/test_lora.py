"""Adapters on a frozen model train as on one device."""

from __future__ import annotations

import pytest
import torch
from lora_work import train_adapters, train_adapters_under
from parity_cases import build_lora
from parity_work import LOSS_TOLERANCE, NORM_TOLERANCE
from rank_launch import run_ranks


# peft 0.x asks for a property that transformers 5 renames.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_adapters_train_as_on_one_device() -> None:
    results = run_ranks(2, train_adapters_under, ["data-shard-2", "pipeline-2"])
    want = train_adapters(build_lora())
    assert min(want["norms"]) > 0.01
    for rank in results:
        for result in rank:
            for name, tolerance in (("losses", LOSS_TOLERANCE), ("norms", NORM_TOLERANCE)):
                for got, wanted in zip(result[name], want[name], strict=True):
                    assert abs(got - wanted) <= tolerance * abs(wanted)
            assert list(result["weights"]) == list(want["weights"])
            for name, value in want["weights"].items():
                torch.testing.assert_close(result["weights"][name], value, rtol=0, atol=1e-5)
