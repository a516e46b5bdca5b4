"""Activation recomputation of one layer, with torch's own checkpointing.

``full`` keeps the layer's input only. ``selective`` also keeps the outputs of matrix products
and of attention, and computes the rest (norms, activations, rotary embeddings) again.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from paraplan.layout import Recompute

_KEPT_OPERATORS = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::_grouped_mm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "paraplan::attention",  # stands for a fused kernel in a dry run
)


def apply_recompute(layer: nn.Module, mode: Recompute) -> None:
    """Make ``layer`` recompute in its backward pass as ``mode`` says.

    The layer's ``forward`` is wrapped, not its ``__call__``: FSDP's hooks stay outside, so
    recomputation does not gather the parameters another time.
    """
    if mode == "none":
        return
    inner = layer.forward
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        kept = frozenset(_kept_overloads())
        options["context_fn"] = partial(
            create_selective_checkpoint_contexts, partial(_policy, kept)
        )

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return inner(*args, **kwargs)
        return checkpoint(inner, *args, **options, **kwargs)

    layer.forward = forward


def _kept_overloads() -> list[Any]:
    found = []
    for name in _KEPT_OPERATORS:
        namespace, _, operator = name.partition("::")
        packet = getattr(getattr(torch.ops, namespace), operator, None)
        found += [] if packet is None else [packet.default]
    return found


def _policy(
    kept: frozenset[Any], context: Any, operator: Any, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    if operator in kept:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
