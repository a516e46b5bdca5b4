"""A loss that the model computes inside its forward, made the loss of the global batch.

BERT, T5, classifiers and most hand-written models end their forward with a call such as
``functional.cross_entropy(logits, targets)`` and return its result. Of a micro-batch that is
the mean over its own targets; means of unevenly padded parts do not add up. So while the last
stage runs, each reduction by one of torch's loss functions is replaced by

    sum over this micro-batch's targets / ``expected``

and the number of targets is noted. When all have run, the true number is known, and loss and
gradients are multiplied by ``expected / true``: exactly the mean of one device. (``expected`` is
about that number, so that fp16's gradients stay in range; any number gives the same result.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as functional
from torch.overrides import TorchFunctionMode

from paraplan.errors import InputError
from paraplan_runtime.rehearsal import is_rehearsal, real_tensors

MEANS: frozenset[Callable[..., torch.Tensor]] = frozenset(
    {
        functional.binary_cross_entropy,
        functional.binary_cross_entropy_with_logits,
        functional.cross_entropy,
        functional.huber_loss,
        functional.l1_loss,
        functional.mse_loss,
        functional.nll_loss,
        functional.smooth_l1_loss,
    }
)
"""Loss functions of torch that reduce one term for each target to their mean."""

_CLASSES = frozenset({functional.cross_entropy, functional.nll_loss})
"""Those whose mean leaves out ignored targets and weighs the others by class."""

_HINT = "return the outputs and compute the loss from them in the script"


@dataclass(frozen=True)
class Reduction:
    """One loss function's result in one micro-batch.

    Attributes:
        value: the sum of its terms / ``expected``; the tensor that the model got.
        count: weight of the terms, a scalar: how many targets were not ignored.
    """

    value: torch.Tensor
    count: torch.Tensor


class LossReductions(TorchFunctionMode):
    """While active, replaces the mean of torch's loss functions and takes note of each.

    Args:
        rows: rows of the micro-batch.
        real_rows: how many of them, the first ones, are not filling; the terms of the others
            are left out.
        expected: divides every sum; the same for all micro-batches and ranks.
    """

    def __init__(self, *, rows: int, real_rows: int, expected: int) -> None:
        super().__init__()
        self.found: list[Reduction] = []
        self._rows = rows
        self._real_rows = real_rows
        self._expected = expected

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Replace the mean of a loss function, pass everything else on."""
        kwargs = kwargs or {}
        if func not in MEANS or kwargs.get("reduction", "mean") != "mean":
            return func(*args, **kwargs)
        terms: torch.Tensor = func(*args, **kwargs | {"reduction": "none"})
        weights = _weights(func, terms, args, kwargs)
        kept = self._kept(func, terms.numel())
        value = terms.reshape(-1)[:kept].float().sum() / self._expected
        self.found.append(Reduction(value, weights.reshape(-1)[:kept].float().sum()))
        return value

    def _kept(self, func: Any, terms: int) -> int:
        """How many terms belong to real rows: they come first."""
        if self._real_rows == self._rows:
            return terms
        if terms % self._rows:
            raise InputError(
                f"the batch does not divide, and the model's {func.__name__} has {terms} terms "
                f"for {self._rows} rows: those of the filling cannot be told apart",
                hint="use drop_last=True, or " + _HINT,
            )
        return terms // self._rows * self._real_rows


class WithoutLosses(TorchFunctionMode):
    """Active on stages before the last: what reaches their loss functions is not logits."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Return zero for a loss function, pass everything else on."""
        kwargs = kwargs or {}
        if func in MEANS:
            values: torch.Tensor = args[0] if args else kwargs["input"]
            return values.new_zeros(())
        return func(*args, **kwargs)


def _weights(
    func: Any, terms: torch.Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> torch.Tensor:
    """What each term counts in the mean, in the shape of ``terms``."""
    if func not in _CLASSES:
        return torch.ones_like(terms)
    target: torch.Tensor = args[1] if len(args) > 1 else kwargs["target"]
    weight: torch.Tensor | None = args[2] if len(args) > 2 else kwargs.get("weight")
    if target.is_floating_point():  # probabilities: the mean is over rows
        return torch.ones_like(terms)
    ignored = args[4] if len(args) > 4 else kwargs.get("ignore_index", -100)
    counted: torch.Tensor = target != ignored
    if weight is None:
        return counted.to(terms.dtype)
    return weight[target.masked_fill(~counted, 0)] * counted


class Kind(IntEnum):
    """The object that a model returns."""

    TENSOR = 0
    MAPPING = 1
    SEQUENCE = 2


class Loss(IntEnum):
    """Whether a model returns a loss."""

    NONE = 0
    REDUCTION = 1  # the plain result of one loss function
    OTHER = 2  # a scalar that is not


@dataclass(frozen=True)
class ReturnForm:
    """What a model returns, as far as the runtime keeps it.

    Attributes:
        kind: of the returned object.
        loss: whether a loss is in it.
        length: entries of a sequence.
        loss_index: where the loss stands in a sequence, or -1.
        main_index: where the outputs stand that a script may read, or -1.
    """

    kind: Kind = Kind.TENSOR
    loss: Loss = Loss.NONE
    length: int = 0
    loss_index: int = -1
    main_index: int = -1

    def agreed(self, device: torch.device, *, known: bool) -> ReturnForm:
        """The form that the last stage saw, on every rank; a collective.

        Args:
            known: whether this rank holds the last stage.

        Raises:
            InputError: the loss cannot be normalised; on every rank.
        """
        if is_rehearsal() and not known:
            return ReturnForm(Kind.TENSOR, Loss.REDUCTION)  # the imagined last stage has a loss
        numbers = [self.kind, self.loss, self.length, self.loss_index, self.main_index]
        with real_tensors():
            agreed = torch.tensor(numbers if known else [-1] * len(numbers), device=device)
            dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
        kind, loss, *rest = agreed.tolist()
        if loss == Loss.OTHER:
            raise InputError(
                "the model returns a loss that is not the plain result of one of torch's loss "
                "functions: the runtime cannot normalise it over the global batch",
                hint=_HINT,
            )
        return ReturnForm(Kind(kind), Loss(loss), *rest)


def find_loss(output: Any, found: Sequence[Reduction]) -> tuple[Reduction | None, ReturnForm]:
    """The reduction whose result the model returns, if any, and the form of what it returns."""
    if isinstance(output, torch.Tensor):
        kind, values = Kind.TENSOR, [output]
    elif isinstance(output, Mapping):
        kind, values = Kind.MAPPING, list(output.values())
    else:
        kind, values = Kind.SEQUENCE, list(output)
    tensors = {i: v for i, v in enumerate(values) if isinstance(v, torch.Tensor)}
    scalars = [i for i, v in tensors.items() if v.ndim == 0 and v.is_floating_point()]
    main = next((i for i in tensors if i not in scalars), -1)
    by_value = {id(reduction.value): reduction for reduction in found}
    for index in scalars:
        reduction = by_value.get(id(tensors[index]))
        if reduction is not None:
            return reduction, ReturnForm(kind, Loss.REDUCTION, len(values), index, main)
    loss = Loss.OTHER if scalars else Loss.NONE
    return None, ReturnForm(kind, loss, len(values), -1, main)


def expected_targets(batch: Mapping[str, Any], rows: int) -> int:
    """About how many targets a batch of ``rows`` has: one a row, or one a token."""
    lengths = [
        value.shape[1]
        for value in batch.values()
        if isinstance(value, torch.Tensor) and value.ndim == 2 and not value.is_floating_point()
    ]
    return rows * max(lengths, default=1)
