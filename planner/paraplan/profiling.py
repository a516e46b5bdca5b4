"""Measures the devices of this machine, or of several, and makes a profile of them.

Tasks are measured one by one on all devices at once (`measure_ranks`), what is known goes to a
partial file so that an interrupted run goes on where it stopped, and the profile ends with a test
of its own: layers that no figure was fitted to, predicted against measured.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, Literal

from paraplan.automatic import profile_of
from paraplan.cluster import Cluster, make_cluster
from paraplan.cpu_ranks import available_cores
from paraplan.device import Device, load_device
from paraplan.errors import InputError
from paraplan.measure_start import start_imports
from paraplan.models import ModelSource, model_of_config
from paraplan.op_table import Dtype
from paraplan.profile_result import (
    LayerFit,
    Measurements,
    MemoryCall,
    Seconds,
    fit_layers,
    layer_calls,
    measured_cluster,
    predicted_layer_seconds,
    with_layers,
    with_speedup,
)
from paraplan.profile_rounds import Kept, over_rounds, schedule_of, still_missing
from paraplan.profile_tasks import (
    LayerTask,
    Scope,
    example_models,
    make_tasks,
)
from paraplan.trace_cache import model_graph, source_digest

if TYPE_CHECKING:
    from paraplan.measure_calls import RecordedCall
    from paraplan.measure_clock import Timing
    from paraplan.measure_nodes import Meeting
    from paraplan.measure_ranks import Facts, RankSettings

SIZES_OF_A_NAME = 8
"""Sizes at which each memory-bound call is timed; half of them with --quick."""
LAYERS_A_ROUND, QUICK_LAYERS_A_ROUND = 3, 2
"""How often whole layers are timed in each round."""
QUICK_BEGUN_SECONDS = 5.0
"""Quick profiles that begin to measure later have time for one round only, and for whole layers
once where one is all they ever do. With two virtual cores at 55 % of their speed, importing and
recording took 6 to 8 s instead of 3; two rounds of two processes had ended after 21 s
(``plan profile --device cpu --gpus 2 --quick``), a round of four processes after 23."""


@dataclass(frozen=True)
class LayerResult:
    """A whole layer, predicted and measured."""

    task: LayerTask
    predicted_seconds: float
    measured_seconds: float

    @property
    def error(self) -> float:
        """(predicted - measured) / measured."""
        return self.predicted_seconds / self.measured_seconds - 1


@dataclass(frozen=True)
class Profile:
    """What profiling a machine gave.

    Attributes:
        layers: whole layers; those not ``fitted`` are the test.
        spread: median over all tasks.
        seconds: that it took.
    """

    cluster: Cluster
    layers: tuple[LayerResult, ...]
    spread: float
    timings: int
    seconds: float

    @property
    def test_error(self) -> float:
        """Median absolute error of the layers that were not fitted."""
        return median(abs(one.error) for one in self.layers if not one.task.fitted)


Done = Callable[[int, int], None]
"""Called with how many tasks are measured, and of how many."""


@dataclass(frozen=True)
class _Work:
    """What is measured, and how.

    Attributes:
        calls: those of the ``tasks`` that are recorded calls.
    """

    base: Cluster
    tasks: tuple[Any, ...]
    calls: tuple[RecordedCall, ...]
    settings: RankSettings
    dtype: Dtype


def profile_machine(
    kind: Literal["cuda", "cpu"],
    ranks: int,
    *,
    quick: bool = False,
    base: Cluster | None = None,
    models: Sequence[tuple[ModelSource, int]] = (),
    partial: Path | None = None,
    done: Done = lambda finished, of: None,
    meeting: Meeting | None = None,
) -> Profile:
    """Measure devices, ``ranks`` of them at once, and make a profile of them.

    Args:
        base: profile whose figures stay where nothing is measured; by default found by name.
        models: models and sequence lengths whose own ops are measured as well.
        partial: file that keeps what is known until all is.
        meeting: with the other machines that have a part of the ``ranks``; they call
            `measure_beside`.

    Raises:
        InputError: a device cannot be measured.
    """
    began = time.perf_counter()
    start_imports()  # ahead of our own

    from paraplan.measure_ranks import QUICK_ROUNDS, ROUNDS, key_of, measure_on_ranks, shared

    work = _work(kind, ranks, quick, models, base, meeting)
    tasks, settings = work.tasks, work.settings
    rounds, often = (QUICK_ROUNDS, QUICK_LAYERS_A_ROUND) if quick else (ROUNDS, LAYERS_A_ROUND)
    late = time.perf_counter() - began > QUICK_BEGUN_SECONDS
    if quick and (late or shared(settings)):
        rounds = 1
    if quick and late and shared(settings):
        often = 1
    kept = Kept(partial, _fingerprint(settings))
    schedule = schedule_of(tasks, rounds, often)
    missing = still_missing(
        schedule, Counter({key: len(t) for key, t in kept.known.items()}), key_of
    )
    if meeting is not None:
        place = {task: index for index, task in enumerate(tasks)}
        meeting.told("tasks", json.dumps([place[task] for task in missing]))
    of = len(schedule)
    done(of - len(missing), of)

    def report(key: str, timing: Timing) -> None:
        kept.add(key, timing)
        done(sum(len(timings) for timings in kept.known.values()), of)

    try:
        facts = measure_on_ranks(missing, settings, report, meeting)
    finally:
        kept.save()
    known = over_rounds({task: kept.known[key_of(task)] for task in tasks})
    made = Measurements(
        tasks={task: timing for task, timing in known.items() if task not in set(work.calls)},
        calls=[_memory_call(call, known[call]) for call in work.calls],
        where=_where(facts, settings),
        facts=_figures(facts, settings),
        ranks=ranks,
        dtype=work.dtype,
        nodes=settings.nodes,
    )
    cluster, layers = _scaled(measured_cluster(work.base, made), made)
    kept.forget()
    spread = median(timing.spread for timing in known.values())
    return Profile(cluster, layers, spread, len(tasks), time.perf_counter() - began)


def measure_beside(
    kind: Literal["cuda", "cpu"],
    ranks: int,
    meeting: Meeting,
    *,
    quick: bool = False,
    models: Sequence[tuple[ModelSource, int]] = (),
) -> None:
    """Measure what the first of the machines measures, which makes the profile.

    Raises:
        InputError: a device cannot be measured, or this machine differs from the first.
    """
    start_imports()

    from paraplan.measure_ranks import measure_on_ranks

    work = _work(kind, ranks, quick, models, None, meeting)
    wanted = [work.tasks[index] for index in json.loads(meeting.told("tasks", ""))]
    measure_on_ranks(wanted, work.settings, lambda key, timing: None, meeting)


def _work(
    kind: Literal["cuda", "cpu"],
    ranks: int,
    quick: bool,
    models: Sequence[tuple[ModelSource, int]],
    base: Cluster | None,
    meeting: Meeting | None,
) -> _Work:
    """The same on all machines: they compare it."""
    from paraplan.measure_ranks import RankSettings, key_of, shared

    nodes = 1 if meeting is None else meeting.nodes
    dtype: Dtype = "bfloat16" if kind == "cuda" else "float32"
    base = base or _base(kind, ranks, nodes)
    scope = Scope(kind, ranks, quick, dtype, nodes, _other_dtypes(base.device))
    calls = _memory_calls(scope, models)
    tasks: list[Any] = [*make_tasks(scope), *_model_tasks(scope, models, base), *calls]
    settings = RankSettings(kind, ranks, quick, _threads(kind, ranks // nodes), nodes)
    if shared(settings) and not quick:  # too few timings tell less than the number of cores does
        fitted = [task for task in tasks if isinstance(task, LayerTask) and task.fitted]
        tasks += [replace(task, alone=True) for task in fitted]
    tasks = list(dict.fromkeys(tasks))
    if meeting is not None:
        import torch

        measured = [_fingerprint(settings), *map(key_of, tasks)]
        meeting.compare(
            {
                "device": base.device.name,
                "torch": torch.__version__,
                "threads": str(settings.threads),
                "measurements": hashlib.sha256(json.dumps(measured).encode()).hexdigest()[:8],
            }
        )
    return _Work(base, tuple(tasks), tuple(calls), settings, dtype)


def _other_dtypes(device: Device) -> tuple[Dtype, ...]:
    """What else the device multiplies, by its profile; ROCm's 8 bits are of another format."""
    found: tuple[Dtype, ...] = ("bfloat16",)
    if device.kind != "cpu":
        found = (
            ("float16", "float32", "float8") if device.kind == "cuda" else ("float16", "float32")
        )
    return tuple(dtype for dtype in found if dtype in device.peak_flops_per_second)


