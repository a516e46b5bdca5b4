"""`plan export`: each file is read by the target's own reader where that is installed.

The readers are not dependencies of the tests: what is not installed is skipped by name.
docs/export.md says which versions all of this was checked against.
"""

from __future__ import annotations

import importlib
import json
import sys
import types
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from made_plans import made_plan

from paraplan.cli import main
from paraplan.export import TARGETS
from paraplan.export_megatron import pipeline_layout
from paraplan.layout import Layout, mesh_axes
from paraplan.plan_file import Plan, save_plan

LAYOUTS: dict[str, Layout] = {
    "replicas": Layout(data_replicate=8, micro_batches=2),
    "zero-1": Layout(data_shard=8, zero_stage=1, micro_batches=2),
    "zero-3": Layout(data_shard=8, zero_stage=3, micro_batches=2, micro_batch_size=3),
    "hybrid": Layout(data_replicate=2, data_shard=4, zero_stage=3, micro_batches=4),
    "tensor": Layout(data_shard=2, zero_stage=2, tensor=4, sequence_parallel=True, micro_batches=4),
    "context": Layout(data_shard=4, zero_stage=1, context=2, micro_batches=2),
    "1f1b": Layout(pipeline=2, schedule="1f1b", data_shard=4, zero_stage=1, micro_batches=8),
    "interleaved": Layout(
        pipeline=2,
        virtual_stages=3,
        schedule="interleaved-1f1b",
        tensor=2,
        data_shard=2,
        zero_stage=1,
        micro_batches=8,
    ),
}
RECOMPUTE = ("none", "selective", "full", "mixed")


@cache
def source_plan() -> Plan:
    """What the plans below are made from."""
    return made_plan()


def plan_with(layout: Layout, recompute: str = "none", **changes: Any) -> Plan:
    """A plan of six layers on eight devices with this layout, consistent in itself."""
    source = source_plan()
    count = layout.pipeline * layout.virtual_stages
    sizes = [6 // count] * count
    if layout.schedule == "1f1b":
        sizes = [2, 4]
    stages, layer = [], 0
    for index, size in enumerate(sizes):
        modules = [f"layers.{layer + i}" for i in range(size)]
        layer += size
        modules = ["embed"] * (index == 0) + modules + ["head"] * (index == count - 1)
        modes = (recompute,) * size
        if recompute == "mixed":
            modes = tuple("full" if i % 2 else "none" for i in range(layer - size, layer))
        stages.append(
            source.stages[0].model_copy(
                update={
                    "index": index,
                    "pipeline_rank": index % layout.pipeline,
                    "modules": tuple(modules),
                    "layers": size,
                    "recompute": modes,
                }
            )
        )
    update = {
        "layout": layout,
        "mesh": mesh_axes(layout),
        "stages": tuple(stages),
        "cluster": source.cluster.model_copy(
            update={"devices": 8, "devices_per_node": 8, "nodes": 1}
        ),
        "workload": source.workload.model_copy(update={"global_batch": layout.global_batch}),
        "prediction": source.prediction.model_copy(
            update={"peak_memory_bytes": source.stages[0].memory_bytes}
        ),
    }
    plan = source.model_copy(update=update | changes)
    return Plan.model_validate(plan.model_dump())


CASES = [(layout, mode) for layout in LAYOUTS.values() for mode in RECOMPUTE]


def reader(module: str) -> Any:
    """A target's module, or a skip that says what was not checked, where something is missing.

    Raises:
        ImportError: it is installed with all it needs, and does not have this module any more.
    """
    target = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing != target and missing.startswith(f"{target}."):
            raise
        pytest.skip(f"not checked by {target}'s own reader: {error}")


def test_accelerate(tmp_path: Path) -> None:
    from accelerate.commands import launch  # in the test extra, through peft: never skipped
    from accelerate.commands.config import config_args

    for layout, mode in CASES:
        plan = plan_with(layout, mode)
        file = tmp_path / "accelerate.yaml"
        file.write_text(TARGETS["accelerate"](plan).text)
        config = config_args.load_config_from_file(str(file))
        assert (config.num_processes, config.num_machines) == (8, 1)
        # The launcher's own parser must know every nested key as an option.
        known = {action.dest for action in launch.launch_command_parser()._actions}
        nested = config.fsdp_config | config.megatron_lm_config | config.parallelism_config
        assert set(nested) <= known
        if config.parallelism_config:
            sizes = [v for v in config.parallelism_config.values() if isinstance(v, int)]
            product = 1
            for size in sizes:
                product *= size
            assert product == 8
        if config.megatron_lm_config:
            assert config.megatron_lm_config["megatron_lm_pp_degree"] == layout.pipeline


def test_torchtitan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe function runs on torchtitan's own dataclasses, and sets only fields they have."""
    config = reader("torchtitan.config.configs")
    for layout, mode in CASES:
        made = types.SimpleNamespace(
            training=config.TrainingConfig(), parallelism=config.ParallelismConfig()
        )
        policies = types.ModuleType("activation_checkpoint")
        for name in ("FullAC", "SelectiveAC"):
            setattr(policies, name, types.SimpleNamespace(Config=lambda name=name: name))
        recipes = types.ModuleType("config_registry")
        recipes.llama3_debugmodel = lambda made=made: made  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "torchtitan.distributed.activation_checkpoint", policies)
        monkeypatch.setitem(sys.modules, "torchtitan.models.llama3.config_registry", recipes)
        plan = plan_with(layout, mode)
        space: dict[str, Any] = {}
        exec(TARGETS["torchtitan"](plan).text, space)
        planned = space["planned"]()
        for part in (planned.training, planned.parallelism):
            names = {field.name for field in fields(part)}
            # Dataclasses with slots refuse others by themselves.
            assert set(getattr(part, "__dict__", {})) <= names
        degrees = planned.parallelism
        assert (
            degrees.data_parallel_replicate_degree
            * degrees.data_parallel_shard_degree
            * degrees.tensor_parallel_degree
            * degrees.context_parallel_degree
            * degrees.pipeline_parallel_degree
        ) == 8
        assert planned.training.global_batch_size == layout.global_batch
        if layout.pipeline > 1:
            parts = degrees.module_fqns_per_model_part
            assert [sum(n.startswith("layers.") for n in part) for part in parts] == [
                stage.layers for stage in plan.stages
            ]
            names = [name for part in parts for name in part]
            assert names[0] == "tok_embeddings" and names[-2:] == ["norm", "lm_head"]
            per_step = (
                planned.training.local_batch_size // degrees.pipeline_parallel_microbatch_size
            )
            assert per_step == layout.micro_batches
        wanted = {"none": None, "selective": "SelectiveAC", "full": "FullAC", "mixed": "FullAC"}[
            mode
        ]
        assert planned.activation_checkpoint == wanted


