"""`plan report`: a plan or a what-if as one HTML file that needs no network.

`plan_page` puts the sections of a plan together; `page_parts` has the pieces, `page_mesh` and
`page_timeline` the pictures, ``assets/`` the stylesheet and the script.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterable

from paraplan.explain import request_of
from paraplan.files import read_small_file, write_atomically
from paraplan.layout import Layout
from paraplan.page_mesh import mesh_picture
from paraplan.page_parts import (
    GIB,
    MEMORY_COLOURS,
    TIME_COLOURS,
    Cell,
    Part,
    bar,
    command,
    data_block,
    definition_list,
    folded,
    legend,
    number,
    page,
    table,
    text,
)
from paraplan.page_timeline import timeline_picture
from paraplan.plan_file import Plan, plan_from_json, plan_to_json
from paraplan.report import (
    TIME_NAMES,
    closing_lines,
    fix_words,
    layout_words,
    recompute_words,
    replay_lines,
    seconds_words,
    stages_of_rank,
)

MEMORY_NAMES = {name: name.replace("_", " ") for name in MEMORY_COLOURS}


def plan_page(plan: Plan) -> str:
    """The report of a plan."""
    sections = [
        ("mesh-of", "Mesh", mesh_picture(plan)),
        ("step", "Timeline of a step", timeline_picture(plan)),
        ("time", "Where the time goes", _time(plan)),
        ("memory", "Memory", _memory(plan)),
        ("stages", "Stages", _stages(plan)),
        ("others", "Runner-ups", _runner_ups(plan)),
        ("proof", "Proof", _proof(plan)),
        ("inputs", "Inputs and assumptions", _inputs(plan)),
    ]
    title = f"{plan.model.name} on {plan.cluster.devices:,} x {plan.cluster.device}"
    return page(title, _answer(plan), sections, data_block("plan", plan_to_json(plan)))


def plan_command(plan: Plan) -> list[str]:
    """The command that asks the question of a plan again."""
    request, work = request_of(plan), plan.workload
    words = ["plan", "--model", plan.model.name, "--gpus", str(plan.cluster.devices)]
    if request.cluster is not None:
        words += ["--cluster", plan.cluster.name]
    else:
        words += ["--device", plan.cluster.device]
        words += ["--gpus-per-node", str(plan.cluster.devices_per_node)]
    words += ["--global-batch", str(work.global_batch), "--seq-len", str(work.sequence_length)]
    words += ["--precision", work.precision, "--optimizer", work.optimizer]
    words += ["--memory-limit", f"{plan.prediction.capacity_bytes / GIB:.9g}"]
    return words + (["--allow", ",".join(plan.needs_unsupported)] if plan.needs_unsupported else [])


def estimate_command(plan: Plan, layout: Layout) -> str:
    """The command that predicts another layout of the same question."""
    words = [word for word in plan_command(plan) if word != "plan"]
    if "--allow" in words:
        words = words[: words.index("--allow")]
    return shlex.join(["plan", "estimate", *words, "--fix", fix_words(layout)])


def _answer(plan: Plan) -> str:
    seen, work = plan.prediction, plan.workload
    room = 1 - seen.peak_memory_bytes / seen.capacity_bytes
    fits = "" if seen.fits else ' <strong class="bad">It does not fit.</strong>'
    facts = [
        ("Step", text(seconds_words(seen.step_seconds))),
        ("Tokens a second", f"{seen.tokens_per_second:,.0f}"),
        ("MFU", f"{seen.mfu * 100:.1f} %"),
        ("Fullest device", f"{seen.peak_memory_bytes / GIB:.1f} GiB, {room * 100:.0f} % free"),
        ("Proof", "-" if plan.proof.status == "estimated" else f"gap {plan.proof.gap * 100:.2g} %"),
    ]
    return (
        f'<p class="answer"><strong>{text(layout_words(plan.layout))}</strong>.{fits} '
        f"{plan.model.parameter_count / 1e9:.2f} B parameters, {work.global_batch:,} sequences of "
        f"{work.sequence_length:,} tokens a step, {text(work.precision)}, {text(work.optimizer)}; "
        f"{plan.cluster.nodes:,} {'node' if plan.cluster.nodes == 1 else 'nodes'} of "
        f"{plan.cluster.devices_per_node}.</p>" + definition_list(facts)
    )


def _time(plan: Plan) -> str:
    step = plan.prediction.step_seconds
    parts = {
        name: seconds
        for name, seconds in plan.prediction.breakdown.model_dump().items()
        if seconds / step >= 5e-5
    }
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    rows = [
        (
            Cell(f'<i class="{TIME_COLOURS[name]}"></i>{text(TIME_NAMES[name])}', TIME_NAMES[name]),
            Cell(text(seconds_words(seconds)), seconds),
            Cell(f"{seconds / step * 100:.1f} %", seconds),
        )
        for name, seconds in ordered
    ]
    whole = bar(
        Part(TIME_NAMES[name], TIME_COLOURS[name], seconds / step, seconds_words(seconds))
        for name, seconds in parts.items()
    )
    where = "<p>Of the pipeline rank that decides the step; the parts add up to it.</p>"
    return where + whole + table("Parts of a step", ("part", "time", "share"), rows)


def _memory(plan: Plan) -> str:
    capacity = plan.prediction.capacity_bytes
    ranks = [stages_of_rank(plan, rank)[0] for rank in range(plan.layout.pipeline)]
    full = max(capacity, plan.prediction.peak_memory_bytes)
    rows = []
    for stage in ranks:
        parts = stage.memory.model_dump()
        picture = bar(
            Part(MEMORY_NAMES[n], colour, parts[n] / full, f"{parts[n] / GIB:.2f} GiB")
            for n, colour in MEMORY_COLOURS.items()
        )
        free = (capacity - stage.memory_bytes) / GIB
        rows.append(
            (
                Cell(str(stage.pipeline_rank), stage.pipeline_rank),
                Cell(picture),
                number(stage.memory_bytes, ".1f", scale=1 / GIB),
                Cell(f"{free:.1f}", free),
            )
        )
    largest = max(ranks, key=lambda stage: stage.memory_bytes)
    ordered = sorted(largest.memory.model_dump().items(), key=lambda part: -part[1])
    detail = [
        (
            Cell(f'<i class="{MEMORY_COLOURS[name]}"></i>{text(MEMORY_NAMES[name])}', name),
            number(size, ".2f", scale=1 / GIB),
            number(size / largest.memory_bytes * 100, ".1f"),
        )
        for name, size in ordered
    ]
    return (
        f"<p>Peak of one device of each pipeline rank. A plan may use {capacity / GIB:.1f} GiB: "
        "the full width.</p>"
        + legend((MEMORY_NAMES[name], colour) for name, colour in MEMORY_COLOURS.items())
        + table(
            "Memory of each pipeline rank",
            ("rank", "memory", "GiB", "GiB free"),
            rows,
        )
        + table(f"Parts of rank {largest.pipeline_rank}, the fullest", ("part", "GiB", "%"), detail)
    )


def _stages(plan: Plan) -> str:
    rows = [
        (
            Cell(str(stage.index), stage.index),
            Cell(str(stage.pipeline_rank), stage.pipeline_rank),
            Cell(str(stage.layers), stage.layers),
            Cell(text(_span(stage.modules))),
            Cell(text(recompute_words(stage.recompute))),
            number(stage.forward_seconds, ".3f", scale=1e3),
            number(stage.backward_seconds, ".3f", scale=1e3),
            number(stage.recompute_seconds, ".3f", scale=1e3),
            number(
                stage.forward_exchange_seconds + stage.backward_exchange_seconds, ".3f", scale=1e3
            ),
            number(stage.transfer_seconds, ".3f", scale=1e3),
            number(stage.step_exchange_seconds, ".3f", scale=1e3),
            number(stage.optimizer_seconds, ".3f", scale=1e3),
        )
        for stage in plan.stages
    ]
    heads = (
        "stage",
        "rank",
        "layers",
        "modules",
        "recompute",
        "forward",
        "backward",
        "of it recompute",
        "collectives",
        "send",
        "once: exchange",
        "once: optimizer",
    )
    said = "<p>Milliseconds; of one micro-batch, the last two columns once a step.</p>"
    return said + table("Stages", heads, rows, filtered=len(rows) > 8)


def _span(modules: tuple[str, ...]) -> str:
    return modules[0] if len(modules) == 1 else f"{modules[0]} … {modules[-1]}" if modules else ""


def _runner_ups(plan: Plan) -> str:
    seen = plan.prediction
    if not plan.runner_ups:
        return "<p>None: nothing else was costed.</p>"
    rows = [
        (
            Cell("the plan", 0),
            Cell(text(layout_words(plan.layout))),
            number(seen.step_seconds, ".4g"),
            Cell("", 0),
            number(seen.simulated_seconds, ".4g"),
            number(seen.peak_memory_bytes, ".1f", scale=1 / GIB),
        )
    ]
    for place, other in enumerate(plan.runner_ups, start=1):
        slower = other.step_seconds / seen.step_seconds - 1
        words = f'<div class="words">{text(layout_words(other.layout))}</div>'
        rows.append(
            (
                Cell(str(place), place),
                Cell(words + folded("command", command(estimate_command(plan, other.layout)))),
                number(other.step_seconds, ".4g"),
                Cell(f"+{slower * 100:.2f} %", slower),
                number(other.simulated_seconds, ".4g"),
                number(other.peak_memory_bytes, ".1f", scale=1 / GIB),
            )
        )
    heads = ("place", "layout", "step, s", "slower", "replayed, s", "GiB")
    return _sentences(replay_lines(plan)) + table("The plan and what came close", heads, rows)


def _sentences(lines: Iterable[str]) -> str:
    return "".join(f"<p>{text(line[:1].upper() + line[1:])}.</p>" for line in lines)


def _proof(plan: Plan) -> str:
    skipped = set(replay_lines(plan))
    said = [line for line in closing_lines(plan) if line not in skipped]
    body = _sentences(said)
    if not plan.proof.excluded:
        return body
    rows = [
        (Cell(text(reason)), Cell(f"{count:,}", count))
        for reason, count in sorted(plan.proof.excluded.items(), key=lambda item: -item[1])
    ]
    return body + table(
        "Impossible combinations", ("reason", "layouts"), rows, filtered=len(rows) > 8
    )


def _inputs(plan: Plan) -> str:
    model, cluster = plan.model, plan.cluster
    facts = [
        ("Model", f"{text(model.name)} ({text(model.architecture)})"),
        ("Parameters", f"{model.parameter_count:,} ({model.trainable_parameter_count:,} trained)"),
        ("Config", f"<code>{text(model.config_sha256[:16])}…</code>"),
        (
            "Cluster",
            f"{text(cluster.name)}, profile <code>{text(cluster.cluster_sha256[:16])}…</code>",
        ),
        (
            "Device",
            f"{text(cluster.device)}, profile <code>{text(cluster.device_sha256[:16])}…</code>",
        ),
        ("Assumed", text("; ".join(plan.assumptions) or "nothing")),
        ("paraplan", text(plan.tool_version)),
    ]
    keep = '<p><button type="button" id="save" hidden>Save the plan file</button></p>'
    again = "<p>Ask again:</p>" + command(shlex.join(plan_command(plan)))
    return definition_list(facts) + again + keep


def report_page(path: str) -> str:
    """The page of a plan file, or of a sweep: the file says which it is.

    Raises:
        InputError: it cannot be read, or is neither.
    """
    from paraplan.page_sweep import sweep_page
    from paraplan.what_if_file import load_what_if

    raw = read_small_file(path, "plan or what-if")
    try:
        kind = json.loads(raw)["kind"]
    except (ValueError, RecursionError, KeyError, TypeError):
        kind = None  # a plan has no such key; whatever else it is, `plan_from_json` says
    return (
        sweep_page(load_what_if(path))
        if kind == "what-if"
        else plan_page(plan_from_json(raw, name=path))
    )


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``plan report``."""
    parser.add_argument("file", metavar="PLAN|WHATIF", help="a plan file, or what `what-if` wrote")
    parser.add_argument(
        "-o", "--output", metavar="FILE", default="report.html", help="default report.html"
    )


def run_report(options: argparse.Namespace) -> int:
    """``plan report``: write the page.

    Raises:
        InputError: the file cannot be read, or the page not written.
    """
    written = report_page(options.file)
    if options.output == "-":
        print(written, end="")
        return 0
    write_atomically(options.output, written)
    print(f"wrote {options.output} ({len(written.encode()) / 1024:,.0f} KiB)")
    return 0
