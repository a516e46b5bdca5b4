"""Plans as text for a terminal of 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from paraplan.layout import Layout
from paraplan.plan_file import Plan, capacity_of
from paraplan.plan_parts import Breakdown, MemoryParts, Stage

GIB = 2**30
BAR = 24  # characters of a full bar
MOST_ROWS = 8  # pipeline ranks shown one by one
CLOSED_FORM_ERROR = 0.002
"""Mean difference of closed form and replay over uneven pipelines (docs/cost-model.md): layouts
that the replay tells apart by less than this are as good as each other."""

TIME_NAMES = {
    "forward": "forward",
    "backward": "backward",
    "recompute": "recomputation",
    "launch": "kernel launches",
    "tensor_communication": "tensor parallel exchange",
    "context_communication": "context parallel exchange",
    "expert_communication": "expert parallel exchange",
    "data_communication": "data parallel exchange",
    "pipeline_communication": "pipeline transfers",
    "pipeline_bubble": "pipeline bubble",
    "optimizer": "optimizer",
}


def layout_words(layout: Layout) -> str:
    """A layout in a line: the degrees above 1 and the micro-batches."""
    parts = []
    if layout.data_replicate > 1:
        parts.append(f"data-replicate {layout.data_replicate}")
    if layout.data_shard > 1:
        parts.append(f"data-shard {layout.data_shard} (ZeRO-{layout.zero_stage})")
    if layout.tensor > 1:
        sequence = " + sequence" if layout.sequence_parallel else ""
        parts.append(f"tensor {layout.tensor}{sequence}")
    parts += [f"{n} {getattr(layout, n)}" for n in ("context", "expert") if getattr(layout, n) > 1]
    if layout.pipeline > 1:
        virtual = f" x {layout.virtual_stages} virtual" if layout.virtual_stages > 1 else ""
        parts.append(f"pipeline {layout.pipeline}{virtual}")
    plural = "" if layout.micro_batches == 1 else "es"
    parts.append(f"{layout.micro_batches} micro-batch{plural} of {layout.micro_batch_size}")
    return ", ".join(parts)


def seconds_words(seconds: float) -> str:
    """A duration with a fitting unit."""
    if seconds == 0:
        return "0 s"
    if seconds >= 1:
        return f"{seconds:.3f} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def recompute_words(stage: Sequence[str]) -> str:
    """How many layers recompute, and how."""
    counts = [(mode, stage.count(mode)) for mode in ("full", "selective")]
    words = [f"{count} {mode}" for mode, count in counts if count]
    return ", ".join(words) if words else "none"


def print_summary(plan: Plan, console: Console) -> None:
    """Everything a user wants to know of a plan, in one screen."""
    _print_head(plan, console)
    print_times(plan.prediction.breakdown, plan.prediction.step_seconds, console)
    print_memory(plan, console)
    if plan.runner_ups:
        print_runner_ups(plan, console)
    for line in closing_lines(plan):
        console.print(line, style="dim", highlight=False)


def _print_head(plan: Plan, console: Console) -> None:
    model, work, cluster, seen = plan.model, plan.workload, plan.cluster, plan.prediction
    console.print(
        f"[bold]{escape(model.name)}[/] ({model.parameter_count / 1e9:.2f} B parameters) on "
        f"[bold]{cluster.devices} x {escape(cluster.device)}[/], "
        f"{cluster.nodes} {'node' if cluster.nodes == 1 else 'nodes'} of "
        f"{cluster.devices_per_node}",
        highlight=False,
    )
    first = 0
    for kind in cluster.kinds:
        end = first + kind.devices * plan.layout.pipeline // cluster.devices
        console.print(
            f"stages {first} to {end - 1} on {kind.devices} x {escape(kind.device)}, in nodes of "
            f"{kind.devices_per_node}: start these nodes {'second' if first else 'first'}",
            highlight=False,
        )
        first = end
    console.print(
        f"{work.global_batch} sequences of {work.sequence_length} tokens a step, "
        f"{work.precision}, {work.optimizer}",
        highlight=False,
    )
    console.print()
    table = Table.grid(padding=(0, 2))
    table.add_row("layout", f"[bold]{layout_words(plan.layout)}[/]")
    speed = (
        f"[bold]{seconds_words(seen.step_seconds)}[/], {seen.tokens_per_second:,.0f} tokens/s, "
        f"MFU {seen.mfu * 100:.1f} %"
    )
    table.add_row("step", speed)
    if seen.interval is not None:
        likely = seen.interval
        table.add_row(
            "",
            f"{seconds_words(likely.low_seconds)} to {seconds_words(likely.high_seconds)} in "
            f"{likely.coverage:.0%} of measured runs like it ({likely.kind})",
        )
    if not seen.fits:
        missing = (seen.peak_memory_bytes - seen.capacity_bytes) / GIB
        table.add_row("", f"[bold red]does not fit: {missing:.1f} GiB too much per device[/]")
    console.print(table)
    console.print()


def _bar(share: float) -> str:
    full = min(BAR, max(0, round(share * BAR)))
    return "#" * full + "." * (BAR - full)


def print_times(breakdown: Breakdown, step_seconds: float, console: Console) -> None:
    """Parts of the step time, largest first."""
    table = Table.grid(padding=(0, 2))
    parts = sorted(breakdown.model_dump().items(), key=lambda part: -part[1])
    for name, seconds in parts:
        share = seconds / step_seconds
        if share >= 0.0005:
            table.add_row(
                TIME_NAMES[name], _bar(share), seconds_words(seconds), f"{share * 100:.1f} %"
            )
    for column in table.columns[2:]:
        column.justify = "right"
    console.print(table, highlight=False)
    console.print()


def print_memory(plan: Plan, console: Console) -> None:
    """Peak memory of each pipeline rank against the capacity."""
    several = [kind.capacity_bytes for kind in plan.cluster.kinds]
    room = " and ".join(f"{c / GIB:.1f}" for c in several or [plan.prediction.capacity_bytes])
    table = Table.grid(padding=(0, 2))
    table.add_row("stage", "layers", f"memory of {room} GiB", "GiB", "recompute")
    ranks = [stages_of_rank(plan, rank) for rank in range(plan.layout.pipeline)]
    shown = ranks if len(ranks) <= MOST_ROWS else ranks[: MOST_ROWS - 1] + ranks[-1:]
    for stages in shown:
        first = stages[0]
        if len(ranks) > MOST_ROWS and stages is ranks[-1]:
            table.add_row("...", "", f"{len(ranks) - MOST_ROWS} more", "", "")
        table.add_row(
            str(first.pipeline_rank),
            str(sum(stage.layers for stage in stages)),
            _bar(first.memory_bytes / capacity_of(plan, first.pipeline_rank)),
            f"{first.memory_bytes / GIB:.1f}",
            recompute_words([mode for stage in stages for mode in stage.recompute]),
        )
    table.columns[1].justify = table.columns[3].justify = "right"
    console.print(table, highlight=False)
    console.print(f"of stage {fullest(plan).pipeline_rank}: {memory_words(fullest(plan).memory)}")
    console.print()


def stages_of_rank(plan: Plan, rank: int) -> list[Stage]:
    """The (virtual) stages that a pipeline rank holds."""
    return [stage for stage in plan.stages if stage.pipeline_rank == rank]


def fullest(plan: Plan) -> Stage:
    """The stage with the highest peak."""
    return max(plan.stages, key=lambda stage: stage.memory_bytes)


def memory_words(memory: MemoryParts) -> str:
    """The larger parts of a stage's memory, largest first."""
    parts = sorted(memory.model_dump().items(), key=lambda part: -part[1])
    return ", ".join(
        f"{name.replace('_', ' ')} {size / GIB:.1f}" for name, size in parts if size >= GIB / 20
    )


