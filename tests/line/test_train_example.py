"""The file in examples/, started by plain ``python``, trains like one process under any plan."""

from __future__ import annotations

from pathlib import Path

import pytest
from line_launch import EXAMPLES, losses, make_plan, run_python, without_line

SCRIPT = str(EXAMPLES / "train_mistral.py")
LAYOUTS = (
    "data_shard=4",
    "tensor=2,data_shard=2",
    "pipeline=2,data_shard=2",
    "pipeline=4",
    "tensor=2,pipeline=2",
)
KINDS = ("mistral", "llama", "gpt2", "qwen2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("example")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, list[float]]:
    """Model -> the losses of the plain script in one process; filled as they are asked for."""
    return {}


def prepare(folder: Path, kind: str, alone: dict[str, list[float]]) -> list[float]:
    """Make the model and dataset once, and train in one process."""
    if kind not in alone:
        made = run_python(folder, str(EXAMPLES / "make_inputs.py"), "--kind", kind, "--model", kind)
        assert made.returncode == 0, made.stderr[-2000:]
        plain = without_line(folder, "train_mistral.py")
        alone[kind] = losses(run_python(folder, str(plain), "--model", kind))
    assert len(alone[kind]) == 8
    return alone[kind]


def check(folder: Path, kind: str, plan: Path | None, alone: dict[str, list[float]]) -> str:
    wanted = prepare(folder, kind, alone)
    chosen = {"PARAPLAN_PLAN": str(plan)} if plan else {}
    done = run_python(folder, SCRIPT, "--model", kind, PARAPLAN_DEVICES="cpu:4", **chosen)
    assert losses(done) == pytest.approx(wanted, rel=1e-5)
    return done.stderr


def test_planned_by_itself(folder: Path, alone: dict[str, list[float]]) -> None:
    words = check(folder, "mistral", None, alone)
    assert words.count("on 4 x cpu") == 1, "one line says what was chosen"


def test_tensor_and_pipeline(folder: Path, alone: dict[str, list[float]]) -> None:
    prepare(folder, "mistral", alone)
    plan = make_plan(folder, "mistral", "tensor=2,pipeline=2")
    words = check(folder, "mistral", plan, alone)
    assert "tensor 2" in words and "pipeline 2" in words


@pytest.mark.matrix
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_layout(folder: Path, alone: dict[str, list[float]], kind: str, layout: str) -> None:
    prepare(folder, kind, alone)
    check(folder, kind, make_plan(folder, kind, layout), alone)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", KINDS[1:])
def test_every_model_planned_by_itself(
    folder: Path, alone: dict[str, list[float]], kind: str
) -> None:
    check(folder, kind, None, alone)
