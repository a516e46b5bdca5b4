"""Tidy rows: dictionaries with the same keys, one a line of CSV or of a data frame."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel

from paraplan.errors import InputError
from paraplan.plan_file import Plan
from paraplan.plan_parts import Stage


def rows_to_csv(rows: Iterable[dict[str, Any]]) -> str:
    """Dictionaries of the same keys as CSV text with a header; None is an empty cell."""
    listed = list(rows)
    text = io.StringIO()
    if listed:
        writer = csv.DictWriter(text, list(listed[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(listed)
    return text.getvalue()


def stage_row(stage: Stage) -> dict[str, Any]:
    """One stage of a plan: times and memory parts beside what it holds."""
    row = stage.model_dump(mode="json", exclude={"modules", "recompute", "memory"})
    modes = {f"recompute_{mode}": stage.recompute.count(mode) for mode in ("selective", "full")}
    parts = {f"memory_{part}_bytes": size for part, size in stage.memory.model_dump().items()}
    return row | modes | parts


def to_dataframe(rows: Sequence[BaseModel]) -> Any:
    """Tidy rows as a pandas data frame, one column a field.

    Raises:
        InputError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError:
        raise InputError("pandas is not installed", hint="pip install pandas") from None
    columns = list(type(rows[0]).model_fields) if rows else None
    return pandas.DataFrame([row.model_dump(mode="json") for row in rows], columns=columns)


def plan_row(plan: Plan) -> dict[str, Any]:
    """What a plan decides and predicts, as one row of numbers and words."""
    seen = plan.prediction
    return {
        "model": plan.model.name,
        "device": plan.cluster.device,
        "gpus": plan.cluster.devices,
        "nodes": plan.cluster.nodes,
        **plan.workload.model_dump(),
        **plan.layout.model_dump(),
        "step_seconds": seen.step_seconds,
        "tokens_per_second": seen.tokens_per_second,
        "mfu": seen.mfu,
        "peak_memory_bytes": seen.peak_memory_bytes,
        "capacity_bytes": seen.capacity_bytes,
        "fits": seen.fits,
        **{f"{name}_seconds": value for name, value in seen.breakdown.model_dump().items()},
        "status": plan.proof.status,
        "gap": plan.proof.gap,
    }
