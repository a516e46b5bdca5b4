"""Closes the loop over two machines that one makes up: profile them together, plan, train, compare.

    python benchmarks/profile_nodes.py --mbit 1000        # as root on Linux; about 8 minutes

Each machine is a network namespace with a core of its own; the wire between them lets so many
Mbit/s through in each direction (``tc tbf``). The same ``plan profile --nnodes 2`` runs on both;
then each layout trains with one process on each, in turns, as in ``profile_loop.py``. Printed:
what the profile says of the wire beside what was set, and each layout's step, predicted by this
profile and by the one that knows nothing of the wire.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import torch.distributed as dist
from profile_loop import MODELS, candidates, predicted_by, spearman, train

from paraplan.cluster import Link, load_cluster
from paraplan.plan_file import plan_to_json
from paraplan.report import layout_words

MACHINES, FIRST = ("paraplan0", "paraplan1"), "10.213.0.1"
BURST_BYTES, QUEUE = 2**18, "50ms"
"""What the wire lets through at once, and how long a message may wait for it."""


@contextmanager
def two_machines(mbit: int) -> Iterator[None]:
    """Two network namespaces joined by a wire."""
    _remove()
    for name in MACHINES:
        _run("ip", "netns", "add", name)
    try:
        ends = [f"pp{i}" for i in range(2)]
        peer = ["peer", "name", ends[1], "netns", MACHINES[1]]
        _run("ip", "link", "add", ends[0], "netns", MACHINES[0], "type", "veth", *peer)
        for i, (name, end) in enumerate(zip(MACHINES, ends, strict=True)):
            _run("ip", "-n", name, "link", "set", "lo", "up")
            _run("ip", "-n", name, "address", "add", f"10.213.0.{i + 1}/24", "dev", end)
            _run("ip", "-n", name, "link", "set", end, "up")
            wire = ["tbf", "rate", f"{mbit}mbit", "burst", str(BURST_BYTES), "latency", QUEUE]
            _run("tc", "-n", name, "qdisc", "add", "dev", end, "root", *wire)
        yield
    finally:
        _remove()


def _remove() -> None:
    for name in MACHINES:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def on_both(*command: str, seconds: float = 900.0) -> list[str]:
    """What the same command prints on each machine."""
    started = []
    for i, name in enumerate(MACHINES):
        where = ["ip", "netns", "exec", name, "taskset", "-c", str(i)]
        rank = {"RANK": str(i), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        meet = {"MASTER_ADDR": FIRST, "MASTER_PORT": "29433", "GLOO_SOCKET_IFNAME": f"pp{i}"}
        environment = os.environ | rank | meet | {"OMP_NUM_THREADS": "1"}
        started.append(
            subprocess.Popen(
                [*where, sys.executable, *command],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    try:
        said = [process.communicate(timeout=seconds)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    if any(process.returncode for process in started):
        raise SystemExit(f"{' '.join(command)} failed")
    return said


def profile(folder: Path, quick: bool) -> Path:
    """The profile of both machines."""
    output = folder / "both.json"
    command = ["-m", "paraplan.cli", "profile", "--device", "cpu", "--nnodes", "2", "--gpus", "2"]
    command += ["--endpoint", f"{FIRST}:29400", *(["--quick"] if quick else []), "-o", str(output)]
    print(on_both(*command)[0], flush=True)
    return output


def train_as_rank(folder: Path, name: str, turns: int) -> None:
    """One rank of the training; the first says how long steps took."""
    plans = json.loads((folder / "plans.json").read_text())
    seconds, _ = train(plans, MODELS[name], turns)
    if dist.get_rank() == 0:
        (folder / "seconds.json").write_text(json.dumps(seconds))


def compare(folder: Path, measured: Path, name: str, turns: int) -> None:
    """One model: every layout, predicted and measured."""
    (folder / "config.json").write_text(json.dumps(MODELS[name]))
    shipped = folder / "shipped.json"
    known = load_cluster(measured)
    usual = load_cluster("cpu-gloo").link_between
    content = known.model_dump(mode="json", exclude_none=True)
    content["link_between"] = usual.model_dump(mode="json", exclude_none=True)
    shipped.write_text(json.dumps(content))
    best, others = candidates(folder, measured, 2)
    blind, _ = candidates(folder, shipped, 2)
    runs = list({one.layout: one for one in (best, blind, *others)}.values())
    (folder / "plans.json").write_text(json.dumps([plan_to_json(one) for one in runs]))
    on_both(__file__, "--train", name, "--folder", str(folder), "--turns", str(turns))
    took = [median(steps) for steps in json.loads((folder / "seconds.json").read_text())]
    told = {path: [predicted_by(folder, path, one) for one in runs] for path in (measured, shipped)}
    print(f"\n{name}: a step measured; predicted with the wire measured; with the shipped network")
    for one, seconds, knows, does_not in sorted(
        zip(runs, took, *told.values(), strict=True), key=lambda row: row[1]
    ):
        print(
            f"{layout_words(one.layout)[:48]:48s} {seconds:6.3f} s {knows:7.3f} s "
            f"{knows / seconds - 1:+6.1%} {does_not:7.3f} s {does_not / seconds - 1:+6.1%}"
        )
    _say_plan("measured", best, runs, took, told[measured])
    _say_plan("shipped", blind, runs, took, told[shipped])


def _say_plan(
    what: str, best: Any, runs: Sequence[Any], took: Sequence[float], told: Sequence[float]
) -> None:
    place = [one.layout for one in runs].index(best.layout)
    print(
        f"{what}: planned {layout_words(best.layout)}, error {told[place] / took[place] - 1:+.1%}, "
        f"regret {took[place] / min(took) - 1:.1%}, rank correlation {spearman(told, took):.2f}"
    )


def say_wire(link: Link, mbit: int) -> None:
    """What the longest exchanges were measured to use of the wire."""
    print(f"the wire lets {mbit / 8:.0f} MB/s through in each direction; of it used")
    longest = max(one.message_bytes for one in link.measured)
    for one in link.measured:
        if one.message_bytes == longest:  # of two ranks: one half goes each way, or all of it
            passes = {"all_reduce": 2, "transfer": 2}.get(one.kind, 1)
            print(f"  {one.kind:15s} {passes * longest / 2 / one.seconds / 1e6:6.1f} MB/s")


def main() -> None:
    """Make the machines up, profile, train, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mbit", type=int, default=1000)
    parser.add_argument("--models", nargs="+", default=["llama", "gpt2"], choices=list(MODELS))
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train_as_rank(arguments.folder, arguments.train, arguments.turns)
        return
    with two_machines(arguments.mbit), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        measured = profile(folder, arguments.quick)
        say_wire(load_cluster(measured).link_between, arguments.mbit)
        for name in arguments.models:
            compare(folder, measured, name, arguments.turns)


if __name__ == "__main__":
    main()
