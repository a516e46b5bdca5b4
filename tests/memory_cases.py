"""Layouts of real models whose predicted memory is held against torch's own count.

``PYTHONPATH=tests python -m memory_cases`` runs all of them at full size, about half an hour of
one core, and prints the table of docs/runtime.md; ``python -m memory_cases 8`` runs them with 8
layers of each model.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from paraplan import estimate
from paraplan.check import COMPARED, CheckedStage, check_plan
from paraplan.plan_file import Plan


@dataclass(frozen=True)
class Case:
    """A layout of a model.

    Attributes:
        fix: as for ``--fix``; what is left out, such as cuts, the planner chooses.
        micro_batches: of a step, one sequence each.
        ranks: pipeline ranks to run: first, last and what differs between them.
    """

    model: str
    gpus: int
    fix: str
    micro_batches: int
    ranks: tuple[int, ...] = (0,)

    def __str__(self) -> str:
        return f"{self.model} on {self.gpus}: {self.fix}"


CASES = (
    Case("mistral-7b", 16, "data_shard=16,zero_stage=3,recompute=none", 4),
    Case("mistral-7b", 16, "data_shard=16,zero_stage=2,recompute=full", 1),
    Case("mistral-7b", 64, "data_replicate=4,data_shard=16,zero_stage=1,recompute=selective", 4),
    Case(
        "mistral-7b",
        16,
        "data_shard=4,tensor=4,sequence_parallel=true,zero_stage=3,recompute=selective",
        4,
    ),
    Case("mistral-7b", 48, "data_shard=16,pipeline=3,zero_stage=2,recompute=none", 8, (0, 1, 2)),
    Case(
        "mistral-7b",
        512,
        "data_shard=128,pipeline=4,virtual_stages=2,zero_stage=1,recompute=none",
        8,
        (0, 1, 3),
    ),
    Case("llama-3-70b", 64, "data_shard=64,zero_stage=3,recompute=full", 2),
    Case("llama-3-70b", 512, "data_replicate=8,data_shard=64,zero_stage=3,recompute=selective", 1),
    Case(
        "llama-3-70b",
        64,
        "data_shard=8,tensor=8,sequence_parallel=true,zero_stage=3,recompute=none",
        4,
    ),
    Case("llama-3-70b", 24, "tensor=8,pipeline=3,recompute=selective", 8, (0, 1, 2)),
    Case(
        "llama-3-70b",
        512,
        "data_shard=16,tensor=8,sequence_parallel=true,pipeline=4,virtual_stages=2,"
        "zero_stage=1,recompute=selective",
        8,
        (0, 3),
    ),
    Case(
        "llama-3-70b",
        512,
        "data_shard=32,tensor=8,pipeline=2,zero_stage=2,recompute=full",
        8,
        (0, 1),
    ),
    Case("mixtral-8x7b", 16, "data_shard=16,zero_stage=3,recompute=selective", 2),
    Case("mixtral-8x7b", 64, "data_replicate=8,data_shard=8,zero_stage=3,recompute=full", 1),
    Case(
        "mixtral-8x7b",
        64,
        "data_shard=8,tensor=8,sequence_parallel=true,zero_stage=3,recompute=selective",
        4,
    ),
    Case("mixtral-8x7b", 24, "data_shard=8,pipeline=3,zero_stage=2,recompute=none", 8, (0, 1, 2)),
    Case(
        "mixtral-8x7b",
        64,
        "data_shard=8,pipeline=4,virtual_stages=2,tensor=2,zero_stage=1,recompute=selective",
        8,
        (0, 3),
    ),
    Case(
        "mixtral-8x7b",
        512,
        "data_shard=32,tensor=8,pipeline=2,zero_stage=3,recompute=none",
        8,
        (0, 1),
    ),
)


def shallow(
    model: str, layers: int, folder: Path, depths: tuple[str, ...] = ("num_hidden_layers",)
) -> str:
    """A model by name with fewer layers, as a folder with its configuration."""
    preset = resources.files("paraplan").joinpath("presets", f"{model}.json")
    config = json.loads(preset.read_text()) | dict.fromkeys(depths, layers)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def planned(case: Case, model: str) -> Plan:
    """The plan of a case; ``model`` is the case's, or a shallow one of it."""
    degrees = dict(item.split("=") for item in case.fix.split(","))
    rows = int(degrees.get("data_shard", 1)) * int(degrees.get("data_replicate", 1))
    return estimate(
        model, gpus=case.gpus, fix=case.fix, global_batch=rows * case.micro_batches, seq_len=4096
    )


def checked(case: Case, layers: int | None) -> list[CheckedStage]:
    """A case in the dry run, at full depth or with some ``layers``."""
    with tempfile.TemporaryDirectory() as folder:
        model = case.model if layers is None else shallow(case.model, layers, Path(folder))
        return list(check_plan(planned(case, model), model=model, ranks=case.ranks))


def worst_part(stage: CheckedStage) -> tuple[str, float]:
    """The part that plan and dry run disagree about most, as a share of the whole peak."""
    shares = {
        part: (getattr(stage.predicted, part) - stage.counted.get(part, 0)) / stage.counted_bytes
        for part in COMPARED
    }
    part = max(shares, key=lambda name: abs(shares[name]))
    return part, shares[part]


def row(case: Case, stage: CheckedStage) -> str:
    """A row of the table."""
    part, share = worst_part(stage)
    return (
        f"| {case.model} | {case.gpus} | {case.fix.replace(',', ', ')} | {stage.pipeline_rank} "
        f"| {stage.predicted_bytes / 2**30:.2f} | {stage.counted_bytes / 2**30:.2f} "
        f"| {100 * stage.difference:+.1f} % | {part.replace('_', ' ')} {100 * share:+.1f} % |"
    )


def main(arguments: Sequence[str]) -> None:
    """Print the table, row by row."""
    layers = int(arguments[0]) if arguments else None
    print("| model | devices | layout | stage | plan, GiB | dry run | difference | largest part |")
    print("|---|---|---|---|---|---|---|---|")
    for case in CASES:
        for stage in checked(case, layers):
            print(row(case, stage), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