def test_torchtitan_reads_a_known_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through torchtitan's ConfigManager, command line and checks of the whole and all."""
    manager = reader("torchtitan.config.manager")
    reader("torchtitan.models.llama3.config_registry")
    monkeypatch.syspath_prepend(str(tmp_path))
    for number, (layout, mode) in enumerate(CASES):
        plan = plan_with(layout, mode)
        named = plan.model.model_copy(update={"name": "llama-3-8b"})
        text = TARGETS["torchtitan"](plan.model_copy(update={"model": named})).text
        (tmp_path / f"planned_{number}.py").write_text(text)
        arguments = ["--module", f"planned_{number}", "--config", "planned"]
        config = manager.ConfigManager().parse_args(arguments)
        assert config.parallelism.pipeline_parallel_degree == layout.pipeline
        assert config.training.global_batch_size == layout.global_batch


def megatron_arguments(text: str) -> dict[str, str]:
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return dict(line.removeprefix("--").partition(" ")[::2] for line in lines)


def test_megatron() -> None:
    """megatron-core's TransformerConfig checks what the arguments set, and reads the layout."""
    transformer = reader("megatron.core.transformer.transformer_config")
    parallel = reader("megatron.core.distributed")
    import torch

    for layout, mode in CASES:
        plan = plan_with(layout, mode)
        given = megatron_arguments(TARGETS["megatron"](plan).text)
        known = {field.name for field in fields(transformer.TransformerConfig)}
        known |= {field.name for field in fields(parallel.DistributedDataParallelConfig)}
        training = {"micro-batch-size", "global-batch-size", "seq-length", "optimizer"}
        assert {name.replace("-", "_") for name in set(given) - training} <= known

        def whole(name: str, given: dict[str, str] = given) -> int:
            return int(given.get(name, "1"))

        config = transformer.TransformerConfig(
            num_layers=whole("num-layers"),
            hidden_size=64,
            num_attention_heads=8,
            tensor_model_parallel_size=whole("tensor-model-parallel-size"),
            pipeline_model_parallel_size=whole("pipeline-model-parallel-size"),
            context_parallel_size=whole("context-parallel-size"),
            pipeline_model_parallel_layout=given.get("pipeline-model-parallel-layout"),
            pipeline_dtype=torch.bfloat16,
            sequence_parallel="sequence-parallel" in given,
            recompute_granularity=given.get("recompute-granularity"),
            recompute_method=given.get("recompute-method"),
            recompute_num_layers=(
                whole("recompute-num-layers") if "recompute-num-layers" in given else None
            ),
            recompute_modules=(
                given["recompute-modules"].split() if "recompute-modules" in given else None
            ),
            bf16=True,
        )
        if layout.pipeline > 1:
            stages = config.pipeline_model_parallel_layout
            assert stages.virtual_pipeline_model_parallel_size == layout.virtual_stages
            counts = [
                sum(kind.name == "decoder" for kind in stages.layout[rank][chunk])
                for chunk in range(layout.virtual_stages)
                for rank in range(layout.pipeline)
            ]
            assert counts == [stage.layers for stage in plan.stages]