def _threads(kind: str, ranks: int) -> int:
    """As many as `launch` gives a rank."""
    named = os.environ.get("OMP_NUM_THREADS", "")
    if named.isdecimal():
        return max(1, int(named))
    return max(1, available_cores() // ranks)


def _base(kind: str, ranks: int, nodes: int) -> Cluster:
    per_node = ranks // nodes
    if kind == "cpu":
        return make_cluster(load_device("cpu"), ranks, devices_per_node=per_node)
    import torch

    if torch.cuda.device_count() < per_node:
        raise InputError(
            f"{per_node} GPUs are to be measured, this machine has {torch.cuda.device_count()}"
        )
    device = load_device(profile_of(torch.cuda.get_device_name()))
    return make_cluster(device, ranks, devices_per_node=per_node)


def _fingerprint(settings: Any) -> str:
    import torch

    how = [source_digest("measure*.py"), source_digest("profil*.py")]
    parts = [asdict(settings), torch.__version__, *how]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _memory_calls(scope: Scope, models: Sequence[tuple[ModelSource, int]]) -> list[RecordedCall]:
    """Memory-bound calls of the example models at a few sizes each, and all of the named ones."""
    from paraplan.measure_calls import record_calls

    found: dict[tuple[str, str], dict[int, list[RecordedCall]]] = {}
    for config, length, sequences in example_models(scope):
        for call in record_calls(
            model_of_config(json.loads(config)),
            sequence_length=length,
            sequences=sequences,
            compute_dtype=scope.dtype,
        ):
            if call.kernel.kind == "memory" and call.kernel.dtype == scope.dtype:
                sizes = found.setdefault((call.name, call.kernel.dtype), {})
                sizes.setdefault(call.size_bytes, []).append(call)
    most = SIZES_OF_A_NAME // (2 if scope.quick else 1)
    chosen = [call for sizes in found.values() for s in _spaced(sizes, most) for call in sizes[s]]
    for source, length in models:
        for sequences in (1, 2, 4):
            chosen += [
                call
                for call in record_calls(
                    source,
                    sequence_length=length,
                    sequences=sequences,
                    compute_dtype=scope.dtype,
                )
                if call.kernel.kind == "memory" and call.kernel.dtype == scope.dtype
            ]
    return list(dict.fromkeys(chosen))


def _spaced(sizes: dict[int, Any], most: int) -> list[int]:
    """At most ``most`` of the sizes, evenly in their order, both ends included."""
    ordered = sorted(sizes)
    if len(ordered) <= most:
        return ordered
    return sorted({ordered[round(i * (len(ordered) - 1) / (most - 1))] for i in range(most)})


def _model_tasks(
    scope: Scope, models: Sequence[tuple[ModelSource, int]], base: Cluster
) -> list[Any]:
    """Matrix products and attention of the named models, at the shapes of feasible layouts."""
    from paraplan.layouts import tensor_degrees
    from paraplan.profile_tasks import AttentionTask, GemmTask

    tasks: list[Any] = []
    for source, length in models:
        graph = model_graph(
            source,
            sequence_length=length,
            compute_dtype="float32" if scope.dtype == "float32" else "bfloat16",
            tensor_degrees=tuple(tensor_degrees(scope.ranks)),
        )
        for block in graph.blocks.values():
            for op in (op for variant in block.variants.values() for op in variant.ops):
                for sequences in (1, 2, 4):
                    dims = tuple(int(dim.at(sequences)) for dim in op.dims)
                    if op.kind == "gemm" and op.dtype == scope.dtype:
                        tasks.append(GemmTask(scope.dtype, dims[1], dims[2], dims[3], dims[0]))
                    elif op.kind == "attention" and op.window is None and len(dims) == 7:
                        tasks.append(AttentionTask(scope.dtype, dims, op.causal, op.phase))
    return tasks


def _memory_call(call: RecordedCall, timing: Seconds) -> MemoryCall:
    dtype: Any = call.kernel.dtype
    return MemoryCall(call.name, dtype, call.size_bytes, call.count, timing)


def _where(facts: Facts, settings: RankSettings) -> str:
    import torch

    date = datetime.now(UTC).date().isoformat()
    what = "processes" if settings.kind == "cpu" else "devices"
    what += f" of {settings.nodes} machines" if settings.nodes > 1 else ""
    return (
        f"{facts.device_name}, {settings.ranks} {what} at once with {settings.threads} threads "
        f"each, torch {torch.__version__}, driver {facts.driver}, clocks {facts.clocks}, {date}"
    )


def _figures(facts: Facts, settings: RankSettings) -> dict[str, float]:
    figures = {
        "memory_capacity_bytes": float(facts.capacity_bytes),
        "framework_memory_bytes": float(facts.framework_bytes),
    }
    if settings.kind == "cuda":
        figures["multiprocessors"] = float(facts.multiprocessors)
    else:
        wanted = settings.per_node * settings.threads
        figures["ranks_per_core"] = max(1.0, wanted / available_cores())
    return figures


def _scaled(cluster: Cluster, made: Measurements) -> tuple[Cluster, tuple[LayerResult, ...]]:
    """Fit what whole layers take; then every layer predicted against measured."""
    layers = [(task, timing) for task, timing in made.of(LayerTask) if not task.alone]
    alone = [(made.tasks[replace(t, alone=False)], s) for t, s in made.of(LayerTask) if t.alone]

    def results(profile: Cluster) -> tuple[LayerResult, ...]:
        return tuple(
            LayerResult(task, predicted_layer_seconds(_graph(task), task, profile), timing.seconds)
            for task, timing in layers
        )

    fitted = [one for one in results(cluster) if one.task.fitted]
    ops = [one.predicted_seconds for one in fitted]
    took = [one.measured_seconds for one in fitted]
    if cluster.device.kind == "cpu":
        fit = fit_layers(ops, [layer_calls(_graph(one.task)) for one in fitted], took)
    else:
        scale = median(whole / alone for whole, alone in zip(took, ops, strict=True))
        fit = LayerFit(scale, None, len(fitted))
    lag = fmean([s.lag for _, s in layers], weights=[s.seconds for _, s in layers])
    scaled = with_layers(cluster, fit, lag, made)
    if alone:
        times = sum(s.seconds for s, _ in alone) / sum(one.seconds for _, one in alone)
        scaled = with_speedup(scaled, times, made)
    return scaled, results(scaled)


def _graph(task: LayerTask) -> Any:
    return model_graph(
        model_of_config(json.loads(task.config)),
        sequence_length=task.sequence_length,
        compute_dtype="float32" if task.dtype == "float32" else "bfloat16",
        tensor_degrees=(1,),
    )
