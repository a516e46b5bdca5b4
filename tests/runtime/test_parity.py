"""Training under a plan is training on one device: losses, gradient norms and weights agree.

The default run takes one case of each layout and each model; all of them, half an hour on two
cores, run with ``pytest -n 2 -m matrix tests/runtime/test_parity.py``. ``PARAPLAN_MATRIX_PART=k/n``
takes every n-th case of those, starting with the k-th; an n that 3 does not divide takes all
recompute modes.
"""

from __future__ import annotations

import os

import pytest
from parity_cases import MODELS
from parity_work import LAYOUTS, RECOMPUTE, Case, compare, train_cases
from rank_launch import TIMEOUT_SECONDS, run_ranks

FAST = {
    2: [
        Case("llama", "data-shard-2", "selective"),
        Case("qwen3", "data-shard-2-zero-1", "none"),
        Case("mistral", "data-shard-2-zero-2", "full"),
        Case("gpt2", "data-replicate-2", "none"),
        Case("mixtral", "tensor-2", "none"),
        Case("gemma2", "sequence-2", "full"),
        Case("qwen2", "pipeline-2", "selective"),
        Case("plain", "interleaved-2", "full"),
    ],
    4: [
        Case("plain", "hybrid-2x2", "none"),
        Case("gpt2", "tensor-2-pipeline-2", "selective"),
        Case("llama", "data-shard-2-tensor-2", "full"),
        Case("llama", "data-shard-2-pipeline-2", "none"),
    ],
}


def check(world: int, cases: list[Case]) -> None:
    limit = TIMEOUT_SECONDS + 15.0 * world * len(cases)
    results = run_ranks(world, train_cases, cases, limit_seconds=limit)
    for rank_results in results:
        for case, result in zip(cases, rank_results, strict=True):
            compare(case, result)


@pytest.mark.parametrize("world", sorted(FAST))
def test_one_case_of_each_layout_and_model(world: int) -> None:
    check(world, FAST[world])


def matrix() -> dict[tuple[int, str], list[Case]]:
    """The cases that ``PARAPLAN_MATRIX_PART`` asks for, by number of ranks and model."""
    part, of = (int(number) for number in os.environ.get("PARAPLAN_MATRIX_PART", "0/1").split("/"))
    cases = [
        Case(model, layout, mode)
        for model in sorted(set(MODELS) - {"gpt2-dropout"})
        for layout in LAYOUTS
        for mode in RECOMPUTE
    ]
    groups: dict[tuple[int, str], list[Case]] = {}
    for case in cases[part::of]:
        groups.setdefault((LAYOUTS[case.layout].devices, case.model), []).append(case)
    return dict(sorted(groups.items()))


@pytest.mark.matrix
@pytest.mark.parametrize(("world", "model"), matrix())
def test_every_layout_and_recompute_mode(world: int, model: str) -> None:
    check(world, matrix()[world, model])
