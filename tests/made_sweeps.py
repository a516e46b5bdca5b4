"""A what-if result made by hand, for tests of what is done with it."""

from __future__ import annotations

from paraplan.what_if_file import (
    Answer,
    Choice,
    Economics,
    Limits,
    Sensitivity,
    WhatIf,
    WhatIfPoint,
)

MEMORY = {"h100-sxm": 79.1, "a100-80gb-sxm": 79.2, "h200": 139.8}


def made_point(number: int, device: str, gpus: int, **changes: object) -> WhatIfPoint:
    """A planned point whose figures follow from its size."""
    speed = gpus * {"h100-sxm": 10_000.0, "a100-80gb-sxm": 4_000.0, "h200": 11_000.0}[device]
    days = 1e12 / speed / 86400
    values: dict[str, object] = {
        "id": number,
        "model": "mistral-7b",
        "cluster": f"dgx-{device}",
        "device": device,
        "gpus": gpus,
        "nodes": gpus // 8,
        "global_batch": max(256, gpus),
        "seq_len": 4096,
        "precision": "bf16",
        "memory_gib": MEMORY[device],
        "link_bandwidth": 1.0,
        "spot_interruptions": 0.0,
        "status": "planned",
        "layout": f"data-shard {gpus} (ZeRO-1)",
        "step_seconds": 2**20 / speed,
        "tokens_per_second": speed,
        "mfu": 0.5,
        "headroom": 0.2,
        "scaling_efficiency": 1.0,
        "dollars_per_million_tokens": 0.08,
        "training_days": days,
        "training_dollars": days * 24 * gpus * 3 + gpus,
        "energy_kwh": 1e5,
        "carbon_kg": 5e4,
        "command": f"plan --model mistral-7b --gpus {gpus} --device {device}",
    }
    return WhatIfPoint.model_validate(values | changes)


def made_sweep() -> WhatIf:
    """Three devices by four sizes; one point does not fit."""
    points = [
        made_point(i, device, gpus)
        for i, (device, gpus) in enumerate((d, n) for d in MEMORY for n in (8, 16, 32, 64))
    ]
    points[4] = WhatIfPoint.model_validate(
        {
            **{name: getattr(points[4], name) for name in list(WhatIfPoint.model_fields)[:12]},
            "status": "infeasible",
            "reason": "no plan fits",
        }
    )
    best = (3, 8, 11)
    for index in best:
        points[index] = points[index].model_copy(update={"pareto": True})
    change = {"factor": 2.0, "step_seconds": 1.0}
    return WhatIf(
        tool_version="test",
        command="plan what-if --model mistral-7b --gpus 8..64 --device h100,a100,h200",
        economics=Economics(),
        limits=Limits(deadline_days=60, budget_dollars=2e6),
        points=tuple(points),
        pareto=best,
        answer=Answer(cheapest=Choice(point=8, binding=("deadline",)), fastest=Choice(point=11)),
        sensitivity=(
            Sensitivity(
                point=8, resource="compute", step_change=-0.4, dollars_change=-0.38, **change
            ),
            Sensitivity(
                point=8, resource="link_between", step_change=0.0, dollars_change=0.0, **change
            ),
        ),
        assumptions=("prices are assumed",),
    )
