"""The result of a what-if sweep: tidy rows, one a cluster, and what they say about sizing.

`WhatIf` is what ``plan what-if -o FILE`` writes and what ``plan report FILE`` reads. Every row
repeats the whole question it answers, and holds the command that plans it alone.
"""

from __future__ import annotations

import json
import os
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from paraplan.errors import InputError
from paraplan.files import describe_validation_error, read_small_file, write_atomically
from paraplan.layout import Precision
from paraplan.plan_parts import Bytes, Seconds
from paraplan.tables import to_dataframe

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Whole = Annotated[int, Field(ge=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class WhatIfPoint(_Frozen):
    """One cluster and workload, its plan and what training on it takes; every field is a scalar.

    Fields from ``layout`` on are None where ``status`` is not ``planned``; those that need a
    price, a power or an end that failures let the training reach are None without it.

    Attributes:
        id: position among the points of the sweep, from 0.
        cluster: name of the cluster; ``device`` of its devices.
        memory_gib: of a device, all of it.
        link_bandwidth: factor on the network between nodes.
        spot_interruptions: of one node, a day (0: no spot market).
        status: ``infeasible``: nothing fits in memory; ``impossible``: no layout can be, or the
            devices do not fill their nodes. ``reason`` then says why, in one line.
        layout: in words; the columns after it hold the same as numbers.
        peak_memory_bytes: of the fullest device; ``headroom`` is the share of ``memory_gib``
            beside it.
        gap: proven relative distance to the optimum.
        scaling_efficiency: tokens per second and device, relative to the smallest planned
            cluster of the same row otherwise.
        price_per_device_hour: US dollars; ``price_is_assumed`` unless the user gave it.
        dollars_per_million_tokens: while it trains; checkpoints and failures come on top.
        mtbf_hours: mean time between failures of the whole cluster, interruptions included.
        checkpoint_every_seconds: the interval that loses least (Daly 2006).
        training_share: of the time that goes into steps; the rest is checkpoints, lost work
            and restarts.
        training_days, training_dollars, energy_kwh, carbon_kg: to all tokens, with failures.
        idle_is_better: fewer devices of the same row otherwise, batch included, that take this step
            no slower: a plan uses all of its devices, so the rest is better left idle.
        pareto: no other point of the model and sequence length is both faster and cheaper.
        command: plans this point alone.
    """

    id: Annotated[int, Field(ge=0)]
    model: str
    cluster: str
    device: str
    gpus: Whole
    nodes: Whole
    global_batch: Whole
    seq_len: Whole
    precision: Precision
    memory_gib: Positive
    link_bandwidth: Positive
    spot_interruptions: Amount
    status: Literal["planned", "infeasible", "impossible"]
    reason: str = ""
    layout: str | None = None
    data_replicate: int | None = None
    data_shard: int | None = None
    zero_stage: int | None = None
    tensor: int | None = None
    context: int | None = None
    expert: int | None = None
    pipeline: int | None = None
    virtual_stages: int | None = None
    micro_batch_size: int | None = None
    micro_batches: int | None = None
    step_seconds: Seconds | None = None
    tokens_per_second: Amount | None = None
    mfu: Amount | None = None
    peak_memory_bytes: Bytes | None = None
    headroom: float | None = None
    gap: Amount | None = None
    scaling_efficiency: Amount | None = None
    price_per_device_hour: Amount | None = None
    price_is_assumed: bool = True
    dollars_per_million_tokens: Amount | None = None
    mtbf_hours: Positive | None = None
    checkpoint_every_seconds: Positive | None = None
    training_share: Amount | None = None
    training_days: Amount | None = None
    training_dollars: Amount | None = None
    energy_kwh: Amount | None = None
    carbon_kg: Amount | None = None
    idle_is_better: Whole | None = None
    pareto: bool = False
    command: str = ""


class Economics(_Frozen):
    """What the money, the failures and the energy of a sweep rest on; all of it can be given.

    Attributes:
        tokens: to train on.
        price_per_device_hour: US dollars instead of the profiles' assumed prices; ``prices`` the
            same by name of the device, before it.
        device_mtbf_hours: mean time between failures that stop the job, of one device. The
            default is Llama 3's: 419 unexpected interruptions of 16,384 devices in 54 days
            (Llama team 2024, section 3.3.4).
        checkpoint_bytes_per_second: that each node writes. The default is Llama 3's: 2 TB/s
            sustained for 16,384 devices, 8 a node (the same, section 3.3.1).
        restart_seconds: from a failure to the first step after it; assumed.
        power_overhead: power of the whole data centre over that of the devices at their maximum;
            assumed. Between a DGX H100's 10.2 kW for 8 devices of 700 W with cooling, and
            devices that do not draw their maximum.
        carbon_kg_per_kwh: of the grid; assumed, about the world's average.
    """

    tokens: Positive = 1e12
    price_per_device_hour: Amount | None = None
    prices: dict[str, Amount] = {}
    device_mtbf_hours: Positive = 54 * 24 * 16384 / 419
    checkpoint_bytes_per_second: Positive = 2e12 / (16384 / 8)
    restart_seconds: Amount = 600.0
    power_overhead: Annotated[float, Field(ge=1, le=10)] = 1.5
    carbon_kg_per_kwh: Amount = 0.48


class Limits(_Frozen):
    """What the cluster must meet; None is no limit."""

    deadline_days: Positive | None = None
    budget_dollars: Positive | None = None
    min_headroom: Annotated[float, Field(ge=0, lt=1)] | None = None


class Choice(_Frozen):
    """A point that answers the sizing question.

    Attributes:
        point: its id.
        binding: limits without which another point would have been chosen, or a better plan of
            this one.
    """

    point: int
    binding: tuple[Literal["deadline", "budget", "min_headroom"], ...] = ()


class Answer(_Frozen):
    """What the limits leave.

    Attributes:
        cheapest: the cheapest cluster that meets every limit; ``fastest`` of them the fastest.
        nearest: where nothing meets them, the point that exceeds them least: the largest of
            days / deadline and dollars / budget is smallest.
    """

    cheapest: Choice | None = None
    fastest: Choice | None = None
    nearest: int | None = None


class Sensitivity(_Frozen):
    """One resource of a point made better, and the plan made again.

    Attributes:
        resource: ``compute``, ``memory_bandwidth``, ``memory``, ``link_inside``,
            ``link_between`` or ``price``.
        factor: on it.
        step_change, dollars_change: relative; dollars at the same price per device (for
            ``price``: at the changed one). A resource may cost up to ``-dollars_change`` more.
    """

    point: int
    resource: str
    factor: Positive
    step_seconds: Seconds
    step_change: float
    dollars_change: float


class WhatIf(_Frozen):
    """A sweep; see the module's docstring.

    Attributes:
        command: makes it again.
        points: in the order of the question, first axis slowest.
        pareto: ids of the Pareto front of training time against money.
        sensitivity: best spent first; empty unless asked for.
        assumptions: what was assumed, one a line.
    """

    kind: Literal["what-if"] = "what-if"
    format: Literal[1] = 1
    tool_version: str
    command: str
    economics: Economics
    limits: Limits = Limits()
    points: Annotated[tuple[WhatIfPoint, ...], Field(min_length=1)]
    pareto: tuple[int, ...] = ()
    answer: Answer | None = None
    sensitivity: tuple[Sensitivity, ...] = ()
    assumptions: tuple[str, ...] = ()

    def to_dataframe(self) -> Any:
        """The points as a pandas data frame, one column a field."""
        return to_dataframe(self.points)


def what_if_to_json(result: WhatIf) -> str:
    """The sweep as JSON text, one point a line."""
    data = result.model_dump(mode="json")
    lines = []
    for key, value in data.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            rows = ",\n".join(f"    {json.dumps(row)}" for row in value)
            lines.append(f"  {json.dumps(key)}: [\n{rows}\n  ]")
        else:
            lines.append(f"  {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def save_what_if(result: WhatIf, path: str | os.PathLike[str]) -> None:
    """Write a sweep; the old file stays if that fails."""
    write_atomically(path, what_if_to_json(result))


def load_what_if(path: str | os.PathLike[str]) -> WhatIf:
    """Read a sweep.

    Raises:
        InputError: it cannot be read or is not a sweep of this format.
    """
    try:
        return WhatIf.model_validate_json(read_small_file(path, "what-if"))
    except ValidationError as error:
        raise InputError(f"{path}: {describe_validation_error(error)}") from None
