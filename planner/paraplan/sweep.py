"""Plans many questions at once: each once, in parallel, and never again.

Every model is traced once, before the workers start, and handed to them as a file, so that they
import neither torch nor transformers. What blocks compute is shared by all questions that a
worker plans for the same kind of node. An outcome goes to disk as soon as it is known, under a
name that changes with everything it depends on: an interrupted sweep goes on where it stopped.

Nothing else is worth sharing: the search takes layouts by their lower bound, so that a good plan
known from a neighbouring question would not spare it a single one.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import signal
import tempfile
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from paraplan.block_compute import BlockCompute
from paraplan.describe import rounded
from paraplan.errors import InfeasibleError, InputError, PlanError
from paraplan.files import write_atomically
from paraplan.graph import ModelGraph
from paraplan.layout import Layout
from paraplan.plan_file import Plan, device_of
from paraplan.planning import graph_of, plan_problem, problem_of, trace_settings
from paraplan.request import Question
from paraplan.trace_cache import default_cache_dir, source_digest, trace_key

Done = Callable[[int, int], None]
"""Called with how many questions are answered, and of how many."""
MODELS_IN_MEMORY = 4  # of a worker; sweeps take their questions model by model
NODES_IN_MEMORY = 8  # kinds of nodes whose block costs a worker keeps


class Outcome(BaseModel):
    """What planning one question came to.

    Attributes:
        reason: why there is no plan, in one line.
        headroom: the least share of a device's memory that a stage leaves free.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    status: Literal["planned", "infeasible", "impossible"]
    reason: str = ""
    layout: Layout | None = None
    step_seconds: float = 0.0
    tokens_per_second: float = 0.0
    mfu: float = 0.0
    peak_memory_bytes: int = 0
    headroom: float = 0.0
    gap: float = 0.0
    parameter_count: int = 0
    trainable_parameter_count: int = 0


@dataclass(frozen=True)
class _Task:
    """A question for a worker: where its trace lies, and where its outcome goes."""

    question: Question
    trace: str
    outcome: Path | None


def plan_questions(
    questions: Sequence[Question],
    *,
    workers: int = 1,
    done: Done = lambda finished, of: None,
) -> list[Outcome]:
    """The outcome of each question, in order.

    Args:
        workers: processes that plan; with 1, this one does. A script that asks for more must be
            importable without starting again (``if __name__ == "__main__":``).

    Raises:
        InputError: a model cannot be traced.
        KeyboardInterrupt: after what was being planned is planned and kept.
    """
    keys = [_key(question) for question in questions]
    known = {key: outcome for key in set(keys) if (outcome := _read(key))}
    missing = {key: question for key, question in zip(keys, questions, strict=True)}
    missing = {key: question for key, question in missing.items() if key not in known}

    def report() -> None:
        done(sum(key in known for key in keys), len(keys))

    report()
    if missing:
        with tempfile.TemporaryDirectory(prefix="paraplan-") as folder:
            tasks = _tasks(missing, Path(folder))
            with closing(_run(tasks, min(workers, len(tasks)))) as outcomes:
                for key, outcome in outcomes:
                    known[key] = outcome
                    report()
    return [known[key] for key in keys]


def _key(question: Question) -> str:
    """Names an outcome; changes with everything that it depends on."""
    settings = trace_settings(question)
    trace = trace_key(
        question.source,
        settings["sequence_length"],
        settings["compute_dtype"],
        settings["tensor_degrees"],
    )
    constraints = question.constraints
    parts = [
        "" if trace else "own code ",
        trace or question.source.config_sha256,
        source_digest("*.py"),
        question.cluster.sha256,
        question.workload.model_dump(),
        question.capacities_bytes,
        sorted(constraints.fixed.items()),
        constraints.recompute,
        constraints.allow,
        question.request.time_limit_seconds,
    ]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]
    return digest if trace else f"own-code-{digest}"


def _path(key: str) -> Path | None:
    """Where an outcome is kept; nowhere if the model's own code may change its trace."""
    if key.startswith("own-code-"):
        return None
    return default_cache_dir() / "points" / key[:2] / f"{key}.json"


