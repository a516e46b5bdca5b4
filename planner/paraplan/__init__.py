"""paraplan finds the fastest way to split a PyTorch training job over your devices.

``plan("mistral-7b", gpus=16)`` returns a `Plan`; ``estimate`` predicts one given layout.
Names load on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paraplan.cluster import Cluster as Cluster
    from paraplan.errors import InfeasibleError as InfeasibleError
    from paraplan.errors import InputError as InputError
    from paraplan.one_line import (
        enable_advanced_parallelization as enable_advanced_parallelization,
    )
    from paraplan.one_line import parallelize as parallelize
    from paraplan.plan_file import Plan as Plan
    from paraplan.plan_file import load_plan as load_plan
    from paraplan.plan_file import save_plan as save_plan
    from paraplan.planning import estimate as estimate
    from paraplan.planning import plan as plan
    from paraplan.what_if_file import WhatIf as WhatIf
    from paraplan.what_if_file import WhatIfPoint as WhatIfPoint
    from paraplan.what_if_file import load_what_if as load_what_if
    from paraplan.what_if_rows import what_if as what_if

_HOME = {
    "Cluster": "cluster",
    "InfeasibleError": "errors",
    "InputError": "errors",
    "Plan": "plan_file",
    "WhatIf": "what_if_file",
    "WhatIfPoint": "what_if_file",
    "enable_advanced_parallelization": "one_line",
    "estimate": "planning",
    "load_plan": "plan_file",
    "load_what_if": "what_if_file",
    "parallelize": "one_line",
    "plan": "planning",
    "save_plan": "plan_file",
    "what_if": "what_if_rows",
}
__all__ = [
    "Cluster",
    "InfeasibleError",
    "InputError",
    "Plan",
    "WhatIf",
    "WhatIfPoint",
    "enable_advanced_parallelization",
    "estimate",
    "load_plan",
    "load_what_if",
    "parallelize",
    "plan",
    "save_plan",
    "what_if",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
