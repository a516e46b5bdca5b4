"""What the one line plans for: the model as the script trains it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from line_launch import losses, run_python
from torch import nn

from paraplan import enable_advanced_parallelization
from paraplan.automatic import Machines, Planned, Wishes, _plan_here
from paraplan.cluster import make_cluster
from paraplan.device import load_device
from paraplan.errors import InputError
from paraplan.own_profile import kept_profile, measure_here
from paraplan_runtime.deferred import FirstBatch

IDS = torch.zeros((8, 16), dtype=torch.long)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARAPLAN_CACHE", str(tmp_path))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def plan(model: nn.Module, profile: str = "auto") -> Planned:
    first = FirstBatch(model, {"input_ids": IDS, "labels": IDS}, ())
    return _plan_here(first, Wishes(profile=profile), Machines("cpu", 2, 2))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # in peft
def test_adapters_are_planned_as_such() -> None:
    from peft import LoraConfig, get_peft_model

    whole = plan(llama()).plan
    targets = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(llama(), targets)
    found = plan(model)
    adapters = 4 * 4 * ((64 + 64) + (64 + 32))  # layers x rank x (in + out) of q_proj and v_proj
    assert found.plan.model.trainable_parameter_count == adapters
    assert found.plan.model.parameter_count == whole.model.parameter_count + adapters
    assert found.plan.layout.tensor == 1
    adapter_states = found.plan.stages[0].memory.optimizer + found.plan.stages[0].memory.gradients
    assert adapter_states <= 3 * 4 * adapters  # at most both moments and a gradient, each fp32
    again = plan(model)
    assert again.origin.startswith("cached") and again.plan == found.plan


def test_frozen_layers_are_planned_as_if_trained() -> None:
    whole, model = llama(), llama()
    model.model.layers[0].requires_grad_(False)  # type: ignore[union-attr,operator,index]
    model.model.embed_tokens.requires_grad_(False)  # type: ignore[union-attr,operator]
    parts = [plan(m).plan.stages[0].memory for m in (whole, model)]
    assert parts[0] == parts[1]


def test_this_machines_own_profile_is_taken_once_it_is_kept() -> None:
    before = plan(llama()).plan
    path = kept_profile("cpu", 2)
    shipped = make_cluster(load_device("cpu"), 2, devices_per_node=2)
    path.parent.mkdir(parents=True)
    for name in ("mine", "measured anew"):
        own = shipped.model_copy(update={"name": name})
        path.write_text(own.model_dump_json(exclude_none=True))
        assert plan(llama()).plan.cluster.name == name  # not the plan that is in the cache
    assert plan(llama(), "shipped").plan.cluster.name == before.cluster.name
    assert measure_here("cpu", 2, tell=pytest.fail) == path  # nothing is measured again


def test_a_machine_that_cannot_be_measured_says_why() -> None:
    with pytest.raises(InputError, match="cannot be measured: --gpus is 2000"):
        measure_here("cpu", 2000, tell=lambda text: None)
    assert not kept_profile("cpu", 2000).exists()


def test_a_wrong_profile_is_told() -> None:
    with pytest.raises(InputError, match="profile is 'fast'; one of auto, measure, shipped"):
        enable_advanced_parallelization(profile="fast")


@pytest.mark.matrix
def test_a_script_measures_once_and_trains_the_same(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    plain = run_python(tmp_path, str(script), PARAPLAN_DISABLE="1")
    first, second = (run_python(tmp_path, str(script), PARAPLAN_DEVICES="cpu:2") for _ in range(2))
    assert "measuring 2 cpu devices, once" in first.stderr
    assert "measuring" not in second.stderr
    for done in (first, second):
        assert losses(done) == pytest.approx(losses(plain), rel=1e-5)


SCRIPT = """
import torch
import paraplan
paraplan.enable_advanced_parallelization(profile="measure")
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2,
)
model = LlamaForCausalLM(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(3):
    ids = torch.randint(128, (8, 32), generator=torch.Generator().manual_seed(step))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"loss {loss.item():.9f}")
"""
