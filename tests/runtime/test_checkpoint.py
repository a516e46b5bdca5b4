"""Training state resumes under any plan; the model is saved and loaded as transformers does."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_work import (
    STEPS,
    die,
    keep_two,
    resume,
    resume_with_dropout,
    run,
    save_and_load,
    save_kinds,
)
from parity_cases import build, build_lora, compute_loss, make_batch
from rank_launch import run_ranks

from paraplan.errors import InputError
from paraplan_runtime.checkpoint_folder import begin, find_latest, publish
from paraplan_runtime.files import stored_tensors


def close(got: list[float], want: list[float]) -> bool:
    return len(got) == len(want) and all(
        abs(a - b) <= 1e-5 * abs(b) for a, b in zip(got, want, strict=True)
    )


@pytest.mark.parametrize(
    "name, parts",
    [
        ("gpt2", [(2, ["tensor-2", "data-shard-2", "pipeline-2"]), (1, ["one"])]),
        pytest.param(
            "mixtral",
            [
                (1, ["one"]),
                (2, ["tensor-2", "data-shard-2", "interleaved-2", "sequence-2"]),
                (2, ["data-replicate-2"]),
            ],
            marks=pytest.mark.matrix,
        ),
        pytest.param(
            "qwen2",
            [(4, ["tensor-2-pipeline-2", "data-shard-4", "tensor-2-pipeline-2", "hybrid-2x2"])],
            marks=pytest.mark.matrix,
        ),
        pytest.param(
            "llama",
            [
                (4, ["tensor-2-pipeline-2", "data-shard-4", "data-shard-2-tensor-2"]),
                (2, ["pipeline-2", "interleaved-2"]),
                (4, ["data-shard-2-pipeline-2"]),
                (1, ["one"]),
            ],
            marks=pytest.mark.matrix,
        ),
        pytest.param(
            "gpt2",
            [
                (4, ["data-shard-2-tensor-2", "tensor-2-pipeline-2", "data-shard-2-pipeline-2"]),
                (2, ["tensor-2"]),
            ],
            marks=pytest.mark.matrix,
        ),
    ],
)
@pytest.mark.parametrize("kind", ["adamw", pytest.param("momentum", marks=pytest.mark.matrix)])
def test_each_plan_resumes_the_one_before(
    name: str, parts: list[tuple[int, list[str]]], kind: str, tmp_path: Path
) -> None:
    done = 0
    total = sum(len(layouts) for _, layouts in parts)
    want = run(build(name), None, 0, STEPS * total, save=False, kind=kind)
    for world, layouts in parts:
        first, last = STEPS * done, STEPS * (done + len(layouts))
        for losses in run_ranks(world, resume, name, layouts, str(tmp_path), done, kind):
            assert close(losses, want[first:last])
        done += len(layouts)
    assert (tmp_path / "latest").read_text() == f"step-{STEPS * total}"
    # Nothing half-written is left.
    assert not list(tmp_path.glob(".step-*"))


def test_dropout_goes_on_as_if_uninterrupted(tmp_path: Path) -> None:
    for straight, parts in run_ranks(2, resume_with_dropout, str(tmp_path)):
        assert close(parts, straight)


def test_a_crash_in_the_middle_of_a_save_loses_nothing(tmp_path: Path) -> None:
    run_ranks(2, resume, "llama", ["tensor-2"], str(tmp_path))
    for moment, left in (("writing", ".step-4"), ("publishing", ".step-4"), ("renamed", "step-4")):
        with pytest.raises(AssertionError):
            run_ranks(2, die, str(tmp_path), moment)
        assert (tmp_path / left).is_dir()
        assert (tmp_path / "latest").read_text() == "step-2"
    for losses in run_ranks(2, resume, "llama", ["data-shard-2"], str(tmp_path), 1):
        assert close(losses, run(build("llama"), None, 0, 4, save=False)[2:])
    assert (tmp_path / "latest").read_text() == "step-4-1"


class Malicious:
    """Runs code when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.marker,))


def test_nothing_is_unpickled_and_old_checkpoints_go(tmp_path: Path) -> None:
    (names,) = run_ranks(1, keep_two, str(tmp_path / "kept"))
    assert names == ["latest", "step-4", "step-4-1"]
    run_ranks(1, resume, "llama", ["one"], str(tmp_path / "run"))
    trap = pickle.dumps(Malicious(tmp_path / "unpickled"))
    for name in (".metadata", "__0_0.distcp", "model.pt"):
        (tmp_path / "run" / "step-2" / name).write_bytes(trap)
    run_ranks(1, resume, "llama", ["one"], str(tmp_path / "run"), 1)
    assert not (tmp_path / "unpickled").exists()
    pickle.loads(trap)
    assert (tmp_path / "unpickled").exists()


def make_folder(folder: Path) -> Path:
    """Two small checkpoints."""
    for step in (2, 4):
        (begin(folder, step) / "shard.safetensors").write_bytes(bytes(100))
        publish(folder, step, {"step": step}, None)
    return folder / "step-4"


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda latest: (latest / "shard.safetensors").unlink(), "is missing, 100 were written"),
        (lambda latest: os.truncate(latest / "shard.safetensors", 60), "has 60 bytes, 100 were"),
        (lambda latest: os.truncate(latest / "training.json", 30), "JSONDecodeError"),
        (lambda latest: (latest / "training.json").unlink(), "No such file"),
        (lambda latest: (latest / "training.json").write_text("[]"), "TypeError"),
        (lambda latest: latest.rename(latest.with_name("gone")), "No such file"),
        (lambda latest: (latest.parent / "latest").write_text("../x"), "is no checkpoint"),
        (
            lambda latest: (latest / "training.json").write_text('{"format": 9, "files": {}}'),
            "reads up to 1",
        ),
    ],
)
def test_a_damaged_checkpoint_is_named(
    damage: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    latest = make_folder(tmp_path)
    found = find_latest(tmp_path)
    assert found is not None and found[0] == latest and found[1]["step"] == 4
    damage(latest)
    with pytest.raises(InputError) as caught:
        find_latest(tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    if "is damaged:" in str(caught.value):
        assert caught.value.hint is not None and "'step-2'" in caught.value.hint


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


def stored_names(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        names |= {tensor.name for tensor in stored_tensors(path)}
    return names


# peft asks for a property that transformers 5 renames.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_experts_half_precision_and_adapters_are_saved_as_usual(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    run_ranks(2, save_kinds, str(tmp_path / "ours"))
    wanted: dict[str, Any] = {
        "mixtral": build("mixtral"),
        "llama": build("llama").to(torch.bfloat16),
        "lora": build_lora(),
    }
    for name, model in wanted.items():
        model.save_pretrained(tmp_path / name)
        assert stored_names(tmp_path / "ours" / name) == stored_names(tmp_path / name)
        folder = tmp_path / "ours" / name
        if name == "lora":
            again = peft.PeftModel.from_pretrained(build("llama"), folder)
        else:
            again = type(model).from_pretrained(folder)
        for path, value in model.state_dict().items():
            found = again.state_dict()[path]
            assert found.dtype == value.dtype and torch.equal(found, value), path
