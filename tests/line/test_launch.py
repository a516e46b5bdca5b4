"""Starting, failing and stopping: what the script sees, what the user reads, what is left."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from line_launch import environment, run_python, wait_until_gone

SCRIPT = str(Path(__file__).with_name("launch_script.py"))
TWO = {"PARAPLAN_DEVICES": "cpu:2"}
LEFT_SECONDS = 10.0


def test_one_script_on_two_devices(tmp_path: Path) -> None:
    """Arguments, folder and exit code are the script's; one rank is heard; -m works alike."""
    (tmp_path / "a module.py").write_text(Path(SCRIPT).read_text())
    (tmp_path / "inside.py").write_text(Path(SCRIPT).read_text())
    for start in ([str(tmp_path / "a module.py")], ["-m", "inside"]):
        done = run_python(tmp_path, *start, "exit", "--x", "a b", **TWO)
        assert done.returncode == 7, done.stderr
        first, draws, *rest = done.stdout.splitlines()
        assert first == f"exit ['--x', 'a b'] {tmp_path} ranks=2 hidden=True"
        assert draws.startswith("draws 2.0 ") and not rest
        (log,) = tmp_path.glob("logs/*/attempt_0/1/stdout.log")
        assert log.read_text() == done.stdout, "rank 1 draws the same numbers"
        shutil.rmtree(tmp_path / "logs")


@pytest.mark.parametrize("how", ["raise", "raise-on-1"])
def test_an_error_is_shown_once(tmp_path: Path, how: str) -> None:
    done = run_python(tmp_path, SCRIPT, how, str(tmp_path), **TWO)
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1, done.stderr
    assert done.stderr.count("ValueError: wrong on purpose") == 1
    assert done.stderr.index("launch_script.py") < done.stderr.index("ValueError")
    assert not wait_until_gone(str(tmp_path), LEFT_SECONDS)


def test_a_killed_rank_is_named(tmp_path: Path) -> None:
    done = run_python(tmp_path, SCRIPT, "kill", str(tmp_path), limit_seconds=120.0, **TWO)
    assert done.returncode == 128 + signal.SIGKILL
    assert "rank 1 was killed by SIGKILL" in done.stderr
    assert not wait_until_gone(str(tmp_path), LEFT_SECONDS)


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_launcher_leaves_nothing(tmp_path: Path, stop: signal.Signals) -> None:
    with (tmp_path / "errors").open("w") as errors:
        started = subprocess.Popen(
            [sys.executable, SCRIPT, "wait", str(tmp_path)],
            env=environment(tmp_path) | TWO,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
    assert started.stdout is not None
    try:
        assert started.stdout.readline().startswith("wait"), "rank 0 runs"
        if stop == signal.SIGINT:
            os.killpg(started.pid, stop)  # a terminal sends Ctrl-C to all processes
        else:
            started.send_signal(stop)
        assert started.wait(60) == 128 + stop
        assert not wait_until_gone(str(tmp_path), LEFT_SECONDS)
        # Python itself shows where Ctrl-C met the script; once, not for each rank.
        shown = (tmp_path / "errors").read_text().count("Traceback")
        assert shown == (1 if stop == signal.SIGINT else 0)
    finally:
        started.kill()
        started.stdout.close()


def test_what_cannot_start_again_goes_on_alone(tmp_path: Path) -> None:
    script = "import torch; torch.moreh.option.enable_advanced_parallelization(); print('after')"
    done = subprocess.run(
        [sys.executable, "-"],
        input=script,
        env=environment(tmp_path) | TWO,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout == "after\n"
    assert done.stderr.count("there is no script file to start again") == 1


def test_disabled_it_is_the_plain_script(tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text(
        "import torch\n"
        "torch.moreh.option.enable_advanced_parallelization()\n"
        "import sys; print('paraplan.launch' in sys.modules, torch.distributed.is_initialized())\n"
    )
    done = run_python(tmp_path, "plain.py", PARAPLAN_DISABLE="1", **TWO)
    assert done.stdout.split()[-1] == "False" and done.returncode == 0, done.stderr
    assert os.listdir(tmp_path) == ["plain.py"]
