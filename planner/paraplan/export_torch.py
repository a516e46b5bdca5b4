"""Plans as configuration of torch-based launchers: torchtitan, accelerate, DeepSpeed.

Each function returns the file and notes on what of the plan the target cannot express. Field names
are those of torchtitan 0.3, accelerate 1.15 and DeepSpeed 0.19.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

from paraplan.plan_file import Plan

TORCHTITAN_RECIPES = {
    "llama-3-8b": ("llama3", "llama3_8b"),
    "llama-3-70b": ("llama3", "llama3_70b"),
    "llama-3-405b": ("llama3", "llama3_405b"),
    "deepseek-v3": ("deepseek_v3", "deepseek_v3_671b"),
}
"""Presets that torchtitan has too: its module and recipe."""

TORCHTITAN_DEBUG = ("llama3", "llama3_debugmodel")


class Exported(NamedTuple):
    """A launch configuration.

    Attributes:
        file_name: what the file is usually called.
        text: its content, notes included as comments where the format has them.
        launch: the command that uses it.
        notes: what the target does not do as the plan says.
    """

    file_name: str
    text: str
    launch: str
    notes: tuple[str, ...]


def torchrun(plan: Plan, rest: str) -> str:
    """A command that starts every rank; run on each node."""
    cluster = plan.cluster
    if cluster.nodes == 1:
        return f"torchrun --standalone --nproc-per-node {cluster.devices} {rest}"
    return (
        f"torchrun --nnodes {cluster.nodes} --nproc-per-node {cluster.devices_per_node} "
        f"--rdzv-backend c10d --rdzv-endpoint HEAD_NODE:29500 {rest}"
    )


def comments(plan: Plan, launch: str, notes: tuple[str, ...]) -> str:
    """The head of a file in which ``#`` begins a comment."""
    lines = [
        f"paraplan: {plan.model.name} on {plan.cluster.devices} x {plan.cluster.device}, predicted "
        f"{plan.prediction.step_seconds:.4g} s a step",
        f"start: {launch}",
        *(f"note: {note}" for note in notes),
    ]
    return "".join(f"# {' '.join(line.split())}\n" for line in lines)


def recompute_modes(plan: Plan) -> set[str]:
    """The recompute modes of the plan's layers."""
    return {mode for stage in plan.stages for mode in stage.recompute}


def even_stages(plan: Plan) -> bool:
    """Whether all (virtual) stages hold the same number of layers."""
    return len({stage.layers for stage in plan.stages}) == 1


def strongest_recompute(plan: Plan) -> tuple[str, list[str]]:
    """One recompute mode for all layers that needs no more memory; a note if the plan mixes."""
    modes = recompute_modes(plan)
    chosen = next((mode for mode in ("full", "selective") if mode in modes), "none")
    if len(modes) <= 1:
        return chosen, []
    note = f"one recompute mode for all layers: {chosen} everywhere, slower than planned"
    return chosen, [note]


def to_torchtitan(plan: Plan) -> Exported:
    """A Python module with a recipe function, as torchtitan 0.3 takes them."""
    layout, work = plan.layout, plan.workload
    mode, notes = strongest_recompute(plan)
    known = TORCHTITAN_RECIPES.get(plan.model.name)
    module, recipe = known or TORCHTITAN_DEBUG
    if known is None:
        notes.append(f"torchtitan has no recipe for {plan.model.name}: put yours for {recipe}")
    if layout.zero_stage in (1, 2):
        notes.append(
            f"ZeRO-{layout.zero_stage} becomes FSDP2 that keeps parameters gathered after forward"
        )
    if work.precision == "fp16":
        notes.append("torchtitan trains in bf16 or fp32, not fp16: bf16 is written")
    if work.optimizer != "adamw":
        notes.append(f"the recipe's optimizer stays; the plan is for {work.optimizer}")
    if layout.expert > 1:
        notes.append("torchtitan takes expert ranks from data shards and tensor ranks only")
    settings: dict[str, object] = {
        "training.seq_len": work.sequence_length,
        "training.local_batch_size": layout.micro_batch_size
        * (layout.micro_batches if layout.pipeline > 1 else 1),
        "training.global_batch_size": work.global_batch,
        "training.mixed_precision_param": "float32" if work.precision == "fp32" else "bfloat16",
        "parallelism.data_parallel_replicate_degree": layout.data_replicate,
        "parallelism.data_parallel_shard_degree": layout.data_shard,
        "parallelism.fsdp_reshard_after_forward": "always" if layout.zero_stage == 3 else "never",
        "parallelism.tensor_parallel_degree": layout.tensor,
        "parallelism.enable_sequence_parallel": layout.sequence_parallel,
        "parallelism.context_parallel_degree": layout.context,
        "parallelism.expert_parallel_degree": layout.expert,
        "parallelism.pipeline_parallel_degree": layout.pipeline,
    }
    if layout.pipeline > 1:
        settings["training.disable_cuda_graphs"] = True  # torchtitan refuses them in a pipeline
        schedule = "Interleaved1F1B" if layout.virtual_stages > 1 else "1F1B"
        settings["parallelism.pipeline_parallel_schedule"] = schedule
        settings["parallelism.pipeline_parallel_microbatch_size"] = layout.micro_batch_size
        settings["parallelism.module_fqns_per_model_part"] = _titan_modules(plan)
    policy = {"full": "FullAC.Config()", "selective": "SelectiveAC.Config()", "none": "None"}[mode]
    launch = torchrun(plan, "-m torchtitan.train --module torchtitan_plan --config planned")
    lines = "\n".join(f"    config.{name} = {value!r}" for name, value in settings.items())
    text = (
        f"{comments(plan, launch, tuple(notes))}"
        "from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC\n"
        f"from torchtitan.models.{module}.config_registry import {recipe}\n\n\n"
        f"def planned():\n    config = {recipe}()\n{lines}\n"
        f"    config.activation_checkpoint = {policy}\n    return config\n"
    )
    return Exported("torchtitan_plan.py", text, launch, tuple(notes))


