"""What the one line plans for: the model as the script trains it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from paraplan.automatic import Machines, Planned, Wishes, _plan_here
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


def plan(model: nn.Module) -> Planned:
    first = FirstBatch(model, {"input_ids": IDS, "labels": IDS}, ())
    return _plan_here(first, Wishes(), Machines("cpu", 2, 2))


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
