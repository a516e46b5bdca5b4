"""Gives ``torch.moreh.option.enable_advanced_parallelization`` to every ``import torch``.

torch calls `install` at the end of its own import (entry point group ``torch.backends``). So
nothing is imported here that is not there already, and nothing is raised.
"""

import sys
from types import ModuleType
from typing import Any


def install() -> None:
    """Add ``torch.moreh``, unless a real one is there."""
    torch = sys.modules.get("torch")
    if torch is None or hasattr(torch, "moreh") or "torch.moreh" in sys.modules:
        return
    moreh, option = ModuleType("torch.moreh"), ModuleType("torch.moreh.option")
    option.__dict__["enable_advanced_parallelization"] = enable_advanced_parallelization
    moreh.__dict__["option"] = option
    torch.__dict__["moreh"] = moreh
    sys.modules["torch.moreh"], sys.modules["torch.moreh.option"] = moreh, option


def enable_advanced_parallelization(*args: Any, **kwargs: Any) -> None:
    """`paraplan.enable_advanced_parallelization`, imported when it is called."""
    import paraplan

    paraplan.enable_advanced_parallelization(*args, **kwargs)
