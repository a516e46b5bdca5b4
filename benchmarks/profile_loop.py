"""Closes the loop on this machine: profile it, plan, train, compare what was predicted.

    python benchmarks/profile_loop.py --ranks 2 -o loop.json        # about 10 minutes
    python benchmarks/profile_loop.py --ranks 4 --models llama --quick-only

For each number of CPU processes the machine is profiled, in full and with ``--quick``; each model
is planned with both profiles; the planned layouts and at least six others then train through the
runtime. All layouts of a model live in the same processes and take turns, so that what else the
machine does falls on all of them; the first step of a turn is not counted, for it finds the caches
as another layout has left them, which does not happen in training. Printed: the error of the
planned layout's predicted step time, the rank correlation of all layouts, and the regret, which is
how much slower the planned layout is than the fastest that was measured. Between the turns the
whole layers of the profile's own test run again, where each process has a core: how much longer
they take than while it was measured is what the machine has changed since, and the error is told
with and without it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.distributed as dist

from paraplan import estimate, plan
from paraplan.cpu_ranks import available_cores
from paraplan.errors import PlanError
from paraplan.measure_clock import Clock
from paraplan.measure_ops import Bench, RandomPool, whole_layer
from paraplan.plan_file import Plan, plan_from_json, plan_to_json
from paraplan.profile_tasks import LayerTask
from paraplan.profiling import Profile, profile_machine
from paraplan.report import layout_words

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "runtime"))
from rank_launch import run_ranks

TURN_STEPS = 3
"""Of one layout, one after the other; the first is not counted."""

LENGTH = 128
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "vocab_size": 2048,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": 320,
    "n_head": 8,
    "n_layer": 4,
    "n_positions": 256,
    "vocab_size": 2048,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
WIDE = LLAMA | {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
}
MODELS: dict[str, dict[str, Any]] = {"llama": LLAMA, "gpt2": GPT2, "wide": WIDE}
OTHERS: dict[int, list[dict[str, Any]]] = {
    2: [
        {"data_replicate": 2, "micro_batch_size": 4},
        {"data_shard": 2, "zero_stage": 1, "micro_batch_size": 2},
        {"data_shard": 2, "zero_stage": 2, "micro_batch_size": 2},
        {"data_shard": 2, "zero_stage": 3, "micro_batch_size": 4},
        {"data_replicate": 2, "micro_batch_size": 1, "recompute": "full"},
        {"tensor": 2, "micro_batch_size": 4},
        {"pipeline": 2, "micro_batch_size": 1},
        {"pipeline": 2, "micro_batch_size": 2},
    ],
    3: [
        {"data_replicate": 3, "micro_batch_size": 4},
        {"data_replicate": 3, "micro_batch_size": 1, "recompute": "full"},
        {"data_shard": 3, "zero_stage": 1, "micro_batch_size": 2},
        {"data_shard": 3, "zero_stage": 2, "micro_batch_size": 4},
        {"data_shard": 3, "zero_stage": 3, "micro_batch_size": 4},
        {"pipeline": 3, "micro_batch_size": 1},
        {"pipeline": 3, "micro_batch_size": 2},
        {"pipeline": 3, "micro_batch_size": 4},
    ],
    4: [
        {"data_replicate": 4, "micro_batch_size": 2},
        {"data_shard": 4, "zero_stage": 1, "micro_batch_size": 1},
        {"data_shard": 4, "zero_stage": 3, "micro_batch_size": 2},
        {"data_replicate": 2, "tensor": 2, "micro_batch_size": 4},
        {"tensor": 4, "micro_batch_size": 8},
        {"data_replicate": 2, "pipeline": 2, "micro_batch_size": 1},
        {"pipeline": 4, "micro_batch_size": 1},
    ],
}


def rows(ranks: int) -> int:
    """Sequences of a step: a number that the data ranks can share."""
    return 12 if ranks == 3 else 8


def train(
    plans: Sequence[str], config: dict[str, Any], turns: int, layers: Sequence[LayerTask] = ()
) -> tuple[list[list[float]], list[list[float]]]:
    """Seconds of every timed step of each plan, in turns after one that warms up; on each rank.

    And those of each layer, which runs once a turn, on all ranks at once.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from paraplan_runtime import parallelize

    settings = AutoConfig.for_model(**config)
    settings.use_cache = False
    trained = []
    for text in plans:
        torch.manual_seed(0)
        whole: Any = AutoModelForCausalLM.from_config(settings)
        model = parallelize(whole.train(), plan_from_json(text), device_type="cpu")
        trained.append((model, torch.optim.AdamW(model.parameters(), lr=1e-4)))
    alone = Bench(Clock(torch.device("cpu"), 0.0, 1), RandomPool(torch.device("cpu")))
    calls = [whole_layer(task, alone) for task in layers]
    seconds: list[list[float]] = [[] for _ in plans]
    of_layers: list[list[float]] = [[] for _ in layers]
    draw = torch.Generator().manual_seed(1)
    for turn in range(turns + 1):
        shape = (rows(dist.get_world_size()), LENGTH)
        ids = torch.randint(settings.vocab_size, shape, generator=draw)
        for index, (model, optimizer) in enumerate(trained):
            for step in range(TURN_STEPS):
                dist.barrier()
                began = time.perf_counter()
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                dist.barrier()
                if turn and step:
                    seconds[index].append(time.perf_counter() - began)
        for index, call in enumerate(calls):
            call[0]()
            dist.barrier()
            began = time.perf_counter()
            for one in call:
                one()
            if turn:
                of_layers[index].append((time.perf_counter() - began) / len(call))
    return seconds, of_layers