def _read(key: str) -> Outcome | None:
    path = _path(key)
    try:
        return None if path is None else Outcome.model_validate_json(path.read_bytes())
    except (OSError, ValidationError, ValueError):
        return None  # not there, or not whole: it is planned again


def _tasks(missing: dict[str, Question], folder: Path) -> dict[str, _Task]:
    """Each question with its model's trace, traced once and written to ``folder``."""
    traces: dict[str, str] = {}
    tasks = {}
    for key, question in missing.items():
        name = json.dumps([question.source.spec, trace_settings(question)])
        if name not in traces:
            file = folder / f"{len(traces)}.json"
            file.write_text(graph_of(question).model_dump_json(exclude_defaults=True))
            traces[name] = str(file)
        tasks[key] = _Task(question, traces[name], _path(key))
    return tasks


def _run(tasks: dict[str, _Task], workers: int) -> Generator[tuple[str, Outcome], None, None]:
    if workers <= 1:
        for key, task in tasks.items():
            yield key, _plan(task)
        return
    # Not forked: the tracer may have started torch's threads in this process.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _ignore_interrupts) as pool:
        futures: dict[Future[Outcome], str] = {
            pool.submit(_plan, task): key for key, task in tasks.items()
        }
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise PlanError(
                "a worker was ended from outside, perhaps for want of memory",
                hint="what is planned is kept: run it again with fewer --workers",
            ) from None
        finally:
            # On Ctrl-C, plans that have begun are finished and kept; the others are not begun.
            pool.shutdown(wait=True, cancel_futures=True)


def _ignore_interrupts() -> None:
    """Ctrl-C reaches every process of a terminal; the parent decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _plan(task: _Task) -> Outcome:
    """Plan one question and keep its outcome."""
    outcome = _outcome(task)
    if task.outcome is not None:
        try:
            task.outcome.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(task.outcome, outcome.model_dump_json())
        except (OSError, InputError):
            pass  # a place that cannot be written costs the next sweep time, nothing else
    return outcome


def _outcome(task: _Task) -> Outcome:
    question = task.question
    problem = problem_of(question, _load(task.trace))
    if not question.constraints.allow and not problem.parts:
        # Without context and expert parallelism, only the node decides what a block computes.
        problem = replace(problem, computes=_computes(task.trace, _node(question)))
    try:
        plan = plan_problem(problem, question)
    except InfeasibleError as error:
        return Outcome(status="infeasible", reason=_line(error))
    except InputError as error:
        return Outcome(status="impossible", reason=_line(error))
    seen = plan.prediction
    return Outcome(
        status="planned",
        layout=plan.layout,
        step_seconds=seen.step_seconds,
        tokens_per_second=seen.tokens_per_second,
        mfu=seen.mfu,
        peak_memory_bytes=seen.peak_memory_bytes,
        headroom=_headroom(plan, question),
        gap=plan.proof.gap,
        parameter_count=plan.model.parameter_count,
        trainable_parameter_count=plan.model.trainable_parameter_count,
    )


def _headroom(plan: Plan, question: Question) -> float:
    devices = {kind.device.name: kind.device for kind in question.cluster.kinds}
    shares = []
    for stage in plan.stages:
        device = devices[device_of(plan, stage.pipeline_rank)]
        shares.append(1 - stage.memory_bytes / device.memory_capacity_bytes.value)
    return rounded(min(shares))


def _line(error: InputError | InfeasibleError) -> str:
    return f"{error}; {error.hint}" if error.hint else str(error)


def _node(question: Question) -> str:
    cluster = question.cluster
    link = cluster.link_inside.model_dump_json()
    return f"{cluster.device.sha256} {cluster.devices_per_node} {link}"


@lru_cache(MODELS_IN_MEMORY)
def _load(trace: str) -> ModelGraph:
    return ModelGraph.model_validate_json(Path(trace).read_bytes())


@lru_cache(NODES_IN_MEMORY)
def _computes(trace: str, node: str) -> dict[object, tuple[BlockCompute, ...]]:
    """The memo of `problem.computes_of` for a model on a kind of node, whatever the network."""
    return {}
