"""What FSDP2 copies, counted by hand from torch's `_fsdp_collectives.py`."""

from __future__ import annotations

import pytest

from paraplan.data_copies import Copies, data_copies
from paraplan.layout import Layout

BF16, FP32 = 2, 4


def copies(layout: Layout, compute_bytes: int) -> Copies:
    return data_copies(layout, compute_bytes, 1.0, wrapped=True)


def test_zero3_gathers_twice_and_copies_each_gradient() -> None:
    layout = Layout(data_shard=4, zero_stage=3, micro_batches=1)
    gather = (4 + 2) / 4 + 2 + 2  # a quarter is cast, the message read, the parameters written
    assert copies(layout, BF16) == Copies(gather, gather + 2 + 4, 0.0, 0.0)


def test_zero1_adds_up_all_but_the_first_micro_batch() -> None:
    layout = Layout(data_shard=4, zero_stage=1, micro_batches=3)
    got = copies(layout, BF16)
    first, others = 2 + 4, 2 * (4 + 2 + 4)
    assert got.backward * 3 == pytest.approx(first + others, rel=1e-12)
    assert got.first_forward == pytest.approx(5.5, rel=1e-12)
    assert got.last_backward == 4 + 4


def test_replicas_in_fp32_cast_nothing() -> None:
    assert copies(Layout(data_replicate=2, micro_batches=1), FP32) == Copies(0, 0, 0, 8 + 8 + 8)


def test_a_shard_adds_its_part_after_the_first_micro_batch() -> None:
    one, four = (
        copies(Layout(data_shard=8, zero_stage=2, micro_batches=n), BF16).backward for n in (1, 4)
    )
    assert (four - one) * 4 == pytest.approx(3 * 12 / 8, rel=1e-12)


def test_alone_in_fp32_gradients_are_added_by_autograd() -> None:
    got = data_copies(Layout(micro_batches=2), FP32, 1.0, wrapped=False)
    assert got == Copies(0.0, 12 / 2, 0.0, 0.0)


def test_frozen_parameters_are_gathered_only() -> None:
    layout = Layout(data_shard=2, zero_stage=3, micro_batches=2)
    got = data_copies(layout, BF16, 0.0, wrapped=True)
    assert got.forward == got.backward == 7