def _titan_modules(plan: Plan) -> list[list[str]]:
    """torchtitan's names of what each (virtual) stage holds."""
    parts: list[list[str]] = []
    layer = 0
    for stage in plan.stages:
        names = [f"layers.{layer + i}" for i in range(stage.layers)]
        layer += stage.layers
        first = ["tok_embeddings"] if not parts else []
        last = ["norm", "lm_head"] if len(parts) == len(plan.stages) - 1 else []
        parts.append([*first, *names, *last])
    return parts


def to_accelerate(plan: Plan) -> Exported:
    """A file for ``accelerate launch --config_file``: FSDP2, or Megatron-LM with a pipeline."""
    layout, cluster = plan.layout, plan.cluster
    mode, notes = strongest_recompute(plan)
    config: dict[str, object] = {
        "compute_environment": "LOCAL_MACHINE",
        "num_machines": cluster.nodes,
        "num_processes": cluster.devices,
        "machine_rank": 0,
        "main_training_function": "main",
        "mixed_precision": "no" if plan.workload.precision == "fp32" else plan.workload.precision,
        "rdzv_backend": "static",
    }
    if layout.pipeline > 1:
        config |= _accelerate_megatron(plan, mode, notes)
    else:
        config |= _accelerate_fsdp(plan, mode, notes)
        notes.append(
            f"gradient accumulation is set in the script: Accelerator(gradient_accumulation_steps="
            f"{layout.micro_batches}), {layout.micro_batch_size} sequences a batch and process"
        )
    if cluster.nodes > 1:
        notes.append("give --machine_rank and --main_process_ip on each node")
    if layout.expert > 1 and layout.pipeline == 1:
        notes.append("accelerate's FSDP2 has no expert parallelism")
    launch = "accelerate launch --config_file accelerate.yaml train.py"
    text = comments(plan, launch, tuple(notes)) + yaml_lines(config)
    return Exported("accelerate.yaml", text, launch, tuple(notes))


def _accelerate_fsdp(plan: Plan, mode: str, notes: list[str]) -> dict[str, object]:
    layout = plan.layout
    if layout.devices == layout.data_replicate:
        return {"distributed_type": "MULTI_GPU" if layout.devices > 1 else "NO"}
    if layout.data_replicate > 1 and layout.data_shard == 1:
        notes.append("accelerate refuses replicas beside tensor or context ranks without shards")
    if mode == "selective":
        notes.append("accelerate recomputes whole layers or none: full is written")
    if layout.zero_stage in (1, 2):
        notes.append(f"ZeRO-{layout.zero_stage} becomes FSDP2 without resharding after forward")
    if layout.sequence_parallel:
        notes.append("sequence parallelism follows the model's own tensor-parallel plan")
    return {
        "distributed_type": "FSDP",
        "fsdp_config": {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_reshard_after_forward": layout.zero_stage == 3,
            "fsdp_activation_checkpointing": mode != "none",
        },
        "parallelism_config": {
            "parallelism_config_dp_replicate_size": layout.data_replicate,
            "parallelism_config_dp_shard_size": layout.data_shard,
            "parallelism_config_tp_size": layout.tensor,
            "parallelism_config_cp_size": layout.context,
        },
    }


