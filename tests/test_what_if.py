"""`plan what-if`: sweeps as a user types them, and the answers against exhaustive tables."""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from paraplan import sweep
from paraplan.cli import main
from paraplan.what_if_file import WhatIf, WhatIfPoint, load_what_if

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
SWEEP = ["what-if", "--model", "tiny", "--gpus", "1,2..8", "--device", "h100,a100"]


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


def swept(*arguments: str, capsys: pytest.CaptureFixture[str]) -> WhatIf:
    code, out, err = run(*SWEEP, "--workers", "1", *arguments, "--json", capsys=capsys)
    assert code in (0, 3), err
    return WhatIf.model_validate_json(out)


def test_every_point_equals_plan_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """The row's own command gives the row's own figures, whatever was varied."""
    result = swept(
        "--link-bandwidth", "x0.5,\u00d72", "--memory", "40,80", "--precision", "bf16,fp32",
        capsys=capsys,
    )  # fmt: skip
    assert len(result.points) == 4 * 2 * 2 * 2 * 2
    for point in result.points[::5]:
        command = shlex.split(point.command)
        assert command.pop(0) == "plan"
        code, out, _ = run(*command, "--json", capsys=capsys)
        assert code == 0
        plan = json.loads(out)
        seen = plan["prediction"]
        assert seen["step_seconds"] == point.step_seconds
        assert seen["tokens_per_second"] == point.tokens_per_second
        assert seen["mfu"] == point.mfu
        assert seen["peak_memory_bytes"] == point.peak_memory_bytes
        assert plan["layout"]["tensor"] == point.tensor
        assert plan["layout"]["micro_batches"] == point.micro_batches
        assert plan["workload"]["global_batch"] == point.global_batch
        assert plan["cluster"]["device"] == point.device


def test_output_file_and_csv_hold_the_same_points(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(*SWEEP, "--csv", "-o", "sweep.json", capsys=capsys)
    assert (code, err) == (0, "")
    saved = load_what_if("sweep.json")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["command"] for row in rows] == [point.command for point in saved.points]
    assert list(rows[0]) == list(WhatIfPoint.model_fields)
    assert [float(row["step_seconds"]) for row in rows] == [p.step_seconds for p in saved.points]
    assert saved.command.startswith("plan what-if --model tiny")


def test_workers_plan_the_same_and_a_second_run_plans_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = swept(capsys=capsys)
    monkeypatch.setenv("PARAPLAN_CACHE", str(tmp_path / "another"))
    code, out, err = run(*SWEEP, "--workers", "2", "--json", capsys=capsys)
    assert (code, err) == (0, "")
    parallel = WhatIf.model_validate_json(out)
    assert parallel.points == alone.points
    monkeypatch.setattr(sweep, "_plan", lambda task: pytest.fail("a point was planned again"))
    assert swept(capsys=capsys).points == alone.points