def print_runner_ups(plan: Plan, console: Console) -> None:
    """The plan and the layouts that came close, as the replayed step ranks them."""
    console.print("the best few, ranked again by the replayed step")
    for line in ranking_lines(plan):
        console.print(line, highlight=False, soft_wrap=True)
    console.print()


def order_by_replay(plan: Plan) -> list[int]:
    """The plan (0) and its runner-ups (1, ...) by their replayed time, the fastest first."""
    seconds = [plan.prediction.simulated_seconds]
    seconds += [other.simulated_seconds for other in plan.runner_ups]
    known = [(value, index) for index, value in enumerate(seconds) if value is not None]
    return [index for _, index in sorted(known)]


def ranking_lines(plan: Plan) -> list[str]:
    """The solver's best few, ranked again by the replayed step, beside the closed form."""
    seen = plan.prediction
    known = [("the plan: ", plan.layout, seen.step_seconds, seen.simulated_seconds)]
    known += [("", o.layout, o.step_seconds, o.simulated_seconds) for o in plan.runner_ups]
    lines = ["   replayed  closed form  difference"]
    for place, index in enumerate(order_by_replay(plan) or range(len(known)), start=1):
        which, layout, closed, simulated = known[index]
        seen_again, off = "not known", ""
        if simulated is not None:
            seen_again = seconds_words(simulated)
            off = f"{(simulated / closed - 1) * 100:+.2f} %"
        figures = f"{place}  {seen_again:>9s}  {seconds_words(closed):>11s}  {off:>10s}  "
        lines += textwrap.wrap(
            which + layout_words(layout), 80, initial_indent=figures, subsequent_indent=" " * 38
        )
    return lines


