"""The parallel model behaves as the model on one device, for all that a script does with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device_work import (
    ODD_ROWS,
    autocast_losses,
    everything,
    odd_lengths,
    one_infinity,
    outputs,
    own_loss,
)
from parity_cases import build, train
from parity_work import LOSS_TOLERANCE, NORM_TOLERANCE
from rank_launch import run_ranks

BF16_TOLERANCE = 2.0**-8
"""bf16 keeps 8 bits of mantissa."""


@pytest.fixture(
    scope="module",
    params=[
        "pipeline",
        pytest.param("data", marks=pytest.mark.matrix),
        pytest.param("interleaved", marks=pytest.mark.matrix),
        pytest.param("tensor", marks=pytest.mark.matrix),
        pytest.param("sequence", marks=pytest.mark.matrix),
    ],
)
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_ranks(2, everything, request.param)


def close(got: list[float], want: list[float], tolerance: float) -> bool:
    return len(got) == len(want) and all(
        abs(a - b) <= tolerance * abs(b) for a, b in zip(got, want, strict=True)
    )


def test_batches_of_any_size_train_exactly(ranks: list[dict[str, Any]]) -> None:
    want = train(build("llama"), rows=ODD_ROWS.__getitem__)
    for rank in ranks:
        assert close(rank["odd"]["losses"], want["losses"], LOSS_TOLERANCE)
        assert close(rank["odd"]["norms"], want["norms"], NORM_TOLERANCE)


def test_batches_of_any_length_train_exactly(ranks: list[dict[str, Any]]) -> None:
    want = odd_lengths(build("llama"))
    for rank in ranks:
        got = rank["lengths"]
        assert close(got["losses"], want["losses"], LOSS_TOLERANCE)
        assert close([got["norm"]], [want["norm"]], NORM_TOLERANCE)
        for one, other in zip(got["logits"], want["logits"], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_outputs_are_those_of_the_global_batch(ranks: list[dict[str, Any]]) -> None:
    want = outputs(build("llama"))
    for rank in ranks:
        assert rank["outputs"].keys() == want.keys()
        for name, value in want.items():
            torch.testing.assert_close(rank["outputs"][name], value, rtol=1e-5, atol=1e-6)


def test_a_loss_computed_from_the_logits_trains_exactly(ranks: list[dict[str, Any]]) -> None:
    want = own_loss(build("llama"))
    for rank in ranks:
        assert close(rank["own loss"]["losses"], want["losses"], LOSS_TOLERANCE)
        assert close(rank["own loss"]["norms"], want["norms"], NORM_TOLERANCE)


def test_ranks_that_read_different_data_are_told_so(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["different"] == (
            "ranks read different batches: rank 1 and rank 0 differ in values"
        )


def test_autocast_computes_as_on_one_device(ranks: list[dict[str, Any]]) -> None:
    want = autocast_losses(build("llama"))
    full = [train(build("llama"), steps=1)["losses"][0]]
    assert want[0] != full[0]  # autocast does change the loss
    for rank in ranks:
        assert close(rank["autocast"], want, BF16_TOLERANCE)
        assert rank["autocast"][0] != full[0]


def test_bf16_keeps_fp32_master_weights(ranks: list[dict[str, Any]]) -> None:
    want = train(build("llama"))
    for rank in ranks:
        assert rank["bf16"]["dtypes"] == {"torch.float32"}
        assert close(rank["bf16"]["losses"], want["losses"], BF16_TOLERANCE)
        assert rank["bf16"]["losses"] != want["losses"]


def test_a_grad_scaler_skips_the_same_steps_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    scales = ranks[0]["scaled"]["scales"]
    assert all(rank["scaled"] == ranks[0]["scaled"] for rank in ranks)
    assert scales[-1] < 2.0**24  # some steps overflowed
    assert scales[-1] == scales[-2]  # the last ones did not
    assert all(0 < loss < 10 for loss in ranks[0]["scaled"]["losses"])


def test_dropout_draws_apart_from_the_host(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["dropout"]["host untouched"]
        assert rank["dropout"]["calls differ"]
        assert rank["dropout"]["halves differ"]


def test_dropout_keeps_copies_equal(ranks: list[dict[str, Any]]) -> None:
    """Parameters that several ranks hold whole must not drift apart."""
    state = ranks[0]["dropout"]["state"]
    for rank in ranks:
        for name, own in rank["dropout"]["own"].items():
            if own.shape == state[name].shape:
                assert torch.equal(own, state[name]), name


def test_gradients_that_are_not_finite_show(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["not finite"]["norm"] != rank["not finite"]["norm"]
        assert "non-finite" in rank["not finite"]["message"]
        assert "twice" in rank["not finite"]["twice"]


def test_one_infinite_gradient_acts_as_on_one_device(ranks: list[dict[str, Any]]) -> None:
    want = one_infinity(build("llama"))
    assert want["skipped"] and want["scale"] == 1.0
    assert sum(int(tensor.isnan().sum()) for tensor in want["state"].values()) == 1
    for rank in ranks:
        got = rank["one infinity"]
        assert got["skipped"] and got["scale"] == want["scale"]
        for name, tensor in want["state"].items():
            torch.testing.assert_close(
                got["state"][name], tensor, rtol=1e-5, atol=1e-6, equal_nan=True
            )


def test_logits_of_changed_parameters_are_refused(ranks: list[dict[str, Any]]) -> None:
    assert all("after the optimizer changed" in rank["stale"] for rank in ranks)
