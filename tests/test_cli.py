"""Whole commands, as a user types them."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from paraplan.cli import main
from paraplan.plan_file import load_plan, plan_schema

TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1024,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder with a tiny model in it, and a cache shared by the tests."""
    monkeypatch.setenv("PARAPLAN_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(TINY))
    yield tmp_path


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def plan_json(*arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    code, out, err = run(*arguments, "--json", capsys=capsys)
    assert code == 0, err
    assert err == ""
    data: dict[str, Any] = json.loads(out)
    return data


def test_plan_writes_a_file_and_a_summary(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run("--model", "tiny", "--gpus", "4", capsys=capsys)
    assert (code, err) == (0, "")
    plan = load_plan("tiny-4xh100.plan.json")
    assert "wrote tiny-4xh100.plan.json" in out
    assert "MFU" in out and "optimal" in out and "modelled" in out
    assert plan.layout.devices == 4
    assert sorted(os.listdir(here)) == ["tiny", "tiny-4xh100.plan.json"]


def test_json_is_the_plan_alone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = plan_json("--model", "tiny", "--gpus", "4", capsys=capsys)
    jsonschema.validate(data, plan_schema())
    assert data["proof"]["status"] == "optimal"
    assert os.listdir(here) == ["tiny"], "--json writes a file only with --output"
    code, out, _ = run("--model", "tiny", "--gpus", "4", "-o", "-", capsys=capsys)
    assert code == 0
    assert json.loads(out)["layout"] == data["layout"]


def test_same_question_same_answer(capsys: pytest.CaptureFixture[str]) -> None:
    one = plan_json("--model", "tiny", "--gpus", "8", capsys=capsys)
    two = plan_json("--model", "tiny", "--gpus", "8", capsys=capsys)
    one["proof"].pop("seconds"), two["proof"].pop("seconds")
    assert one == two


def test_estimate_of_the_plan_is_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_json("--model", "tiny", "--gpus", "4", capsys=capsys)
    fix = ",".join(f"{k}={v}" for k, v in plan["layout"].items())
    estimate = plan_json("estimate", "--model", "tiny", "--gpus", "4", "--fix", fix, capsys=capsys)
    assert estimate["prediction"] == plan["prediction"]
    assert estimate["stages"] == plan["stages"]
    assert estimate["proof"]["status"] == "estimated"


def test_fix_is_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    question = ["--model", "tiny", "--gpus", "8", "--global-batch", "64"]
    free = plan_json(*question, capsys=capsys)
    fixed = plan_json(*question, "--fix", "tensor=2,pipeline=2,recompute=full", capsys=capsys)
    assert fixed["layout"]["tensor"] == fixed["layout"]["pipeline"] == 2
    assert {mode for stage in fixed["stages"] for mode in stage["recompute"]} == {"full"}
    assert fixed["prediction"]["step_seconds"] >= free["prediction"]["step_seconds"]


def test_allow_context(capsys: pytest.CaptureFixture[str]) -> None:
    question = ["--model", "tiny", "--gpus", "4", "--global-batch", "1", "--seq-len", "512"]
    fixed = ["--allow", "context", "--fix", "context=4"]
    assert plan_json(*question, capsys=capsys)["needs_unsupported"] == []
    assert plan_json(*question, *fixed, capsys=capsys)["needs_unsupported"] == ["context"]


def test_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run("--model", "tiny", "--gpus", "1", "--memory-limit", "0.66", capsys=capsys)
    assert (code, out) == (3, "")
    assert err.startswith("error: no plan fits: ") and "GiB more per device" in err
    assert err.count("\n") == 2 and "hint: " in err


BAD = [
    ([], "--model is missing"),
    (["--model", "tiny"], "--gpus is missing"),
    (["--model", "tiny", "--gpus", "0"], "--gpus is 0"),
    (["--model", "tiny", "--gpus", "-3"], "--gpus is -3"),
    (["--model", "tiny", "--gpus", "x"], "invalid int value"),
    (["--model", "tiny", "--gpus", "99999999999"], "--gpus is 99999999999"),
    (["--model", "tiny", "--gpus", "12"], "12 devices do not fill nodes of 8"),
    (["--model", "mistral-7", "--gpus", "8"], "mistral-7"),
    (["--model", "no/such/model", "--gpus", "8"], "no/such/model"),
    (["--model", "tiny", "--gpus", "8", "--device", "h10"], "h10"),
    (["--model", "tiny", "--gpus", "8", "--cluster", "dgx-h10"], "dgx-h10"),
    (["--model", "tiny", "--gpus", "8", "--precision", "bf61"], "unknown precision 'bf61'"),
    (["--model", "tiny", "--gpus", "8", "--optimizer", "adamx"], "unknown optimizer 'adamx'"),
    (["--model", "tiny", "--gpus", "8", "--global-batch", "0"], "global batch is 0"),
    (["--model", "tiny", "--gpus", "8", "--seq-len", "-1"], "sequence length is -1"),
    (["--model", "tiny", "--gpus", "8", "--memory-limit", "nan"], "--memory-limit is 'nan'"),
    (["--model", "tiny", "--gpus", "8", "--memory-limit", "0"], "memory limit is 0"),
    (["--model", "tiny", "--gpus", "8", "--fix", "tensr=2"], "knows no 'tensr'"),
    (["--model", "tiny", "--gpus", "8", "--fix", "tensor"], "not of the form"),
    (["--model", "tiny", "--gpus", "8", "--fix", "tensor=0"], "tensor is '0'"),
    (["--model", "tiny", "--gpus", "8", "--fix", "tensor=1e3"], "tensor is '1e3'"),
    (["--model", "tiny", "--gpus", "8", "--fix", "recompute=some"], "recompute is 'some'"),
    (["--model", "tiny", "--gpus", "8", "--allow", "contxt"], "--allow knows no 'contxt'"),
    (["--model", "tiny", "--gpus", "8", "--top", "0"], "top is 0"),
    (["--model", "tiny", "--gpus", "8", "--frob"], "--frob"),
    (["estimate", "--model", "tiny", "--gpus", "8", "--fix", "tensor=3"], "not 8 devices"),
    (["estimate", "--model", "tiny", "--fix", "tensor=8"], "4 kv heads"),
    (
        ["estimate", "--model", "tiny", "--global-batch", "6", "--fix", "data_shard=4"],
        "not the global batch of 6",
    ),
    (["estimate", "--model", "tiny", "--gpus", "1", "--fix", "zero_stage=3"], "zero_stage(3)"),
    (
        ["--model", "tiny", "--gpus", "8", "--global-batch", "6", "--fix", "data_shard=8"],
        "global batch 6 is not a multiple of data_shard(8)",
    ),
    (["--model", "tiny", "--gpus", "8", "--fix", "tensor=3"], "tensor(3) = 3 does not go into 8"),
    (
        ["--model", "tiny", "--gpus", "8", "--fix", "micro_batch_size=3"],
        "micro_batch_size(3)",
    ),
    (["--model", "tiny", "--gpus", "8", "--fix", "data_shard=8,zero_stage=0"], "0 exactly for 1"),
    (["--model", "tiny", "--gpus", "8", "--fix", "schedule=none,pipeline=2"], "schedule none"),
    (["--model", "tiny", "--gpus", "8", "--seq-len", "0"], "sequence length is 0"),
    (["explain", "missing.json"], "missing.json"),
    (["explain", "tiny/config.json"], "format is None"),
    (["diff", "missing.json", "missing.json"], "missing.json"),
    (["plam"], "unknown command 'plam'"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD, ids=[" ".join(bad[0])[:40] for bad in BAD])
def test_bad_input_is_one_line(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(*arguments, capsys=capsys)
    assert code == 2
    assert out == ""
    lines = err.splitlines()
    assert lines[0].startswith("error: ") and says in lines[0]
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("hint: "))


def test_explain_and_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    question = ["--model", "tiny", "--gpus", "4", "-q", "-o", "p.json"]
    assert run(*question, capsys=capsys)[0] == 0
    code, out, _ = run("explain", "p.json", capsys=capsys)
    assert code == 0 and "forward" in out
    ask = ["explain", "p.json", "--model", "tiny", "--why-not"]
    code, out, err = run(*ask, "tensor=4", capsys=capsys)
    assert code == 0, err
    assert "at best" in out and "what costs most: tensor parallel exchange" in out
    code, out, _ = run(*ask, "tensor=8", capsys=capsys)
    assert code == 0 and "no layout of tiny on 4 devices is possible" in out
    code, _, err = run("explain", "p.json", "--why-not", "tensor=4", capsys=capsys)
    assert code == 0, "the folder stands where the plan's name says"


def test_why_not_uses_the_cluster_of_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    question = ["--model", "tiny", "--cluster", "gcp-a3-high", "--gpus", "16", "-q", "-o", "g.json"]
    assert run(*question, capsys=capsys)[0] == 0
    plan = load_plan("g.json")
    ask = ["explain", "g.json", "--model", "tiny", "--why-not", "pipeline=2"]
    code, out, err = run(*ask, capsys=capsys)
    assert code == 0, err
    found = re.search(r"([+-][\d.]+) % against", out)
    assert found and float(found[1]) >= 0, f"nothing beats {plan.prediction.step_seconds}: {out}"


def test_csv_lists_what_json_does(capsys: pytest.CaptureFixture[str]) -> None:
    question = ["--model", "tiny", "--gpus", "4", "--fix", "pipeline=2"]
    made = plan_json(*question, "-o", "c.json", capsys=capsys)

    def rows(*arguments: str) -> list[dict[str, str]]:
        code, out, err = run(*arguments, "--csv", capsys=capsys)
        assert (code, err) == (0, "")
        return list(csv.DictReader(io.StringIO(out)))

    stages = rows("explain", "c.json")
    assert [int(row["memory_bytes"]) for row in stages] == [
        stage["memory_bytes"] for stage in made["stages"]
    ]
    (one,) = rows(*question)
    assert float(one["step_seconds"]) == made["prediction"]["step_seconds"]
    done = rows("timeline", "c.json")
    assert {row["rank"] for row in done} == {
        str(stage["pipeline_rank"]) for stage in made["stages"]
    }
    assert "mistral-7b" in {row["model"] for row in rows("models")}
    assert "h100-sxm" in {row["device"] for row in rows("devices")}


def test_diff(capsys: pytest.CaptureFixture[str]) -> None:
    question = ["--model", "tiny", "--gpus", "4", "-q"]
    run(*question, "-o", "a.json", capsys=capsys)
    run(*question, "-o", "b.json", capsys=capsys)
    run(*question, "-o", "c.json", "--fix", "tensor=2", capsys=capsys)
    assert run("diff", "a.json", "b.json", capsys=capsys)[0] == 0
    code, out, _ = run("diff", "a.json", "c.json", capsys=capsys)
    assert code == 1 and "layout.tensor: 1 -> 2" in out


def test_replacing_a_plan_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    question = ["--model", "tiny", "--gpus", "4", "-o", "a.json"]
    run(*question, "--fix", "tensor=2", capsys=capsys)
    _, out, _ = run(*question, capsys=capsys)
    assert "it replaces a plan with" in out and "tensor 2" in out


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert "mistral-7b" in run("models", capsys=capsys)[1]
    listed = run("devices", capsys=capsys)[1]
    assert "h100-sxm" in listed and "dgx-h100" in listed
    assert json.loads(run("schema", capsys=capsys)[1])["title"] == "Plan"
    assert "--gpus" in run("--print-completion", "bash", capsys=capsys)[1]


def options_of(*command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", capsys.readouterr().out))


def test_a_new_option_is_a_decision(capsys: pytest.CaptureFixture[str]) -> None:
    expected = (
        "--model --gpus --device --gpus-per-node --cluster --global-batch --seq-len --precision "
        "--optimizer --memory-limit --memory --scale --fix --trust-remote-code --allow --top "
        "--output --json --csv --quiet --verbose --version --print-completion --help --why-not"
    )
    assert options_of(capsys=capsys) == set(expected.split())


def command(*arguments: str, width: int = 80) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "paraplan.cli", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": str(width)},
        timeout=120,
        check=False,
    )


def test_a_planned_model_needs_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither help nor a plan with a cached trace imports what is slow to import."""
    run("--model", "tiny", "--gpus", "4", "-q", capsys=capsys)
    script = (
        "import sys; from paraplan.cli import main\n"
        "try: code = main(sys.argv[1:])\n"
        "except SystemExit: code = 0\n"
        "heavy = {'torch', 'transformers', 'networkx', 'pandas'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy or code else 0)"
    )
    for arguments in (["--help"], ["--model", "tiny", "--gpus", "4"], ["devices"]):
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr


def test_output_without_a_terminal_is_plain() -> None:
    done = command("--model", "tiny", "--gpus", "4")
    assert done.returncode == 0 and done.stderr == ""
    assert "\x1b" not in done.stdout


def test_errors_leave_no_traceback_in_a_real_process() -> None:
    done = command("--model", "nothing-like-it", "--gpus", "4")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and done.stdout == ""