def replay_lines(plan: Plan) -> list[str]:
    """What the replay says to the plan: how far off it is, and whether it ranks another first."""
    seen = plan.prediction
    if seen.simulated_seconds is None:
        return []
    if plan.layout.pipeline == 1 and all(o.layout.pipeline == 1 for o in plan.runner_ups):
        return []  # without a pipeline both are the same sum
    off = seen.simulated_seconds / seen.step_seconds - 1
    lines = [f"replayed: {seconds_words(seen.simulated_seconds)}, {off * 100:+.2f} %"]
    first = order_by_replay(plan)[0]
    if first:
        other = plan.runner_ups[first - 1]
        assert other.simulated_seconds is not None, "only known ones are in the order"
        gain = 1 - other.simulated_seconds / seen.simulated_seconds
        if gain <= CLOSED_FORM_ERROR:
            lines.append(
                f"replayed, another is {gain * 100:.2g} % faster, no more than the closed form "
                f"is off ({CLOSED_FORM_ERROR:.1%}): {layout_words(other.layout)}"
            )
        else:
            lines += [
                f"replayed, another is {gain * 100:.2g} % faster: {layout_words(other.layout)} "
                f"({seconds_words(other.simulated_seconds)}); to take it, add",
                f"--fix {fix_words(other.layout)}",
            ]
    return lines


def fix_words(layout: Layout) -> str:
    """What ``--fix`` takes to pin a layout; degrees left out can only be 1."""
    plain = Layout()
    fields = layout.model_dump()
    changed = {name: value for name, value in fields.items() if value != getattr(plain, name)}
    if layout.tensor > 1:
        changed["sequence_parallel"] = layout.sequence_parallel
    return ",".join(f"{name}={value}" for name, value in changed.items()) or "tensor=1"


def closing_lines(plan: Plan) -> list[str]:
    """Proof, replay, basis of the figures, assumptions."""
    proof, basis = plan.proof, plan.prediction.basis
    lines = []
    if proof.status == "estimated":
        lines.append("an estimate of this one layout; nothing was searched")
    else:
        word = "optimal" if proof.status == "optimal" else "not proven optimal"
        lines.append(
            f"{word} for the cost model, gap {proof.gap * 100:.2g} %: "
            f"{proof.layouts_considered:,} layouts = {proof.layouts_bounded:,} excluded by a "
            f"bound + {proof.layouts_infeasible:,} out of memory + {proof.layouts_solved:,} "
            f"solved, {proof.seconds:.2f} s"
        )
    lines += replay_lines(plan)
    lines.append(
        f"rests on: {basis.measured * 100:.0f} % measured, {basis.interpolated * 100:.0f} % "
        f"interpolated, {basis.modelled * 100:.0f} % modelled operation times"
    )
    if plan.assumptions:
        lines.append("assumed: " + ", ".join(plan.assumptions))
    if plan.needs_unsupported:
        axes = ", ".join(plan.needs_unsupported)
        lines.append(f"note: the runtime cannot apply {axes} parallelism yet")
    return lines
