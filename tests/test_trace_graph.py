"""The FX graphs of traced blocks hold what the blocks' ops say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paraplan.graph import ModelGraph
from paraplan.models import ModelSource, resolve_model
from paraplan.trace import trace_model

TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    folder: Path = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(TINY))
    return resolve_model(str(folder))


def test_graphs_hold_the_ops(source: ModelSource) -> None:
    from paraplan.trace_graph import block_graphs

    question = {"sequence_length": 32, "compute_dtype": "bfloat16"}
    graphs = block_graphs(source, **question)  # type: ignore[arg-type]
    traced: ModelGraph = trace_model(source, tensor_degrees=(1,), **question)  # type: ignore[arg-type]
    assert set(graphs) == set(traced.blocks)
    for name, graph in graphs.items():
        graph.lint()
        ops = traced.blocks[name].variants[1].ops
        for phase in ("forward", "backward"):
            for kind in ("gemm", "attention"):
                nodes = [
                    node
                    for node in graph.nodes
                    if node.op == "call_function"
                    and node.meta["phase"] == phase
                    and node.meta["kernel"].kind == kind
                ]
                count = sum(op.count for op in ops if op.phase == phase and op.kind == kind)
                assert len(nodes) == count, f"{name} {phase} {kind}"
    layer = graphs["LlamaDecoderLayer"]
    owned = {node.meta["parameter"] for node in layer.nodes if node.op == "placeholder"} - {None}
    assert len(owned) == 9, "seven matrices and two norms"
    backward = [n for n in layer.nodes if n.meta.get("phase") == "backward"]
    saved = {a for n in backward for a in n.all_input_nodes if a.meta.get("phase") == "forward"}
    assert saved, "the backward reads what the forward made"
