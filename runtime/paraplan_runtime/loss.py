"""The loss of the global batch: each micro-batch gives its part of one sum over all targets.

A causal language model of transformers computes its loss through ``model.loss_function``. The
runtime puts an object of this module there: it divides the micro-batch's sum by the number of
targets of the *global* batch, so that the parts of all ranks and micro-batches add up to the
loss, and to the gradients, of one device, however unevenly padding is spread.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as functional

from paraplan.errors import InputError
from paraplan_runtime.batch import IGNORED_LABEL

CAUSAL_LOSS = "ForCausalLM"
"""``loss_type`` of a mean of cross entropies over the next tokens."""


def causal_loss_owner(model: torch.nn.Module) -> torch.nn.Module | None:
    """The module that computes a causal loss by its ``loss_function``: the model, or what peft
    wraps. None for models whose loss ``own_loss`` has to find.
    """
    for module in model.modules():
        if hasattr(type(module), "loss_function"):
            # transformers falls back to this type too, for GPT2LMHeadModel for instance.
            causal = (getattr(module, "loss_type", None) or CAUSAL_LOSS) == CAUSAL_LOSS
            called = inspect.unwrap(type(module).forward).__code__.co_names
            return module if causal and "loss_function" in called else None
    return None


class GlobalLoss:
    """Takes the place of a model's ``loss_function``.

    Args:
        tensor_group: the ranks that share the vocabulary, when the head is split over them.
    """

    def __init__(self, tensor_group: dist.ProcessGroup | None = None) -> None:
        self.tensor_group = tensor_group
        self.targets: torch.Tensor | None = None

    def count_targets(self, batch: dict[str, Any]) -> torch.Tensor:
        """Targets of the global batch, or the caller's own ``num_items_in_batch``.

        Raises:
            InputError: the labels are not integers.
        """
        given = batch.pop("num_items_in_batch", None)
        if given is not None:
            return torch.tensor(int(given))
        labels = batch.get("shift_labels")
        if labels is None:
            labels = batch["labels"][..., 1:]
        if labels.is_floating_point():
            raise InputError(
                "the labels are floating-point: the runtime normalises cross entropies only",
                hint="call the model without labels and compute the loss from the outputs",
            )
        count: torch.Tensor = (labels != IGNORED_LABEL).sum()
        return count

    def __call__(
        self, logits: torch.Tensor, labels: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """This micro-batch's part of the global loss, a scalar in fp32.

        Args:
            logits: ``(rows, sequence, vocabulary)``, or this rank's slice of the vocabulary.
            labels: ``(rows, sequence)``; ``shift_labels`` in ``kwargs`` takes precedence.
        """
        if self.targets is None:
            raise RuntimeError("count_targets must run before the model")
        targets = kwargs.get("shift_labels")
        if targets is None:
            targets = functional.pad(labels, (0, 1), value=IGNORED_LABEL)[..., 1:]
        ignored = kwargs.get("ignore_index", IGNORED_LABEL)
        flat = logits.float().reshape(-1, logits.shape[-1])
        total = self._summed(flat, targets.reshape(-1).to(logits.device), ignored)
        return total / self.targets.to(logits.device)

    def _summed(self, logits: torch.Tensor, targets: torch.Tensor, ignored: int) -> torch.Tensor:
        if self.tensor_group is None:
            return functional.cross_entropy(logits, targets, ignore_index=ignored, reduction="sum")
        total: torch.Tensor = _SplitCrossEntropy.apply(  # type: ignore[no-untyped-call]
            logits, targets, ignored, self.tensor_group
        )
        return total


class _SplitCrossEntropy(torch.autograd.Function):
    """Summed cross entropy of logits whose vocabulary is split over the tensor ranks.

    Two small exchanges, of the maximum and of (sum of exponentials, target's logit) for each
    row, in place of gathering the logits. (torch's ``loss_parallel`` computes the same, but its
    context must be open during the backward pass, which a pipeline schedule runs elsewhere.)
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        ignored: int,
        group: dist.ProcessGroup,
    ) -> torch.Tensor:
        width = logits.shape[-1]
        counted = targets != ignored
        place = targets - width * group.rank()
        inside = counted & (place >= 0) & (place < width)
        place = place.masked_fill(~inside, 0).unsqueeze(1)
        highest = logits.amax(dim=1, keepdim=True)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        shifted = logits - highest
        target = shifted.gather(1, place).squeeze(1).masked_fill(~inside, 0.0)
        exponentials = shifted.exp_()
        sums = torch.stack([exponentials.sum(dim=1), target])
        dist.all_reduce(sums, group=group)
        ctx.save_for_backward(exponentials.div_(sums[0].unsqueeze(1)), place, inside, counted)
        return torch.where(counted, sums[0].log() - sums[1], 0.0).sum()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        probabilities, place, inside, counted = ctx.saved_tensors
        result = probabilities.scatter_add(1, place, -inside.to(probabilities.dtype).unsqueeze(1))
        return result.mul_(counted.unsqueeze(1)).mul_(gradient), None, None, None


class _ReturnedLoss(torch.autograd.Function):
    """A loss whose gradients are already computed; its backward hands them out, scaled."""

    @staticmethod
    def forward(
        ctx: Any, value: torch.Tensor, anchor: torch.Tensor, install: Callable[[torch.Tensor], None]
    ) -> torch.Tensor:
        ctx.install = install
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None]:
        ctx.install(gradient)
        return None, None, None


def returned_loss(value: torch.Tensor, install: Callable[[torch.Tensor], None]) -> torch.Tensor:
    """A scalar equal to ``value``; ``backward()`` calls ``install`` with the incoming gradient."""
    anchor = torch.zeros((), device=value.device, requires_grad=True)
    result: torch.Tensor = _ReturnedLoss.apply(value, anchor, install)  # type: ignore[no-untyped-call]
    return result


def sum_over_ranks(value: torch.Tensor, *, contributes: bool) -> torch.Tensor:
    """The sum of ``value`` over the ranks that contribute, on every rank."""
    total = value.detach().clone() if contributes else torch.zeros_like(value)
    dist.all_reduce(total)
    return total
