"""`plan check`: the runtime on tensors without data, and the memory that torch counts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from memory_cases import CASES, Case, checked, shallow

from paraplan import estimate
from paraplan.check import COMPARED, TOLERANCE, CheckedStage, check_plan
from paraplan.cli import main
from paraplan.plan_file import Plan, save_plan

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_hidden_layers": 8,
    "num_key_value_heads": 4,
    "vocab_size": 2048,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return str(folder)


def hold(stages: list[CheckedStage], case: Case) -> None:
    """Plan and dry run agree about each stage, and about every part of it.

    A part is held to 5 % of the stage's whole peak: of two moments of nearly the same peak the
    plan may take the one and the dry run the other, and each has its own parts.
    """
    for stage in stages:
        where = f"{case}, stage {stage.pipeline_rank}"
        assert abs(stage.difference) <= TOLERANCE, where
        for part in COMPARED:
            off = getattr(stage.predicted, part) - stage.counted.get(part, 0)
            assert abs(off) <= TOLERANCE * stage.counted_bytes, f"{where}, {part}"


@pytest.mark.parametrize("number", [0, 14])
def test_shallow_real_models_need_what_is_predicted(number: int) -> None:
    """Real widths, four layers: data shards with accumulation, and experts on tensor ranks."""
    hold(checked(CASES[number], layers=4), CASES[number])


def test_the_last_micro_batch_frees_what_was_gathered(model: str) -> None:
    """One micro-batch, so short that parameters are most of what it needs.

    The layers' parameters never stand beside all gradients then. Two moments need nearly the
    same, so that only the sum is compared.
    """
    fix = "data_shard=16,zero_stage=2,recompute=full"
    plan = estimate(model, gpus=16, fix=fix, global_batch=16, seq_len=128)
    (stage,) = check_plan(plan, model=model)
    assert abs(stage.difference) <= TOLERANCE


@pytest.mark.matrix
@pytest.mark.parametrize("case", CASES, ids=str)
def test_real_models_need_what_is_predicted(case: Case) -> None:
    """Mistral-7B, Llama-3-70B and Mixtral-8x7B at full size, each under six layouts."""
    hold(checked(case, layers=None), case)


def planned(model: str, fix: str, **options: object) -> Plan:
    return estimate(model, gpus=16, fix=fix, seq_len=1024, **options)


def test_more_micro_batches_hold_no_more(model: str) -> None:
    plan = planned(model, "pipeline=2,data_shard=8,zero_stage=2", global_batch=64)
    short, long = (
        next(check_plan(plan, model=model, ranks=[0], micro_batches=count)) for count in (None, 8)
    )
    assert short.micro_batches < long.micro_batches == 8
    # The rows of the global batch themselves are longer: 8 bytes for each of its tokens.
    assert 0 <= long.counted_bytes - short.counted_bytes <= 2 * 8 * 64 * 1024


def test_tied_embeddings_with_dropout_under_tensor_and_pipeline(tmp_path: Path) -> None:
    """The last stage has a copy of the embedding, whole where tensor ranks cannot divide it."""
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 16383}
    config |= {"n_embd": 512, "n_layer": 4, "n_head": 8, "n_positions": 512}
    (tmp_path / "config.json").write_text(json.dumps(config))
    fix = "tensor=2,pipeline=2,recompute=none"
    plan = estimate(str(tmp_path), gpus=4, fix=fix, global_batch=4, seq_len=512)
    (stage,) = check_plan(plan, model=str(tmp_path), ranks=[1])
    assert abs(stage.difference) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "layers", "depths"),
    [
        ("bert-large", 2, ("num_hidden_layers",)),
        ("t5-large", 2, ("num_layers", "num_decoder_layers")),
        ("vit-huge", 6, ("num_hidden_layers",)),
    ],
)
def test_models_with_a_loss_of_their_own(
    name: str, layers: int, depths: tuple[str, ...], tmp_path: Path
) -> None:
    """An encoder, both, and one for images."""
    folder = shallow(name, layers, tmp_path, depths)
    fix = "data_shard=2,zero_stage=2,micro_batch_size=16"
    plan = estimate(folder, gpus=2, fix=fix, global_batch=64)
    (stage,) = check_plan(plan, model=folder)
    assert abs(stage.difference) <= TOLERANCE


def test_attention_is_kept_where_nothing_was_traced_before() -> None:
    """Selective recomputation finds the op that stands for a fused kernel by its name."""
    lines = [
        "from paraplan.trace_attention import FusedAttention",
        "from paraplan_runtime.recompute import _kept_overloads",
        "FusedAttention()",
        "print([str(kept) for kept in _kept_overloads()])",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True
    )
    assert "paraplan.attention.default" in done.stdout


def test_command_says_what_it_found(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(model, "data_shard=8,tensor=2,sequence_parallel=true", global_batch=16)
    file = str(tmp_path / "a.plan.json")
    save_plan(plan, file)
    code = main(["check", file, "--model", model, "--json"])
    found = json.loads(capsys.readouterr().out)
    (stage,) = found["stages"]
    assert code == (1 if found["problems"] else 0)
    for part in ("parameters", "optimizer"):  # arithmetic, up to FSDP's padding
        assert stage["counted"][part] == pytest.approx(stage["predicted"][part], rel=0.01)
    assert stage["counted_bytes"] == sum(stage["counted"].values())
    assert main(["check", file, "--model", model, "--csv"]) == code
    head, *rows = capsys.readouterr().out.splitlines()
    assert head == "pipeline_rank,part,predicted_bytes,counted_bytes"
    assert sum(int(row.split(",")[3]) for row in rows) == stage["counted_bytes"]


def test_a_contradicted_plan_exits_with_one(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(model, "data_shard=16", global_batch=16)
    stage = plan.stages[0]
    parts = stage.memory.model_copy(update={"working": stage.memory.working + 2**30})
    lying = stage.model_copy(update={"memory": parts, "memory_bytes": parts.total})
    file = str(tmp_path / "lying.plan.json")
    peak = plan.prediction.model_copy(update={"peak_memory_bytes": parts.total})
    save_plan(plan.model_copy(update={"stages": (lying,), "prediction": peak}), file)
    assert main(["check", file, "--model", model]) == 1
    assert "off the dry run" in capsys.readouterr().out


def test_another_model_and_a_missing_stage_are_bad_input(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "a.plan.json")
    save_plan(planned(model, "data_shard=16", global_batch=16), file)
    assert main(["check", file, "--model", "gpt2"]) == 2
    assert "made for another" in capsys.readouterr().err
    assert main(["check", file, "--model", model, "--stage", "1"]) == 2
    assert "stages 0 to 0" in capsys.readouterr().err


def test_a_step_that_fails_is_one_line(
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    file = str(tmp_path / "a.plan.json")
    save_plan(planned(model, "data_shard=16", global_batch=16), file)
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, hidden: self.up_proj(hidden))
    assert main(["check", file, "--model", model]) == 1
    message = capsys.readouterr().err
    assert "stage 0: the dry run fails: " in message
    assert len(message.splitlines()) == 1
