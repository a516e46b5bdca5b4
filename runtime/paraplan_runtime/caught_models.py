"""Catches models of transformers as the script makes them, so that no rank builds one whole."""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn

from paraplan_runtime.construction import parameters_on_meta

_MODULE = "transformers.modeling_utils"

Adopt = Callable[[nn.Module], None]
"""Takes a model whose parameters are on meta."""


class _Depth:
    """How many constructors are running: the outermost one's model is the script's."""

    value = 0

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Count one more."""
        self.value += 1
        try:
            yield
        finally:
            self.value -= 1


def catch_models(adopt: Adopt) -> None:
    """From now on, hand every model of transformers that the script makes to ``adopt``.

    Works before or after transformers is imported, and imports it in neither case.
    """
    loaded = sys.modules.get(_MODULE)
    if loaded is not None:
        _catch_in(loaded, adopt)
    else:
        sys.meta_path.insert(0, _Finder(adopt))


class _Finder(importlib.abc.MetaPathFinder):
    """Waits for transformers' module of models to be imported."""

    def __init__(self, adopt: Adopt) -> None:
        self._adopt = adopt

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find it as Python would, and add to its loading."""
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                _catch_in(module, self._adopt)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _catch_in(module: ModuleType, adopt: Adopt) -> None:
    base: Any = module.PreTrainedModel
    depth = _Depth()
    original = base.__init_subclass__.__func__

    def init_subclass(cls: type, /, **kwargs: Any) -> None:
        original(cls, **kwargs)
        _catch_constructor(cls, adopt, depth)

    base.__init_subclass__ = classmethod(init_subclass)
    for cls in _subclasses(base):
        _catch_constructor(cls, adopt, depth)
    _catch_from_pretrained(base, adopt, depth)


def _subclasses(cls: type) -> Iterator[type]:
    direct: list[type] = cls.__subclasses__()
    for sub in direct:
        yield sub
        yield from _subclasses(sub)


def _catch_constructor(cls: type, adopt: Adopt, depth: _Depth) -> None:
    original = cls.__dict__.get("__init__")
    if original is None:
        return

    @functools.wraps(original)
    def construct(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        if depth.value or torch.get_default_device().type == "meta":
            original(self, *args, **kwargs)
            return
        with depth.inside(), parameters_on_meta():
            original(self, *args, **kwargs)
        adopt(self)

    cls.__init__ = construct  # type: ignore[misc]


def _catch_from_pretrained(base: Any, adopt: Adopt, depth: _Depth) -> None:
    original = base.from_pretrained.__func__

    @functools.wraps(original)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if depth.value:
            return original(cls, *args, **kwargs)
        kwargs.pop("device_map", None)  # the plan says what lies where
        with depth.inside(), parameters_on_meta():
            loaded = original(cls, *args, **kwargs)
        # With output_loading_info it is a pair.
        adopt(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    base.from_pretrained = classmethod(from_pretrained)
