"""`plan calibrate` on made-up runs: what is wrong in the profile is found and put right."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from made_rows import BASE

from paraplan.calibrate import calibrate
from paraplan.calibrate_fit import Parameter, fit, with_factors
from paraplan.cli import main
from paraplan.cluster import Cluster, load_cluster
from paraplan.validate_machines import Machines
from paraplan.validate_predict import predict
from paraplan.validate_rows import Row

# On one data-parallel node whose network nobody states.
RUN = BASE | {
    "model": "a",
    "network": "",
    "tp": "1",
    "pp": "1",
    "zero_or_fsdp": "fsdp-full_shard",
    "micro_batch": "4",
    "global_batch": "64",
}
WRONG = Parameter("products", rates=("node_groups.*.device.gemm.sustained.bfloat16",))


def runs(path: Path, rows: list[dict[str, str]], machine: Cluster) -> Path:
    """A file of runs that took exactly what the model predicts for ``machine``."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(RUN))
        writer.writeheader()
        for index, cells in enumerate(rows):
            one = RUN | {"id": f"made-{index}"} | cells
            seconds = predict(Row("made", one), Machines(only=machine)).predicted_s
            writer.writerow(one | {"measured_iter_time_s": repr(seconds)})
    return path


def slower(base: Cluster, log: float) -> Cluster:
    """The cluster with other products."""
    return Cluster.model_validate(with_factors(base.model_dump(mode="json"), [WRONG], [log]))


MODELS = [
    {"model": name, "layers": layers, "hidden": hidden, "ffn": str(4 * int(hidden)), "tp": tp}
    for name, layers, hidden in (("a", "16", "2048"), ("b", "24", "4096"), ("c", "32", "1024"))
    for tp in ("1", "2", "8")
]


def test_the_wrong_figure_is_found(tmp_path: Path) -> None:
    base = load_cluster("dgx-h100")
    path = runs(tmp_path / "made.csv", MODELS, slower(base, -0.2))
    made = calibrate(base, [path])
    assert made.rows == len(MODELS)
    assert made.before > 0.08
    assert made.after < 0.2 * made.before
    assert made.left_out is not None
    assert made.left_out < 0.5 * made.before
    found = dict(zip((p.name for p in made.parameters), made.found.logs, strict=True))
    assert found["matrix products, 16 bit"] == pytest.approx(-0.2, abs=0.06)
    figure = made.cluster.device.gemm.sustained["bfloat16"]
    assert figure.basis == "measured"
    assert "made.csv" in figure.source


def test_one_run_gives_one_factor(tmp_path: Path) -> None:
    base = load_cluster("dgx-h100")
    path = runs(tmp_path / "one.csv", MODELS[:1], slower(base, -0.3))
    made = calibrate(base, [path])
    assert [parameter.name for parameter in made.parameters] == ["everything"]
    assert made.after < 0.1 * made.before
    assert made.left_out is None


def test_outliers_do_not_decide() -> None:
    # Ten rows want a factor of e^0.1, two of e^2.
    wanted = [0.1] * 10 + [2.0] * 2
    found = fit(lambda logs: [logs[0] - one for one in wanted], [1.0] * 12, [1.0])
    assert found.logs[0] == pytest.approx(0.1, abs=0.03)


def test_what_no_row_tells_stays_and_is_called_unknown() -> None:
    found = fit(lambda logs: [logs[0] - 0.2] * 6, [1.0] * 6, [1.0, 0.3])
    assert found.logs[1] == pytest.approx(0, abs=1e-9)
    assert found.spreads[1] == pytest.approx(0.3, rel=1e-6)
    assert found.spreads[0] < 0.1


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = runs(tmp_path / "one.csv", MODELS[:1], load_cluster("dgx-h100"))
    target = tmp_path / "ours.json"
    assert main(["calibrate", str(path), "--device", "h100", "-o", str(target)]) == 0
    assert "plan with --cluster" in capsys.readouterr().out
    assert load_cluster(str(target)).name == "dgx-h100-calibrated"
    assert main(["calibrate", str(path), "--cluster", "dgx-h100", "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert set(written) == {
        *("profile", "rows", "unused", "parameters", "error_before", "error_after"),
        *("error_model_left_out", "memory_rows"),
    }
    assert main(["calibrate", str(path), "--cluster", "dgx-h100", "--csv"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head == "name,factor,spread,determined" and len(rows) == len(written["parameters"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which machine did they run on?"),
        (["--device", "h100", "--cluster", "dgx-h100"], "which machine did they run on?"),
        (["--device", "h100", "-o", "ours.toml"], "a name that ends in .json is wanted"),
        (["--device", "a100"], "no row of the files can be used: 1 x its GPU is h100-sxm"),
    ],
)
def test_mistakes_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    path = runs(tmp_path / "one.csv", MODELS[:1], load_cluster("dgx-h100"))
    assert main(["calibrate", str(path), *arguments]) == 2
    assert message in capsys.readouterr().err
