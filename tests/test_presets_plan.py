"""Every named model on 8, 16 and 64 H100: a plan that holds together, or why nothing fits."""

from __future__ import annotations

import random

import pytest

from paraplan import InfeasibleError, Plan, estimate, plan
from paraplan.models import preset_names


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    """One cache for the module, so that each model is traced once."""
    patch = pytest.MonkeyPatch()
    patch.setenv("PARAPLAN_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield None
    patch.undo()


def check(found: Plan) -> None:
    seen = found.prediction
    assert found.proof.status == "optimal" and found.proof.gap <= 1e-5
    assert seen.fits and seen.peak_memory_bytes <= seen.capacity_bytes
    assert seen.breakdown.total == pytest.approx(seen.step_seconds, rel=1e-6)
    assert 0 < seen.mfu < 1
    modules = [path for stage in found.stages for path in stage.modules]
    assert len(modules) == len(set(modules))
    assert found.layout.devices == found.cluster.devices
    for other in found.runner_ups:
        assert other.step_seconds >= seen.step_seconds * (1 - 1e-6)


@pytest.mark.parametrize("model", preset_names())
def test_plans_or_says_why(model: str) -> None:
    for gpus in (8, 16, 64):
        try:
            found = plan(model, gpus=gpus)
        except InfeasibleError as error:
            assert "GiB more per device" in str(error) and error.hint
            continue
        check(found)


@pytest.mark.parametrize(("model", "gpus"), [("mistral-7b", 16), ("gpt2-xl", 8)])
def test_no_estimate_of_a_real_model_is_faster(model: str, gpus: int) -> None:
    """Random layouts of the whole space, asked for one by one."""
    best = plan(model, gpus=gpus)
    rng = random.Random(0)
    fitting = 0
    for _ in range(60):
        tensor = rng.choice([1, 1, 2, 4]) if model == "mistral-7b" else 1
        pipeline = rng.choice([1, 1, 2, 4])
        ranks = gpus // tensor // pipeline
        shard = rng.choice([d for d in (1, 2, 4, 8, 16) if ranks % d == 0])
        each = best.workload.global_batch // ranks
        size = rng.choice([s for s in (1, 2, 4, 8, 16) if each % s == 0])
        fix = {
            "tensor": tensor,
            "pipeline": pipeline,
            "data_shard": shard,
            "data_replicate": ranks // shard,
            "zero_stage": rng.choice([1, 2, 3]) if shard > 1 else 0,
            "micro_batch_size": size,
            "sequence_parallel": tensor > 1 and rng.random() < 0.5,
        }
        other = estimate(model, gpus=gpus, fix=fix).prediction
        if other.fits:
            fitting += 1
            assert other.step_seconds >= best.prediction.step_seconds * (1 - 1e-6)
    assert fitting >= 10
