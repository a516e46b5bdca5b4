"""`plan profile` on this machine as it is, and the loop closed on it; minutes, so marked.

    pytest -m matrix tests/test_profile_machine.py

What is asserted holds on a busy machine too: `benchmarks/profile_loop.py` on a quiet one shows how
good the predictions are.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.matrix

LIMIT_SECONDS = 500.0
COMMAND = [sys.executable, "-m", "paraplan.cli", "profile", "--device", "cpu", "--gpus", "2"]
TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "num_key_value_heads": 3,
    "vocab_size": 320,
    "max_position_embeddings": 128,
}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return os.environ | {"PARAPLAN_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}


def test_an_interrupted_profile_keeps_what_it_measured(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    output, partial = tmp_path / "mine.json", tmp_path / "mine.json.partial"
    command = [*COMMAND, "--quick", "-o", str(output)]
    measuring = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + LIMIT_SECONDS
    while measuring.poll() is None and not partial.exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    measuring.send_signal(signal.SIGINT)
    _, err = measuring.communicate(timeout=LIMIT_SECONDS)
    assert measuring.returncode == 130 and "Traceback" not in err
    assert not output.exists()
    known = json.loads(partial.read_text())["known"]
    assert known
    key, (_, *rest) = next((key, timings[0]) for key, timings in known.items())
    assert key.startswith("GemmTask")
    known[key] = 2 * [(12345.0, *rest)]  # both rounds; measured again it would be another figure
    content = json.loads(partial.read_text()) | {"known": known}
    partial.write_text(json.dumps(content))
    done = subprocess.run(
        [*command, "--json"], env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS
    )
    assert done.returncode == 0, done.stderr
    device = json.loads(done.stdout)["profile"]["node_groups"][0]["device"]
    assert 12345.0 in [op["seconds"] for op in device["ops"]], f"{key} was measured again"
    assert output.is_file() and not partial.exists()


def test_two_machines_make_one_profile(tmp_path: Path, environment: dict[str, str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    met = ["--nnodes", "2", "--endpoint", endpoint, "--quick"]
    outputs = [tmp_path / f"{name}.json" for name in "ab"]
    started = [
        subprocess.Popen(
            [*COMMAND, *met, "-o", str(output)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for output in outputs
    ]
    try:
        said = [one.communicate(timeout=LIMIT_SECONDS)[0] for one in started]
    finally:
        for one in started:
            one.kill()
            one.wait()
    assert [one.returncode for one in started] == [0, 0], said
    (written,) = (output for output in outputs if output.exists())
    other = said[1 - outputs.index(written)]
    assert "measured as machine 1; the first one has the profile" in other
    cluster = json.loads(written.read_text())
    (group,) = cluster["node_groups"]
    assert (group["count"], group["devices_per_node"]) == (2, 1)
    assert cluster["link_between"]["efficiency"]["basis"] == "measured"
    assert {one["per_node"] for one in cluster["link_between"]["measured"]} == {1}


def test_a_named_models_own_products_are_measured(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    model = tmp_path / "tiny"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(TINY))
    output = tmp_path / "mine.json"
    named = ["--quick", "--model", str(model), "--seq-len", "64", "-o", str(output), "--json"]
    done = subprocess.run(
        [*COMMAND, *named], env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS
    )
    assert done.returncode == 0, done.stderr
    asked = ["plan", "--model", str(model), "--cluster", str(output), "--seq-len", "64"]
    planned = subprocess.run(
        [
            sys.executable,
            "-m",
            "paraplan.cli",
            *asked[1:],
            "--global-batch",
            "4",
            "--precision",
            "fp32",
            "--json",
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert planned.returncode == 0, planned.stderr
    plan = json.loads(planned.stdout)
    # All that a plan of this model computes was measured as it is, but for what a layout with
    # another number of sequences than 1, 2 and 4 would ask.
    assert plan["prediction"]["basis"]["measured"] > 0.9


def test_plans_of_this_machine_come_near_what_it_does(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "profile_loop.py"
    output = tmp_path / "loop.json"
    chosen = [
        "--ranks",
        "2",
        "--models",
        "llama",
        "--quick-only",
        "--turns",
        "2",
        "-o",
        str(output),
    ]
    done = subprocess.run(
        [sys.executable, str(script), *chosen, "--output", str(output)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=2 * LIMIT_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = json.loads(output.read_text())["models"]
    timed = [row for row in result["layouts"] if row["predicted_seconds"] is not None]
    assert len(timed) >= 7
    for row in timed:  # other work on the machine slows both by up to its share of the cores
        assert 1 / 3 < row["predicted_seconds"] / row["measured_seconds"] < 3, row
    assert result["plans"]["quick"]["regret"] < 0.5
