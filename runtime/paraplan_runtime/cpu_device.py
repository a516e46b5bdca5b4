"""On CPU ranks, ``cuda`` in the script means this rank's device, so that it runs unchanged.

Only what names a device is replaced: ``Tensor.cuda`` and ``Tensor.to`` (modules go through
them), torch's functions that make tensors, ``torch.load`` and three calls of ``torch.cuda``.
``torch.cuda.is_available()`` stays False. On GPUs nothing is replaced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _device


def cuda_means_cpu() -> None:
    """Replace, in this process, what would ask for a GPU that is not there."""
    if torch.cuda.is_available() or getattr(torch.Tensor.to, "_paraplan", False):
        return
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.Tensor.to = _on_cpu(torch.Tensor.to)  # type: ignore[method-assign]
    nn.Module.to = _on_cpu(nn.Module.to)  # type: ignore[method-assign]
    torch.load = _on_cpu(torch.load, "map_location")
    for function in _device._device_constructors():
        name = getattr(function, "__name__", "")
        if getattr(torch, name, None) is function:
            setattr(torch, name, _on_cpu(function))
    torch.cuda.set_device = lambda device: None
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.current_device = lambda: 0


def _on_cpu(function: Any, keyword: str = "device") -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get(keyword)):
            kwargs[keyword] = "cpu"
        return function(*("cpu" if _is_cuda(a) else a for a in args), **kwargs)

    call._paraplan = True  # type: ignore[attr-defined]
    return call


def _is_cuda(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and (value == "cuda" or value.startswith("cuda:"))