def question(cluster: Path, ranks: int) -> dict[str, Any]:
    """What is planned."""
    return {
        "cluster": str(cluster),
        "gpus": ranks,
        "seq_len": LENGTH,
        "global_batch": rows(ranks),
        "precision": "fp32",
    }


def predicted_by(folder: Path, cluster: Path, one: Plan) -> float:
    """Seconds of a plan's layout by this profile."""
    names = one.layout.model_dump(exclude_defaults=True, exclude={"micro_batches", "schedule"})
    known = question(cluster, one.layout.devices)
    return estimate(str(folder), fix=names, **known).prediction.step_seconds


def candidates(folder: Path, cluster: Path, ranks: int) -> tuple[Plan, list[Plan]]:
    """The planned layout, and others that are possible for this model."""
    known = question(cluster, ranks)
    best = plan(str(folder), **known)
    others = []
    for fix in OTHERS[ranks]:
        try:
            other = estimate(str(folder), fix=fix, **known)
        except PlanError as error:
            print(f"left out {fix}: {error}", file=sys.stderr)
            continue
        others.append(other)
    return best, others


def compare(
    name: str,
    ranks: int,
    profiles: dict[str, Path],
    folder: Path,
    turns: int,
    layers: dict[str, dict[LayerTask, float]],
) -> dict[str, Any]:
    """One model on so many processes: every layout, predicted and measured.

    Args:
        layers: of each profile, and the seconds that they took while it was made.
    """
    (folder / "config.json").write_text(json.dumps(MODELS[name]))
    found = {kind: candidates(folder, path, ranks) for kind, path in profiles.items()}
    first = next(iter(found))
    plans = {kind: best for kind, (best, _) in found.items()}
    runs = {one.layout: one for _, (best, others) in found.items() for one in (best, *others)}
    texts = [plan_to_json(one) for one in runs.values()]
    tests = list(dict.fromkeys(task for made in layers.values() for task in made))
    took, again = run_ranks(ranks, train, texts, MODELS[name], turns, tests, limit_seconds=480)[0]
    now = {task: median(seconds) for task, seconds in zip(tests, again, strict=True)}
    slower = {
        kind: median(now[task] / then for task, then in made.items()) if made else None
        for kind, made in layers.items()
    }
    measured = {layout: median(seconds) for layout, seconds in zip(runs, took, strict=True)}
    spreads = {layout: (max(s) - min(s)) / median(s) for layout, s in zip(runs, took, strict=True)}
    predicted = {one.layout: one.prediction.step_seconds for one in found[first][1]}
    for best in plans.values():
        predicted.setdefault(best.layout, predicted_by(folder, profiles[first], best))
    fastest = min(measured.values())
    return {
        "model": name,
        "ranks": ranks,
        "layouts": [
            {
                "layout": layout_words(layout),
                "predicted_seconds": predicted[layout],
                "measured_seconds": measured[layout],
                "spread": spreads[layout],
            }
            for layout in runs
        ],
        "rank_correlation": spearman(
            list(predicted.values()), [measured[layout] for layout in predicted]
        ),
        "plans": {
            kind: {
                "layout": layout_words(best.layout),
                "predicted_seconds": best.prediction.step_seconds,
                "measured_seconds": measured[best.layout],
                "error": best.prediction.step_seconds / measured[best.layout] - 1,
                "machine": slower[kind],
                "regret": measured[best.layout] / fastest - 1,
            }
            for kind, best in plans.items()
        },
    }


