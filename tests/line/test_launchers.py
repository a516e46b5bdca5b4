"""The same script under torchrun, under `plan run`, and as two machines that meet on loopback."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from line_launch import EXAMPLES, LIMIT_SECONDS, environment, losses, run_python, without_line

from paraplan.surroundings import FIRST_SLURM_PORT

SCRIPT = str(Path(__file__).with_name("launch_script.py"))
TORCHRUN = ("-m", "torch.distributed.run")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run_together(folder: Path, starts: Sequence[tuple[Sequence[str], dict[str, str]]]) -> list[str]:
    """What commands that run at the same time print, each with variables of its own."""
    started = [
        subprocess.Popen(
            [sys.executable, *arguments],
            cwd=folder,
            env=environment(folder) | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for arguments, variables in starts
    ]
    try:
        said = [process.communicate(timeout=LIMIT_SECONDS)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    codes = [process.returncode for process in started]
    assert codes == [0] * len(codes), "\n".join(text[-2000:] for text in said)
    return said


def two_machines(folder: Path, *script: str) -> list[str]:
    """What each of two agents printed; each starts half of the ranks."""
    endpoint = f"127.0.0.1:{free_port()}"
    command = [*TORCHRUN, "--nnodes=2", f"--rdzv-endpoint={endpoint}", "--rdzv-backend=c10d"]
    command += ["--rdzv-id=two", "--nproc-per-node=2", *script]
    settings = {"PARAPLAN_DEVICES": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    return run_together(folder, [(command, settings)] * 2)


def test_it_joins_what_torchrun_started(tmp_path: Path) -> None:
    start = [*TORCHRUN, "--standalone", "--nproc-per-node=2", SCRIPT, "end"]
    done = run_python(tmp_path, *start, PARAPLAN_DEVICES="cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("end [] ") == 1, "one rank is heard"
    assert "ranks=2 hidden=True" in done.stdout


def test_plan_run_needs_no_line(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("NUMBER = 41\n")
    (tmp_path / "train.py").write_text(
        "import sys, beside, torch.distributed as dist\n"
        "print(beside.NUMBER + 1, sys.argv[1:], dist.get_world_size(), flush=True)\n"
        "raise KeyError('wrong on purpose')\n"
    )
    start = ["-m", "paraplan.cli", "run", "--devices", "cpu:2", str(tmp_path / "train.py")]
    done = run_python(tmp_path.parent, *start, "--global_batch", "3")
    assert done.stdout == "42 ['--global_batch', '3'] 2\n", done.stderr
    assert done.returncode == 1
    trace = done.stderr[done.stderr.index("Traceback") :].splitlines()
    assert "train.py" in trace[1] and trace[-1] == "KeyError: 'wrong on purpose'"


@pytest.mark.matrix
@pytest.mark.parametrize("start", ["torchrun", "two machines"])
def test_the_example_elsewhere(tmp_path: Path, start: str) -> None:
    made = run_python(tmp_path, str(EXAMPLES / "make_inputs.py"))
    assert made.returncode == 0, made.stderr[-2000:]
    wanted = losses(run_python(tmp_path, str(without_line(tmp_path, "train_mistral.py"))))
    script = str(EXAMPLES / "train_mistral.py")
    if start == "torchrun":
        alone = [*TORCHRUN, "--standalone", "--nproc-per-node=4", script]
        done = run_python(tmp_path, *alone, PARAPLAN_DEVICES="cpu")
    else:
        said = two_machines(tmp_path, script)
        heard = max(said, key=lambda text: text.count("loss"))
        assert min(text.count("loss") for text in said) == 0, "rank 0's machine alone speaks"
        done = subprocess.CompletedProcess([], 0, heard, "")
    assert losses(done) == pytest.approx(wanted, rel=1e-5)


def slurm(rank: int) -> dict[str, str]:
    """What `srun --nodes 1 --ntasks 2` sets for a task."""
    job = str(free_port() - FIRST_SLURM_PORT) if rank == 0 else ""
    step = {"PROCID": str(rank), "LOCALID": str(rank), "STEP_NUM_TASKS": "2"}
    step |= {"STEP_TASKS_PER_NODE": "2", "STEP_NODELIST": "localhost", "JOB_ID": job}
    return {f"SLURM_{name}": value for name, value in step.items()}


def mpirun(rank: int) -> dict[str, str]:
    """What Open MPI sets for two processes of one node; it names no port."""
    world = {"RANK": str(rank), "SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_SIZE": "2"}
    port = {"MASTER_PORT": str(free_port())} if rank == 0 else {}
    return {f"OMPI_COMM_WORLD_{name}": value for name, value in world.items()} | port


@pytest.mark.parametrize("variables", [slurm, mpirun])
def test_it_joins_what_others_started(
    tmp_path: Path, variables: Callable[[int], dict[str, str]]
) -> None:
    first = variables(0)
    shared = {key: first[key] for key in ("SLURM_JOB_ID", "MASTER_PORT") if key in first}
    shared["PARAPLAN_DEVICES"] = "cpu"
    said = run_together(
        tmp_path, [([SCRIPT, "end"], variables(rank) | shared) for rank in range(2)]
    )
    assert "ranks=2" in said[0] and said[1] == "", "one rank is heard"


def test_a_batch_script_is_no_rank() -> None:
    """SLURM sets SLURM_PROCID in a batch script too, where no step of several tasks runs."""
    from paraplan.surroundings import Place, find_place, first_host, standard_variables

    assert find_place({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) is None
    step = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}
    step["SLURM_STEP_TASKS_PER_NODE"] = "4(x2)"
    assert find_place(step) == Place(5, 8, 1, 4)
    step |= {"SLURM_STEP_NODELIST": "gpu[03-04,9],cpu1", "SLURM_JOB_ID": "77"}
    variables = standard_variables(Place(5, 8, 1, 4), step)
    assert variables["LOCAL_WORLD_SIZE"] == "4"
    assert variables["MASTER_ADDR"] == "gpu03" and variables["MASTER_PORT"] == "15077"
    assert first_host("a,b[1-2]") == "a" and first_host("node[1]") == "node1"
