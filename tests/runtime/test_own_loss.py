"""Models that compute their loss inside their forward train as on one device."""

from __future__ import annotations

import pytest
import torch
from own_loss_work import MODELS, build, refused_loss, train, train_under
from parity_work import LOSS_TOLERANCE, NORM_TOLERANCE
from rank_launch import run_ranks
from torch import nn

from paraplan_runtime.own_loss import LossReductions

CASES = [(name, "data-shard-2-zero-2") for name in MODELS] + [
    ("pair", "pipeline-2"),
    ("pair", "tensor-2"),
    ("llama-classifier", "interleaved-2"),
]


def test_losses_are_means_over_the_global_batch() -> None:
    """Encoders, encoder-decoders, classifiers and a plain pair; odd batches; evaluation."""
    for results in run_ranks(2, train_under, CASES):
        for (name, layout), result in zip(CASES, results, strict=True):
            wanted = train(name, build(name))
            for kind, tolerance in (("losses", LOSS_TOLERANCE), ("norms", NORM_TOLERANCE)):
                assert result[kind] == pytest.approx(wanted[kind], rel=tolerance), (name, layout)


def test_a_loss_of_several_terms_is_refused_on_every_rank() -> None:
    for message in run_ranks(2, refused_loss):
        assert "not the plain result of one of torch's loss functions" in message


@pytest.mark.parametrize(
    "module",
    [
        nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0]), ignore_index=1),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.MSELoss(),
        nn.BCEWithLogitsLoss(),
        nn.HuberLoss(),
    ],
)
def test_sums_over_counts_are_torchs_means(module: nn.Module) -> None:
    """Three parts of one batch, the last with filling rows, add up to torch's own mean."""
    torch.manual_seed(0)
    outputs = torch.randn(7, 3)
    classes = isinstance(module, nn.CrossEntropyLoss)
    targets = torch.randint(0, 3, (7,)) if classes else torch.rand(7, 3)
    total, count = torch.zeros(()), torch.zeros(())
    for first in (0, 3, 6):
        rows = torch.arange(first, first + 3).clamp(max=6)
        with LossReductions(rows=3, real_rows=min(3, 7 - first), expected=5) as reductions:
            module(outputs[rows], targets[rows])
        (reduction,) = reductions.found
        total += reduction.value * 5
        count += reduction.count
    torch.testing.assert_close(total / count, module(outputs, targets))
