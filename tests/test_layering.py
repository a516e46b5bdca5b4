"""Who may import whom: data flows one way, and planning needs neither torch nor the runtime."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PLANNER = ROOT / "planner" / "paraplan"

# Each module of the planner, lowest first: a module imports only from lines above its own.
ORDER = """
errors graph cpu_ranks
files layout
pipeline
plan_parts
plan_file
tables
profile_types
op_table
link_table
device
cluster
op_times collectives workload
models
trace
trace_cache
layout_rules recompute engine
layouts
data_copies
data_traffic
block_compute
block_cost
chain
stage_memory
stage_cost simulate
partition problem
best_cuts solver fitting
search
uncertainty
stage_times
describe
validate_frameworks calibrate_fit
validate_ops
validate_loss
validate_graph
validate_rows
validate_recompute
validate_model
validate_machines validate_layout
validate_predict validate_spread validate_plot
validate_statistics
validate
request
calibrate
planning
profile_tasks
profile_result
profile_rounds
measure
report
timeline explain
what_if_file
training_cost sizing sensitivity what_if_axes sweep
what_if_rows
what_if_options what_if_report
what_if_command
page_parts
page_mesh page_timeline page_chart
page_sweep
page
surroundings torch_option
own_profile
launch automatic
profiling
profile_command
rank_errors
one_line
run_script run_command
export_torch
export_megatron
export
check
listings argument_parsers
cli
"""
MAY_CALL_RUNTIME = {"check", "one_line"}
"""Modules in which planner and runtime meet; they import it where they call it."""
MAY_READ = {"cpu_ranks", "errors", "files", "layout", "plan_file"}
"""Modules of the planner that the runtime imports."""
HEAVY = {"torch", "transformers", "ortools", "networkx", "numpy", "rich", "safetensors"}
MAY_IMPORT_AT_TOP = {"report": {"rich"}, "explain": {"rich"}, "what_if_report": {"rich"}}


def imports(path: Path) -> list[tuple[str, bool]]:
    """Modules that a file imports, and whether at its top (type checking left out)."""
    tree = ast.parse(path.read_text())
    guarded = {
        id(node)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.If) and "TYPE_CHECKING" in ast.dump(outer.test)
        for node in ast.walk(outer)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node in tree.body) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, node in tree.body))
    return found


def _part(module: str) -> str:
    """The tracer's modules (``trace_attention`` and so on) are one part, what measures another."""
    inner = module.startswith("trace_") and module != "trace_cache"
    measures = module.startswith("measure_")
    return "trace" if inner else "measure" if measures else module


def test_planner_modules_import_only_from_lower_ones() -> None:
    order = {name: i for i, line in enumerate(ORDER.split("\n")) for name in line.split()}
    for path in PLANNER.glob("*.py"):
        if path.stem == "__init__":
            continue
        name = _part(path.stem)
        assert name in order, f"say in ORDER where {path.stem} stands"
        for module, at_top in imports(path):
            top, _, rest = module.partition(".")
            meets = name in MAY_CALL_RUNTIME and not at_top
            assert top != "paraplan_runtime" or meets, f"{path.stem} imports the runtime"
            if top == "paraplan" and rest:
                lower = order[_part(rest)] < order[name] or _part(rest) == name in (
                    "trace",
                    "measure",
                )
                assert lower, f"{path.stem} imports {rest}, which stands above it"


def test_nothing_heavy_is_imported_at_the_top() -> None:
    for path in PLANNER.glob("*.py"):
        if (path.stem.startswith("trace_") and path.stem != "trace_cache") or path.stem == "trace":
            continue  # the tracer is made of torch, and imported only to trace
        if path.stem.startswith("measure_"):
            continue  # made of torch too, and imported only to measure
        allowed = MAY_IMPORT_AT_TOP.get(path.stem, set())
        for module, at_top in imports(path):
            heavy = module.partition(".")[0] in HEAVY - allowed
            assert not (heavy and at_top), f"{path.stem} imports {module} at its top"


def test_runtime_imports_only_plans_and_errors() -> None:
    for path in (ROOT / "runtime" / "paraplan_runtime").glob("*.py"):
        for module, _ in imports(path):
            if module.partition(".")[0] == "paraplan":
                assert module.removeprefix("paraplan.") in MAY_READ, f"{path.name}: {module}"
