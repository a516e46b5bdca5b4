"""What is trained, and the defaults for what the user leaves out."""

from __future__ import annotations

from difflib import get_close_matches

from paraplan.errors import InputError
from paraplan.layout import Precision
from paraplan.op_table import Dtype
from paraplan.plan_parts import Workload

OPTIMIZER_STATE_BYTES: dict[str, float] = {
    "adamw": 8,  # two fp32 moments (Loshchilov & Hutter 2019)
    "adam": 8,
    "adamw-8bit": 2,  # two moments of one byte each (Dettmers et al. 2022)
    "lion": 4,  # one fp32 momentum (Chen et al. 2023)
    "sgd-momentum": 4,
    "sgd": 0,
}
"""Bytes of optimizer state per parameter, fp32 master weights not included."""

OPTIMIZER_WORK_BYTES: dict[str, float] = {"adamw": 4, "adam": 4}
"""Temporaries per parameter during the update: torch's ``foreach`` Adam, its default on GPUs,
takes the square root of all second moments at once (torch/optim/adam.py). Others: none."""

COMPUTE_DTYPE: dict[Precision, Dtype] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""torch's name of the dtype that matrix products and activations use."""

COMPUTE_BYTES: dict[Precision, int] = {"bf16": 2, "fp16": 2, "fp32": 4}

DEFAULT_TOKENS_PER_STEP = 2**20  # a common choice for 1B to 13B models (Llama: 4M, GPT-3 2.7B: 1M)
MOST_DEFAULT_TOKENS_PER_STEP = 2**24  # Llama 3 405B trains with 16M (Llama team 2024, table 4)


def default_global_batch(sequence_length: int, devices: int) -> int:
    """Sequences of a step when the user names none.

    About a million tokens, at least one sequence for each device up to 16 M tokens, and a
    multiple of the number of devices where that does not blow it up, so that pure data
    parallelism stays possible.
    """
    wanted = max(
        DEFAULT_TOKENS_PER_STEP // sequence_length,
        min(devices, MOST_DEFAULT_TOKENS_PER_STEP // sequence_length),
        1,
    )
    if devices <= wanted:
        return -(-wanted // devices) * devices
    return wanted


def make_workload(
    *,
    sequence_length: int,
    devices: int,
    global_batch: int | None = None,
    precision: str = "bf16",
    optimizer: str = "adamw",
) -> Workload:
    """Check the user's choices and fill in the rest.

    Raises:
        InputError: an unknown name, or a size that is not a positive whole number.
    """
    if not isinstance(precision, str) or precision not in COMPUTE_BYTES:
        raise InputError(
            f"unknown precision {precision!r}", hint=f"one of {', '.join(COMPUTE_BYTES)}"
        )
    if not isinstance(optimizer, str) or optimizer not in OPTIMIZER_STATE_BYTES:
        close = get_close_matches(str(optimizer).lower(), OPTIMIZER_STATE_BYTES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else None
        raise InputError(
            f"unknown optimizer {optimizer!r}",
            hint=hint or f"one of {', '.join(OPTIMIZER_STATE_BYTES)}",
        )
    _check_size("sequence length", sequence_length)
    if global_batch is None:
        global_batch = default_global_batch(sequence_length, devices)
    _check_size("global batch", global_batch)
    return Workload(
        global_batch=global_batch,
        sequence_length=sequence_length,
        precision=precision,  # checked above
        optimizer=optimizer,
    )


def _check_size(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 2**24:
        raise InputError(f"{name} is {value!r}; a whole number from 1 to {2**24} is wanted")
