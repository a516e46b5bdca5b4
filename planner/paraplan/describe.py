"""Turns what the search found into a `Plan`: stages, prediction, proof."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise

from paraplan.block_cost import BlockCost
from paraplan.graph import Recompute
from paraplan.layout import Layout, mesh_axes, unsupported_fields
from paraplan.pipeline import interleaved_seconds, one_f_one_b_seconds
from paraplan.plan_file import Plan
from paraplan.plan_parts import (
    Breakdown,
    ClusterInfo,
    MemoryParts,
    ModelInfo,
    NodeKind,
    Prediction,
    Proof,
    RunnerUp,
    Stage,
    TimeBasis,
)
from paraplan.problem import Problem
from paraplan.search import Found, SearchResult
from paraplan.stage_cost import StageCost
from paraplan.stage_times import layer_modes, simulated_step, stage_times
from paraplan.uncertainty import computing_share, interval_of
from paraplan.workload import COMPUTE_DTYPE

SIGNIFICANT_DIGITS = 9  # what plan files keep of a float


def tool_version() -> str:
    """Version of the installed package."""
    try:
        return version("paraplan")
    except PackageNotFoundError:
        return "0+source"


def describe(
    problem: Problem, found: Found, proof: Proof, runner_ups: Sequence[Found], notes: Sequence[str]
) -> Plan:
    """The plan for a layout and its stages."""
    graph = problem.graph
    return Plan(
        tool_version=tool_version(),
        model=ModelInfo(
            name=graph.name,
            architecture=graph.architecture,
            config_sha256=graph.config_sha256,
            parameter_count=graph.parameter_count,
            trainable_parameter_count=graph.trainable_parameter_count,
        ),
        workload=problem.workload,
        cluster=_cluster_info(problem),
        layout=Layout.model_validate(found.layout.model_dump()),
        mesh=mesh_axes(found.layout),
        needs_unsupported=unsupported_fields(found.layout),
        stages=_stages(found),
        prediction=predict(problem, found),
        proof=proof,
        runner_ups=tuple(
            RunnerUp(
                layout=other.layout,
                step_seconds=rounded(other.staged.step_seconds),
                simulated_seconds=rounded(simulated_step(other)),
                peak_memory_bytes=max(_memory(s).total for s in other.staged.stages),
            )
            for other in runner_ups
        ),
        assumptions=tuple(notes),
    )


def _cluster_info(problem: Problem) -> ClusterInfo:
    cluster, kinds = problem.cluster, problem.parts or (problem,)
    return ClusterInfo(
        name=cluster.name,
        device=" + ".join(kind.device.name for kind in kinds),
        devices=cluster.devices,
        devices_per_node=min(kind.cluster.devices_per_node for kind in kinds),
        nodes=cluster.nodes,
        cluster_sha256=cluster.sha256,
        device_sha256=" + ".join(kind.device.sha256 for kind in kinds),
        kinds=tuple(
            NodeKind(
                device=part.device.name,
                devices=part.cluster.devices,
                devices_per_node=part.cluster.devices_per_node,
                capacity_bytes=int(part.capacity_bytes),
            )
            for part in problem.parts
        ),
    )


def proof_of(result: SearchResult) -> Proof:
    """The proof of a search."""
    step = result.best.staged.step_seconds
    bound = min(result.bound_seconds, step)
    return Proof(
        status="optimal" if result.optimal else "feasible",
        bound_seconds=rounded(bound),
        gap=rounded((step - bound) / step),
        layouts_considered=result.considered,
        layouts_bounded=result.bounded,
        layouts_infeasible=result.infeasible,
        layouts_solved=result.solved,
        excluded=dict(sorted(result.excluded.items())),
        solver=result.solver,
        seconds=round(result.seconds, 3),
    )


def no_proof(seconds: float) -> Proof:
    """The proof of an estimate: nothing was searched."""
    return Proof(
        status="estimated",
        bound_seconds=0.0,
        gap=0.0,
        layouts_considered=1,
        layouts_bounded=0,
        layouts_infeasible=0,
        layouts_solved=1,
        excluded={},
        solver="none",
        seconds=round(seconds, 3),
    )


def predict(problem: Problem, found: Found) -> Prediction:
    """Time and memory of a layout with its stages chosen."""
    step = found.staged.step_seconds
    workload, stages = problem.workload, found.staged.stages
    rank = max(range(len(stages)), key=lambda s: _memory(stages[s]).total)
    fullest, capacity = _memory(stages[rank]).total, _capacity_bytes(problem, found, rank)
    dtype = COMPUTE_DTYPE[workload.precision]
    peak = sum(
        kind.device.peak_flops_per_second[dtype].value * kind.cluster.devices
        for kind in problem.parts or (problem,)
    )
    flops = problem.graph.model_flops_per_sequence * workload.global_batch
    breakdown = _breakdown(found)
    computing = computing_share(found.chain, layer_modes(found), step)
    return Prediction(
        step_seconds=rounded(step),
        simulated_seconds=rounded(simulated_step(found)),
        tokens_per_second=rounded(workload.global_batch * workload.sequence_length / step),
        mfu=rounded(flops / step / peak),
        peak_memory_bytes=fullest,
        capacity_bytes=int(capacity),
        fits=fullest <= capacity,
        breakdown=breakdown,
        basis=_basis(found),
        interval=interval_of(problem.device, problem.cluster.nodes, computing, step),
    )


def _capacity_bytes(problem: Problem, found: Found, rank: int) -> float:
    """What a plan may use of a device that holds a pipeline rank."""
    if not problem.parts:
        return problem.capacity_bytes  # an estimate that does not fit is costed at a larger one
    first = problem.parts[0].cluster.devices * found.layout.pipeline // found.layout.devices
    return problem.parts[0 if rank < first else 1].capacity_bytes


def rounded(value: float) -> float:
    """A float as plan files keep it."""
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")


def _memory(stage: StageCost) -> MemoryParts:
    # Down, so that a stage planned to fill the capacity is not shown a byte above it.
    return MemoryParts(**{name: int(value) for name, value in stage.parts.items()})


def _stages(found: Found) -> tuple[Stage, ...]:
    chain, cuts = found.chain, found.staged.cuts
    modes = layer_modes(found)
    stages = []
    for index, times in enumerate(stage_times(found)):
        rank, run = index % found.layout.pipeline, range(cuts[index], cuts[index + 1])
        layers = [modes[i] for i in run if i in modes]
        cost = found.staged.stages[rank]
        memory = _memory(cost)
        stages.append(
            Stage(
                index=index,
                pipeline_rank=rank,
                modules=tuple(m for i in run for m in chain.graph.chain[i].modules),
                layers=len(layers),
                recompute=tuple(layers),
                forward_seconds=rounded(times.forward),
                backward_seconds=rounded(times.backward),
                recompute_seconds=rounded(times.recompute),
                forward_exchange_seconds=rounded(times.forward_exchange),
                backward_exchange_seconds=rounded(times.backward_exchange),
                forward_overlapped_seconds=rounded(times.overlapped.forward),
                backward_overlapped_seconds=rounded(times.overlapped.backward),
                first_overlapped_seconds=rounded(times.overlapped.first_forward),
                last_overlapped_seconds=rounded(times.overlapped.last_backward),
                transfer_seconds=rounded(times.transfer),
                step_exchange_seconds=rounded(cost.tail_seconds - cost.optimizer_seconds),
                optimizer_seconds=rounded(cost.optimizer_seconds),
                memory_bytes=memory.total,
                memory=memory,
            )
        )
    return tuple(stages)


def _breakdown(found: Found) -> Breakdown:
    """Attribute the step to the rank whose stage takes longest."""
    chain, layout, done = found.chain, found.layout, found.staged
    m = layout.micro_batches
    rank = max(range(layout.pipeline), key=lambda s: done.stages[s].seconds)
    stage = done.stages[rank]
    modes = layer_modes(found)
    passes: defaultdict[str, float] = defaultdict(float)
    for index in range(rank, len(done.cuts) - 1, layout.pipeline):
        for i in range(done.cuts[index], done.cuts[index + 1]):
            _add_passes(
                passes, chain.of_rank(rank).costs[chain.shape.kind_at[i]], modes.get(i, "none")
            )
    whole = _pipeline_seconds(found, done.transfers)
    without = _pipeline_seconds(found, [0.0] * layout.pipeline)
    tail = max(s.tail_seconds for s in done.stages)
    optimizer = min(stage.optimizer_seconds, tail)
    exposed = stage.seconds - sum(passes.values())  # gathers and reductions not hidden
    parts = {name: seconds * m for name, seconds in passes.items()}
    parts["data_communication"] = max(0.0, exposed * m) + tail - optimizer
    parts["pipeline_communication"] = max(0.0, whole - without)
    parts["pipeline_bubble"] = max(0.0, without - m * stage.seconds)
    parts["optimizer"] = optimizer
    return Breakdown(**{name: rounded(parts[name]) for name in Breakdown.model_fields})


def _add_passes(passes: defaultdict[str, float], cost: BlockCost, mode: Recompute) -> None:
    compute = cost.compute
    again = compute.rerun[mode]
    passes["forward"] += compute.forward.kernels
    passes["backward"] += compute.backward.kernels
    passes["recompute"] += again.kernels
    for one in (compute.forward, compute.backward, again):
        passes["launch"] += one.launch
        passes["tensor_communication"] += one.tensor
        passes["context_communication"] += one.context
        passes["expert_communication"] += one.expert


def _pipeline_seconds(found: Found, transfers: Sequence[float]) -> float:
    layout, stages = found.layout, found.staged.stages
    if layout.virtual_stages > 1:
        return interleaved_seconds(
            [s.seconds for s in stages],
            max(transfers),
            layout.micro_batches,
            layout.virtual_stages,
            contention=found.chain.transfer_contention,
        )
    return one_f_one_b_seconds(
        [s.forward_seconds for s in stages],
        [s.backward_seconds for s in stages],
        transfers,
        layout.micro_batches,
    )


def _basis(found: Found) -> TimeBasis:
    shares = {"measured": 0.0, "interpolated": 0.0, "modelled": 0.0}
    for index, (first, end) in enumerate(pairwise(found.staged.cuts)):
        costs = found.chain.of_rank(index % found.layout.pipeline).costs
        for before, cost in zip(found.chain.shape.counts_before, costs, strict=True):
            for name in shares:
                shares[name] += (before[end] - before[first]) * getattr(cost.compute, name)
    total = sum(shares.values()) or 1.0
    return TimeBasis(**{name: round(value / total, 6) for name, value in shares.items()})
