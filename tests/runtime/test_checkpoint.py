"""Training state resumes under any plan; the model is saved and loaded as transformers does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_work import resume, run, save_and_load
from parity_cases import build, compute_loss, make_batch
from rank_launch import run_ranks


def close(got: list[float], want: list[float]) -> bool:
    return len(got) == len(want) and all(
        abs(a - b) <= 1e-5 * abs(b) for a, b in zip(got, want, strict=True)
    )


@pytest.mark.parametrize(
    "world, name, layouts",
    [
        (2, "gpt2", ["tensor-2", "data-shard-2", "pipeline-2"]),
        pytest.param(
            2,
            "mixtral",
            ["tensor-2", "data-shard-2", "interleaved-2", "sequence-2", "data-replicate-2"],
            marks=pytest.mark.matrix,
        ),
        pytest.param(
            4,
            "qwen2",
            ["tensor-2-pipeline-2", "data-shard-2-tensor-2", "hybrid-2x2"],
            marks=pytest.mark.matrix,
        ),
        pytest.param(
            4,
            "gpt2",
            ["data-shard-2-tensor-2", "tensor-2-pipeline-2", "data-shard-2-pipeline-2"],
            marks=pytest.mark.matrix,
        ),
    ],
)
def test_each_plan_resumes_the_one_before(
    world: int, name: str, layouts: list[str], tmp_path: Path
) -> None:
    results = run_ranks(world, resume, name, layouts, str(tmp_path))
    want = run(build(name), None, 0, 2 * len(layouts), save=False)
    for losses in results:
        assert close(losses, want)
    assert (tmp_path / "latest").read_text() == f"step-{2 * len(layouts)}"
    # Nothing half-written is left.
    assert not list(tmp_path.glob(".step-*"))


@pytest.mark.parametrize(
    "world, name, layouts",
    [
        (2, "qwen2", ["tensor-2", "data-shard-2"]),
        pytest.param(
            2, "qwen2", ["pipeline-2", "sequence-2", "data-shard-2"], marks=pytest.mark.matrix
        ),
        pytest.param(2, "gpt2", ["tensor-2", "data-shard-2"], marks=pytest.mark.matrix),
        pytest.param(2, "mixtral", ["tensor-2", "pipeline-2"], marks=pytest.mark.matrix),
    ],
)
def test_the_model_is_saved_whole_and_loaded_in_slices(
    world: int, name: str, layouts: list[str], tmp_path: Path
) -> None:
    results = run_ranks(world, save_and_load, name, layouts, str(tmp_path))
    whole = build(name)
    want = run(build(name), None, 0, 2, save=False)
    for result in results:
        for losses in result["losses"]:
            assert close(losses, want)
    assert "model.safetensors.index.json" in results[0]["files"][0]
    for number in range(len(layouts)):
        again = type(whole).from_pretrained(tmp_path / str(number))
        loss = compute_loss(again, make_batch(0), plain=False)
        torch.testing.assert_close(loss, compute_loss(whole, make_batch(0), plain=False))
