"""What the money is best spent on: a point planned again with more of one resource at a time.

Nothing is derived at a fixed plan: with more memory or faster links another layout may be best.
"""

from __future__ import annotations

from dataclasses import replace

from paraplan.request import GIB, SCALABLE, Question, Request, resolve
from paraplan.what_if_file import Sensitivity, WhatIfPoint

MORE = 1.1
"""How much more of a resource is tried; of a price, how much less."""
RESOURCES = (*SCALABLE, "memory")


def richer_questions(question: Question) -> dict[str, Question]:
    """The question with ``MORE`` of each resource."""
    return {resource: resolve(_richer(question, resource)) for resource in RESOURCES}


def _richer(question: Question, resource: str) -> Request:
    request = question.request
    if resource != "memory":
        factor = request.scale.get(resource, 1.0) * MORE
        return replace(request, scale={**request.scale, resource: factor})
    limit = request.memory_limit_gib
    if len(question.cluster.kinds) > 1:
        # Two kinds of devices have no one size: only what a plan may use of them can grow.
        return replace(request, memory_limit_gib=max(question.capacities_bytes) / GIB * MORE)
    memory = question.cluster.device.memory_capacity_bytes.value / GIB
    return replace(
        request,
        memory_gib=memory * MORE,
        memory_limit_gib=None if limit is None else limit * MORE,
    )


def ranked(point: WhatIfPoint, richer: dict[str, WhatIfPoint]) -> tuple[Sensitivity, ...]:
    """What each resource does to the step and to the cost of the run, best spent first.

    Args:
        point: as it is; it has a plan.
        richer: the same point with more of each resource.
    """
    assert point.step_seconds is not None, "the caller takes a point that has a plan"
    rows = [
        Sensitivity(
            point=point.id,
            resource="price",
            factor=1 / MORE,
            step_seconds=point.step_seconds,
            step_change=0.0,
            dollars_change=1 / MORE - 1,
        )
    ]
    for resource, other in richer.items():
        if other.step_seconds is None:
            continue  # the device cannot be planned for so; more of anything never loses a plan
        step = other.step_seconds / point.step_seconds - 1
        dollars = step
        if other.training_days and point.training_days:
            dollars = other.training_days / point.training_days - 1
        rows.append(
            Sensitivity(
                point=point.id,
                resource=resource,
                factor=MORE,
                step_seconds=other.step_seconds,
                step_change=step,
                dollars_change=dollars,
            )
        )
    return tuple(sorted(rows, key=lambda row: row.dollars_change))
