"""A model built on meta gets, shard by shard, the values that it would have had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from construction_cases import differ, fresh, initialise, pretrain
from parity_cases import MODELS, build, compute_loss, make_batch
from rank_launch import run_ranks
from torch import nn

from paraplan.errors import InputError
from paraplan_runtime import parameters_on_meta
from paraplan_runtime.construction import take_sources
from paraplan_runtime.state import Source


def read(source: Source, parameter: torch.Tensor) -> torch.Tensor:
    value: torch.Tensor = source.open()[tuple(slice(0, size) for size in parameter.shape)]
    return value.to(source.dtype)


def assert_same(got: nn.Module, want: nn.Module) -> None:
    parameters = dict(got.named_parameters(remove_duplicate=False))
    assert all(parameter.is_meta for parameter in parameters.values())
    shared = {path for path, _ in got.named_parameters()}
    sources = take_sources(got)
    assert shared == {path for path, _ in want.named_parameters()}
    for path, value in want.named_parameters(remove_duplicate=False):
        assert parameters[path].requires_grad == value.requires_grad
        found = read(sources[path], value)
        assert found.dtype == value.dtype and torch.equal(found, value.detach()), path
    for (path, found), (_, value) in zip(got.named_buffers(), want.named_buffers(), strict=True):
        assert not found.is_meta and torch.equal(found, value), path


@pytest.mark.parametrize("name", ["odd", *MODELS])
def test_initialisation_is_that_of_the_usual_construction(name: str) -> None:
    want = fresh(name)
    state = torch.get_rng_state()
    with parameters_on_meta():
        got = fresh(name)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(got, want)
    # Replaying draws again, but not from the host's generator.
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "mixtral"])
def test_from_pretrained_reads_what_it_would_have_loaded(
    name: str, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    model: Any = build(name)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    want = type(model).from_pretrained(tmp_path, dtype=dtype)
    state = torch.get_rng_state()
    with parameters_on_meta():
        got = type(model).from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(torch.get_rng_state(), state)
    assert got.training == want.training is False
    assert_same(got, want)


@pytest.mark.filterwarnings("ignore")
def test_a_missing_head_is_initialised_as_transformers_does(tmp_path: Path) -> None:
    from transformers import LlamaForSequenceClassification

    build("llama").save_pretrained(tmp_path)  # type: ignore[operator]
    torch.manual_seed(8)
    want = LlamaForSequenceClassification.from_pretrained(tmp_path)
    state = torch.get_rng_state()
    torch.manual_seed(8)
    with parameters_on_meta():
        got = LlamaForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(got, want)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model: Any = build("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with parameters_on_meta(), pytest.raises(InputError, match="not a safetensors file"):
        type(model).from_pretrained(tmp_path)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    model: Any = build("llama")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with parameters_on_meta(), pytest.raises(InputError, match="cannot be read as safetensors"):
        type(model).from_pretrained(tmp_path, dtype=torch.float32)


def test_parameters_replaced_afterwards_are_refused() -> None:
    with parameters_on_meta():
        model = fresh("plain")
    model.to(torch.bfloat16)
    with pytest.raises(InputError, match="replaced after parameters_on_meta"):
        take_sources(model)


def test_ranks_draw_their_shards() -> None:
    cases = [("qwen2", "data-shard-2"), ("gpt2", "tensor-2"), ("qwen2", "pipeline-2")]
    for states in run_ranks(2, initialise, cases):
        for (name, _), state in zip(cases, states, strict=True):
            want = fresh(name).state_dict()
            assert list(state) == list(want)
            for path, value in want.items():
                assert torch.equal(state[path], value), path


def test_ranks_read_their_slices(tmp_path: Path) -> None:
    model: Any = build("mixtral")
    model.save_pretrained(tmp_path)
    want = compute_loss(model, make_batch(0), plain=False).item()
    for results in run_ranks(2, pretrain, "mixtral", ["tensor-2", "data-shard-2"], str(tmp_path)):
        for result in results:
            assert abs(result["loss"] - want) <= 1e-5 * want
            for path, value in model.state_dict().items():
                assert torch.equal(result["state"][path], value), path


def test_ranks_with_different_seeds_are_refused() -> None:
    for message in run_ranks(2, differ, "llama"):
        assert "built different parameters" in message