def spearman(some: Sequence[float], others: Sequence[float]) -> float:
    """Rank correlation; equal values do not occur in measured seconds."""

    def ranks(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64).argsort().argsort().double()

    return float(torch.corrcoef(torch.stack([ranks(some), ranks(others)]))[0, 1])


def profile_into(folder: Path, ranks: int, kinds: Sequence[str]) -> dict[str, tuple[Path, Profile]]:
    """Profile this machine; the files by kind of profile."""
    made = {}
    for kind in kinds:
        found = profile_machine("cpu", ranks, quick=kind == "quick")
        path = folder / f"{kind}-{ranks}.json"
        path.write_text(found.cluster.model_dump_json(exclude_none=True))
        made[kind] = (path, found)
    return made


def show(result: dict[str, Any]) -> None:
    """One model as a table."""
    print(f"\n{result['model']} on {result['ranks']} processes", flush=True)
    for row in sorted(result["layouts"], key=lambda row: float(row["measured_seconds"])):
        told, measured = row["predicted_seconds"], row["measured_seconds"]
        print(
            f"{row['layout'][:58]:58s} {measured:7.3f} s (spread {row['spread']:4.0%}) "
            f"{told:7.3f} s {told / measured - 1:+7.1%}"
        )
    for kind, planned in result["plans"].items():
        error, slower = planned["error"], planned["machine"]
        print(
            f"{kind}: error {error:+.1%}, regret {planned['regret']:.1%}, "
            f"planned {planned['layout']}"
        )
        if slower is not None:
            left = slower * (1 + error) - 1
            print(f"  layers take {slower:.3f} x what they took while profiled; else {left:+.1%}")
    print(f"rank correlation {result['rank_correlation']:.2f}", flush=True)


def main() -> None:
    """Profile, plan, train, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2], choices=sorted(OTHERS))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--quick-only", action="store_true", help="leave the full profile out")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    kinds = ["quick"] if arguments.quick_only else ["full", "quick"]
    results: list[dict[str, Any]] = []
    profiles_told: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for ranks in arguments.ranks:
            made = profile_into(folder, ranks, kinds)
            for kind, (_, found) in made.items():
                told = {
                    "kind": kind,
                    "ranks": ranks,
                    "seconds": found.seconds,
                    "spread": found.spread,
                    "test_error": found.test_error,
                    "layers": [
                        {"fitted": one.task.fitted, "error": one.error} for one in found.layers
                    ],
                }
                profiles_told.append(told)
                print(told, flush=True)
            paths = {kind: path for kind, (path, _) in made.items()}
            tests = {
                kind: {
                    one.task: one.measured_seconds
                    for one in found.layers
                    if not one.task.fitted and ranks <= available_cores()
                }
                for kind, (_, found) in made.items()
            }
            for name in arguments.models:
                results.append(compare(name, ranks, paths, folder, arguments.turns, tests))
                show(results[-1])
                if arguments.output:
                    content = {"profiles": profiles_told, "models": results}
                    arguments.output.write_text(json.dumps(content, indent=1))
    errors = [abs(p["error"]) for r in results for p in r["plans"].values()]
    regrets = [p["regret"] for r in results for p in r["plans"].values()]
    print(
        f"\nplanned layouts: median error {median(errors):.1%}, median regret {median(regrets):.1%}"
    )
    ratios = [
        row["measured_seconds"] / row["predicted_seconds"]
        for result in results
        for row in result["layouts"]
    ]
    tenth, *_, ninetieth = quantiles(ratios, n=10)
    print(
        f"four of five of {len(ratios)} layouts took {tenth:.3f} to {ninetieth:.3f} times what was "
        "predicted"
    )


if __name__ == "__main__":
    main()
