"""Plans that cannot be applied are refused in one line before anything is touched."""

from __future__ import annotations

import pytest
import torch
from kinds_work import applied_to_kinds, plan_on
from parity_cases import FAMILIES, PlainModel, build, make_plan
from rank_launch import run_ranks
from torch import nn

from paraplan.errors import InputError
from paraplan.layout import Layout
from paraplan_runtime.batch import schedule_accepts, split_rows, take_micro_batch
from paraplan_runtime.check import check_model, check_plan, misplaced_rank
from paraplan_runtime.stage import stage_paths
from paraplan_runtime.tensor import tensor_plan


def refusal(name: str, layout: Layout, model: nn.Module | None = None) -> str:
    model = model or build(name)
    plan = make_plan(name, layout)
    with pytest.raises(InputError) as caught:
        check_plan(plan)
        stages = stage_paths(plan, model)
        check_model(model, plan, stages)
        tensor_plan(model, plan, stages)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_layouts_that_no_model_can_run() -> None:
    assert "context" in refusal("llama", Layout(context=2))
    few = Layout(pipeline=4, schedule="1f1b", micro_batches=2)
    assert "at least as many as stages" in refusal("llama", few)


def test_degrees_that_do_not_divide() -> None:
    assert "num_key_value_heads(2)" in refusal("llama", Layout(tensor=4))


def test_models_without_a_tensor_plan() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 8)
            self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
            self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

    assert "base_model_tp_plan" in refusal("plain", Layout(tensor=2), Other())


def test_modules_that_may_mix_tokens_of_sequence_shards() -> None:
    class Mixes(PlainModel):
        def __init__(self) -> None:
            super().__init__()
            for layer in self.layers:
                layer.shift = nn.Conv2d(1, 1, 1)

    layout = Layout(tensor=2, sequence_parallel=True)
    assert "layers.0.shift (Conv2d) may mix tokens" in refusal("plain", layout, Mixes())


def test_plans_of_another_model() -> None:
    assert FAMILIES["gpt2"][0][0] in refusal("gpt2", Layout(), build("llama"))


def test_losses_that_do_not_add_up_over_rows() -> None:
    model = build("mixtral")
    model.config.output_router_logits = True  # type: ignore[union-attr]
    assert "output_router_logits" in refusal("mixtral", Layout(micro_batches=2), model)


def test_half_precision_parameters_under_a_plan_for_fp32() -> None:
    assert "torch.bfloat16" in refusal("llama", Layout(), build("llama").bfloat16())


@pytest.mark.parametrize("rows", [1, 3, 8, 13, 64])
@pytest.mark.parametrize(
    "layout",
    [
        Layout(data_replicate=2, micro_batch_size=2, micro_batches=2),
        Layout(pipeline=4, schedule="1f1b", micro_batch_size=2, micro_batches=4),
        Layout(pipeline=2, virtual_stages=2, schedule="interleaved-1f1b", micro_batches=4),
    ],
)
def test_every_row_is_computed_once_within_the_planned_micro_batch(
    rows: int, layout: Layout
) -> None:
    split = split_rows(rows, layout)
    assert split.micro_batch_size <= layout.micro_batch_size
    assert schedule_accepts(layout, split.micro_batches)
    batch = {"input_ids": torch.arange(rows)[:, None], "labels": torch.arange(rows)[:, None]}
    seen = []
    for rank in range(layout.data_ranks):
        for index in range(split.micro_batches):
            part = take_micro_batch(batch, split, rank, index, torch.device("cpu"))
            assert len(part["input_ids"]) == split.micro_batch_size
            seen += [int(label) for label in part["labels"] if label != -100]
    assert seen == list(range(rows))


def test_a_batch_of_the_planned_size_is_cut_as_planned() -> None:
    layout = Layout(data_replicate=2, micro_batch_size=2, micro_batches=3)
    split = split_rows(layout.global_batch, layout)
    assert (split.micro_batch_size, split.micro_batches) == (2, 3)


def test_architectures_in_the_shared_list() -> None:
    class Phi3ForCausalLM(type(build("llama"))):  # type: ignore[misc]
        """A model that bears a listed name."""

    model = build("llama")
    model.__class__ = Phi3ForCausalLM
    assert "tensor parallelism to Phi3ForCausalLM" in refusal("llama", Layout(tensor=2), model)


def test_nodes_of_two_kinds_in_the_wrong_order() -> None:
    """Every rank refuses, in the same line, before anything is split."""
    messages = run_ranks(2, applied_to_kinds, ("h100-sxm", "cpu"))
    assert messages[0] == messages[1]
    assert messages[0].startswith(
        "rank 0 runs on cpu, the plan has it on h100-sxm; start the nodes"
    )
    assert run_ranks(2, applied_to_kinds, ("cpu", "a100-80gb-sxm"))[0].startswith("rank 1 runs on")


def test_devices_are_told_apart_by_name() -> None:
    plan = plan_on("h100-sxm", "a100-80gb-sxm")
    h100, a100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"
    assert misplaced_rank(plan, [h100, a100]) is None
    assert misplaced_rank(plan, [a100, h100]) == 0
    assert misplaced_rank(plan, [h100, h100]) == 1
    # Of a name that is neither kind's, nothing is said.
    assert misplaced_rank(plan, ["NVIDIA GH200 480GB", "some device"]) is None
    same = plan_on("h100-sxm", "h100-96gb-500w")
    assert misplaced_rank(same, [h100, h100]) is None
