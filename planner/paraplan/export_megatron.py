"""Plans as configuration of Megatron: arguments of Megatron-LM, overrides of NeMo's recipes.

Names are those of Megatron-LM (megatron-core 0.16) and Megatron Bridge 0.3, which holds NeMo's
recipes for language models. Both number their ranks as the plan does: tensor ranks innermost,
pipeline ranks outermost.
"""

from __future__ import annotations

from paraplan.export_torch import Exported, comments, recompute_modes, torchrun, yaml_lines
from paraplan.plan_file import Plan

SHARDING = {1: "optim", 2: "optim_grads", 3: "optim_grads_params"}
"""Megatron FSDP's name for each ZeRO stage."""


def pipeline_layout(plan: Plan) -> str:
    """The stages as Megatron writes them: ``Ettt|ttt|ttt|tttL``, exactly as the plan cuts."""
    parts = ["t" * stage.layers for stage in plan.stages]
    parts[0] = "E" + parts[0]
    parts[-1] += "L"
    return "|".join(parts)


def _recompute(plan: Plan, notes: list[str]) -> dict[str, object]:
    modes = recompute_modes(plan)
    if modes == {"none"}:
        return {}
    most = max(len(stage.recompute) - stage.recompute.count("none") for stage in plan.stages)
    if "full" in modes:
        if len(modes) > 1 or any(set(stage.recompute) != {"full"} for stage in plan.stages):
            notes.append(
                f"the same number of layers recomputes fully in each stage: {most}, the most of any"
            )
        return {
            "recompute_granularity": "full",
            "recompute_method": "block",
            "recompute_num_layers": most,
        }
    notes.append(
        "Megatron's selective recomputation runs attention, norms and the MLP's activation again, "
        "in all layers; the plan's keeps matrix products and attention"
    )
    return {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "layernorm"]}


def _data_parallel(plan: Plan, notes: list[str]) -> dict[str, object]:
    layout = plan.layout
    if not layout.zero_stage:
        return {}
    settings: dict[str, object] = {"use_distributed_optimizer": True}
    if layout.data_replicate > 1:
        settings["num_distributed_optimizer_instances"] = layout.data_replicate
    if layout.zero_stage > 1:
        settings["use_megatron_fsdp"] = True
        settings["data_parallel_sharding_strategy"] = SHARDING[layout.zero_stage]
        if layout.pipeline > 1:
            notes.append("Megatron FSDP beside a pipeline is not supported by every release")
    return settings


def _model(plan: Plan, notes: list[str]) -> dict[str, object]:
    layout = plan.layout
    settings: dict[str, object] = {
        "tensor_model_parallel_size": layout.tensor,
        "sequence_parallel": layout.sequence_parallel,
        "pipeline_model_parallel_size": layout.pipeline,
        "context_parallel_size": layout.context,
        "expert_model_parallel_size": layout.expert,
    }
    if layout.pipeline > 1:
        settings["pipeline_model_parallel_layout"] = pipeline_layout(plan)
    if layout.virtual_stages > 1:
        settings["virtual_pipeline_model_parallel_size"] = layout.virtual_stages
        if layout.micro_batches % layout.pipeline:
            notes.append("Megatron interleaves whole rounds of micro-batches only")
    return settings | _recompute(plan, notes)


def _optimizer_note(plan: Plan, notes: list[str]) -> None:
    if plan.workload.optimizer not in ("adamw", "adam", "sgd"):
        notes.append(f"Megatron has no {plan.workload.optimizer}: memory will differ")


def to_megatron(plan: Plan) -> Exported:
    """A file of arguments for Megatron-LM's ``pretrain_gpt.py``."""
    work, notes = plan.workload, []  # type: ignore[var-annotated]
    settings = _model(plan, notes) | _data_parallel(plan, notes)
    settings.pop("virtual_pipeline_model_parallel_size", None)  # follows from the layout
    settings |= {
        "micro_batch_size": plan.layout.micro_batch_size,
        "global_batch_size": work.global_batch,
        "seq_length": work.sequence_length,
        "num_layers": sum(stage.layers for stage in plan.stages),
        "optimizer": "sgd" if work.optimizer.startswith("sgd") else "adam",
    }
    if work.precision != "fp32":
        settings[work.precision] = True
    notes.append("a plan does not hold the model's sizes: add --hidden-size and the like")
    _optimizer_note(plan, notes)
    launch = torchrun(plan, 'pretrain_gpt.py $(grep -v "^#" megatron.args)')
    lines = [line for name, value in settings.items() for line in _argument(name, value)]
    text = comments(plan, launch, tuple(notes)) + "\n".join(lines) + "\n"
    return Exported("megatron.args", text, launch, tuple(notes))


def _argument(name: str, value: object) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if value is True:
        return [flag]
    if value is False:
        return []
    if isinstance(value, list):
        return [f"{flag} {' '.join(map(str, value))}"]
    return [f"{flag} {value}"]


def to_nemo(plan: Plan) -> Exported:
    """A YAML of overrides for a recipe of Megatron Bridge, NeMo's library for language models."""
    layout, work = plan.layout, plan.workload
    notes: list[str] = []
    model = _model(plan, notes) | {"seq_length": work.sequence_length}
    config: dict[str, object] = {
        "model": model,
        "train": {
            "global_batch_size": work.global_batch,
            "micro_batch_size": layout.micro_batch_size,
        },
        "dataset": {"seq_length": work.sequence_length},
        "mixed_precision": {"bf16": "bf16_mixed", "fp16": "fp16_mixed", "fp32": None}[
            work.precision
        ],
    }
    data = _data_parallel(plan, notes)
    if data:
        config["ddp"] = data
    if layout.zero_stage:
        config["optimizer"] = {"use_distributed_optimizer": True}
    _optimizer_note(plan, notes)
    notes.append("overrides of a recipe: take that of your model, and its tokenizer and data")
    launch = torchrun(plan, "your_recipe.py --config-file nemo.yaml")
    text = comments(plan, launch, tuple(notes)) + yaml_lines(config)
    return Exported("nemo.yaml", text, launch, tuple(notes))