def _accelerate_megatron(plan: Plan, mode: str, notes: list[str]) -> dict[str, object]:
    layout = plan.layout
    if layout.virtual_stages > 1 or not even_stages(plan):
        notes.append("accelerate's Megatron plugin takes equal stages, not those of the plan")
    if layout.zero_stage in (2, 3):
        notes.append(f"ZeRO-{layout.zero_stage} becomes ZeRO-1, which needs more memory")
    if layout.data_replicate > 1 and layout.data_shard > 1:
        notes.append("the distributed optimizer shards over all data ranks, replicas included")
    settings: dict[str, object] = {
        "megatron_lm_tp_degree": layout.tensor,
        "megatron_lm_pp_degree": layout.pipeline,
        "megatron_lm_num_micro_batches": layout.micro_batches,
        "megatron_lm_sequence_parallelism": layout.sequence_parallel,
        "megatron_lm_use_distributed_optimizer": layout.zero_stage > 0,
        "megatron_lm_recompute_activations": mode == "selective",
        "megatron_lm_gradient_clipping": 1.0,
        "megatron_lm_context_parallel_size": layout.context,
        "megatron_lm_expert_model_parallel_size": layout.expert,
    }
    if mode == "full":
        settings["megatron_lm_recompute_granularity"] = "full"
        settings["megatron_lm_recompute_method"] = "block"
        most = max(stage.recompute.count("full") for stage in plan.stages)
        settings["megatron_lm_recompute_num_layers"] = most
    return {"distributed_type": "MEGATRON_LM", "megatron_lm_config": settings}


def yaml_lines(values: Mapping[str, object], indent: str = "") -> str:
    """Nested mappings as block YAML; scalars are JSON's, which YAML reads alike."""
    lines = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            lines.append(f"{indent}{name}:\n{yaml_lines(value, indent + '  ')}")
        else:
            lines.append(f"{indent}{name}: {json.dumps(value)}\n")
    return "".join(lines)


def to_deepspeed(plan: Plan) -> Exported:
    """A DeepSpeed JSON configuration."""
    layout, work = plan.layout, plan.workload
    mode, notes = strongest_recompute(plan)
    config: dict[str, object] = {
        "train_batch_size": work.global_batch,
        "train_micro_batch_size_per_gpu": layout.micro_batch_size,
        "gradient_accumulation_steps": layout.micro_batches,
        "bf16": {"enabled": work.precision == "bf16"},
        "fp16": {"enabled": work.precision == "fp16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_clipping": 1.0,
    }
    zero: dict[str, object] = {"stage": layout.zero_stage, "overlap_comm": True}
    if layout.data_replicate > 1 and layout.zero_stage:
        notes.append("DeepSpeed shards over all data ranks: no replicas of the shards")
    if layout.pipeline > 1 and layout.zero_stage > 1:
        zero["stage"] = 1
        notes.append("DeepSpeed's pipeline goes with ZeRO-1 at most: 1 is written")
    config["zero_optimization"] = zero
    if layout.tensor > 1:
        config["tensor_parallel"] = {"autotp_size": layout.tensor}
        if layout.sequence_parallel:
            notes.append("AutoTP keeps norms and residuals whole: no sequence parallelism")
    if layout.pipeline > 1:
        notes.append(
            f"stages are built in the script: PipelineModule(layers, num_stages={layout.pipeline})"
        )
        if layout.virtual_stages > 1 or not even_stages(plan):
            notes.append("DeepSpeed partitions equal stages without virtual ones")
    if layout.context > 1 or layout.expert > 1:
        notes.append("context (Ulysses) and expert groups are made in the script")
    if mode != "none":
        notes.append(f"{mode} recomputation is switched on in the model, not here")
    launch = (
        f"deepspeed --num_nodes {plan.cluster.nodes} --num_gpus {plan.cluster.devices_per_node} "
        "train.py --deepspeed --deepspeed_config deepspeed.json"
    )
    # JSON has no comments; DeepSpeed reads the keys it knows and leaves others alone.
    about = {"paraplan": [f"{plan.model.name} on {plan.cluster.devices} x {plan.cluster.device}"]}
    about["paraplan"] += notes
    text = json.dumps(about | config, indent=2) + "\n"
    return Exported("deepspeed.json", text, launch, tuple(notes))
