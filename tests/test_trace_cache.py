"""Cached graphs: found again without torch, rebuilt when anything is wrong with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paraplan import trace_cache
from paraplan.graph import ModelGraph
from paraplan.models import ModelSource, resolve_model
from paraplan.trace_cache import default_cache_dir, model_graph

TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY))
    return resolve_model(str(folder))


def graph_of(source: ModelSource, cache: Path, **changes: Any) -> ModelGraph:
    asked: dict[str, Any] = {
        "sequence_length": 16,
        "compute_dtype": "bfloat16",
        "tensor_degrees": (1, 2),
    }
    return model_graph(source, cache_dir=cache, **(asked | changes))


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file())


def test_a_second_graph_comes_from_the_cache(source: ModelSource, tmp_path: Path) -> None:
    import paraplan.trace

    first = graph_of(source, tmp_path / "cache")
    assert len(entries(tmp_path / "cache")) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paraplan.trace, "trace_model", None)
        assert graph_of(source, tmp_path / "cache") == first
        assert graph_of(source, tmp_path / "cache", tensor_degrees=(2, 1, 2)) == first
        with pytest.raises(TypeError):  # another question, so it would be traced
            graph_of(source, tmp_path / "cache", sequence_length=8)


@pytest.mark.parametrize(
    "changes",
    [
        {"sequence_length": 8},
        {"compute_dtype": "float32"},
        {"tensor_degrees": (1,)},
    ],
)
def test_the_key_holds_the_question(
    source: ModelSource, tmp_path: Path, changes: dict[str, Any]
) -> None:
    graph_of(source, tmp_path / "cache")
    graph = graph_of(source, tmp_path / "cache", **changes)
    assert len(entries(tmp_path / "cache")) == 2
    assert graph == graph_of(source, tmp_path / "none", **changes)


def test_the_key_holds_versions_and_the_tracer_itself(
    source: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph_of(source, tmp_path)
    monkeypatch.setattr(trace_cache, "version", lambda name: f"{name} of tomorrow")
    graph_of(source, tmp_path)
    monkeypatch.setattr(trace_cache, "source_digest", lambda pattern: "another tracer")
    graph_of(source, tmp_path)
    assert len([e for e in entries(tmp_path) if e.name.startswith("tiny-")]) == 3


@pytest.mark.parametrize("damage", ["truncated", "empty", "other json", "binary", "old format"])
def test_damaged_entries_are_rebuilt(source: ModelSource, tmp_path: Path, damage: str) -> None:
    cache = tmp_path / "cache"
    first = graph_of(source, cache)
    entry = entries(cache)[0]
    whole = entry.read_bytes()
    entry.write_bytes(
        {
            "truncated": whole[: len(whole) // 2],
            "empty": b"",
            "other json": b'{"a": 1}',
            "binary": bytes(range(256)),
            "old format": whole.replace(b'"name"', b'"title"', 1),
        }[damage]
    )
    assert graph_of(source, cache) == first
    assert entry.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_no_error(source: ModelSource, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    assert graph_of(source, tmp_path / "file").parameter_count > 0
    assert (tmp_path / "file").read_text() == "not a directory"


WRITE_AND_READ = """
import sys
from pathlib import Path
from paraplan import trace_cache
path = Path(sys.argv[1])
graph = trace_cache._read(path)
assert graph is not None
for _ in range(30):
    trace_cache._write(path, graph)
    assert trace_cache._read(path) == graph, "half an entry was read"
"""


def test_concurrent_processes(source: ModelSource, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    graph_of(source, cache)
    entry = entries(cache)[0]
    command = [sys.executable, "-c", WRITE_AND_READ, str(entry)]
    workers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
    assert len(entries(cache)) == 1  # no temporary files are left


def test_a_hit_imports_neither_torch_nor_transformers(source: ModelSource, tmp_path: Path) -> None:
    graph_of(source, tmp_path / "paraplan")
    code = (
        "import sys; from paraplan.models import resolve_model;"
        "from paraplan.trace_cache import model_graph;"
        f"graph = model_graph(resolve_model({source.spec!r}), sequence_length=16,"
        " compute_dtype='bfloat16', tensor_degrees=(1, 2));"
        "print(graph.name, [m for m in ('torch', 'transformers', 'networkx') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PARAPLAN_CACHE": str(tmp_path / "paraplan")},
    )
    assert done.stdout.strip() == "tiny []"


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("PARAPLAN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache_dir() == tmp_path / ".cache" / "paraplan"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "paraplan"
    monkeypatch.setenv("PARAPLAN_CACHE", str(tmp_path / "own"))
    assert default_cache_dir() == tmp_path / "own"


def test_callables_are_traced_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cached_factory.py").write_text(
        "import torch\n"
        "made = []\n"
        "class Model(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a = torch.nn.Linear(4, 4)\n"
        "    def forward(self, x):\n"
        "        return self.a(x).sum()\n"
        "def make():\n"
        "    made.append(1)\n"
        "    return Model(), (torch.zeros(1, 4),)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(2):
        model_graph(
            resolve_model("cached_factory:make"),
            sequence_length=4,
            compute_dtype="float32",
            tensor_degrees=(1,),
            cache_dir=tmp_path / "cache",
        )
    import importlib

    assert len(importlib.import_module("cached_factory").made) == 2
    assert not entries(tmp_path / "cache")