def test_megatron_layout_is_the_plans_cuts() -> None:
    assert pipeline_layout(plan_with(LAYOUTS["1f1b"])) == "Ett|ttttL"
    assert pipeline_layout(plan_with(LAYOUTS["interleaved"])) == "Et|t|t|t|t|tL"


def test_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = reader("deepspeed.runtime.config")
    monkeypatch.setattr(config.dist, "get_rank", lambda group=None: 0)  # as if the job ran
    for layout, mode in CASES:
        text = TARGETS["deepspeed"](plan_with(layout, mode)).text
        (tmp_path / "deepspeed.json").write_text(text)

        ranks = types.SimpleNamespace(
            get_data_parallel_world_size=lambda count=layout.data_ranks: count
        )
        read = config.DeepSpeedConfig(str(tmp_path / "deepspeed.json"), mpu=ranks)
        assert read.train_batch_size == layout.global_batch
        assert read.gradient_accumulation_steps == layout.micro_batches
        assert read.zero_config.stage == (min(layout.zero_stage, 1 if layout.pipeline > 1 else 3))


def nested_keys(text: str) -> dict[str, set[str]]:
    """Section -> names, of the YAML that the exporter writes."""
    sections: dict[str, set[str]] = {}
    section = ""
    for line in text.splitlines():
        name = line.partition(":")[0]
        if line.startswith("  "):
            sections[section].add(name.strip())
        elif not line.startswith("#"):
            section = name
            sections[section] = set()
    return sections


def test_nemo() -> None:
    """Every override is a field of Megatron Bridge's configuration."""
    bridge = reader("megatron.bridge.training.config")
    transformer = reader("megatron.core.transformer.transformer_config")
    for layout, mode in CASES:
        sections = nested_keys(TARGETS["nemo"](plan_with(layout, mode)).text)
        containers = {
            "model": {f.name for f in fields(transformer.TransformerConfig)} | {"seq_length"},
            "train": {f.name for f in fields(bridge.TrainingConfig)},
            "dataset": {f.name for f in fields(bridge.GPTDatasetConfig)} | {"seq_length"},
            "ddp": {f.name for f in fields(bridge.DistributedDataParallelConfig)},
            "optimizer": {f.name for f in fields(bridge.OptimizerConfig)},
            "mixed_precision": set[str](),
        }
        assert set(sections) <= {f.name for f in fields(bridge.ConfigContainer)}
        for section, names in sections.items():
            assert names <= containers[section]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("layout", "mode"), CASES)
def test_what_cannot_be_said_is_noted(target: str, layout: Layout, mode: str) -> None:
    made = TARGETS[target](plan_with(layout, mode))
    for note in made.notes:
        if target == "deepspeed":
            assert note in json.loads(made.text)["paraplan"]
        else:
            assert f"# note: {note}\n" in made.text
        assert "\n" not in note
    assert str(layout.global_batch) in made.text or target == "accelerate"
    text = " ".join(made.notes)
    if mode == "mixed" and target in ("torchtitan", "accelerate", "deepspeed"):
        assert "one recompute mode" in text
    if layout.pipeline > 1 and target in ("accelerate", "deepspeed"):
        assert "equal stages" in text
    if layout.zero_stage == 1 and target == "torchtitan":
        assert "ZeRO-1 becomes" in text


def test_names_cannot_leave_their_comment() -> None:
    plan = plan_with(LAYOUTS["zero-1"])
    evil = "x\nimport os\r\nevil: 1\x85--evil\u2028y"
    plan = plan.model_copy(update={"model": plan.model.model_copy(update={"name": evil})})
    for target, export in TARGETS.items():
        for line in export(plan).text.splitlines():
            assert line.lstrip().startswith(("#", '"')) or "evil" not in line, (target, line)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "p.json")
    save_plan(plan_with(LAYOUTS["1f1b"]), file)
    for target in TARGETS:
        assert main(["export", file, "--to", target]) == 0
        out, err = capsys.readouterr()
        assert out.strip() and all(line.startswith("note: ") for line in err.splitlines())
        assert main(["export", file, "--to", target, "-o", str(tmp_path / target)]) == 0
        assert (tmp_path / target).read_text() == out
        assert "start with" in capsys.readouterr().out
        assert main(["export", file, "--to", target, "--json"]) == 0
        notes = json.loads(capsys.readouterr().out)["notes"]
        assert main(["export", file, "--to", target, "--csv"]) == 0
        assert len(capsys.readouterr().out.splitlines()) == (1 + len(notes) if notes else 0)
    assert main(["export", file, "--to", "horovod"]) == 2
    assert main(["export", file]) == 2
    assert main(["export", str(tmp_path / "none"), "--to", "nemo"]) == 2
